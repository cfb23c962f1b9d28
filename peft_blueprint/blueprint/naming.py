"""The names of blueprint files, by which several of one model stand side by side.

Knows nothing of what is in them.
"""

from __future__ import annotations

import re

from ..errors import BlueprintError


SUFFIXES = (".json", ".csv", ".safetensors")
_DOMAIN = re.compile(r"[a-z0-9](?:[a-z0-9._]{0,62}[a-z0-9])?")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def file_name(domain: str | None = None, checkpoint: float | None = None, suffix: str = ".json") -> str:
    """`blueprint[-DOMAIN][-PERCENT].json`: `blueprint.json`, `blueprint-math.json`, `blueprint-math-80.json`.

    Args:
        domain: the kind of data: lower-case letters, digits, dots and underscores, and not a number.
        checkpoint: share of the model's training that was done, (0, 1].
        suffix: of the file.

    Raises:
        BlueprintError: for another domain or checkpoint.
    """
    name = "blueprint"
    if domain is not None:
        if not _DOMAIN.fullmatch(domain) or ".." in domain or _NUMBER.fullmatch(domain):
            raise BlueprintError(
                f"{domain!r} is no name of a domain: give lower-case letters, digits, dots and underscores, at most 64 and "
                "not a number, such as math or source_code."
            )
        name += f"-{domain}"
    if checkpoint is not None:
        if not 0 < checkpoint <= 1:
            raise BlueprintError(
                f"checkpoint={checkpoint} is no share of the training: give a number above 0, at most 1."
            )
        name += f"-{checkpoint * 100:.6g}"
    return name + suffix
