"""Run a benchmark: `python -m benchmarks NAME [options]`; `python -m benchmarks --list` names them."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path


HERE = Path(__file__).parent
NAMES = (
    *("study", "selection", "mixture", "rewards", "routing", "noise", "stopping"),  # does it pay?
    *("measure", "experts", "cost", "answer_only", "contexts", "gpu", "callbacks", "files"),  # what does it cost?
    *("drift", "influence", "sketch", "privacy", "cross", "objectives"),  # how good is a measurement?
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark that the first argument names.

    Raises:
        SystemExit: for an unknown name or option.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("--list", "-h", "--help"):
        print("python -m benchmarks NAME [--quick] [--data FOLDER] [options]; NAME --help shows the options.\n")
        for name in NAMES:
            print(f"  {name:<10} {docstring_of(name).partition(chr(10))[0]}")
        return
    name = argv[0]
    if name not in NAMES:
        raise SystemExit(f"Unknown benchmark {name!r}. Choose from {', '.join(NAMES)}.")
    import_module("benchmarks.setup").quiet()
    module = import_module(module_of(name))
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of GSM8K and PubMedQA (data)")
    parser.add_argument("--quick", action="store_true", help="seconds on a tiny random model, to see that it runs")
    module.add_options(parser)
    if "--quick" in argv:
        parser.set_defaults(**getattr(module, "QUICK", {}))
    options = parser.parse_args(argv[1:])
    options.argv = argv
    module.main(options)


def module_of(name: str) -> str:
    """Return the module of a benchmark."""
    return "benchmarks.study.run" if name == "study" else f"benchmarks.{name}"


def docstring_of(name: str) -> str:
    """Read a benchmark's docstring without importing it."""
    path = HERE.joinpath(*module_of(name).split(".")[1:]).with_suffix(".py")
    return ast.get_docstring(ast.parse(path.read_text())) or ""


if __name__ == "__main__":
    main()
