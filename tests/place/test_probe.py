"""Algorithm 1 in one call: probe, drift check, blend and placement when PEFT puts the adapter on."""

import copy
import dataclasses
import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from peft_blueprint import Blueprint, BlueprintConfig, BlueprintError, generate_blueprint, plan_placement
from peft_blueprint.errors import DriftError, MismatchError, PlacementError
from peft_blueprint.measure import encode
from peft_blueprint.place import probe_blueprint
from peft_blueprint.testing import randomize_adapters, save_tiny_model, tiny_llama, toy_batches


LOCAL = toy_batches(seed=3)
WISH = {"num_modules": 5, "coverage": "none", "rank_by": "gradient_norm"}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(layers=6)


@pytest.fixture(scope="module")
def published(model):
    """Of two domains, whose norms are proportional but in the last layer."""
    measured = generate_blueprint(model, toy_batches(), model_id="tiny/llama", progress=False)
    tags = [{"general": 1.0, "bio": 30.0 if entry.depth == 5 else 1.0, "law": 2.0} for entry in measured]
    entries = [dataclasses.replace(e, domain_tags=t) for e, t in zip(measured, tags, strict=True)]
    return dataclasses.replace(measured, submodules=tuple(entries))


@pytest.fixture(scope="module")
def probe(model):
    return generate_blueprint(model, LOCAL, max_examples=6, progress=False)


def drifted(blueprint):
    """The same entries with their norms in the opposite order."""
    norms = sorted(entry.gradient_norm for entry in blueprint)
    ranks = {e.name: i for i, e in enumerate(sorted(blueprint, key=lambda e: -e.gradient_norm))}
    entries = [dataclasses.replace(e, gradient_norm=norms[ranks[e.name]], norm_interval=None) for e in blueprint]
    return dataclasses.replace(blueprint, submodules=tuple(entries))


@pytest.mark.parametrize(
    ("options", "blend"),
    [
        ({}, {}),
        ({"blend_weight": 0.2}, {"weight": 0.2}),
        ({"rescale": False}, {"rescale": False}),
        ({"by_uncertainty": True}, {"by_uncertainty": True}),
    ],
)
def test_one_call_is_probe_blend_and_placement(model, published, probe, options, blend):
    """The config's placement is that of the blend made by hand, which its record is."""
    by_hand = published.blend(probe, **blend)
    config = BlueprintConfig(blueprint=published, probe=LOCAL, probe_examples=6, r=2, **WISH, **options)
    assert not config.selection
    config.resolve(tiny_llama(layers=6))
    assert config.selection == plan_placement(by_hand, model, **WISH, r=2).lora
    assert [e.gradient_norm for e in config.record] == pytest.approx([e.gradient_norm for e in by_hand])
    assert config.blueprint == config.record.digest
    history = config.record.provenance["blend"]
    assert history["weight"] == blend.get("weight", 0.5) and history["by_uncertainty"] == ("by_uncertainty" in blend)


def test_a_drifted_blueprint_is_treated_by_the_policy(model, published, probe):
    """Refused, blended with a warning, or replaced by the probe; the threshold decides on drift."""

    def settle(**options):
        config = BlueprintConfig(blueprint=drifted(published), probe=LOCAL, probe_examples=6, **WISH, **options)
        return config.resolve(model).record

    with pytest.raises(DriftError, match="does not fit this data"):
        settle(drift_policy="error")
    with pytest.warns(UserWarning, match="Policy: warn"):
        assert settle().provenance["blend"]
    with pytest.warns(UserWarning, match="Policy: refresh"):
        assert [e.gradient_norm for e in settle(drift_policy="refresh")] == [e.gradient_norm for e in probe]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settle(drift_policy="error", drift_threshold=-1)


@pytest.mark.parametrize("domain", ["bio", {"bio": 3, "law": 1}, "bio=3,law=1"], ids=str)
@pytest.mark.parametrize("given", ["object", "dict", "file"])
def test_a_domain_is_placed_by_its_own_norms(model, published, tmp_path, domain, given):
    """From an object, its JSON or a file; a copy and the saved recipe place the same."""
    file = published.save(tmp_path / "published.json")
    source = {"object": published, "dict": json.loads(file.read_text()), "file": str(file)}[given]
    config = BlueprintConfig(blueprint=source, domain=domain, r=2, **WISH)
    weights = {"bio": 3, "law": 1} if domain != "bio" else "bio"
    assert config.selection == plan_placement(published.for_domain(weights), **WISH).lora
    assert config.selection != plan_placement(published, **WISH).lora
    adapted = get_peft_model(tiny_llama(layers=6), config)
    adapted.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "blueprint_config.json").read_text())
    again = BlueprintConfig(**{key: value for key, value in saved.items() if key != "peft_type"})
    assert again.selection == config.selection == dataclasses.replace(config).selection
    assert [e.gradient_norm for e in again.record] == pytest.approx([e.gradient_norm for e in config.record])


def test_the_probe_is_measured_on_top_of_the_domain(model, published, probe):
    """The blend is of the domain's norms and the probe's."""
    options = {"probe_examples": 6, "drift_threshold": -1}
    config = BlueprintConfig(blueprint=published, probe=LOCAL, domain="bio", **options, **WISH).resolve(model)
    assert config.domain is None
    by_hand = published.for_domain("bio").blend(probe)
    assert [e.gradient_norm for e in config.record] == pytest.approx([e.gradient_norm for e in by_hand])


def test_the_probe_is_neither_saved_nor_logged(published, tmp_path):
    """Before it is measured and after; a copy of the unsettled config has it, and then it is let go."""
    config = BlueprintConfig(blueprint=published, probe=LOCAL, r=2, **WISH)
    for one in (config, copy.deepcopy(config), dataclasses.replace(config, r=4)):
        assert vars(one)["probe"] is not None
        texts = (repr(one), str(dataclasses.asdict(one)), json.dumps(one.to_dict(), default=str))
        assert all("tensor" not in text and "input_ids" not in text for text in texts)
    adapted = get_peft_model(tiny_llama(layers=6), dataclasses.replace(config, r=4))
    settled = adapted.peft_config["default"]
    assert vars(settled)["probe"] is None and settled.r == 4 and settled.record.provenance["blend"]
    adapted.save_pretrained(tmp_path)
    for name in ("adapter_config.json", "blueprint_config.json"):
        text = (tmp_path / name).read_text()
        assert "tensor" not in text and "input_ids" not in text
    assert "blend" not in json.loads((tmp_path / "adapter_config.json").read_text())


def test_an_adapter_saved_with_a_probe_reloads_and_resumes(published, tmp_path):
    """By PEFT from the folder, without measuring again; and by the Trainer, from the same probe, to the same adapter."""

    def adapted():
        config = BlueprintConfig(blueprint=published, probe=LOCAL, probe_examples=4, r=2, **WISH)
        return get_peft_model(tiny_llama(layers=6), config)

    def trainer(model, steps):
        settings = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
        arguments = TrainingArguments(tmp_path / "run", max_steps=steps, save_steps=2, learning_rate=0.05, **settings)
        rows = [{key: batch[key][i] for key in batch} for batch in LOCAL for i in range(4)]
        return Trainer(model, arguments, train_dataset=rows)

    whole = adapted()
    trainer(whole, 4).train()
    resumed = adapted()
    trainer(resumed, 4).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    reloaded = PeftModel.from_pretrained(tiny_llama(layers=6), tmp_path / "run" / "checkpoint-4")
    tokens = torch.arange(1, 11)[None]
    expected = whole.eval()(tokens).logits
    torch.testing.assert_close(resumed.eval()(tokens).logits, expected)
    torch.testing.assert_close(reloaded.eval()(tokens).logits, expected)


def test_any_form_of_data_is_a_probe(published, probe, tmp_path, model):
    """Batches, a DataLoader, an iterator, encoded rows, a blueprint; texts with the tokenizer of the model's folder."""
    rows = [{k: v[i].tolist() for k, v in batch.items() if k != "attention_mask"} for batch in LOCAL for i in range(4)]
    loader = DataLoader(
        rows, batch_size=4, collate_fn=lambda part: {k: torch.tensor([r[k] for r in part]) for k in part[0]}
    )
    found = [
        probe_blueprint(model, given, published, probe_examples=6, progress=False).blueprint
        for given in (LOCAL, iter(LOCAL), loader, probe)
    ]
    norms = [[entry.gradient_norm for entry in one] for one in found]
    assert all(one == pytest.approx(norms[0], rel=1e-3) for one in norms)
    folder = save_tiny_model(tmp_path / "model", layers=6)
    texts = [{"prompt": f"1 2 {i}", "completion": f"{i} 5 6"} for i in range(8)]
    named = AutoModelForCausalLM.from_pretrained(folder)
    config = BlueprintConfig(probe=texts, r=2, **WISH).resolve(named)
    encoded = encode(texts, AutoTokenizer.from_pretrained(folder))
    assert config.selection == BlueprintConfig(probe=encoded, r=2, **WISH).resolve(named).selection
    with pytest.raises(BlueprintError, match=r"no name to find its tokenizer by. Encode them: probe="):
        BlueprintConfig(probe=texts, r=2, **WISH).resolve(tiny_llama(layers=6))


def test_a_probe_alone_is_the_blueprint(model, probe):
    """The probe is the blueprint then; with probe_examples=0 as well, the call is an error."""
    config = BlueprintConfig(probe=LOCAL, probe_examples=6, **WISH).resolve(model)
    assert (
        config.selection == plan_placement(probe, model, **WISH).lora and config.record.provenance.get("blend") is None
    )
    with pytest.raises(PlacementError, match="needs a blueprint .* a probe or a placement"):
        BlueprintConfig(probe=LOCAL, probe_examples=0, **WISH)


def test_options_that_a_probe_rules_out_are_refused(model, published):
    """Each in one line, and a blueprint of another model before anything is measured."""
    with pytest.raises(PlacementError, match="probe and placement both say where adapters go"):
        BlueprintConfig(placement=plan_placement(published), probe=LOCAL)
    with pytest.raises(PlacementError, match="domain='bio' chooses among the domains of a blueprint"):
        BlueprintConfig(probe=LOCAL, domain="bio")
    with pytest.raises(MismatchError, match="no domain tag 'code'"):
        BlueprintConfig(blueprint=published, domain="code")
    with pytest.raises(BlueprintError, match="blend_weight must be in"):
        BlueprintConfig(blueprint=published, probe=LOCAL, blend_weight=2)

    class Unread:
        def __iter__(self):
            raise AssertionError("measured a model that the blueprint is not of")

    with pytest.raises(MismatchError):
        BlueprintConfig(blueprint=published, probe=Unread()).resolve(tiny_llama(layers=4))
    with pytest.raises(BlueprintError, match="probe_examples=0 leaves nothing to measure"):
        probe_blueprint(model, LOCAL, published, probe_examples=0)
    with pytest.raises(BlueprintError, match="domain='bio' chooses among the domains of a published blueprint"):
        probe_blueprint(model, LOCAL, domain="bio", progress=False)


def test_a_second_adapter_is_probed_where_the_first_one_is(published):
    """The names are the base model's; the first adapter counts as part of the model and keeps its weights."""
    model = get_peft_model(tiny_llama(layers=6), BlueprintConfig(blueprint=published, r=2, **WISH))
    randomize_adapters(model)
    tokens = torch.arange(1, 11)[None]
    before = model.eval()(tokens).logits
    model.add_adapter("second", BlueprintConfig(blueprint=published, probe=LOCAL, r=2, **WISH))
    assert len(model.peft_config["second"].selection) == 5
    torch.testing.assert_close(model(tokens).logits, before)


def test_groups_are_spread_onto_the_model_before_the_blend(model, published, probe):
    """A published blueprint of groups with a probe of submodules."""
    config = BlueprintConfig(blueprint=published.coarsen("group"), probe=probe, **WISH).resolve(model)
    assert config.record.level == "submodule" and isinstance(config.record, Blueprint)
    assert config.record.provenance["blend"]
