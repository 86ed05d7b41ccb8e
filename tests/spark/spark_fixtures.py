"""One Spark session at a time, started anew where a test wants another master or other settings.

A test says which one it wants by `@pytest.mark.session(MASTER)`, of itself or its file, and gets it as
`spark`; tests/conftest.py lets those of one session run after each other.  What wants a session of its own
asks `session_for`, and comes last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession  # here, not above: most tests need no Spark

_ENDS_JAVA = pytest.StashKey[threading.Timer]()
_CLEAN_UP_S = 5.0

_current: dict[str, object] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> None:
    """See to it that a test that is cut off ends: what cleans up after it may ask Java, and wait."""
    if "session_for" in getattr(item, "fixturenames", ()):
        item.stash[_ENDS_JAVA] = timer = threading.Timer(settings.timeout + _CLEAN_UP_S, _end_java)
        timer.daemon = True
        timer.start()


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> None:
    """Let Java live after a test that ended by itself."""
    if _ENDS_JAVA in item.stash:
        item.stash[_ENDS_JAVA].cancel()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Forget Java after a test that was cut off: an answer that comes late would be taken for another one."""
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    if "session_for" not in getattr(item, "fixturenames", ()) or call.excinfo is None:
        return
    if "Timeout" in str(call.excinfo.value):
        _end_java()
    if SparkContext._gateway is not None and SparkContext._gateway.proc.poll() is not None:
        SparkContext._gateway = SparkContext._jvm = SparkContext._active_spark_context = None
        SparkSession._instantiatedSession = None
        _current.clear()


def _end_java() -> None:
    """End the JVM of all sessions, whatever it does."""
    from pyspark import SparkContext

    if SparkContext._gateway is not None:
        SparkContext._gateway.proc.kill()
        SparkContext._gateway.proc.wait()


@pytest.fixture(scope="session")
def local_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where these sessions keep their blocks and shards, apart from any other Spark here."""
    return tmp_path_factory.mktemp("spark")


@contextmanager
def sessions(local_dir: Path) -> Iterator[Callable[..., SparkSession]]:
    """Give a function: the session of a master and settings, the last one if they are the same."""
    from pyspark import SparkConf, SparkContext

    from sparksgd.config import TrainConfig
    from sparksgd.spark.session import start_session

    def session(master: str, **settings: str) -> SparkSession:
        wanted = (master, tuple(sorted(settings.items())))
        if _current.get("wanted") != wanted or SparkContext._active_spark_context is None:
            stop()
            conf = {"spark.master": master, "spark.ui.enabled": "false", "spark.log.level": "ERROR"}
            conf |= {"spark.ui.showConsoleProgress": "false", "spark.local.dir": str(local_dir)}
            conf |= {"spark.python.daemon.module": "daemon_with_torch"}
            conf |= {key.replace("__", "."): value for key, value in settings.items()}
            if SparkContext._gateway is None:
                SparkContext._ensure_initialized(conf=SparkConf(loadDefaults=False))
            system = SparkContext._jvm.System  # what spark-submit would have set
            for key in _current.get("keys", ()):
                system.clearProperty(key)
            for key, value in conf.items():
                system.setProperty(key, value)
            _current.update(
                wanted=wanted, keys=tuple(conf), session=start_session("sparksgd tests", TrainConfig())
            )
        return _current["session"]

    def stop() -> None:
        if SparkContext._active_spark_context is not None:
            SparkContext._active_spark_context.stop()

    try:
        yield session
    finally:
        stop()


@pytest.fixture(scope="session")
def session_for(local_dir: Path) -> Iterator[Callable[..., SparkSession]]:
    """Return the function of `sessions`."""
    with sessions(local_dir) as session:
        yield session


@pytest.fixture
def spark(request: pytest.FixtureRequest, session_for: Callable[..., SparkSession]) -> SparkSession:
    """Return the session that the test, or its file, is marked with."""
    marker = request.node.get_closest_marker("session")
    return session_for(*marker.args, **marker.kwargs)
