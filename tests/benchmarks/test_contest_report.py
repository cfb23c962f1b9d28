"""The benchmark of placements: that its report says what the numbers say. On made-up summaries, and on the real ones."""

import json
import math
from copy import deepcopy
from dataclasses import asdict

import pytest

from benchmarks.study import verdict
from benchmarks.study.quoting import quotes_of, requoted
from benchmarks.study.report import in_short, markdown
from benchmarks.study.study import Entry
from tests import ROOT


def row_of(arm: str, budget: float | None, above: float, time: float = 1.0, seeds: int = 1, **changes) -> dict:
    """A summary's row, so much above all-linear with every seed."""
    losses = [1.0 + above + 0.1 * i + 0.001 * (i % 2) * (arm != "all-linear") for i in range(8)]
    loss = sum(losses) / 8
    one = {"loss": loss, "losses": losses, "curve": [[30, loss]], "unrelated": {"license": 3.0}, "accuracy": None}
    numbers = {"modules": 9, "lowest": 0, "parameters": 1000, "rate": 0.002, "flops": 1e12, "charged_flops": 0.0}
    numbers |= {"step_time": time, "time": 30 * time, "charged_time": 0.0, "memory": 2**30, "steps": 30}
    entry = Entry(arm, **changes.pop("entry", {}))
    own = {"arm": arm, "label": entry.label, "entry": asdict(entry), "budget": budget, "status": "done", "ranks": [16]}
    own |= {"tried": {"0.002": loss}, "is_inside": False, "seeds": {str(k): deepcopy(one) for k in range(seeds)}}
    return {**own, **numbers, "examples": 240, **changes}


def shifted(row: dict, by: dict[str, float]) -> dict:
    """A row with its losses raised, by seed; without other seeds."""
    old = row["seeds"]["0"]
    seeds = {k: {**old, "loss": old["loss"] + v, "losses": [x + v for x in old["losses"]]} for k, v in by.items()}
    return {**row, "seeds": seeds}


def made_up(shift: float, seeds: int = 3) -> dict:
    """A summary of three arms: the default is `shift` above all-linear."""
    rows = [row_of("all-linear", None, 0.0, 1.0, seeds), row_of("planner", 0.2, shift, 0.65, seeds)]
    rows.append(row_of("random", 0.2, 0.02, 0.8, seeds))
    facts = {"data": "made up", "steps": 30, "batch": 8, "length": 9, "held_out": 8, "dtype": "float32"}
    before = {"loss": 2.0, "losses": [2.0] * 8, "curve": [[0, 2.0]], "unrelated": {"license": 2.5}, "accuracy": None}
    about = {
        "study": "s",
        "kind": "contest",
        "reference": "all-linear",
        "default": "planner",
        "jobs": 4,
        "device": "-",
    }
    return {
        **about,
        "facts": facts,
        "counts": [4] * 8,
        "untrained": before,
        "rows": rows,
        "times": {},
        "not_run": ["x"],
    }


def test_the_paragraph_follows_the_numbers():
    """Change a number of the summary, and the sentences change with it."""
    good, bad = (markdown(made_up(shift)) for shift in (-0.05, 0.05))
    assert "planner came out lowest with the first seed" in good and "better by two standard errors" in good
    assert "beats random placements by two standard errors" in good and "is met" in good
    assert "random came out lowest" in bad and "does not beat random placements" in bad
    assert "is missed, the loss by" in bad and "Not run: x." in bad and "Not run: x." in good
    slow = made_up(-0.05)
    slow["rows"][1]["step_time"] = 0.9
    assert "is missed, the time by 0.20" in verdict.paragraph(slow)
    assert "All-linear" not in verdict.paragraph(made_up(0.0)) and "1 arms have" not in good
    once = verdict.paragraph(made_up(-0.05, seeds=1))
    assert "standard errors" not in once and "against random (1 draw), with one seed" in once
    assert "It has one seed in common with all-linear, the one that it was chosen by: -0.0495" in once
    assert "What to use cannot be said yet" in once and "What to use, of the 3 rules" in good


def test_what_to_use_takes_draws_of_one_rule_together():
    """A lucky draw is not recommended; what is above the lowest stands there with what it costs."""
    summary = made_up(0.1)
    summary["rows"][2] = row_of("random", 0.2, -0.04, 0.8, seeds=3)
    summary["rows"].append(row_of("random #1", 0.2, 0.02, 0.9, seeds=3))
    said = in_short(summary)
    assert "of the 3 rules with several seeds: random at 20% (2 draws) has the lowest loss, in 0.85 of" in said
    assert "Not clearly above it: all-linear. All others are, by two standard errors." in said
    assert [line for line in said.splitlines() if line.startswith("| ")][1:] == [
        "| random at 20% (2 draws) | 3 | – | -0.0095 ± 0.0300 | 0.85 | 1.00 |",
        "| all-linear | 3 | +0.0095 ± 0.0300 | – | 1.00 | 1.00 |",
        "| planner at 20% | 3 | +0.1100 ± 0.0300 | +0.1005 ± 0.0002 | 0.65 | 1.00 |",
    ]
    assert "All others are above it by two standard errors" in verdict.paragraph(made_up(-0.05))
    ones, others = summary["rows"][2:], summary["rows"][:1]
    assert verdict.between(summary, ones, others).mean == -verdict.between(summary, others, ones).mean


def test_differences_are_paired():
    """What all examples share cancels; the standard error is of what is left, over examples or seeds."""
    summary = made_up(-0.05)
    reference, row, _ = summary["rows"]
    one = verdict.difference(summary, row, [reference])
    assert one is not None and one.mean == pytest.approx(-0.0495) and one.error < 0.001
    assert one.is_clear and one.seeds == 3
    of_examples = one.over_examples
    two = verdict.difference(summary, shifted(row, {"0": 0.0, "1": 0.1, "7": 9.0}), [reference])
    assert two is not None and two.seeds == 2 and two.mean == pytest.approx(0.0005) and not two.is_clear
    assert two.over_seeds == pytest.approx(0.05) and two.error == pytest.approx(math.hypot(0.05, of_examples))
    draws = [shifted(reference, {"0": 0.0, "1": 0.0, "8": 5.0}), shifted(reference, {"0": 0.3})]
    of_draws = verdict.difference(summary, shifted(row, {"0": 0.0, "1": 0.1}), draws)
    assert of_draws is not None and (of_draws.draws, of_draws.seeds) == (2, 2)
    assert of_draws.mean == pytest.approx((0.0005 - 0.3495) / 2), "one mean a draw, then theirs"
    assert of_draws.over_draws == pytest.approx(0.35 / 2) and of_draws.over_seeds == pytest.approx(0.25 / 2)
    alone = verdict.difference(summary, shifted(row, {"0": -9.0}), [reference])
    assert alone is not None and alone.over_seeds is None and not alone.is_clear, "one seed decides nothing"


def test_a_winner_is_tested_on_seeds_that_did_not_choose_it():
    """Its luck with the first seed is no part of the difference that is stated, nor are rates that it did not have."""
    summary = made_up(0.05)
    summary["rows"][1] = shifted(summary["rows"][1], {"0": -0.1, "1": 0.0, "2": 0.0})
    summary["rows"][2]["tried"] = {"0.002": 1.0, "0.004": 1.0}
    text = verdict.paragraph(summary)
    assert "of 2 arms (1 of which have had only one learning rate) planner came out lowest" in text
    assert (
        "On 2 other seeds it is +0.0505 ± 0.0002 against all-linear, worse by two standard errors, and +0.03" in text
    )
    del summary["rows"][2]["seeds"]["1"], summary["rows"][2]["seeds"]["2"]
    assert "worse by two standard errors; random has none of them." in verdict.paragraph(summary)


def test_the_random_control_is_one_rule_of_the_same_budget_and_of_as_many_modules():
    """Draws of one rule belong together, and no rule stands in for another's budget."""
    summary = made_up(-0.05)
    few = [row_of(f"random, as many{k}", 0.2, 0.04, seeds=2, modules=4) for k in ("", " #1")]
    whole = row_of("random, as shipped", None, 0.03, seeds=2, modules=60)
    chosen = row_of("random", 0.2, 0.5, modules=4, entry={"select": "random", "share": 0.3})
    summary["rows"] += [*few, whole, chosen, row_of("random, raised", 0.2, 0.1, modules=4)]
    reference, row, pooled = summary["rows"][:3]
    assert verdict.control_of(summary, row) == [pooled] and verdict.control_of(summary, reference) == [whole]
    row["modules"] = 5
    assert verdict.control_of(summary, row) == few, "of two as near the one with more draws"
    assert "against random, as many (2 draws)" in verdict.paragraph(summary)
    assert verdict.control_of(summary, {**row, "budget": 0.05}) == []
    begun = row_of("random, along the gradient", 0.2, 0.01, modules=90)
    summary["rows"].append(begun)
    assert verdict.control_of(summary, row) == few, "which begins otherwise"
    assert verdict.control_of(summary, {**row, "arm": "planner, along the gradient x 16"}) == [begun]


def test_a_table_says_which_rows_fall_short_and_compares_those_of_one_seed_with_those_of_three():
    """Losses are all-linear's and the paired difference; the time is that to within half a percent."""
    summary = made_up(0.005)
    reference, row, control = summary["rows"]
    summary["rows"][0] = shifted(reference, {"0": 0.0, "1": 0.6, "2": 0.6})
    control["seeds"] = {"0": control["seeds"]["0"]}
    row["parameters"], control["parameters"] = 114, 181
    row["seeds"]["0"]["curve"] = [[15, 1.354], [30, 1.352]]
    lines = {line.split(" | ")[0][2:]: line for line in markdown(summary).splitlines() if line.startswith("| ")}
    assert "of the budget" not in lines["random"] and "| 0.00 M (0.57 of the budget) |" in lines["planner"]
    assert "| 1.7500 |" in lines["all-linear"] and "| 1.7705 |" in lines["random"]
    assert "time to all-linear's loss + 0.5 %" in lines["arm"] and "| 0.65 | 0.32 |" in lines["planner"]
    for one in (one for r in summary["rows"] for one in r["seeds"].values()):
        one["accuracy"] = 0.5
    assert "| accuracy, given the long answer |" in markdown(summary)


def test_transfer_compares_with_the_same_arm_and_multiplication_over_shared_seeds():
    """A follower's row is beside its own blueprint's; gains are of seeds that both have, and a whole run is counted."""
    summary = made_up(-0.05)
    other = {"entry": {"blueprint": "nf4 x 4"}}
    summary["rows"] += [row_of("norm", 0.2, 0.3, seeds=2), row_of("norm", 0.2, 0.4, seeds=2, **other)]
    lines = [x for x in markdown({**summary, "kind": "transfer"}).splitlines() if x.startswith("| norm [nf4 x 4]")]
    assert "| +0.1000 ± 0.0000 | +0.4005" in lines[0]
    said = "norm at 20%: of 1 other blueprints nf4 x 4 chose worse than the study's own by two standard errors (2 seeds); "
    assert said + "the worst is nf4 x 4 with +0.1000 ± 0.0000." in markdown({**summary, "kind": "transfer"})
    assert "No arm has run yet both by" in markdown({**made_up(0.0), "kind": "transfer"})
    assert "No arm that combines" in markdown({**summary, "kind": "multiplication"})
    all_of_it = {"entry": {"select": "random", "share": 0.3, "stop": True}, "flops": 1e11, "steps": 5, "examples": 72}
    summary["rows"][0] = shifted(summary["rows"][0], {"0": 0.0, "1": 0.3})
    summary["rows"].append(row_of("planner", None, 0.1295, **all_of_it))
    summary["rows"].append(row_of("all-linear", None, 0.26, **{**all_of_it, "flops": 2e11}))
    text = markdown({**summary, "kind": "multiplication"})
    assert "planner + random 0.3 + stop, with one seed): 80% of all-linear's gain at 10% of its FLOPs, or 110%" in text
    [line] = [x for x in text.splitlines() if x.startswith("| planner + random 0.3 + stop")]
    assert "| 72 | 40 | 5 |" in line and "| +0.1300 ± 0.0002 | 80% | 10% | 0% | 110% |" in line
    assert (
        "all-linear + random 0.3 + stop, which measures and chooses nothing and is as short: 60% of all-linear's"
        in text
    )
    assert text.count("72% of the gain at 6% of the cost") == 1


def test_a_row_is_compared_with_all_linear_in_the_same_time():
    """Between its runs of all steps and of fewer, in a straight line; beyond them nothing is said."""
    summary = made_up(0.01)
    shorter = row_of("all-linear", None, 0.1, 1.0, 3, entry={"select": "random", "share": 0.5}) | {"steps": 15}
    assert verdict.less_in_same_time(summary, summary["rows"][1]) is None
    summary["rows"].append(shorter)
    planner = summary["rows"][1]  # at 0.65 of the time, where all-linear is 0.07 above its end
    assert verdict.less_in_same_time(summary, planner) == pytest.approx(0.01 - 0.07, abs=2e-3)
    charged = planner | {"charged_time": 5.0}
    assert verdict.less_in_same_time(summary, charged) == verdict.less_in_same_time(summary, planner)
    assert verdict.less_in_same_time(summary, planner | {"steps": 10}) is None
    text = markdown(summary)
    assert "against all-linear trained for fewer steps in that time" in text and "-0.0" in text


def test_a_step_time_that_was_measured_often_enough_stands_for_the_predicted_one():
    """In the paragraph, in the time to a loss and in comparisons at equal time; the reference takes 1 by definition."""
    summary = made_up(-0.05)
    reference, planner, _ = summary["rows"]
    planner["seeds"]["0"]["curve"] = [[15, 1.0]]
    summary["times"] = {"planner at 20%": [0.9, 0.5], "all-linear": [1.1, 1.2, 1.3]}
    assert verdict.step_time(summary, planner) == 0.65 and "predicted time" in verdict.paragraph(summary)
    before = verdict.time_to_reach(summary, planner, 1.2)
    summary["times"]["planner at 20%"].append(0.52)
    assert verdict.step_time(summary, planner) == 0.52 and verdict.step_time(summary, reference) == 1.0
    said = verdict.paragraph(summary)
    assert "in 0.52 of its measured time" in said and "0.52 of all-linear's step time" in said
    assert verdict.time_to_reach(summary, planner, 1.2) == pytest.approx(before * 0.52 / 0.65)


def test_predicted_gains_are_held_against_losses():
    """Over arms of one size, where there are enough of them; an arm with another blueprint, or unpredicted, is left out."""
    summary = made_up(0.1)
    assert "predicted gain" not in markdown(summary) and "planner predicts" not in verdict.paragraph(summary)
    summary["rows"] += [row_of(f"arm {i}", 0.2, 0.01 * i, kept=1 - 0.05 * i) for i in range(8)]
    summary["rows"] += [row_of("odd", 0.2, 9.0, kept=1.0, entry={"blueprint": "nf4 x 8"}), row_of("whole", 0.2, 8.0)]
    said = verdict.paragraph(summary)
    assert "ranks losses with a Spearman correlation of -1.00 (p = 0) over 8 arms with 20% of them." in said
    lines = {line.split(" | ")[0][2:]: line for line in markdown(summary).splitlines() if line.startswith("| ")}
    assert "| predicted gain |" in lines["arm"] and "| 0.65 |" in lines["arm 7"] and "| – |" in lines["whole"]


def test_documents_quote_what_the_studies_say():
    """README.md and RESULTS.md are as `--report` would write them from the summaries beside the recipes."""
    summaries = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    for name in ("README.md", "RESULTS.md"):
        text = (ROOT / name).read_text()
        assert quotes_of(text) <= {one["study"] for one in summaries}, name
        for one in summaries:
            assert requoted(text, one) == text, (
                f"{name} does not say what {one['study']} says: run its --report again."
            )
    assert quotes_of((ROOT / "RESULTS.md").read_text()) == {one["study"] for one in summaries}


def test_quotes_are_of_the_study_that_they_name():
    """Others stay as they are, prose is wrapped, tables are not; the short one says what to use."""
    mine, other = (
        "<!-- {}: {} -->\nold\n<!-- {}: end -->\n".format(*one) for one in (("s", "whole", "s"), ("t", "short", "t"))
    )
    found = requoted(f"A\n{mine}B\n{other}C\n", made_up(-0.05))
    assert found.startswith("A\n<!-- s: whole -->\ns: made up, 30 steps") and found.endswith(f"B\n{other}C\n")
    prose = [line for line in found.splitlines() if not line.startswith("|")]
    assert max(map(len, prose)) <= 120 < max(map(len, found.splitlines()))
    short = requoted(mine.replace("whole", "short"), made_up(-0.05))
    said = [line for line in short.split("\n")[1:-2] if not line.startswith("|")]
    assert "old" not in short and " ".join(said).strip() == verdict.recommendation(made_up(-0.05))
    assert "| planner at 20% | 3 |" in short and "| planner at 20% | 3 |" in found
    assert requoted(found, made_up(-0.05)) == found and quotes_of(found) == {"s", "t"}
