"""One model's blueprints followed over its training."""

import json
import math
from dataclasses import replace

import pytest

from peft_blueprint import BlueprintError, check_drift, generate_blueprint
from peft_blueprint.compare.merging import merge_all
from peft_blueprint.compare.movement import checkpoint_movement
from peft_blueprint.compare.table import read_sources, write_table
from peft_blueprint.errors import MismatchError
from peft_blueprint.testing import tiny_llama, toy_batches
from tests.made_up import UP, measured


def test_a_change_of_scale_is_not_a_movement():
    """Norms three times as large everywhere: every ratio 1, ranks and shares the same, correlation 1."""
    later = measured({name: 3 * norm for name, norm in UP.items()}, checkpoint=1.0)
    found = checkpoint_movement([later, measured(UP, checkpoint=0.5)])
    assert found.checkpoints == (0.5, 1.0) and found.scales == (1.0, pytest.approx(1 / 3))
    assert all(moved.ratio == pytest.approx(1) and moved.climbed == 0 for moved in found.submodules)
    assert found.drifts[0].correlation > 0.99 and "by kind: unchanged" in str(found)
    assert found.kind_shares["up"] == pytest.approx((found.kind_shares["up"][0],) * 2)
    assert sum(shares[1] for shares in found.depth_shares.values()) == pytest.approx(1)


def test_moved_submodules_are_found():
    """The weakest q becomes the strongest: it climbs five ranks, comes first in the rows, and its block gains."""
    later = measured(UP | {"0.q": 60.0}, checkpoint=0.8)
    last = measured(UP | {"0.q": 60.0}, checkpoint=1.0)
    found = checkpoint_movement({"c": last, "a": measured(UP, checkpoint=0.5), "b": later})
    first_row = found.rows()[0]
    assert (first_row["id"], first_row["climbed"], first_row["rank_50"], first_row["rank_100"]) == ("0.q", 5, 6, 1)
    scale = (1 / 60) ** (1 / 12)  # of geometric means over 12 submodules
    assert found.scales == pytest.approx((1, scale, scale)) and first_row["norm_80"] == pytest.approx(60 * scale)
    assert first_row["ratio"] == pytest.approx(60 * scale)
    expected = check_drift(later, measured(UP, checkpoint=0.5))
    assert found.drifts[0] == expected and expected.by_kind == pytest.approx({"q": 1 / 7, "up": 1.0})
    assert found.drifts[1].by_kind == pytest.approx({"q": 1.0, "up": 1.0})
    total = math.fsum(UP.values())
    assert found.depth_shares[0] == pytest.approx((12 / total, 71 / (total + 59), 71 / (total + 59)))
    text = str(found)
    assert "org/m at 50, 80 and 100 % of its training: 12 submodules" in text
    assert f"50 to 80 %: rank correlation within kind {expected.correlation:.3f}" in text
    assert "by kind: gained q (" in text and "by block: gained block 0 (" in text and "moved most: 0.q, times" in text
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["checkpoints"] == [0.5, 0.8, 1.0]


def test_zero_norms_and_few_entries_move_too(tmp_path):
    """A norm from zero has no ratio, one that stays zero has 1; kinds of under 4 entries have no correlation."""
    a, b = {"0.q": 0.0, "0.k": 0.0, "0.v": 2.0}, {"0.q": 1.0, "0.k": 0.0, "0.v": 1.0}
    found = checkpoint_movement([measured(a, checkpoint=0.5), measured(b, checkpoint=1.0)])
    assert [moved.ratio for moved in found.submodules] == [None, 1.0, 1.0]
    assert found.drifts == (None,) and "too few entries" in str(found) and "from or to zero" in str(found)
    write_table(found.rows(), tmp_path / "t.parquet")
    nothing = {"0.q": 0.0}
    assert checkpoint_movement([measured(nothing, checkpoint=0.5), measured(nothing, checkpoint=1.0)]).scales == (
        1.0,
        1.0,
    )


def test_different_data_are_noted():
    """A movement between blueprints of different or unknown data says so."""
    one, other = measured(UP, checkpoint=0.5), measured(UP, checkpoint=1.0, data="b")
    assert checkpoint_movement([one, measured(UP, checkpoint=1.0)]).notes == ()
    assert "different data" in checkpoint_movement([one, other]).notes[0]
    assert "Not every blueprint says" in checkpoint_movement([one, replace(other, provenance={})]).notes[0]
    quantized = replace(one, training_checkpoint=1.0, submodules=tuple(replace(e, quantized=True) for e in one))
    assert "equally quantized" in checkpoint_movement([one, quantized]).notes[0]


@pytest.mark.parametrize(
    ("others", "error", "message"),
    [
        ([], BlueprintError, r"needs two checkpoints or more; there is 50 %"),
        ([measured(UP, checkpoint=0.5)], BlueprintError, r"blueprint 1 and blueprint 2 are both at 50 %.*--merge"),
        ([measured(UP, model_id="org/b")], MismatchError, r"their model_id is 'org/m' and 'org/b'"),
        ([measured({"0.q": 1.0})], MismatchError, r"cannot be compared: '0\.up'"),
    ],
)
def test_blueprints_without_a_movement_are_refused(others, error, message):
    """One checkpoint, one twice, none, another model, other submodules."""
    with pytest.raises(error, match=message):
        checkpoint_movement([measured(UP, checkpoint=0.5), *others])


def test_digests_of_two_models_are_refused():
    """The same id is not enough where both know their model's structure."""
    one = replace(measured(UP, checkpoint=0.5), model_digest="sha256:1")
    with pytest.raises(MismatchError, match="model_digest is 'sha256:1' and 'sha256:2'"):
        checkpoint_movement([one, replace(measured(UP), model_digest="sha256:2")])
    assert checkpoint_movement([one, measured(UP)]).checkpoints == (0.5, 0.8)


def test_it_reads_the_callbacks_files(run_folder):
    """The folder of a training gives its movement, of the same examples throughout; and they do not merge."""
    blueprints, _ = read_sources([run_folder])
    found = checkpoint_movement(blueprints)
    assert found.checkpoints == (0.5, 0.8, 1.0) and len(found.submodules) == 28 and None not in found.drifts
    assert any(moved.ratio != 1 for moved in found.submodules) and found.notes == ()
    merged, notes = merge_all(blueprints)
    assert merged == tuple(blueprints.values()) and "training_checkpoint" in notes[0]


def test_a_measured_model_moves_from_its_untrained_self():
    """Blueprints of generate_blueprint at two checkpoints, on the same data, need no note."""
    sides = [
        generate_blueprint(
            tiny_llama(layers=4, seed=seed), toy_batches(), model_id="t", training_checkpoint=share, progress=False
        )
        for seed, share in ((0, 0.5), (1, 1.0))
    ]
    found = checkpoint_movement(sides)
    assert found.notes == () and len(found.rows()) == 28
    assert max(abs(math.log(moved.ratio)) for moved in found.submodules) > 0.01
