"""Every family of models is measured rightly, nothing dropped in silence. Run: pytest tests/measure/test_architectures.py"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf

from peft_blueprint import measure_influence
from peft_blueprint.blueprint.entry import ADAPTABLE
from peft_blueprint.measure.hooks import measurement_mode
from peft_blueprint.measure.losses import per_example_losses
from peft_blueprint.measure.submodules import dequantized_weight, find_weights, linear_modules, shape_of
from peft_blueprint.testing import (
    VOCABULARY,
    quantize,
    random_model,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_t5,
    tiny_vit,
    toy_batches,
)


WORDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
GROUPED = {**SMALL, "num_key_value_heads": 2}
SEEN = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "patch_size": 8}


def decoder(name: str, **settings: Any) -> Callable[[], Any]:
    def build() -> Any:
        return random_model(getattr(tf, name + "ForCausalLM"), getattr(tf, name + "Config")(**WORDS | settings))

    return build


def of(head: str, config: str, **settings: Any) -> Callable[[], Any]:
    return lambda: random_model(getattr(tf, head), getattr(tf, config)(**settings))


# ------------------------------------------------------------------------------------------ batches


def text():
    return toy_batches(examples=4, length=9, batch_size=2)


def classes():
    batches = text()
    return [batch | {"labels": torch.tensor([i % 3, 2])} for i, batch in enumerate(batches)]


def token_classes():
    return [b | {"labels": b["labels"].where(b["labels"] < 0, b["labels"] % 3)} for b in text()]


def squares():
    """As many examples as tokens: whether a layer sees examples or tokens first is not to be seen."""
    [batch] = toy_batches(examples=4, length=4, batch_size=4, padding="none", prompt=1)
    return [batch | {"labels": torch.tensor([0, 2, 1, 2])}]


def numbers():
    return [batch | {"labels": torch.tensor([0.5, -1.0])} for batch in text()]


def several_of_three():
    return [batch | {"labels": torch.tensor([[1.0, 0, 1], [0, 0, 1]])} for batch in text()]


def spans():
    answers = {"start_positions": torch.tensor([3, 2]), "end_positions": torch.tensor([4, 3])}
    return [{k: v for k, v in batch.items() if k != "labels"} | answers for batch in text()]


def pairs_of_sequences():
    return [
        batch | {"labels": batch["labels"][:, 2:7].contiguous()}
        for batch in toy_batches(4, 9, 2, padding="none", prompt=1)
    ]


def pictures():
    generator = torch.Generator().manual_seed(3)
    return [
        {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator), "labels": torch.tensor([0, 2])}
        for _ in range(2)
    ]


def sounds():
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(2, 8, 20, generator=generator)
    return [{"input_features": features, "labels": torch.tensor([[5, 6, 7, -100], [8, 9, 10, 11]])}]


def pictures_and_text():
    """Two examples with a picture, in one batch, and one without; the picture stands where token 96 does."""
    generator = torch.Generator().manual_seed(3)
    [words] = toy_batches(examples=3, length=10, batch_size=3, padding="none")
    seen = {key: value[:2].clone() for key, value in words.items()}
    seen["input_ids"][:, 1:5] = 96
    seen["labels"][:, 1:5] = -100
    blind = {key: value[2:].clone() for key, value in words.items()}
    blind["input_ids"] = blind["input_ids"].clamp_max(90)
    return [seen | {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}, blind]


def patches_and_text():
    """For Qwen2-VL, which takes all patches of all pictures as one list: one example with a picture, one without."""
    generator = torch.Generator().manual_seed(3)
    [batch] = toy_batches(examples=2, length=10, batch_size=2, padding="none")
    seen, blind = ({key: value[i : i + 1].clone() for key, value in batch.items()} for i in range(2))
    seen["input_ids"][:, 1], seen["input_ids"][:, 2:6], seen["input_ids"][:, 6] = 94, 96, 95
    seen["labels"][:, 1:7] = -100
    patches = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
    return [
        seen
        | {
            "pixel_values": patches,
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (seen["input_ids"] == 96).int(),
        },
        blind | {"input_ids": blind["input_ids"].clamp_max(90)},
    ]


# ------------------------------------------------------------------------------------------ models


def llava():
    vision = tf.CLIPVisionConfig(**SEEN, image_size=16)
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(**WORDS, **GROUPED),
        image_token_id=96,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return random_model(tf.LlavaForConditionalGeneration, config)


def qwen2_vl():
    config = tf.Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
        text_config={**WORDS, **GROUPED, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        image_token_id=96,
        vision_start_token_id=94,
        vision_end_token_id=95,
    )
    return random_model(tf.Qwen2VLForConditionalGeneration, config)


def smolvlm():
    config = tf.SmolVLMConfig(
        vision_config={**SEEN, "image_size": 16},
        text_config=tf.LlamaConfig(**WORDS, **GROUPED),
        image_token_id=96,
        scale_factor=1,
        pad_token_id=0,
    )
    return random_model(tf.SmolVLMForConditionalGeneration, config)


def smolvlm_batches():
    seen, blind = pictures_and_text()
    return [seen | {"pixel_values": seen["pixel_values"][:, None]}, blind]


class Case(NamedTuple):
    build: Callable[[], Any]
    batches: Callable[[], list[dict[str, Any]]] = text


SEQ2SEQ = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
SEQ2SEQ |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "num_labels": 3, "pad_token_id": 0}
ENCODER = {**WORDS, **SMALL, "num_labels": 3}
CASES = {
    "Llama": Case(tiny_llama),
    "Llama tied": Case(lambda: tiny_llama(tie_word_embeddings=True)),
    "Llama with biases": Case(lambda: tiny_llama(attention_bias=True, mlp_bias=True)),
    "Qwen3": Case(decoder("Qwen3", **GROUPED, head_dim=8)),
    "Gemma": Case(decoder("Gemma", **GROUPED, head_dim=8)),
    "Gemma 2": Case(decoder("Gemma2", **GROUPED, head_dim=8, attn_logit_softcapping=3.0, final_logit_softcapping=2.0)),
    "Gemma 3": Case(of("Gemma3ForCausalLM", "Gemma3TextConfig", **WORDS, **GROUPED, head_dim=8)),
    "Mistral": Case(decoder("Mistral", **GROUPED, sliding_window=4)),
    "Phi": Case(decoder("Phi", **SMALL)),
    "Phi-3": Case(decoder("Phi3", **GROUPED)),
    "GPT-2": Case(tiny_gpt2),
    "OPT": Case(decoder("OPT", hidden_size=32, ffn_dim=48, num_attention_heads=4, num_hidden_layers=2)),
    "OPT 350m": Case(
        decoder("OPT", hidden_size=32, ffn_dim=48, num_attention_heads=4, num_hidden_layers=2, word_embed_proj_dim=16)
    ),
    "GPT-NeoX": Case(decoder("GPTNeoX", **SMALL)),
    "Falcon": Case(decoder("Falcon", hidden_size=32, num_attention_heads=4, num_hidden_layers=2)),
    "Bloom": Case(decoder("Bloom", hidden_size=32, n_head=4, n_layer=2)),
    "Mamba": Case(decoder("Mamba", hidden_size=32, num_hidden_layers=2, state_size=4)),
    "Mixtral": Case(tiny_mixtral),
    "Mixtral balancing its router": Case(lambda: tiny_mixtral(output_router_logits=True, router_aux_loss_coef=0.5)),
    "Qwen3-MoE": Case(
        decoder("Qwen3Moe", **GROUPED, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
    ),
    "Qwen2-MoE": Case(
        decoder(
            "Qwen2Moe",
            **GROUPED,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
        )
    ),
    "GraniteMoe": Case(decoder("GraniteMoe", **GROUPED, num_local_experts=4, num_experts_per_tok=2)),
    "GPT-OSS": Case(decoder("GptOss", **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
    "BERT classifying sequences": Case(tiny_bert, classes),
    "BERT classifying tokens": Case(lambda: tiny_bert(tokens=True), token_classes),
    "BERT filling in": Case(of("BertForMaskedLM", "BertConfig", **WORDS, **SMALL)),
    "BERT answering": Case(of("BertForQuestionAnswering", "BertConfig", **WORDS, **SMALL), spans),
    "BERT regressing": Case(of("BertForSequenceClassification", "BertConfig", **ENCODER | {"num_labels": 1}), numbers),
    "BERT with several labels": Case(of("BertForSequenceClassification", "BertConfig", **ENCODER), several_of_three),
    "ALBERT": Case(of("AlbertForSequenceClassification", "AlbertConfig", **ENCODER, embedding_size=16), classes),
    "DeBERTa": Case(
        of(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            **ENCODER,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
        ),
        classes,
    ),
    "XLNet": Case(of("XLNetForSequenceClassification", "XLNetConfig", vocab_size=VOCABULARY, **XLNET), squares),
    "T5": Case(tiny_t5, pairs_of_sequences),
    "T5 gated": Case(lambda: tiny_t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False), pairs_of_sequences),
    "BART": Case(
        of("BartForConditionalGeneration", "BartConfig", vocab_size=VOCABULARY, **SEQ2SEQ), pairs_of_sequences
    ),
    "BART classifying": Case(
        of("BartForSequenceClassification", "BartConfig", vocab_size=VOCABULARY, **SEQ2SEQ, num_labels=3),
        lambda: [
            b | {"input_ids": b["input_ids"].clamp_min(3).index_fill(1, torch.tensor([8]), 2)} for b in classes()
        ],
    ),
    "Whisper": Case(
        of(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=VOCABULARY,
            **SEQ2SEQ,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=8,
            decoder_start_token_id=1,
            bos_token_id=1,
            eos_token_id=2,
        ),
        sounds,
    ),
    "ViT": Case(tiny_vit, pictures),
    "ConvNeXt": Case(
        of(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_stages=2,
            num_labels=3,
        ),
        pictures,
    ),
    "LLaVA": Case(llava, pictures_and_text),
    "SmolVLM": Case(smolvlm, smolvlm_batches),
    "Qwen2-VL": Case(qwen2_vl, patches_and_text),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """A model, its batches, and autograd's gradients."""
    case = CASES[request.param]
    model, batches = case.build(), case.batches()
    return model, batches, *by_autograd(model, batches)


def by_autograd(model, batches):
    """{parameter: norms}, losses: the model's own loss, one example at a time."""
    model.requires_grad_(True)  # a few freeze what they compute, as Whisper its positions
    norms, losses = {name: [] for name, _ in model.named_parameters()}, []
    for batch in batches:
        examples = len(next(iter(batch.values()))) if "image_grid_thw" not in batch else 1
        for i in range(examples):
            model.zero_grad()
            one = {key: value[i : i + 1] if examples > 1 else value for key, value in batch.items()}
            loss = model(**one).loss
            loss.backward()
            losses.append(loss.item())
            for name, parameter in model.named_parameters():
                norms[name].append(0.0 if parameter.grad is None else parameter.grad.norm().item())
    model.zero_grad()
    return {name: torch.tensor(each) for name, each in norms.items()}, torch.tensor(losses)


@pytest.mark.parametrize("include", ["adaptable", "all"])
def test_norms_and_losses_are_autograds_and_nothing_is_dropped(case, include):
    """Every row, every example; and every parameter is a row or is listed with the reason, once."""
    model, batches, norms, losses = case
    influence = measure_influence(model, batches, method="exact", include=include, progress=False)
    torch.testing.assert_close(influence.losses, losses, rtol=1e-4, atol=1e-6)
    rows, unmeasured = [s.name for s in influence.submodules], dict(influence.unmeasured)
    names = {w.name: f"{w.name}.{w.parameter}" if w.name not in norms else w.name for w in find_weights(model)}
    assert sorted(names.values()) == sorted(norms), "every parameter goes by one name, tied ones by their first"
    assert sorted([*rows, *unmeasured]) == sorted(names), "each is measured or listed"
    assert len(unmeasured) == len(influence.unmeasured) and all(unmeasured.values())
    expected = torch.stack([norms[names[row]] for row in rows])
    scale = expected.norm(dim=0, keepdim=True)  # an example's whole gradient: some rows' are nought but for rounding
    wrong = ((influence.norms - expected).abs() > 1e-4 * expected + 1e-6 * scale).any(dim=1)
    assert not wrong.any(), [row for row, is_wrong in zip(rows, wrong, strict=True) if is_wrong]
    if include == "all":
        assert all(norms[names[name]].max() == 0 for name in unmeasured), unmeasured
    else:
        assert all(submodule.form in ADAPTABLE for submodule in influence.submodules)


# ------------------------------------------------------------------------------------------ sketches


def saved_shapes(run):
    """How many tensors of each shape are saved for the backward pass."""
    shapes = Counter()

    def pack(tensor):
        shapes[tuple(tensor.shape)] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return shapes


WIDE = {"hidden_size": 128, "intermediate_size": 192}


def test_sketched_norms_are_as_near_as_they_say_and_no_input_is_kept():
    """Errors are of the predicted size; beyond what a pass saves anyway there are only sketches, (B, T, s)."""
    model, batches = tiny_llama(**WIDE), toy_batches(examples=16, length=48, batch_size=4, padding="none")
    exact = measure_influence(model, batches, method="exact", progress=False)
    sketched = measure_influence(model, batches, method="sketch", sketch_size=16, progress=False)
    assert (sketched.norm_errors > 0).all() and not exact.norm_errors.any()
    errors = (sketched.norms / exact.norms - 1) / sketched.norm_errors
    assert 0.5 < errors.square().mean().sqrt() < 1.5 and errors.abs().max() < 5

    def plain():
        with (
            measurement_mode(model),
            model.get_input_embeddings().register_forward_hook(lambda *given: given[2].requires_grad_()),
        ):
            per_example_losses(model, batches[0])[0].sum().backward()

    anyway = saved_shapes(plain)
    settings = {"method": "sketch", "sketch_size": 16, "progress": False}
    besides = saved_shapes(lambda: measure_influence(model, batches[:1], **settings)) - anyway
    assert besides == Counter({(4, 48, 16): len(exact.submodules)})
    long = toy_batches(examples=1, length=160, padding="none")
    whole = saved_shapes(lambda: measure_influence(model, long, method="exact", progress=False))
    assert (1, 160, 128) in whole, "this test sees an input that is kept"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights_are_sketched(kind):
    """4- and 8-bit layers give the sketches of their dequantised values, with the same directions."""
    pytest.importorskip("bitsandbytes")
    model, reference = quantize(tiny_llama(layers=2, **WIDE), kind), tiny_llama(layers=2, **WIDE)
    others = dict(linear_modules(reference))
    settings = {"method": "sketch", "sketch_size": 16, "progress": False}
    measured = measure_influence(model, toy_batches(), **settings)
    assert all(s.quantized for s in measured.submodules) and (measured.norm_errors > 0).all()
    for name, module in list(linear_modules(model))[:-1]:
        others[name].weight.data = dequantized_weight(module).float().reshape(shape_of(others[name]))
    expected = measure_influence(reference, toy_batches(), **settings)
    # 8-bit layers round their inputs too, so that they can only be near
    torch.testing.assert_close(measured.norms, expected.norms, rtol=0.1 if kind == "int8" else 1e-4, atol=1e-8)
