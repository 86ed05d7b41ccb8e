"""What the jobs have in common on a command line: their help, and how their errors leave."""

from __future__ import annotations

import argparse
import atexit
import gc
import logging
import signal
import sys
from collections.abc import Callable

from sparksgd.errors import SparkSGDError
from sparksgd.interrupts import ended_by
from sparksgd.logs import are_json

__all__ = ["exit_status", "parser_of"]

log = logging.getLogger("sparksgd")


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
    atexit.register(gc.freeze)  # the last collections would walk all of torch, for half a second
    try:
        work()
    except SparkSGDError as error:
        if ended_by() is None:
            _say(f"error: {error}")
            return error.exit_code
    except KeyboardInterrupt:
        pass
    else:
        return 0
    terminated = ended_by() == signal.SIGTERM
    _say("terminated" if terminated else interrupted)
    return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


def _say(last: str) -> None:
    if are_json():
        log.error(last)
    else:
        print(last, file=sys.stderr)
