"""Untrusted files in place of a recipe or a run's record are refused with a clear error."""

import os

import pytest

from peft_blueprint.errors import BlueprintError
from peft_blueprint.runs import RunRecord
from peft_blueprint.train import Recipe


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
CONTENTS = {
    "empty": b"",
    "zeros": bytes(1000),
    "binary": bytes(range(256)),
    "UTF-16": "model: m".encode("utf-16"),
    "a list": b"[1]",
    "a number": b"3",
    "null": b"null",
    "cut short": b'{"model": "m",',
    "deep": b"[" * 100_000,
    "aliases": BOMB.encode(),
    "a cycle": b"model: m\ntrain: t\noutput: o\nlora: &a {target_modules: *a}\n",
    "a Python object": b"model: !!python/object/apply:os.system ['true']\n",
    "a date": b"model: 2024-01-01\ntrain: t\noutput: o\n",
    "no date": b"model: 2024-99-99\ntrain: t\noutput: o\n",
    "bytes": b"model: !!binary aGVsbG8=\ntrain: t\noutput: o\n",
    "a set": b"model: m\ntrain: t\noutput: o\nlora: !!set {a, b}\n",
    "a key twice": b"model: m\nmodel: n\ntrain: t\noutput: o\n",
    "a list as a key": b"? [a, b]\n: 1\nmodel: m\n",
    "a number as a key": b"1: 2\nmodel: m\ntrain: t\noutput: o\n",
    "a tag on nothing": b"model: !!int x\n",
}


def place(path, kind):
    """Put a file of a kind at a path."""
    if kind in CONTENTS:
        path.write_bytes(CONTENTS[kind])
    elif kind == "a folder":
        path.mkdir()
    elif kind == "300 MB":
        path.touch()
        os.truncate(path, 300 * 2**20)
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a link to nowhere":
        path.symlink_to("nowhere")
    elif kind == "a link to itself":
        path.symlink_to(path.name)


@pytest.mark.parametrize("name", ["run.json", "trainer_state.json", "recipe.yaml"])
@pytest.mark.parametrize(
    "kind",
    [*CONTENTS, "a folder", "300 MB", "a pipe", "a device", "a link to nowhere", "a link to itself", "nothing"],
)
def test_invalid_files_are_refused_by_name(kind, name, tmp_path):
    """One line that names the file; nothing hangs, is run or fills the memory."""
    place(tmp_path / name, kind)
    read = Recipe.from_yaml if name == "recipe.yaml" else RunRecord.load
    with pytest.raises(BlueprintError) as raised:
        read(tmp_path / name)
    assert name in str(raised.value) and "blueprint at" not in str(raised.value)
    if name != "recipe.yaml":
        with pytest.raises(BlueprintError, match=str(tmp_path)):
            RunRecord.load(tmp_path)
