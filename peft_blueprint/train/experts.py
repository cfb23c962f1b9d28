"""Train chosen experts of a mixture whole (ESFT): unfreeze them, save and load them alone, merge them into a checkpoint."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._files import replacing, require_writable
from .._text import format_names, shape_str
from ..blueprint import split_expert
from ..errors import BlueprintError, FormatError, MismatchError, PlacementError
from ..measure import find_weights, is_quantized, is_sharded, load_model, unwrap
from ..place import ExpertStack, reach


FILE_NAME = "experts.safetensors"
_CHILD = "trained_experts"


def unfreeze_experts(
    model: nn.Module, experts: Mapping[str, Iterable[int]] | Iterable[str], *, freeze: bool = True
) -> int:
    """Train chosen experts of a mixture whole: expert-specialised fine-tuning (Wang et al. 2024, arXiv:2407.01906).

    Each chosen expert's slice of a fused parameter becomes a parameter of its own, which shares the memory of the whole.
    Gradients and optimizer states exist for these slices alone, and no pass computes them for other experts. The state
    dict keeps its names, with the trained experts in place, so `model.save_pretrained` writes a full checkpoint. Experts
    in a list of modules are unfrozen as they are.

    Call it before the optimizer is made.

    Args:
        model: a mixture of experts in floating point.
        experts: numbers of the experts by the name of the module that holds them, as `choose_experts` returns; or names
            of experts, `model.layers.3.mlp.experts.17`.
        freeze: freeze everything else first. False keeps what trains already, such as LoRA on the attention.

    Returns:
        Number of parameters of these experts.

    Raises:
        MismatchError: if the model has no such experts.
        PlacementError: if they are quantized, sharded, adapted or unfrozen already.

    Example:
        >>> from peft_blueprint.testing import tiny_mixtral
        >>> model = tiny_mixtral(layers=1)
        >>> unfreeze_experts(model, {"model.layers.0.mlp.experts": [1, 3]})
        4608
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad][0]
        'model.layers.0.mlp.experts.trained_experts.1.down_proj'
    """
    chosen = _found(unwrap(model), _numbers(experts))
    for name, (module, numbers) in chosen.items():
        if isinstance(module, BaseTunerLayer) or _CHILD in vars(module)["_modules"]:
            has = "have an adapter" if isinstance(module, BaseTunerLayer) else "were unfrozen before"
            raise PlacementError(f"The experts of {name!r} {has}. Load the model again to train others.")
        for key, parameter in module.named_parameters():
            if is_quantized(parameter) or is_sharded(parameter):
                raise PlacementError(
                    f"{name}.{key} is quantized or sharded, and single experts of it cannot be trained. Load the model in "
                    "bfloat16, and unfreeze experts before the model is sharded."
                )
        if not numbers:
            raise PlacementError(f"No expert of {name!r} was named. Leave it out.")
    if freeze:
        model.requires_grad_(False)
    trained = [_unfreeze(module, numbers) for module, numbers in chosen.values()]
    return sum(parameter.numel() for part in trained for parameter in part.parameters())


def save_experts(model: nn.Module, path: str | Path) -> Path:
    """Write the trained experts of a model as one safetensors file of slices.

    A tensor is called `model.layers.3.mlp.experts.17.gate_up_proj`. Of experts in a list, those are written whose
    parameters all train.

    Args:
        model: after `unfreeze_experts`.
        path: a .safetensors file, or a folder for `experts.safetensors`.

    Returns:
        The file.

    Raises:
        PlacementError: if the model has no trained experts.
        BlueprintError: if the file cannot be written.

    Example:
        >>> from peft_blueprint.testing import tiny_mixtral
        >>> model = tiny_mixtral(layers=1)
        >>> _ = unfreeze_experts(model, ["model.layers.0.mlp.experts.3"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load_experts(tiny_mixtral(layers=1), save_experts(model, folder))
        {'model.layers.0.mlp.experts': (3,)}
    """
    base = unwrap(model)
    tensors: dict[str, Tensor] = {}
    for name, module in _containers(base).items():
        slices = vars(module)["_modules"].get(_CHILD)
        if isinstance(slices, _Slices):
            tensors |= {f"{name}.{key}": parameter for key, parameter in slices.named_parameters()}
        elif not _is_fused(module):
            for number, expert in module.named_children():
                own = dict(expert.named_parameters(prefix=f"{name}.{number}"))
                tensors |= own if all(parameter.requires_grad for parameter in own.values()) else {}
    if not tensors:
        raise PlacementError(f"This {type(base).__name__} has no trained experts. Call unfreeze_experts first.")
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path / FILE_NAME
    metadata = {"format": "pt", "model_id": str(getattr(getattr(base, "config", None), "_name_or_path", ""))}
    with replacing(path) as file:
        file.write(save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, metadata))
    return path


def load_experts(model: nn.Module, path: str | Path) -> dict[str, tuple[int, ...]]:
    """Copy saved experts into a model. To go on training them, call `unfreeze_experts` with the result.

    Args:
        model: the model that was trained, with or without unfrozen experts.
        path: what `save_experts` wrote, the file or its folder.

    Returns:
        Numbers of the experts by the name of the module that holds them.

    Raises:
        FormatError: if the file is missing, or was not written by `save_experts`.
        MismatchError: if the model lacks one of the experts, or has it in another shape. It is then unchanged.

    Example: see `save_experts`.
    """
    base, tensors = unwrap(model), _read(Path(path))
    places = {key: _split(key, path) for key in tensors}
    experts: dict[str, set[int]] = {}
    for holder, number, _ in places.values():
        experts.setdefault(holder, set()).add(number)
    found = _found(base, {holder: sorted(numbers) for holder, numbers in experts.items()})
    targets: list[tuple[Tensor, Tensor]] = []
    for key, (holder, number, own) in places.items():
        module = found[holder][0]
        if _is_fused(module):
            whole = _stacked(module).get(own)
            into = [] if whole is None else [whole.data[number]]
            slices = vars(module)["_modules"].get(_CHILD)
            if isinstance(slices, _Slices) and number in slices.numbers:
                into += [slices.of(number)[own].data] if own in slices.of(number) else []
        else:
            into = [p.data for name, p in module.get_submodule(str(number)).named_parameters() if name == own]
        if not into or into[0].shape != tensors[key].shape:
            has = shape_str(tuple(into[0].shape)) if into else "none"
            raise MismatchError(
                f"{key!r} in {path} is {shape_str(tuple(tensors[key].shape))}, and the model's is {has}. Load the experts into "
                "the model that they were trained in."
            )
        targets += [(target, tensors[key]) for target in into]
    for target, tensor in targets:
        target.copy_(tensor)
    return {holder: numbers for holder, (_, numbers) in found.items()}


def merge_experts(path: str | Path, model: str, out: str | Path) -> Path:
    """Write a full checkpoint of a model with saved experts in place, with the model's tokenizer.

    Args:
        path: what `save_experts` wrote, the file or its folder.
        model: folder or repository of the model that the experts were trained in.
        out: folder to write, new or empty.

    Returns:
        The folder, complete; nothing is left there after an error.

    Raises:
        BlueprintError: as `load_experts`; if the model cannot be loaded, or the folder holds something.

    Example:
        >>> from peft_blueprint.train import merge_experts
        >>> merge_experts("no-such-file", "org/model", "merged")
        Traceback (most recent call last):
        peft_blueprint.errors.FormatError: no-such-file is not a file of experts: No such file or directory. Give a file that save_experts wrote.
    """
    _read(Path(path))
    out = Path(out)
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        raise BlueprintError(f"{out} exists and is not an empty folder. Choose another one to write to.")
    require_writable(out)
    base, tokenizer = load_model(model)
    load_experts(base, path)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name[:40]}.", suffix=".part", dir=out.parent))
    try:
        base.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.chmod(0o755)
        os.replace(part, out)
    except OSError as error:
        raise BlueprintError(f"{out} cannot be written: {error.strerror or error}. Choose another folder.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


class ExpertCheckpoints(TrainerCallback):
    """Save the trained experts with every checkpoint of a Trainer, and load them when it resumes.

    Transformers 5 saves fused experts one by one, under other names, and its Trainer does not fuse them again when it
    resumes: it warns of missing keys, and goes on from the base model's experts.

    Args:
        resume_from: checkpoint to resume from; by default the one of the Trainer's step in its output folder.

    Example:
        >>> from peft_blueprint.train import ExpertCheckpoints
        >>> callbacks = [ExpertCheckpoints()]  # of Trainer(…, callbacks=callbacks)
    """

    def __init__(self, resume_from: str | Path | None = None):
        self.resume_from = resume_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load the experts of the checkpoint that training resumes from.

        Raises:
            FormatError, MismatchError: as `load_experts`.
        """
        if state.global_step:
            folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            load_experts(kwargs["model"], folder if self.resume_from is None else self.resume_from)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the experts beside a checkpoint."""
        if state.is_world_process_zero:
            save_experts(kwargs["model"], Path(args.output_dir or ".") / f"checkpoint-{state.global_step}")


class _Slices(nn.Module):
    """The trained slices of a module of fused experts, by expert and parameter; a child of that module.

    Hooks on the module let the slices stand in for its parameters, and keep its state dict as it was. The slices hold
    what was trained; the module's parameters share their memory, or are updated where moving the model separated them.
    """

    def __init__(self, module: nn.Module, numbers: Iterable[int]):
        super().__init__()
        self.numbers = tuple(numbers)
        for number in self.numbers:
            own = {name: nn.Parameter(p.data[number]) for name, p in _stacked(module).items()}
            self.add_module(str(number), nn.ParameterDict(own))
        for whole in _stacked(module).values():
            whole.requires_grad_(False)
        module.add_module(_CHILD, self)
        module.register_forward_pre_hook(_enter)
        module.register_forward_hook(_leave, always_call=True)
        module.register_state_dict_post_hook(_merge)
        module.register_load_state_dict_pre_hook(_take)

    def of(self, number: int) -> Mapping[str, nn.Parameter]:
        """Return the parameters of one expert."""
        return cast(Mapping[str, nn.Parameter], self.get_submodule(str(number)))


def _slices_of(module: nn.Module) -> _Slices:
    return cast(_Slices, vars(module)["_modules"][_CHILD])


def _enter(module: nn.Module, args: Any) -> None:
    """Before a forward pass: let the slices stand in."""
    slices = _slices_of(module)
    for name, whole in _stacked(module).items():
        own = {number: slices.of(number)[name] for number in slices.numbers}
        for number, trained in own.items():
            _share(whole, number, trained)
        place = torch.tensor(slices.numbers, device=whole.device)
        is_matrix = whole.dim() > 2
        frozen = whole.detach()
        vars(module)[name] = (
            ExpertStack(frozen, own) if is_matrix else frozen.index_copy(0, place, torch.stack(list(own.values())))
        )


def _leave(module: nn.Module, args: Any, output: Any) -> Any:
    """After a forward pass, also a failed one: take them out again."""
    for name in _stacked(module):
        vars(module).pop(name, None)
    if isinstance(output, Tensor) and torch.is_grad_enabled():
        # no token may have reached a trained expert: backward() needs a graph, and DDP waits for every gradient
        if torch.distributed.is_initialized() or not output.requires_grad:
            return reach(output, list(_slices_of(module).parameters()))
    return output


def _merge(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Take the slices out of a state dict, and put what was trained into the whole parameters."""
    own = f"{prefix}{_CHILD}."
    if any(
        isinstance(state_dict.get(f"{own}{key}"), nn.Parameter) for key, _ in _slices_of(module).named_parameters()
    ):
        return  # the parameters themselves were asked for, as by wrappers that shard them
    for key in [key for key in state_dict if key.startswith(own)]:
        number, _, name = key.removeprefix(own).partition(".")
        trained, whole = state_dict.pop(key), state_dict.get(prefix + name)
        if whole is not None and whole[int(number)].data_ptr() != trained.data_ptr():
            state_dict[prefix + name] = whole.index_copy(
                0, torch.tensor([int(number)], device=whole.device), trained[None].to(whole)
            )


def _take(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Take the slices to load from the whole parameters."""
    for key in dict(_slices_of(module).named_parameters()):
        number, _, name = key.partition(".")
        whole = state_dict.get(prefix + name)
        if whole is not None and whole.dim() > 1 and len(whole) > int(number):
            state_dict.setdefault(f"{prefix}{_CHILD}.{key}", whole[int(number)])


def _share(whole: nn.Parameter, number: int, trained: nn.Parameter) -> None:
    """Let a trained slice use the memory of the whole parameter, with the slice's numbers, unless it does or cannot."""
    place = whole.data[number]
    same = place.device == trained.device and place.dtype == trained.dtype and place.shape == trained.shape
    if same and place.data_ptr() != trained.data_ptr() and not is_sharded(trained) and not is_sharded(whole):
        place.copy_(trained.data)
        trained.data = place


def _unfreeze(module: nn.Module, numbers: tuple[int, ...]) -> nn.Module:
    """Unfreeze experts of a module that holds them, and return what holds their parameters."""
    if _is_fused(module):
        return _Slices(module, numbers)
    return nn.ModuleList([module.get_submodule(str(number)) for number in numbers]).requires_grad_(True)


def _numbers(experts: Mapping[str, Iterable[int]] | Iterable[str]) -> dict[str, tuple[int, ...]]:
    found: dict[str, dict[int, None]] = {}
    if isinstance(experts, Mapping):
        for name, numbers in experts.items():
            given = tuple(numbers) if isinstance(numbers, Iterable) and not isinstance(numbers, str) else (numbers,)
            if not all(isinstance(number, Integral) and not isinstance(number, bool) for number in given):
                raise PlacementError(f"experts must be whole numbers, such as [1, 3], got {numbers!r} for {name!r}.")
            found[name] = dict.fromkeys(map(int, cast("tuple[int, ...]", given)))
    for name in [experts] if isinstance(experts, str) else () if found else experts:
        holder, _, number = str(name).rpartition(".")
        if not (holder and number.isdigit()):
            raise PlacementError(f"experts must be names such as 'model.layers.3.mlp.experts.17', got {name!r}.")
        found.setdefault(holder, {})[int(number)] = None
    return {holder: tuple(numbers) for holder, numbers in found.items()}


def _found(base: nn.Module, experts: Mapping[str, Iterable[int]]) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Return the modules that hold the experts, and the experts' numbers, in the model's order.

    Raises:
        MismatchError: if the model lacks one.
    """
    known = _containers(base)
    found = {}
    for holder, numbers in experts.items():
        has = _count(known[holder]) if holder in known else 0
        if missing := [number for number in numbers if not 0 <= number < has]:
            raise MismatchError(
                f"This {type(base).__name__} has no expert {missing[0]} in {holder!r}, which has {has}; modules of experts: "
                f"{format_names(list(known)) or 'none'}. Choose experts by a blueprint of this model."
            )
        found[holder] = tuple(sorted(numbers))
    if not found:
        raise PlacementError("No expert was named. Choose some with choose_experts.")
    return {holder: (known[holder], found[holder]) for holder in known if holder in found}


def _containers(base: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that hold experts, fused or as children, by name."""
    names: dict[str, None] = {}
    for weight in find_weights(base):
        expert = split_expert(weight.name)
        if weight.form == "experts":
            names[weight.name.rpartition(".")[0]] = None
        elif expert is not None and weight.form == "linear":
            names[expert.container] = None
    return {name: base.get_submodule(name) for name in names}


def _is_fused(module: nn.Module) -> bool:
    return any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))


def _stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module of fused experts that have a slice for each expert: weights, and biases."""
    count = _count(module)
    return {n: p for n, p in module.named_parameters(recurse=False) if p.dim() > 1 and p.shape[0] == count}


def _count(module: nn.Module) -> int:
    wholes = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    return wholes[0].shape[0] if wholes else len(list(module.children()))


def _split(key: str, path: Any) -> tuple[str, int, str]:
    """Return holder, number and own name of a saved tensor."""
    expert = split_expert(key)
    if expert is None:
        raise FormatError(f"{key!r} in {path} is not an expert's parameter. Give a file that save_experts wrote.")
    holder = expert.container
    return holder, expert.number, key.removeprefix(f"{holder}.{expert.number}.")


def _read(path: Path) -> dict[str, Tensor]:
    path = path / FILE_NAME if path.is_dir() else path
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        if isinstance(error, FileNotFoundError):
            reason = "No such file or directory"
        raise FormatError(
            f"{path} is not a file of experts: {reason}. Give a file that save_experts wrote."
        ) from error
