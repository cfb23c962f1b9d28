"""A blueprint is bound to its model: by names and shapes, id and revision, and weights. Run: pytest tests/measure/test_compatibility.py"""

import warnings
from dataclasses import replace

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
)

from peft_blueprint import Blueprint, BlueprintConfig, generate_blueprint
from peft_blueprint.blueprint.entry import Submodule
from peft_blueprint.errors import MismatchError
from peft_blueprint.measure import find_submodules
from peft_blueprint.measure.compatibility import WEIGHTS_DIGEST, check_fits, check_weights, weights_digest
from peft_blueprint.publish import embed
from peft_blueprint.testing import quantize, random_model, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, toy_batches


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
RESIZABLE = {  # with an untied, a tied and a shared table, with a head's bias, and stored under other names
    "tiny_llama": tiny_llama,
    "tied": lambda: tiny_llama(1, tie_word_embeddings=True),
    "tiny_gpt2": tiny_gpt2,
    "tiny_t5": tiny_t5,
    "Phi": lambda: random_model(PhiForCausalLM, PhiConfig(vocab_size=97, pad_token_id=0, **SMALL)),
    "BERT": lambda: random_model(BertForMaskedLM, BertConfig(vocab_size=97, **SMALL)),
    "LLaVA": lambda: random_model(
        LlavaForConditionalGeneration,
        LlavaConfig(
            text_config=LlamaConfig(vocab_size=97, **SMALL), vision_config=CLIPVisionConfig(image_size=16, **SMALL)
        ),
    ),
}


def named(name, commit=None):
    """A tiny model that was loaded under a name, at a commit."""
    model = tiny_llama(layers=12)
    model.config._name_or_path, model.config._commit_hash = name, commit
    return model


def test_the_models_own_blueprint_fits_without_a_word(blueprint):
    """Under its own id at the revision that was measured, from a folder, and from nowhere."""
    published = replace(blueprint, model_id="org/model", model_revision="a" * 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (named("org/model", "a" * 40), named("org/model"), named("a folder/of/mine"), named("")):
            check_fits(published, model)


def test_names_and_shapes_must_be_the_models(blueprint):
    """A deeper model's blueprint, and a wider one's, are refused with both sides."""
    with pytest.raises(MismatchError, match="'tiny/llama' does not fit this LlamaForCausalLM: 77 of its 84 entries"):
        check_fits(blueprint, tiny_llama(layers=1))
    with pytest.raises(MismatchError, match="is 32x32 in the blueprint of 'tiny/llama' and 64x64 in this model"):
        check_fits(blueprint, tiny_llama(layers=12, hidden_size=64))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (named("org/other"), "is of 'org/model', but this model is 'org/other'.*check_drift"),
        (named("org/model", "b" * 40), "'org/model' is of revision aaaa.*this model is of revision bbbb"),
    ],
    ids=["another id", "another revision"],
)
def test_a_fitting_blueprint_of_another_model_warns(blueprint, model, message):
    """By check_fits, and so by the config that places by it."""
    published = replace(blueprint, model_id="org/model", model_revision="a" * 40)
    with pytest.warns(UserWarning, match=message):
        check_fits(published, model)
    with pytest.warns(UserWarning, match=message):
        BlueprintConfig(blueprint=published, fraction=0.1, r=2).resolve(model)


def test_submodules_missing_in_the_blueprint_are_named(blueprint):
    """A model with more layers than were measured: the measured ones fit, the others are named."""
    with pytest.warns(UserWarning, match="with other submodules than this one, which also has 'model.layers.12.self"):
        check_fits(blueprint, tiny_llama(layers=13))


def test_weights_are_compared_on_request():
    """Equal in float32 and bfloat16; others are refused, and incomparable ones are an error."""
    model = tiny_llama(layers=2).to(torch.bfloat16)
    measured = generate_blueprint(model.float(), toy_batches(), digest_weights=True, progress=False)
    assert measured.provenance[WEIGHTS_DIGEST] == weights_digest(model.to(torch.bfloat16))
    check_weights(measured, model)
    with pytest.raises(MismatchError, match="measured on other weights.*than this model's"):
        check_weights(measured, tiny_llama(layers=2, seed=1))
    with pytest.raises(MismatchError, match="quantized, sharded or not loaded"):
        check_weights(measured, quantize(tiny_llama(layers=2), "nf4"))
    with pytest.raises(MismatchError, match="no weights_digest in its provenance.*digest_weights=True"):
        check_weights(replace(measured, provenance={}), model)


def test_an_adapted_model_has_its_base_models_weights():
    """Adapters do not change a model's digest."""
    from peft import LoraConfig, get_peft_model

    before = weights_digest(tiny_llama(layers=2))
    assert weights_digest(get_peft_model(tiny_llama(layers=2), LoraConfig(target_modules=["q_proj"]))) == before


def test_an_entry_that_is_none_of_the_models_is_named(blueprint):
    """However few they are."""
    odd = replace(blueprint, submodules=(*blueprint.submodules, Submodule("model.layers.0.mlp.odd", 1.0)))
    with pytest.raises(MismatchError, match="1 of its 85 entries are not in the model .'model.layers.0.mlp.odd'"):
        check_fits(odd, tiny_llama(layers=12))


@pytest.mark.parametrize("build", RESIZABLE.values(), ids=RESIZABLE)
def test_a_resized_vocabulary_fits(build, tmp_path):
    """The model and its files: no adapter goes on embeddings and heads, whose rows are tokens; another width is not."""
    model = build()
    entries = tuple(replace(row, gradient_norm=1.0) for row in find_submodules(model, include="all"))
    blueprint = Blueprint("org/model", entries)
    wide = tuple(
        replace(entry, shape=(entry.shape[0], 2 * entry.shape[1])) if entry.form == "embedding" else entry
        for entry in blueprint
    )
    for tokens in (90, 128):
        model.resize_token_embeddings(tokens)
        check_fits(blueprint, model)
        model.save_pretrained(tmp_path)
        embed(blueprint, tmp_path, progress=False)
    for check in (lambda of: check_fits(of, model), lambda of: embed(of, tmp_path, progress=False)):
        with pytest.raises(MismatchError, match="another size|does not fit"):
            check(replace(blueprint, submodules=wide))


def test_another_number_of_classes_fits():
    """Of a classifier, whose rows and bias are classes."""
    entries = tuple(replace(row, gradient_norm=1.0) for row in find_submodules(tiny_bert(labels=3), include="all"))
    check_fits(Blueprint("org/model", entries), tiny_bert(labels=5))
