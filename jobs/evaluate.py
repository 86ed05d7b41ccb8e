"""Evaluate a trained model on Parquet: accuracy and confusion matrix.

    spark-submit jobs/evaluate.py --model runs/mnist-lenet/model --data data/mnist/test.parquet

Exit status: 0 done, 2 refused (model or data), 4 the cluster failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sparksgd.cli.command_line import add_loading, add_log_format, exit_status, parser_of
from sparksgd.cli.logs import log_to, new_run_id, open_console
from sparksgd.cli.run import run_evaluation
from sparksgd.training.interrupts import end_in_order


def parser() -> argparse.ArgumentParser:
    result = parser_of(__doc__)
    add_loading(result)
    result.add_argument(
        "--data",
        required=True,
        metavar="PARQUET",
        help="Parquet with the columns that the model was trained on: path or URI",
    )
    add_log_format(result)
    return result


def main(argv: Sequence[str]) -> int:
    """Print a model's scores; return the exit status."""
    return exit_status(lambda: _evaluate(argv))


def _evaluate(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    log_to(open_console(), new_run_id(), args.log_format)
    run_evaluation(args.model, args.data, args.trust, strict=args.strict)


if __name__ == "__main__":
    end_in_order()
    sys.exit(main(sys.argv[1:]))
