"""The same bits as ever: digests taken at commit 417309a, before the solvers' seam was made, on every engine.

They hold for one build of torch and one arithmetic: CPUs differ, even where all are held to AVX2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from golden_runs import NUMERICS

from sparksgd.arithmetic import instruction_set

HERE = Path(__file__).parent

NO_BUFFERS = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

PARAMETERS_AND_BUFFERS = {
    "synchronous": ("0e9046f0c134aac326ae2ff9f81ecf86ac2918eea144e1dd34e8a13a1d7aec6d", NO_BUFFERS),
    "momentum": ("eb5a6e7f8b5af4c9de21418fe60c706f7144f8b17966a31e31895cd1b3014719", NO_BUFFERS),
    "schedule": ("51596be753f015120ac2afc74ecc44360cdebec103744f80a5eaa62019d4629f", NO_BUFFERS),
    "adam": ("23b06cab2e38d5bd6390d730ba8a78f848317ebe8d1d4bb2451d203ba75edd11", NO_BUFFERS),
    "batch-norm": (
        "2e5b6db47ef629e4e76b7f507a19c9c721d33185c3d72a71f1541c32e10b0915",
        "110cfcc553eec338e1a5112158ac928d9ebd203ab91f0d0bf5527f1734ad1507",
    ),
    "clipping": ("349abf0cfcad0abd678086214597bcbdf3587f61771a1a7807d060aa28879ad0", NO_BUFFERS),
    "backup replay": (
        "95a877ede84d77ca49063e0f287e1b64ef539c65b7c2a64b8a8d4e5fef74840d",
        "462f54a86676e6fc984980e8acfacbde0d79dd973e1d0d7f4945341049c82998",
    ),
}


def digests(*words: str) -> dict[str, Any]:
    """Return what golden_runs.py prints in a Python that is held to AVX2; skip on other arithmetic."""
    done = subprocess.run(
        [sys.executable, HERE / "golden_runs.py", *words],
        env=os.environ
        | instruction_set.variables("avx2")
        | {
            "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent / "modules", HERE.parents[1]))),
            "PYSPARK_PYTHON": sys.executable,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if found["numerics"] != NUMERICS:
        pytest.skip(f"the digests are of {NUMERICS}, but this machine computes as {found['numerics']}")
    return found["digests"]


def check(found: dict[str, Any], experiments: set[str]) -> None:
    assert {run.split(" / ")[0] for run in found} == experiments
    different = {
        run: ended
        for run, ended in found.items()
        if tuple(ended) != PARAMETERS_AND_BUFFERS[run.split(" / ")[0]]
    }
    assert different == {}


def test_inline_ends_at_the_golden_digests():
    check(digests("inline"), set(PARAMETERS_AND_BUFFERS))


@pytest.mark.jvm
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_every_engine_with_every_number_of_workers_ends_at_the_golden_digests():
    words = ("tree:1,2,3,4", "allreduce:1,2,3,4", "stages:1,2,3,4")
    check(digests(*words), set(PARAMETERS_AND_BUFFERS))
