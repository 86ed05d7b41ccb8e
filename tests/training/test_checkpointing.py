"""Checkpoints are taken when they are due, and take a small part of the time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from at_once import written_at_once

from sparksgd.config import CheckpointConfig
from sparksgd.errors import ConfigError, DataError
from sparksgd.training import checkpointing
from sparksgd.training.checkpoint import Checkpoint
from sparksgd.training.checkpointing import SHARE, Checkpointing


class Run:
    """A run of steps that take a second each, and whose checkpoints take some seconds to be written."""

    def __init__(self, writing_s: float, config: CheckpointConfig, epoch: int = 1000) -> None:
        self.now_s, self.written, self.fails, self.waits_s = 0.0, [], None, 0.0
        self.refused, self.copying_s, self.copies = "", 0.0, 0
        self._writing_s, self._checkpoints = writing_s, {}
        self.solver = SimpleNamespace(turns=0, version=0, run=self)
        self.training = SimpleNamespace(evaluations=[], is_evaluated=False, config=None, error=None)
        self.shards: Any = {}
        self.keeper = Checkpointing(
            config, self, epoch, self.check, lambda: self.shards, clock=lambda: self.now_s
        )

    def write(self, checkpoint: Checkpoint) -> str:
        self.now_s += self._writing_s
        self.fail("written")
        self.written.append(checkpoint.step)
        self._checkpoints[str(checkpoint.step)] = checkpoint
        return str(checkpoint.step)

    def fail(self, when: str) -> None:
        if self.fails == when:
            self.now_s += self.waits_s
            raise OSError(28, "No space left on device")

    def read(self, name: str) -> Checkpoint:
        return self._checkpoints[name]

    def check(self, checkpoint: Checkpoint) -> None:
        if self.refused:
            raise DataError(self.refused)

    def remove(self, name: str) -> None:
        del self._checkpoints[name]

    def make(self, steps: int) -> None:
        for _ in range(steps):
            self.now_s += 1
            self.solver.turns = self.solver.version = self.solver.turns + 1
            self.keeper.offer(self.training, self.solver, ())

    def evaluated(self, loss: float) -> None:
        self.training.evaluations.append(SimpleNamespace(loss=loss))
        self.training.is_evaluated = True
        self.make(1)
        self.training.is_evaluated = False


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def taken(training: Any, solver: Any, observers: Any, shards: Any) -> Checkpoint:
        solver.run.copies += 1
        solver.run.now_s += solver.run.copying_s
        solver.run.fail("copied")
        return Checkpoint(step=solver.version, turns=solver.turns, parts={})

    monkeypatch.setattr(checkpointing, "taken", taken)
    monkeypatch.setattr(checkpointing, "check_own_state", lambda kept, config: None)
    with written_at_once():
        yield


def test_one_is_taken_every_so_many_seconds():
    run = Run(0.0, CheckpointConfig(every_s=10))
    run.make(35)
    assert run.written == [10, 21, 32], "they count from the step that finds the last one written"


def test_one_is_taken_at_the_steps_that_are_named():
    run = Run(0.0, CheckpointConfig(every_s=1e6, every_steps=4, every_epochs=1), epoch=10)
    assert [run.keeper.next_turn(turns) for turns in (0, 3, 4, 8, 10)] == [4, 4, 8, 10, 12]
    run.make(21)
    assert run.written == [4, 8, 10, 12, 16, 20]


@pytest.mark.parametrize("writing_s", [0.5, 2.0, 7.0])
def test_they_take_their_share_of_the_time_at_most(writing_s: float, caplog: pytest.LogCaptureFixture):
    run = Run(writing_s, CheckpointConfig(every_s=1e6, every_steps=1))
    with caplog.at_level(logging.WARNING, "sparksgd"):
        run.make(2000)
    assert len(run.written) > 2
    pauses = [after - before for before, after in zip(run.written, run.written[1:], strict=False)]
    assert all(writing_s <= SHARE * (pause + writing_s) for pause in pauses)
    assert max(pauses) <= writing_s / SHARE + 2, "they are taken as often as their share allows"
    said = [record for record in caplog.records if "less often" in record.getMessage()]
    assert len(said) == 1, "it is said once"


def test_one_is_taken_where_the_evaluation_was_the_best():
    run = Run(0.0, CheckpointConfig(every_s=1e6))
    for loss in (3.0, 2.0, 2.5, 1.0):
        run.make(2)
        run.evaluated(loss)
    assert run.written == [3, 6, 12]


@pytest.mark.parametrize("when", ["copied", "written"])
def test_training_goes_on_when_none_can_be_written_and_the_next_is_tried(
    when: str, caplog: pytest.LogCaptureFixture
):
    run = Run(0.0, CheckpointConfig(every_s=1e6, every_steps=5))
    run.fails = when
    with caplog.at_level(logging.WARNING, "sparksgd"):
        run.make(6)
    assert "no checkpoint can be written now, but training goes on: No space left" in caplog.text
    run.fails = None
    run.make(6)
    assert run.written == [10]


def test_after_an_outage_that_was_waited_for_the_next_is_tried_within_minutes():
    run = Run(0.0, CheckpointConfig(every_s=60))
    run.fails, run.waits_s = "copied", 90.0
    run.make(60)
    run.fails = None
    run.make(1000)
    assert run.written[0] == 60 + 9 * 90, "nine times as long, not 32 times"


def test_one_that_met_an_outage_makes_the_next_no_rarer():
    run = Run(0.1, CheckpointConfig(every_s=60))
    run.make(70)
    run._writing_s = 40.0  # its file system was waited for
    run.make(60)
    run._writing_s = 0.1
    run.make(200)
    pauses = [after - before for before, after in zip(run.written, run.written[1:], strict=False)]
    assert max(pauses) < 65 < 40 / SHARE


@pytest.mark.parametrize("when", ["copied", "written"])
def test_a_finished_run_whose_last_one_cannot_be_written_ends_well(
    when: str, caplog: pytest.LogCaptureFixture
):
    run = Run(0.0, CheckpointConfig(every_s=1e6, every_steps=5))
    run.make(7)
    run.fails = when
    run.keeper.end(run.training, run.solver, ())
    assert run.written == [5]
    assert "no checkpoint can be written now" in caplog.text


def test_steps_are_made_while_one_is_written():
    run, may_write = Run(0.0, CheckpointConfig(every_s=1e6, every_steps=5)), threading.Event()
    write = run.write

    def wait_and_write(checkpoint: Checkpoint) -> str:
        may_write.wait()
        return write(checkpoint)

    run.write = wait_and_write
    with ThreadPoolExecutor(1) as behind:
        run.keeper._behind = behind
        run.make(12)  # the one that is due at step 10 is left out
        assert run.written == []
        may_write.set()
        run.keeper.close()
        assert run.written == [5]


def test_the_last_step_has_one_and_not_two():
    run = Run(0.0, CheckpointConfig(every_s=1e6, every_steps=5))
    run.make(7)
    run.keeper.end(run.training, run.solver, ())
    run.keeper.end(run.training, run.solver, ())
    assert run.written == [5, 7]


def test_a_first_one_that_is_read_with_other_values_is_the_last(caplog: pytest.LogCaptureFixture):
    run = Run(0.0, CheckpointConfig(every_s=1e6, every_steps=5))
    run.read = lambda name: Checkpoint(step=4, turns=4, parts={})
    with caplog.at_level(logging.WARNING, "sparksgd"):
        run.make(12)
    assert run.written == [5]
    assert not run._checkpoints, "it does not stay"
    assert "was read again with another step" in caplog.text


def test_a_first_one_that_a_resume_would_refuse_is_the_last(caplog: pytest.LogCaptureFixture):
    run = Run(0.0, CheckpointConfig(every_s=1e6, every_steps=5))
    run.refused = "run.deal is -1, but must be a whole number from 0 to 5"
    with caplog.at_level(logging.WARNING, "sparksgd"):
        run.make(12)
    assert (run.written, run._checkpoints) == ([5], {}), "it does not stay"
    assert "this run has no checkpoints, and cannot go on if it is killed" in caplog.text
    assert "no run could go on from it: run.deal is -1" in caplog.text


def ended(run: Run) -> None:
    run.keeper.end(run.training, run.solver, ())


def test_the_best_one_is_written_as_soon_as_the_pause_is_over(caplog: pytest.LogCaptureFixture):
    run = Run(2.0, CheckpointConfig(every_s=1e6))
    run.evaluated(3.0)
    for loss in (2.5, 1.0, 1.5):
        run.make(5)
        run.evaluated(loss)
    assert run.written == [1]
    run.make(100)
    assert run.written == [1, 13]
    ended(run)
    assert run.written == [1, 13, 119]
    assert "has no checkpoint" not in caplog.text


@pytest.mark.parametrize(("is_ended", "written"), [(True, [1, 7, 10]), (False, [1, 7])])
def test_the_best_one_of_a_short_run_is_written_at_its_end(is_ended: bool, written: list[int]):
    run = Run(2.0, CheckpointConfig(every_s=1e6))
    run.evaluated(3.0)
    run.make(5)
    run.evaluated(1.0)
    run.make(3)
    if is_ended:
        ended(run)
    run.keeper.close()
    assert run.written == written


def test_a_best_evaluation_that_could_not_be_copied_cheaply_is_told(caplog: pytest.LogCaptureFixture):
    run = Run(2.0, CheckpointConfig(every_s=1e6))
    run.copying_s = 1.0
    run.evaluated(3.0)
    run.make(5)
    run.evaluated(1.25)
    run.make(3)
    with caplog.at_level(logging.WARNING, "sparksgd"):
        ended(run)
        run.keeper.close()
    assert run.written == [1, 10]
    assert caplog.text.count("the smallest test loss, 1.25 after step 7, has no checkpoint") == 1


def test_with_copies_for_the_best_they_take_their_share_of_the_time_at_most():
    run = Run(1.0, CheckpointConfig(every_s=1e6))
    run.copying_s = 0.1
    for step in range(3000):
        run.evaluated(1 / (1 + step))
    assert len(run.written) > 30
    assert run.copies > 2 * len(run.written)
    assert len(run.written) * 1.0 + run.copies * 0.1 <= 1.05 * SHARE * run.now_s


def test_an_evaluation_that_is_no_number_is_not_the_best():
    run = Run(0.0, CheckpointConfig(every_s=1e6))
    for loss in (float("nan"), 2.0, float("nan"), 1.0):
        run.evaluated(loss)
    assert run.written == [2, 4]


def test_shards_that_a_checkpoint_cannot_hold_end_the_checkpoints_and_not_the_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = Run(0.0, CheckpointConfig(every_s=10))

    def refuse() -> None:
        raise ConfigError("the optimiser keeps a lock")

    run.make(12)
    run.keeper._shards = refuse
    run.make(12)
    assert run.written == [10]
    assert "this run has no checkpoint from now on, and goes on from the last one" in caplog.text


def test_a_step_that_was_cut_off_has_no_checkpoint() -> None:
    run = Run(0.0, CheckpointConfig(every_s=10))
    run.make(12)
    run.shards = None
    run.make(12)
    run.keeper.end(run.training, run.solver, ())
    assert run.written == [10]
