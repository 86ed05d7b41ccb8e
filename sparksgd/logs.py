"""Where log lines go: a terminal, a file, or a collector that wants one JSON object a line."""

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
    """Return a name that no other run has."""
    return uuid.uuid4().hex[:12]


def open_console() -> Console:
    """Return standard error, or the terminal behind it: spark-submit puts a pipe of its own between."""
    try:
        behind = Path(f"/proc/{os.getppid()}/fd/2").readlink()
    except OSError:
        behind = Path()
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ
    if sys.stderr.isatty() or not submitted or not str(behind).startswith(("/dev/pts/", "/dev/tty")):
        return Console(stderr=True, force_terminal=sys.stderr.isatty())  # whatever FORCE_COLOR says
    try:
        terminal = behind.open("w", encoding="utf-8")
        width = os.get_terminal_size(terminal.fileno()).columns or None  # 0 where nobody said
    except OSError:
        return Console(stderr=True, force_terminal=False)  # another user's terminal, after su or sudo
    return Console(file=terminal, force_terminal=True, width=width)


def log_to(console: Console, run_id: str, form: LogFormat = "text") -> None:
    """Send the library's log lines to a console; with time and run where it is no terminal.

    Args:
        console: where to.
        run_id: the run that they are of.
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
    """Return whether log lines are JSON, so that an error should be, too."""
    return any(isinstance(handler.formatter, _JsonFormatter) for handler in log.handlers)


class _JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, run, message, and the traceback where there is one."""

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
