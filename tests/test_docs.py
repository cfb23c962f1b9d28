"""README and docs are true: code runs; verbs, links and rooms exist. Run: pytest tests/test_docs.py"""

import dataclasses
import importlib.util
import inspect
import json
import re
import shlex
from typing import get_args

import pytest
import typer
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaConfig, Trainer, TrainingArguments

from peft_blueprint import Blueprint, BlueprintConfig
from peft_blueprint.blueprint import bundled_blueprints
from peft_blueprint.cli.program import app
from peft_blueprint.measure import empty_model
from peft_blueprint.place import PlacementOptions, RankBy
from peft_blueprint.publish import embed
from peft_blueprint.testing import save_tiny_model, tiny_llama, tiny_mixtral, toy_batches
from peft_blueprint.train import Recipe
from tests import ROOMS, ROOT


README = ROOT / "README.md"
PAGES = {str(path.relative_to(ROOT)): path for path in [README, *sorted((ROOT / "docs").rglob("*.md"))]}
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
OWN_TESTS = ("docs/how-to/long_prompts.md", "docs/how-to/frozen_prefix.md")  # of the functions they show
EXPERTS = "docs/how-to/experts.md"  # each of its blocks starts from a plain mixture
SETTINGS = {
    "num_train_epochs": 2,
    "eval_strategy": "epoch",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


def blocks_of(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page].read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore:Under epsilon")  # four examples are too few for a guarantee
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern")  # of PEFT, which applies them all the same
@pytest.mark.parametrize("page", [p for p in PAGES if p not in ("README.md", *OWN_TESTS) and blocks_of(p, "python")])
def test_code_of_a_page_runs(page, blueprint: Blueprint, tmp_path, monkeypatch):
    """Every Python block as printed, one after the other, on a tiny model; org/model is a folder here."""
    (tmp_path / "org" / "model").mkdir(parents=True)
    blueprint.save(tmp_path / "org" / "model")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    model, batches = tiny_llama(layers=12), toy_batches()
    model.save_pretrained("model-folder")
    rows = [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(len(batch["labels"]))]
    namespace = {
        "blueprint": blueprint,
        "rows": rows,
        "wanted": rows[:2],
        "tokenizer": None,  # these rows are encoded
        "model": model,
        "batches": batches,
        "trainer": Trainer(model, TrainingArguments("run", **SETTINGS), train_dataset=rows, eval_dataset=rows[:4]),
    }
    for block in blocks_of(page, "python"):
        if page == EXPERTS:
            namespace |= {"model": tiny_mixtral(4), "folder": "adapter"}
        exec(block, namespace)
        if page == EXPERTS and "adapted" in namespace:
            namespace["adapted"].save_pretrained("adapter")
        elif page == EXPERTS:
            namespace |= dict.fromkeys(("math", "law"), namespace["blueprint"])


def test_the_quick_start_runs(tmp_path, monkeypatch, capsys):
    """It starts from nothing: the model and the data that it names are on disk here."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct", layers=12)
    questions = Dataset.from_list([{"question": f"1 2 {i}", "answer": f"{i} 5 6"} for i in range(9)])
    monkeypatch.setattr("datasets.load_dataset", lambda name, subset, split: questions)
    [block] = blocks_of("README.md", "python")
    found: dict = {}
    exec(block, found)
    assert found["model"].peft_config["default"].selection
    assert "trainable params: " in capsys.readouterr().out


def test_the_quick_start_prints_the_shown_output(capsys):
    """For the bundled blueprint of the same model and data, on a model of the same shapes."""
    shapes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    config = LlamaConfig(**shapes, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    bundled = bundled_blueprints("HuggingFaceTB/SmolLM2-135M-Instruct")
    get_peft_model(empty_model(config), BlueprintConfig(blueprint=str(bundled["gsm8k"]))).print_trainable_parameters()
    assert capsys.readouterr().out == blocks_of("README.md", "text")[0]


def module_of(path: str):
    """Load a Python file beside the pages."""
    specification = importlib.util.spec_from_file_location("beside", ROOT / "docs" / path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generated() -> dict:
    """Pages that MkDocs adds to those on disk."""
    return module_of("generated.py").generated()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch, generated):
    """Every cell, with the kinds of output that are stored; the tutorial's page shows its text and pictures."""
    monkeypatch.chdir(tmp_path)
    found = module_of("execute.py").execute(path)
    stored = [c["outputs"] for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    kinds = [[sorted(output.get("data", output)) for output in outputs] for outputs in stored]
    assert kinds == [[sorted(output.get("data", output)) for output in outputs] for outputs in found]
    page = generated[f"tutorials/{path.stem}.md"]
    assert page.count("```text") + page.count("![") == sum(map(len, stored)) > 3
    assert all(f"tutorials/{name}" in generated for name in re.findall(r"!\[.*?\]\((.*?)\)", page))


def test_the_generated_reference_is_complete(generated):
    """Every public function, class and field of options; every verb with every flag; every key of a recipe."""
    for room in set(ROOMS) - {"cli", "place.cost"}:
        module = importlib.import_module(f"peft_blueprint.{room}")
        values = (getattr(module, name) for name in module.__all__)
        paths = {f"{v.__module__}.{v.__qualname__}" for v in values if inspect.isfunction(v) or inspect.isclass(v)}
        assert paths == set(re.findall(r"^::: (\S+)$", generated[f"reference/{room}.md"], re.MULTILINE)) != set()
    beside, fields = module_of("generated.py"), dataclasses.fields(PlacementOptions)
    for options in (PlacementOptions, BlueprintConfig):
        assert all(f"\n| `{field.name}` | `" in beside.options(options) for field in fields)
    assert all(f"\n| `{score}` | " in generated["reference/place.md"] for score in get_args(RankBy))
    text = generated["reference/cli.md"]
    sections = dict(re.findall(r"^## `peft-blueprint (\S+)`\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    for verb, command in typer.main.get_command(app).commands.items():
        flags = [name for parameter in command.params for name in parameter.opts if name.startswith("--")]
        assert all(f"{flag}`" in sections[verb] or f"{flag} " in sections[verb] for flag in flags), verb
    keys = dict(re.findall(r"^\| `(\w+)` \|.*\| (.+?) \|$", generated["reference/recipe.md"], re.MULTILINE))
    fields = [
        f.name for cls in (Recipe, PlacementOptions) for f in dataclasses.fields(cls) if f.init and f.name != "r"
    ]
    assert all(len(keys[name]) > 10 for name in [*fields, "memory", "batch_size", "patience", "resource"])


def test_verbs_and_options_exist(generated):
    """Each `$ peft-blueprint` line parses against the program, and no verb goes unmentioned."""
    command = typer.main.get_command(app)
    mentioned = set()
    tutorials = [text for path, text in generated.items() if path.startswith("tutorials/") and path.endswith(".md")]
    for text in [*tutorials, *(page.read_text() for page in PAGES.values())]:
        for line in re.findall(r"^\$ peft-blueprint (.*?)(?:\s+[#>].*)?$", text, re.MULTILINE):
            verb, *words = shlex.split(line)
            command.commands[verb].make_context(verb, words)
            mentioned.add(verb)
    assert mentioned == set(command.commands)


def test_links_lead_somewhere(generated):
    """Relative links of every page, pictures too; every page is in the navigation."""
    docs = ROOT / "docs"
    texts = {path: path.read_text() for path in PAGES.values()}
    texts |= {docs / path: text for path, text in generated.items() if isinstance(text, str)}
    made = {docs / path for path in generated}
    for page, text in texts.items():
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            target = (page.parent / link).resolve()
            assert link.startswith("https://") or target.exists() or target in made, f"{page}: {link}"
    nav = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    assert {docs / path for path in nav} == {path for path in {*texts, *made} if path.suffix == ".md"} - {README}


def test_make_targets_exist():
    """`make demo` and `make test` are in the Makefile, and CI runs the latter."""
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^\$ make (\S+)", README.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_rooms_are_the_folders():
    """Every room of the package has its line, in the order of the contract."""
    rooms = re.findall(r"^\| `(\w+)/` \|", PAGES["docs/contributing.md"].read_text(), re.MULTILINE)
    assert set(rooms) == {path.parent.name for path in (ROOT / "peft_blueprint").glob("*/__init__.py")}


def test_the_reader_of_the_format_page_reads_our_files(blueprint: Blueprint, tmp_path):
    """JSON and header, with nothing of this package."""
    [block] = blocks_of("docs/reference/format.md", "python")
    reader: dict = {}
    exec(block, reader)
    tiny_llama(layers=12).save_pretrained(tmp_path)
    blueprint.save(tmp_path / "blueprint.json")
    embed(blueprint, tmp_path)
    expected = {entry.name: entry.gradient_norm for entry in blueprint}
    assert reader["read_blueprint"](tmp_path / "blueprint.json") == expected
    assert reader["read_blueprint"](tmp_path / "model.safetensors") == pytest.approx(expected, rel=1e-3)
