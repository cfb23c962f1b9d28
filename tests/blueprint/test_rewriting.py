"""A safetensors file's metadata, replaced safely and read again."""

import errno
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_in_torch

from peft_blueprint.blueprint.header import (
    FIRST_READ,
    HEADER_LIMIT,
    metadata_of_prefix,
    read_header,
    read_metadata,
    replace_metadata,
)
from peft_blueprint.errors import BlueprintError


KEY = "blueprint.json"

OTHERS = {"format": "pt", "modelspec.title": 'a "model"\n', "ss_tag_frequency": '{"ä": 1}'}

TENSORS = {f"model.layers.{i}.weight": np.arange(i, i + 210, dtype="f4").reshape(7, 30) for i in range(12)}


def text_of(seed, count=6000):
    """JSON of some pages with many quotes and backslashes, different everywhere for each seed."""
    return json.dumps({"seed": seed, "words": [f'"{(seed * 7919 + i * 31) % 9973}\\' for i in range(count // 12)]})


@pytest.fixture
def model(tmp_path):
    """A file as another tool writes it."""
    save_file(TENSORS, tmp_path / "model.safetensors", metadata=OTHERS)
    return tmp_path / "model.safetensors"


def same(a, b):
    return json.loads(a) == json.loads(b)


def data_of(path):
    content = path.read_bytes()
    return hashlib.sha256(content[8 + struct.unpack("<Q", content[:8])[0] :]).hexdigest()


def check_loads(path, *texts):
    """Every reader loads the file, its tensors are as they were, and its text is one of `texts`, which is returned."""
    for load in (load_file, load_in_torch):
        loaded = load(path)
        assert loaded.keys() == TENSORS.keys()
        assert all(np.array_equal(np.asarray(loaded[name]), TENSORS[name]) for name in TENSORS)
    with safe_open(path, "np") as file:
        seen = file.metadata()
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    ours = read_metadata(path)
    for metadata in (seen, ours, json.loads(content[8:end])["__metadata__"]):
        assert {key: metadata[key] for key in OTHERS} == OTHERS
        assert same(metadata[KEY], ours[KEY])
    assert end % 8 == 0 and sum(same(ours[KEY], text) for text in texts) == 1
    return ours[KEY]


def test_a_rewrite_changes_the_metadata_alone(model):
    """Other keys, permissions and the bytes of the tensors stay, data stays aligned, the metadata comes first."""
    model.chmod(0o640)
    before = data_of(model)
    for text in (text_of(1), text_of(2, 60_000)):
        assert replace_metadata(model, {KEY: text, "blueprint.version": "1"}, progress=False) is True
        check_loads(model, text)
        assert data_of(model) == before and model.stat().st_mode & 0o777 == 0o640
        assert model.read_bytes()[8:24] == b'{"__metadata__":'
    assert os.listdir(model.parent) == [model.name]


def test_removed_keys_are_gone(model):
    """Removing gives the metadata that was there, and of a file that had none, none."""
    replace_metadata(model, {KEY: text_of(0)}, progress=False)
    size = model.stat().st_size
    replace_metadata(model, {KEY: None}, progress=False)
    assert read_metadata(model) == OTHERS and model.stat().st_size < size - 6000
    save_file(TENSORS, model)
    replace_metadata(model, {KEY: "{}"}, progress=False)
    replace_metadata(model, {KEY: None}, progress=False)
    assert read_metadata(model) == {"format": "pt"} and load_file(model).keys() == TENSORS.keys()


@pytest.mark.parametrize("before", [None, {}, {"ss_network_dim": "4"}, {"format": "np"}])
def test_metadata_names_a_format(tmp_path, before):
    """transformers before version 5 refuses metadata without one; one that is named stays."""
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata=before)
    replace_metadata(path, {KEY: "{}"}, progress=False)
    assert read_metadata(path) == {"format": "pt", **(before or {}), KEY: "{}"}


@pytest.mark.parametrize(
    "header", ['{"__metadata__":null,%s}', '{%s,"__metadata__": null}', '{ "__metadata__" : null , %s }']
)
def test_null_metadata_counts_as_none(tmp_path, header):
    """As for the safetensors library."""
    path = tmp_path / "model.safetensors"
    text = (header % '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}').encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    assert read_metadata(path) == {} and list(read_header(path).entries) == ["a"]
    assert metadata_of_prefix(path.read_bytes(), "x")[0] == {}
    replace_metadata(path, {KEY: "{}"}, progress=False)
    assert read_metadata(path) == {"format": "pt", KEY: "{}"} and load_file(path)["a"] == [0]


CHANGES = {
    "moved into its place": lambda path: os.replace(shutil.copy(path, path.with_name("new")), path),
    "written in its place": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"xxxx"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("moment", ["fsync", "copystat"])
def test_a_file_that_is_replaced_meanwhile_stays(model, monkeypatch, change, moment):
    """New weights are not lost: the error says so, and nothing is left beside them."""
    where = os if moment == "fsync" else shutil
    original = getattr(where, moment)

    def then(*arguments):
        monkeypatch.undo()  # once
        change(model)
        return original(*arguments) if model.exists() or moment == "fsync" else None

    monkeypatch.setattr(where, moment, then)
    with pytest.raises(BlueprintError, match="replaced or changed by another program.*Try again"):
        replace_metadata(model, {KEY: "{}"}, progress=False)
    assert not model.exists() or KEY not in read_metadata(model)
    assert set(os.listdir(model.parent)) <= {model.name}


def test_owner_permissions_and_attributes_stay(model):
    """Those that another program, a server or a group relies on."""
    os.setxattr(model, "user.source", b"https://example.org/model")
    if os.getuid() == 0:
        os.chown(model, 1234, 4321)
    model.chmod(0o640)
    before = model.stat()
    replace_metadata(model, {KEY: "{}"}, progress=False)
    after = model.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert os.getxattr(model, "user.source") == b"https://example.org/model"
    assert after.st_ino != before.st_ino and after.st_mtime_ns >= before.st_mtime_ns


def test_a_file_whose_owner_cannot_be_kept_stays(model, monkeypatch):
    """The error says whose it is."""
    before = model.read_bytes()

    def refuses(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    other = os.stat_result((*model.stat()[:4], 1234, 4321, *model.stat()[6:]))
    original = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **_: other if path == model else original(path))
    monkeypatch.setattr(os, "chown", refuses)
    with pytest.raises(BlueprintError, match="belongs to user 1234 and group 4321.*Copy it"):
        replace_metadata(model, {KEY: "{}"}, progress=False)
    monkeypatch.undo()
    assert model.read_bytes() == before and os.listdir(model.parent) == [model.name]


@pytest.mark.parametrize("has_unnamed", [True, False])
def test_leftovers_of_killed_runs_are_removed(model, monkeypatch, has_unnamed):
    """Also where a new file must have a name from the start; other files with such names stay."""
    if not has_unnamed:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    names = [f".{model.name}.0123abcd.part", ".other.safetensors.0123abcd.part", f".{model.name}.part"]
    for name in names:
        model.with_name(name).write_text("half")
    replace_metadata(model, {KEY: "{}"}, progress=False)
    assert set(os.listdir(model.parent)) == {model.name, *names[1:]}
    assert read_metadata(model)[KEY] == "{}"


def test_names_of_any_length_and_letters(tmp_path):
    """Up to what a file system takes."""
    for name in ("a" * 243 + ".safetensors", "ä" * 120 + ".safetensors", "[1]*?{}$ \n.safetensors"):
        path = tmp_path / name
        save_file(TENSORS, path)
        replace_metadata(path, {KEY: "{}"}, progress=False)
        assert read_metadata(path)[KEY] == "{}"
    assert len(os.listdir(tmp_path)) == 3


def test_a_second_write_of_the_same_changes_nothing(model):
    """The file keeps its inode, and a link to the old file keeps the old content."""
    assert replace_metadata(model, {KEY: text_of(1)}, progress=False) is True
    status = model.stat()
    assert replace_metadata(model, {KEY: text_of(1), "format": "pt"}, progress=False) is False
    assert (model.stat().st_ino, model.stat().st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    os.link(model, model.with_name("other.safetensors"))
    replace_metadata(model, {KEY: text_of(2)}, progress=False)
    check_loads(model, text_of(2))
    check_loads(model.with_name("other.safetensors"), text_of(1))


def test_the_metadata_of_another_tool_is_kept(model):
    """Written first or last, in any order."""
    replace_metadata(model, {KEY: text_of(1)}, progress=False)
    with safe_open(model, "np") as file:
        metadata = file.metadata()
    save_file(load_file(model), model, metadata=dict(sorted(metadata.items(), reverse=True)))
    replace_metadata(model, {KEY: text_of(3)}, progress=False)
    check_loads(model, text_of(3))


KILLING = """
import faulthandler, json, os, random, signal, sys, time
from pathlib import Path
from threading import RLock
from safetensors.numpy import load_file
from tqdm import tqdm
from peft_blueprint.blueprint import read_metadata, replace_metadata

tqdm.set_lock(RLock())  # its own is shared with forked children, and one that is killed would hold it for ever
faulthandler.dump_traceback_later(200, exit=True)  # if it hangs, say where
path, rounds = Path(sys.argv[1]), int(sys.argv[2])
os.fsync = os.fdatasync = lambda file: None  # a killed process loses nothing that it wrote, and a busy disk takes minutes to sync
texts = [json.dumps({"which": which, "words": [f'"{which}{i}' for i in range(4000)]}) for which in (0, 1)]
want = {name: tensor.tobytes() for name, tensor in load_file(path).items()}
replace_metadata(path, {"blueprint.json": texts[0]}, progress=False)
rng, seen, left = random.Random(0), set(), 0
started = time.perf_counter()
replace_metadata(path, {"blueprint.json": texts[1]}, progress=False)
takes = time.perf_counter() - started
for i in range(20 * rounds):  # on a busy machine writers may take far longer than the first did
    spent = time.perf_counter() - started
    if (i >= rounds or spent > 40) and (len(seen) == 2 or spent > 90):
        break
    child = os.fork()
    if not child:
        while True:
            for text in texts:
                replace_metadata(path, {"blueprint.json": text}, progress=False)
    time.sleep(min(5, rng.uniform(0, 3 * takes * max(1, 2 * i / rounds))))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left += len(os.listdir(path.parent)) - 1
    assert {name: tensor.tobytes() for name, tensor in load_file(path).items()} == want
    metadata = read_metadata(path)
    record = json.loads(metadata["blueprint.json"])
    assert record == json.loads(texts[record["which"]]), "neither of the two texts"
    seen.add(record["which"])
replace_metadata(path, {"blueprint.json": texts[0]}, progress=False)
assert os.listdir(path.parent) == [path.name], os.listdir(path.parent)
print(sorted(seen), left)
"""


def test_killed_at_any_moment_the_file_is_whole(tmp_path):
    """A process that keeps updating is killed many times: the file loads, its text is one of the two, and nothing is
    left beside it. In memory where there is room: a writer that waits for a busy disk cannot be killed.
    """
    memory = Path("/dev/shm")
    has_room = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 10**8
    with tempfile.TemporaryDirectory(dir=memory if has_room else tmp_path) as folder:
        path = Path(folder, "model.safetensors")
        save_file({"a": np.arange(10**6, dtype="f4"), "b": np.ones((3, 5), "f2")}, path)
        command = [sys.executable, "-c", KILLING, str(path), "30"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    seen, left = result.stdout.rsplit(maxsplit=1)
    assert seen == "[0, 1]"
    assert int(left) <= 1 or not hasattr(os, "O_TMPFILE"), "a new file has no name before it is whole"


def test_a_failed_rewrite_leaves_the_file(model, monkeypatch):
    """Without room on the disk nothing is begun; where writing or moving fails, the file is as it was and alone."""
    before = model.read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(BlueprintError, match=r"written anew.*takes [\d,]+ bytes; its disk has 1 free.*Make room"):
        replace_metadata(model, {KEY: "{}"}, progress=False)
    monkeypatch.undo()

    def fails(*_):
        raise OSError(errno.EIO, "broken disk")

    for name in ("replace", "fsync"):
        monkeypatch.setattr(os, name, fails)
        with pytest.raises(BlueprintError, match="model.safetensors cannot be written: broken disk.*unchanged"):
            replace_metadata(model, {KEY: "{}"}, progress=False)
        monkeypatch.undo()
    with pytest.raises(BlueprintError, match="header of .* would have 25[0-9,]+ bytes.*beside the model"):
        replace_metadata(model, {KEY: "x" * HEADER_LIMIT}, progress=False)
    assert model.read_bytes() == before and os.listdir(model.parent) == [model.name]


def test_progress_is_shown_in_bytes(model, capsys):
    """A bar while the file is written anew, unless it is not wanted."""
    replace_metadata(model, {KEY: "{}"})
    assert "Rewriting model.safetensors: 100%" in capsys.readouterr().err
    replace_metadata(model, {KEY: "[]"}, progress=False)
    assert not capsys.readouterr().err


def test_two_writers_do_not_meet(model):
    """While another process holds the file, an update is refused."""
    import fcntl

    with open(model, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BlueprintError, match="being written by another process"):
            replace_metadata(model, {KEY: "{}"}, progress=False)
    replace_metadata(model, {KEY: "{}"}, progress=False)


def test_a_prefix_is_enough(model):
    """The metadata is read from the first bytes, without the tensors' names; with fewer, the bytes needed are returned."""
    replace_metadata(model, {KEY: text_of(0)}, progress=False)
    content = model.read_bytes()
    metadata, end = metadata_of_prefix(content, "x", len(content))
    assert metadata_of_prefix(content[: end - 800], "x", len(content)) == (metadata, end)
    for count in (8, 9, 20, 40, 3000):
        assert metadata_of_prefix(content[:count], "x", len(content)) == (None, end)
    assert metadata_of_prefix(content[:5], "x") == (None, 8)
    assert metadata == read_metadata(model) and same(metadata[KEY], text_of(0))
    assert next(iter(metadata)) == KEY and FIRST_READ == 100_000


def test_names_and_shapes(model):
    """The whole header has every tensor's dtype and shape."""
    assert read_header(model).tensors == dict.fromkeys(TENSORS, ("F32", (7, 30)))
