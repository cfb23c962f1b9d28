"""The record and its arithmetic."""

import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

from peft_blueprint import Blueprint, BlueprintError, Submodule, plan_placement
from peft_blueprint.blueprint import from_dict
from peft_blueprint.blueprint.coarsening import pooled_alpha
from peft_blueprint.errors import FormatError, MismatchError
from peft_blueprint.measure.submodules import find_submodules
from peft_blueprint.testing import tiny_bert, tiny_gpt2, tiny_llama
from tests.made_up import norms_of


Z = 1.959964


def blueprint_of(norms, errors=None, gains=None, **changes):
    """Entries a, b, c, … with these norms, standard errors and Adam gains."""
    entries = tuple(
        Submodule(
            "abcdefghij"[i],
            float(norm),
            kind="q_proj",
            norm_interval=(norm - Z * errors[i], norm + Z * errors[i]) if errors else None,
            adam_gain=gains[i] if gains else None,
            examples=4,
        )
        for i, norm in enumerate(norms)
    )
    return Blueprint("m", entries, **changes)


# ------------------------------------------------------------------------------------------ the record


def test_a_blueprint_cannot_be_changed():
    """Records are frozen after their check."""
    blueprint = blueprint_of([1, 2])
    for record, name in ((blueprint, "model_id"), (blueprint["a"], "gradient_norm")):
        with pytest.raises(AttributeError):
            setattr(record, name, "other")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Blueprint("m", ()), "'m' has no entries"),
        (lambda: blueprint_of([1, float("nan")]), "'b' in the blueprint of 'm' has gradient_norm=nan"),
        (lambda: blueprint_of([1, -2]), "'b'.*gradient_norm=-2.0.*not negative"),
        (lambda: blueprint_of([1, 2], gains=[1, float("inf")]), "'b'.*adam_gain=inf.*finite"),
        (lambda: Blueprint("m", (Submodule("a", 1.0, gamma=float("nan")),)), "'a'.*gamma=nan"),
        (lambda: Blueprint("m", (Submodule("a"),)), "'a'.*no gradient_norm"),
        (lambda: Blueprint("m", (Submodule("a", 1.0),) * 2), "names 'a' twice"),
    ],
)
def test_impossible_records_are_refused_when_made(make, message):
    """The check is the record's own, so that no way of making one goes round it."""
    with pytest.raises(FormatError, match=message):
        make()


# ------------------------------------------------------------------------------------------ blending


@given(
    st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(0.01, 0.5)), min_size=3, max_size=3),
    st.floats(1e-6, 1e6),
    st.floats(0, 1),
    st.booleans(),
)
def test_the_probes_scale_does_not_matter(probes, factor, weight, by_uncertainty):
    """Multiplying all the probe's norms (and their errors and gains) by any constant changes nothing in the blend."""
    published = blueprint_of([5, 1, 2], [0.5, 0.1, 0.4], [1.0, 2.0, 3.0])
    mine, errors = [norm for norm, _ in probes], [norm * share for norm, share in probes]
    probe = blueprint_of(mine, errors, mine)
    louder = blueprint_of([n * factor for n in mine], [e * factor for e in errors], [n * factor for n in mine])
    one, other = (published.blend(p, weight, by_uncertainty=by_uncertainty) for p in (probe, louder))
    assert norms_of(one) == pytest.approx(norms_of(other), rel=1e-6)
    assert [e.adam_gain for e in one] == pytest.approx([e.adam_gain for e in other], rel=1e-6)


def test_the_blend_by_hand():
    """Geometric means 4 and 2, so the probe counts double; then w·Ḡ + (1 − w)·G̃, for any order of entries."""
    published, probe = blueprint_of([1, 4, 16]), blueprint_of([2, 1, 4])
    assert norms_of(published.blend(probe, 0.25)) == pytest.approx([0.25 + 3, 1 + 1.5, 4 + 6])
    shuffled = replace(probe, submodules=probe.submodules[::-1])
    assert published.blend(shuffled, 0.25).submodules == published.blend(probe, 0.25).submodules
    assert published.blend(probe, 0.25).provenance["blend"]["scale"] == pytest.approx(2)


def test_the_ends_of_the_weight():
    """Weight 1 is the published norms to the last digit; weight 0 is the probe's ranking, for both statistics."""
    published = blueprint_of([1, 4, 16, 0], gains=[1.0, 2.0, 3.0, 4.0])
    probe = blueprint_of([2, 1, 0, 3], gains=[5.0, 7.0, 2.0, 1.0])
    for by_uncertainty in (False, True):
        assert norms_of(published.blend(probe, 1, by_uncertainty=by_uncertainty)) == norms_of(published)
    for by in ("gradient_norm", "adam_gain"):
        assert published.blend(probe, 0).ranks(by) == probe.ranks(by) != published.ranks(by)


def test_a_gain_that_only_one_side_has_is_left_out():
    """Otherwise the placement, which prefers adam_gain, would not see the probe at all."""
    published, probe = blueprint_of([1, 9], gains=[9.0, 1.0]), blueprint_of([9, 1])
    for blend in (published.blend(probe), probe.blend(published)):
        assert [e.adam_gain for e in blend] == [None, None]
        assert plan_placement(blend, num_modules=1).rank_by == "gradient_norm"


def test_by_uncertainty_moves_towards_the_more_certain_side():
    """Inverse variances: the sure side is believed; equal errors and entries without intervals keep the weight."""
    published = blueprint_of([1, 1, 1], [0.1, 0.1, 0.001])
    probe = blueprint_of([2, 2, 0.5], [0.1, 0.001, 0.2])
    plain, careful = published.blend(probe, 0.5), published.blend(probe, 0.5, by_uncertainty=True)
    scale = plain.provenance["blend"]["scale"]
    aim = [scale * norm for norm in norms_of(probe)]
    assert abs(careful["b"].gradient_norm - aim[1]) < 0.01 < abs(plain["b"].gradient_norm - aim[1])
    assert abs(careful["c"].gradient_norm - 1) < 0.01 < abs(plain["c"].gradient_norm - 1)
    w = scale**2 / (1 + scale**2)  # in the published scale the probe's error of "a" is 0.1·scale
    assert careful["a"].gradient_norm == pytest.approx(w + (1 - w) * aim[0])
    bare = blueprint_of([2, 2, 0.5])
    assert norms_of(published.blend(bare, 0.3, by_uncertainty=True)) == norms_of(published.blend(bare, 0.3))


def test_the_blends_interval_is_that_of_a_weighted_sum():
    """Errors add in squares, each with its side's weight and scale; without one of them there is no interval."""
    blend = blueprint_of([1, 4], [0.3, 0.3]).blend(blueprint_of([2, 8], [0.4, 0.4]), 0.5)
    assert blend["a"].norm_error == pytest.approx(math.hypot(0.15, 0.1), rel=1e-5)
    assert blueprint_of([1, 4], [0.3, 0.3]).blend(blueprint_of([2, 8]))["a"].norm_interval is None


def test_blueprints_that_do_not_blend():
    """Names that differ are shown from both sides; a weight outside [0, 1] is named."""
    other = Blueprint("n", (Submodule("a", 1.0), Submodule("z", 1.0)))
    with pytest.raises(MismatchError, match="'b' only in that of 'm', 'z' only in that of 'n'.*expand"):
        blueprint_of([1, 2]).blend(other)
    for weight in (-0.1, 1.5, float("nan")):
        with pytest.raises(BlueprintError, match=rf"weight must be in \[0, 1\], got {weight}"):
            blueprint_of([1]).blend(blueprint_of([1]), weight)


# ------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (blueprint_of([1, 2], training_checkpoint=0.5), "different training_checkpoint.*0.8 and 0.5.*[Aa]ggregate"),
        (replace(blueprint_of([1, 2], training_checkpoint=0.8), model_id="n"), "different model_id.*'m' and 'n'"),
        (blueprint_of([1, 2], training_checkpoint=0.8, model_digest="sha256:1"), "different model_digest"),
        (blueprint_of([1, 2, 3], training_checkpoint=0.8), "cannot be merged: nothing only .* 'c' only"),
        (Blueprint("m", (Submodule("a", 1.0), Submodule("b", 1.0)), training_checkpoint=0.8), "no number of examples"),
    ],
)
def test_blueprints_of_different_models_do_not_merge(other, message):
    """Another checkpoint, model, structure or list of entries, and an unknown number of examples."""
    with pytest.raises(MismatchError, match=message):
        Blueprint.merge([blueprint_of([1, 2], training_checkpoint=0.8), other])
    with pytest.raises(BlueprintError, match="Nothing to merge"):
        Blueprint.merge([])


# ------------------------------------------------------------------------------------------ levels


@pytest.mark.parametrize("level", ["group", "layer"])
def test_coarse_levels_expand_to_the_submodules_again(blueprint, level):
    """Groups and layers are roots of sums of squares, gains add; expanding shares them out evenly, and coarsening gives them back."""
    coarse = blueprint.coarsen(level)
    assert len(coarse) == {"group": 24, "layer": 12}[level] and coarse.level == level
    unit = coarse["attn.3" if level == "group" else "layer.3"]
    members = [e for e in blueprint if e.depth == 3 and (level == "layer" or e.group == "attn.3")]
    assert len(members) == {"group": 4, "layer": 7}[level]
    assert unit.gradient_norm == pytest.approx(math.hypot(*norms_of(members)))
    assert unit.adam_gain == pytest.approx(sum(e.adam_gain for e in members))
    expanded = coarse.expand(find_submodules(tiny_llama(layers=12)))
    assert expanded.level == "submodule" and set(expanded.names) == set(blueprint.names)
    for entry in expanded:
        unit = coarse[entry.group if level == "group" else f"layer.{entry.depth}"]
        count = {"attn": 4, "ffn": 3}[entry.group.split(".")[0]] if level == "group" else 7
        assert entry.gradient_norm == pytest.approx(unit.gradient_norm / count**0.5)
        assert entry.adam_gain == pytest.approx(unit.adam_gain / count)
        mine = blueprint[entry.name]
        assert (entry.kind, entry.depth, entry.group, entry.shape) == (mine.kind, mine.depth, mine.group, mine.shape)
    assert norms_of(expanded.coarsen(level)) == pytest.approx(norms_of(coarse))
    assert blueprint.expand(find_submodules(tiny_llama())) is blueprint and coarse.coarsen(level) is coarse


def test_a_groups_statistics_follow_from_its_members():
    """Squares of norms add, weighted by tags too; noise adds; α is of all members' rows, γ and k* are of that α."""
    costs = {"fixed_cost": 1.0, "variable_cost": 4.0, "unit": "bytes", "k_star": 0.3, "k_star_gain": 0.5}
    coarse = replace(FULL, costs=costs).coarsen("group")
    assert coarse.costs == {"fixed_cost": 1.0, "variable_cost": 4.0, "unit": "bytes"}  # k* was of the submodules
    entry, root = coarse["attn.1"], 2**0.5
    assert entry.norm_interval == pytest.approx((1.0 * root, 4.0 * root))
    assert (entry.signal_norm, entry.influence, entry.influence_mismatch) == pytest.approx((root, root, root))
    assert (entry.weight_norm, entry.noise_scale) == pytest.approx((9 * root, 3.0))
    assert entry.domain_tags == pytest.approx({"law": 1.0, "bio": 0.5})
    assert entry.alpha > 0 and entry.alpha_error == pytest.approx(entry.alpha * (2 / 8) ** 0.5)
    assert entry.gamma == pytest.approx(1 / (1 + entry.alpha))
    assert entry.k_star == pytest.approx(min(1.0, entry.gamma / (4 * (1 - entry.gamma))))
    unequal = replace(FULL.submodules[0], signal_norm=2.0, noise_scale=6.0), FULL.submodules[1]
    prompts = [replace(e, prompt_share=s, prompt_adam_share=s) for e, s in zip(unequal, (0.2, 0.8), strict=True)]
    shares = Blueprint("m", (replace(prompts[0], adam_gain=6.0), prompts[1])).coarsen("group")["attn.0"]
    weights = 4 * (1 + 6 / 8), 1 + 3 / 8  # squared norms of the mean gradients of 8 examples
    assert shares.prompt_share == pytest.approx((0.2 * weights[0] + 0.8 * weights[1]) / sum(weights))
    assert shares.prompt_adam_share == pytest.approx((0.2 * 6 + 0.8 * 2) / 8)
    mixed = Blueprint("m", unequal).coarsen("group")["attn.0"]
    assert (mixed.noise_scale, mixed.k_star) == (pytest.approx((6 * 4 + 3 * 1) / 5), None)
    assert mixed.alpha != pytest.approx(entry.alpha, rel=1e-3)  # one member's rows are larger


@pytest.mark.parametrize("missing", ["norm_interval", "signal_norm", "noise_scale", "influence", "alpha", "shape"])
def test_a_group_has_no_statistic_that_a_member_lacks(missing):
    """Derived statistics are missing too."""
    members = replace(FULL.submodules[0], **{missing: None}), *FULL.submodules[1:]
    entry = replace(FULL, submodules=members).coarsen("group")["attn.0"]
    assert missing == "shape" or getattr(entry, missing) is None
    if missing in ("alpha", "shape"):
        assert (entry.alpha, entry.alpha_error, entry.gamma, entry.k_star) == (None,) * 4


@pytest.mark.parametrize("rows", [64, 20_000])
def test_a_pooled_exponent_is_that_of_the_laws(rows):
    """Members of one law and size have its exponent, in many rows too, of which only some are computed."""
    member = Submodule("q", 1.0, shape=(rows, 4), alpha=0.7, signal_norm=1.0, noise_scale=2.0, examples=8)
    alpha, error = pooled_alpha([member, member])
    assert alpha == pytest.approx(0.7, rel=0.02) and error == pytest.approx(alpha * (2 / rows) ** 0.5, rel=1e-6)
    even = replace(member, alpha=0.2)
    noisy = replace(even, noise_scale=800.0)  # whose mean gradient over 8 examples is ten times as large
    assert pooled_alpha([member, noisy])[0] < 0.9 * pooled_alpha([member, even])[0] < alpha
    assert pooled_alpha([replace(member, shape=(2, 4))]) is None


def test_an_entry_of_no_group_stays_as_it_is():
    """An embedding is a unit of its own, with all of its statistics."""
    embedding = replace(FULL.submodules[0], name="model.embed_tokens", depth=None, group=None, form="embedding")
    coarse = replace(FULL, submodules=(embedding, *FULL.submodules)).coarsen("group")
    assert coarse.submodules[0] == embedding and coarse.names[1:] == ("attn.0", "attn.1")


def test_groups_coarsen_to_layers(blueprint):
    """Layers from groups are the layers from submodules."""
    direct, stepwise = blueprint.coarsen("layer"), blueprint.coarsen("group").coarsen("layer")
    assert direct.names == stepwise.names and norms_of(direct) == pytest.approx(norms_of(stepwise))


def test_a_group_that_the_model_lacks_is_an_error():
    """Both sides are shown; the paper's own ids on a shallower model, or of another stack."""
    blueprint = Blueprint("m", (Submodule("attn.0", 1.0), Submodule("attn.7", 1.0)), level="group")
    with pytest.raises(MismatchError, match="names 'attn.7', and the model has 'attn.0', 'attn.1'"):
        blueprint.expand(find_submodules(tiny_llama()))
    with pytest.raises(MismatchError, match="names 'attn.0', 'attn.7', and the model has 'decoder.attn.0'"):
        blueprint.expand(find_submodules(tiny_t5()))


def test_the_papers_ids_say_their_layer():
    """attn.0 and ffn.0 make layer.0 without any further field, of a stack too."""
    paper = Blueprint("m", tuple(Submodule(i, n) for i, n in (("attn.0", 3.0), ("ffn.0", 4.0))), level="group")
    assert [(e.name, e.gradient_norm) for e in paper.coarsen("layer")] == [("layer.0", 5.0)]
    stack = Blueprint("m", (Submodule("encoder.attn.2", 1.0),), level="group")
    assert stack.coarsen("layer").names == ("encoder.layer.2",)
    cross = from_dict({"model_id": "m", "layers": [{"id": "decoder.cross_attn.2", "gradient_norm": 1.0}]})
    assert cross.level == "group" and cross.coarsen("layer").names == ("decoder.layer.2",)


def test_entries_that_say_no_group_do_not_coarsen():
    """Bare names, and layers asked for their groups, are refused: nothing is invented."""
    with pytest.raises(MismatchError, match="'a', 'b'.*which group.*[Ee]xpand"):
        blueprint_of([1, 2]).coarsen("group")
    with pytest.raises(MismatchError, match="'layer.0'.*which group"):
        Blueprint("m", (Submodule("layer.0", 1.0),), level="layer").coarsen("group")


def tiny_t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def tiny_opt():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 24, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(vocab_size=97, max_position_embeddings=32, word_embed_proj_dim=8, **sizes))


GROUPS_OF_LAYER_1 = {
    "gpt2": (tiny_gpt2, {"attn.1": {"c_attn", "attn.c_proj"}, "ffn.1": {"c_fc", "mlp.c_proj"}}),
    "bert": (
        tiny_bert,
        {
            "attn.1": {"query", "key", "value", "attention.output.dense"},
            "ffn.1": {"intermediate.dense", "output.dense"},
        },
    ),
    "opt": (tiny_opt, {"attn.1": {"q_proj", "k_proj", "v_proj", "out_proj"}, "ffn.1": {"fc1", "fc2"}}),
    "t5": (
        tiny_t5,
        {
            "encoder.attn.1": {"encoder.q", "encoder.k", "encoder.v", "encoder.o"},
            "encoder.ffn.1": {"encoder.wi", "encoder.wo"},
            "decoder.attn.1": {f"decoder.SelfAttention.{p}" for p in "qkvo"},
            "decoder.cross_attn.1": {f"decoder.EncDecAttention.{p}" for p in "qkvo"},
            "decoder.ffn.1": {"decoder.wi", "decoder.wo"},
        },
    ),
}


@pytest.mark.parametrize(("build", "expected"), GROUPS_OF_LAYER_1.values(), ids=GROUPS_OF_LAYER_1)
def test_kinds_and_groups_are_right_for_other_architectures(build, expected):
    """Within a stack a kind names one submodule of a block, and attention is told from feed-forward."""
    submodules = find_submodules(build())
    groups = {}
    for entry in submodules:
        if entry.depth == 1:
            groups.setdefault(entry.group, []).append(entry.kind)
    assert groups.keys() == expected.keys()
    assert {group: set(kinds) for group, kinds in groups.items()} == expected
    assert all(len(kinds) == len(set(kinds)) for kinds in groups.values()), "two submodules of one kind in a block"
    blueprint = Blueprint("m", tuple(replace(s, gradient_norm=1.0) for s in submodules))
    for level in ("group", "layer"):
        assert set(blueprint.coarsen(level).expand(find_submodules(build())).names) >= {
            s.name for s in submodules if s.depth is not None
        }


# ------------------------------------------------------------------------------------------ domains


def test_a_domains_tag_weighs_its_norms():
    """for_domain multiplies by the tag and leaves out statistics of the first domain alone."""
    entry = Submodule("a", 2.0, adam_gain=1.0, norm_interval=(1.0, 3.0), domain_tags={"law": 1.0, "bio": 0.25})
    weighted = Blueprint("m", (entry,)).for_domain("bio")["a"]
    assert (weighted.gradient_norm, weighted.adam_gain, weighted.norm_interval) == (0.5, None, None)
    assert weighted.domain_tags == {"bio": 1.0}
    with pytest.raises(MismatchError, match=r"'a' have no domain tag 'code'.*\['bio', 'law'\]"):
        Blueprint("m", (entry,)).for_domain("code")


def test_weights_mix_domains():
    """The mean norm over examples drawn from them; weights need not sum to 1, and twice is as once."""
    entries = (Submodule("a", 2.0, domain_tags={"law": 1.0, "bio": 0.25}), Submodule("b", 0.0, domain_tags=TAGS))
    mixed = Blueprint("m", entries).for_domain({"law": 3, "bio": 1})
    assert [entry.gradient_norm for entry in mixed] == [pytest.approx(0.75 * 2.0 + 0.25 * 0.5), 0.0]
    assert mixed["a"].gradient_norm * mixed["a"].domain_tags["bio"] == pytest.approx(0.5)
    assert norms_of(mixed.for_domain({"law": 3, "bio": 1})) == pytest.approx(norms_of(mixed))
    full = FULL.for_domain({"law": 3, "bio": 1})
    assert full.provenance["domain_weights"] == {"law": 0.75, "bio": 0.25} and full.submodules[0].adam_gain is None
    assert {entry.examples for entry in full} == {None}


def test_the_first_domain_keeps_its_statistics():
    """They were measured on it; a blend's and a mixture's were not."""
    law = FULL.for_domain("law")
    assert law.submodules == FULL.submodules and law.concentration == FULL.concentration
    assert law.provenance["domains"] == {"law": {"examples": 8}}
    assert FULL.blend(PROBE).for_domain("law").submodules[0].adam_gain is None


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ({}, "domain must be a tag"),
        (3, "domain must be a tag"),
        ({"law": 0}, "'law' must be a positive number, got 0"),
        ({"law": 1, "bio": -1}, "'bio' must be a positive number, got -1"),
        ({"law": float("nan")}, "must be a positive number, got nan"),
        ({"law": "1"}, "must be a positive number, got '1'"),
        ({"law": 1, "code": 1}, "no domain tag 'code'"),
    ],
)
def test_domains_that_cannot_be_weighed_are_refused(domain, message):
    """In one line, with the given value."""
    with pytest.raises(BlueprintError, match=message):
        FULL.for_domain(domain)


def test_a_plain_sum_keeps_the_probes_size():
    """Algorithm 1, line 2, as printed; by default the probe is brought to the published size first."""
    published = Blueprint("m", (Submodule("a", 1.0, adam_gain=1.0), Submodule("b", 4.0, adam_gain=1.0)))
    probe = Blueprint("m", (Submodule("a", 20.0, adam_gain=3.0), Submodule("b", 20.0, adam_gain=3.0)))
    plain = published.blend(probe, 0.25, rescale=False)
    assert norms_of(plain) == pytest.approx([0.25 + 15.0, 1.0 + 15.0])
    assert plain["a"].adam_gain == pytest.approx(0.25 + 0.75 * 3.0)
    assert plain.provenance["blend"]["scale"] == 1.0 != published.blend(probe, 0.25).provenance["blend"]["scale"]


# ------------------------------------------------------------------------------------------ statistics of another

TAGS = {"law": 1.0, "bio": 2.0}
FULL = Blueprint(
    "m",
    tuple(
        Submodule(
            f"model.layers.{depth}.{kind}",
            2.0 + depth,
            kind=kind,
            depth=depth,
            group=f"attn.{depth}",
            shape=(4, 4),
            median_norm=2.0,
            norm_interval=(1.0, 4.0),
            signal_norm=1.0,
            noise_scale=3.0,
            influence=1.0,
            influence_mismatch=1.0,
            weight_norm=9.0,
            adam_gain=2.0,
            weight_gradient=2.0,
            prompt_share=0.5,
            prompt_adam_share=0.25,
            singular_energy=0.5,
            alignment=(1.0,),
            alpha=1.0,
            alpha_error=0.1,
            gamma=0.5,
            k_star=0.5,
            examples=8,
            domain_tags={"law": 1.0, "bio": 0.5},
            extra={"later": 1},
        )
        for depth in range(2)
        for kind in ("q_proj", "k_proj")
    ),
    concentration={"gamma_fit": 0.5},
    influence={"scale": 1.0},
    costs={"fixed_cost": 2.0},
    provenance={"domains": {"law": {"examples": 8}, "bio": {"examples": 4}}, "rounded": {"digits": 4}},
    extra={"later": 1},
)
PROBE = replace(FULL, submodules=tuple(replace(entry, gradient_norm=3.0) for entry in FULL))
DERIVED = {
    "blend": (lambda: FULL.blend(PROBE), {"norm_interval", "adam_gain", "weight_gradient", "domain_tags"}),
    "blend with weight 0": (
        lambda: FULL.blend(PROBE, 0),
        {"norm_interval", "adam_gain", "weight_gradient", "domain_tags"},
    ),
    "for_domain": (lambda: FULL.for_domain("bio"), {"domain_tags", "examples"}),
    "coarsen": (
        lambda: FULL.coarsen("group"),
        {"norm_interval", "signal_norm", "noise_scale", "influence", "influence_mismatch", "adam_gain"}
        | {"prompt_share", "prompt_adam_share", "weight_gradient", "alignment", "alpha", "alpha_error", "gamma"}
        | {"examples", "domain_tags"},
    ),
    "merge": (lambda: Blueprint.merge([FULL, PROBE]), {"norm_interval", "domain_tags", "examples"}),
}
OF_THE_PLACE = {"name", "kind", "depth", "group", "shape", "form", "quantized", "weight_norm", "gradient_norm"}


@pytest.mark.parametrize(("derive", "recomputed"), DERIVED.values(), ids=DERIVED)
def test_a_derived_blueprint_has_no_statistic_of_its_sources(derive, recomputed):
    """Statistics that are not recomputed and unknown keys are dropped; the provenance names them."""
    derived = derive()
    known = {f.name for entry in derived for f in fields(Submodule) if getattr(entry, f.name)}
    assert known - OF_THE_PLACE == recomputed
    assert not (derived.concentration or derived.influence or derived.extra) and not derived.costs
    [step] = derived.provenance["derived"]
    every = {f.name for f in fields(Submodule) if getattr(FULL.submodules[0], f.name)}
    assert set(step["dropped"]) == every - known | {"concentration", "influence", "extra"}
    assert "rounded" not in derived.provenance
    again = derived.blend(derived)
    assert [step["by"] for step in again.provenance["derived"]][1:] == ["blend"]


def test_a_domains_blueprint_names_its_own_data():
    """Examples and provenance are the domain's, so that it is not taken for the first one's data."""
    bio = FULL.for_domain("bio")
    assert bio.submodules[0].examples == 4 and bio.provenance["domains"] == {"bio": {"examples": 4}}


def test_tags_of_a_blend_are_over_the_blended_norm():
    """for_domain of a blend gives the norms that the published blueprint has for that domain."""
    blend = FULL.blend(PROBE, 0.25)
    assert norms_of(blend.for_domain("bio")) == pytest.approx(norms_of(FULL.for_domain("bio")))


def test_blueprints_of_two_revisions_merge_into_one_of_neither():
    """The first one's revision does not stand for both."""
    one, other = (replace(FULL, model_revision=revision) for revision in ("a" * 40, "b" * 40))
    assert Blueprint.merge([one, one]).model_revision == "a" * 40
    assert Blueprint.merge([one, other]).model_revision is None


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=5))
def test_a_coarse_norm_is_a_lower_bound(examples):
    """Of the mean over examples of the norm of both members together; equal for one example."""
    count = len(examples)
    means = [sum(norms) / count for norms in zip(*examples, strict=True)]
    members = tuple(Submodule(f"m.{i}", norm, group="attn.0", depth=0) for i, norm in enumerate(means))
    coarse = Blueprint("m", members).coarsen("group")["attn.0"].gradient_norm
    truth = sum(math.hypot(*norms) for norms in examples) / count
    assert coarse <= truth + 1e-9
    assert count > 1 or coarse == pytest.approx(truth)


def test_two_measurements_of_the_same_have_one_digest():
    """Date, device and command do not count as content; data, seed and numbers do."""
    ours = blueprint_of([1, 2], provenance={"seed": 0, "data_digest": "a", "created": "2026", "spent": {"seconds": 1}})
    theirs = {"seed": 0, "data_digest": "a", "created": "2027", "command": "generate", "versions": {"torch": "3"}}
    assert replace(ours, provenance=theirs).digest == ours.digest
    for other in ({"seed": 1}, {"data_digest": "b"}):
        assert replace(ours, provenance={**theirs, **other}).digest != ours.digest
    assert blueprint_of([1, 3], provenance=theirs).digest != ours.digest


def test_a_notebook_shows_the_strongest_entries_and_pandas_has_all(blueprint):
    """The table is short for any model; names are escaped; the picture is that of publishing."""
    page = blueprint._repr_html_()
    strongest = max(blueprint.submodules, key=lambda entry: entry.gradient_norm)
    assert page.count("<tr>") == 21 and strongest.name in page and f"<p>{len(blueprint) - 20} more</p>" in page
    assert "&lt;b&gt;" in replace(blueprint, model_id="<b>")._repr_html_()
    frame = blueprint.to_pandas()
    assert list(frame["id"]) == list(blueprint.names) and {"gradient_norm", "kind", "shape"} <= set(frame)
    placement = plan_placement(blueprint, num_modules=3)
    assert len(placement.to_pandas()) == 3 and placement._repr_html_().startswith("<pre>")
    assert blueprint.model_id in blueprint.plot(placement).axes[0].get_title()
