"""The servers that other tests stand on do what those rely on, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import servers  # tests/hosts
from hadoop import Hadoop

HERE = Path(__file__).parent
PROGRAM = str(HERE / "program.py")
SMALL = [
    *(
        "--num-executors",
        "2",
        "--executor-cores",
        "1",
        "--executor-memory",
        "512m",
        "--driver-memory",
        "512m",
    ),
    *("--conf", "spark.ui.enabled=false"),
]

pytestmark = pytest.mark.cluster


def hdfs(hadoop, *words: str) -> str:
    environment = os.environ | hadoop.environment
    done = subprocess.run(
        ["hdfs", "dfs", *words], env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def living(marker: str) -> list[str]:
    """Return the command lines of processes that mention something."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                environment = (process / "environ").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if words and (marker in words or marker in environment):
                found.append(words)
    return found


def test_a_file_put_on_hdfs_is_read_back_by_the_command_of_hadoop(hadoop, tmp_path):
    (tmp_path / "greeting").write_text("good morning\n")
    hdfs(hadoop, "-put", str(tmp_path / "greeting"), "greeting")
    assert hdfs(hadoop, "-cat", f"{hadoop.default_fs}/user/*/greeting") == "good morning\n"


@pytest.mark.parametrize("mode", ["client", "cluster"])
def test_a_barrier_job_and_parquet_on_hdfs_work_on_yarn(hadoop, tmp_path, mode):
    folder = f"{hadoop.default_fs}/{mode}"
    words = ["--master", "yarn", "--deploy-mode", mode, "--name", f"{mode} mode", *SMALL, PROGRAM, folder]
    done = servers.submit(*words, cwd=tmp_path, environment=hadoop.environment)
    application = hadoop.applications()[0]
    logs = hadoop.container_logs(application["id"])
    assert done.returncode == 0, (done.stdout, logs)
    assert (application["name"], application["finalStatus"]) == (f"{mode} mode", "SUCCEEDED")
    assert len(logs) == 3  # the application master, and two executors
    found = hdfs(hadoop, "-cat", f"{folder}/found/part-*")
    assert found.startswith("1000 rows, sums [4950, 4950], hosts ['127.0.0.")
    assert not list(tmp_path.iterdir())


def test_an_application_is_killed_through_yarn(hadoop, tmp_path):
    program = tmp_path / "sleeps.py"
    program.write_text(
        "import time\nfrom pyspark.sql import SparkSession\n"
        "SparkSession.builder.getOrCreate()\ntime.sleep(600)\n"
    )
    words = ["--master", "yarn", "--deploy-mode", "cluster", *SMALL, str(program)]
    command = [str(Path(sys.executable).parent / "spark-submit"), *words]
    log = tmp_path / "log"
    process = servers.kept(command, log, environment=os.environ | hadoop.environment)
    try:
        running = servers.wait_for(
            lambda: [one for one in hadoop.applications() if one["state"] == "RUNNING"],
            "the application", process=process, log=log,
        )  # fmt: skip
        hadoop.kill_application(running[0]["id"])
        assert hadoop.application(running[0]["id"])["finalStatus"] == "KILLED"
        assert process.wait(timeout=30) == 1
        servers.wait_for(lambda: not living(running[0]["id"]), "the end of its containers", timeout_s=20)
    finally:
        servers.stop(process)


def test_a_container_that_takes_more_memory_than_it_asked_for_is_killed(hadoop, tmp_path):
    program = tmp_path / "takes.py"
    program.write_text(
        "from pyspark.sql import SparkSession\n"
        "context = SparkSession.builder.getOrCreate().sparkContext\n"
        "def takes(_):\n"
        "    import time\n"
        "    taken = bytearray(b'x' * (600 << 20)); time.sleep(20)\n"
        "    return [len(taken)]\n"
        "context.parallelize([1], 1).mapPartitions(takes).collect()\n"
    )
    settings = ["--conf", "spark.executor.memoryOverhead=200m", "--conf", "spark.task.maxFailures=1"]
    words = ["--master", "yarn", *SMALL, *settings, str(program)]
    done = servers.submit(*words, cwd=tmp_path, environment=hadoop.environment)
    assert done.returncode == 1
    assert "running beyond physical memory limits" in done.stdout or "killed by YARN" in done.stdout
    assert "712 MB" in done.stdout  # 512 of the heap and 200 over it: nothing is rounded up


def test_a_killed_node_manager_is_noticed_and_comes_back(hadoop):
    before = {node["id"] for node in hadoop.nodes()}
    assert before == {hadoop.node_id(0), hadoop.node_id(1)}
    hadoop.kill_node_manager(1)
    hadoop.wait_until_lost(1)
    assert [node["id"] for node in hadoop.nodes()] == [hadoop.node_id(0)]
    hadoop.restart_node_manager(1)
    assert {node["id"] for node in hadoop.nodes()} == {hadoop.node_id(0), hadoop.node_id(1)}


def test_a_history_server_shows_what_a_standalone_cluster_ran(standalone, history_server, tmp_path):
    events = tmp_path / "events"
    events.mkdir()
    settings = ["--conf", "spark.eventLog.enabled=true", "--conf", f"spark.eventLog.dir={events.as_uri()}"]
    small = ["--executor-memory", "512m", "--conf", "spark.ui.enabled=false", "--name", "of the past"]
    words = ["--master", standalone.address, *small, *settings, PROGRAM, (tmp_path / "out").as_uri()]
    done = servers.submit(*words, cwd=tmp_path, environment={})
    assert done.returncode == 0, done.stdout
    found = "".join(file.read_text() for file in (tmp_path / "out" / "found").glob("part-*"))
    assert found.startswith("1000 rows, sums [4950, 4950], hosts ['127.0.0.")
    address = history_server(events.as_uri())

    def names() -> list[str]:
        with urllib.request.urlopen(f"{address}/api/v1/applications", timeout=60) as answer:
            return [application["name"] for application in json.load(answer)]

    assert servers.wait_for(names, "the application in the history") == ["of the past"]


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_no_server_and_no_container_outlives_who_started_it(tmp_path, ending):
    program = tmp_path / "starts.py"
    marker = f"{tmp_path}/marker"
    # a descendant in a session of its own, as a container is
    program.write_text(
        f"import sys; sys.path.insert(0, {str(Path(servers.__file__).parent)!r})\n"
        "import os, servers, time; from pathlib import Path\n"
        f"command = ['sh', '-c', 'setsid sleep 600 & sleep 500', {marker!r}]\n"
        f"environment = os.environ | {{'MARKER': {marker!r}}}\n"
        f"servers.kept(command, Path({str(tmp_path)!r}) / 'log', environment=environment)\n"
        "print('started', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "started\n"
        servers.wait_for(lambda: len(living(marker)) >= 4, "keeper, shell and two sleepers")
        process.send_signal(ending)
    servers.wait_for(lambda: not living(marker), "the end of all", timeout_s=10)


def test_closing_a_cluster_leaves_no_process(hadoop, tmp_path):
    with Hadoop(tmp_path / "another") as another:
        assert another.default_fs != hadoop.default_fs
        assert len(living(str(another.folder))) == 10  # five servers, each with its keeper
    assert not living(str(tmp_path / "another"))
