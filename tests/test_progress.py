"""Progress bars that are switched off, and files whose mode needs no umask of the process."""

import os
import stat
import subprocess
import sys

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm import tqdm

from peft_blueprint import generate_blueprint
from peft_blueprint._files import write_atomically
from peft_blueprint._progress import progress_bar
from peft_blueprint.blueprint import replace_metadata
from peft_blueprint.compare import read_sources
from peft_blueprint.measure import count_ahead
from peft_blueprint.testing import tiny_llama, toy_batches
from peft_blueprint.train.run import held_out_loss
from tests import ROOT


def test_a_bar_that_is_off_does_nothing():
    """It is a context and an iterable, and takes updates."""
    with progress_bar(show=False, total=3, desc="x") as bar:
        bar.update(2)
    assert list(progress_bar([1, 2], show=False)) == [1, 2]


def test_a_bar_knows_how_many_examples_there_are(capsys):
    """Of lists, data sets and loaders, at most as many as are measured; of an iterator only what was asked for."""
    batches, rows = toy_batches(examples=16), [{"input_ids": [5, 6], "labels": [5, 6]}] * 10
    known = [count_ahead(data, 64) for data in (batches, rows, Dataset.from_list(rows), DataLoader(rows, 4))]
    assert known == [16, 10, 10, 10]
    assert [count_ahead(batches, limit) for limit in (4, None)] == [4, 16]
    assert [count_ahead(iter(batches), limit) for limit in (64, None)] == [64, None]
    generate_blueprint(tiny_llama(1), toy_batches(examples=2), bootstrap=2)
    assert "Measuring: 100%" in capsys.readouterr().err


def rewrite(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((8).to_bytes(8, "little") + b"{}      ")
    replace_metadata(path, {"a": "b"}, progress=False)


QUIET = {
    "measuring": lambda tmp_path: generate_blueprint(tiny_llama(), toy_batches(examples=2), progress=False),
    "rewriting": rewrite,
    "reading": lambda tmp_path: read_sources(
        [generate_blueprint(tiny_llama(), toy_batches(examples=2), progress=False).save(tmp_path / "b.json")]
    ),
    "evaluating": lambda tmp_path: held_out_loss(tiny_llama(), toy_batches(examples=2), progress=False),
}


@pytest.mark.parametrize("run", QUIET.values(), ids=QUIET)
def test_without_progress_no_lock_is_taken(run, tmp_path, monkeypatch):
    """All processes share it: a child that is killed while it holds it would hang the others."""

    def taken(cls):
        raise AssertionError("the lock of the bars was taken")

    monkeypatch.setattr(tqdm, "get_lock", classmethod(taken))
    run(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from tqdm import tqdm
from tests.test_progress import QUIET
lock = tqdm.get_lock()
if not (child := os.fork()):
    lock.acquire()
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(child, 0)
assert not any(part.acquire(block=False) for part in lock.locks[:1]), "the dead child has it"
QUIET[sys.argv[1]](Path(sys.argv[2]))
sys.exit(f"{sys.argv[1]} ends")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", ["measuring"])
def test_a_child_killed_with_the_lock_does_not_hang_others(name, tmp_path):
    """The lock is never given back, and the siblings work on."""
    command = [sys.executable, "-c", KILLED, name, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1] == f"{name} ends", done.stderr


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_their_mode_without_a_change_of_the_umask(umask, mode, tmp_path, monkeypatch):
    """Other threads create files meanwhile; a file that is replaced keeps its mode."""
    old = os.umask(umask)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", lambda _: pytest.fail("the umask was changed"))
            write_atomically(tmp_path / "new", "x")
            (tmp_path / "old").write_text("x")
            (tmp_path / "old").chmod(0o640)
            write_atomically(tmp_path / "old", "y")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o640
