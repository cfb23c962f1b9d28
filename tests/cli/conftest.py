"""The program as a test calls it."""

import sys

import pytest

from peft_blueprint.cli.program import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process; return exit status, stdout and stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["peft-blueprint", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        return exit.value.code or 0, out, err

    return call
