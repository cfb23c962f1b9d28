"""The cross-influence matrix is stored, analysed and chosen from. Run: pytest tests/data/test_cross_influence.py"""

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from peft_blueprint.data.cross_influence import (
    Budget,
    CrossInfluence,
    alternate,
    analyse_low_rank,
    fit_exponent,
    search_pairs,
    upper_bound,
)
from peft_blueprint.errors import BlueprintError, FormatError, MeasurementError, MismatchError
from peft_blueprint.measure import per_example_losses
from peft_blueprint.measure.concentration import FRACTIONS, fit_gamma, retained_mass_curve
from peft_blueprint.measure.influence import Influence
from peft_blueprint.measure.measurement import measure_influence
from peft_blueprint.testing import tiny_llama, toy_batches


def cross(values, **options):
    values = np.asarray(values, dtype=float)
    rows, columns = values.shape
    return CrossInfluence(
        values=values,
        names=tuple(f"m.{i}" for i in range(rows)),
        kinds=tuple("ab"[i % 2] for i in range(rows)),
        depths=tuple(range(rows)),
        examples=np.arange(columns),
        **options,
    )


def skewed(rows, columns, seed=0):
    return np.exp(np.random.default_rng(seed).normal(size=(rows, columns)))


def best_by_trying_all(matrix, rows, columns):
    return max(
        matrix[np.ix_(some, others)].sum()
        for some in combinations(range(matrix.shape[0]), rows)
        for others in combinations(range(matrix.shape[1]), columns)
    )


# Two blocks that belong together, and a row and a column that are large everywhere else.
BLOCKS = np.array(
    [
        [9.0, 9.0, 0.0, 0.0, 0.0, 0.0],
        [9.0, 9.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 5.0, 5.0, 5.0, 5.0],
        [0.0, 0.0, 5.0, 5.0, 5.0, 5.0],
    ]
)


@pytest.fixture(scope="module")
def influence() -> Influence:
    """Of the four-layer tiny Llama, 28 submodules, on eight toy examples."""
    return measure_influence(tiny_llama(), toy_batches(), progress=False)


# ------------------------------------------------------------------------------------------ the record


def test_the_matrix_holds_the_measurement(influence):
    """Norms (eq. 32) or alignments, with names, kinds and depths."""
    matrix = CrossInfluence.from_influence(influence)
    assert np.array_equal(matrix.values, influence.norms.numpy())
    assert matrix.names == tuple(s.name for s in influence.submodules)
    assert matrix.kinds[0] == "q_proj" and matrix.depths[-1] == 3
    assert matrix.examples.tolist() == list(range(influence.examples))
    assert matrix.target_tokens.tolist() == influence.target_tokens.tolist()
    assert matrix.parameters[0] == np.prod(influence.submodules[0].shape)
    assert matrix.data_digest == influence.data_digest
    aligned = CrossInfluence.from_influence(influence, "alignments", examples=range(100, 100 + influence.examples))
    assert np.array_equal(aligned.values, influence.alignments.numpy()) and aligned.examples[0] == 100
    with pytest.raises(ValueError, match="read-only"):
        matrix.values[0, 0] = 1


@pytest.mark.parametrize("of", ["norms", "alignments"])
def test_a_saved_matrix_loads_unchanged(influence, tmp_path, of):
    """All fields come back from one file."""
    matrix = CrossInfluence.from_influence(influence, of).normalize("kind")
    path = matrix.save(tmp_path / "new" / "cross.safetensors")
    assert [file.name for file in path.parent.iterdir()] == ["cross.safetensors"]
    again = CrossInfluence.load(path)
    for name in ("values", "examples", "losses", "target_tokens", "parameters"):
        assert np.array_equal(vars(matrix)[name], vars(again)[name])
    for name in ("names", "kinds", "depths", "statistic", "normalized", "data_digest"):
        assert vars(matrix)[name] == vars(again)[name]
    bare = cross(BLOCKS)
    assert CrossInfluence.load(bare.save(path)).losses is None


def test_invalid_files_are_refused(tmp_path):
    """Missing, truncated, of another kind or version, with mismatched arrays or impossible values."""
    path = tmp_path / "cross.safetensors"
    with pytest.raises(BlueprintError, match="does not exist"):
        CrossInfluence.load(path)
    whole = cross(BLOCKS).save(path).read_bytes()
    for content in (b"", b"{}", whole[:-4], whole[:50]):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="is not a valid safetensors file"):
            CrossInfluence.load(path)

    names = [f"m.{i}" for i in range(4)]
    record = {"names": names, "kinds": [None] * 4, "depths": [None] * 4, "statistic": "norms", "normalized": []}
    record["data_digest"] = ""
    values, ids = BLOCKS.astype(np.float32), np.arange(6)

    def load(arrays=None, version="1", **changes):
        text = json.dumps(record | changes)
        tensors = {"values": values, "examples": ids} | (arrays or {})
        metadata = {"cross_influence.version": version, "cross_influence.json": text}
        save_file(tensors, path, metadata if version else None)
        return CrossInfluence.load(path)

    assert load().values.shape == (4, 6)
    wrong = [
        ({"version": ""}, "version 1, got no version"),
        ({"version": "2"}, "version 1, got version '2'"),
        ({"statistic": "sums"}, "statistic must be one of .* got 'sums'"),
        ({"names": names[:3]}, "names must have length 4 for 4 × 6 values, got 3"),
        ({"names": [1, 2, 3, 4]}, "names.* must be text, got 1"),
        ({"depths": ["0"] * 4}, "depths.* must be"),
        ({"normalized": ["size"]}, "normalized.* must be one of"),
        ({"names": ["m.0"] * 4}, "have 1 names"),
        ({"arrays": {"values": values[0]}}, "must be a matrix"),
        ({"arrays": {"values": -values}}, "negative norms"),
        ({"arrays": {"values": values * np.float32("nan")}}, "not finite"),
        ({"arrays": {"values": values.astype(np.float64)}}, "'values': 'F64'"),
        ({"arrays": {"losses": values[0, :4]}}, "losses must have length 6"),
        ({"arrays": {"more": values}}, "'more': 'F32'"),
        ({"arrays": {"examples": ids * 0}}, "1 ids"),
    ]
    for options, message in wrong:
        with pytest.raises(FormatError, match=message):
            load(**options)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """The error says why."""
    (tmp_path / "file").write_text("old")
    with pytest.raises(BlueprintError, match="cannot be written"):
        cross(BLOCKS).save(tmp_path / "file" / "cross.safetensors")
    assert (tmp_path / "file").read_text() == "old"


def test_parts_with_different_examples_merge(influence):
    """Two halves make the whole; alignments, which depend on all examples, are refused."""
    whole = CrossInfluence.from_influence(influence)
    half = influence.examples // 2
    cut = [slice(0, half), slice(half, None)]
    parts = [
        replace(
            whole,
            values=whole.values[:, part],
            examples=whole.examples[part],
            losses=whole.losses[part],
            target_tokens=whole.target_tokens[part],
        )
        for part in cut
    ]
    merged = CrossInfluence.merge(parts)
    for name in ("values", "examples", "losses", "target_tokens", "parameters"):
        assert np.array_equal(vars(whole)[name], vars(merged)[name]), name
    assert merged.data_digest != whole.data_digest
    assert CrossInfluence.merge([replace(parts[0], losses=None), parts[1]]).losses is None
    with pytest.raises(MismatchError, match="must be unique"):
        CrossInfluence.merge([whole, whole])
    with pytest.raises(MismatchError, match="Influence.merge"):
        CrossInfluence.merge([parts[0], CrossInfluence.from_influence(influence, "alignments")])
    with pytest.raises(MismatchError, match="normalize after"):
        CrossInfluence.merge([parts[0], parts[1].normalize("kind")])
    with pytest.raises(MismatchError, match="same model"):
        CrossInfluence.merge([parts[0], cross(BLOCKS)])
    with pytest.raises(MeasurementError, match="at least one part"):
        CrossInfluence.merge([])


def test_normalizing_gives_each_kind_or_example_mean_1():
    """In absolute value; signs stay."""
    values = skewed(6, 5) * [[1], [100], [1], [100], [1], [100]]
    by_kind, by_example = (cross(values).normalize(by) for by in ("kind", "example"))
    assert np.allclose([by_kind.values[0::2].mean(), by_kind.values[1::2].mean()], 1)
    assert np.allclose(by_example.values.mean(axis=0), 1)
    both = by_kind.normalize("example")
    assert both.normalized == ("kind", "example") and np.allclose(both.values.mean(axis=0), 1)
    signed = cross(values * np.where(np.arange(5) % 2, -1, 1), statistic="alignments").normalize("kind")
    assert np.allclose(np.abs(signed.values), by_kind.values) and (signed.values[:, 1] < 0).all()
    assert cross(np.diag([1.0, 0.0])).normalize("example").normalize("kind").values.tolist() == [
        [2, 0],
        [0, 0],
    ]
    with pytest.raises(BlueprintError, match="must be one of kind, example"):
        cross(values).normalize("depth")


# ------------------------------------------------------------------------------------------ low-rank structure


def test_low_rank_structure_is_detected():
    """Rank one of an outer product, full rank of an identity, and three patterns put in (eq. 33)."""
    one = analyse_low_rank(np.outer(skewed(1, 30), skewed(1, 20)))
    assert one.effective_rank == pytest.approx(1) and one.participation_ratio == pytest.approx(1)
    assert one.independent_error < 1e-9 and one.components_for(0.99) == 1 and one.interactions == 0
    identity = analyse_low_rank(np.eye(8), shuffles=0)
    assert identity.effective_rank == pytest.approx(8) and identity.participation_ratio == pytest.approx(8)
    assert identity.captured(2) == pytest.approx(2 / 8) and identity.error(2) == pytest.approx((6 / 8) ** 0.5)
    assert [identity.components_for(share) for share in (0.25, 0.26, 1)] == [2, 3, 8] and identity.interactions is None
    rng = np.random.default_rng(0)
    modes = 10 + sum(np.outer(rng.normal(size=40), rng.normal(size=30)) for _ in range(3))
    assert analyse_low_rank(modes + 0.2 * rng.normal(size=(40, 30))).interactions == 3
    assert analyse_low_rank(10 + rng.normal(size=(40, 30))).interactions <= 1


def test_the_first_components_are_the_best_of_their_rank():
    """Errors are those of the truncated decomposition, and independence does no better than one component."""
    values = skewed(9, 7)
    found = cross(values).low_rank(shuffles=3)
    left, sizes, right = np.linalg.svd(values.astype(np.float32).astype(float), full_matrices=False)
    for rank in (1, 3):
        rest = values - (left[:, :rank] * sizes[:rank]) @ right[:rank]
        assert found.error(rank) == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(values), abs=1e-5)
    assert found.independent_error >= found.error(1)
    assert json.loads(json.dumps(found.to_dict()))["effective_rank"] == found.effective_rank
    assert "effective rank" in found.summary()


# ------------------------------------------------------------------------------------------ choosing


def test_captured_share_is_eq_34():
    """The sum of the entries where the chosen meet, over the whole; each name and id counts once."""
    matrix = replace(cross(BLOCKS), examples=np.arange(6) + 10)
    assert matrix.captured_share(["m.0", "m.2"], [10, 13]) == pytest.approx(14 / 76)
    assert matrix.captured_share(["m.0", "m.0"], [10, 10]) == pytest.approx(9 / 76)
    assert matrix.captured_share(matrix.names, matrix.examples.tolist()) == 1
    assert matrix.captured_share([], []) == 0
    with pytest.raises(BlueprintError, match="1 of 2 submodules are unknown: 'm.9'"):
        matrix.captured_share(["m.0", "m.9"], [10])
    with pytest.raises(BlueprintError, match="1 of 1 examples are unknown: '3'. The matrix has 6"):
        matrix.captured_share(["m.0"], [3])


def test_joint_selection_finds_a_block_that_separate_selection_misses():
    """Separate selection takes the rows of one block and the columns of the other."""
    matrix = cross(BLOCKS)
    found = matrix.select_jointly(0.5, 2 / 6)
    assert found.submodules == ("m.0", "m.1") and found.examples == (0, 1)
    assert found.share == found.bound == pytest.approx(36 / 76)
    tall = cross(BLOCKS + np.array([[0], [0], [3], [3]]))  # now the other rows have the larger sums
    assert tall.select_jointly(0.5, 2 / 6).separate < 0.2 < tall.select_jointly(0.5, 2 / 6).share


@pytest.mark.parametrize("seed", range(6))
def test_joint_selection_against_all_pairs(seed):
    """Between the separate choice and the bound, and for small matrices near the optimum."""
    values = skewed(7, 8, seed)
    matrix = cross(values)
    found = matrix.select_jointly(0.43, 0.38)  # three of each
    best = best_by_trying_all(matrix.values.astype(float), 3, 3) / matrix.values.sum(dtype=float)
    assert len(found.submodules) == len(found.examples) == 3
    assert found.separate <= found.share <= best + 1e-12 <= found.bound + 2e-12
    assert found.share > 0.98 * best
    assert found.share == pytest.approx(matrix.captured_share(found.submodules, found.examples))
    assert found.share == max(share for _, share in found.starts) and len(found.starts) == 17


@pytest.mark.parametrize("has_costs", [False, True])
@pytest.mark.parametrize("is_signed", [False, True])
def test_the_alternation_rises_monotonically_and_converges(has_costs, is_signed):
    """From every start, also under budgets of cost and with negative entries; the pair keeps to its limits."""
    rng = np.random.default_rng(1)
    for seed in range(8):
        matrix = skewed(12, 15, seed) - (1.0 if is_signed else 0.0)
        row_costs, column_costs = (np.exp(rng.normal(size=n)) if has_costs else None for n in (12, 15))
        rows, columns = Budget(12, 0.4, row_costs), Budget(15, 0.3, column_costs)
        pairs = search_pairs(matrix, rows, columns, seed=seed)
        for pair in pairs.values():
            assert np.all(np.diff(pair.history) > 0)
            assert pair.total == pytest.approx(matrix[np.ix_(pair.rows, pair.columns)].sum())
            again = alternate(matrix, rows, columns, pair.columns, pair.rows)
            assert again.history == (pytest.approx(pair.total),)
            assert rows.costs[pair.rows].sum() <= rows.limit and columns.costs[pair.columns].sum() <= columns.limit
            assert pair.total <= upper_bound(matrix, rows, columns) + 1e-9
        assert max(pair.total for pair in pairs.values()) >= pairs["separate"].total


def test_a_budget_of_cost_takes_the_largest_scores_per_cost():
    """Or the single largest if that is more; equal costs give the same as a count."""
    assert Budget(3, 0.5, [1, 1, 2]).choose(np.array([3.0, 3.0, 5.0])).tolist() == [0, 1]
    assert Budget(3, 0.5, [1, 7, 8]).choose(np.array([2.0, 1.0, 9.0])).tolist() == [2]
    assert Budget(3, 0.6, [1, 1, 1]).choose(np.array([-3.0, -1.0, -2.0])).tolist() == [1], (
        "negative scores are left out"
    )
    assert Budget(3, 0.6).choose(np.array([-3.0, -1.0, -2.0])).tolist() == [1, 2], "a count is exact"
    matrix = cross(skewed(8, 10))
    same = matrix.select_jointly(0.5, 0.5, submodule_costs=np.full(8, 3.0), example_costs=np.full(10, 0.1))
    assert (
        same.submodules == matrix.select_jointly(0.5, 0.5).submodules
        and same.share == matrix.select_jointly(0.5, 0.5).share
    )
    assert same.gamma == pytest.approx(matrix.select_jointly(0.5, 0.5).gamma)


def test_independence_is_eq_35():
    """Exponents fit the curves of retained mass; an outer product captures the product of the shares."""
    rows, columns = skewed(1, 40, 1)[0], skewed(1, 50, 2)[0]
    matrix = cross(np.outer(rows, columns))
    for scores, found in zip((rows, columns), matrix.exponents(), strict=True):
        fractions = [k for k in FRACTIONS if k * len(scores) >= 1]
        assert found == pytest.approx(fit_gamma(fractions, retained_mass_curve(scores, fractions))[0], rel=1e-5)
    found = matrix.select_jointly(0.2, 0.3)
    assert found.share == pytest.approx(found.separate) and found.share == pytest.approx(found.product)
    assert found.bound == pytest.approx(found.share)
    assert found.independent == pytest.approx(0.2**found.gamma * 0.3**found.delta)
    assert fit_exponent(np.ones(10)) == pytest.approx(1)
    power = np.diff(np.linspace(0, 1, 101) ** 0.4)
    assert fit_exponent(power) == pytest.approx(0.4, abs=1e-6)


def test_harmful_examples_count_against(influence):
    """With alignments the example that moves most in the wrong direction is left out."""
    pulls = np.array([[1.0, 1.0, 1.0, -2.0], [1.0, 1.0, 1.0, -1.0]])
    chosen = cross(pulls, statistic="alignments").select_jointly(1.0, 0.75)
    assert chosen.examples == (0, 1, 2) and chosen.share == pytest.approx(6 / 3) == chosen.bound
    assert 3 in cross(np.abs(pulls)).select_jointly(1.0, 0.25).examples
    with pytest.raises(BlueprintError, match="must have a positive sum"):
        cross(-pulls, statistic="alignments").select_jointly(0.5, 0.5)
    found = CrossInfluence.from_influence(influence, "alignments").select_jointly(0.3, 0.3)
    assert found.share >= found.separate


def test_reports_are_json_and_text(influence):
    """The matrix's report holds nothing of a single example."""
    matrix = CrossInfluence.from_influence(influence)
    found = matrix.select_jointly(0.3, 0.3, seed=1)
    assert found == matrix.select_jointly(0.3, 0.3, seed=1), "the same for the same seed"
    assert json.loads(json.dumps(found.to_dict()))["starts"]["separate"] > 0
    assert "chosen separately" in found.summary()
    report = json.loads(json.dumps(matrix.to_dict()))
    assert sum(report["submodule_shares"].values()) == pytest.approx(1) and report["examples"] == influence.examples
    assert "norms of 28 submodules" in matrix.summary()
    assert "by kind and example" in matrix.normalize("kind").normalize("example").summary()


def test_bad_arguments_are_refused_by_name(influence):
    """Shares, costs, starts, a single example, and values that are not finite."""
    matrix = cross(BLOCKS)
    for k, q in ((0, 0.5), (1.5, 0.5), (float("nan"), 0.5), (0.5, 0), (0.5, -1)):
        with pytest.raises(BlueprintError, match=r"must be in .0, 1."):
            matrix.select_jointly(k, q)
    with pytest.raises(BlueprintError, match="Costs must be 4 positive numbers, one for each of the submodules"):
        matrix.select_jointly(0.5, 0.5, submodule_costs=[1, 2, 3])
    with pytest.raises(BlueprintError, match="Costs must be 6 positive numbers, one for each of the examples"):
        matrix.exponents(example_costs=[1, 1, 1, 1, 1, 0])
    with pytest.raises(BlueprintError, match="the cheapest costs 5"):
        matrix.select_jointly(0.2, 0.5, submodule_costs=[5, 5, 5, 5])
    with pytest.raises(BlueprintError, match="starts must be at least 0"):
        matrix.select_jointly(0.5, 0.5, starts=-1)
    with pytest.raises(BlueprintError, match="shuffles must be at least 0"):
        matrix.low_rank(shuffles=-1)
    with pytest.raises(BlueprintError, match="components must be from 0 to 4, got 9"):
        matrix.low_rank(0).error(9)
    with pytest.raises(BlueprintError, match=r"share must be in .0, 1., got 0"):
        matrix.low_rank(0).components_for(0)
    with pytest.raises(BlueprintError, match="matrix of zeros"):
        cross(np.zeros((2, 2))).low_rank()
    one = cross(BLOCKS[:, :1])
    for ask in (one.low_rank, one.exponents, lambda: one.select_jointly(0.5, 0.5)):
        with pytest.raises(MeasurementError, match="at least two examples"):
            ask()
    for values, message in (
        (np.empty((3, 0)), "must be a matrix"),
        (np.empty((0, 3)), "must be a matrix"),
        (-BLOCKS, "9.0 in row 0, column 0"),
    ):
        with pytest.raises(MeasurementError, match=message):
            cross(values)
    with pytest.raises(MeasurementError, match="not finite"):
        cross(np.where(BLOCKS == 9, np.nan, BLOCKS), statistic="alignments")
    with pytest.raises(MismatchError, match="losses must have length 6 for 4 × 6 values, got 5"):
        cross(BLOCKS, losses=np.ones(5))
    with pytest.raises(MismatchError, match="must be integers"):
        replace(matrix, examples=np.arange(6) / 2)
    with pytest.raises(BlueprintError, match="statistic must be one of norms, alignments, got 'sizes'"):
        CrossInfluence.from_influence(influence, "sizes")
    with pytest.raises(MeasurementError, match="projections"):
        CrossInfluence.from_influence(replace(influence, projections=torch.zeros(28, 8, 0)), "alignments")
    with pytest.raises(MeasurementError, match="at least two"):
        CrossInfluence.from_influence(replace(influence, norms=influence.norms[:, :1]), "alignments")


def test_blocks_keep_the_sums_of_their_examples():
    """A whole block's share is that of its examples; costs, losses and tokens add; choosing blocks captures no more."""
    influence = measure_influence(tiny_llama(), toy_batches(examples=12), projection_size=251, progress=False)
    labels = [0, 2, 0, 1, 2, 2, 0, 1, 1, 0, 2, 0]
    for statistic in ("norms", "alignments"):
        matrix = CrossInfluence.from_influence(influence, statistic)
        blocks = matrix.coarsen(labels)
        assert blocks.examples.tolist() == [0, 1, 2] and blocks.sizes.tolist() == [5, 3, 4]
        assert blocks.submodule_totals == pytest.approx(matrix.submodule_totals, rel=1e-5)
        for block in (0, 1, 2):
            members = [i for i, label in enumerate(labels) if label == block]
            assert blocks.values[:, block] == pytest.approx(matrix.values[:, members].sum(axis=1), rel=1e-4, abs=1e-5)
            if statistic == "norms":
                some, both = matrix.names[::3], [(matrix, members), (blocks, [block])]
                shares = [of.captured_share(some, chosen) for of, chosen in both]
                assert shares[0] == pytest.approx(shares[1], rel=1e-5)
            counts = influence.target_tokens.numpy()[members]
            assert blocks.target_tokens[block] == counts.sum()
            assert blocks.losses[block] == pytest.approx(influence.losses.numpy()[members].mean(), rel=1e-5)
    blocks = CrossInfluence.from_influence(influence).coarsen(labels)
    coarse = blocks.select_jointly(0.3, 0.45, example_costs=blocks.sizes)
    fine = CrossInfluence.from_influence(influence).select_jointly(0.3, 5 / 12)
    assert coarse.examples == (0,) and coarse.share <= fine.share + 1e-9
    assert "3 blocks of 3 to 5 examples" in blocks.summary()
    twice = blocks.coarsen([0, 1, 1])
    assert twice.sizes.tolist() == [5, 7] and twice.losses[1] == pytest.approx(
        (blocks.losses[1] * 3 + blocks.losses[2] * 4) / 7
    )
    with pytest.raises(MismatchError, match=r"blocks must be 12 integers, one for each example, got shape \(2,\)"):
        CrossInfluence.from_influence(influence).coarsen([0, 1])


def test_a_stream_is_measured_block_by_block(tmp_path):
    """As the whole is, coarsened; and the norm of a block's own gradient is autograd's."""
    model, batches = tiny_llama(layers=1), toy_batches(examples=20)
    found = CrossInfluence.from_blocks(model, iter(batches), batches_per_block=2)
    whole = CrossInfluence.from_influence(measure_influence(model, batches, progress=False))
    expected = whole.coarsen([i // 8 for i in range(20)])
    assert found.values == pytest.approx(expected.values, rel=1e-3) and found.sizes.tolist() == [8, 8, 4]
    assert found.losses == pytest.approx(expected.losses, rel=1e-4)
    assert (found.target_tokens == expected.target_tokens).all()

    own = CrossInfluence.from_blocks(model, batches, 2, "block_norms", sketch_size=None)
    for block in range(3):
        model.zero_grad()
        for batch in batches[2 * block : 2 * block + 2]:
            per_example_losses(model, batch)[0].sum().backward()
        norms = [float(model.get_submodule(name).weight.grad.norm()) for name in own.names]
        assert own.values[:, block] == pytest.approx(norms, rel=1e-3)
    assert (own.values <= found.values * 1.001).all()
    again = CrossInfluence.load(own.save(tmp_path / "blocks.safetensors"))
    assert again.statistic == "block_norms" and again.sizes.tolist() == [8, 8, 4]
    with pytest.raises(MismatchError, match="Only norms of one kind"):
        CrossInfluence.merge([own, replace(found, examples=found.examples + 3)])
    with pytest.raises(BlueprintError, match="batches_per_block must be at least 1, got 0"):
        CrossInfluence.from_blocks(model, batches, 0)
    with pytest.raises(BlueprintError, match="statistic must be one of norms, block_norms"):
        CrossInfluence.from_blocks(model, batches, 2, "alignments")
