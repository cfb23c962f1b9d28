"""A safetensors file's metadata, replaced safely and read again. Run: pytest tests/test_rewriting.py"""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_in_torch

from peft_blueprint.blueprint import slots
from peft_blueprint.blueprint.header import (
    FIRST_READ,
    HEADER_LIMIT,
    metadata_of_prefix,
    read_header,
    read_metadata,
    replace_metadata,
    with_metadata,
)
from peft_blueprint.blueprint.slots import escaped, find_slots, first_text, fit, is_clean
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


@pytest.fixture
def roomy(model):
    """A file with text 0 and room for another."""
    replace_metadata(model, {KEY: text_of(0)}, reserve=len(escaped(text_of(0))) + 200, progress=False)
    return model


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
        assert replace_metadata(model, {KEY: text, "blueprint.version": "1"}, progress=False) is False
        check_loads(model, text)
        assert data_of(model) == before and model.stat().st_mode & 0o777 == 0o640
        assert model.read_bytes()[8:24] == b'{"__metadata__":'
    assert os.listdir(model.parent) == [model.name]


def test_what_is_removed_is_gone(model):
    """Removing gives the metadata that was there, and of a file that had none, none."""
    replace_metadata(model, {KEY: text_of(0)}, reserve=9000, progress=False)
    size = model.stat().st_size
    replace_metadata(model, {KEY: None}, progress=False)
    assert read_metadata(model) == OTHERS and model.stat().st_size < size - 18_000
    save_file(TENSORS, model)
    replace_metadata(model, {KEY: "{}"}, progress=False)
    assert read_metadata(model) == {KEY: "{}"}
    replace_metadata(model, {KEY: None}, progress=False)
    assert read_metadata(model) == {} and load_file(model).keys() == TENSORS.keys()


def test_an_update_within_the_room_leaves_size_inode_and_tensors(roomy):
    """Again and again, in both directions; what does not fit is written anew, with at least the same room."""
    before, status = data_of(roomy), roomy.stat()
    for seed in range(1, 6):
        assert replace_metadata(roomy, {KEY: text_of(seed)}) is True
        check_loads(roomy, text_of(seed))
        assert (roomy.stat().st_size, roomy.stat().st_ino) == (status.st_size, status.st_ino)
    assert data_of(roomy) == before
    assert replace_metadata(roomy, {KEY: text_of(6, 9000)}, progress=False) is False
    assert replace_metadata(roomy, {KEY: text_of(7, 9000)}) is True
    check_loads(roomy, text_of(7, 9000))


def test_room_survives_another_tool_and_another_key(roomy):
    """With a header that another tool rewrote, or another key to change, the file is written anew."""
    assert replace_metadata(roomy, {KEY: text_of(1), "format": "pt"}) is True
    assert replace_metadata(roomy, {KEY: text_of(1), "blueprint.version": "1"}, progress=False) is False
    assert replace_metadata(roomy, {KEY: text_of(2), "blueprint.version": "1"}) is True
    with safe_open(roomy, "np") as file:
        metadata = file.metadata()
    save_file(load_file(roomy), roomy, metadata=dict(sorted(metadata.items(), reverse=True)))
    replace_metadata(roomy, {KEY: text_of(3)}, progress=False)
    check_loads(roomy, text_of(3))


def test_a_file_with_a_second_name_is_not_updated_in_place(roomy, tmp_path):
    """A hard link elsewhere keeps what it had."""
    other = tmp_path / "other.safetensors"
    os.link(roomy, other)
    assert replace_metadata(roomy, {KEY: text_of(1)}, progress=False) is False
    check_loads(roomy, text_of(1))
    check_loads(other, text_of(0))


class Stopped(OSError):
    pass


@pytest.mark.parametrize("start", [0, 1])
def test_every_state_of_an_update_reads_as_the_old_or_the_new(roomy, monkeypatch, start):
    """Stopped after any number of writes, from either slot, also from what an earlier stop left; then it goes on."""
    if start:  # as an update leaves it that is stopped halfway
        with open(roomy, "r+b", buffering=0) as file:
            assert slots._into_room(file, find_slots(roomy.read_bytes()), text_of(9))
        assert find_slots(roomy.read_bytes()).current == 1
    old, new = text_of(9 if start else 0), text_of(1)
    clean, write, count, seen = roomy.read_bytes(), slots._write_at, 0, []
    while not seen or seen[-1] != "done":
        roomy.write_bytes(clean)
        left = count

        def stop_later(file, position, part):
            nonlocal left
            if not left:
                raise Stopped(errno.EIO, "stopped")
            left -= 1
            write(file, position, part)

        monkeypatch.setattr(slots, "_write_at", stop_later)
        try:
            replace_metadata(roomy, {KEY: new})
            seen.append("done")
        except BlueprintError as error:
            assert isinstance(error.__cause__, Stopped)
            seen.append("old" if same(read_metadata(roomy)[KEY], old) else "new")
        monkeypatch.setattr(slots, "_write_at", write)
        check_loads(roomy, old, new)
        early = first_text(roomy.read_bytes())
        assert early is None or same(early, old) or same(early, new)
        halfway = json.loads(json.dumps(read_metadata(roomy)))
        assert replace_metadata(roomy, {KEY: text_of(2)}) is True, halfway.keys()
        check_loads(roomy, text_of(2))
        assert same(first_text(roomy.read_bytes()), text_of(2)), "in the end it stands first"
        count += 1
    assert count >= 5 and seen[0] == "old" and (("new" in seen) == (start == 0))
    assert seen == sorted(seen, key=["old", "new", "done"].index)


@settings(max_examples=60)
@given(
    a=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60),
    b=st.text('"\\ab', max_size=60),
    offset=st.integers(0, 5000),
    mask=st.integers(0, 15),
)
def test_any_mix_of_pages_is_a_string(a, b, offset, mask):
    """Of two texts' pages at one place, whichever have been written, a JSON reader makes one string."""
    texts = [json.dumps({"x": [word] * (9000 // (len(word) + 9))}) for word in (a, b)]
    bodies = [fit(text, offset) for text in texts]
    for text, body in zip(texts, bodies, strict=True):
        assert body is None or is_clean(body, offset) and same(json.loads(b'"' + body + b'"'), text)
    if None in bodies:
        return
    size = max(map(len, bodies))
    pages = [slots._pages(body.ljust(size), offset) for body in bodies]
    mixed = b"".join(pages[mask >> i & 1][i][1] for i in range(len(pages[0])))
    assert isinstance(json.loads(b'"' + mixed + b'"'), str)


def test_a_text_full_of_escapes_or_beyond_ascii_is_written_anew(roomy):
    """What cannot be cut at page borders is not put there in place."""
    for text in (json.dumps({"x": "\\" * 4000}), '{"x": "ä"}'):
        assert fit('"' + "\\" * 20_001 + '"', 9) is None
        replace_metadata(roomy, {KEY: text}, progress=False)
        check_loads(roomy, text)


KILLING = """
import faulthandler, json, os, random, signal, sys, time
from pathlib import Path
from threading import RLock
from safetensors.numpy import load_file
from tqdm import tqdm
from peft_blueprint.header import read_metadata, replace_metadata

tqdm.set_lock(RLock())  # its own is shared with forked children, and one that is killed would hold it for ever
faulthandler.dump_traceback_later(200, exit=True)  # if it hangs, say where
path, reserve, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
os.fsync = os.fdatasync = lambda file: None  # a killed process loses nothing that it wrote, and a busy disk takes minutes to sync
texts = [json.dumps({"which": which, "words": [f'"{which}{i}' for i in range(4000)]}) for which in (0, 1)]
want = {name: tensor.tobytes() for name, tensor in load_file(path).items()}
replace_metadata(path, {"blueprint.json": texts[0]}, reserve=reserve, progress=False)
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


@pytest.mark.parametrize("reserve, rounds", [(100_000, 30), (0, 30)], ids=["in place", "anew"])
def test_killed_at_any_moment_the_file_is_whole(tmp_path, reserve, rounds):
    """A process that keeps updating is killed many times: the file loads, its text is one of the two, and what was left
    beside it is removed by the next. In memory where there is room: a writer that waits for a busy disk cannot be killed.
    """
    memory = Path("/dev/shm")
    has_room = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 10**8
    with tempfile.TemporaryDirectory(dir=memory if has_room else tmp_path) as folder:
        path = Path(folder, "model.safetensors")
        save_file({"a": np.arange(10**6, dtype="f4"), "b": np.ones((3, 5), "f2")}, path)
        command = [sys.executable, "-c", KILLING, str(path), str(reserve), str(rounds)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    seen, left = result.stdout.rsplit(maxsplit=1)
    assert seen == "[0, 1]"
    assert int(left) > 0 or reserve, "some of the kills came while the file was written anew"


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
    with pytest.raises(BlueprintError, match="header of .* would have 5[0-9,]+ bytes.*Reserve less"):
        replace_metadata(model, {KEY: "{}"}, reserve=HEADER_LIMIT, progress=False)
    assert model.read_bytes() == before and os.listdir(model.parent) == [model.name]


def test_progress_is_shown_in_bytes(model, capsys):
    """A bar while the file is written anew, none while it is updated in place."""
    replace_metadata(model, {KEY: "{}"}, reserve=1000)
    assert "Rewriting model.safetensors: 100%" in capsys.readouterr().err
    assert replace_metadata(model, {KEY: "[]"}) is True
    assert not capsys.readouterr().err


def test_two_writers_do_not_meet(model):
    """While another process holds the file, an update is refused."""
    import fcntl

    with open(model, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BlueprintError, match="being written by another process"):
            replace_metadata(model, {KEY: "{}"}, progress=False)
    replace_metadata(model, {KEY: "{}"}, progress=False)


def test_a_prefix_is_enough(roomy):
    """The metadata is had from the first bytes, without the tensors' names; with fewer, the bytes needed are said."""
    content = roomy.read_bytes()
    metadata, end = metadata_of_prefix(content, "x", len(content))
    assert metadata_of_prefix(content[: end - 800], "x", len(content)) == (metadata, end)
    for count in (8, 9, 20, 40, 3000, 9000):
        assert metadata_of_prefix(content[:count], "x", len(content)) == (None, end)
    assert metadata_of_prefix(content[:5], "x") == (None, 8)
    assert metadata == read_metadata(roomy) and same(metadata[KEY], text_of(0))
    again = with_metadata(
        with_metadata(content, {"new": "ö", "format": None}, "x"), {"new": None, "format": "pt"}, "x"
    )
    metadata, _ = metadata_of_prefix(again, "x")
    assert metadata.items() >= OTHERS.items() and same(metadata[KEY], text_of(0)) and len(again) == len(content)
    assert FIRST_READ == 100_000 and find_slots(content[:end]).current == 0


def test_names_and_shapes(model):
    """The whole header has every tensor's dtype and shape."""
    assert read_header(model).tensors == dict.fromkeys(TENSORS, ("F32", (7, 30)))
