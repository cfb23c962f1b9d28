"""Blueprints that come with the package, found by the id of their model."""

from __future__ import annotations

from pathlib import Path


_PLACES = (Path(__file__).parents[1] / "blueprints", Path(__file__).parents[2] / "blueprints")  # installed; repository


def bundled_blueprints(model_id: str) -> dict[str, Path]:
    """Return the files of the blueprints of a model that come with the package, by the kind of data.

    Args:
        model_id: id on the Hub, such as "HuggingFaceTB/SmolLM2-135M-Instruct".

    Example:
        >>> bundled_blueprints("HuggingFaceTB/SmolLM2-135M-Instruct")["stdlib_docs"].name
        'blueprint-stdlib_docs.json'
        >>> bundled_blueprints("org/model")
        {}
    """
    name = model_id.replace("/", "--")
    if Path(name).name != name:
        return {}
    found = (sorted((place / name).glob("blueprint-*.json")) for place in _PLACES)
    return {path.stem.removeprefix("blueprint-"): path for paths in found for path in paths}
