"""How many rows Spark puts into an Arrow batch: few enough that wide rows take little memory.

It is a setting of the session, which several runs may share.  The smallest number that a run wants holds for
all of them; the last run to end restores the setting of before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pyspark.sql import SparkSession

from sparksgd.data.schema import RowSchema
from sparksgd.spark.cluster.jobs import cleanup

__all__ = ["small_batches"]

_KEY = "spark.sql.execution.arrow.maxRecordsPerBatch"
_BATCH_BYTES = 8 << 20
_FEWEST_ROWS = 16
_MOST_ROWS = 10_000


@dataclass
class _Users:
    """The runs that have changed the setting of a session now."""

    before: str
    """The setting before the first of them."""

    rows: list[int] = field(default_factory=list)
    """What each of them wants."""


_lock = threading.Lock()
_users_of: dict[Any, _Users] = {}
"""By the JVM's session, which several Python sessions may share."""


@contextmanager
def small_batches(session: SparkSession, schema: RowSchema) -> Iterator[None]:
    """Bound the memory of Arrow batches: 10,000 wide rows, Spark's default, would be gigabytes."""
    context, rows = session.sparkContext, _rows_per_batch(schema)
    before = context.getLocalProperty(_KEY)
    users = _enter(session, rows)
    try:
        context.setLocalProperty(_KEY, str(rows))  # read by tasks before a shuffle
        yield
    finally:
        with cleanup():
            context.setLocalProperty(_KEY, before)  # type: ignore[arg-type]  # None clears it
        _leave(session, users, rows)


def _rows_per_batch(schema: RowSchema) -> int:
    return max(_FEWEST_ROWS, min(_MOST_ROWS, _BATCH_BYTES // schema.record.itemsize))


def _enter(session: SparkSession, rows: int) -> _Users:
    with _lock:
        users = _users_of.get(session._jsparkSession)
        if users is None:
            users = _Users(before=str(session.conf.get(_KEY)))
        session.conf.set(_KEY, str(min([*users.rows, rows])))
        users.rows.append(rows)
        _users_of[session._jsparkSession] = users
        return users


def _leave(session: SparkSession, users: _Users, rows: int) -> None:
    with _lock, cleanup():
        users.rows.remove(rows)
        if users.rows:
            session.conf.set(_KEY, str(min(users.rows)))
            return
        del _users_of[session._jsparkSession]
        session.conf.set(_KEY, users.before)
