"""Generated pages: home, rooms, command line, recipe keys, and a tutorial for every notebook. MkDocs runs it as a hook."""

from __future__ import annotations

import base64
import dataclasses
import functools
import importlib
import inspect
import json
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import griffe
import typer
from typer.cli import get_docs_for_click

import peft_blueprint
from peft_blueprint.cli.program import app
from peft_blueprint.place import SCORES, CoverGain, SetGain, Workload
from peft_blueprint.place.config import LoraConfig  # after the filter of its warning
from peft_blueprint.runs import RESOURCES, MarginalReturn
from peft_blueprint.train.recipe import Recipe, RecipePlacement


README = Path(__file__).parents[1] / "README.md"
NOTEBOOKS = Path(__file__).parent / "notebooks"
ROOMS = ("blueprint", "runs", "compare", "measure", "place", "data", "train", "publish", "testing")
SECTIONS_ELSEWHERE = {
    "lora": "https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig",
    "training": "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments",
    "quantization": "https://huggingface.co/docs/transformers/main_classes/quantization#transformers.BitsAndBytesConfig",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages and pictures to MkDocs' files."""
    from mkdocs.structure.files import File

    for path, content in generated().items():
        files.append(File.generated(config, path, content=content))
    return files


def generated() -> dict[str, str | bytes]:
    """Return every generated file by its path in the site."""
    pages: dict[str, str | bytes] = {f"reference/{room}.md": api(room) for room in ROOMS}
    pages |= {"index.md": home(), "reference/index.md": contents()}
    pages |= {"reference/cli.md": command_line(), "reference/recipe.md": recipe_keys()}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        pages |= tutorial(path)
    return pages


def home() -> str:
    """Return the README with links to the pages of the site."""
    text = re.sub(r"\]\(docs/notebooks/(\w+)\.ipynb\)", r"](tutorials/\1.md)", README.read_text(encoding="utf-8"))
    text = text.replace("](peft_blueprint/train/recipe.py)", "](reference/recipe.md)").replace("](docs/", "](")
    text = re.sub(r"\]\(peft_blueprint/(\w+)/options\.py\)", r"](reference/\1.md)", text)
    return f"---\nhide: [navigation]\n---\n{text}"


def api(room: str) -> str:
    """Return the reference of a room: a table of its functions and classes, and each of them in full by mkdocstrings."""
    module = importlib.import_module(f"peft_blueprint.{room}")
    found = functions_and_classes(module)
    parts = [f"# peft_blueprint.{room}", inspect.getdoc(module), links(found)]
    if room == "place":
        scores = {**SCORES, "cover_gain": CoverGain, "set_gain": SetGain}
        rows = "\n".join(f"| `{name}` | {summary_of(score)} |" for name, score in scores.items())
        parts.append(f"## Scores\n\nChoices of `rank_by`:\n\n| score | of a submodule |\n|---|---|\n{rows}")
    parts += [f"::: {path_of(value)}" for value in found.values()]
    return "\n\n".join(parts) + "\n"


class Docstrings(griffe.Extension):
    """Make docstrings' examples code blocks, and add a table of the options of a dataclass."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring as it is read."""
        if obj.docstring is None:
            return
        text, value = obj.docstring.value, _public().get(obj.path)
        if dataclasses.is_dataclass(value) and any("help" in field.metadata for field in dataclasses.fields(value)):
            parts = re.split(r"^(Args:|Raises:|Example:)$", text, maxsplit=1, flags=re.MULTILINE)
            text = "".join([parts[0], f"\n{options(value)}\n\n", *parts[1:]])
        obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


@functools.cache
def _public() -> dict[str, Any]:
    modules = (importlib.import_module(f"peft_blueprint.{room}") for room in ROOMS)
    return {path_of(value): value for module in modules for value in functions_and_classes(module).values()}


def contents() -> str:
    """Return the first page of the reference: the names of the package itself, and what else there is to look up."""
    found = functions_and_classes(peft_blueprint)
    modules = {room: importlib.import_module(f"peft_blueprint.{room}") for room in ROOMS}
    rooms = "\n".join(f"| [{room}]({room}.md) | {summary_of(module)} |" for room, module in modules.items())
    return f"""# Reference

[Command line](cli.md), [recipe keys](recipe.md), [errors](errors.md), [file format](format.md).

## The package's own names

`from peft_blueprint import …`

{links(found, pages=True)}

## Rooms

`from peft_blueprint.place import …`

| room | |
|---|---|
{rooms}
"""


def functions_and_classes(module: types.ModuleType) -> dict[str, Any]:
    """Return the public functions and classes of a module by name."""
    found = {name: getattr(module, name) for name in module.__all__}
    return {name: value for name, value in found.items() if inspect.isfunction(value) or inspect.isclass(value)}


def links(found: Mapping[str, Any], pages: bool = False) -> str:
    """Return a table of names with links and the first lines of their docstrings."""
    rows = []
    for name, value in found.items():
        page = value.__module__.split(".")[1] + ".md" if pages else ""
        rows.append(f"| [`{name}`]({page}#{path_of(value)}) | {summary_of(value)} |")
    return "\n".join(["| name | |", "|---|---|", *rows])


def path_of(value: Any) -> str:
    """Return where a function or class is defined."""
    return f"{value.__module__}.{value.__qualname__}"


def summary_of(value: Any) -> str:
    """Return the first paragraph of a docstring on one line of a table."""
    return " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split()).replace("|", "\\|")


def options(cls: Any) -> str:
    """Return a table of the fields that this package adds to a dataclass: name, type, default and help."""
    rows, hints = [], get_type_hints(cls)
    for field in dataclasses.fields(cls):
        is_own = field is not LoraConfig.__dataclass_fields__.get(field.name)
        if is_own and field.init and "help" in field.metadata:
            default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
            rows.append(
                f"| `{field.name}` | {kind_of(hints[field.name], in_python=True)} | {default} | {field.metadata['help']} |"
            )
    return "\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows])


def command_line() -> str:
    """Return the reference of all verbs, by Typer, with its list of verbs as a table of links by panel."""
    command = typer.main.get_command(app)
    context = command.make_context("peft-blueprint", ["env"], resilient_parsing=True)
    text = get_docs_for_click(obj=command, ctx=context, name="peft-blueprint", title="Command line")
    head, verbs = text[: text.index("**Usage**")], text[text.index("\n## ") :]
    rows = "".join(
        f"| {verb.rich_help_panel} | [`{name}`](#peft-blueprint-{name}) | {verb.help} |\n"
        for name, verb in command.commands.items()
    )
    return f"{head}| | verb | |\n|---|---|---|\n{rows}{verbs}"


def recipe_keys() -> str:
    """Return the reference of a recipe's keys, from the dataclasses that read it."""
    stop, described = get_type_hints(MarginalReturn.__init__), arguments_of(MarginalReturn)
    rules = [(name, kind_of(stop[name]), "", described[name]) for name in described]
    rules += [
        (
            "metric",
            "text",
            "",
            "The metric to watch. By default `metric_for_best_model` of `training`, otherwise the loss.",
        ),
        ("resource", "text", "`seconds`", f"One of {', '.join(RESOURCES)}."),
    ]
    sections = [
        "# Recipe keys\n\n`peft-blueprint train recipe.yaml` reads one YAML 1.2 file. Every key is checked before "
        "anything is loaded. A minimal recipe:\n\n```yaml\nmodel: org/model\ntrain: train.jsonl\noutput: adapter\n```",
        table(sorted(rows_of(Recipe), key=lambda row: row[2] != "required")),
        "## placement\n\nEither `all-linear`, or a mapping:\n\n"
        + table(row for row in rows_of(RecipePlacement) if row[0] not in ("r", "seed")),
        "## workload\n\nWhat a step computes, for the predictions. Batch size, length, optimizer, checkpointing and "
        "quantization follow from the other keys.\n\n" + table(row for row in rows_of(Workload) if row[0] != "rank"),
        "## stop\n\nA mapping; `{}` takes the defaults.\n\n" + table(rules),
        "## Keys of other libraries\n\n"
        + "\n".join(
            f"- `{key}`: fields of [{url.rsplit('.', 1)[1]}]({url})" for key, url in SECTIONS_ELSEWHERE.items()
        ),
    ]
    return "\n\n".join(sections) + "\n"


def rows_of(cls: type) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default and help of a dataclass's fields that a file can set."""
    hints, described = get_type_hints(cls), arguments_of(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        default = "required" if field.default is dataclasses.MISSING else f"`{field.default}`"
        if isinstance(field.default, bool):
            default = f"`{str(field.default).lower()}`"  # as in YAML
        if field.default_factory is not dataclasses.MISSING or field.default is None:
            default = ""
        text = field.metadata.get("help") or described[field.name]
        yield field.name, kind_of(hints[field.name]), default, text


def arguments_of(cls: type) -> dict[str, str]:
    """Return the arguments that a class's docstring describes."""
    text = inspect.getdoc(cls) or ""
    section = text.partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", section, re.M | re.S)
    return {name: " ".join(described.split()) for name, described in found}


def kind_of(hint: Any, in_python: bool = False) -> str:
    """Return a type in words: `number or k_star`; in Python: `float` or `'k_star'`."""
    words = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    found: list[str] = []
    for choice in choices:
        if get_origin(choice) is Literal:
            found += [f"`{word!r}`" if in_python else f"`{word}`" for word in get_args(choice)]
        elif choice is not type(None) and in_python:
            found.append("`" + re.sub(r"(\w+\.)+", "", inspect.formatannotation(choice)) + "`")
        elif choice is not type(None):
            is_mapping = get_origin(choice) is not None and issubclass(get_origin(choice), Mapping)
            found.append(words.get(choice, "mapping" if is_mapping or dataclasses.is_dataclass(choice) else "list"))
    return " or ".join(dict.fromkeys(found))


def table(rows: Any) -> str:
    """Return rows of key, type, default and meaning as Markdown."""
    lines = [f"| `{name}` | {kind} | {default} | {text[0].upper()}{text[1:]} |" for name, kind, default, text in rows]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *lines])


def tutorial(path: Path) -> dict[str, str | bytes]:
    """Return a notebook's page and pictures; links to other notebooks become links to their pages."""
    name = path.stem
    parts, files = [], {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", source))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{name}-{len(files) + 1}.png"
                files[f"tutorials/{picture}"] = base64.b64decode(data["image/png"])
                parts.append(f"![{data['text/plain']}]({picture})")
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{text.rstrip()}\n```")
    title, _, text = parts[0].partition("\n")
    parts[0] = f"{title}\n\n[Download this page as a notebook.](../notebooks/{path.name})\n{text}"
    return {f"tutorials/{name}.md": "\n\n".join(parts) + "\n", **files}
