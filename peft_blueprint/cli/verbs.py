"""Turn a function into a verb: flags from dataclasses of options, a help panel, examples, and the output's format."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from .. import __version__
from .output import Format, Output


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 119},
)

# Arguments and options that several verbs take.
Source = Annotated[str, typer.Argument(help="A blueprint: file (JSON or CSV), folder, or repository id on the Hub.")]
Model = Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")]
Picture = Annotated[
    str | None, typer.Option(metavar="FILE", help="Also draw a picture: .png, .svg or .pdf (needs matplotlib).")
]

Columns = Annotated[str, typer.Option(help="Names of the data's columns: prompt=question,completion=answer.")]
Split = Annotated[str, typer.Option(help="Split of a data set on the Hub.")]
Dtype = Annotated[str, typer.Option(help="Data type of the weights: auto, float32, bfloat16 or float16.")]
In4Bit = Annotated[bool, typer.Option("--load-in-4bit", help="Quantize the weights to NF4 (needs bitsandbytes).")]

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

_FLAG_NAMES = {"r": "--rank"}  # of fields whose own name makes a poor flag
_FORMAT = inspect.Parameter(
    "format",
    inspect.Parameter.KEYWORD_ONLY,
    default="table",
    annotation=Annotated[
        Format, typer.Option("--format", "-f", help="table for people, json for programs, quiet for pipelines.")
    ],
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"peft-blueprint {__version__}")
        raise typer.Exit()


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Measure where a model's gradient lives, and train less of the model for the same result."""


class Only:
    """Restrict the flags of a dataclass of options to some fields: `Annotated[Options, Only("fraction")]`."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def accepts(self, name: str) -> bool:
        """Whether the field `name` becomes a flag."""
        return name in self.names


class Without(Only):
    """Leave some fields of a dataclass of options without a flag."""

    def accepts(self, name: str) -> bool:
        """Whether the field `name` becomes a flag."""
        return name not in self.names


def verb(panel: str, *, examples: Sequence[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a verb of the command line.

    A parameter annotated with a dataclass becomes one flag for each field that has `metadata={"help": …}`; the function
    receives the dataclass. A parameter `output: Output` becomes `--format`.

    Args:
        panel: heading of the help page that lists the verb.
        examples: commands shown in the verb's help; the tests run them.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        parameters: list[inspect.Parameter] = []
        groups: dict[str, tuple[type, list[str]]] = {}
        for name, parameter in inspect.signature(function).parameters.items():
            cls, chosen = _options_of(hints[name])
            if cls is Output:
                continue
            if cls is None:
                parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            flags = list(_flags(cls, chosen))
            groups[name] = (cls, [flag.name for flag in flags])
            parameters += flags
        parameters.append(_FORMAT)

        @functools.wraps(function)
        def call(**given: Any) -> None:
            output = Output(given.pop("format"))
            options = {
                name: cls(**{field: given.pop(field) for field in names}) for name, (cls, names) in groups.items()
            }
            function(**given, **options, output=output)

        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del call.__wrapped__
        shown = "\n\n".join(("Examples:", *(f"$ {example}" for example in examples))) if examples else None
        app.command(function.__name__.replace("_", "-"), rich_help_panel=panel, epilog=shown)(call)
        EXAMPLES.extend(examples)
        return function

    return register


PANELS = ("Measure", "Compare", "Place", "Publish", "Data", "Runs")  # in the order of the help page
EXAMPLES: list[str] = []


def _options_of(hint: Any) -> tuple[type | None, Only]:
    """Split a parameter's annotation into its dataclass, if it has one, and the fields that become flags."""
    fields: Only = Without()
    if get_origin(hint) is Annotated:
        hint, *marks = get_args(hint)
        fields = next((mark for mark in marks if isinstance(mark, Only)), fields)
    return (hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None), fields


def _flags(cls: type, chosen: Only) -> Sequence[inspect.Parameter]:
    hints = get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        kind = _flag_type(hints[field.name])
        if "help" not in field.metadata or kind is None or not chosen.accepts(field.name):
            continue
        names = [_FLAG_NAMES[field.name]] if field.name in _FLAG_NAMES else []
        if kind is bool and not names and field.default is False:
            names = [f"--{field.name.replace('_', '-')}"]  # without this, Typer would add --no-…
        found.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None if field.default is dataclasses.MISSING else field.default,
                annotation=Annotated[
                    kind, typer.Option(*names, help=field.metadata["help"], **_parsing(hints[field.name]))
                ],
            )
        )
    return found


def _flag_type(hint: Any) -> Any:
    """The type that a flag is parsed as; None for a field that no flag can express."""
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for choice in choices:
        if choice in (str, int, float, bool) or get_origin(choice) is Literal:
            return choice | None if type(None) in choices else choice
    return None


def _parsing(hint: Any) -> dict[str, Any]:
    """Return Typer's settings of a flag that is a number or one of some words, such as `float | Literal["k_star"]`."""
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    words = [word for choice in choices if get_origin(choice) is Literal for word in get_args(choice)]
    if float not in choices or not words:
        return {}

    def parse(text: str) -> float | str:
        try:
            return text if text in words else float(text)
        except ValueError:
            raise typer.BadParameter(f"must be a number or {' or '.join(words)}, got {text!r}") from None

    return {"parser": parse, "metavar": f"FLOAT|{'|'.join(words)}"}


def parse_pairs(text: str, flag: str = "--columns") -> Mapping[str, str]:
    """Parse `prompt=question,completion=answer`.

    Raises:
        BadParameter: for anything else.
    """
    pairs = [item.split("=", 1) for item in text.split(",") if item]
    if any(len(pair) != 2 for pair in pairs):
        raise typer.BadParameter(
            f"{flag} must be NAME=COLUMN pairs such as prompt=question,completion=answer, got {text!r}"
        )
    return {key.strip(): value.strip() for key, value in pairs}
