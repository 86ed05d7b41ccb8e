"""How many backup workers save time, from arrival times; N + b = W workers, and W is fixed.

    time(N) = iterations(N) x mean of the N-th arrival of W

Chen et al. 2016, "Revisiting Distributed Synchronous SGD" (arXiv:1604.00981), section 3.2: their estimate of
the time to converge.  We assume iterations(N) = N ** -exponent.  With exponent 1 a training needs a fixed
number of gradients, however many a step has.  They measured 0.85 between N = 50 and 100.

Legend: T steps, W workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparksgd.errors import ConfigError, DataError
from sparksgd.imports import shortened
from sparksgd.runs.metrics import read_metrics
from sparksgd.runs.names import METRICS
from sparksgd.storage import Location, location

__all__ = ["Choice", "best_of", "choices", "plot", "read_arrivals"]

_FEWEST_STEPS = 10
_QUANTILES = (0.5, 0.9, 0.99)

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A number of backup workers, and what it would cost."""

    backups: int
    """b."""

    quantiles_s: tuple[float, float, float]
    """Median, 90th and 99th percentile of the N-th arrival."""

    step_s: float
    """Mean of the N-th arrival: the expected time of a step."""

    relative_time: float
    """Expected time to the same training, divided by the time without backup workers."""


def choices(arrivals_s: Seconds, exponent: float = 1.0) -> list[Choice]:
    """Return what each number of backup workers would cost, from none to all but one.

    Args:
        arrivals_s: when each worker's gradient arrived, from the step's beginning, [T, W].
        exponent: see above.
    """
    ordered = np.sort(arrivals_s, axis=1)
    workers = ordered.shape[1]
    steps_s = ordered.mean(axis=0)
    cost = steps_s * np.arange(1, workers + 1) ** -exponent
    return [
        Choice(
            backups=workers - needed,
            quantiles_s=tuple(np.quantile(ordered[:, needed - 1], _QUANTILES).tolist()),
            step_s=float(steps_s[needed - 1]),
            relative_time=float(cost[needed - 1] / cost[-1]),
        )
        for needed in range(workers, 0, -1)
    ]


def best_of(found: list[Choice]) -> Choice:
    """Return the choice with the least expected time; if several are equal, the one with fewest backups."""
    return min(found, key=lambda choice: choice.relative_time)


def read_arrivals(path: str | Path | Location) -> Seconds:
    """Read when the gradients of workers arrived, [T, W], from a run's folder or its metrics.jsonl.

    If gradients arrived one by one, these are the recorded times.  Otherwise it is the time that each worker
    computed.  Steps in which a worker was not asked, because it was still late, are left out.

    Raises:
        DataError: there are no such steps, or too few.
    """
    file = location(path)
    try:
        if file.name != METRICS and (file / METRICS).exists():
            file /= METRICS
        steps = read_metrics(file).steps
        arrived = [arrival for step in steps for arrival in step["timing"].get("arrivals", [])]
        of_step: dict[int, dict[int, float]] = {step["version"]: {} for step in steps}
        if arrived:
            for arrival in arrived:
                of_step[arrival["version"]][int(arrival["worker"])] = _seconds(arrival["arrived_s"])
        else:
            for step in steps:
                computed = {int(w["worker"]): _seconds(w["compute"]) for w in step["timing"]["workers"]}
                of_step[step["version"]] = computed
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{file} holds no steps of a run: {type(error).__name__}: {shortened(str(error), 400)}. Name the "
            f"folder that jobs/train.py --out wrote"
        ) from error
    workers = sorted({worker for of_worker in of_step.values() for worker in of_worker})
    complete = [of_worker for of_worker in of_step.values() if len(of_worker) == len(workers)]
    if len(workers) < 2 or len(complete) < _FEWEST_STEPS:
        raise DataError(
            f"{file} has {len(complete)} steps in which all of {len(workers)} workers answered, but "
            f"{_FEWEST_STEPS} steps of at least two workers are needed: record some with jobs/train.py --set "
            f"engine.barrier=false --set train.steps=100"
        )
    return np.array([[of_worker[worker] for worker in workers] for of_worker in complete])


def _seconds(value: Any) -> float:
    """Return a time that was measured."""
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError(f"{seconds} is no time")
    return seconds


def plot(arrivals_s: Seconds, found: list[Choice], file: Path) -> None:
    """Draw when the k-th gradient arrives, and what each number of backup workers costs.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ConfigError(
            "a plot needs matplotlib: pip install 'sparksgd[plot]', or leave --plot out"
        ) from error
    best, workers = best_of(found), arrivals_s.shape[1]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    ordered = np.sort(arrivals_s, axis=1)
    shares = np.arange(1, len(ordered) + 1) / len(ordered)
    wanted = {1, (workers + 1) // 2, workers - best.backups, workers}
    for number, k in enumerate(sorted(wanted)):
        label = f"{k} of {workers}" + (f"  (b = {best.backups})" if k == workers - best.backups else "")
        shade = _shade(number, len(wanted))
        left.plot(np.sort(ordered[:, k - 1]), shares, color=shade, label=label, drawstyle="steps-post")
    left.set(xlabel="seconds from the step's beginning", ylabel="share of steps", ylim=(0, 1))
    left.set_xscale("log")
    left.xaxis.set_major_formatter("{x:g}")
    left.set_title("The k-th gradient has arrived", loc="left")
    left.legend(frameon=False, loc="lower right")
    right.plot([c.backups for c in found], [c.relative_time for c in found], color=_shade(1, 3), marker=".")
    right.plot(best.backups, best.relative_time, "o", color="#d1495b", markersize=9)
    right.annotate(
        f"b = {best.backups}: {best.relative_time:.2f}", (best.backups, best.relative_time),
        xytext=(0, -20), textcoords="offset points", ha="left" if best.backups == 0 else "center",
        color="#d1495b",
    )  # fmt: skip
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set(
        xlabel="backup workers b, of N + b fixed", ylim=(0, min(3, 1.1 * max(c.relative_time for c in found)))
    )
    right.axhline(1, color="#bbbbbb", linewidth=0.8)
    right.set_title("Expected time to the same training, b = 0 is 1", loc="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {file} cannot be written: {error}") from error


def _shade(number: int, of: int) -> tuple[float, float, float, float]:
    """Return one of several colours from light to dark."""
    from matplotlib import colormaps

    shade: Any = colormaps["viridis"](0.85 - 0.7 * number / max(1, of - 1))
    return shade  # type: ignore[no-any-return]  # matplotlib leaves it open
