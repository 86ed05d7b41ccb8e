"""Log lines that say how far a run is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from sparksgd.engines.protocol import StepReport
from sparksgd.training.state import EvaluationReport, Observer, Training

__all__ = ["ProgressLines"]

log = logging.getLogger("sparksgd")

_LINE_EVERY_S = 10.0
_NEWEST = 0.05  # the share of the newest step in the rate


class ProgressLines(Observer):
    """Logs a run at INFO: what it begins with, a line at most every ten seconds, evaluations, and its end.

    Args:
        of_steps: whether steps are told of, too.
        clock: returns seconds.
    """

    def __init__(self, *, of_steps: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._of_steps, self._clock = of_steps, clock
        self._rows_per_s: float | None = None
        self._rows = 0  # of steps whose time is still to come
        self._said_s = clock()

    @property
    def rows_per_s(self) -> float:
        """Return how many rows a second the last steps had; 0 before the first."""
        return self._rows_per_s or 0.0

    def started(self, training: Training) -> None:
        """Log what is trained."""
        config = training.config
        log.info(
            "%s parameters, %s rows in %d shards, %d turns of %d rows (%d per epoch)",
            f"{training.flat.parameters.numel():,}",
            f"{training.rows.rows:,}",
            config.train.num_shards,
            training.total_turns,
            config.train.rows_per_step,
            training.plan.sampling.turns_per_epoch,
        )

    def stepped(self, training: Training, report: StepReport) -> None:
        """Log how far the run is, if that was not said just now."""
        self._rows += report.rows
        if report.timing.total:  # of several steps at one moment, the first has the time
            now = self._rows / report.timing.total
            before = now if self._rows_per_s is None else self._rows_per_s
            self._rows_per_s, self._rows = (1 - _NEWEST) * before + _NEWEST * now, 0
        if self._of_steps and (now_s := self._clock()) - self._said_s >= _LINE_EVERY_S:
            self._said_s = now_s
            log.info(
                "turn %d of %d, epoch %d, loss %.4f, %.0f rows/s",
                report.turn, training.total_turns, report.epoch, report.loss, self.rows_per_s,
            )  # fmt: skip

    def evaluated(self, training: Training, report: EvaluationReport) -> None:
        """Log the result of an evaluation."""
        reached = f"loss {report.loss:.4f}"
        if report.accuracy is not None:
            reached = f"accuracy {report.accuracy:.4f}, {reached}"
        reached += "".join(f", {name} {value:.4f}" for name, value in report.metrics.items())
        log.info("epoch %d, step %d: test %s (%.1f s)", report.epoch, report.step, reached, report.time_s)

    def ended(self, training: Training) -> None:
        """Log the end of a run; an error says itself how one ended."""
        if training.error is not None or not log.isEnabledFor(logging.INFO):  # the digest of many takes long
            return
        how = "finished" if training.stopped_by is None else f"stopped by {training.stopped_by}"
        if training.restored is not None:
            how += f", the best step is {training.restored.step}"
        log.info("%s: %d steps, parameters %s", how, training.version, training.flat.parameters_sha256())
