"""A run that was interrupted or killed, at whatever moment, goes on and loses nothing."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_jobs import EVERY_STEP, SHORT, Jobs, metrics, must_resume_from, resumed_from

from sparksgd.engines.inline import InlineEngine
from sparksgd.runs.checkpoints import manifests
from sparksgd.storage import LocalLocation, location
from sparksgd.training.checkpointing import Checkpointing

pytestmark = pytest.mark.usefixtures("every_checkpoint", "log")


def uninterrupted(jobs: Jobs) -> list[dict[str, Any]]:
    """Return the metrics of the run that nobody interrupts; made once in a process."""
    out = jobs.folder / "never interrupted"
    if not out.exists():
        jobs.run(out.name)
    return metrics(out)


# Interrupted


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


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.soak)])
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


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.soak)])
def test_a_run_that_is_killed_at_any_write_goes_on(jobs: Jobs, whole: dict[str, Any], stride: int) -> None:
    deaths, resumed = 0, 0
    for writes in range(0, 1000, stride):
        out, disk = f"killed at {writes} of each {stride}", Disk(writes)
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
        step = must_resume_from(jobs.folder / out)
        again = jobs.run(out, SHORT)
        assert step is None or resumed_from(again) == step, writes
        resumed += step is not None
        assert again["parameters_sha256"] == whole["parameters_sha256"], writes
        assert metrics(jobs.folder / out) == metrics(jobs.folder / "reference"), writes
        kept = {each.name for each in manifests(location(jobs.folder / out / "checkpoints"))}
        assert {f.name.partition(".")[0] for f in (jobs.folder / out / "checkpoints").iterdir()} == kept
    assert deaths > 20 / stride
    assert resumed > deaths / 2


# Power that is lost


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
