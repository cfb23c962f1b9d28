"""Helpers of tests with two processes."""

import contextlib
import os
import subprocess
import sys

import torch
import torch.distributed as dist

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


@contextlib.contextmanager
def gloo_process():
    """Join the other process of `in_two_processes`, and yield this one's rank.

    The process ends with the block, once both have come there: gloo's threads can abort an interpreter that shuts down.
    """
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    yield dist.get_rank()
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
