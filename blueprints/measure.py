"""Measure a model on data of a kind and add its blueprint to this folder, with its card.

    python blueprints/measure.py org/model gsm8k                      # on the first GPU, in the model's own dtype
    python blueprints/measure.py org/model law --data law.jsonl       # other data: a file, or a data set of the Hub
    python blueprints/measure.py --cards                              # write the cards anew

The blueprint is of 64 examples of at most 512 tokens, and seed 0, so that two measurements of a model have one digest
where their numbers agree.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from peft_blueprint import Blueprint, generate_blueprint
from peft_blueprint.blueprint import file_name
from peft_blueprint.data import read_examples
from peft_blueprint.errors import BlueprintError
from peft_blueprint.measure import LoadOptions, encode, get_pad_token_id, load_model, make_batches
from peft_blueprint.publish.card import card_section


FOLDER = Path(__file__).parent
DATA = {  # kind → data set of the Hub, and the names of its columns
    "gsm8k": ("openai/gsm8k:main", {"prompt": "question", "completion": "answer"}),
    "pubmedqa": ("qiaojin/PubMedQA:pqa_labeled", {"prompt": "question", "completion": "long_answer"}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, save and describe."""
    options = parse(arguments)
    if options.cards:
        for folder in sorted(path for path in FOLDER.iterdir() if any(path.glob("*.json"))):
            write_card(folder)
        return
    source, columns = DATA.get(options.kind, (None, {}))
    if options.data is None and source is None:
        raise BlueprintError(f"kind must be one of {', '.join(DATA)}, or have --data, got {options.kind!r}.")
    columns = dict(pair.split("=", 1) for pair in options.columns.split(",")) if options.columns else columns
    examples = read_examples(options.data or source, columns, split=options.split, limit=64)
    model, tokenizer = load_model(options.path or options.model, options.dtype, options=LoadOptions(options.revision))
    batches = make_batches(encode(examples, tokenizer), 8, get_pad_token_id(tokenizer))
    blueprint = generate_blueprint(
        model,
        batches,
        model_id=options.model,
        model_revision=options.revision,
        data=source if options.data is None or source else options.data,
        command=shlex.join(["python", "blueprints/measure.py", *(sys.argv[1:] if arguments is None else arguments)]),
    )
    folder = FOLDER / options.model.replace("/", "--")
    folder.mkdir(exist_ok=True)
    written = blueprint.save(folder / file_name(options.kind))
    write_card(folder)
    print(f"{written}, digest {blueprint.digest}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="the model's id on the Hub")
    parser.add_argument("kind", nargs="?", help=f"{', '.join(DATA)}, or a name for --data")
    parser.add_argument("--data", help="file or data set of the Hub, ID or ID:CONFIG")
    parser.add_argument("--columns", help="names of its columns, such as prompt=question,completion=answer")
    parser.add_argument("--split", default="train", help="split of a data set of the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_argument("--path", help="folder to load the model from instead of the Hub")
    parser.add_argument("--dtype", default="auto", help="data type of the weights")
    parser.add_argument("--cards", action="store_true", help="write the cards of all models anew")
    options = parser.parse_args(arguments)
    if not options.cards and (options.model is None or options.kind is None):
        parser.error("give a model and a kind of data, or --cards")
    return options


def write_card(folder: Path) -> None:
    """Write README.md beside a model's blueprints: how each was measured, and what it says."""
    model_id = folder.name.replace("--", "/")
    parts = [f"# Blueprints of {model_id}\n"]
    for path in sorted(folder.glob("*.json")):
        blueprint, kind = Blueprint.from_pretrained(path), path.stem.removeprefix("blueprint-")
        section = card_section(blueprint, path.name, repo_id=model_id)
        parts.append(section.replace(f'("{model_id}", domain="{kind}")', '("blueprint.json")  # of the command below'))
        parts.append(f"Measured with `{blueprint.provenance.get('command')}`. Digest: `{blueprint.digest}`.\n")
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
