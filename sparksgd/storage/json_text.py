"""Text of JSON that may be a stranger's: read in memory that its length bounds.

An empty list has two characters, and takes 64 bytes in memory; a table of one key has six, and takes 300.
So before a text is parsed, its brackets and its keys are counted.
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["parsed"]

_FREE = 1 << 16
_CHARACTERS_OF_EACH = 16
"""What runs write has 25 or more for each key, and 50 or more for each list and table."""


def parsed(text: bytes) -> Any:
    """Return the value that JSON text has.

    Raises:
        ValueError: it is not JSON, its values are nested too deeply or are too many for its length, or a key
            is there twice.
    """
    most = _FREE + len(text) // _CHARACTERS_OF_EACH
    for count, what in (
        (text.count(b"[") + text.count(b"{"), "lists and tables"),
        (text.count(b":"), "keys"),
    ):
        if count > most:
            raise ValueError(
                f"it has {count:,} {what}, but a text of {len(text):,} characters may have {most:,}, so that "
                f"it takes no more memory than others: no run writes such a one, so restore it"
            )
    try:
        return json.loads(text, object_pairs_hook=_table)
    except RecursionError as error:
        raise ValueError("it has values within values, too deep to be read") from error


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("it has a key twice")
    return table
