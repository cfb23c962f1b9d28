"""`Placement`, what is adapted and why: names, ranks, what they cost, and what else could have been.

A record that prints as a table and reads back from JSON. Knows nothing of models, or of how it was decided.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from .._text import format_names
from ..errors import PlacementError
from .budget import shown


_NAME_LISTS = ("lora", "unfreeze", "target_parameters")
_MAPPINGS = ("selector", "ranks", "details", "cost")


@dataclass(frozen=True)
class Placement:
    """What is adapted, and why.

    Args:
        model_id: of the blueprint that it came from.
        lora: full names of the submodules that get an adapter, in the model's order; of a linear layer the module's,
            of fused experts the parameter's.
        unfreeze: full names of the modules that are trained whole.
        rank_by: the statistic that ranked them.
        coverage: over what they were spread.
        selector: the wish, such as `{"fraction": 0.2}` or `{"memory": 12884901888}`.
        candidates: how many submodules, or blocks, there were to choose from.
        target_parameters: those of `lora` that are parameters: experts that are fused into one.
        left_out: how many entries of the blueprint were no candidates: on embeddings, norms, biases, convolutions and
            heads no adapter is put.
        rank: of every adapter that `ranks` does not name; None where the adapter's config is to say.
        ranks: rank by full name, where they differ.
        learning_rate_scale: factor on the learning rate that suits LoRA on every linear layer; None where the
            blueprint does not carry what predicts it.
        gain_retained: predicted gain as a share of all-linear LoRA's, see `redundancy.CoverGain`: of Adam's first-order gain
            where all entries carry it, else with every entry counted alike. None in placements made before there was one.
        cost: what it costs as far as that was predicted: `time` as a share of all-linear LoRA's step, `parameters`,
            `modules`, `lowest` (the depth at which the backward pass stops), `memory` and its parts in bytes.
        details: of every name in `lora` its `kind`, `depth`, `score` and, where the blueprint says k*, `k_star_rank`: the
            rank at which an adapter has the share k* of the weight's parameters (eq. 15).
        alternatives: the next smaller and larger choices, each with `modules`, `time`, `gain_retained` and so on.
    """

    model_id: str
    lora: tuple[str, ...]
    unfreeze: tuple[str, ...]
    rank_by: str
    coverage: str
    selector: Mapping[str, float] = field(default_factory=dict)
    candidates: int = 0
    target_parameters: tuple[str, ...] = ()
    left_out: int = 0
    rank: int | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    learning_rate_scale: float | None = None
    gain_retained: float | None = None
    cost: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    alternatives: tuple[Mapping[str, float], ...] = ()

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Those of `lora` that are modules."""
        return tuple(name for name in self.lora if name not in self.target_parameters)

    def quantization_skip_modules(self, head: str = "lm_head") -> list[str]:
        """What to give `BitsAndBytesConfig(llm_int8_skip_modules=…)` so that the blocks to unfreeze are not quantised.

        The head is on the list because an explicit list replaces transformers' own, which has it.
        """
        return [head, *self.unfreeze]

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        lists = {name: list(getattr(self, name)) for name in (*_NAME_LISTS, "alternatives")}
        return asdict(self) | lists | {name: dict(getattr(self, name)) for name in _MAPPINGS}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Placement:
        """The placement of such an object.

        Raises:
            PlacementError: if it is not one.
        """
        try:
            values = {"target_parameters": (), "alternatives": (), **data}
            return cls(**values | {name: tuple(values[name]) for name in (*_NAME_LISTS, "alternatives")})
        except (TypeError, KeyError) as error:
            raise PlacementError(
                f"This is not a placement: {error}. It has the keys {format_names(list(data))}."
            ) from error

    def summary(self) -> str:
        """One line: how many of how many, by what, and what it costs."""
        what = [f"{len(self.lora)} adapters"] if self.lora else []
        what += [f"{len(self.unfreeze)} unfrozen modules"] if self.unfreeze else []
        rank = f" of rank {self.rank}" if self.rank is not None and self.lora and not self.ranks else ""
        line = f"{' and '.join(what)}{rank} of {self.candidates} candidates by {self.rank_by}, spread over {self.coverage}"
        return line if self.coverage != "none" else line.replace("spread over none", "not spread")

    def __str__(self) -> str:
        """A table: where the adapters are by kind, what they cost, and the next smaller and larger choices."""
        places = Table()
        for column, justify in (("kind", "left"), ("layers", "left"), ("rank", "right"), ("adapters", "right")):
            places.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
        by_kind: defaultdict[str, list[str]] = defaultdict(list)
        for name in self.lora:
            by_kind[str(self.details.get(name, {}).get("kind") or name.rpartition(".")[2])].append(name)
        for kind, names in by_kind.items():
            depths = sorted(d for name in names if (d := self.details.get(name, {}).get("depth")) is not None)
            ranks = sorted({self.ranks.get(name, self.rank) for name in names} - {None})  # type: ignore[type-var]
            held = f"{ranks[0]}–{ranks[-1]}" if len(ranks) > 1 else "".join(map(str, ranks))
            places.add_row(kind, _runs(depths), held, str(len(names)))
        for name in self.unfreeze:
            places.add_row(name, "", "", "whole")
        return _text(
            f"{self.model_id}: {self.summary()}", places, *([self._cost_table()] if self.cost else []), *self._notes()
        )

    def _cost_table(self) -> Table:
        table = Table()
        for column in ("", "memory", "step time", "parameters", "modules", "lowest layer", "gain kept"):
            table.add_column(column, justify="right" if column else "left")
        smaller = [row for row in self.alternatives if row["modules"] < self.cost["modules"]]
        larger = [row for row in self.alternatives if row["modules"] >= self.cost["modules"]]
        own = {**self.cost, **({"gain_retained": self.gain_retained} if self.gain_retained is not None else {})}
        for label, rows in (("next smaller", smaller), ("this one", [own]), ("next larger", larger)):
            for row in rows:
                table.add_row(
                    label,
                    shown("memory", row["memory"]) if "memory" in row else "",
                    f"{row['time']:.2f}" if "time" in row else "",
                    f"{row['parameters']:,.0f}" if "parameters" in row else "",
                    f"{row['modules']:.0f}",
                    f"{row['lowest']:.0f}" if row.get("lowest") is not None else "",
                    f"{row['gain_retained']:.0%}" if row.get("gain_retained") is not None else "",
                )
        return table

    def _notes(self) -> list[str]:
        notes = []
        if self.learning_rate_scale is not None:
            notes.append(f"Learning rate: {self.learning_rate_scale:.2f} times what suits LoRA on every linear layer.")
        if self.cost:
            notes.append("Costs are predicted; step time is a share of the same step with LoRA on every linear layer.")
        return notes


def _runs(depths: list[int]) -> str:
    """Depths with runs drawn together: 0-3 7 12."""
    runs: list[list[int]] = []
    for depth in depths:
        if runs and depth - runs[-1][-1] <= 1:
            runs[-1].append(depth)
        else:
            runs.append([depth])
    return " ".join(
        f"{run[0]}-{run[-1]}" if run[-1] - run[0] > 1 else " ".join(map(str, dict.fromkeys(run))) for run in runs
    )


def _text(*parts: Table | str) -> str:
    """Tables and lines as plain text."""
    console = Console(file=io.StringIO(), width=119, highlight=False)
    for part in parts:
        console.print(part)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]
