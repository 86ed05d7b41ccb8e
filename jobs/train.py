"""Train a module on Spark by synchronous SGD.

    spark-submit jobs/train.py --config conf/mnist-lenet.toml --set optimizer.nesterov=false --out runs/lenet
    spark-submit jobs/train.py --replay runs/lenet --out runs/again

Every path may be a URI: hdfs:, s3a:, abfss: ... as Hadoop knows them; without a scheme it is of this machine.

Exit status: 0 finished, or there was nothing to do; 2 refused (configuration, data or module); 3 training
failed; 4 the cluster failed; 130 interrupted or cancelled; 143 terminated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from sparksgd import instruction_set
from sparksgd.command_line import exit_status, parser_of
from sparksgd.config import Config
from sparksgd.earlier import IfExists
from sparksgd.errors import ConfigError
from sparksgd.interrupts import end_in_order
from sparksgd.logs import LogFormat, log_to, new_run_id, open_console
from sparksgd.participation import Record
from sparksgd.storage import location


def parser() -> argparse.ArgumentParser:
    result = parser_of(__doc__)
    what = result.add_mutually_exclusive_group()
    what.add_argument("--config", metavar="FILE", help="TOML; without it, the defaults")
    what.add_argument("--replay", metavar="DIR", help="repeat the run of this --out folder")
    result.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="over the file; repeatable"
    )
    result.add_argument("--out", required=True, metavar="DIR", help="model, metrics, summary")
    result.add_argument(
        "--if-exists", choices=get_args(IfExists), default="skip",
        help="a finished run in --out: of the same configuration, files and code there is nothing to do, any "
        "other is refused (skip, the default); refuse any (fail); train anew (overwrite)",
    )  # fmt: skip
    result.add_argument(
        "--log-format", choices=get_args(LogFormat), default="text", help="of log lines, on standard error"
    )
    return result


def main(argv: Sequence[str]) -> int:
    """Run a training; return the exit status."""
    args = parser().parse_args(argv)
    run_id, console = new_run_id(), open_console()
    log_to(console, run_id, args.log_format)

    def work() -> None:
        if args.replay is None:
            record, config = None, Config.load(args.config and location(args.config), args.set)
        else:
            if Path(args.replay).resolve() == Path(args.out).resolve():
                raise ConfigError(f"--out is {args.out}, which holds the record to be replayed: name another")
            record = Record.read(args.replay)
            config = Config.load(record.config, args.set)
        instruction_set.pin(config.train.instruction_set)  # before anything imports torch
        from sparksgd.run import run
        from sparksgd.terminal import Terminal

        run(
            config,
            args.out,
            run_id=run_id,
            terminal=Terminal(console, tables=args.log_format == "text"),
            record=record,
            if_exists=args.if_exists,
        )

    return exit_status(work)


if __name__ == "__main__":
    end_in_order()
    sys.exit(main(sys.argv[1:]))
