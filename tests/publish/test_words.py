"""A report in words, and as PEFT's results. Run: pytest tests/publish/test_words.py"""

import json
import math
from dataclasses import replace

from peft_blueprint.publish.method_comparison import method_comparison_json
from peft_blueprint.publish.words import describe_run, describe_stop, headline
from peft_blueprint.runs.quantity import absent, measured
from peft_blueprint.runs.record import Point, RunRecord
from peft_blueprint.runs.report import make_report
from tests.made_up_runs import made_up_run


def run(name, curve, *, metric="eval_loss", direction="minimize", total=None, **about):
    """A run whose points are (seconds, metric); the steps are the seconds."""
    points = tuple(Point(int(x), {"seconds": float(x)}, {metric: y}) for x, y in curve)
    spent = measured(float(total if total is not None else curve[-1][0]), "clock")
    return RunRecord(name, metric, direction, "seconds", {"seconds": spent}, points, about=about)


BASE = run("base", [(0, 3.0), (10, 2.5), (20, 2.2), (40, 2.0)])
FAST = run("fast", [(0, 3.0), (5, 2.4), (10, 1.9)], total=12)


def test_the_headline_states_gain_and_cost():
    """Against the baseline, without one, and alone."""
    assert headline(make_report([BASE, FAST], baseline="base")) == (
        "fast improved eval_loss 3.67 × as much per second as base. It reached the final eval_loss of base after 9 s, "
        "22 % of that run's time."
    )
    assert headline(make_report([BASE, FAST])).startswith("The largest gain of 2 runs: fast: eval_loss fell")
    alone = "base: eval_loss fell from 3.000 before training to 2.000 for 40 s (measured)."
    assert headline(make_report([BASE])) == alone
    unknown = replace(BASE, totals={"seconds": absent("no clock")})
    assert "time is unknown" in headline(make_report([unknown]))


def test_the_decision_to_stop_is_in_the_rules_own_words():
    """Whether, when, why, and the proposal; empty for a run without a rule."""
    stopping = {"stopped": False, "step": None, "reason": "It still pays.", "proposal": "Half the schedule would do."}
    row = make_report([replace(BASE, stopping=stopping)]).rows[0]
    assert describe_stop(row) == ["Not stopped by the rule.", "It still pays.", "Half the schedule would do."]
    assert describe_stop(make_report([BASE]).rows[0]) == []


def test_a_run_that_got_worse_diverged_or_was_not_evaluated_is_described():
    """Each in a sentence of its own."""
    runs = [run("worse", [(0, 2.0), (10, 2.5)]), run("broken", [(0, 3.0), (10, math.nan)]), replace(BASE, points=())]
    report = make_report(runs)
    said = [describe_run(row, report) for row in report.rows]
    assert "got worse" in said[0] and "diverged" in said[1] and "not evaluated" in said[2]


def read_as_peft_does(result):
    """The fields that PEFT's method_comparison/processing.py takes from a result, by the same keys."""
    run_info, train_info, meta = result["run_info"], result["train_info"], result["meta_info"]
    last = train_info["metrics"][-1]
    packages = [f"{name}-version" for name in ("peft", "transformers", "datasets", "torch", "bitsandbytes")]
    return {
        "peft_type": run_info["peft_config"]["peft_type"] if run_info["peft_config"] else "full-finetuning",
        "status": train_info["status"],
        "model_id": run_info["train_config"]["model_id"],
        **{name: run_info[name] for name in ("experiment_name", "total_time", "peft_branch", "created_at")},
        **{f"accelerator_memory_{name}": train_info[f"accelerator_memory_{name}"] for name in ("max", "reserved_avg")},
        "accelerator_memory_reserved_99th": train_info["accelerator_memory_reserved_99th"],
        **{name: train_info[name] for name in ("train_time", "file_size")},
        **{name: last[name] for name in ("test accuracy", "train loss", "train samples", "train total tokens")},
        **{name: meta["package_info"][name] for name in packages},
        "system_info": meta["system_info"],
    }


def test_the_results_are_in_the_form_that_pefts_tools_read():
    """Every key is there, unknown values are null, and further keys stand apart."""
    record = made_up_run("lora/r16", seconds_of_which={"evaluating": 10.0, "saving": 1.0})
    report = make_report([record])
    result = method_comparison_json(report.rows[0], report)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    read = read_as_peft_does(result)
    assert read["experiment_name"] == "lora/r16" and read["peft_type"] == "LORA" and read["status"] == "success"
    assert read["total_time"] == 604 and read["train_time"] == 593
    assert read["train samples"] == 8 * 600 and read["train total tokens"] == 600 * 8192
    assert read["test accuracy"] is None and read["bitsandbytes-version"] is None and read["peft-version"] == "0.21.0"
    assert read["system_info"]["accelerator"] == "NVIDIA L40S" and read["file_size"] == 7_372_800
    metrics = result["train_info"]["metrics"]
    assert metrics[1]["step"] == 50 and metrics[1]["valid accuracy"] == record.points[1].metrics["eval_accuracy"]
    ours = result["peft_blueprint"]
    assert ours["run"]["totals"]["energy_joules"]["how"] == "measured" and ours["metric"] == "eval_loss"


def test_unknown_figures_of_a_run_are_null():
    """The same keys, without a figure made up, and a metric that was not finite as null."""
    bare = run("bare", [(0, 3.0), (10, math.nan)])
    report = make_report([bare])
    result = method_comparison_json(report.rows[0], report)
    read = read_as_peft_does(json.loads(json.dumps(result, allow_nan=False)))
    assert read["model_id"] is None and read["train_time"] is None and read["train samples"] is None
    assert result["peft_blueprint"]["run"]["metric"] is None
