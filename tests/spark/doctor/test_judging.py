"""Facts in, findings out: what the doctor says of what it saw.  Needs no JVM."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from sparksgd.arithmetic.instruction_set import Machine
from sparksgd.errors import ClusterError, ConfigError, PeerLost
from sparksgd.peers.links import Link
from sparksgd.spark.cluster.environments import ExecutorPython
from sparksgd.spark.doctor.findings import bad, broken, poor
from sparksgd.spark.doctor.machines import (
    Executor,
    judge_cores,
    judge_executors,
    judge_instruction_sets,
    judge_java,
)
from sparksgd.spark.doctor.network import Network, judge_empty_job, judge_network
from sparksgd.spark.doctor.settings import judge_settings, judge_slots
from sparksgd.spark.doctor.sizes import judge_disk, judge_machines
from sparksgd.spark.tasks.link_tasks import Measured

PYTHON = ExecutorPython(
    host="node1", executable="/usr/bin/python3", missing=(), version="0.1.0", held=None,
    architecture="x86_64", cpuinfo="flags : fma avx2", unpacked=None,
)  # fmt: skip
VERSIONS = {"torch": "2.9.1", "numpy": "2.3.0"}
ONE = Executor(
    python=PYTHON, process=7, java="17.0.2", python_version="3.11.2", versions=VERSIONS, cpus=4,
    memory_bytes=8 << 30, free_bytes={"node1:3": 1_000_000},
)  # fmt: skip
AVX512 = "flags : fma avx2 avx512f avx512bw avx512dq avx512vl"


def of_python(**changes: object) -> Executor:
    return replace(ONE, python=replace(PYTHON, **changes))


def judged(*found: Executor, executors: int | None = None, instruction_set: str | None = None):
    return list(
        judge_executors(
            found, executors or len({(one.host, one.process) for one in found}), own="0.1.0",
            versions=VERSIONS, instruction_set=instruction_set,
        )
    )  # fmt: skip


def test_equal_executors_are_one_line():
    (finding,) = judged(ONE, ONE, of_python(host="node2"))
    assert finding.status == "pass"
    assert finding.seen == "2 executors on 2 hosts, with the driver's packages"


@pytest.mark.parametrize(
    ("changes", "seen", "fix"),
    [
        ({"missing": ("torch", "sparksgd")}, "on node2 (/usr/bin/python3) lacks torch", "make dist"),
        ({"missing": ("sparksgd",), "version": None}, "lacks sparksgd", "--py-files dist/sparksgd.zip"),
        ({"version": "0.0.9"}, "sparksgd is 0.0.9 for the executors' Python on node2", "remove the other"),
    ],
)
def test_a_package_on_the_driver_only_fails_with_the_hosts_name_and_what_brings_it(changes, seen, fix):
    (finding,) = judged(ONE, of_python(host="node2", **changes))
    assert (finding.status, finding.name) == ("fail", "their Python")
    assert seen in finding.seen
    assert fix in finding.fix


def test_many_that_fail_are_counted():
    findings = judged(*(of_python(host=f"node{number}", missing=("torch",)) for number in range(9)))
    assert [finding.status for finding in findings] == ["fail"] * 5
    assert findings[-1].seen == "and 5 more of these"


def test_other_versions_than_the_drivers_and_a_mix_are_told():
    (finding,) = judged(replace(ONE, versions=VERSIONS | {"torch": "2.4.0"}))
    assert finding.status == "warn"
    assert finding.seen == "1 executor on 1 host: torch 2.4.0, but 2.9.1 at the driver"
    (finding,) = judged(ONE, replace(of_python(host="node2"), versions=VERSIONS | {"torch": "2.4.0"}))
    assert finding.status == "warn"
    assert "have different packages: 1 x Python 3.11.2, torch 2.9.1" in finding.seen


def test_executors_that_did_not_answer_are_told():
    *_, finding = judged(ONE, executors=3)
    assert (finding.status, finding.seen[:29]) == ("warn", "1 of 3 executors answered: th")


def test_an_instruction_set_that_a_cpu_lacks_fails():
    (finding,) = judged(ONE, instruction_set="avx512")
    assert finding.status == "fail"
    assert "the CPU of node1 (x86_64) has no avx512f" in finding.seen


def test_a_mix_of_cpus_is_told_with_the_best_that_all_have():
    driver = Machine(name="this machine", architecture="x86_64", cpuinfo=AVX512)
    finding = judge_instruction_sets(driver, [ONE], None)
    assert (finding.status, finding.fix) == ("warn", "--set train.instruction_set=avx2")
    assert "node1: avx2; this machine: avx512" in finding.seen
    assert judge_instruction_sets(driver, [ONE], "avx2").status == "pass"
    assert judge_instruction_sets(driver, [of_python(cpuinfo=AVX512)], None).status == "pass"


@pytest.mark.parametrize(
    ("driver", "executors", "status"),
    [
        ("17.0.2", [None], "skip"),
        ("17.0.2", [None, "17.0.2"], "pass"),
        ("17.0.2", ["17.0.2"], "pass"),
        ("17.0.2", ["17.0.15"], "pass"),
        ("17.0.2", ["17.0.2", "21"], "warn"),
        ("17.0.2", ["1.8.0_402"], "fail"),
        ("11.0.22", ["11.0.22"], "fail"),
    ],
)
def test_java(driver, executors, status):
    finding = judge_java(driver, [replace(ONE, java=java) for java in executors])
    assert finding.status == status
    assert bool(finding.fix) == (status in ("warn", "fail"))


def test_more_threads_than_cores_are_told():
    other = replace(ONE, process=8)
    assert judge_cores([ONE], 4, 1).status == "pass"
    finding = judge_cores([ONE, other], 2, 2)
    assert finding.status == "warn"
    assert finding.seen == "node1 runs 8 threads of workers on 4 cores"


class Refuses:
    """Slots that a run's own check refuses."""

    def __init__(self, barrier: str = "", threads: str = "") -> None:
        self._barrier, self._threads = barrier, threads

    def check_barrier(self) -> None:
        if self._barrier:
            raise ClusterError(self._barrier)

    def check_threads(self) -> None:
        if self._threads:
            raise ConfigError(self._threads)


def test_what_a_run_refuses_fails_with_its_own_words():
    findings = list(judge_slots(Refuses("it is true, but: submit with X", "3 of 1: set Y"), True, 3))
    assert [(one.name, one.status, one.seen, one.fix) for one in findings] == [
        ("dynamic allocation", "fail", "it is true, but", "submit with X"),
        ("threads", "fail", "3 of 1", "set Y"),
    ]
    assert [one.status for one in judge_slots(Refuses(), False, 1)] == ["pass", "pass"]


@pytest.mark.parametrize(
    ("settings", "name", "status"),
    [
        ({"spark.speculation": "true"}, "speculation", "warn"),
        ({"spark.python.worker.reuse": "false"}, "worker reuse", "warn"),
        ({"spark.io.encryption.enabled": "true"}, "encryption", "fail"),
        ({"spark.databricks.clusterUsageTags.clusterScalingType": "autoscaling"}, "autoscaling", "warn"),
    ],
)
def test_settings(settings, name, status):
    findings = {one.name: one for one in judge_settings(lambda key, default: settings.get(key, default))}
    assert findings[name].status == status
    assert next(iter(settings)) in findings[name].seen
    assert findings[name].fix
    plain = {one.name: one.status for one in judge_settings(lambda key, default: default)}
    assert plain == {
        "autoscaling": "skip", "speculation": "pass", "worker reuse": "pass", "encryption": "pass",
    }  # fmt: skip


def test_a_cluster_of_databricks_that_does_not_scale_passes():
    key = "spark.databricks.clusterUsageTags.clusterScalingType"
    findings = judge_settings(lambda asked, default: "fixed_size" if asked == key else default)
    assert {one.name: one.status for one in findings}["autoscaling"] == "pass"


SCHEMA = SimpleNamespace(record=np.dtype([("image", "u1", 92)]))
"""With its checksum a record takes 96 bytes; 180 pass before it is written."""


@pytest.mark.parametrize(("rows", "status"), [(3_623, "pass"), (3_624, "fail"), (0, "pass")])
def test_shards_that_do_not_fit_on_the_disks_fail(rows, status):
    finding = judge_disk(SCHEMA, rows, "hashed", [ONE, ONE])
    assert finding.status == status
    if status == "fail":
        assert "the shards need" in finding.seen
        assert "spark.local.dir" in finding.fix


def test_disks_of_all_hosts_are_added_each_once():
    other = replace(of_python(host="node2"), free_bytes={"node2:3": 1_000_000, "node2:4": 1_000_000})
    assert judge_disk(SCHEMA, 3 * 3_623, "hashed", [ONE, ONE, other]).status == "pass"
    assert judge_disk(SCHEMA, 3 * 3_624, "hashed", [ONE, other, other]).status == "fail"


def test_machines_that_are_too_small_are_told():
    assert judge_machines({"a": (5, 10), "b": (10, 10)}).status == "pass"
    finding = judge_machines({"a": (5, 10), "b": (11_000, 10_000)})
    assert finding.status == "warn"
    assert "b: 11.0 kB of 10.0 kB" in finding.seen


def network(trip_s: float = 1e-4, *speeds: float, failure: PeerLost | None = None) -> Network:
    """Return what the driver and two executors measured: speeds from the driver, node1 and node2 on."""
    given = iter(speeds)
    return Network(
        executors=2,
        with_driver=True,
        encrypted=False,
        measured=[
            Measured(
                worker=worker,
                host=f"node{worker}",
                links=tuple(
                    Link(sender=worker, receiver=other, round_trip_s=trip_s, bytes_per_s=next(given, 1e9))
                    for other in range(3)
                    if other != worker
                ),
                failure=failure if worker == 2 else None,
            )
            for worker in range(3)
        ],
    )


def test_a_good_network_is_two_lines_with_its_figures():
    between, driver = judge_network(network(1e-4, 5e8), 4_000_000, 2, is_needed=True)
    assert (between.status, driver.status) == ("pass", "pass")
    assert between.seen == (
        "2 of 2 executors: round trip 0.10 ms, 1,000 MB/s; a sum of the model's gradients takes 4.0 ms at "
        "least"
    )
    assert driver.seen == "both ways: round trip 0.10 ms, 500 to 1,000 MB/s"


def test_a_slow_host_a_long_way_and_a_model_too_large_for_the_wire_are_told():
    _, driver = judge_network(network(1e-4, 1e6), None, 2, is_needed=True)
    assert driver.status == "warn"
    assert "slow: the driver to node1 1.0 MB/s" in driver.seen
    assert [one.status for one in judge_network(network(0.1), None, 2, is_needed=True)] == ["warn", "warn"]
    between, driver = judge_network(network(), 2_000_000_000, 2, is_needed=True)
    assert (between.status, driver.status) == ("warn", "pass")
    assert "local_sgd" in between.fix


def test_who_cannot_be_reached_fails():
    lost = network(failure=PeerLost("cannot reach worker 1 at 10.0.0.1:4: no"))
    (finding,) = judge_network(lost, None, 2, is_needed=True)
    assert finding.status == "fail"
    assert [one.status for one in judge_network(lost, None, 2, is_needed=False)] == ["warn"]
    assert finding.seen == "node2: cannot reach worker 1 at 10.0.0.1:4: no"
    assert "ports" in finding.fix


def test_executors_that_only_reach_the_driver_do_for_the_server():
    lost = network(failure=PeerLost("cannot reach worker 1 at 10.0.0.1:4: no"))
    star = replace(network(), measured=[
        replace(one, links=tuple(link for link in one.links if 0 in (link.sender, link.receiver)))
        for one in network().measured
    ])  # fmt: skip
    between, driver = judge_network(lost, None, 2, is_needed=True, star=star)
    assert (between.name, between.status) == ("between executors", "skip")
    assert "need the driver only" in between.seen
    assert (driver.name, driver.status) == ("with the driver", "pass")
    apart = list(judge_network(lost, None, 2, is_needed=True, star=lost))
    assert [one.status for one in apart] == ["skip", "fail"]


def test_a_network_of_one_is_not_seen():
    alone = Network(executors=1, with_driver=False, encrypted=False, measured=())
    assert [one.status for one in judge_network(alone, None, 1, is_needed=True)] == ["skip", "skip"]


def test_a_slow_empty_job_is_told():
    assert judge_empty_job(0.04, 2).seen.startswith("40 ms for 2 tasks")
    assert [judge_empty_job(took_s, 2).status for took_s in (0.04, 0.4)] == ["pass", "warn"]


def test_errors_are_told_in_one_line():
    finding = broken("disk", ValueError("no\n  such thing"), "look there")
    assert (finding.seen, finding.fix) == ("ValueError: no", "look there")
    java = "An error occurred\n: java.lang.IllegalStateException: it is closed\n\tat x.y.z"
    assert broken("disk", RuntimeError(java), "look there").seen == (
        "RuntimeError: java.lang.IllegalStateException: it is closed"
    )
    assert len(broken("disk", ConfigError("x" * 5_000), "look there").seen) < 500


@pytest.mark.parametrize(
    ("text", "seen", "fix"),
    [
        (
            "cannot read /nope as Parquet: [PATH_NOT_FOUND] Path does not exist: file:/nope.",
            "cannot read /nope as Parquet: [PATH_NOT_FOUND] Path does not exist: file:/nope.",
            "look there",
        ),
        (
            "loss.name is 'a:b', but importing a raised OSError: no such library",
            "loss.name is 'a:b', but importing a raised OSError: no such library",
            "look there",
        ),
        ("3 slots: 2 are there: give it 3 cores", "3 slots: 2 are there", "give it 3 cores"),
        ("no torch: `make dist` builds it: submit it", "no torch", "`make dist` builds it: submit it"),
        ("it is full. Ask for fewer; or use another", "it is full", "Ask for fewer; or use another"),
        ("settings: settled", "settings: settled", "look there"),
    ],
)  # fmt: skip
def test_only_what_says_what_to_do_is_a_fix(text, seen, fix):
    finding = broken("model", ConfigError(text), "look there")
    assert (finding.seen, finding.fix) == (seen, fix)


def test_advice_at_the_end_of_a_long_error_is_kept():
    finding = broken("memory", ConfigError("x" * 5_000 + ": submit with more"), "look there")
    assert len(finding.seen) < 500
    assert finding.fix == "submit with more"


@pytest.mark.parametrize("make", [poor, bad])
def test_no_finding_that_warns_or_fails_is_without_a_fix(make):
    with pytest.raises(AssertionError, match="nobody says what mends"):
        make("disk", "it is full", "")
