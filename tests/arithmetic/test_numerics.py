"""What decides the bits besides the experiment is reported, and another instruction set is told apart."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import sparksgd
from sparksgd.arithmetic import instruction_set, numerics
from sparksgd.arithmetic.generators import generators_seeded
from sparksgd.arithmetic.numerics import Numerics, thread_count
from sparksgd.errors import ConfigError

SAY = """
import json, torch
from sparksgd.arithmetic.numerics import Numerics
print(json.dumps([torch.backends.cpu.get_cpu_capability(), vars(Numerics.here(1))]))
"""
HELD = set(instruction_set.variables("default"))
ANY = instruction_set.Machine(name="any", architecture="", cpuinfo="")


def python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter that nothing holds to an instruction set but `environment`."""
    inherited = {name: value for name, value in os.environ.items() if name not in HELD}
    path = {"PYTHONPATH": str(Path(sparksgd.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | path | environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@cache
def numerics_under(**environment: str) -> tuple[str, Numerics]:
    """Return what torch itself says of its instruction set, and what we report."""
    capability, numerics = json.loads(python(SAY, **environment))
    return capability, Numerics(**numerics)


@pytest.mark.soak
def test_another_instruction_set_is_reported_as_such() -> None:
    capability, best = numerics_under()
    if capability == "DEFAULT":
        pytest.skip("this CPU has nothing beside the default instruction set")
    _, held = numerics_under(ATEN_CPU_CAPABILITY="default")
    assert (held.instruction_set, best.instruction_set) == ("DEFAULT", capability)
    differences = held.differences(best)
    assert f"instruction_set DEFAULT / {capability}" in differences
    assert "held_by ATEN_CPU_CAPABILITY=default / none" in differences
    assert {difference.split()[0] for difference in differences} <= {
        "instruction_set",
        "held_by",
        "arithmetic",
    }


def test_two_processes_that_compute_alike_have_no_difference() -> None:
    _, there = numerics_under()
    here = Numerics.here(1)
    if here.held_by:
        pytest.skip("this process is held to an instruction set")
    assert here.differences(there) == []


def test_pinning_sets_what_torch_reads_when_it_is_imported() -> None:
    say = "import json, os; print(json.dumps(dict(os.environ)))"
    pinned = json.loads(
        python(f"from sparksgd.arithmetic import instruction_set as i; i.pin('default'); {say}")
    )
    assert {name: pinned.get(name) for name in HELD} == {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
    }
    untouched = json.loads(
        python(f"from sparksgd.arithmetic import instruction_set as i; i.pin(None); {say}")
    )
    assert HELD.isdisjoint(untouched)


def test_pinning_comes_too_late_once_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "torch" in sys.modules
    for name in HELD:
        monkeypatch.delenv(name, raising=False)
    instruction_set.pin(None)
    with pytest.raises(
        ConfigError, match=r"'avx2', but torch is already imported: set ATEN_CPU_CAPABILITY=avx2 "
    ):
        instruction_set.pin("avx2", ANY)
    for name, value in instruction_set.variables("avx2").items():
        monkeypatch.setenv(name, value)
    instruction_set.pin("avx2", ANY)  # the environment had said so before


def test_differences_name_the_field_and_both_values() -> None:
    here = Numerics.here(1)
    other = replace(here, torch="2.4.0", threads=2, held_by="MKL_CBWR=AVX2")
    assert here.differences(other) == [
        f"torch {torch.__version__} / 2.4.0",
        "held_by none / MKL_CBWR=AVX2" if not here.held_by else f"held_by {here.held_by} / MKL_CBWR=AVX2",
        "threads 1 / 2",
    ]
    assert here.differences(here) == []


def test_the_thread_count_is_set_and_restored_even_when_the_block_fails() -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        with thread_count(before + 1):
            assert torch.get_num_threads() == before + 1
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    assert torch.get_num_threads() == before
    assert Numerics.here(before + 1).threads == before + 1
    assert torch.get_num_threads() == before


def test_the_package_s_digest_is_of_its_source_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = numerics.package_digest.__wrapped__  # past the cache
    here, source = digest(), Path(sparksgd.__file__).parent
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as archive:
        for file in source.rglob("*.py"):
            archive.write(file, file.relative_to(source.parent))
    monkeypatch.setattr(numerics, "files", lambda name: zipfile.Path(tmp_path / "package.zip", f"{name}/"))
    assert digest() == here
    with zipfile.ZipFile(tmp_path / "package.zip", "a") as archive:
        archive.writestr("sparksgd/one_more.py", "")
    assert digest() != here


def drawn() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_seeded_generators_draw_the_same_numbers_and_the_callers_go_on_as_before() -> None:
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    undisturbed = drawn(), drawn()
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    first = drawn()
    with generators_seeded(7):
        seeded = drawn()
    with generators_seeded(7):
        assert drawn() == seeded
    with pytest.raises(ZeroDivisionError), generators_seeded(7):
        raise ZeroDivisionError
    assert (first, drawn()) == undisturbed
    with generators_seeded(8):
        assert all(one != other for one, other in zip(drawn(), seeded, strict=True))
