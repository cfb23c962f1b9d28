"""What it costs to read a published blueprint: requests and bytes, by where it stands.

    python -m benchmarks read

From a Hub on loopback, by the real client. The models have the tensors of a Llama by name and none of their size, so
that the header is a real one's; the blueprints are those of `benchmark_embed`.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from peft_blueprint import Blueprint
from peft_blueprint.publish import embed
from tests.hub.loopback import COMMIT, LoopbackHub

from .embed import synthetic


CASES = {
    "header, 210 submodules": (210, "single"),
    "header, 210 submodules, 64 KiB reserved": (210, "roomy"),
    "header, 800 submodules": (800, "single"),
    "index of a sharded model, 800 submodules": (800, "sharded"),
    "header, 10,000 submodules": (10_000, "single"),
    "`blueprint.json` beside, 210 submodules": (210, "beside"),
    "`blueprint.safetensors` beside, 10,000 submodules": (10_000, "arrays"),
}


def make(folder: Path, count: int, how: str) -> None:
    """A model's folder with a blueprint in it."""
    blueprint = synthetic(count)
    tensors = {f"{entry.name}.weight": np.zeros(1, "f2") for entry in blueprint}
    folder.mkdir()
    if how == "beside":
        blueprint.save(folder / "blueprint.json")
    elif how == "arrays":
        blueprint.save(folder / "blueprint.safetensors")
    elif how == "sharded":
        shards = [f"model-{i:05}-of-00030.safetensors" for i in range(1, 31)]
        weight_map = {name: shards[i * 30 // count] for i, name in enumerate(tensors)}
        for shard in shards:
            part = {name: tensors[name] for name, place in weight_map.items() if place == shard}
            save_file(part, folder / shard, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 140_000_000_000}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        embed(blueprint, folder, check=False, progress=False)
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        embed(blueprint, folder, check=False, reserve=64 * 1024 if how == "roomy" else 0, progress=False)


def main() -> None:
    """Print the table."""
    print("| where it stands | requests | of them 404 | bytes received | ms | again, at that commit |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as root:
        for number, (case, (count, how)) in enumerate(CASES.items()):
            folder = Path(root) / str(number)
            make(folder, count, how)
            with LoopbackHub({"org/model": folder}) as hub:
                settings = {"endpoint": hub.endpoint, "cache_dir": Path(root) / f"cache-{number}"}
                start = time.perf_counter()
                found = Blueprint.from_pretrained("org/model", **settings)
                seconds = time.perf_counter() - start
                assert len(found) == count
                asked = hub.requests
                Blueprint.from_pretrained("org/model", revision=COMMIT, **settings)
                again = len(hub.requests) - len(asked)
                missing = sum(request.status == 404 for request in asked)
                received = sum(request.sent for request in asked)
                print(f"| {case} | {len(asked)} | {missing} | {received:,} | {seconds * 1e3:.0f} | {again} |")


if __name__ == "__main__":
    main()
