"""What the command lines of the jobs have in common: their help, and how errors are reported."""

from __future__ import annotations

import argparse
import atexit
import gc
import logging
import signal
import sys
from collections.abc import Callable
from typing import get_args

from sparksgd.cli.logs import LogFormat, are_json
from sparksgd.errors import SparkSGDError
from sparksgd.runs.attempts import not_repeated
from sparksgd.spark.uris import lead_to_hadoop
from sparksgd.training.interrupts import ended_by

__all__ = ["add_loading", "add_log_format", "exit_status", "parser_of"]

log = logging.getLogger("sparksgd")


def parser_of(docstring: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help text is a job's docstring."""
    return argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_log_format(parser: argparse.ArgumentParser) -> None:
    """Add the option --log-format."""
    parser.add_argument(
        "--log-format",
        choices=get_args(LogFormat),
        default="text",
        help="format of the log lines, on standard error",
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the options of which model is loaded, and how: --model, --trust and --strict."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="the folder model/ of a run: path or URI"
    )
    parser.add_argument(
        "--trust", action="append", default=[], metavar="PACKAGE",
        help="run code of this package, if the model names it; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--strict", action="store_true", help="refuse a model whose code is not that of the training"
    )


def exit_status(work: Callable[[], int | None], *, interrupted: str = "interrupted") -> int:
    """Do a job's work, and return its exit status; errors are printed on standard error.

    Its paths may be URIs of Hadoop's file systems, even if there is no session.

    Args:
        work: what to do, its options included; returns the exit status, or None, which is 0.
        interrupted: what to say after Ctrl-C.
    """
    atexit.register(gc.freeze)  # the last garbage collections would take half a second
    lead_to_hadoop()
    where = ""
    try:
        return not_repeated(work)
    except SparkSGDError as error:
        if ended_by() is None:
            _say(f"error: {error}")
            return error.exit_code
    except KeyboardInterrupt as error:
        where = f" {error}" if str(error) else ""
    terminated = ended_by() == signal.SIGTERM
    _say(("terminated" if terminated else interrupted) + where)
    return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


def _say(last: str) -> None:
    if are_json():
        log.error(last)
    else:
        print(last, file=sys.stderr)
