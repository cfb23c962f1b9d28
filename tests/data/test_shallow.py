"""A model's first layers score for the whole. Run: pytest tests/data/test_shallow.py"""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_blueprint import measure_influence
from peft_blueprint.data import first_layers, select_examples
from peft_blueprint.errors import BlueprintError, MismatchError
from peft_blueprint.measure import collate
from peft_blueprint.testing import tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5
from tests.choosing import choose, make_rows


ROWS = make_rows(12)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_mixtral])
def test_the_first_layers_are_a_model_of_that_depth(build):
    """Its losses are those of a model built with that many layers; afterwards it is whole."""
    whole, batch = build(layers=3), collate(ROWS[:4], 0)
    short = build(layers=2)
    weights = whole.state_dict()
    short.load_state_dict({key: weights[key] for key in short.state_dict()})
    with torch.no_grad(), first_layers(whole, 2) as cut:
        assert torch.equal(cut(**batch).logits, short(**batch).logits)
    assert list(whole.state_dict()) == list(weights)


def test_adapted_models_are_cut_and_errors_restore():
    """Through PEFT's wrapping; an error inside of the `with` leaves the model whole."""
    adapted = get_peft_model(tiny_llama(layers=3), LoraConfig(target_modules=["q_proj"]))
    names = list(adapted.state_dict())
    with pytest.raises(RuntimeError, match="midway"), first_layers(adapted, 1) as cut:
        assert sum(".layers." in name for name in cut.state_dict()) == sum(".layers.0." in name for name in names)
        raise RuntimeError("midway")
    assert list(adapted.state_dict()) == names


def test_models_without_one_stack_are_refused():
    """And numbers of layers that it does not have."""
    for model, layers, message in [
        (tiny_t5(), 1, "one stack of layers to cut, got 2: 'encoder.block', 'decoder.block'"),
        (nn.Linear(2, 2), 1, "one stack of layers to cut, got 0"),
        (tiny_llama(layers=3), 4, "layers must be an integer from 1 to 3, the model's layers, got 4"),
        (tiny_llama(layers=3), 0, "from 1 to 3"),
    ]:
        with pytest.raises(BlueprintError, match=message), first_layers(model, layers):
            raise AssertionError("it was cut")


def test_examples_are_scored_by_the_first_layers():
    """With their scores and at their cost; the whole model comes back."""
    model = tiny_llama(layers=4)
    with first_layers(model, 1) as cut:
        expected = measure_influence(cut, [collate([row], 0) for row in ROWS], progress=False).example_norms.numpy()
    whole = choose(ROWS, model, count=4, method="norm")
    found = choose(ROWS, model, count=4, method="norm", scorer_layers=1)
    assert found.all_scores == pytest.approx(expected, rel=1e-3)
    assert found.indices == tuple(sorted(np.argsort(-expected)[:4].tolist()))
    blocks, head = (
        sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() > 1),
        model.lm_head.weight.numel(),
    )
    costs = [one.report["cost"]["parameters"] for one in (found, whole)]
    assert costs == [blocks + head, 4 * blocks + head] and len(model.model.layers) == 4
    assert found.settings["scorer_layers"] == 1 and "scorer_layers" not in whole.settings


def test_submodules_above_the_first_layers_do_not_count():
    """A note says how many; if all are above, that is an error."""
    names = ["model.layers.0.mlp.up_proj", "model.layers.3.mlp.up_proj"]
    found = choose(ROWS, tiny_llama(layers=4), count=4, method="norm", submodules=names, scorer_layers=2)
    alone = choose(ROWS, tiny_llama(layers=2), count=4, method="norm", submodules=names[:1])
    assert found.settings["submodules"] == 1 and found.fallbacks[0].startswith("1 submodules above the first 2 layers")
    assert len(alone) == 4
    with pytest.raises(MismatchError, match=r"All 1 submodules .* above the first 2 layers .* Increase scorer_layers"):
        choose(ROWS, tiny_llama(layers=4), count=4, method="norm", submodules=names[1:], scorer_layers=2)


def test_methods_that_run_no_model_refuse_scorer_layers():
    """As does "iterative", which trains it."""
    for method in ("random", "iterative"):
        with pytest.raises(BlueprintError, match="does not score with a part of the model"):
            select_examples(tiny_llama(), ROWS, count=2, method=method, scorer_layers=1, progress=False)
