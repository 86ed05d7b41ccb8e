"""What jobs/compare.py does: make the runs with a progress bar; write the table, the CSV and the plots."""

from __future__ import annotations

import io
import logging
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sparksgd.runs.comparing.course import Comparison, compare
from sparksgd.runs.comparing.kept_runs import KeptRuns
from sparksgd.runs.comparing.plots import drawn, require_matplotlib
from sparksgd.runs.comparing.question import Question
from sparksgd.runs.comparing.report import COLUMNS, csv_of, sentence, table_rows, target_line, tuning_line
from sparksgd.storage import location

__all__ = ["run_comparison"]

log = logging.getLogger("sparksgd")

_SECONDS_BETWEEN_LINES = 10.0
_WIDTH = 140  # of tables that go to no terminal


def run_comparison(question: Question, out: str, console: Console) -> None:
    """Answer a question; print the table and the sentences, and write all files.

    Args:
        question: what is compared.
        out: the folder, a path or URI; what it holds of an earlier call is not made again.
        console: shows the progress.

    Raises:
        SparkSGDError: see `compare`, and plots.py.
    """
    require_matplotlib()
    folder = location(out)
    kept = KeptRuns(folder / "runs")
    with _Bar(console) as bar:
        comparison = compare(question, kept, bar.show)
    log.info("%d runs were made", kept.made)
    text = io.StringIO()
    _show(comparison, Console(file=text, width=_WIDTH))
    (folder / "table.txt").write_bytes(text.getvalue().encode())
    (folder / "runs.csv").write_bytes(csv_of(comparison).encode())
    for cluster in question.clusters:
        (folder / f"{cluster}.png").write_bytes(drawn(comparison, cluster))
    _show(comparison, Console(width=None if Console().is_terminal else _WIDTH))


def _show(comparison: Comparison, console: Console) -> None:
    """Print the tables of all clusters, each with its sentence."""
    console.print(target_line(comparison), tuning_line(comparison), sep="\n", soft_wrap=True)
    for cluster in comparison.question.clusters:
        table = Table(title=cluster, title_justify="left", show_lines=True)
        for number, name in enumerate(COLUMNS):
            if number:
                table.add_column(name, justify="right", no_wrap=True)
            else:
                table.add_column(name, min_width=24)
        for row in table_rows(comparison, cluster):
            table.add_row(*map(escape, row))
        console.print(table)
        console.print(escape(sentence(comparison, cluster)), soft_wrap=True)


@dataclass
class _Bar:
    """A progress bar on a terminal, with the time left; elsewhere a line every ten seconds."""

    console: Console
    _progress: Progress = field(init=False)
    _last_line_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._progress = Progress(
            TextColumn("[bold]run"), MofNCompleteColumn(), BarColumn(bar_width=None), TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, done: int, total: int, what: str) -> None:
        """Show how far the comparison is."""
        self._progress.update(self._task, completed=done, total=total, description=what)
        now_s = time.monotonic()
        if (
            done < total
            and not self.console.is_terminal
            and now_s - self._last_line_s >= _SECONDS_BETWEEN_LINES
        ):
            self._last_line_s = now_s
            left = self._progress.tasks[0].time_remaining
            about = "" if left is None else f", about {left / 60:.0f} min left"
            log.info("run %d of %d%s: %s", done + 1, total, about, what)
