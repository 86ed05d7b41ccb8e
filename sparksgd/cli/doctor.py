"""The doctor's screen: each finding in a line, and what mends it; or all of it as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparksgd.config import Config
from sparksgd.errors import ClusterError, ConfigError
from sparksgd.solvers.rules import completed
from sparksgd.training.preflight import allowed_engines

if TYPE_CHECKING:
    from sparksgd.spark.doctor.examination import Group
    from sparksgd.spark.doctor.findings import Finding

__all__ = ["examine", "screen"]

_STYLES = {"pass": "green", "warn": "bold yellow", "fail": "bold red", "skip": "dim"}
_MOST_PRINTED = 10_000
_NO_SESSION = "see Spark's own log lines"


def examine(
    config: Config, out: str | None, *, within_s: float, as_json: bool, console: Console, progress: Console
) -> bool:
    """Examine the cluster of this process, and show what was found; return whether nothing failed.

    Args:
        config: of the run that would be made.
        out: the folder that it would write to; None: not said.
        within_s: how long all looks may take.
        as_json: whether to print one JSON document instead of the screen.
        console: where the screen goes; standard output.
        progress: where it is shown what is looked at, if that is a terminal.

    Raises:
        ConfigError: the configuration is refused, or needs no cluster.
    """
    from sparksgd.spark.cluster.environments import own_version

    started = time.perf_counter()
    with TemporaryFile() as file:
        with _printing_to(file) if as_json else nullcontext():
            groups, about = _examined(config, out, within_s, progress)
        file.seek(0)
        printed = file.read().decode(errors="replace")[-_MOST_PRINTED:]
    took_s = time.perf_counter() - started
    findings = [finding for group in groups for finding in group.findings]
    counts: Counter[str] = Counter(finding.status for finding in findings)
    if as_json:
        document = {
            "sparksgd": own_version(),
            **about,
            "took_s": took_s,
            "counts": {status: counts[status] for status in _STYLES},
            "findings": [
                {"group": group.title} | asdict(finding) for group in groups for finding in group.findings
            ],
            "printed": printed,
        }
        print(json.dumps(document, indent=2))
    else:
        title = ", ".join(filter(None, (about.get("master"), about.get("application"))))
        console.print(screen(groups))
        console.print(_last_line(counts, title, took_s))
    return not counts["fail"]


def _examined(
    config: Config, out: str | None, within_s: float, progress: Console
) -> tuple[list[Group], dict[str, Any]]:
    """Return what was found, and facts for programs; arguments as above."""
    from sparksgd.spark.doctor.examination import Examination, Group
    from sparksgd.spark.doctor.findings import broken
    from sparksgd.spark.session import job_session

    config = completed(config)
    kinds = allowed_engines(config)
    if not kinds[0].on_spark:
        raise ConfigError(f"{kinds[0]} needs no cluster, and a cluster is what is looked at: leave it out")
    groups, about = list[Group](), dict[str, Any]()
    with progress.status("starting Spark") if progress.is_terminal else nullcontext() as shown:

        def say(name: str) -> None:
            if shown is not None:
                shown.update(f"looking at {name}")

        try:
            with job_session("sparksgd doctor", config.train, config.engine.slots_timeout_s) as session:
                context = session.sparkContext
                about = {"master": str(context.master), "application": str(context.applicationId)}
                examination = Examination(
                    session,
                    config,
                    kinds,
                    out=out,
                    within_s=within_s,
                    is_submitted="PYSPARK_GATEWAY_PORT" in os.environ,
                    say=say,
                )
                groups += examination.run()
                about["facts"] = examination.facts()
        except (ClusterError, ConfigError) as error:
            groups.append(Group(title="Session", findings=[broken("Spark session", error, _NO_SESSION)]))
    return groups, about


@contextmanager
def _printing_to(file: IO[bytes]) -> Iterator[None]:
    """Let what this process and its children print go to a file; if the block raises, it is shown then.

    Below spark-submit standard error is the same stream as standard output, and goes there, too.
    """
    streams = [stream for stream in (1, 2) if os.path.sameopenfile(1, stream)]
    sys.stdout.flush()
    before = {stream: os.dup(stream) for stream in streams}
    try:
        for stream in streams:
            os.dup2(file.fileno(), stream)
        with os.fdopen(os.dup(file.fileno()), "w", buffering=1) as text, redirect_stdout(text):
            yield
    except BaseException:
        file.seek(0)
        os.write(before.get(2, 2), file.read())
        raise
    finally:
        for stream, copy in before.items():
            os.dup2(copy, stream)
            os.close(copy)


def screen(groups: Sequence[Group]) -> Table:
    """Return the screen: groups of findings, and under each finding what mends it."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=4)
    table.add_column(no_wrap=True, min_width=14)
    table.add_column(overflow="fold")
    for group in groups:
        table.add_row("", Text(group.title, "bold"), "")
        for finding in group.findings:
            table.add_row(*_row(finding))
    return table


def _row(finding: Finding) -> tuple[Text, Text, Text]:
    style = _STYLES[finding.status]
    told = Text(finding.seen, "" if finding.status != "skip" else "dim")
    if finding.fix:
        told.append("\n")
        told.append("fix  ", "bold cyan")
        told.append(finding.fix, "cyan")
    return Text(finding.status, style), Text(finding.name), told


def _last_line(counts: Counter[str], title: str, took_s: float) -> Text:
    line = Text()
    for status, style in _STYLES.items():
        if counts[status]:
            line.append(f"{counts[status]} {status}", style)
            line.append("  ")
    line.append(f"in {took_s:.0f} s", "dim")
    if title:
        line.append(f", {title}", "dim")
    return line
