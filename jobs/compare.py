"""Compare solvers on one model in virtual time: which one, on which cluster?

    python jobs/compare.py conf/compare-mnist.toml --out runs/compared

The TOML names a base configuration, solvers with their settings, and clusters; jobs/README.md describes it,
and the protocol. A table, a CSV, the plots of each cluster and all runs go to --out. The same command goes on
where an earlier one ended: no run is made twice.

Exit status: 0 done, 2 refused (configuration or data), 3 a training failed otherwise than by divergence,
130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sparksgd.arithmetic import instruction_set
from sparksgd.cli.command_line import add_log_format, exit_status, parser_of
from sparksgd.cli.logs import log_to, new_run_id, open_console
from sparksgd.config import Config
from sparksgd.runs.comparing.reading import read_question
from sparksgd.training.interrupts import end_in_order


def parser() -> argparse.ArgumentParser:
    result = parser_of(__doc__)
    result.add_argument("comparison", metavar="FILE", help="TOML: what is compared")
    result.add_argument(
        "--data", metavar="PARQUET", help="rows to train on, in place of the base's data.train"
    )
    result.add_argument("--out", required=True, metavar="DIR", help="folder for all files: path or URI")
    add_log_format(result)
    return result


def main(argv: Sequence[str]) -> int:
    """Make the comparison; return the exit status."""
    return exit_status(lambda: _compare(argv), interrupted="interrupted: the same command goes on")


def _compare(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    console = open_console()
    log_to(console, new_run_id(), args.log_format)
    question = read_question(args.comparison, args.data)
    instruction_set.pin(Config.from_dict(question.base).train.instruction_set)  # before torch is imported
    from sparksgd.cli.comparing import run_comparison

    run_comparison(question, args.out, console)


if __name__ == "__main__":
    end_in_order()
    sys.exit(main(sys.argv[1:]))
