"""Build tiny random models and toy batches for tests. Models take milliseconds to build and to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from .measure import linear_modules, shape_of


__all__ = [
    "VOCABULARY",
    "quantize",
    "random_model",
    "randomize_adapters",
    "save_tiny_model",
    "tiny_bert",
    "tiny_deepseek_v3",
    "tiny_gpt2",
    "tiny_gpt_oss",
    "tiny_llama",
    "tiny_mixtral",
    "tiny_olmoe",
    "tiny_qwen3_moe",
    "tiny_t5",
    "tiny_vit",
    "toy_batches",
]


VOCABULARY = 97
_MIXTURE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_llama(layers: int = 4, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Build a random Llama with grouped-query attention: hidden size 32, 4 heads, 2 key-value heads, d_ff 48.

    Example:
        >>> tiny_llama(layers=2).num_parameters()
        21728
    """
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return random_model(
        LlamaForCausalLM, LlamaConfig(num_hidden_layers=layers, **_vocabulary(), **settings | changes), seed
    )


def tiny_gpt2(layers: int = 3, seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    """Build a random GPT-2, whose linear layers are transformers' `Conv1D`.

    Example:
        >>> type(tiny_gpt2().transformer.h[0].attn.c_attn).__name__
        'Conv1D'
    """
    settings: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": layers, "n_positions": 64}
    return random_model(GPT2LMHeadModel, GPT2Config(**_vocabulary(), **settings | changes), seed)


def tiny_mixtral(layers: int = 3, seed: int = 0, **changes: Any) -> MixtralForCausalLM:
    """Build a random Mixtral with 4 experts, 2 for each token; transformers 5 fuses them into one parameter.

    Example:
        >>> tiny_mixtral().config.num_local_experts
        4
    """
    settings = _MIXTURE | {"num_local_experts": 4}
    return random_model(
        MixtralForCausalLM, MixtralConfig(num_hidden_layers=layers, **_vocabulary(), **settings | changes), seed
    )


def tiny_qwen3_moe(layers: int = 3, seed: int = 0, **changes: Any) -> Qwen3MoeForCausalLM:
    """Build a random Qwen3-MoE with 4 experts, 2 for each token.

    Example:
        >>> tiny_qwen3_moe().config.num_experts
        4
    """
    settings = _MIXTURE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return random_model(
        Qwen3MoeForCausalLM, Qwen3MoeConfig(num_hidden_layers=layers, **_vocabulary(), **settings | changes), seed
    )


def tiny_gpt_oss(layers: int = 3, seed: int = 0, **changes: Any) -> GptOssForCausalLM:
    """Build a random GPT-OSS with 4 experts, 2 for each token, whose weights are (experts, d_in, d_out) with biases.

    Example:
        >>> tiny_gpt_oss().config.num_local_experts
        4
    """
    settings = _MIXTURE | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return random_model(
        GptOssForCausalLM, GptOssConfig(num_hidden_layers=layers, **_vocabulary(), **settings | changes), seed
    )


def tiny_deepseek_v3(layers: int = 3, seed: int = 0, **changes: Any) -> DeepseekV3ForCausalLM:
    """Build a random DeepSeek-V3 with 4 experts in 2 groups, 2 for each token, and a shared one; the first block is dense.

    Example:
        >>> tiny_deepseek_v3().config.n_routed_experts
        4
    """
    settings = _MIXTURE | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
    settings |= {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    settings |= {"moe_intermediate_size": 24, "q_lora_rank": 16, "kv_lora_rank": 16}
    settings |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    return random_model(
        DeepseekV3ForCausalLM, DeepseekV3Config(num_hidden_layers=layers, **_vocabulary(), **settings | changes), seed
    )


def tiny_olmoe(layers: int = 3, seed: int = 0, **changes: Any) -> OlmoeForCausalLM:
    """Build a random OLMoE with 4 experts, 2 for each token.

    Example:
        >>> tiny_olmoe().config.num_experts
        4
    """
    settings = _MIXTURE | {"num_experts": 4, "num_experts_per_tok": 2}
    return random_model(
        OlmoeForCausalLM, OlmoeConfig(num_hidden_layers=layers, **_vocabulary(), **settings | changes), seed
    )


def tiny_t5(layers: int = 2, seed: int = 0, **changes: Any) -> T5ForConditionalGeneration:
    """Build a random T5 with as many encoder as decoder layers.

    Example:
        >>> tiny_t5().config.num_decoder_layers
        2
    """
    settings: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "decoder_start_token_id": 0}
    return random_model(
        T5ForConditionalGeneration, T5Config(num_layers=layers, **_vocabulary(), **settings | changes), seed
    )


def tiny_vit(layers: int = 2, seed: int = 0, labels: int = 3, **changes: Any) -> ViTForImageClassification:
    """Build a random vision transformer that classifies images of 16 × 16 in patches of 8 × 8.

    Example:
        >>> tiny_vit()(torch.zeros(2, 3, 16, 16)).logits.shape
        torch.Size([2, 3])
    """
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
        "num_labels": labels,
    }
    return random_model(ViTForImageClassification, ViTConfig(num_hidden_layers=layers, **settings | changes), seed)


def tiny_bert(layers: int = 2, seed: int = 0, tokens: bool = False, labels: int = 3) -> PreTrainedModel:
    """Build a random BERT that classifies sequences, or tokens.

    Example:
        >>> tiny_bert(tokens=True)(torch.ones(2, 5, dtype=torch.long)).logits.shape
        torch.Size([2, 5, 3])
    """
    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=layers,
        **_vocabulary() | {"num_labels": labels},
    )
    return random_model(BertForTokenClassification if tokens else BertForSequenceClassification, config, seed)


def random_model(cls: type[nn.Module], config: Any, seed: int = 0) -> Any:
    """Build a transformers model in evaluation mode, with weights large enough that gradients differ between layers.

    Example:
        >>> random_model(LlamaForCausalLM, tiny_llama().config).training
        False
    """
    generator = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = cls(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    finally:
        torch.random.set_rng_state(generator)
    return model.eval()


def toy_batches(
    examples: int = 8, length: int = 12, batch_size: int = 4, padding: str = "right", seed: int = 0, prompt: int = 3
) -> list[dict[str, Tensor]]:
    """Make random token batches of varied lengths for a causal model, with targets after a prompt.

    Args:
        examples: number of examples.
        length: tokens of the longest; the shortest has `prompt + 2`.
        batch_size: rows of a batch; the last may have fewer.
        padding: "right", "left" or "none" (all of full length).
        seed: seed of the tokens and lengths.
        prompt: tokens at the start of every example that are not targets.

    Example:
        >>> [tuple(batch["input_ids"].shape) for batch in toy_batches(examples=6)]
        [(4, 12), (2, 12)]
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, VOCABULARY, (examples, length), generator=generator)
    lengths = torch.randint(prompt + 2, length + 1, (examples,), generator=generator)
    if padding == "none":
        lengths = torch.full_like(lengths, length)
    place = torch.arange(length).expand(examples, -1)
    start = (length - lengths)[:, None] if padding == "left" else torch.zeros(examples, 1, dtype=torch.long)
    mask = (place >= start) & (place < start + lengths[:, None])
    labels = input_ids.masked_fill(~mask | (place < start + prompt), -100)
    rows = {"input_ids": input_ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels}
    return [{key: value[i : i + batch_size] for key, value in rows.items()} for i in range(0, examples, batch_size)]


def quantize(model: nn.Module, kind: str, nested: bool = True, device: str = "cpu") -> nn.Module:
    """Quantize every linear layer except the head with bitsandbytes.

    Args:
        model: changed in place.
        kind: "nf4", "fp4" or "int8".
        nested: double quantization of the scales, in 4 bits.
        device: of the quantized layers.

    Example:
        >>> type(quantize(tiny_llama(), "nf4").model.layers[0].self_attn.q_proj).__name__
        'Linear4bit'
    """
    import bitsandbytes as bnb

    for name, module in list(linear_modules(model)):
        if name == "lm_head":
            continue
        d_out, d_in = shape_of(module)
        if kind == "int8":
            layer: Any = bnb.nn.Linear8bitLt(d_in, d_out, bias=False, has_fp16_weights=False)
            layer.load_state_dict({"weight": module.weight.data}, strict=False)
        else:
            layer = bnb.nn.Linear4bit(
                d_in, d_out, bias=False, compute_dtype=module.weight.dtype, quant_type=kind, device="meta"
            )
            layer.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type=kind, compress_statistics=nested, module=layer
            )
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent).register_module(own, layer.to(device))
    return model


def randomize_adapters(model: nn.Module, seed: int = 1) -> nn.Module:
    """Randomize LoRA's B, and other trainable weights, so that adapters change the model's logits.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
        >>> randomize_adapters(model) is model
        True
    """
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
        elif parameter.requires_grad and "lora_" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def save_tiny_model(folder: Path, layers: int = 3) -> Path:
    """Save a tiny Llama with a tokenizer of the numbers 0 to 89, and return the folder.

    Example:
        >>> (save_tiny_model(Path("model")) / "tokenizer.json").exists()
        True
    """
    words = ["<pad>", "<s>", "</s>", "<unk>", *map(str, range(90))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    tiny_llama(layers).save_pretrained(folder)
    return folder


def _vocabulary() -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
