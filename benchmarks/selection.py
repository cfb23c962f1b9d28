"""Does choosing examples pay? Held-out loss of SmolLM2-135M on GSM8K and PubMedQA after the same total FLOPs.

    python -m benchmarks selection --data FOLDER [--sets SET ...] [--arms ARM[@Q][#SEED] ...] [--seeds 0 1 2] [--print]

Of a pool of 60 examples each method keeps a share q, and a placement is trained on those, again and again, until the
budget is spent: what 15 steps of 8 examples of the whole pool cost, padding included. Choosing is paid out of it, by
`Selection.report`'s FLOPs; a training token costs 2P forward, 2P backward times the share of the backward pass that the
placement needs by `CostModel`, and its adapters and their optimizer, with P the parameters that a token is multiplied
with. References, which choose nothing: "everything", the whole pool for the whole budget; "one_pass", the whole pool
once, for less; "untrained". "METHOD, unpaid" is not charged for choosing. One learning rate for all, a third of what
suits the placement, since small shares are seen many times over; seeds vary the draws of pool and target, the order and
the adapters. Results are appended to --out and not computed again; scores are kept in .cache/benchmarks/selection/, so
that what arms share is measured once, and charged to each. --print prints the table of all that is in --out.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peft_blueprint.data import METHODS, select_examples
from peft_blueprint.measure import Row, encode, make_batches, parameters_per_token
from peft_blueprint.train import held_out_loss

from . import setup
from .study.ground import Ground
from .study.plan import Study, digest


SCORES = setup.CACHE / "selection"
KEEP = 0.85  # the placement's share of all-linear LoRA's predicted gain
LENGTHS = {"gsm8k": 90, "pubmedqa": 60, "numbers": 16}  # tokens of an example: short, so that many arms fit in hours
POOL, TARGET, HELD_OUT, STEPS, BATCH, WARM_UP = 60, 12, 36, 15, 8, 3
SHARES, SEEDS = (0.3, 0.1), (0, 1, 2)
LEARNING_RATE = 2e-3 / 3
REFERENCES = ("everything", "one_pass", "untrained")
UNPAID = ", unpaid"
QUICK = {"sets": ["numbers"], "arms": ["everything", "random@0.5", "length@0.5"], "seeds": [0], "pool": 12, "steps": 2}

# what an arm asks of select_examples, beyond its defaults
WISHES: dict[str, dict[str, Any]] = {
    **{name: {} for name in METHODS if name not in ("iterative", "head_norm")},
    "predicted_norm, tokens": {"method": "predicted_norm", "features": "tokens", "small": 24},
    "predicted_alignment, tokens": {"method": "predicted_alignment", "features": "tokens", "small": 24},
    "alignment, adam": {"method": "alignment", "precondition": "adam"},
    # with a forward pass over all in each round, or more measured, it would be over the budget
    "iterative": {"features": "tokens", "small": 16, "train_steps": 3},
}
OPPOSITE = {"norm_low": "norm", "loss_low": "loss", "length_short": "length"}
DEFAULT = (
    *("random", "norm", "alignment", "predicted_norm, tokens", "coreset_facility", "loss", "length", "bm25"),
    *("predicted_alignment, tokens", "norm_low", "iterative"),
)


@dataclass(frozen=True)
class Arm:
    """A method or reference on one draw of a set; the share is 1 for references."""

    name: str
    share: float
    seed: int

    @classmethod
    def all_of(cls, text: str, seeds: Sequence[int]) -> list[Arm]:
        """Parse `name`, `name@0.3`, `name#1` or `name@0.3#1`; by default every share and seed."""
        rest, _, seed = text.partition("#")
        name, _, share = rest.partition("@")
        if name.removesuffix(UNPAID) not in WISHES and name not in REFERENCES:
            raise SystemExit(f"Unknown arm {name!r}. Choose from {', '.join([*WISHES, *REFERENCES])}.")
        shares = (1.0,) if name in REFERENCES else (float(share),) if share else SHARES
        return [cls(name, s, i) for s in shares for i in ((int(seed),) if seed else seeds)]


@dataclass(frozen=True)
class Draw:
    """A pool to choose from, and a target to choose for, with the greatest number of tokens of an example."""

    name: str
    pool: list[setup.Example]
    target: list[setup.Example]
    longest: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--sets", nargs="+", choices=list(LENGTHS), default=["gsm8k", "pubmedqa"])
    parser.add_argument("--arms", nargs="+", default=[*REFERENCES, *DEFAULT], metavar="ARM[@Q][#SEED]")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--pool", type=int, default=POOL, help="examples to choose from")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the whole pool: the budget")
    parser.add_argument("--out", type=Path, default=setup.RESULTS / "selection.jsonl")
    parser.add_argument("--print", action="store_true", dest="prints", help="run nothing")


def main(options: argparse.Namespace) -> None:
    """Run the missing parts, and print a table for every set."""
    if options.quick:
        options.out = setup.CACHE / "quick" / "selection.jsonl"
        options.out.unlink(missing_ok=True)
    records = setup.Records(options.out)
    found = list(records.known.values())
    if not options.prints:
        contest = Contest(options.data, options.pool, options.steps, options.quick)
        arms = list(dict.fromkeys(arm for text in options.arms for arm in Arm.all_of(text, options.seeds)))
        arms.sort(key=lambda arm: (arm.seed, -arm.share))
        runs = [(name, arm) for arm in arms for name in options.sets]
        found = [records.get(contest.key(name, arm), functools.partial(contest.run, name, arm)) for name, arm in runs]
        print(
            f"A pool of {options.pool}, a budget of {options.steps} x {BATCH} of its examples, {setup.device_name()}"
        )
    for name in options.sets:
        print(f"\n{name}\n")
        report([record for record in found if record["set"] == name])


class Contest:
    """The data, the placement and the budget, with each draw's scores by every method."""

    def __init__(self, data: Path, pool: int = POOL, steps: int = STEPS, quick: bool = False):
        # the placement is by 64 examples of GSM8K, for both sets
        sizes: dict[str, Any] = {"data": "gsm8k", "length": 100}
        if quick:
            sizes = {"data": "numbers", "model": "tiny", "length": 16, "rank": 4, "measured": 4}
        self.ground = Ground(Study("selection", **sizes), data, setup.CACHE / "measured")
        self.folder = data
        self.pool = pool
        self.steps = steps

    @functools.cached_property
    def placement(self) -> Any:
        """The same for all arms and sets."""
        return self.ground.plan(keep=KEEP, ranks="equal_parameters")

    @functools.cached_property
    def model(self) -> Any:
        """Without adapters, to measure on."""
        return self.ground.model()

    @property
    def rate(self) -> float:
        """The learning rate."""
        return LEARNING_RATE * float(self.placement.learning_rate_scale or 1.0)

    @functools.cached_property
    def per_token(self) -> float:
        """FLOPs of training on one token, as `Selection.report` counts them."""
        costs = self.ground.costs
        cost = costs.cost(dict.fromkeys(self.placement.lora, self.placement.rank or self.ground.study.rank))
        share = cost.backward / costs.floor().backward
        return float(2 * parameters_per_token(self.ground.shell)[0] * (1 + share) + cost.adapters + cost.optimizer)

    @functools.cache  # noqa: B019  one contest lives as long as the process
    def examples(self, name: str, split: setup.Split, longest: int) -> list[setup.Example]:
        """Examples of a set of at most this many tokens, in its order."""
        found = setup.read_examples(name, self.folder, split)
        if name == "pubmedqa":  # the long answer alone
            found = [one | {"completion": one["completion"].rpartition("\nAnswer:")[0]} for one in found]
        return [one for one, row in zip(found, self.rows(found), strict=True) if len(row["input_ids"]) <= longest]

    def draw(self, name: str, seed: int, longest: int | None = None) -> Draw:
        """Draw a pool of training examples, and a target outside of it."""
        longest = longest or LENGTHS[name]
        found = list(self.examples(name, "train", longest))
        if len(found) < self.pool + TARGET:
            raise SystemExit(f"{name} has {len(found)} examples of at most {longest} tokens. Ask for a smaller pool.")
        random.Random(seed).shuffle(found)
        return Draw(name, found[: self.pool], found[self.pool : self.pool + TARGET], longest)

    @functools.cache  # noqa: B019
    def held_out(self, name: str) -> list[Any]:
        """Batches of test examples, the same for all arms and seeds."""
        found = list(self.examples(name, "test", LENGTHS[name]))
        random.Random(1).shuffle(found)
        return make_batches(self.rows(found[:HELD_OUT]), BATCH, self.ground.pad)

    def rows(self, examples: Sequence[setup.Example]) -> list[Row]:
        """Encode examples, all of which have a target."""
        return encode(examples, self.ground.tokenizer, setup.LONGEST)

    def key(self, name: str, arm: Arm) -> str:
        """Return a digest of all that bears on an arm's result."""
        own = [WISHES.get(arm.name), self.steps, BATCH, WARM_UP, HELD_OUT, self.rate]
        return f"{name} {arm.name}@{arm.share}#{arm.seed} {digest([*own, self._digest(self.draw(name, arm.seed))])}"

    def run(self, name: str, arm: Arm) -> dict[str, Any]:
        """Choose and train; return the loss, what of the budget choosing took, and how many steps were left."""
        whole = self.rows(self.draw(name, arm.seed).pool)
        budget = setup.tokens_of(setup.random_batches(whole, BATCH, arm.seed, self.steps))
        chosen, cost, seconds = whole, 0.0, 0.0
        if arm.name not in REFERENCES:
            method = arm.name.removesuffix(UNPAID)
            scored = self.scores(self.draw(name, arm.seed), method, arm.seed, arm.share)
            chosen = [whole[i] for i in best_of(scored["scores"], arm.share)]
            if method == arm.name:
                cost, seconds = scored["flops"] / self.per_token, scored["seconds"]
        steps = {"untrained": 0, "one_pass": -(-len(whole) // BATCH)}.get(arm.name)
        batches = setup.random_batches(chosen, BATCH, arm.seed, steps, budget - cost)
        known = {
            "set": name,
            "arm": arm.name,
            "q": arm.share,
            "seed": arm.seed,
            "chosen": len(chosen),
            "mean_targets": statistics.mean(sum(label >= 0 for label in row["labels"]) for row in chosen),
            "selection": cost / budget,
            "spent": (cost + setup.tokens_of(batches)) / budget,
            "steps": len(batches),
            "passes": len(batches) * BATCH / len(chosen),
            "budget_flops": budget * self.per_token,
            "selection_seconds": seconds,
            "loss": None,
        }
        if batches or arm.name == "untrained":
            known["loss"] = self.train(batches, self.held_out(name), arm.seed)
        return known

    def train(self, batches: Sequence[Sequence[Row]], test: Sequence[Any], seed: int) -> float:
        """Train the placement on these batches; return the held-out loss."""
        model = self.ground.adapted(self.placement, seed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
        for step, rows in enumerate(batches, start=1):
            for group in optimizer.param_groups:
                group["lr"] = self.rate * setup.linear_schedule(step, len(batches), WARM_UP)
            setup.train_step(model, optimizer, setup.on_device(rows, self.ground.pad))
        return held_out_loss(model, test, progress=False)

    def scores(self, draw: Draw, name: str, seed: int, share: float) -> dict[str, Any]:
        """Score all of a pool, the higher the sooner chosen, with FLOPs and seconds; kept between runs.

        Both shares are cut from the same scores, except for "iterative", whose rounds depend on how many are chosen. None
        of these pools holds near-duplicates, which are therefore not looked for.
        """
        base, wish, wanted = wish_of(name, share)
        path = self.path(draw, name, seed, share)

        def make() -> dict[str, Any]:
            needs_model = wish["method"] == "iterative" or METHODS[wish["method"]].uses_model
            found = select_examples(
                self.model if needs_model else None,
                draw.pool,
                fraction=wanted,
                tokenizer=self.ground.tokenizer,
                target=draw.target,
                placement=self.placement if wish["method"] not in ("random", "length", "bm25") else None,
                deduplicate=False,
                batch_size=BATCH,
                max_length=2 * draw.longest,  # swapped answers may be longer than their own
                seed=seed,
                progress=False,
                **wish,
            )
            values = dict(zip(found.indices, found.scores, strict=True))
            if found.all_scores is not None:
                values = dict(enumerate(found.all_scores.tolist()))
            cost = found.report["cost"]
            scores = [values[i] for i in range(len(draw.pool))]
            return {"scores": scores, "flops": cost["flops"], "seconds": cost["seconds"]}

        known = setup.kept(path, make)
        return known | {"scores": [-s for s in known["scores"]]} if base != name else known

    def path(self, draw: Draw, name: str, seed: int, share: float) -> Path:
        """Return where scores are kept."""
        base, wish, wanted = wish_of(name, share)
        return SCORES / f"{draw.name}-{seed}-{base}-{digest([wish, wanted, seed, self._digest(draw)])}.json"

    def _digest(self, draw: Draw) -> str:
        return digest([self.placement.lora, self.placement.rank, draw.longest, draw.pool, draw.target])


def wish_of(name: str, share: float) -> tuple[str, dict[str, Any], float]:
    """Return the method that measures the same, what it asks of select_examples, and how much it asks for."""
    base = OPPOSITE.get(name, name)
    wish = {"method": base, **WISHES[base]}
    return base, wish, share if wish["method"] == "iterative" else 1.0


def best_of(scores: Sequence[float], share: float) -> list[int]:
    """Return the positions of the highest scores, as many as the share, in order; ties go to the earlier."""
    count = max(1, int(share * len(scores) + 1e-9))
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def report(records: Sequence[Mapping[str, Any]]) -> None:
    """Print one set's table."""
    found: dict[tuple[str, float], dict[int, Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault((record["arm"], record["q"]), {})[record["seed"]] = record
    losses = {
        arm: {seed: run["loss"] for seed, run in runs.items() if run["loss"] is not None}
        for arm, runs in found.items()
    }

    def minus(arm: tuple[str, float], other: tuple[str, float]) -> str:
        theirs = losses.get(other, {}) if arm != other else {}
        return setup.mean_and_error([x - theirs[seed] for seed, x in losses[arm].items() if seed in theirs], sign="+")

    rows = []
    for (method, q), runs in sorted(found.items(), key=lambda item: -item[0][1]):
        own = list(losses[method, q].values())
        shown = setup.mean_and_error(own) if own else "selection exceeds the budget"
        differences = minus((method, q), ("random", q)), minus((method, q), ("everything", 1.0))
        mean = {of: statistics.mean(run[of] for run in runs.values()) for of in ("selection", "steps", "passes")}
        spent = f"{mean['selection']:.0%}", f"{mean['steps']:.0f}", f"{mean['passes']:.1f}"
        rows.append([method, f"{q:g}", len(runs), shown, *differences, *spent])
    columns = ["method", "q", "seeds", "loss", "minus random", "minus everything", "selection's share", "steps"]
    setup.print_table([*columns, "passes"], rows)
