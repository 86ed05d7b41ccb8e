"""Jobs as functions of this process."""

from __future__ import annotations

import importlib.util
import io
import logging
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """How a job ended, and what it said."""

    returncode: int
    stdout: str


def run_job(job: str, *words: str) -> Done:
    """Run a job as a function, in the session that is active, if it needs one."""
    logger, said = logging.getLogger("sparksgd"), io.StringIO()
    before = (logger.handlers[:], logger.level, logger.propagate)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            status = module_of(job).main(words)
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
    return Done(status, said.getvalue())


def module_of(job: str) -> ModuleType:
    path = ROOT / "jobs" / job
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
