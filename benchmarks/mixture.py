"""Where can choosing data win? A pool ten times the budget, of five domains, a fifth of the answers wrong.

    python -m benchmarks mixture --data FOLDER [--seeds 0 1 2 3 4] [--arms ARM ...] [--print | --tokens]

The models are small and trained from scratch here, once, on other examples of the same domains: a large one of 1.3 M
parameters and a small one of 0.1 M. The domains are sums, sorted letters and look-ups (synthetic), and continued text of
PubMedQA's abstracts and of GSM8K's questions (real). Sorted letters and PubMedQA are the targets, and rare before: 3 % each
of what the models were trained on. For each seed a pool, 32 examples of each target and held-out examples are drawn anew,
all right but the pool's. Each arm keeps 100 of 1000 examples, and the large model is trained on these for three passes.
Scorers are the large model itself, its first layer ("cut") and the small model. References: "random"; "clean", random
among the right ones; "clean domain", random among the right ones of the target's domain. These two read labels that a user
does not have. All arms of a seed share data, order and rate, so that differences are paired; the rate is the better of
3e-4 and 1e-3 for random on a seed of its own.
Results are appended to --out and not computed again. --tokens trains nothing: it measures the gradient of each target
token of 60 examples alone, and prints how well cheap scores rank them.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from peft_blueprint import measure_influence
from peft_blueprint.compare import spearman
from peft_blueprint.data import (
    HEAD_SCALARS,
    alignment_scores,
    first_layers,
    head_features,
    make_target,
    select_examples,
)
from peft_blueprint.measure import IGNORED, Influence, Row, make_batches

from . import setup


LARGE: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
}
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
DOMAINS = ("sums", "sorting", "look-up", "pubmedqa", "gsm8k")
TARGETS = ("sorting", "pubmedqa")  # domains to choose for
BASE_SHARES = (0.31, 0.03, 0.31, 0.03, 0.32)  # of the domains before
SPLITS = ("base", "pool", "held_out")  # disjoint
POOL, CHOSEN, TARGET = 1000, 100, 32
HELD_OUT, OTHERS = 128, 32  # of each target domain, and of each other one
WRONG = 0.2
PASSES, BATCH, RATE, WARM_UP = 3, 16, 3e-4, 3
BASE_STEPS, BASE_BATCH, BASE_RATE = 500, 32, 2e-3
KEPT_LAYERS = 1
TOKEN_EXAMPLES = 60
PROMPT, COMPLETION = 24, 40  # characters of real text
BY_SCORE = ("predicted_norm", "norm", "norm, small", "norm, cut", "loss", "loss_low")
FOR_TARGET = ("alignment", "alignment, small", "alignment, cut", "bm25", "clean domain")
FOR_ALL = ("random", "clean", *BY_SCORE)
QUICK = {"seeds": [0], "arms": ["random", "norm, cut", "bm25"], "pool": 60, "steps": 2}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--arms", nargs="+", choices=[*FOR_ALL, *FOR_TARGET], default=[*FOR_ALL, *FOR_TARGET])
    parser.add_argument("--pool", type=int, default=POOL, help="examples to choose from; a tenth is kept")
    parser.add_argument("--steps", type=int, default=BASE_STEPS, help="that the models are trained before")
    parser.add_argument("--rate", type=float, default=RATE, help="of training on the chosen examples")
    parser.add_argument("--out", type=Path, default=setup.RESULTS / "mixture.jsonl")
    parser.add_argument("--print", action="store_true", dest="prints", help="run nothing")
    parser.add_argument("--tokens", action="store_true", help="rank single tokens instead")


def main(options: argparse.Namespace) -> None:
    """Run the missing parts, and print the tables."""
    if options.quick:
        options.out = setup.CACHE / "quick" / "mixture.jsonl"
        options.out.unlink(missing_ok=True)
    if options.tokens:
        rank_tokens(Contest(options), options.seeds)
        return
    records = setup.Records(options.out)
    if not options.prints:
        contest = Contest(options)
        for seed in options.seeds:
            draw = contest.draw(seed)
            for name in ("untrained", *options.arms):
                for target in TARGETS if name in FOR_TARGET else ("",):
                    key = f"{name}|{target}|{seed}|{options.pool}|{options.steps}|{options.rate:g}"
                    records.get(key, functools.partial(contest.run, draw, name, target))
    found = [r for r in records.known.values() if r["pool"] == options.pool and r["rate"] == options.rate]
    for target in TARGETS:
        report(found, target)


@dataclass(frozen=True)
class Example:
    """One example: its domain, whether its completion is right, and its text."""

    domain: str
    is_right: bool
    prompt: str
    completion: str

    @functools.cached_property
    def row(self) -> Row:
        """One token a character; the completion and a line's end are targets."""
        prompt, rest = ([ord(c) % 128 for c in text] for text in (self.prompt, f"{self.completion}\n"))
        return {"input_ids": prompt + rest, "labels": [IGNORED] * len(prompt) + rest}


@dataclass(frozen=True)
class Draw:
    """Data of one seed."""

    seed: int
    pool: list[Example]
    targets: dict[str, list[Example]]
    held_out: dict[str, list[Example]]


class Texts:
    """Draw examples of each domain from disjoint splits."""

    def __init__(self, folder: Path, quick: bool):
        self._passages = {"pubmedqa": _pubmedqa(folder, quick), "gsm8k": _gsm8k(folder, quick)}

    def draw(self, domain: str, split: str, generator: random.Random) -> Example:
        """Draw one right example."""
        if domain in self._passages:
            passages = self._passages[domain]
            text = passages[generator.randrange(len(passages) // 3) * 3 + SPLITS.index(split)]
            start = generator.randrange(max(1, len(text) - PROMPT - COMPLETION))
            return Example(domain, True, text[start : start + PROMPT], text[start + PROMPT :][:COMPLETION])
        while True:
            prompt, completion = _SYNTHETIC[domain](generator)
            if sum(map(ord, prompt)) % 3 == SPLITS.index(split):  # splits share no prompt
                return Example(domain, True, prompt, completion)


class Contest:
    """The models, and all that one arm needs."""

    def __init__(self, options: argparse.Namespace):
        self.pool, self.steps, self.rate, self.quick = options.pool, options.steps, options.rate, options.quick
        self.texts = Texts(options.data, options.quick)
        self.large, self.small = self._pretrained("large", LARGE), self._pretrained("small", SMALL)
        self.start = {key: value.clone() for key, value in self.large.state_dict().items()}
        self._measured: dict[tuple[int, str], tuple[Influence, dict[str, np.ndarray], float]] = {}

    def draw(self, seed: int) -> Draw:
        """Draw pool, targets and held-out examples."""
        generator = random.Random(f"draw {seed}")
        pool = [self.texts.draw(DOMAINS[i % len(DOMAINS)], "pool", generator) for i in range(self.pool)]
        generator.shuffle(pool)
        for domain in DOMAINS:
            places = [i for i, one in enumerate(pool) if one.domain == domain]
            wrong = generator.sample(places, max(2, round(WRONG * len(places))))
            answers = [pool[i].completion for i in wrong]
            for i, answer in zip(wrong, answers[1:] + answers[:1], strict=True):
                is_right = pool[i].completion == answer
                pool[i] = Example(domain, is_right, pool[i].prompt, answer)
        targets = {name: [self.texts.draw(name, "held_out", generator) for _ in range(TARGET)] for name in TARGETS}
        sizes = {name: HELD_OUT if name in TARGETS else OTHERS for name in DOMAINS}
        held_out = {
            name: [self.texts.draw(name, "held_out", generator) for _ in range(n)] for name, n in sizes.items()
        }
        return Draw(seed, pool, targets, held_out)

    def run(self, draw: Draw, name: str, target: str) -> dict[str, Any]:
        """Choose, train and evaluate one arm."""
        known: dict[str, Any] = {
            "arm": name,
            "target": target,
            "seed": draw.seed,
            "pool": self.pool,
            "rate": self.rate,
        }
        before = time.process_time()
        chosen, score_seconds = ([], 0.0) if name == "untrained" else self.choose(draw, name, target)
        between = time.process_time()
        if chosen:
            examples = [draw.pool[i] for i in chosen]
            known["right"] = statistics.mean(one.is_right for one in examples)
            known["domains"] = {d: statistics.mean(one.domain == d for one in examples) for d in DOMAINS}
            self.train([one.row for one in examples], draw.seed)
        after = time.process_time()
        known |= {"score_seconds": score_seconds or between - before, "train_seconds": after - between}
        for domain, held_out in draw.held_out.items():
            loss, accuracy = evaluate(self.large, [one.row for one in held_out])
            known[f"loss {domain}"], known[f"accuracy {domain}"] = loss, accuracy
        self.large.load_state_dict(self.start)
        return known

    def choose(self, draw: Draw, name: str, target: str) -> tuple[list[int], float]:
        """Return positions in the pool, and the CPU seconds of a scoring that several arms share."""
        count = max(4, round(self.pool * CHOSEN / POOL))
        generator = random.Random(f"choose {draw.seed}")
        everything = range(len(draw.pool))
        base, _, scorer = name.partition(", ")
        if base in ("random", "clean", "clean domain"):
            allowed = [
                i
                for i in everything
                if (draw.pool[i].is_right or not base.startswith("clean"))
                and (draw.pool[i].domain == target or not base.endswith("domain"))
            ]
            return generator.sample(allowed, min(len(allowed), count)), 0.0
        if base in ("predicted_norm", "bm25"):
            rows = [one.row for one in draw.pool]
            found = select_examples(
                self.large if base == "predicted_norm" else None,
                rows,
                count=count,
                method=base,
                small=min(128, len(rows) - 1),
                target=[one.row for one in draw.targets[target]] if base == "bm25" else None,
                batch_size=32,
                deduplicate=False,
                seed=draw.seed,
                progress=False,
            )
            return list(found.indices), 0.0
        influence, aligned, seconds = self.measure(draw, scorer or "large")
        scores = {
            "norm": lambda: influence.example_norms.numpy(),
            "loss": lambda: influence.losses.numpy(),
            "loss_low": lambda: -influence.losses.numpy(),
            "alignment": lambda: aligned[target],
        }[base]()
        return np.argsort(-scores, kind="stable")[:count].tolist(), seconds

    def measure(self, draw: Draw, scorer: str) -> tuple[Influence, dict[str, np.ndarray], float]:
        """Measure the pool once for all arms of a scorer: norms and losses, and alignments with each target."""
        key = (draw.seed, scorer)
        if key not in self._measured:
            self._measured = {k: v for k, v in self._measured.items() if k[0] == draw.seed}
            before = time.process_time()
            model = self.small if scorer == "small" else self.large
            with first_layers(model, KEPT_LAYERS if scorer == "cut" else model.config.num_hidden_layers):
                pool = measured(model, draw.pool)
                aligned = {
                    name: alignment_scores(pool, make_target(measured(model, examples)))
                    for name, examples in draw.targets.items()
                }
            self._measured[key] = pool, aligned, time.process_time() - before
        return self._measured[key]

    def train(self, rows: Sequence[Row], seed: int) -> None:
        """Train all weights of the large model."""
        steps = max(1, len(rows) * PASSES // BATCH)
        batches = setup.random_batches(rows, BATCH, seed, steps)
        optimizer = torch.optim.AdamW(self.large.parameters(), weight_decay=0.0)
        for step, part in enumerate(batches, start=1):
            for group in optimizer.param_groups:
                group["lr"] = self.rate * setup.linear_schedule(step, steps, WARM_UP)
            setup.train_step(self.large, optimizer, setup.on_device(part, 0))

    def _pretrained(self, name: str, sizes: dict[str, Any]) -> LlamaForCausalLM:
        """Train a model from scratch on right examples of the split "base", or read it."""
        torch.manual_seed(0)
        heads = {"num_key_value_heads": sizes["num_attention_heads"], "tie_word_embeddings": True}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=128, **heads, **sizes)).eval()
        path = setup.CACHE / ("quick" if self.quick else "mixture") / f"{name}-{self.steps}.pt"
        if path.exists():
            model.load_state_dict(torch.load(path))
            return model
        generator = random.Random(f"base {name}")
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        for step in range(1, self.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = BASE_RATE * setup.linear_schedule(step, self.steps, 50)
            rows = [
                self.texts.draw(domain, "base", generator).row
                for domain in generator.choices(DOMAINS, BASE_SHARES, k=BASE_BATCH)
            ]
            loss = setup.train_step(model, optimizer, setup.on_device(rows, 0))
            if step % 100 == 0:
                setup.say(f"{name}: step {step} of {self.steps}, loss {loss:.3f}")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
        return model


def measured(model: torch.nn.Module, examples: Sequence[Example]) -> Influence:
    """Measure examples in batches of similar length, and give them back in their own order."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].row["input_ids"]))
    batches = make_batches([examples[i].row for i in order], 32, 0)
    found = measure_influence(model, batches, seed=0, progress=False)
    back = torch.tensor(np.argsort(order))
    arrays = {name: getattr(found, name)[..., back] for name in ("norms", "norm_errors", "losses", "target_tokens")}
    return Influence(**{**vars(found), **arrays, "projections": found.projections[:, back]})


def evaluate(model: LlamaForCausalLM, rows: Sequence[Row]) -> tuple[float, float]:
    """Return the loss a target token, and the share of examples whose every target is the likeliest token."""
    loss, targets, exact = 0.0, 0, 0
    for batch in make_batches(rows, 64, 0):
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        loss += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"))
        targets += int((labels != IGNORED).sum())
        exact += int(((logits.argmax(-1) == labels) | (labels == IGNORED)).all(dim=1).sum())
    return loss / targets, exact / len(rows)


def rank_tokens(contest: Contest, seeds: Sequence[int]) -> None:
    """Print rank correlations of cheap scores of tokens with their exact gradient norms, over seeds."""
    found: dict[str, list[tuple[float, float]]] = {}
    names = {"loss": "loss", "norm in the head's weight": "log head gradient", "entropy": "entropy"}
    for seed in seeds:
        rows = [one.row for one in contest.draw(seed).pool[:TOKEN_EXAMPLES]]
        places = [(i, p) for i, row in enumerate(rows) for p, label in enumerate(row["labels"]) if label != IGNORED]
        alone = []
        for i, p in places:
            ids = rows[i]["input_ids"][: p + 1]
            alone.append({"input_ids": ids, "labels": [IGNORED] * p + ids[p:]})
        batches = make_batches(alone, 32, 0)
        norms = measure_influence(contest.large, batches, projection_size=0, progress=False).example_norms.numpy()
        [features], _ = head_features(contest.large, make_batches(rows, len(rows), 0), size=0)
        scores = {name: features[:, :, HEAD_SCALARS.index(key)] for name, key in names.items()}
        by_layers = {}
        with first_layers(contest.large, KEPT_LAYERS):
            by_layers["norm, by the first layer alone"] = measure_influence(
                contest.large, batches, projection_size=0, progress=False
            ).example_norms.numpy()
        by_layers |= {name: np.array([values[place] for place in places]) for name, values in scores.items()}
        half = len(norms) // 2
        highest = set(np.argsort(-norms)[:half].tolist())
        for name, values in by_layers.items():
            shared = len(highest & set(np.argsort(-values)[:half].tolist())) / half
            found.setdefault(name, []).append((float(spearman(values, norms)), shared))
    setup.print_table(
        ["score of a token", "rank correlation with its gradient norm", "of the half of largest norm, kept"],
        [
            [
                name,
                setup.mean_and_error([a for a, _ in both], ".3f"),
                setup.mean_and_error([b for _, b in both], ".3f"),
            ]
            for name, both in found.items()
        ],
    )


def report(records: Sequence[dict[str, Any]], target: str) -> None:
    """Print one target's table: losses less random's, paired by seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        if record["target"] in ("", target):
            found.setdefault(record["arm"], {})[record["seed"]] = record
    random_arm = found.get("random", {})
    print(f"\nTarget: {target}\n")
    columns = ["arm", "seeds", "right answers", "of the target's domain", "loss less random's"]
    setup.print_table(
        [*columns, "mean loss of all domains less random's", "scoring, CPU s"],
        (
            _line(name, found[name], random_arm, target)
            for name in ("untrained", *FOR_ALL, *FOR_TARGET)
            if name in found
        ),
    )
    losses = [one[f"loss {target}"] for one in random_arm.values()]
    print(f"\nrandom: {setup.mean_and_error(losses)}, {len(losses)} seeds, mean ± standard error")


def _line(name: str, arm: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]], target: str) -> list[str]:
    seeds = sorted(arm.keys() & other.keys())

    def less_random(read: Callable[[dict[str, Any]], float]) -> str:
        return setup.mean_and_error([read(arm[seed]) - read(other[seed]) for seed in seeds], ".3f", "+")

    def mean(read: Callable[[dict[str, Any]], float]) -> str:
        return f"{statistics.mean(read(record) for record in arm.values()):.0%}"

    is_trained = name != "untrained"
    return [
        name,
        str(len(arm)),
        mean(lambda one: one["right"]) if is_trained else "–",
        mean(lambda one: one["domains"][target]) if is_trained else "–",
        less_random(lambda one: one[f"loss {target}"]),
        less_random(lambda one: statistics.mean(one[f"loss {domain}"] for domain in DOMAINS)),
        f"{statistics.mean(one['score_seconds'] for one in arm.values()):.1f}" if is_trained else "–",
    ]


def _sum(generator: random.Random) -> tuple[str, str]:
    first, second = generator.randrange(1000), generator.randrange(100)
    return f"add {first} {second}=", str(first + second)


def _sorted(generator: random.Random) -> tuple[str, str]:
    letters = generator.choices(string.ascii_lowercase, k=generator.randrange(4, 8))
    return f"sort {''.join(letters)}=", "".join(sorted(letters))


def _look_up(generator: random.Random) -> tuple[str, str]:
    keys = generator.sample(string.ascii_lowercase, 6)
    values = [str(generator.randrange(10, 100)) for _ in keys]
    place = generator.randrange(6)
    return f"{' '.join(map(''.join, zip(keys, values, strict=True)))} ?{keys[place]}=", values[place]


_SYNTHETIC = {"sums": _sum, "sorting": _sorted, "look-up": _look_up}


def _pubmedqa(folder: Path, quick: bool) -> list[str]:
    if quick:
        return [one["prompt"] * 4 for one in setup.read_examples("numbers", folder, "train")]
    rows = json.loads((folder / "pubmedqa_ori_pqal.json").read_text())
    return [" ".join(row["CONTEXTS"]) for row in rows.values()]


def _gsm8k(folder: Path, quick: bool) -> list[str]:
    name = "numbers" if quick else "gsm8k"
    return [one["prompt"] * (4 if quick else 1) for one in setup.read_examples(name, folder, "train")]
