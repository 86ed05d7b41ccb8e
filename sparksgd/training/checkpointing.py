"""When checkpoints are taken during a run, and how they are written behind it.

A checkpoint is copied between two steps, and written by another thread while the next steps are made.  The
first one is read back before it counts, and goes through all that a resume refuses, so that a run which
could not go on says so early.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from errno import EIO
from typing import Any, Protocol

import numpy as np
import torch

from sparksgd.arithmetic.believed import NotBelieved
from sparksgd.config import CheckpointConfig, Config
from sparksgd.engines.protocol import ShardStates
from sparksgd.errors import ClusterError, ConfigError, ModelError, SparkSGDError, TrainingError
from sparksgd.solvers.protocol import CentralSolver
from sparksgd.training.checkpoint import Checkpoint, RunIdentity, Start, taken
from sparksgd.training.own_state import check_own_state
from sparksgd.training.state import Observer, Training

__all__ = ["SHARE", "CheckpointStore", "Checkpointing"]

log = logging.getLogger("sparksgd")

SHARE = 0.03
"""Checkpoints take this part of the time at most."""

_SHARE_OF_OWED = SHARE / 2
"""This part of the time at most is for copies at best evaluations that cannot be written at once.  The next
pause is longer for them, and still comes to an end."""

_SHARE_OF_FAILED = 0.1
"""So much may those take that could not be written; else there would be none for long after an outage."""


class CheckpointStore(Protocol):
    """Writes the checkpoints of a run, and reads them."""

    def begin(self, run: RunIdentity) -> Start | None:
        """Return the checkpoint that a run goes on from; None: it begins anew.

        Args:
            run: what must be the same.

        Raises:
            ConfigError, DataError: it may not go on from that.
        """
        ...

    def write(self, checkpoint: Checkpoint) -> str:
        """Write a checkpoint, and remove those that are not kept; return its name.

        Raises:
            OSError: it cannot be written now.
        """
        ...

    def read(self, name: str) -> Checkpoint:
        """Read a checkpoint as a later run would.

        Raises:
            DataError: it is not whole.
        """
        ...

    def remove(self, name: str) -> None:
        """Remove a checkpoint."""
        ...

    def stopped(self, parameters: str | None) -> None:
        """Note how the run has left a module that was given in Python.

        Args:
            parameters: digest of those of the module; None: the run is finished.
        """
        ...


class Checkpointing:
    """Takes checkpoints of a run when they are due.

    Args:
        config: when they are due.
        store: where they go.
        turns_per_epoch: turns of one pass over the rows.
        check: raises what a resume would raise, if it could not go on from a checkpoint.
        shards: returns what shards keep, see `Engine.shard_states`.
        clock: returns seconds.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        store: CheckpointStore,
        turns_per_epoch: int,
        check: Callable[[Checkpoint], None],
        shards: Callable[[], ShardStates | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._store, self._check, self._clock = config, store, check, clock
        self._shards = shards
        every_epochs = None if config.every_epochs is None else config.every_epochs * turns_per_epoch
        self._every_turns = [every for every in (config.every_steps, every_epochs) if every is not None]
        self._behind = ThreadPoolExecutor(1, "sparksgd-checkpoint")
        self._writing: Future[float] | None = None
        self._writing_step = 0
        self._copied_s = 0.0  # how long the copy of the one that is written took
        self._ended_s = self._clock()  # of the last one
        self._took_s = self._least_pause_s = 0.0  # the pause keeps the share
        self._usual_s = math.inf
        self._last_step: int | None = None
        self._owed: tuple[Checkpoint, Config] | None = None  # of the best evaluation, to be written later
        self._owed_s = 0.0  # what copies for it took since the last pause began
        self._copy_s, self._copy_ended_s = 0.0, self._ended_s  # of the last copy
        self._best: tuple[int, float] | None = None  # step and loss, of the evaluations of this process
        self._has_best = False  # whether its checkpoint is written
        self._offered_turns: int | None = None
        self._has_said = self._is_tried = self._is_off = False

    def next_turn(self, turns: int) -> int | None:
        """Return the turn, after these, at whose end one is due; None: no turn is named."""
        return min(((turns // every + 1) * every for every in self._every_turns), default=None)

    def offer(self, training: Training, solver: CentralSolver, observers: Sequence[Observer]) -> None:
        """Take a checkpoint if one is due.

        Raises:
            ClusterError: the place belongs to another run now.
        """
        before, self._offered_turns = self._offered_turns, solver.turns
        passed = solver.turns - 1 if before is None else before  # steps of arrivals may pass several turns
        is_named = any(solver.turns // every > passed // every for every in self._every_turns)
        self._collect(wait=False)
        if self._is_off:
            return
        is_best, is_writing = self._note_best(training, solver), self._writing is not None
        is_due = is_named or self._clock() - self._ended_s >= self._config.every_s
        if is_writing or self._clock() - self._ended_s < self._least_pause_s:
            # While the first one is read back, a third copy would be more memory than is said beforehand.
            if is_best and (self._is_tried or not is_writing):
                self._owe(training, solver, observers)
            if not is_writing and is_due and (is_named or self._least_pause_s > self._config.every_s):
                self._say_seldom()
        elif is_best:
            self._take(training, solver, observers)
        elif self._owed is not None:
            self._write_owed()
        elif is_due:
            self._take(training, solver, observers)

    def end(self, training: Training, solver: CentralSolver, observers: Sequence[Observer]) -> None:
        """Take a last checkpoint, where the run stands now, and wait until it is written."""
        self._note_best(training, solver)
        self._settle()
        if solver.version != self._last_step and not self._is_off:
            self._take(training, solver, observers)
            self._collect(wait=True)
        if training.error is not None and self._last_step is not None and not self._is_off:
            log.info("a later run can go on from step %d", self._last_step)
        self._tell_of_best()

    def close(self) -> None:
        """Wait for what is being written."""
        with ExitStack() as stack:
            stack.callback(self._behind.shutdown)
            self._settle()
            self._tell_of_best()

    def _settle(self) -> None:
        """Wait for what is being written, and write what is owed."""
        self._collect(wait=True)
        if self._owed is not None and not self._is_off:
            self._write_owed()
            self._collect(wait=True)

    def _note_best(self, training: Training, solver: CentralSolver) -> bool:
        """Return whether these weights have the smallest test loss so far."""
        if not training.is_evaluated:
            return False
        *earlier, loss = (report.loss for report in training.evaluations)
        is_best = loss < min((one for one in earlier if not math.isnan(one)), default=math.inf)
        if is_best and (self._best is None or self._best[0] != solver.version):
            self._best, self._has_best = (solver.version, loss), False
        return is_best

    def _owe(self, training: Training, solver: CentralSolver, observers: Sequence[Observer]) -> None:
        """Copy the state of the best evaluation, to be written as soon as one may be, if that is cheap."""
        if self._copy_s > _SHARE_OF_OWED * (self._clock() - self._copy_ended_s):
            return
        checkpoint = self._copied(training, solver, observers)
        self._owed_s += self._copy_s
        if checkpoint is not None:
            self._owed = checkpoint, training.config

    def _write_owed(self) -> None:
        assert self._owed is not None
        (checkpoint, config), self._owed = self._owed, None
        self._begin(checkpoint, config, 0.0)

    def _tell_of_best(self) -> None:
        """Say once that the best evaluation has no checkpoint."""
        if self._best is not None and not self._has_best and not self._is_off:
            log.warning(
                "the smallest test loss, %.6g after step %d, has no checkpoint: none could be taken then "
                "(they may take %.0f %% of the time); kept is the best one of those that were written",
                self._best[1],
                self._best[0],
                100 * SHARE,
            )
        self._best = None

    def _take(self, training: Training, solver: CentralSolver, observers: Sequence[Observer]) -> None:
        checkpoint = self._copied(training, solver, observers)
        if checkpoint is not None:
            self._owed = None  # this one is newer, and better where it is of an evaluation
            self._begin(checkpoint, training.config, self._copy_s)

    def _copied(
        self, training: Training, solver: CentralSolver, observers: Sequence[Observer]
    ) -> Checkpoint | None:
        began_s = self._clock()
        checkpoint = None
        try:
            if (states := self._shards()) is not None:
                checkpoint = taken(training, solver, observers, states)
        except ConfigError as error:  # an own optimiser keeps what no other process could have
            self._give_up(error)
        except OSError as error:  # an observer could not bring its files up to this step
            self._try_later(error, self._clock() - began_s)
        self._copy_ended_s = self._clock()
        self._copy_s = self._copy_ended_s - began_s
        return checkpoint

    def _begin(self, checkpoint: Checkpoint, config: Config, copied_s: float) -> None:
        self._copied_s, self._last_step, self._writing_step = copied_s, checkpoint.step, checkpoint.step
        self._writing = self._behind.submit(self._write, checkpoint, config)

    def _write(self, checkpoint: Checkpoint, config: Config) -> float:
        """Write a checkpoint; return how long that took, without what is done for the first one alone."""
        began_s = self._clock()
        try:
            check_own_state({name: part.values for name, part in checkpoint.parts.items()}, config)
        except NotBelieved as error:
            raise TrainingError(
                f"the checkpoint of step {checkpoint.step} could not be read again: {error}; let it keep "
                f"numbers, texts and tensors alone, or name the package in SPARKSGD_TRUST"
            ) from error
        name = self._store.write(checkpoint)
        took_s = self._clock() - began_s
        if not self._is_tried:
            self._read_back(name, checkpoint)
            self._is_tried = True
        return took_s

    def _read_back(self, name: str, checkpoint: Checkpoint) -> None:
        """Read the first checkpoint as a later run would.

        Raises:
            TrainingError: no run could go on from it.
            OSError: it cannot be read now.
        """
        try:
            again = self._store.read(name)
        except SparkSGDError as error:
            with suppress(OSError):
                self._store.remove(name)
            said = f"the checkpoint of step {checkpoint.step} was not read again: {error}"
            if isinstance(error, ClusterError) or isinstance(error.__cause__, OSError):
                raise OSError(EIO, said) from error
            raise TrainingError(said) from error
        said = f"the checkpoint of step {checkpoint.step}"
        different = _difference(checkpoint, again)
        if different is not None:
            self._store.remove(name)
            raise TrainingError(f"{said} was read again with another {different}")
        try:
            self._check(again)
        except SparkSGDError as error:
            self._store.remove(name)
            raise TrainingError(f"{said} was read again, but no run could go on from it: {error}") from error

    def _collect(self, *, wait: bool) -> None:
        """Look how the writing ended, if it did."""
        writing = self._writing
        if writing is None or not (wait or writing.done()):
            return
        self._writing = None
        try:
            took_s = self._copied_s + writing.result()
        except (ModelError, TrainingError) as error:
            self._give_up(error)
            return
        except OSError as error:
            self._try_later(error, self._copied_s)
            return
        usual_s, self._usual_s = min(took_s, self._usual_s), took_s  # one alone that took long met an outage
        self._pause(usual_s + self._owed_s, SHARE)
        self._owed_s = 0.0
        self._has_best |= self._best is not None and self._best[0] == self._writing_step

    def _try_later(self, error: OSError, took_s: float) -> None:
        log.warning("no checkpoint can be written now, but training goes on: %s", error.strerror or error)
        self._last_step = None
        self._pause(took_s, _SHARE_OF_FAILED)

    def _pause(self, took_s: float, share: float) -> None:
        """Begin to wait for the next one; what took so long must keep its share of the time."""
        self._ended_s = self._clock()
        self._took_s, self._least_pause_s = took_s, took_s * (1 / share - 1)

    def _give_up(self, error: SparkSGDError) -> None:
        self._is_off = True
        if not self._is_tried:
            log.warning("this run has no checkpoints, and cannot go on if it is killed: %s", error)
        else:
            log.warning("this run has no checkpoint from now on, and goes on from the last one: %s", error)

    def _say_seldom(self) -> None:
        """Say once that checkpoints are written less often than they are asked for."""
        if not self._has_said:
            self._has_said = True
            log.warning(
                "a checkpoint takes %.1f s, and all of them may take %.0f %% of the time: so there is "
                "one every %.0f s, less often than [checkpoint] asks for",
                self._took_s,
                100 * SHARE,
                self._took_s / SHARE,
            )


def _difference(one: Checkpoint, other: Checkpoint) -> str | None:
    """Return the path of the first value that two checkpoints have not both; None: they are equal."""
    if (one.step, one.turns, one.parts.keys()) != (other.step, other.turns, other.parts.keys()):
        return "step"
    for name, part in one.parts.items():
        if part.version != other.parts[name].version:
            return f"version of {name}"
        found = _different(part.values, other.parts[name].values, name)
        if found is not None:
            return found
    return None


def _different(one: Any, other: Any, path: str) -> str | None:
    if type(one) is not type(other):
        return path
    if isinstance(one, dict):
        if list(one) != list(other):
            return path
        pairs = ((one[key], other[key], f"{path}.{key}") for key in one)
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            return path
        pairs = (
            (mine, theirs, f"{path}[{i}]") for i, (mine, theirs) in enumerate(zip(one, other, strict=True))
        )
    elif isinstance(one, torch.Tensor):
        same = (one.dtype, one.shape) == (other.dtype, other.shape) and _bytes(one) == _bytes(other)
        return None if same else path
    else:
        return None if one == other or one != one else path
    return next((found for pair in pairs if (found := _different(*pair)) is not None), None)


def _bytes(tensor: torch.Tensor) -> bytes:
    dense = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    return np.ascontiguousarray(dense.contiguous().view(-1).view(torch.uint8).numpy()).tobytes()
