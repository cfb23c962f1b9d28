"""Modules of a model that can take an adapter. Run: pytest tests/measure/test_submodules.py"""

from dataclasses import replace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from peft_blueprint import Blueprint, BlueprintConfig, generate_blueprint, measure_influence
from peft_blueprint.errors import BlueprintError
from peft_blueprint.measure.submodules import find_submodules, find_weights
from peft_blueprint.testing import VOCABULARY, random_model, tiny_llama, tiny_mixtral, tiny_t5, toy_batches


def forms_of(model):
    return {weight.name: weight.form for weight in find_weights(model)}


def roberta(**settings):
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=1,
        **settings,
    )
    return random_model(transformers.RobertaForSequenceClassification, config)


def test_a_head_of_several_layers_is_a_head():
    """PEFT trains the whole of `classifier` for its task, and passes over adapters inside it."""
    forms = forms_of(roberta())
    assert forms["classifier.dense"] == forms["classifier.out_proj"] == "head"
    assert forms["roberta.encoder.layer.0.output.dense"] == "linear"


def test_parameters_without_an_element_are_left_out():
    """As DINOv3's registers where there are none, and MobileBERT's head where two sizes are equal."""
    model = tiny_llama(1)
    forms = forms_of(model)
    model.registers = torch.nn.Parameter(torch.empty(1, 0, 32))
    model.model.layers[0].mlp.empty = torch.nn.Linear(97, 1, bias=False)
    model.model.layers[0].mlp.empty.weight = torch.nn.Parameter(torch.empty(0, 97))
    assert forms_of(model) == forms
    blueprint = generate_blueprint(model, toy_batches(2), include="all", bootstrap=5, progress=False)
    assert set(blueprint.names) == set(forms)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Lazy modules")
def test_modules_whose_layers_cannot_be_looked_into_are_refused():
    """In words."""
    scripted = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    for model, message in (
        (scripted, "compiled by torch.jit"),
        (torch.nn.LazyLinear(3), "'weight' .* no shape before"),
    ):
        with pytest.raises(BlueprintError, match=message):
            measure_influence(model, toy_batches(2), progress=False)


def test_tied_weights_have_one_name_and_take_no_adapter():
    """The first name that the model has for them."""
    forms = forms_of(tiny_t5(tie_word_embeddings=True))
    assert forms["shared"] == "embedding" and not {"lm_head", "encoder.embed_tokens"} & forms.keys()
    assert forms_of(tiny_llama(tie_word_embeddings=False))["lm_head"] == "head"
    assert "lm_head" not in forms_of(tiny_llama(tie_word_embeddings=True))


def test_a_head_stays_a_head_under_an_adapter_or_a_trained_copy():
    """So that a blueprint made while training has the entries, and the digest, of the bare model."""
    names = [s.name for s in find_submodules(tiny_llama(layers=1))]
    for settings in ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, {"target_modules": ["lm_head"]}):
        adapted = get_peft_model(tiny_llama(layers=1), LoraConfig(**settings))
        assert [s.name for s in find_submodules(adapted)] == names


def test_experts_stored_the_other_way_round_have_their_outputs_as_rows():
    """GPT-OSS keeps (experts, d_in, d_out); shapes and sketches have outputs first, as those of other experts."""
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.GptOssConfig(
        vocab_size=VOCABULARY, num_hidden_layers=1, head_dim=8, num_local_experts=4, num_experts_per_tok=2, **settings
    )
    model = random_model(transformers.GptOssForCausalLM, config)
    [down] = [weight for weight in find_weights(model) if weight.name.endswith("experts.down_proj")]
    if not down.is_transposed:
        pytest.skip("this release of transformers does not say which way round")
    assert tuple(down.tensor.shape) == (4, 48, 32) and down.shape == (4, 32, 48)
    [batch] = toy_batches(examples=2, batch_size=2)
    influence = measure_influence(model, [batch], sketch_size=None, progress=False)
    row = [s.name for s in influence.submodules].index(down.name)
    model.zero_grad()
    for i in range(2):
        (model(**{key: value[i : i + 1] for key, value in batch.items()}).loss / 2).backward()
    expected = down.tensor.grad.mT.flatten(0, 1)
    torch.testing.assert_close(influence.sketches[row], expected, rtol=1e-3, atol=1e-6)


def test_a_block_at_two_places_is_one_and_a_layer_at_two_places_takes_no_adapter():
    """PEFT replaces a layer at one place: inside a block that all places share that is right, elsewhere it is not."""
    model = tiny_llama(layers=3)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.model.layers[2].mlp.up_proj = model.model.layers[2].mlp.gate_proj
    forms = forms_of(model)
    assert forms["model.layers.0.mlp.up_proj"] == "linear" and "model.layers.1.mlp.up_proj" not in forms
    assert forms["model.layers.2.mlp.gate_proj"] == "parameter" and "model.layers.2.mlp.up_proj" not in forms
    batches = toy_batches(examples=2, batch_size=2)
    influence = measure_influence(model, batches, include="all", method="exact", progress=False)
    weights = {weight.name: weight.tensor for weight in find_weights(model)}
    model(**{key: value[:1] for key, value in batches[0].items()}).loss.backward()
    expected = torch.stack([weights[s.name].grad.norm() for s in influence.submodules])
    torch.testing.assert_close(influence.norms[:, 0], expected, rtol=1e-4, atol=1e-6)


def test_experts_under_adapters_are_measured_as_without():
    """PEFT puts its adapters around a whole parameter, several around one module; names and norms stay."""
    expected = measure_influence(tiny_mixtral(), toy_batches(4), include="all", method="exact", progress=False)
    record = Blueprint("m", tuple(replace(s, gradient_norm=1.0) for s in find_submodules(tiny_mixtral())))
    model = get_peft_model(tiny_mixtral(), BlueprintConfig(blueprint=record, fraction=1.0, r=2))
    measured = measure_influence(model, toy_batches(4), include="all", method="exact", progress=False)
    assert [s.name for s in measured.submodules] == [s.name for s in expected.submodules]
    torch.testing.assert_close(measured.norms, expected.norms, rtol=1e-4, atol=1e-6)


def test_routers_are_not_candidates_for_adapters():
    """Whether they are linear layers, as in transformers 4, or not."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    config = transformers.Qwen2MoeConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, **experts)
    names = [s.name for s in find_submodules(random_model(transformers.Qwen2MoeForCausalLM, config))]
    assert [n for n in names if "shared_expert.up_proj" in n] and not [n for n in names if n.endswith("gate")]

    class Mixture(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = torch.nn.Linear(4, 2), torch.nn.Linear(4, 4)
            self.experts = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])

    assert [s.name for s in find_submodules(Mixture())] == ["up", "experts.0", "experts.1"]


def test_a_weight_that_is_read_without_a_call_is_measured_as_a_parameter():
    """nn.MultiheadAttention's output projection: an adapter on it would go unheard."""

    class Attending(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
            self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = self.layers[0](x)
            return self.attention(x, x, x)[0]

    torch.manual_seed(0)
    model, batch = Attending(), {"x": torch.randn(3, 5, 8)}
    settings = {"loss_fn": lambda m, b: m(b["x"]).square().mean((1, 2)), "progress": False}
    assert [s.name for s in measure_influence(model, [batch], **settings).submodules] == ["layers.0"]
    everything = measure_influence(model, [batch], include="all", **settings)
    assert not everything.unmeasured and everything.examples == 3
    model(batch["x"][:1]).square().mean().backward()
    for i, submodule in enumerate(everything.submodules):
        [weight] = [w for w in find_weights(model) if w.name == submodule.name]
        torch.testing.assert_close(everything.norms[i, 0], weight.tensor.grad.norm(), rtol=1e-4, atol=1e-7)
