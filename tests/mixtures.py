"""Tiny mixtures of experts: the families of transformers, and experts in a list as older models have them."""

import torch
from torch import nn

from peft_blueprint import testing


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
