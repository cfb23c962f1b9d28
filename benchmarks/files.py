"""What does a published blueprint cost? Bytes, seconds to write it into a model's header, requests to read it.

    python -m benchmarks files [--gigabytes 1] [--repeats 5] [--folder .]

Times are of a file that is made for it in --folder, on the disk to measure, and removed. Every repeat copies the file
with `cp`, which ends before the disk has it; then with `sync` and `mv` over the old one, as embedding does; then embeds.
Ratios are medians over repeats of the ratio within one. Requests are of the real client to a Hub on loopback, whose
models have the tensors of a Llama by name and none of their size. Blueprints are synthetic, with every statistic of a
measurement and one domain tag beside the general one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from peft_blueprint import Blueprint, Submodule
from peft_blueprint.blueprint import extract, from_header_text, gamma_from_alpha, k_star, to_dict, to_header_text
from peft_blueprint.publish import embed
from tests.hub.loopback import COMMIT, LoopbackHub

from . import setup


SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
COSTS = {"fixed_cost": 0.4, "variable_cost": 0.6}
# where a blueprint is read from, and of how many submodules
CASES = {
    "header": ("single", (210, 800, 10_000)),
    "index of a sharded model": ("sharded", (800,)),
    "`blueprint.json` beside": ("json", (210,)),
    "`blueprint.safetensors` beside": ("safetensors", (10_000,)),
}
SHARDS = 30
QUICK = {"gigabytes": 0.01, "repeats": 1, "largest": 210}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the model file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk to measure")
    parser.add_argument("--largest", type=int, default=10_000, help="submodules of the largest blueprint")


def main(options: argparse.Namespace) -> None:
    """Print three tables."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        _print_times(Path(folder), options.gigabytes, options.repeats)
    print()
    _print_sizes([count for count in (210, 800, 10_000) if count <= options.largest])
    print()
    _print_requests(options.largest)


def synthetic(count: int, seed: int = 0) -> Blueprint:
    """Return a blueprint of the first `count` linear submodules of a deep Llama, with about the spread of measured ones."""
    rng = np.random.default_rng(seed)
    entries = []
    for index in range(count):
        depth, path = index // len(SHAPES), list(SHAPES)[index % len(SHAPES)]
        norm, alpha = float(rng.lognormal(-1, 0.7)), float(rng.lognormal(-1, 0.3))
        gamma = gamma_from_alpha(alpha)
        entries.append(
            Submodule(
                f"model.layers.{depth}.{path}",
                gradient_norm=norm,
                kind=path.split(".")[1],
                depth=depth,
                group=f"{'attn' if 'attn' in path else 'ffn'}.{depth}",
                shape=SHAPES[path],
                median_norm=norm * float(rng.uniform(0.8, 1)),
                norm_interval=(norm * float(rng.uniform(0.8, 1)), norm * float(rng.uniform(1, 1.2))),
                signal_norm=norm * float(rng.uniform(0.1, 0.6)),
                noise_scale=float(rng.lognormal(2, 1)),
                weight_norm=float(rng.lognormal(4, 0.4)),
                adam_gain=float(rng.lognormal(-2, 0.7)),
                weight_gradient=float(rng.lognormal(2, 0.7)),
                singular_energy=float(rng.uniform(0.5, 1)),
                alignment=tuple(float(x) for x in rng.normal(size=16) * norm / 100),
                alpha=alpha,
                alpha_error=alpha * float(rng.uniform(0.02, 0.1)),
                gamma=gamma,
                k_star=k_star(gamma, **COSTS),
                examples=64,
                domain_tags={"general": 1.0, "law": float(rng.lognormal(0, 0.3))},
            )
        )
    return Blueprint("org/model", tuple(entries), costs=COSTS, provenance={"data": "synthetic", "seed": seed})


def _timed(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def _print_times(folder: Path, gigabytes: float, repeats: int) -> None:
    """Time copying the file, embedding into it, and reading the blueprint back."""
    blueprint, shape = synthetic(210), SHAPES["mlp.up_proj"]
    count = max(1, round(gigabytes * 1e9 / (math.prod(shape) * 2)))
    tensors = {f"{entry.name}.weight": np.zeros(shape, "f2") for entry in list(blueprint)[:count]}
    path, other = folder / "model.safetensors", folder / "copy.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    del tensors

    def replaced() -> None:
        for command in (["cp", path, other], ["sync", other], ["mv", other, path]):
            subprocess.run(command, check=True)

    rows: dict[str, list[float]] = {}
    for repeat in range(repeats):
        again = replace(blueprint, provenance={"repeat": repeat})
        acts: dict[str, Callable[[], object]] = {
            "`cp`": lambda: subprocess.run(["cp", path, other], check=True),
            "`cp`, `sync`, `mv`": replaced,
            "embedding": lambda: embed(again, path, check=False, progress=False),  # noqa: B023
            "reading it": lambda: extract(path),
        }
        for name, act in acts.items():
            other.unlink(missing_ok=True)
            os.sync()
            rows.setdefault(name, []).append(_timed(act))
    print(f"A file of {path.stat().st_size / 1e9:.2f} GB, 210 submodules, medians over {repeats} repeats:\n")
    bases = ("`cp`", "`cp`, `sync`, `mv`")
    cells = []
    for name, seconds in rows.items():
        ratios = [f"{statistics.median(setup.ratios(rows, name, base)):.2f}" for base in bases]
        median = statistics.median(seconds)
        cells.append([name, f"{median:.2f} s" if median > 0.5 else f"{median * 1e3:.1f} ms", *ratios])
    setup.print_table(["", "time", *(f"over {base}" for base in bases)], cells)


def _print_sizes(counts: list[int]) -> None:
    """Count the bytes of each form."""
    columns = ["submodules", "bytes in the header", "of each", "`blueprint.json`", "`blueprint.safetensors`"]
    rows = []
    for count in counts:
        blueprint = synthetic(count)
        record = to_dict(blueprint)
        text = to_header_text(record)
        size = len(json.dumps(text))
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"blueprint.{suffix}" for suffix in ("json", "safetensors")]
            for path in paths:
                blueprint.save(path)
            sizes = [f"{path.stat().st_size:,}" for path in paths]
        seconds = [_timed(partial(to_header_text, record)), _timed(partial(from_header_text, text))]
        rows.append([f"{count:,}", f"{size:,}", f"{size / count:.0f}", *sizes, *(f"{s:.2f} s" for s in seconds)])
    setup.print_table([*columns, "write", "read"], rows)


def _print_requests(largest: int) -> None:
    """Count requests and bytes of a first read, and requests of another read of the same commit."""
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for name, (form, counts) in CASES.items():
            for count in (count for count in counts if count <= largest):
                folder = Path(root) / f"{form}-{count}"
                _make_model(folder, count, form)
                with LoopbackHub({"org/model": folder}) as hub:
                    settings = {"endpoint": hub.endpoint, "cache_dir": Path(root) / f"cache-{form}-{count}"}
                    seconds = _timed(lambda: Blueprint.from_pretrained("org/model", **settings))  # noqa: B023
                    asked = hub.requests
                    Blueprint.from_pretrained("org/model", revision=COMMIT, **settings)
                    again = len(hub.requests) - len(asked)
                    missing = sum(request.status == 404 for request in asked)
                    received = sum(request.sent for request in asked)
                rows.append([name, f"{count:,}", len(asked), missing, f"{received:,}", f"{seconds * 1e3:.0f}", again])
    columns = ["read from", "submodules", "requests", "with 404", "bytes received", "ms", "again, at that commit"]
    setup.print_table(columns, rows)


def _make_model(folder: Path, count: int, form: str) -> None:
    """Write a model's folder with a blueprint in it."""
    blueprint = synthetic(count)
    tensors = {f"{entry.name}.weight": np.zeros(1, "f2") for entry in blueprint}
    folder.mkdir()
    if form in ("json", "safetensors"):
        blueprint.save(folder / f"blueprint.{form}")
        return
    if form == "single":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        shards = [f"model-{i:05}-of-{SHARDS:05}.safetensors" for i in range(1, SHARDS + 1)]
        weight_map = {name: shards[i * SHARDS // count] for i, name in enumerate(tensors)}
        for shard in shards:
            part = {name: tensors[name] for name, place in weight_map.items() if place == shard}
            save_file(part, folder / shard, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 140_000_000_000}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    embed(blueprint, folder, check=False, progress=False)
