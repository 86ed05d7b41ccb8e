"""Say how many backup workers would save time, from the arrival times of a run's gradients.

    python jobs/stragglers.py runs/probe --plot stragglers.png

Any run of jobs/train.py will do.  Best is a probe of 100 steps with --set engine.barrier=false, because
gradients then arrive one by one.  Exit status: 0 done, 2 refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sparksgd.cli.command_line import exit_status, parser_of
from sparksgd.runs.stragglers import Choice, best_of, choices, plot, read_arrivals
from sparksgd.training.interrupts import end_in_order

_MOST_ROWS = 16


def parser() -> argparse.ArgumentParser:
    result = parser_of(__doc__)
    result.add_argument("run", metavar="DIR", help="folder of a run, or its metrics.jsonl: path or URI")
    result.add_argument("--plot", type=Path, metavar="FILE", help="draw it as well: .png, .svg or .pdf")
    result.add_argument(
        "--exponent", type=float, default=1.0, metavar="P",
        help="a training needs N ** -P times as many steps (default 1; Chen et al. measured 0.85)",
    )  # fmt: skip
    return result


def main(argv: Sequence[str]) -> int:
    """Print the table, and draw the plot; return the exit status."""
    return exit_status(lambda: _show(argv))


def _show(argv: Sequence[str]) -> None:
    options = parser().parse_args(argv)
    arrivals_s = read_arrivals(options.run)
    found = choices(arrivals_s, options.exponent)
    Console().print(_table(found, len(arrivals_s)))
    best = best_of(found)
    saved = (
        f"{1 - best.relative_time:.0%} less time than without" if best.backups else "stragglers cost little"
    )
    print(f"train.num_shards={len(found)} solver.backup_workers={best.backups}: {saved}")
    if options.plot is not None:
        plot(arrivals_s, found, options.plot)


def _table(found: list[Choice], steps: int) -> Table:
    """Return the cost of each number of backups; with many workers only the first rows and the best one."""
    best = best_of(found)
    table = Table(title=f"{len(found)} workers, {steps:,} steps", title_justify="left")
    for name in ("b", "waits for", "p50", "p90", "p99", "mean step", "expected time"):
        table.add_column(name, justify="right")
    for choice in found:
        if choice.backups >= _MOST_ROWS and choice is not best:
            continue
        table.add_row(
            str(choice.backups),
            f"{len(found) - choice.backups} of {len(found)}",
            *(f"{second:.3f} s" for second in (*choice.quantiles_s, choice.step_s)),
            f"{choice.relative_time:.2f}",
            style="bold green" if choice is best else None,
        )
    return table


if __name__ == "__main__":
    end_in_order()
    sys.exit(main(sys.argv[1:]))
