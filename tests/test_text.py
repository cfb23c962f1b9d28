"""Texts for messages: no secret and no control character reaches a terminal or a log."""

import pytest

from peft_blueprint import Blueprint, BlueprintError, Submodule, plan_placement
from peft_blueprint._secrets import masked
from peft_blueprint._text import find_unprintable, printable
from peft_blueprint.cli.output import Output


LEAKS = {
    "a token of the Hub": "no access with hf_abcDEF123456789",
    "a password in an address": "cannot reach https://me:hf-pass1234@hub.example/api",
    "a name in an address": "cannot reach https://secret9876@hub.example/api",
    "a token with a line end in a header": r"Illegal header value b'Bearer secret9876\nmore'",
    "basic authorization": "Authorization: Basic c2VjcmV0OTg3Ng==",
    "a token that was given": "the value 'plain-token-42' is wrong",
    "the escape of a token that was given": r"the value 'plain-token\n42' is wrong",
    "the environment's token": "refused: env-token-77",
    "the environment's token in an address": "no file at https://hub.example/x?t=env%20token%2078",
    "a password that is not escaped": "cannot reach https://me:secret9876/'#x@hub.example/api",
    "a header in small letters": "authorization: bearer secret9876",
    "a key of another service": "the tracker answers that other-key-99 is unknown",
    "a password of the environment's proxy": "failed: ConnectionError(host='me:proxy/pass')",
    "a signed address": "cannot load https://cdn.example/x?Expires=1&Signature=secret9876&Key-Pair-Id=K1",
}


@pytest.mark.parametrize("text", LEAKS.values(), ids=LEAKS)
def test_secrets_are_masked(text, monkeypatch):
    """In tokens, headers and addresses; the rest of the text stays."""
    monkeypatch.setenv("HF_TOKEN", "env-token-77\n")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "env token 78")
    monkeypatch.setenv("TRACKER_API_KEY", "other-key-99")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:proxy%2Fpass@proxy.example:8080")
    assert str(BlueprintError(text)) == masked(text)
    found = masked(text, ["plain-token-42", "plain-token\n42", None, True])
    secrets = ("hf_abc", "hf-pass", "secret9876", "c2Vj", "plain-token-42", r"token\n42", "env-token", "token%20")
    for secret in (*secrets, "other-key", "proxy/pass"):
        assert secret not in found
    assert found.startswith(text.split()[0]) and "***" in found
    for fine in ("org/model at https://hub.example/a@b", "http://localhost:8080/a@b?revision=1", "Set HF_TOKEN."):
        assert masked(fine) == fine


CONTROLS = [
    "\0",
    "\x07",
    "\x1b[2J",
    "\x7f",
    "\x9b",
    "\u061c",
    "\u200b",
    "\u200f",
    "\u2028",
    "\u202e",
    "\u2066",
    "\ufeff",
]


@pytest.mark.parametrize("control", CONTROLS, ids=ascii)
def test_control_characters_are_escaped(control):
    """Also those that are not shown or turn the line around; letters, spaces of any width and line ends stay."""
    assert find_unprintable(f"a{control}b") is not None
    assert find_unprintable(printable(f"a{control}b")) is None
    assert printable("модель 層\u3000a\u00a0b\nc") == "модель 層\u3000a\u00a0b\nc"


@pytest.mark.parametrize(
    "name", ["a[/b]c", "[red]x", "a\\[b]", "[link=http://x]y[/link]", ":smile:", "a[", "]b", "[/]"]
)
def test_markup_in_names_is_plain_text(name, capsys):
    """In the tables of verbs and of a placement, as id, kind, tag and model."""
    entry = Submodule(
        name.replace("\\", "/"), 1.0, kind=name, depth=0, group="attn.0", shape=(4, 4), domain_tags={name: 1.0}
    )
    blueprint = Blueprint(name, (entry,), concentration={"gamma_fit": "x", "tail": {"gini": 3}})
    Output().blueprint(blueprint, "gradient_norm", 0, [])
    assert capsys.readouterr().out.count(name) >= 2
    assert str(plan_placement(blueprint, num_modules=1)).count(name) >= 2


def test_titles_and_lines_are_printable(capsys):
    """The terminal obeys nothing that a file says."""
    Output().answer(None, [{"a\x1b[2J": "b\x07"}], [], "c\x9bd")
    Output("quiet").answer(None, [], ["e\x1b]0;x\x07"], "")
    Output().hint("f\x1b[31m hf_0123456789")
    shown = capsys.readouterr()
    assert find_unprintable((shown.out + shown.err).replace("\n", "")) is None
    assert "hf_0123456789" not in shown.err
