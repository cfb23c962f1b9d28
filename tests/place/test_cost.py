"""What a placement costs, counted before it is run."""

import json
import random
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen2ForCausalLM

from benchmarks.contexts import predictions
from peft_blueprint import Blueprint, testing
from peft_blueprint.errors import MismatchError, PlacementError
from peft_blueprint.measure.submodules import find_submodules
from peft_blueprint.place import plan_placement, step_variants
from peft_blueprint.place.cost import Cost, CostModel, Structure, Workload
from peft_blueprint.train import answer_only
from peft_blueprint.train.memory import release_inputs
from tests.fused import needs_fused


EXAMPLES, LENGTH, RANK = 4, 20, 3
TOKENS = EXAMPLES * LENGTH
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
WORKLOAD = Workload(EXAMPLES, LENGTH, dtype="float32", rank=RANK, device="cpu")


def tiny_qwen2(layers):
    """A random Qwen2, whose queries, keys and values have biases."""
    config = Qwen2Config(
        vocab_size=testing.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=layers,
        pad_token_id=0,
    )
    return testing.random_model(Qwen2ForCausalLM, config)


MODELS = {
    "llama": testing.tiny_llama,
    "gpt2": lambda layers: testing.tiny_gpt2(layers, **NO_DROPOUT),
    "mixtral": testing.tiny_mixtral,
    "qwen2": tiny_qwen2,
}
PLACEMENTS = {
    "all": lambda entries: entries,
    "sparse": lambda entries: entries[2::5],
    "upper": lambda entries: [entry for entry in entries if entry.depth >= 2],
}


def placed(model, placement, experts=False):
    """Names of the adapted submodules, linear layers and experts apart."""
    entries = find_submodules(model)
    linear = PLACEMENTS[placement]([entry for entry in entries if entry.form == "linear"])
    fused = [entry.name for entry in entries if entry.form == "experts"] if experts else []
    return [entry.name for entry in linear], fused


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT on GPT-2, which it then puts right
def adapted(model, linear, fused=(), rank=RANK, **config):
    """The model in training mode with LoRA on these."""
    parameters = {"target_parameters": list(fused)} if fused else {}
    wanted = LoraConfig(
        r=rank,
        target_modules=list(linear),
        lora_dropout=0.0,
        fan_in_fan_out=type(model).__name__.startswith("GPT2"),
        **parameters,
        **config,
    )
    model.train()
    model.config.use_cache = False
    return get_peft_model(model, wanted)


def batch(padding="right"):
    (only,) = testing.toy_batches(EXAMPLES, LENGTH, EXAMPLES, padding=padding)
    return only


def bytes_saved(model, inputs):
    """Bytes of all distinct storages that autograd saves in a forward pass, parameters and inputs left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *inputs.values())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    total = sum(size for size, _ in storages.values())
    storages.clear()
    del loss
    return total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_fused if name == "mixtral" else ()) for name in MODELS]
)
def test_activations_agree_with_autograds_saved_bytes(name, placement, dtype):
    """Within 10 %, by architecture, placement and dtype, the log-softmax of the loss beside them."""
    model = MODELS[name](4).to(getattr(torch, dtype))
    linear, _ = placed(model, placement)
    predicted = CostModel(Structure.of(model), replace(WORKLOAD, dtype=dtype)).cost(dict.fromkeys(linear, RANK))
    saved = bytes_saved(adapted(model, linear), batch())
    assert predicted.activations + predicted.logits / 3 == pytest.approx(saved, rel=0.1)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("attention", "padding"), [("sdpa", "none"), ("eager", "right")])
def test_both_kinds_of_attention_are_distinguished(attention, padding, placement):
    """Without padding no keys are repeated and no mask is kept; eager attention keeps its scores."""
    model = testing.tiny_llama(4)
    model.set_attn_implementation(attention)
    linear, _ = placed(model, placement)
    workload = replace(WORKLOAD, attention=attention, padded=padding != "none")
    predicted = CostModel(Structure.of(model), workload).cost(dict.fromkeys(linear, RANK))
    saved = bytes_saved(adapted(model, linear), batch(padding))
    assert predicted.activations + predicted.logits / 3 == pytest.approx(saved, rel=0.1)


@needs_fused
def test_adapters_on_fused_experts_keep_a_copy_of_all_of_them():
    """PEFT folds such an adapter into the weight in every pass; the prediction meets autograd's saved bytes."""
    model = testing.tiny_mixtral(4)
    linear, fused = placed(model, "all", experts=True)
    costs = CostModel(Structure.of(model), WORKLOAD)
    predicted = costs.cost(dict.fromkeys([*linear, *fused], RANK))
    copies = sum(4 * numel_of(model, name) for name in fused)
    assert predicted.activations - costs.cost(dict.fromkeys(linear, RANK)).activations >= copies
    saved = bytes_saved(adapted(model, linear, fused), batch())
    assert predicted.activations + predicted.logits / 3 == pytest.approx(saved, rel=0.1)


def numel_of(model, name):
    return dict(model.named_parameters())[name].numel()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("to_the_bottom", [True, False])
def test_checkpointing_keeps_the_inputs_of_blocks(placement, to_the_bottom):
    """Of every block that a gradient passes through; all of them where the embeddings' output requires one."""
    model = testing.tiny_llama(4)
    linear, _ = placed(model, placement)
    workload = replace(WORKLOAD, checkpointing=True, input_gradients=to_the_bottom)
    predicted = CostModel(Structure.of(model), workload).cost(dict.fromkeys(linear, RANK))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    peft_model = adapted(model, linear)
    if not to_the_bottom:  # transformers asked for it, and PEFT again
        release_inputs(model)
    inputs_of_blocks = 4 if to_the_bottom else 4 - predicted.lowest
    final_norm = TOKENS * (32 + 1) * 4
    assert predicted.activations == inputs_of_blocks * TOKENS * 32 * 4 + final_norm
    assert (
        0
        < predicted.recomputed
        < CostModel(Structure.of(model), WORKLOAD).cost(dict.fromkeys(linear, RANK)).activations
    )
    again = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda *_: again.append(1))
    peft_model(**batch()).loss.backward()
    assert len(again) == 4 + inputs_of_blocks, "a pass through every block, and a second through those"


@pytest.mark.parametrize("name", MODELS)
def test_trainable_parameters_are_pefts_own(name):
    """For random placements with random ranks, experts included."""
    model = MODELS[name](3)
    generator = random.Random(0)
    entries = [entry for entry in find_submodules(model) if generator.random() < 0.6]
    ranks = {entry.name: generator.choice([1, 2, 5]) for entry in entries}
    cost = CostModel(Structure.of(model), WORKLOAD).cost(ranks)
    linear = [entry.name for entry in entries if entry.form == "linear"]
    fused = [entry.name for entry in entries if entry.form == "experts"]
    pattern = {"^" + key.replace(".", r"\."): value for key, value in ranks.items() if key in linear}
    for key in fused:
        ranks[key] = RANK
    cost = CostModel(Structure.of(model), WORKLOAD).cost(ranks)
    peft_model = adapted(model, linear, fused, rank_pattern=pattern)
    assert cost.trainable == peft_model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(("kind", "double_quant"), [("nf4", False), ("fp4", False), ("nf4", True), ("int8", False)])
def test_quantized_bytes_agree_with_bitsandbytes(kind, double_quant):
    """Packed numbers, scales, tables and offset, to the byte."""
    from bitsandbytes import functional

    model = testing.tiny_llama(2, hidden_size=64, intermediate_size=96)
    structure = Structure.of(model)
    quantized = CostModel(structure, replace(WORKLOAD, quantization=kind, double_quant=double_quant)).all_linear()
    whole = CostModel(structure, WORKLOAD).all_linear()
    stored = plain = 0
    for entry in find_submodules(model):
        weight = model.get_submodule(entry.name).weight.data
        plain += weight.nbytes
        if kind == "int8":
            packed, scale, _ = functional.int8_vectorwise_quant(weight.half())
            stored += packed.nbytes + scale.nbytes
            continue
        packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double_quant)
        tables = [state.absmax, state.code]
        if double_quant:
            tables += [state.state2.absmax, state.state2.code, state.offset]
        stored += packed.nbytes + sum(table.nbytes for table in tables)
    assert whole.weights - quantized.weights == plain - stored
    assert quantized.workspace == 64 * 96 * 4


def test_flops_of_one_layer_counted_by_hand():
    """One block of one head: products forward and backward, adapters and attention, down to the lowest trained weight."""
    model = testing.tiny_llama(1, num_attention_heads=1, num_key_value_heads=1)
    costs = CostModel(Structure.of(model), replace(WORKLOAD, padded=False))
    attention, feed_forward, head = 4 * 32 * 32, 3 * 32 * 48, 32 * testing.VOCABULARY
    products = 2 * (attention + feed_forward + head) + 4 * (LENGTH / 2) * 32
    elementwise = 3 * 6 * 32 + 48 * 6 + 5 * testing.VOCABULARY
    layer = "model.layers.0"
    down = costs.cost({f"{layer}.mlp.down_proj": 2})
    assert down.forward == products + elementwise
    assert down.backward == 2 * head + 12 * 32 + 3 * testing.VOCABULARY, "the final norm and the head alone"
    assert down.adapters == 2 * 2 * (32 + 48) + 2 * 2 * (48 + 2 * 32), "the gradient of the input is not needed"
    gate = costs.cost({f"{layer}.mlp.gate_proj": 2})
    assert gate.backward - down.backward == 2 * 32 * 48 + 48 * 10, "down_proj, the activation and its product"
    both = costs.cost({f"{layer}.mlp.down_proj": 2, f"{layer}.mlp.gate_proj": 2})
    assert both.backward == gate.backward
    assert both.adapters - gate.adapters == 3 * (2 * 2 * (32 + 48)), "which is needed now"
    assert gate.lowest == 0 and both.trainable == 2 * 2 * (32 + 48)


def test_modules_trained_whole():
    """A block's name counts for everything under it: weight gradients, a copy, gradients and two states of each."""
    model = testing.tiny_llama(3)
    costs = CostModel(Structure.of(model), WORKLOAD)
    numbers = sum(p.numel() for p in model.model.layers[1].mlp.parameters())
    cost = costs.cost({}, ["model.layers.1.mlp"])
    assert cost.trainable == numbers and cost.weight_gradients == 2 * numbers and cost.adapters == 0
    assert cost.added == cost.gradients == 4 * numbers and cost.states == 8 * numbers and cost.lowest == 1
    quantized = CostModel(Structure.of(model), replace(WORKLOAD, quantization="nf4"))
    assert quantized.cost({}, ["model.layers.1.mlp"]).weights > quantized.cost({}).weights, "it cannot be quantised"
    with pytest.raises(PlacementError, match="trained whole"):
        costs.cost({"model.layers.1.mlp.up_proj": 2}, ["model.layers.1.mlp"])


def test_activations_of_a_module_trained_whole():
    """Its inputs are kept, as autograd keeps them."""
    model = testing.tiny_llama(4)
    name = "model.layers.2.mlp"
    predicted = CostModel(Structure.of(model), WORKLOAD).cost({}, [name])
    model.train().requires_grad_(False)
    model.config.use_cache = False
    model.get_submodule(name).requires_grad_(True)
    saved = bytes_saved(model, batch())
    assert predicted.activations + predicted.logits / 3 == pytest.approx(saved, rel=0.1)


def test_states_of_optimizers():
    """None of plain SGD, two of AdamW, two of a byte for matrices of at least 4096 numbers."""
    model = testing.tiny_llama(2, hidden_size=512, intermediate_size=512)
    states = {
        name: CostModel(Structure.of(model), replace(WORKLOAD, optimizer=name, rank=8)).all_linear()
        for name in ("sgd", "adamw", "adamw_8bit", "paged_adamw_32bit")
    }
    assert states["sgd"].states == 0
    assert states["adamw"].states == states["paged_adamw_32bit"].states == 8 * states["adamw"].trainable
    small = sum(8 * entry.shape[0] for entry in find_submodules(model) if entry.shape[0] < 512)
    large = states["adamw"].trainable - small
    assert states["adamw_8bit"].states == 2 * (large + large // 256 * 4) + 8 * small


def test_master_weights_make_twelve_bytes_a_parameter():
    """2-byte weights have a float32 copy and two float32 moments; float32 adapters and models have no copy."""
    structure = Structure.of(testing.tiny_llama(2))
    load = replace(WORKLOAD, dtype="bfloat16", master_weights=True)
    mixed, plain = (CostModel(structure, replace(load, master_weights=on)) for on in (True, False))
    block = "model.layers.1.mlp"
    trained = mixed.cost({}, [block])
    assert trained.states == 12 * trained.trainable == 3 * plain.cost({}, [block]).states
    assert trained.moved > plain.cost({}, [block]).moved and trained.gradients == 2 * trained.trainable
    assert mixed.all_linear() == plain.all_linear(), "adapters are in float32 already"
    in_2_bytes = CostModel(structure, replace(load, adapter_dtype="bfloat16")).all_linear()
    assert in_2_bytes.states == 12 * in_2_bytes.trainable
    in_float32 = CostModel(structure, replace(load, dtype="float32"))
    assert in_float32.cost({}, [block]).states == 8 * trained.trainable
    for optimizer, bytes_each in (("sgd", 4), ("paged_adamw_32bit", 12)):
        found = CostModel(structure, replace(load, optimizer=optimizer)).cost({}, [block])
        assert found.states == bytes_each * found.trainable, optimizer
    with pytest.raises(PlacementError, match="master_weights must be true or false, got 'yes'"):
        Workload(master_weights="yes")


def test_full_training_holds_every_weight_once():
    """In place: weights, gradients and states of all parameters, and no copy of PEFT's."""
    model = testing.tiny_llama(2)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    full = CostModel(Structure.of(model), replace(WORKLOAD, dtype="bfloat16", quantization="nf4")).full()
    assert full.trainable == numbers and full.weights == full.gradients == 2 * numbers and full.added == 0
    assert full.states == 4 * numbers and full.lowest is None


def test_cheaper_placements_are_predicted_cheaper():
    """Fewer adapters and a higher lowest one take less time and memory; all-linear is 1."""
    model = testing.tiny_llama(10)
    for device in ("cpu", "cuda"):
        costs = CostModel(Structure.of(model), Workload(rank=8, device=device))
        names = costs.structure.adaptable
        all_linear = costs.all_linear()
        assert costs.time_ratio(all_linear) == 1
        assert all_linear == costs.cost(dict.fromkeys(names, 8))
        few, upper = costs.cost(dict.fromkeys(names[::5], 8)), costs.cost(dict.fromkeys(names[35:], 8))
        assert costs.time_ratio(costs.floor()) < costs.time_ratio(few) < 1
        top = costs.cost(dict.fromkeys(names[63:], 8))
        assert costs.time_ratio(top) < costs.time_ratio(costs.floor()) and costs.time_ratio(upper) < 1
        assert upper.bytes < few.bytes < all_linear.bytes
        assert sum(costs.adapter_cost(name, 8) for name in names) == pytest.approx(
            1 - costs.time_ratio(costs.floor()), rel=0.05
        )


def test_structure_of_a_blueprint_gives_ratios_of_time():
    """From names and shapes alone, close to the model's own ratios when the head is known."""
    model = testing.tiny_llama(6)
    entries = tuple(replace(entry, gradient_norm=1.0) for entry in find_submodules(model, include="all"))
    structures = Structure.of_blueprint(Blueprint("org/tiny", entries)), Structure.of(model)
    assert [structure.is_whole for structure in structures] == [False, True]
    ratios = []
    for structure in structures:
        costs = CostModel(structure, WORKLOAD)
        ratios.append(costs.time_ratio(costs.cost(dict.fromkeys(structure.adaptable[14:], RANK))))
    assert ratios[0] == pytest.approx(ratios[1], abs=0.03)


def test_a_large_model_on_the_meta_device():
    """Names and shapes are enough: 8-bit states, nf4 weights and 560 adapters of a model of 70 B, in its real numbers."""
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    structure = Structure.of(model)
    plain = CostModel(structure, Workload(1, 2048)).all_linear()
    assert plain.weights == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert plain.trainable == 207_093_760
    quantized = CostModel(structure, Workload(1, 2048, quantization="nf4", checkpointing=True)).all_linear()
    assert 40e9 > quantized.weights > 39e9, "4.127 bits a weight, embeddings and head in bfloat16"
    assert quantized.bytes < plain.bytes / 3


@needs_fused
def test_experts_are_visited_by_some_tokens_and_stored_for_all():
    """FLOPs by the experts a token visits; a list of expert modules costs the same as fused experts."""
    model = testing.tiny_mixtral(1)
    structure = Structure.of(model)
    expert = 3 * 32 * 24
    forward = {
        visited: CostModel(Structure.of(testing.tiny_mixtral(1, num_experts_per_tok=visited)), WORKLOAD).all_linear()
        for visited in (1, 2)
    }
    assert forward[2].forward - forward[1].forward == pytest.approx(2 * expert, rel=0.1)
    assert forward[2].weights == forward[1].weights == 4 * sum(p.numel() for p in model.parameters())
    names = [name for name in structure.adaptable if "experts" in name]
    cost = CostModel(structure, WORKLOAD).cost(dict.fromkeys(names, 2))
    assert cost.trainable == 4 * 2 * (32 + 48 + 24 + 32)


def test_wrong_names_and_values_are_refused():
    """The error has the name, the known names and the fix."""
    costs = CostModel(Structure.of(testing.tiny_llama(2)), WORKLOAD)
    with pytest.raises(MismatchError, match=r"'model.layers.7.mlp' .*full names"):
        costs.cost({}, ["model.layers.7.mlp"])
    with pytest.raises(MismatchError, match=r"'q_proj' are not in the model"):
        costs.cost({"q_proj": 2})
    with pytest.raises(MismatchError, match="take no adapter"):
        costs.adapter_cost("model.norm", 2)
    with pytest.raises(PlacementError, match="positive integers, got"):
        costs.cost({"model.layers.0.mlp.up_proj": 0})
    with pytest.raises(PlacementError, match=r"'bfloat16'.*got dtype='float8'"):
        Workload(dtype="float8")
    with pytest.raises(PlacementError, match="batch_size=0"):
        Workload(batch_size=0)
    groups = Blueprint(
        "org/tiny", (replace(find_submodules(testing.tiny_llama(1))[0], shape=None, gradient_norm=1.0),)
    )
    with pytest.raises(MismatchError, match="expand"):
        Structure.of_blueprint(groups)


def test_a_cost_is_a_json_object():
    """With its totals, for a file beside the placement."""
    cost = CostModel(Structure.of(testing.tiny_llama(2)), WORKLOAD).all_linear()
    data = json.loads(json.dumps(cost.to_dict()))
    assert data.pop("flops") == cost.flops and data.pop("bytes") == cost.bytes
    assert Cost(**data) == cost


def test_a_cached_prefix_is_not_computed_again():
    """Over many epochs the lower half costs nothing; over three, a third."""
    whole, upper = Structure.of(testing.tiny_llama(4)), Structure.of(testing.tiny_llama(2))
    ranks = {name: RANK for name in whole.adaptable if ".layers.2." in name or ".layers.3." in name}
    same = {name.replace(".2.", ".0.").replace(".3.", ".1."): rank for name, rank in ranks.items()}
    once = CostModel(whole, WORKLOAD).cost(ranks)
    half = CostModel(upper, WORKLOAD).cost(same)
    often = CostModel(whole, replace(WORKLOAD, epochs=10**9)).cost(ranks)
    assert often.forward == pytest.approx(half.forward) and often.backward == half.backward == once.backward
    assert often.moved == pytest.approx(half.moved + 2 * often.cache)
    thrice = CostModel(whole, replace(WORKLOAD, epochs=3)).cost(ranks)
    assert thrice.forward == pytest.approx(half.forward + (once.forward - half.forward) / 3)
    assert thrice.bytes == once.bytes, "the first epoch needs all weights"
    layers = testing.tiny_llama(4).model.layers
    assert often.prefix == 4 * sum(p.numel() for layer in layers[:2] for p in layer.parameters())
    assert often.cache == 4 * 32
    whole_again = CostModel(whole, replace(WORKLOAD, epochs=3)).all_linear()
    assert whole_again == CostModel(whole, WORKLOAD).all_linear() and whole_again.cache == whole_again.prefix == 0


def test_a_cache_ends_the_backward_pass_that_checkpointing_sends_to_the_bottom():
    model = testing.tiny_llama(4)
    ranks = {f"model.layers.{i}.mlp.up_proj": RANK for i in (2, 3)}
    load = replace(WORKLOAD, checkpointing=True)
    costs = [CostModel(Structure.of(model), replace(load, epochs=epochs)).cost(ranks) for epochs in (1, 3)]
    assert costs[1].backward < costs[0].backward and costs[1].activations < costs[0].activations


def test_more_epochs_place_higher():
    """A cache makes layers below the lowest adapter free, so the fastest placement for a gain lies higher."""
    model = testing.tiny_llama(12)
    lowest = [
        plan_placement(None, model, r=16, keep=0.8, workload=replace(WORKLOAD, epochs=epochs)).cost["lowest"]
        for epochs in (1, 50)
    ]
    assert lowest[1] > lowest[0]


ANSWER = 5


@pytest.mark.parametrize("padding", ["none", "right"])
def test_answer_only_activations_agree_with_autograds_saved_bytes(padding):
    """Keys and values of the prompt included, which attention joins with the answer's."""
    model = testing.tiny_llama(4)
    [inputs] = testing.toy_batches(EXAMPLES, LENGTH, EXAMPLES, padding="none", prompt=LENGTH - ANSWER)
    inputs["input_ids"][:, LENGTH - ANSWER - 1] = 7
    linear, _ = placed(model, "all")
    load = replace(WORKLOAD, prompt=LENGTH - ANSWER - 1, answer_only=True, padded=padding != "none")
    predicted = CostModel(Structure.of(model), load).cost(dict.fromkeys(linear, RANK))
    peft_model = answer_only(adapted(model, linear, alora_invocation_tokens=[7], task_type="CAUSAL_LM"))
    peft_model(**inputs).loss.backward()  # the first step checks itself
    if padding == "none":
        saved = bytes_saved(peft_model, inputs)
        assert predicted.activations + predicted.logits / 3 == pytest.approx(saved, rel=0.15)
    whole = CostModel(Structure.of(model), replace(load, answer_only=False)).cost(dict.fromkeys(linear, RANK))
    assert predicted.activations < 0.5 * whole.activations and predicted.logits == pytest.approx(0.3 * whole.logits)
    assert predicted.prompts == 4 * 2 * 16 * 4 * load.prompt * EXAMPLES, "layers x keys and values x width x bytes"


def test_answer_only_flops_by_hand():
    """Prompts pass forward, without head and adapters; the rest is that of the answers alone."""
    structure = Structure.of(testing.tiny_llama(2))
    load = replace(WORKLOAD, length=100, prompt=80, padded=False)
    costs = {answers: CostModel(structure, replace(load, answer_only=answers)) for answers in (False, True)}
    whole, answers = costs[False].all_linear(), costs[True].all_linear()
    assert answers.adapters == pytest.approx(0.2 * whole.adapters)
    head = 2 * 32 * testing.VOCABULARY + 5 * testing.VOCABULARY
    attention = 2 * 4 * 32  # FLOPs per key of two layers
    assert whole.forward - answers.forward == pytest.approx(
        0.8 * head + attention * (50 - (0.8 * 40 + 0.2 * 90)), rel=1e-6
    )
    assert costs[True].time_ratio(answers) < 0.6 and costs[False].time_ratio(whole) == 1
    cached = CostModel(structure, replace(load, answer_only=True, epochs=4))
    assert costs[True].time_ratio(answers) > cached.time_ratio(cached.all_linear())
    assert cached.all_linear().cache == 2 * 2 * 16 * 4


def test_the_head_on_targets_alone():
    structure = Structure.of(testing.tiny_llama(2))
    load = replace(WORKLOAD, length=100, prompt=80)
    whole = CostModel(structure, load).all_linear()
    targets = CostModel(structure, replace(load, head_on_targets=True)).all_linear()
    assert targets.logits == pytest.approx(whole.logits * 0.2, rel=1e-4) and targets.activations == whole.activations
    head = 2 * 32 * testing.VOCABULARY + 5 * testing.VOCABULARY
    assert whole.forward - targets.forward == pytest.approx(0.8 * head)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": 20, "length": 20}, "from 0 to 19"),
        ({"answer_only": True}, "needs the tokens of the prompt"),
        ({"epochs": 0}, "epochs must be a positive integer"),
        ({"head_on_targets": 1}, "true or false"),
    ],
)
def test_workloads_with_prompts_are_checked(settings, message):
    with pytest.raises(PlacementError, match=message):
        Workload(**settings)


def test_variants_of_a_step():
    """For all-linear LoRA and a placement; only a placement has a frozen prefix."""
    model = testing.tiny_llama(6)
    placement = plan_placement(None, model, num_modules=4, rank_by="last", coverage="none", workload=WORKLOAD)
    load = replace(WORKLOAD, prompt=15, epochs=3)
    found = {(v.adapters, v.name): v for v in step_variants(Structure.of(model), load, placement)}
    assert ("all-linear", "frozen prefix cached") not in found and found["all-linear", "all positions"].time == 1
    assert found["placement", "frozen prefix cached"].time < found["placement", "all positions"].time
    assert found["placement", "frozen prefix cached"].cache == 32 * 4 * LENGTH
    answers = found["all-linear", "answer only"]
    assert answers.memory < found["all-linear", "head on targets"].memory < found["all-linear", "all positions"].memory
    assert found["all-linear", "answer only, prompts cached"].time < answers.time and answers.cache == 0


def test_contexts_of_7b_on_cards():
    """Predicted: in nf4 a 12 GiB card trains 16k tokens with answer-only adapters, and does not without."""
    rows = {(r.length, r.weights, r.variant.adapters, r.variant.name): r for r in predictions([4096, 16384], 0.84)}
    for adapters in ("all-linear", "placement", "upper half"):
        assert not rows[16384, "nf4", adapters, "all positions"].fits(12)
        assert rows[16384, "nf4", adapters, "answer only"].fits(12)
        assert rows[4096, "nf4", adapters, "all positions"].fits(12)
        assert not rows[4096, "bfloat16", adapters, "answer only"].fits(12)
        assert rows[16384, "bfloat16", adapters, "answer only"].fits(24)
        assert rows[16384, "nf4", adapters, "answer only"].variant.time < 0.45
    assert not rows[16384, "bfloat16", "all-linear", "all positions"].fits(24)
    cached = rows[4096, "nf4", "upper half", "frozen prefix cached"].variant
    assert cached.time < 0.9 * rows[4096, "nf4", "upper half", "all positions"].variant.time
