"""Does it pay to train the lower half of the adapters on some of the steps alone?

    python -m benchmarks freezing --data FOLDER [--arm "cover_gain, as shipped"] [--schedules "every 2" "until 0.4"]

The backward pass of a step ends at the lowest adapter that has a gradient, so that steps on which the lower half is frozen
are cheaper. "every 2" trains it on every second step, "until 0.4" on the first four tenths, where the learning rate is
highest. Everything else is as in the contest of placements on GSM8K, of which the arm is one; prints a line of JSON for
each schedule, with the predicted time over all-linear LoRA's.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from .study.arms import Choice
from .study.catalogue import choice_of
from .study.data import steps_of
from .study.ground import Ground
from .study.job import losses_of, mean_of, one_step
from .study.starts import ready
from .study.study import Entry, Study


HERE = Path(__file__).parent
MEASURED = Path(".cache/contest/measured")


def main() -> None:
    """Parse, train once a schedule, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--arm", default="cover_gain, as shipped")
    parser.add_argument("--schedules", nargs="+", default=["every 2", "every 3", "until 0.4"])
    options = parser.parse_args()
    study = Study.read(HERE / "studies" / "contest_gsm8k.yaml")
    ground = Ground(study, options.data, MEASURED)
    choice = choice_of(ground, Entry(options.arm), None)
    for schedule in options.schedules:
        is_whole = [is_of_all(schedule, step, study.steps) for step in range(study.steps)]
        time = sum(step_time(ground, choice, 0 if whole else half(ground)) for whole in is_whole) / study.steps
        loss = train(ground, choice, is_whole)
        print(json.dumps({"arm": options.arm, "schedule": schedule, "time": round(time, 3), "loss": loss}), flush=True)


def is_of_all(schedule: str, step: int, steps: int) -> bool:
    """Whether a step, counted from 0, trains the lower half too.

    Raises:
        SystemExit: if the schedule is neither "every N" nor "until SHARE".
    """
    word, _, number = schedule.partition(" ")
    if word == "every" and number.isdigit() and int(number):
        return step % int(number) == 0
    if word == "until" and number.replace(".", "", 1).isdigit():
        return step < float(number) * steps
    raise SystemExit(f"{schedule!r} is no schedule: say 'every N' or 'until SHARE'.")


def half(ground: Ground) -> int:
    """The first layer of the upper half."""
    depths = [entry.depth for entry in ground.entries() if entry.depth is not None]
    return (max(depths) + 1) // 2


def step_time(ground: Ground, choice: Choice, lowest: int) -> float:
    """Of a step with a backward pass down to the first adapter at or above a layer, over all-linear LoRA's."""
    depths = {entry.name: entry.depth or 0 for entry in ground.entries()}
    ranks = {name: rank for name, rank in choice.ranks.items() if depths[name] >= lowest}
    return ground.costs.time_ratio(ground.costs.cost(ranks, ()))


def train(ground: Ground, choice: Choice, is_whole: Sequence[bool]) -> float:
    """Held-out loss after training with the lower half frozen where it is not trained; AdamW leaves out what has no
    gradient.
    """
    study, data = ground.study, ground.data
    begun = ready(ground, choice, study.steps, 0)
    depths = {entry.name: entry.depth or 0 for entry in ground.entries()}
    lower = tuple(f".{name}." for name, depth in depths.items() if depth < half(ground))
    trained = [(name, p) for name, p in begun.model.named_parameters() if p.requires_grad]
    shallow = [p for name, p in trained if any(one in name for one in lower)]
    assert 0 < len(shallow) < len(trained)
    optimizer = torch.optim.AdamW(begun.groups, lr=study.rate, weight_decay=0.0)
    for step, rows in enumerate(steps_of(data.train, study.batch, study.steps, 0), start=1):
        for parameter in shallow:
            parameter.requires_grad_(is_whole[step - 1])
        share = min(step / study.warm_up, (study.steps - step + 1) / (study.steps - study.warm_up + 1))
        for group in optimizer.param_groups:
            group["lr"] = study.rate * share * group["factor"]
        if not math.isfinite(one_step(ground, begun, optimizer, rows, step)):
            return math.nan
    return mean_of(*losses_of(ground, begun.model, data.test))


if __name__ == "__main__":
    main()
