"""Make a small dataset from Python's standard library: module and signature in, docstring out.

The docstrings are those of the running interpreter, so nothing is downloaded. Training and held-out modules do not
overlap, and similar modules are in the same split.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal


TRAIN_MODULES = (
    *("argparse", "optparse", "cmd", "shlex", "bdb", "dis", "inspect", "symtable", "traceback", "linecache"),
    *("asyncio", "queue", "sched", "selectors", "threading", "subprocess", "multiprocessing.pool"),
    *("abc", "builtins", "collections", "contextlib", "copy", "dataclasses", "enum", "functools", "gc", "heapq"),
    *("itertools", "operator", "types", "warnings", "weakref", "codecs", "io", "pickle", "struct"),
    *("email.charset", "email.header", "email.message", "email.policy", "email.utils", "mailbox"),
    *("ftplib", "http.client", "http.cookiejar", "http.server", "imaplib", "ipaddress", "poplib", "smtplib"),
    *("socketserver", "urllib.parse", "urllib.request", "xmlrpc.client", "xmlrpc.server"),
    *("filecmp", "fileinput", "fnmatch", "glob", "os.path", "pathlib", "shutil", "tempfile"),
    *("importlib.abc", "importlib.machinery", "importlib.metadata", "importlib.util", "pkgutil", "zipimport"),
    *("logging", "logging.config", "logging.handlers", "doctest", "unittest.case", "unittest.loader", "unittest.mock"),
)
HELD_OUT_MODULES = (
    *("calendar", "datetime", "time", "timeit", "zoneinfo", "locale"),
    *("decimal", "fractions", "math", "random", "statistics"),
    *("base64", "binascii", "hashlib", "hmac", "secrets", "uuid"),
    *("configparser", "csv", "json", "plistlib", "pstats", "shelve", "sqlite3", "tomllib", "xml.etree.ElementTree"),
    *("difflib", "html.parser", "pprint", "re", "string", "textwrap", "unicodedata"),
    *("bz2", "gzip", "lzma", "tarfile", "zipfile", "zlib"),
)
INSTRUCTION = "Python 3 standard library. Write the docstring."
SHORTEST, LONGEST = 25, 280  # characters of a docstring; 280 are about 65 tokens
LONGEST_SIGNATURE = 160

SENTENCE_END = re.compile(r"(?<=[.!?])\s(?=[A-Z'\"`])|\n\n")
SIGNATURE_LINE = re.compile(r"[\w.]+\(.*\)( -+> ?\S+( or \S+)?)?$")  # first line of old C functions
NOT_PROSE = re.compile(r"^(\s|>>>|[-*+.=|]|\d+[.)]|:\w)", re.MULTILINE)
UNINFORMATIVE = re.compile(r"^[^A-Z]|Alias for field number|Initialize self|See help\(|Return self[=<>!+-]")


def examples(split: Literal["train", "held_out"]) -> list[dict[str, str]]:
    """Return one split, in an order that is the same on every run.

    Examples are sorted by a digest of the prompt, so the first n are a fair sample of all modules.

    Returns:
        Mappings with `prompt`, `completion` (the docstring's first sentences), `module` and `name`.
    """
    modules = {"train": TRAIN_MODULES, "held_out": HELD_OUT_MODULES}[split]
    chosen = [dict(example) for example in everything() if example["module"] in modules]
    return sorted(chosen, key=lambda example: hashlib.sha256(example["prompt"].encode()).digest())


@cache
def everything() -> list[dict[str, str]]:
    """Read both splits in a fresh interpreter, because some libraries patch `logging` or `inspect` on import."""
    command = [sys.executable, "-I", "-S", "-X", "utf8", "-W", "ignore", __file__, "--json"]
    found: list[dict[str, str]] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def read() -> Iterator[dict[str, str]]:
    """Yield every example of both splits, module by module, without repeated docstrings."""
    seen: set[str] = set()
    for module in TRAIN_MODULES + HELD_OUT_MODULES:
        for name, definition, docstring in documented(module):
            completion = opening(docstring)
            key = " ".join(completion.casefold().split())
            if len(completion) < SHORTEST or UNINFORMATIVE.search(completion) or key in seen:
                continue
            seen.add(key)
            prompt = f"{INSTRUCTION}\n\nmodule: {module}\n{definition}\n"
            yield {"prompt": prompt, "completion": completion, "module": module, "name": name}


def documented(module: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, definition and docstring of a module's public functions, classes and methods."""
    try:
        namespace = vars(importlib.import_module(module))  # `getattr` may warn of deprecated names
    except ImportError:  # this Python lacks it
        return
    public = namespace.get("__all__") or [n for n, v in namespace.items() if getattr(v, "__module__", "") == module]
    for name in sorted(set(public)):
        value = namespace.get(name)
        if name.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if not inspect.isclass(value):
            yield name, definition_of(name, value), docstring_of(value)
            continue
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        header = f"class {name}({bases}):" if bases else f"class {name}:"
        yield name, header, docstring_of(value)
        for member, attribute in sorted(vars(value).items()):
            if not member.startswith("_") and (inspect.isroutine(attribute) or isinstance(attribute, property)):
                definition = definition_of(member, attribute).replace("\n", "\n    ")
                yield f"{name}.{member}", f"class {name}:\n    {definition}", docstring_of(attribute)


def definition_of(name: str, value: Any) -> str:
    """Return the `def` line of a function, method or property."""
    if isinstance(value, property):
        return f"@property\ndef {name}(self):"
    function, decorator = value, ""
    if isinstance(value, (classmethod, staticmethod)):
        function, decorator = value.__func__, f"@{type(value).__name__}\n"
    try:
        signature = str(inspect.signature(function))
    except (NameError, TypeError, ValueError):  # written in C, or annotated with unknown names
        signature = "(...)"
    signature = re.sub(r"(?<!')<[^,()]*>", "...", signature)  # reprs, which may contain an address
    if len(signature) > LONGEST_SIGNATURE:
        signature = "(...)"
    return f"{decorator}{'async ' * inspect.iscoroutinefunction(function)}def {name}{signature}:"


def docstring_of(value: Any) -> str:
    """Return the object's own docstring without its indentation, or an empty string."""
    return inspect.cleandoc(value.__doc__) if isinstance(value.__doc__, str) else ""


def opening(docstring: str) -> str:
    """Return the docstring's first sentences, up to `LONGEST` characters and the first list, example or table."""
    first, _, rest = docstring.partition("\n")
    if SIGNATURE_LINE.match(first):
        docstring = rest.strip()
    paragraphs = []
    for paragraph in docstring.split("\n\n"):
        if NOT_PROSE.search(paragraph):
            break
        paragraphs.append(" ".join(paragraph.split()))
    text = "\n\n".join(paragraphs)
    ends = [end.start() for end in SENTENCE_END.finditer(text)] + [len(text)]
    whole = [
        end for end in ends if end <= LONGEST and not text[:end].endswith((":", "e.g."))
    ]  # these announce a part that was cut
    return text[: whole[-1]] if whole else ""


def main() -> None:
    """Print the size and an example of each split."""
    for split in ("train", "held_out"):
        chosen = examples(split)
        counts = Counter(example["module"] for example in chosen)
        largest = ", ".join(f"{module} {count}" for module, count in counts.most_common(5))
        print(f"{split}: {len(chosen)} examples from {len(counts)} modules (most from {largest}). The first:\n")
        print(f"{chosen[0]['prompt']}--> {chosen[0]['completion']}\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--json"]:
        json.dump(list(read()), sys.stdout)
    else:
        main()
