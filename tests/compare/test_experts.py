"""Which experts two tasks share: top-p sets, their Jaccard index beside chance, and rank correlations by layer."""

from dataclasses import replace
from itertools import combinations

import pytest

from peft_blueprint import Blueprint
from peft_blueprint.blueprint import Submodule, expert_scores, top_p_experts
from peft_blueprint.compare import LayerOverlap, compare_experts
from peft_blueprint.errors import BlueprintError, MismatchError
from tests.mixtures import blueprint_of_experts


def mixture(*layers, **statistics):
    """A blueprint of experts with these token shares, in one list a layer."""
    entries = [
        Submodule(f"layers.{i}.mlp.experts.{e}.{key}", 1.0 + e, form="expert", token_share=share, **statistics)
        for i, shares in enumerate(layers)
        for key in ("gate_up_proj", "down_proj")
        for e, share in enumerate(shares)
    ]
    return Blueprint("org/mixture", tuple(entries))


def test_compares_the_fewest_experts_that_hold_a_share():
    found = compare_experts(
        mixture([0.5, 0.3, 0.1, 0.1], [0.25] * 4), mixture([0.4, 0.1, 0.1, 0.4], [0.4, 0.3, 0.2, 0.1]), top_p=0.75
    )
    first, second = found.layers
    assert (first.first, first.second, first.shared, first.jaccard) == ((0, 1), (0, 3), (0,), pytest.approx(1 / 3))
    assert (second.first, second.second, second.jaccard) == ((0, 1, 2), (0, 1, 2), 1)
    assert second.correlation == 0 and found.jaccard == pytest.approx(2 / 3)
    assert found.to_dict()["layers"][0]["shared"] == (0,)


@pytest.mark.parametrize("sizes", [(2, 3), (4, 4), (0, 2), (5, 5)])
def test_chance_is_the_mean_over_all_pairs_of_sets(sizes):
    a, b = sizes
    sets = [[set(s) for s in combinations(range(5), n)] for n in (a, b)]
    indices = [len(x & y) / len(x | y) if x | y else 1.0 for x in sets[0] for y in sets[1]]
    layer = LayerOverlap("experts", tuple(range(a)), tuple(range(b)), 5, 0.0)
    assert layer.chance == pytest.approx(sum(indices) / len(indices))


def test_scores_add_over_the_weights_of_an_expert():
    blueprint = mixture([0.75, 0.25], adam_gain=2.0)
    assert expert_scores(blueprint, "adam_gain") == {"layers.0.mlp.experts": {0: 4.0, 1: 4.0}}
    norms = expert_scores(blueprint, "gradient_norm")["layers.0.mlp.experts"]
    assert norms == pytest.approx({0: 2**0.5, 1: 8**0.5})
    assert expert_scores(blueprint)["layers.0.mlp.experts"] == {0: 0.75, 1: 0.25}
    assert top_p_experts({0: 0.0, 1: 0.0}, 0.9) == () and top_p_experts({0: 1.0, 1: 0.0, 2: 1.0}, 1.0) == (0, 2)


def test_compares_two_domains_by_their_gradients():
    one = blueprint_of_experts(2, 16)
    tagged = replace(
        one,
        submodules=tuple(replace(e, domain_tags={"math": 1.0, "law": 1 + i % 5}) for i, e in enumerate(one)),
        provenance={"domains": {"math": {"examples": 8}, "law": {"examples": 8}}},
    )
    found = compare_experts(tagged.for_domain("math"), tagged.for_domain("law"), "gradient_norm", 0.5)
    assert 0 < found.jaccard < 1 and 0 < found.correlation < 1


@pytest.mark.parametrize(
    ("other", "settings", "error", "message"),
    [
        (mixture([0.5, 0.5]), {"top_p": 0}, BlueprintError, r"top_p must be in \(0, 1\], got 0"),
        (mixture([0.5, 0.5]), {"by": "alpha"}, BlueprintError, "scored by one of token_share"),
        (mixture([0.5, 0.5]), {"by": "adam_gain"}, BlueprintError, "has no adam_gain"),
        (mixture([0.5, 0.3, 0.2]), {}, MismatchError, "different experts in 1 layers"),
        (Blueprint("org/dense", (Submodule("a.q_proj", 1.0),)), {}, MismatchError, "no single experts"),
    ],
)
def test_incomparable_blueprints_of_experts_are_refused(other, settings, error, message):
    with pytest.raises(error, match=message):
        compare_experts(mixture([0.5, 0.5]), other, **settings)


def test_experts_join_to_their_parameters():
    one = blueprint_of_experts(2, 16)
    joined = one.join_experts()
    own = [e for e in one if e.name.startswith("model.layers.1.mlp.experts.") and e.name.endswith("down_proj")]
    entry = joined["model.layers.1.mlp.experts.down_proj"]
    assert len(joined) == 2 * 6 and entry.form == "experts" and entry.shape == (16, 64, 48)
    assert entry.adam_gain == pytest.approx(sum(e.adam_gain for e in own))
    assert entry.kind == "experts.down_proj" and entry.group == "ffn.1" and joined.join_experts() is joined
