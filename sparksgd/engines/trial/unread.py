"""Counters that nothing reads: an attribute that functions only count on, as in `self.calls += 1`.

No piece can depend on one, and it stays as it was.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterable, Sequence

__all__ = ["is_only_counted"]

_LOADS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
_SIGNS = ("+", "+=", "-", "-=")
_READ_ALL = ("vars", "__dict__", "getattr", "attrgetter", "__getstate__")
"""Names of what reads attributes that it does not name."""


def is_only_counted(name: str, functions: Iterable[types.FunctionType]) -> bool:
    """Return whether functions that have an attribute of this name read it only to add to it."""
    return not any(_reads(function.__code__, name) for function in functions)


def _reads(code: types.CodeType, name: str) -> bool:
    if name in code.co_consts or not set(code.co_names).isdisjoint(_READ_ALL):
        return True
    instructions = list(dis.get_instructions(code))
    for at, one in enumerate(instructions):
        if one.opname in _LOADS and one.argval == name and not _is_counted_on(instructions[at + 1 :], name):
            return True
    return any(_reads(inner, name) for inner in code.co_consts if isinstance(inner, types.CodeType))


def _is_counted_on(following: Sequence[dis.Instruction], name: str) -> bool:
    """Return whether what was just loaded is only added to, and stored again.

    Args:
        following: the instructions after that.
        name: of the attribute.
    """
    depth = 1  # of the stack, from the loaded value on
    for at, one in enumerate(following):
        if one.opname in ("COPY", "SWAP") or one.opcode in (*dis.hasjrel, *dis.hasjabs):
            return False
        effect = dis.stack_effect(one.opcode, one.arg, jump=False)
        if depth == 1 and effect <= 0 and one.opname not in ("NOP", "EXTENDED_ARG", "KW_NAMES"):
            return False
        if depth + effect > 1 or depth == 1:
            depth += effect
            continue
        stores = following[at + 1 : at + 3]
        return (
            one.opname == "BINARY_OP"
            and one.argrepr in _SIGNS
            and len(stores) == 2
            and stores[0].opname in ("SWAP", "LOAD_FAST", "LOAD_FAST_BORROW")
            and (stores[1].opname, stores[1].argval) == ("STORE_ATTR", name)
        )
    return False
