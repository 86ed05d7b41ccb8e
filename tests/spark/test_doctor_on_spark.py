"""The doctor on a session that can train, and on some that cannot."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sparksgd.config import Config
from sparksgd.solvers.rules import completed
from sparksgd.spark.doctor.examination import Examination
from sparksgd.spark.doctor.findings import Finding
from sparksgd.training.preflight import allowed_engines

JOB = Path(__file__).parents[2] / "jobs" / "doctor.py"
SMALL = ("model.maps=[2, 4]", "model.hidden=8", "train.num_shards=4")
LONG_S = 280.0
"""For all looks: on a machine that is busy, none is left out for want of time."""

pytestmark = pytest.mark.session("local[2]")


def ran(*words: str) -> int:
    """Run the job in this process, in the active session."""
    spec = importlib.util.spec_from_file_location("doctor", JOB)
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    return job.main([*(word for key in SMALL for word in ("--set", key)), "--within", str(LONG_S), *words])


def examined(spark, *settings: str, out: str | None = None) -> list[Finding]:
    """Return the findings of a session."""
    config = completed(Config.load(None, [*SMALL, *settings]))
    examination = Examination(spark, config, allowed_engines(config), out=out, within_s=LONG_S)
    return [finding for group in examination.run() for finding in group.findings]


def of_status(status: str, findings: Sequence[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings if finding.status == status}


@pytest.mark.soak
@pytest.mark.usefixtures("spark")
def test_where_a_run_would_train_nothing_fails_and_nothing_is_left(tmp_path, capfd):
    before = logging.getLogger("sparksgd").handlers[:]
    status = ran("--json", "--out", str(tmp_path / "new" / "run"))
    document = json.loads(capfd.readouterr().out)
    findings = [Finding(**{k: v for k, v in one.items() if k != "group"}) for one in document["findings"]]
    assert (status, of_status("fail", findings)) == (0, {})
    assert of_status("skip", findings).keys() <= {
        "Unix sockets",
        "autoscaling",
    }  # Spark 3.5 has no such sockets
    assert of_status("pass", findings).keys() >= {
        "driver", "Java", "dynamic allocation", "threads", "slots", "speculation", "worker reuse",
        "encryption", "settings", "locality wait", "their Python", "instruction set", "model", "memory",
        "your code", "disk", "between executors", "with the driver", "--out", "inline", "tree",
        "tree, stages", "allreduce", "server",
    }  # fmt: skip
    assert document["counts"]["fail"] == 0
    assert document["master"] == "local[2]"
    (executor,) = document["facts"]["executors"]
    assert executor["python"] == sys.executable
    assert {(link["from"], link["to"]) for link in document["facts"]["links"]} >= {
        ("the driver", executor["host"]), (executor["host"], "the driver"),
    }  # fmt: skip
    trained = [one for one in findings if "3 steps" in one.seen]
    assert [one.name for one in trained if one.seen.endswith(": equal when repeated here")] == ["server"]
    assert len({one.seen.split("parameters ")[1][:12] for one in trained if one.name != "server"}) == 1
    assert list(tmp_path.iterdir()) == []
    assert logging.getLogger("sparksgd").handlers == before


def test_what_a_run_would_refuse_fails_with_its_fix(spark, setting, tmp_path, monkeypatch):
    setting("spark.io.encryption.enabled", "true")
    setting("spark.task.maxDirectResultSize", "1k")
    setting("spark.speculation", "true")
    (tmp_path / "file").touch()
    (tmp_path / "on_the_driver.py").write_text(
        "from torch.nn import functional as F\n"
        "def loss(output, label): return F.cross_entropy(output, label, reduction='none')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = ("engine.num_workers=3", "loss.name=on_the_driver:loss", "loss.kind=classes")
    findings = examined(spark, *settings, out=str(tmp_path / "file" / "run"))
    failing = of_status("fail", findings)
    assert failing.keys() == {"encryption", "slots", "your code", "--out"}
    assert "finds no module 'on_the_driver'" in failing["your code"].seen
    assert failing["your code"].fix.startswith("ship it with --py-files")
    assert failing["slots"].seen == "engine.num_workers is 3, but the cluster has 2 slots"
    assert "engine.num_workers=2" in failing["slots"].fix
    assert "--conf spark.io.encryption.enabled=false" in failing["encryption"].fix
    assert failing["--out"].seen.endswith("cannot be written: Not a directory")
    assert failing["--out"].fix == "name another folder"
    warned = {finding.name: finding.seen for finding in findings if finding.status == "warn"}
    assert "the smaller of spark.task.maxDirectResultSize" in warned["memory"]
    assert "spark.speculation" in warned["speculation"]
    assert of_status("skip", findings)["training"].seen == "a run is refused here: see encryption, your code"


@pytest.mark.soak
def test_with_dynamic_allocation_only_ordinary_stages_are_tried(spark, setting):
    setting("spark.dynamicAllocation.enabled", "true")
    findings = examined(spark)
    assert of_status("fail", findings).keys() == {"dynamic allocation"}, of_status("fail", findings)
    assert of_status("pass", findings).keys() >= {"slots", "inline", "tree, stages"}
    assert of_status("skip", findings).keys() >= {"tree", "allreduce", "--out"}


@pytest.mark.soak
def test_memory_and_threads_that_are_not_there_fail(spark, setting):
    setting("spark.driver.maxResultSize", "1m")
    findings = examined(spark, "model.hidden=2000", "train.threads=2")
    failing = of_status("fail", findings)
    assert failing.keys() == {"threads", "memory"}
    assert "spark.driver.maxResultSize is 1.0 MB, but the run takes" in failing["memory"].seen
    assert "--conf spark.driver.maxResultSize=256m" in failing["memory"].fix
    assert failing["threads"].fix.endswith("--conf spark.task.cpus=2")
    assert of_status("skip", findings)["training"].seen == "a run is refused here: see threads"


@pytest.mark.soak  # a session of its own
@pytest.mark.session("local-cluster[2,1,1024]", spark__python__daemon__module="pyspark.daemon")
def test_executors_without_torch_fail_by_name_and_no_engine_is_tried(spark, monkeypatch):
    monkeypatch.setattr(spark.sparkContext, "pythonExec", sys._base_executable)  # without .venv's packages
    findings = examined(spark)
    failing = of_status("fail", findings)
    assert failing.keys() == {"their Python"}
    assert "lacks" in failing["their Python"].seen
    assert "--archives" in failing["their Python"].fix
    assert of_status("skip", findings).keys() >= {"network", "training"}
