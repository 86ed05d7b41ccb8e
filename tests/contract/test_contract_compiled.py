"""Modules that torch compiles train as the same modules do in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.soak  # the compiler takes seconds to load
def test_a_compiled_module_on_shards_is_that_module_on_the_union_of_the_rows() -> None:
    done = subprocess.run(
        [sys.executable, HERE / "compiled.py"],
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "torch.compile, eager: right",
        "torch.compile, aot_eager: right",
        "module.compile(): right",
        "a compiled function: right",
    ]
