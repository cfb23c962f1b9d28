"""Imports stay light, PEFT's type is registered, and the public names are few."""

import ast
import inspect
import re
import subprocess
import sys

import pytest

import peft_blueprint
from tests import ROOT


def run(script):
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_reading_a_blueprint_needs_no_tensor_library(blueprint, tmp_path):
    """A file is read, blended and written without torch, peft, transformers, NumPy and the Hub's client."""
    path = blueprint.save(tmp_path)
    script = f"""
import sys, peft_blueprint
published = peft_blueprint.Blueprint.from_pretrained({str(path)!r})
published.blend(published).coarsen("layer").save({str(tmp_path / "layers.csv")!r})
published.save({str(tmp_path / "arrays.safetensors")!r})
heavy = {{"torch", "peft", "transformers", "numpy", "scipy", "pandas", "pyarrow", "pydantic", "httpx", "requests"}}
print(sorted(heavy & sys.modules.keys()))
"""
    assert run(script) == "[]"
    assert (tmp_path / "layers.csv").exists()


def test_comparing_blueprints_needs_no_tensor_library(blueprint, tmp_path):
    """Drift, merging and tables work without torch, peft or transformers."""
    path = blueprint.save(tmp_path)
    script = f"""
import sys
from peft_blueprint.compare import aggregate, check_drift, merge_all, read_sources, write_table
blueprints, _ = read_sources([{str(path)!r}])
[published] = blueprints.values()
check_drift(published, published), merge_all(blueprints), write_table(aggregate(blueprints), {str(tmp_path / "t.csv")!r})
print(sorted({{"torch", "peft", "transformers"}} & sys.modules.keys()))
"""
    assert run(script) == "[]"


def test_a_ledger_of_cpu_work_needs_no_tensor_library(tmp_path):
    """A ledger, a run's log and its report work without torch where no GPU is used."""
    script = f"""
import sys
from peft_blueprint.runs import Ledger, MarginalReturn, RunLog, make_report, RunRecord
import peft_blueprint.runs.meters
log = RunLog("run", metric="loss", stop=MarginalReturn(), ledger=Ledger(gpus=False, meters=[]), output_dir={str(tmp_path)!r})
with log:
    log.step(tokens=8)
    log.evaluate({{"loss": 2.0}}, step=1)
make_report([RunRecord.load({str(tmp_path)!r})])
print(sorted({{"torch", "peft", "transformers", "zeus", "codecarbon", "pandas"}} & sys.modules.keys()))
"""
    assert run(script) == "[]"


def blocks(file, start, end):
    """The parts of a file between two marks."""
    return re.findall(f"{start}\n(.*?){end}", (ROOT / file).read_text(encoding="utf-8"), re.DOTALL)


# bitsandbytes, which PEFT imports in every process, warns of a missing kernel on CPUs with AVX512-BF16.
QUICK_START, *_ = blocks("README.md", "```python", "```")
PAGES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]
WITHOUT_THE_PACKAGE, *_ = blocks("recipes/demo.py", 'RELOAD = """', "\n\n")
RECIPES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "recipes").glob("*.py")}


@pytest.mark.parametrize("file", ["README.md", *PAGES, *RECIPES])
def test_peft_is_imported_after_the_filter_of_its_warning(file):
    """In every recipe, and in each block of the documentation that imports both."""
    for code in [RECIPES[file]] if file in RECIPES else blocks(file, "```python", "```"):
        order = re.findall(r"^(?:from|import) (peft_blueprint|peft|trl)\b", code, re.MULTILINE)
        assert not {"peft", "trl"} & set(order) or order[0] == "peft_blueprint"


REGISTERED = """
import sys, peft
sys.modules.get("peft_blueprint") or sys.modules.pop("peft_blueprint", None)  # the demo blocks it with None
import peft_blueprint
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
print(PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.BLUEPRINT].__name__)
"""


@pytest.mark.parametrize("code", [QUICK_START.partition("name =")[0], WITHOUT_THE_PACKAGE], ids=["README", "demo"])
def test_imports_register_the_type_without_a_word_on_kernels(code):
    """In the quick start, and after the demo's process without this package has imported PEFT."""
    done = subprocess.run([sys.executable, "-c", code + REGISTERED], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split()[-1] == "BlueprintConfig" and "kernels" not in done.stderr, done.stderr


def test_the_public_face():
    """About a dozen classes and a dozen verbs, each with a docstring; no other name."""
    names = peft_blueprint.__all__
    assert set(names) <= set(dir(peft_blueprint)) and len(names) < 30
    for name in names:
        assert inspect.getdoc(getattr(peft_blueprint, name)), name
    with pytest.raises(AttributeError, match="attribute '?blueprint_of"):
        _ = peft_blueprint.blueprint_of


# Why an import may stand inside a function: the module is an optional extra, or heavy where the file must stay light.
EXTRAS = {
    "bitsandbytes",
    "bm25s",
    "datasets",
    "datasketch",
    "matplotlib",
    "pandas",
    "pyarrow",
    "opendp",
    "sklearn",
    "zeus",
    "torchao",
    "deepspeed",
}
LIGHT = {
    ("_options.py", "pydantic"),  # validates untrusted data alone
    ("_options.py", "typing_extensions"),
    ("blueprint/blueprint.py", ".hub"),  # the Hub's client takes 0.2 s, which reading a file does not need
    ("blueprint/blueprint.py", "..publish"),  # Blueprint.push_to_hub, the one import of a room above
    ("_progress.py", "tqdm"),  # only where a bar is shown
    ("cli/runs.py", "torch"),
    ("publish/embedding.py", ".loaded_tensors"),  # needs transformers, and most files do not need it
    ("publish/loaded_tensors.py", "transformers"),  # a module that transformers 4 lacks
    ("publish/per_expert.py", "transformers"),  # likewise
    ("place/placement.py", "..publish"),  # Placement.plot
    ("place/planner.py", "peft"),  # takes 3 s, and only a model is compared with its refusals
    ("runs/ledger.py", "torch"),  # only for GPUs, optimizers and counted FLOPs
    ("runs/meters.py", "torch"),
    ("runs/report.py", "..publish"),  # Report.plot
}


def test_imports_inside_functions_are_listed():
    """No import hides from the order of the rooms, or from a reader."""
    found = set()
    for path in (ROOT / "peft_blueprint").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = ["." * node.level + (node.module or "")]
                for name in names:
                    root = name if name.startswith(".") else name.partition(".")[0]
                    if root not in EXTRAS:
                        found.add((path.relative_to(ROOT / "peft_blueprint").as_posix(), root))
    assert found - LIGHT == set() and LIGHT - found == set()
