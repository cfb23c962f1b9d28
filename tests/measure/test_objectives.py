"""The minimized objective is measured, or an error gives the reason. Run: pytest tests/measure/test_objectives.py"""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaForCausalLM,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from benchmarks.objectives import classes, compare
from peft_blueprint import generate_blueprint, measure_influence
from peft_blueprint.errors import MeasurementError
from peft_blueprint.measure.submodules import find_submodules, find_weights
from peft_blueprint.testing import (
    VOCABULARY,
    random_model,
    tiny_bert,
    tiny_llama,
    tiny_mixtral,
    tiny_t5,
    tiny_vit,
    toy_batches,
)


def norms_by_autograd(model, rows, losses):
    """(rows, examples): norms of the gradient of each of the losses, one at a time."""
    weights = {weight.name: weight.tensor for weight in find_weights(model)}
    tensors = [weights[submodule.name] for submodule in rows]
    gradients = [torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True) for loss in losses]
    return torch.stack([torch.stack([torch.zeros(()) if g is None else g.norm() for g in of]) for of in gradients]).T


def assert_measures(model, batch, loss_fn, losses, **settings):
    influence = measure_influence(model, [batch], loss_fn=loss_fn, method="exact", progress=False, **settings)
    expected = norms_by_autograd(model, influence.submodules, losses)
    torch.testing.assert_close(influence.norms, expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------ preference and reward


def pairs(examples=4, length=7):
    generator = torch.Generator().manual_seed(0)
    shape = (2, examples, length)
    chosen, rejected = torch.randint(1, VOCABULARY, shape, generator=generator)
    return {"chosen": chosen, "rejected": rejected, "margin": torch.linspace(0, 1, examples)}


def log_likelihoods(model, ids):
    scores = model(ids).logits[:, :-1].float().log_softmax(-1)
    return scores.gather(2, ids[:, 1:, None])[..., 0].sum(1)


def preference_by_two_calls(model, batch):
    margin = log_likelihoods(model, batch["chosen"]) - log_likelihoods(model, batch["rejected"])
    return -F.logsigmoid(0.1 * margin - batch["margin"])


def preference_by_one_call(model, batch):
    chosen, rejected = log_likelihoods(model, torch.cat([batch["chosen"], batch["rejected"]])).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected) - batch["margin"])


@pytest.mark.parametrize("loss_fn", [preference_by_two_calls, preference_by_one_call])
@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral])
@pytest.mark.parametrize("include", ["adaptable", "all"])
def test_a_preference_loss(loss_fn, build, include):
    """DPO's, with a call for each side of the pairs, or one on both together, whose rows are not the examples."""
    model, batch = build(layers=2), pairs()
    assert_measures(model, batch, loss_fn, preference_by_two_calls(model, batch), include=include)


def test_a_policy_gradient():
    """REINFORCE with its advantages beside the tokens."""
    model, batch = tiny_llama(layers=2), pairs() | {"advantages": torch.tensor([1.0, -2.0, 0.5, 0.1])}

    def reinforce(model, batch):
        return -batch["advantages"] * log_likelihoods(model, batch["chosen"])

    assert_measures(model, batch, reinforce, reinforce(model, batch))


# ------------------------------------------------------------------------------------------ losses with other rows in


def embed(model, ids):
    return F.normalize(model(ids, output_hidden_states=True).hidden_states[-1].mean(dim=1), dim=1)


def contrastive(model, batch):
    scores = embed(model, batch["chosen"]) @ embed(model, batch["rejected"]).T / 0.1
    return F.cross_entropy(scores, torch.arange(len(scores)), reduction="none")


def test_a_contrastive_loss_is_measured_through_an_examples_own_rows():
    """For all the batch's losses: the weights' gradient with the other examples held constant."""
    model, batch = tiny_llama(layers=2), pairs()
    ones, others = embed(model, batch["chosen"]), embed(model, batch["rejected"])
    through = []
    for i in range(4):
        own = torch.arange(4)[:, None] == i
        scores = torch.where(own, ones, ones.detach()) @ torch.where(own, others, others.detach()).T / 0.1
        through.append(F.cross_entropy(scores, torch.arange(4), reduction="sum"))
    assert_measures(model, batch, contrastive, through)


@pytest.mark.parametrize(("build", "include"), [(tiny_llama, "all"), (tiny_mixtral, "adaptable")])
def test_a_contrastive_loss_cannot_be_measured_one_example_at_a_time(build, include):
    """A single example of a contrastive loss has zero gradient: that is an error."""
    with pytest.raises(
        MeasurementError, match=r"the loss [\d.]+, and 0 by itself: its losses depend on the other rows"
    ):
        measure_influence(build(), [pairs()], loss_fn=contrastive, include=include, progress=False)


# ------------------------------------------------------------------------------------------ the model's own


def by_own_loss(model, batch):
    one = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["labels"]))]
    outputs = [model(**example) for example in one]
    return [output["loss"] if isinstance(output, dict) else output[0] for output in outputs]


CLASSES = """BartForCausalLM WhisperForCausalLM CpmAntForCausalLM XLMWithLMHeadModel GPT2LMHeadModel MixtralForCausalLM
EncoderDecoderModel FSMTForConditionalGeneration T5GemmaForConditionalGeneration T5Gemma2ForTokenClassification
BigBirdForPreTraining BertForMaskedLM BertForSequenceClassification ViTForImageClassification"""


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("name", "kind", "config"), list(classes(CLASSES.split())), ids=lambda value: value)
def test_losses_are_those_that_a_class_of_transformers_returns(name, kind, config):
    """With labels shifted or not, decoder inputs made in its own way, several losses summed, another loss with a cache."""
    outcome, note = compare(name, kind, config)
    assert outcome == "own", note


class Wrapper(torch.nn.Module):
    """Another forward around a model, which hides its arguments."""

    def __init__(self, change):
        super().__init__()
        self.inner, self.change = tiny_llama(layers=2), change

    def forward(self, *args, **kwargs):
        return self.change(self.inner(*args, **kwargs))


def scaled(output):
    if output.loss is not None:
        output.loss = 1.5 * output.loss
    return output


def in_float64(output):
    output.loss = output.loss.double()  # fails without labels
    return output


def with_vectors(output):
    output.loss = output.loss.expand(3)
    return output


def detached(output):
    output.loss = 2 * output.loss.detach()
    return output


@pytest.mark.parametrize("change", [lambda output: output, dict, lambda output: output.to_tuple(), scaled, in_float64])
def test_a_wrapper_is_measured_by_its_own_loss(change):
    """Its arguments are hidden, and it returns an object, a dictionary, a tuple, or another loss."""
    model, [batch, *_] = Wrapper(change), toy_batches()
    assert_measures(model, batch, None, by_own_loss(model, batch))
    assert "inner.lm_head" not in [row.name for row in find_submodules(model)], "a wrapped model's head is a head"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda output: output.logits, "Wrapper returned no loss"),
        (with_vectors, r"one number as its loss, got shape \(3,\)"),
        (detached, "Wrapper returned losses without a graph"),
        (lambda output: output.nothing, "Wrapper failed on input_ids 1x12, .*nothing"),
    ],
)
def test_a_wrapper_without_a_usable_loss_is_an_error(change, message):
    """Nothing is guessed."""
    with pytest.raises(MeasurementError, match=message):
        measure_influence(Wrapper(change), toy_batches(), progress=False)


def compiled_layers(model):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer)
    return model


def compiled_in_place(model):
    model.compile()
    return model


@pytest.mark.parametrize(
    "compiled",
    [
        torch.compile,
        compiled_in_place,
        compiled_layers,
        lambda model: torch.compile(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))),
        lambda model: get_peft_model(torch.compile(model), LoraConfig(target_modules=["q_proj"])),
    ],
)
def test_a_compiled_model_is_measured_as_the_model_in_it(compiled):
    """By the same names, without compiling the hooks."""
    expected = measure_influence(tiny_llama(layers=2), toy_batches(), progress=False)
    measured = measure_influence(compiled(tiny_llama(layers=2)), toy_batches(), progress=False)
    assert measured.submodules == expected.submodules
    torch.testing.assert_close(measured.norms, expected.norms)
    torch.testing.assert_close(measured.losses, expected.losses)


@pytest.mark.parametrize("tuning", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS"])
def test_virtual_tokens_do_not_shift_the_targets(tuning, task):
    """Prompt tuning, P-tuning and prefix tuning."""
    build = {"CAUSAL_LM": tiny_llama, "SEQ_2_SEQ_LM": tiny_t5, "SEQ_CLS": tiny_bert}[task]
    torch.manual_seed(0)
    model, [batch, *_] = get_peft_model(build(layers=2), tuning(task_type=task, num_virtual_tokens=3)), toy_batches()
    model.eval().requires_grad_(True)
    if task == "SEQ_CLS":
        if tuning is PrefixTuningConfig:
            pytest.skip("BERT does not take prefixes in this version of PEFT")
        batch = batch | {"labels": torch.tensor([0, 1, 2, 1])}
    assert_measures(model, batch, None, by_own_loss(model, batch))


def test_examples_that_need_their_own_loss_and_cannot_be_split_are_an_error():
    """Both numbers are in the message."""
    positions = torch.arange(12)[None]
    batches = [batch | {"position_ids": positions} for batch in toy_batches()]
    influence = measure_influence(tiny_llama(), batches, progress=False)
    torch.testing.assert_close(influence.losses, measure_influence(tiny_llama(), toy_batches(), progress=False).losses)
    with pytest.raises(MeasurementError, match=r"returns the loss [\d.]+ .* computes as [\d.]+ .*'position_ids': 1"):
        measure_influence(Wrapper(scaled), batches, progress=False)


def test_a_models_own_contrastive_loss_is_an_error():
    """CLIP's is zero for one example."""
    parts = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    words = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=parts | words, vision_config=parts | {"image_size": 16, "patch_size": 8})
    batch = {"input_ids": pairs(2)["chosen"], "pixel_values": torch.randn(2, 3, 16, 16), "return_loss": True}
    with pytest.raises(MeasurementError, match="CLIPModel gives a batch of 2 examples the loss"):
        measure_influence(random_model(CLIPModel, config), [batch], progress=False)


def test_a_model_with_several_heads():
    """MusicGen predicts several codebooks, with a head for each."""
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MusicgenDecoderConfig(**sizes, vocab_size=64, num_codebooks=4, pad_token_id=63, bos_token_id=63)
    model = random_model(MusicgenForCausalLM, config)
    batch = {"input_ids": torch.randint(0, 60, (4, 5)), "labels": torch.randint(0, 60, (1, 5, 4))}
    assert_measures(model, batch, None, [model(**batch).loss])
    assert generate_blueprint(model, [batch], progress=False)


# ------------------------------------------------------------------------------------------ how a model is held


class CalledByKeyword(torch.nn.Module):
    """Linear layers whose input is a keyword."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, 8)
        self.proj, self.out = torch.nn.Linear(8, 8), torch.nn.Linear(8, VOCABULARY)

    def forward(self, input_ids, labels, attention_mask=None):
        logits = self.out(input=self.proj(input=self.embed(input_ids)).relu())
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_layers_called_by_keyword():
    """And a model that cannot do without labels."""
    model, [batch, *_] = CalledByKeyword(), toy_batches()
    assert_measures(model, batch, None, by_own_loss(model, batch))


@pytest.mark.parametrize("build", [tiny_llama, tiny_vit])
def test_inside_inference_mode(build):
    """Also with batches that were made there."""
    batches = [{"pixel_values": torch.ones(2, 3, 16, 16), "labels": torch.tensor([0, 2])}]
    batches = toy_batches() if build is tiny_llama else batches
    model = build(layers=2)
    expected = measure_influence(model, batches, progress=False)
    with torch.inference_mode():
        made_there = [{key: value.clone() for key, value in batch.items()} for batch in batches]
        torch.testing.assert_close(measure_influence(model, made_there, progress=False).norms, expected.norms)
        with pytest.raises(MeasurementError, match=r"made in torch.inference_mode\(\)"):
            measure_influence(build(layers=1), batches, progress=False)


def test_weights_on_the_meta_device_are_an_error():
    """There is nothing to measure with."""
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_llama().config)
    with pytest.raises(MeasurementError, match="weights are on the meta device"):
        measure_influence(model, toy_batches(), progress=False)


def wav2vec2():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    convolutions = {"conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (4, 2), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(**sizes, **convolutions, **positions, vocab_size=VOCABULARY, layerdrop=0.9)
    return random_model(Wav2Vec2ForCTC, config)


@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (tiny_vit, {"pixel_values": torch.ones(2, 3, 16, 16), "labels": torch.tensor([0, 2])}),
        (wav2vec2, {"input_values": torch.linspace(-1, 1, 800).view(2, 400), "labels": torch.arange(3, 9).view(2, 3)}),
    ],
)
def test_reentrant_checkpointing_without_an_embedding(build, batch):
    """Although the first layer's input requires no gradient, every layer is measured."""
    model = build()
    expected = measure_influence(model, [batch], progress=False)
    name = "activation_checkpointing_enable"  # gradient_… in transformers 4
    getattr(model, name, model.gradient_checkpointing_enable)({"use_reentrant": True})
    model.train()
    measured = measure_influence(model, [batch], progress=False)
    assert measured.submodules == expected.submodules
    torch.testing.assert_close(measured.norms, expected.norms)


def test_a_classifier_with_an_objective_of_its_own():
    """With weighted classes: the model's own loss counts, not the one that its shapes suggest."""
    model, [batch, *_] = tiny_bert(), toy_batches()
    batch = batch | {"labels": torch.tensor([0, 1, 2, 1])}
    forward, weights = model.forward, torch.tensor([1.0, 5.0, 0.2])

    def weighted(input_ids=None, attention_mask=None, labels=None, **rest):
        output = forward(input_ids=input_ids, attention_mask=attention_mask, **rest)
        if labels is not None:
            output.loss = (F.cross_entropy(output.logits, labels, reduction="none") * weights[labels]).mean()
        return output

    model.forward = weighted
    assert_measures(model, batch, None, by_own_loss(model, batch))


def test_a_decoder_with_another_loss_function():
    """Label smoothing put in through transformers' own door, `loss_function`."""
    model, [batch, *_] = tiny_llama(layers=2), toy_batches()

    def smoothed(logits, labels, **_):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.3)

    model.loss_function = smoothed
    assert_measures(model, batch, None, by_own_loss(model, batch))


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda m, b: log_likelihoods(m, b["chosen"]).mean(), r"one loss for each example, .*got shape \(\)"),
        (lambda m, b: log_likelihoods(m, b["chosen"])[:, None], r"got shape \(4, 1\)"),
        (lambda m, b: log_likelihoods(m, b["chosen"]).tolist(), "got list"),
        (lambda m, b: log_likelihoods(m, b["chosen"])[:3], "got 3 losses for a batch of 4 examples"),
        (lambda m, b: log_likelihoods(m, b["chosen"]).detach(), "losses without a graph: they were detached"),
    ],
)
def test_invalid_losses(loss_fn, message):
    """Each error names the given and the expected value."""
    with pytest.raises(MeasurementError, match=message):
        measure_influence(tiny_llama(layers=1), [pairs()], loss_fn=loss_fn, progress=False)


def test_an_example_without_a_target_is_named_for_any_objective():
    """By the model's own loss it would be NaN."""
    model, [batch, *_] = tiny_mixtral(output_router_logits=True), toy_batches()
    batch = batch | {"labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(MeasurementError, match="have no target token"):
        measure_influence(model, [batch], progress=False)


def test_a_models_own_loss_is_asked_for_without_a_cache():
    """Keys and values that are kept would be added to once more where a checkpointed layer runs again."""
    model, [batch, *_] = tiny_mixtral(output_router_logits=True), toy_batches()
    seen = []
    model.register_forward_pre_hook(lambda m, a, words: seen.append(words.get("use_cache")), with_kwargs=True)
    measure_influence(model, [batch], progress=False)
    assert seen[-4:] == [False] * 4


def test_batches_without_rows_are_named():
    """Nested tensors, and rows beyond the examples."""
    nested = {"chosen": {"input_ids": torch.ones(2, 3, dtype=torch.long)}}
    with pytest.raises(MeasurementError, match=r"got \['chosen'\]. Give tensors by name, not nested"):
        measure_influence(tiny_llama(), [nested], loss_fn=preference_by_two_calls, progress=False)
    with pytest.raises(MeasurementError, match=r"A batch of 4 examples has {'reference': 3}"):
        odd = pairs() | {"reference": torch.zeros(3)}
        measure_influence(tiny_mixtral(), [odd], loss_fn=preference_by_two_calls, progress=False)
    with pytest.raises(
        MeasurementError, match=r"has \['input_ids'\] and no labels.*LlamaForCausalLM returned no loss"
    ):
        measure_influence(tiny_llama(), [{"input_ids": pairs()["chosen"]}], progress=False)
