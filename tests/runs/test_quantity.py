"""Every amount has a label and a unit. Run: pytest tests/runs/test_quantity.py"""

import json
import math

import pytest

from peft_blueprint.errors import BlueprintError, FormatError
from peft_blueprint.runs.quantity import (
    RESOURCES,
    UNITS,
    Quantity,
    absent,
    across_processes,
    format_number,
    format_quantity,
    largest,
    measured,
    modelled,
    total,
    weakest,
)


def test_resources_add_up_while_a_run_goes_on():
    """Peaks and states do not add up, so they are not resources; everything has a unit."""
    assert RESOURCES == tuple(name for name in UNITS if not name.endswith("bytes"))
    assert len(UNITS) == 9 and all(UNITS.values())


@pytest.mark.parametrize(
    ("value", "how", "message", "of_file"),
    [
        (None, "measured", "value must be None if and only if how is 'absent', got None and 'measured'", None),
        (3.0, "absent", "value must be None if and only if how is 'absent', got 3.0 and 'absent'", None),
        (
            3.0,
            "guessed",
            "how must be one of measured, modelled, absent, got 'guessed'",
            "how must be one of 'measured'",
        ),
        (math.nan, "measured", "value must be a finite number, got nan", None),
        (math.inf, "modelled", "value must be a finite number, got inf", None),
        (10**400, "modelled", "value must be a finite number, got 1000", "value must be a (finite )?number, got"),
        (True, "measured", "value must be a finite number, got True", "value must be a number, got True"),
        ("3", "measured", "value must be a finite number, got '3'", "value must be a number, got '3'"),
    ],
)
def test_a_quantity_is_a_finite_number_or_absent(value, how, message, of_file):
    """Other values are refused, with an error of a file's form where they come from one."""
    with pytest.raises(BlueprintError, match=message):
        Quantity(value, how)
    with pytest.raises(FormatError, match=f"A quantity: {of_file or message[:32]}"):
        Quantity.from_dict({"value": value, "how": how})


@pytest.mark.parametrize(
    "quantity", [measured(3, "clock"), modelled(2.5, "watts"), absent("no meter"), Quantity(1, "measured")]
)
def test_a_quantity_survives_json(quantity):
    """Reading returns the same quantity."""
    assert Quantity.from_dict(json.loads(json.dumps(quantity.to_dict()))) == quantity


@pytest.mark.parametrize(
    "content", [3, {}, {"value": 3}, {"value": 3, "how": "measured", "source": 7}, [3, "measured"]]
)
def test_other_content_is_a_format_error(content):
    """The error names the key."""
    with pytest.raises(FormatError, match="A quantity"):
        Quantity.from_dict(content)


def test_the_weaker_label_wins():
    """A sum is as good as the worst of its parts, and none at all where a part is missing."""
    assert total([measured(1, "a"), measured(2, "a")]) == measured(3, "a")
    assert total([measured(1, "a"), modelled(2, "b")]) == modelled(3, "a; b")
    assert total([measured(1, "a"), absent("gone"), modelled(2, "b")]) == absent("gone")
    assert largest([measured(1, "a"), modelled(2, "b"), measured(0.5, "a")]) == modelled(2, "a; b")
    assert weakest(["measured", "modelled"]) == "modelled"
    assert weakest([]) == "measured"
    with pytest.raises(BlueprintError, match="at least one quantity"):
        total([])


def test_sources_do_not_pile_up():
    """A quantity that grows step by step names each of its sources once."""
    quantity = measured(0, "a")
    for _ in range(3):
        quantity = total([quantity, modelled(1, "b"), measured(1, "a")])
    assert quantity == modelled(6, "a; b")


def test_processes_share_one_clock():
    """The longest clock, the highest peak, and the sum of the others."""
    one = {"seconds": measured(10, "clock"), "tokens": measured(5, "n"), "peak_bytes": measured(7, "m")}
    other = {"seconds": measured(11, "clock"), "tokens": measured(6, "n"), "peak_bytes": measured(3, "m")}
    together = across_processes([one, other])
    assert {name: quantity.value for name, quantity in together.items()} == {
        "seconds": 11,
        "tokens": 11,
        "peak_bytes": 7,
    }
    assert across_processes([one]) == one
    with pytest.raises(BlueprintError, match="same names"):
        across_processes([one, {"seconds": measured(1, "clock")}])
    with pytest.raises(BlueprintError, match="got none"):
        across_processes([])


@pytest.mark.parametrize(
    ("value", "name", "shown"),
    [
        (59.94, "seconds", "59.9 s"),
        (605, "seconds", "10 min 5 s"),
        (7260, "seconds", "2 h 1 min"),
        (3.66e16, "flops", "36.6 PFLOP"),
        (4_915_200, "tokens", "4.92 million tokens"),
        (900, "tokens", "900 tokens"),
        (9.4e9, "peak_bytes", "8.75 GiB"),
        (1999, "carbon_grams", "2 kg CO₂e"),
        (0.0001, "carbon_grams", "1.00 × 10⁻⁴ g CO₂e"),
        (None, "energy_joules", "–"),
    ],
)
def test_quantities_read_as_a_person_writes_them(value, name, shown):
    """With the unit that suits the size."""
    assert format_quantity(value, name) == shown


def test_numbers_have_no_exponents_where_they_read_better():
    """Infinite ones and NaN are shown."""
    assert [format_number(x) for x in (0, 1.23456, 12345.6, 2.5e-5, math.nan, None)] == [
        *("0", "1.235", "12,346", "2.50 × 10⁻⁵", "not finite", "–"),
    ]
