"""A carbon factor is given or comes from CodeCarbon's files, never from the network.

Run: pytest tests/runs/test_carbon_factor.py
"""

import json
import socket
import subprocess
import sys

import pytest

from peft_blueprint.errors import BlueprintError
from peft_blueprint.runs.meters import ENERGY_MIX, carbon_factor


@pytest.fixture
def codecarbon(tmp_path, monkeypatch):
    """A package of that name whose code must not run; returns where its table of countries is."""
    package = tmp_path / "site" / "codecarbon"
    (package / ENERGY_MIX).parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    countries = {"ATL": {"carbon_intensity": 12.5, "year": 2023}, "MUU": {"carbon_intensity": None}}
    (package / ENERGY_MIX).write_text(json.dumps(countries))
    about = package.parent / "codecarbon-9.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: codecarbon\nVersion: 9.9\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "codecarbon"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(package.parent))
    return package / ENERGY_MIX


def test_a_number_is_taken():
    """A given factor is still a mean, so carbon counts as modelled."""
    quantity = carbon_factor(45)
    assert (quantity.value, quantity.how, quantity.source) == (45.0, "modelled", "45 g CO2e/kWh, as given")
    assert carbon_factor(0).value == 0


def test_without_a_place_carbon_is_absent():
    """A world mean is not assumed."""
    assert carbon_factor(None).how == "absent"


@pytest.mark.parametrize("where", [-1, float("nan"), float("inf"), True, [300]])
def test_other_values_are_refused(where):
    """The error names the forms that are accepted."""
    with pytest.raises(BlueprintError, match="carbon must be grams of CO2 equivalent per kWh"):
        carbon_factor(where)


def test_a_country_is_looked_up_without_running_codecarbon(codecarbon):
    """The files are read; the package is not imported. The source has its version and the year."""
    quantity = carbon_factor("atl")
    assert (quantity.value, quantity.how) == (12.5, "modelled")
    assert quantity.source == "12.5 g CO2e/kWh, CodeCarbon 9.9, ATL, 2023"


@pytest.mark.parametrize("where", ["XYZ", "Atlantis", "", "300"])
def test_an_unknown_country_does_not_get_a_world_mean(codecarbon, where):
    """CodeCarbon would take a mean of the world; here it is an error."""
    with pytest.raises(BlueprintError, match="is not among the 2 countries of CodeCarbon 9.9. Give three letters"):
        carbon_factor(where)


def test_a_table_that_is_not_as_expected_is_an_error(codecarbon):
    """Another version may have other files."""
    with pytest.raises(BlueprintError, match="no carbon intensity of MUU"):
        carbon_factor("MUU")
    codecarbon.write_text("[]")
    with pytest.raises(BlueprintError, match="CodeCarbon 9.9 has no table of countries"):
        carbon_factor("ATL")
    codecarbon.unlink()
    with pytest.raises(BlueprintError, match="CodeCarbon 9.9 has no table of countries"):
        carbon_factor("ATL")


def test_without_codecarbon_the_extra_is_named(monkeypatch):
    """And the number that would do instead."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BlueprintError, match=r"pip install 'peft-blueprint\[carbon\]'.*as a number"):
        carbon_factor("FRA")


def test_codecarbon_itself_is_read_without_network(monkeypatch):
    """Of the version that is installed: Sweden's electricity is cleaner than Poland's."""

    def refuse(*_, **__):
        raise AssertionError("a socket was made")

    monkeypatch.setattr(socket, "socket", refuse)
    sweden, poland = carbon_factor("SWE"), carbon_factor("POL")
    assert 5 < sweden.value < 100 < poland.value < 1200
    assert sweden.source.startswith(f"{sweden.value:g} g CO2e/kWh, CodeCarbon ")


def test_looking_up_a_country_imports_nothing_heavy():
    """Without torch, CodeCarbon and zeus, so that a report starts fast."""
    script = (
        "import sys; from peft_blueprint.runs import carbon_factor;"
        "carbon_factor('FRA'); print(sorted({'torch', 'codecarbon', 'pandas', 'zeus', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
