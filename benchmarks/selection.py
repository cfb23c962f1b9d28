"""Does choosing examples pay? Held-out loss of SmolLM2-135M on GSM8K and PubMedQA after the same total FLOPs.

    python -m benchmarks selection --data FOLDER [--sets SET ...] [--arms ARM[@Q][#SEED] ...] [--seeds 0 1 2] [--print]

FOLDER holds `gsm8k_{train,test}.jsonl`, `pubmedqa_ori_pqal.json` and `pubmedqa_test_ground_truth.json`. Of a pool of 60
examples each method keeps a share q, and a placement is trained on those, again and again, until the budget is
spent: what 15 steps of 8 examples of the whole pool cost, padding included. Choosing is paid out of it, by
`Selection.report`'s FLOPs; a training token costs 2P forward, 2P backward times the share of the backward pass that the
placement needs by `CostModel`, and its adapters and their optimizer. With P the parameters that a token is multiplied with,
so that both are counted alike. References, which choose nothing: "everything", the whole pool for the whole budget;
"one_pass", the whole pool once, for less; "untrained". "METHOD, unpaid" is not charged for choosing. One learning rate for
all, a third of benchmark_placement.py's for the placement, since small shares are seen many times over, with a linear fall
over the arm's own steps; seeds vary the pool's and the target's draw, order and adapters.
Results go to --out as they come and are not computed again; scores are kept in .cache/benchmark_selection/, so that what
arms share is measured once, and charged to each. --print prints the table of what is there.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peft_blueprint.data import METHODS, Row, collate, encode, make_batches, pad_token_of, select_examples
from peft_blueprint.measure import empty_model, load_model, parameters_per_token
from peft_blueprint.place import CostModel, Structure
from peft_blueprint.train import held_out_loss
from recipes import smollm2

from .measure import device_name
from .placement import BASE_LEARNING_RATE, BATCH, RANK, WARM_UP, Bench, one_step


CACHE = Path(".cache/benchmark_selection")
PLACEMENT = "keep 0.85"
LENGTHS = {"gsm8k": 90, "pubmedqa": 60}  # tokens of an example at most: short, so that many arms fit in hours
POOL, TARGET, HELD_OUT, STEPS = 60, 12, 36, 15
SHARES, SEEDS = (0.3, 0.1), (0, 1, 2)
LEARNING_RATE = BASE_LEARNING_RATE / 3
REFERENCES = ("everything", "one_pass", "untrained")
UNPAID = ", unpaid"

# what an arm asks of select_examples, beyond its defaults
WISHES: dict[str, dict[str, Any]] = {
    "random": {},
    "norm": {},
    "norm_low": {},
    "alignment": {},
    "predicted_norm": {},
    "predicted_norm, tokens": {"method": "predicted_norm", "features": "tokens", "small": 24},
    "predicted_alignment": {},
    "predicted_alignment, tokens": {"method": "predicted_alignment", "features": "tokens", "small": 24},
    "alignment, adam": {"method": "alignment", "precondition": "adam"},
    "coreset_facility": {},
    "coreset_k_centre": {},
    "loss": {},
    "loss_low": {},
    "length": {},
    "length_short": {},
    "bm25": {},
    # with a forward pass over all in each round, or more measured, it would be over the budget
    "iterative": {"features": "tokens", "small": 16, "train_steps": 3},
}
OPPOSITE = {"norm_low": "norm", "loss_low": "loss", "length_short": "length"}
DEFAULT = [
    *("random", "norm", "alignment", "predicted_norm, tokens", "coreset_facility", "loss", "length", "bm25"),
    *("predicted_alignment, tokens", "norm_low", "iterative"),
]

Example = dict[str, str]


@dataclass(frozen=True)
class Arm:
    """A method or reference on one draw of a set; q is 1 for references."""

    name: str
    share: float
    seed: int

    @classmethod
    def all_of(cls, text: str, seeds: Sequence[int]) -> list[Arm]:
        """From `name`, `name@0.3`, `name#1` or `name@0.3#1`; what is not said is every share, and all seeds."""
        rest, _, seed = text.partition("#")
        name, _, share = rest.partition("@")
        if name.removesuffix(UNPAID) not in WISHES and name not in REFERENCES:
            raise SystemExit(f"There is no arm {name!r}; choose from {', '.join([*WISHES, *REFERENCES])}.")
        shares = (1.0,) if name in REFERENCES else (float(share),) if share else SHARES
        return [cls(name, s, i) for s in shares for i in ((int(seed),) if seed else seeds)]


@dataclass(frozen=True)
class Draw:
    """A pool to choose from, and a target to choose for, with the greatest number of tokens of an example."""

    name: str
    pool: list[Example]
    target: list[Example]
    longest: int


def main() -> None:
    """Parse, run what is missing, and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with GSM8K and PubMedQA")
    parser.add_argument("--sets", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--arms", nargs="+", default=[*REFERENCES, *DEFAULT], metavar="ARM[@Q][#SEED]")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--pool", type=int, default=POOL, help="examples to choose from")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the whole pool: the budget")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/selection.jsonl"))
    parser.add_argument("--print", action="store_true", dest="prints", help="run nothing")
    options = parser.parse_args()

    contest = Contest(options.data, options.pool, options.steps)
    known = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    arms = list(dict.fromkeys(arm for text in options.arms for arm in Arm.all_of(text, options.seeds)))
    arms.sort(key=lambda arm: (arm.seed, arm.share < max(SHARES), -arm.share))
    groups: dict[tuple[int, bool], list[Arm]] = {}
    for arm in arms:
        groups.setdefault((arm.seed, arm.share < max(SHARES)), []).append(arm)
    todo = [(name, arm) for group in groups.values() for name in options.sets for arm in group]
    records = []
    for i, (name, arm) in enumerate(todo, start=1):
        key = contest.key(name, arm)
        record = next((r for r in known if r["key"] == key), None)
        if record is None and not options.prints:
            start = time.perf_counter()
            record = {"key": key, "set": name, "arm": arm.name, "q": arm.share, "seed": arm.seed}
            record |= contest.run(name, arm)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{i} of {len(todo)}, {time.perf_counter() - start:.0f} s: {record}", file=sys.stderr, flush=True)
        records += [] if record is None else [record]
    print(f"A pool of {options.pool}, a budget of {options.steps} x {BATCH} of its examples, float32, {device_name()}")
    for name in options.sets:
        report(name, [r for r in records if r["set"] == name])


class Contest:
    """The data, the placement and the budget, with each draw's scores by every method."""

    def __init__(self, data: Path, pool: int = POOL, steps: int = STEPS):
        self.bench = Bench(data)
        self.pool = pool
        self.steps = steps

    @functools.cached_property
    def placement(self) -> Any:
        """The same for all arms and both sets."""
        return self.bench.placement(PLACEMENT)

    @functools.cached_property
    def model(self) -> Any:
        """Without adapters, to measure on."""
        return load_model(str(smollm2.prepare()), "float32")[0]

    @functools.cached_property
    def per_token(self) -> float:
        """FLOPs of training on one token, in the convention of `scoring.Cost`."""
        empty = empty_model(str(smollm2.FOLDER))
        model = CostModel(Structure.of(empty), self.bench.workload(PLACEMENT))
        cost = model.cost(dict.fromkeys(self.placement.lora, self.placement.rank or RANK))
        share = cost.backward / model.floor().backward
        return 2 * parameters_per_token(empty)[0] * (1 + share) + cost.adapters + cost.optimizer

    @functools.cache  # noqa: B019  one contest lives as long as the process
    def examples(self, name: str, split: str, longest: int) -> list[Example]:
        """Of a set, in its order, those of at most so many tokens."""
        if name == "gsm8k":
            lines = (self.bench.data / f"gsm8k_{split}.jsonl").read_text().splitlines()
            found = [{"prompt": f"{row['question']}\n", "completion": row["answer"]} for row in map(json.loads, lines)]
        else:
            rows = json.loads((self.bench.data / "pubmedqa_ori_pqal.json").read_text())
            test = json.loads((self.bench.data / "pubmedqa_test_ground_truth.json").read_text())
            found = [
                {"prompt": f"{row['QUESTION']}\n", "completion": row["LONG_ANSWER"]}
                for i, row in rows.items()
                if (i in test) == (split == "test")
            ]
        rows = encode(found, self.bench.tokenizer, 4096)  # every example has a target: none is left out
        return [one for one, row in zip(found, rows, strict=True) if len(row["input_ids"]) <= longest]

    def draw(self, name: str, seed: int, longest: int | None = None) -> Draw:
        """Training examples: a pool, and a target outside of it."""
        longest = longest or LENGTHS[name]
        found = list(self.examples(name, "train", longest))
        if len(found) < self.pool + TARGET:
            raise SystemExit(f"{name} has {len(found)} examples of at most {longest} tokens: ask for a smaller pool.")
        random.Random(seed).shuffle(found)
        return Draw(name, found[: self.pool], found[self.pool : self.pool + TARGET], longest)

    @functools.cache  # noqa: B019
    def held_out(self, name: str) -> list[Any]:
        """Test examples, the same for all arms and seeds."""
        found = list(self.examples(name, "test", LENGTHS[name]))
        random.Random(1).shuffle(found)
        return make_batches(self.rows(found[:HELD_OUT]), BATCH, pad_token_of(self.bench.tokenizer))

    def rows(self, examples: Sequence[Example]) -> list[Row]:
        """As token ids."""
        return encode(examples, self.bench.tokenizer, 4096)

    def key(self, name: str, arm: Arm) -> str:
        """Of all that bears on an arm's result."""
        draw = self.draw(name, arm.seed)
        rate = LEARNING_RATE * self.placement.learning_rate_scale
        matters = [arm.name, arm.share, arm.seed, WISHES.get(arm.name), self.steps, BATCH, WARM_UP, HELD_OUT, rate]
        return f"{name} {arm.name}@{arm.share}#{arm.seed} {digest([*matters, self._digest(draw)])}"

    def run(self, name: str, arm: Arm) -> dict[str, Any]:
        """Choose and train: an arm's loss, what of the budget choosing took, and how many steps were left."""
        draw = self.draw(name, arm.seed)
        whole = self.rows(draw.pool)
        budget = tokens_of(batches_of(whole, arm.seed, steps=self.steps))
        chosen, cost, seconds = whole, 0.0, 0.0
        if arm.name not in REFERENCES:
            method = arm.name.removesuffix(UNPAID)
            scored = self.scores(draw, method, arm.seed, arm.share)
            chosen = [whole[i] for i in best_of(scored["scores"], arm.share)]
            cost, seconds = (scored["flops"] / self.per_token, scored["seconds"]) if method == arm.name else (0.0, 0.0)
        steps = {"untrained": 0, "one_pass": -(-len(whole) // BATCH)}.get(arm.name)
        batches = batches_of(chosen, arm.seed, steps=steps, tokens=budget - cost)
        known = {
            "chosen": len(chosen),
            "mean_targets": statistics.mean(sum(label >= 0 for label in row["labels"]) for row in chosen),
            "selection": cost / budget,
            "spent": (cost + tokens_of(batches)) / budget,
            "steps": len(batches),
            "passes": len(batches) * BATCH / len(chosen),
            "budget_flops": budget * self.per_token,
            "selection_seconds": seconds,
        }
        if not batches and arm.name != "untrained":
            return known | {"loss": None}
        return known | self.train(batches, self.held_out(name), arm.seed)

    def train(self, batches: Sequence[Sequence[Row]], test: Sequence[Any], seed: int) -> dict[str, Any]:
        """Train the placement on these batches; the loss on held-out examples."""
        model = self.bench.adapted(PLACEMENT, seed)
        rate = LEARNING_RATE * self.placement.learning_rate_scale
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        steps, start = len(batches), time.perf_counter()
        for step, rows in enumerate(batches, start=1):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(step / WARM_UP, (steps - step + 1) / max(1, steps - WARM_UP + 1))
            one_step(model, optimizer, collate(rows, pad_token_of(self.bench.tokenizer)))
        seconds = time.perf_counter() - start
        return {"loss": held_out_loss(model, test, progress=False), "training_seconds": seconds}

    def scores(self, draw: Draw, name: str, seed: int, share: float) -> dict[str, Any]:
        """Scores of all of a pool, the higher the sooner chosen, with their FLOPs and seconds; kept between runs.

        Both shares are cut from the same scores, but for "iterative", whose rounds depend on how many are chosen. None of
        these pools holds near-duplicates, which are therefore not looked for.
        """
        base, wish, wanted = wish_of(name, share)
        path = self.path(draw, name, seed, share)
        if not path.exists():
            found = select_examples(
                self.model if wish["method"] == "iterative" or METHODS[wish["method"]].uses_model else None,
                draw.pool,
                fraction=wanted,
                tokenizer=self.bench.tokenizer,
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
            record = {
                "scores": [values[i] for i in range(len(draw.pool))],
                "flops": cost["flops"],
                "seconds": cost["seconds"],
                "share_of_measuring_all": cost["share_of_measuring_all"],
                "predictor": found.report.get("predictor"),
                "fallbacks": list(found.fallbacks),
            }
            said = {"share": cost["share_of_measuring_all"], "predictor": record["predictor"]}
            print(f"{name}: {cost['seconds']:.1f} s, {said}", file=sys.stderr, flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(".part")
            beside.write_text(json.dumps(record))
            beside.replace(path)
        known = json.loads(path.read_text())
        return known | {"scores": [-s for s in known["scores"]]} if base != name else known

    def path(self, draw: Draw, name: str, seed: int, share: float) -> Path:
        """Where scores are kept."""
        base, wish, wanted = wish_of(name, share)
        return CACHE / f"{draw.name}-{seed}-{base}-{digest([wish, wanted, seed, self._digest(draw)])}.json"

    def _digest(self, draw: Draw) -> str:
        placed = [self.placement.lora, self.placement.rank, draw.longest]
        return digest([placed, draw.pool, draw.target])


def wish_of(name: str, share: float) -> tuple[str, dict[str, Any], float]:
    """Of a method the one that measures the same, what it asks of select_examples, and how much it asks for."""
    base = OPPOSITE.get(name, name)
    wish = {"method": base, **WISHES[base]}
    return base, wish, share if wish["method"] == "iterative" else 1.0


def best_of(scores: Sequence[float], share: float) -> list[int]:
    """Positions of the highest, as many as the share; in order, ties to the earlier."""
    count = max(1, int(share * len(scores) + 1e-9))
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def batches_of(
    rows: Sequence[Row], seed: int, *, steps: int | None = None, tokens: float = float("inf")
) -> list[list[Row]]:
    """Batches over the rows in random order, again and again, for so many steps or padded tokens at most."""
    generator = random.Random(seed)
    batches: list[list[Row]] = []
    order: list[Row] = []
    spent = 0
    while steps is None or len(batches) < steps:
        while len(order) < BATCH:
            order += generator.sample(list(rows), len(rows))
        spent += tokens_of([order[:BATCH]])
        if spent > tokens:
            break
        batches.append(order[:BATCH])
        order = order[BATCH:]
    return batches


def tokens_of(batches: Sequence[Sequence[Row]]) -> int:
    """Positions, padding included."""
    return sum(len(rows) * max(len(row["input_ids"]) for row in rows) for rows in batches)


def digest(value: Any) -> str:
    """Short, of what JSON can say."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def shown(values: Sequence[float], form: str = ".4f", sign: str = "") -> str:
    """Mean ± standard error."""
    if not values:
        return "–"
    mean = format(statistics.mean(values), f"{sign}{form}")
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:{form}}" if len(values) > 1 else mean


def report(name: str, records: Sequence[Mapping[str, Any]]) -> None:
    """One set's table."""
    found: dict[tuple[str, float], dict[int, Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault((record["arm"], record["q"]), {})[record["seed"]] = record
    print(f"\n{name}\n")
    print("| method | q | seeds | loss | less random's | less everything's | selection's share | steps | passes |")
    print("|---" * 9 + "|")
    for (method, q), runs in sorted(found.items(), key=lambda item: -item[0][1]):
        losses = {seed: run["loss"] for seed, run in runs.items() if run["loss"] is not None}

        def less(other: tuple[str, float], losses: Mapping[int, float] = losses) -> str:
            theirs = {seed: run["loss"] for seed, run in found.get(other, {}).items() if run["loss"] is not None}
            return shown([losses[seed] - theirs[seed] for seed in losses if seed in theirs], sign="+")

        is_random = method == "random"
        mean = {of: statistics.mean(run[of] for run in runs.values()) for of in ("selection", "steps", "passes")}
        print(
            f"| {method} | {q:g} | {len(runs)} | {shown(list(losses.values())) if losses else 'selection exceeds the budget'} | "
            f"{'–' if is_random else less(('random', q))} | {'–' if method == 'everything' else less(('everything', 1.0))} | "
            f"{mean['selection']:.0%} | {mean['steps']:.0f} | {mean['passes']:.1f} |"
        )


if __name__ == "__main__":
    main()
