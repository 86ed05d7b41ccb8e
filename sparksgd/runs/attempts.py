"""Ends on purpose, where YARN would start the application again.

YARN makes another attempt after every end with a status but 0, as often as spark.yarn.maxAppAttempts allows.
That mends a lost node: the run goes on from its last checkpoint.  It mends no configuration that was refused,
and no loss that is not finite.  So such an end is written to ended.json in the run's folder, and a later
attempt of the same application ends at once, with the same status and words.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sparksgd.errors import (
    Cancelled,
    ConfigError,
    DataError,
    ModelError,
    OutOfMemory,
    SparkSGDError,
    TrainingError,
)
from sparksgd.runs.holder import Holder
from sparksgd.runs.json_files import read_json, write_json
from sparksgd.storage import Location

__all__ = ["EndedBefore", "ends_noted", "note_end"]

ENDED = "ended.json"

_ON_PURPOSE = (ConfigError, DataError, ModelError, TrainingError, OutOfMemory, Cancelled)
"""What another attempt would meet again, or what somebody wanted; a cluster that failed may be well again."""


class EndedBefore(SparkSGDError):
    """An earlier attempt of this application ended on purpose; it has that one's status and words."""

    def __init__(self, message: str, exit_code: int = SparkSGDError.exit_code) -> None:
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def ends_noted(folder: Location, holder: Holder) -> Iterator[None]:
    """Note in a run's folder if the block ends on purpose; if an earlier attempt did, end at once.

    Args:
        folder: of the run; nothing is written but by an application of YARN.
        holder: which attempt this is.

    Raises:
        EndedBefore: an earlier attempt of the same application ended on purpose.
    """
    if holder.application is None or holder.attempt is None:
        yield
        return
    _refuse_again(folder, holder.application, holder.attempt)
    try:
        yield
    except _ON_PURPOSE as error:
        note_end(folder, holder, error.exit_code, str(error))
        raise


def note_end(folder: Location, holder: Holder, exit_code: int, message: str) -> None:
    """Note an end on purpose, whose status is not 0; nothing is written but by an application of YARN."""
    if holder.application is None or holder.attempt is None:
        return
    about = {
        "application": holder.application,
        "attempt": holder.attempt,
        "exit_code": exit_code,
        "message": message,
    }
    with suppress(OSError, SparkSGDError):
        write_json(folder / ENDED, about)


def _refuse_again(folder: Location, application: str, attempt: int) -> None:
    try:
        about = read_json(folder / ENDED)
        is_ours = about["application"] == application and about["attempt"] < attempt
        message, exit_code = str(about["message"]), int(about["exit_code"])
    except (OSError, ValueError, LookupError, TypeError):
        return  # there is none, or none of ours
    if is_ours:
        raise EndedBefore(f"attempt {about['attempt']} of {application} ended with: {message}", exit_code)
