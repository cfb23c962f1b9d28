"""Every name, command and file in the table of the paper exists. Run: pytest tests/test_paper_page.py"""

import ast
import dataclasses
import importlib
import inspect
import re
import shlex
from operator import attrgetter

import pytest
import typer

from benchmarks.__main__ import NAMES
from peft_blueprint.cli.program import app
from tests import ROOT


PAGE = ROOT / "docs" / "explanation" / "paper.md"
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if re.match(r"\| (?!Section|---)", line)
]
SPANS = sorted({span for row in ROWS for span in re.findall(r"`([^`]+)`", row[2])})


def require(span):
    """Raise an error unless a code span names something that exists."""
    program, *words = shlex.split(span)
    if program == "peft-blueprint":
        typer.main.get_command(app).commands[words[0]].make_context(words[0], words[1:])
    elif program == "python":
        assert words[:2] == ["-m", "benchmarks"] and words[2] in NAMES, span
    elif "/" in span:
        assert (ROOT / span).is_file(), span
    else:
        node = ast.parse(span, mode="eval").body
        call = node if isinstance(node, ast.Call) else None
        room, *path = ast.unparse(call.func if call else node).split(".")
        found = attrgetter(".".join(path))(importlib.import_module(f"peft_blueprint.{room}"))
        if call is not None:
            given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
            assert given.keys() <= inspect.signature(found).parameters.keys(), span
            if dataclasses.is_dataclass(found) and "Options" in found.__name__:
                found(**given)  # refuses a value that is no choice


def test_each_part_of_the_paper_has_its_place():
    """Four tables of four columns, from section 1 to A.2, each row with a name or a link."""
    assert len(ROWS) > 55 and {len(row) for row in ROWS} == {4}
    assert all(row[0] and row[1] and ("`" in row[2] or "](" in row[2]) for row in ROWS)
    sections = " ".join(row[0] for row in ROWS)
    for part in ("4.1", "4.2", "4.3", "4.4", "Algorithm 1", "Algorithm 2", *(f"5 ({i})" for i in range(1, 6))):
        assert part in sections, part
    assert all(f"{letter}.{i}" in sections for letter, count in (("A", 2), ("B", 5)) for i in range(1, count + 1))


@pytest.mark.parametrize("span", SPANS)
def test_names_in_the_table_exist(span):
    """Python names with their arguments, verbs with their options, benchmarks and files."""
    require(span)


@pytest.mark.parametrize(
    "wrong",
    ["place.plan_everything", "place.PlacementOptions(rank_by='beauty')", "blueprint.k_star(alpha=1)"]
    + ["peft-blueprint show x.json --beauty", "python -m benchmarks beauty", "recipes/beauty.py"],
)
def test_missing_names_are_found(wrong):
    """The check itself fails for each kind of name."""
    with pytest.raises(Exception):  # noqa: B017 (Click's, Python's or ours)
        require(wrong)
