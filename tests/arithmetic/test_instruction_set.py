"""torch is held to no instruction set that a CPU does not have: it would die by SIGILL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparksgd
from sparksgd.arithmetic.instruction_set import Machine, pin, refuse
from sparksgd.errors import ConfigError

HASWELL = "processor\t: 0\nflags\t\t: fpu sse4_2 fma avx avx2 bmi2\n"
SKYLAKE = "processor\t: 0\nflags\t\t: fpu fma avx avx2 avx512f avx512dq avx512bw avx512vl\n"
NEHALEM = "processor\t: 0\nflags\t\t: fpu sse4_1 sse4_2 popcnt\n"
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd sve\n"


def machine(cpuinfo: str, name: str = "this machine", architecture: str = "x86_64") -> Machine:
    return Machine(name=name, architecture=architecture, cpuinfo=cpuinfo)


@pytest.mark.parametrize(
    ("cpuinfo", "architecture", "instruction_set", "lacking"),
    [
        (HASWELL, "x86_64", "avx512", ("avx512f", "avx512bw", "avx512dq", "avx512vl")),
        (HASWELL, "x86_64", "avx2", ()),
        (SKYLAKE, "x86_64", "avx512", ()),
        (SKYLAKE + HASWELL, "x86_64", "avx512", ("avx512f", "avx512bw", "avx512dq", "avx512vl")),
        (SKYLAKE.replace(" fma", ""), "AMD64", "avx2", ("fma",)),
        (NEHALEM, "x86_64", "avx2", ("avx2", "fma")),
        (NEHALEM, "x86_64", "default", ()),
        (GRAVITON, "aarch64", "avx2", ("avx2", "fma")),
        (GRAVITON, "aarch64", "default", ()),
        ("", "arm64", "avx2", ("avx2", "fma")),
        ("", "x86_64", "avx512", ()),
        ("", "", "avx512", ()),
    ],
    ids=[
        "AVX2 alone", "AVX2", "AVX-512", "one core lacks it", "no FMA", "neither", "the default", "ARM",
        "ARM's default", "ARM's macOS", "no list of flags", "unknown",
    ],
)  # fmt: skip
def test_a_cpu_is_asked_for_the_flags_that_torch_asks_for(
    cpuinfo: str, architecture: str, instruction_set: str, lacking: tuple[str, ...]
) -> None:
    assert machine(cpuinfo, architecture=architecture).lacks(instruction_set) == lacking


def test_an_error_names_the_machine_what_it_lacks_and_what_all_have() -> None:
    machines = [machine(SKYLAKE, "host1"), machine(HASWELL, "host2"), machine("", "host3")]
    refuse("avx2", machines, "train.instruction_set")
    refuse(None, machines, "train.instruction_set")
    with pytest.raises(ConfigError) as refused:
        refuse("avx512", machines, "train.instruction_set")
    assert str(refused.value) == (
        "train.instruction_set is 'avx512', but the CPU of host2 (x86_64) has no avx512f, avx512bw, "
        "avx512dq, avx512vl: torch would die by an illegal instruction. Set it to 'avx2', or leave it out"
    )


def test_the_flags_are_read_from_a_file_if_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(HASWELL)
    assert Machine.here(tmp_path / "cpuinfo").cpuinfo == HASWELL
    assert Machine.here(tmp_path / "none").cpuinfo == ""


def test_pinning_is_refused_before_anything_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    with pytest.raises(ConfigError, match="but the CPU of this machine"):
        pin("avx512", machine(HASWELL))
    assert "ATEN_CPU_CAPABILITY" not in os.environ
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx512")
    pin(None, machine(SKYLAKE))
    with pytest.raises(ConfigError, match=r"^ATEN_CPU_CAPABILITY, an environment variable, is 'avx512', but"):
        pin(None, machine(HASWELL))


def test_the_job_refuses_it_before_torch_is_imported() -> None:
    code = (
        "import sys, sparksgd.arithmetic.instruction_set as i, jobs.train as job\n"
        "here = i.Machine(name='this machine', architecture='aarch64', cpuinfo='')\n"
        "i.Machine.here = lambda: here\n"
        "status = job.main(['--out', 'nowhere', '--set', 'train.instruction_set=avx2'])\n"
        "print(status, 'torch' in sys.modules)"
    )
    root = Path(sparksgd.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.stdout == "2 False\n"
    assert "error: train.instruction_set is 'avx2', but the CPU of this machine (aarch64)" in done.stderr
