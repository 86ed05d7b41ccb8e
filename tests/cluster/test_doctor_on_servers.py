"""The doctor on real clusters: it finds those good that train, and says what one lacks."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from checkouts import SMALL, Checkout, sets

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

LONG = ("--within", "300")
ENGINES = {"inline", "tree", "tree, stages", "allreduce", "server"}


def examined(checkout: Checkout, command: list[str]) -> tuple[int, dict[str, Any]]:
    """Submit the doctor; return its status, and what it printed."""
    words = ["jobs/doctor.py" if word == "jobs/train.py" else word for word in command]
    done = checkout.run("sh", "-c", 'exec "$@" 2> doctor.log', "sh", *words)  # there Spark logs
    return done.returncode, json.loads(done.stdout)


def of_status(status: str, document: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {one["name"]: one for one in document["findings"] if one["status"] == status}


def test_yarn_is_found_good_and_its_hdfs_written_to(checkout):
    words = [*sets(*SMALL), "--json", *LONG, "--out", "hdfs:///models/doctor"]
    status, document = examined(checkout, checkout.on_yarn(*words))
    assert (status, of_status("fail", document)) == (0, {}), document
    assert of_status("pass", document).keys() >= {"--out", "between executors", "with the driver", *ENGINES}
    assert len(document["facts"]["executors"]) == 2
    assert "hdfs:///models/doctor" in of_status("pass", document)["--out"]["seen"]
    listed = checkout.run("hdfs", "dfs", "-ls", "/models")
    assert "doctor" not in listed.stdout


def test_standalone_is_found_good_with_the_archive_and_its_lack_is_told_without(checkout, standalone):
    command = [
        "spark-submit", "--master", standalone.address, "--properties-file", "conf/spark-standalone.conf",
        "--conf", "spark.pyspark.driver.python=python3", "--executor-memory", "640m", "--conf",
        "spark.cores.max=2", "--archives", "dist/environment.tar.gz#environment", "--py-files",
        "dist/sparksgd.zip", "jobs/doctor.py", "--config", "conf/mnist-lenet.toml", *sets(*SMALL), *LONG,
        "--json",
    ]  # fmt: skip
    status, document = examined(checkout, command)
    assert (status, of_status("fail", document)) == (0, {}), document
    assert of_status("pass", document).keys() >= {"disk", "memory", *ENGINES}
    assert "6,000 rows" in of_status("pass", document)["disk"]["seen"]

    archive = command.index("--archives")
    command[archive : archive + 2] = ["--conf", "spark.pyspark.python=python3"]  # the nodes' own
    status, document = examined(checkout, command)
    failing = of_status("fail", document)
    assert (status, failing.keys()) == (1, {"their Python"}), document
    assert re.search(r"lacks .*torch", failing["their Python"]["seen"])
    assert "--archives" in failing["their Python"]["fix"]
    assert of_status("skip", document).keys() >= {"network", "training"}
