"""What tests with two processes share."""

import os
import subprocess
import sys

from tests import ROOT


def error_of(act):
    """The error that it ends in, in words, or "none"."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def in_two_processes(script, *arguments):
    """Run a file as the script of two gloo processes."""
    run = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2".split()
    done = subprocess.run(
        [sys.executable, *run, script, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]
