"""Share what every benchmark needs: models, data sets, batches, timing, peak memory, tables and record files."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch
from filelock import FileLock
from torch import Tensor, nn
from transformers.utils import logging

from peft_blueprint._files import write_atomically
from peft_blueprint.measure import Row, collate, encode, load_model
from peft_blueprint.runs import Ledger
from peft_blueprint.testing import save_tiny_model
from recipes import smollm2, stdlib_docs


Split = Literal["train", "test"]
Example = dict[str, str]
Item = TypeVar("Item")

CACHE = Path(".cache/benchmarks")
RESULTS = Path(__file__).parent / "results"
# glibc returns freed memory at once, so that resident memory is live memory
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
FILES = {
    "gsm8k": {"train": "gsm8k_train.jsonl", "test": "gsm8k_test.jsonl"},
    "pubmedqa": {"train": "pubmedqa_ori_pqal.json", "test": "pubmedqa_test_ground_truth.json"},
    "jsonl": {"train": "train.jsonl", "test": "test.jsonl"},
}
FILES["pubmedqa with contexts"] = FILES["pubmedqa"]
CODE = ("argparse", "calendar", "difflib", "fractions", "heapq", "inspect", "shutil", "statistics", "textwrap")
LONGEST = 4096  # tokens; longer examples are cut


# ---- models


def model_folder(quick: bool = False) -> str:
    """Return the folder of SmolLM2-135M-Instruct, or of a tiny random Llama, written on the first call."""
    if not quick:
        return str(smollm2.prepare())
    folder = CACHE / "tiny"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "tiny.lock"):
        if not (folder / "model.safetensors").exists():
            save_tiny_model(folder, layers=4)
    return str(folder)


def load(quick: bool = False, dtype: str = "float32") -> tuple[Any, Any]:
    """Load model and tokenizer onto the device; dtype "nf4" loads 4-bit weights."""
    quantization = NF4 if dtype == "nf4" else None
    model, tokenizer = load_model(model_folder(quick), "bfloat16" if quantization else dtype, quantization)
    return model.to(device()), tokenizer


def one_batch(options: argparse.Namespace) -> tuple[Any, dict[str, Tensor]]:
    """Load the model and one batch of text in which every token is a target, the hardest case for the logits.

    Args:
        options: with `quick`, `dtype`, `examples` and `length`.
    """
    model, tokenizer = load(options.quick, options.dtype)
    if options.quick:
        ids = torch.randint(4, model.config.vocab_size, (options.examples, options.length))
    else:
        text = "\n\n".join(example["prompt"] + example["completion"] for example in stdlib_docs.examples("train"))
        ids = torch.tensor(tokenizer(text)["input_ids"][: options.length * options.examples])
    ids = ids.view(options.examples, options.length).to(device())
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def device() -> str:
    """Return "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """Name the GPU, or count CPU threads."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"


# ---- data


def read_examples(name: str, folder: Path, split: Split) -> list[Example]:
    """Read prompts and completions of a data set, in its own order.

    Args:
        name: "gsm8k", "pubmedqa", "pubmedqa with contexts" or "jsonl", read from `folder`; "demo" or "code", the docstrings and the functions of
            Python's standard library; "numbers", made up for tiny models.

    Raises:
        SystemExit: for an unknown data set or a missing file.
    """
    if name == "numbers":
        draw = random.Random(split)
        return [{"prompt": _numbers(draw, 6), "completion": f" {_numbers(draw, 8)}"} for _ in range(400)]
    if name == "code":
        return _functions()
    if name == "demo":
        found = stdlib_docs.examples("train" if split == "train" else "held_out")
        return [{key: one[key] for key in ("prompt", "completion")} for one in found]
    if name not in FILES:
        raise SystemExit(f"Unknown data set {name!r}. Choose from {', '.join(FILES)}, demo, code or numbers.")
    paths = {part: folder / file for part, file in FILES[name].items()}
    if missing := [str(path) for path in paths.values() if not path.exists()]:
        raise SystemExit(f"{' and '.join(missing)} not found. Give the folder that holds them as --data.")
    if name.startswith("pubmedqa"):
        tests = json.loads(paths["test"].read_text())
        rows = json.loads(paths["train"].read_text())
        found = []
        for row in (row for key, row in rows.items() if (key in tests) == (split == "test")):
            contexts = "".join(f"{text}\n" for text in row["CONTEXTS"]) if name.endswith("contexts") else ""
            completion = f"{row['LONG_ANSWER']}\nAnswer: {row['final_decision']}"
            found.append({"prompt": f"{contexts}{row['QUESTION']}\n", "completion": completion})
        return found
    lines = [json.loads(line) for line in paths[split].read_text().splitlines()]
    if name == "gsm8k":
        return [{"prompt": f"{line['question']}\n", "completion": line["answer"]} for line in lines]
    return [{"prompt": line["prompt"], "completion": line["completion"]} for line in lines]


def read_rows(name: str, folder: Path, split: Split, tokenizer: Any, longest: int, seed: int) -> list[Row]:
    """Encode a data set's examples of at most `longest` tokens, in random order."""
    found = shuffled(read_examples(name, folder, split), seed)
    return [row for row in encode(found, tokenizer, LONGEST) if len(row["input_ids"]) <= longest]


def shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """Return items in a random order that is the same on every call."""
    found = list(items)
    random.Random(seed).shuffle(found)
    return found


def random_batches(
    rows: Sequence[Row], size: int, seed: int, steps: int | None = None, tokens: float = float("inf")
) -> list[list[Row]]:
    """Draw batches over the rows in random order, pass after pass, for at most this many steps or padded tokens."""
    generator = random.Random(seed)
    batches: list[list[Row]] = []
    order: list[Row] = []
    spent = 0
    while steps is None or len(batches) < steps:
        while len(order) < size:
            order += generator.sample(list(rows), len(rows))
        spent += tokens_of([order[:size]])
        if spent > tokens:
            break
        batches.append(order[:size])
        order = order[size:]
    return batches


def in_batches(rows: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Split rows into batches, in order."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def tokens_of(batches: Iterable[Sequence[Row]]) -> int:
    """Count positions, padding included."""
    return sum(len(rows) * max(len(row["input_ids"]) for row in rows) for rows in batches)


def on_device(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """Collate rows into one batch on the device."""
    return {key: value.to(device()) for key, value in collate(rows, pad).items()}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Mapping[str, Tensor]) -> float:
    """Run forward, backward and update; return the loss."""
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def linear_schedule(step: int, steps: int, warm_up: int) -> float:
    """Return the factor on the learning rate at a step, counted from 1: a linear rise, then a linear fall."""
    return min(step / warm_up, (steps - step + 1) / max(1, steps - warm_up + 1))


# ---- time and memory


def seconds_per_round(
    arms: Mapping[str, Callable[[], object]], rounds: int, cpu_time: bool = False
) -> dict[str, list[float]]:
    """Time every arm once a round, in turn; an extra first round warms up and is dropped.

    Compare arms by the median ratio within a round, which a machine of drifting speed does not distort.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds + 1):
        for name, arm in arms.items():
            before = time.process_time()
            with Ledger() as spent:
                arm()
            if i:
                seconds[name].append(time.process_time() - before if cpu_time else spent.seconds)
        say(f"round {i} of {rounds}")
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], name: str, reference: str) -> list[float]:
    """Divide an arm's seconds by the reference's, round by round."""
    return [a / b for a, b in zip(seconds[name], seconds[reference], strict=True)]


def resident_bytes() -> int:
    """Return the bytes held by this process, or by CUDA's allocator on a GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else int(psutil.Process().memory_info().rss)


def peak_bytes(act: Callable[[], object], held: int | None = None) -> int:
    """Return the peak memory during a call in bytes, above the memory held before.

    Raises:
        SystemExit: where the peak cannot be measured.
    """
    held = resident_bytes() if held is None else held
    with Ledger() as spent:
        act()
    if spent.peak_bytes is None:
        raise SystemExit("Peak memory cannot be measured on this machine: it needs Linux or CUDA.")
    return spent.peak_bytes - held


def own_command(options: argparse.Namespace, *more: str) -> list[str]:
    """Return the command of this run, with more arguments, for a process of its own."""
    return [sys.executable, "-W", "ignore", "-m", "benchmarks", *options.argv, *more]


def own_environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that finds this package, with more variables."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **more}


def peaks_in_own_processes(options: argparse.Namespace, names: Iterable[str]) -> dict[str, int]:
    """Run the same command once more with `--peak-of NAME` for every arm; return the peaks in bytes."""
    found = {}
    for name in names:
        command = own_command(options, "--peak-of", name)
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=own_environment(**MALLOC))
        found[name] = int(json.loads(run.stdout.splitlines()[-1]))
        say(f"memory of {name}")
    return found


# ---- output


def quiet() -> None:
    """Silence progress bars of loading, and a warning that users cannot act on."""
    logging.disable_progress_bar()
    # PEFT asks transformers a question that is about to be renamed
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows in Markdown as they come."""
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def mean_and_error(values: Sequence[float], form: str = ".4f", sign: str = "") -> str:
    """Format a mean with its standard error."""
    if not values:
        return "–"
    mean = format(statistics.mean(values), f"{sign}{form}")
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:{form}}" if len(values) > 1 else mean


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Read a JSON file, or make and write it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(make()))
    return dict(json.loads(path.read_text()))


class Records:
    """JSON records in a file of lines, appended as they are made and found again by their key.

    Args:
        path: made with the first record.
    """

    def __init__(self, path: Path):
        self.path = path

    @functools.cached_property
    def known(self) -> dict[str, dict[str, Any]]:
        """Records by key."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return {record["key"]: record for record in map(json.loads, lines)}

    def get(self, key: str, make: Callable[[], Mapping[str, Any]] | None) -> dict[str, Any] | None:
        """Return a record; make and append a missing one, or return None without `make`."""
        if key not in self.known and make is not None:
            record = {"key": key, **make()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            self.known[key] = record
            say(key)
        return self.known.get(key)


def _numbers(draw: random.Random, count: int) -> str:
    return " ".join(str(draw.randrange(90)) for _ in range(count))


def _functions() -> list[Example]:
    """Return functions of the standard library: signature in, body out."""
    found = []
    for module in CODE:
        for _, function in inspect.getmembers(import_module(module), inspect.isfunction):
            if function.__module__ == module:
                head, _, body = inspect.getsource(function).partition("\n")
                found.append({"prompt": f"module: {module}\n{head}\n", "completion": body})
    return found
