"""Self-attention, cross-attention and feed-forward blocks are unfrozen apart from each other."""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from peft_blueprint import Blueprint, BlueprintConfig, plan_placement
from peft_blueprint.measure import find_submodules
from peft_blueprint.testing import tiny_t5


CROSS = "decoder.block.{}.layer.1.EncDecAttention"


@pytest.fixture
def blueprint():
    """The paper's translation example: cross-attention in later layers has the largest gradients."""
    entries = find_submodules(tiny_t5())
    norms = [1.0 + 5.0 * ("EncDec" in e.name) + e.depth for e in entries]
    return Blueprint("org/t5", tuple(replace(e, gradient_norm=n) for e, n in zip(entries, norms, strict=True)))


@pytest.mark.parametrize("level", ["submodule", "group"])
def test_cross_attention_is_unfrozen_alone(blueprint, level):
    """Without the self-attention of its block, from either level of the file."""
    given = blueprint if level == "submodule" else blueprint.coarsen("group")
    wish = {"mode": "unfreeze", "rank_by": "gradient_norm", "coverage": "none"}
    placement = plan_placement(given, tiny_t5(), num_modules=2, **wish)
    assert placement.unfreeze == (CROSS.format(0), CROSS.format(1)) and placement.candidates == 10
    assert plan_placement(given, tiny_t5(), num_modules=1, **wish).unfreeze == (CROSS.format(1),)


def test_training_it_moves_nothing_else(blueprint):
    """Only the cross-attention's weights have a gradient under PEFT."""
    wish = {"mode": "unfreeze", "rank_by": "gradient_norm", "coverage": "none", "task_type": "SEQ_2_SEQ_LM"}
    model = get_peft_model(tiny_t5(), BlueprintConfig(blueprint=blueprint, num_modules=1, **wish))
    ids = torch.arange(1, 9).view(2, 4)
    model(input_ids=ids, labels=ids).loss.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(moved) == 4 and all("block.1.layer.1.EncDecAttention" in name for name in moved)
