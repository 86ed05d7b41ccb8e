"""What a comparison tells: a table of each cluster, a CSV with a line for each run, a sentence."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence

import numpy as np

from sparksgd.runs.comparing.course import Comparison, Entry, Tuned
from sparksgd.runs.comparing.outcomes import Evaluated, Outcome
from sparksgd.runs.comparing.question import ONE_PROCESS, REFERENCE
from sparksgd.runs.comparing.statistics import FEWEST_PAIRS, Difference, ratio_of

__all__ = ["COLUMNS", "csv_of", "sentence", "table_rows", "target_line", "tuning_line", "values_of"]

COLUMNS = (
    "solver", "time, s", "ratio", "95 % interval", "never", "diverged", "rows", "MB sent", "worker-s",
    "staleness", "score",
)  # fmt: skip
"""Of `table_rows`.  Times, rows, bytes and worker-seconds are until the target, medians of all runs.  The
solver's cell has its settings and what its tuning cost, too."""

_CSV = (
    "cluster", "solver", "rate", "momentum", "knob", "seed", "diverged", "score", "target", "reached_s",
    "reached_rows", "reached_sent_bytes", "reached_worker_s", "ratio", "virtual_s", "rows", "workers",
    "mean_staleness", "run",
)  # fmt: skip


def values_of(
    outcomes: Sequence[Outcome], target: float, value: Callable[[Evaluated, Outcome], float]
) -> list[float]:
    """Return a value at the target for each run; infinite for one that never reaches it."""
    reached = [(outcome.reached(target), outcome) for outcome in outcomes]
    return [math.inf if at is None else value(at, outcome) for at, outcome in reached]


def _median_of(entry: Entry, target: float, value: Callable[[Evaluated, Outcome], float]) -> float:
    """Return the median of a value at the target; infinite where half of the runs never reach it."""
    return float(np.median(values_of(entry.outcomes, target, value)))


def table_rows(comparison: Comparison, cluster: str) -> list[tuple[str, ...]]:
    """Return the rows of a cluster's table, each as long as COLUMNS."""
    target = comparison.target
    rows: list[tuple[str, ...]] = []
    for entry in comparison.of(cluster):
        found = comparison.difference(entry)
        is_reference = entry.competitor.label == REFERENCE
        rows.append(
            (
                "\n".join(
                    (
                        entry.competitor.label,
                        entry.tuned.chosen.text(entry.competitor.knob),
                        _tuning_text(entry.tuned, cluster),
                    )
                ),
                _number(_median_of(entry, target, lambda at, _: at.virtual_s)),
                "1" if is_reference else _number(found.ratio),
                "" if is_reference else _interval(found),
                str(sum(outcome.reached(target) is None for outcome in entry.outcomes)),
                str(sum(outcome.diverged for outcome in entry.outcomes)),
                _number(_median_of(entry, target, lambda at, _: at.rows)),
                _number(_median_of(entry, target, lambda at, _: at.sent_bytes / 1e6)),
                _number(_median_of(entry, target, lambda at, run: at.virtual_s * run.workers)),
                f"{np.median([outcome.mean_staleness for outcome in entry.outcomes]):.1f}",
                f"{np.median([outcome.score for outcome in entry.outcomes]):.4f}",
            )
        )
    return rows


def target_line(comparison: Comparison) -> str:
    """Return what the target is."""
    budget = comparison.question.budget
    return (
        f"target: a score of {comparison.target:.4f} at two evaluations in a row: the median of "
        f"{budget.seeds} tuned runs in one process, less {budget.margin:g}"
    )


def tuning_line(comparison: Comparison) -> str:
    """Return how the run in one process was tuned."""
    tuned = comparison.one_process
    return f"{ONE_PROCESS}: {tuned.chosen.text(None)}; {_tuning_text(tuned, None)}"


def _tuning_text(tuned: Tuned, cluster: str | None) -> str:
    """Return what the tuning cost: rows, and seconds if it ran on this cluster."""
    parts = [f"{tuned.trials} trials", f"{_number(tuned.rows)} rows"]
    if tuned.cluster == cluster:
        parts.append(f"{_number(tuned.virtual_s)} s")
    if tuned.diverged:
        parts.append(f"{tuned.diverged} diverged")
    if tuned.at_edge:
        parts.append("best at the grid's edge")
    return ", ".join(parts)


def sentence(comparison: Comparison, cluster: str) -> str:
    """Return the answer for a cluster: the best solver, or that no difference is shown."""
    reference, *others = comparison.of(cluster)
    best = min(others, key=lambda entry: _rank(comparison, entry))
    found, label, seeds = comparison.difference(best), best.competitor.label, len(best.outcomes)
    if all(math.isinf(time) for entry in (reference, *others) for time in entry.times(comparison.target)):
        return (
            f"On {cluster}: no difference shown between {label} and {REFERENCE}. No run reached the target "
            f"({seeds} seeds)."
        )
    is_never = found.low == found.high and found.ratio in (0, math.inf)  # the words say it all
    shown_by = f"({seeds} seeds)" if is_never else f"(95 % interval {_interval(found)}, {seeds} seeds)"
    needs = f"needs {_number(found.ratio)} times the time of {REFERENCE} {shown_by}."
    if math.isinf(found.ratio):
        needs = f"does not reach the target in half of the runs or more, where {REFERENCE} does {shown_by}."
    elif found.ratio == 0:
        needs = f"reaches the target in half of the runs or more, where {REFERENCE} does not {shown_by}."
    if found.is_shown and found.ratio < 1:
        return f"On {cluster}: {label} is best. It {needs}"
    if found.is_shown:
        return f"On {cluster}: {REFERENCE} is best. The next is {label}. It {needs}"
    too_few = f" Fewer than {FEWEST_PAIRS} seeds cannot show one." if seeds < FEWEST_PAIRS else ""
    return f"On {cluster}: no difference shown between {label} and {REFERENCE}. {label} {needs}{too_few}"


def _rank(comparison: Comparison, entry: Entry) -> tuple[bool, float, int]:
    """Return what orders solvers: first those that are shown to be faster, then by the ratio."""
    found = comparison.difference(entry)
    never = sum(math.isinf(time) for time in entry.times(comparison.target))
    return not (found.is_shown and found.ratio < 1), found.ratio, never


def csv_of(comparison: Comparison) -> str:
    """Return a CSV with a line for each run that is reported; what never came is `inf`."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(_CSV)
    target, seeds = comparison.target, comparison.question.seeds
    for entry in comparison.entries:
        chosen, reference = entry.tuned.chosen, comparison.of(entry.cluster)[0]
        knob = "" if entry.competitor.knob is None else f"{entry.competitor.knob}={chosen.knob}"
        for seed, outcome, first in zip(seeds, entry.outcomes, reference.outcomes, strict=True):
            reached, time, first_s = outcome.reached(target), outcome.time_to(target), first.time_to(target)
            at: tuple[float, ...] = (math.inf,) * 4
            if reached is not None:
                at = (time, reached.rows, reached.sent_bytes, time * outcome.workers)
            lines.writerow(
                (
                    entry.cluster, entry.competitor.label, chosen.rate,
                    "" if chosen.momentum is None else chosen.momentum, knob, seed, outcome.diverged,
                    outcome.score, target, *at, ratio_of(time, first_s), outcome.virtual_s, outcome.rows,
                    outcome.workers, outcome.mean_staleness, outcome.folder,
                )
            )  # fmt: skip
    return text.getvalue()


def _interval(found: Difference) -> str:
    """Return an interval for people."""
    if not math.isinf(found.high):
        return f"{_number(found.low)} to {_number(found.high)}"
    if math.isinf(found.low):
        return "never"
    return f"{_number(found.low)} or more" if found.low else "not bounded"


def _number(value: float) -> str:
    """Return a number of three digits, for people."""
    if math.isinf(value):  # a time, or a ratio of times
        return "never"
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"
