"""Texts become the right tokens and targets, and bad data is refused by name. Run: pytest tests/measure/test_batches.py"""

import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peft_blueprint import generate_blueprint, measure_influence
from peft_blueprint.data import Pool, read_examples
from peft_blueprint.data.features import model_features
from peft_blueprint.errors import BlueprintError, MeasurementError
from peft_blueprint.measure import Privacy, as_batches, encode, encode_one, make_batches
from peft_blueprint.testing import save_tiny_model, tiny_bert, tiny_llama, tiny_t5, tiny_vit, toy_batches


USER, ASSISTANT, THINK, END = 80, 81, 82, 83  # words of the tiny tokenizer that stand for a template's marks
CHAT = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3 4"}]
LONG_CHAT = [*CHAT, {"role": "user", "content": "5"}, {"role": "assistant", "content": "6 7"}]
HEADERS = (
    f"{{% for m in messages %}}{{{{ '{USER} ' if m.role == 'user' else '{ASSISTANT} ' }}}}"
    f"{{{{ m.content }}}} {END} {{% endfor %}}"
)
MARKED = (
    f"{{% for m in messages %}}{{% if m.role == 'user' %}}{USER} {{{{ m.content }}}} {END} {{% else %}}"
    f"{{{{ '{ASSISTANT} ' }}}}{{% generation %}}{{{{ m.content }}}} {END}{{% endgeneration %}} {{% endif %}}{{% endfor %}}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture
def tokenizer(folder):
    """Words are the numbers 0 to 89, with ids from 4; <s> is 1 and </s> is 2."""
    return AutoTokenizer.from_pretrained(folder)


def words(row):
    """Tokens and targets as words: numbers, with None where there is no target."""
    ids = [i - 4 if i > 3 else {1: "<s>", 2: "</s>"}[i] for i in row["input_ids"]]
    return ids, [None if label == -100 else word for word, label in zip(ids, row["labels"], strict=True)]


# ------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize(
    ("form", "eos", "before", "after"),
    [
        ("$A", "</s>", [], ["</s>"]),
        ("<s> $A", "</s>", ["<s>"], ["</s>"]),
        ("<s> $A </s>", "</s>", ["<s>"], ["</s>"]),
        ("$A </s>", "</s>", [], ["</s>"]),
        ("<s> $A </s>", None, ["<s>"], ["</s>"]),
        ("<s> $A", None, ["<s>"], []),
    ],
)
def test_special_tokens_stand_around_prompt_and_completion(tokenizer, form, eos, before, after):
    """Once each, and never between them, whichever of them the tokenizer adds itself."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=form, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.eos_token = eos
    ids, targets = words(encode_one({"prompt": "11 12", "completion": "21 22"}, tokenizer))
    assert ids == [*before, 11, 12, 21, 22, *after]
    assert targets == [None] * (len(before) + 2) + [21, 22, *after]
    ids, targets = words(encode_one({"prompt": "", "completion": "21 22"}, tokenizer))
    assert ids == [*before, 21, 22, *after] and targets[len(before) :] == [21, 22, *after]
    ids, targets = words(encode_one({"text": "21 22"}, tokenizer))
    assert ids == targets == [*before, 21, 22, *after]


@pytest.mark.parametrize(
    ("generation_prompt", "targets"),
    [
        (f"{ASSISTANT} ", [6, 7, END]),
        (f"{ASSISTANT} {THINK} ", [6, 7, END]),  # not in the whole chat
        (f"{THINK} {END} {ASSISTANT} ", [6, 7, END]),
        ("", [6, 7, END]),
    ],
)
def test_targets_are_the_last_message_for_any_generation_prompt(tokenizer, generation_prompt, targets):
    """The question and the generation prompt are masked."""
    tokenizer.chat_template = HEADERS + f"{{% if add_generation_prompt %}}{generation_prompt}{{% endif %}}"
    ids, found = words(encode_one({"messages": LONG_CHAT}, tokenizer))
    assert ids == [USER, 1, 2, END, ASSISTANT, 3, 4, END, USER, 5, END, ASSISTANT, 6, 7, END]
    assert [target for target in found if target is not None] == targets
    assert found[-len(targets) :] == targets


@pytest.mark.parametrize("mark", ["{% generation %}", "{%- generation -%}", "{%generation%}"])
@pytest.mark.parametrize("generation_prompt", [f"{ASSISTANT} ", f"{ASSISTANT} {THINK} "])
def test_where_a_template_marks_generation_its_marks_are_the_targets(tokenizer, generation_prompt, mark):
    """Of every turn, also where the mark begins or ends with a space, which is in no token here."""
    for before, after in (("", "{% endgeneration %} "), (" ", " {% endgeneration %}")):
        marked = MARKED.replace("{% generation %}", mark + before).replace("{% endgeneration %} ", after)
        tokenizer.chat_template = marked + f"{{% if add_generation_prompt %}}{generation_prompt}{{% endif %}}"
        ids, found = words(encode_one({"messages": LONG_CHAT}, tokenizer))
        assert ids == [USER, 1, 2, END, ASSISTANT, 3, 4, END, USER, 5, END, ASSISTANT, 6, 7, END]
        assert found == [None] * 5 + [3, 4, END] + [None] * 4 + [6, 7, END]


@pytest.mark.parametrize(
    "template",
    [
        f"{HEADERS.replace('in messages', 'in messages|reverse')}{{% if add_generation_prompt %}}{THINK}{{% endif %}}",
        f"{HEADERS.replace('m.content', 'm.content|replace(7, 8)')}{{% if add_generation_prompt %}}{THINK}{{% endif %}}",
    ],
)
def test_a_chat_whose_answer_cannot_be_found_is_refused(tokenizer, template):
    """Because it stands before the question, or the answer itself is rendered otherwise."""
    tokenizer.chat_template = template
    with pytest.raises(BlueprintError, match=r"changes the messages of example 1, .*\{% generation %\}"):
        encode([{"prompt": "1", "completion": "2"}, {"messages": LONG_CHAT}], tokenizer)


@pytest.mark.parametrize("generation_prompt", ["", f"{ASSISTANT} {THINK} "])
@pytest.mark.parametrize("answer", [str(ASSISTANT), "8", "1", ""])
def test_an_answer_that_stands_in_a_header_or_the_question_too(tokenizer, generation_prompt, answer):
    """The targets are the answer's own place, wherever else its words are; also behind a count of the messages."""
    headers = f"{{{{ messages|length }}}} {HEADERS}"
    tokenizer.chat_template = headers + f"{{% if add_generation_prompt %}}{generation_prompt}{{% endif %}}"
    chat = [CHAT[0], {"role": "assistant", "content": answer}]
    ids, found = words(encode_one({"messages": chat}, tokenizer))
    assert ids == [2, USER, 1, 2, END, ASSISTANT, *map(int, answer.split()), END]
    assert found == [None] * 6 + [*map(int, answer.split()), END]


@pytest.mark.parametrize("template", [HEADERS, MARKED])
def test_a_chat_without_an_answer_has_no_target(tokenizer, template):
    """The question is none."""
    tokenizer.chat_template = template
    asked = {"messages": [CHAT[0], CHAT[0]]}
    assert encode_one(asked, tokenizer) is None and len(encode([asked, {"messages": CHAT}], tokenizer)) == 1


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_a_prompt_and_its_answer_have_the_tokens_of_the_whole_text(tokenizer, scheme):
    """Also where the tokenizer puts a space before each text; a token of a space and the answer is a target."""
    letters = [*"▁abc", "▁a", "▁b"]
    backend = Tokenizer(BPE({t: i for i, t in enumerate(letters)}, [("▁", "a"), ("▁", "b")]))
    backend.pre_tokenizer = Metaspace(prepend_scheme=scheme)
    metaspace = PreTrainedTokenizerFast(tokenizer_object=backend)
    for prompt, answer, targets in (("a", "b", "b"), ("a", " b", "▁b"), ("a ", "b", "▁b"), ("a b", "c a", "c▁a")):
        row = encode_one({"prompt": prompt, "completion": answer}, metaspace)
        assert row["input_ids"] == metaspace(prompt + answer)["input_ids"]
        assert "".join(letters[i] for i in row["labels"] if i != -100) == targets


WRONG = [None, 3, 2.5, ["1", "2"], {"a": "1"}, [["1"]], b"1", "\ud800"]


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("key", ["prompt", "completion", "text", "messages", "content", "input_ids", "labels"])
def test_a_bad_value_is_one_error_that_names_example_and_key(tokenizer, key, value):
    """Null, numbers, nested values and text that is not Unicode; before any model runs."""
    tokenizer.chat_template = HEADERS
    good = {"prompt": "1", "completion": "2"}
    example = {
        "text": {"text": value},
        "messages": {"messages": value},
        "content": {"messages": [CHAT[0], {"role": "assistant", "content": value}]},
        "input_ids": {"input_ids": value, "labels": [1, 2]},
        "labels": {"input_ids": [1, 2], "labels": value},
    }.get(key, good | {key: value})
    shown = "content|messages" if key == "content" else key
    with pytest.raises(
        BlueprintError, match=rf"(?i)({shown}).* example 1|example 1.*({shown})|message 0 of example 1"
    ):
        encode([good, example], tokenizer)
    with pytest.raises(BlueprintError, match="example 1"):
        measure_influence(tiny_llama(1), [good, example], tokenizer=tokenizer, progress=False)


ALPACA = {"instruction": "1 2", "input": "3", "output": "4", "text": "### 1 2 3 4"}
SHAREGPT = {"conversations": [{"from": "human", "value": "1 2"}, {"from": "gpt", "value": "3 4"}]}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (ALPACA, {"prompt": "1 2\n3\n", "completion": "4"}),
        ({**ALPACA, "input": ""}, {"prompt": "1 2\n", "completion": "4"}),
        (SHAREGPT, {"messages": CHAT}),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {"messages": CHAT}),
    ],
)
def test_columns_of_alpaca_sharegpt_and_trl_are_known(tokenizer, tmp_path, theirs, ours):
    """In a list, a pool to choose from, and a file."""
    tokenizer.chat_template = HEADERS
    expected = encode_one(ours, tokenizer)
    assert encode_one(theirs, tokenizer) == expected
    assert Pool([theirs], tokenizer).encode(0, theirs).row == expected
    Dataset.from_list([theirs]).to_json(tmp_path / "rows.jsonl")
    assert read_examples(str(tmp_path / "rows.jsonl")) == [ours]
    [batch] = as_batches(tiny_llama(2), [theirs], tokenizer=tokenizer)
    assert batch["input_ids"].tolist() == [expected["input_ids"]]


def test_a_turn_of_neither_user_nor_assistant_is_refused(tokenizer):
    """Named with its example."""
    turns = {"conversations": [{"from": "tool", "value": "1"}]}
    with pytest.raises(BlueprintError, match="conversations of example 3 must have turns from human, user, gpt"):
        encode_one(turns, tokenizer, index=3)


def test_parts_that_a_template_prints_with_brackets_are_refused(tokenizer):
    """Templates for text alone write a list as Python does."""
    tokenizer.chat_template = HEADERS
    parts = [{"type": "text", "text": "3 4"}]
    chat = {"messages": [CHAT[0], {"role": "assistant", "content": parts}]}
    with pytest.raises(BlueprintError, match="'content' of message 1 of example 0 must be text, got a list"):
        encode_one(chat, tokenizer)
    tokenizer.chat_template = HEADERS.replace("m.content", "m.content if m.content is string else m.content[0].text")
    assert words(encode_one(chat, tokenizer))[0] == [USER, 1, 2, END, ASSISTANT, 3, 4, END]


# ------------------------------------------------------------------------------------------ examples as data

TEXTS = [{"prompt": f"{i} {i + 1}", "completion": " ".join(map(str, range(i % 4 + 1)))} for i in range(20)]


def measured(batches, tokenizer=None, **options):
    return measure_influence(tiny_llama(2), batches, tokenizer=tokenizer, progress=False, **options).norms


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        iter,
        Dataset.from_list,
        lambda rows: Dataset.from_list(rows).with_format("torch"),
        lambda rows: Dataset.from_list(rows).to_iterable_dataset(),
        lambda rows: IterableDataset.from_generator(lambda: iter(rows)),
    ],
)
@pytest.mark.parametrize("encoded", [False, True])
def test_examples_are_measured_as_their_batches_are(tokenizer, form, encoded):
    """Of texts, or of token ids, which need no tokenizer."""
    rows = encode(TEXTS, tokenizer)
    expected = measured(make_batches(rows, 8, 0), max_examples=12)
    given, needed = (rows, None) if encoded else (TEXTS, tokenizer)
    assert torch.equal(measured(form(given), needed, max_examples=12), expected)


def test_wherever_batches_are_taken_examples_are_too(tokenizer):
    """A blueprint, of several domains and with privacy, the initialization and the held-out loss."""
    from peft import LoraConfig, get_peft_model

    from peft_blueprint.train import held_out_loss, initialize_along_gradient

    model, batches = tiny_llama(2), make_batches(encode(TEXTS, tokenizer), 8, 0)
    for options in ({}, {"privacy": Privacy(epsilon=1000.0, delta=1e-5)}):
        found, expected = (
            generate_blueprint(model, {"a": data, "b": data}, tokenizer=tokenizer, progress=False, **options)
            for data in (TEXTS, batches)
        )
        assert [entry.examples for entry in found] == [entry.examples for entry in expected] == [20] * 14
        assert found.provenance["domains"].keys() == expected.provenance["domains"].keys() == {"a", "b"}
    assert held_out_loss(model, TEXTS, tokenizer=tokenizer, progress=False) == pytest.approx(
        held_out_loss(model, batches, progress=False)
    )
    adapters = []
    for data in (Dataset.from_list(TEXTS), batches):
        torch.manual_seed(0)
        adapted = get_peft_model(tiny_llama(2), LoraConfig(r=2, target_modules=["q_proj"]))
        assert initialize_along_gradient(adapted, data, tokenizer=tokenizer, progress=False) == 2
        adapters.append({name: value for name, value in adapted.named_parameters() if "lora_A" in name})
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())


def test_a_tokenizer_beside_batches_changes_nothing(tokenizer):
    """And texts without one, or an example of another kind, are refused."""
    assert torch.equal(measured(toy_batches(), tokenizer), measured(toy_batches()))
    with pytest.raises(BlueprintError, match="Pass the model's tokenizer"):
        measured(TEXTS)
    with pytest.raises(BlueprintError, match="Example 0 must have prompt and completion, .* it has 'question'"):
        measured([{"question": "1"}], tokenizer)
    with pytest.raises(BlueprintError, match="None of 2 examples has a target within 512 tokens"):
        measured([{"input_ids": [1, 2], "labels": [-100, -100]}] * 2)


def batches_once(kind):
    batches = toy_batches()
    return {
        "generator": lambda: (batch for batch in batches),
        "iterator": lambda: iter(batches),
        "map": lambda: map(dict, batches),
        "loader": lambda: iter(DataLoader(batches, batch_size=None)),
    }[kind]()


@pytest.mark.parametrize("kind", ["generator", "iterator", "map", "loader"])
def test_a_used_up_iterator_is_named(kind):
    """Instead of empty batches, by every function that takes batches."""
    from peft import LoraConfig, get_peft_model

    from peft_blueprint.train import held_out_loss, initialize_along_gradient

    model, batches = tiny_llama(1), batches_once(kind)
    generate_blueprint(model, batches, max_examples=None, progress=False)
    private = Privacy(epsilon=4.0, delta=1e-5)
    for call in (
        lambda: generate_blueprint(model, batches, progress=False),
        lambda: generate_blueprint(model, batches, privacy=private, progress=False),
        lambda: generate_blueprint(model, {"a": toy_batches(), "b": batches}, progress=False),
        lambda: measure_influence(model, batches, progress=False),
        lambda: held_out_loss(model, batches, progress=False),
        lambda: model_features(model, batches),
        lambda: initialize_along_gradient(
            get_peft_model(tiny_llama(1), LoraConfig(target_modules=["q_proj"])), batches, progress=False
        ),
    ):
        with pytest.raises(MeasurementError, match=r"batches is an iterator .* read only once, .* earlier call"):
            call()
    with pytest.raises(MeasurementError, match="The batches are empty"):
        measure_influence(model, [], progress=False)


# ------------------------------------------------------------------------------------------ shapes and labels


def changed(**values):
    """A batch of 2 examples of 8 tokens with some values replaced; a slice cuts the columns."""
    [batch] = toy_batches(examples=2, length=8, batch_size=2, padding="none")
    return batch | {k: batch[k][:, v].contiguous() if isinstance(v, slice) else v for k, v in values.items()}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (changed(labels=slice(0, 6)), "labels, 2x6, do not fit LlamaForCausalLM and its input_ids, 2x8"),
        (changed(labels=torch.ones(2, 9, dtype=torch.long)), "labels, 2x9, do not fit"),
        (changed(labels=torch.ones(2, dtype=torch.long)), "labels, 2, do not fit"),
        (changed(labels=torch.ones(3, 8, dtype=torch.long)), "labels, 3x8, do not fit"),
        (changed(labels=torch.ones(2, 8, 1, dtype=torch.long)), "labels, 2x8x1, do not fit .* loss for them is nan"),
        (changed(attention_mask=torch.ones(2, 7, dtype=torch.long)), "attention_mask, 2x7, does not fit"),
        (changed(input_ids=slice(0, 6)), "input_ids, 2x6"),
        (
            {key: value[0] for key, value in changed().items()},
            r"input_ids must have a row .*got shape \(8,\).*\[None\]",
        ),
        (changed(labels=torch.tensor(1)), r"labels must have a row .* got shape \(\)"),
        (changed(labels=[[1] * 8] * 2), "labels must be a tensor, got list"),
        ([1, 2], "A batch must be a mapping with labels, got list"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(batch, message):
    """Whether it is measured at once or example by example, under a guarantee too."""
    model = tiny_llama(1)
    for data in ([batch], [changed(), batch]):
        with pytest.raises(MeasurementError, match=message):
            measure_influence(model, data, progress=False)
        with pytest.raises(MeasurementError, match=message):
            generate_blueprint(model, data, privacy=Privacy(epsilon=4.0, delta=1e-5), progress=False)
    measure_influence(model, [changed()], progress=False)


def test_shapes_that_the_model_itself_accepts_are_measured():
    """As a class for each text in a column of its own, or a decoder's labels of another length."""
    words = changed()["input_ids"]
    classes = torch.tensor([1, 2])
    column, flat = (
        measure_influence(tiny_bert(1), [{"input_ids": words, "labels": labels}], progress=False)
        for labels in (classes[:, None], classes)
    )
    torch.testing.assert_close(column.losses, flat.losses)
    assert measure_influence(tiny_t5(1), [changed(labels=slice(3, 6))], progress=False).examples == 2


@pytest.mark.parametrize("value", [-1, -99, -101, -1000, 97, 5000])
@pytest.mark.parametrize("build", [tiny_llama, tiny_t5])
def test_labels_out_of_range_are_refused_by_value(build, value):
    """Below 0 except for -100, or beyond the vocabulary, wherever they stand."""
    batch = changed()
    for row, column in ((0, 5), (1, 7)):
        labels = batch["labels"].clone()
        labels[row, column] = value
        with pytest.raises(MeasurementError, match=rf"below 97, or -100 .*; got {value} in row {row}"):
            measure_influence(build(1), [batch, batch | {"labels": labels}], progress=False)


@pytest.mark.parametrize("value", [-1, 3])
def test_classes_out_of_range_are_refused_by_value(value):
    """Of texts, tokens and images; 2 is the last of three."""
    words = changed()["input_ids"]
    images = {"pixel_values": torch.randn(2, 3, 16, 16)}
    for model, batch, labels in (
        (tiny_bert(1), {"input_ids": words}, torch.tensor([2, 0])),
        (tiny_bert(1, tokens=True), {"input_ids": words}, words % 3),
        (tiny_vit(1), images, torch.tensor([2, 0])),
    ):
        assert measure_influence(model, [batch | {"labels": labels}], progress=False).examples == 2
        labels = labels.clone()
        labels[1] = value
        with pytest.raises(MeasurementError, match=f"below 3, or -100 .*; got {value} in row 1"):
            measure_influence(model, [batch | {"labels": labels}], progress=False)


def test_labels_of_another_objective_are_its_own():
    """As preferences of 1 and -1 for a loss function."""
    batch = changed(labels=torch.tensor([1, -1]))

    def loss_fn(model, batch):
        return batch["labels"] * model(input_ids=batch["input_ids"]).logits.mean(dim=(1, 2))

    assert measure_influence(tiny_llama(1), [batch], loss_fn=loss_fn, progress=False).examples == 2
