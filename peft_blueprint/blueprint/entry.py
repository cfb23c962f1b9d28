"""One entry of a blueprint: where a submodule is in the model, and how the gradient there behaves."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .._text import find_unprintable
from ..errors import BlueprintError, FormatError


Level = Literal["submodule", "group", "layer"]
Form = Literal["linear", "experts", "expert", "embedding", "convolution", "norm", "bias", "head", "parameter"]


ADAPTABLE = ("linear", "experts", "expert")  # the forms that an adapter is put on
_LEAST_DIMENSIONS = {"linear": 2, "experts": 3, "expert": 2}
_BY_TOKEN = ("embedding", "head", "bias")  # forms whose rows may be tokens or classes

Z95 = 1.959964  # half-width of a 95 % interval, in standard errors

# Far beyond any model, and small enough to compute with.
MAX_NAME = 1024  # characters of an id, kind, group or tag
MAX_BLOCKS = 4096
MAX_EXAMPLES = 10**12
MAX_ELEMENTS = 2**53  # of a shape; a double counts no further
MAX_DIMENSIONS = 16
MAX_ALIGNMENT = 64  # columns; 16 are measured
MAX_TAGS = 256
MAX_ALPHA = 100  # measured ones are near 1
MAX_NUMBER = 1e150  # sums of squares stay finite

_GROUP_ID = re.compile(r"(\w+\.)?(?:attn|cross_attn|ffn|other)\.(\d+)")
_LAYER_ID = re.compile(r"(?:\w+\.)?layer\.\d+")
_BLOCK_ID = re.compile(r"(?:\w+\.)?(?:attn|cross_attn|ffn|other|layer)\.(\d+)")


@dataclass(frozen=True)
class Submodule:
    """One entry: where it is in the model, and how the gradient there behaves. Unknown statistics are None.

    Args:
        name: full module name in the unwrapped model, `model.layers.3.self_attn.q_proj`; in a file the key is `id`.
            In a blueprint at group or layer level, `attn.3`, `cross_attn.3`, `ffn.3` or `layer.3`.
        gradient_norm: mean over examples of the L2 norm of the gradient of that example's mean token loss.
        kind: the role, `q_proj`; norms of different kinds are not comparable as they stand.
        depth: index of the transformer block, from 0 at the embeddings.
        group: the paper's coarser unit: `attn.3`, `cross_attn.3` or `ffn.3`, after the stack's name if a model has
            several, `decoder.cross_attn.3`.
        shape: (d_out, d_in) of a linear layer's weight, whatever way round or however quantized it is stored; of
            fused experts (experts, d_out, d_in), of one of them (d_out, d_in); of any other form the parameter's own.
        form: what it is: a linear layer; experts fused into one parameter, which PEFT knows as a target parameter, or
            one of these experts; or an embedding, convolution, norm, bias, output or classification head, or other
            parameter. Adapters are put on the first three.
        quantized: whether the weight was held in 4 or 8 bits when this was measured.
        median_norm: median over examples of the same norms.
        norm_interval: 95 % bootstrap interval of `gradient_norm` over examples. A sketch's own error, `norm_error` in
            the provenance, comes on top.
        signal_norm: norm of the mean gradient, estimated without bias (0.0 when the estimate of its square is
            negative).
        noise_scale: tr(Σ)/‖E g‖² in examples, McCandlish et al. 2018 (arXiv:1812.06162), appendix A.1.
        influence: ‖(F + λI)⁻¹ḡ‖, the size of the mean gradient preconditioned by the submodule's empirical Fisher matrix F
            (appendix B.3, eq. 24); λ in `Blueprint.influence`.
        influence_mismatch: ε = ‖ḡ − c·(F + λI)⁻¹ḡ‖ (eq. 25), c in `Blueprint.influence`.
        weight_norm: Frobenius norm of the weight.
        adam_gain: expected L1 norm of the gradient that one row of a standard-initialized LoRA A would give its B.
        weight_gradient: Σ|w·ḡ| over the weight's entries, how far to first order the loss moves if each were removed
            (SNIP's saliency, arXiv:1810.02340); estimated from norms of rows.
        prompt_share: share of the mean gradient that arrives through prompt positions, which answer-only adapters
            (activated LoRA, arXiv:2504.12397) leave out, in [0, 1].
        prompt_adam_share: share of `adam_gain` that answer-only adapters lose, in [0, 1].
        singular_energy: share of the mean gradient's energy in its 16 leading directions, in [0, 1].
        token_share: of an expert's weight: share of its layer's routing choices that fall on the expert, in [0, 1]; each
            token chooses top-k experts. Over all experts of a layer these sum to 1 (the token selection ratio of ESFT,
            arXiv:2407.01906).
        gate_weight: of an expert's weight: mean over tokens of the weight that the router gives the expert, zero for a
            token that does not choose it (ESFT's average gate score).
        alignment: the entry's row of a factor U of at most 16 columns. UUᵀ approximates Q = CCᵀ/B, where C[i, b] is
            how much example b's gradient in entry i agrees with the other examples' mean there. The first number is
            the mean over examples, an estimate of ‖E g‖² that may fall below zero; the others span the covariance.
            Rows of one measurement belong together. An aggregate over examples.
        alpha: rank-size exponent of the row norms of the mean gradient, the paper's α within this submodule.
        alpha_error: its standard error.
        gamma: 1 − α/(1 + α), appendix A.1.
        k_star: best fraction to update, eq. 15.
        examples: how many examples the norms are over.
        domain_tags: gradient norm on another domain's data over `gradient_norm`.
        extra: keys of a file that this version does not know, kept as they are.

    Example:
        >>> entry = Submodule("layers.0.self_attn.q_proj", 0.052, kind="q_proj", depth=0, group="attn.0", shape=(64, 32))
        >>> entry.parameters, entry.d_in
        (2048, 32)
    """

    name: str
    gradient_norm: float | None = None
    kind: str | None = None
    depth: int | None = None
    group: str | None = None
    shape: tuple[int, ...] | None = None
    form: Form = "linear"
    quantized: bool = False
    median_norm: float | None = None
    norm_interval: tuple[float, float] | None = None
    signal_norm: float | None = None
    noise_scale: float | None = None
    influence: float | None = None
    influence_mismatch: float | None = None
    weight_norm: float | None = None
    adam_gain: float | None = None
    weight_gradient: float | None = None
    prompt_share: float | None = None
    prompt_adam_share: float | None = None
    singular_energy: float | None = None
    token_share: float | None = None
    gate_weight: float | None = None
    alignment: tuple[float, ...] | None = None
    alpha: float | None = None
    alpha_error: float | None = None
    gamma: float | None = None
    k_star: float | None = None
    examples: int | None = None
    domain_tags: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def d_in(self) -> int:
        """Columns of the gradient as a matrix, the weight's last dimension; 1 for a vector."""
        return self.shape[-1] if self.shape is not None and len(self.shape) > 1 else 1

    def fits(self, shape: tuple[int, ...], in_any_order: bool = False) -> bool:
        """Return whether a model's weight of this shape may be this entry's; any may if the entry has no shape.

        Embeddings, heads and biases may have another number of rows, one for each token, class or position: no adapter
        goes there, and a resized vocabulary changes it.

        Args:
            shape: of the weight.
            in_any_order: whether its dimensions may be stored the other way round.

        Example:
            >>> Submodule("embed_tokens", shape=(97, 32), form="embedding").fits((128, 32))
            True
        """
        if self.shape is None or self.shape == shape:
            return True
        if self.form in _BY_TOKEN and len(self.shape) == len(shape) and self.shape[1:] == shape[1:]:
            return True
        return in_any_order and sorted(self.shape) == sorted(shape)

    @property
    def parameters(self) -> int | None:
        """Number of the weight's entries, or None without a shape."""
        return None if self.shape is None else math.prod(self.shape)

    @property
    def norm_error(self) -> float | None:
        """Standard error of `gradient_norm` implied by its interval, or None without one."""
        if self.norm_interval is None:
            return None
        return (self.norm_interval[1] - self.norm_interval[0]) / (2 * Z95)


NUMBERS = (
    "gradient_norm",
    "median_norm",
    "signal_norm",
    "noise_scale",
    "influence",
    "influence_mismatch",
    "weight_norm",
    "adam_gain",
    "weight_gradient",
    "prompt_share",
    "prompt_adam_share",
    "singular_energy",
    "token_share",
    "gate_weight",
    "alpha",
    "k_star",
    "alpha_error",
    "gamma",
)
_SHARES = ("gamma", "k_star", "prompt_share", "prompt_adam_share", "singular_energy", "token_share")  # at most 1
_POSITIVE = ("alpha", "gamma", "k_star")
_ROUNDING = 1e-6  # relative, of the bootstrap's sums


def norm_of(entry: Submodule) -> float:
    """Return the entry's gradient norm, which every entry of a `Blueprint` has.

    Example:
        >>> norm_of(Submodule("layers.0.q_proj", 1.5))
        1.5
    """
    assert entry.gradient_norm is not None
    return entry.gradient_norm


def score_of(entry: Submodule, by: str) -> float:
    """Return the statistic `by` of an entry.

    Raises:
        BlueprintError: if `by` is not a statistic, or the entry lacks it.

    Example:
        >>> score_of(Submodule("attn.0", gradient_norm=0.052), "gradient_norm")
        0.052
    """
    if by not in NUMBERS:
        raise BlueprintError(f"by must be one of {', '.join(NUMBERS)}, got {by!r}.")
    value = getattr(entry, by)
    if value is None:
        raise BlueprintError(
            f"{entry.name!r} has no {by}. Measure the blueprint again with generate_blueprint, or rank by "
            "gradient_norm."
        )
    return value


def level_of_ids(ids: Iterable[str]) -> Level:
    """Return the level of a blueprint from the form of its entries' ids."""
    ids = list(ids)
    if all(_GROUP_ID.fullmatch(i) for i in ids):
        return "group"
    if all(_LAYER_ID.fullmatch(i) for i in ids):
        return "layer"
    return "submodule"


def check_numbers(entry: Submodule, model_id: str) -> None:
    """Raise FormatError unless an entry has a norm, its numbers are finite and not negative, and sizes in bounds."""
    check_bounds(entry, model_id)
    where = f"{entry.name!r} in the blueprint of {model_id!r}"
    if entry.gradient_norm is None:
        raise FormatError(f"{where} has no gradient_norm; every entry needs one.")
    for name, value in _numbers_of(entry):
        most = 1 if name in _SHARES else MAX_ALPHA if name == "alpha" else MAX_NUMBER
        if value is None or (0 <= value <= most and (value > 0 or name not in _POSITIVE)):
            continue
        if not (math.isfinite(value) and value >= 0):
            raise FormatError(f"{where} has {name}={value}; it must be finite and not negative. Measure it again.")
        raise FormatError(
            f"{where} has {name}={value}; it must be {'positive and ' if name in _POSITIVE else ''}at most {most:g}. "
            "Measure it again."
        )
    wrong = next((value for value in entry.alignment or () if not abs(value) <= MAX_NUMBER), None)
    if wrong is not None:
        raise FormatError(
            f"{where} has {wrong} in its alignment; numbers must be finite, at most {MAX_NUMBER:g} in size. Measure it "
            "again."
        )
    if entry.norm_interval is not None:
        low, high = entry.norm_interval
        if low > high:
            raise FormatError(f"{where} has norm_interval={entry.norm_interval}; its lower end must come first.")
        if not low * (1 - _ROUNDING) <= entry.gradient_norm <= high * (1 + _ROUNDING):
            raise FormatError(
                f"{where} has gradient_norm={entry.gradient_norm} outside its norm_interval={entry.norm_interval}. "
                "Measure it again."
            )


def _numbers_of(entry: Submodule) -> Iterator[tuple[str, float | None]]:
    for name in NUMBERS:
        yield name, getattr(entry, name)
    for tag, value in entry.domain_tags.items():
        yield f"domain_tags[{tag!r}]", value
    for i, value in enumerate(entry.norm_interval or ()):
        yield f"norm_interval[{i}]", value


def check_bounds(entry: Submodule, model_id: str) -> None:
    """Raise FormatError unless an entry's names can be printed and its counts and sizes are in bounds."""
    check_text(entry.name, "the id")
    where = f"{entry.name!r} in the blueprint of {model_id!r}"
    if not entry.name or "\\" in entry.name or entry.name.startswith("/") or ".." in entry.name.split("/"):
        raise FormatError(
            f"{where} is not the name of a submodule: it is empty or a path. Give the module's name, such as "
            "model.layers.3.self_attn.q_proj."
        )
    for name in (entry.kind, entry.group, *entry.domain_tags):
        if name is not None:
            check_text(name, f"a kind, group or tag of {where}")
    for what, value, most in (("depth", entry.depth, MAX_BLOCKS - 1), ("examples", entry.examples, MAX_EXAMPLES)):
        if value is not None and not 0 <= value <= most:
            raise FormatError(f"{where} has {what}={value}; it must be from 0 to {most:,}. Measure it again.")
    for what, count, most in (
        ("dimensions in its shape", len(entry.shape or ()), MAX_DIMENSIONS),
        ("numbers in its alignment", len(entry.alignment or ()), MAX_ALIGNMENT),
        ("domain_tags", len(entry.domain_tags), MAX_TAGS),
    ):
        if count > most:
            raise FormatError(f"{where} has {count:,} {what}; at most {most} are read. Leave the others out.")
    for what, name in (("group", entry.group), ("id", entry.name)):
        block = _BLOCK_ID.fullmatch(name or "")
        if block is not None and entry.depth is not None and int(block[1][:9]) != entry.depth:
            raise FormatError(
                f"{where} has depth={entry.depth}, and its {what} is {name!r}; they must agree. Measure it again."
            )
    if entry.shape and (min(entry.shape) < 1 or math.prod(entry.shape) > MAX_ELEMENTS):
        raise FormatError(
            f"{where} has shape={str(entry.shape)[:60]}; dimensions are at least 1, and their product at most 2**53. Measure it "
            "again."
        )
    if entry.shape is not None and len(entry.shape) < _LEAST_DIMENSIONS.get(entry.form, 0):
        raise FormatError(
            f"{where} has shape={entry.shape}; its form {entry.form!r} needs {_LEAST_DIMENSIONS[entry.form]} dimensions or "
            "more. Measure it again."
        )


def check_text(text: str, what: str, limit: int = MAX_NAME) -> None:
    """Raise FormatError if a name is too long or holds control characters, which a terminal would obey."""
    if len(text) > limit:
        raise FormatError(
            f"{what} {text[:40]!r}… has {len(text):,} characters; at most {limit:,} are read. Shorten it."
        )
    if found := find_unprintable(text):
        shown = ascii(text if len(text) <= 80 else text[:80] + "…")
        raise FormatError(f"{what} {shown} holds the control character U+{ord(found):04X}. Take it out.")


def unit_of(entry: Submodule, level: Level) -> str:
    """Return the id of the entry's group or layer, or its own name where it belongs to none.

    Example:
        >>> unit_of(Submodule("layers.0.q_proj", 1.5, depth=0, group="attn.0"), "group")
        'attn.0'
    """
    if level == "group" and entry.group is not None:
        return entry.group
    if level == "layer":
        group = _GROUP_ID.fullmatch(entry.group or entry.name)  # the paper's entries have no group beside their id
        if group is not None:
            return f"{group[1] or ''}layer.{group[2]}"
        if entry.depth is not None:
            return f"layer.{entry.depth}"
    return entry.name
