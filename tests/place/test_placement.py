"""Submodules that a blueprint chooses, by hand and for any blueprint."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_blueprint import Blueprint, Placement, Submodule, plan_placement
from peft_blueprint.blueprint import from_dict, to_dict
from peft_blueprint.errors import MismatchError, PlacementError
from peft_blueprint.measure.submodules import find_submodules
from peft_blueprint.testing import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5, tiny_vit


GROUPS = {"q_proj": "attn", "o_proj": "attn", "up_proj": "ffn", "down_proj": "ffn"}
PARTS = {"attn": "self_attn", "ffn": "mlp"}


def blueprint_of(gains=None, **norms_by_kind):
    """Entries block by block, `model.layers.2.mlp.up_proj`, with these norms; of adam_gain too if `gains` says so."""
    kinds = list(norms_by_kind)
    entries = tuple(
        Submodule(
            f"model.layers.{depth}.{PARTS[GROUPS[kind]]}.{kind}",
            float(norms_by_kind[kind][depth]),
            kind=kind,
            depth=depth,
            group=f"{GROUPS[kind]}.{depth}",
            adam_gain=None if gains is None else float(gains[kind][depth]),
        )
        for depth in range(max(map(len, norms_by_kind.values())))
        for kind in kinds
        if depth < len(norms_by_kind[kind])
    )
    return Blueprint("org/m", entries)


def chosen(blueprint, **wish):
    """The chosen names as `kind.depth`."""
    return [f"{name.split('.')[-1][:-5]}.{name.split('.')[2]}" for name in plan_placement(blueprint, **wish).lora]


SMALL = blueprint_of(q_proj=[1, 5, 3, 2], up_proj=[40, 10, 20, 35])


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"fraction": 0.25, "coverage": "none"}, ["up.0", "up.3"]),
        ({"fraction": 0.01, "coverage": "none"}, ["up.0"]),
        ({"fraction": 1.0, "coverage": "none"}, ["q.0", "up.0", "q.1", "up.1", "q.2", "up.2", "q.3", "up.3"]),
        ({"num_modules": 5, "coverage": "none"}, ["up.0", "q.1", "up.1", "up.2", "up.3"]),
        ({"threshold": 5, "coverage": "none"}, ["up.0", "q.1", "up.1", "up.2", "up.3"]),
        ({"threshold": 5}, ["up.0", "q.1", "up.1", "up.2", "up.3"]),
        ({"top_p": 0.8, "coverage": "none"}, ["up.0", "up.2", "up.3"]),  # 95 of 116
        ({"top_p": 0.7, "coverage": "kind"}, ["up.0", "q.1", "q.2", "up.3"]),  # 8 of 11 and 75 of 105
        ({"num_modules": 4, "coverage": "kind"}, ["up.0", "q.1", "q.2", "up.3"]),
        ({"num_modules": 4, "coverage": "kind+depth"}, ["up.0", "q.1", "q.2", "up.3"]),
        ({"num_modules": 6, "coverage": "kind"}, ["up.0", "q.1", "q.2", "up.2", "q.3", "up.3"]),
        ({"num_modules": 2, "coverage": "kind"}, ["up.0", "q.1"]),
        ({"num_modules": 2, "coverage": "kind+depth"}, ["q.1", "up.3"]),  # 5 and 35 against medians 2.5 and 27.5
        ({}, ["q.1", "up.3"]),
    ],
)
def test_selectors_by_hand(wish, expected):
    """Each selector and coverage on eight submodules whose kinds have norms of different sizes."""
    assert chosen(SMALL, **wish) == expected


def test_a_placement_is_text_in_a_notebook_too(monkeypatch):
    """Where rich would display the tables, and leave the text empty."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *_: pytest.fail("displayed"))
    assert "2 adapters of rank 16 of 8 candidates" in str(plan_placement(SMALL, num_modules=2))


def test_coverage_none_is_the_papers_rule():
    """Pooled top-k, which can leave a whole kind out."""
    blueprint = blueprint_of(q_proj=[1] * 10, up_proj=range(2, 12))
    assert chosen(blueprint, fraction=0.3, coverage="none") == [f"up.{i}" for i in range(4, 10)]


def test_coverage_kind_gives_every_kind_its_share():
    """In proportion to its number, by largest remainder, and the strongest of it."""
    blueprint = blueprint_of(q_proj=range(1, 13), o_proj=range(1, 7), up_proj=range(100, 106))
    names = chosen(blueprint, num_modules=8, coverage="kind")
    assert Counter(name.split(".")[0] for name in names) == {"q": 4, "o": 2, "up": 2}
    assert {"q.11", "q.10", "q.9", "q.8", "o.5", "o.4", "up.5", "up.4"} == set(names)
    assert Counter(n.split(".")[0] for n in chosen(blueprint, num_modules=9, coverage="kind"))["q"] in (4, 5)


def test_coverage_kind_and_depth_puts_one_in_every_stratum():
    """Each kind's seats are spread over as many runs of layers, and the strongest of each run is taken."""
    blueprint = blueprint_of(**{kind: range(1, 13) for kind in GROUPS})
    names = chosen(blueprint, num_modules=16)
    for kind in ("q", "o", "up", "down"):
        depths = [int(name.split(".")[1]) for name in names if name.split(".")[0] == kind]
        assert depths == [2, 5, 8, 11], "the deepest of each three layers has the largest norm"


def test_few_adapters_are_spread_over_depth_alone():
    """Fewer than two a kind: one for every run of layers, of any kind, compared by its kind's median."""
    blueprint = blueprint_of(q_proj=[1, 1, 1, 1, 3, 1], o_proj=[5, 5, 5, 5, 5, 5], up_proj=[90, 50, 50, 50, 50, 50])
    names = chosen(blueprint, num_modules=3)
    assert [int(name.split(".")[1]) // 2 for name in names] == [0, 1, 2]
    assert names[0] == "up.0" and names[2] == "q.4"
    gains = {"q_proj": [1] * 6, "o_proj": [2] * 6, "up_proj": [1, 1, 1, 1, 1, 9]}
    blueprint = blueprint_of(gains, **gains)
    assert chosen(blueprint, num_modules=3)[0].startswith("o") and chosen(blueprint, num_modules=3)[2] == "up.5"


def test_ranking_goes_by_adam_gain_where_it_is_known():
    """By default, and falls back to the norm if one entry lacks it; asked for without it, it is an error."""
    norms = {"q_proj": [9, 1], "up_proj": [1, 9]}
    blueprint = blueprint_of({"q_proj": [1, 9], "up_proj": [9, 1]}, **norms)
    placement = plan_placement(blueprint, num_modules=2, coverage="kind")
    assert placement.rank_by == "adam_gain"
    assert chosen(blueprint, num_modules=2, coverage="kind") == ["up.0", "q.1"]
    assert chosen(blueprint, num_modules=2, coverage="kind", rank_by="gradient_norm") == ["q.0", "up.1"]
    partly = replace(
        blueprint, submodules=(replace(blueprint.submodules[0], adam_gain=None), *blueprint.submodules[1:])
    )
    assert plan_placement(partly, num_modules=2).rank_by == "gradient_norm"
    with pytest.raises(ValueError, match="1 of 4 entries have no adam_gain .'model.layers.0.self_attn.q_proj'"):
        plan_placement(partly, num_modules=2, rank_by="adam_gain")


# ------------------------------------------------------------------------------------------ whatever the blueprint


@st.composite
def random_blueprints(draw):
    """One to four kinds of one to nine layers each, with distinct norms from a wide range."""
    sizes = {kind: draw(st.integers(1, 9)) for kind in draw(st.sets(st.sampled_from(list(GROUPS)), min_size=1))}
    count = sum(sizes.values())
    norms = iter(draw(st.lists(st.floats(1e-3, 1e3), min_size=count, max_size=count, unique=True)))
    return blueprint_of(**{kind: [next(norms) for _ in range(size)] for kind, size in sizes.items()})


coverages = st.sampled_from(["none", "kind", "kind+depth"])


@given(random_blueprints(), coverages, st.data())
def test_exactly_as_many_as_asked_for(blueprint, coverage, data):
    """num_modules and fraction give that many distinct names in the model's order."""
    count = data.draw(st.integers(1, len(blueprint)))
    names = plan_placement(blueprint, num_modules=count, coverage=coverage).lora
    assert len(names) == len(set(names)) == count
    assert [name for name in blueprint.names if name in names] == list(names)
    low, high = sorted(data.draw(st.tuples(*[st.floats(0, 1, exclude_min=True)] * 2)))
    fewer, more = (plan_placement(blueprint, fraction=f, coverage=coverage).lora for f in (low, high))
    assert len(fewer) == max(1, round(low * len(blueprint))) <= len(more)
    if coverage == "none":
        assert set(fewer) <= set(more)


@given(random_blueprints(), coverages, st.data())
def test_every_kind_is_covered(blueprint, coverage, data):
    """Except by the paper's rule a kind has its quota to the seat; from two a kind on, in every run of its layers."""
    kinds = Counter(entry.kind for entry in blueprint)
    count = data.draw(st.integers(1, len(blueprint)))
    placed = set(plan_placement(blueprint, num_modules=count, coverage=coverage).lora)
    if coverage == "none" or (coverage == "kind+depth" and count < 2 * len(kinds)):
        return
    for kind, size in kinds.items():
        members = [entry.name in placed for entry in blueprint if entry.kind == kind]
        seats = sum(members)
        assert abs(seats - count * size / len(blueprint)) < 1
        if coverage == "kind+depth" and seats:
            bounds = [round(i * size / seats) for i in range(seats + 1)]
            assert [sum(members[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)] == [1] * seats


@given(random_blueprints(), coverages, st.data())
def test_the_order_of_the_entries_does_not_matter(blueprint, coverage, data):
    """Where scores differ. (Which of equally large kinds gets the odd seat does go by which comes first.)"""
    entries = list(blueprint.submodules)
    if coverage == "none":
        entries = data.draw(st.permutations(entries))
    else:  # kinds keep their order
        entries = [e for kind in dict.fromkeys(e.kind for e in entries) for e in entries if e.kind == kind]
    shuffled = replace(blueprint, submodules=tuple(entries))
    count = data.draw(st.integers(1, len(blueprint)))
    if coverage != "kind+depth" or count >= 2 * len({e.kind for e in entries}):
        expected = plan_placement(blueprint, num_modules=count, coverage=coverage).lora
        assert set(plan_placement(shuffled, num_modules=count, coverage=coverage).lora) == set(expected)


@given(random_blueprints(), st.sets(st.integers(0, 35)), coverages, st.floats(0.01, 1))
def test_top_p_holds_its_share_with_the_fewest(blueprint, silent, coverage, share):
    """At 1 it takes all with a positive score and no other; below, one fewer would hold too little."""
    entries = tuple(
        replace(e, gradient_norm=0.0, norm_interval=None) if i in silent else e for i, e in enumerate(blueprint)
    )
    blueprint = replace(blueprint, submodules=entries)
    total = math.fsum(e.gradient_norm for e in blueprint)
    positive = {e.name for e in blueprint if e.gradient_norm > 0}
    everything = plan_placement(blueprint, top_p=1.0, coverage="none").lora
    assert set(everything) == positive or (not positive and len(everything) == 1)
    norms = [blueprint[name].gradient_norm for name in plan_placement(blueprint, top_p=share, coverage=coverage).lora]
    assert math.fsum(norms) >= share * total * (1 - 1e-9)
    if coverage == "none" and len(norms) > 1:
        assert math.fsum(norms) - min(norms) < share * total


@given(random_blueprints(), st.floats(1e-3, 1e3), coverages)
def test_threshold_takes_every_score_that_reaches_it(blueprint, threshold, coverage):
    """All of them under any coverage, or an error with the largest score."""
    expected = tuple(e.name for e in blueprint if e.gradient_norm >= threshold)
    if expected:
        assert plan_placement(blueprint, threshold=threshold, coverage=coverage).lora == expected
    else:
        largest = max(e.gradient_norm for e in blueprint)
        with pytest.raises(PlacementError, match=f"the largest is {largest:.4g}".replace("+", r"\+")):
            plan_placement(blueprint, threshold=threshold, coverage=coverage)


# ------------------------------------------------------------------------------------------ unfreezing


def of_model(model, **norms):
    """A blueprint of a model whose entries have norm 1, or by ending of their name another."""
    entries = (
        replace(s, gradient_norm=next((n for end, n in norms.items() if s.group == end.replace("_", ".")), 1.0))
        for s in find_submodules(model)
    )
    return Blueprint("org/m", tuple(entries))


@pytest.mark.parametrize(
    ("build", "unfrozen"),
    [
        (tiny_llama, {"attn_1": ["model.layers.1.self_attn"], "ffn_1": ["model.layers.1.mlp"]}),
        (tiny_gpt2, {"attn_1": ["transformer.h.1.attn"], "ffn_1": ["transformer.h.1.mlp"]}),
        (
            tiny_bert,
            {
                "attn_1": ["bert.encoder.layer.1.attention"],
                "ffn_1": ["bert.encoder.layer.1.intermediate.dense", "bert.encoder.layer.1.output.dense"],
            },
        ),
    ],
)
def test_a_block_is_the_module_that_holds_just_its_members(build, unfrozen):
    """attn and mlp where the model has such modules; BERT's feed-forward has none, so its two layers stand for it."""
    for group, modules in unfrozen.items():
        placement = plan_placement(of_model(build(), **{group: 9.0}), build(), mode="unfreeze", num_modules=1)
        assert list(placement.unfreeze) == modules and placement.lora == ()
        names = [name for name, _ in build().named_modules()]
        assert all(name in names for name in modules)


def test_lora_beside_unfrozen_blocks_keeps_out_of_them():
    """The strongest block is unfrozen; the fraction is of the others."""
    model = tiny_llama()
    placement = plan_placement(of_model(model, ffn_2=9.0), mode="lora+unfreeze", fraction=1.0)
    assert placement.unfreeze == ("model.layers.2.mlp",) and len(placement.lora) == 4 * 7 - 3
    assert not any(name.startswith("model.layers.2.mlp.") for name in placement.lora)
    with pytest.raises(PlacementError, match="leaves no submodule for LoRA"):
        plan_placement(of_model(model), mode="lora+unfreeze", unfreeze_blocks=8)


def test_the_list_that_keeps_unfrozen_blocks_out_of_quantisation():
    """The head first, since an explicit list replaces transformers' own; another head if it has another name."""
    placement = plan_placement(of_model(tiny_llama(), attn_0=9.0), mode="unfreeze", num_modules=1)
    assert placement.quantization_skip_modules() == ["lm_head", "model.layers.0.self_attn"]
    assert placement.quantization_skip_modules("score")[0] == "score"
    assert plan_placement(SMALL).quantization_skip_modules() == ["lm_head"]


# ------------------------------------------------------------------------------------------ other forms than linear


def everything_of(model):
    """A blueprint with all weights of a model."""
    return Blueprint("org/m", tuple(replace(s, gradient_norm=1.0) for s in find_submodules(model, "all")))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert, tiny_vit, tiny_t5, tiny_mixtral])
@pytest.mark.parametrize("wish", [{"fraction": 1.0}, {"mode": "unfreeze", "fraction": 1.0}], ids=["lora", "unfreeze"])
def test_entries_without_adapters_are_left_out_and_counted(build, wish):
    """A blueprint with embeddings, norms, biases and heads is placed as one without them."""
    model = build()
    placement = plan_placement(everything_of(model), **wish)
    assert placement.left_out == len(find_submodules(model, "all")) - len(find_submodules(model)) > 0
    without = plan_placement(of_model(model), **wish)  # which knows less of what steps cost
    of_costs = {"cost": {}, "alternatives": (), "gain_per_cost": None}
    assert replace(placement, left_out=0, **of_costs) == replace(without, **of_costs)
    if "mode" not in wish:
        assert list(placement.lora) == [s.name for s in find_submodules(model)]


def test_a_blueprint_without_adaptable_entries_is_an_error():
    """The error names the forms that there are."""
    norms = Blueprint("org/m", tuple(e for e in everything_of(tiny_llama()) if e.form in ("norm", "embedding")))
    with pytest.raises(
        PlacementError, match=r"'org/m' has no linear layer .* 10 entries \(embedding, norm; 'model.embed"
    ):
        plan_placement(norms)


def test_the_model_completes_a_file():
    """Entries without a form count as linear or, of one dimension, as parameters; with the model its own forms count."""
    model = tiny_llama(layers=1, tie_word_embeddings=True)
    entries = tuple(everything_of(model))
    record = to_dict(Blueprint("org/m", entries))
    for entry in record["layers"]:
        entry.pop("form", None)
    written = from_dict({key: value for key, value in record.items() if key != "digest"})
    assert {entry.form for entry in written} == {"linear", "parameter"}
    placement = plan_placement(written, model, fraction=1.0)
    assert list(placement.lora) == [s.name for s in find_submodules(model)] and placement.left_out == 4
    assert "lm_head" not in [e.name for e in entries], "a tied weight has one name"


def test_fused_experts_are_placed_by_their_parameters_names():
    """As kinds of their own, which are covered as the others are; a block of them is the module that holds them."""
    model = tiny_mixtral(layers=12)
    blueprint = of_model(model)
    placement = plan_placement(blueprint, model, fraction=0.5)
    kinds, all_kinds = Counter(blueprint[name].kind for name in placement.lora), Counter(e.kind for e in blueprint)
    assert {kind: 2 * number for kind, number in kinds.items()} == all_kinds
    fused = {name for name in placement.lora if blueprint[name].form == "experts"}
    assert set(placement.target_parameters) == fused
    assert set(placement.target_modules) == set(placement.lora) - fused
    [block] = plan_placement(of_model(model, ffn_1=9.0), mode="unfreeze", num_modules=1).unfreeze
    assert not isinstance(model.get_submodule(block), torch.nn.ModuleList)
    assert {s.name for s in find_submodules(model) if s.group == "ffn.1"} == {
        s.name for s in find_submodules(model) if s.name.startswith(block + ".")
    }


# ------------------------------------------------------------------------------------------ the record


@pytest.mark.parametrize("wish", [{"fraction": 0.5}, {"mode": "lora+unfreeze", "num_modules": 2}])
def test_a_placement_goes_through_json(wish):
    """to_dict is plain JSON, from_dict returns the same placement and refuses other objects."""
    placement = plan_placement(SMALL, **wish)
    assert placement.selector == {key: value for key, value in wish.items() if key != "mode"}
    assert placement.candidates == len(SMALL) and placement.model_id == "org/m"
    assert Placement.from_dict(json.loads(json.dumps(placement.to_dict()))) == placement
    older = {key: v for key, v in placement.to_dict().items() if key not in ("target_parameters", "left_out")}
    assert Placement.from_dict(older) == placement
    for bad in ({"lora": []}, placement.to_dict() | {"colour": 8}, {}):
        with pytest.raises(PlacementError, match="not a placement.*keys"):
            Placement.from_dict(bad)


def test_a_placement_counts_submodules_and_parameters():
    """20 % of submodules are another share of parameters: said in the line, the table and the JSON."""
    entries = (
        *(Submodule(f"{i}.k_proj", 1.0, kind="k_proj", depth=i, shape=(4, 16)) for i in range(4)),
        *(Submodule(f"{i}.up_proj", 2.0, kind="up_proj", depth=i, shape=(60, 16)) for i in range(4)),
    )
    placement = plan_placement(Blueprint("org/m", entries), fraction=0.5, coverage="none")
    assert placement.shares == {"submodules": 0.5, "parameters": pytest.approx(60 / 64)}
    assert "50 % of submodules, 93.8 % of parameters" in repr(placement)
    assert "50 % of submodules, 93.8 % of parameters" in str(placement)
    model = tiny_llama(layers=2)
    whole = plan_placement(of_model(model), model, mode="unfreeze", num_modules=1)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    inside = sum(parameter.numel() for parameter in model.get_submodule(whole.unfreeze[0]).parameters())
    assert whole.shares["trainable"] == inside / numbers and whole.shares["submodules"] < 0.5
    shapeless = plan_placement(SMALL, fraction=0.5)
    assert shapeless.shares == {"submodules": 0.5} and "50 % of submodules" in repr(shapeless)


def test_groups_need_the_model():
    """A group-level blueprint alone has no names to place on; with the model it has."""
    groups = Blueprint("m", (Submodule("attn.0", 1.0), Submodule("ffn.3", 2.0)), level="group")
    with pytest.raises(PlacementError, match=r"lists groups \('attn.0', 'ffn.3'\).*expand\(find_submodules"):
        plan_placement(groups)
    assert len(plan_placement(groups, tiny_llama(), fraction=1.0).lora) == 7
    with pytest.raises(MismatchError, match="does not fit this GPT2LMHeadModel"):
        plan_placement(SMALL, tiny_gpt2())


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"fraction": 0}, r"fraction must be in \(0, 1\], got 0"),
        ({"top_p": 1.01}, r"top_p must be in \(0, 1\], got 1.01"),
        ({"fraction": float("nan")}, r"fraction must be in \(0, 1\], got nan"),
        ({"num_modules": 2.5}, "num_modules must be a whole number, got 2.5"),
        ({"num_modules": 0}, "num_modules must be a positive integer, got 0"),
        ({"num_modules": 9}, "num_modules=9: the blueprint has only 8"),
        ({"threshold": -1}, "threshold must be a finite number of at least 0, got -1"),
        ({"threshold": 41}, "No gradient_norm reaches threshold=41; the largest is 40"),
        ({"fraction": 0.5, "top_p": 0.5}, "fraction=0.5 and top_p=0.5 both say how many"),
        ({"mode": "full"}, "mode must be .*, got 'full'"),
        ({"coverage": "depth"}, "coverage must be .*, got 'depth'"),
        ({"rank_by": "alpha"}, "rank_by must be .*, got 'alpha'"),
        ({"unfreeze_blocks": 0, "mode": "lora+unfreeze"}, "unfreeze_blocks must be a positive integer, got 0"),
    ],
)
def test_wishes_that_cannot_be_met_are_named(wish, message):
    """With the given and the allowed values."""
    with pytest.raises(PlacementError, match=message):
        plan_placement(SMALL, **wish)
