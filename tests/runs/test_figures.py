"""A number never goes without how it came about. Run: pytest tests/test_figures.py"""

import json
import math

import pytest

from peft_blueprint.errors import BlueprintError, FormatError
from peft_blueprint.runs.figures import (
    RESOURCES,
    UNITS,
    Figure,
    absent,
    across_processes,
    largest,
    measured,
    modelled,
    total,
    weakest,
)


def test_resources_are_what_adds_up_while_a_run_goes_on():
    """Peaks and states do not add up, and are no resource; everything has a unit."""
    assert RESOURCES == tuple(name for name in UNITS if not name.endswith("bytes"))
    assert len(UNITS) == 9 and all(UNITS.values())


@pytest.mark.parametrize(
    ("value", "how", "message"),
    [
        (None, "measured", "absent if and only if"),
        (3.0, "absent", "absent if and only if"),
        (3.0, "guessed", "how='guessed' is not known"),
        (math.nan, "measured", "finite number, not nan"),
        (math.inf, "modelled", "finite number, not inf"),
        (True, "measured", "finite number, not True"),
        ("3", "measured", "finite number, not '3'"),
    ],
)
def test_a_figure_is_a_finite_number_or_absent(value, how, message):
    """Nothing else can be made, and read from a file it is called what it is."""
    with pytest.raises(BlueprintError, match=message):
        Figure(value, how)
    with pytest.raises(FormatError, match=message):
        Figure.from_dict({"value": value, "how": how})


@pytest.mark.parametrize(
    "figure", [measured(3, "clock"), modelled(2.5, "watts"), absent("no meter"), Figure(1, "measured")]
)
def test_a_figure_survives_json(figure):
    """What is written is what is read."""
    assert Figure.from_dict(json.loads(json.dumps(figure.to_dict()))) == figure


@pytest.mark.parametrize(
    "content", [3, {}, {"value": 3}, {"value": 3, "how": "measured", "source": 7}, [3, "measured"]]
)
def test_what_is_no_figure_is_not_read(content):
    """The error says what a figure is."""
    with pytest.raises(FormatError, match="A figure"):
        Figure.from_dict(content)


def test_the_weaker_label_wins():
    """A sum is as good as the worst of its parts, and none at all where a part is missing."""
    assert total([measured(1, "a"), measured(2, "a")]) == measured(3, "a")
    assert total([measured(1, "a"), modelled(2, "b")]) == modelled(3, "a; b")
    assert total([measured(1, "a"), absent("gone"), modelled(2, "b")]) == absent("gone")
    assert largest([measured(1, "a"), modelled(2, "b"), measured(0.5, "a")]) == modelled(2, "a; b")
    assert weakest(["measured", "modelled"]) == "modelled"
    assert weakest([]) == "measured"
    with pytest.raises(BlueprintError, match="no figures"):
        total([])


def test_sources_do_not_pile_up():
    """A figure that grows step by step names each of its sources once."""
    figure = measured(0, "a")
    for _ in range(3):
        figure = total([figure, modelled(1, "b"), measured(1, "a")])
    assert figure == modelled(6, "a; b")


def test_processes_share_one_clock():
    """The longest clock and the highest peak count, and the sum of what each spent for itself."""
    one = {"seconds": measured(10, "clock"), "tokens": measured(5, "n"), "peak_bytes": measured(7, "m")}
    other = {"seconds": measured(11, "clock"), "tokens": measured(6, "n"), "peak_bytes": measured(3, "m")}
    together = across_processes([one, other])
    assert {name: figure.value for name, figure in together.items()} == {"seconds": 11, "tokens": 11, "peak_bytes": 7}
    assert across_processes([one]) == one
    with pytest.raises(BlueprintError, match="same names"):
        across_processes([one, {"seconds": measured(1, "clock")}])
    with pytest.raises(BlueprintError, match="these are none"):
        across_processes([])
