"""Demo on real weights: measure, probe, check drift, place, train, save, and reload with plain PEFT.

Trains SmolLM2-135M to write docstrings of Python's standard library, once with adapters where the blueprint places them
and once on every linear layer. The two take their steps in turn, on the same batches, so that other work on the machine
slows both alike. The probe and the initialization are charged to the run that they were for, and also shown apart. Needs
no network. Run it with `make demo`.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_blueprint import Blueprint, Placement, generate_blueprint


# isort: split
import torch
from peft import get_peft_model  # after peft_blueprint, which silences a warning of bitsandbytes on CPUs
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import TrainingArguments, get_scheduler

import smollm2
import stdlib_docs
from peft_blueprint.data import read_examples
from peft_blueprint.measure import collate, encode, get_pad_token_id, load_model, make_batches
from peft_blueprint.publish import plot_blueprint, save_page, save_plot, update_card
from peft_blueprint.runs import Ledger, RunLog, RunRecord, counted_flops, make_report
from peft_blueprint.train import (
    HeldOut,
    Recipe,
    charge,
    facts_of,
    held_out_losses,
    initialize_adapters,
    prepare,
    training_settings,
)


RECIPE = Path("recipes/stdlib_docs.yaml")
OUTPUT = Path("demo-output")
# PEFT calls a method that transformers is about to rename.
NOISE = "`is_gradient_checkpointing` is deprecated"
DATA = Path(".cache/stdlib_docs")
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
CALIBRATION_EXAMPLES = 32
STEPS_BETWEEN_EVALUATIONS = 4

# Run without this package: compute the held-out loss as the report does.
RELOAD = """
import json, logging, sys
sys.modules["peft_blueprint"] = None  # importing it would now fail
logging.getLogger("bitsandbytes").setLevel("ERROR")  # on CPUs it warns of a kernel that only 4-bit inference needs
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

    say("3/6 Probing, checking drift, placing and initializing adapters on a seventh of the layers")
    placed = Training(recipe, "blueprint")
    everything = Training(
        replace(recipe, placement="all-linear", start_examples=0, output=str(OUTPUT / "all-linear")), "all-linear"
    )

    say(f"4/6 Training both for {placed.max_steps} steps, in turn")
    train_in_turn([placed, everything])
    records = [placed.finish(), everything.finish()]
    draw(recipe)

    say("5/6 Loading the adapter in a process that cannot import peft_blueprint")
    reloaded = reload(recipe)

    say("6/6 Results")
    report(placed, everything, records, reloaded)
    print(
        f"\nDone in {time.perf_counter() - start:.0f} s: SmolLM2-135M now documents Python a little better, with adapters "
        f"on {placed.adapters} of its submodules.\nThe adapter is in {recipe.output}, the blueprint in "
        f"{OUTPUT / 'blueprint.json'}, the picture in {OUTPUT / 'placement.png'};\n"
        f"{OUTPUT / 'report.html'} compares gains and costs, curve by curve.\n"
        "Next, try: .venv/bin/peft-blueprint show demo-output/blueprint.json"
    )
    if abs(reloaded - placed.losses[-1].mean) > 1e-3:
        raise SystemExit(
            f"The reloaded adapter must have the loss {placed.losses[-1].mean:.4f} it was trained to, got {reloaded:.4f}."
        )


class Training:
    """One of several trainings that take their steps in turn: everything of a recipe before and after a step."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        arguments = TrainingArguments(**training_settings(recipe, progress=False))
        self.recipe, self.prepared = recipe, prepare(recipe, arguments)
        self.model = get_peft_model(self.prepared.model, self.prepared.config)
        self.pad = get_pad_token_id(self.prepared.tokenizer)
        initialization = initialize_adapters(self.model, recipe, self.prepared.rows, self.pad)
        self.before = {"probe": self.prepared.probe, "start": initialization}  # resources spent, by purpose
        self.max_steps, self.batch_size = arguments.max_steps, arguments.per_device_train_batch_size
        self.most_norm = arguments.max_grad_norm
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        arguments.learning_rate = self.prepared.learning_rate or arguments.learning_rate
        rate, decay = arguments.learning_rate, arguments.weight_decay
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=decay)
        warmup = arguments.get_warmup_steps(self.max_steps)
        self.scheduler = get_scheduler(arguments.lr_scheduler_type, self.optimizer, warmup, self.max_steps)
        examples = read_examples(str(recipe.held_out), limit=recipe.held_out_examples)
        self.held_out = make_batches(encode(examples, self.prepared.tokenizer, recipe.max_length), 8, self.pad)
        data = {"train": recipe.train, "held_out": recipe.held_out}
        about = {**facts_of(self.model, arguments), "model_id": MODEL_ID, **data}
        self.log = RunLog(
            name, metric="held_out_loss", resource="flops", ledger=Ledger(), output_dir=recipe.output, about=about
        )
        self.losses: list[HeldOut] = []  # at each evaluation
        self.wall: list[float] = []  # seconds of each step
        self.cpu: list[float] = []  # of the process, all threads

    @property
    def adapters(self) -> int:
        """Number of submodules with an adapter."""
        return sum(name.endswith("lora_A") for name, _ in self.model.named_modules())

    def batches(self) -> list[dict[str, Tensor]]:
        """Return the batches of the steps, the same for the same data, seed and size."""
        rows, count = self.prepared.rows, self.max_steps * self.batch_size
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.recipe.seed)).tolist()
        chosen = [rows[i] for i in (order * (count // len(rows) + 1))[:count]]
        return [collate(chosen[i : i + self.batch_size], self.pad) for i in range(0, count, self.batch_size)]

    def count_flops(self, batch: Mapping[str, Tensor]) -> None:
        """Count the operations of one step, without taking it; counting is too slow to be timed."""
        self.model.train()
        with counted_flops() as counted:
            self.model(**batch).loss.backward()
        self.optimizer.zero_grad()
        self.log.ledger.flops_per_token = counted.per_token(batch["input_ids"].numel())

    def step(self, batch: Mapping[str, Tensor]) -> None:
        """Take one step, and note what it took."""
        self.model.train()
        self.log.ledger.start()
        wall, cpu = time.perf_counter(), time.process_time()
        loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.most_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        self.log.ledger.pause()
        self.log.step(tokens=batch["input_ids"].numel())
        self.log.note_optimizer(self.optimizer)
        self.log.settle()
        self.log.note_loss(loss.item(), step=len(self.wall), learning_rate=self.scheduler.get_last_lr()[0])

    def evaluate(self) -> None:
        """Note the held-out loss."""
        self.losses.append(held_out_losses(self.model, self.held_out, progress=False))
        self.log.evaluate(self.losses[-1].metrics(), step=len(self.wall))

    def finish(self) -> RunRecord:
        """Save the adapter and the record of the run, in which the work before training is charged to it."""
        self.model.save_pretrained(self.recipe.output)
        self.prepared.tokenizer.save_pretrained(self.recipe.output)
        record = self.log.finish()
        for name, spent in self.before.items():
            record = charge(record, spent, name)
        record.save(self.recipe.output)
        return record


def train_in_turn(trainings: Sequence[Training]) -> None:
    """Let each take a step on a batch before any takes the next; who goes first alternates."""
    for training in trainings:
        training.evaluate()
        training.count_flops(training.batches()[0])
    for number, batches in enumerate(zip(*(training.batches() for training in trainings), strict=True)):
        pairs = list(zip(trainings, batches, strict=True))
        for training, batch in reversed(pairs) if number % 2 else pairs:
            training.step(batch)
        if (number + 1) % STEPS_BETWEEN_EVALUATIONS == 0 or number + 1 == trainings[0].max_steps:
            for training in trainings:
                training.evaluate()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles, without the first step, which pays for lazy initialization."""
    low, middle, high = statistics.quantiles(values[1:], n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def format_spread(values: Mapping[str, float], form: str = ".2f") -> str:
    """Format a median with its quartiles."""
    return f"{values['median']:{form}} [{values['low']:{form}}, {values['high']:{form}}]"


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
        model_id=MODEL_ID,
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


def report(placed: Training, everything: Training, records: Sequence[RunRecord], reloaded: float) -> None:
    """Print a table, and write `report.json`, `report.html` and the adapters' model cards."""
    table = Table()
    for column in ("", "by blueprint", "all-linear", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    results: dict[str, Any] = {"by_blueprint": {}, "all_linear": {}, "ratio": {}, "reloaded_loss": reloaded}

    def row(name: str, a: float, b: float, form: str) -> None:
        results["by_blueprint"][name], results["all_linear"][name], results["ratio"][name] = a, b, a / b if b else None
        table.add_row(name, format(a, form), format(b, form), f"{a / b:.2f}" if b else "")

    def timed(name: str, a: Sequence[float], b: Sequence[float]) -> None:
        found = [spread(values) for values in (a, b, [x / y for x, y in zip(a, b, strict=True)])]
        results["by_blueprint"][name], results["all_linear"][name], results["ratio"][name] = found
        table.add_row(name, *map(format_spread, found))

    before = [
        sum(spent["flops"].value or 0.0 for spent in training.before.values() if spent)
        for training in (placed, everything)
    ]
    flops = [record.total("flops").value or 0.0 for record in records]
    row("adapters", placed.adapters, everything.adapters, "d")
    sizes = [sum(parameter.numel() for parameter in training.trained) for training in (placed, everything)]
    row("trainable parameters", sizes[0], sizes[1], ",d")
    row("held-out loss before", placed.losses[0].mean, everything.losses[0].mean, ".4f")
    row("held-out loss after", placed.losses[-1].mean, everything.losses[-1].mean, ".4f")
    timed("seconds of a step", placed.wall, everything.wall)
    timed("processor seconds of a step", placed.cpu, everything.cpu)
    a_step = [(whole - part) / placed.max_steps / 1e12 for whole, part in zip(flops, before, strict=True)]
    row("TFLOP of a step", a_step[0], a_step[1], ".2f")
    row("TFLOP of the probe and the initialization", before[0] / 1e12, before[1] / 1e12, ".1f")
    row("TFLOP in all", flops[0] / 1e12, flops[1] / 1e12, ".1f")
    memory = [training.prepared.predicted["predicted_bytes"] for training in (placed, everything)]
    row("memory of a step, modelled, MiB", memory[0] / 2**20, memory[1] / 2**20, ".0f")
    table.add_row("loss, reloaded by plain PEFT", f"{reloaded:.4f}", "", "")
    Console(width=119 if not sys.stdout.isatty() else None, highlight=False).print(table)
    print("Times are medians and quartiles over the steps; their ratios are of the two steps on the same batch.")
    apart = placed.losses[-1].minus(everything.losses[-1])
    results["difference"] = {"loss": apart.mean, "standard_error": apart.error}
    print(
        f"Held-out loss by blueprint minus all-linear: {apart.mean:+.4f} ± {apart.error:.4f} (one standard error over "
        f"{len(apart.losses)} examples, one seed)."
    )
    if a_step[1] > a_step[0]:
        pays_after = before[0] / 1e12 / (a_step[1] - a_step[0])
        print(
            f"A step saves {a_step[1] - a_step[0]:.2f} TFLOP, so the work before training is paid for after {pays_after:.0f} steps."
        )
    if placed.prepared.drift is not None:
        drift = f"{placed.prepared.drift:.2f}"
        print(f"Rank correlation of the local probe with the published blueprint, within kinds: {drift}")
    found = make_report(records, baseline=records[1].name, resource="flops")
    save_page(found, OUTPUT / "report.html")
    for training, of_run in zip((placed, everything), found.rows, strict=True):
        update_card(training.recipe.output, found, of_run, license="apache-2.0")
    (OUTPUT / "report.json").write_text(json.dumps(results, indent=2) + "\n")


def say(text: str) -> None:
    """Print a step's heading."""
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    main()
