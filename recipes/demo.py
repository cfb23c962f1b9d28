"""The main job on real weights: measure, probe, check drift, place, train, save, and reload without this package.

Adapts SmolLM2-135M to documenting Python's standard library, once where the blueprint says and once on every linear
layer, for the same number of steps. Needs no network and no file outside the repository. Run it with `make demo`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

import smollm2
import stdlib_docs
from peft_blueprint import Blueprint, Placement, generate_blueprint
from peft_blueprint.data import encode, make_batches, pad_token_of, read_examples
from peft_blueprint.measure import load_model
from peft_blueprint.publish import plot_blueprint, save_page, save_plot
from peft_blueprint.runs import RunRecord, make_report
from peft_blueprint.train import Recipe, Report, run_recipe


RECIPE = Path("recipes/stdlib_docs.yaml")
OUTPUT = Path("demo-output")
# PEFT asks transformers a question that transformers is about to rename; nobody who runs this can do anything about it.
NOISE = "`is_gradient_checkpointing` is deprecated"
DATA = Path(".cache/stdlib_docs")
CALIBRATION_EXAMPLES = 32

# What a colleague without this package runs; the loss is computed as the report computes it.
RELOAD = """
import json, sys
sys.modules["peft_blueprint"] = None  # importing it would now fail
import torch
from peft import AutoPeftModelForCausalLM

adapter, batches = sys.argv[1:]
model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
loss = targets = 0
with torch.no_grad():
    for batch in torch.load(batches):
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        loss += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        targets += (labels != -100).sum().item()
print(json.dumps(loss / targets))
"""


def main() -> None:
    """Run every step, saying what it does; the table and the picture come last."""
    start = time.perf_counter()
    warnings.filterwarnings("ignore", NOISE, FutureWarning)
    recipe = Recipe.from_yaml(RECIPE)
    say("1/6 Preparing the model and the data")
    smollm2.prepare(Path(recipe.model))
    write_examples(Path(recipe.train), Path(str(recipe.held_out)))

    say(f"2/6 Measuring a blueprint on {CALIBRATION_EXAMPLES} calibration examples, as its publisher would")
    publish(recipe)

    say("3/6 Probing, checking drift, placing LoRA on a seventh of the layers, along the gradient, and training")
    placed = run_recipe(recipe)
    draw(recipe)

    say("4/6 Training the same number of steps with LoRA on every linear layer")
    everything = run_recipe(
        replace(recipe, placement="all-linear", start_examples=0, output=str(OUTPUT / "all-linear"))
    )

    say("5/6 Loading the adapter in a process that cannot import peft_blueprint")
    reloaded = reload(recipe)

    say("6/6 Results")
    report(placed, everything, reloaded)
    print(
        f"\nDone in {time.perf_counter() - start:.0f} s: SmolLM2-135M now documents Python a little better, with adapters "
        f"on {placed.placed} of its submodules.\nThe adapter is in {placed.output}, the blueprint in "
        f"{OUTPUT / 'blueprint.json'}, the picture in {OUTPUT / 'placement.png'};\n"
        f"{OUTPUT / 'report.html'} says what was gained for what was spent.\n"
        "Next, try: .venv/bin/peft-blueprint show demo-output/blueprint.json"
    )
    if abs(reloaded - (placed.loss_after or 0)) > 1e-3:
        raise SystemExit(
            f"The reloaded adapter's loss {reloaded:.4f} is not the trained one's {placed.loss_after:.4f}."
        )


def write_examples(train: Path, held_out: Path) -> None:
    """Both sides of the data as JSON lines; their modules do not overlap."""
    DATA.mkdir(parents=True, exist_ok=True)
    for split, path in (("train", train), ("held_out", held_out)):
        examples = stdlib_docs.examples(split)  # type: ignore[arg-type]
        path.write_text("".join(json.dumps(example) + "\n" for example in examples))
        print(f"    {path}: {len(examples)} examples")


def publish(recipe: Recipe) -> None:
    """Measure on examples from the end of the training set; the local probe takes them from its start."""
    model, tokenizer = load_model(recipe.model, recipe.dtype)
    examples = read_examples(recipe.train)[-CALIBRATION_EXAMPLES:]
    rows = encode(examples, tokenizer, recipe.max_length)
    blueprint = generate_blueprint(
        model,
        make_batches(rows, 8, pad_token_of(tokenizer)),
        max_examples=CALIBRATION_EXAMPLES,
        model_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        data="docstrings of Python's standard library",
        command="make demo",
    )
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    blueprint.save(OUTPUT)


def draw(recipe: Recipe) -> None:
    """The blueprint that was used, with what was placed outlined."""
    used = json.loads((Path(recipe.output) / "blueprint_config.json").read_text())
    (OUTPUT / "blended.json").write_text(json.dumps(used["blueprint"]))
    placement = Placement.from_dict(used["placement"])
    figure = plot_blueprint(Blueprint.from_pretrained(OUTPUT / "blended.json"), placement)
    save_plot(figure, OUTPUT / "placement.png")


def reload(recipe: Recipe) -> float:
    """The held-out loss of the saved adapter, in a process of its own."""
    import torch

    _, tokenizer = load_model(recipe.model, recipe.dtype)
    examples = read_examples(str(recipe.held_out), limit=recipe.held_out_examples)
    batches = OUTPUT / "held_out.pt"
    torch.save(make_batches(encode(examples, tokenizer, recipe.max_length), 8, pad_token_of(tokenizer)), batches)
    command = [sys.executable, "-W", f"ignore:{NOISE}:FutureWarning", "-c", RELOAD, recipe.output, str(batches)]
    loss = float(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    batches.unlink()
    return loss


def report(placed: Report, everything: Report, reloaded: float) -> None:
    """One table, on the screen and in `demo-output/report.json`; and what was gained for what was spent, as a page."""
    table = Table()
    for column in ("", "by blueprint", "all-linear", "ratio"):
        table.add_column(column, justify="left" if not column else "right")

    def row(name: str, a: float | None, b: float | None, form: str) -> None:
        if a is not None and b is not None:
            table.add_row(name, format(a, form), format(b, form), f"{a / b:.2f}")

    row("adapters", placed.placed, everything.placed, "d")
    row("trainable parameters", placed.trainable_parameters, everything.trainable_parameters, ",d")
    row("held-out loss before", placed.loss_before, everything.loss_before, ".4f")
    row("held-out loss after", placed.loss_after, everything.loss_after, ".4f")
    row("seconds of training", placed.train_seconds, everything.train_seconds, ".0f")
    row("peak memory, MiB", (placed.peak_bytes or 0) / 2**20, (everything.peak_bytes or 1) / 2**20, ".0f")
    table.add_row("seconds of probing and starting", f"{placed.measure_seconds:.0f}", "0", "")
    table.add_row("loss, reloaded by plain PEFT", f"{reloaded:.4f}", "", "")
    Console(width=100 if not sys.stdout.isatty() else None, highlight=False).print(table)
    if placed.drift is not None:
        print(f"Rank correlation of the local probe with the published blueprint, within kinds: {placed.drift:.2f}")
    runs = [RunRecord.load(one.output) for one in (placed, everything)]
    save_page(make_report(runs, baseline=runs[1].name, resource="flops"), OUTPUT / "report.html")
    results = {"by_blueprint": asdict(placed), "all_linear": asdict(everything), "reloaded_loss": reloaded}
    (OUTPUT / "report.json").write_text(json.dumps(results, indent=2) + "\n")


def say(text: str) -> None:
    """A step's heading."""
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    main()
