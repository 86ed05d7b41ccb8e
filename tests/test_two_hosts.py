"""Trainings across real hosts: a standalone master, and two workers with addresses of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from two_hosts import INSIDE, PROBE, WORKERS  # tests/hosts

from sparksgd.config import Config
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.training.loop import train

pytestmark = pytest.mark.jvm

HOSTS = Path(__file__).parent / "hosts"

ENCRYPTED = {
    "spark.authenticate": "true",
    "spark.authenticate.secret": "of this test",
    "spark.network.crypto.enabled": "true",
}
SMALL = ("model.maps=[4, 8]", "model.hidden=16", "train.steps=20")
OF_431080 = ("model.maps=[20, 50]", "model.hidden=500", "model.padding=0", "train.steps=20")


@pytest.fixture(scope="module", autouse=True)
def _hosts_can_be_made() -> None:
    probe = subprocess.run([*INSIDE, "sh", "-c", PROBE], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"network namespaces cannot be made here: {probe.stderr.strip()}")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """Write 2,000 images that nobody need recognise."""
    path, source = tmp_path_factory.mktemp("images") / "train.parquet", np.random.default_rng(0)
    images = source.integers(0, 256, (2000, 784), np.uint8)
    labels = source.integers(0, 10, 2000)
    pq.write_table(pa.table({"image": [image.tobytes() for image in images], "label": labels}), path)
    return str(path)


def settings_of(path: str, *settings: str) -> list[str]:
    base = (
        f"data.train={path}", "data.features=image", "optimizer.lr=0.01", "optimizer.momentum=0.9",
        "train.epochs=9", "train.num_shards=4", "engine.num_workers=2",
    )  # fmt: skip
    return [*base, *settings]


def digest_of_reference(path: str, *settings: str) -> str:
    config = Config.load(None, settings_of(path, *settings))
    training = train(config, rows=ParquetRows(path), test=None, make_engine=InlineEngine)
    return training.flat.parameters_sha256()


def trained(
    folder: Path, path: str, trainings: list[tuple[str, ...]], spark: dict[str, str], *options: str
) -> list[dict]:
    """Train on a cluster of two hosts; return what each training came to."""
    task, results, properties = (folder / name for name in ("task.json", "results.json", "properties"))
    properties.write_text("".join(f"{key} {value}\n" for key, value in spark.items()))
    task.write_text(
        json.dumps({"spark": spark, "trainings": [settings_of(path, *training) for training in trainings]})
    )
    program = [sys.executable, str(HOSTS / "trainings.py"), str(task), str(results)]
    without = ("SPARK_LOCAL_IP", "SPARK_HOME")
    cluster = [sys.executable, str(HOSTS / "two_hosts.py"), *options, "--properties", str(properties)]
    done = subprocess.run(
        [*INSIDE, *cluster, str(folder), *program],
        env={key: value for key, value in os.environ.items() if key not in without}
        | {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_DIRS": str(folder / "driver")},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return json.loads(results.read_text())


@pytest.mark.soak
@pytest.mark.parametrize("spark", [{}, ENCRYPTED], ids=["plain Spark", "encrypted Spark"])
def test_both_engines_reach_the_digest_of_the_reference_across_hosts(tmp_path, images, spark):
    trainings = [
        (*SMALL, "engine.name=tree"),
        (*SMALL, "engine.name=allreduce", "engine.segment_steps=10"),
        (*SMALL, "engine.name=auto", "engine.segment_steps=7", "engine.encrypt=true"),
        (*SMALL, "engine.barrier=false", f"data.test={images}"),
    ]
    found = trained(tmp_path, images, trainings, spark)
    assert [result["engine"] for result in found] == ["tree", "allreduce", "allreduce", "tree"]
    reference = digest_of_reference(images, *SMALL)
    for result in found:
        assert (result["parameters_sha256"], result["retries"]) == (reference, 0)
        assert result["hosts"] == sorted(WORKERS)


@pytest.mark.soak
def test_both_engines_train_across_a_link_of_one_gigabit_per_second(tmp_path, images):
    trainings = [(*OF_431080, f"engine.name={name}") for name in ("tree", "allreduce")]
    tree, allreduce = trained(tmp_path, images, trainings, {}, "--rate", "1gbit")
    assert tree["hosts"] == allreduce["hosts"] == sorted(WORKERS)
    reference = digest_of_reference(images, *OF_431080)
    assert tree["parameters_sha256"] == allreduce["parameters_sha256"] == reference
    links = json.loads((tmp_path / "links.json").read_text())
    limited = [link for link in links if link["kind"] == "tbf"]
    assert {link["dev"] for link in limited} == WORKERS.keys()
    for link in limited:
        assert link["bytes"] > 20 * 2 * 431_080 * 4  # a vector a step, for either engine
        assert link["overlimits"] > 100  # packets did wait for the rate
