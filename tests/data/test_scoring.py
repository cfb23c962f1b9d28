"""Cost of scoring candidates in chunks. Run: pytest tests/data/test_scoring.py"""

import pytest

from peft_blueprint.data.examples import Candidate
from peft_blueprint.data.scoring import ExampleScorer
from tests.choosing import choose, make_rows, model


@pytest.fixture
def counted():
    """A tiny model, and the number of examples of each of its forward passes."""
    found, passes = model(), []
    found.register_forward_pre_hook(lambda _, args, inputs: passes.append(len(inputs["input_ids"])), with_kwargs=True)
    return found, passes


def test_a_model_is_checked_once_and_not_in_every_chunk(counted):
    """Against its own loss, and for layers that training does not call; then a chunk costs its batches alone."""
    model, passes = counted
    scorer = ExampleScorer(model, None, 4, 0, 0, None)
    pool = [Candidate(i, row, row["input_ids"], row) for i, row in enumerate(make_rows(8))]
    first = scorer.norms(pool)
    assert passes == [1, 1, 4, 4]
    passes.clear()
    assert (scorer.norms(pool) == first).all()
    scorer.losses(pool), scorer.points(pool[:4])
    assert passes == [4] * 5


def test_selecting_makes_one_pass_for_each_batch(counted):
    """Over four chunks of candidates, beside the two checks."""
    model, passes = counted
    choose(make_rows(100), using=model, count=5, method="norm")
    assert sorted(passes) == [1, 1] + [4] * 25
