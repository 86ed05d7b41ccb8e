"""Draw test accuracy over the rows trained on, of one run or several, as an SVG.

    python tests/bench/picture.py --out jobs/mnist-lenet.svg "synchronous SGD=runs/a" "local SGD=runs/b"

Each run is LABEL=FOLDER, where FOLDER is what jobs/train.py --out wrote.  For a smooth line, evaluate often:
--set train.eval_every=47.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from xml.sax.saxutils import escape

from sparksgd.runs.metrics import read_metrics
from sparksgd.runs.names import METRICS
from sparksgd.storage import location

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 32, 40, 44
COLOURS = ("#2a6fbb", "#d1495b", "#3a7d44", "#8d6a9f")
INK, PALE = "#6b7280", "#d1d5db"
"""Grey that can be read on a white page and on a dark one."""

BEST, LEAST = 1.0, 0.88
"""The ends of the accuracy axis; what is below them is not drawn."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One line of the picture."""

    label: str

    rows: list[int]
    """Trained on before each evaluation."""

    accuracies: list[float]


def read_run(label: str, folder: str) -> Run:
    """Read the evaluations of a run's folder."""
    metrics = read_metrics(location(folder) / METRICS)
    rows_until = dict(
        zip(
            (step["step"] for step in metrics.steps),
            accumulate(step["rows"] for step in metrics.steps),
            strict=True,
        )
    )
    return Run(
        label=label,
        rows=[rows_until[one["step"]] for one in metrics.evaluations],
        accuracies=[one["test_accuracy"] for one in metrics.evaluations],
    )


def drawn(runs: Sequence[Run]) -> str:
    """Return the picture, as SVG."""
    most = max(run.rows[-1] for run in runs)

    def x(rows: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * rows / most

    def y(accuracy: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (BEST - accuracy) / (BEST - LEAST)

    def text(at_x: float, at_y: float, words: str, anchor: str = "middle", fill: str = INK) -> str:
        return (
            f'<text x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(words)}</text>'
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12">',
        text(LEFT, 20, "test accuracy", "start"),
        text(WIDTH - RIGHT, HEIGHT - 8, "rows trained on", "end"),
    ]
    for hundredths in range(round(100 * LEAST), 101, 2):
        level = y(hundredths / 100)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" y2="{level:.1f}" stroke="{PALE}" '
            f'stroke-width="0.7"/>'
        )
        parts.append(text(LEFT - 8, level + 4, f"{hundredths / 100:.2f}", "end"))
    for thousands in range(0, most // 1000 + 1, 30):
        parts.append(
            text(x(1000 * thousands), HEIGHT - BOTTOM + 18, f"{thousands},000" if thousands else "0")
        )
    for number, run in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        points = [
            (x(rows), y(accuracy))
            for rows, accuracy in zip(run.rows, run.accuracies, strict=True)
            if accuracy >= LEAST
        ]
        line = " ".join(f"{one:.1f},{other:.1f}" for one, other in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{one:.1f}" cy="{other:.1f}" r="3" fill="{colour}"/>' for one, other in points]
        words = f"{run.label}: {run.accuracies[-1]:.4f} at the end"
        parts.append(
            text(
                WIDTH - RIGHT - 8, HEIGHT - BOTTOM - 14 - 20 * (len(runs) - 1 - number), words, "end", colour
            )
        )
    return "\n".join([*parts, "</svg>", ""])


def main(argv: Sequence[str]) -> int:
    """Write the picture; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.svg")
    options = parser.parse_args(argv)
    runs = [read_run(label, folder) for label, _, folder in (one.rpartition("=") for one in options.runs)]
    options.out.write_text(drawn(runs), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
