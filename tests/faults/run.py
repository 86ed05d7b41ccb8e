"""Strikes trainings with faults, one after the other, and writes the table of what came of them.

    python tests/faults/run.py [--only WORD...] [--engine WORD...] [--out FILE]

--only strikes with some faults, --engine at some engines; the other rows of the file stay as they are.

Each run is struck at a step.  It must end at the bits of an undisturbed run, or be refused in the words that
the table shows.  "Seconds lost" are its wall time less the median of undisturbed runs of the same session.
The exit status is 1 if a row is not as it should be.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from table import Fault, NotHere, Outcome, Place, Row, updated, wanted

TESTS = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str]) -> int:
    """Strike; return the exit status."""
    options = _options(argv)
    _look_around()
    import mounts

    mounts.begin_with_own_mounts()
    import of_disks
    import of_hadoop
    import of_hosts
    import of_processes

    started_s, rows, version = time.perf_counter(), [], _version()
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        for module in (of_processes, of_disks, of_hosts, of_hadoop):
            for place in module.places(Path(temporary, module.__name__)):
                faults = wanted(place.faults, options.only, options.engine)
                if faults:
                    print(f"{place.name}:", flush=True)
                    rows += _struck(place, faults, options.out, version, temporary)
    print(f"{len(rows)} rows in {(time.perf_counter() - started_s) / 60:.0f} minutes; see {options.out}")
    wrong = [row for row in rows if not row.outcome.is_right]
    for row in wrong:
        print(f"NOT AS IT SHOULD BE: {row}", file=sys.stderr)
    return 1 if wrong or not rows else 0


def _struck(place: Place, faults: Sequence[Fault], page: Path, version: str, temporary: str) -> list[Row]:
    """Strike this version with these faults; write each row to the page, and return all."""
    rows: list[Row] = []

    def write(fault: Fault, engine: str, outcome: Outcome) -> None:
        outcome = replace(outcome, result=outcome.result.replace(temporary, "/tmp/..."))
        rows.append(Row(fault=fault, engine=engine, outcome=outcome, when=version))
        page.write_text(updated(page.read_text() if page.exists() else "", rows[-1]))

    try:
        with place.opened() as here:
            for fault in faults:
                for engine in fault.engines:
                    started_s = time.perf_counter()
                    try:
                        found = fault.strike(here, engine)
                    except Exception as error:
                        traceback.print_exc()
                        found = Outcome(result=f"{type(error).__name__}: {error}", is_right=False)
                    write(fault, engine, found)
                    took_s = time.perf_counter() - started_s
                    print(f"  {rows[-1]} {took_s:.0f} s", flush=True)
    except NotHere as why:
        for fault in faults:
            for engine in fault.engines:
                write(fault, engine, Outcome(result=f"not run: {why}", is_right=True))
    return rows


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="faults in whose first columns this stands"
    )
    parser.add_argument(
        "--engine", nargs="+", default=[""], metavar="WORD", help="engines in whose names this stands"
    )
    parser.add_argument("--out", type=Path, default=TESTS / "FAULTS.md", metavar="FILE")
    return parser.parse_args(argv)


def _version() -> str:
    """Return the date, and the version of this checkout, before the page makes it dirty."""
    version = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=TESTS, capture_output=True, text=True, check=False
    ).stdout.strip()
    return f"{datetime.now(UTC).strftime('%Y-%m-%d')}, {version}"


def _look_around() -> None:
    """Let this process and those of Spark find the modules of tests, as tests/conftest.py does."""
    folders = [str(TESTS / name) for name in ("modules", "hosts", "cluster", "spark")]
    sys.path[:0] = folders
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    os.environ.setdefault("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folders[0], os.environ.get("PYTHONPATH")]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
