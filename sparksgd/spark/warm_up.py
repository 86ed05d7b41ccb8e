"""Make Spark start sooner on this machine: prepare once what every process would otherwise repeat.

    python -m sparksgd.spark.warm_up spark.jsa
    export SPARK_SUBMIT_OPTS="-XX:SharedArchiveFile=$PWD/spark.jsa"

First, an archive of the classes that a training loads.  Java maps them into memory, already parsed and
checked (class-data sharing).  The archive fits only the Java and the Spark that made it, and one class path,
so SPARK_CONF_DIR must not be set.  If the archive does not fit, Java ignores it.  If the file does not exist,
Java starts more slowly than without the option.

Second, the bytecode of PySpark, in the pyspark.zip that Spark puts first on the path of its drivers and
Python workers.  Python itself keeps no bytecode for a zip, so that each process would compile what it
imports.
"""

from __future__ import annotations

import argparse
import logging
import marshal
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from importlib.util import MAGIC_NUMBER, source_hash
from pathlib import Path

from pyspark.find_spark_home import _find_spark_home

__all__ = ["add_bytecode", "main"]

_ENGINES = "tree", "allreduce"
_LONGEST_S = 600
_OTHERS = "SPARK_CONF_DIR", "PYSPARK_SUBMIT_ARGS"  # they would change the class path
_UNCHECKED = (0b01).to_bytes(4, "little")  # identified by the hash of its source, which Python does not check


def main(argv: Sequence[str]) -> int:
    """Write the bytecode and the archive; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sparksgd.spark.warm_up",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("archive", type=Path, metavar="FILE", help="of classes; some 190 MB")
    archive: Path = parser.parse_args(argv).archive.absolute()
    try:
        add_bytecode(Path(_find_spark_home(), "python", "lib", "pyspark.zip"))
    except OSError as error:
        print(f"warning: PySpark's bytecode cannot be kept: {error}", file=sys.stderr)
    try:
        _archive_classes(archive)
    except (OSError, _Failed) as error:
        print(
            f"{error}\nerror: {archive} was not written. Spark does without: leave SPARK_SUBMIT_OPTS unset",
            file=sys.stderr,
        )
        return 4
    return 0


def add_bytecode(path: Path) -> None:
    """Add bytecode for the modules of a zip that have none; a Python of another version ignores it."""
    with zipfile.ZipFile(path) as zipped:
        names = set(zipped.namelist())
        modules = [name for name in names if name.endswith(".py") and "/tests/" not in name]
        bare = [name for name in modules if f"{name}c" not in names]
        sources = {name: zipped.read(name) for name in bare}
    if not sources:
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder, path.name)
        shutil.copy(path, whole)
        with zipfile.ZipFile(whole, "a", zipfile.ZIP_DEFLATED) as zipped, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about somebody else's source
            for name, source in sorted(sources.items()):
                code = compile(source, str(path / name), "exec", dont_inherit=True)
                header = MAGIC_NUMBER + _UNCHECKED + source_hash(source)
                zipped.writestr(f"{name}c", header + marshal.dumps(code))
        whole.replace(path)  # in one step: Python may be reading it


class _Failed(Exception):
    """Spark failed; the message is its last output."""


def _archive_classes(archive: Path) -> None:
    """Train a little on a JVM that writes its classes when it ends."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    submit = [str(Path(_find_spark_home(), "bin", "spark-submit")), "--master", "local[2]"]
    environment = {name: value for name, value in os.environ.items() if name not in _OTHERS}
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        written = Path(folder, archive.name)
        environment["SPARK_SUBMIT_OPTS"] = f'-XX:ArchiveClassesAtExit="{written}"'
        environment["PYSPARK_PYTHON"] = environment["PYSPARK_DRIVER_PYTHON"] = sys.executable
        try:
            done = subprocess.run(
                [*submit, "--conf", "spark.driver.memory=2g", __file__, folder],
                env=environment,
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=_LONGEST_S,
            )
        except subprocess.TimeoutExpired as error:
            raise _Failed(f"Spark did not end within {_LONGEST_S} s") from error
        if done.returncode or not written.exists():
            raise _Failed(done.stdout[-2000:] + done.stderr[-4000:])
        written.replace(archive)


def train_a_little(folder: str) -> None:
    """Do what a job does: read Parquet, check and deal rows, make steps by every engine, evaluate."""
    from sparksgd.config import Config
    from sparksgd.spark.session import job_session
    from sparksgd.spark.train import train

    logging.getLogger("sparksgd").setLevel(logging.ERROR)
    path = str(Path(folder, "rows.parquet"))
    with job_session("sparksgd warm-up", Config().train) as session:
        rows = session.range(64).selectExpr("array(float(id), 1f) as features", "id % 2 as label")
        rows.write.parquet(path)
        for engine in _ENGINES:
            config = Config.from_dict(
                {
                    "model": {"name": "torch.nn:Linear", "in_features": 2, "out_features": 2},
                    "engine": {"name": engine},
                    "train": {"rows_per_step": 16, "num_shards": 2, "epochs": 2},
                }
            )
            train(session, config, path, path)


if __name__ == "__main__":
    if "PYSPARK_GATEWAY_PORT" in os.environ:  # under spark-submit
        train_a_little(sys.argv[1])
    else:
        sys.exit(main(sys.argv[1:]))
