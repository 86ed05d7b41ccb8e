"""Text of JSON that may be a stranger's: read in memory that its length bounds.

An empty list has two characters, and takes 64 bytes in memory; a table of one key has six, and takes 300.
So before a text is parsed, its brackets and its keys are counted.
"""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["parsed", "require_bounds"]

_FREE = 1 << 16
"""So many keys, and so many lists and tables, any text may have."""

_CHARACTERS_OF_EACH = 16
"""What runs write has 25 or more for each key, and 50 or more for each list and table."""

_TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
"""One that nobody ended goes on to the end.  ++ and *+ remember no way back: no quadratic time, no memory."""


def parsed(text: bytes) -> Any:
    """Return the value that JSON text has.

    Raises:
        ValueError: it is not JSON, its values are nested too deeply or are too many for its length, or a key
            is there twice.
    """
    require_bounds(text)
    try:
        return json.loads(text, object_pairs_hook=_table)
    except RecursionError as error:
        raise ValueError("it has values within values, too deep to be read") from error


def require_bounds(text: bytes) -> None:
    """Refuse JSON text that would take far more memory than its length.

    Raises:
        ValueError: it has too many lists, tables or keys.
    """
    most = _FREE + len(text) // _CHARACTERS_OF_EACH
    for what, marks in (("lists and tables", b"[{"), ("keys", b":")):
        count = _count(text, marks)
        if count > most:
            count -= sum(_count(found.group(), marks) for found in _TEXT.finditer(text))
        if count > most:
            raise ValueError(
                f"it has {count:,} {what}, but a text of {len(text):,} characters may have {most:,}, so that "
                f"it takes no more memory than others: no run writes such a one, so restore it"
            )


def _count(text: bytes, marks: bytes) -> int:
    return sum(text.count(mark) for mark in marks)


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("it has a key twice")
    return table
