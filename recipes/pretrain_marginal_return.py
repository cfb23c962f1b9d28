"""Pretrain a small language model until it no longer pays, and publish the blueprints of its training.

    python recipes/pretrain_marginal_return.py [--data FOLDER] [--output pretrained] [--repo org/name [--endpoint URL]]

This is the paper's Stage 1 in small. A Llama of 5 million parameters and its tokenizer are trained from nothing on
`gsm8k_train.jsonl` and `pubmedqa_ori_pqal.json` in FOLDER, or on the docstrings of Python's standard library. Every
twentieth of the planned steps it is evaluated; the run is halted when the loss improves too little for the time that is
spent, checkpoints included (ΔΨ/ΔΓ, paper §3). Blueprints of validation data are measured at the same steps. Those
nearest to 50, 80 and 100 % of the steps done are published beside the model with --repo, and lie in OUTPUT without.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

import stdlib_docs
from peft_blueprint import BlueprintError, LedgerCallback, MarginalReturn
from peft_blueprint.blueprint import file_name
from peft_blueprint.compare import checkpoint_movement
from peft_blueprint.publish import publish, update_card
from peft_blueprint.runs import RESOURCES, make_report
from peft_blueprint.train import BlueprintCallback, keep_stdout_clean


EVALUATIONS = 20  # in the planned steps
HELD_OUT = 20  # one text in this many
END = "<end>"

Row = dict[str, list[int]]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Pretrain, measure and publish; return the report that is printed and written to `report.json`."""
    options = parse(arguments)
    texts = read_texts(options.data)
    training = {name: [text for text in of_one if not is_held_out(text)] for name, of_one in texts.items()}
    held_out = {name: [text for text in of_one if is_held_out(text)] for name, of_one in texts.items()}
    tokenizer = train_tokenizer(list(chain.from_iterable(training.values())), options.vocabulary)
    blocks = pack(chain.from_iterable(training.values()), tokenizer, options.length)
    validation = {
        name: pack(of_one, tokenizer, options.length)[: options.validation] for name, of_one in held_out.items()
    }
    if not blocks or not all(validation.values()):
        raise SystemExit(
            f"The texts do not fill a block of {options.length} tokens. Give more text or a smaller --length."
        )
    torch.manual_seed(options.seed)
    model = make_model(tokenizer, options)

    every = max(1, options.steps // EVALUATIONS)
    settings = TrainingArguments(
        str(options.output / "run"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=every,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=every,
        eval_strategy="steps",
        eval_steps=every,
        save_steps=2 * every,
        save_total_limit=1,
        seed=options.seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    together = list(chain.from_iterable(validation.values()))
    trainer = Trainer(
        model,
        settings,
        train_dataset=blocks,
        eval_dataset=together,
        data_collator=collate,  # type: ignore[arg-type]
    )
    keep_stdout_clean(trainer)
    rule = MarginalReturn(worth=options.worth, stop_in_decay=options.stop_in_decay)
    ledger = LedgerCallback(trainer, stop=rule, resource=options.resource, name=options.output.name)
    model_id = options.repo or options.output.name
    measuring = BlueprintCallback(
        trainer, eval_dataset=validation, max_examples=options.examples, model_id=model_id, projection_size=0
    )
    trainer.add_callback(ledger)
    trainer.add_callback(measuring)
    trainer.train()

    folder = options.output / "model"
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(folder)
    record = ledger.log.record()
    record.save(folder)
    report = make_report([record])
    update_card(folder, report, report.rows[0])
    blueprints = measuring.checkpoints()
    for blueprint in blueprints:
        blueprint.save(folder / file_name(checkpoint=blueprint.training_checkpoint))
    published = []
    if options.repo:
        api = HfApi(endpoint=options.endpoint)
        api.create_repo(options.repo, exist_ok=True)
        api.upload_folder(
            repo_id=options.repo, folder_path=folder, ignore_patterns=["blueprint*", "training_args.bin"]
        )
        for blueprint in blueprints:
            share = blueprint.training_checkpoint
            published.append(publish(blueprint, options.repo, checkpoint=share, endpoint=options.endpoint))
    print(ledger.summary(), file=sys.stderr)
    if len(blueprints) > 1:
        print(checkpoint_movement(blueprints), file=sys.stderr)

    first, last = record.points[0], record.points[-1]
    found = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_tokens": len(blocks) * options.length,
        "steps": trainer.state.global_step,
        "planned_steps": options.steps,
        "loss": {"first": first.metrics["eval_loss"], "last": last.metrics["eval_loss"]},
        "last_window_ratio": report.rows[0].ratio,
        "reason": ledger.log.decision.reason if ledger.log.decision else None,
        "totals": {name: quantity.to_dict() for name, quantity in record.totals.items()},
        "seconds_of_which": record.about["seconds_of_which"],
        "optimizer_gb_hours": record.about.get("optimizer_gb_hours"),
        "blueprints": [
            {
                "training_checkpoint": one.training_checkpoint,
                "step": one.provenance["step"],
                "gamma_fit": one.concentration.get("gamma_fit"),
                "gini": one.concentration["tail"]["gini"]["value"],
                "k_star": one.costs.get("k_star"),
            }
            for one in blueprints
        ],
        "published": published,
        "output": str(folder),
    }
    text = json.dumps(found, indent=2, ensure_ascii=False)
    (options.output / "report.json").write_text(text + "\n")
    print(text)
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of GSM8K and PubMedQA; docstrings by default")
    parser.add_argument(
        "--output", type=Path, default=Path("pretrained"), help="folder for everything that is written"
    )
    parser.add_argument("--repo", help="repository on the Hub for model and blueprints, org/name")
    parser.add_argument("--endpoint", help="URL of another Hub")
    parser.add_argument("--steps", type=int, default=240, help="planned optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="blocks of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a block")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens of the tokenizer, at least 257")
    parser.add_argument("--hidden", type=int, default=256, help="width; a multiple of 32")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--schedule", default="constant_with_warmup", help="transformers' name, such as cosine")
    parser.add_argument(
        "--worth", type=float, default=0.04, help="share of the loss that 10 %% of the budget must buy"
    )
    parser.add_argument("--stop-in-decay", action="store_true", help="stop while the learning rate falls as well")
    parser.add_argument("--resource", choices=RESOURCES, default="seconds", help="of ΔΓ")
    parser.add_argument("--validation", type=int, default=24, help="validation blocks of each domain")
    parser.add_argument("--examples", type=int, default=16, help="of these, blocks measured for a blueprint")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.steps < EVALUATIONS:
        parser.error(f"--steps must be at least {EVALUATIONS}, got {options.steps}")
    return options


def read_texts(folder: Path | None) -> dict[str, list[str]]:
    """Return texts by domain.

    Raises:
        SystemExit: if the folder has neither of the two files.
    """
    if folder is None:
        found = [one["prompt"] + one["completion"] for one in stdlib_docs.everything()]
        return {"docs": found}
    texts: dict[str, list[str]] = {}
    if (path := folder / "gsm8k_train.jsonl").exists():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        texts["math"] = [f"{line['question']}\n{line['answer']}" for line in lines]
    if (path := folder / "pubmedqa_ori_pqal.json").exists():
        rows: Mapping[str, Any] = json.loads(path.read_text())
        texts["bio"] = ["\n".join([row["QUESTION"], *row["CONTEXTS"], row["LONG_ANSWER"]]) for row in rows.values()]
    if not texts:
        raise SystemExit(
            f"{folder} has neither gsm8k_train.jsonl nor pubmedqa_ori_pqal.json. Give a folder that does."
        )
    return texts


def is_held_out(text: str) -> bool:
    """Whether a text is for validation; the same on every machine."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % HELD_OUT == 0


def train_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def pack(texts: Iterator[str] | Sequence[str], tokenizer: PreTrainedTokenizerFast, length: int) -> list[Row]:
    """Join texts with an end token and cut them into full blocks; the rest is dropped."""
    end = tokenizer.eos_token_id
    ids = [token for text in tokenizer(list(texts))["input_ids"] for token in (*text, end)]
    return [{"input_ids": ids[i : i + length]} for i in range(0, len(ids) - length + 1, length)]


def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Make a batch in which every token is a target."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


def make_model(tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> LlamaForCausalLM:
    """Make a Llama with random weights and shared embeddings."""
    heads = max(1, options.hidden // 64)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        intermediate_size=32 * round(options.hidden * 8 / 3 / 32),
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=options.length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    try:
        main()
    except BlueprintError as error:
        raise SystemExit(str(error)) from error
