"""The command line: `peft-blueprint VERB`.

Data goes to stdout, everything else to stderr. Exit status 0; 1 when the answer is "no", such as drift beyond the limit;
2 for bad use. Verbs that only read start without torch.
"""

from __future__ import annotations

import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .._files import require_writable
from ..blueprint import SKETCH_SIZE, Blueprint, Include, Method, norm_of, require_same_names, score_of
from ..errors import BlueprintError
from . import cli_plan
from . import compare as cli_aggregate
from . import data as cli_select
from . import place as cli_place
from . import publish as cli_publish
from . import runs as cli_report
from .answers import show_blueprint
from .output import AsJson, Quiet, Source, pairs_of, print_answer, say


if TYPE_CHECKING:
    from ..measure import Privacy


app = typer.Typer(
    help="Measure which submodules of a model carry the gradient, and put LoRA adapters only where they pay.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 119},
)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    data: Annotated[
        list[str],
        typer.Option(
            help="Examples: a JSON-lines, CSV or Parquet file or a Hub data set; NAME=FILE for several domains."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where to write: .json, .csv or a folder.")] = Path("blueprint.json"),
    columns: Annotated[str, typer.Option(help="What the data calls things: prompt=question,completion=answer.")] = "",
    max_examples: Annotated[int, typer.Option(min=1, help="Examples of each domain.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of an example.")] = 512,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16, float16.")] = "auto",
    load_in_4bit: Annotated[bool, typer.Option(help="Quantise the weights to NF4 (needs bitsandbytes).")] = False,
    model_id: Annotated[str | None, typer.Option(help="Name to publish under, if not the one given.")] = None,
    training_checkpoint: Annotated[
        float | None, typer.Option(help="Share of the model's training done, (0, 1].")
    ] = None,
    method: Annotated[
        Method, typer.Option(help="Norms exact, sketched, or exact where that is nearly free.")
    ] = "auto",
    sketch_size: Annotated[int, typer.Option(min=2, help="Columns of the sketch.")] = SKETCH_SIZE,
    include: Annotated[Include, typer.Option(help="What an adapter may be put on, or every weight.")] = "adaptable",
    noise: Annotated[
        float, typer.Option(min=0, help="Publish with Gaussian noise, as a share of a kind's mean norm; no guarantee.")
    ] = 0.0,
    dp_epsilon: Annotated[float | None, typer.Option(help="Publish with differential privacy, such as 4.")] = None,
    dp_delta: Annotated[float | None, typer.Option(help="Goes with it: far below one over the examples.")] = None,
    dp_clip: Annotated[
        float | None, typer.Option(help="Bound on an example's norm, from other data; by default all count alike.")
    ] = None,
    digest_weights: Annotated[
        bool, typer.Option("--digest-weights", help="Also bind it to the weights' values, by a digest.")
    ] = False,
    seed: int = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure a blueprint of a model on data. Under torchrun or accelerate launch, every process takes its share."""
    from ..data import encode, make_batches, pad_token_of, read_examples
    from ..measure import generate_blueprint
    from ..measure import join_processes, load_model

    privacy = _privacy(noise, dp_epsilon, dp_delta, dp_clip)
    require_writable(out if out.is_dir() else out.parent)
    rank, processes = join_processes()
    examples = {
        name: read_examples(source, pairs_of(columns), limit=max_examples)[rank::processes]
        for name, source in _domains(data).items()
    }
    loaded, tokenizer = load_model(
        model, dtype, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if load_in_4bit else None
    )
    pad = pad_token_of(tokenizer)
    batches = {
        name: make_batches(encode(of_domain, tokenizer, max_length), batch_size, pad)
        for name, of_domain in examples.items()
    }
    blueprint = generate_blueprint(
        loaded,
        batches if "" not in batches else batches[""],
        max_examples=max_examples,
        model_id=model_id or model,
        training_checkpoint=training_checkpoint,
        data=", ".join(data),
        command=shlex.join(["peft-blueprint", *sys.argv[1:]]),
        method=method,
        sketch_size=sketch_size,
        include=include,
        privacy=privacy,
        digest_weights=digest_weights,
        seed=seed,
        progress=not quiet,
    )
    if rank:
        return
    written = blueprint.save(out)
    show_blueprint(blueprint, "gradient_norm", 10, as_json, quiet, bare=[str(written)])
    if not (as_json or quiet):
        say(f"Written to {written}. Next: peft-blueprint targets {written}")


@app.command()
def show(
    source: Source,
    by: Annotated[
        str, typer.Option(help="The statistic to sort by, such as gradient_norm or adam_gain.")
    ] = "gradient_norm",
    top: Annotated[int, typer.Option(min=0, help="How many entries; 0 for all.")] = 20,
    picture: Annotated[Path | None, typer.Option(help="Also draw it: .png, .svg or .pdf (needs matplotlib).")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show a blueprint: where it comes from, and its strongest submodules."""
    blueprint = Blueprint.from_pretrained(source)
    if picture:
        from ..publish import plot_blueprint, save_plot

        save_plot(plot_blueprint(blueprint, by=by), picture)
    names = [entry.name for entry in sorted(blueprint, key=lambda e: -score_of(e, by))]
    show_blueprint(blueprint, by, top, as_json, quiet, bare=names[: top or None])


@app.command()
def compare(
    first: Source,
    second: Source,
    top: Annotated[int, typer.Option(min=0, help="How many entries, those that moved most first; 0 for all.")] = 20,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare two blueprints of one model: norms, and ranks within each kind."""
    a, b = Blueprint.from_pretrained(first), Blueprint.from_pretrained(second)
    require_same_names(a, b, "compared")
    ranks_a, ranks_b = a.ranks(), b.ranks()
    rows = [
        {
            "id": entry.name,
            "kind": entry.kind,
            "first": norm_of(entry),
            "second": norm_of(b[entry.name]),
            "rank_first": ranks_a[entry.name],
            "rank_second": ranks_b[entry.name],
        }
        for entry in a
    ]
    rows.sort(key=lambda row: -abs(row["rank_first"] - row["rank_second"]))  # type: ignore[operator]
    shown = rows[: top or None]
    print_answer(rows, shown, as_json, quiet, [str(row["id"]) for row in shown], f"{a.model_id} and {b.model_id}")


@app.command()
def drift(
    local: Source,
    published: Source,
    threshold: Annotated[float | None, typer.Option(help="Correlation below which the answer is no.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say whether a local blueprint still agrees with a published one. Exit status 1 if it does not."""
    from ..compare import DRIFT_THRESHOLD, check_drift

    found = check_drift(
        Blueprint.from_pretrained(local),
        Blueprint.from_pretrained(published),
        threshold=DRIFT_THRESHOLD if threshold is None else threshold,
    )
    result = {
        "correlation": found.correlation,
        "interval": list(found.interval),
        "threshold": found.threshold,
        "drifted": found.drifted,
        "level": found.level,
        "by_kind": found.by_kind,
    }
    rows = [{"kind": kind, "correlation": value} for kind, value in found.by_kind.items()]
    title = (
        f"rank correlation within kind {found.correlation:.3f} [{found.interval[0]:.3f}, {found.interval[1]:.3f}], "
        f"{'below' if found.drifted else 'not below'} {found.threshold:g}"
    )
    print_answer(result, rows, as_json, quiet, [f"{found.correlation:.4f}"], title)
    raise typer.Exit(1 if found.drifted else 0)


_VERBS: tuple[Callable[..., None], ...] = (
    *cli_place.VERBS,
    *cli_plan.VERBS,
    *cli_publish.VERBS,
    *cli_aggregate.VERBS,
    *cli_select.VERBS,
    *cli_report.VERBS,
)
for verb in _VERBS:
    app.command()(verb)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; see recipes/.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Carry out a recipe: probe, check drift, place, train, evaluate, save the adapter."""
    from dataclasses import asdict

    from ..train import Recipe, run_recipe

    report = asdict(run_recipe(Recipe.from_yaml(recipe), progress=not quiet))
    rows = [{"what": key.replace("_", " "), "value": value} for key, value in report.items()]
    print_answer(report, rows, as_json, quiet, [report["output"]], f"The run of {recipe}")


@app.command()
def env(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Print versions and hardware, for a bug report."""
    import torch

    packages = (
        *("peft-blueprint", "peft", "transformers", "torch", "accelerate", "datasets", "huggingface_hub"),
        *("safetensors", "scipy", "bitsandbytes", "matplotlib"),
    )
    found: dict[str, str] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["accelerator"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows = [{"what": key, "value": value} for key, value in found.items()]
    print_answer(found, rows, as_json, quiet, [f"{key} {value}" for key, value in found.items()], "Environment")


def main() -> None:
    """Entry point of the console script: errors become one line on stderr and status 2."""
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    try:
        app()
    except BlueprintError as error:
        say(f"error: {error}")
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone, as `head` does
        sys.exit(0)


def _privacy(noise: float, epsilon: float | None, delta: float | None, clip: float | None) -> Privacy | None:
    if not noise and (epsilon, delta, clip) == (None, None, None):
        return None
    from ..measure import Privacy

    return Privacy(noise, epsilon, delta, clip)


def _domains(data: Sequence[str]) -> dict[str, str]:
    named = {
        name if found else "": source if found else item
        for item in data
        for name, found, source in [item.partition("=")]
    }
    if len(named) != len(data) or (len(data) > 1 and "" in named):
        raise BlueprintError(f"--data {' --data '.join(data)}: name every domain, once, as --data bio=FILE.")
    return named
