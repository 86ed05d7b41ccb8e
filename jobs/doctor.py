"""Say whether this cluster can train: one screen, on which each line passes, warns or fails with its fix.

    spark-submit jobs/doctor.py --config conf/mnist-lenet.toml --out runs/lenet

Submit it with the options of the training, and only another job.  It looks at the driver, the slots, Spark's
settings, the executors, memory and disk, the network, three steps on each engine, and the output folder.

Exit status: 0 nothing fails; 1 something does; 2 refused (the configuration); 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sparksgd.arithmetic import instruction_set
from sparksgd.cli.command_line import exit_status, parser_of
from sparksgd.cli.logs import open_console
from sparksgd.config import Config
from sparksgd.storage import location
from sparksgd.training.interrupts import end_in_order


def parser() -> argparse.ArgumentParser:
    result = parser_of(__doc__)
    result.add_argument("--config", metavar="FILE", help="TOML of the training; without it, LeNet on MNIST")
    result.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="set a key, over the file; repeatable",
    )
    result.add_argument(
        "--out", metavar="DIR", help="the training's: a checkpoint is written, read and removed there"
    )
    result.add_argument("--json", action="store_true", help="print one JSON document, and nothing else")
    result.add_argument(
        "--within", type=float, default=60.0, metavar="SECONDS",
        help="what is not seen by then is skipped; default 60, from when Spark has started",
    )  # fmt: skip
    return result


def main(argv: Sequence[str]) -> int:
    """Look, and show what was found; return the exit status."""
    return exit_status(lambda: _examine(argv))


def _examine(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    config = Config.load(args.config and location(args.config), args.set)
    instruction_set.pin(config.train.instruction_set)  # before anything imports torch
    from sparksgd.cli.doctor import examine

    is_well = examine(
        config,
        args.out,
        within_s=args.within,
        as_json=args.json,
        console=open_console(output=True),
        progress=open_console(),
    )
    return 0 if is_well else 1


if __name__ == "__main__":
    end_in_order()
    sys.exit(main(sys.argv[1:]))
