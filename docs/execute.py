"""Run notebooks with this Python, without Jupyter, and store what they show: python docs/execute.py [FILE …]

A cell's output is its printed text, and its last expression: a matplotlib figure as a picture, anything else by `repr`.
Files that a notebook writes go into a temporary folder.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def execute(path: Path) -> list[list[dict[str, Any]]]:
    """Run a notebook's code cells in one namespace and return the outputs of each, in Jupyter's format.

    Args:
        path: of the notebook, which is not changed; relative files are those of the current folder.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    return [
        _outputs(_source(cell), namespace, f"<{path.name}>")
        for cell in _code_cells(json.loads(path.read_text("utf-8")))
    ]


def main(paths: list[Path]) -> None:
    """Run notebooks and store their outputs."""
    for path in paths:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            found = execute(path)
        notebook = json.loads(path.read_text("utf-8"))
        for count, (cell, outputs) in enumerate(zip(_code_cells(notebook), found, strict=True), 1):
            cell |= {"outputs": outputs, "execution_count": count}
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def _outputs(source: str, namespace: dict[str, Any], name: str) -> list[dict[str, Any]]:
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        value = None if last is None else eval(compile(last, name, "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append(
            {
                "output_type": "stream",
                "name": "stdout",
                "text": printed.getvalue().splitlines(keepends=True),
            }
        )
    if value is not None:
        outputs.append({"output_type": "display_data", "metadata": {}, "data": _shown(value)})
    return outputs


def _shown(value: Any) -> dict[str, Any]:
    if not hasattr(value, "savefig"):
        return {"text/plain": repr(value)}
    png = io.BytesIO()
    value.savefig(png, format="png", dpi=80)
    import matplotlib.pyplot as plt

    plt.close(value)
    return {
        "image/png": base64.b64encode(png.getvalue()).decode(),
        "text/plain": value.axes[0].get_title() or "Figure",
    }


if __name__ == "__main__":
    folder = Path(__file__).resolve().parent / "notebooks"
    main([Path(name).resolve() for name in sys.argv[1:]] or sorted(folder.glob("*.ipynb")))
