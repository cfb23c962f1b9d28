"""The README says what is true: its code runs, its verbs and its rooms exist. Run: pytest tests/test_readme.py"""

import re
import shlex

import typer
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from peft_blueprint import Blueprint
from peft_blueprint.cli.program import app
from peft_blueprint.testing import save_tiny_model, tiny_llama, toy_batches
from tests import ROOT


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_python_runs(blueprint: Blueprint, tmp_path, monkeypatch):
    """Every Python block runs as printed, one after the other, on a tiny model; org/model is a folder here."""
    (tmp_path / "org" / "model").mkdir(parents=True)
    blueprint.save(tmp_path / "org" / "model")
    monkeypatch.chdir(tmp_path)
    model, batches = tiny_llama(layers=12), toy_batches()
    model.save_pretrained("model-folder")
    rows = [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(len(batch["labels"]))]
    settings = TrainingArguments(
        "run",
        num_train_epochs=10,
        eval_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    wanted = rows[:2]
    namespace = {
        "rows": rows,
        "wanted": wanted,
        "tokenizer": None,  # these rows are encoded
        "model": model,
        "batches": batches,
        "trainer": Trainer(model, settings, train_dataset=rows, eval_dataset=rows[:4]),
    }
    first, *others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert others
    for block in others:
        exec(block, namespace)
    # The first block starts from nothing: the model and the data that it names are on disk here.
    save_tiny_model(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct", layers=12)
    questions = Dataset.from_list([{"question": f"1 2 {i}", "answer": f"{i} 5 6"} for i in range(9)])
    monkeypatch.setattr("datasets.load_dataset", lambda name, subset, split: questions)
    fresh: dict = {}
    exec(first, fresh)
    assert fresh["model"].peft_config["default"].selection


def test_its_verbs_and_options_exist():
    """Each `$ peft-blueprint` line parses against the program, and no verb goes unmentioned."""
    command = typer.main.get_command(app)
    lines = re.findall(r"^\$ peft-blueprint (.*?)(?:\s+#.*)?$", README, re.MULTILINE)
    for line in lines:
        verb, *words = shlex.split(line)
        command.commands[verb].make_context(verb, words)
    assert {shlex.split(line)[0] for line in lines} == set(command.commands)


def test_its_make_targets_exist():
    """`make demo` and `make test` are in the Makefile, and CI runs the latter."""
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^\$ make (\S+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_its_rooms_are_the_folders():
    """Every room of the package has its line, in the order of the contract."""
    rooms = [line.strip() for line in re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE)]
    folders = {path.parent.name for path in (ROOT / "peft_blueprint").glob("*/__init__.py")}
    assert set(rooms) == folders
