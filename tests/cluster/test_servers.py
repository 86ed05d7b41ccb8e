"""The servers that other tests stand on do what those rely on, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import servers  # tests/hosts
from checkouts import processes_of
from hadoop import Hadoop

pytestmark = pytest.mark.cluster


def hdfs(hadoop, *words: str) -> str:
    environment = os.environ | hadoop.environment
    done = subprocess.run(
        ["hdfs", "dfs", *words], env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.gate
def test_a_file_put_on_hdfs_is_read_back_by_the_command_of_hadoop(hadoop, tmp_path):
    (tmp_path / "greeting").write_text("good morning\n")
    hdfs(hadoop, "-put", str(tmp_path / "greeting"), "greeting")
    assert hdfs(hadoop, "-cat", f"{hadoop.default_fs}/user/*/greeting") == "good morning\n"


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
        servers.wait_for(lambda: len(processes_of(marker)) >= 4, "keeper, shell and two sleepers")
        process.send_signal(ending)
    servers.wait_for(lambda: not processes_of(marker), "the end of all")


def test_closing_a_cluster_leaves_no_process(hadoop, tmp_path):
    with Hadoop(tmp_path / "another") as another:
        assert another.default_fs != hadoop.default_fs
        assert len(processes_of(str(another.folder))) == 10  # five servers, each with its keeper
    assert not processes_of(str(tmp_path / "another"))
