"""Tiny mixtures of experts: the families of transformers, and experts in a list as older models have them."""

import numpy as np
import torch
from torch import nn

from peft_blueprint import Blueprint, testing
from peft_blueprint.blueprint import Submodule


class ListedMixture(nn.Module):
    """Four feed-forward networks in a list, of which every token visits two, as Mixtral had them in transformers 4."""

    def __init__(self, width: int = 32, inner: int = 24, experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner, bias=False), nn.SiLU(), nn.Linear(inner, width, bias=False))
            for _ in range(experts)
        )

    def forward(self, hidden):
        flat = hidden.flatten(0, -2)
        weights, chosen = self.gate(flat).softmax(dim=-1).topk(self.top_k)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        total = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            if len(token):
                total = total.index_add(0, token, expert(flat[token]) * weights[token, place, None])
        return total.view_as(hidden)


def tiny_listed(layers: int = 2, **sizes: int) -> nn.Module:
    """Build a random Llama whose feed-forward parts are mixtures of experts in lists."""
    model = testing.tiny_llama(layers)
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = ListedMixture(**sizes)
        for parameter in layer.mlp.parameters():
            nn.init.normal_(parameter, std=0.2)
    torch.random.set_rng_state(generator)
    return model.eval()


MIXTURES = {
    "mixtral": testing.tiny_mixtral,
    "qwen3_moe": testing.tiny_qwen3_moe,
    "gpt_oss": testing.tiny_gpt_oss,
    "deepseek_v3": testing.tiny_deepseek_v3,
    "olmoe": testing.tiny_olmoe,
    "listed": tiny_listed,
}


def blueprint_of_experts(
    layers: int = 12, experts: int = 128, seed: int = 0, model_id: str = "org/mixture"
) -> Blueprint:
    """A made-up blueprint of single experts, with routing that is concentrated on few."""
    draw = np.random.default_rng(seed)
    entries = []
    for depth in range(layers):
        shares = draw.dirichlet(np.full(experts, 0.3))
        block = f"model.layers.{depth}"
        kinds = [(f"{block}.self_attn.{key}_proj", f"{key}_proj", (64, 64), "linear", None) for key in "qkvo"]
        for key, shape in (("gate_up_proj", (96, 64)), ("down_proj", (64, 48))):
            names = (f"{block}.mlp.experts.{number}.{key}" for number in range(experts))
            kinds += [
                (name, f"experts.{key}", shape, "expert", float(s)) for name, s in zip(names, shares, strict=True)
            ]
        for name, kind, shape, form, share in kinds:
            norm = float(draw.lognormal())
            entries.append(
                Submodule(
                    name,
                    norm,
                    kind=kind,
                    depth=depth,
                    group=f"{'attn' if share is None else 'ffn'}.{depth}",
                    shape=shape,
                    form=form,
                    norm_interval=(0.9 * norm, 1.1 * norm),
                    signal_norm=norm / 2,
                    adam_gain=norm,
                    weight_norm=1.0,
                    examples=64,
                    token_share=share,
                    gate_weight=share,
                )
            )
    return Blueprint(model_id, tuple(entries), provenance={"experts_per_token": 8})
