"""A safetensors file's metadata from its first bytes, for any writer."""

import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_blueprint.blueprint.header import HEADER_LIMIT, metadata_of_prefix, read_header, read_metadata
from peft_blueprint.errors import BlueprintError, FormatError


def safetensors(header, data=b"", length=None):
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def test_metadata_may_stand_anywhere_or_nowhere():
    """After the tensors, or not at all, then the whole header is needed."""
    tensor = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    for header, metadata in (
        ("{" + tensor + "}", {}),
        ("{}", {}),
        ('{ "__metadata__" : { } }', {}),
        ("{" + tensor + ' , "__metadata__":{"k":"v{\\"é"} }   ', {"k": 'v{"é'}),
    ):
        data = safetensors(header)
        assert metadata_of_prefix(data, "x") == (metadata, len(data))
        assert metadata_of_prefix(data[:9], "x")[0] in (None, {})


META = '{"__metadata__":'

HOSTILE = {
    "nothing": (b"", "0 bytes, too few"),
    "a length beyond all": (safetensors("{}", length=2**63), "9,223,372,036,854,775,808 bytes"),
    "beyond the limit": (safetensors("{}", length=HEADER_LIMIT + 1), "at most 25,000,000"),
    "beyond the file": (safetensors("{}", length=1000), "end at byte 1,008, and it has 10"),
    "no JSON": (safetensors("hello"), "not valid JSON"),
    "a list": (safetensors("[]"), "not a JSON object"),
    "cut": (safetensors(META), "not valid JSON"),
    "no text": (safetensors(b'{"__metadata__":{"a":"\xff\xfe"}}'), "not text"),
    "a number": (safetensors(META + '{"a":1}}'), "must hold text alone, and 'a' does not"),
    "an object": (safetensors(META + '{"a":{}}}'), "must hold text alone, and 'a' does not"),
    "no object": (safetensors(META + "[]}"), "must be an object"),
    "a key twice": (safetensors(META + '{"a":"1","a":"2"}}'), "key 'a' appears twice"),
    "nested in the metadata": (safetensors(META + "[" * 10**7), "is nested"),
    "nested before": (safetensors('{"a":' + '{"a":' * 4_000_000), "at most 600,000"),
    "lists before": (safetensors('{"a":' + "[" * 10**7), "at most 300,000"),
    "many keys": (
        safetensors(META + "{" + ",".join(f'"{i}":""' for i in range(400_000)) + "}}"),
        "at most 20,000",
    ),
    "many tensors": (safetensors("{" + ",".join(f'"{i}":{{}}' for i in range(400_000)) + "}"), "at most 300,000"),
    "one long text": (safetensors(META + '{"a":"' + "\\\\" * 10**7), "not valid JSON"),
}


@pytest.mark.parametrize("data, message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_refused_at_once(tmp_path, data, message):
    """Each is a FormatError that names the file, within a second and for few bytes of memory."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    started = time.process_time()
    with pytest.raises(FormatError, match=f"(?s)bad.safetensors.*{message}"):
        read_metadata(path)
    assert time.process_time() - started < 1


@given(st.binary(max_size=40) | st.text('{}[]":,_ametd1\\ ', max_size=40).map(str.encode), st.booleans())
def test_any_bytes_are_metadata_or_a_format_error(content, is_first):
    """Any header; no other exception is raised."""
    data = safetensors((META.encode() if is_first else b"") + content)
    for end in (len(data), len(data) - 1, 12):
        try:
            metadata_of_prefix(data[:end], "x", len(data))
        except FormatError:
            continue


def test_missing_keys_and_files(tmp_path):
    """A missing file or a folder is a BlueprintError."""
    with pytest.raises(BlueprintError, match="The file .*none.* does not exist"):
        read_metadata(tmp_path / "none.safetensors")
    with pytest.raises(BlueprintError, match="cannot be read: Is a directory"):
        read_header(tmp_path)
