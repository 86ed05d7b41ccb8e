"""An executor whose folder is gone, as a killed container's is for some seconds, is waited for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from test_out_of_memory import ABORTED, SESSION, Engine

from sparksgd.errors import ConfigError
from sparksgd.spark.engines import base
from sparksgd.spark.engines.stages import StagesEngine

NO_PYTHON = ABORTED.format(
    'java.io.IOException: Cannot run program "./environment/bin/python": error=2, No such file or directory\n'
    "\tat java.lang.ProcessBuilder.start(ProcessBuilder.java:1143)\n"
    "\tat org.apache.spark.api.python.PythonWorkerFactory.startDaemon(PythonWorkerFactory.scala:371)"
)


@pytest.fixture
def slept(monkeypatch):
    found = []
    monkeypatch.setattr(base.time, "sleep", found.append)
    return found


def failing(times):
    """Return a job that fails so often, and the list of its runs."""
    ran = []

    def job():
        ran.append(1)
        if len(ran) <= times:
            raise RuntimeError(NO_PYTHON)
        return "done"

    return job, ran


def test_its_job_is_tried_again_after_a_while(slept):
    job, ran = failing(3)
    assert Engine()._run(job, None, "step 5") == "done"
    assert len(ran) == 4
    assert slept == [base.DYING_S] * 3


def test_a_python_that_stays_away_is_named_in_the_end(slept):
    job, ran = failing(9)
    with pytest.raises(ConfigError, match=r"there is no \./environment/bin/python on host7"):
        Engine()._run(job, None, "step 5")
    assert len(ran) == 4


def test_before_the_first_contact_it_is_refused_at_once(slept):
    engine = Engine()
    engine._has_contact = False
    job, ran = failing(1)
    with pytest.raises(ConfigError, match=r"there is no \./environment/bin/python on host7"):
        engine._run(job, None, "first contact")
    assert (len(ran), slept) == (1, [])


@pytest.mark.parametrize("has_contact", [True, False])
def test_a_late_task_of_it_ends_no_run_with_backup_workers(monkeypatch, has_contact):
    class Job:
        def get(self):
            raise RuntimeError(NO_PYTHON)

    engine = object.__new__(StagesEngine)
    engine._has_contact, engine._context = has_contact, SESSION
    engine._asked = {7: SimpleNamespace(job=Job())}
    assert engine._ended(7).is_final == (not has_contact)
