"""Drift between a probe and a published blueprint, and the policies for it."""

from dataclasses import replace

import numpy as np
import pytest

from peft_blueprint import Blueprint, BlueprintError, Submodule, check_drift, reconcile
from peft_blueprint.compare.drift import DRIFT_THRESHOLD, spearman
from peft_blueprint.errors import DriftError, MismatchError


Z = 1.959964
GROUPS = {"q_proj": "attn", "k_proj": "attn", "v_proj": "attn", "up_proj": "ffn"}


def blueprint_of(error=None, model_id="m", **norms_by_kind):
    """One entry for every kind and layer, with a 95 % interval if a relative error is given."""
    entries = tuple(
        Submodule(
            f"model.layers.{depth}.{kind}",
            float(norm),
            kind=kind,
            depth=depth,
            group=f"{GROUPS[kind]}.{depth}",
            norm_interval=None if error is None else (norm * (1 - Z * error), norm * (1 + Z * error)),
        )
        for kind, norms in norms_by_kind.items()
        for depth, norm in enumerate(norms)
    )
    return Blueprint(model_id, entries)


def random_blueprint(seed, layers=100, error=None):
    generator = np.random.default_rng(seed)
    return blueprint_of(error, **{kind: generator.lognormal(size=layers) for kind in GROUPS})


UP, DOWN = [1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]
PUBLISHED = blueprint_of(q_proj=UP, up_proj=UP)
DRIFTED = blueprint_of(q_proj=DOWN, up_proj=DOWN)


def test_a_blueprint_has_not_drifted_from_itself():
    """Identical norms correlate 1 in every kind."""
    drift = check_drift(random_blueprint(0), random_blueprint(0))
    assert drift.correlation == pytest.approx(1, abs=1e-3) and not drift.drifted
    assert drift.by_kind == dict.fromkeys(sorted(GROUPS), pytest.approx(1))
    assert drift.level == "submodule" and drift.threshold == DRIFT_THRESHOLD


def test_independent_blueprints_have_drifted():
    """Unrelated norms correlate about 0, and the interval says so; reversed ones correlate −1."""
    drift = check_drift(random_blueprint(0), random_blueprint(1))
    assert abs(drift.correlation) < 0.15 and drift.drifted
    assert drift.interval[0] < 0 < drift.interval[1] < DRIFT_THRESHOLD
    assert check_drift(DRIFTED, PUBLISHED).correlation == pytest.approx(-1, abs=1e-3)


def test_pooling_by_hand():
    """Ranks over 5 and over 7 entries, centred and divided by 5 and 7, as one sample; three entries are too few."""
    published = blueprint_of(q_proj=[1, 2, 3, 4, 5], up_proj=[1, 2, 3, 4, 5, 6, 7], k_proj=[1, 2, 3])
    local = blueprint_of(q_proj=[20, 10, 30, 40, 50], up_proj=[5, 2, 1, 4, 3, 7, 6], k_proj=[3, 2, 1])
    squares = sum((a - b) ** 2 for a, b in zip([5, 2, 1, 4, 3, 7, 6], range(1, 8), strict=True))
    drift = check_drift(local, published)
    assert drift.by_kind == pytest.approx({"q_proj": 1 - 6 * 2 / (5 * 24), "up_proj": 1 - 6 * squares / (7 * 48)})
    pooled = [[(n - 3) / 5 for n in (2, 1, 3, 4, 5)] + [(n - 4) / 7 for n in (5, 2, 1, 4, 3, 7, 6)]]
    pooled += [[(n - 3) / 5 for n in range(1, 6)] + [(n - 4) / 7 for n in range(1, 8)]]
    assert drift.correlation == pytest.approx(np.corrcoef(pooled)[0, 1])
    assert drift.interval[0] < drift.correlation < drift.interval[1]


NEAR_ZERO = {4: [2, 4, 1, 3], 8: [5, 2, 8, 1, 6, 4, 7, 3], 30: np.random.default_rng(3).permutation(30) + 1}


@pytest.mark.parametrize("entries", NEAR_ZERO)
@pytest.mark.parametrize("level", ["submodule", "group"])
def test_kinds_that_agree_do_not_hide_kinds_that_do_not(entries, level):
    """Of equally many entries every kind counts the same, on shallow and deep models and at group level."""
    steps = list(range(1, entries + 1))
    published = blueprint_of(q_proj=steps, up_proj=steps, k_proj=steps, v_proj=steps)
    local = blueprint_of(q_proj=steps, up_proj=steps, k_proj=NEAR_ZERO[entries], v_proj=NEAR_ZERO[entries])
    if level == "group":
        published, local = (
            Blueprint(
                "m",
                tuple(
                    Submodule(f"{group}.{e.depth}", e.gradient_norm, kind=group)
                    for kind, group in (("q_proj", "attn"), ("k_proj", "ffn"))
                    for e in b
                    if e.kind == kind
                ),
                level="group",
            )
            for b in (published, local)
        )
    drift = check_drift(local, published)
    assert drift.correlation == pytest.approx(np.mean(list(drift.by_kind.values()))) and drift.correlation < 0.6
    assert drift.drifted and drift.interval[0] < drift.correlation < drift.interval[1] < 0.95


@pytest.mark.parametrize("kinds", [("attn", "ffn"), ("q_proj", "k_proj", "v_proj", "up_proj")])
@pytest.mark.parametrize("entries", [4, 6, 12, 30])
def test_the_interval_covers(entries, kinds):
    """The mean correlation of random pairs of blueprints is in about 95 % of their intervals (91 % or more of 180)."""
    generator = np.random.default_rng(entries)
    found = []
    for rho in (0.0, 0.5, 0.9):
        pairs = generator.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=(60, len(kinds), entries))
        drifts = []
        for pair in np.exp(pairs):
            both = (
                Blueprint(
                    "m",
                    tuple(
                        Submodule(f"{kind}.{i}", pair[k, i, side], kind=kind)
                        for k, kind in enumerate(kinds)
                        for i in range(entries)
                    ),
                )
                for side in (0, 1)
            )
            drifts.append(check_drift(*both))
        many = generator.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=(5_000, entries))
        truth = spearman(many[..., 0], many[..., 1]).mean()
        found += [drift.interval[0] <= truth <= drift.interval[1] for drift in drifts]
        assert all(drift.interval[0] <= drift.correlation <= drift.interval[1] for drift in drifts)
    assert 0.9 <= np.mean(found)  # 180 draws: three standard errors below 0.95


def test_only_ranks_within_a_kind_count():
    """Another scale of one kind, or of everything, or a monotone curve through it, changes nothing."""
    local, published = random_blueprint(0, layers=9), random_blueprint(1, layers=9)
    louder = tuple(
        replace(e, gradient_norm=1e3 * e.gradient_norm**2) if e.kind == "q_proj" else e for e in local.submodules
    )
    assert check_drift(replace(local, submodules=louder), published) == check_drift(local, published)
    shuffled = replace(local, submodules=local.submodules[::-1])
    assert check_drift(shuffled, published).correlation == pytest.approx(check_drift(local, published).correlation)


def test_the_interval_narrows_with_the_entries_errors():
    """Ten times smaller errors on both sides give a narrower interval, the same for the same seed."""
    widths = []
    for error in (0.3, 0.03):
        drift = check_drift(random_blueprint(0, 20, error), random_blueprint(1, 20, error), draws=100)
        assert drift.interval[0] < drift.correlation < drift.interval[1]
        widths.append(drift.interval[1] - drift.interval[0])
    assert widths[1] < widths[0] / 3
    assert drift == check_drift(random_blueprint(0, 20, error), random_blueprint(1, 20, error), draws=100)


@pytest.mark.parametrize(("rho", "error"), [(0.0, 0.1), (0.99, 0.02)])
def test_the_interval_is_as_wide_as_repeated_measurements_spread(rho, error):
    """An error that the norms carry already does not count twice, where they agree and where they do not."""
    generator = np.random.default_rng(3)
    truth = 1 + generator.multivariate_normal([0, 0], [[0.01, rho / 100], [rho / 100, 0.01]], size=(4, 30))
    found, widths = [], []
    for i in range(150):
        sides = truth + error * generator.standard_normal(truth.shape)
        both = [
            Blueprint(
                "m",
                tuple(
                    Submodule(f"{k}.{j}", x, kind=str(k), norm_interval=(max(0, x - Z * error), x + Z * error))
                    for k, norms in enumerate(sides[..., side])
                    for j, x in enumerate(norms)
                ),
            )
            for side in (0, 1)
        ]
        drift = check_drift(*both, draws=300 if i < 12 else 2, seed=i)
        found.append(drift.correlation)
        widths += [(drift.interval[1] - drift.interval[0]) / 2 / Z] if i < 12 else []
    assert 0.92 < np.mean(widths) / np.std(found) < 1.27


def test_an_error_of_zero_is_known_and_not_missing():
    """A submodule that no gradient reaches is sure of its zero; the others' intervals still count."""
    certain = blueprint_of(0.001, q_proj=[0, *UP], up_proj=[0, *UP])
    drift = check_drift(certain, certain)
    assert drift.interval[1] - drift.interval[0] < 1e-3


def test_a_published_blueprint_of_groups_is_compared_at_its_level():
    """A local probe is coarsened to it; a constant kind ranks nothing and correlates 0."""
    local = blueprint_of(q_proj=UP, k_proj=[1] * 8, up_proj=UP)
    groups = tuple(Submodule(f"{g}.{i}", 2.0 * i + 1) for g in ("attn", "ffn") for i in range(8))
    drift = check_drift(local, Blueprint("foundation", groups, level="group"))
    assert drift.level == "group" and set(drift.by_kind) == {"attn", "ffn"}
    assert drift.correlation == pytest.approx(1, abs=1e-3)
    assert check_drift(local, local).by_kind["k_proj"] == 0


def test_incomparable_blueprints():
    """Other submodules, and too few of every kind."""
    with pytest.raises(MismatchError, match="cannot be compared.*'model.layers.7.q_proj'.*only in that of"):
        check_drift(PUBLISHED, blueprint_of(q_proj=UP[:7], up_proj=UP))
    with pytest.raises(MismatchError, match="No kind .* has 4 entries .there are 6 in 2 kinds"):
        check_drift(blueprint_of(q_proj=UP[:3], up_proj=UP[:3]), blueprint_of(q_proj=UP[:3], up_proj=UP[:3]))


@pytest.mark.parametrize("policy", ["warn", "error", "refresh", "coarsen"])
def test_without_drift_every_policy_blends(policy):
    """Without a warning, at the given weight."""
    local = blueprint_of(q_proj=[2 * n for n in UP], up_proj=[n**2 for n in UP])
    assert reconcile(PUBLISHED, local, weight=0.3, policy=policy) == PUBLISHED.blend(local, 0.3)


def test_warn_warns_and_blends():
    """The numbers are in the warning."""
    with pytest.warns(UserWarning, match=r"'m' does not fit this data.*-1.00 \[-1.00, -\d.*\], below 0.85.*warn"):
        assert reconcile(PUBLISHED, DRIFTED, weight=0.3) == PUBLISHED.blend(DRIFTED, 0.3)


def test_error_stops_and_shows_the_numbers():
    """DriftError, with the correlation, its interval, the threshold and a fix."""
    with pytest.raises(DriftError, match=r"-1.00 \[-1.00, -\d.*\], below 0.85. Use policy='refresh'"):
        reconcile(PUBLISHED, DRIFTED, policy="error")
    assert reconcile(PUBLISHED, DRIFTED, policy="error", threshold=-2)


def test_refresh_is_the_probe_alone():
    """Norms and all of the probe's entries, with the published one's provenance noted."""
    published = replace(PUBLISHED, provenance={"command": "theirs"})
    with pytest.warns(UserWarning, match="refresh"):
        result = reconcile(published, DRIFTED, policy="refresh")
    assert result.submodules == DRIFTED.submodules
    assert result.provenance["instead_of"] == {"command": "theirs"}


COARSEN = {
    # k and v disagree and are small beside q, so that the groups agree
    "group": (
        blueprint_of(q_proj=UP, k_proj=[n / 100 for n in UP], v_proj=[n / 100 for n in UP]),
        blueprint_of(q_proj=UP, k_proj=[n / 100 for n in DOWN], v_proj=[n / 100 for n in DOWN]),
    ),
    # attention disagrees and is small beside the feed-forward blocks, so that only whole layers agree
    "layer": (
        blueprint_of(q_proj=[n / 100 for n in UP], up_proj=UP),
        blueprint_of(q_proj=[n / 100 for n in DOWN], up_proj=UP),
    ),
}


@pytest.mark.parametrize("level", COARSEN)
def test_coarsen_blends_at_the_first_level_that_agrees(level):
    """Every submodule then carries an even share of the blended norm of its group, or of its layer."""
    published, local = COARSEN[level]
    with pytest.warns(UserWarning, match="coarsen"):
        result = reconcile(published, local, weight=0.5, policy="coarsen")
    units = published.coarsen(level).blend(local.coarsen(level), 0.5)
    assert result == units.expand(local.submodules) and set(result.names) == set(local.names)
    of_layer_2 = [e.gradient_norm for e in result if e.depth == 2]
    [unit] = [e.gradient_norm for e in units if e.depth == 2]
    assert of_layer_2 == pytest.approx([unit / len(of_layer_2) ** 0.5] * len(of_layer_2))


@pytest.mark.parametrize("layers", [8, 5])
def test_coarsen_ends_with_the_probe(layers):
    """Where no level agrees."""
    published, local = (blueprint_of(**dict.fromkeys(("q_proj", "up_proj"), norms[:layers])) for norms in (UP, DOWN))
    with pytest.warns(UserWarning, match="coarsen"):
        assert reconcile(published, local, policy="coarsen").submodules == local.submodules


def test_a_published_blueprint_of_groups_is_reconciled_with_a_probe():
    """The paper's ids, blended onto the probe's submodules, or refused for their drift."""
    local = blueprint_of(q_proj=UP, k_proj=UP, up_proj=UP)
    groups = [Submodule(f"{g}.{i}", float(n)) for g in ("attn", "ffn") for i, n in enumerate(UP)]
    published = Blueprint("foundation", tuple(groups), level="group")
    blended = reconcile(published, local, policy="error")
    assert blended.level == "submodule" and set(blended.names) == set(local.names)
    away = blueprint_of(q_proj=DOWN, k_proj=DOWN, up_proj=DOWN)
    with pytest.warns(UserWarning, match="coarsen"):
        assert reconcile(published, away, policy="coarsen").submodules == away.submodules


def test_an_unknown_policy_is_named():
    """Before anything is compared."""
    with pytest.raises(BlueprintError, match="policy must be warn, error, refresh or coarsen, got 'ignore'"):
        reconcile(PUBLISHED, DRIFTED, policy="ignore")
