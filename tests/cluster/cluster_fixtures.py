"""Clusters of real servers: Hadoop's once for all tests, a standalone master and workers for one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import servers  # tests/hosts
from checkouts import ROOT, Checkout, make_checkout
from hadoop import Hadoop
from jars import NoJars, class_path

SECRET = "of-the-tests"
README_LINES = [
    line
    for line in (ROOT / "jobs" / "README.md")
    .read_text()
    .partition("## On a cluster")[2]
    .partition("\n## ")[0]
    .splitlines()
    if line.startswith(("make ", "hdfs ", "spark-submit "))
]


@pytest.fixture(scope="session")
def hadoop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hadoop]:
    """Start HDFS and YARN, once."""
    try:
        class_path()
    except NoJars as why:
        pytest.skip(str(why))
    with Hadoop(tmp_path_factory.mktemp("hadoop") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def checkout(hadoop: Hadoop, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """Return a checkout whose files are where README's first lines put them."""
    made = make_checkout(tmp_path_factory.mktemp("checkout") / "sparksgd", hadoop)
    for line in README_LINES:
        if line.startswith("hdfs "):
            done = made.run(*shlex.split(line))
            assert done.returncode == 0, done.stdout
    return made


@pytest.fixture(scope="module")
def standalone(checkout: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Standalone]:
    """Start a master, and two workers with hosts and disks of their own."""
    with _standalone(checkout, tmp_path_factory, {}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def encrypted_standalone(
    checkout: Checkout, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[servers.Standalone]:
    """Start the same of servers that speak only with those who know the secret."""
    settings = {
        "spark.authenticate": "true",
        "spark.authenticate.secret": SECRET,
        "spark.network.crypto.enabled": "true",
    }
    with _standalone(checkout, tmp_path_factory, settings) as cluster:
        yield cluster


@contextmanager
def _standalone(
    checkout: Checkout, tmp_path_factory: pytest.TempPathFactory, settings: Mapping[str, str]
) -> Iterator[servers.Standalone]:
    options = " ".join(f"-D{key}={value}" for key, value in settings.items())
    environment = servers.node_environment(checkout.environment) | {"SPARK_DAEMON_JAVA_OPTS": options}
    folder, hosts = tmp_path_factory.mktemp("standalone"), ("127.0.0.2", "127.0.0.3")
    of_host = {host: {"SPARK_LOCAL_DIRS": str(folder / host)} for host in hosts}
    with servers.standalone(
        folder / "servers", environment=environment, hosts=hosts, memory="3g", of_host=of_host
    ) as cluster:
        yield cluster


@pytest.fixture
def history_server(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Return a function that starts a history server of a folder, or URI, and returns its address."""
    started = []

    def start(log_directory: str, **environment: str) -> str:
        log = tmp_path / f"history-{len(started)}.log"
        process, address = servers.start_history_server(
            log_directory, log, environment=os.environ | environment
        )
        started.append(process)
        return address

    yield start
    servers.stop(*started)
