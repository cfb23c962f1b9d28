"""Invocation tokens: found in a tokenizer, and the answers that they begin."""

import pytest
import torch
from transformers import AutoTokenizer

from peft_blueprint import BlueprintError
from peft_blueprint.testing import save_tiny_model
from peft_blueprint.train import find_invocation_tokens
from peft_blueprint.train.invocation import Answer, find_answers


TEMPLATE = "{% for m in messages %}{{ m.role == 'user' and '70' or '71' }} {{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of the numbers 0 to 89, whose ids begin at 4."""
    return AutoTokenizer.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("tiny")))


def test_they_are_the_generation_prompt_of_the_chat_template(tokenizer):
    """As in every chat of that template."""
    tokenizer.chat_template = TEMPLATE + "{% if add_generation_prompt %}71 5 {% endif %}"
    assert find_invocation_tokens(tokenizer) == [75, 9]
    for template, message in ((TEMPLATE, "adds nothing for add_generation_prompt"), (None, "has no chat template")):
        tokenizer.chat_template = template
        with pytest.raises(BlueprintError, match=message):
            find_invocation_tokens(tokenizer)


def test_a_text_must_have_tokens_of_its_own(tokenizer):
    """An empty one has none."""
    assert find_invocation_tokens(tokenizer, " 7 8") == [11, 12]
    with pytest.raises(BlueprintError, match="has no tokens"):
        find_invocation_tokens(tokenizer, " ")


def test_text_that_merges_with_its_surroundings_is_refused(tokenizer):
    """So that no example lacks them later."""

    class Merging:
        chat_template = None

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [len(word) for word in text.split(" ")]}

    with pytest.raises(BlueprintError, match="is tokenized differently before"):
        find_invocation_tokens(Merging(), "Answer:\n")


def test_answers_of_a_chat_begin_at_its_invocations():
    """The last one, or every one with a target; positions behind the last target are left out."""
    ids = torch.tensor([[0, 0, 3, 7, 8, 4, 5, 6, 7, 8, 9, 2, 2]])
    targets = torch.full_like(ids, -100)
    targets[0, 4], targets[0, 9] = 4, 9
    mask = ids > 0
    last, first = Answer(0, 2, 8, 10, 13), Answer(0, 2, 3, 5, 8)
    assert find_answers(ids, mask, targets, [7, 8]) == [last]
    assert find_answers(ids, mask, targets, [7, 8], "every") == [first, last]
    targets[0, 9] = -100
    assert find_answers(ids, mask, targets, [7, 8], "every") == [first]
    targets[0, 4] = -100
    assert find_answers(ids, mask, targets, [7, 8], "every") == [Answer(0, 2, 8, 9, 13)]
