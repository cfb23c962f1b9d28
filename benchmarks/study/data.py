"""Data of a study as rows of tokens: to measure on, to train on, to test on, and unrelated text to see what is forgotten.

Knows data sets and tokenizers. Knows nothing of models or arms.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft_blueprint.data import Row, encode, pad_token_of

from .study import Study


Split = Literal["train", "test"]

DECISIONS = ("yes", "no", "maybe")  # PubMedQA's
OTHER = {"gsm8k": "pubmedqa", "pubmedqa": "gsm8k", "demo": "gsm8k"}  # the data set that a study's own does not teach
FIXED = Path(__file__).parents[2] / "LICENSE"  # text that is the same for all
LONG = 4096


@dataclass(frozen=True)
class Data:
    """All that jobs of a study read.

    Args:
        measured: for blueprints and initialisations, none of them trained on.
        train: as many as one pass has.
        test: the final loss's.
        unrelated: rows by name.
        questions: prompts that end where a decision is due, with the place of the right one among the options.
        options: the first token of each decision.
        pad: the padding token.
        spare: training examples behind those that are measured and trained on, of the curve.
    """

    measured: list[Row]
    train: list[Row]
    test: list[Row]
    unrelated: dict[str, list[Row]]
    questions: list[tuple[list[int], int]]
    options: list[int]
    pad: int
    spare: list[Row] = field(default_factory=list)


def load(study: Study, folder: Path, tokenizer: Any) -> Data:
    """A study's data, the same on every call.

    Raises:
        SystemExit: if there are too few examples of at most the study's length.
    """
    found = rows_of(study.data, folder, "train", tokenizer, study.length, seed=0)
    tests = rows_of(study.data, folder, "test", tokenizer, study.length, seed=1)
    used = study.measured + study.examples
    for what, rows, wanted in (
        ("training", found, used + study.spare),
        ("test", tests, study.held_out),
    ):
        if len(rows) < wanted:
            raise SystemExit(
                f"{study.data} has {len(rows)} {what} examples of at most {study.length} tokens, and {study.name} needs "
                f"{wanted}: raise its length, or lower its steps, pool, measured, spare or held_out."
            )
    unrelated = {"license": pieces(FIXED.read_text(), tokenizer, study.length)[: study.unrelated]}
    other = OTHER.get(study.data)
    if other is not None and (folder / FILES[other]["test"]).exists():
        unrelated[other] = rows_of(other, folder, "test", tokenizer, study.length, seed=1)[: study.unrelated]
    unrelated = {name: rows for name, rows in unrelated.items() if rows}
    questions: list[tuple[list[int], int]] = []
    options: list[int] = []
    if study.data == "pubmedqa":
        options = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in DECISIONS]
        questions = [cut for row in tests[: study.held_out] if (cut := question_of(row, options)) is not None]
    return Data(
        measured=found[: study.measured],
        train=found[study.measured : used],
        test=tests[: study.held_out],
        unrelated=unrelated,
        questions=questions,
        options=options,
        pad=pad_token_of(tokenizer),
        spare=found[used : used + study.spare],
    )


def rows_of(name: str, folder: Path, split: Split, tokenizer: Any, longest: int, seed: int) -> list[Row]:
    """A data set's rows of at most so many tokens, in random order."""
    found = examples(name, folder, split)
    random.Random(seed).shuffle(found)
    return [row for row in encode(found, tokenizer, LONG) if len(row["input_ids"]) <= longest]


FILES = {
    "gsm8k": {"train": "gsm8k_train.jsonl", "test": "gsm8k_test.jsonl"},
    "pubmedqa": {"train": "pubmedqa_ori_pqal.json", "test": "pubmedqa_test_ground_truth.json"},
    "jsonl": {"train": "train.jsonl", "test": "test.jsonl"},
}


def examples(name: str, folder: Path, split: Split) -> list[dict[str, str]]:
    """A data set's prompts and completions, in its own order.

    Raises:
        SystemExit: if there is no such data set, or its file is missing.
    """
    if name == "demo":
        from recipes import stdlib_docs

        found = stdlib_docs.examples("train" if split == "train" else "held_out")
        return [{key: one[key] for key in ("prompt", "completion")} for one in found]
    if name not in FILES:
        raise SystemExit(f"There is no data set {name!r}; choose {', '.join(FILES)} or demo.")
    paths = {of: folder / file for of, file in FILES[name].items()}
    if missing := [str(path) for path in paths.values() if not path.exists()]:
        raise SystemExit(f"{' and '.join(missing)} are not there: give the folder that has them as --data.")
    if name == "pubmedqa":
        tests = json.loads(paths["test"].read_text())
        rows = json.loads(paths["train"].read_text())
        return [
            {"prompt": f"{row['QUESTION']}\n", "completion": f"{row['LONG_ANSWER']}\nAnswer: {row['final_decision']}"}
            for i, row in rows.items()
            if (i in tests) == (split == "test")
        ]
    lines = [json.loads(line) for line in paths[split].read_text().splitlines()]
    if name == "gsm8k":
        return [{"prompt": f"{line['question']}\n", "completion": line["answer"]} for line in lines]
    return [{"prompt": line["prompt"], "completion": line["completion"]} for line in lines]


def question_of(row: Row, options: Sequence[int]) -> tuple[list[int], int] | None:
    """What stands before the last decision in a row, and which one it is."""
    for at in range(len(row["input_ids"]) - 1, 0, -1):
        if row["input_ids"][at] in options:
            return row["input_ids"][:at], options.index(row["input_ids"][at])
    return None


def pieces(text: str, tokenizer: Any, length: int) -> list[Row]:
    """A text as rows of so many tokens, every one a target."""
    ids = tokenizer(" ".join(text.split()), add_special_tokens=False)["input_ids"]
    cut = [ids[i : i + length] for i in range(0, len(ids) - 1, length)]
    return [{"input_ids": part, "labels": list(part)} for part in cut if len(part) > 1]


def steps_of(rows: Sequence[Row], batch: int, steps: int, seed: int) -> list[list[Row]]:
    """Batches over the rows in random order, again and again."""
    generator = random.Random(seed)
    order: list[Row] = []
    found = []
    for _ in range(steps):
        while len(order) < batch:
            order += generator.sample(list(rows), len(rows))
        found.append(order[:batch])
        order = order[batch:]
    return found


def tokens_of(batches: Sequence[Sequence[Row]]) -> int:
    """Positions, padding included."""
    return sum(len(rows) * max(len(row["input_ids"]) for row in rows) for rows in batches)


def in_batches(rows: Sequence[Row], batch: int) -> list[Sequence[Row]]:
    """Rows in their order, so many at a time."""
    return [rows[i : i + batch] for i in range(0, len(rows), batch)]
