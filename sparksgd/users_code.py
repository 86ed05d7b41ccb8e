"""Where the user's own code runs: what it raises is told as the user's, and never tried again."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from sparksgd.errors import SparkSGDError, UserCodeError

__all__ = ["users_code"]


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Turn what the user's code raises in the block into a UserCodeError that holds its traceback.

    Args:
        what: of the user's runs here.
    """
    try:
        yield
    except SparkSGDError:
        raise
    except Exception as error:
        raise UserCodeError(
            f"{what} raised {type(error).__name__}: {error}\n" + traceback.format_exc().rstrip()
        ) from error
