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
    """Positions by their highest score, from sorting everything; ties go to the earlier."""
    highest = {index: max(s for s, i in pairs if i == index) for _, index in pairs}
    return sorted(highest, key=lambda index: (-highest[index], index))[:count]


@given(offers)
def test_top_k_equals_sorting_everything(pairs):
    """Each position counts once, with its highest score."""
    best = offered(pairs)
    assert [index for index, _, _ in best.ranked()] == sorted_out(pairs)
    scores = [score for _, score, _ in best.ranked()]
    assert scores == sorted(scores, reverse=True)
    assert all(payload == f"text {index}" for index, _, payload in best.ranked())
    assert best.next_out == (best.ranked()[-1][0] if len(best) == 4 else None)


@given(offers, st.integers(0, 60))
def test_an_interrupted_stream_continues_from_its_state(pairs, cut):
    """Through JSON, and with the last few offered again."""
    broken = TopK.from_state(json.loads(json.dumps(offered(pairs[:cut]).state())))
    for score, index in pairs[max(0, cut - 5) :]:
        broken.offer(score, index, payload=f"text {index}")
    assert broken.ranked() == offered(pairs).ranked()


@given(offers, st.randoms())
def test_the_order_of_offers_does_not_matter(pairs, rng):
    """The result depends on the scores alone."""
    assert offered(rng.sample(pairs, len(pairs))).ranked() == offered(pairs).ranked()


def test_memory_does_not_grow_with_the_stream():
    """Only `count` elements are held; `offer` returns whether it kept one."""
    best, rng = TopK(10), random.Random(0)
    taken = sum(best.offer(rng.random(), index, "x" * 100) for index in range(5000))
    assert len(best) == len(best._kept) == 10
    assert 10 < taken < 200
    assert not best.would_keep(best.ranked()[-1][1], 5000) and best.would_keep(2.0, 5000)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_must_be_finite(score):
    """The error names the element."""
    with pytest.raises(BlueprintError, match=f"element 7 must be finite, got {score}"):
        TopK(2).offer(score, 7)


def test_bad_counts_positions_and_states_are_refused():
    """Below their range, or not a state."""
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
