"""Two processes choose the same examples as one. Run: pytest tests/data/test_selection_processes.py

They run once, as gloo processes that `torchrun` starts with this very file as their script.
"""

import sys
from pathlib import Path

import pytest
import torch

from peft_blueprint.data import filter_stream
from peft_blueprint.data.options import METHODS
from tests.choosing import choose, make_rows, model
from tests.processes import error_of, gloo_process, in_two_processes


POOL = make_rows(40)


SHARED = ["random", "norm", "alignment", "predicted_norm", "coreset_k_centre", "iterative"]


def shared(method):
    options = {"count": 6, "method": method, "small": 18, "target": make_rows(4, seed=8), "train_steps": 2}
    return (
        options
        if method == "alignment" or METHODS.get(method, METHODS["norm"]).uses_target
        else options | {"target": None}
    )


def scenario(rank, path):
    """Results of one process."""
    from torch.distributed.fsdp import fully_shard

    whole = fully_shard(model())
    return {
        **{method: choose(POOL, **shared(method)) for method in SHARED},
        "filtered": {unit: filtered(unit) for unit in ("example", "token")},
        "stream": choose(iter(POOL), **shared("norm"), keep_state=path / "state"),
        "sharded": choose(POOL[:37], whole, count=6, method="norm"),
        "other data": error_of(lambda: choose(POOL[rank:], count=6, method="norm")),
        "failing": error_of(lambda: choose(POOL, count=6, method="norm", loss_fn=lambda m, b: failing(m, b, rank))),
    }


def filtered(unit):
    """Rows that are kept, and the report's counts."""
    method = "head_norm" if unit == "token" else "norm"
    found = filter_stream(model(), iter(POOL), unit=unit, fraction=0.4, method=method, batch_size=4, progress=False)
    return list(found), {key: found.report[key] for key in ("units", "kept", "rows", "tokens")}


def failing(inner, batch, rank):
    if rank == 1:
        raise OSError("the device is gone")
    return inner(batch["input_ids"]).logits.mean(dim=(1, 2))


@pytest.fixture(scope="module")
def found(tmp_path_factory, pytestconfig):
    """Results of both processes."""
    path = tmp_path_factory.mktemp("found")
    in_two_processes(__file__, path)
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("method", SHARED)
def test_two_processes_choose_the_same_examples_as_one(found, method):
    """Each measures its share, and both get the same selection."""
    one, other = (of_process[method] for of_process in found)
    alone = choose(POOL, **shared(method))
    assert one.indices == other.indices == alone.indices and one.scores == other.scores
    assert one.scores == pytest.approx(alone.scores, rel=1e-3, abs=1e-4)
    assert one.report["cost"]["flops"] == other.report["cost"]["flops"]


@pytest.mark.parametrize("unit", ["example", "token"])
def test_two_processes_filter_as_one_does(found, unit):
    """Each scores its share of a chunk, and both yield all rows that are kept. The chunks of two are twice as long."""
    (rows, report), other = (of_process["filtered"][unit] for of_process in found)
    assert (rows, report) == other and report["rows"] == len(rows)
    alone, counts = filtered(unit)
    assert report["units"] == counts["units"] and abs(report["kept"] - counts["kept"]) <= 0.1 * counts["units"]
    assert sum(row in alone for row in rows) >= 0.5 * len(rows)


def test_two_processes_share_streams_and_sharded_models(found):
    """Both read a stream and measure half of it; on a model sharded by FSDP2 they stay in step."""
    for of_process in found:
        assert of_process["stream"].indices == choose(POOL, **shared("norm")).indices
        assert of_process["sharded"].indices == choose(POOL[:37], count=6, method="norm").indices


def test_an_error_on_one_process_ends_the_others(found):
    """With its message; so do different data on each."""
    first, second = (of_process["failing"] for of_process in found)
    assert first.startswith("MeasurementError: Process 1 of 2 failed") and "the device is gone" in first
    assert second == "OSError: the device is gone"
    assert all("different" in of_process["other data"] for of_process in found)


def main():
    """Run one of the two processes."""
    path = Path(sys.argv[1])
    with gloo_process() as rank:
        torch.save(scenario(rank, path), path / f"{rank}.pt")


if __name__ == "__main__":
    main()
