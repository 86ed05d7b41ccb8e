"""What goes wrong on a cluster: containers, nodes and applications that are killed, queues that are full."""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import servers  # tests/hosts
from checkouts import HELD, HOLDING, SMALL, Checkout, Run, processes_of, sets
from holds import Hold  # tests/hosts

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

LONG = (*SMALL, "train.steps=none", "train.epochs=200", "schedule.total_steps=10000")
"""Some minutes of training, if nobody ends it."""


@pytest.fixture
def hold(tmp_path: Path) -> Hold:
    """Return what holds a run at its twelfth step."""
    return Hold(folder=tmp_path / "hold", at=12)


def executors(application: str) -> list[int]:
    """Return the JVMs of an application's executors."""
    return processes_of("CoarseGrainedExecutorBackend", application, "-Dspark.yarn.app.container.log.dir")


def held_on_yarn(checkout: Checkout, hold: Hold, out: str, *settings: str, **options: object) -> list[str]:
    """Return the command of a run that is held, and leaves its folder on HDFS."""
    words = [*sets(*HELD, *hold.settings, *settings), "--out", f"hdfs://{out}"]
    return checkout.on_yarn(*words, modules=[HOLDING], **options)


def wait_until_held(hold: Hold, run: Run) -> str:
    """Return the run's application, once both of its workers are in the step at which it is held."""
    hold.wait(workers=2, process=run.process, log=run.log)
    return run.application()


def trained(checkout: Checkout, out: str, steps: int) -> dict:
    """Return a run's model.json; its weights are there."""
    about = json.loads(checkout.hadoop.read(f"{out}/model/model.json"))
    assert checkout.hadoop.read(f"{out}/model/{about['weights']['name']}")
    assert about["version"] <= steps
    return about


@pytest.mark.parametrize("engine", ["tree", "allreduce"])
def test_a_killed_container_costs_a_step_and_no_bit(checkout, hold, engine):
    out = f"/models/killed-{engine}"
    words = held_on_yarn(checkout, hold, out, f"engine.name={engine}")
    with checkout.started(*words, name=f"killed-{engine}") as run:
        application = wait_until_held(hold, run)
        os.kill(executors(application)[0], signal.SIGKILL)
        hold.go()
        assert run.wait() == 0, run.said
    summary = checkout.summary(out)
    reference = checkout.reference(*HELD, *hold.settings)
    assert summary["parameters_sha256"] == reference["parameters_sha256"]
    assert summary["retried_steps"] >= 1
    assert summary["rebuilt_shards"] >= 1


def test_a_killed_node_costs_no_bit(checkout, hold):
    out, hadoop = "/models/killed-node", checkout.hadoop
    large = ["--executor-memory", "2600m"]  # one fits on a node
    with checkout.started(*held_on_yarn(checkout, hold, out, settings=large), name="killed-node") as run:
        application = wait_until_held(hold, run)
        # not that of the application master: YARN starts another, which knows nothing of this driver
        (number,) = [
            number
            for number in (0, 1)
            if not processes_of("ExecutorLauncher", application, f"nodemanager-{number}/")
        ]
        hadoop.kill_node_manager(number)
        hadoop.wait_until_lost(number)
        hadoop.restart_node_manager(number)
        hold.go()
        assert run.wait() == 0, run.said
    summary = checkout.summary(out)
    assert summary["retried_steps"] >= 1
    reference = checkout.reference(*HELD, *hold.settings)
    assert summary["parameters_sha256"] == reference["parameters_sha256"]


def test_more_executors_than_the_queue_holds_are_an_error_in_the_configured_time(checkout):
    words = checkout.on_yarn(
        *sets("engine.slots_timeout_s=15"),
        "--out",
        "hdfs:///models/too-many",
        settings=["--num-executors", "8"],
    )
    done = checkout.run(*words)
    assert done.returncode == 4, done.stdout
    said = re.search(r"error: .*", done.stdout)[0]
    assert re.search(
        r"8 slots are needed, and 8 were asked for \(spark.executor.instances=8 of 1 cores\), but after "
        r"\d+ s there are [1-6], of [1-6] executors", said
    ), said  # fmt: skip
    assert "waiting for slots: " in done.stdout


def test_a_session_that_yarn_refuses_is_an_error_in_a_line(checkout):
    words = checkout.on_yarn("--out", "hdfs:///models/no-queue", settings=["--queue", "nosuch"])
    done = checkout.run(*words)
    assert done.returncode == 4, done.stdout
    assert re.search(r"error: the Spark session cannot start: .*nosuch", done.stdout), done.stdout
    assert "Traceback" not in done.stdout


def test_an_application_that_yarn_does_not_take_is_given_up_and_killed(checkout):
    words = checkout.on_yarn(
        *sets("engine.slots_timeout_s=8"), "--out", "hdfs:///models/untaken",
        settings=["--conf", "spark.yarn.am.memory=5g"],
    )  # fmt: skip
    holder = checkout.on_yarn(
        *sets(*LONG), "--out", "hdfs:///models/holder",
        settings=["--conf", "spark.yarn.am.memory=5g", "--num-executors", "8"],  # more than there will be
    )  # fmt: skip
    with checkout.started(*holder, name="holder") as run:
        servers.wait_for(
            lambda: [one for one in checkout.hadoop.applications() if one["state"] == "RUNNING"],
            "the holder", process=run.process, log=run.log,
        )  # fmt: skip
        done = checkout.run(*words)
        assert done.returncode == 4, done.stdout
        assert "error: the cluster did not take the application in 8 s: its queue is full" in done.stdout
        assert "Traceback" not in done.stdout
        (untaken,) = [one for one in checkout.hadoop.applications() if "untaken" in one["name"]]
        assert untaken["state"] == "KILLED"
        checkout.hadoop.kill_application(run.application())
        assert run.wait() == 4, run.said
        assert "error: the Spark session was stopped during the run, in waiting for slots" in run.said


@pytest.mark.parametrize("mode", ["client", "cluster"])
def test_an_application_that_is_killed_leaves_its_last_model_and_no_process(checkout, hold, mode):
    out = f"/models/application-killed-{mode}"
    words = held_on_yarn(checkout, hold, out, mode=mode)
    with checkout.started(*words, name=f"application-killed-{mode}") as run:
        application = wait_until_held(hold, run)
        checkout.hadoop.kill_application(application)
        assert run.wait() == (4 if mode == "client" else 1), run.said
        servers.wait_for(lambda: not processes_of(application), "the end of its containers")
        assert not processes_of("jobs/train.py", out)
        if mode == "client":
            assert "Traceback" not in run.said
            assert "error: the Spark session was stopped during the run" in run.said
            assert checkout.summary(out)["status"] != "finished"
    about = trained(checkout, out, hold.at - 1)  # the metrics of its last seconds may be missing on HDFS
    assert not about["finished"]
    assert about["version"] >= 1


def test_a_killed_application_master_is_followed_by_an_attempt_that_goes_on(checkout, hold):
    out = "/models/master-killed"
    words = held_on_yarn(checkout, hold, out, "checkpoint.every_steps=5", mode="cluster")
    with checkout.started(*words, name="master-killed") as run:
        application = wait_until_held(hold, run)
        hold.go()  # the workers of the first attempt may still be there when the second begins
        master = "deploy.yarn.ApplicationMaster", application, "-Dspark.yarn.app.container.log.dir"
        for process in processes_of(*master):  # the JVM, and the shell that started it
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        assert run.wait() == 0, run.said
    summary = checkout.summary(out)
    assert [resumed["step"] for resumed in summary["resumed"]] in ([5], [10])  # the second may be left out
    assert summary["parameters_sha256"] == checkout.reference(*HELD, *hold.settings)["parameters_sha256"]
    assert checkout.steps(out) == summary["steps"]


def test_sigterm_to_the_driver_writes_the_last_model_to_hdfs(checkout, hold):
    out = "/models/terminated"
    with checkout.started(*held_on_yarn(checkout, hold, out), name="terminated") as run:
        application = wait_until_held(hold, run)
        (submitter,) = processes_of("org.apache.spark.deploy.SparkSubmit", f"hdfs://{out}", "-Xmx")
        os.kill(submitter, signal.SIGTERM)
        assert run.wait() == 143, run.said
        assert "Traceback" not in run.said
        servers.wait_for(lambda: not processes_of(application), "the end of its containers")
    assert checkout.summary(out)["status"] in ("Terminated", "Cancelled")
    about = trained(checkout, out, checkout.steps(out))
    assert (about["version"], about["weights"]["name"]) == (hold.at - 1, "weights.pt")
    assert checkout.summary(out)["steps"] == hold.at - 1
    assert checkout.hadoop.application(application)["state"] != "RUNNING"


def test_a_container_killed_for_its_memory_is_an_error_that_names_the_setting(checkout):
    settings = ["--conf", "spark.executor.memoryOverhead=100m"]
    words = checkout.on_yarn(
        *sets(*LONG, "engine.max_attempts=2"), "--out", "hdfs:///models/too-large", settings=settings
    )
    done = checkout.run(*words)
    assert done.returncode == 4, done.stdout
    (said,) = re.findall(r"error: .*", done.stdout)
    assert re.search(
        r"its container used \d+\.?\d* MB of the 740 MB that it may: 640m of spark\.executor\.memory and "
        r"100m of spark\.executor\.memoryOverhead.* Set spark\.executor\.memoryOverhead=1024m", said
    ), done.stdout  # fmt: skip
