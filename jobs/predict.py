"""Add the predictions of a trained model to a table: the same rows, with new columns.

    spark-submit jobs/predict.py --model runs/mnist-lenet/model --data data/mnist/test.parquet --out predicted

A classifier gives the columns prediction (the class, a double) and probability (an array of floats); where a
row has several labels, prediction is an array of doubles, 0 or 1. A regression gives prediction, a double.
Where the loss is your own, and loss.kind was not set, prediction is an array of floats: what the module
gives. Bytes and shorts of Parquet are written as integers.

Exit status: 0 done, 2 refused (model or data), 3 the model failed, 4 the cluster failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

from sparksgd.cli.command_line import add_loading, add_log_format, exit_status, parser_of
from sparksgd.cli.logs import log_to, new_run_id, open_console
from sparksgd.cli.predictions import run_prediction
from sparksgd.spark.predicted_tables import PredictionJob, TableIfExists
from sparksgd.spark.prediction import OnBadRow
from sparksgd.training.interrupts import end_in_order


def parser() -> argparse.ArgumentParser:
    result = parser_of(__doc__)
    add_loading(result)
    data = result.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", metavar="PARQUET", help="Parquet with the features of the model: path or URI")
    data.add_argument("--table", metavar="NAME", help="a table of Spark's catalogue instead")
    out = result.add_mutually_exclusive_group(required=True)
    out.add_argument("--out", metavar="DIR", help="a folder for Parquet: path or URI")
    out.add_argument("--out-table", metavar="NAME", help="a table of Spark's catalogue instead")
    result.add_argument(
        "--if-exists", choices=get_args(TableIfExists), default="fail", help="what to do if the output exists"
    )
    result.add_argument(
        "--columns", metavar="A,B", help="the columns of the data to write; by default all of them"
    )
    result.add_argument(
        "--raw",
        action="store_true",
        help="also write rawPrediction: log-probabilities, or (-z, z) for one logit z",
    )
    result.add_argument(
        "--on-bad-row", choices=get_args(OnBadRow), default="error",
        help="rows that are null, misshapen or not finite: an error, left out, or kept with null",
    )  # fmt: skip
    add_log_format(result)
    return result


def main(argv: Sequence[str]) -> int:
    """Write the predictions; return the exit status."""
    return exit_status(lambda: _predict(argv))


def _predict(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    log_to(open_console(), new_run_id(), args.log_format)
    asked = PredictionJob(
        data=args.data or args.table,
        data_is_table=args.data is None,
        out=args.out or args.out_table,
        out_is_table=args.out is None,
        columns=tuple(name.strip() for name in args.columns.split(",")) if args.columns else None,
        with_raw=args.raw,
        on_bad_row=args.on_bad_row,
        if_exists=args.if_exists,
    )
    run_prediction(args.model, asked, tuple(args.trust), strict=args.strict)


if __name__ == "__main__":
    end_in_order()
    sys.exit(main(sys.argv[1:]))
