"""The Pareto front. Run: pytest tests/test_pareto.py"""

import math

from hypothesis import given
from hypothesis import strategies as st

from peft_blueprint.runs.pareto import pareto_front


NUMBERS = st.none() | st.sampled_from([0.0, 1.0, 2.0, 3.0, math.nan, math.inf]) | st.floats(-5, 5)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12))
def test_on_the_front_is_what_no_other_beats(pairs):
    """As the definition says it, pair by pair: at least as good in both, and better in one."""
    known = [all(value is not None and math.isfinite(value) for value in pair) for pair in pairs]

    def is_beaten(i):
        return any(
            known[j] and pairs[j][0] <= pairs[i][0] and pairs[j][1] >= pairs[i][1] and pairs[j] != pairs[i]
            for j in range(len(pairs))
        )

    expected = tuple(known[i] and not is_beaten(i) for i in range(len(pairs)))
    assert pareto_front([cost for cost, _ in pairs], [worth for _, worth in pairs]) == expected
