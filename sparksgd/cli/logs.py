"""Where log lines go: a terminal, a file, or a collector that needs one JSON object on each line."""

from __future__ import annotations

import json
import logging
import os
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.logging import RichHandler

__all__ = ["LogFormat", "are_json", "log_to", "new_run_id", "open_console"]

log = logging.getLogger("sparksgd")

LogFormat = Literal["text", "json"]


def new_run_id() -> str:
    """Return a unique name for a run."""
    return uuid.uuid4().hex[:12]


def open_console(*, output: bool = False) -> Console:
    """Return standard error, or the terminal behind it: spark-submit puts a pipe between the two.

    Args:
        output: whether standard output is meant instead.
    """
    stream, number = (sys.stdout, 1) if output else (sys.stderr, 2)
    try:
        behind = Path(f"/proc/{os.getppid()}/fd/{number}").readlink()
    except OSError:
        behind = Path()
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ
    if stream.isatty() or not submitted or not str(behind).startswith(("/dev/pts/", "/dev/tty")):
        # even if FORCE_COLOR is set
        return Console(stderr=not output, force_terminal=stream.isatty())
    try:
        terminal = behind.open("w", encoding="utf-8")
        width = os.get_terminal_size(terminal.fileno()).columns or None  # 0 if nobody set it
    except OSError:
        return Console(stderr=not output, force_terminal=False)  # another user's terminal, after su or sudo
    return Console(file=terminal, force_terminal=True, width=width)


def log_to(console: Console, run_id: str, form: LogFormat = "text") -> None:
    """Send the library's log lines to a console; with time and run if it is not a terminal.

    Args:
        console: receives them.
        run_id: the run that they belong to.
        form: text or json.
    """
    handler: logging.Handler
    if form == "json":
        handler = logging.StreamHandler()
        handler.setFormatter(_JsonFormatter(run_id))
    elif console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_time=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s {run_id} %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def are_json() -> bool:
    """Return whether log lines are JSON; then errors should be, too."""
    return any(isinstance(handler.formatter, _JsonFormatter) for handler in log.handlers)


class _JsonFormatter(logging.Formatter):
    """One JSON object on each line: time, level, run, message, and the traceback if there is one."""

    def __init__(self, run_id: str) -> None:
        super().__init__()
        self._run_id = run_id

    def format(self, record: logging.LogRecord) -> str:
        values = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "run_id": self._run_id,
            "message": record.getMessage(),
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values)
