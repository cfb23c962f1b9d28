"""What a blueprint in a model's header costs: to write, to update, to read, and in bytes.

    python -m benchmarks embed [--gigabytes 1] [--repeats 5] [--folder .]

Times are on a file that is made for it and removed. Every repeat copies the file with `cp`, which ends
before the disk has it; then with `sync` after it and `mv` over the old one, whose room on the disk is given back, as
embedding does; then embeds. The ratios are medians over repeats of the ratio within one. The blueprints are those of a
Llama of as many blocks, with every statistic of a measurement and one domain tag beside the general one.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from peft_blueprint import Blueprint, Submodule
from peft_blueprint.blueprint import (
    JSON_KEY,
    escaped,
    extract,
    from_header_text,
    gamma_from_alpha,
    k_star,
    replace_metadata,
    to_arrays_bytes,
    to_header_text,
    to_json,
)
from peft_blueprint.publish import embed


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


def synthetic(count: int, seed: int = 0) -> Blueprint:
    """A blueprint of the first `count` linear submodules of a deep Llama; statistics about as measured ones spread."""
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


def timed(act: Callable[[], object]) -> float:
    """Seconds that `act` takes."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def copy(source: Path, target: Path, over: bool) -> None:
    """`cp`, and then `sync` and `mv` back over the source if `over`."""
    subprocess.run(["cp", source, target], check=True)
    if over:
        subprocess.run(["sync", target], check=True)
        subprocess.run(["mv", target, source], check=True)


def print_sizes() -> None:
    """The table of bytes."""
    print("| submodules | bytes in the header | of each | `blueprint.json` | `blueprint.safetensors` | write | read |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for count in (210, 800, 10_000):
        blueprint = synthetic(count)
        text = to_header_text(blueprint)
        size = len(escaped(text))
        write, read = timed(lambda: to_header_text(blueprint)), timed(lambda: from_header_text(text))  # noqa: B023
        print(
            f"| {count:,} | {size:,} | {size / count:.0f} | {len(to_json(blueprint)):,} | "
            f"{len(to_arrays_bytes(blueprint)):,} | {write:.2f} s | {read:.2f} s |"
        )


def print_times(folder: Path, gigabytes: float, repeats: int) -> None:
    """The table of seconds."""
    blueprint = synthetic(210)
    shape = SHAPES["mlp.up_proj"]
    names = [entry.name for entry in blueprint]
    size = math.prod(shape) * 2
    tensors = {f"{name}.weight": np.zeros(shape, "f2") for name in names[: max(1, round(gigabytes * 1e9 / size))]}
    path, other = folder / "model.safetensors", folder / "copy.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    del tensors
    rows: dict[str, list[float]] = {}
    room = len(escaped(to_header_text(blueprint)))
    for repeat in range(repeats):
        again = replace(blueprint, provenance={"repeat": repeat})
        for name, act in {
            "`cp`": lambda: copy(path, other, over=False),
            "`cp`, `sync`, `mv`": lambda: copy(path, other, over=True),
            "embedding, the file written anew": lambda: embed(
                again,  # noqa: B023
                path,
                reserve=room + 3000 * (repeat + 1),  # noqa: B023
                check=False,
                progress=False,
            ),
        }.items():
            other.unlink(missing_ok=True)
            os.sync()
            rows.setdefault(name, []).append(timed(act))
        other.unlink(missing_ok=True)
        for step in range(10):
            changed = replace(blueprint, provenance={"step": step})
            rows.setdefault("an update in place", []).append(
                timed(lambda: embed(changed, path, check=False, progress=False))  # noqa: B023
            )
            text = to_header_text(replace(blueprint, provenance={"step": -step}))
            rows.setdefault("the same, without composing its text", []).append(
                timed(lambda: replace_metadata(path, {JSON_KEY: text}, progress=False))  # noqa: B023
            )
            rows.setdefault("reading it", []).append(timed(lambda: extract(path)))
    print(f"A file of {path.stat().st_size / 1e9:.2f} GB, 210 submodules, medians over {repeats} repeats:\n")
    print("| | time | over `cp` | over `cp`, `sync`, `mv` |")
    print("|---|---:|---:|---:|")
    for name, seconds in rows.items():
        ratios = [
            f"{statistics.median(a / b for a, b in zip(seconds, rows[base], strict=True)):.2f}"
            if len(seconds) == repeats
            else "–"
            for base in ("`cp`", "`cp`, `sync`, `mv`")
        ]
        median = statistics.median(seconds)
        print(f"| {name} | {f'{median:.2f} s' if median > 0.5 else f'{median * 1e3:.1f} ms'} | {' | '.join(ratios)} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=Path("."), help="Where the file is made: on the disk to measure."
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print_times(Path(folder), args.gigabytes, args.repeats)
    print()
    print_sizes()


if __name__ == "__main__":
    main()
