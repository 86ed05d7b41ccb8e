"""A run that is killed at an exact system call goes on from what is on the disk, to the same bits."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from resumed_jobs import made_jobs, must_resume_from, resumed_from

CALLS = ["write", "openat", "rename", "fsync", "unlink", "link", "mkdir"]
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        shutil.which("strace") is None, reason="strace, which kills at a call, is not installed"
    ),
]


class Server:
    """Runs jobs in forks of one process.

    Args:
        folder: of their rows and folders.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        made_jobs(folder)
        python = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "modules")))
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/hosts/forked_jobs.py"), str(folder / "rows.parquet"),
             "resumed_modules:with_norm"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(folder / "errors").open("a"), text=True,
            env=os.environ | {"PYTHONPATH": python, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def _line(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def run(self, out: Path, *options: str) -> int:
        """Run a job, traced if there are options; return its exit status."""
        assert self._process.stdin is not None
        go = out.with_name(f"{out.name}.go")
        go.unlink(missing_ok=True)
        self._process.stdin.write(f"{out}\n")
        self._process.stdin.flush()
        tracer, pid = None, self._line()
        if options:
            tracer = subprocess.Popen(
                ["strace", "-f", "-y", "-p", str(pid), "-o", f"{out}.calls", *options],
                stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert tracer.stderr is not None
            assert "attached" in tracer.stderr.readline()
        go.touch()
        status = self._line()
        if tracer is not None:
            tracer.wait()
        return status

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]  # it is a pipe
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("killed"))
    yield made
    made.close()


def lines(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in found]


@pytest.mark.parametrize("call", CALLS)
def test_a_run_that_is_killed_at_any_call_goes_on(server: Server, call: str) -> None:
    whole = server.folder / f"whole {call}"
    names = {"rename": "rename,renameat,renameat2", "unlink": "unlink,unlinkat", "link": "link,linkat"}
    names |= {"mkdir": "mkdir,mkdirat"}
    calls = f"trace={names.get(call, call)}"
    assert server.run(whole, "-e", calls) == 0
    wanted = json.loads((whole / "summary.json").read_text())["parameters_sha256"]
    of_threads: dict[str, list[int]] = {}
    for line in Path(f"{whole}.calls").read_text().splitlines():
        thread, _, rest = line.partition(" ")
        if re.match(rf"\s*{call}", rest):
            changes = call != "openat" or "O_CREAT" in rest
            of_threads.setdefault(thread, []).append(str(whole) in rest and changes)
    whens = sorted({n for found in of_threads.values() for n, ours in enumerate(found, 1) if ours})
    kills = resumed = 0
    for when in whens:
        out = server.folder / f"{call} {when}"
        status = server.run(
            out, "-e", calls, "-e", f"inject={names.get(call, call)}:signal=SIGKILL:when={when}"
        )
        if status == 0:
            continue
        assert status == -9, (server.folder / "errors").read_text()[-2000:]
        kills += 1
        step = must_resume_from(out)
        assert server.run(out) == 0, (when, (server.folder / "errors").read_text()[-2000:])
        again = json.loads((out / "summary.json").read_text())
        assert step is None or resumed_from(again) == step, when
        resumed += step is not None
        assert again["parameters_sha256"] == wanted, when
        assert lines(out) == lines(whole), when
        assert not list(out.rglob("*.part")), when
        shutil.rmtree(out)
    print(f"{call}: killed {kills} times, {resumed} went on from a checkpoint")
    assert resumed or call == "link"  # which only the lease needs, before there is a checkpoint
