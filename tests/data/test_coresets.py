"""Coresets keep their guarantees. Run: pytest tests/data/test_coresets.py"""

from itertools import combinations

import numpy as np
import pytest

from peft_blueprint.data import coresets
from peft_blueprint.data.coresets import facility_location, k_centre
from peft_blueprint.errors import BlueprintError


RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(14, 3))


def similarities_of(points):
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    return 1 + unit @ unit.T


def cover_radius(points, chosen):
    """The largest distance of a point to the nearest chosen one."""
    return np.linalg.norm(points[:, None] - points[None, list(chosen)], axis=2).min(axis=1).max()


def covered(similarities, chosen):
    return similarities[:, list(chosen)].max(axis=1).sum()


def covers_as_much(similarities, chosen, expected):
    """At every step; two points that cover each other and nothing else add alike, and either may come first."""
    steps = range(1, len(expected) + 1)
    return len(set(chosen)) == len(expected) and np.allclose(
        [covered(similarities, chosen[:n]) for n in steps], [covered(similarities, expected[:n]) for n in steps], 1e-5
    )


def plain_greedy(similarities, count):
    """Facility location without lazy evaluation."""
    chosen = []
    for _ in range(count):
        free = [j for j in range(len(similarities)) if j not in chosen]
        chosen.append(max(free, key=lambda j: covered(similarities, [*chosen, j])))
    return chosen


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("start", range(0, 14, 3))
def test_k_centre_is_within_twice_the_best(count, start):
    """Compared with all sets of the same size."""
    chosen = k_centre(POINTS, count, start=start)
    best = min(cover_radius(POINTS, some) for some in combinations(range(len(POINTS)), count))
    assert chosen[0] == start and len(set(chosen)) == count
    assert cover_radius(POINTS, chosen) <= 2 * best + 1e-12


def test_k_centre_takes_the_farthest_each_time():
    """Also far from the origin, where distances are small against coordinates."""
    line = np.array([[0.0], [1.0], [2.0], [10.0], [4.9]])
    for offset in (0, 1e6):
        assert k_centre(line + offset, 4, start=0).tolist() == [0, 3, 4, 2]
    assert k_centre(POINTS, 5, seed=3).tolist() == k_centre(POINTS, 9, seed=3)[:5].tolist()
    assert len({int(k_centre(POINTS, 1, seed=seed)[0]) for seed in range(20)}) > 3


def test_copies_of_a_point_come_last():
    """A covered point is chosen only when no other is left."""
    twice = np.concatenate([POINTS[:5], POINTS[:5]])
    for chosen in (k_centre(twice, 10, start=0), facility_location(twice, 10)):
        assert sorted(chosen) == list(range(10))
        assert len({i % 5 for i in chosen[:5]}) == 5


@pytest.mark.parametrize("held", [0, 1000])
def test_facility_location_equals_plain_greedy(monkeypatch, held):
    """Lazily and in blocks, with similarities held or recomputed."""
    monkeypatch.setattr(coresets, "_HELD_POINTS", held)
    monkeypatch.setattr(coresets, "_AT_ONCE", 4)
    monkeypatch.setattr(coresets, "_ELEMENTS", 500)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        points = np.concatenate([rng.normal(size=(40, 4)), 5 + 0.1 * rng.normal(size=(40, 4))])
        similarities = similarities_of(points)
        expected = plain_greedy(similarities, 12)
        assert covers_as_much(similarities, facility_location(points, 12), expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_facility_location_covers_its_guaranteed_share_of_the_best(count):
    """1 − 1/e of the maximum over all sets of the same size."""
    similarities = similarities_of(POINTS)
    best = max(covered(similarities, some) for some in combinations(range(len(POINTS)), count))
    assert covered(similarities, facility_location(POINTS, count)) >= (1 - 1 / np.e) * best


def test_facility_location_prefers_dense_regions_and_k_centre_outliers():
    """One outlier beside a dense cluster."""
    points = np.concatenate([0.1 * RNG.normal(size=(30, 2)), [[9.0, 9.0]]])
    assert facility_location(points, 1)[0] < 30
    assert 30 in k_centre(points, 2, start=0)


def test_bad_points_and_counts_are_refused(monkeypatch):
    """Each message shows both sides."""
    for choose in (k_centre, facility_location):
        for count in (0, 15):
            with pytest.raises(BlueprintError, match=f"count must be from 1 to 14, the number of points, got {count}"):
                choose(POINTS, count)
        for wrong in (np.empty((0, 3)), np.ones(4), np.array([[1.0, np.nan]])):
            with pytest.raises(BlueprintError, match="Points must be finite numbers"):
                choose(wrong, 1)
    with pytest.raises(BlueprintError, match="start must be a position from 0 to 13, got 14"):
        k_centre(POINTS, 2, start=14)
    monkeypatch.setattr(coresets, "MAX_FACILITY_POINTS", 10)
    with pytest.raises(BlueprintError, match="at most 10 points, got 14"):
        facility_location(POINTS, 2)
