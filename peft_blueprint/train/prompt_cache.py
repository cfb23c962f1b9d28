"""Keep the keys and values of prompts over steps and epochs, in memory or in files, within a number of bytes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .._files import replacing
from ..errors import BlueprintError
from ..place import Budget
from ..runs import format_quantity


_SAMPLES = 64  # values of every weight that identify a model


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt.

    Args:
        input_ids: (length,).
        positions: (length,).
        targets: (length,), targets that the prompt's own positions predict, -100 elsewhere; None without any.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def begins(self, other: Prompt) -> bool:
        """Return whether `other` begins with this prompt."""
        length = len(self)
        return (
            len(other) >= length
            and torch.equal(other.input_ids[:length], self.input_ids)
            and torch.equal(other.positions[:length], self.positions)
        )

    def key(self, digest: str) -> str:
        """Return a hash of the prompt's content and of the model's digest."""
        parts = [self.input_ids, self.positions, *([] if self.targets is None else [self.targets])]
        content = b"|".join(part.contiguous().numpy().tobytes() for part in parts)
        return hashlib.sha256(digest.encode() + content).hexdigest()


@dataclass(frozen=True)
class PromptStates:
    """Keys and values of a prompt.

    Args:
        layers: for every layer, keys and values (heads, length, head size).
        loss: sum of the losses of the prompt's targets, if it has any.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    loss: Tensor | None = None

    @classmethod
    def of(cls, cache: Cache, row: int, length: int, loss: Tensor | None = None) -> PromptStates:
        """Copy a row of a cache of transformers."""
        layers: list[Any] = cache.layers
        pairs = ((layer.keys, layer.values) for layer in layers)
        return cls(
            tuple((keys[row, :, :length].clone(), values[row, :, :length].clone()) for keys, values in pairs), loss
        )

    def beginning(self, length: int) -> PromptStates:
        """Return the states of the prompt's first tokens."""
        return PromptStates(tuple((keys[:, :length], values[:, :length]) for keys, values in self.layers))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(part.numel() * part.element_size() for pair in self.layers for part in pair)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return named tensors, for a file."""
        named = {
            f"{i}.{name}": part.contiguous()
            for i, pair in enumerate(self.layers)
            for name, part in zip(("keys", "values"), pair, strict=True)
        }
        return named if self.loss is None else {**named, "loss": self.loss.reshape(1)}

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor]) -> PromptStates:
        """Return the states of `to_tensors`."""
        count = sum(name.endswith(".keys") for name in named)
        loss = named["loss"][0] if "loss" in named else None
        return cls(tuple((named[f"{i}.keys"], named[f"{i}.values"]) for i in range(count)), loss)


@dataclass
class _Entry:
    nbytes: int
    flops: float
    states: PromptStates | None  # None: in a file


class PromptCache:
    """Keep prompts' keys and values, so that a prompt costs nothing from the second time on.

    A prompt is found by its tokens, positions and model. When the bytes are used up, prompts make room that save the
    fewest FLOPs a byte, each times how often it was asked for. Of equals the first stay, because an epoch asks for
    all of them before one comes back. Values are kept in the model's type, so gradients do not change.

    Keys and values of a token take `2 × layers × key-value heads × head size` numbers: 23 kB for SmolLM2-135M and
    131 kB for Llama 3 8B in bfloat16.

    Args:
        budget: bytes, or a text such as "8GiB".
        folder: keeps them in memory-mapped files here, one a prompt, instead of memory. Files of earlier runs with the
            same model are used again.

    Raises:
        BlueprintError: for a budget that is not a positive number of bytes.

    Example:
        >>> cache = PromptCache("100MiB")
        >>> print(cache)
        0 prompts, 0 B of 100 MiB; 0 of 0 found
    """

    def __init__(self, budget: int | str, folder: str | Path | None = None):
        limit = Budget.of(budget).memory if isinstance(budget, str) else budget
        if not isinstance(limit, int) or isinstance(limit, bool) or limit <= 0:
            raise BlueprintError(f"budget must be a number of bytes or a text such as '8GiB', got {budget!r}.")
        self.limit = limit
        self.folder = None if folder is None else Path(folder)
        self.found = 0
        self._entries: dict[str, _Entry] = {}
        self._asked: Counter[str] = Counter()
        self._used = 0
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(self.folder.glob("*.safetensors")):
                with safe_open(path, "pt") as file:
                    flops = float((file.metadata() or {}).get("flops", 0))
                self._add(path.stem, _Entry(path.stat().st_size, flops, None))

    @property
    def used(self) -> int:
        """Bytes in use."""
        return self._used

    def __len__(self) -> int:
        return len(self._entries)

    def __str__(self) -> str:
        used, limit = (format_quantity(value, "B") for value in (self._used, self.limit))
        return f"{len(self)} prompts, {used} of {limit}; {self.found} of {self._asked.total()} found"

    def get(self, key: str) -> PromptStates | None:
        """Return the states of a prompt, or None."""
        self._asked[key] += 1
        entry = self._entries.get(key)
        if entry is None:
            return None
        self.found += 1
        if entry.states is not None:
            return entry.states
        with safe_open(self._path(key), "pt") as file:
            return PromptStates.from_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

    def put(self, key: str, states: PromptStates, model: PreTrainedModel, length: int) -> bool:
        """Keep a prompt's states if there is room, or prompts worth less a byte can make room.

        Returns:
            Whether it was kept.
        """
        entry = _Entry(states.nbytes, prompt_flops(model, length), None)
        if not entry.nbytes or key in self._entries or not self._make_room(key, entry):
            return False
        named = {name: part.detach().cpu() for name, part in states.to_tensors().items()}
        if self.folder is None:
            entry.states = PromptStates.from_tensors({name: part.clone() for name, part in named.items()})
        else:
            with replacing(self._path(key)) as file:
                file.write(save(named, metadata={"flops": str(entry.flops)}))
        self._add(key, entry)
        return True

    def _make_room(self, key: str, new: _Entry) -> bool:
        needed = self._used + new.nbytes - self.limit
        going: list[str] = []
        for other in sorted(self._entries, key=self._worth) if needed > 0 else ():
            if needed <= 0 or self._worth(other) >= self._asked[key] * new.flops / new.nbytes:
                break
            going.append(other)
            needed -= self._entries[other].nbytes
        if needed > 0:
            return False
        for other in going:
            self._used -= self._entries.pop(other).nbytes
            if self.folder is not None:
                self._path(other).unlink(missing_ok=True)
        return True

    def _worth(self, key: str) -> float:
        """Return the FLOPs that a byte of the entry has saved or would save."""
        entry = self._entries[key]
        return max(1, self._asked[key]) * entry.flops / entry.nbytes

    def _add(self, key: str, entry: _Entry) -> None:
        self._entries[key] = entry
        self._used += entry.nbytes

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"


def prompt_flops(model: PreTrainedModel, length: int) -> float:
    """Estimate the FLOPs of a prompt's forward pass: two a weight and token, and attention to earlier tokens.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> prompt_flops(tiny_llama(), 10)
        707840.0
    """
    config = model.config.get_text_config()
    weights = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "lora_" not in name and "embed" not in name
    )
    return length * (2.0 * weights + 2.0 * config.num_hidden_layers * config.hidden_size * length)


def model_digest(model: PreTrainedModel) -> str:
    """Hash the configuration and a sample of every frozen weight, so that states of another model are never used."""
    digest = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, parameter in model.named_parameters():
        if not any(part in name for part in ("lora_", "modules_to_save")):
            flat: Any = parameter.detach().flatten()
            sample = flat[:: max(1, flat.numel() // _SAMPLES)].contiguous().cpu()
            digest.update(f"{name}{parameter.dtype}".encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
