"""benchmarks/on_gpu.sh runs every check within its time, goes on after a failure, and says what did not pass."""

import os
import stat
import subprocess

import pytest

from tests import ROOT


CHECKS = ("device", "recipe", "steps", "steps-7b-nf4", "tests")


def run(folder, body, *options, **environment):
    """Run the script with a program of its own in the interpreter's place, which appends its arguments to a file."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> {folder}/calls\n{body}\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run(
        [str(ROOT / "benchmarks" / "on_gpu.sh"), *options, str(folder / "out")],
        env=os.environ | {"PYTHON": str(python), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    calls = (folder / "calls").read_text() if (folder / "calls").exists() else ""
    return done.returncode, done.stdout, calls, done.stderr


def test_all_checks_run_and_their_tables_are_shown(tmp_path):
    body = 'case "$*" in *"benchmarks gpu"*) echo "| arm | seconds |";; esac'
    code, out, calls, _ = run(tmp_path, body, "--rehearse")
    assert code == 0 and all(f"{name}: passed" in out for name in CHECKS) and out.count("| arm | seconds |") == 2
    assert "-m benchmarks gpu --quick" in calls and "-m peft_blueprint.cli train" in calls and "-m pytest" in calls
    assert all((tmp_path / "out" / f"{name}.txt").exists() for name in CHECKS)


def test_a_failure_is_named_and_the_rest_runs(tmp_path):
    code, out, _, _ = run(tmp_path, 'case "$*" in *train*qlora.json) exit 3;; esac', "--rehearse")
    assert code == 1 and "recipe: failed (3)" in out and "tests: passed" in out and "Not passed: recipe." in out


def test_it_ends_within_its_time(tmp_path):
    """A hanging check is stopped, and checks without time left are skipped."""
    code, out, _, _ = run(
        tmp_path, 'case "$*" in *"-m pytest"*|*"benchmarks gpu"*) exec sleep 50;; esac', "--rehearse", LIMIT="7"
    )
    assert code == 1 and "steps: stopped after" in out and "tests: not run, no time left" in out


@pytest.mark.skipif("CUDA_VISIBLE_DEVICES" in os.environ, reason="says itself which GPUs there are")
def test_without_a_gpu_the_error_has_a_fix(tmp_path):
    code, _, _, errors = run(tmp_path, "exit 1")
    assert code == 2 and "--rehearse" in errors
