"""Which experts should a new task train? A mixture of experts, pretrained here from nothing, is tuned on new text.

    python -m benchmarks routing --data FOLDER [--seeds 10] [--pretrain-only | --print]

The mixture (Qwen3-MoE's shape: 4 layers of 16 experts, 2 of them a token, 7.0 M parameters) reads GSM8K's questions,
PubMedQA's abstracts and docstrings of Python's standard library until it routes by kind of text. Then it is tuned on text
that it has never seen: GSM8K's worked answers ("answers") or Python functions ("code"). Each arm trains the same number of
experts in every layer and nothing else, chosen by ESFT's two scores (arXiv:2407.01906: share of tokens, mean gate weight),
by a measured gradient or gain, or at random. "all by LoRA" has as many parameters, spread over all experts; "all" trains every
expert whole and has four times as many; "least gain" is the opposite of "gain". Training and test
text is fresh for every seed and the same for all arms of a seed. The learning rate of each arm is chosen on seed 0, which
is not reported. Forgetting is the rise of the loss on held-out text of the three kinds of pretraining.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

from peft_blueprint import generate_blueprint
from peft_blueprint.place import choose_experts
from peft_blueprint.train import unfreeze_experts

from . import setup
from .study.inference import relative_difference


BASE = ("questions", "abstracts", "docstrings")
NEW = ("answers", "code")
LENGTH, BATCH = 128, 16
VOCABULARY = 4096
PRETRAINING = {"steps": 2400, "learning_rate": 2e-3}
SHAPE: dict[str, Any] = {
    "hidden_size": 160,
    "moe_intermediate_size": 192,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
}
STEPS, RATES = 20, (1e-3, 3e-3, 1e-2, 3e-2)
MEASURED, TESTS, OTHERS = 64, 128, 64  # blocks
CHOSEN = 4  # experts of a layer
RANK = 26  # of LoRA on all experts, with as many parameters as a quarter of the experts has
SCORES: dict[str, Any] = {
    "token share": "token_share",
    "gate weight": "gate_weight",
    "gradient norm": "gradient_norm",
    "gain": "adam_gain",
}
ARMS = ("all", "all by LoRA", *SCORES, "random", "least gain")
QUICK = {"seeds": 1, "arms": ["gate weight", "random"], "pretraining_steps": 2}
HELD_OUT = 8  # one text in this many
END = "<end>"
SKIPPED = {"test", "tests", "idlelib", "site-packages", "lib2to3", "__pycache__", "pydoc_data", "turtledemo"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--seeds", type=int, default=10, help="that are reported")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=setup.RESULTS / "routing.jsonl")
    parser.add_argument("--print", action="store_true", dest="prints", help="run nothing")
    parser.add_argument("--pretrain-only", action="store_true", help="stop when the mixture is there")
    parser.add_argument("--pretraining-steps", type=int, default=PRETRAINING["steps"])


def main(options: argparse.Namespace) -> None:
    """Pretrain where the mixture is missing, run the missing parts, and print the tables."""
    if options.quick:
        options.out = setup.CACHE / "quick" / "routing.jsonl"
        options.out.unlink(missing_ok=True)
    records, rates = setup.Records(options.out), RATES[:1] if options.quick else RATES
    if not options.prints:
        base, kinds = pretrained(options), NEW[:1] if options.quick else NEW
        for seed, kind, arm in () if options.pretrain_only else product(range(options.seeds + 1), kinds, options.arms):
            for rate in rates if seed == 0 else [best_rate(records, arm, kind)]:
                records.get(key(arm, kind, seed, rate), partial(run, base, arm, kind, seed, rate, options.quick))
    report(records, options.arms)


# ---- text


def read_texts(folder: Path) -> dict[str, list[str]]:
    """Return texts by kind.

    Raises:
        SystemExit: for a missing file.
    """
    paths = [folder / "gsm8k_train.jsonl", folder / "pubmedqa_ori_pqal.json"]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise SystemExit(f"{' and '.join(missing)} not found. Give the folder that holds them as --data.")
    maths = [json.loads(line) for line in paths[0].read_text().splitlines()]
    medicine = json.loads(paths[1].read_text()).values()
    docstrings, functions = python_texts()
    return {
        "questions": [row["question"] for row in maths],
        "abstracts": ["\n".join(row["CONTEXTS"]) for row in medicine],
        "docstrings": docstrings,
        "answers": [row["answer"] for row in maths],
        "code": functions,
    }


def made_up() -> dict[str, list[str]]:
    """Return numbers instead of text, which need no files."""
    draw = random.Random(0)
    return {
        kind: [" ".join(str(draw.randrange(1000)) for _ in range(99)) for _ in range(48)] for kind in (*BASE, *NEW)
    }


def python_texts() -> tuple[list[str], list[str]]:
    """Return docstrings and functions without docstrings, of the standard library's source."""
    docstrings, functions = {}, {}
    library = Path(os.__file__).parent
    for path in sorted(library.rglob("*.py")):
        if SKIPPED & set(path.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if text := ast.get_docstring(node):
                docstrings[text] = None
                node.body = node.body[1:] or [ast.Pass()]
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1:
                functions[ast.unparse(node)] = None
    return list(docstrings), list(functions)


def is_held_out(text: str) -> bool:
    """Whether a text is never trained on; the same on every machine."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % HELD_OUT == 0


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Join texts with an end token and cut them into full blocks, (blocks, LENGTH)."""
    end = tokenizer.eos_token_id
    ids = [token for text in tokenizer(list(texts))["input_ids"] for token in (*text, end)]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH], dtype=torch.long).view(-1, LENGTH)


# ---- pretraining


@dataclass(frozen=True)
class Base:
    """The mixture's folder, and blocks of tokens by kind, to train on and held out."""

    folder: Path
    train: dict[str, Tensor]
    held_out: dict[str, Tensor]

    def load(self) -> Qwen3MoeForCausalLM:
        """Load a fresh copy of the mixture."""
        return Qwen3MoeForCausalLM.from_pretrained(self.folder, dtype=torch.float32)


def pretrained(options: argparse.Namespace) -> Base:
    """Return the mixture, trained on the first call; a killed training resumes."""
    folder = setup.CACHE / ("quick" if options.quick else ".") / "routing"
    texts = made_up() if options.quick else read_texts(options.data)
    parts = {
        kind: ([t for t in of if not is_held_out(t)], [t for t in of if is_held_out(t)]) for kind, of in texts.items()
    }
    if not (folder / "tokenizer.json").exists():
        train_tokenizer([text for kind in BASE for text in parts[kind][0]]).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    train, held_out = ({kind: pack(of[i], tokenizer) for kind, of in parts.items()} for i in range(2))
    print({kind: (len(train[kind]), len(held_out[kind])) for kind in train}, flush=True)
    if not (folder / "model.safetensors").exists():
        pretrain(folder, train, held_out, options.pretraining_steps)
    return Base(folder, train, held_out)


def pretrain(folder: Path, train: dict[str, Tensor], held_out: dict[str, Tensor], steps: int) -> None:
    """Train the mixture on equal shares of the three kinds, each as often as it takes."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        norm_topk_prob=True,
        output_router_logits=True,  # adds the loss that balances experts
        router_aux_loss_coef=0.001,
        **SHAPE,
    )
    config._experts_implementation = "grouped_mm"
    model = Qwen3MoeForCausalLM(config)
    draw = torch.Generator().manual_seed(0)
    longest = max(len(train[kind]) for kind in BASE)
    rows = [
        {"input_ids": train[kind][i % len(train[kind])], "labels": train[kind][i % len(train[kind])]}
        for i in torch.randperm(longest, generator=draw).tolist()
        for kind in BASE
    ]
    last = folder / "run"
    settings = TrainingArguments(
        str(last),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=PRETRAINING["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=min(100, steps // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=max(1, steps // 24),
        save_steps=max(1, steps // 8),
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    evaluation = {kind: [{"input_ids": x, "labels": x} for x in held_out[kind][:32]] for kind in BASE}
    trainer = Trainer(model, settings, train_dataset=rows, eval_dataset=evaluation)  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=any(last.glob("checkpoint-*")))
    print(trainer.evaluate(), flush=True)
    trainer.save_model(str(folder))


# ---- tuning


def run(base: Base, arm: str, kind: str, seed: int, rate: float, quick: bool) -> dict[str, Any]:
    """Tune the experts that an arm chooses, and return losses before and after."""
    torch.manual_seed(seed)
    steps, tests, others = (2, 4, 4) if quick else (STEPS, TESTS, OTHERS)
    train = draw(base.train[kind], BATCH * steps, seed)
    held_out = {other: draw(base.held_out[other], tests if other == kind else others, seed) for other in (kind, *BASE)}
    model: Any = base.load()
    before = {name: loss_of(model, blocks) for name, blocks in held_out.items()}
    start = time.process_time()
    chosen = choose(model, train[:MEASURED], arm, seed)
    measuring = time.process_time() - start
    if arm == "all by LoRA":
        names = [f"mlp.experts.{weight}" for weight in ("gate_up_proj", "down_proj")]
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[], target_parameters=names)
        model = get_peft_model(model, config)
    else:
        unfreeze_experts(model, chosen)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    model.train()
    start = time.process_time()
    for step, batch in enumerate(train.split(BATCH)):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 3)
        model(input_ids=batch, labels=batch, output_router_logits=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    training = time.process_time() - start
    return {
        "arm": arm,
        "kind": kind,
        "seed": seed,
        "rate": rate,
        "before": before,
        "after": {name: loss_of(model, blocks) for name, blocks in held_out.items()},
        "chosen": list(chosen.values()),
        "trained": sum(parameter.numel() for parameter in trained),
        "optimizer_bytes": sum(x.nbytes for state in optimizer.state.values() for x in state.values()),
        "training_cpu_s": training,
        "measuring_cpu_s": measuring,
    }


def draw(blocks: Tensor, count: int, seed: int) -> Tensor:
    """Draw blocks without repetition."""
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:count]]


@torch.no_grad()
def loss_of(model: Qwen3MoeForCausalLM, blocks: Tensor) -> float:
    """Return the mean loss of blocks of equal length."""
    model.eval()
    batches = blocks.split(BATCH)
    losses = [model(input_ids=x, labels=x, output_router_logits=False).loss.item() * len(x) for x in batches]
    return sum(losses) / len(blocks)


def choose(model: Qwen3MoeForCausalLM, blocks: Tensor, arm: str, seed: int) -> dict[str, list[int]]:
    """Return the numbers of the experts that an arm trains, by the name of the module that holds them."""
    experts = range(SHAPE["num_experts"])
    holders = [f"model.layers.{layer}.mlp.experts" for layer in range(SHAPE["num_hidden_layers"])]
    if arm.startswith("all"):
        return dict.fromkeys(holders, list(experts))
    if arm == "random":
        return {holder: sorted(random.Random(f"{seed} {holder}").sample(experts, CHOSEN)) for holder in holders}
    batches = [{"input_ids": x, "labels": x} for x in blocks.split(BATCH)]
    blueprint = generate_blueprint(model, batches, experts=True, max_examples=len(blocks), progress=False)
    if arm == "least gain":
        ranked = choose_experts(blueprint, len(experts), by="adam_gain")
        return {holder: sorted(numbers[-CHOSEN:]) for holder, numbers in ranked.items()}
    chosen = choose_experts(blueprint, CHOSEN, by=SCORES[arm])
    return {holder: sorted(numbers) for holder, numbers in chosen.items()}


# ---- report


def key(arm: str, kind: str, seed: int, rate: float) -> str:
    """Return a record's key."""
    return f"{arm}|{kind}|{seed}|{rate:g}"


def best_rate(records: setup.Records, arm: str, kind: str) -> float:
    """Return the learning rate of an arm's lowest loss with seed 0."""
    known = [r for r in records.known.values() if (r["arm"], r["kind"], r["seed"]) == (arm, kind, 0)]
    return float(min(known, key=lambda r: r["after"][kind])["rate"])


def report(records: setup.Records, arms: Sequence[str]) -> None:
    """Print losses, differences from ESFT's gate score paired by seed, and forgetting, for each new kind of text."""
    others = ("gate weight", "random")
    columns = [
        "arm",
        "seeds",
        "rate",
        "trained",
        "optimizer",
        "step, CPU s",
        "loss",
        *(f"against {o}" for o in others),
    ]
    for kind in NEW:
        of_kind = [r for r in records.known.values() if r["kind"] == kind and r["seed"]]
        at_best = [r for r in of_kind if r["rate"] == best_rate(records, r["arm"], kind)]
        found = {arm: {r["seed"]: r for r in at_best if r["arm"] == arm} for arm in arms}
        rows = []
        for arm, mine in found.items():
            if not mine:
                continue
            forgotten = [statistics.fmean(r["after"][b] - r["before"][b] for b in BASE) for r in mine.values()]
            rows.append(
                [
                    arm,
                    len(mine),
                    f"{best_rate(records, arm, kind):g}",
                    f"{next(iter(mine.values()))['trained'] / 1e6:.2f} M",
                    f"{next(iter(mine.values()))['optimizer_bytes'] / 1e6:.1f} MB",
                    f"{statistics.median(r['training_cpu_s'] / STEPS for r in mine.values()):.2f}",
                    f"{statistics.fmean(r['after'][kind] for r in mine.values()):.4f}",
                    *(apart(mine, found.get(other, {}), kind) for other in others),
                    setup.mean_and_error(forgotten, ".3f", "+"),
                ]
            )
        untuned = statistics.fmean(r["before"][kind] for r in of_kind) if of_kind else 0.0
        print(f"\n{kind}: {untuned:.4f} before tuning\n")
        setup.print_table([*columns, "forgetting"], rows)


def apart(mine: Mapping[int, Any], others: Mapping[int, Any], kind: str) -> str:
    """Format the relative difference of two arms' losses with its 95 % interval."""
    seeds = sorted(mine.keys() & others.keys())
    if mine is others:
        return "–"
    return relative_difference(*([arm[seed]["after"][kind] for seed in seeds] for arm in (mine, others)))
