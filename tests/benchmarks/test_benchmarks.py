"""Benchmarks: every one starts on a tiny model, and `--list` names them."""

import json

import pytest

from benchmarks import setup
from benchmarks.__main__ import NAMES, docstring_of, main
from benchmarks.noise import with_swapped
from benchmarks.selection import Arm, Draw, best_of
from benchmarks.stopping import early_stop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory that benchmarks share, so that they share the tiny model too."""
    return tmp_path_factory.mktemp("benchmarks")


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_starts_on_a_tiny_model(name, folder, monkeypatch, capsys):
    """Each prints a table of more than its head; peaks are measured here instead of in processes of their own."""

    def peaks_here(options, names):
        found = {}
        for arm in names:
            main([*options.argv, "--peak-of", arm])
            found[arm] = int(json.loads(capsys.readouterr().out.splitlines()[-1]))
        return found

    monkeypatch.setattr(setup, "peaks_in_own_processes", peaks_here)
    monkeypatch.chdir(folder)
    main([name, "--quick"])
    out = capsys.readouterr().out
    if name == "sketch":
        assert "rank correlation within kind: " in out
    else:
        assert len([line for line in out.splitlines() if line.startswith("| ")]) > 1, out


def test_the_list_names_every_benchmark_with_its_question(capsys):
    """One line each, from the docstring; an unknown name is refused with the choice."""
    main(["--list"])
    out = capsys.readouterr().out
    assert all(f"  {name:<10} {docstring_of(name).splitlines()[0]}\n" in out for name in NAMES)
    assert max(map(len, out.splitlines())) < 140
    with pytest.raises(SystemExit, match="Unknown benchmark 'speed'. Choose from study, "):
        main(["speed"])


def test_records_are_made_once_and_found_again(tmp_path):
    """Without a way to make one, a missing record is None."""
    made = []

    def make():
        made.append(1)
        return {"loss": 0.5}

    path = tmp_path / "new" / "records.jsonl"
    assert setup.Records(path).get("a", make) == {"key": "a", "loss": 0.5} == setup.Records(path).get("a", make)
    assert len(made) == 1 and setup.Records(path).get("b", None) is None


def test_batches_go_over_the_rows_until_the_budget_is_spent():
    """By steps or by padded tokens; every pass has each row once, in an order of the seed."""
    rows = [{"input_ids": [i] * (1 + i % 2), "labels": []} for i in range(4)]
    batches = setup.random_batches(rows, 2, seed=0, steps=4)
    assert sorted(row["input_ids"][0] for batch in batches[:2] for row in batch) == [0, 1, 2, 3]
    assert batches == setup.random_batches(rows, 2, seed=0, steps=4) != setup.random_batches(rows, 2, seed=1, steps=4)
    short = setup.random_batches(rows, 2, seed=0, tokens=9)
    assert short == batches[: len(short)] and setup.tokens_of(short) <= 9 < setup.tokens_of(batches)


def test_the_rate_rises_and_falls_to_zero():
    """A linear schedule peaks at the last step of the warm-up."""
    factors = [setup.linear_schedule(step, 8, 4) for step in range(1, 9)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2]


def test_selection_reads_arms_and_cuts_shares():
    """Ties go to the earlier; references have no share."""
    assert Arm.all_of("norm@0.3", [0, 1]) == [Arm("norm", 0.3, 0), Arm("norm", 0.3, 1)]
    assert Arm.all_of("everything#2", [0]) == [Arm("everything", 1.0, 2)]
    with pytest.raises(SystemExit, match="Unknown arm 'luck'"):
        Arm.all_of("luck", [0])
    assert best_of([1.0, 3.0, 3.0, 2.0], 0.5) == [1, 2] and best_of([1.0, 1.0, 1.0], 0.1) == [0]


def test_swapped_answers_are_a_fifth_and_none_keeps_its_own():
    """Prompts stay where they are."""
    pool = [{"prompt": str(i), "completion": f"answer {i}"} for i in range(20)]
    draw, wrong = with_swapped(Draw("gsm8k", pool, [], 90), seed=1)
    assert len(wrong) == 4 and [one["prompt"] for one in draw.pool] == [one["prompt"] for one in pool]
    assert wrong == {i for i in range(20) if draw.pool[i] != pool[i]}


def test_early_stopping_waits_for_three_evaluations_without_a_new_best():
    """Otherwise it runs to the end."""
    assert early_stop([3.0, 2.0, 2.1, 2.2, 2.3, 1.0]) == 4 and early_stop([3.0, 2.0, 1.0]) == 2
