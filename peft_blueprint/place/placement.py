"""`Placement`: names, ranks, predicted costs and the reasons for them; prints as a table, reads back from JSON."""

from __future__ import annotations

import html
import io
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from .._text import data_frame, format_names
from ..errors import PlacementError
from ..runs import format_quantity


_NAME_LISTS = ("lora", "unfreeze", "target_parameters", "notes")
_MAPPINGS = ("selector", "ranks", "details", "cost", "full_training", "shares")


@dataclass(frozen=True)
class Placement:
    """Where adapters go and which modules are unfrozen, with the reasons.

    Args:
        model_id: model of the blueprint.
        lora: full names of the submodules that get an adapter, in the model's order: of linear layers the module's
            name, of fused experts the parameter's.
        unfreeze: full names of the modules that are trained whole.
        rank_by: score that ranked the submodules.
        coverage: dimensions that the choice was spread over.
        selector: size or limits, such as `{"fraction": 0.2}` or `{"memory": 12884901888}`.
        candidates: number of submodules, or blocks, to choose from.
        target_parameters: the names in `lora` that are parameters: experts fused into one.
        left_out: number of the blueprint's entries that take no adapter: embeddings, norms, biases, convolutions, heads.
        rank: rank of each adapter that is not in `ranks`, with ranks="score" their mean; None without adapters, or to
            leave it to the adapter's config.
        ranks: rank by full name, where ranks differ.
        learning_rate_scale: factor on the learning rate that suits LoRA on every linear layer; None without Adam's gain.
        gain_retained: predicted gain as a share of all-linear LoRA's, see `CoverGain`: of Adam's first-order gain if all
            entries carry it, otherwise with every entry counted alike, which `is_gain_measured` tells.
        is_gain_measured: whether `gain_retained` rests on a measurement.
        gain_per_cost: predicted gain over predicted cost (eq. 8), relative to all candidates: 1.2 is a fifth more of the
            gain for each unit of cost. The cost is that of `best`, by default the step time.
        notes: observations in choosing, such as an optimum that is not in the interior.
        cost: predicted costs, as far as known: `time` as a share of all-linear LoRA's step, `parameters`, `modules`,
            `lowest` (depth at which the backward pass stops), `optimizer_state` and `memory` in bytes.
        full_training: the same of full fine-tuning with this optimizer, where the whole model is known: `time`, `parameters`,
            `optimizer_state`.
        shares: how much of the model that is: `submodules` with an adapter or trained whole, of all candidates;
            `parameters` of these, of those of all candidates; and, where the whole model is known, `trainable`
            parameters, of all that the model has.
        details: for each name in `lora` its `kind`, `depth`, `score` and, if the blueprint has k*, `k_star_rank`: the
            rank at which an adapter has the share k* of the weight's parameters (eq. 15).
        alternatives: the next smaller and larger choices, each with `modules`, `time`, `gain_retained` and so on.

    Example:
        >>> from peft_blueprint import plan_placement
        >>> from peft_blueprint.testing import tiny_llama
        >>> placement = plan_placement(None, tiny_llama(), num_modules=2)
        >>> placement.lora
        ('model.layers.1.self_attn.q_proj', 'model.layers.3.self_attn.q_proj')
        >>> print(placement.summary())
        2 adapters of rank 32 of 28 candidates by even, spread over kind+depth; 7.14 % of submodules, 6.67 % of parameters
    """

    model_id: str
    lora: tuple[str, ...]
    unfreeze: tuple[str, ...]
    rank_by: str
    coverage: str
    selector: Mapping[str, float | str] = field(default_factory=dict)
    candidates: int = 0
    target_parameters: tuple[str, ...] = ()
    left_out: int = 0
    rank: int | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    learning_rate_scale: float | None = None
    gain_retained: float | None = None
    is_gain_measured: bool = True
    gain_per_cost: float | None = None
    notes: tuple[str, ...] = ()
    cost: Mapping[str, float] = field(default_factory=dict)
    full_training: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    alternatives: tuple[Mapping[str, float], ...] = ()

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The names in `lora` that are modules."""
        return tuple(name for name in self.lora if name not in self.target_parameters)

    def quantization_skip_modules(self, head: str = "lm_head") -> list[str]:
        """Return what `BitsAndBytesConfig(llm_int8_skip_modules=…)` needs so that blocks to unfreeze stay unquantized.

        The head is included because an explicit list replaces transformers' own, which has it.
        """
        return [head, *self.unfreeze]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        lists = {name: list(getattr(self, name)) for name in (*_NAME_LISTS, "alternatives")}
        return asdict(self) | lists | {name: dict(getattr(self, name)) for name in _MAPPINGS}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Placement:
        """Read the object that `to_dict` returns.

        Raises:
            PlacementError: if it is not a placement.
        """
        try:
            values = {"target_parameters": (), "notes": (), "alternatives": (), **data}
            return cls(**values | {name: tuple(values[name]) for name in (*_NAME_LISTS, "alternatives")})
        except (TypeError, KeyError) as error:
            raise PlacementError(
                f"This is not a placement: {error}. It has the keys {format_names(list(data))}."
            ) from error

    def summary(self) -> str:
        """Return one line: how many of how many, by which score, at which rank."""
        ranks = sorted({self.ranks.get(name, self.rank) for name in self.lora} - {None})  # type: ignore[type-var]
        rank = f" of rank {ranks[0]}" + f" to {ranks[-1]}" * (len(ranks) > 1) if ranks else ""
        adapted = [f"{len(self.lora)} adapters{rank}"] if self.lora else []
        adapted += [f"{len(self.unfreeze)} unfrozen modules"] if self.unfreeze else []
        spread = "not spread" if self.coverage == "none" else f"spread over {self.coverage}"
        shares = f"; {text}" if (text := self._shares()) else ""
        return f"{' and '.join(adapted)} of {self.candidates} candidates by {self.rank_by}, {spread}{shares}"

    def _shares(self) -> str:
        """Return k by submodules and by parameters: 20 % of submodules, 15.5 % of parameters."""
        return ", ".join(
            f"{_percent(self.shares[name])} of {name}" for name in ("submodules", "parameters") if name in self.shares
        )

    def __repr__(self) -> str:
        """One line: the model and the summary; `print` shows the tables, and `to_dict` all of it."""
        return f"<Placement for {self.model_id!r}: {self.summary()}>"

    def _repr_html_(self) -> str:
        """Show the tables in a notebook."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with a row for every adapter and unfrozen block.

        Raises:
            BlueprintError: without pandas.
        """
        adapters = [
            {"id": name, "as": "adapter", "rank": self.ranks.get(name, self.rank), **self.details.get(name, {})}
            for name in self.lora
        ]
        return data_frame([*adapters, *({"id": name, "as": "unfrozen"} for name in self.unfreeze)])

    def plot(self, blueprint: Any = None) -> Any:
        """Draw where adapters go, by layer and kind, see `publish.plot_placement`.

        Args:
            blueprint: that the placement was planned with, to shade every submodule by what it was chosen by.

        Returns:
            A matplotlib figure, which a notebook shows.
        """
        from ..publish import plot_placement  # a room above, as in Blueprint.plot

        return plot_placement(self, blueprint)

    def __str__(self) -> str:
        """Tables of the adapters by kind, and of the costs beside the next smaller and larger choices."""
        # in a notebook rich displays instead of writing to the file
        console = Console(
            file=io.StringIO(), width=119, force_jupyter=False, highlight=False, markup=False, emoji=False
        )
        console.print(f"{self.model_id}: {self.summary()}")
        console.print(self._kind_table())
        if self.cost:
            console.print(self._cost_table())
        if "trainable" in self.shares:
            console.print(f"Trains {_percent(self.shares['trainable'])} of the model's parameters.{self._saving()}")
        if self.learning_rate_scale is not None:
            console.print(
                f"Learning rate: {self.learning_rate_scale:.2f} times that of LoRA on every linear layer, at the same alpha / r."
            )
        if self.cost:
            console.print("Costs are predicted. The step time is a share of all-linear LoRA's.")
        if self.gain_per_cost is not None and "best" in self.selector:
            console.print(f"Gain per cost: {self.gain_per_cost:.2f} times that of all {self.candidates} candidates.")
        if self.cost and not self.is_gain_measured:
            console.print("No gain was measured: the coverage counts every submodule alike.")
        for note in self.notes:
            console.print(note)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def _saving(self) -> str:
        """Say how much optimizer state is saved, in the decimal GB of the paper's §5."""
        if not self.full_training.get("optimizer_state") or "optimizer_state" not in self.cost:
            return ""
        whole, own = self.full_training["optimizer_state"], self.cost["optimizer_state"]
        if own >= whole:  # adapters in float32 on a tiny model in bfloat16
            return f" Optimizer state: {_gigabytes(own)}."
        return (
            f" Optimizer state: {_gigabytes(own)}, {_gigabytes(whole - own)} less than for all "
            f"{format_quantity(self.full_training['parameters'], 'parameters')}."
        )

    def _kind_table(self) -> Table:
        table = Table()
        for column, justify in (("kind", "left"), ("layers", "left"), ("rank", "right"), ("adapters", "right")):
            table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
        by_kind: defaultdict[str, list[str]] = defaultdict(list)
        for name in self.lora:
            by_kind[str(self.details.get(name, {}).get("kind") or name.rpartition(".")[2])].append(name)
        for kind, names in by_kind.items():
            depths = sorted(d for name in names if (d := self.details.get(name, {}).get("depth")) is not None)
            ranks = sorted({self.ranks.get(name, self.rank) for name in names} - {None})  # type: ignore[type-var]
            rank = f"{ranks[0]}–{ranks[-1]}" if len(ranks) > 1 else "".join(map(str, ranks))
            table.add_row(kind, _format_ranges(depths), rank, str(len(names)))
        for name in self.unfreeze:
            table.add_row(name, "", "", "whole")
        return table

    def _cost_table(self) -> Table:
        table = Table()
        columns = {
            "memory": ("memory", lambda value: format_quantity(value, "B")),
            "time": ("step time", "{:.2f}".format),
            "optimizer_state": ("optimizer state", lambda value: format_quantity(value, "B")),
            "parameters": ("parameters", "{:,.0f}".format),
            "modules": ("modules", "{:.0f}".format),
            "lowest": ("lowest layer", "{:.0f}".format),
            "gain_retained": (
                "gain retained" if self.is_gain_measured else "coverage (gain not measured)",
                "{:.0%}".format,
            ),
        }
        for title in ("", *(title for title, _ in columns.values())):
            table.add_column(title, justify="right" if title else "left")
        rows = [("this one", {**self.cost, "gain_retained": self.gain_retained})]
        smaller = [("next smaller", row) for row in self.alternatives if row["modules"] < self.cost["modules"]]
        larger = [("next larger", row) for row in self.alternatives if row["modules"] >= self.cost["modules"]]
        for label, row in (*smaller, *rows, *larger):
            cells = ("" if row.get(key) is None else write(row[key]) for key, (_, write) in columns.items())
            table.add_row(label, *cells)
        return table


def _percent(share: float) -> str:
    """Format a share with three digits: 20 %, 15.5 %, 0.712 %."""
    return f"{100 * share:.3g} %"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.3g} GB" if value >= 1e8 else f"{value / 1e6:.3g} MB"


def _format_ranges(depths: list[int]) -> str:
    """Shorten sorted depths to ranges: 0-3 7 12."""
    ranges: list[list[int]] = []
    for depth in depths:
        if ranges and depth - ranges[-1][-1] <= 1:
            ranges[-1].append(depth)
        else:
            ranges.append([depth])
    return " ".join(
        f"{part[0]}-{part[-1]}" if part[-1] - part[0] > 1 else " ".join(map(str, dict.fromkeys(part)))
        for part in ranges
    )
