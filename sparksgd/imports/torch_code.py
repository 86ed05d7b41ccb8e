"""The user's own code that uses torch: a module, a loss, an optimiser, a schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sparksgd.arithmetic.scripted import as_written
from sparksgd.imports import users_code

__all__ = ["users_torch_code"]


@contextmanager
def users_torch_code(what: str) -> Iterator[None]:
    """Run the user's code in the block `as_written`; what it raises becomes a UserCodeError.

    Args:
        what: which of the user's code runs in the block, for the error.

    Raises:
        UserCodeError: the block raised; see `users_code`.
    """
    with as_written(), users_code(what):
        yield
