"""What all tests share: Spark on the loopback interface, modules that users might write, hosts to run on."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).parent
MODULES = TESTS / "modules"

os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")  # a host name need not resolve where tests run
os.environ["PYSPARK_PYTHON"] = sys.executable
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(MODULES), os.environ.get("PYTHONPATH")]))
sys.path[:0] = [str(TESTS / name) for name in ("modules", "hosts", "cluster", "spark")]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C

settings.register_profile("any machine", deadline=None)  # no test races a clock
settings.load_profile("any machine")

pytest_plugins = ["cluster_fixtures", "spark_fixtures"]  # not of a conftest.py: all folders use them


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests: without a JVM, with one of their own, by the session they share, with their own.

    Where several processes run them, one process has all tests of a session, and the longest of the others
    come first: who has one of these at the end lets the others wait.
    """
    for item in items:
        if _uses_sessions(item):
            item.add_marker("jvm")
            _put_in_group(item, _shared_session(item) or "own")
    items.sort(key=_turn)


def pytest_collection_finish() -> None:
    """Keep what torch and the collected tests are made of out of all later collections of garbage."""
    gc.freeze()


def _put_in_group(item: pytest.Item, session: str) -> None:
    """Let xdist give all tests of a session to one process: it reads the group at the end of a test's id."""
    group = re.sub(r"\W+", "-", session).strip("-")  # it takes a bracket for that of a parameter
    item.add_marker(pytest.mark.xdist_group(group))
    if "PYTEST_XDIST_WORKER" in os.environ and hasattr(item, "_id"):
        # xdist 3.8 writes the id where pytest 9.2 does not read it
        item._id = type(item._id).parse(f"{item.nodeid}@{group}")


def _turn(item: pytest.Item) -> tuple[int, str]:
    """Return when a test runs; those of equal turns keep their order."""
    if item.get_closest_marker("cluster") is not None:
        return (4, "")
    if item.get_closest_marker("jvm") is None:
        return (0, "" if "contract" in item.path.parts else "shorter ones")
    if not _uses_sessions(item):
        return (-1 if "PYTEST_XDIST_WORKER" in os.environ else 1, "")
    shared = _shared_session(item)
    return (2, shared) if shared else (3, "")


def _uses_sessions(item: pytest.Item) -> bool:
    return "session_for" in getattr(item, "fixturenames", ())


def _shared_session(item: pytest.Item) -> str:
    """Return the name of the session that a test shares, or nothing."""
    shared = item.get_closest_marker("session")
    return "" if shared is None else " ".join([*shared.args, *(f"{k}={v}" for k, v in shared.kwargs.items())])


@pytest.fixture(name="every_checkpoint")
def _every_checkpoint() -> Iterator[None]:
    from at_once import every_checkpoint

    with every_checkpoint():
        yield
