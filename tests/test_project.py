"""pytest tests/test_project.py: what the project says of itself is true."""

import re
import tomllib

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
