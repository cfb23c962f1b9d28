"""Imports go down only, and what need not wait for torch does not. Run: pytest tests/test_floors.py"""

import ast
import graphlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peft_blueprint


ROOT = Path(__file__).parent.parent
FILES = {path.stem: path for path in sorted((ROOT / "peft_blueprint").glob("*.py"))}
MAP = re.findall(r"^\| (\d|–) \| `(\w+)\.py` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
FLOORS = {name: int(floor) for floor, name in MAP if floor.isdigit()}
DOORS = {("blueprint", "hub"), ("blueprint", "formats"), ("blueprint", "submodules"), ("planner", "empty")}
DOORS |= {("blueprint", "publish"), ("blueprint", "schema")}  # push_to_hub, digest
TOOLS = {"testing", "loopback", "loopback_api", "loopback_state"}


def imports_of(name):
    """(module, whether at module level) for every import of a file that runs; our own modules as `.name`."""
    found = []

    def walk(node, top):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for other in child.orelse:
                    walk(other, top)
            elif isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.level and not child.module:
                found.extend((f".{alias.name}", top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                found.append(("." * child.level + child.module, top))
            else:
                walk(child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    walk(ast.parse(FILES[name].read_text(encoding="utf-8")), top=True)
    return found


def our_imports(name, top):
    return [module[1:] for module, at_top in imports_of(name) if module.startswith(".") and at_top == top]


def outside(name, packages):
    return [(module, top) for module, top in imports_of(name) if module.split(".")[0] in packages]


def run(script):
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_file_map_lists_every_file_once():
    """The README's map, from which the floors are read here, has all files and no other."""
    assert sorted(name for _, name in MAP) == sorted(FILES.keys() - {"__init__"})
    assert {name for floor, name in MAP if floor == "–"} == TOOLS


@pytest.mark.parametrize("name", FLOORS)
def test_imports_go_down(name):
    """At the top of a file to lower floors, or along its own; inside a function up only through doors."""
    here = FLOORS[name]
    assert all(FLOORS.get(other, 99) <= here for other in our_imports(name, top=True)), our_imports(name, top=True)
    for other in our_imports(name, top=False):
        assert FLOORS.get(other, 99) <= here or (name, other) in DOORS, f"{name} imports {other} in a function"
    assert not outside(name, {"peft_blueprint"}), "our own modules are imported relatively"


def test_no_imports_go_round():
    """Along a floor there is an order in which files can be read."""
    tuple(graphlib.TopologicalSorter({name: our_imports(name, top=True) for name in FILES}).static_order())


def test_nothing_imports_the_tools_of_testing():
    """They are for tests; the package runs without them."""
    assert not [name for name in FILES.keys() - TOOLS if TOOLS & {*our_imports(name, True), *our_imports(name, False)}]


def test_torch_begins_on_floor_1_and_peft_on_floor_4():
    """Records and their files know no tensor; measuring and placing know no PEFT and no transformers."""
    for name, floor in FLOORS.items():
        if floor == 0 or name in ("schema", "formats"):
            assert not outside(name, {"torch", "numpy", "scipy", "peft", "transformers"}), name
        if floor < 4:
            assert not outside(name, {"peft", "transformers"}), name
    assert outside("config", {"peft"}) and outside("submodules", {"torch"}), "this test sees imports"


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_short_and_says_what_it_is_for(name):
    """At most 400 lines, with a docstring first."""
    text = FILES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text))


def test_reading_a_blueprint_waits_for_no_tensor_library(blueprint, tmp_path):
    """import peft_blueprint, and a JSON read, blended, written: without torch, peft or transformers."""
    path = blueprint.save(tmp_path)
    script = f"""
import sys, peft_blueprint
published = peft_blueprint.Blueprint.from_pretrained({str(path)!r})
published.blend(published).coarsen("layer").save({str(tmp_path / "layers.csv")!r})
print(sorted({{"torch", "peft", "transformers"}} & sys.modules.keys()))
"""
    assert run(script) == "[]"
    assert (tmp_path / "layers.csv").exists()


def test_importing_it_after_peft_registers_the_type():
    """So that a saved recipe is understood without a further import."""
    script = """
import peft, peft_blueprint
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
print(PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.BLUEPRINT].__name__)
"""
    assert run(script) == "BlueprintConfig"


def test_the_public_face():
    """Every name of __all__, sorted, resolves, has a docstring, and comes from where _HOMES says; no other does."""
    names = peft_blueprint.__all__
    assert names == sorted(names) and set(names) == {*peft_blueprint._HOMES, "BlueprintError"} <= set(
        dir(peft_blueprint)
    )
    for name in names:
        value = getattr(peft_blueprint, name)
        assert inspect.getdoc(value), name
        assert value.__module__ == f"peft_blueprint.{peft_blueprint._HOMES.get(name, 'errors')}"
    tree = ast.parse(FILES["__init__"].read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for branch in tree.body
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in branch.body
        for alias in node.names
    }
    assert typed == peft_blueprint._HOMES, "a type checker sees the same names"
    with pytest.raises(AttributeError, match="no attribute 'blueprint_of'"):
        _ = peft_blueprint.blueprint_of
