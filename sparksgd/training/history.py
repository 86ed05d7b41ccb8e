"""What a run went through, epoch by epoch: a few rows that a person reads or plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparksgd.engines.protocol import StepReport
from sparksgd.training.state import NO_RESULTS, EvaluationReport, Observer, Training
from sparksgd.training.value_rules import FINITE, NUMBER, WHOLE, ListOf, Rule, Table, optional

__all__ = ["COLUMNS", "History", "check_history"]

COLUMNS: Mapping[str, Rule] = {
    "epoch": WHOLE,
    "step": WHOLE,
    "loss": NUMBER,
    "lr": NUMBER,
    "test_loss": optional(NUMBER),
    "test_accuracy": optional(NUMBER),
}
"""The columns of a history.

    epoch, step      where the run was, both from 1
    loss             the mean loss of the rows trained on since the row before
    lr               the learning rate of the last step
    test_loss        of an evaluation after this step; None if there was none, and so test_accuracy
    test_...         other metrics of the evaluation, if there are some
"""

_OF_EVALUATIONS = "test_"


def check_history(rows: Any, path: str) -> None:
    """Refuse what is no history.

    Raises:
        DataError: with the path of the value, and the rule.
    """
    ListOf(_check_row)(rows, path)


def _check_row(row: Any, path: str) -> None:
    names = [name for name in row if name not in COLUMNS] if isinstance(row, dict) else []
    more = {n: optional(NUMBER) for n in names if isinstance(n, str) and n.startswith(_OF_EVALUATIONS)}
    Table({**COLUMNS, **more})(row, path)


class History(Observer):
    """Notes a row at each evaluation, and at the end of each epoch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        """One for each, by the names in COLUMNS."""

        self._sum, self._weight = 0.0, 0.0  # of the rows trained on since the last row: losses, and weight
        self._last: tuple[int, int, float] | None = None  # epoch, step and rate of the last step

    def started(self, training: Training) -> None:
        """Begin anew, unless the run goes on."""
        if not training.resumed:
            self.rows, self._sum, self._weight, self._last = [], 0.0, 0.0, None

    def memory(self) -> dict[str, Any]:
        """Return all rows, and what the next one begins with."""
        last = None if self._last is None else list(self._last)
        return {"rows": self.rows, "sum": self._sum, "count": self._weight, "last": last}

    def recall(self, memory: dict[str, Any]) -> None:
        """Continue from there."""
        last = optional(ListOf(FINITE, 3))
        Table({"rows": check_history, "sum": NUMBER, "count": FINITE, "last": last})(
            memory, "observers.History"
        )
        self.rows = [dict(row) for row in memory["rows"]]
        self._sum, self._weight = float(memory["sum"]), float(memory["count"])
        if memory["last"] is not None:
            epoch, step, lr = memory["last"]
            self._last = int(epoch), int(step), float(lr)

    def stepped(self, training: Training, report: StepReport) -> None:
        """Add a step; the first one of an epoch ends the row of the epoch before."""
        if self._last is not None and report.epoch > self._last[0]:
            self._end_row(None)
        self._sum += report.loss * report.weight
        self._weight += report.weight
        self._last = report.epoch, report.step, report.lr

    def evaluated(self, training: Training, report: EvaluationReport) -> None:
        """End a row with an evaluation."""
        self._end_row(report)

    def ended(self, training: Training) -> None:
        """End the last row."""
        self._end_row(None)

    def _end_row(self, evaluation: EvaluationReport | None) -> None:
        if not self._weight or self._last is None:
            return
        epoch, step, lr = self._last
        self.rows.append(
            {
                "epoch": epoch,
                "step": step,
                "loss": self._sum / self._weight,
                "lr": lr,
                **(NO_RESULTS if evaluation is None else evaluation.named()),
            }
        )
        self._sum, self._weight = 0.0, 0.0
