"""Blueprints of one model on different data become one."""

import re
from dataclasses import replace

import pytest

from peft_blueprint import Blueprint, BlueprintError
from peft_blueprint.compare.merging import merge_all
from peft_blueprint.compare.movement import checkpoint_movement
from tests.made_up import UP, measured


def test_different_data_merge_by_their_examples():
    """Two labs' norms become their mean weighted by examples, as in Blueprint.merge, for any order of names."""
    one, other = measured(UP, data="a", examples=8), measured({n: 2 * v for n, v in UP.items()}, data="b", examples=24)
    merged, notes = merge_all({"oxford": one, "berlin": other})
    assert merged == (Blueprint.merge([one, other]),)
    assert merged[0]["3.q"].gradient_norm == pytest.approx(4 * (8 + 2 * 24) / 32) and merged[0]["3.q"].examples == 32
    assert notes == ("'oxford', 'berlin' are merged into one of 32 examples.",)
    shuffled = replace(other, submodules=other.submodules[::-1])
    assert merge_all({"oxford": one, "berlin": shuffled})[0] == merged


def test_the_same_data_count_once():
    """A copy, a second measurement on the same data, and a part of a merged blueprint add nothing."""
    one, other = measured(UP, data="a"), measured(UP, data="b")
    both = Blueprint.merge([one, other])
    again = replace(one, provenance={**one.provenance, "seed": 1})
    merged, notes = merge_all({"one": one, "copy": one, "again": again, "both": both})
    assert merged == (both,)
    assert [note for note in notes if note.endswith("is of the same data as both and counts once.")] == list(notes)
    assert len(notes) == 3
    overlapping = Blueprint.merge([other, measured(UP, data="c")])
    merged, notes = merge_all({"both": both, "overlapping": overlapping})
    assert set(map(id, merged)) == {id(both), id(overlapping)}
    assert notes == ("overlapping is not merged: part of its data is in 'both' too.",)


def test_a_repeated_name_of_the_data_is_an_error():
    """64 and 128 examples of a file have two digests; that they may overlap is noted."""
    named = {lab: measured(UP, data=lab) for lab in ("a", "b")}
    named = {lab: replace(one, provenance={**one.provenance, "data": "gsm8k"}) for lab, one in named.items()}
    _, notes = merge_all(named)
    assert notes[-1] == "Several of them name the data 'gsm8k': if they share examples, those count twice."


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_id": "org/other"}, None),
        ({"training_checkpoint": 0.5}, r"differ in training_checkpoint \(0\.8, 0\.5\)"),
        ({"model_digest": "sha256:f"}, r"differ in model_digest \(unknown, sha256:f\)"),
        ({"submodules": measured({"0.q": 1.0}).submodules}, r"submodules \(12, 1 of them\)"),
        ({"submodules": tuple(replace(e, quantized=True) for e in measured(UP))}, "quantized submodules"),
        ({"submodules": tuple(replace(e, examples=None) for e in measured(UP))}, "'0.q', .* no number of examples"),
        ({"provenance": {}}, "no data digest"),
        ({"provenance": {**measured(UP, data="b").provenance, "blend": {"weight": 0.5}}}, "a blend"),
        ({"provenance": {**measured(UP, data="b").provenance, "privacy": {"sigma": 1.0}}}, "privacy noise"),
    ],
)
def test_unmergeable_blueprints_stay_apart_with_the_reason(changes, reason):
    """Both come back as they were, and a note says why."""
    one, other = measured(UP, data="a"), replace(measured(UP, data="b"), **changes)
    merged, notes = merge_all({"one": one, "other": other})
    assert merged == (one, other)
    if reason is None:
        assert notes == (), "blueprints of two models need no reason"
    else:
        assert len(notes) == 1 and re.search(reason, notes[0])


def test_revisions_are_kept_apart_where_both_are_known():
    """Two commits are two models; a blueprint that names none joins the only one there is, and a note says so."""
    first = replace(measured(UP, data="a"), model_revision="1111")
    second = replace(measured(UP, data="a"), model_revision="2222")
    silent = measured(UP, data="c")
    merged, notes = merge_all({"first": first, "second": second})
    assert merged == (first, second), "the same data on two revisions are two measurements"
    assert notes == ("second is not merged with first: model_revision 2222 is not 1111.",)
    merged, notes = merge_all({"silent": silent, "first": first})
    assert len(merged) == 1 and merged[0].model_revision == "1111" and merged[0]["0.q"].examples == 16
    assert notes[0] == "'silent' has no model_revision; taken to be that of the others."
    merged, notes = merge_all({"silent": silent, "first": first, "second": second})
    assert len(merged) == 3 and "silent is not merged: it could be of the weights of first or second." in notes


def test_private_blueprints_stay_apart():
    """They do not merge, also not with each other; a copy counts once, and a movement notes the noise."""
    clear, noisy = measured(UP, data="c"), measured(UP, checkpoint=1.0)
    noisy = replace(
        noisy, provenance={"domains": {"law": {"examples": 8}}, "privacy": {"epsilon": 4.0, "delta": 1e-6}}
    )
    other = replace(noisy, submodules=measured(UP | {"0.q": 1.1}).submodules)
    merged, notes = merge_all({"clear": clear, "one": noisy, "two": other, "copy": noisy})
    assert merged == (clear, noisy, other) and notes[-1] == "copy is the same as one and counts once."
    assert all("privacy noise" in note for note in notes[:2]) and len(notes) == 3
    assert any("privacy noise" in note for note in checkpoint_movement([clear, noisy]).notes)


def test_blueprints_to_merge_need_names():
    with pytest.raises(BlueprintError, match="mapping from names to blueprints, got list"):
        merge_all([measured(UP)])
