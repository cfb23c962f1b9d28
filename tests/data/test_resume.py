"""The k best of a stream are kept, and survive an interruption. Run: pytest tests/data/test_resume.py"""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_blueprint.data.resume import TopK
from peft_blueprint.errors import BlueprintError, FormatError


offers = st.lists(st.tuples(st.integers(-3, 3).map(float), st.integers(0, 30)), min_size=1, max_size=60)


def offered(pairs, count=4):
    best = TopK(count)
    for score, index in pairs:
        best.offer(score, index, payload=f"text {index}")
    return best


def sorted_out(pairs, count=4):
    """The same by sorting everything: the highest score of each position, ties to the earlier."""
    highest = {index: max(s for s, i in pairs if i == index) for _, index in pairs}
    return sorted(highest, key=lambda index: (-highest[index], index))[:count]


@given(offers)
def test_it_keeps_what_sorting_would(pairs):
    """The highest scores, ties to the earlier position, each position once with the highest of its scores."""
    best = offered(pairs)
    assert [index for index, _, _ in best.ranked()] == sorted_out(pairs)
    scores = [score for _, score, _ in best.ranked()]
    assert scores == sorted(scores, reverse=True)
    assert all(payload == f"text {index}" for index, _, payload in best.ranked())
    assert best.next_out == (best.ranked()[-1][0] if len(best) == 4 else None)


@given(offers, st.integers(0, 60))
def test_a_stream_that_was_broken_off_continues(pairs, cut):
    """From the state, through JSON, and with the last few offered again, as after a kill."""
    broken = TopK.from_state(json.loads(json.dumps(offered(pairs[:cut]).state())))
    for score, index in pairs[max(0, cut - 5) :]:
        broken.offer(score, index, payload=f"text {index}")
    assert broken.ranked() == offered(pairs).ranked()


@given(offers, st.randoms())
def test_the_order_of_offers_does_not_matter(pairs, rng):
    """What is kept depends on the scores alone."""
    assert offered(rng.sample(pairs, len(pairs))).ranked() == offered(pairs).ranked()


def test_memory_does_not_grow_with_the_stream():
    """Only `count` are held, and an offer says whether it was taken."""
    best, rng = TopK(10), random.Random(0)
    taken = sum(best.offer(rng.random(), index, "x" * 100) for index in range(5000))
    assert len(best) == len(best._kept) == len(best._heap) == 10
    assert 10 < taken < 200
    assert not best.would_keep(best.ranked()[-1][1], 5000) and best.would_keep(2.0, 5000)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_must_be_finite(score):
    """NaN would sort anywhere; the message names the element."""
    with pytest.raises(BlueprintError, match=f"element 7 must be finite, got {score}"):
        TopK(2).offer(score, 7)


def test_what_cannot_be():
    """Counts and positions below their range, parts that differ, states that are none."""
    with pytest.raises(BlueprintError, match="count must be at least 1"):
        TopK(0)
    with pytest.raises(BlueprintError, match="at least 0, got -1"):
        TopK(1).offer(0.5, -1)
    good = offered([(1.0, 0), (2.0, 1)]).state()
    for wrong in ({"count": 0}, {"kept": [[0, 1.0]]}, {"kept": [[0, "nan", None]]}, {"count": 1}):
        with pytest.raises(FormatError, match="top-k is not valid"):
            TopK.from_state(good | wrong)
    with pytest.raises(FormatError, match="top-k is not valid"):
        TopK.from_state({})
