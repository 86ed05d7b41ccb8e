"""Every line of README's section on clusters, and what it promises: the same bits, wherever they ran."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest
import servers  # tests/hosts
from checkouts import HELD, HOLDING, ROOT, SMALL, processes_of, sets
from cluster_fixtures import README_LINES, SECRET
from holds import Hold  # tests/hosts

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SUBMISSIONS = [line for line in README_LINES if line.startswith("spark-submit ")]
ENCRYPTED = ["--conf", "spark.authenticate=true", "--conf", "spark.network.crypto.enabled=true"]


def test_the_nodes_own_python_cannot_train():
    environment = servers.node_environment(os.environ)
    command = ["/usr/bin/env", "python3", "-c", "import torch"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert b"No module named 'torch'" in done.stderr


@pytest.mark.gate
@pytest.mark.parametrize("line", SUBMISSIONS, ids=lambda line: re.search(r"(lenet-of-\w+)", line)[1])
def test_a_line_of_readme_does_what_it_says(checkout, request, line):
    if "spark://host:7077" in line:
        line = line.replace("spark://host:7077", request.getfixturevalue("standalone").address)
    done = checkout.run(*shlex.split(line))
    assert done.returncode == 0, done.stdout
    if "jobs/evaluate.py" in line:
        assert "Confusion matrix" in done.stdout
        return
    summary = checkout.summary(re.search(r"--out hdfs://(\S+)", line)[1])
    reference = checkout.reference()
    for key in ("parameters_sha256", "buffers_sha256", "data_digest", "test_accuracy", "steps"):
        assert summary[key] == reference[key], key
    assert summary["engine"] == ("allreduce" if "allreduce" in line else "tree")
    assert summary["num_workers"] == 2
    assert summary["retried_steps"] == 0
    start = summary["start_up_s"]
    assert list(start)[:4] == ["submit", "containers", "shards", "first_step"]
    if "spark://" in line:
        assert start["environment"] > 1  # each executor unpacks it there; on YARN a node does, once
    assert all(seconds >= 0 for seconds in start.values())
    if "--deploy-mode cluster" not in line:
        assert re.search(r"start .*submit [\d.]+ +containers", done.stdout)


def test_a_node_unpacks_the_environment_once_for_all_applications(checkout):
    assert len(checkout.hadoop.applications()) >= 2
    for number in (0, 1):
        local = checkout.hadoop.folder / f"nodemanager-{number}" / "local"
        assert len(list(local.rglob("filecache/*/environment.tar.gz"))) == 1


def test_a_second_submission_has_nothing_to_do_and_another_is_refused(checkout, tmp_path):
    (line,) = [line for line in SUBMISSIONS if "--deploy-mode client" in line]
    words = shlex.split(line)
    checkout.run(*words)  # another test may have done so
    applications = len(checkout.hadoop.applications())
    done = checkout.run(*words, "--set", "engine.num_workers=1")
    assert (done.returncode, "nothing to do" in done.stdout) == (0, True), done.stdout
    done = checkout.run(*words, "--set", "optimizer.lr=0.05", "--log-format", "json")
    assert done.returncode == 2, done.stdout
    (said,) = [json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")]
    assert "optimizer.lr is 0.05, but was 0.1" in said["message"]
    assert len(checkout.hadoop.applications()) == applications  # it did not ask the cluster for anything


def test_a_path_of_the_drivers_machine_is_refused_for_output_in_cluster_mode(checkout):
    done = checkout.run(*checkout.on_yarn("--out", "models/lenet", mode="cluster"))
    assert done.returncode == 1
    application = checkout.hadoop.applications()[0]
    refusal = "--out is models/lenet, of the driver's machine; but --deploy-mode is cluster"
    first, again = checkout.hadoop.container_logs(application["id"]).values()
    assert f"error: {refusal}" in first
    assert f"error: attempt 1 of {application['id']} ended with: {refusal}" in again
    assert "User application exited with status 2" in application["diagnostics"]


def test_from_another_directory_encrypted_with_a_module_of_ones_own_seen_in_the_history(
    checkout, history_server, tmp_path
):
    (tmp_path / "theirs.py").write_text(
        "from torch import nn\n\n"
        "class Linear(nn.Linear):\n"
        "    def forward(self, image):\n"
        "        return super().forward(image.float() / 255)\n\n"
        "def factory(classes=10):\n"
        "    return Linear(784, classes)\n"
    )
    settings = ("train.num_shards=4", "train.rows_per_step=120")
    module = "model.name=theirs:factory"
    events = f"{checkout.hadoop.default_fs}/events"
    checkout.run("hdfs", "dfs", "-mkdir", "-p", "/events")
    recorded = ["--conf", "spark.eventLog.enabled=true", "--conf", f"spark.eventLog.dir={events}"]
    words = checkout.on_yarn(
        *sets(*settings, module), "--out", "hdfs:///models/theirs", settings=[*recorded, *ENCRYPTED]
    )
    elsewhere = [
        str(checkout.folder / word) if word.startswith(("conf/", "jobs/")) else word for word in words
    ]
    shipped = f"{checkout.folder}/dist/sparksgd.zip,{tmp_path}/theirs.py"
    elsewhere[elsewhere.index("dist/sparksgd.zip")] = shipped
    done = checkout.run(*elsewhere, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["theirs.py"]

    local = checkout.folder / "theirs.py"
    local.write_bytes((tmp_path / "theirs.py").read_bytes())
    reference = checkout.reference(*settings, module)
    summary = checkout.summary("/models/theirs")
    assert summary["parameters_sha256"] == reference["parameters_sha256"]

    address = history_server(events, **checkout.environment)

    def seen(path: str) -> list[dict]:
        with urllib.request.urlopen(f"{address}/api/v1/applications{path}", timeout=10) as answer:
            return json.load(answer)

    (application,) = servers.wait_for(lambda: seen(""), "the application in the history")
    assert application["name"] == f"sparksgd theirs {summary['run_id']}"
    jobs = [job.get("description", "") for job in seen(f"/{application['id']}/jobs")]
    assert any(re.fullmatch(r"sparksgd: step 6 .*", name) for name in jobs), jobs
    assert all(name.startswith("sparksgd: ") for name in jobs), jobs


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """Return the addresses and ports, of IPv4, on which some processes listen."""
    sockets = set()
    for pid in pids:
        try:
            for link in Path(f"/proc/{pid}/fd").iterdir():
                found = re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink()))
                sockets.update(found.groups() if found else ())
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                address, port = fields[1].split(":")
                raw = bytes.fromhex(address[-8:])[::-1]
                found.add((socket.inet_ntoa(raw), int(port, 16)))
    return found


@pytest.mark.parametrize(("where", "engine"), [("yarn in cluster mode", "allreduce"), ("standalone", "tree")])
def test_the_other_engine_encrypted(checkout, request, where, engine):
    out, settings = f"/models/encrypted-{engine}", (*SMALL, "train.steps=20")
    # Executors may come one by one, so the number of workers is said.
    words = [*sets(*settings, f"engine.name={engine}", "engine.num_workers=2"), "--out", f"hdfs://{out}"]
    if where == "standalone":
        command = on_encrypted_standalone(request.getfixturevalue("encrypted_standalone").address, *words)
    else:
        command = checkout.on_yarn(*words, mode="cluster", settings=ENCRYPTED)
    done = checkout.run(*command)
    assert done.returncode == 0, done.stdout
    summary = checkout.summary(out)
    assert summary["parameters_sha256"] == checkout.reference(*settings)["parameters_sha256"]
    assert (summary["engine"], summary["num_workers"]) == (engine, 2)


def on_encrypted_standalone(
    master: str, *words: str, settings: Sequence[str] = (), modules: Sequence[Path] = ()
) -> list[str]:
    """Return the command that trains on a standalone cluster with a secret, with small executors."""
    shipped = ",".join(["dist/sparksgd.zip", *map(str, modules)])
    return [
        "spark-submit", "--master", master, "--properties-file", "conf/spark-standalone.conf",
        "--conf", "spark.pyspark.driver.python=python3", "--executor-memory", "640m",
        "--archives", "dist/environment.tar.gz#environment", "--py-files", shipped,
        *ENCRYPTED, "--conf", f"spark.authenticate.secret={SECRET}", *settings,
        "jobs/train.py", "--config", "conf/mnist-lenet.toml", *words,
    ]  # fmt: skip


def test_on_standalone_encrypted_everybody_listens_on_the_ports_that_were_given(
    checkout, encrypted_standalone, tmp_path
):
    ports = {
        "spark.driver.port": "41000", "spark.driver.blockManager.port": "41001",
        "spark.blockManager.port": "41002", "spark.driver.host": "127.0.0.4",
        "spark.driver.bindAddress": "127.0.0.4", "spark.ui.port": "41020",
    }  # fmt: skip
    given = [word for key, value in ports.items() for word in ("--conf", f"{key}={value}")]
    hold = Hold(folder=tmp_path / "hold", at=12)
    settings = (*HELD, *hold.settings)
    allreduce = sets(*settings, "engine.name=allreduce", "engine.ports=41010-41012")
    words = on_encrypted_standalone(
        encrypted_standalone.address, *allreduce, "--out", "hdfs:///models/ports", settings=given,
        modules=[HOLDING],
    )  # fmt: skip

    def ours() -> list[int]:
        marks = [(str(checkout.folder), "app-"), ("127.0.0.4",), ("hdfs:///models/ports",)]
        return [pid for mark in marks for pid in processes_of(*mark)]

    with checkout.started(*words, name="ports") as run:
        hold.wait(workers=2, process=run.process, log=run.log)
        seen = listening(ours())  # everybody listens: workers are in the midst of a segment
        hold.go()
        assert run.wait() == 0, run.said
    between_hosts = {
        port for address, port in seen if address in ("127.0.0.2", "127.0.0.3", "127.0.0.4", "0.0.0.0")
    }
    assert {41000, 41001, 41002} <= between_hosts
    assert between_hosts & {41010, 41011, 41012}
    assert between_hosts <= {*range(41000, 41013), 41020}
    reference = checkout.reference(*settings)
    assert checkout.summary("/models/ports")["parameters_sha256"] == reference["parameters_sha256"]


def test_what_readme_says_of_data_is_there(checkout):
    """The same rows are read from HDFS as lie here."""
    for split in ("train", "test"):
        here = (checkout.folder / "data" / "mnist" / f"{split}.parquet").read_bytes()
        assert checkout.hadoop.read(f"/data/mnist/{split}.parquet") == here
    assert ROOT.joinpath("dist", "environment.tar.gz").exists()
