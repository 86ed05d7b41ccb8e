"""Let Spark start sooner on this machine: make once what it would make anew in every process.

    python -m sparksgd.spark.warm_up spark.jsa
    export SPARK_SUBMIT_OPTS="-XX:SharedArchiveFile=$PWD/spark.jsa"

An archive of the classes that a training loads: Java, which calls it class-data sharing, maps them into
memory, parsed and checked.  It fits the Java and the Spark that made it, and one path of classes, so
SPARK_CONF_DIR must not be set.  Where it does not fit Java starts as it would without; where the file that
it is told of is not there it starts later.

The bytecode of PySpark, within the pyspark.zip that Spark puts first on the path of its drivers and its
Python workers: of a zip Python keeps none by itself, so each process compiles what it imports.
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
_OTHERS = "SPARK_CONF_DIR", "PYSPARK_SUBMIT_ARGS"  # they would put other classes on the path
_UNCHECKED = (0b01).to_bytes(4, "little")  # known by the hash of its source, which nobody compares


def main(argv: Sequence[str]) -> int:
    """Write bytecode and archive; return the exit status."""
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
    """Add to a zip the bytecode of its modules that have none; a Python of another version passes it over."""
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
        whole.replace(path)  # at once: Python may be reading it


class _Failed(Exception):
    """Spark did not end well; the message is what it said last."""


def _archive_classes(archive: Path) -> None:
    """Train a little on a JVM that writes its classes at its end."""
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
    from sparksgd.spark.training import train_parquet

    logging.getLogger("sparksgd").setLevel(logging.ERROR)
    path = str(Path(folder, "rows.parquet"))
    with job_session("sparksgd warm-up", Config().train) as session:
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
        train_a_little(sys.argv[1])
    else:
        sys.exit(main(sys.argv[1:]))
