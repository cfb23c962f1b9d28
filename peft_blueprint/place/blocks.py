"""Blocks that are trained whole: which modules an attention or feed-forward block is made of.

Functions on a blueprint's names. Knows nothing of models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from os.path import commonprefix

from ..blueprint import Submodule


def members_by_block(entries: Sequence[Submodule]) -> dict[str, list[Submodule]]:
    """The entries of every block, by its id; one that is in none is a block of its own."""
    members: defaultdict[str, list[Submodule]] = defaultdict(list)
    for entry in entries:
        members[entry.group or entry.name].append(entry)
    return dict(members)


def modules_of_blocks(members: Mapping[str, Sequence[Submodule]]) -> dict[str, tuple[str, ...]]:
    """What to unfreeze for every block: the module that holds just its members, or else the members themselves."""
    owner = {_module_of(entry): block for block, entries in members.items() for entry in entries}
    holders = {block: _holder([_module_of(entry) for entry in entries]) for block, entries in members.items()}
    others: defaultdict[str, set[str]] = defaultdict(set)  # blocks with a module under each holder
    wanted = set(holders.values())
    for module, block in owner.items():
        parts = module.split(".")
        for end in range(1, len(parts)):
            if (prefix := ".".join(parts[:end])) in wanted:
                others[prefix].add(block)
    found = {}
    for block, entries in members.items():
        own = tuple(dict.fromkeys(_module_of(entry) for entry in entries))
        holder = holders[block]
        found[block] = (holder,) if len(own) > 1 and holder and others[holder] == {block} else own
    return found


def _holder(modules: Sequence[str]) -> str:
    """The innermost module that holds these and can be unfrozen; "" if there is none."""
    holder = commonprefix([name + "." for name in modules]).rpartition(".")[0]
    if any(name[len(holder) + 1 :].split(".")[0].isdigit() for name in modules):  # a list, which cannot be unfrozen
        holder = holder.rpartition(".")[0]
    return holder


def _module_of(entry: Submodule) -> str:
    """The module that is trained whole for an entry: fused experts are a parameter of theirs."""
    return entry.name.rpartition(".")[0] if entry.form == "experts" else entry.name
