"""How much CO2 a kilowatt-hour stands for: as given, or as CodeCarbon's data files say of a country.

CodeCarbon is an extra: `pip install peft-blueprint[carbon]`. Its files are read and it is not imported, so that nothing
is asked of the network, nor of the machine where it stands. Knows nothing of energy.
"""

from __future__ import annotations

import importlib.util
import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import BlueprintError
from .figures import Figure, absent, modelled


PACKAGE = "codecarbon"
ENERGY_MIX = "data/private_infra/global_energy_mix.json"


def carbon_factor(where: str | float | None) -> Figure:
    """Grams of CO2 equivalent per kWh of electricity.

    Args:
        where: the grams themselves, of which more is known than here; a country's three letters (ISO 3166-1 alpha-3,
            "DEU"), for its yearly mean in the data files of the CodeCarbon that is installed; None if it is not known.

    Returns:
        A modelled figure, since a factor is a mean over places and times; absent for None.

    Raises:
        BlueprintError: for a number that is none or below zero; for a country that CodeCarbon has no figure of; without
            CodeCarbon, or if its files are not as expected.
    """
    if where is None:
        return absent("no carbon factor: nothing says where the electricity comes from")
    if isinstance(where, str):
        return _of_country(where.strip().upper())
    if isinstance(where, bool) or not isinstance(where, int | float) or not (0 <= where < math.inf):
        raise BlueprintError(
            f"carbon={where!r} is no carbon factor: give grams of CO2 equivalent per kWh, from 0, or a country's three "
            "letters."
        )
    return modelled(float(where), f"{where:g} g CO2e/kWh, as given")


def _of_country(country: str) -> Figure:
    countries, version = _energy_mix()
    entry = countries.get(country)
    if not isinstance(entry, dict):
        raise BlueprintError(
            f"CodeCarbon {version} has no country {country!r} among its {len(countries)}. Give three letters, such as "
            "DEU, FRA or USA, or the grams of CO2 equivalent per kWh as a number."
        )
    grams = entry.get("carbon_intensity")
    if isinstance(grams, bool) or not isinstance(grams, int | float) or not (0 <= grams < math.inf):
        raise BlueprintError(
            f"CodeCarbon {version} has no carbon intensity of {country}, but {grams!r}. Give the grams of CO2 equivalent "
            "per kWh as a number."
        )
    year = f", {entry['year']}" if "year" in entry else ""
    return modelled(float(grams), f"{grams:g} g CO2e/kWh, CodeCarbon {version}, {country}{year}")


def _energy_mix() -> tuple[dict[str, Any], str]:
    """CodeCarbon's countries and its version."""
    spec = importlib.util.find_spec(PACKAGE)  # finds a package without running it
    if spec is None or not spec.submodule_search_locations:
        raise BlueprintError(
            "A country's carbon factor needs CodeCarbon: pip install 'peft-blueprint[carbon]'. Or give the grams of CO2 "
            "equivalent per kWh as a number."
        )
    path = Path(spec.submodule_search_locations[0], ENERGY_MIX)
    version = metadata.version(PACKAGE)
    try:
        countries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(countries, dict):
            raise ValueError("not an object of countries")
    except (OSError, ValueError) as error:
        raise BlueprintError(
            f"CodeCarbon {version} has no table of countries at {path}: {error}. Give the grams of CO2 equivalent per "
            "kWh as a number."
        ) from error
    return countries, version
