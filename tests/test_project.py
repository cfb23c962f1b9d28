"""The project's metadata is true. Run: pytest tests/test_project.py"""

import re
import runpy
import sys
import tomllib
from types import ModuleType

import pytest

from peft_blueprint import Blueprint, BlueprintError
from peft_blueprint.testing import save_tiny_model
from tests import ROOT


def test_each_declared_bound_is_the_version_that_the_oldest_tests_use():
    """The bounds in pyproject.toml and constraints-oldest.txt agree; torch, of which one build is tested, is apart."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    bounds = dict(re.match(r"([\w.-]+)(?:\[\w+\])?>=([^;\s]+)", d.lower()).groups() for d in declared if ">=" in d)
    pins = dict(
        re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").lower(), re.M)
    )
    del bounds["torch"]
    assert bounds == {name: pins.get(name) for name in bounds}


def test_a_releases_readme_has_absolute_links(monkeypatch):
    """To files of the repository, pictures raw; other addresses and places in the page stay."""
    names = ("hatchling", "hatchling.metadata", "hatchling.metadata.plugin", "hatchling.metadata.plugin.interface")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].MetadataHookInterface = object
    absolute = runpy.run_path(str(ROOT / "hatch_build.py"))["absolute"]
    text = "![a](docs/a.png) [b](docs/b.md) [c](#c) [d](https://d.org/x)"
    assert absolute(text, "https://h/o") == (
        "![a](https://h/o/raw/main/docs/a.png) [b](https://h/o/blob/main/docs/b.md) [c](#c) [d](https://d.org/x)"
    )
    targets = re.findall(r"\]\(([^)]+)\)", absolute((ROOT / "README.md").read_text(encoding="utf-8"), "https://h/o"))
    assert targets and all(target.startswith(("https:", "#")) for target in targets)


def test_one_line_measures_a_model_for_the_folder_of_blueprints(tmp_path, capsys):
    """The file, its digest and the command are in the card; a kind without data is refused."""
    script = runpy.run_path(str(ROOT / "blueprints" / "measure.py"))
    script["main"].__globals__["FOLDER"] = tmp_path
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "1 2", "completion": "{i}"}}\n' for i in range(4)))
    path = save_tiny_model(tmp_path / "weights", layers=2)
    script["main"](["org/tiny", "sums", "--data", str(data), "--path", str(path)])
    [written] = (tmp_path / "org--tiny").glob("*.json")
    blueprint = Blueprint.from_pretrained(written)
    assert (written.name, blueprint.model_id) == ("blueprint-sums.json", "org/tiny")
    assert blueprint.digest in capsys.readouterr().out
    card = (tmp_path / "org--tiny" / "README.md").read_text(encoding="utf-8")
    assert blueprint.digest in card and "python blueprints/measure.py org/tiny sums" in card
    with pytest.raises(BlueprintError, match="kind must be one of gsm8k, pubmedqa, or have --data, got 'law'"):
        script["main"](["org/tiny", "law"])
