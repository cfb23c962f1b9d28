"""Streams are filtered in constant memory, by example, block or token. Run: pytest tests/data/test_filtering.py"""

import re
import tracemalloc
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from torch.nn import functional as F

from peft_blueprint.data import continue_table, cut_blocks, filter_stream, select_examples, train_briefly
from peft_blueprint.data.filtering import RunningTop
from peft_blueprint.data.tokens import HEAD_SCALARS, head_features
from peft_blueprint.errors import BlueprintError, MismatchError
from peft_blueprint.measure import IGNORED, collate, find_submodules
from peft_blueprint.testing import random_model, tiny_gpt2, tiny_llama, tiny_t5
from tests.choosing import make_rows, model


ROWS = make_rows(20, longest=14)


def filtered(rows, using=None, **options):
    return filter_stream(using or model(), rows, **{"progress": False, "batch_size": 4} | options)


def token_losses(using, row):
    """Loss of every label's position, (T − 1,), with its graph."""
    logits = using(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
    return F.cross_entropy(logits.float(), torch.tensor(row["labels"][1:]), reduction="none", ignore_index=IGNORED)


def norms_by_autograd(using, row, weights):
    """Gradient norm of each target's own loss in some weights together, by position."""
    found = {}
    for position, loss in enumerate(token_losses(using, row), start=1):
        if row["labels"][position] != IGNORED:
            gradients = torch.autograd.grad(loss, weights, retain_graph=True)
            found[position] = float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
    return found


def scaled_llama():
    """A model that scales and bounds its logits after the head."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = Gemma2Config(vocab_size=97, num_hidden_layers=2, final_logit_softcapping=2.0, pad_token_id=0, **sizes)
    return random_model(Gemma2ForCausalLM, config)


@pytest.mark.parametrize("build", [model, tiny_gpt2, scaled_llama])
def test_the_heads_gradient_of_every_token_is_autograds(build):
    """Also with a function after the head; losses are those of the next token, and 0 stands where no target is."""
    using = build()
    head = using.get_output_embeddings()
    using.set_output_embeddings(type(head)(head.in_features, head.out_features, bias=False))  # untie
    torch.nn.init.normal_(using.get_output_embeddings().weight, std=0.3)
    weight = using.get_output_embeddings().weight
    [found], tokens = head_features(using, [collate(ROWS[:4], 0)], size=2)
    assert found.shape == (4, max(len(row["labels"]) for row in ROWS[:4]), len(HEAD_SCALARS) + 2) and tokens
    for features, row in zip(found, ROWS[:4], strict=True):
        expected = norms_by_autograd(using, row, [weight])
        losses = token_losses(using, row).tolist()
        for position in range(len(features)):
            if position not in expected:
                assert not features[position].any()
                continue
            scalars = dict(zip(HEAD_SCALARS, features[position], strict=False))
            assert np.exp(scalars["log head gradient"]) == pytest.approx(expected[position], rel=1e-4)
            assert scalars["loss"] == pytest.approx(losses[position - 1], rel=1e-4)
    assert not using.get_output_embeddings()._forward_hooks


def kept_targets(rows, found):
    """(row, position) of the targets left; the inputs are unchanged."""
    by_ids = {tuple(row["input_ids"]): i for i, row in enumerate(rows)}
    kept = set()
    for row in found:
        i = by_ids[tuple(row["input_ids"])]
        for position, label in enumerate(row["labels"]):
            if label != IGNORED:
                assert label == rows[i]["labels"][position]
                kept.add((i, position))
    return kept


def highest(scores, share):
    ordered = sorted(scores, key=scores.__getitem__, reverse=True)
    return set(ordered[: round(share * len(ordered))])


@pytest.mark.parametrize("method", ["norm", "norm_low", "head_norm", "loss", "loss_low"])
def test_the_tokens_kept_are_those_that_autograd_ranks_highest(method):
    """In one chunk the share is exact. "norm" counts every submodule, "head_norm" the head's weight."""
    using = model()
    names = {submodule.name for submodule in find_submodules(using)}
    every = [parameter for name, parameter in using.named_parameters() if name.removesuffix(".weight") in names]
    weights = [using.lm_head.weight] if method == "head_norm" else every
    scores = {}
    for i, row in enumerate(ROWS):
        losses = token_losses(using, row).tolist()
        norms = norms_by_autograd(using, row, weights) if "norm" in method else {}
        for position in range(1, len(row["labels"])):
            if row["labels"][position] != IGNORED:
                scores[i, position] = norms.get(position, losses[position - 1]) * (-1 if "low" in method else 1)
    stream = filtered(iter(ROWS), using, unit="token", fraction=0.3, method=method)
    kept = kept_targets(ROWS, stream)
    assert len(kept ^ highest(scores, 0.3)) <= 2  # a bin is 0.02 % wide
    assert stream.report["kept"] == len(kept) and stream.report["units"] == len(scores)
    assert stream.report["share"] == pytest.approx(0.3, abs=0.02)


def test_masked_rows_train_on_the_kept_tokens_alone():
    """The loss of a row is the mean of its kept tokens' own losses."""
    using = model()
    for row in islice(filtered(ROWS, using, unit="token", fraction=0.5, method="head_norm"), 3):
        whole = next(one for one in ROWS if one["input_ids"] == row["input_ids"])
        losses = token_losses(using, whole)
        kept = [losses[i - 1] for i, label in enumerate(row["labels"]) if label != IGNORED]
        loss = using(**collate([row], 0)).loss.item()
        assert loss == pytest.approx(torch.stack(kept).mean().item(), rel=1e-4)


def trained_on_half():
    """Rows in which every second token is always the same at its place, and a model that knows these."""
    generator, using = np.random.default_rng(0), tiny_llama(layers=1)
    rows = []
    for _ in range(60):
        ids = [int(i) for i in generator.integers(20, 97, 12)]
        ids[1::2] = range(1, 7)
        rows.append({"input_ids": ids, "labels": ids})
    train_briefly(using, rows, 60, batch_size=8, pad_token_id=0, learning_rate=0.01)
    return using, rows


def test_algorithm_2_predicts_tokens_from_one_of_a_few_examples():
    """Far cheaper than measuring each, and ordered alike on a model that has learned some of them."""
    using, rows = trained_on_half()
    exact = filtered(rows, using, unit="token", fraction=0.3, method="norm")
    truth = kept_targets(rows, exact)
    predicted = filtered(rows, using, unit="token", fraction=0.3, method="predicted_norm", small=40)
    found = kept_targets(rows, predicted)
    assert len(found & truth) / len(truth) > 0.6  # 0.3 by chance
    assert predicted.report["predictor"]["measured"] == 40
    assert predicted.report["cost"]["flops"] < 0.5 * exact.report["cost"]["flops"]
    few = filtered(rows[:17], using, unit="token", fraction=0.3, method="predicted_norm", small=30)
    assert len(kept_targets(rows, few)) == 56 and "only 17 examples have a target" in few.fallbacks[0]


def test_a_stream_of_examples_keeps_a_share_of_the_highest():
    """As many as the fraction, in their order, with scores when asked; the first chunk exactly."""
    rows = make_rows(32)
    whole = select_examples(model(), rows, fraction=0.25, method="norm", deduplicate=False, progress=False)
    stream = filtered(iter(rows), fraction=0.25, method="norm", with_scores=True)
    found = list(stream)
    assert tuple(row["selection_index"] for row in found) == whole.indices
    assert [row["selection_score"] for row in found] == pytest.approx(whole.scores, rel=1e-3)
    assert found[0]["input_ids"] == rows[whole.indices[0]]["input_ids"] and stream.report["kept"] == 8
    low = list(filtered(iter(rows), fraction=0.25, method="norm_low"))
    assert not {tuple(row["input_ids"]) for row in low} & {tuple(row["input_ids"]) for row in found}


def test_memory_stays_constant_on_a_long_stream():
    """Of rows that are dropped nothing is held, and the share is met."""

    def rows():
        for i in range(2000):
            ids = [1 + (i * 7 + j) % 90 for j in range(40)]
            yield {"input_ids": ids, "labels": ids}

    stream = filter_stream(None, rows(), fraction=0.3, method="random", progress=False)
    iterator, count = iter(stream), 0
    next(iterator)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in iterator:
        count += 1
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 0.26 < count / 2000 < 0.34 and held < 1e6


@pytest.mark.parametrize("unit", ["example", "token"])
def test_a_killed_run_goes_on_where_it_stopped(tmp_path, unit):
    """With the rows written so far, and the same result; a finished one yields nothing more."""
    options = {"unit": unit, "fraction": 0.4, "method": "head_norm" if unit == "token" else "norm", "state_every": 4}
    options |= {"batch_size": 1, "keep_state": tmp_path / "state"}
    rows = make_rows(40)
    continue_table(tmp_path / "whole.jsonl", filtered(iter(rows), **options | {"keep_state": None}))

    class Killed(Exception):
        pass

    def broken():
        yield from rows[:29]
        raise Killed

    out = tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        continue_table(out, filtered(broken(), **options))
    assert not out.exists()
    again = filtered(iter(rows), **options)
    assert again.resumed > 0
    continue_table(out, again, again.resumed)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    done = filtered(iter(rows), **options)
    continue_table(out, done, done.resumed)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and done.report["rows"] == done.resumed
    with pytest.raises(MismatchError, match="holds the state of other work"):
        filtered(iter(rows), **options | {"fraction": 0.5})
    with pytest.raises(BlueprintError, match=r"counts \d+ rows written, but .*other.jsonl.part has 0"):
        continue_table(tmp_path / "other.jsonl", done, done.resumed)


def test_the_highest_share_of_a_stream_is_kept_for_any_numbers():
    """Positive and negative, of any size; the share of all converges however they are chunked."""
    values = np.random.default_rng(0).normal(size=5000) * np.logspace(-3, 3, 5000)
    whole = RunningTop().keep(values, 0.2)
    assert 1000 <= whole.sum() <= 1003 and values[whole].min() >= np.sort(values)[-1000] * (1 - 2**-11)
    top, shuffled = RunningTop(), np.random.default_rng(1).permutation(values)
    kept = np.concatenate([top.keep(part, 0.2) for part in np.array_split(shuffled, 80)])
    assert kept.mean() == pytest.approx(0.2, abs=0.02)
    resumed = RunningTop(top.bins, top.counts)
    assert resumed.keep(np.array([-1e9, 1e9]), 0.2).tolist() == [False, True] and top.counts.sum() == 5000
    assert resumed.keep(np.zeros(0), 0.2).tolist() == []


def test_blocks_hold_every_token_once():
    """In order, of each document alone or joined; by position and as a stream alike, and from a `datasets` stream."""
    documents = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for n in (7, 2, 9, 1, 4) for ids in [list(range(n))]]
    documents[3] = {"input_ids": [5, 6], "labels": [-100, -100]}  # no target: left out
    alone, packed = (cut_blocks(documents, size=4, pack=pack) for pack in (False, True))
    assert [(len(b["input_ids"]), b["document"], b["start"]) for b in alone] == [
        *[(4, 0, 0), (3, 0, 4), (2, 1, 0), (4, 2, 0), (4, 2, 4), (1, 2, 8), (4, 4, 0)]
    ]
    assert [len(block["input_ids"]) for block in packed] == [4, 4, 4, 4, 4, 2]
    assert [(b["document"], b["start"]) for b in packed] == [(0, 0), (0, 4), (1, 1), (2, 3), (2, 7), (4, 2)]
    joined = [i for document in documents if document["labels"][-1] >= 0 for i in document["input_ids"]]
    for blocks, pack in ((alone, False), (packed, True)):
        assert [i for block in blocks for i in block["input_ids"]] == joined
        assert list(cut_blocks(iter(documents), size=4, pack=pack)) == list(blocks)
        assert blocks[-1] == blocks[len(blocks) - 1] == list(blocks)[-1]
        with pytest.raises(IndexError):
            blocks[len(blocks)]
    streamed = cut_blocks(IterableDataset.from_generator(lambda: iter(documents)), size=4)
    assert list(streamed) == list(streamed) == list(alone)


def test_the_blocks_of_the_least_gradient_are_dropped():
    """A block's score is the gradient norm of its own mean loss by autograd, from a list and from a stream."""
    using = model()
    documents = make_rows(6, longest=60)
    names = {submodule.name for submodule in find_submodules(using)}
    weights = [parameter for name, parameter in using.named_parameters() if name.removesuffix(".weight") in names]
    blocks = cut_blocks(documents, size=8)
    norms = {}
    for i, block in enumerate(blocks):
        if target_positions_of(block):
            gradients = torch.autograd.grad(using(**collate([block], 0)).loss, weights)
            norms[i] = float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
    found = select_examples(
        using, blocks, fraction=0.5, method="norm", max_length=8, deduplicate=False, progress=False
    )
    assert set(found.indices) == highest(norms, len(found) / len(norms))
    assert [found.all_scores[i] for i in norms] == pytest.approx(list(norms.values()), rel=1e-3)
    rows = found.apply(blocks)
    assert [row["start"] % 8 for row in rows] == [0] * len(rows) and rows[0]["input_ids"] == blocks[found.indices[0]][
        "input_ids"
    ]
    streamed = list(filtered(cut_blocks(iter(documents), size=8), using, fraction=0.5, method="norm", max_length=8))
    assert [(row["document"], row["start"]) for row in streamed] == [
        (blocks[i]["document"], blocks[i]["start"]) for i in sorted(highest(norms, 0.5))
    ]


def target_positions_of(block):
    return [i for i, label in enumerate(block["labels"]) if i and label != IGNORED]


def test_bad_requests_are_refused():
    """The error says how to fix it."""
    for message, options in [
        ("A stream is filtered by a fraction in (0, 1], got fraction=None, count=3", {"count": 3}),
        ("Tokens cannot be scored by method='length'. Choose from random", {"unit": "token", "method": "length"}),
        ("Tokens cannot be scored by method='iterative'", {"unit": "token", "method": "iterative"}),
        ("method='head_norm' is of single tokens", {"method": "head_norm"}),
        ("unit must be one of example, token, got 'block'", {"unit": "block"}),
        ("Rows of tokens have no single score", {"unit": "token", "with_scores": True}),
        ("predicted from the model's features", {"unit": "token", "method": "predicted_norm", "features": "tokens"}),
        ("cannot take a stream", {"method": "coreset_k_centre"}),
    ]:
        with pytest.raises(BlueprintError, match=re.escape(message)):
            filtered(ROWS, **{"fraction": 0.5} | options if "count" not in options else options)
    with pytest.raises(BlueprintError, match="causal language models, got T5"):
        list(filtered(ROWS, tiny_t5(), unit="token", fraction=0.5, method="loss"))
    with pytest.raises(BlueprintError, match="size must be at least 2"):
        cut_blocks(ROWS, size=1)
    with pytest.raises(BlueprintError, match="None of 1 documents has a target"):
        cut_blocks([{"input_ids": [5, 6], "labels": [-100, -100]}])


def test_the_first_layers_score_tokens_too():
    """As a model of that depth does."""
    using, options = tiny_llama(layers=3), {"unit": "token", "fraction": 0.3, "method": "head_norm"}
    weights, short = using.state_dict(), tiny_llama(layers=1)
    short.load_state_dict({key: weights[key] for key in short.state_dict()})
    cut = kept_targets(ROWS, filtered(ROWS, using, scorer_layers=1, **options))
    assert cut == kept_targets(ROWS, filtered(ROWS, short, **options))
    assert cut != kept_targets(ROWS, filtered(ROWS, using, **options))
