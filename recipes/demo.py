"""Demo on real weights: measure, probe, check drift, place, train, save, and reload with plain PEFT.

Trains SmolLM2-135M to write docstrings of Python's standard library, once with adapters where the blueprint places them
and once on every linear layer, for the same number of steps. Needs no network. Run it with `make demo`.
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
from peft_blueprint.data import read_examples
from peft_blueprint.measure import encode, get_pad_token_id, load_model, make_batches
from peft_blueprint.publish import plot_blueprint, save_page, save_plot
from peft_blueprint.runs import RunRecord, make_report
from peft_blueprint.train import Recipe, Report, run_recipe


RECIPE = Path("recipes/stdlib_docs.yaml")
OUTPUT = Path("demo-output")
# PEFT calls a method that transformers is about to rename.
NOISE = "`is_gradient_checkpointing` is deprecated"
DATA = Path(".cache/stdlib_docs")
CALIBRATION_EXAMPLES = 32

# Run without this package: compute the held-out loss as the report does.
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
    """Run every step, and print a table of results."""
    start = time.perf_counter()
    warnings.filterwarnings("ignore", NOISE, FutureWarning)
    recipe = Recipe.from_yaml(RECIPE)
    say("1/6 Preparing the model and the data")
    smollm2.prepare(Path(recipe.model))
    write_examples(Path(recipe.train), Path(str(recipe.held_out)))

    say(f"2/6 Measuring a blueprint on {CALIBRATION_EXAMPLES} calibration examples, as its publisher would")
    publish(recipe)

    say("3/6 Probing, checking drift, placing and initializing adapters on a seventh of the layers, and training")
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
        f"{OUTPUT / 'report.html'} compares gains and costs.\n"
        "Next, try: .venv/bin/peft-blueprint show demo-output/blueprint.json"
    )
    if abs(reloaded - (placed.loss_after or 0)) > 1e-3:
        raise SystemExit(
            f"The reloaded adapter must have the loss {placed.loss_after:.4f} it was trained to, got {reloaded:.4f}."
        )


def write_examples(train: Path, held_out: Path) -> None:
    """Write both splits as JSON lines; their modules do not overlap."""
    DATA.mkdir(parents=True, exist_ok=True)
    for split, path in (("train", train), ("held_out", held_out)):
        examples = stdlib_docs.examples(split)  # type: ignore[arg-type]
        path.write_text("".join(json.dumps(example) + "\n" for example in examples))
        print(f"    {path}: {len(examples)} examples")


def publish(recipe: Recipe) -> None:
    """Measure on the last training examples; the local probe takes the first ones."""
    model, tokenizer = load_model(recipe.model, recipe.dtype)
    examples = read_examples(recipe.train)[-CALIBRATION_EXAMPLES:]
    rows = encode(examples, tokenizer, recipe.max_length)
    blueprint = generate_blueprint(
        model,
        make_batches(rows, 8, get_pad_token_id(tokenizer)),
        max_examples=CALIBRATION_EXAMPLES,
        model_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        data="docstrings of Python's standard library",
        command="make demo",
    )
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    blueprint.save(OUTPUT)


def draw(recipe: Recipe) -> None:
    """Draw the blended blueprint with the placement outlined."""
    used = json.loads((Path(recipe.output) / "blueprint_config.json").read_text())
    (OUTPUT / "blended.json").write_text(json.dumps(used["blueprint"]))
    placement = Placement.from_dict(used["placement"])
    figure = plot_blueprint(Blueprint.from_pretrained(OUTPUT / "blended.json"), placement)
    save_plot(figure, OUTPUT / "placement.png")


def reload(recipe: Recipe) -> float:
    """Compute the held-out loss of the saved adapter in a process without this package."""
    import torch

    _, tokenizer = load_model(recipe.model, recipe.dtype)
    examples = read_examples(str(recipe.held_out), limit=recipe.held_out_examples)
    batches = OUTPUT / "held_out.pt"
    torch.save(make_batches(encode(examples, tokenizer, recipe.max_length), 8, get_pad_token_id(tokenizer)), batches)
    command = [sys.executable, "-W", f"ignore:{NOISE}:FutureWarning", "-c", RELOAD, recipe.output, str(batches)]
    loss = float(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    batches.unlink()
    return loss


def report(placed: Report, everything: Report, reloaded: float) -> None:
    """Print a table, and write `report.json` and `report.html`."""
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
    table.add_row("seconds of probe and initialization", f"{placed.measure_seconds:.0f}", "0", "")
    table.add_row("loss, reloaded by plain PEFT", f"{reloaded:.4f}", "", "")
    Console(width=100 if not sys.stdout.isatty() else None, highlight=False).print(table)
    if placed.drift is not None:
        print(f"Rank correlation of the local probe with the published blueprint, within kinds: {placed.drift:.2f}")
    runs = [RunRecord.load(one.output) for one in (placed, everything)]
    save_page(make_report(runs, baseline=runs[1].name, resource="flops"), OUTPUT / "report.html")
    results = {"by_blueprint": asdict(placed), "all_linear": asdict(everything), "reloaded_loss": reloaded}
    (OUTPUT / "report.json").write_text(json.dumps(results, indent=2) + "\n")


def say(text: str) -> None:
    """Print a step's heading."""
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    main()
