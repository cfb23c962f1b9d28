"""How well two small samples agree on where the gradient is: of the same data, and of different data.

    python -m benchmarks drift [--examples 64] [--data FOLDER] [--sets NAME ...]

Measures SmolLM2-135M once on each data set, then correlates ranks within kind between random disjoint samples of 8, 16,
32, … examples, up to half of what was measured. The drift threshold belongs between what the same data gives and what other data gives. FOLDER may hold
`gsm8k_train.jsonl` and `pubmedqa_ori_pqal.json`; the standard library's docstrings and its source code are always there.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import statistics
from dataclasses import replace
from importlib import import_module
from itertools import combinations
from pathlib import Path

import torch

from peft_blueprint import Blueprint, Influence, check_drift, measure_influence
from peft_blueprint.data import encode, make_batches, pad_token_of
from peft_blueprint.measure import load_model
from recipes import smollm2, stdlib_docs


SIZES = (8, 16, 32, 64, 128)
DRAWS = 20


def main() -> None:
    """Measure every data set, then print a table of correlations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--data", type=Path, help="folder with more data sets")
    parser.add_argument("--sets", nargs="+", help="names of the data sets; by default all there are")
    options = parser.parse_args()
    sizes = [size for size in SIZES if 2 * size <= options.examples]

    model, tokenizer = load_model(str(smollm2.prepare()), "float32")
    influences = {}
    sets = data_sets(options.data)
    for name in options.sets or sets:
        examples = sets[name]
        random.Random(0).shuffle(examples)
        rows = encode(examples[: 2 * options.examples], tokenizer, options.max_length)
        batches = make_batches(rows, 8, pad_token_of(tokenizer))
        influences[name] = measure_influence(model, batches, max_examples=options.examples)
        found = influences[name]
        error = found.norm_errors.mean()
        print(f"{name}: {found.examples} examples, loss {found.losses.mean():.2f}, norms ± {error:.3f}", flush=True)

    print(f"\n{'correlation of ranks within kind':<44}" + "".join(f"{f'n = {size}':>22}" for size in sizes))
    pairs = [(name, name) for name in influences] + list(combinations(influences, 2))
    for a, b in pairs:
        cells = [correlations(influences[a], influences[b], size) for size in sizes]
        label = f"{a}, two samples" if a == b else f"{a} against {b}"
        print(f"{label:<44}" + "".join(f"{statistics.mean(c):>8.3f} [{min(c):.3f}, {max(c):.3f}]" for c in cells))


def correlations(a: Influence, b: Influence, size: int) -> list[float]:
    """Drift correlations of random samples of `size` examples, disjoint where the data are the same."""
    found = []
    for draw in range(DRAWS):
        order = torch.randperm(a.examples, generator=torch.Generator().manual_seed(draw))
        mine, others = order[:size], order[-size:]
        found.append(check_drift(sample(a, mine), sample(b, others), draws=2).correlation)
    return found


def sample(influence: Influence, columns: torch.Tensor) -> Blueprint:
    """A blueprint of some of the measured examples, with norms alone."""
    means = influence.norms[:, columns].mean(dim=1).tolist()
    entries = zip(influence.submodules, means, strict=True)
    return Blueprint("SmolLM2-135M", tuple(replace(entry, gradient_norm=mean) for entry, mean in entries))


def data_sets(folder: Path | None) -> dict[str, list[dict[str, str]]]:
    """Examples by data set."""
    sets = {"docstrings": stdlib_docs.examples("train"), "source code": list(source_code())}
    if folder is not None:
        lines = (folder / "gsm8k_train.jsonl").read_text().splitlines()
        gsm8k = [json.loads(line) for line in lines]
        sets["GSM8K"] = [{"prompt": f"{r['question']}\n", "completion": r["answer"]} for r in gsm8k]
        pubmedqa = json.loads((folder / "pubmedqa_ori_pqal.json").read_text()).values()
        sets["PubMedQA"] = [{"prompt": f"{r['QUESTION']}\n", "completion": r["LONG_ANSWER"]} for r in pubmedqa]
    return sets


def source_code() -> list[dict[str, str]]:
    """Functions of the standard library: signature in, body out."""
    found = []
    for module in (
        "argparse",
        "calendar",
        "difflib",
        "fractions",
        "heapq",
        "inspect",
        "shutil",
        "statistics",
        "textwrap",
    ):
        for name, function in inspect.getmembers(import_module(module), inspect.isfunction):
            if function.__module__ == module:
                head, _, body = inspect.getsource(function).partition("\n")
                found.append({"prompt": f"module: {module}\n{head}\n", "completion": body, "name": name})
    return found


if __name__ == "__main__":
    main()
