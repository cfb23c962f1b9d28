"""Budgets are read as people write them."""

import pytest

from peft_blueprint.place.budget import Budget, format_cost


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("12GiB", {"memory": 12 * 2**30}),
        ("24 GB", {"memory": 24 * 10**9}),
        ("900MiB", {"memory": 900 * 2**20}),
        ("0.7x", {"time": 0.7}),
        ("70%", {"time": 0.7}),
        ("2M parameters", {"parameters": 2_000_000}),
        ("1_000 params", {"parameters": 1000}),
        ("42 modules", {"modules": 42}),
        ("12GiB, 0.5x,1 module", {"memory": 12 * 2**30, "time": 0.5, "modules": 1}),
        (
            {"memory": "1GiB", "time": 0.7, "parameters": "2M", "modules": 3},
            {"memory": 2**30, "time": 0.7, "parameters": 2_000_000, "modules": 3},
        ),
    ],
)
def test_budgets_are_read_as_people_write_them(text, limits):
    """Units name the limit."""
    assert Budget.of(text).limits == pytest.approx(limits)
    assert Budget.of(Budget.of(text)) == Budget.of(text) and str(Budget.of(text))


def test_exceeded_limits_are_named():
    """Limit by limit; other costs are free."""
    budget = Budget.of("1GiB, 0.7x")
    assert budget.exceeded({"memory": 2**30, "time": 0.7}) == []
    assert budget.exceeded({"memory": 2**30 + 1, "time": 0.6, "modules": 10**6}) == ["memory"]
    assert format_cost("memory", 1.5 * 2**30) == "1.5 GiB" and format_cost("parameters", 4_880_000).startswith(
        "4.88 million"
    )
