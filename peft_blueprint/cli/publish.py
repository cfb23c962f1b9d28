"""Verbs that publish and read blueprints: `publish`, `fetch`, `embed`, `extract`, `remove`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .. import blueprint as records
from .. import publish as publishing
from .. import train as training
from ..errors import BlueprintError
from ..publish import PublishOptions
from .output import Output, say
from .verbs import Source, Without, verb


ModelFiles = Annotated[
    Path, typer.Argument(help="A .safetensors file, or the folder of a model in one file or in shards with an index.")
]
Domain = Annotated[str | None, typer.Option(help="Domain of the blueprint where a model has several, such as math.")]
Checkpoint = Annotated[
    float | None, typer.Option(help="Share of the model's training done at the checkpoint, in (0, 1].")
]


@verb(
    "Publish",
    examples=[
        "peft-blueprint publish blueprint.json org/model",
        "peft-blueprint publish blueprint.json org/model --create-pr",
        "peft-blueprint publish math.json org/model --domain math --dry-run",
    ],
)
def publish(
    source: Source,
    repository: Annotated[str, typer.Argument(help="The model's repository, or one that holds blueprints alone.")],
    output: Output,
    options: Annotated[PublishOptions, Without("datasets", "with_arrays")],
    dataset: Annotated[
        list[str] | None, typer.Option(help="Hub id of a data set it was measured on, for the card; may be repeated.")
    ] = None,
    model_id: Annotated[
        str | None, typer.Option(help="The model's id on the Hub, if the file names a folder.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")] = False,
) -> None:
    """Publish a blueprint on the Hub in one commit, with a section of the model card."""
    blueprint = records.Blueprint.from_pretrained(source)
    if model_id is not None:
        blueprint = replace(blueprint, model_id=model_id)
    options = replace(options, datasets=dataset or None)
    result = publishing.publish(blueprint, repository, options, dry_run=dry_run)
    if isinstance(result, publishing.Publication):
        rows = [{"file": name, "bytes": len(content)} for name, content in result.files.items()]
        if output.format == "table":
            print(result)
            say(
                "Nothing would change." if result.is_unchanged else "Nothing was sent. Leave out --dry-run to send it."
            )
            return
        output.answer({"repository": repository, "files": rows}, rows, list(result.files), f"To {repository}")
        return
    output.answer({"url": result}, [{"url": result}], [result], f"Published to {repository}")


@verb(
    "Publish",
    examples=[
        "peft-blueprint fetch org/model --domain math --out math.json",
        "peft-blueprint fetch HuggingFaceTB/SmolLM2-135M-Instruct --domain stdlib_docs",
    ],
)
def fetch(
    source: Source,
    output: Output,
    out: Annotated[Path, typer.Option(help="Where to write: .json, .csv, .safetensors or a folder.")] = Path(
        "blueprint.json"
    ),
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    domain: Domain = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Get a blueprint that was published with a model, or that comes with this package, and write it to a file."""
    own = records.bundled_blueprints(source)
    if domain in own and revision is None and checkpoint is None:
        blueprint = records.Blueprint.from_pretrained(own[domain])
    else:
        try:
            blueprint = records.Blueprint.from_pretrained(
                source, revision=revision, domain=domain, checkpoint=checkpoint
            )
        except BlueprintError as error:
            if not own:
                raise
            choices = " or ".join(f"--domain {name}" for name in own)
            raise type(error)(f"{error} Of this model, blueprints come with the package: {choices}.") from error
    written = blueprint.save(out)
    output.blueprint(blueprint, "gradient_norm", 10, bare=[str(written)])
    output.hint(f"Written to {written}. Next: peft-blueprint targets {written}")


@verb("Publish", examples=["peft-blueprint embed model-folder blueprint.json"])
def embed(
    model: ModelFiles,
    source: Source,
    output: Output,
    check: Annotated[
        bool, typer.Option(help="Check that the model has the submodules that the blueprint names.")
    ] = True,
) -> None:
    """Write a blueprint into the header of a model's safetensors, or its index; no tensor changes."""
    blueprint = records.Blueprint.from_pretrained(source)
    changed = publishing.embed(blueprint, model, check=check, progress=output.progress)
    rows = [{"file": str(path), "bytes": path.stat().st_size} for path in changed]
    title = f"The blueprint of {blueprint.model_id} with {len(blueprint)} {blueprint.level}s is now in"
    output.answer({"files": rows}, rows, [str(path) for path in changed], title)


@verb("Publish", examples=["peft-blueprint extract model-folder --out blueprint.json"])
def extract(
    model: ModelFiles,
    output: Output,
    out: Annotated[
        Path | None, typer.Option(help="Also write it to this file: .json, .csv, .safetensors or a folder.")
    ] = None,
) -> None:
    """Show the blueprint that a model's header or index holds, numbers to four digits."""
    blueprint = records.extract(model)
    bare = [str(blueprint.save(out))] if out is not None else list(blueprint.names)
    output.blueprint(blueprint, "gradient_norm", 20, bare=bare)
    if out is not None:
        output.hint(f"Written to {bare[0]}. Next: peft-blueprint targets {bare[0]}")


@verb("Publish", examples=["peft-blueprint remove model-folder"])
def remove(model: ModelFiles, output: Output) -> None:
    """Remove a blueprint from a model's header and index. Exits with status 1 if the model has none."""
    changed = [str(path) for path in publishing.remove(model, progress=output.progress)]
    rows = [{"file": path} for path in changed]
    output.answer({"files": changed}, rows, changed, "Removed from" if changed else "No blueprint in these files")
    raise typer.Exit(0 if changed else 1)


@verb("Publish", examples=["peft-blueprint merge-experts experts.safetensors mixture-folder --out merged"])
def merge_experts(
    experts: Annotated[
        Path, typer.Argument(help="File of trained experts, as save_experts writes it, or its folder.")
    ],
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the model that they were trained in.")],
    output: Output,
    out: Annotated[Path, typer.Option(help="Folder for the full checkpoint; new or empty.")] = Path("merged"),
) -> None:
    """Write a full checkpoint of a mixture with experts that were trained whole."""
    folder = str(training.merge_experts(experts, model, out))
    output.answer({"folder": folder}, [{"folder": folder}], [folder], f"The experts of {experts} are merged in")
