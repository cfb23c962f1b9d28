"""A run killed by the operating system is resumed. Run: pytest tests/data/test_selection_killed.py"""

import os
import signal
import subprocess
import sys
import time

import pytest

from peft_blueprint.data.select import select_examples
from peft_blueprint.testing import tiny_llama
from tests import ROOT


OPTIONS = {"count": 6, "method": "norm", "batch_size": 1, "state_every": 8, "deduplicate": False, "progress": False}
STUCK = 30  # examples, after which the process that is killed waits for more


def rows(count):
    """Distinct rows."""
    return [{"input_ids": [1 + (7 * i + 3 * j) % 90 for j in range(4 + i % 9)], "labels": None} for i in range(count)]


def stream(count, waits=False):
    """One row at a time, each token a target; it may hang."""
    for i, row in enumerate(rows(count)):
        if waits and i == STUCK:
            time.sleep(600)
        yield {**row, "labels": row["input_ids"]}


def main(path):
    """The process that is killed."""
    select_examples(tiny_llama(layers=2), stream(40, waits=True), keep_state=path, **OPTIONS)


def test_a_killed_process_loses_almost_no_work(tmp_path):
    """Kept results are not measured again, and the selection is the same."""
    path = tmp_path / "state"
    process = subprocess.Popen([sys.executable, __file__, str(path)], env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        end = time.monotonic() + 120
        while not path.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()

    def counted():
        model, passes = tiny_llama(layers=2), []
        model.register_forward_hook(lambda *_: passes.append(1))
        return model, passes

    model, all_passes = counted()
    whole = select_examples(model, stream(40), **OPTIONS)
    model, passes = counted()
    resumed = select_examples(model, stream(40), keep_state=path, **OPTIONS)
    assert resumed.indices == whole.indices and resumed.scores == pytest.approx(whole.scores, rel=1e-5)
    assert len(passes) <= len(all_passes) - OPTIONS["state_every"]
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


if __name__ == "__main__":
    main(sys.argv[1])
