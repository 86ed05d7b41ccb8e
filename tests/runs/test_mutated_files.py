"""Whatever was done to the bytes of a file, it is read, or refused in our words, in bounded memory."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import pytest
from at_once import every_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manifests import change_manifest, put
from mutated_bytes import mutated
from resumed_jobs import SHORT, forge, made_jobs, without_digests

from sparksgd.config import Config
from sparksgd.errors import SparkSGDError
from sparksgd.runs.checkpoints import manifests
from sparksgd.runs.model import load_model
from sparksgd.runs.replay import read_replay
from sparksgd.storage import location
from sparksgd.training import tensor_archives

HERE = Path(__file__).parent
KIB, MIB = 1 << 10, 1 << 20
OF_VALID_FILE = 3
"""The peak of memory is at most so many times that of reading the valid file, were it as long."""


@dataclass(frozen=True)
class Kind:
    """A file, and how it is read."""

    pattern: str
    read: Callable[[Path], object]
    believe: Callable[[Path], object] | None = None
    """Writes the digest of the changed file where one is kept."""

    memory_of_a_byte: int = 13
    """What a byte of a valid pickle takes while it is loaded, and more than one of JSON; as measured."""


def read_model(folder: Path) -> object:
    return load_model(folder / "model", trust=["torch"])


def read_run(folder: Path) -> object:
    return read_replay(folder, trust=["torch"])


def read_checkpoints(folder: Path) -> object:
    return [manifest.checkpoint() for manifest in manifests(location(folder / "checkpoints"))]


def believe_weights(file: Path) -> None:
    change_manifest(file.parent, put("weights", value=entry_of(file)))


def believe_part(file: Path) -> None:
    name, part, _ = file.name.split(".")
    manifest = file.with_name(f"{name}.json")
    parts = json.loads(manifest.read_text())["parts"]
    forge(manifest, parts=parts | {part: {"version": parts[part]["version"]} | entry_of(file)})


def believe_manifest(file: Path) -> None:
    with suppress(ValueError, RecursionError, TypeError):
        forge(file)


def believe_model(file: Path) -> None:
    with suppress(ValueError, RecursionError, AttributeError):
        change_manifest(file.parent, lambda about: None)


def entry_of(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return {"name": file.name, "size_bytes": len(data), "sha256": sha256(data).hexdigest()}


KINDS = {
    "weights": Kind(
        "model/weights.pt", lambda run: load_model(run / "model", trust=["torch"]), believe_weights
    ),
    "model": Kind("model/model.json", lambda run: load_model(run / "model", trust=["torch"]), believe_model),
    "part": Kind("checkpoints/*.solver.pt", read_checkpoints, believe_part),
    "manifest": Kind("checkpoints/*.json", read_checkpoints, believe_manifest),
    "metrics": Kind("metrics.jsonl", read_run),
    "trace": Kind("trace.jsonl", read_run),
    "record": Kind("run.json", read_run),
    "summary": Kind("summary.json", read_run),
    "configuration": Kind(
        "run.toml", lambda run: Config.load(str(run / "run.toml"), []), memory_of_a_byte=70
    ),  # of many short tables
}


@dataclass(frozen=True)
class Run:
    """The folder of a run."""

    folder: Path
    valid_bytes: dict[str, int]
    """The peak of memory of reading it as it is, by kind."""

    def file(self, kind: str) -> Path:
        return min(self.folder.glob(KINDS[kind].pattern))


def read(kind: str, folder: Path) -> int:
    """Read a file, which may be refused."""
    with suppress(SparkSGDError):
        KINDS[kind].read(folder)
    return 0


def peak_of(kind: str, folder: Path) -> int:
    """Read a file, which may be refused; return the peak of Python's memory."""
    gc.collect()
    tracemalloc.start()
    try:
        read(kind, folder)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return the folder of a run of arrivals; the checkpoints in it are of another one."""
    jobs = made_jobs(tmp_path_factory.mktemp("mutated"))
    jobs.run("run", SHORT, {"engine": {"name": "simulated"}, "solver": {"name": "async_sgd"}})
    with every_checkpoint():
        jobs.run("other", SHORT)
    folder = jobs.folder / "run"
    shutil.copytree(jobs.folder / "other" / "checkpoints", folder / "checkpoints", dirs_exist_ok=True)
    (folder / "run.toml").write_text('[train]\nepochs = 2\n[optimizer]\nname = "SGD"\nlr = 0.1\n')
    without_digests(folder)  # else nothing of these files would be read
    for kind in KINDS.values():
        kind.read(folder)  # whatever is imported or kept once, is
    return Run(folder, {kind: peak_of(kind, folder) for kind in KINDS})


@pytest.fixture
def nothing_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small files show what large ones would take."""
    monkeypatch.setattr(tensor_archives, "_FREE_MADE_BYTES", 64 * KIB)


def fuzzed(examples: int) -> settings:
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


CHANCE = st.integers(0, 1 << 64).map(Random)


def check(run: Run, kind: str, chance: Random, most_bytes: int) -> None:
    file = run.file(kind)
    beside = [run.file(other) for other in ("model", "manifest")]
    before = {each: each.read_bytes() for each in (file, *beside)}
    believe = KINDS[kind].believe
    try:
        file.write_bytes(mutated(before[file], chance, most_bytes))
        if believe is not None and chance.random() < 0.8:
            believe(file)
        more = max(0, file.stat().st_size - len(before[file]))
        allowed = OF_VALID_FILE * (run.valid_bytes[kind] + KINDS[kind].memory_of_a_byte * more) + MIB // 2
        assert peak_of(kind, run.folder) <= allowed, (more, run.valid_bytes[kind])
    finally:
        for each, data in before.items():
            each.write_bytes(data)


@pytest.mark.parametrize("kind", KINDS)
@fuzzed(25)
@given(chance=CHANCE)
def test_files_that_are_cut_flipped_repeated_or_enlarged(
    run: Run, nothing_is_free: None, kind: str, chance: Random
) -> None:
    check(run, kind, chance, 64 * KIB)


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
@fuzzed(400)
@given(chance=CHANCE)
def test_many_more_of_them(run: Run, nothing_is_free: None, kind: str, chance: Random) -> None:
    check(run, kind, chance, 128 * KIB)


IN_A_PROCESS = """
import resource, sys
from pathlib import Path
from random import Random
import test_mutated_files as tests
tests.peak_of = tests.read  # without tracemalloc, which takes time
run = tests.Run(Path(sys.argv[1]), dict.fromkeys(tests.KINDS, 1 << 50))
for kind in ("weights", "part"):
    for seed in range(9):
        tests.check(run, kind, Random(seed), 16)
taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
for seed in range(int(sys.argv[2])):
    for kind in ("weights", "part"):
        tests.check(run, kind, Random(seed), 16 << 10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - taken)
"""


@pytest.mark.parametrize("seeds", [25, pytest.param(1000, marks=pytest.mark.soak)])
def test_what_torch_allocates_is_bounded_too(run: Run, seeds: int) -> None:
    paths = [str(HERE), str(HERE.parent / "modules"), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, str(run.folder), str(seeds)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32 * KIB  # KiB
