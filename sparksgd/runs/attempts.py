"""Ends on purpose, where YARN would start the application again.

YARN makes another attempt after every end with a status but 0, as often as spark.yarn.maxAppAttempts allows.
That mends a lost node: the run goes on from its last checkpoint.  It mends no configuration that was refused,
and no loss that is not finite.  So such an end is noted in the application's staging folder, and a later
attempt ends at once, with the same status and words.  The attempts share that folder, whatever the job's
options are, and Spark removes it after the last one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress

from sparksgd.errors import (
    Cancelled,
    ConfigError,
    DataError,
    ModelError,
    OutOfMemory,
    SparkSGDError,
    TrainingError,
)
from sparksgd.runs.holder import attempt_here
from sparksgd.runs.json_files import read_json, write_json
from sparksgd.storage import Location, location
from sparksgd.training.interrupts import ended_by

__all__ = ["EndedBefore", "not_repeated"]

ENDED = "sparksgd-ended.json"
_REFUSED = 2  # by argparse, which has said why

_ON_PURPOSE = (ConfigError, DataError, ModelError, TrainingError, OutOfMemory, Cancelled)
"""What another attempt would meet again, or what somebody wanted; a cluster that failed may be well again."""


class EndedBefore(SparkSGDError):
    """An earlier attempt of this application ended on purpose; it has that one's status and words."""

    def __init__(self, message: str, exit_code: int = SparkSGDError.exit_code) -> None:
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


def not_repeated(work: Callable[[], int | None], environment: Mapping[str, str] = os.environ) -> int:
    """Do a job's work, unless an earlier attempt of the application ended on purpose; note if it does.

    Args:
        work: returns the exit status, or None, which is 0.
        environment: in CONTAINER_ID YARN names the attempt, in SPARK_YARN_STAGING_DIR Spark the folder.

    Returns:
        The exit status.

    Raises:
        EndedBefore: an earlier attempt ended on purpose.
    """
    staging, attempt = environment.get("SPARK_YARN_STAGING_DIR"), attempt_here(environment)
    if not staging or attempt is None:
        return work() or 0
    note = location(staging) / ENDED
    _refuse_again(note, *attempt)
    try:
        status = work() or 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        why = "options that were refused" if status == _REFUSED else f"status {status}"
        _write(note, attempt[1], status, why)
        raise
    except _ON_PURPOSE as error:
        if ended_by() is None:  # else YARN took the container away
            _write(note, attempt[1], error.exit_code, str(error))
        raise
    _write(note, attempt[1], status, f"status {status}")
    return status


def _write(note: Location, attempt: int, status: int, message: str) -> None:
    """Note an end with a status but 0."""
    if status:
        with suppress(OSError, SparkSGDError):
            write_json(note, {"attempt": attempt, "exit_code": status, "message": message})


def _refuse_again(note: Location, application: str, attempt: int) -> None:
    try:
        about = read_json(note)
        before, exit_code, message = int(about["attempt"]), int(about["exit_code"]), str(about["message"])
    except (OSError, ValueError, LookupError, TypeError):
        return  # there is none, or none of ours
    if before < attempt:
        raise EndedBefore(
            f"attempt {before} of {application} ended with: {message} (its log says more: yarn logs "
            f"-applicationId {application})", exit_code,
        )  # fmt: skip
