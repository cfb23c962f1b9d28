"""Examples are chosen from lists, datasets and streams. Run: pytest tests/data/test_select.py"""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

from peft_blueprint import measure_influence, plan_placement
from peft_blueprint.data.examples import Pool
from peft_blueprint.data.scoring import ExampleScorer
from peft_blueprint.data.select import select_examples
from peft_blueprint.errors import BlueprintError, FormatError, MeasurementError, MismatchError
from peft_blueprint.measure import collate
from peft_blueprint.measure.submodules import find_submodules
from peft_blueprint.testing import save_tiny_model, tiny_llama
from tests.choosing import choose, make_rows, model


def norms_of(rows, submodules=None):
    influence = measure_influence(model(), [collate([row], 0) for row in rows], progress=False, projection_size=0)
    kept = [i for i, s in enumerate(influence.submodules) if submodules is None or s.name in submodules]
    return torch.linalg.vector_norm(influence.norms[kept], dim=0).numpy()


def top(scores, count):
    return tuple(sorted(np.argsort(-np.asarray(scores), kind="stable")[:count].tolist()))


POOL = make_rows(40)
NAMES = [submodule.name for submodule in find_submodules(model())]


def test_norm_keeps_the_largest_gradients():
    """In the data's order, with their scores; "norm_low" keeps the smallest."""
    norms = norms_of(POOL)
    found = choose(POOL, fraction=0.25, method="norm")
    assert found.indices == top(norms, 10) and found.scores == pytest.approx(norms[list(found.indices)], rel=1e-3)
    assert found.all_scores == pytest.approx(norms, rel=1e-3)
    assert choose(POOL, count=10, method="norm_low").indices == top(-norms, 10)
    assert found.report["chosen"] == len(found) == 10 and found.report["usable"] == 40


def test_only_gradients_of_the_placements_submodules_count(blueprint):
    """Given as names or as a placement for this model."""
    name = "model.layers.1.mlp.up_proj"
    found = choose(POOL, count=10, method="norm", submodules=[name])
    assert found.all_scores == pytest.approx(norms_of(POOL, [name]), rel=1e-3)
    placement = plan_placement(blueprint, num_modules=6)
    rows = make_rows(12)
    deep = select_examples(tiny_llama(layers=12), rows, count=3, method="norm", placement=placement, progress=False)
    assert deep.settings["submodules"] == 6
    with pytest.raises(MismatchError, match=r"of 6 submodules are not in this model"):
        choose(POOL, count=10, method="norm", placement=placement)


@pytest.mark.parametrize("features", ["model", "tokens"])
def test_algorithm_2_measures_a_few_and_predicts_all(features):
    """It costs a fraction of measuring all, reports the rank correlation, agrees with the true norms far better than chance, and measures nothing twice."""
    rows = make_rows(120, longest=60)
    norms = norms_of(rows)
    found = choose(rows, count=30, method="predicted_norm", small=40, features=features)
    assert len(set(found.indices) & set(top(norms, 30))) >= 14  # 7.5 by chance
    cost, predictor = found.report["cost"], found.report["predictor"]
    assert predictor["measured"] == 40 and predictor["rank_correlation"] > 0.4
    assert cost["measured_tokens"] < 0.45 * found.report["tokens"]
    assert (cost["forward_tokens"] > 0) == (features == "model")
    passes = cost["parameters"] + cost["backward_parameters"]
    assert cost["flops"] == 2 * (cost["parameters"] * cost["forward_tokens"] + passes * cost["measured_tokens"])
    assert cost["share_of_measuring_all"] < 1


def test_the_last_submodules_alone_cost_less():
    """Gradients of the last block's submodules need no backward pass through earlier blocks, as the FLOPs show."""
    layers = len(model().model.layers)
    last = [name for name in NAMES if f".{layers - 1}." in name]
    whole, part = (choose(POOL, count=6, method="norm", submodules=names).report["cost"] for names in (None, last))
    assert whole["backward_parameters"] == whole["parameters"] == part["parameters"]
    of_blocks = whole["parameters"] - model().lm_head.weight.numel()
    assert part["backward_parameters"] == whole["parameters"] - of_blocks * (layers - 1) // layers
    assert part["flops"] < whole["flops"]


def test_alignment_chooses_examples_like_the_target():
    """From a pool of two kinds of text, measured or predicted."""
    rows = [row for pair in zip(make_rows(30, 1, 1, 20), make_rows(30, 2, 60, 97), strict=True) for row in pair]
    for aims, wanted in ((make_rows(8, 3, 1, 20), 0), (make_rows(8, 4, 60, 97), 1)):
        for options in ({"precondition": "blocks"}, {"similarity": "dot"}, {}):
            found = choose(rows, count=15, method="alignment", target=aims, **options)
            assert sum(index % 2 == wanted for index in found.indices) >= 11, options
    found = choose(rows, count=15, method="predicted_alignment", target=aims, small=24)
    assert sum(index % 2 == 1 for index in found.indices) >= 12


def test_length_loss_and_bm25_rank_as_named():
    """Length counts targets, loss is the model's, BM25 counts shared words; ties go to the earlier."""
    lengths = [len(row["labels"]) - 3 for row in POOL]
    assert choose(POOL, count=7, method="length").indices == top(lengths, 7)
    assert choose(POOL, count=7, method="length_short").indices == top([-x for x in lengths], 7)
    with torch.no_grad():
        losses = [float(model()(**collate([row], 0)).loss) for row in POOL]
    assert choose(POOL, count=7, method="loss").indices == top(losses, 7)
    assert choose(POOL, count=7, method="loss_low").indices == top([-x for x in losses], 7)
    assert choose(POOL, count=1, method="bm25", target=[POOL[11]]).indices == (11,)


def test_random_is_a_uniform_sample_fixed_by_the_seed():
    """The same for a list and a stream."""
    counts = np.zeros(20)
    for seed in range(200):
        counts[list(choose(POOL[:20], count=5, seed=seed, deduplicate=False).indices)] += 1
    assert np.abs(counts / 200 - 0.25).max() < 0.13
    assert choose(POOL, count=5, seed=1).indices == choose(iter(POOL), count=5, seed=1).indices
    assert select_examples(None, POOL, count=5, progress=False).indices == choose(POOL, count=5).indices


@pytest.mark.parametrize("method", ["coreset_k_centre", "coreset_facility"])
def test_a_coreset_has_one_of_each_kind(method):
    """Four choices from four groups of similar examples take one of each."""
    groups = [make_rows(1, seed, 1 + 24 * seed, 24 * seed + 24)[0] for seed in range(4)]
    rows = []
    for i in range(16):
        row = {key: list(value) for key, value in groups[i % 4].items()}
        row["input_ids"][4] = row["labels"][4] = 1 + (row["input_ids"][4] + i) % 96
        rows.append(row)
    found = choose(rows, count=4, method=method, deduplicate=False)
    assert sorted(index % 4 for index in found.indices) == [0, 1, 2, 3]
    assert sorted(found.scores) == [-3, -2, -1, 0] and found.all_scores is None


def test_iterating_trains_between_choices_and_restores_the_model():
    """By LoRA or an own function: scores are the trained model's; weights, flags and random numbers are restored."""
    using = model().train()
    using.model.layers[0].requires_grad_(False)
    before = {key: value.clone() for key, value in using.state_dict().items()}
    flags = [parameter.requires_grad for parameter in using.parameters()]
    modules, attributes, random = list(using.modules()), set(vars(using)), torch.random.get_rng_state()
    seen = []

    def train(inner, rows):
        seen.append(len(rows))
        torch.rand(1)
        for parameter in inner.parameters():
            parameter.data += 0.05

    once = choose(POOL, using, count=8, method="predicted_norm", small=20)
    found = choose(POOL, using, count=8, method="iterative", small=20, train_steps=3)
    own = choose(POOL, using, count=8, method="iterative", small=20, train=train)
    assert found.report["cost"]["trained_tokens"] > 0 and seen == [8]
    assert not np.allclose(found.all_scores, once.all_scores) and not np.allclose(own.all_scores, once.all_scores)
    assert any("not counted" in said for said in own.fallbacks)
    assert all(torch.equal(value, before[key]) for key, value in using.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in using.parameters()]
    assert modules == list(using.modules()) and attributes == set(vars(using)) and using.training
    assert torch.equal(random, torch.random.get_rng_state())
    with pytest.raises(RuntimeError, match="enough"):
        choose(POOL, using, count=8, method="iterative", small=20, train=lambda inner, rows: fail(inner))
    assert all(torch.equal(value, before[key]) for key, value in using.state_dict().items())


def fail(inner):
    inner.model.norm.weight.data.zero_()
    raise RuntimeError("enough")


def test_near_duplicates_do_not_fill_a_selection():
    """Ten copies of the longest example are chosen once; the others are counted."""
    longest = make_rows(1, seed=9, longest=9)[0]["input_ids"] * 6
    rows = [{"input_ids": longest[i % 2 :], "labels": longest[i % 2 :]} for i in range(10)] + POOL
    found = choose(rows, count=5, method="length")
    assert found.report["duplicates"] == 9 and found.indices[0] == 0 and all(i >= 10 for i in found.indices[1:])
    stream = choose(iter(rows), count=5, method="length")
    assert (stream.indices, stream.report["duplicates"]) == (found.indices, 9)
    few = choose(rows[:10], count=5, method="length")
    assert few.indices == (0,) and "1 examples were chosen instead of 5" in few.fallbacks[0]
    assert len(choose(rows, count=6, method="coreset_k_centre", small=4)) == 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), layers=2)


def test_a_dataset_goes_in_and_a_dataset_comes_out(folder):
    """With all its columns under their own names, and scores as columns on request."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = np.random.default_rng(0)
    texts = [" ".join(map(str, generator.integers(0, 90, 4 + i % 7))) for i in range(30)]
    table = Dataset.from_dict({"question": texts, "answer": texts[::-1], "kept": list(range(30))})
    columns = {"prompt": "question", "completion": "answer"}
    found = choose(table, fraction=0.2, method="loss", tokenizer=tokenizer, columns=columns)
    chosen = found.apply(table)
    assert isinstance(chosen, Dataset) and chosen["kept"] == list(found.indices) and len(chosen) == 6
    scored = found.apply(table, with_scores=True)
    assert scored["selection_score"] == list(found.scores) and scored["selection_index"] == list(found.indices)
    as_list = found.apply([dict(row) for row in table], with_scores=True)
    assert as_list == [dict(row) for row in scored]
    stream = IterableDataset.from_generator(lambda: iter(table))
    from_stream = choose(stream, count=6, method="loss", tokenizer=tokenizer, columns=columns)
    assert from_stream.indices == found.indices and [row["kept"] for row in from_stream.rows] == chosen["kept"]
    assert from_stream.apply(with_scores=True) == as_list and found.apply(stream) == from_stream.apply()
    with pytest.raises(BlueprintError, match="has 'selection_index' and 'selection_score' already|already"):
        found.apply(Dataset.from_list(list(scored) * 5), with_scores=True)
    with pytest.raises(MismatchError, match="of 30 examples, the dataset has 6"):
        found.apply(chosen)
    with pytest.raises(BlueprintError, match="apply needs the dataset"):
        found.apply()
    json.dumps(found.to_dict(), allow_nan=False)
    target = [{"prompt": "5 5", "completion": texts[0]}]  # under other names than the data
    assert len(choose(table, count=3, method="bm25", tokenizer=tokenizer, columns=columns, target=target)) == 3
    chats = [{"text": text} for text in texts]
    assert choose(chats, count=3, method="length", tokenizer=tokenizer).report["usable"] == 30
    with pytest.raises(BlueprintError, match="Pass the model's tokenizer"):
        choose(table, count=3, columns=columns)


@pytest.mark.parametrize("method", ["norm", "predicted_norm", "alignment", "length"])
def test_a_stream_and_a_list_agree(method):
    """The same indices, scores and rows."""
    options = {"count": 6, "method": method, "small": 20, "target": make_rows(4, seed=8)}
    whole, stream = choose(POOL, **options), choose((row for row in POOL), **options)
    assert stream.indices == whole.indices and stream.scores == pytest.approx(whole.scores, rel=1e-4)
    assert stream.rows == tuple(POOL[i] for i in whole.indices)


def test_the_memory_of_a_stream_does_not_grow_with_it():
    """Four times as many examples take no more memory."""

    def peak(n):
        rows = ({"input_ids": [1 + i % 90, *range(1, 60)], "labels": [1] * 60} for i in range(n))
        tracemalloc.start()
        select_examples(None, rows, count=5, deduplicate=False, progress=False)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(200)
    assert peak(4000) < 1.2 * peak(1000)


class Killed(BaseException):
    """Stands in for a signal."""


@pytest.mark.parametrize(
    ("method", "form"), [("norm", list), ("norm", iter), ("predicted_norm", iter), ("alignment", list)]
)
def test_a_run_that_was_killed_is_resumed_to_the_same_selection(tmp_path, monkeypatch, method, form):
    """Without measuring much twice; a finished run answers at once."""
    path = tmp_path / "state"
    options = {"count": 6, "method": method, "small": 16, "target": make_rows(4, seed=8)}
    options |= {"batch_size": 1, "state_every": 8}
    whole = choose(form(POOL), **options)
    together, calls = ExampleScorer.distribute, []

    def dying(*arguments):
        calls.append(0)
        if len(calls) == (7 if method == "predicted_norm" else 3):
            raise Killed
        return together(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(ExampleScorer, "distribute", dying)
        with pytest.raises(Killed):
            choose(form(POOL), **options, keep_state=path)
    assert list(tmp_path.iterdir()) == [path]
    resumed = choose(form(POOL), **options, keep_state=path)
    again = choose(form(POOL), **options, keep_state=path)
    for other in (resumed, again):
        assert (other.indices, other.scores, other.rows) == (whole.indices, whole.scores, whole.rows)
        for key in ("measured_tokens", "forward_tokens"):
            assert other.report["cost"][key] <= whole.report["cost"][key]
        assert other.report["usable"] == 40


def test_state_of_other_settings_or_data_is_refused(tmp_path):
    """Other settings, model or data, less data, or a file of another kind; the file stays."""
    path = tmp_path / "state"
    options = {"count": 6, "method": "norm", "keep_state": path}
    choose(iter(POOL), **options)
    content = path.read_bytes()
    with pytest.raises(MismatchError, match="holds the state of other work: count was 6 and is 7"):
        choose(iter(POOL), **options | {"count": 7})
    with pytest.raises(MismatchError, match="model was"):
        choose(iter(POOL), tiny_llama(layers=2, seed=1), **options)
    with pytest.raises(MismatchError, match="The first 40 examples differ from those of the kept state"):
        choose(iter([POOL[1], POOL[0], *POOL[2:]]), **options)
    with pytest.raises(MismatchError, match="covers 40 examples, and the data has only 30"):
        choose(iter(POOL[:30]), **options)
    assert path.read_bytes() == content
    path.write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(FormatError, match="is not a state file to resume from"):
        choose(iter(POOL), **options)
    longer = tmp_path / "longer"
    choose(iter(POOL[:30]), **options | {"keep_state": longer})
    assert (
        choose(iter(POOL), **options | {"keep_state": longer}).indices
        == choose(POOL, **options | {"keep_state": None}).indices
    )
    with pytest.raises(BlueprintError, match="keep_state cannot store these examples"):
        choose(iter([{**POOL[0], "date": {1}}]), count=1, keep_state=tmp_path / "new")


def test_examples_without_targets_are_left_out_and_counted():
    """If all lack one it is an error; if too few are left, all are chosen and the shortfall is reported."""
    bare = {"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}
    found = choose([bare, *POOL[:5], bare], count=6, method="norm")
    assert found.indices == (1, 2, 3, 4, 5) and found.report["without_targets"] == 2
    assert found.fallbacks == ("5 examples were chosen instead of 6: 2 of 7 have no target",)
    assert np.isnan(found.all_scores[[0, 6]]).all() and found.report["usable"] == 5
    for rows in ([bare, bare], iter([bare, bare])):
        with pytest.raises(BlueprintError, match="None of 2 examples has a target"):
            choose(rows, count=1)
    with pytest.raises(BlueprintError, match="No example of the target set has a target token"):
        choose(POOL, count=1, method="alignment", target=[bare])
    cut = choose(POOL, count=2, method="length", max_length=4)
    assert set(cut.scores) == {1.0}


def test_too_few_examples_to_predict_are_all_measured():
    """And the fallback is reported."""
    found = choose(POOL[:31], count=5, method="predicted_norm", small=30)
    assert "predictor" in found.report
    few = choose(POOL[:12], count=5, method="predicted_norm", small=30)
    assert few.indices == choose(POOL[:12], count=5, method="norm").indices
    assert "all were measured, none predicted" in few.fallbacks[0] and "predictor" not in few.report
    stream = choose(iter(POOL[:12]), count=5, method="predicted_norm", small=30)
    assert stream.indices == few.indices and stream.fallbacks == few.fallbacks


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (POOL, {}, "Give either fraction or count, got fraction=None, count=None"),
        (POOL, {"fraction": 0.1, "count": 2}, "Give either fraction or count"),
        (POOL, {"fraction": 0.0}, "fraction must be a number in .0, 1., got 0.0"),
        (POOL, {"fraction": 1.5}, "fraction must be a number in .0, 1., got 1.5"),
        (POOL, {"fraction": float("nan")}, "fraction must be a number in .0, 1., got nan"),
        (POOL, {"count": 0}, "count must be at least 1, got 0"),
        (POOL, {"count": 1, "method": "best"}, "method must be one of random, .*iterative, got 'best'"),
        (POOL, {"count": 1, "method": "alignment"}, "method='alignment' needs a target"),
        (POOL, {"count": 1, "method": "bm25"}, "Give target="),
        (POOL, {"count": 1, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        (POOL, {"count": 1, "small": 0}, "small must be at least 1, got 0"),
        (POOL, {"count": 1, "max_length": 1}, "max_length must be at least 2, got 1"),
        (
            POOL,
            {"count": 1, "method": "predicted_norm", "features": "text"},
            "features must be one of model, tokens, got 'text'",
        ),
        (
            POOL,
            {"count": 1, "method": "predicted_norm", "small": 8},
            "small must be at least 16 for a prediction, got 8",
        ),
        (POOL, {"count": 1, "method": "norm", "submodules": ["nowhere"]}, "1 of 1 submodules are not in this model"),
        (POOL, {"count": 1, "method": "norm", "submodules": []}, "no names given"),
        (POOL, {"count": 1, "method": "norm", "submodules": "nowhere"}, "must be a list of names, got 'nowhere'"),
        (POOL, {"count": 1, "method": "iterative", "keep_state": Path("x")}, "cannot be resumed"),
        (iter(POOL), {"fraction": 0.5}, "no known length"),
        (iter(POOL), {"count": 1, "method": "coreset_facility"}, "cannot take a stream"),
        (iter(POOL), {"count": 1, "method": "iterative"}, "cannot take a stream"),
        ([], {"count": 1}, "The dataset is empty"),
        (iter([]), {"count": 1}, "None of 0 examples"),
        ("file.jsonl", {"count": 1}, "dataset must be a list .* got str"),
        ({"train": POOL}, {"count": 1}, "dataset must be a list .* got dict with keys 'train'"),
        ([3], {"count": 1}, "Example 0 must be a mapping .* got int"),
        ([{"question": "?"}], {"count": 1}, "Example 0 must have prompt and completion, .* it has 'question'"),
        ([{"text": 5}], {"count": 1}, "'text' of example 0 must be text, got int"),
        ([{"input_ids": [1, 2], "labels": [1]}], {"count": 1}, "of one length, got 2 and 1"),
    ],
)
def test_bad_options_and_data_are_refused(rows, options, message):
    """Before anything is measured."""
    with pytest.raises(BlueprintError, match=message):
        choose(rows, **options)


def test_scores_that_are_not_finite_are_refused():
    """From losses and gradients; and methods that run a model need one."""
    broken = model()
    broken.model.layers[1].mlp.down_proj.weight.data[:] = torch.nan
    for method in ("loss", "norm"):
        with pytest.raises(MeasurementError, match="NaN"):
            choose(POOL, broken, count=3, method=method)
    candidates = [Pool(POOL).encode(i, POOL[i]) for i in range(4)]
    with pytest.raises(MeasurementError, match="Scores must be finite; 4 of 4 are not, the first of example 0"):
        ExampleScorer(model(), None, 4, 0, 0, None).distribute(lambda some: np.full(len(some), np.inf), candidates)
    with pytest.raises(BlueprintError, match="method='loss' runs the model"):
        select_examples(None, POOL, count=3, method="loss")
