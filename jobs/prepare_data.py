"""Write a public data set as DIR/train.parquet and DIR/test.parquet (image: 784 bytes; label: int).

    python jobs/prepare_data.py --dataset mnist --out data/mnist
    python jobs/prepare_data.py --dataset fashion-mnist --out data/fashion --source DOWNLOADS

It needs no Spark, but spark-submit runs it as well.  You may interrupt and repeat it: finished files are
kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparksgd.cli.command_line import exit_status, parser_of
from sparksgd.data.sets import DATASETS, find_dataset, prepare
from sparksgd.training.interrupts import end_in_order


def parser() -> argparse.ArgumentParser:
    result = parser_of(__doc__)
    result.add_argument("--dataset", required=True, metavar="NAME", help=" or ".join(DATASETS))
    result.add_argument(
        "--out", required=True, metavar="DIR", help="path or URI; created if it does not exist"
    )
    result.add_argument(
        "--source",
        type=Path,
        metavar="DIR",
        help="folder of the four IDX files, plain or .gz; without it they are downloaded",
    )
    return result


def main(argv: Sequence[str]) -> int:
    """Return 0 if the data are written, 2 if something was refused, 130 if interrupted."""
    return exit_status(lambda: _prepare(argv), interrupted="interrupted: run the same command again to go on")


def _prepare(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    prepare(find_dataset(args.dataset), args.out, source=args.source)


if __name__ == "__main__":
    end_in_order()
    sys.exit(main(sys.argv[1:]))
