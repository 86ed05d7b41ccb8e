"""A run that goes on from a checkpoint ends as one that was never stopped, or says why it cannot."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import pickle
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import carried_kinds
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from resumed_jobs import EVERY_STEP, Jobs, made_jobs
from resumed_modules import TwoHeads
from rich.console import Console

import sparksgd
from sparksgd.cli.run import run
from sparksgd.cli.terminal import Terminal
from sparksgd.config import Config
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import ConfigError, DataError, ModelError, SparkSGDError
from sparksgd.runs.checkpoints import manifests
from sparksgd.storage import LocalLocation, location
from sparksgd.training.checkpointing import Checkpointing
from sparksgd.training.state import Observer, Training

pytestmark = pytest.mark.usefixtures("every_checkpoint")

KINDS: dict[str, dict[str, Any]] = {
    "momentum, one cycle": {
        "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9, "nesterov": True},
        "schedule": {"name": "OneCycleLR", "max_lr": 0.1, "total_steps": 10},
    },
    "AdamW, norm, dropout, clipping": {
        "model": {"name": "resumed_modules:with_norm"},
        "optimizer": {"name": "AdamW", "lr": 0.01},
        "solver": {"clip_norm": 0.5},
    },
    "heads that steps leave out": {
        "model": {"name": "resumed_modules:TwoHeads"},
        "optimizer": {"name": "Adam", "lr": 0.02},
    },
    "a projection in forward": {
        "model": {"name": "resumed_modules:Projected"},
        "optimizer": {"name": "RMSprop", "lr": 0.02},
        "schedule": {"name": "MultiStepLR", "milestones": [3, 9]},
    },
    "optimiser and schedule of one's own": {
        "optimizer": {"name": "resumed_modules:Slow", "lr": 0.02},
        "schedule": {"name": "resumed_modules:Steps"},
    },
    "local SGD": {
        "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9},
        "solver": {
            "name": "local_sgd", "turns_per_round": 3, "outer_lr": 0.7, "outer_momentum": 0.9,
            "inner_state": "average", "synchronous_steps": 4,
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return made_jobs(tmp_path_factory.mktemp("jobs"))


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def uninterrupted(jobs: Jobs) -> list[dict[str, Any]]:
    """Return the metrics of the run that nobody interrupts; made once in a process."""
    out = jobs.folder / "never interrupted"
    if not out.exists():
        jobs.run(out.name)
    return metrics(out)


# The same bits


CARRIED = {
    f"carried: {kind}": {
        section: {"name": f"carried_kinds:{named.__name__}"} | rate[section]
        for section, named in classes.items()
    }
    for rate in [{"optimizer": {"lr": 0.02}, "schedule": {}}]
    for kind, classes in carried_kinds.RIGHT.items()
}


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.soak) for kind in CARRIED)])
def test_a_run_goes_on_from_any_of_its_checkpoints_to_the_same_bits(jobs: Jobs, kind: str) -> None:
    tables = (KINDS | CARRIED)[kind]
    whole = jobs.run(f"whole {kind}", tables, EVERY_STEP)
    made = manifests(location(jobs.folder / f"whole {kind}" / "checkpoints"))
    assert len(made) == whole["steps"] >= 5
    for number, manifest in enumerate(made):
        out = f"{kind} from {manifest.step}"
        copied_until(jobs.folder / f"whole {kind}", jobs.folder / out, [each.name for each in made[number:]])
        again = jobs.run(out, tables, EVERY_STEP)
        assert again["resumed"][-1]["step"] == manifest.step
        assert again["parameters_sha256"] == whole["parameters_sha256"], manifest.step
        assert again["buffers_sha256"] == whole["buffers_sha256"]
        assert again["test_loss"] == whole["test_loss"]
        assert metrics(jobs.folder / out) == metrics(jobs.folder / f"whole {kind}")


def copied_until(run: Path, to: Path, names: list[str]) -> None:
    """Copy a run's folder as it was when these checkpoints were there."""
    (to / "checkpoints").mkdir(parents=True)
    for file in (run / "checkpoints").iterdir():
        if file.name.partition(".")[0] in names:
            (to / "checkpoints" / file.name).write_bytes(file.read_bytes())
    for name in ("metrics.jsonl", "run.json"):
        (to / name).write_bytes((run / name).read_bytes())


@pytest.mark.parametrize("where", ["advance", "evaluate"])
def test_a_run_that_was_interrupted_loses_nothing(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    done = getattr(InlineEngine, where)

    def interrupted(self: InlineEngine, solver: Any, *given: Any) -> Any:
        if solver.version == 5:  # the end of an epoch
            raise KeyboardInterrupt
        return done(self, solver, *given)

    with monkeypatch.context() as patch:
        patch.setattr(InlineEngine, where, interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"^at step 5: the same command goes on from step 5$"):
            jobs.run(f"interrupted in {where}")
    again = jobs.run(f"interrupted in {where}")
    assert "resumed from step 5 of 20" in caplog.text
    assert "0 steps were lost" in caplog.text
    assert again["parameters_sha256"] == jobs.run("never stopped at all")["parameters_sha256"]
    assert metrics(jobs.folder / f"interrupted in {where}") == uninterrupted(jobs)


def test_a_run_that_was_interrupted_while_it_told_of_a_step_makes_that_again(jobs: Jobs) -> None:
    jobs.stopped_at("told", 3, EVERY_STEP)
    again = jobs.run("told")
    assert (again["resumed"][0]["step"], again["resumed"][0]["lost_steps"]) == (3, 1)
    assert metrics(jobs.folder / "told") == uninterrupted(jobs)


class Interruption:
    """Raises KeyboardInterrupt at the n-th line that runs, in some files, while it is on."""

    FILES = ("loop.py", "folder.py", "lines.py", "checkpointing.py")

    def __init__(self, number: int) -> None:
        self.left, self.place = number, ""

    def on(self) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None:
            frame.f_trace = self._trace if frame.f_code.co_filename.endswith(self.FILES) else None
            frame = frame.f_back
        sys.settrace(self._trace)

    def off(self) -> None:
        sys.settrace(None)

    def _trace(self, frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith(self.FILES):
            return None
        if event == "line":
            self.left -= 1
            if self.left < 0:
                self.off()
                self.place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._trace


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.soak)])
def test_an_evaluation_has_one_line_wherever_the_run_is_interrupted(jobs: Jobs, stride: int) -> None:
    """From the evaluation's result to the next step."""
    tables = SHORT | {
        "train": SHORT["train"] | {"eval_every": 2},
        "checkpoint": {"every_steps": 2, "keep": 9},
    }
    reference = f"evaluated, {stride}"
    whole, evaluate, places = jobs.run(reference, tables), InlineEngine.evaluate, []
    for number in itertools.count(0, stride):
        out, interruption = f"interrupted at line {number}, {stride}", Interruption(number)

        def evaluated(self: InlineEngine, solver: Any, it: Interruption = interruption) -> Any:
            found = evaluate(self, solver)
            if solver.version == 2:
                it.on()
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InlineEngine, "evaluate", evaluated)
            patch.setattr(InlineEngine, "advance", before(interruption.off, InlineEngine.advance))
            patch.setattr(Checkpointing, "end", before(interruption.off, Checkpointing.end))
            try:
                jobs.run(out, tables)
            except KeyboardInterrupt:
                places.append(interruption.place)
        if not interruption.place:
            break
        again = jobs.run(out, tables)
        assert again["parameters_sha256"] == whole["parameters_sha256"], interruption.place
        assert metrics(jobs.folder / out) == metrics(jobs.folder / reference), interruption.place
    assert {place.partition(":")[0] for place in places} >= {"loop.py", "folder.py"}


def before(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*given: Any) -> Any:
        first()
        return then(*given)

    return both


def test_a_step_that_was_cut_off_is_in_no_checkpoint(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    step, made = torch.optim.Adam.step, [0]

    def cut_off(self: Any, closure: Any = None) -> None:
        step(self)
        made[0] += self.param_groups[0]["params"][0].numel() == 10  # not of the trial
        if made[0] == 6:
            raise KeyboardInterrupt  # the optimiser has moved, the version has not

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", cut_off)
        with pytest.raises(KeyboardInterrupt):
            jobs.run("cut off", EVERY_STEP)
    steps = [manifest.step for manifest in manifests(location(jobs.folder / "cut off" / "checkpoints"))]
    again = jobs.run("cut off", EVERY_STEP)
    assert again["resumed"][0]["step"] == max(steps) <= 5
    assert again["parameters_sha256"] == jobs.run("never cut off")["parameters_sha256"]


def test_a_finished_run_goes_on_to_more_epochs(jobs: Jobs) -> None:
    jobs.run("longer", {"train": {"epochs": 1}})
    again = jobs.run("longer", {"train": {"epochs": 2}})
    assert (again["steps"], again["resumed"][0]["step"], again["resumed"][0]["lost_steps"]) == (10, 5, 0)
    whole = jobs.run("two epochs")
    assert again["parameters_sha256"] == whole["parameters_sha256"]
    assert metrics(jobs.folder / "longer") == metrics(jobs.folder / "two epochs")


def test_a_run_of_another_folder_goes_on(jobs: Jobs) -> None:
    jobs.stopped_at("elsewhere", 4, EVERY_STEP)
    again = jobs.run("here", resume=str(jobs.folder / "elsewhere"))
    assert again["resumed"][0]["step"] == 4
    assert again["parameters_sha256"] == jobs.run("at once")["parameters_sha256"]
    assert metrics(jobs.folder / "here") == metrics(jobs.folder / "at once")


def test_a_job_that_goes_on_elsewhere_goes_on_with_its_own_when_it_is_submitted_again(jobs: Jobs) -> None:
    jobs.stopped_at("begun", 2, EVERY_STEP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InlineEngine, "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            jobs.run("moved", EVERY_STEP, resume=str(jobs.folder / "begun"))
    again = jobs.run("moved", EVERY_STEP, resume=str(jobs.folder / "begun"))
    assert [resumed["step"] for resumed in again["resumed"]] == [2, 5]
    assert metrics(jobs.folder / "moved") == uninterrupted(jobs)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_folder_may_be_called_otherwise(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.stopped_at("spelled", 3, EVERY_STEP)
    (jobs.folder / "link").symlink_to(jobs.folder / "spelled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InlineEngine, "advance", interrupt)  # at once: nothing new is written
        with pytest.raises(KeyboardInterrupt):
            jobs.run("spelled", EVERY_STEP, resume=str(jobs.folder / "link"))
    assert [each.step for each in manifests(location(jobs.folder / "spelled" / "checkpoints"))][-1] == 1
    assert jobs.run("spelled", EVERY_STEP)["resumed"][-1]["step"] == 3


def test_an_interruption_says_where_the_run_ended_and_what_comes(jobs: Jobs) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InlineEngine, "advance", interrupt)
        with pytest.raises(KeyboardInterrupt, match="at step 0: the same command goes on from step 0"):
            jobs.run("interrupted at once")
        patch.setattr(InlineEngine, "open", interrupt)
        with pytest.raises(KeyboardInterrupt, match="before the first step"):
            jobs.run("interrupted before")


def test_all_of_a_checkpoint_is_on_the_disk_before_its_manifest(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file, then its name, in this order: metrics, parts, manifest; older ones go last."""
    synced, fsync, unlink = [], os.fsync, Path.unlink

    def watched(file: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)  # noqa: PTH115  # it is no path
        fsync(file)

    def removed(path: Path, **how: Any) -> None:
        if path.name.startswith("checkpoint-") and path.exists():
            synced.append(f"removed {path.name}")
        unlink(path, **how)

    jobs.stopped_at("on the disk", 1, SHORT)
    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(Path, "unlink", removed)
    jobs.stopped_at("on the disk", 2, SHORT)
    told = [re.sub(r"checkpoint-0+(\d)-\w{8}", r"\1", name) for name in synced]
    told = [re.sub(r"^\.(.*)\.\w{8}\.part$", r"\1", name) for name in told]
    told = [name for name in told if re.match(r"\d|checkpoints|metrics|removed", name)]  # not the model
    first = told.index("2.solver.pt")
    assert told[first - 1] == "metrics.jsonl"
    parts = ["2.solver.pt", "2.run.pt", "2.observers.pt", "2.json"]
    expected = [one for part in parts for one in (part, "checkpoints")]
    assert told[first : first + 9] == [*expected, "removed 1.json"]


def test_where_no_step_is_left_the_job_says_so_in_a_table(jobs: Jobs) -> None:
    jobs.run("at its end", SHORT)
    shown = io.StringIO()
    terminal = Terminal(Console(file=shown), tables=True)
    config = Config.from_dict(jobs.config(SHORT))
    run(
        config,
        str(jobs.folder / "copied"),
        run_id="c",
        terminal=terminal,
        resume=str(jobs.folder / "at its end"),
    )
    assert "0 rows in 0 steps" in shown.getvalue()


def test_the_last_ones_and_the_best_are_kept(jobs: Jobs) -> None:
    summary = jobs.run(
        "kept", {"checkpoint": {"every_steps": 1, "keep": 3}, "train": {"rows_per_step": 50, "epochs": 3}}
    )
    kept = manifests(location(jobs.folder / "kept" / "checkpoints"))
    losses = [line["test_loss"] for line in metrics(jobs.folder / "kept") if line["kind"] == "evaluation"]
    best = 2 * (1 + losses.index(min(losses)))
    assert summary["steps"] == 6
    assert [each.step for each in kept] == sorted({4, 5, 6, best}, reverse=True)
    files = {file.name.partition(".")[0] for file in (jobs.folder / "kept" / "checkpoints").iterdir()}
    assert files == {each.name for each in kept}


# A process that is killed at any write


class Killed(BaseException):
    """The process is gone: it writes nothing any more."""


@dataclass
class Disk:
    """Lets a process die at its n-th write."""

    left: int

    def dies_in(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def written(where: LocalLocation, *given: Any) -> Any:
            if self.left <= 0:
                raise Killed(f"{write.__name__} {where}")
            self.left -= 1
            return write(where, *given)

        return written


@pytest.fixture
def whole(jobs: Jobs) -> dict[str, Any]:
    if not (jobs.folder / "reference" / "summary.json").exists():
        jobs.run("reference", SHORT)
    found: dict[str, Any] = json.loads((jobs.folder / "reference" / "summary.json").read_text())
    return found


SHORT = {"train": {"epochs": 1, "rows_per_step": 32}, "checkpoint": {"every_steps": 1, "keep": 1}}


def test_a_run_that_is_killed_at_any_write_goes_on(jobs: Jobs, whole: dict[str, Any]) -> None:
    deaths = 0
    for writes in range(1000):
        out, disk = f"killed at {writes}", Disk(writes)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("write_bytes", "put", "remove", "lines"):
                patch.setattr(LocalLocation, name, disk.dies_in(getattr(LocalLocation, name)))
            try:
                jobs.run(out, SHORT)
            except Killed:
                deaths += 1
            else:
                break
        for lease in (jobs.folder / out).glob(".lease-*"):
            lease.unlink()  # its process is this one, which lives
        again = jobs.run(out, SHORT)
        assert again["parameters_sha256"] == whole["parameters_sha256"], writes
        assert metrics(jobs.folder / out) == metrics(jobs.folder / "reference"), writes
        kept = {each.name for each in manifests(location(jobs.folder / out / "checkpoints"))}
        assert {f.name.partition(".")[0] for f in (jobs.folder / out / "checkpoints").iterdir()} == kept
    assert deaths > 20


# What is damaged, or of something else


@pytest.mark.parametrize("flips", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_each_flipped_bit_is_noticed(
    jobs: Jobs, whole: dict[str, Any], caplog: pytest.LogCaptureFixture, flips: int
) -> None:
    two = SHORT | {"checkpoint": {"every_steps": 1, "keep": 2}}
    out = f"flipped {flips}"
    jobs.stopped_at(out, 3, two)
    folder, chance = jobs.folder / out, random.Random(flips)
    newest = manifests(location(folder / "checkpoints"))[0].name
    files = [*(folder / "checkpoints").glob(f"{newest}*"), folder / "metrics.jsonl"]
    before = {file: file.read_bytes() for file in (folder).rglob("*") if file.is_file()}
    for _ in range(flips):
        file = chance.choice(files)
        size = before[file].index(b'"step": 4') - 50 if file.suffix == ".jsonl" else len(before[file])
        bit = chance.randrange(8 * size)  # the line of step 4 is written again
        changed = bytearray(before[file])
        changed[bit // 8] ^= 1 << bit % 8
        for path in folder.rglob("*"):
            if path.is_file() and path not in before:
                path.unlink()
        for path, data in before.items():
            path.write_bytes(data)
        file.write_bytes(changed)
        caplog.clear()
        if file.name == "metrics.jsonl":
            with pytest.raises(DataError, match=r"metrics.jsonl is damaged"):
                jobs.run(out, two)
            continue
        again = jobs.run(out, two)
        assert "left out" in caplog.text, (file, bit)
        assert again["resumed"][-1]["step"] == 2
        assert again["parameters_sha256"] == whole["parameters_sha256"]


@pytest.mark.parametrize("damaged", ["*.solver.pt", "*.json"])
def test_where_no_checkpoint_is_whole_the_run_is_refused_and_all_is_kept(jobs: Jobs, damaged: str) -> None:
    out = f"none whole, {damaged[2:]}"
    jobs.stopped_at(out, 3, SHORT | {"checkpoint": {"every_steps": 1, "keep": 2}})
    for file in (jobs.folder / out / "checkpoints").glob(damaged):
        file.write_bytes(file.read_bytes()[:-9])
    before = {file.name for file in (jobs.folder / out / "checkpoints").iterdir()}
    with pytest.raises(SparkSGDError, match=r"has no whole checkpoint.*--if-exists overwrite"):
        jobs.run(out, SHORT)
    assert {file.name for file in (jobs.folder / out / "checkpoints").iterdir()} == before
    assert jobs.run(out, SHORT, resume="never")["steps"] == 4


def test_a_checkpoint_that_cannot_be_written_is_said_and_leaves_nothing(
    jobs: Jobs, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = LocalLocation.write_bytes

    def full(where: LocalLocation, data: bytes) -> None:
        if where.path.name.endswith((".run.pt", ".observers.pt")):
            raise OSError(28, "No space left on device", str(where))
        write(where, data)

    monkeypatch.setattr(LocalLocation, "write_bytes", full)
    summary = jobs.run("full", SHORT)
    assert summary["parameters_sha256"] == whole["parameters_sha256"]
    assert "no checkpoint can be written now, but training goes on: No space left on device" in caplog.text
    assert list((jobs.folder / "full" / "checkpoints").iterdir()) == []


def test_without_its_metrics_a_run_goes_on_and_says_so(jobs: Jobs, caplog: pytest.LogCaptureFixture) -> None:
    jobs.stopped_at("without lines", 2, SHORT)
    (jobs.folder / "without lines" / "metrics.jsonl").unlink()
    jobs.run("without lines", SHORT)
    assert "metrics.jsonl is not there: it begins after the checkpoint's step" in caplog.text
    assert [line["step"] for line in metrics(jobs.folder / "without lines")] == [3, 4, 4]


REMOVED = {
    "run.json": "resumed from step 2",
    "summary.json": "resumed from step 2",
    "model/model.json": "resumed from step 2",
    "model/weights.pt": "resumed from step 2",
    "metrics.jsonl": "metrics.jsonl is not there: it begins after",
    "checkpoints/*.json": "without a checkpoint: training anew",
    "checkpoints/*.run.pt": "has no whole checkpoint",
    "checkpoints/*.solver.pt": "has no whole checkpoint",
    "checkpoints/*.observers.pt": "has no whole checkpoint",
}
REFUSALS = ("has no whole checkpoint", "something that is not a run of this version", "is damaged")
EMPTIED = REMOVED | {
    "run.json": "something that is not a run of this version",
    "summary.json": "something that is not a run of this version",
    "metrics.jsonl": "is damaged",
    "checkpoints/*.json": "has no whole checkpoint",
}


@pytest.mark.parametrize(
    ("deed", "name", "words"),
    [("removed", *each) for each in REMOVED.items()] + [("emptied", *each) for each in EMPTIED.items()],
)
def test_a_file_that_was_removed_or_emptied_by_hand_is_named_or_written_anew(
    jobs: Jobs, whole: dict[str, Any], caplog: pytest.LogCaptureFixture, deed: str, name: str, words: str
) -> None:
    if not (jobs.folder / "by hand").exists():
        jobs.stopped_at("by hand", 2, SHORT)
    out = jobs.folder / f"{deed} {name.replace('/', ' ').replace('*', 'all')}"
    shutil.copytree(jobs.folder / "by hand", out)
    for file in out.glob(name):
        file.unlink() if deed == "removed" else file.write_bytes(b"")
    caplog.clear()
    if words in REFUSALS:
        with pytest.raises(SparkSGDError, match=rf"{re.escape(str(out))}.*{words}"):
            jobs.run(out.name, SHORT)
        return
    again = jobs.run(out.name, SHORT)
    assert words in caplog.text
    assert again["parameters_sha256"] == whole["parameters_sha256"]
    sparksgd.load_model(out / "model", trust=["torch"])
    if name != "metrics.jsonl":
        assert metrics(out) == metrics(jobs.folder / "reference")


def test_rows_that_changed_behind_the_same_file_are_refused(jobs: Jobs) -> None:
    jobs.stopped_at("other rows", 2, SHORT)
    for manifest in (jobs.folder / "other rows" / "checkpoints").glob("*.json"):
        forge(manifest, data_digest="another")
    with pytest.raises(DataError, match="the rows are not those of the run to go on with"):
        jobs.run("other rows", SHORT)


def test_an_end_before_the_checkpoint_is_refused(jobs: Jobs) -> None:
    jobs.stopped_at("too short", 3, SHORT)
    with pytest.raises(ConfigError, match=r"ask for 2 turns, but .* has made 3"):
        jobs.run("too short", SHORT, {"train": {"steps": 2}})


def test_a_round_that_was_cut_short_at_the_end_does_not_go_on(jobs: Jobs) -> None:
    kind = KINDS["local SGD"]
    jobs.run("cut short", kind, {"train": {"steps": 7}})
    with pytest.raises(ConfigError, match="the last round of local_sgd was cut short"):
        jobs.run("cut short", kind, {"train": {"steps": 9}})


def test_a_round_that_was_whole_at_the_end_goes_on(jobs: Jobs) -> None:
    whole_rounds = {"solver": {"name": "local_sgd", "turns_per_round": 2, "inner_state": "drop"}}
    jobs.run("whole rounds", whole_rounds, {"train": {"steps": 4}})
    again = jobs.run("whole rounds", whole_rounds, {"train": {"steps": 9}})
    assert again["resumed"][0]["step"] == 2
    alone = jobs.run("whole rounds at once", whole_rounds, {"train": {"steps": 9}})
    assert again["parameters_sha256"] == alone["parameters_sha256"]


def forge(manifest: Path, **changes: Any) -> None:
    """Change a manifest, with a digest that fits."""
    from sparksgd.runs.checkpoints import _digest

    values = json.loads(manifest.read_text()) | changes
    manifest.write_text(json.dumps(values | {"sha256": _digest(values)}))


# In Python


def test_a_run_in_python_goes_on_where_it_is_told_to(jobs: Jobs, tmp_path: Path) -> None:
    config, rows = jobs.config(KINDS["heads that steps leave out"]), str(jobs.folder / "rows.parquet")

    class Stops(Observer):
        def stepped(self, training: Training, report: Any) -> None:
            if report.step == 7:
                raise KeyboardInterrupt

    def module() -> torch.nn.Module:
        torch.manual_seed(1)
        return TwoHeads()

    whole = sparksgd.train(config, rows, rows, module=module())
    with pytest.raises(KeyboardInterrupt):
        sparksgd.train(config, rows, rows, module=module(), out=tmp_path, observers=[Stops()])
    again = sparksgd.train(config, rows, rows, module=module(), out=tmp_path, resume_from=tmp_path)
    assert again.resumed[0].step == 5
    assert again.flat.parameters_sha256() == whole.flat.parameters_sha256()
    assert [report.step for report in again.evaluations] == [report.step for report in whole.evaluations]
    with pytest.raises(ModelError, match="is of another module: the module was TwoHeads, but is Linear"):
        sparksgd.train(config, rows, module=torch.nn.Linear(4, 2), out=tmp_path / "b", resume_from=tmp_path)
    with pytest.raises(ConfigError, match=r"resume_from is .*, but out is None"):
        sparksgd.train(config, rows, module=module(), resume_from=tmp_path)


def test_many_runs_have_their_checkpoints_in_one_folder(jobs: Jobs, tmp_path: Path) -> None:
    rows = str(jobs.folder / "rows.parquet")
    made: list[Training] = []
    for lr in (0.01, 0.02, 0.01):
        config = jobs.config({"optimizer": {"name": "Adam", "lr": lr}}, {"train": {"epochs": 1}})
        made.append(sparksgd.train(config, rows, checkpoint_dir=tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    assert [bool(training.resumed) for training in made] == [False, False, True]
    digests = [training.flat.parameters_sha256() for training in made]
    assert digests[0] == digests[2] != digests[1]


def test_other_modules_have_checkpoints_of_their_own(jobs: Jobs, tmp_path: Path) -> None:
    rows, config = str(jobs.folder / "rows.parquet"), jobs.config({"train": {"epochs": 1}})

    def train(seed: int = 1, dropout: float = 0.1, frozen: float = 1.0, **where: Any) -> Training:
        torch.manual_seed(seed)
        module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(dropout), torch.nn.Linear(4, 2))
        module[0].bias.requires_grad_(False).fill_(frozen)
        return sparksgd.train(config, rows, module=module, **where)

    kinds: list[dict[str, Any]] = [{}, {"seed": 2}, {"dropout": 0.5}, {"frozen": 5.0}]
    for kind in [*kinds, {}]:
        found, alone = train(**kind, checkpoint_dir=tmp_path / "many"), train(**kind)
        assert found.flat.parameters_sha256() == alone.flat.parameters_sha256()
    assert len(list((tmp_path / "many").iterdir())) == len(kinds)
    train(out=tmp_path / "one")
    assert train(
        seed=2, out=tmp_path / "two", resume_from=tmp_path / "one"
    ).resumed  # its weights are replaced
    for kind in kinds[2:]:
        with pytest.raises(ModelError, match="is of another module: a number or a text that it keeps"):
            train(**kind, out=tmp_path / "three", resume_from=tmp_path / "one")


def test_other_test_rows_are_evaluated_where_no_step_is_left(jobs: Jobs, tmp_path: Path) -> None:
    rows, config = str(jobs.folder / "rows.parquet"), jobs.config({"train": {"epochs": 1}})
    others = str(tmp_path / "others.parquet")
    pq.write_table(pq.read_table(rows).slice(10, 40), others)
    first = sparksgd.train(config, rows, rows, checkpoint_dir=tmp_path / "c")
    again = sparksgd.train(config, rows, others, checkpoint_dir=tmp_path / "c")
    assert ([e.rows for e in first.evaluations], [e.rows for e in again.evaluations]) == ([100], [40])
    assert len(again.step_times) == 0


def test_local_sgd_that_keeps_the_states_of_shards_has_no_checkpoints_and_says_so(
    jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    keeps = {"solver": {"name": "local_sgd", "turns_per_round": 3, "inner_state": "keep"}}
    jobs.run("keeps", EVERY_STEP, keeps, {"optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9}})
    assert "this run has no checkpoints, and cannot go on if it is killed: its shards keep" in caplog.text
    assert not (jobs.folder / "keeps" / "checkpoints").exists()


def test_an_observer_remembers(jobs: Jobs, tmp_path: Path) -> None:
    rows = str(jobs.folder / "rows.parquet")

    class Counts(Observer):
        def __init__(self) -> None:
            self.steps, self.best = 0, np.float32(9)

        def memory(self) -> dict[str, Any]:
            return {"steps": self.steps, "best": self.best}

        def recall(self, memory: dict[str, Any]) -> None:
            self.steps, self.best = memory["steps"], memory["best"]

        def stepped(self, training: Training, report: Any) -> None:
            self.steps, self.best = self.steps + 1, min(self.best, np.float32(report.loss))

    for epochs, steps in ((1, 5), (2, 10)):
        counts, config = Counts(), jobs.config({"train": {"epochs": epochs}})
        sparksgd.train(config, rows, checkpoint_dir=tmp_path, observers=[counts])
        assert counts.steps == steps
        assert type(counts.best) is np.float32


# Nobody gets in


class Evil:
    def __reduce__(self) -> Any:
        return print, ("somebody got in",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Evil()),
        b"cos\nsystem\n(S'echo somebody got in'\ntR.",
        b"\x80\x04\x8c\x0fresumed_modules\x8c\x0dtorch.os.exit\x93)R.",
        b"cresumed_modules\ntorch\n.",
        b"csubprocess\nPopen\n(S'true'\ntR.",
        b"ctorch.hub\nload\n(S'a'\ntR.",
        b"cbuiltins\ngetattr\n.",
        b"ctorch\nload\n(S'/dev/zero'\ntR.",
        b"cresumed_modules\nwith_norm\n(tR.",
        b"cnumpy.f2py.__main__\nmain\n.",
        b"ctorch.fx._lazy_graph_module\n_LazyGraphModule\n.",
        b"ctorch.nn\nIdentity\n(tR.",
        b"csparksgd.arithmetic.reductions\n_set_module_state\n.",
        b"csparksgd.arithmetic.reductions\n_set_tensor_state\n(ctorch\nTensor\n((dS'x'\nI1\ns(lttR.",
    ],
    ids=[
        "builtin",
        "os",
        "through a module of the package",
        "a module",
        "Popen",
        "torch.hub",
        "getattr",
        "load",
        "a function of the package",
        "an import that runs",
        "a module that runs its source",
        "a module of torch",
        "what calls __setstate__",
        "attributes of a class",
    ],
)
def test_what_an_own_optimiser_kept_runs_nothing(
    jobs: Jobs, tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    kind = KINDS["optimiser and schedule of one's own"]
    if not (jobs.folder / "attacked").exists():
        jobs.stopped_at("attacked", 3, SHORT, kind)
    out = f"attacked by {len(content)} {hash(content)}"
    names = [each.name for each in manifests(location(jobs.folder / "attacked" / "checkpoints"))]
    copied_until(jobs.folder / "attacked", jobs.folder / out, names)
    replace_attributes(jobs.folder / out / "checkpoints", content)
    with pytest.raises(SparkSGDError, match=r"neither plain nor a class of|does not fit this run"):
        jobs.run(out, SHORT, kind)
    assert "somebody got in" not in "".join(capfd.readouterr())


def replace_attributes(checkpoints: Path, content: bytes) -> None:
    """Let the newest checkpoint have another pickle where the optimiser's is, with digests that fit."""
    import hashlib

    (manifest,) = checkpoints.glob("*.json")
    part = next(checkpoints.glob("*.solver.pt"))
    values = torch.load(part, weights_only=True)
    values["rest"]["optimizer"]["attributes"]["raw"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    torch.save(values, part)
    parts = json.loads(manifest.read_text())["parts"]
    data = part.read_bytes()
    parts["solver"] |= {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge(manifest, parts=parts)


def test_a_state_that_cannot_be_read_again_is_said_at_the_first_checkpoint(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sparksgd.solvers.synchronous import SynchronousSolver

    state = SynchronousSolver.state

    def strange(self: SynchronousSolver) -> Any:
        found = state(self)
        found.rest["optimizer"]["path"] = Path("/")  # type: ignore[index]  # as an optimiser of torch's might
        return found

    monkeypatch.setattr(SynchronousSolver, "state", strange)
    assert jobs.run("unreadable", EVERY_STEP)["status"] == "finished"
    assert caplog.text.count("this run has no checkpoints, and cannot go on if it is killed: ") == 1
    assert list((jobs.folder / "unreadable" / "checkpoints").glob("*.json")) == []


def test_a_state_that_cannot_be_carried_any_more_is_said_and_training_goes_on(
    jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    kind = {"optimizer": {"name": "carried_kinds:MadeInStep", "lr": 0.01}}
    whole = jobs.run("carried no more", EVERY_STEP, kind)
    assert (
        "this run has no checkpoint from now on, and goes on from the last one: the optimiser" in caplog.text
    )
    kept = [each.step for each in manifests(location(jobs.folder / "carried no more" / "checkpoints"))]
    assert (whole["steps"], max(kept)) == (10, carried_kinds.LATE - 1)


def test_an_object_of_another_package_is_named_at_the_first_checkpoint(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kind = {"optimizer": {"name": "resumed_modules:Foreign", "lr": 0.01}}
    jobs.run("foreign", SHORT, kind)
    assert "it names string.Template, which is neither plain nor a class of resumed_modules" in caplog.text
    assert "SPARKSGD_TRUST" in caplog.text
    monkeypatch.setenv("SPARKSGD_TRUST", "string")
    jobs.stopped_at("trusted", 2, SHORT, kind)
    assert jobs.run("trusted", SHORT, kind)["resumed"][0]["step"] == 2


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, "sparksgd"):
        yield
