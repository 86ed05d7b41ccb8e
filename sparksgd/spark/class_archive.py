"""Let Spark's JVM start sooner: an archive of the classes that a training loads.

    python -m sparksgd.spark.class_archive spark.jsa
    export SPARK_SUBMIT_OPTS="-XX:SharedArchiveFile=$PWD/spark.jsa"

Java calls it class-data sharing: with the archive the classes of Spark are mapped into memory, checked and
parsed already.  It fits the Java and the Spark that made it, and one path of classes: SPARK_CONF_DIR, if set,
must name an empty folder, or none.  Where it does not fit, Java starts as it would without.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

_ENGINES = "tree", "allreduce"


def main(argv: Sequence[str]) -> int:
    """Train a little on a Spark whose JVM writes its classes when it ends; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sparksgd.spark.class_archive",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="FILE", help="the archive; some 190 MB")
    out: Path = parser.parse_args(argv).out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    submit = [str(Path(sys.executable).with_name("spark-submit")), "--master", "local[2]"]
    options = {"SPARK_SUBMIT_OPTS": f'-XX:ArchiveClassesAtExit="{out}"', "PYSPARK_PYTHON": sys.executable}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*submit, "--conf", "spark.driver.memory=2g", __file__, folder],
            env=os.environ | options,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode or not out.exists():
        said = done.stdout[-2000:], done.stderr[-4000:]
        print(*said, f"error: {out} was not written; Spark's last words are above", sep="\n", file=sys.stderr)
        return 4
    return 0


def load_classes(folder: str) -> None:
    """Do what a job does: read Parquet, check and deal rows, make steps by every engine, evaluate."""
    from sparksgd.config import Config
    from sparksgd.spark.session import job_session
    from sparksgd.spark.training import train_parquet

    logging.getLogger("sparksgd").setLevel(logging.ERROR)
    path = str(Path(folder, "rows.parquet"))
    with job_session("sparksgd class archive", Config().train) as session:
        rows = session.range(64).selectExpr("array(float(id), 1f) as features", "id % 2 as label")
        rows.write.parquet(path)
        for engine in _ENGINES:
            config = Config.from_dict(
                {
                    "data": {"train": path, "test": path},
                    "model": {"name": "torch.nn:Linear", "in_features": 2, "out_features": 2},
                    "engine": {"name": engine},
                    "train": {"rows_per_step": 16, "num_shards": 2, "epochs": 2},
                }
            )
            train_parquet(session, config)


if __name__ == "__main__":
    if "PYSPARK_GATEWAY_PORT" in os.environ:  # under spark-submit
        load_classes(sys.argv[1])
    else:
        sys.exit(main(sys.argv[1:]))
