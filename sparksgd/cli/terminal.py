"""What a person sees: log lines, a progress bar, a table at the end."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sparksgd.engines.protocol import StepReport
from sparksgd.solvers.protocol import Need
from sparksgd.training.progress import ProgressLines
from sparksgd.training.state import EvaluationReport, Observer, Training

__all__ = ["Terminal", "scores_tables"]


class Terminal(Observer):
    """Observes a run and shows it: a progress bar on a terminal, elsewhere a line every ten seconds.

    Args:
        console: where to show it.
        tables: whether a finished run ends with tables; else it ends with a log line.
    """

    def __init__(self, console: Console, *, tables: bool = True) -> None:
        self._console = console
        self._tables = tables
        self._bar = console.is_terminal and tables
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("epoch {task.fields[epoch]}  loss {task.fields[loss]:.4f}"),
            TextColumn("[cyan]{task.fields[rate]:,.0f} rows/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._bar,
        )
        self._task = self._progress.add_task("", total=None, epoch=1, loss=float("nan"), rate=0.0)
        self._lines = ProgressLines(of_steps=not self._bar)

    def started(self, training: Training) -> None:
        """Draw the bar."""
        self._lines.started(training)
        self._progress.update(self._task, total=training.total_turns)
        self._progress.start()

    def stepped(self, training: Training, report: StepReport) -> None:
        """Move the bar, or log how far the run is."""
        self._lines.stepped(training, report)
        rate = self._lines.rows_per_s
        self._progress.update(
            self._task, completed=report.turn, epoch=report.epoch, loss=report.loss, rate=rate
        )

    def evaluated(self, training: Training, report: EvaluationReport) -> None:
        """Log the result of an evaluation."""
        self._lines.evaluated(training, report)

    def ended(self, training: Training) -> None:
        """Remove the bar, and show the table of a finished run."""
        self._progress.stop()
        if not self._tables:
            self._lines.ended(training)
        elif training.error is None:
            self._console.print(_table(training))
            if Need.QUORUM in training.needs and training.participation.by_worker():
                self._console.print(_arrivals_table(training))


def _table(training: Training) -> Table:
    table = Table(show_header=False, title="Training", title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    last = training.last_evaluation
    if last is not None:
        if last.accuracy is not None:
            table.add_row("test accuracy", f"[bold green]{last.accuracy:.4f}[/]  of {last.rows:,} rows")
        table.add_row("test loss", f"{last.loss:.4f}")
        for name, value in last.metrics.items():
            table.add_row(f"test {name}", f"{value:.4f}")
    times = training.step_times
    speed = "" if times.rows_per_second is None else f", {times.rows_per_second:,.0f} rows/s"
    table.add_row("trained", f"{times.rows:,} rows in {len(times):,} steps{speed}")
    if training.restored is not None:
        table.add_row("best step", f"{training.restored.step:,}: the model has its weights")
    if training.stopped_by is not None:
        table.add_row("stopped by", escape(training.stopped_by))
    if training.resumed:
        table.add_row("resumed", f"from step {training.resumed[-1].step:,}")
    if training.turns != training.version:
        table.add_row("solver", f"{training.config.solver.name}, {training.turns:,} turns")
    if training.virtual_s is not None:
        lost = training.participation.lost_workers
        more = f"; {lost} workers were lost" if lost else ""
        table.add_row("virtual time", f"{training.virtual_s:,.1f} s: rows/s and steps are in it{more}")
    if staleness := training.participation.staleness:
        ignored = training.participation.ignored
        more = f"; {ignored:,} messages were older, and ignored" if ignored else ""
        mean = training.participation.mean_staleness
        table.add_row("staleness", f"mean {mean:.1f}, largest {max(staleness)} steps{more}")
    if (server := training.participation.server()) is not None:
        table.add_row("server", _server_told(training, **server))
    workers = len(training.numerics) - 1
    table.add_row("engine", f"{training.engine}, {workers} workers, "
                            f"{training.config.train.num_shards} shards")  # fmt: skip
    if training.participation.by_worker():
        table.add_row("steps ran as", training.mode)
    if parts := [f"{name} {1e3 * seconds:.1f}" for name, seconds in times.medians_s().items()]:
        table.add_row("median step", "  ".join(parts) + "  ms")
    if training.sent_bytes:
        table.add_row("sent", f"{decimal(round(training.sent_bytes_per_worker_step))} per worker and step")
    mended = training.recovery
    if mended.retries or mended.rebuilt_shards:
        table.add_row(
            "recovered", f"{mended.retries} jobs tried again, {mended.rebuilt_shards} shards rebuilt"
        )
    if mended.strangers:
        table.add_row("strangers", f"{mended.strangers} connections dropped")
    start = training.start_up.seconds()
    if start:
        parts = [f"{name.replace('_', ' ')} {seconds:.1f}" for name, seconds in start.items()]
        table.add_row("start", f"{sum(start.values()):.1f} s:  {'  '.join(parts)}")
    table.add_row("parameters", f"{training.flat.parameters_sha256()[:16]}…")
    return table


_BUSY, _WAITING = 0.8, 0.2


def _server_told(training: Training, busy_share: float, waiting_share: float) -> str:
    """Return how busy the server was, and whether it holds the workers up."""
    told = f"busy {busy_share:.0%} of the time; workers waited {waiting_share:.0%} of theirs"
    if busy_share > _BUSY and waiting_share > _WAITING:
        told += ": the server holds them up, and more workers would wait longer"
    if lost := training.participation.lost_workers:
        told += f"; workers were lost {lost} times"
    return told


def _arrivals_table(training: Training) -> Table:
    """Return a table of how often each worker was late; with backup workers, worker i owns shard i."""
    table = Table(title="Backup workers: who came when", title_justify="left")
    for name in ("worker", "took part", "late", "arrived p50", "p90", "p99"):
        table.add_column(name, justify="right")
    took_part = training.participation.shares()
    for worker, found in training.participation.by_worker().items():
        seconds = [found[f"arrival_{name}_s"] for name in ("p50", "p90", "p99")]
        table.add_row(
            str(worker),
            f"{took_part[worker]:.1%}",
            f"{found['late_share']:.1%}",
            *("" if value is None else f"{1e3 * value:,.0f} ms" for value in seconds),
        )
    return table


def scores_tables(
    rows: int, loss: float, accuracy: float | None, confusion: npt.NDArray[np.int64] | None
) -> list[Table]:
    """Return the tables of an evaluation: its figures, and its confusion matrix where it has classes."""
    figures = Table(show_header=False, title="Evaluation", title_justify="left")
    figures.add_column(style="bold")
    figures.add_column()
    if accuracy is not None:
        figures.add_row("accuracy", f"[bold green]{accuracy:.4f}[/]")
    figures.add_row("loss", f"{loss:.4f}")
    figures.add_row("rows", f"{rows:,}")
    if confusion is None or confusion.ndim > 2:
        return [figures]
    matrix = Table(title="Confusion matrix: label down, prediction across", title_justify="left")
    matrix.add_column("", style="bold")
    for predicted in range(len(confusion)):
        matrix.add_column(str(predicted), justify="right")
    matrix.add_column("right", justify="right", style="bold")
    for label, counts in enumerate(confusion):
        cells = [
            f"[green]{count}[/]" if label == predicted else (f"[red]{count}[/]" if count else "[dim]·[/]")
            for predicted, count in enumerate(counts)
        ]
        total = int(counts.sum())
        matrix.add_row(str(label), *cells, f"{counts[label] / total:.1%}" if total else "")
    return [figures, matrix]
