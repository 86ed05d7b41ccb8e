"""Train a module on Spark by synchronous SGD.

    spark-submit jobs/train.py --config conf/mnist-lenet.toml --set optimizer.nesterov=false --out runs/lenet
    spark-submit jobs/train.py --replay runs/lenet --out runs/again

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
from sparksgd.errors import ConfigError
from sparksgd.participation import Record


def parser() -> argparse.ArgumentParser:
    result = parser_of(__doc__)
    what = result.add_mutually_exclusive_group()
    what.add_argument("--config", type=Path, metavar="FILE", help="TOML; without it, the defaults")
    what.add_argument("--replay", type=Path, metavar="DIR", help="repeat the run of this --out folder")
    result.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="over the file; repeatable"
    )
    result.add_argument("--out", required=True, type=Path, metavar="DIR", help="model, metrics, summary")
    return result


def main(argv: Sequence[str]) -> int:
    """Run a training; return the exit status."""
    args = parser().parse_args(argv)

    def work() -> None:
        if args.replay is None:
            record, config = None, Config.load(args.config, args.set)
        else:
            if args.replay.resolve() == args.out.resolve():
                raise ConfigError(f"--out is {args.out}, which holds the record to be replayed: name another")
            record = Record.read(args.replay)
            config = Config.load(record.config, args.set)
        instruction_set.pin(config.train.instruction_set)  # before anything imports torch
        from sparksgd.run import run

        run(config, args.out, record)

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
