"""The state of a run, its reports, and its observers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparksgd.arithmetic.flat import FlatModule, Weights
from sparksgd.arithmetic.numerics import Numerics
from sparksgd.config import Config
from sparksgd.data.row_report import RowReport
from sparksgd.engines.compute import Plan
from sparksgd.engines.protocol import Recovery, StepReport
from sparksgd.errors import ConfigError
from sparksgd.imports import shown
from sparksgd.models.outputs import Output
from sparksgd.solvers.protocol import Need
from sparksgd.training.participation import Participation
from sparksgd.training.rebuilding import Sample
from sparksgd.training.start_up import StartUp
from sparksgd.training.step_times import StepTimes
from sparksgd.training.unreplaced import Unreplaced

__all__ = [
    "NO_PROBE",
    "NO_RESULTS",
    "EvaluationReport",
    "NumericsChange",
    "Observer",
    "Probe",
    "Resumed",
    "Training",
]


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """The results of the module on the test rows, after a step."""

    step: int
    turn: int
    epoch: int
    loss: float
    accuracy: float | None
    rows: int
    time_s: float

    metrics: Mapping[str, float] = field(default_factory=dict)
    """What else was asked for, by name."""

    def named(self) -> dict[str, float | None]:
        """Return all results by the names that files and tables have."""
        found = {"loss": self.loss, "accuracy": self.accuracy, **self.metrics}
        return {f"test_{name}": value for name, value in found.items()}


NO_RESULTS: Mapping[str, None] = {"test_loss": None, "test_accuracy": None}
"""The results of a run, or a part of it, that was not evaluated; see `EvaluationReport.named`."""


@dataclass(frozen=True, kw_only=True)
class NumericsChange:
    """A change of arithmetic: another executor took a worker's place, or a run went on elsewhere."""

    step: int

    worker: int | None
    """None: the driver."""

    numerics: Numerics


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A point at which a run went on in another process."""

    step: int
    """Of the checkpoint."""

    lost_steps: int
    """Steps that had been made after it, and were made again."""

    written_at: str
    """When the checkpoint was written, in ISO 8601."""


@dataclass(kw_only=True, repr=False)
class Training:
    """A run, and how far it is."""

    config: Config
    """The configuration."""

    module: nn.Module
    """The module; the solver owns its parameters."""

    model_name: str | None
    """The name that rebuilds the module; None if the module was given in Python."""

    flat: FlatModule
    """The module as vectors."""

    plan: Plan
    """The plan that the workers follow."""

    rows: RowReport
    """The rows trained on."""

    test_rows: RowReport | None
    """The rows evaluated on."""

    total_turns: int
    """How many turns each shard will make."""

    needs: frozenset[Need]
    """What the solver needs of the engine."""

    numerics: list[Numerics]
    """The arithmetic of the driver, then of each worker."""

    version: int = 0
    """How many steps the run has made."""

    turns: int = 0
    """How many turns each shard has made."""

    virtual_s: float | None = None
    """How long the run has taken, in virtual time; None if its times are real."""

    settled_turns: int = 0
    """The turns after which evaluation and the end of an epoch are done."""

    unreplaced: Unreplaced | None = None
    """What no solver's state replaces in the module, as it was at first; None: there are no checkpoints."""

    step_times: StepTimes = field(default_factory=StepTimes)
    """How long the steps took."""

    evaluations: list[EvaluationReport] = field(default_factory=list)
    """All evaluations so far."""

    engine: str
    """The engine's name."""

    recovery: Recovery = field(default_factory=Recovery)
    """What the engine recovered from."""

    participation: Participation
    """Which shards took part, and when workers answered."""

    mode: str
    """How the engine runs steps."""

    sent_bytes: int = 0
    """Bytes of vectors that workers sent to each other, all of them together."""

    numerics_changes: list[NumericsChange] = field(default_factory=list)
    """Workers that were replaced by workers of other arithmetic."""

    sample: Sample
    """Some rows, to compare the module with the one that is built again."""

    outputs: tuple[Output, ...]
    """What the module gives of a row; none if that is not known."""

    drawn: frozenset[str]
    """Paths of the tensors, arrays and plain values that are others when the module is built again."""

    code: Mapping[str, str]
    """Digests of the user's code as it was when the run began, by the keys that name it."""

    start_up: StartUp
    """How the time before the first step was spent."""

    resumed: list[Resumed] = field(default_factory=list)
    """The checkpoints that the run went on from, in their order."""

    error: BaseException | None = None
    """What ended the run early."""

    stopped_by: str | None = None
    """What ended the run before its last turn, without an error; see `stop`."""

    is_out_of_time: bool = False
    """Whether train.max_wall_s did, so that the run is not finished."""

    is_off_grid: bool = False
    """Whether the last evaluation was made only because the run ended there."""

    best_weights: Weights | None = None
    """Those of the best evaluation so far, where early stopping keeps them."""

    restored: EvaluationReport | None = None
    """The evaluation whose weights the module got back at the end; None: it has those of the last step."""

    def __repr__(self) -> str:
        return f"<Training: {self.version} steps, {self.turns} of {self.total_turns} turns>"

    @property
    def is_finished(self) -> bool:
        """Return whether all turns are made, or nothing but the time has ended the run before."""
        return self.error is None and self.is_over and not self.is_out_of_time

    @property
    def is_over(self) -> bool:
        """Return whether no turn will follow."""
        return self.turns >= self.total_turns or self.stopped_by is not None

    @property
    def module_step(self) -> int:
        """Return how many steps made the module's parameters."""
        return self.version if self.restored is None else self.restored.step

    def stop(self, reason: str) -> None:
        """End the run, as if this were its last turn: it is evaluated and saved, and no error is raised.

        An observer may call it. The run ends as soon as its engine gives it back to the driver: after this
        step; with all-reduce after the segment. At an evaluation that is the same step on every engine. A
        second call changes nothing, nor does one after the last turn.

        Args:
            reason: what the summary says under `stopped_by`.

        Raises:
            ConfigError: the reason is no text, or empty.
        """
        if not isinstance(reason, str) or not reason.strip():
            raise ConfigError(
                f"the reason of training.stop() is {shown(reason)}, but must be a text that says why the run "
                f"ends"
            )
        if not self.is_over:
            self.stopped_by = reason

    def end_by_time(self) -> None:
        """End the run, which is not finished then, and can go on."""
        if not self.is_over:
            self.stopped_by, self.is_out_of_time = "train.max_wall_s", True

    @property
    def is_evaluated(self) -> bool:
        """Return whether there is an evaluation of the newest weights."""
        return bool(self.evaluations) and self.evaluations[-1].step == self.version

    @property
    def sent_bytes_per_worker_step(self) -> float:
        """Return how many bytes of vectors a worker sent to others in a step, on average."""
        worker_steps = (len(self.numerics) - 1) * len(self.step_times)
        return self.sent_bytes / worker_steps if worker_steps else 0.0

    @property
    def last_evaluation(self) -> EvaluationReport | None:
        """Return the evaluation of the module's weights, or the newest of earlier ones.

        A NaN loss undoes the last step, and early stopping may return to an earlier one.
        """
        if self.restored is not None:
            return self.restored
        standing = [report for report in self.evaluations if report.step <= self.version]
        return standing[-1] if standing else None


class Observer:
    """Watches a run: writes its files, draws its progress, or ends it by `training.stop(reason)`.

    A subclass defines those of the methods that it needs; the others do nothing.
    """

    @property
    def checkpoint_name(self) -> str:
        """Return what checkpoints call it: what it remembers is given to the one of this name.

        Several of one name are told apart by their order: where that may change, give each a name of its own.
        """
        return type(self).__qualname__

    def memory(self) -> dict[str, Any]:
        """Return what it must remember if the run goes on in another process: numbers, texts, arrays."""
        return {}

    def recall(self, memory: dict[str, Any]) -> None:
        """Take what `memory` returned; called before `started` where a run goes on from a checkpoint."""

    def started(self, training: Training) -> None:
        """Called before the first step."""

    def stepped(self, training: Training, report: StepReport) -> None:
        """Called after a step."""

    def evaluated(self, training: Training, report: EvaluationReport) -> None:
        """Called after an evaluation."""

    def ended(self, training: Training) -> None:
        """Called when no step will follow; `training.error` or `stopped_by` says why the run ended early."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What tests and benchmarks change in a run; no user needs it."""

    before_gradients: Callable[[int, int], None] | None = None
    """Called with a worker and a round's first turn (from 0) before the worker computes; it may wait."""

    dtype: torch.dtype = torch.float32
    """Type of the parameters."""


NO_PROBE = Probe()
