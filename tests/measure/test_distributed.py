"""Several processes, and models sharded over them, give one process's measurement. Run: pytest tests/measure/test_distributed.py

What needs two processes runs once, in two gloo processes that `torchrun` starts with this very file as their script:
each scenario below returns what it found, and the tests compare.
"""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from peft_blueprint import Influence, generate_blueprint, measure_influence
from peft_blueprint.testing import tiny_llama, tiny_mixtral, toy_batches
from tests.processes import error_of, gloo_process, in_two_processes


SKETCH = 8


def llama():
    return tiny_llama(layers=2)


def measured(model, batches, **options):
    return measure_influence(model, batches, **{"sketch_size": SKETCH, "progress": False} | options)


def sharded(model):
    """FSDP2 as it is used: every block, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def shares(rank, sizes=(1, 3)):
    """Four batches, one for the first process and three for the second."""
    batches = toy_batches(examples=16)
    start = sum(sizes[:rank])
    return batches[start : start + sizes[rank]]


def trained(model, rank, measure):
    """The weights after two steps of training, with a measurement between them or not."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in shares(rank, (2, 2)):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        if measure:
            measured(model, shares(rank), include="all")
        optimizer.step()
    return {k: getattr(v, "full_tensor", lambda v=v: v)().clone() for k, v in model.state_dict().items()}


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def scenario_ddp(rank):
    return measured(ddp(llama()), shares(rank))


def scenario_apart(rank):
    return measured(ddp(llama()), shares(rank), reduce=False, max_examples=4)


def scenario_max_examples(rank):
    return measured(llama(), shares(rank, (2, 2)), max_examples=5)


def scenario_one_example(rank):
    return [measured(model, shares(rank), max_examples=1) for model in (llama(), sharded(llama()))]


def scenario_training_ddp(rank):
    return [trained(ddp(llama()), rank, measure) for measure in (False, True)]


def scenario_fsdp(rank):
    return measured(sharded(llama()), shares(rank))


def scenario_fsdp_with_an_empty_shard(rank):
    return measured(sharded(llama()), shares(rank, (0, 4)))


def scenario_fsdp_after_a_forward_pass(rank):
    model = sharded(llama())
    with torch.no_grad():
        model(**toy_batches()[0])
    found = measured(model, shares(rank))
    return found, [p.requires_grad for p in model.parameters()], [p.grad is None for p in model.parameters()]


def scenario_fsdp_all(rank):
    return measured(sharded(llama()), shares(rank), include="all", method="exact")


def scenario_fsdp_experts(rank):
    model = tiny_mixtral(layers=2)
    return measured(sharded(model), shares(rank))


def scenario_fsdp_single_experts(rank):
    return measured(sharded(tiny_mixtral(layers=2)), shares(rank), experts=True)


def scenario_fsdp_checkpointed(rank):
    model = llama()
    model.gradient_checkpointing_enable()
    return measured(sharded(model.train()), shares(rank), include="all", method="exact")


def scenario_training_fsdp(rank):
    return [trained(sharded(llama()), rank, measure) for measure in (False, True)]


def scenario_own_objective(rank):
    class Odd(type(llama())):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits[:, :0].clone()  # no shape that is known
            return output

    model = llama()
    model.__class__ = Odd
    return measured(sharded(model), shares(rank))


def scenario_partly_reached(rank):
    def loss(model, batch):
        hidden = model(batch["input_ids"], output_hidden_states=True).hidden_states
        return hidden[1 if rank == 0 else 2].square().mean(dim=(1, 2))

    return measured(tiny_llama(layers=3), shares(rank), loss_fn=loss)


def scenario_error_in_data(rank):
    def batches():
        yield from shares(rank)
        if rank == 1:
            raise OSError("the file ends early")

    return [error_of(lambda m=m: measured(m, batches())) for m in (ddp(llama()), sharded(llama()))]


def scenario_error_in_a_pass(rank):
    batches = shares(rank)
    if rank == 1:
        batches[0]["labels"][2] = -100
    return error_of(lambda: measured(ddp(llama()), batches))


def scenario_bad_use(rank):
    return {
        "same": error_of(lambda: measured(llama(), toy_batches())),
        "nothing": error_of(lambda: measured(llama(), [])),
        "nothing sharded": error_of(lambda: measured(sharded(llama()), [])),
        "seeds": error_of(lambda: measured(llama(), shares(rank), seed=rank)),
    }


def scenario_split_otherwise(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    parallel, mesh = llama(), init_device_mesh("cpu", (2,))
    parallelize_module(parallel, mesh, {"model.layers.0.mlp.up_proj": ColwiseParallel()})
    flat = FullyShardedDataParallel(llama(), device_id=torch.device("cpu"))
    return [error_of(lambda m=m: measured(m, shares(rank))) for m in (flat, parallel)]


def in_4_bits(model):
    import bitsandbytes as bnb

    for layer in model.model.layers:
        d_out, d_in = layer.mlp.up_proj.weight.shape
        options = {"bias": False, "compute_dtype": torch.float32, "quant_storage": torch.float32, "quant_type": "nf4"}
        quantised = bnb.nn.Linear4bit(d_in, d_out, **options)
        quantised.load_state_dict({"weight": layer.mlp.up_proj.weight.data}, strict=False)
        layer.mlp.up_proj = quantised.to("cpu")
    return model


def scenario_fsdp_4_bits(rank):
    return generate_blueprint(sharded(in_4_bits(llama())), shares(rank), progress=False, bootstrap=20)


def scenario_blueprint(rank):
    return [
        generate_blueprint(model, shares(rank), progress=False, bootstrap=20)
        for model in (ddp(llama()), sharded(llama()))
    ]


def scenario_accelerate(rank):
    from accelerate import Accelerator, DataLoaderConfiguration
    from torch.utils.data import DataLoader

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
    examples = [{key: value[0] for key, value in batch.items()} for batch in toy_batches(examples=14, batch_size=1)]
    model, loader = accelerator.prepare(llama(), DataLoader(examples, batch_size=4))
    return type(model).__name__, measured(model, loader)


SCENARIOS = [name for name in globals() if name.startswith("scenario_")]


@pytest.fixture(scope="module")
def found(tmp_path_factory, pytestconfig):
    """Results of both processes, by scenario."""
    folder = tmp_path_factory.mktemp("found")
    in_two_processes(__file__, folder, pytestconfig.getini("filterwarnings")[0])
    return {
        name.removeprefix("scenario_"): [
            torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in (0, 1)
        ]
        for name in SCENARIOS
    }


def assert_equal(influence, expected, rtol=1e-4):
    """The same measurement, but for the order in which floating-point numbers were added."""
    assert influence.submodules == expected.submodules
    torch.testing.assert_close(influence.norms, expected.norms, rtol=rtol, atol=1e-6)
    torch.testing.assert_close(influence.norm_errors, expected.norm_errors, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(influence.projections, expected.projections, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close([influence.losses, influence.target_tokens], [expected.losses, expected.target_tokens])
    for mine, theirs in zip(influence.sketches, expected.sketches, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(influence.signal_norms, expected.signal_norms, rtol=1e-3, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(influence.routing, expected.routing, equal_nan=True)
    assert influence.tokens == expected.tokens
    assert influence.unmeasured == expected.unmeasured


def assert_identical(one, other):
    assert one.data_digest == other.data_digest and torch.equal(one.norms, other.norms)
    assert all(torch.equal(a, b) for a, b in zip(one.sketches, other.sketches, strict=True))


def whole(build=llama, **options):
    return lambda: measured(build(), toy_batches(examples=16), **options)


EXPECTED = {
    **dict.fromkeys(("ddp", "fsdp", "fsdp_with_an_empty_shard", "own_objective"), whole()),
    **dict.fromkeys(("fsdp_all", "fsdp_checkpointed"), whole(include="all", method="exact")),
    "fsdp_experts": whole(lambda: tiny_mixtral(layers=2)),
    "fsdp_single_experts": whole(lambda: tiny_mixtral(layers=2), experts=True),
    "max_examples": lambda: Influence.merge(
        [measured(llama(), shares(rank, (2, 2)), max_examples=n) for rank, n in ((0, 3), (1, 2))]
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_two_processes_agree_with_one(found, name):
    """DDP and FSDP2, shares of unequal size or none, experts, checkpointing: each process has the whole."""
    one, other = found[name]
    assert_identical(one, other)
    assert_equal(one, EXPECTED[name]())


def test_a_process_can_measure_by_itself(found):
    """With reduce=False each has its own shard's measurement, cut off at its own max_examples."""
    for rank, influence in enumerate(found["apart"]):
        assert_identical(influence, measured(llama(), shares(rank), max_examples=4))


def test_a_process_may_have_no_share(found):
    """A single example for two processes: it is measured once, and the digest is its own."""
    expected = measured(llama(), shares(0), max_examples=1)
    for influence in (*found["one_example"][0], *found["one_example"][1]):
        assert_equal(influence, expected)
        assert influence.data_digest == expected.data_digest


def test_the_digest_is_that_of_merged_shards(found):
    """In the order of ranks, as Influence.merge has it."""
    merged = Influence.merge([measured(llama(), shares(rank)) for rank in (0, 1)])
    assert found["ddp"][0].data_digest == merged.data_digest


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_training_goes_on_as_if_nothing_had_been_measured(found, kind):
    """A measurement between backward pass and optimiser step leaves gradients, hooks and shards as they were."""
    for plain, with_measurement in found[f"training_{kind}"]:
        assert plain.keys() == with_measurement.keys()
        assert all(torch.equal(plain[key], with_measurement[key]) for key in plain)


def test_weights_left_whole_by_a_forward_pass_are_frozen_too(found):
    """FSDP2 keeps the root's weights gathered after a forward pass; none takes a gradient from the measurement."""
    for influence, trainable, without_gradient in found["fsdp_after_a_forward_pass"]:
        assert_equal(influence, EXPECTED["fsdp"]())
        assert all(trainable) and all(without_gradient)


def test_a_row_that_one_process_reached_is_measured(found):
    """Zeros for the examples of the process that did not reach it, and no entry among the unmeasured."""
    one, other = found["partly_reached"]
    assert_identical(one, other)
    rows = {submodule.name: row for submodule, row in zip(one.submodules, one.norms, strict=True)}
    row = rows["model.layers.1.mlp.down_proj"]
    assert row.shape == (16,) and not row[:4].any() and row[4:].all()
    assert "model.layers.2.mlp.down_proj" in dict(one.unmeasured)


def test_an_error_on_one_process_reaches_the_others(found):
    """While data is read, and inside a pass: each process ends, and the message says where to look."""
    for first, second in zip(*found["error_in_data"], strict=True):
        assert first.startswith("MeasurementError: Process 1 of 2 failed") and "OSError: the file ends early" in first
        assert second == "OSError: the file ends early"
    first, second = found["error_in_a_pass"]
    assert "Process 1 of 2 failed" in first and second.startswith("MeasurementError: Examples [2] of a batch of 4")


def test_bad_use_is_the_same_error_everywhere(found):
    """The same data twice, no data, other settings: all processes raise an error with a fix."""
    first, second = found["bad_use"]
    assert first == second
    assert "Processes 0 and 1 measured the same 8 examples" in first["same"] and "reduce=False" in first["same"]
    assert "batches are empty" in first["nothing"] and "batches are empty" in first["nothing sharded"]
    assert "same model and settings" in first["seeds"]


def test_every_process_has_the_same_blueprint(found):
    """Weight norms of shards included; the provenance says how many processes there were."""
    alone = generate_blueprint(llama(), toy_batches(examples=16), progress=False, bootstrap=20)
    for first, second in zip(*found["blueprint"], strict=True):
        assert first == second
        assert first.provenance["processes"] == 2 and "processes" not in alone.provenance
        assert first.model_digest == alone.model_digest
        for mine, expected in zip(first, alone, strict=True):
            assert mine.name == expected.name
            assert mine.weight_norm == pytest.approx(expected.weight_norm)
            assert mine.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)


def test_4_bit_weights_are_known_in_shards(found):
    """Marked as quantised, with the norm of the dequantised weight."""
    expected = generate_blueprint(in_4_bits(llama()), toy_batches(examples=16), progress=False, bootstrap=20)
    for blueprint in found["fsdp_4_bits"]:
        for mine, theirs in zip(blueprint, expected, strict=True):
            assert (mine.name, mine.quantized) == (theirs.name, theirs.quantized)
            assert mine.weight_norm == pytest.approx(theirs.weight_norm)
            assert mine.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-4)
    assert sum(submodule.quantized for submodule in expected) == 2


def test_other_ways_to_split_a_model_are_errors(found):
    """FSDP1 and tensor parallelism: the error names an alternative."""
    for flat, parallel in found["split_otherwise"]:
        assert "FullyShardedDataParallel" in flat and "fully_shard" in flat
        assert "tensor parallelism" in parallel and "up_proj" in parallel


def test_a_loader_prepared_by_accelerate_is_measured(found):
    """A model in DDP and a loader that shares batches out in turns."""
    batches = toy_batches(examples=14)
    turns = [measured(llama(), batches[rank::2]) for rank in (0, 1)]
    for name, influence in found["accelerate"]:
        assert name == "DistributedDataParallel"
        assert influence.examples == 14, influence.examples
        assert_equal(influence, Influence.merge(turns))


def main(folder):
    with gloo_process() as rank, warnings.catch_warnings():  # as in pyproject.toml
        warnings.simplefilter(sys.argv[2])
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        warnings.filterwarnings("ignore", "`(is_gradient_checkpointing|gradient_checkpointing_enable)`", FutureWarning)
        for name in sys.argv[3:] or SCENARIOS:
            torch.save(globals()[name](rank), folder / f"{name}.{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
