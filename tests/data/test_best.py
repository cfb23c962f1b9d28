"""The best few of a stream. Run: pytest tests/test_best.py"""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_blueprint.data.best import Best
from peft_blueprint.errors import BlueprintError, FormatError


offers = st.lists(st.tuples(st.integers(-3, 3).map(float), st.integers(0, 30)), min_size=1, max_size=60)


def offered(pairs, count=4):
    best = Best(count)
    for score, index in pairs:
        best.offer(score, index, payload=f"text {index}")
    return best


def sorted_out(pairs, count=4):
    """The same by sorting everything: the highest score of each position, ties to the earlier."""
    highest = {index: max(s for s, i in pairs if i == index) for _, index in pairs}
    return sorted(sorted(highest, key=lambda index: (-highest[index], index))[:count])


@given(offers)
def test_it_keeps_what_sorting_would(pairs):
    """The highest scores, ties to the earlier position, each position once with the highest of its scores."""
    best = offered(pairs)
    assert best.indices() == sorted_out(pairs)
    scores = [score for _, score, _ in best.ranked()]
    assert scores == sorted(scores, reverse=True)
    assert all(payload == f"text {index}" for index, _, payload in best.ranked())
    assert best.threshold == (scores[-1] if len(scores) == 4 else float("-inf"))


@given(offers, st.integers(0, 60))
def test_a_stream_that_was_broken_off_continues(pairs, cut):
    """From the state, through JSON, and with the last few offered again, as after a kill."""
    broken = Best.from_state(json.loads(json.dumps(offered(pairs[:cut]).state())))
    for score, index in pairs[max(0, cut - 5) :]:
        broken.offer(score, index, payload=f"text {index}")
    assert broken.ranked() == offered(pairs).ranked()


@given(offers, st.integers(1, 4))
def test_parts_of_several_processes_merge(pairs, processes):
    """To what one would have kept, also where the last examples were given to two of them."""
    parts = [offered(pairs[rank::processes] + pairs[:2]) for rank in range(processes)]
    merged = Best.merge(parts)
    assert merged.ranked() == offered(pairs).ranked()
    assert merged.offered == sum(part.offered for part in parts)


def test_memory_does_not_grow_with_the_stream():
    """Only `count` are held, and an offer says whether it was taken."""
    best, rng = Best(10), random.Random(0)
    taken = sum(best.offer(rng.random(), index, "x" * 100) for index in range(5000))
    assert len(best) == len(best._kept) == len(best._heap) == 10 and best.offered == 5000
    assert 10 < taken < 200
    assert not best.takes(best.threshold, 5000) and best.takes(2.0, 5000)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_must_be_finite(score):
    """NaN would sort anywhere; the message names the element."""
    with pytest.raises(BlueprintError, match=f"element 7 is {score}"):
        Best(2).offer(score, 7)


def test_what_cannot_be():
    """Counts and positions below their range, parts that differ, states that are none."""
    with pytest.raises(BlueprintError, match="count=0"):
        Best(0)
    with pytest.raises(BlueprintError, match="Position -1"):
        Best(1).offer(0.5, -1)
    with pytest.raises(BlueprintError, match=r"\[1, 2\] elements do not merge"):
        Best.merge([Best(1), Best(2)])
    with pytest.raises(BlueprintError, match=r"\[\] elements"):
        Best.merge([])
    good = offered([(1.0, 0), (2.0, 1)]).state()
    for wrong in ({"count": 0}, {"kept": [[0, 1.0]]}, {"kept": [[0, "nan", None]]}, {"offered": 1}, {"count": 1}):
        with pytest.raises(FormatError, match="no state of a selection"):
            Best.from_state(good | wrong)
    with pytest.raises(FormatError, match="no state"):
        Best.from_state({})
