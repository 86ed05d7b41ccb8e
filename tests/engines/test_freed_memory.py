"""A step that allocates what the one before it has freed costs no page fault."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

_COUNT = """
import resource, torch
from sparksgd.engines.freed_memory import freed_memory_kept_in_block, keep_freed_memory_until_exit

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        parts = [torch.ones(1 << 18) for _ in range(20)]  # of 1 MiB, which is 256 pages
        del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident_pages():
    return int(open("/proc/self/statm").read().split()[1])
"""


def counted(program: str, **environment: str) -> list[int]:
    ran = subprocess.run(
        [sys.executable, "-c", _COUNT + program], capture_output=True, text=True, check=True,
        env=os.environ | environment,
    )  # fmt: skip
    return [int(word) for word in ran.stdout.split()]


@pytest.mark.soak
def test_a_process_that_keeps_what_it_freed() -> None:
    before, _, after = counted(
        "print(faults()); keep_freed_memory_until_exit(); print(faults()); print(faults())"
    )
    assert before > 20 * 256  # otherwise this would show nothing
    assert after < 20


def test_what_was_kept_in_a_block_is_given_back() -> None:
    program = """
first = resident_pages()
with freed_memory_kept_in_block():
    with freed_memory_kept_in_block():
        faults()
    faults()
    print(faults())
    print(resident_pages() - first)
print(resident_pages() - first)
"""
    inside, kept, left = counted(program)
    assert inside < 20
    assert kept >= 20 * 256
    assert left < kept / 4  # a library that was loaded meanwhile stays


@pytest.mark.soak
def test_thresholds_of_the_environment_hold() -> None:
    own = {"MALLOC_MMAP_THRESHOLD_": "131072"}
    (faults,) = counted("keep_freed_memory_until_exit(); faults(); print(faults())", **own)
    assert faults > 20 * 256
