"""Is the loss that is measured the model's own? Tiny random models of every transformers class that can be built.

    python -m benchmarks objectives [--only NAME ...]

Every class of the Auto mappings is built with a few thousand random weights and measured on two examples. `loss` compares
the measured losses with what the model returns for each example alone. Classes that cannot be built this way, or refuse
the toy inputs, are counted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_blueprint import measure_influence
from peft_blueprint.errors import BlueprintError
from peft_blueprint.testing import VOCABULARY, random_model


TASKS = {
    "CAUSAL_LM": "text",
    "MASKED_LM": "text",
    "SEQ_TO_SEQ_CAUSAL_LM": "text",
    "TOKEN_CLASSIFICATION": "tokens",
    "SEQUENCE_CLASSIFICATION": "classes",
    "PRETRAINING": "text",
    "IMAGE_CLASSIFICATION": "images",
    "SPEECH_SEQ_2_SEQ": "features",
    "CTC": "waves",
    "AUDIO_CLASSIFICATION": "waves",
    "MULTIMODAL_LM": "text",
}
LARGEST = 3_000_000  # weights
QUICK = {"only": ["LlamaForCausalLM", "BartForCausalLM", "BertForMaskedLM"]}
SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "embed_dim", "emb_dim", "width"), 32
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "d_inner", "n_inner", "hidden_dim", "ffn_hidden_size"), 48
    ),
    **dict.fromkeys(
        ("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size"), 48
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "depth", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size", "d_head"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "num_labels": 3},
    **{"image_size": 16, "patch_size": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "num_mel_bins": 8},
    **{"conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (4, 2), "num_feat_extract_layers": 2},
    **{"max_source_positions": 10, "max_target_positions": 16, "state_size": 4, "mamba_d_state": 8},
}


def main(options: argparse.Namespace) -> None:
    """Measure every class and print those whose losses are not the model's own."""
    outcomes: Counter[str] = Counter()
    for name, kind, config in classes(options.only):
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            outcome, note = compare(name, kind, config)
        outcomes[outcome] += 1
        if outcome in options.show:
            print(f"{name:<55} {outcome}: {note}", flush=True)
    print("| outcome | classes |\n|---|---|")
    for outcome, count in outcomes.most_common():
        print(f"| {outcome} | {count} |")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--only", nargs="+", metavar="NAME", help="classes (all)")
    parser.add_argument(
        "--show", nargs="+", default=["wrong", "raw error"], help="outcomes to list (wrong, raw error)"
    )


def classes(only: list[str] | None = None) -> Iterator[tuple[str, str, str]]:
    """Yield class, kind of batch and the model type of its configuration, each class once."""
    seen = set()
    for task, kind in TASKS.items():
        spellings = (task, task.replace("PRETRAINING", "PRE_TRAINING"))
        found = (getattr(modeling_auto, f"MODEL_FOR_{spelling}_MAPPING_NAMES", None) for spelling in spellings)
        mapping = next((mapping for mapping in found if mapping is not None), {})  # none in older versions
        for model_type, names in mapping.items():
            for name in [names] if isinstance(names, str) else names:
                if name not in seen and (only is None or name in only):
                    seen.add(name)
                    yield name, kind, model_type


def compare(name: str, kind: str, model_type: str) -> tuple[str, str]:
    """Return how a class fares: "own", "wrong", "refused", "raw error", "not built" or "not run", and why."""
    try:
        config = shrunk(CONFIG_MAPPING[model_type])
        cls = getattr(transformers, name)
        with torch.device("meta"):
            if sum(p.numel() for p in cls(config).parameters()) > LARGEST:
                return "not built", "too large"
        model = random_model(cls, config)
    except Exception as error:
        return "not built", f"{type(error).__name__}: {str(error)[:120]}"
    batch = toy_batch(kind, config, model)
    try:
        with torch.no_grad():
            expected = [own_loss(model, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(2)]
    except Exception as error:
        return "not run", f"{type(error).__name__}: {str(error)[:120]}"
    try:
        losses = measure_influence(model, [batch], progress=False).losses.tolist()
    except BlueprintError as error:
        return "refused", str(error)[:200]
    except Exception as error:
        return "raw error", f"{type(error).__name__}: {str(error)[:200]}"
    is_own = all(abs(a - b) <= 2e-4 * max(1, abs(b)) for a, b in zip(losses, expected, strict=True))
    return ("own" if is_own else "wrong"), f"measured {losses}, the model's {expected}"


def own_loss(model: nn.Module, example: Mapping[str, Tensor]) -> float:
    """Return the loss that a model returns."""
    return float(model(**example).loss)


def shrunk(cls: type[Any]) -> Any:
    """Build a configuration with small sizes, its parts too."""
    default = cls()
    changes = {key: value for key, value in SMALL.items() if hasattr(default, key)}
    changes |= {key: shrunk(type(part)) for key, part in vars(default).items() if hasattr(part, "to_diff_dict")}
    return cls(**changes)


def toy_batch(kind: str, config: Any, model: nn.Module) -> dict[str, Tensor]:
    """Make two examples."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (2, 9), generator=generator)
    if kind == "text":
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids.clone().index_fill(1, torch.tensor([0, 1]), -100),
        }
    if kind == "tokens":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 3}
    if kind == "classes":
        ids[:, -1] = 2
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([1, 2])}
    if kind == "images":
        size = getattr(config, "image_size", 32)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (2, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": torch.randn(shape, generator=generator), "labels": torch.tensor([1, 2])}
    if kind == "features":
        mels = getattr(config, "num_mel_bins", 80)
        return {"input_features": torch.randn(2, mels, 20, generator=generator), "labels": ids[:, :5]}
    is_ctc = type(model).__name__.endswith("CTC")
    labels = ids[:, :3] if is_ctc else torch.tensor([1, 2])
    return {"input_values": torch.randn(2, 400, generator=generator), "labels": labels}
