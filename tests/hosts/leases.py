"""Processes that take the lease of a folder, wherever it is: two that race for it, and one that writes on."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

__all__ = ["DRIVER", "race", "start"]

_BEGIN = """
import os, sys, time
from contextlib import suppress
from sparksgd.errors import ClusterError
from sparksgd.runs.holder import Holder
from sparksgd.runs.lease import Lease
from sparksgd.spark.uris import lead_to_hadoop
from sparksgd.storage import location

lead_to_hadoop()
folder, name = location(sys.argv[1]), sys.argv[2]
"""

_RACER = f"""{_BEGIN}
diary = os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
folder.names()
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[4])):
    lease = Lease(folder, Holder.here(name), sleep=lambda pause_s: time.sleep(0.0005))
    with lease.held("wait"):
        os.write(diary, f"{{name}} in\\n".encode())
        (folder.guarded(lease.check) / "run.json").write_bytes(name.encode() * 1000)
        assert (folder / "run.json").read_bytes() == name.encode() * 1000
        os.write(diary, f"{{name}} out\\n".encode())
"""

DRIVER = f"""{_BEGIN}
lease = Lease(folder, Holder.here(name), renew_s=0.02)
with lease.held():
    place = folder.guarded(lease.check)
    lines, step = (place / "metrics.jsonl").lines(), 0
    try:
        while True:
            step += 1
            lines.write(f"step {{step}}\\n")
            with suppress(FileNotFoundError):  # the file that it was just preparing
                (place / "model.json").write_bytes(str(step).encode())
    except ClusterError as error:
        print(error)
"""
"""Writes to a folder until it has lost it, and says who has taken it."""


def start(program: str, *words: str | Path) -> subprocess.Popen[str]:
    """Start a program."""
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def race(folder: str | Path, diary: Path, times: int) -> None:
    """Let two processes take the lease of a folder, each some times, and check that none met the other."""
    racers = [start(_RACER, folder, name, diary, str(times)) for name in ("one", "two")]
    try:
        for racer in racers:
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            racer.stdin.write("go\n")
            racer.stdin.flush()
        for racer in racers:
            told, _ = racer.communicate(timeout=200)
            assert (racer.returncode, told) == (0, "")
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    lines = diary.read_text().splitlines()
    assert len(lines) == 4 * times
    entries, exits = lines[::2], lines[1::2]
    assert [line.removesuffix(" in") for line in entries] == [line.removesuffix(" out") for line in exits]
    assert sum(one != other for one, other in pairwise(entries)) > 2  # they did race
