"""Layers that are more, or less, than a weight times an input. Run: pytest tests/measure/test_layers.py"""

import copy
import re
import subprocess
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from peft_blueprint import BlueprintConfig, generate_blueprint, measure_influence
from peft_blueprint.errors import MeasurementError, PlacementError
from peft_blueprint.measure import Checks, find_submodules, find_weights, is_quantized, unwrap
from peft_blueprint.place import plan_settings
from peft_blueprint.place.cost import Structure, workload_of
from peft_blueprint.testing import VOCABULARY, random_model, tiny_llama, toy_batches
from peft_blueprint.train import check_adapters


BATCHES = toy_batches(examples=2, batch_size=2)
LAYERS = ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]


class PackedBuffer(nn.Module):
    """As GPTQ, AWQ and EETQ: the weight is a buffer of integers."""

    key = "qweight"

    def __init__(self, weight):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None
        self.hold((weight * 64).round().clamp(-127, 127).to(torch.int8))

    def hold(self, values):
        self.register_buffer(self.key, values)

    def forward(self, x):
        return F.linear(x, getattr(self, self.key).to(x) / 64)


class PackedWeight(PackedBuffer):
    """As EETQ: its buffer is called weight."""

    key = "weight"


class PackedParameter(PackedBuffer):
    """As HQQ: a parameter of integers, and a way to dequantize it."""

    key = "W_q"

    def hold(self, values):
        self.W_q = nn.Parameter(values, requires_grad=False)

    def dequantize(self):
        return self.W_q.float() / 64


class OldNames(PackedBuffer):
    """As AutoGPTQ, which writes infeatures."""

    def __init__(self, weight):
        super().__init__(weight)
        self.outfeatures, self.infeatures = self.out_features, self.in_features
        del self.out_features, self.in_features


class Integers(nn.Linear):
    """An `nn.Linear` whose weight has a dtype that takes no gradient."""

    dtype = torch.int8

    def __init__(self, weight):
        super().__init__(*weight.shape[::-1], bias=False)
        self.weight = nn.Parameter((weight * 64).round().clamp(-127, 127).to(self.dtype), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x) / 64)


class Float8(Integers):
    """As transformers' FP8Linear."""

    dtype = torch.float8_e4m3fn


class Wrapped(torch.Tensor):
    """As torchao's tensors: float32 by its dtype, integers inside."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values):
        self.values_inside = values

    def __tensor_flatten__(self):
        return ["values_inside"], None

    def dequantize(self):
        return self.values_inside.float() / 64

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values_inside)
        return function(*[a.dequantize() if isinstance(a, cls) else a for a in args], **(kwargs or {}))


class Subclassed(nn.Linear):
    """An `nn.Linear` whose weight is a subclass of Tensor."""

    kind = Wrapped

    def __init__(self, weight):
        super().__init__(*weight.shape[::-1], bias=False)
        values = (weight * 64).round().clamp(-127, 127).to(torch.int8)
        self.weight = nn.Parameter(self.kind(values), requires_grad=False)


class Opaque(Wrapped):
    """As tensors that do not tell their parts."""

    __tensor_flatten__ = None


class SubclassedOpaque(Subclassed):
    """An `nn.Linear` with such a weight."""

    kind = Opaque


class Compressed(nn.Linear):
    """As compressed-tensors: an `nn.Linear` without its weight."""

    def __init__(self, weight):
        super().__init__(*weight.shape[::-1], bias=False)
        del self.weight
        self.weight_packed = nn.Parameter((weight * 64).round().clamp(-127, 127).to(torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.full((len(weight), 1), 1 / 64), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight_packed.to(x) * self.weight_scale)


class OfOtherSizes(PackedBuffer):
    """As Megatron, which writes input_size."""

    def __init__(self, weight):
        super().__init__(weight)
        self.output_size, self.input_size = self.out_features, self.in_features
        del self.out_features, self.in_features


QUANTIZED = [PackedBuffer, PackedWeight, PackedParameter, OldNames, Integers, Float8, Subclassed]
QUANTIZED += [SubclassedOpaque, Compressed, OfOtherSizes]


def with_layers(cls, names=LAYERS):
    """A model with layers of a class, and the plain model of the same values."""
    model, plain = tiny_llama(layers=2), tiny_llama(layers=2)
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        parent, _, own = name.rpartition(".")
        layer = cls(weight)
        setattr(model.get_submodule(parent), own, layer)
        plain.get_submodule(name).weight.data = layer(torch.eye(weight.shape[1])).detach().T.contiguous()
    return model, plain


@pytest.mark.parametrize("cls", QUANTIZED)
def test_quantized_layers_of_any_class_are_measured_and_not_unfrozen(cls):
    """They are recognized by their weights; norms equal those of the plain model of the same values."""
    model, plain = with_layers(cls)
    found = {s.name: s for s in find_submodules(model)}
    assert [name for name, s in found.items() if s.quantized] == LAYERS
    assert [s.shape for s in found.values()] == [s.shape for s in find_submodules(plain)]
    assert Structure.of(model).adaptable == Structure.of(plain).adaptable
    expected = measure_influence(plain, BATCHES, method="exact", progress=False)
    measured = measure_influence(model, BATCHES, method="exact", progress=False)
    torch.testing.assert_close(measured.norms, expected.norms, rtol=1e-4, atol=1e-6)
    blueprint = generate_blueprint(model, BATCHES, progress=False)
    with pytest.raises(PlacementError, match="held in 4 or 8 bits"):
        get_peft_model(model, BlueprintConfig(blueprint=blueprint, mode="unfreeze", num_modules=2))


def test_floating_point_is_not_quantized():
    """Half precision, and torchao's wrappers of floating point."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert not is_quantized(torch.ones(2, dtype=dtype)) and not is_quantized(Wrapped(torch.ones(2, dtype=dtype)))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4}, "nf4"),
        ({"quant_method": "gptq", "bits": 8}, "int8"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "nf4"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "int8"),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "nf4"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, "nf4"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "int8"),
        ({"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"num_bits": 4}}}}, "nf4"),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}}, "nf4"),
        ({"quant_method": "eetq", "weights": "int8"}, "int8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}, "int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"quant_method": "gptq", "bits": "4"}, "nf4"),
        ({"quant_method": "torchao", "quant_type": "int8_dynamic_activation_int4_weight"}, "nf4"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ", "kv_cache_quant_algo": "FP8"}, "nf4"),
        ({"quant_method": "gguf", "gguf_file": "model-Q8_0.gguf"}, "int8"),
        ({"quant_method": "fp8", "dequantize": True}, None),
        ({}, None),
    ],
)
def test_plans_take_quantized_checkpoints_as_they_are(settings, expected):
    """By the config's quantization_config, of any method."""
    config = copy.deepcopy(tiny_llama(layers=1).config)
    config.quantization_config = settings
    assert workload_of(config).quantization == expected
    planned = {setting.quantization for setting in plan_settings(None, config, budget="1GiB")}
    assert planned == ({expected} if expected else {None, "nf4"})
    assert workload_of(tiny_llama(layers=1).config).quantization is None


@pytest.mark.parametrize(
    ("settings", "said", "expected"),
    [
        ({"quant_method": "aqlm", "nbits_per_codebook": 16, "in_group_size": 8}, "aqlm) takes 2 bits", "nf4"),
        (
            {
                "quant_method": "vptq",
                "config_for_layers": {"q": {"vector_lens": [-1, 8], "num_centroids": [-1, 4096]}},
            },
            "vptq) takes 1.5 bits",
            "nf4",
        ),
        ({"quant_method": "bitnet", "linear_class": "bitlinear"}, "bitnet) takes 2 bits", "nf4"),
        ({"quant_method": "quanto", "weights": "int2", "activations": "int8"}, "quanto) takes 2 bits", "nf4"),
        ({"quant_method": "exl3", "bits": 5.5}, "exl3) takes 5.5 bits", "int8"),
        (
            {"quant_method": "new", "compute_dtype": "float16", "nbits_per_codebook": "?"},
            "does not say how many",
            "int8",
        ),
    ],
)
def test_plans_say_which_bits_they_assume(settings, said, expected):
    config = copy.deepcopy(tiny_llama(layers=1).config)
    config.quantization_config = settings
    with pytest.warns(UserWarning, match=re.escape(said)):
        assert workload_of(config).quantization == expected
    assert workload_of(config, quantization="fp4").quantization == "fp4", "which is an answer, so nothing warns"


class Scaled(nn.Linear):
    """Other values than its weight's."""

    def forward(self, x):
        return 1.05 * super().forward(x)


class Grouped(nn.Linear):
    """Another shape: the weight holds the blocks of a block-diagonal matrix."""

    def forward(self, x):
        return F.linear(x, self.weight).unflatten(-1, (2, -1))


class Pair(nn.Linear):
    """As Megatron's layers, which return the bias beside."""

    def forward(self, x):
        return super().forward(x), None


class Renamed(nn.Linear):
    """The same computation in other words."""

    def forward(self, x):
        return x @ self.weight.mT if self.bias is None else x @ self.weight.mT + self.bias


class Holder(nn.Module):
    """A gated feed-forward part whose first layer is of any class."""

    def __init__(self, cls):
        super().__init__()
        self.up, self.down = cls(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        y = self.up(x)
        y = y[0] if isinstance(y, tuple) else y
        return self.down(F.silu(y.flatten(2)))


@pytest.mark.parametrize(
    ("cls", "reason"), [(Scaled, "other values"), (Grouped, "not the product"), (Pair, "a tuple")]
)
def test_layers_that_compute_something_else_are_unmeasured_with_the_reason(cls, reason):
    """In shape, values or type of output; the layers around them are measured."""
    torch.manual_seed(0)
    model = tiny_llama(layers=2)
    model.model.layers[1].mlp = Holder(cls)
    influence = measure_influence(model, BATCHES, progress=False)
    name = "model.layers.1.mlp.up"
    assert reason in dict(influence.unmeasured)[name]
    measured = [s.name for s in influence.submodules]
    assert name not in measured and "model.layers.1.mlp.down" in measured and len(measured) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_compute_the_same_in_their_own_way_are_measured(dtype):
    """The comparison allows for rounding."""
    torch.manual_seed(0)
    model = tiny_llama(layers=2)
    model.model.layers[1].mlp = Holder(Renamed)
    influence = measure_influence(model.to(dtype), BATCHES, progress=False)
    assert "model.layers.1.mlp.up" in [s.name for s in influence.submodules]


class ReadInTraining(nn.Module):
    """As Bamba and Gemma 3n: in training a kernel reads a weight whose layer evaluation calls."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(32, 48), nn.Linear(48, 32), nn.Dropout(0.5)

    def forward(self, x):
        weight = getattr(self, "up").weight  # noqa: B009
        y = F.linear(x, weight, self.up.bias) if self.training else self.up(x)
        return self.down(self.dropout(F.silu(y)))


def test_layers_that_training_does_not_call_are_unmeasured_and_found_after_placing():
    """By a pass in training mode before, and by one backward pass after an adapter was put on."""
    model = tiny_llama(layers=2)
    model.model.layers[1].mlp = ReadInTraining()
    influence = measure_influence(model, BATCHES, progress=False)
    assert "without calling it" in dict(influence.unmeasured)["model.layers.1.mlp.up"]
    assert "model.layers.1.mlp.down" in [s.name for s in influence.submodules]
    checks = Checks()
    measure_influence(model, BATCHES, submodules=["model.layers.0.mlp.up_proj"], checks=checks, progress=False)
    for _ in range(2):  # the layer is new to the checks the first time, and known the second
        again = measure_influence(model, BATCHES, checks=checks, progress=False)
        assert again.unmeasured == influence.unmeasured and "model.layers.1.mlp.up" in checks.refused
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up", "down", "q_proj"]))
    with pytest.raises(PlacementError, match=r"1 of 4 adapters \('model.layers.1.mlp.up'\)"):
        check_adapters(adapted, BATCHES)
    check_adapters(get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear")), BATCHES)


@pytest.mark.parametrize("config", ["Mamba", "FalconMamba", "Mamba2", "Bamba", "FalconH1"])
def test_weights_that_fused_kernels_read_are_not_candidates(config):
    """Also where no kernel is installed: training may run elsewhere. PEFT refuses some of them too."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, f"{config}Config")(num_hidden_layers=2)
        )
    own = {weight.name.rsplit(".", 1)[-1] for weight in find_weights(model) if weight.form == "linear"}
    assert "in_proj" in own and not {"x_proj", "dt_proj", "out_proj"} & own


def test_weights_that_code_only_looks_at_stay_candidates():
    """T5 reads a weight's dtype, and Bloom a slice of it in one setting."""
    with torch.device("meta"):
        bloom = transformers.BloomForCausalLM(transformers.BloomConfig())
        t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(num_layers=1))
    assert {w.form for w in find_weights(bloom) if w.name.endswith("dense")} == {"linear"}
    assert {w.form for w in find_weights(t5) if w.name.endswith("wo")} == {"linear"}


def test_layers_that_are_skipped_at_random_are_measured():
    """Layer drop, which the pass in training mode must not take for a layer that training never calls."""
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_layerdrop=0.9,
        decoder_layerdrop=0.9,
    )
    model = random_model(transformers.BartForConditionalGeneration, config)
    influence = measure_influence(model, BATCHES, progress=False)
    assert not [reason for _, reason in influence.unmeasured if "without calling" in reason]


def partitioned(model):
    """As DeepSpeed's ZeRO stage 3 leaves the parameters: empty, with their shape beside."""
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = parameter.data.new_empty(0)
    return model


class DeepSpeedEngine(nn.Module):
    """DeepSpeed's wrapper around a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_partitioned_weights_have_their_shapes_and_are_not_measured():
    """Planning works with ZeRO stage 3, measuring is an error with a fix; an engine around whole weights is unwrapped."""
    plain = tiny_llama(layers=2)
    model = DeepSpeedEngine(partitioned(tiny_llama(layers=2)))
    assert find_submodules(model, include="all") == find_submodules(plain, include="all")
    assert Structure.of(model) == Structure.of(plain)
    with pytest.raises(MeasurementError, match="ZeRO stage 3"):
        measure_influence(model, BATCHES, progress=False)
    engine = DeepSpeedEngine(plain)
    assert unwrap(engine) is plain
    expected = measure_influence(plain, BATCHES, progress=False)
    assert torch.equal(measure_influence(engine, BATCHES, progress=False).norms, expected.norms)


def test_no_word_on_quantization_without_quantized_weights():
    """bitsandbytes, which PEFT imports in every process, warns of a missing kernel on some CPUs."""
    code = """
from peft_blueprint import BlueprintConfig, generate_blueprint
from peft_blueprint.testing import tiny_llama, toy_batches
from peft import get_peft_model
model = tiny_llama(2)
blueprint = generate_blueprint(model, toy_batches(4), progress=False)
get_peft_model(model, BlueprintConfig(blueprint=blueprint))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gemm_4bit" not in run.stderr and "kernels" not in run.stderr
    lines = "import sys, peft_blueprint.measure as m; m.measure_influence; print('bitsandbytes' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
