"""The blueprint: how strongly each submodule of one model is moved by data of one kind, and the arithmetic on it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from numbers import Real
from pathlib import Path
from typing import Any

from .._text import data_frame, format_names, html_table
from ..errors import BlueprintError, FormatError, MismatchError
from .coarsening import coarse_entry
from .entry import Z95, Level, Submodule, check_numbers, norm_of, score_of, unit_of
from .experts import split_expert
from .formats import SUFFIXES, file_name, read_record, write_record
from .model_files import read_embedded
from .schema import DIGEST, fields_of, record_of


@dataclass(frozen=True)
class Blueprint:
    """Gradient norms of a model's submodules, with their statistics and provenance.

    Args:
        model_id: the model, as on the Hub.
        submodules: the entries, in the model's order; a file calls them `layers`.
        training_checkpoint: share of the model's own training that was done, (0, 1]; 1 for a finished model.
        level: whether an entry is a submodule, a group or a layer.
        model_revision: commit of the model, when known.
        model_digest: `sha256:…` over the names and shapes of the linear submodules; binds the record to the model.
        concentration: distribution of the norms over submodules: the measured retained-mass curve, `gamma_fit` with
            its residual, α with its standard error.
        influence: how well gradient norms stand for the Fisher-preconditioned influence (appendix B.3): the damping λ in
            mean eigenvalues, the scale c, rank correlations of the two rankings, and at several fractions the bound of
            eq. 26 and the loss itself, as shares of all influence.
        costs: fixed and variable cost behind `k_star`, and their unit.
        provenance: command, data, versions, seed and so on of the measurement.
        extra: keys of a file that this version does not know, kept unchanged.

    Raises:
        FormatError: for no entries, a name twice, a checkpoint outside (0, 1], or a number that is missing, negative,
            infinite or NaN.

    Example:
        >>> blueprint = Blueprint("org/model", (Submodule("layers.0.q_proj", 3.0), Submodule("layers.0.v_proj", 1.0)))
        >>> blueprint
        <Blueprint of 'org/model': 2 submodules>
        >>> max(blueprint, key=lambda entry: entry.gradient_norm).name, blueprint["layers.0.v_proj"].gradient_norm
        ('layers.0.q_proj', 1.0)
        >>> Blueprint.from_pretrained(blueprint.save("blueprint.json")) == blueprint
        True
    """

    model_id: str
    submodules: tuple[Submodule, ...]
    training_checkpoint: float = 1.0
    level: Level = "submodule"
    model_revision: str | None = None
    model_digest: str | None = None
    concentration: Mapping[str, Any] = field(default_factory=dict)
    influence: Mapping[str, Any] = field(default_factory=dict)
    costs: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.submodules:
            raise FormatError(f"The blueprint of {self.model_id!r} has no entries; it needs at least one.")
        if not 0 < self.training_checkpoint <= 1:
            raise FormatError(
                f"training_checkpoint of {self.model_id!r} must be in (0, 1], got {self.training_checkpoint}."
            )
        seen: set[str] = set()
        for entry in self.submodules:
            if entry.name in seen:
                raise FormatError(f"The blueprint of {self.model_id!r} names {entry.name!r} twice; keep one entry.")
            seen.add(entry.name)
            check_numbers(entry, self.model_id)

    def __len__(self) -> int:
        return len(self.submodules)

    def __iter__(self) -> Iterator[Submodule]:
        return iter(self.submodules)

    def __getitem__(self, name: str) -> Submodule:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Submodule]:
        return {entry.name: entry for entry in self.submodules}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the entries, in order."""
        return tuple(entry.name for entry in self.submodules)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        domain: str | None = None,
        checkpoint: float | None = None,
        **kwargs: Any,
    ) -> Blueprint:
        """Read a blueprint from a file, a folder, or a repository on the Hub, where it costs one request and no tensor.

        A source that exists on disk, or ends in `.json`, `.csv` or `.safetensors`, is a path; any other is a
        repository.

        Args:
            source: path or repository id.
            revision: branch, tag or commit, for a repository.
            subfolder: folder within the repository, or below the path.
            domain: read the blueprint of this kind of data among several side by side, see `file_name`.
            checkpoint: likewise, the share of the training that was done, (0, 1].
            **kwargs: for `huggingface_hub.hf_hub_download`: `token`, `cache_dir`, `local_files_only`, `endpoint`, ….

        Raises:
            FormatError: if the file is not a blueprint.
            BlueprintError: if there is none, with the reason and a fix.
        """
        name = file_name(domain, checkpoint)
        if Path(source).exists() or Path(source).suffix in SUFFIXES:
            return from_dict(*read_record(Path(source, subfolder or ""), name))
        from .hub import fetch  # importing the Hub's client takes 0.2 s, which reading a file does not need

        return from_dict(*fetch(str(source), name, revision=revision, subfolder=subfolder, **kwargs))

    def save(self, path: str | Path) -> Path:
        """Write CSV, safetensors or JSON, as the suffix of `path` says; `blueprint.json` into a folder.

        Returns the file, which is replaced atomically.
        """
        return write_record(to_dict(self), path)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Publish to a repository on the Hub in one commit, with a section of its model card.

        Args:
            repo_id: the model's own repository, or one of blueprints alone.
            **kwargs: `domain`, `checkpoint`, `create_pr`, `dry_run`, `token`, …, see `publish.publish`.

        Returns:
            The URL of the commit or pull request; with `dry_run` the content of the commit.
        """
        from ..publish import publish  # the one import of a room above

        return publish(self, repo_id, **kwargs)

    def __repr__(self) -> str:
        """One line: the model, the number of entries and their level; `to_dict` has all of it."""
        return f"<Blueprint of {self.model_id!r}: {len(self.submodules)} {self.level}s>"

    def _repr_html_(self) -> str:
        """Show the entries of largest norm in a notebook."""
        columns = ("kind", "depth", "gradient_norm", "adam_gain", "alpha", "k_star")
        entries = sorted(self.submodules, key=lambda entry: -(entry.gradient_norm or 0.0))
        rows = [{"id": e.name} | {c: v for c in columns if (v := getattr(e, c)) is not None} for e in entries]
        return html_table(repr(self)[1:-1], rows)

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with a row for every entry and a column for every statistic.

        Raises:
            BlueprintError: without pandas.

        Example:
            >>> Blueprint("org/model", (Submodule("attn.0", 0.052),), level="group").to_pandas().to_dict("records")
            [{'id': 'attn.0', 'gradient_norm': 0.052}]
        """
        return data_frame(to_dict(self)["layers"])

    def plot(self, placement: Any = None, by: str | None = None) -> Any:
        """Draw the entries by layer and kind, see `publish.plot_blueprint`.

        Returns:
            A matplotlib figure, which a notebook shows.
        """
        from ..publish import plot_blueprint  # a room above, as in push_to_hub

        return plot_blueprint(self, placement, by)

    @property
    def digest(self) -> str:
        """`sha256:…` over the content, the same in every file that holds all of it."""
        return str(to_dict(self)[DIGEST])

    def expand(self, submodules: Sequence[Submodule]) -> Blueprint:
        """Expand a group- or layer-level blueprint to submodules; return others unchanged.

        Each of the n submodules in a group or layer has its gradient norm over √n, and its L1 norms and alignments
        over n, so that coarsening restores the original. Exponents and ratios of equal shares are those of the whole.
        The concentration, which is over groups or layers, and unknown keys are dropped.

        Args:
            submodules: of the model, `find_submodules(model)`.

        Raises:
            MismatchError: if an entry matches no submodule.

        Example:
            >>> coarse = Blueprint("org/model", (Submodule("attn.0", 2.0),), level="group")
            >>> members = [Submodule(f"layers.0.{name}_proj", group="attn.0") for name in "qkvo"]
            >>> [(entry.name, entry.gradient_norm) for entry in coarse.expand(members)][:2]
            [('layers.0.q_proj', 1.0), ('layers.0.k_proj', 1.0)]
        """
        if self.level == "submodule":
            return self
        members: dict[str, list[Submodule]] = {}
        for submodule in submodules:
            members.setdefault(unit_of(submodule, self.level), []).append(submodule)
        missing = [entry.name for entry in self.submodules if entry.name not in members]
        if missing:
            raise MismatchError(
                f"The blueprint of {self.model_id!r} names {format_names(missing)}, and the model has "
                f"{format_names(sorted(members)) if members else 'no such groups'}. Use a blueprint of this model."
            )
        expanded = tuple(
            _even_share(entry, member, len(members[entry.name]))
            for entry in self.submodules
            for member in members[entry.name]
        )
        return _derived([self], "expand", expanded, level="submodule")

    def coarsen(self, level: Level) -> Blueprint:
        """Sum the entries up to groups or layers.

        The gradient norm of a group or layer is the root of its members' summed squares, the norm of their
        concatenated gradients: exact for one example, a lower bound for the mean over examples, because the norm of a
        mean is at most the mean of the norms (`generate_blueprint(level="group")` measures that mean itself). Signal,
        weight and influence norms add alike, and noise scales and tags follow from them. L1 norms (`adam_gain`,
        `weight_gradient`) and alignments, which are inner products, add.

        The ends of the interval are the roots of the members' summed squared ends. It is the 95 % interval if all
        members' norms rise and fall together from example to example, and too wide otherwise. α is fitted to the rows
        of all members, each by its own law (`pooled_alpha`); γ and k* follow from it and the costs. All other
        statistics and the concentration are dropped; `provenance["derived"]` names them.

        Raises:
            MismatchError: if the entries do not say which group or layer they belong to, as for a finer level.

        Example:
            >>> entries = (Submodule("q_proj", 3.0, group="attn.0"), Submodule("k_proj", 4.0, group="attn.0"))
            >>> Blueprint("org/model", entries).coarsen("group")["attn.0"].gradient_norm
            5.0
        """
        if level == self.level:
            return self
        units: dict[str, list[Submodule]] = {}
        for entry in self.submodules:
            units.setdefault(unit_of(entry, level), []).append(entry)
        if tuple(units) == self.names:
            raise MismatchError(
                f"The entries of the blueprint of {self.model_id!r} ({format_names(self.names)}) do not say which {level} "
                "they belong to. Expand it onto the model first, or measure it again with generate_blueprint."
            )
        coarse = [
            members[0] if members[0].name == name else coarse_entry(name, members, level, self.costs)  # in no group
            for name, members in units.items()
        ]
        return _derived([self], "coarsen", coarse, level=level)

    def join_experts(self) -> Blueprint:
        """Sum the entries of single experts up to those of their fused parameters, `…experts.gate_up_proj`.

        Statistics add as in `coarsen`. Entries of linear layers stay, and so do experts in lists of modules.

        Example:
            >>> names = ("mlp.experts.0.up_proj", "mlp.experts.1.up_proj")
            >>> entries = [Submodule(name, n, shape=(4, 2), form="expert") for name, n in zip(names, (3.0, 4.0))]
            >>> joined = Blueprint("org/model", tuple(entries)).join_experts()["mlp.experts.up_proj"]
            >>> joined.gradient_norm, joined.shape
            (5.0, (2, 4, 2))
        """
        units: dict[str, list[Submodule]] = {}
        for entry in self.submodules:
            expert = split_expert(entry.name) if entry.form == "expert" else None
            units.setdefault(entry.name if expert is None else expert.parameter, []).append(entry)
        if tuple(units) == self.names:
            return self
        joined = [
            members[0] if members[0].name == name else _joined(name, members, self.costs)
            for name, members in units.items()
        ]
        return _derived([self], "join_experts", joined)

    def for_domain(self, domain: str | Mapping[str, float]) -> Blueprint:
        """Return the blueprint of another domain, or of a mixture of domains, by the entries' `domain_tags`.

        A domain's gradient norm is the entry's own times its tag, G·t. That of a mixture is Σ w·G·t over its domains,
        the mean over examples drawn from them with these weights. Statistics of the first domain are dropped: all but
        the gradient's and the weight's norm, and the concentration. `provenance["derived"]` names them, and
        `provenance["domains"]` keeps these domains alone. The first domain itself keeps all of its statistics.

        Args:
            domain: a tag; or weights by tag, above zero, which are divided by their sum, also as text: "math=1,code=3".

        Raises:
            MismatchError: if an entry has no such tag.
            BlueprintError: for no weight, or one that is not a positive number.

        Example:
            >>> entry = Submodule("attn.0", 0.5, domain_tags={"general": 1.0, "law": 2.0})
            >>> blueprint = Blueprint("org/model", (entry,), level="group")
            >>> blueprint.for_domain("law")["attn.0"].gradient_norm
            1.0
            >>> blueprint.for_domain({"general": 3, "law": 1})["attn.0"].gradient_norm
            0.625
        """
        weights = domain_weights(domain)
        for tag in weights:
            missing = [entry.name for entry in self.submodules if tag not in entry.domain_tags]
            if missing:
                known = sorted({t for entry in self.submodules for t in entry.domain_tags})
                raise MismatchError(
                    f"{format_names(missing)} have no domain tag {tag!r}; the blueprint's tags are {known}."
                )
        provenance = _of_domains(self.provenance, tuple(weights))
        [first, *others] = weights
        is_first = _reference_of(self.provenance) == first and all(e.domain_tags[first] == 1 for e in self.submodules)
        if is_first and not others:
            return replace(self, provenance=provenance)
        if others:
            provenance["domain_weights"] = weights
        examples = None if others else provenance.get("domains", {}).get(first, {}).get("examples")
        weighted = []
        for entry in self.submodules:
            share = math.fsum(weight * entry.domain_tags[tag] for tag, weight in weights.items())
            weighted.append(
                _without_statistics(
                    entry,
                    gradient_norm=norm_of(entry) * share,
                    domain_tags={tag: entry.domain_tags[tag] / share if share else 1.0 for tag in weights},
                    examples=examples if type(examples) is int else None,
                )
            )
        return _derived([self], "for_domain", weighted, provenance=provenance)

    def blend(
        self, local: Blueprint, weight: float = 0.5, *, by_uncertainty: bool = False, rescale: bool = True
    ) -> Blueprint:
        """Blend this blueprint's norms with a local probe's: G' = weight·Ḡ + (1 − weight)·G̃ (Algorithm 1, line 2).

        The probe is first scaled by the ratio of the geometric means, unless `rescale=False` asks for the paper's plain
        sum. The size of the whole gradient depends on the loss, the sequence length and the data, and carries no
        information about where to adapt. The geometric mean keeps a few large norms from setting the scale. `adam_gain` and `weight_gradient` are blended the same way
        where all entries of both have them. Tags are this blueprint's, over the blended norm. All other statistics and
        the concentration are dropped, at every weight; `provenance["derived"]` names them.

        Args:
            local: the probe; the same submodules, in any order.
            weight: of this blueprint, in [0, 1]: 1 ignores the probe, 0 keeps only its shape.
            by_uncertainty: weight each entry also by the inverse variance of its two norms, so that a norm with a wide
                interval counts less. Entries without intervals keep `weight`.
            rescale: bring the probe to this blueprint's size first.

        Raises:
            BlueprintError: for a weight outside [0, 1].
            MismatchError: if the two do not name the same submodules.

        Example:
            >>> published = Blueprint("org/model", (Submodule("a", 1.0), Submodule("b", 4.0)))
            >>> probe = Blueprint("org/model", (Submodule("a", 20.0), Submodule("b", 20.0)))
            >>> [round(entry.gradient_norm, 3) for entry in published.blend(probe, 0.5)]
            [1.5, 3.0]
            >>> [entry.gradient_norm for entry in published.blend(probe, 0.5, rescale=False)]
            [10.5, 12.0]
        """
        if not 0 <= weight <= 1:
            raise BlueprintError(f"weight must be in [0, 1], got {weight}.")
        require_same_names(self, local, "blended")
        others = {entry.name: entry for entry in local.submodules}
        scale = _common_scale(self.submodules, others, norm_of) if rescale else 1.0
        gain_scales = {
            by: _common_scale(self.submodules, others, partial(score_of, by=by)) if rescale else 1.0
            for by in ("adam_gain", "weight_gradient")
            if all(getattr(entry, by) is not None for entry in (*self.submodules, *local.submodules))
        }

        blended = []
        for mine in self.submodules:
            other = others[mine.name]
            w = _inverse_variance(weight, mine, other, scale) if by_uncertainty else weight
            norm = w * norm_of(mine) + (1 - w) * scale * norm_of(other)
            gains = {
                by: w * score_of(mine, by) + (1 - w) * gain_scale * score_of(other, by)
                for by, gain_scale in gain_scales.items()
            }
            interval = None
            if mine.norm_error is not None and other.norm_error is not None:
                half = Z95 * math.hypot(w * mine.norm_error, (1 - w) * scale * other.norm_error)
                interval = (max(0.0, norm - half), norm + half)
            tags = {tag: value * norm_of(mine) / norm for tag, value in mine.domain_tags.items()} if norm else {}
            blended.append(
                _without_statistics(mine, gradient_norm=norm, norm_interval=interval, domain_tags=tags, **gains)
            )
        history = {"weight": weight, "by_uncertainty": by_uncertainty, "scale": scale, "with": dict(local.provenance)}
        return _derived([self, local], "blend", blended, provenance={**self.provenance, "blend": history})

    @staticmethod
    def merge(blueprints: Sequence[Blueprint]) -> Blueprint:
        """Merge blueprints of the same model, weighted by their numbers of examples.

        Mean norms merge exactly, and their standard errors add in squares. Tags merge where every blueprint has them.
        Medians, signal norms, gains, alignments, exponents and the concentration do not follow from summaries and are
        dropped (`Influence.merge` has them); `provenance["derived"]` names them.

        Raises:
            MismatchError: if models, checkpoints or submodules differ, or an entry has no number of examples.

        Example:
            >>> few = Blueprint("org/model", (Submodule("attn.0", 1.0, examples=8),), level="group")
            >>> many = Blueprint("org/model", (Submodule("attn.0", 2.0, examples=24),), level="group")
            >>> Blueprint.merge([few, many])["attn.0"].gradient_norm
            1.75
        """
        if not blueprints:
            raise BlueprintError("Nothing to merge: give at least one blueprint.")
        first = blueprints[0]
        for other in blueprints[1:]:
            for what in ("model_id", "training_checkpoint", "model_digest", "level"):
                if getattr(first, what) != getattr(other, what):
                    raise MismatchError(
                        f"Blueprints of different {what} do not merge: {getattr(first, what)!r} and "
                        f"{getattr(other, what)!r}. Aggregate them into one table instead."
                    )
            require_same_names(first, other, "merged")
        by_name = [{entry.name: entry for entry in blueprint} for blueprint in blueprints]
        merged = [_merge_entries([of[entry.name] for of in by_name]) for entry in first.submodules]
        return _derived(
            blueprints,
            "merge",
            merged,
            model_revision=_common([b.model_revision for b in blueprints if b.model_revision] or [None]),
            provenance={"merged": [dict(b.provenance) for b in blueprints]},
        )

    def ranks(self, by: str = "gradient_norm") -> dict[str, int]:
        """Return the rank of every entry within its kind, 1 for the largest."""
        by_kind: dict[str | None, list[Submodule]] = {}
        for entry in self.submodules:
            by_kind.setdefault(entry.kind, []).append(entry)
        return {
            entry.name: rank
            for members in by_kind.values()
            for rank, entry in enumerate(sorted(members, key=lambda e: -score_of(e, by)), start=1)
        }


def _joined(name: str, members: Sequence[Submodule], costs: Mapping[str, Any]) -> Submodule:
    """Return the entry of a fused parameter from those of its experts."""
    first = members[0]
    return replace(
        coarse_entry(name, members, "group", costs),
        kind=first.kind,
        group=first.group,
        shape=None if first.shape is None else (len(members), *first.shape),
        form="experts",
    )


def to_dict(blueprint: Blueprint) -> dict[str, Any]:
    """Return a blueprint's record: the JSON object of its file, with its digest.

    Example:
        >>> to_dict(Blueprint("org/model", (Submodule("attn.0", 0.052),), level="group"))["layers"]
        [{'id': 'attn.0', 'gradient_norm': 0.052}]
    """
    return record_of(vars(blueprint))


def from_dict(record: Any, source: str | None = None) -> Blueprint:
    """Return the blueprint of a record, all keys checked.

    Args:
        record: JSON object.
        source: file named in error messages.

    Raises:
        FormatError: naming the key or entry that is wrong.

    Example:
        >>> from_dict({"model_id": "org/model", "layers": [{"id": "attn.0", "gradient_norm": 0.052}]}).level
        'group'
    """
    try:
        return Blueprint(**fields_of(record))
    except FormatError as error:
        raise error if source is None else FormatError(f"{source}: {error}") from error


def extract(path: str | Path) -> Blueprint:
    """Read the blueprint in a model's own files: in the header of its safetensors, or in its index.

    Args:
        path: folder of the model, `.safetensors` file or index.

    Raises:
        BlueprintError: if there is none, or a file is missing.
        FormatError: if it is not a blueprint.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from peft_blueprint.publish import embed
        >>> from peft_blueprint.testing import save_tiny_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = save_tiny_model(Path(folder) / "model")
        ...     blueprint = Blueprint("org/m", (Submodule("model.layers.0.mlp.up_proj", 1.0),))
        ...     written = embed(blueprint, model, progress=False)
        ...     extract(model).names
        ('model.layers.0.mlp.up_proj',)
    """
    return from_dict(*read_embedded(path))


def require_same_names(a: Blueprint, b: Blueprint, verb: str) -> None:
    """Raise MismatchError, with the names missing on each side, unless two blueprints name the same entries.

    Example:
        >>> one = Blueprint("org/model", (Submodule("layers.0.q_proj", 1.0),))
        >>> require_same_names(one, one, "compared")
    """
    only_a = [n for n in a.names if n not in set(b.names)]
    only_b = [n for n in b.names if n not in set(a.names)]
    if only_a or only_b:
        raise MismatchError(
            f"These blueprints cannot be {verb}: {format_names(only_a) or 'nothing'} only in that of {a.model_id!r}, "
            f"{format_names(only_b) or 'nothing'} only in that of {b.model_id!r}. Measure both on the same model, or bring "
            "them to one level with expand() or coarsen()."
        )


# fields that describe the model, independent of the data
_OF_THE_MODEL = ("name", "kind", "depth", "group", "shape", "form", "quantized", "weight_norm")


def _without_statistics(entry: Submodule, **known: Any) -> Submodule:
    """Return an entry of the same submodule with the given statistics of the data and no others."""
    return Submodule(**{key: getattr(entry, key) for key in _OF_THE_MODEL} | known)


def _derived(sources: Sequence[Blueprint], by: str, entries: Sequence[Submodule], **changes: Any) -> Blueprint:
    """Return the first source with other entries, without the statistics of the whole, which were of the old entries.

    The provenance names the operation and the statistics that were dropped.
    """
    first = sources[0]
    names = [f.name for f in fields(Submodule)]
    known = {name for source in sources for entry in source for name in names if getattr(entry, name)}
    kept = {name for entry in entries for name in names if getattr(entry, name)}
    dropped = [name for name in names if name in known - kept]
    dropped += [
        name for name in ("concentration", "influence", "extra") if any(getattr(source, name) for source in sources)
    ]
    provenance = {key: value for key, value in changes.pop("provenance", first.provenance).items() if key != "rounded"}
    derived = provenance.get("derived")
    steps = [*(derived if isinstance(derived, list) else ()), {"by": by, "dropped": dropped}]
    return replace(
        first,
        submodules=tuple(entries),
        concentration={},
        influence={},
        costs={key: value for key, value in first.costs.items() if not key.startswith("k_star")}  # of the old whole
        if "k_star" in kept
        else {},
        extra={},
        provenance={**provenance, "derived": steps},
        **changes,
    )


def domain_weights(domain: str | Mapping[str, float]) -> dict[str, float]:
    """Return the weights of a domain, or of a mixture, by tag; they sum to 1.

    Args:
        domain: a tag; weights by tag; or such weights as text, "math=1,code=3".

    Raises:
        BlueprintError: for no weight, or one that is not a positive number.

    Example:
        >>> domain_weights({"math": 1, "code": 3}), domain_weights("math=1,code=3"), domain_weights("math")
        ({'math': 0.25, 'code': 0.75}, {'math': 0.25, 'code': 0.75}, {'math': 1.0})
    """
    weights: Any = domain
    if isinstance(domain, str):
        weights = _parsed_weights(domain) if "=" in domain else {domain: 1.0}
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(tag, str) for tag in weights):
        raise BlueprintError(
            f"domain must be a tag such as 'math', or weights by tag such as {{'math': 0.5, 'code': 0.5}}, got {domain!r}."
        )
    for tag, weight in weights.items():
        is_number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not is_number or not 0 < weight < math.inf:
            raise BlueprintError(f"The weight of domain {tag!r} must be a positive number, got {weight!r}.")
    total = math.fsum(weights.values())
    return {tag: weight / total for tag, weight in weights.items()}


def _parsed_weights(text: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for item in text.split(","):
        tag, _, weight = (part.strip() for part in item.partition("="))
        try:
            if not tag or tag in weights:
                raise ValueError
            weights[tag] = float(weight)
        except ValueError:
            raise BlueprintError(
                f"domain must be a tag, or weights of different tags such as math=0.5,code=0.5, got {text!r}."
            ) from None
    return weights


def _of_domains(provenance: Mapping[str, Any], tags: Sequence[str]) -> dict[str, Any]:
    """Return a provenance with some of its domains alone, also in the parts of a merged one."""
    found = dict(provenance)
    domains, parts = found.get("domains"), found.get("merged")
    if isinstance(domains, Mapping):
        found["domains"] = {tag: domains[tag] for tag in tags if isinstance(domains.get(tag), Mapping)}
    else:
        found.pop("domains", None)
    if isinstance(parts, list):
        found["merged"] = [_of_domains(part, tags) for part in parts if isinstance(part, Mapping)]
    return found


def _reference_of(provenance: Mapping[str, Any]) -> str | None:
    """Return the domain that the statistics are of; None for a blend, a merged blueprint and where it is unknown."""
    domains = provenance.get("domains")
    if not isinstance(domains, Mapping) or not domains or provenance.keys() & {"merged", "blend", "domain_weights"}:
        return None
    return next((tag for tag in domains if isinstance(tag, str)), None)


def _even_share(unit: Submodule, member: Submodule, count: int) -> Submodule:
    """Return `member` with its share of the statistics of a group or layer of `count` members."""

    def share(value: float | None, of: float) -> float | None:
        return None if value is None else value / of

    root = math.sqrt(count)
    interval = unit.norm_interval
    return replace(
        _without_statistics(member, weight_norm=None),
        gradient_norm=norm_of(unit) / root,
        norm_interval=None if interval is None else (interval[0] / root, interval[1] / root),
        median_norm=share(unit.median_norm, root),
        signal_norm=share(unit.signal_norm, root),
        influence=share(unit.influence, root),
        influence_mismatch=share(unit.influence_mismatch, root),
        adam_gain=share(unit.adam_gain, count),
        weight_gradient=share(unit.weight_gradient, count),
        alignment=None if unit.alignment is None else tuple(value / count for value in unit.alignment),
        **{key: getattr(unit, key) for key in _SAME_FOR_EQUAL_SHARES},
    )


_SAME_FOR_EQUAL_SHARES = ("noise_scale", "alpha", "alpha_error", "gamma", "k_star", "examples", "domain_tags")


def _common(values: Sequence[Any]) -> Any:
    """Return the value that all have, otherwise None."""
    return values[0] if all(value == values[0] for value in values) else None


def _common_scale(
    mine: Sequence[Submodule], others: Mapping[str, Submodule], value: Callable[[Submodule], float]
) -> float:
    """Return the ratio of two blueprints' geometric means of a statistic."""
    pairs = [(value(m), value(others[m.name])) for m in mine]
    logs = [math.log(a / b) for a, b in pairs if a > 0 and b > 0]
    return math.exp(statistics.fmean(logs)) if logs else 1.0


def _inverse_variance(weight: float, mine: Submodule, other: Submodule, scale: float) -> float:
    """Return `weight` adjusted by the inverse variances of the two norms; `weight` itself where one is unknown."""
    if not mine.norm_error or not other.norm_error:
        return weight
    precision, other_precision = weight / mine.norm_error**2, (1 - weight) / (scale * other.norm_error) ** 2
    return precision / (precision + other_precision)


def _merge_entries(entries: Sequence[Submodule]) -> Submodule:
    """Merge entries of the same submodule, weighted by their numbers of examples."""
    counts = [entry.examples for entry in entries]
    if any(not count for count in counts):
        raise MismatchError(f"{entries[0].name!r} has no number of examples, so it cannot be merged.")
    total = sum(count or 0 for count in counts)
    shares = [(count or 0) / total for count in counts]
    norm = math.fsum(share * norm_of(entry) for share, entry in zip(shares, entries, strict=True))
    errors = [entry.norm_error for entry in entries]
    interval = None
    if all(error is not None for error in errors):
        half = Z95 * math.hypot(*(share * (error or 0.0) for share, error in zip(shares, errors, strict=True)))
        interval = (max(0.0, norm - half), norm + half)
    tags = set.intersection(*(set(entry.domain_tags) for entry in entries))
    return _without_statistics(
        entries[0],
        gradient_norm=norm,
        norm_interval=interval,
        examples=total,
        domain_tags={
            tag: math.fsum(s * norm_of(e) * e.domain_tags[tag] for s, e in zip(shares, entries, strict=True)) / norm
            if norm
            else entries[0].domain_tags[tag]
            for tag in sorted(tags)
        },
        weight_norm=_common([entry.weight_norm for entry in entries]),
    )
