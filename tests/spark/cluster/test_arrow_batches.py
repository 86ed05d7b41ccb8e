"""The setting for Arrow batches of a session that several runs share; no JVM, a session stands in."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from sparksgd.spark.cluster.arrow_batches import small_batches

KEY = "spark.sql.execution.arrow.maxRecordsPerBatch"


class Conf(dict):
    """Settings of a session."""

    def set(self, key, value):
        self[key] = value


class Context:
    """A context with local properties, which each thread has its own of."""

    def __init__(self):
        self._properties = threading.local()

    def getLocalProperty(self, key):  # noqa: N802  # Spark's name
        return getattr(self._properties, key, None)

    def setLocalProperty(self, key, value):  # noqa: N802  # Spark's name
        setattr(self._properties, key, value)


@pytest.fixture
def session():
    return SimpleNamespace(conf=Conf({KEY: "777"}), sparkContext=Context(), _jsparkSession=object())


def wide(record_bytes):
    """Return a schema of rows of this size."""
    return SimpleNamespace(record=np.dtype((np.void, record_bytes)))


def test_wide_rows_get_small_batches_and_narrow_ones_no_larger_than_sparks(session):
    for record_bytes, rows in ((1, "10000"), (1 << 20, "16"), (8 << 10, "1024")):
        with small_batches(session, wide(record_bytes)):
            assert session.conf[KEY] == session.sparkContext.getLocalProperty(KEY) == rows
        assert (session.conf[KEY], session.sparkContext.getLocalProperty(KEY)) == ("777", None)


def test_the_fewest_rows_hold_while_runs_are_nested(session):
    with small_batches(session, wide(8 << 10)):
        with small_batches(session, wide(1 << 20)):
            assert (session.conf[KEY], session.sparkContext.getLocalProperty(KEY)) == ("16", "16")
        assert (session.conf[KEY], session.sparkContext.getLocalProperty(KEY)) == ("1024", "1024")
        with small_batches(session, wide(4 << 10)):
            assert (session.conf[KEY], session.sparkContext.getLocalProperty(KEY)) == ("1024", "2048")
    assert session.conf[KEY] == "777"


def test_of_runs_that_overlap_the_last_gives_back_what_was_there_before_the_first(session):
    one, other = small_batches(session, wide(1 << 20)), small_batches(session, wide(8 << 10))
    one.__enter__()
    other.__enter__()
    assert session.conf[KEY] == "16"
    one.__exit__(None, None, None)
    assert session.conf[KEY] == "1024"
    other.__exit__(None, None, None)
    assert session.conf[KEY] == "777"


def test_another_session_keeps_its_own(session):
    other = SimpleNamespace(conf=Conf({KEY: "888"}), sparkContext=Context(), _jsparkSession=object())
    with small_batches(session, wide(1 << 20)), small_batches(other, wide(8 << 10)):
        assert (session.conf[KEY], other.conf[KEY]) == ("16", "1024")
    assert (session.conf[KEY], other.conf[KEY]) == ("777", "888")


def test_runs_in_threads_end_with_the_setting_that_was_there(session):
    all_within, seen = threading.Barrier(4, timeout=60), []

    def run(record_bytes):
        for _ in range(50):
            with small_batches(session, wide(record_bytes)):
                all_within.wait()
                seen.append(int(session.conf[KEY]) * record_bytes)

    threads = [threading.Thread(target=run, args=[(1 << 10) << shift]) for shift in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 200
    assert max(seen) <= 8 << 20  # no run ever saw more rows than it may
    assert session.conf[KEY] == "777"


def test_a_run_that_fails_gives_the_setting_back_too(session):
    with pytest.raises(ValueError, match="bad"), small_batches(session, wide(1 << 20)):
        raise ValueError("bad")
    assert session.conf[KEY] == "777"


def test_a_session_that_refuses_the_setting_has_no_user(session):
    whole = session.conf
    session.conf = SimpleNamespace(get=whole.get, set=None)
    with pytest.raises(TypeError), small_batches(session, wide(1 << 20)):
        pass
    session.conf = whole
    with small_batches(session, wide(8 << 10)):
        assert session.conf[KEY] == "1024"
    assert session.conf[KEY] == "777"
