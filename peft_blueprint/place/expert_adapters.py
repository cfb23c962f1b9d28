"""LoRA on chosen experts of a fused parameter: PEFT's adapter, with slices for the chosen experts only."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import peft
import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from ..errors import PlacementError
from .expert_weights import ExpertStack, LowRank, UpdatedMatrix, standing_in


class ParamWrapper(lora.ParamWrapper):
    """PEFT's adapter of a fused parameter (experts, …), which holds and trains the slices of chosen experts alone.

    PEFT's own has lora_A (r·experts, d_in) and lora_B (d_out, r·experts). Here `experts` counts the chosen ones, in
    memory, in gradients and in the optimizer. A state dict has PEFT's form, with zeros for the other experts, so that
    plain PEFT loads and merges it; and such a state dict can be loaded. The name is PEFT's because PEFT compares it.

    Args:
        base_layer: module that holds the parameter, or another adapter on it.
        adapter_name: PEFT's name of the adapter.
        parameter_name: the parameter's own name, `gate_up_proj`.
        config: `LoraConfig`; a `BlueprintConfig` tells the chosen experts, any other chooses all.
        **kwargs: as PEFT gives them; `target_name` is the parameter's full name.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig, **kwargs: Any
    ):
        vars(self).update(chosen={}, full_name=kwargs["target_name"])  # before nn.Module's own attributes exist
        super().__init__(base_layer, adapter_name, parameter_name=parameter_name, config=config, **kwargs)

    chosen: dict[str, tuple[int, ...]]  # numbers of the experts by adapter
    full_name: str

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Create an adapter of the chosen experts."""
        whole = self.num_experts
        chosen = getattr(config, "chosen_experts", {}).get(self.full_name, tuple(range(whole)))
        if outside := [expert for expert in chosen if expert >= whole]:
            raise PlacementError(
                f"{self.full_name!r} has {whole} experts, numbered from 0, got {outside}. Plan a placement for this model."
            )
        self.chosen[adapter_name] = chosen
        self.num_experts = len(chosen)
        try:
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        finally:
            self.num_experts = whole

    def updates(self, adapter_name: str) -> dict[int, LowRank]:
        """Return each chosen expert's update of its matrix, as the parameter stores it."""
        chosen, dtype = self.chosen[adapter_name], self.get_param().dtype
        a, b = (matrix.to(dtype) for matrix in self._matrices(adapter_name))
        downs = a.unflatten(0, (len(chosen), -1)).unbind(0)  # (r, d_in) each
        ups = b.unflatten(1, (-1, len(chosen))).unbind(2)  # (d_out, r) each
        scaling = float(self.scaling[adapter_name])
        found = {e: LowRank(up, down, scaling) for e, up, down in zip(chosen, ups, downs, strict=True)}
        if self._did_swap_in_out_features:  # stored as (experts, d_out, d_in)
            return found
        return {expert: update.transposed() for expert, update in found.items()}

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """Return the update of the whole parameter, zero for experts that were not chosen."""
        delta = torch.zeros_like(self.get_param(), requires_grad=False)
        for expert, update in self.updates(adapter_name).items():
            delta[expert] = update.scaling * (update.left @ update.right)
        return delta

    @contextmanager
    def _activate_lora(self, active_adapters: Sequence[str]) -> Iterator[None]:
        updates: dict[int, list[LowRank]] = {}
        for adapter in active_adapters:
            if adapter in self.chosen:
                for expert, update in self.updates(adapter).items():
                    updates.setdefault(expert, []).append(update)
        weight = self.get_param()
        own = {expert: UpdatedMatrix(weight[expert], found) for expert, found in updates.items()}
        with standing_in(self.get_base_layer(), {self.parameter_name: ExpertStack(weight, own)} if own else {}):
            yield

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the experts with the active adapters."""
        result = super().forward(x, *args, **kwargs)
        if torch.is_grad_enabled() and not self.merged and not self.disable_adapters:
            result = reach(result, [p for a in self.active_adapters if a in self.chosen for p in self._matrices(a)])
        return result

    def _matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        a, b = self.lora_A[adapter], self.lora_B[adapter]
        return cast(nn.Linear, a).weight, cast(nn.Linear, b).weight

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **kwargs: Any) -> Any:
        """Return PEFT's form, with zeros for experts that were not chosen; the parameters themselves for `keep_vars`."""
        found = super().state_dict(*args, prefix=prefix, keep_vars=keep_vars, **kwargs)
        if not keep_vars:
            for adapter, chosen in self.chosen.items():
                for key, experts in self._keys(prefix, adapter).items():
                    found[key] = scatter(found[key], chosen, self.num_experts, experts)
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for adapter, chosen in self.chosen.items():
            for key, experts in self._keys(prefix, adapter).items():
                value = state_dict.get(key)
                if value is None:
                    continue
                rows, whole = value.shape[experts], self.r[adapter] * self.num_experts
                if rows != whole:
                    raise PlacementError(
                        f"The adapter to load has {rows} rows for the {self.num_experts} experts of {self.full_name!r}, and "
                        f"rank {self.r[adapter]} needs {whole}. Load it with the placement that it was trained with."
                    )
                trained = [] if value.is_meta else trained_experts(value, self.num_experts, experts)
                if dropped := sorted(set(trained) - set(chosen)):
                    raise PlacementError(
                        f"The adapter to load has trained experts {dropped[:10]} of {self.full_name!r}, and this model "
                        f"adapts only {list(chosen)[:10]}. Load it with the placement that it was trained with."
                    )
                state_dict[key] = gather(value, chosen, self.num_experts, experts)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @staticmethod
    def _keys(prefix: str, adapter: str) -> dict[str, int]:
        """Return the keys of A and B, with the dimension along which experts lie."""
        return {f"{prefix}lora_A.{adapter}.weight": 0, f"{prefix}lora_B.{adapter}.weight": 1}


def reach(result: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Add zero times the parameters, so that those that no token reached get a gradient of zero, which DDP waits for.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> reach(torch.zeros(1, requires_grad=True), [weight]).sum().backward()
        >>> weight.grad
        tensor([0., 0.])
    """
    empty = [p.flatten()[:0].sum() for p in parameters if p.requires_grad]
    return result + sum(empty[1:], empty[0]).to(result) if empty else result


def _by_expert(matrix: Tensor, experts: int, dimension: int) -> Tensor:
    """Return A (experts·r, d_in) as (experts, r, d_in), and B (d_out, r·experts) as (experts, d_out, r)."""
    if dimension == 0:
        return matrix.unflatten(0, (experts, -1))
    return matrix.unflatten(1, (-1, experts)).movedim(2, 0)


def _joined(slices: Tensor, dimension: int) -> Tensor:
    """Reverse `_by_expert`."""
    return slices.flatten(0, 1) if dimension == 0 else slices.movedim(0, 2).flatten(1)


def scatter(matrix: Tensor, chosen: Sequence[int], experts: int, dimension: int) -> Tensor:
    """Return an adapter's A or B of all experts from that of chosen ones, with zeros for the others."""
    own = _by_expert(matrix, len(chosen), dimension)
    whole = own.new_zeros(experts, *own.shape[1:])
    whole[list(chosen)] = own
    return _joined(whole, dimension).contiguous()


def gather(matrix: Tensor, chosen: Sequence[int], experts: int, dimension: int) -> Tensor:
    """Return an adapter's A or B of chosen experts from that of all."""
    return _joined(_by_expert(matrix, experts, dimension)[list(chosen)], dimension).contiguous()


def trained_experts(matrix: Tensor, experts: int, dimension: int) -> list[int]:
    """Return the experts whose A or B is not zero."""
    return [int(e) for e in _by_expert(matrix, experts, dimension).flatten(1).any(dim=1).nonzero()[:, 0]]


def narrow_experts(model: nn.Module, adapter_name: str = "default") -> dict[str, tuple[int, ...]]:
    """Keep only the trained experts of an adapter that was loaded with plain PEFT, to go on training these alone.

    A saved adapter of chosen experts has PEFT's form, with zeros for the others. Call this after
    `PeftModel.from_pretrained(model, folder, is_trainable=True)` and before the optimizer is made.

    Args:
        model: with a LoRA adapter on fused experts.
        adapter_name: PEFT's name of the adapter.

    Returns:
        Numbers of the experts that are left, by the parameter's name.

    Raises:
        PlacementError: if the model has no such adapter on fused experts, or it is untrained.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_blueprint.testing import tiny_mixtral
        >>> names = ["mlp.experts.gate_up_proj"]
        >>> model = get_peft_model(tiny_mixtral(layers=1), LoraConfig(r=2, target_modules=[], target_parameters=names))
        >>> wrapper = next(m for m in model.modules() if isinstance(m, lora.ParamWrapper))
        >>> with torch.no_grad():
        ...     wrapper.lora_A["default"].weight[2:] = 0  # two rows for each expert: only the first is left
        >>> narrow_experts(model)
        {'model.layers.0.mlp.experts.gate_up_proj': (0,)}
    """
    found: dict[str, tuple[int, ...]] = {}
    wrappers = {n: m for n, m in _wrappers(model) if adapter_name in m.lora_A and m.num_experts > 1}
    if not wrappers:
        raise PlacementError(
            f"{type(model).__name__} has no adapter {adapter_name!r} on fused experts. Load one with "
            "PeftModel.from_pretrained(model, folder, is_trainable=True)."
        )
    for name, wrapper in wrappers.items():
        adopt(wrapper, name)
        chosen, experts = wrapper.chosen[adapter_name], wrapper.num_experts
        own = trained_experts(wrapper.lora_A[adapter_name].weight, len(chosen), 0)
        if not own:
            raise PlacementError(
                f"The adapter {adapter_name!r} is zero on all {experts} experts of {name!r}: load another."
            )
        for layer, dimension in ((wrapper.lora_A[adapter_name], 0), (wrapper.lora_B[adapter_name], 1)):
            weight = gather(layer.weight.data, own, len(chosen), dimension)
            layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        found[name] = wrapper.chosen[adapter_name] = tuple(chosen[i] for i in own)
    return found


def adopt(wrapper: lora.ParamWrapper, full_name: str) -> None:
    """Turn PEFT's adapter of a fused parameter into one of chosen experts, with all of them chosen."""
    if not isinstance(wrapper, ParamWrapper):
        wrapper.__class__ = ParamWrapper
        chosen = {adapter: tuple(range(wrapper.num_experts)) for adapter in wrapper.lora_A}
        vars(wrapper).update(chosen=chosen, full_name=full_name)


def prepare_injection(model: nn.Module, config: LoraConfig, chosen: Mapping[str, Sequence[int]]) -> None:
    """Let PEFT put adapters on chosen experts alone where it wraps these parameters for a config.

    Raises:
        PlacementError: if PEFT is too old.
    """
    _require_peft()
    wrapped = dict(_wrappers(model))
    classes: dict[type[nn.Module], type[nn.Module]] = {}
    for name in chosen:
        if name in wrapped:
            adopt(wrapped[name], name)
        holder, _, own = name.rpartition(".")
        module = model.get_submodule(holder)
        while isinstance(module, lora.LoraLayer):
            module = cast(Any, module).base_layer
        classes[type(module)] = ParamWrapper
    config._register_custom_module(classes)


def _require_peft() -> None:
    if "config" not in inspect.signature(lora.ParamWrapper.update_layer).parameters:
        raise PlacementError(
            f"Adapters on single fused experts need PEFT 0.20 or newer, got {peft.__version__}. Upgrade PEFT, or plan without "
            "experts."
        )


def _wrappers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield PEFT's adapters of parameters with the parameters' names in the unwrapped model."""
    for path, module in model.named_modules():
        if isinstance(module, lora.ParamWrapper):
            holder = path.replace(".base_layer", "").removeprefix("base_model.model.")
            yield f"{holder}.{module.parameter_name}", module
