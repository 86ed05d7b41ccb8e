"""The jars that Hadoop's servers need besides Spark's own, and where they are.

    python jars.py

fetches them into build/hadoop-jars from Maven Central, by the resolver that comes with Spark (Ivy),
unless SPARKSGD_HADOOP_JARS names a folder that has them. IVY_SETTINGS may name Ivy's settings for
another repository.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyspark

FOLDER = Path(__file__).parents[2] / "build" / "hadoop-jars"
HADOOP_VERSION = "3.5.0"
JARS = {
    "org.apache.hadoop:hadoop-client-minicluster:3.5.0": (
        "06772d24529e59939915979b3edba204d367750ef7dc5120411f35221dd4818c"
    ),
    "org.bouncycastle:bcprov-jdk18on:1.82": (
        "14cde2fdfaa8890480a8e5b67aceef0c90f96682c1e23c133bafdc9e0b3255ce"
    ),
    "org.bouncycastle:bcpkix-jdk18on:1.82": (
        "bdc723e20834832ac6af136cb5b5ff05e43b71d4fa151cc6510d9212ee086e63"
    ),
    "org.bouncycastle:bcutil-jdk18on:1.82": (
        "4420691958ad1c0ba275a6d6d8a6317adbdbdc9277055b6a72aa89c88cda8c7d"
    ),
}
"""SHA-256 by Maven's coordinates."""

_FETCH_S = 300
_WHY = re.compile(r"(?:\w+\.)*\w+(?:Exception|Error): .*|\[FAILED.*|not found.*")


class NoJars(Exception):
    """Hadoop's servers cannot be started here; the message says why, in a line."""


def java() -> str:
    """Return the Java that Spark would take."""
    home = os.environ.get("JAVA_HOME")
    return str(Path(home) / "bin" / "java") if home else "java"


def file_name(coordinates: str) -> str:
    _, artifact, version = coordinates.split(":")
    return f"{artifact}-{version}.jar"


def spark_jars() -> Path:
    return Path(pyspark.__file__).parent / "jars"


def class_path() -> list[Path]:
    """Return the jars of Hadoop's servers: those of Spark's that they need, and the four.

    Raises:
        NoJars: nobody has fetched them, or this Spark has another Hadoop.
        FileNotFoundError: SPARKSGD_HADOOP_JARS names a folder that lacks one.
    """
    api = spark_jars() / f"hadoop-client-api-{HADOOP_VERSION}.jar"
    if not api.exists():
        found = [jar.name for jar in spark_jars().glob("hadoop-client-api-*.jar")]
        raise NoJars(f"pyspark {pyspark.__version__} has {found}, not Hadoop {HADOOP_VERSION}")
    named = os.environ.get("SPARKSGD_HADOOP_JARS")
    folder = Path(named) if named else FOLDER
    ours = [folder / file_name(coordinates) for coordinates in JARS]
    lacking = [jar.name for jar in ours if not jar.exists()]
    if lacking and named:
        raise FileNotFoundError(f"SPARKSGD_HADOOP_JARS is {named}, which lacks {', '.join(lacking)}")
    if lacking:
        raise NoJars("no jars of Hadoop: `make hadoop-jars`, or name their folder in SPARKSGD_HADOOP_JARS")
    # of Spark's 250 jars only these: web servers read through all that they see when they start
    wanted = re.compile(r"hadoop-client-(api|runtime)|slf4j-api|log4j-(api|core|slf4j2|1\.2)|jcl-over-slf4j")
    return [*(jar for jar in sorted(spark_jars().iterdir()) if wanted.match(jar.name)), *ours]


def fetch(folder: Path) -> None:
    """Fetch the jars that a folder lacks.

    Raises:
        NoJars: one could not be fetched, or is not the one that was tested.
    """
    (ivy,) = spark_jars().glob("ivy-*.jar")
    settings = os.environ.get("IVY_SETTINGS")
    for coordinates, sha256 in JARS.items():
        jar = folder / file_name(coordinates)
        if jar.exists():
            continue
        with tempfile.TemporaryDirectory() as work:
            got = Path(work) / jar.name
            command = [java(), "-Dsun.net.client.defaultConnectTimeout=10000", "-jar", str(ivy)]
            command += ["-settings", settings] if settings else []
            command += ["-cache", f"{work}/cache", "-notransitive", "-types", "jar", "-confs", "default"]
            command += ["-dependency", *coordinates.split(":")]
            command += ["-retrieve", f"{work}/[artifact]-[revision].[ext]"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_FETCH_S, check=False)
                said = done.stdout + done.stderr
            except subprocess.TimeoutExpired:
                said = f"[FAILED ] not within {_FETCH_S} s"
            if not got.exists():
                why = _WHY.search(said)
                raise NoJars(f"cannot fetch {coordinates} from Maven: {why[0] if why else said[-200:]}")
            found = hashlib.sha256(got.read_bytes()).hexdigest()
            if found != sha256:
                raise NoJars(f"{coordinates} has SHA-256 {found}, not {sha256}")
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(got, jar.with_suffix(".part"))
            jar.with_suffix(".part").rename(jar)


def main() -> int:
    """Fetch what is not there; say in a line what is wrong."""
    try:
        if not os.environ.get("SPARKSGD_HADOOP_JARS"):
            fetch(FOLDER)
        class_path()
    except (NoJars, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
