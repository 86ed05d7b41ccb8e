"""The plots of a cluster: curves over virtual time and rows; time, bytes and worker-seconds to the target."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from sparksgd.errors import ConfigError
from sparksgd.runs.comparing.course import Comparison, Entry
from sparksgd.runs.comparing.outcomes import Evaluated, Outcome
from sparksgd.runs.comparing.report import values_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["drawn", "require_matplotlib"]

_LINE = "#888888"


def require_matplotlib() -> None:
    """Refuse to draw without matplotlib.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401  # the other functions import its parts
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'sparksgd[plot]'") from error


def drawn(comparison: Comparison, cluster: str) -> bytes:
    """Return the plots of a cluster as a PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    entries, target = comparison.of(cluster), comparison.target
    shades = colormaps["tab10" if len(entries) <= 10 else "tab20"].colors  # type: ignore[attr-defined]  # lists of colours have it
    colours = [shades[number % len(shades)] for number in range(len(entries))]
    figure = Figure(figsize=(17, 8), layout="constrained")
    figure.suptitle(f"{cluster}: score {target:.4f} is the target", x=0.01, ha="left")
    (loss_time, loss_rows, score_time, score_rows), below = figure.subplots(2, 4)
    for axes, x_name, over_time in ((loss_time, "virtual seconds", True), (loss_rows, "rows", False)):
        _curves(axes, entries, colours, lambda at: at.loss, over_time=over_time)
        axes.set(xlabel=x_name, title="Loss of the validation rows")
        if all(at.loss > 0 for each in entries for at in _evaluations(each)):
            axes.set_yscale("log")
    has_accuracy = all(at.accuracy is not None for each in entries for at in _evaluations(each))
    title = "Accuracy of the validation rows" if has_accuracy else "Score: the negative loss"
    for axes, x_name, over_time in ((score_time, "virtual seconds", True), (score_rows, "rows", False)):
        _curves(axes, entries, colours, lambda at: at.score, over_time=over_time)
        axes.axhline(target, color=_LINE, linewidth=0.8, linestyle="--")
        axes.set(xlabel=x_name, title=title)
    loss_time.legend(frameon=False)
    to_target: tuple[tuple[str, Callable[[Evaluated, Outcome], float]], ...] = (
        ("Virtual seconds to the target", lambda at, _: at.virtual_s),
        ("MB sent to the target", lambda at, _: at.sent_bytes / 1e6),
        ("Worker-seconds to the target", lambda at, run: at.virtual_s * run.workers),
    )
    for axes, (name, value) in zip(below, to_target, strict=False):
        _points(axes, entries, colours, [values_of(each.outcomes, target, value) for each in entries])
        axes.set_title(name)
    _staleness(below[3], entries, colours)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _evaluations(entry: Entry) -> list[Evaluated]:
    return [at for outcome in entry.outcomes for at in outcome.evaluations]


def _curves(
    axes: Axes,
    entries: Sequence[Entry],
    colours: Sequence[Any],
    value: Callable[[Evaluated], float],
    *,
    over_time: bool,
) -> None:
    """Draw a thin line for each run, and a thick one through the medians of those that did not diverge."""
    for entry, colour in zip(entries, colours, strict=True):
        runs = [
            [(at.virtual_s if over_time else at.rows, value(at)) for at in outcome.evaluations]
            for outcome in entry.outcomes
        ]
        for points in runs:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.5, alpha=0.4)
        whole = [points for points, run in zip(runs, entry.outcomes, strict=True) if not run.diverged]
        label = entry.competitor.label
        if not whole:
            axes.plot([], [], color=colour, linewidth=2, label=f"{label} (diverged)")
            continue
        medians = np.median([points[: min(map(len, whole))] for points in whole], axis=0)
        axes.plot(medians[:, 0], medians[:, 1], color=colour, linewidth=2, label=label)


def _points(
    axes: Axes, entries: Sequence[Entry], colours: Sequence[Any], values: Sequence[Sequence[float]]
) -> None:
    """Draw a point for each run and a bar at the median; runs that never reach the target are counted."""
    for place, (of_entry, colour) in enumerate(zip(values, colours, strict=True)):
        finite, median = [value for value in of_entry if math.isfinite(value)], float(np.median(of_entry))
        axes.plot(finite, [place] * len(finite), "o", color=colour, alpha=0.6)
        if math.isfinite(median):
            axes.plot([median], [place], "|", color="black", markersize=18)
        if len(finite) < len(of_entry):
            axes.annotate(
                f"{len(of_entry) - len(finite)} of {len(of_entry)} never",
                (1, place + 0.1), xycoords=("axes fraction", "data"), ha="right", va="top", color=colour,
            )  # fmt: skip
    axes.locator_params(axis="x", nbins=5)
    axes.set(xlim=(0, None), ylim=(len(entries) - 0.5, -0.5))
    axes.set_yticks(range(len(entries)), [entry.competitor.label for entry in entries])


def _staleness(axes: Axes, entries: Sequence[Entry], colours: Sequence[Any]) -> None:
    """Draw which share of messages is at most how stale."""
    for entry, colour in zip(entries, colours, strict=True):
        counts: dict[int, int] = {}
        for outcome in entry.outcomes:
            for tau, count in (outcome.staleness or {0: 1}).items():
                counts[tau] = counts.get(tau, 0) + count
        taus = sorted(counts)
        shares = np.array(list(accumulate(counts[tau] for tau in taus))) / sum(counts.values())
        axes.plot(
            [0, *taus], [0, *shares], color=colour, drawstyle="steps-post", label=entry.competitor.label
        )
    axes.set(title="Share of messages", xlabel="at most so many steps stale", ylim=(0, 1.02))
