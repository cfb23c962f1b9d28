"""Verbs: their flags come from the options, their help has examples that run, failures end in one table."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import typer
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from peft_blueprint.blueprint import file_name, split_expert
from peft_blueprint.cli import program
from peft_blueprint.cli.program import FAILURES, app
from peft_blueprint.cli.verbs import EXAMPLES
from peft_blueprint.compare import ProbeOptions
from peft_blueprint.data import SelectionOptions
from peft_blueprint.errors import BlueprintError, DriftError
from peft_blueprint.measure import GenerateOptions, find_submodules
from peft_blueprint.place import PlacementOptions
from peft_blueprint.testing import save_tiny_model, tiny_llama, tiny_mixtral
from peft_blueprint.train import save_experts, unfreeze_experts
from tests import ROOT
from tests.hub.loopback import LoopbackHub
from tests.made_up_runs import made_up_run
from tests.mixtures import blueprint_of_experts


VERBS = {verb.name: verb for verb in app.registered_commands}
PANELS = {"Measure", "Compare", "Place", "Publish", "Data", "Runs"}


def help_of(*words):
    return CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).stdout


def test_every_verb_has_a_panel_an_example_and_a_format():
    """The program's help is in panels; no verb without what a person needs to start."""
    assert {verb.rich_help_panel for verb in VERBS.values()} == PANELS
    shown = help_of()
    assert all(panel in shown for panel in PANELS) and all(name in shown for name in VERBS)
    for name, verb in VERBS.items():
        assert f"$ peft-blueprint {name} " in f"{verb.epilog} ", name
        assert "--format" in help_of(name), name


@pytest.mark.parametrize(
    ("verb", "cls", "hidden"),
    [
        ("targets", PlacementOptions, ()),
        ("targets", ProbeOptions, ()),
        ("select-data", SelectionOptions, ("columns", "submodules")),
        ("generate", GenerateOptions, ("data", "command")),
    ],
)
def test_flags_help_and_defaults_are_those_of_the_dataclass(verb, cls, hidden):
    """One source: a field added to the options is a flag the next moment."""
    text = re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", help_of(verb)))
    parameters = {p.name: p for p in typer.main.get_command(app).commands[verb].params}
    for field in dataclasses.fields(cls):
        if field.name in hidden:
            continue
        assert f"--{'rank' if field.name == 'r' else field.name.replace('_', '-')}" in text
        assert field.metadata["help"].split(";")[0][:40] in text
        assert parameters[field.name].default == field.default


@pytest.fixture
def workshop(tmp_path, monkeypatch, blueprint):
    """A folder with all that the examples in the help name, and a Hub that has org/model."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "org" / "model", layers=12)
    shutil.copytree(tmp_path / "org" / "model", tmp_path / "model-folder")
    mixture = tiny_mixtral(layers=1)
    shutil.copytree(tmp_path / "org" / "model", tmp_path / "mixture-folder")
    mixture.save_pretrained(tmp_path / "mixture-folder")
    experts = filter(None, (split_expert(row.name) for row in find_submodules(mixture, experts=True)))
    unfreeze_experts(mixture, {next(experts).container: [1]})
    save_experts(mixture, tmp_path)
    rows = [{"question": f"1 2 {i}", "answer": f"{i} 5", "prompt": f"1 {i}", "completion": f"{i} 7"} for i in range(9)]
    for name in ("train", "few", "other"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = dataclasses.replace(blueprint, model_id="org/model")
    for name in ("blueprint", "one", "other", "local", "math"):
        named.save(tmp_path / f"{name}.json")
    named.coarsen("group").save(tmp_path / "groups.json")
    for seed, name in enumerate(("experts_math", "experts_law")):
        blueprint_of_experts(2, 8, seed).save(tmp_path / f"{name}.json")
    named.save(tmp_path / "org" / "model")
    named.save(tmp_path / "org" / "model" / file_name("math"))
    for share in (0.5, 0.8, 1.0):
        dataclasses.replace(named, training_checkpoint=share).save(tmp_path / "run" / file_name(None, share))
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 5})
    get_peft_model(tiny_llama(layers=2), config).save_pretrained(tmp_path / "adapter")
    made_up_run("all-linear").save(tmp_path / "all-linear")
    made_up_run("placed", speed=0.6).save(tmp_path / "blueprint")
    recipe = {"model": "model-folder", "train": "train.jsonl", "output": "out", "max_length": 16, "probe_examples": 4}
    training = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, "training": training}))
    with LoopbackHub({"org/model": tmp_path / "org" / "model"}, user="org") as hub:
        yield hub


def on_the_hub(hub, home, words):
    """Run a command in a process of its own, whose Hub is on loopback; return exit status, stdout and stderr."""
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_any"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    words = [sys.executable, "-m", "peft_blueprint.cli", *words]
    environment["PYTHONPATH"] = str(ROOT)
    away = home / "away"  # where org/model is no folder
    away.mkdir(parents=True, exist_ok=True)
    for file in home.parent.glob("*.json"):
        shutil.copy(file, away)
    done = subprocess.run(words, env=environment, cwd=away, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_the_examples_in_the_help_run(workshop, run, tmp_path):
    """Each of them, word for word, beside files of these names."""
    assert len(EXAMPLES) >= len(VERBS)
    order = {"extract": 1, "remove": 2, "fetch": 3}  # after embed and publish, which put there what these take
    for example in sorted(EXAMPLES, key=lambda text: order.get(text.split()[1], 0)):
        program_name, *words = shlex.split(example)
        is_remote = words[0] in ("publish", "fetch")
        status, out, err = on_the_hub(workshop, tmp_path / "home", words) if is_remote else run(*words)
        assert program_name == "peft-blueprint" and status == 0 and out, f"{example}\n{err}"


def test_json_is_one_value_on_stdout_and_talk_is_on_stderr(workshop, run):
    """For every verb that only reads."""
    for words in (
        ["show", "blueprint.json"],
        ["targets", "blueprint.json"],
        ["compare", "one.json", "other.json"],
        ["drift", "one.json", "other.json"],
        ["aggregate", "one.json", "other.json"],
        ["plan", "model-folder", "--vram", "12GiB"],
        ["report", "all-linear", "blueprint"],
        ["env"],
    ):
        status, out, _ = run(*words, "--format", "json")
        assert status == 0 and json.loads(out) is not None, words


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (BlueprintError("no such thing"), 2, "error: no such thing\n"),
        (DriftError("far away"), 1, "error: far away\nnext: peft-blueprint compare LOCAL PUBLISHED\n"),
        (ModuleNotFoundError("No module named 'zeus'"), 2, "error: No module named 'zeus'\nnext: pip install "),
        (MemoryError(), 1, "error: MemoryError\nnext: peft-blueprint plan"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), 1, "error: CUDA out of memory\nnext: "),
        (PermissionError(13, "Permission denied", "a.json"), 2, "error: a.json: Permission denied\n"),
        (BrokenPipeError(32, "Broken pipe"), 0, ""),
    ],
)
def test_every_failure_has_its_line_and_status(run, monkeypatch, error, status, message):
    """By the one table."""

    def fail(**_):
        raise error

    monkeypatch.setattr(program, "app", fail)
    monkeypatch.setattr(sys.stderr, "close", lambda: None, raising=False)
    found, out, err = run("show", "x")
    assert (found, out) == (status, "") and err.startswith(message)


@pytest.mark.parametrize(
    ("words", "command"),
    [(["blueprint", "fetch"], "peft-blueprint fetch --help"), (["frobnicate"], "peft-blueprint --help")],
)
def test_the_next_command_after_an_unknown_one_exists(run, words, command):
    """The help of a verb among the words, otherwise of the program."""
    assert run(*words)[2].endswith(f"next: {command}\n")


def test_a_fault_of_the_package_keeps_its_traceback(monkeypatch):
    """It is not dressed up as a person's mistake."""

    def fail(**_):
        raise KeyError("inner")

    monkeypatch.setattr(program, "app", fail)
    with pytest.raises(KeyError, match="inner"):
        program.main()


def test_the_table_has_the_more_special_class_first():
    """So that no line hides another."""
    for i, failure in enumerate(FAILURES):
        assert not any(issubclass(other.kind, failure.kind) for other in FAILURES[i + 1 :])


def test_help_imports_nothing_heavy():
    """No library for tensors, tables or validation."""
    heavy = {"torch", "numpy", "pandas", "scipy", "transformers", "peft", "datasets", "pydantic", "huggingface_hub"}
    script = f"import sys, peft_blueprint.cli.program; print(sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
