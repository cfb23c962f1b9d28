"""The verbs by which blueprints travel: `publish`, `fetch`, `embed`, `extract`, `remove`.

Thin shells round `publish`, `hub` and `embedding`; knows nothing of file layouts or HTTP.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..blueprint import Blueprint
from ..errors import BlueprintError
from ..place import Budget
from .answers import show_blueprint
from .output import AsJson, Quiet, Source, print_answer, say


Model = Annotated[
    Path, typer.Argument(help="A .safetensors file, or the folder of a model in one file or in shards with an index.")
]
Domain = Annotated[str | None, typer.Option(help="One of several side by side: the kind of data, such as math.")]
Checkpoint = Annotated[float | None, typer.Option(help="Likewise: share of the model's training done, (0, 1].")]


def publish(
    source: Source,
    repository: Annotated[str, typer.Argument(help="Where to: the model's own, or one of blueprints alone.")],
    domain: Domain = None,
    checkpoint: Checkpoint = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Hub id of a data set it was measured on, for the card; may be repeated.")
    ] = None,
    model_id: Annotated[
        str | None, typer.Option(help="The model's id on the Hub, if the file names a folder.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="As a pull request, to a repository one may not write to.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    private: Annotated[bool, typer.Option("--private", help="If the repository is made, make it private.")] = False,
    in_index: Annotated[
        bool, typer.Option("--in-index", help="Also into the index of the repository's sharded model.")
    ] = False,
    picture: Annotated[bool, typer.Option(help="Send a picture too (needs matplotlib).")] = True,
    replace_other: Annotated[
        bool, typer.Option("--replace", help="Also in place of a blueprint of another model or another form of it.")
    ] = False,
    allow_other_model: Annotated[
        bool, typer.Option("--allow-other-model", help="Also to a repository that holds another model.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Publish a blueprint on the Hub in one commit, with a section of the model card."""
    from ..publish import Publication, publish

    blueprint = Blueprint.from_pretrained(source)
    if model_id is not None:
        blueprint = replace(blueprint, model_id=model_id)
    result = publish(
        blueprint,
        repository,
        domain=domain,
        checkpoint=checkpoint,
        datasets=dataset or None,
        create_pr=create_pr,
        revision=revision,
        private=private,
        in_index=in_index,
        picture=picture,
        replace=replace_other,
        allow_other_model=allow_other_model,
        message=message,
        dry_run=dry_run,
    )
    if isinstance(result, Publication):
        rows = [{"file": name, "bytes": len(content)} for name, content in result.files.items()]
        if not (as_json or quiet):
            print(result)
            say("Nothing would be sent." if result.is_unchanged else "Nothing was sent. Without --dry-run it is.")
            return
        answer = {"repository": repository, "files": rows}
        print_answer(answer, rows, as_json, quiet, list(result.files), f"To {repository}")
        return
    print_answer({"url": result}, [{"url": result}], as_json, quiet, [result], f"Published to {repository}")


def fetch(
    source: Source,
    out: Annotated[Path, typer.Option(help="Where to write: .json, .csv, .safetensors or a folder.")] = Path(
        "blueprint.json"
    ),
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    domain: Domain = None,
    checkpoint: Checkpoint = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Get a published blueprint, from a model's header, its index or beside it, and write it to a file."""
    blueprint = Blueprint.from_pretrained(source, revision=revision, domain=domain, checkpoint=checkpoint)
    written = blueprint.save(out)
    show_blueprint(blueprint, "gradient_norm", 10, as_json, quiet, bare=[str(written)])
    if not (as_json or quiet):
        say(f"Written to {written}. Next: peft-blueprint targets {written}")


def embed(
    model: Model,
    source: Source,
    reserve: Annotated[
        str | None, typer.Option(help="Room for later, such as 64KiB: an update within it takes milliseconds.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Require that the model has what the blueprint speaks of.")] = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a blueprint into the header of a model's safetensors, or its index; no tensor changes."""
    from ..publish import embed

    blueprint = Blueprint.from_pretrained(source)
    changed = embed(
        blueprint, model, reserve=0 if reserve is None else _bytes(reserve), check=check, progress=not quiet
    )
    rows = [{"file": str(path), "bytes": path.stat().st_size} for path in changed]
    title = f"The blueprint of {blueprint.model_id} with {len(blueprint)} {blueprint.level}s is now in"
    print_answer({"files": rows}, rows, as_json, quiet, [str(path) for path in changed], title)


def extract(
    model: Model,
    out: Annotated[
        Path | None, typer.Option(help="Also write it there: .json, .csv, .safetensors or a folder.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show the blueprint that a model's header or index holds, numbers to four digits."""
    from ..blueprint import extract

    blueprint = extract(model)
    bare = [str(blueprint.save(out))] if out is not None else list(blueprint.names)
    show_blueprint(blueprint, "gradient_norm", 20, as_json, quiet, bare=bare)
    if out is not None and not (as_json or quiet):
        say(f"Written to {bare[0]}. Next: peft-blueprint targets {bare[0]}")


def remove(model: Model, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Take a blueprint out of a model's header and index again. Exit status 1 if there is none."""
    from ..publish import remove

    changed = [str(path) for path in remove(model, progress=not quiet)]
    rows = [{"file": path} for path in changed]
    print_answer({"files": changed}, rows, as_json, quiet, changed, "Removed from" if changed else "There is none in")
    raise typer.Exit(0 if changed else 1)


def _bytes(text: str) -> int:
    try:
        return int(Budget.of({"memory": text}).memory or 0)
    except BlueprintError:
        raise BlueprintError(f"--reserve {text} is no size: write 64KiB or 100kB.") from None


VERBS = (publish, fetch, embed, extract, remove)
