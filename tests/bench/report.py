"""What the blocks say: the lines and ratios of the table, and the same as JSON."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from measuring import EMPTY_JOB, OWN_EMPTY_JOB, Block, percentile
from rich.filesize import decimal
from rich.table import Table

__all__ = [
    "Line",
    "Ratio",
    "accuracy_ratio",
    "allreduce_ratios",
    "job_ratios",
    "job_table",
    "lines_of",
    "machine",
    "ratio_table",
    "ratios_of",
    "size_table",
    "soak_ratios",
    "soak_table",
    "speed_table",
    "straggler_ratios",
    "straggler_table",
]

OVERHEAD_TARGET = 1.5
SPEEDUP_TARGET = 3.0
BACKUP_TARGET = 1.3
ACCURACY_TARGET = 0.2
_UNDISTURBED = "undisturbed, b = 0"
DDP_TARGET = 1.0
JOB_TARGET = 0.6
SENT_BESIDE = 0.001  # a record of rows and loss goes with each gradient
FLAT_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Line:
    """All blocks of one name."""

    what: str
    """Their name."""

    rows_per_step: int
    """Rows of a step; 0 for an empty job."""

    steps: int
    """Steps timed."""

    p50_s: float
    """Median over all steps."""

    p99_s: float
    """99th percentile over all steps."""

    compute_p50_s: float | None
    """Median of the slowest worker's compute."""

    rows_per_second: float | None
    """Median over the blocks."""

    block_medians_s: tuple[float, ...]
    """Each block's median, in the order of the run."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A number that the benchmark is run for."""

    of: str
    """What is judged."""

    means: str
    """What is divided by what."""

    value: float
    """The ratio."""

    target: str | None = None
    """What it should be; None where it only informs."""

    met: bool | None = None
    """Whether it is."""


def lines_of(blocks: Iterable[Block]) -> list[Line]:
    """Sum up blocks by name, in the order of their first appearance."""
    named: dict[str, list[Block]] = {}
    for block in blocks:
        named.setdefault(block.what, []).append(block)
    return [_line(what, of_name) for what, of_name in named.items()]


def _line(what: str, blocks: Sequence[Block]) -> Line:
    step_s = [second for block in blocks for second in block.step_s]
    compute_s = [second for block in blocks for second in block.compute_s]
    rows = blocks[0].rows_per_step
    return Line(
        what=what,
        rows_per_step=rows,
        steps=len(step_s),
        p50_s=median(step_s),
        p99_s=percentile(step_s, 0.99),
        compute_p50_s=median(compute_s) if compute_s else None,
        rows_per_second=median(block.rows_per_second for block in blocks) if rows else None,
        block_medians_s=tuple(median(block.step_s) for block in blocks),
    )


def ratios_of(blocks: Sequence[Block]) -> list[Ratio]:
    """Compare the lines; `blocks` in the order of the run."""
    overhead, speedup = _overhead(blocks, EMPTY_JOB), _speed(blocks, "product", "textbook")
    shards = list(dict.fromkeys(block.what for block in blocks if block.what.endswith("per worker")))
    return [
        Ratio(
            of="product",
            means=f"(step - slowest worker's compute) / {EMPTY_JOB}",
            value=overhead,
            target=f"<= {OVERHEAD_TARGET:g}",
            met=overhead <= OVERHEAD_TARGET,
        ),
        Ratio(
            of="product",
            means=f"(step - slowest worker's compute) / {OWN_EMPTY_JOB}",
            value=_overhead(blocks, OWN_EMPTY_JOB),
        ),
        Ratio(
            of="textbook",
            means="rows/s of product / textbook",
            value=speedup,
            target=f">= {SPEEDUP_TARGET:g}",
            met=speedup >= SPEEDUP_TARGET,
        ),
        Ratio(
            of="plain session",
            means="rows/s of product / plain session",
            value=_speed(blocks, "product", "plain session"),
        ),
        Ratio(
            of="one process",
            means="rows/s of product / one process",
            value=_speed(blocks, "product", "one process"),
        ),
        *(
            Ratio(of=what, means=f"rows/s of {shards[0]} / {what}", value=_speed(blocks, shards[0], what))
            for what in shards[1:]
        ),
    ]


def allreduce_ratios(blocks: Sequence[Block]) -> list[Ratio]:
    """Compare the all-reduce engine with DistributedDataParallel, and with itself on more shards."""
    ours, theirs = "sparksgd all-reduce", "DistributedDataParallel"
    names = list(dict.fromkeys(block.what for block in blocks))
    ratios = []
    for name in names:
        arm, _, size = name.partition(", ")
        if arm == ours:
            continue
        value = _speed(blocks, f"{ours}, {size}", name)
        if arm == theirs:
            ratios.append(
                Ratio(
                    of=name,
                    means=f"rows/s of {ours} / {name}",
                    value=value,
                    target=f">= {DDP_TARGET:g}",
                    met=value >= DDP_TARGET,
                )
            )
        else:
            ratios.append(Ratio(of=name, means=f"rows/s of {ours} / {name}", value=value))
    share = max(block.sent_share for block in blocks if block.sent_share is not None)
    ratios.append(
        Ratio(
            of="bytes",
            means="bytes sent per worker and step / (2 (W - 1) / W) gradients, the most of all sizes",
            value=share,
            target="1",
            met=abs(share - 1) < SENT_BESIDE,
        )
    )
    by_shards = [name for name in names if name.endswith("per worker")]
    for name in by_shards[1:]:
        means = f"rows/s of {by_shards[0]} / {name.rpartition(', ')[2]}"
        ratios.append(Ratio(of=name, means=means, value=_speed(blocks, by_shards[0], name)))
    return ratios


def _overhead(blocks: Sequence[Block], kind: str) -> float:
    """Return the median over the product's blocks of overhead / empty job, of its kind's next block."""
    ratios = []
    for number, steps in enumerate(blocks):
        if steps.what == "product":
            jobs = next(block for block in blocks[number:] if block.what == f"product: {kind}")
            ratios.append(steps.overhead_s / median(jobs.step_s))
    return median(ratios)


def _speed(blocks: Sequence[Block], faster: str, slower: str) -> float:
    """Return rows per second of one / of the other, medians over their blocks."""

    def speed(what: str) -> float:
        return median(block.rows_per_second for block in blocks if block.what == what)

    return speed(faster) / speed(slower)


def job_ratios(took_s: Mapping[str, Sequence[float]]) -> list[Ratio]:
    """Compare what whole jobs took: both of ours with both of theirs; one pair is judged."""
    ours_of_all = [name for name in took_s if name.startswith("sparksgd")]
    theirs_of_all = [name for name in took_s if name not in ours_of_all]
    ratios = []
    for ours, theirs in product(ours_of_all, theirs_of_all):
        value = median(took_s[ours]) / median(took_s[theirs])
        is_judged = (ours, theirs) == ("sparksgd", "TorchDistributor")
        ratios.append(
            Ratio(
                of=f"job, {ours}, {theirs}",
                means=f"wall-clock of a job with {ours} / {theirs}",
                value=value,
                target=f"<= {JOB_TARGET:g}" if is_judged else None,
                met=value <= JOB_TARGET if is_judged else None,
            )
        )
    return ratios


def job_table(title: str, took_s: Mapping[str, Sequence[float]]) -> Table:
    """Draw what whole jobs took."""
    table = Table("a whole job with", title=title)
    table.add_column("median s", justify="right")
    table.add_column("each")
    for name, seconds in took_s.items():
        table.add_row(name, f"{median(seconds):.1f}", ", ".join(f"{second:.1f}" for second in seconds))
    return table


def straggler_ratios(blocks: Sequence[Block]) -> list[Ratio]:
    """Compare the mean step beside a straggler with that of the undisturbed run."""
    ratios = []
    for what in dict.fromkeys(block.what for block in blocks):
        if what == _UNDISTURBED:
            continue
        value = _mean_step_s(blocks, what) / _mean_step_s(blocks, _UNDISTURBED)
        judged = what.endswith("b = 1")
        ratios.append(
            Ratio(
                of=what,
                means=f"mean step of {what} / {_UNDISTURBED}",
                value=value,
                target=f"<= {BACKUP_TARGET:g}" if judged else None,
                met=value <= BACKUP_TARGET if judged else None,
            )
        )
    return ratios


def accuracy_ratio(found: Mapping[str, Mapping[str, float]]) -> Ratio:
    """Compare what was learnt beside a worker that is always late with what was learnt of all."""
    without, backed = found["b = 0"]["accuracy"], found["b = 1"]["accuracy"]
    return Ratio(
        of="accuracy",
        means=f"points of test accuracy lost with b = 1 and one of 8 workers always late "
        f"({100 * backed:.2f} % instead of {100 * without:.2f} %)",
        value=100 * (without - backed),
        target=f"<= {ACCURACY_TARGET:g}",
        met=100 * (without - backed) <= ACCURACY_TARGET,
    )


def straggler_table(title: str, blocks: Sequence[Block]) -> Table:
    """Draw what steps took beside a straggler."""
    table = Table(title=title)
    table.add_column("what")
    for name in ("mean ms", "p50 ms", "p99 ms", "rows/s"):
        table.add_column(name, justify="right")
    for line in lines_of(blocks):
        mean_s = _mean_step_s(blocks, line.what)
        table.add_row(
            line.what, _ms(mean_s), _ms(line.p50_s), _ms(line.p99_s), f"{line.rows_per_step / mean_s:,.0f}"
        )
    return table


def _mean_step_s(blocks: Sequence[Block], what: str) -> float:
    """Return the median over blocks of their mean step: a step in three may take a second longer."""
    return median(sum(block.step_s) / len(block.step_s) for block in blocks if block.what == what)


def soak_ratios(early: Mapping[str, int], late: Mapping[str, int]) -> list[Ratio]:
    """Compare what the driver holds late in a training with what it held early."""
    steps = f"step {late['step']} / step {early['step']}"
    ratios = []
    for of in early:
        if of == "step":
            continue
        value = late[of] / early[of] if early[of] else float(late[of] > 0) + 1
        if of.startswith("temporary"):
            target, met = "<= 1", value <= 1
        else:
            target, met = f"1 +- {FLAT_SHARE:g}", abs(value - 1) <= FLAT_SHARE
        ratios.append(Ratio(of=of, means=steps, value=value, target=target, met=met))
    return ratios


def speed_table(title: str, lines: Sequence[Line]) -> Table:
    """Draw the times."""
    table = Table(title=title)
    table.add_column("what")
    for name in ("rows", "p50 ms", "p99 ms", "compute ms", "rows/s"):
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(
            line.what,
            str(line.rows_per_step or ""),
            _ms(line.p50_s),
            _ms(line.p99_s),
            "" if line.compute_p50_s is None else _ms(line.compute_p50_s),
            "" if line.rows_per_second is None else f"{line.rows_per_second:,.0f}",
        )
    return table


def size_table(title: str, lines: Sequence[Line]) -> Table:
    """Draw the times of lines named "arm, model, rows" side by side."""
    arms: dict[str, dict[str, Line]] = {}
    for line in lines:
        arm, _, size = line.what.partition(", ")
        arms.setdefault(arm, {})[size] = line
    table = Table("p50 / p99 ms, rows/s", title=title)
    for arm in arms:
        table.add_column(arm, justify="right")
    for size in dict.fromkeys(size for of_arm in arms.values() for size in of_arm):
        found = [of_arm.get(size) for of_arm in arms.values()]
        table.add_row(
            size,
            *(
                "" if line is None else f"{_ms(line.p50_s)} / {_ms(line.p99_s)}\n{line.rows_per_second:,.0f}"
                for line in found
            ),
        )
    return table


def ratio_table(ratios: Sequence[Ratio]) -> Table:
    """Draw the ratios."""
    table = Table("ratio", "target")
    table.add_column("is", justify="right")
    table.add_column("")
    for ratio in ratios:
        table.add_row(ratio.means, ratio.target or "", f"{ratio.value:.2f}", _verdict(ratio))
    return table


def soak_table(early: Mapping[str, int], late: Mapping[str, int], ratios: Sequence[Ratio]) -> Table:
    """Draw what the driver holds early and late."""
    table = Table("the driver's", title="A long training")
    for sample in (early, late):
        table.add_column(f"step {sample['step']:,}", justify="right")
    table.add_column("ratio", justify="right")
    table.add_column("target")
    table.add_column("")
    for ratio in ratios:
        shown = decimal if ratio.of.endswith("bytes") else str
        table.add_row(
            ratio.of.removesuffix("_bytes").replace("_", " "),
            shown(early[ratio.of]),
            shown(late[ratio.of]),
            f"{ratio.value:.3f}",
            ratio.target or "",
            _verdict(ratio),
        )
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _verdict(ratio: Ratio) -> str:
    return {None: "", True: "[green]met[/]", False: "[red]not met[/]"}[ratio.met]


def machine() -> dict[str, Any]:
    """Describe what this runs on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "java": _java_version(),
        **{package: version(package) for package in ("torch", "pyspark", "numpy")},
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def _java_version() -> str:
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else "java"
    answer = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    return answer.stderr.splitlines()[0] if answer.stderr else "unknown"
