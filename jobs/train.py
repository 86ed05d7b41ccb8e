"""Train a module on Spark by distributed SGD.

    spark-submit jobs/train.py --config conf/mnist-lenet.toml --set optimizer.nesterov=false --out runs/lenet
    spark-submit jobs/train.py --replay runs/lenet --out runs/again

A path may be a URI of any file system that Hadoop knows: hdfs:, s3a:, abfss: ...  A path without a scheme
is on this machine.

Exit status: 0 finished, stopped by train.max_wall_s, or nothing to do; 2 refused (configuration, data or
module); 3 training failed; 4 the cluster failed; 130 interrupted or cancelled; 143 terminated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from sparksgd.arithmetic import instruction_set
from sparksgd.cli.command_line import add_log_format, exit_status, parser_of
from sparksgd.cli.logs import log_to, new_run_id, open_console
from sparksgd.config import Config
from sparksgd.errors import ConfigError
from sparksgd.runs.asked import IfExists
from sparksgd.runs.lease import IfRunning
from sparksgd.runs.replay import read_replay
from sparksgd.storage import location
from sparksgd.training.interrupts import end_in_order


def parser() -> argparse.ArgumentParser:
    result = parser_of(__doc__)
    what = result.add_mutually_exclusive_group()
    what.add_argument("--config", metavar="FILE", help="TOML; without it, the defaults")
    what.add_argument("--replay", metavar="DIR", help="repeat the run of this --out folder")
    result.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="set a key, over the file; repeatable",
    )
    result.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the model, metrics and summary"
    )
    result.add_argument(
        "--if-exists", choices=get_args(IfExists), default="skip",
        help="what to do if --out holds a finished run.  skip (the default): nothing, if it has the same "
        "configuration, files and code, else refuse; fail: refuse; overwrite: train again; archive: as skip, "
        "but rename what is of something else to DIR.1 instead of refusing",
    )  # fmt: skip
    result.add_argument(
        "--resume", nargs="?", const="must", default="auto", metavar="HOW",
        help="whether to go on from the last checkpoint of a run that ended early, or with fewer epochs or "
        "other test data.  "
        "auto (the default): if --out holds such a run of this; must (--resume alone): refuse if it does "
        "not; never: begin anew; or another folder, whose run goes on in --out",
    )  # fmt: skip
    result.add_argument(
        "--if-running", choices=get_args(IfRunning), default="refuse",
        help="what to do if another run writes to --out.  refuse (the default): end with status 2; wait: for "
        "its end",
    )  # fmt: skip
    result.add_argument(
        "--callback", action="append", default=[], metavar="PACKAGE.MODULE:CLASS",
        help="watch the run by this subclass of sparksgd.Observer, which may end it by "
        "training.stop(reason); repeatable",
    )  # fmt: skip
    result.add_argument(
        "--status-when-stopped", type=_status, default=0, metavar="STATUS",
        help="the exit status of a run that train.max_wall_s stopped: 0 (the default), or 5 to 125",
    )  # fmt: skip
    add_log_format(result)
    result.add_argument(
        "--trust", action="append", default=[], metavar="PACKAGE",
        help="run code of this package, if the run of --replay names it; repeatable",
    )  # fmt: skip
    return result


def _status(text: str) -> int:
    """Return an exit status that means nothing else."""
    status = int(text) if text.isdecimal() else -1
    if status and not 5 <= status <= 125:
        raise argparse.ArgumentTypeError(f"{text} is not 0, nor from 5 to 125: the others have a meaning")
    return status


def main(argv: Sequence[str]) -> int:
    """Run a training; return the exit status."""
    return exit_status(lambda: _train(argv))


def _train(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    run_id, console = new_run_id(), open_console()
    log_to(console, run_id, args.log_format)
    if args.replay is None:
        if args.trust:
            raise ConfigError("--trust is for --replay: what your own configuration names needs no trust")
        replay, config = None, Config.load(args.config and location(args.config), args.set)
    else:
        if Path(args.replay).resolve() == Path(args.out).resolve():
            raise ConfigError(
                f"--out is {args.out}, but that folder holds the run to replay: name another folder"
            )
        replay = read_replay(args.replay, trust=args.trust)
        config = Config.load(replay.config, args.set)
    instruction_set.pin(config.train.instruction_set)  # before anything imports torch
    from sparksgd.cli.run import run
    from sparksgd.cli.terminal import Terminal
    from sparksgd.training.callbacks import Callback

    return run(
        config,
        args.out,
        run_id=run_id,
        terminal=Terminal(console, tables=args.log_format == "text"),
        callbacks=[Callback("--callback", name) for name in args.callback],
        status_when_stopped=args.status_when_stopped,
        replay=replay,
        if_exists=args.if_exists,
        resume=args.resume,
        if_running=args.if_running,
    )


if __name__ == "__main__":
    end_in_order()
    sys.exit(main(sys.argv[1:]))
