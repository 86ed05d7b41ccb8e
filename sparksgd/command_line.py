"""What the jobs have in common on a command line: their help, and how their errors leave."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from sparksgd.errors import SparkSGDError

__all__ = ["exit_status", "parser_of"]


def parser_of(docstring: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is a job's docstring."""
    return argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def exit_status(work: Callable[[], object], *, interrupted: str = "interrupted") -> int:
    """Do a job's work, and return its exit status; what it refuses goes to standard error.

    Args:
        work: what to do.
        interrupted: what to say after Ctrl-C.
    """
    try:
        work()
    except SparkSGDError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0
