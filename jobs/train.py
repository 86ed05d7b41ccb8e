"""Train a module on Spark by synchronous SGD.

    spark-submit jobs/train.py --config conf/mnist-lenet.toml --set optimizer.nesterov=false --out runs/lenet

Exit status: 0 finished, 2 refused (configuration, data or module), 3 training failed, 4 the cluster
failed, 130 interrupted or cancelled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparksgd import instruction_set
from sparksgd.command_line import exit_status, parser_of
from sparksgd.config import Config


def parser() -> argparse.ArgumentParser:
    result = parser_of(__doc__)
    result.add_argument("--config", type=Path, metavar="FILE", help="TOML; without it, the defaults")
    result.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="over the file; repeatable"
    )
    result.add_argument("--out", required=True, type=Path, metavar="DIR", help="model, metrics, summary")
    return result


def main(argv: Sequence[str]) -> int:
    """Run a training; return the exit status."""
    args = parser().parse_args(argv)

    def work() -> None:
        config = Config.load(args.config, args.set)
        instruction_set.pin(config.train.instruction_set)  # before anything imports torch
        from sparksgd.run import run

        run(config, args.out)

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
