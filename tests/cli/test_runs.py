"""The verb `report`. Run: pytest tests/test_cli_report.py"""

import json
import subprocess
import sys

import pytest

from tests.made_up_runs import made_up_run


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Three runs in folders of their own, and the working folder beside them."""
    for name, about in {"base": {}, "fast": {"speed": 0.6}, "slow": {"end": 1.6, "seed": 3}}.items():
        made_up_run(name, **about).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(run):
    """Run the verb `report`."""
    return lambda *words: run("report", *words)


def test_runs_of_one_name_are_named_by_their_last_folders(tmp_path, call):
    """Below the folder that they share, without the path to it."""
    for folder in ("a", "b"):
        made_up_run("run").save(tmp_path / folder)
    status, out, _ = call(str(tmp_path / "a"), str(tmp_path / "b"), "--format", "quiet")
    assert status == 0 and [line.split("\t")[0] for line in out.splitlines()] == ["a", "b"]


def test_by_default_a_table_says_all(folders, call):
    """The headline, every run with its label and whether it is on the front, and every figure's label."""
    status, out, _ = call("base", "fast", "slow", "--baseline", "base")
    assert status == 0 and out.startswith("fast improved eval_loss 1.66 × as much per minute as base.")
    for word in ("base (baseline)", "measured", "10 min 4 s", "36.6 PFLOP (modelled)", "absent", "front", "yes", "no"):
        assert word in out


def test_one_run_alone_is_reported(folders, call):
    """Without a front and without a baseline's columns."""
    status, out, _ = call("fast")
    assert status == 0 and "fell from 2.310" in out and "front" not in out and "baseline" not in out


def test_quiet_gives_bare_lines(folders, call):
    """Name, metric and cost, separated by tabs."""
    _, out, err = call("base", "fast", "--format", "quiet", "--resource", "tokens")
    assert [line.split("\t")[0::2] for line in out.splitlines()] == [["base", "4915200.0"], ["fast", "4915200.0"]]
    assert err == ""


def test_the_baseline_may_be_a_folder_beside_the_runs(folders, call):
    """One that is among them, or another, which is then a row too."""
    assert "base (baseline)" in call("base", "fast", "--baseline", "./base/")[1]
    assert "base (baseline)" in call("fast", "--baseline", "base")[1]
    status, _, err = call("fast", "--baseline", "best")
    assert status == 2 and "'best' is neither the name of a run nor a folder. The runs are fast." in err


def test_runs_of_one_name_go_by_their_paths(folders, call):
    """So that one can be named as the baseline."""
    made_up_run("base").save(folders / "again")
    _, out, _ = call("base", "again", "--format", "quiet", "--baseline", "again")
    assert [line.split("\t")[0] for line in out.splitlines()] == ["base", "again"]


def test_names_are_not_read_as_markup(folders, call):
    """A name in brackets is printed as it is."""
    made_up_run("[red]x[/blue]").save(folders / "odd")
    assert call("odd")[0] == 0 and "[red]x[/blue]" in call("odd")[1]


def test_results_go_to_a_file_a_folder_or_are_printed(folders, call):
    """All as one list, or a file each, as PEFT's tools read a folder."""
    assert json.loads(call("base", "--format", "json")[1])[0]["run_info"]["experiment_name"] == "base"
    assert call("base", "fast", "--results", "all.json")[0] == 0
    assert [r["run_info"]["experiment_name"] for r in json.loads((folders / "all.json").read_text())] == [
        "base",
        "fast",
    ]
    made_up_run("a/b c").save(folders / "odd")
    assert call("base", "odd", "--results", "results")[0] == 0
    assert sorted(path.name for path in (folders / "results").iterdir()) == ["a--b--c.json", "base.json"]


def test_markdown_is_printed_or_written(folders, call):
    """With the runs beside each other; two answers on one stdout are refused."""
    assert call("base", "fast", "--markdown", "-")[1].startswith("## What it cost\n\n| run |")
    assert call("base", "--markdown", "cost.md")[0] == 0 and "| time |" in (folders / "cost.md").read_text()
    status, _, err = call("base", "--markdown", "-", "--format", "json")
    assert status == 2 and "both print to stdout" in err


def test_the_card_is_of_the_run_whose_folder_it_is_in(folders, call):
    """Else of the one that is not the baseline; where that leaves two, nothing is written."""
    assert call("base", "fast", "--card", "fast")[0] == 0
    assert "fast: eval_loss fell" in (folders / "fast" / "README.md").read_text(encoding="utf-8")
    (folders / "adapter").mkdir()
    assert call("base", "fast", "--baseline", "base", "--card", "adapter")[0] == 0
    assert "emissions: 1.624" in (folders / "adapter" / "README.md").read_text(encoding="utf-8")
    (folders / "other").mkdir()
    status, _, err = call("base", "fast", "--card", "other")
    assert status == 2 and "base, fast" in err and not list((folders / "other").iterdir())


def test_the_page_is_written(folders, call):
    """Its path goes to stderr, and the table to stdout."""
    status, out, err = call("fast", "--html", "page.html", "--resource", "energy_joules")
    assert status == 0 and "Written to page.html." in err and "Written" not in out
    assert 'id="by-energy_joules" checked' in (folders / "page.html").read_text(encoding="utf-8")


def test_errors_are_one_line(folders, call):
    """No such run, a broken file, a run without evaluation, a place that cannot be written."""
    assert call("nowhere")[::2] == (
        2,
        "error: No run found at nowhere. Give a folder with run.json, as LedgerCallback writes it, or with "
        "trainer_state.json.\n",
    )
    (folders / "slow" / "run.json").write_text('{"schema_version": 1, "name": 3}')
    status, _, err = call("base", "slow")
    assert status == 2 and "slow/run.json: name must be text, got 3" in err
    (folders / "slow" / "run.json").unlink()
    (folders / "slow" / "trainer_state.json").write_text('{"log_history": [{"step": 5, "loss": 2.0}]}')
    status, out, err = call("slow")
    assert status == 0 and "slow was not evaluated" in out and "slow" in err
    assert call("base", "--html", "base/run.json/page.html")[0] == 2


def test_the_verb_waits_for_no_torch(folders):
    """With a table, Markdown, JSON, the card or the page."""
    code = (
        "import sys; from peft_blueprint.cli import app; "
        "app(['report', 'base', 'fast', '--results', 'r', '--markdown', 'm.md', '--html', 'p.html', '--card', 'fast'], "
        "standalone_mode=False); sys.exit(bool({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
