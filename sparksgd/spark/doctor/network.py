"""How fast executors reach each other and the driver, over the connections of the all-reduce engine.

One process of each executor takes part, and the driver; each pair is measured both ways, see peers/links.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from pyspark import RDD
from rich.filesize import decimal

from sparksgd.config import EngineConfig
from sparksgd.peers.links import Link
from sparksgd.spark.cluster.cluster import Cluster
from sparksgd.spark.cluster.environments import by_value
from sparksgd.spark.cluster.jobs import spark_job
from sparksgd.spark.doctor.findings import Finding, bad, good, poor, unseen
from sparksgd.spark.engines.allreduce import encrypts, rendezvous_of
from sparksgd.spark.tasks import environment_tasks, link_tasks
from sparksgd.spark.tasks.link_tasks import Measured

__all__ = [
    "DRIVER",
    "Network",
    "empty_job_s",
    "judge_empty_job",
    "judge_network",
    "measured_network",
    "measured_with_driver",
]

DRIVER = 0
"""Its number among those that are measured: all others connect to it, as in a run."""

_MOST = 8
_WAIT_S = 10.0
_LONG_TRIP_S = 0.02
_LONG_SUM_S = 1.0
_ODD = 4  # times slower than the median
_JOBS = 8
_SLOW_JOB_S = 0.25
_TOLD = 3


@dataclass(frozen=True, kw_only=True)
class Network:
    """What was measured."""

    executors: int
    """How many executors the cluster has."""

    with_driver: bool
    encrypted: bool

    measured: Sequence[Measured]
    """By each process that took part."""

    @property
    def failures(self) -> list[Measured]:
        """Return who could not measure."""
        return [one for one in self.measured if one.failure is not None]

    @property
    def links(self) -> list[Link]:
        """Return what was measured."""
        return [link for one in self.measured for link in one.links]

    def facts(self) -> list[dict[str, str | float]]:
        """Return what was measured as plain values, each direction by itself."""
        names = self.names
        return [
            {
                "from": names[link.sender],
                "to": names[link.receiver],
                "round_trip_s": link.round_trip_s,
                "bytes_per_s": link.bytes_per_s,
            }
            for link in self.links
        ]

    @property
    def names(self) -> dict[int, str]:
        """Return how lines call the processes."""
        return {
            one.worker: "the driver" if self.with_driver and one.worker == DRIVER else one.host
            for one in self.measured
        }


def measured_network(cluster: Cluster, config: EngineConfig) -> Network:
    """Measure the connections between executors, and with the driver.

    Args:
        cluster: whose executors.
        config: how workers connect.

    Raises:
        SparkSGDError: Spark could not run the job, or the driver cannot listen.
    """
    places, chosen = _chosen(cluster)
    if len(chosen) == 1 and cluster.slots() > 1:
        chosen *= 2  # then two workers of one executor
    ports = config.port_range
    with_driver = ports is None or len(ports) > len(chosen) + 1
    if len(chosen) + with_driver < 2:
        return Network(executors=places, with_driver=False, encrypted=False, measured=())
    return Network(
        executors=places,
        with_driver=with_driver,
        encrypted=encrypts(cluster, config),
        measured=_measured(cluster, config, chosen, with_driver=with_driver),
    )


def measured_with_driver(cluster: Cluster, config: EngineConfig) -> Network:
    """Measure the connection of each executor with the driver alone, one after the other.

    Executors need not reach each other.  The first that does not reach the driver is the last.

    Args:
        cluster: whose executors.
        config: how workers connect.

    Raises:
        SparkSGDError: as `measured_network`.
    """
    places, chosen = _chosen(cluster)
    found: list[Measured] = []
    for number, place in enumerate(chosen, DRIVER + 1):
        for one in _measured(cluster, config, [place], with_driver=True):
            found.append(one if number == DRIVER + 1 else _renumbered(one, number))
        if any(one.failure is not None for one in found):
            break
    encrypted = encrypts(cluster, config)
    return Network(executors=places, with_driver=True, encrypted=encrypted, measured=found)


def _renumbered(one: Measured, number: int) -> Measured:
    """Return what one of a pair measured, where the executor of the pair has another number."""

    def of(worker: int) -> int:
        return DRIVER if worker == DRIVER else number

    links = tuple(replace(link, sender=of(link.sender), receiver=of(link.receiver)) for link in one.links)
    return replace(one, worker=of(one.worker), links=links)


def _chosen(cluster: Cluster) -> tuple[int, list[str | None]]:
    """Return how many executors there are, and which are measured."""
    places = sorted(cluster.places())
    return len(places), [*places[:: -(-len(places) // _MOST)]]


def _measured(
    cluster: Cluster, config: EngineConfig, chosen: Sequence[str | None], *, with_driver: bool
) -> list[Measured]:
    """Return what these executors measure among each other, and with the driver if it takes part."""
    first = DRIVER + 1 if with_driver else DRIVER
    rendezvous = rendezvous_of(cluster, config, first + len(chosen))
    rendezvous.start()
    try:
        meeting = rendezvous.call()
        elements = [cluster.at_place(first + number, place) for number, place in enumerate(chosen)]
        rdd: RDD[Any] = cluster.placed_rdd(elements)
        task = partial(link_tasks.measure, meeting)
        tasks = rdd.mapPartitions(task) if cluster.is_elastic else rdd.barrier().mapPartitions(task)
        with ThreadPoolExecutor(1) as beside, spark_job(cluster.context, "measuring the network"):
            own = beside.submit(link_tasks.measured_here, meeting, DRIVER) if with_driver else None
            with cluster.job_watch.over(len(chosen), _WAIT_S + 2 * config.peer_timeout_s):
                measured = tasks.collect()
            if own is not None:
                measured.append(own.result())
    finally:
        rendezvous.close()
    return sorted(measured, key=lambda one: one.worker)


def judge_network(
    network: Network,
    gradient_bytes: int | None,
    num_workers: int,
    *,
    is_needed: bool,
    star: Network | None = None,
) -> Iterator[Finding]:
    """Yield what is to be said of the connections.

    Args:
        network: what was measured.
        gradient_bytes: of the model; None: not known.
        num_workers: how many workers a run would have.
        is_needed: whether workers of the run must reach each other, or the driver.
        star: the connections with the driver alone, if a run needs no others.
    """
    if star is not None and network.failures:
        first = network.failures[0]
        told = f"{network.names[first.worker]}: {first.failure}"
        yield unseen("between executors", f"{told}; workers of the server engine need the driver only")
        network = star
    if network.failures:
        first = min(network.failures, key=lambda one: "cannot reach" not in str(one.failure))
        yield (bad if is_needed else poor)(
            "network",
            f"{network.names[first.worker]}: {first.failure}",
            "open the ports of jobs/README.md, Ports, between the nodes and to the driver; or "
            'engine.name = "tree", which needs none of them',
        )
        return
    between = [] if network is star else [link for link in network.links if not _is_of_driver(network, link)]
    count = len(network.measured) - network.with_driver
    if between:
        which = "2 workers of one executor"
        if count <= network.executors:
            which = f"{count} of {network.executors} executors"
        yield _judge("between executors", which, between, network, gradient_bytes, num_workers)
    elif network is not star:
        yield unseen("between executors", "there is one, with one slot")
    with_driver = [link for link in network.links if _is_of_driver(network, link)]
    if with_driver:
        yield _judge("with the driver", "both ways", with_driver, network, None, num_workers)
    else:
        yield unseen("with the driver", "engine.ports has no port to spare for the measurement")


def _is_of_driver(network: Network, link: Link) -> bool:
    return network.with_driver and DRIVER in (link.sender, link.receiver)


def _judge(
    name: str,
    which: str,
    links: Sequence[Link],
    network: Network,
    gradient_bytes: int | None,
    num_workers: int,
) -> Finding:
    trips_s, speeds = [link.round_trip_s for link in links], [link.bytes_per_s for link in links]
    encrypted = ", encrypted" if network.encrypted else ""
    seen = (
        f"{which}: round trip {_range([1e3 * trip_s for trip_s in trips_s], '.2f')} ms, "
        f"{_range([speed / 1e6 for speed in speeds], ',.0f')} MB/s{encrypted}"
    )
    sum_s = None
    if gradient_bytes is not None and num_workers > 1:
        sum_s = 2 * gradient_bytes * (num_workers - 1) / num_workers / min(speeds)
        seen += f"; a sum of the model's gradients takes {1e3 * sum_s:,.1f} ms at least"
    names = network.names
    odd = [link for link in links if link.bytes_per_s * _ODD < median(speeds)]
    if odd:
        told = ", ".join(
            f"{names[link.sender]} to {names[link.receiver]} {decimal(int(link.bytes_per_s))}/s"
            for link in sorted(odd, key=lambda link: link.bytes_per_s)[:_TOLD]
        )
        return poor(name, f"{seen}; slow: {told}", "see what that host lacks: every step waits for it")
    if median(trips_s) > _LONG_TRIP_S:
        return poor(name, seen, "bring driver and executors into one data centre")
    if sum_s is not None and sum_s > _LONG_SUM_S:
        return poor(name, seen, 'solver.name = "local_sgd" sends less; or fewer engine.num_workers')
    return good(name, seen)


def _range(values: Sequence[float], form: str) -> str:
    least, most = format(min(values), form), format(max(values), form)
    return least if least == most else f"{least} to {most}"


def empty_job_s(cluster: Cluster, tasks: int) -> float:
    """Return the median time of some jobs whose tasks do nothing, after a first one."""
    rdd = cluster.context.parallelize(range(tasks), tasks)
    work = by_value(environment_tasks.nothing)
    times_s = []
    with spark_job(cluster.context, "an empty job"):
        for _ in range(1 + _JOBS):
            started = time.perf_counter()
            rdd.mapPartitions(work).collect()
            times_s.append(time.perf_counter() - started)
    return median(times_s[1:])


def judge_empty_job(took_s: float, tasks: int) -> Finding:
    """Return what is to be said of the time of an empty job, which each step of the tree engine takes."""
    seen = f"{1e3 * took_s:,.0f} ms for {tasks} tasks; each step of the tree engine has one"
    if took_s > _SLOW_JOB_S:
        return poor("empty job", seen, "--set engine.name=allreduce: one job for many steps")
    return good("empty job", seen)
