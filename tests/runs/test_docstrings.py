"""The room's examples run, and reports start without torch. Run: pytest tests/runs/test_docstrings.py"""

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

from peft_blueprint import runs


NAMES = [module.name for module in pkgutil.iter_modules(runs.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_docstrings_run(name):
    """Their output is as shown."""
    assert doctest.testmod(importlib.import_module(f"peft_blueprint.runs.{name}")).failed == 0


def test_records_reports_and_the_rule_need_no_torch(tmp_path):
    """Only the ledger and the log of a running loop do; a record is validated without it."""
    script = (
        "import sys; from peft_blueprint.runs import MarginalReturn, RunRecord, make_report\n"
        "MarginalReturn().check(1, 2.0); record = RunRecord('a', 'loss', 'minimize', 'seconds')\n"
        f"make_report([RunRecord.load(record.save({str(tmp_path)!r}))])\n"
        "import peft_blueprint.runs.meters; sys.exit(bool({'torch', 'zeus', 'codecarbon', 'pandas'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
