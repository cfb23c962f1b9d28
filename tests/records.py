"""Blueprints to and from text and bytes, in one call each."""

from peft_blueprint.blueprint import Blueprint, arrays, formats, from_dict, header, header_text, strict_json, to_dict


def to_json(blueprint: Blueprint) -> str:
    return formats.to_json(to_dict(blueprint))


def from_json(text: str, source: str = "the text") -> Blueprint:
    return from_dict(strict_json.loads(text, source), source)


def to_csv(blueprint: Blueprint) -> str:
    return formats.to_csv(to_dict(blueprint))


def from_csv(text: str, source: str = "the text") -> Blueprint:
    return from_dict(formats.from_csv(text, source), source)


def to_arrays_bytes(blueprint: Blueprint) -> bytes:
    return arrays.to_arrays_bytes(to_dict(blueprint))


def from_arrays_bytes(data: bytes, source: str = "the bytes") -> Blueprint:
    return from_dict(arrays.from_arrays_bytes(data, source), source)


def to_header_text(blueprint: Blueprint, digits: int = 4) -> str:
    return header_text.to_header_text(to_dict(blueprint), digits)


def from_header_text(text: str, source: str = "the header") -> Blueprint:
    return from_dict(header_text.from_header_text(text, source), source)


def rounded(blueprint: Blueprint, digits: int = 4) -> Blueprint:
    return from_dict(header_text.rounded(to_dict(blueprint), digits))


def with_metadata(data: bytes, **changes: str) -> bytes:
    """The bytes of a safetensors file with keys of its metadata changed."""
    found = header.parse_header(data, "it", len(data))
    return header.header_bytes(found.metadata | changes, found.entries, "it") + data[found.size :]
