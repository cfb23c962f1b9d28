"""Does it matter where adapters go when the signal is a reward? GRPO on sums, by a small model trained here.

    python -m benchmarks rewards [--seeds 10] [--arms ARM ...] [--print]

A Llama of 0.6 M parameters, one character a token, learns sums of two numbers below 100 until it gets about a third right,
once. Then TRL's GRPOTrainer trains adapters of 5 % of the model's parameters on problems that pretraining did not have; a
reward of 1 is for the right answer. Every arm has the same number of parameters. The measured arms read 32 groups of the
model's own answers, 8 each: `generate_blueprint(loss_fn=…)` of the policy's loss, or the consistency of the gradient's
sign over groups (the score of arXiv:2605.12207, there for single weights of B, here the mean over a submodule's weights).
"equal" is the same cover of depth and kinds with equal weights and measures nothing; "V, O and down" is what that paper
finds chosen. Problems are fresh for every seed and the same for all arms of a seed; seed 0 chooses the learning rates
and is not reported. The result is the share of 500 held-out problems that greedy decoding gets right.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from peft_blueprint import Blueprint, generate_blueprint, plan_placement

from . import setup
from .study.inference import Effect


SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
CHARACTERS = "0123456789+=."  # "." ends an answer
LENGTH = 10  # characters of "12+34=46." and padding
BASE_STEPS, BASE_BATCH, BASE_RATE = 1600, 256, 1e-3
PROMPTS, GENERATIONS, STEPS = 16, 8, 40
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
GROUPS = 32
COUNT = 12  # adapters of a placement, of 42 submodules
SHARE = 0.05  # of the model's parameters
TESTS = 500
PROBLEMS = [(a, b) for a in range(100) for b in range(100)]
ARMS = (
    *("all-linear", "equal", "policy cover", "SFT cover", "policy top", "sign consistency", "V, O and down"),
    *("random", "last layers"),
)
QUICK = {"seeds": 1, "arms": ["all-linear", "equal", "SFT cover"]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--seeds", type=int, default=10, help="that are reported")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=setup.RESULTS / "rewards.jsonl")
    parser.add_argument("--print", action="store_true", dest="prints", help="run nothing")


def main(options: argparse.Namespace) -> None:
    """Run the missing parts, and print the table."""
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)  # TRL's own use of it
    if options.quick:
        options.out = setup.CACHE / "quick" / "rewards.jsonl"
        options.out.unlink(missing_ok=True)
    records, rates = setup.Records(options.out), RATES[:1] if options.quick else RATES
    if not options.prints:
        trial = Trial(options.quick)
        for seed in range(options.seeds + 1):
            for arm in options.arms:
                for rate in rates if seed == 0 else [best_rate(records, arm)]:
                    records.get(f"{arm}|{seed}|{rate:g}", functools.partial(trial.run, arm, seed, rate))
    report(records, options.arms)


class Trial:
    """The model, trained on sums once, and its further training."""

    def __init__(self, quick: bool):
        self.steps, self.base_steps = (2, 2) if quick else (STEPS, BASE_STEPS)
        self.folder = setup.CACHE / ("quick" if quick else ".") / "rewards"
        self.tokenizer = make_tokenizer()
        shuffled = setup.shuffled(PROBLEMS, seed=0)
        self.seen, self.fresh = shuffled[:6000], shuffled[6000:]
        if not (self.folder / "model.safetensors").exists():
            self._pretrain()

    def load(self) -> LlamaForCausalLM:
        """Load a fresh copy of the model."""
        return LlamaForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def run(self, arm: str, seed: int, rate: float) -> dict[str, Any]:
        """Train an arm, and return what it got right before and after."""
        problems = setup.shuffled(self.fresh, seed + 1)
        tests, training = problems[:TESTS], problems[TESTS:]
        ranks, measuring = self.ranks(arm, seed, training)
        model = self.load()
        before = self.right(model, tests)
        torch.manual_seed(seed)
        config = LoraConfig(
            target_modules=list(ranks),
            r=1,
            lora_alpha=1,
            rank_pattern=ranks,
            alpha_pattern=ranks,
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(model, config)
        rows = Dataset.from_list([{"prompt": question(*one), "answer": answer(*one)} for one in training])
        settings = GRPOConfig(
            str(self.folder / "run"),
            learning_rate=rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=4,
            max_steps=self.steps,
            per_device_train_batch_size=PROMPTS * GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=4,
            beta=0.0,
            seed=seed,
            report_to="none",
            save_strategy="no",
            logging_steps=self.steps,
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
        )
        start = time.process_time()
        trainer = GRPOTrainer(adapted, reward, settings, train_dataset=rows, processing_class=self.tokenizer)
        trainer.train()
        return {
            "arm": arm,
            "seed": seed,
            "rate": rate,
            "before": before,
            "right": self.right(adapted, tests),
            "parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
            "adapters": len(ranks),
            "layers": sorted(f"{name.split('.')[2]}.{name.split('.')[-1]}" for name in ranks),
            "training_cpu_s": time.process_time() - start,
            "measuring_cpu_s": measuring,
        }

    def ranks(self, arm: str, seed: int, training: Sequence[tuple[int, int]]) -> tuple[dict[str, int], float]:
        """Return an arm's ranks by submodule, and the CPU seconds of measuring."""
        model = self.load()
        shapes = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
        start = time.process_time()
        policy = (
            self.groups(model, training[:GROUPS]) if arm in ("policy cover", "policy top", "sign consistency") else []
        )
        blueprint = None
        if arm in ("policy cover", "policy top"):
            blueprint = generate_blueprint(
                model, policy, loss_fn=policy_loss, max_examples=GROUPS * GENERATIONS, progress=False
            )
        elif arm == "SFT cover":
            rows = [self.encode([one]) for one in training[: GROUPS * GENERATIONS]]
            blueprint = generate_blueprint(model, rows, max_examples=len(rows), progress=False)
        elif arm == "equal":  # weights do not matter, so any batch will do
            measured = generate_blueprint(model, [self.encode(training[:8])], max_examples=8, progress=False)
            blueprint = replace(measured, submodules=tuple(replace(entry, adam_gain=1.0) for entry in measured))
        if blueprint is not None and arm != "policy top":
            chosen = list(plan_placement(blueprint, num_modules=COUNT, rank_by="cover_gain").lora)
        elif arm == "all-linear":
            chosen = list(shapes)
        else:
            chosen = self.top(arm, seed, model, list(shapes), blueprint, policy)
        spent = time.process_time() - start if arm != "equal" and (blueprint is not None or policy) else 0.0
        budget = SHARE * sum(parameter.numel() for parameter in model.parameters())
        per_rank = sum(shapes[name].in_features + shapes[name].out_features for name in chosen)
        return dict.fromkeys(chosen, max(1, round(budget / per_rank))), spent

    def top(
        self,
        arm: str,
        seed: int,
        model: nn.Module,
        names: list[str],
        blueprint: Blueprint | None,
        policy: Sequence[Mapping[str, Tensor]],
    ) -> list[str]:
        """Return the COUNT submodules that an arm without cover prefers."""
        if arm == "random":
            return random.Random(seed).sample(names, COUNT)
        if arm == "last layers":
            return names[-COUNT:]
        if arm == "V, O and down":
            return [name for name in names if name.endswith(("v_proj", "o_proj", "down_proj"))]
        if blueprint is not None:
            return [entry.name for entry in sorted(blueprint, key=lambda e: -e.gradient_norm)[:COUNT]]
        consistent = sign_consistency(model, policy, names)
        return sorted(names, key=lambda name: -consistent[name])[:COUNT]

    def encode(self, problems: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Return a batch of questions with their right answers; questions are not targets."""
        texts = [question(*one) + answer(*one) + "." for one in problems]
        rows = [self.tokenizer(text)["input_ids"] for text in texts]
        width = max(len(row) for row in rows)
        ids = torch.tensor([row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        labels = ids.clone()
        for i, (one, row) in enumerate(zip(problems, rows, strict=True)):
            labels[i, : len(question(*one))] = -100
            labels[i, len(row) :] = -100
        return {
            "input_ids": ids,
            "attention_mask": (labels != -100).long() | (ids != self.tokenizer.pad_token_id),
            "labels": labels,
        }

    @torch.no_grad()
    def answers(self, model: Any, problems: Sequence[tuple[int, int]], **sampling: Any) -> list[str]:
        """Return the model's answers; questions of equal length go together."""
        model.eval()
        found: dict[int, str] = {}
        lengths = {len(question(*one)) for one in problems}
        for length in lengths:
            places = [i for i, one in enumerate(problems) if len(question(*one)) == length]
            ids = torch.tensor([self.tokenizer(question(*problems[i]))["input_ids"] for i in places])
            new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **sampling)
            texts = self.tokenizer.batch_decode(new[:, length:], skip_special_tokens=True)
            found |= dict(zip(places, (text.replace(" ", "") for text in texts), strict=True))
        return [found[i] for i in range(len(problems))]

    def right(self, model: Any, problems: Sequence[tuple[int, int]]) -> float:
        """Return the share of problems that greedy decoding gets right."""
        given = self.answers(model, problems, do_sample=False)
        return statistics.fmean(text == answer(*one) for text, one in zip(given, problems, strict=True))

    def groups(self, model: Any, problems: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Return a batch for each problem: GENERATIONS sampled answers, and `advantages` (GENERATIONS,) as GRPO has them."""
        torch.manual_seed(0)
        batches = []
        for one in problems:
            ids = torch.tensor([self.tokenizer(question(*one))["input_ids"]] * GENERATIONS)
            new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=True)
            ends = (new == self.tokenizer.eos_token_id).cumsum(1).cumsum(1) <= 1  # up to the first end
            labels = torch.where(ends, new, -100)
            labels[:, : ids.shape[1]] = -100
            texts = self.tokenizer.batch_decode(new[:, ids.shape[1] :], skip_special_tokens=True)
            rewards = torch.tensor([float(text.replace(" ", "") == answer(*one)) for text in texts])
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            batches.append(
                {"input_ids": new, "attention_mask": ends.long(), "labels": labels, "advantages": advantages}
            )
        return batches

    def _pretrain(self) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(self.tokenizer),
            max_position_embeddings=32,
            bos_token_id=None,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            **SHAPE,
        )
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE)
        draw = random.Random(0)
        for step in range(self.base_steps):
            loss = model(**self.encode(draw.choices(self.seen, k=BASE_BATCH))).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 20 == 19:
                share = self.right(model, self.fresh[:TESTS])
                print(step + 1, f"{loss.item():.3f} {share:.3f}", flush=True)
                if share > 1 / 3:
                    break
        model.save_pretrained(self.folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one character a token."""
    vocabulary = {character: i for i, character in enumerate(["_", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="_", eos_token=".", padding_side="left")


def question(a: int, b: int) -> str:
    """Return the text of a problem."""
    return f"{a}+{b}="


def answer(a: int, b: int) -> str:
    """Return the right answer."""
    return str(a + b)


def reward(completions: Sequence[str], answer: Sequence[str], **others: Any) -> list[float]:
    """Return 1 for a right answer, 0 for a wrong one."""
    return [float(text.replace(" ", "").rstrip(".") == right) for text, right in zip(completions, answer, strict=True)]


def policy_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return GRPO's loss of each answer at the policy that gave it: −advantage · mean log-probability, (B,)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return batch["advantages"] * losses.sum(1) / (labels != -100).sum(1).clamp(min=1)


def sign_consistency(
    model: nn.Module, groups: Sequence[Mapping[str, Tensor]], names: Sequence[str]
) -> dict[str, float]:
    """Return each submodule's mean over weights of |mean over groups of the gradient's sign|; groups without signal are left out."""
    weights = [model.get_submodule(name).weight for name in names]
    signs, count = [torch.zeros_like(weight) for weight in weights], 0
    for group in groups:
        if group["advantages"].any():
            gradients = torch.autograd.grad(policy_loss(model, group).mean(), weights)
            signs = [total + gradient.sign() for total, gradient in zip(signs, gradients, strict=True)]
            count += 1
    return {name: float((total / count).abs().mean()) for name, total in zip(names, signs, strict=True)}


def best_rate(records: setup.Records, arm: str) -> float:
    """Return the learning rate of an arm's best result with seed 0."""
    known = [r for r in records.known.values() if (r["arm"], r["seed"]) == (arm, 0)]
    return float(max(known, key=lambda r: r["right"])["rate"])


def report(records: setup.Records, arms: Sequence[str]) -> None:
    """Print each arm's result and its difference from all-linear and from the equal cover, paired by seed."""
    found = {arm: {r["seed"]: r for r in records.known.values() if r["arm"] == arm and r["seed"]} for arm in arms}
    rows = []
    for arm in arms:
        if not (mine := found[arm]):
            continue
        row = [
            arm,
            len(mine),
            f"{best_rate(records, arm):g}",
            f"{statistics.fmean(r['right'] for r in mine.values()):.3f}",
        ]
        for other in ("all-linear", "equal"):
            apart = [
                mine[seed]["right"] - found[other][seed]["right"] for seed in mine if seed in found.get(other, {})
            ]
            if arm == other or len(apart) < 2:
                row.append("–")
                continue
            effect = Effect(statistics.fmean(apart), statistics.stdev(apart) / len(apart) ** 0.5, len(apart))
            low, high = effect.interval()
            row.append(f"{effect.mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        rows.append([*row, f"{statistics.fmean(r['measuring_cpu_s'] for r in mine.values()):.1f}"])
    setup.print_table(
        ["arm", "seeds", "rate", "right", "against all-linear", "against equal cover", "measuring, CPU s"], rows
    )
