"""The paper's case study (§5) on PubMedQA with its contexts: from a published blueprint to the report, in one command.

    python recipes/pubmedqa.py --data DATA

Reads a published blueprint, probes the model on local examples, checks drift, blends, places adapters, selects training
examples (Algorithm 2), trains until ΔΨ/ΔΓ stays below a threshold, and reports the task score Ψ, the resources Γ with
carbon, the final (Ψ, Γ) and the ratio of the last window, as the paper asks (§3). LoRA on every linear layer, trained on
randomly drawn examples for as many steps, stands beside it. `DATA` holds `pubmedqa_ori_pqal.json` and
`pubmedqa_test_ground_truth.json`; without `--blueprint` one is measured first, as its publisher would.

The defaults are small, so that it ends within a quarter of an hour on one thread. For the full size add

    --max-length 512 --pool 450 --validation 50 --test 500 --steps 200 --batch-size 8
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft_blueprint import Blueprint, BlueprintConfig, generate_blueprint


# isort: split
import numpy as np
import torch
from peft import LoraConfig, get_peft_model  # after peft_blueprint, which silences a warning of bitsandbytes on CPUs
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

import smollm2
from peft_blueprint.compare import read_for_domain
from peft_blueprint.data import select_examples
from peft_blueprint.measure import collate, encode, get_pad_token_id, load_model, make_batches
from peft_blueprint.place import Probed, probe_blueprint
from peft_blueprint.publish import RESOURCE_NAMES, describe_stop, per_unit, rate, save_page
from peft_blueprint.runs import (
    UNITS,
    Ledger,
    MarginalReturn,
    Point,
    Quantity,
    Report,
    Row,
    RunRecord,
    carbon_factor,
    format_number,
    format_quantity,
    make_report,
)
from peft_blueprint.train import LedgerCallback, charge, keep_stdout_clean


ANSWERS = ("yes", "no", "maybe")
PROMPT = "Question: {question}\nContext: {context}\nAnswer (yes, no or maybe):"
SLACK = 4  # tokens for the answer and the end of the text
BATCH_SIZE = 8  # examples of a measurement and of an evaluation
BY_GRADIENT = ("predicted_norm", "norm", "norm_low")  # methods of data selection
SCORE = "test_accuracy"
RESOURCE = "flops"  # to judge by: other work on a shared machine does not change it

Example = dict[str, str]
Spent = Mapping[str, Quantity]


@dataclass(frozen=True)
class Study:
    """What every step needs: options, the base model, its tokenizer, and the examples by their use."""

    options: argparse.Namespace
    model: Any
    tokenizer: PreTrainedTokenizerBase
    data: Mapping[str, Sequence[Example]]

    def rows(self, examples: Sequence[Example]) -> list[dict[str, list[int]]]:
        """Encode examples."""
        return encode(examples, self.tokenizer, self.options.max_length)

    def batches(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        """Encode and collate examples in order."""
        return make_batches(self.rows(examples), BATCH_SIZE, get_pad_token_id(self.tokenizer))

    def ledger(self) -> Ledger:
        """Begin to count what a step spends."""
        return Ledger(watts=self.options.watts, carbon=carbon_factor(self.options.carbon))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the whole path; print the report, and return and write what it says."""
    options = parse(arguments)
    set_seed(options.seed)
    say("1/6 Reading the model, and PubMedQA with its contexts")
    model, tokenizer = load_model(options.model or str(smollm2.prepare()), options.dtype)
    study = Study(options, model, tokenizer, read_pubmedqa(options, tokenizer))
    say("2/6 The published blueprint")
    published = read_for_domain(options.blueprint or publish(study), options.domain)
    say("3/6 Probe, drift check, blend and placement (Algorithm 1)")
    probed, config, probing = place(study, published)
    say(f"4/6 Selecting training examples by {options.select} (Algorithm 2)")
    chosen, selecting = select(study, config)
    say(f"5/6 Training on {len(chosen)} of {options.pool} examples until it no longer pays")
    records = [train(study, config, chosen, "blueprint", {"probe": probing, "selection": selecting})]
    if options.compare:
        everywhere = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        drawn = random.Random(options.seed).sample(study.data["pool"], len(chosen))
        records.append(train(study, everywhere, drawn, "all-linear", {}))
    say("6/6 Report")
    return report(study, records, config, probed)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of PubMedQA's files, and of gsm8k_train.jsonl if it is there")
    add("--output", type=Path, default=Path("pubmedqa-output"), help="folder for adapters, records and report")
    add("--model", help="folder or Hub id of a causal model; by default SmolLM2-135M-Instruct from its package")
    add("--blueprint", help="published blueprint: file, folder or Hub id; by default one is measured")
    add("--domain", help="domain of the published blueprint: bio, or weights as math=0.5,bio=0.5")
    add("--drift-policy", default="warn", help="warn, error, refresh or coarsen")
    add("--blend-weight", type=float, default=0.5, help="weight of the published blueprint")
    add("--fraction", type=float, help="share of the submodules to adapt; by default the library's placement")
    add("--rank", type=int, help="rank of the adapters; by default as many parameters as all-linear LoRA of rank 16")
    add(
        "--select", choices=(*BY_GRADIENT, "loss", "random"), default="predicted_norm", help="method of data selection"
    )
    add("--keep", type=float, default=0.5, help="share of the pool to train on")
    add("--published", type=int, default=24, help="examples of the blueprint that is measured without --blueprint")
    add("--probe", type=int, default=16, help="examples of the local probe")
    add("--pool", type=int, default=96, help="training examples to select from, of the official training half")
    add("--validation", type=int, default=24, help="examples that the stopping rule watches, of the same half")
    add("--test", type=int, default=64, help="examples of the official test half for the task score")
    add("--max-length", type=int, default=256, help="tokens of an example; longer contexts are cut")
    add("--steps", type=int, default=24, help="most optimizer steps")
    add("--batch-size", type=int, default=4, help="examples of a step")
    add("--learning-rate", type=float, default=3e-4, help="of all-linear LoRA of rank 16; scaled for the placement")
    add("--checks", type=int, default=6, help="evaluations of the stopping rule during training")
    add("--dtype", default="float32", help="of the weights; bfloat16 is slow on most CPUs")
    add("--watts", type=float, help="power of the device, where there is no energy meter")
    add("--carbon", default="USA", help="grams of CO2e per kWh, or a country's three letters")
    add("--html", action="store_true", help="also draw report.html (needs matplotlib)")
    add("--compare", action=argparse.BooleanOptionalAction, default=True, help="train all-linear LoRA beside it")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.carbon.replace(".", "", 1).isdigit():
        options.carbon = float(options.carbon)
    options.output.mkdir(parents=True, exist_ok=True)
    return options


# ---- data


def read_pubmedqa(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Example]]:
    """Read the questions with their contexts, in a random order that the seed fixes.

    Returns:
        "pool" and "validation" of the official training half, "publisher" from the rest of it, and "test" of the
        other half.
    """
    try:
        records = json.loads((options.data / "pubmedqa_ori_pqal.json").read_text())
        tests = json.loads((options.data / "pubmedqa_test_ground_truth.json").read_text())
    except FileNotFoundError as error:
        raise SystemExit(f"{error.filename} not found. Give the folder that holds PubMedQA as --data.") from None
    halves: dict[bool, list[Example]] = {True: [], False: []}
    for key, record in records.items():
        halves[key in tests].append(as_example(record, tokenizer, options.max_length))
    for half in halves.values():
        random.Random(options.seed).shuffle(half)
    end = options.pool + options.validation
    needed = end + (0 if options.blueprint else options.published)
    if needed > len(halves[False]) or options.test > len(halves[True]):
        raise SystemExit(
            f"PubMedQA has {len(halves[False])} training and {len(halves[True])} test questions; --pool, --validation and "
            f"--published ask for {needed}, --test for {options.test}. Ask for fewer."
        )
    return {
        "pool": halves[False][: options.pool],
        "validation": halves[False][options.pool : end],
        "publisher": halves[False][end : end + options.published],
        "test": halves[True][: options.test],
    }


def as_example(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    """Return prompt and completion, with the end of the context cut so that both fit `max_length` tokens."""
    context = " ".join(record["CONTEXTS"])
    frame = PROMPT.format(question=record["QUESTION"], context="")
    room = max(0, max_length - SLACK - len(tokenizer(frame)["input_ids"]))
    offsets = tokenizer(context, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    if len(offsets) > room:
        context = context[: offsets[room - 1][1]] if room else ""
    prompt = PROMPT.format(question=record["QUESTION"], context=context)
    return {"prompt": prompt, "completion": f" {record['final_decision']}"}


def publish(study: Study) -> Path:
    """Measure and save a blueprint as its publisher would: of GSM8K ("math") if it is there, and of "bio"."""
    options, sources = study.options, {"bio": study.data["publisher"]}
    if (mathematics := options.data / "gsm8k_train.jsonl").exists():
        rows = [json.loads(line) for line in mathematics.read_text().splitlines()[: options.published]]
        examples = [{"prompt": f"{row['question']}\n", "completion": row["answer"]} for row in rows]
        sources = {"math": examples, **sources}
    batches = {name: study.batches(examples) for name, examples in sources.items()}
    blueprint = generate_blueprint(study.model, batches, max_examples=options.published, data=", ".join(sources))
    return blueprint.save(options.output / "blueprint.json")


# ---- the path


def place(study: Study, published: Blueprint) -> tuple[Probed, BlueprintConfig, Spent]:
    """Probe the model on the first examples of the pool, and settle where adapters go.

    `BlueprintConfig(blueprint=…, probe=…)` does the same in one call; here the drift and the cost are wanted too.
    """
    options = study.options
    with study.ledger() as ledger:
        probed = probe_blueprint(
            study.model,
            study.batches(study.data["pool"][: options.probe]),
            published,
            probe_examples=options.probe,
            blend_weight=options.blend_weight,
            drift_policy=options.drift_policy,
            seed=options.seed,
            data="PubMedQA with contexts",
        )
        measured = {name: Quantity.from_dict(found) for name, found in probed.probe.provenance["spent"].items()}
        ledger.add(int(measured["tokens"].value or 0), measured["flops"].value)
    config = BlueprintConfig(
        blueprint=probed.blueprint, fraction=options.fraction, lora_alpha=32, r=options.rank, task_type="CAUSAL_LM"
    )
    return probed, config.resolve(study.model), ledger.quantities()


def select(study: Study, config: BlueprintConfig) -> tuple[list[Example], Spent]:
    """Choose the examples whose gradients in the placed submodules promise most."""
    options = study.options
    with study.ledger() as ledger:
        selection = select_examples(
            study.model,
            study.data["pool"],
            fraction=options.keep,
            method=options.select,
            small=min(options.pool, max(16, options.pool // 4)),
            max_length=options.max_length,
            seed=options.seed,
            tokenizer=study.tokenizer,
            placement=config.placement if options.select in BY_GRADIENT else None,
        )
        ledger.add(flops=float(selection.report["cost"]["flops"] or 0.0))
    return selection.apply(study.data["pool"]), ledger.quantities()


def train(
    study: Study, config: LoraConfig, examples: Sequence[Example], name: str, before: Mapping[str, Spent]
) -> RunRecord:
    """Train adapters until ΔΨ/ΔΓ stays below the threshold, score them on the test half, and take them off again.

    Args:
        study: the model is left as it was.
        config: of the adapters.
        examples: to train on.
        name: of the run, and of its folder.
        before: costs before training, by purpose; they are charged to the run.
    """
    options, pad = study.options, get_pad_token_id(study.tokenizer)
    score_before = score(study, study.model)
    set_seed(options.seed)
    adapted = get_peft_model(study.model, config)
    scale = getattr(getattr(config, "placement", None), "learning_rate_scale", None) or 1.0
    every = max(1, options.steps // options.checks)
    arguments = TrainingArguments(
        str(options.output / name),
        max_steps=options.steps,
        learning_rate=options.learning_rate * scale,
        lr_scheduler_type="constant_with_warmup",  # a decaying rate would hide when it no longer pays
        warmup_steps=max(1, options.steps // 10),
        weight_decay=0.0,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=BATCH_SIZE,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=True,
        logging_steps=every,
        save_strategy="no",
        report_to="none",
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        seed=options.seed,
    )
    trainer = Trainer(
        model=adapted,
        args=arguments,
        train_dataset=study.rows(examples),
        eval_dataset=study.rows(study.data["validation"]),
        data_collator=partial(collate, pad_token_id=pad),
        compute_metrics=partial(accuracy_of, answers=answer_ids(study.tokenizer)),
        preprocess_logits_for_metrics=partial(decide, answers=answer_ids(study.tokenizer)),
    )
    keep_stdout_clean(trainer)
    rule = MarginalReturn(window=3, patience=2)
    callback = LedgerCallback(
        trainer, stop=rule, resource=RESOURCE, carbon=options.carbon, watts=options.watts, name=name
    )
    trainer.add_callback(callback)
    trainer.train()
    adapted.save_pretrained(arguments.output_dir)
    record = callback.log.record()
    for purpose, spent in before.items():
        record = charge(record, spent, purpose)
    record = with_scores(record, trainer.state.global_step, score_before, score(study, adapted))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    record = replace(record, about={**record.about, "trained_parameters": trained, "examples": len(examples)})
    record.save(arguments.output_dir)
    adapted.unload()
    return record


def with_scores(record: RunRecord, steps: int, before: Mapping[str, float], after: Mapping[str, float]) -> RunRecord:
    """Add the test scores to the evaluations of the untrained and of the final model."""
    first, *others = record.points
    points = [replace(first, metrics={**first.metrics, **before}), *others]
    if points[-1].step == steps:
        points[-1] = replace(points[-1], metrics={**points[-1].metrics, **after})
    else:
        spent = {name: quantity.value for name, quantity in record.totals.items() if quantity.value is not None}
        points.append(Point(steps, spent, dict(after)))
    return replace(record, points=tuple(points))


# ---- the task score


def answer_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the first token of each answer.

    Raises:
        SystemExit: if two answers begin with the same token, which would not tell them apart.
    """
    ids = [tokenizer(f" {answer}", add_special_tokens=False)["input_ids"][0] for answer in ANSWERS]
    if len(set(ids)) < len(ids):
        raise SystemExit(f"The tokenizer does not tell {', '.join(ANSWERS)} apart by their first token: {ids}.")
    return ids


def decide(logits: Tensor, labels: Tensor, answers: Sequence[int]) -> Tensor:
    """Return the answer, (B,), an index into `ANSWERS`, that is likeliest where the first target is predicted.

    Args:
        logits: (B, T, V).
        labels: (B, T), -100 where there is no target.
        answers: token of each answer.
    """
    first = (labels != -100).int().argmax(dim=1) - 1
    at_first = logits[torch.arange(len(logits), device=logits.device), first]
    return at_first[:, list(answers)].argmax(dim=1)


def accuracy_of(prediction: Any, answers: Sequence[int]) -> dict[str, float]:
    """Return the accuracy of decisions against the first target of each row, for the Trainer."""
    labels = prediction.label_ids
    first = labels[np.arange(len(labels)), (labels != -100).argmax(axis=1)]
    return {"accuracy": float(np.mean(np.asarray(answers)[prediction.predictions] == first))}


@torch.no_grad()
def score(study: Study, model: nn.Module) -> dict[str, float]:
    """Return accuracy and macro-F1 on the test half."""
    answers = answer_ids(study.tokenizer)
    found: list[int] = []
    for batch in study.batches(study.data["test"]):
        batch = {key: value.to(study.model.device) for key, value in batch.items()}
        labels = batch.pop("labels")
        found += decide(model.eval()(**batch).logits, labels, answers).tolist()
    truth = [ANSWERS.index(example["completion"].strip()) for example in study.data["test"]]
    return {SCORE: float(np.mean(np.equal(found, truth))), "test_macro_f1": macro_f1(found, truth)}


def macro_f1(found: Sequence[int], truth: Sequence[int]) -> float:
    """Return the mean over answers of F1 = 2·TP / (2·TP + FP + FN); an answer that neither side has is left out."""
    scores = []
    for answer in range(len(ANSWERS)):
        hits = sum(a == b == answer for a, b in zip(found, truth, strict=True))
        named = sum(a == answer for a in found) + sum(b == answer for b in truth)
        if named:
            scores.append(2 * hits / named)
    return float(np.mean(scores))


# ---- the report


def report(study: Study, records: Sequence[RunRecord], config: BlueprintConfig, probed: Probed) -> dict[str, Any]:
    """Fill in the paper's template (§3) for every run; write and print it, and the numbers beside it."""
    options, baseline = study.options, records[1].name if len(records) > 1 else None
    by_loss = make_report(records, baseline=baseline, resource=RESOURCE, metric="eval_loss", window=3)
    by_score = make_report(records, baseline=baseline, resource=RESOURCE, metric=SCORE)
    count = len(study.data["test"])
    columns = [template(loss, gain, count, by_loss) for loss, gain in zip(by_loss.rows, by_score.rows, strict=True)]
    lines = [f"| | {' | '.join(row.name for row in by_loss.rows)} |", "|---|" + "---|" * len(records)]
    lines += [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]]
    placement, drift = config.placement, probed.drift
    assert placement is not None and drift is not None
    majority = max(ANSWERS, key=lambda answer: sum(e["completion"].strip() == answer for e in study.data["test"]))
    share = sum(e["completion"].strip() == majority for e in study.data["test"]) / count
    text = "\n".join(
        [
            f"# PubMedQA with contexts: {study.model.config._name_or_path}",
            "",
            f"Placement: {placement.summary()}.",
            f"Drift: rank correlation of {options.probe} local examples with the published blueprint "
            f"{drift.correlation:.2f} [{drift.interval[0]:.2f}, {drift.interval[1]:.2f}], "
            f"{'below' if drift.drifted else 'not below'} {drift.threshold:g}; policy {options.drift_policy}.",
            f"Always answering {majority!r} scores {share:.3f} on these {count} questions.",
            "",
            *lines,
            "",
            *(f"- {note}" for note in dict.fromkeys((*by_loss.notes, *by_score.notes))),
            "",
        ]
    )
    (options.output / "report.md").write_text(text)
    written = {"drift": drift.correlation, "placement": placement.to_dict(), "majority": share}
    written |= {"loss": by_loss.to_dict(), "score": by_score.to_dict()}
    (options.output / "report.json").write_text(json.dumps(written, indent=2) + "\n")
    if options.html:
        save_page(by_loss, options.output / "report.html")
    print(text)
    return written


def template(loss: Row, gain: Row, count: int, report: Report) -> dict[str, str]:
    """Return a run's entries of the paper's template: Ψ, Γ, carbon, the final pair and the last window's ratio."""
    record, accuracy = loss.record, gain.metric or 0.0
    error = (accuracy * (1 - accuracy) / count) ** 0.5
    totals = {name: format_quantity(record.total(name).value, name) for name in UNITS}
    parts = {
        name: record.about[name]["flops"]["value"] or 0.0 for name in ("probe", "selection") if name in record.about
    }
    last, whole = record.points[-1], record.total(RESOURCE).value or 0.0
    spent = {**parts, "training": whole - sum(parts.values())}
    return {
        f"Ψ: accuracy on {count} test questions, before → after": f"{gain.first:.3f} → {accuracy:.3f} ± {error:.3f}",
        "Ψ: macro-F1, before → after": " → ".join(
            f"{point.metrics['test_macro_f1']:.3f}" for point in (record.points[0], last)
        ),
        "Ψ: validation loss, before → after": f"{loss.first:.4f} → {loss.metric:.4f}",
        **{
            f"Γ: {'carbon, ' if name == 'carbon_grams' else ''}{RESOURCE_NAMES[name]}": f"{totals[name]} ({record.total(name).how})"
            for name in UNITS
        },
        "Γ by purpose, share of FLOPs": ", ".join(f"{name} {part / whole:.0%}" for name, part in spent.items()),
        "final (Ψ, Γ)": f"({accuracy:.3f}, {totals[RESOURCE]})",
        f"last window: ΔΨ/ΔΓ of the validation loss {per_unit(report)}": format_number(rate(loss.ratio, report)),
        f"gain of the validation loss {per_unit(report)}": format_number(rate(loss.per_resource, report)),
        f"gain of accuracy {per_unit(report)}": format_number(rate(gain.per_resource, report)),
        "steps, and why it ended": f"{last.step}. {' '.join(describe_stop(loss))}",
        "examples trained on": str(record.about["examples"]),
        "trained parameters": f"{record.about['trained_parameters']:,}",
    }


def say(text: str) -> None:
    """Print a step's heading."""
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main()
