"""Untrusted files of any content are read or refused within a second and little memory."""

import json
import os
import struct
import subprocess
import sys
import time
import tracemalloc
from contextlib import suppress

import pytest

from peft_blueprint import Blueprint, BlueprintError
from peft_blueprint.blueprint import extract
from peft_blueprint.blueprint.header import metadata_of_prefix, read_metadata
from peft_blueprint.blueprint.strict_json import MAX_BYTES, MAX_DEPTH, loads, read_text
from peft_blueprint.errors import FormatError
from tests.records import from_arrays_bytes, from_csv, from_header_text, from_json


ENTRY = {"id": "a", "gradient_norm": 1.0}


def record(layers=(ENTRY,), **top):
    """The JSON text of a blueprint with these entries and keys."""
    return json.dumps({"model_id": "m", "layers": list(layers)} | top)


def entry(**changes):
    """The JSON text of a blueprint of one entry with keys changed."""
    return record([ENTRY | changes])


def nested(depth, inner="1"):
    return "[" * depth + inner + "]" * depth


# ------------------------------------------------------------------------------------------ the corpus

SMALL = {
    "nothing": "",
    "a NUL": "\0",
    "a mark without text": "\ufeff",
    "a scalar": "3",
    "null": "null",
    "NaN in the provenance": record(provenance={"a": 1}).replace("1}", "NaN}"),
    "infinity in the provenance": record(provenance={"a": 1}).replace('"a": 1}', '"a": -Infinity}'),
    "1e999 in the provenance": record(provenance={"a": 1}).replace('"a": 1}', '"a": -1e999}'),
    "1e999 in an unknown key, far behind": record(x=[[" " * 500, 1]]).replace("1]", "1E+0999]"),
    "many digits and an exponent": record(x=[1]).replace("[1]", f"[{'9' * 250}e99]"),
    "309 digits": record(x=1).replace('"x": 1', f'"x": {"9" * 309}'),
    "a million digits": record(x=1).replace('"x": 1', f'"x": {"9" * 10**6}'),
    "a key twice, deep down": record(x=[[{"a": 1}]]).replace('"a": 1', '"a": 1, "\\u0061": 2'),
    "layers twice": record().replace('"layers"', '"layers": [], "layers"'),
    "half a character in an id": entry().replace('"id": "a"', '"id": "\\ud800"'),
    "half a character in the provenance": record(provenance={"a": "\udfff"}),
    "half a character in a key": record(provenance={"a" * 500 + "\udfff": 1}),
    "one level too deep": record(x=0).replace('"x": 0', f'"x": {nested(MAX_DEPTH)}'),
    "1,000 levels": record(x=0).replace('"x": 0', f'"x": {nested(1000)}'),
    "100,000 levels": record(x=0).replace('"x": 0', f'"x": {nested(100_000)}'),
    "100,000 open levels": '{"a":' * 100_000,
    "an empty id": entry(id=""),
    "a path up": entry(id="../x"),
    "a path from the root": entry(id="/etc/passwd"),
    "a path up in the middle": entry(id="a/../b"),
    "a Windows path": entry(id="a\\..\\b"),
    "only up": entry(id=".."),
    "a NUL in an id": entry(id="a\0b"),
    "an escape sequence in an id": entry(id="\x1b[2Ja"),
    "a line end in an id": entry(id="a\nb"),
    "a line turned around in an id": entry(id="a\u202eb"),
    "an id of a megabyte": entry(id="a" * 10**6),
    "an escape sequence in a kind": entry(kind="\x1b]0;x\x07"),
    "a kind of a megabyte": entry(kind="a" * 10**6),
    "a line end in a group": entry(group="a\r"),
    "an escape sequence in a tag": entry(domain_tags={"\x9b": 1.0}),
    "a thousand tags": entry(domain_tags={f"t{i}": 1.0 for i in range(1000)}),
    "an escape sequence in model_id": record(model_id="\x1b[2J"),
    "a model_id of a megabyte": record(model_id="a" * 10**6),
    "an escape sequence in model_revision": record(model_revision="\x1b[2J"),
    "a depth below zero": entry(depth=-1),
    "a depth beyond all": entry(depth=10**9),
    "a depth beyond a machine's word": entry(depth=10**300),
    "kinds by depths beyond all": record([ENTRY | {"id": f"a{i}", "kind": f"{i}", "depth": 4095} for i in range(9)]),
    "examples below zero": entry(examples=-1),
    "examples beyond all": entry(examples=10**300),
    "a shape of nothing": entry(shape=[0, 4]),
    "a linear layer of one dimension": entry(shape=[4], form="linear"),
    "experts of two dimensions": entry(shape=[4, 4], form="experts"),
    "a shape below zero": entry(shape=[-4, -4]),
    "a shape beyond all": entry(shape=[2**31, 2**31]),
    "a shape of a thousand dimensions": entry(shape=[1] * 1000),
    "a shape of long numbers": entry(shape=[int("9" * 300)] * 12),
    "an alignment of 100,000": entry(alignment=[0.5] * 10**5),
    "an alignment of nothing": entry(alignment=[]),
    "a norm that no double holds": entry(gradient_norm=10**308 * 9).replace("9", "99", 1),
    "true for a tag": entry(domain_tags={"t": True}),
    "a list for an id": entry(id=["a"]),
    "an object for an id": entry(id={"a": 1}),
    "a gamma beyond one": entry(gamma=7.5),
    "a gamma of zero": entry(gamma=0),
    "a k* beyond one": entry(k_star=20),
    "a k* of zero": entry(k_star=0),
    "an alpha beyond all": entry(alpha=1e9),
    "an alpha of zero": entry(alpha=0),
    "a share of energy beyond one": entry(singular_energy=1.1),
    "a norm above its interval": entry(norm_interval=[0.1, 0.9]),
    "a norm below its interval": entry(norm_interval=[1.1, 2]),
    "an interval turned around": entry(norm_interval=[2, 0.5]),
    "a norm whose square is infinite": entry(gradient_norm=1.1e154),
    "a gain whose square is infinite": entry(adam_gain=1e200),
    "a tag whose square is infinite": entry(domain_tags={"t": 1e155}),
    "an alignment whose square is infinite": entry(alignment=[-1e155]),
    "a group that contradicts the depth": entry(group="attn.3", depth=5),
    "a stack's group that contradicts the depth": entry(group="encoder.ffn.3", depth=5),
    "an id that contradicts the depth": entry(id="layer.3", depth=5),
    "a zero-width space in an id": entry(id="a\u200bb"),
    "a byte order mark in a kind": entry(kind="\ufeffa"),
    "an Arabic letter mark in a tag": entry(domain_tags={"\u061c": 1.0}),
    "the model's gamma beyond one": record(concentration={"gamma": 7.5}),
    "the model's alpha below zero": record(concentration={"alpha": -1}),
    "the model's k* beyond one": record(costs={"k_star": 20}),
    "a schema of many digits": record(schema_version=10**300),
    "a schema of many items": record(schema_version=[1] * 10**5),
    "a level of a megabyte": record(level="a" * 10**6),
    "a form of a megabyte": entry(form="a" * 10**6),
    "a wrong type of many items": record(training_checkpoint=[[1] * 10**5]),
    "no known keys but many": json.dumps({"k" * 10**5 + str(i): i for i in range(9)}),
    "a digest of another": record(digest="sha256:" + "0" * 64),
    "a digest of another kind": record(digest=[]),
}


@pytest.mark.parametrize("text", SMALL.values(), ids=SMALL)
def test_a_hostile_record_is_refused_in_every_form(tmp_path, text):
    """Text, file, folder, header and arrays: a FormatError of at most 1,000 characters that can be printed."""
    raw = text.encode("utf-8", "surrogatepass")
    (tmp_path / "blueprint.json").write_bytes(raw)
    readable = raw.decode("utf-8", "replace")
    tensors = safetensors_of({"blueprint.json": readable})
    (tmp_path / "model.safetensors").write_bytes(tensors)
    index = {"metadata": {"blueprint.json": readable}, "weight_map": {"w": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for read, source in (
        (from_json, text),
        (Blueprint.from_pretrained, tmp_path / "blueprint.json"),
        (Blueprint.from_pretrained, tmp_path),
        (from_header_text, text),
        (from_arrays_bytes, tensors),
        (extract, tmp_path / "model.safetensors"),
        (extract, tmp_path / "model.safetensors.index.json"),
    ):
        with pytest.raises(FormatError) as error:
            read(source)
        assert len(str(error.value).replace(str(tmp_path), "")) < 1000
        str(error.value).encode()


# Short texts that name much: each id, tag and column becomes an object of its own.
EXPANDING = {
    "ids": json.dumps({"model_id": "m", "layers": {"id": [f"{i:x}" for i in range(400)], "gradient_norm": [1] * 400}}),
    "ids of blocks": record([{"id": f"layer.{i}", "gradient_norm": 1} for i in (*range(90), 4095)]),
    "tags": json.dumps(
        {
            "model_id": "m",
            "layers": {
                "id": list("abcd"),
                "gradient_norm": [1] * 4,
                "domain_tags": {str(i): [1] * 4 for i in range(250)},
            },
        }
    ),
    "others": json.dumps(
        {
            "model_id": "m",
            "layers": {"id": ["a"], "gradient_norm": [1], "others": {"0" * i: {"x": 1} for i in range(1, 9)}},
        }
    ),
    "provenance in provenance": entry().replace(
        "}]}", '}],"provenance":' + '{"merged":[' * 14 + "{}" + "]}" * 14 + "}"
    ),
    "digits": entry().replace("1.0", f"0.{'9' * 3600}"),
    "columns by rows": "model_id,id,gradient_norm" + "".join(f",c{i}" for i in range(190)) + "\nm,a,1" * 400,
    "tags by rows": "model_id,id,gradient_norm"
    + "".join(f",domain_tags.{i}" for i in range(99))
    + "".join(f"\nm,{i:x},1" for i in range(300)),
}


@pytest.mark.parametrize("text", [t for t in {**SMALL, **EXPANDING}.values() if len(t) <= 4096])
def test_a_short_text_costs_little(text):
    """Read as JSON, as a header and as a table: under half a CPU second and 8 MB for at most 4 kB."""
    for read in (from_json, from_header_text, from_csv):
        tracemalloc.start()
        start = time.process_time()
        with suppress(BlueprintError):
            read(text)
        seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert seconds < 0.5 and peak < 8 * 10**6, (read, seconds, peak)


def safetensors_of(metadata, tensors=b""):
    """The bytes of a safetensors file without tensors."""
    header = json.dumps({"__metadata__": metadata}).encode()
    return struct.pack("<Q", len(header)) + header + tensors


HEADERS = {
    "nothing": b"",
    "half a length": b"\1\0\0",
    "a length of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "a length beyond the file": struct.pack("<Q", 2_000_000) + b"{}",
    "a length beyond the limit": struct.pack("<Q", 10**9) + b"{}",
    "a length of zero": struct.pack("<Q", 0),
    "a list": struct.pack("<Q", 2) + b"[]",
    "no JSON": struct.pack("<Q", 4) + b"{{{{",
    "no text": struct.pack("<Q", 4) + b'{"\xff\xfe',
    "deep": struct.pack("<Q", 200_005) + b'{"a":' + b"[" * 200_000,
    "deep metadata": struct.pack("<Q", 200_016) + b'{"__metadata__":' + b"{" * 200_000,
    "a number in the metadata": safetensors_of({"a": 1}),
    "an object in the metadata": safetensors_of({"a": {"b": "c"}}),
    "a list for the metadata": safetensors_of(["a"]),
    "a key twice": safetensors_of({"a": "b"}).replace(b'{"a": "b"}', b'{"a":"","a":""}')[:8].replace(b"\x1c", b"\x21")
    + b'{"__metadata__": {"a":"","a":""}}',
}


@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS)
def test_a_hostile_header_is_refused(tmp_path, data):
    """A wrong length, invalid JSON and binary metadata are a BlueprintError, from memory and from a file."""
    (tmp_path / "model.safetensors").write_bytes(data)
    for read in (
        lambda: metadata_of_prefix(data, "it", len(data)),
        lambda: read_metadata(tmp_path / "model.safetensors"),
        lambda: from_arrays_bytes(data),
        lambda: extract(tmp_path / "model.safetensors"),
        lambda: Blueprint.from_pretrained(tmp_path),
    ):
        with pytest.raises(BlueprintError):
            read()


def columns(**layers):
    """The JSON text of a blueprint as lists."""
    return json.dumps({"schema_version": 1, "model_id": "m", "layers": layers})


IDS = [f"a.{i}" for i in range(9)]
COLUMNS = {
    "no ids": columns(gradient_norm=[1.0]),
    "no list of ids": columns(id="abc", gradient_norm=[1.0] * 3),
    "an id that is no text": columns(id=[1], gradient_norm=[1.0]),
    "a list too short": columns(id=IDS, gradient_norm=[1.0]),
    "no list": columns(id=IDS, gradient_norm={"all": 1.0}),
    "tags without names": columns(id=IDS, gradient_norm=[1.0] * 9, domain_tags=[1.0] * 9),
    "an unknown list": columns(id=IDS, gradient_norm=[1.0] * 9, x=[1.0] * 9),
    "an entry beyond all": columns(id=IDS, gradient_norm=[1.0] * 9, others={"99999999999": {}}),
    "tags beyond all": columns(id=IDS, gradient_norm=[1.0] * 9, domain_tags={f"t{i}": [1] * 9 for i in range(300)}),
    "tags by ids beyond all": columns(
        id=[f"a{i}" for i in range(4000)],
        gradient_norm=[1] * 4000,
        domain_tags={f"t{i}": [1] * 4000 for i in range(150)},
    ),
    "ids beyond all": columns(id=[""] * 100_001),
    "alignments beyond all": columns(id=IDS, gradient_norm=[1.0] * 9, alignment=[[0.5] * 10**4] * 9),
}


@pytest.mark.parametrize("text", COLUMNS.values(), ids=COLUMNS)
def test_lists_that_do_not_fit_together_are_refused(text):
    """A FormatError, whichever list is wrong."""
    with pytest.raises(FormatError):
        from_header_text(text)


HEAD = "model_id,id,gradient_norm"
TABLES = {
    "nothing": "",
    "a NUL": f"{HEAD}\nm,a\0,1\n",
    "a column twice": f"{HEAD},id\nm,a,1,b\n",
    "a thousand columns": HEAD + "".join(f",c{i}" for i in range(1000)) + "\nm,a,1\n",
    "columns by rows": HEAD + "".join(f",c{i}" for i in range(150)) + "\nm,a,1" * 50_000,
    "millions of lines": HEAD + "\n" * 3_000_000,
    "millions of commas": HEAD + "\n" + "," * 3_000_000,
    "a quote that never ends": f'{HEAD}\nm,"{"a" * 3_000_000}',
    "a path": f"{HEAD}\nm,../x,1\n",
    "an escape sequence": f"{HEAD}\nm,\x1b[2J,1\n",
    "an empty id": f"{HEAD}\nm,,1\n",
    "1e999": f"{HEAD}\nm,a,1e999\n",
    "infinity": f"{HEAD}\nm,a,Infinity\n",
    "a depth beyond all": f"{HEAD},depth\nm,a,1,{10**12}\n",
    "layers in the metadata's place": f'{HEAD},metadata\nm,a,1,"{{""layers"": 1, ""layers"": 2}}"\n',
    "deep extras": f"{HEAD},extra\nm,a,1," + '{""a"":'.join([""] * 100) + "\n",
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
def test_a_hostile_table_is_refused(tmp_path, text):
    """As for JSON, and for faults of CSV: too many columns by rows, a NUL, an endless cell."""
    (tmp_path / "b.csv").write_text(text)
    for read, source in ((from_csv, text), (Blueprint.from_pretrained, tmp_path / "b.csv")):
        with pytest.raises(FormatError):
            read(source)


def test_unusual_content_is_read():
    """−0.0, whole numbers for floats, 308 digits, 32 levels, unicode in ids and line ends in the provenance are read."""
    odd = entry(
        id="модель.層.3/x", gradient_norm=-0.0, alpha=2, depth=0, examples=10**12, kind="é", extra={"deep": [[1]]}
    )
    blueprint = from_json(odd)
    assert blueprint.names == ("модель.層.3/x",) and blueprint.submodules[0].alpha == 2.0
    whole = loads(f'{{"a": {"9" * 308}, "b": {nested(MAX_DEPTH - 1)}, "c": "\\ud83d\\ude00", "d": 1e308}}')
    assert whole["a"] == 10**308 - 1 and whole["c"] == "😀" and whole["d"] == 1e308
    text = record(model_id="/home/me/model", provenance={"command": "a\n\tb", "digits": "1e999 " + "9" * 10**6})
    assert from_json(text).provenance["command"] == "a\n\tb"


# ------------------------------------------------------------------------------------------ files


def test_only_files_are_read_and_only_so_much_of_them(tmp_path):
    """A device, an empty pipe, a file one byte too long and a path with a NUL are immediate errors."""
    os.mkfifo(tmp_path / "pipe.json")
    for path in ("/dev/zero", tmp_path / "pipe.json"):
        with pytest.raises(FormatError, match="a device or a pipe"):
            read_text(path)
    (tmp_path / "long.json").write_text("a" * 101)
    assert len(read_text(tmp_path / "long.json", limit=101)) == 101
    with pytest.raises(FormatError, match="has 101 bytes.*at most 100 are read"):
        read_text(tmp_path / "long.json", limit=100)
    (tmp_path / "wide.json").write_text("é" * 40)
    with pytest.raises(FormatError, match="80 bytes with characters beyond ASCII.*at most 25"):
        read_text(tmp_path / "wide.json", limit=100)
    for path, message in (
        (tmp_path, "Is a directory"),
        ("a\0b", "is not a path"),
        (tmp_path / "none", "No blueprint"),
    ):
        with pytest.raises(BlueprintError, match=message):
            read_text(path)


def test_a_file_that_says_too_little_of_itself_is_read_to_the_limit_only():
    """A file that grows while it is read, or has no size as in /proc, is cut off after one byte too many."""
    assert os.stat("/proc/self/maps").st_size == 0
    with pytest.raises(FormatError, match="101 bytes or more; at most 100 are read"):
        read_text("/proc/self/maps", limit=100)


# What each file holds, and what reads it.
LARGE = {
    "32 MB of numbers": ("json", lambda: "[" + "1," * (2**24 - 9) + "1]"),
    "32 MB of lists": ("json", lambda: "[" + "[]," * (2**23) + "1]"),
    "32 MB of keys": ("json", lambda: "{" + '"a":0,' * (5 * 10**6) + '"b":0}'),
    "32 MB in one text": ("json", lambda: '["' + "a" * (2**25 - 9) + '"]'),
    "32 MB in one wide text": ("json", lambda: '["\U0001f600' + "a" * (2**25 - 19) + '"]'),
    "8 MB in one wide text": ("json", lambda: '["\U0001f600' + "a" * (2**23 - 19) + '"]'),
    "32 MB of digits": ("json", lambda: "[" + "9" * (2**25 - 9) + "]"),
    "32 MB of exponents": ("json", lambda: "[" + "1e300," * (5 * 10**6) + "1]"),
    "32 MB of spaces": ("json", lambda: " " * (2**25 - 9)),
    "as many numbers as are read": ("json", lambda: "[" + "0.5," * 1_249_999 + "1]"),
    "as many texts as are read": ("json", lambda: "[" + '"ab",' * 1_249_999 + "1]"),
    "as many keys as are read": ("json", lambda: "{" + ",".join(f'"{i:x}":0' for i in range(600_000)) + "}"),
    "as many lists as are read": ("json", lambda: "[" + "[]," * 299_998 + "1]"),
    "a key twice among many": ("json", lambda: "{" + ",".join(f'"{i:x}":0' for i in range(500_000)) + ',"0":0}'),
    "32 MB of lines": ("csv", lambda: HEAD + "\n" * (2**25 - 99)),
    "a full table with an id twice": ("csv", lambda: HEAD + ",alpha" + "\nm,a,1,1" * 20_000),
    "too many rows": ("csv", lambda: HEAD + "\nm,a,1" * 200_000),
    "24 MB of nested header": ("safetensors", lambda: '{"a":' + "[" * (24 * 10**6)),
    "24 MB of lists in a header": ("safetensors", lambda: '{"a":[' + "[]," * (8 * 10**6) + "1]}"),
    "24 MB of objects in a header": ("safetensors", lambda: "{" + '"a":{},' * (3 * 10**6) + '"b":{}}'),
    "24 MB of metadata": ("safetensors", lambda: '{"__metadata__":{' + '"a":"",' * (3 * 10**6) + '"b":""}}'),
}
# Prints the CPU seconds that a file took and the MB beyond those at the start that the process then had at most.
APART = """
import sys, time
from pathlib import Path
from peft_blueprint.errors import BlueprintError
from peft_blueprint import Blueprint
from peft_blueprint.blueprint import read_metadata

def held(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))

before = held("VmRSS")
for path in map(Path, sys.argv[1:]):
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    start = time.process_time()
    try:
        (read_metadata if path.suffix == ".safetensors" else Blueprint.from_pretrained)(path)
        found = "read"
    except BlueprintError:
        found = "refused"
    print(path.stem, found, time.process_time() - start, held("VmHWM") - before, sep="|")
"""


def test_large_files_cost_little(tmp_path):
    """200 MB of JSON, and files at the limits, take at most 200 MB of memory and few CPU seconds each."""
    paths = []
    for name, (suffix, text) in LARGE.items():
        raw = text().encode()
        assert len(raw) <= MAX_BYTES
        paths.append(tmp_path / f"{name}.{suffix}")
        paths[-1].write_bytes((struct.pack("<Q", len(raw)) if suffix == "safetensors" else b"") + raw)
    for suffix in ("json", "csv"):
        paths.append(tmp_path / f"200 MB of {suffix}.{suffix}")
        paths[-1].touch()
        os.truncate(paths[-1], 200 * 2**20)
    ran = subprocess.run([sys.executable, "-c", APART, *map(str, paths)], capture_output=True, text=True)
    rows = [line.split("|") for line in ran.stdout.splitlines()]
    for path in paths:
        path.unlink()
    assert len(rows) == len(paths), ran.stderr
    assert [row for row in rows if row[1] != "refused" or float(row[2]) > 4 or float(row[3]) > 200] == []
