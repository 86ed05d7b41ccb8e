"""Kinds that the product does not get right yet, and why; a kind leaves this table when it does."""

from __future__ import annotations

from typing import Any

import pytest

STILL_WRONG: dict[str, str] = {
    "a sparse buffer": "the trial takes it for a tensor of the module that was copied",
    "complex views": "a view as complex numbers must begin at an even place of the flat vector",
}
"""By kind."""


def kinds(names: Any) -> list[Any]:
    """Return parameters of a test, those that are still wrong marked."""
    return [
        pytest.param(name, marks=pytest.mark.xfail(reason=STILL_WRONG[name], raises=BaseException))
        if name in STILL_WRONG
        else name
        for name in names
    ]
