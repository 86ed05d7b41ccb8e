"""The jobs: what they say, what they leave behind, how they end.

Most run as functions in the tests' own process and session; what depends on a process is submitted.
"""

from __future__ import annotations

import ast
import errno
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers  # tests/hosts
import torch
from holds import Hold  # tests/hosts
from jobs_in_process import Done, module_of, run_job

from sparksgd.models import LeNet
from sparksgd.runs.holder import Holder
from sparksgd.runs.lease import Lease
from sparksgd.runs.model import load_model
from sparksgd.storage import location

ROOT = Path(__file__).parent.parent
SUMMARY_KEYS = {
    "test_accuracy", "test_loss", "train_rows", "epochs", "steps", "rows_per_second", "wall_s", "engine",
    "num_workers", "num_shards", "rows_per_step", "parameters", "parameters_sha256", "buffers_sha256",
    "numerics", "data_digest", "step_time_s",
}  # fmt: skip
EXACT_KEYS = [
    "kind", "step", "turn", "epoch", "version", "rows", "shards", "loss", "lr", "deal", "took_part",
]  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Write 600 images of a bright bar at one of ten places, as train and test Parquet."""
    folder = tmp_path_factory.mktemp("digits")
    source = np.random.default_rng(3)
    images = source.integers(0, 60, (600, 28, 28), dtype=np.uint8)
    labels = source.integers(0, 10, 600)
    for image, label in zip(images, labels, strict=True):
        image[4 + 2 * label : 6 + 2 * label] = 250
    table = pa.table(
        {"image": pa.array([image.tobytes() for image in images], pa.binary()), "label": pa.array(labels)}
    )
    pq.write_table(table, folder / "train.parquet")
    pq.write_table(table.slice(0, 100), folder / "test.parquet")
    return folder


def environment(**more: str) -> dict[str, str]:
    """Return what a job's process sees: the Spark of this Python first."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | more


def submission(job: str, *words: str) -> list[str]:
    """Return the command that submits a job."""
    spark_submit = str(Path(sys.executable).parent / "spark-submit")
    settings = ["--conf", "spark.ui.enabled=false", "--conf", "spark.executor.memory=1g"]
    return [spark_submit, "--master", "local[2]", *settings, str(ROOT / "jobs" / job), *words]


def submit(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Submit a job from a directory."""
    return subprocess.run(
        command, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=280, check=False,
    )  # fmt: skip


LENET = ("model.maps=[4, 8]", "model.hidden=16")
LONG = ("train.epochs=1000", "schedule.total_steps=10000")


def arguments(
    digits: Path, out: Path, *settings: str, engine: str = "tree", model: tuple[str, ...] = LENET
) -> list[str]:
    """Return the arguments of a small training."""
    base = [
        f"data.train={digits}/train.parquet", f"data.test={digits}/test.parquet", f"engine.name={engine}",
        "train.num_shards=4", "train.rows_per_step=60", "train.epochs=2", "optimizer.lr=0.02", *model,
    ]  # fmt: skip
    sets = [word for setting in (*base, *settings) for word in ("--set", setting)]
    return ["--config", str(ROOT / "conf" / "mnist-lenet.toml"), *sets, "--out", str(out)]


def train(digits: Path, out: Path, *settings: str, engine: str = "tree") -> Done:
    return run_job("train.py", *arguments(digits, out, *settings, engine=engine))


@pytest.fixture(scope="module")
def reference(digits, tmp_path_factory) -> Path:
    """Return the folder of a run by the inline engine."""
    out = tmp_path_factory.mktemp("reference") / "run"
    done = train(digits, out, engine="inline")
    assert done.returncode == 0, done.stdout
    return out


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.session("local[2]")
@pytest.mark.usefixtures("spark")
def test_a_run_leaves_all_its_files_and_equals_the_reference(digits, reference, tmp_path):
    out = tmp_path / "run"
    done = train(digits, out)
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert (summary["train_rows"], summary["steps"], summary["epochs"]) == (600, 20, 2)
    assert (summary["engine"], summary["num_workers"], summary["num_shards"]) == ("tree", 2, 4)
    assert summary["step_time_s"].keys() == {
        "total", "broadcast", "launch", "compute", "aggregate", "update"
    }  # fmt: skip

    lines = metrics(out)
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert list(steps[0]) == [*EXACT_KEYS, "timing"]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [10, 20]

    state = torch.load(out / "model" / "weights.pt", weights_only=True)
    module = LeNet(maps=(4, 8), hidden=16)
    module.load_state_dict(state)
    assert sum(p.numel() for p in module.parameters()) == summary["parameters"]
    model = load_model(out / "model")
    assert not model.module.training

    words = ["--model", str(out / "model"), "--data", f"{digits}/test.parquet"]
    scored = run_job("evaluate.py", *words)
    assert scored.returncode == 0, scored.stdout
    assert f"{summary['test_accuracy']:.4f}" in scored.stdout
    assert "Confusion matrix" in scored.stdout

    test_rows = pq.read_metadata(digits / "test.parquet").num_rows
    words += ["--out", str(tmp_path / "predicted"), "--columns", "label"]
    predicted = run_job("predict.py", *words)
    assert predicted.returncode == 0, predicted.stdout
    assert f"{test_rows} rows with predictions" in predicted.stdout
    table = pq.read_table(tmp_path / "predicted")
    assert table.column_names == ["label", "prediction", "probability"]
    right = np.mean(table["label"].to_numpy() == table["prediction"].to_numpy())
    assert right == pytest.approx(summary["test_accuracy"])
    again = run_job("predict.py", *words)
    assert (again.returncode, "--if-exists overwrite" in again.stdout) == (2, True), again.stdout
    assert run_job("predict.py", *words, "--if-exists", "overwrite").returncode == 0

    other = json.loads((reference / "summary.json").read_text())
    for key in ("parameters_sha256", "buffers_sha256", "data_digest", "test_accuracy", "test_loss", "steps"):
        assert other[key] == summary[key]
    exact = [
        [{k: v for k, v in line.items() if k != "timing"} for line in metrics(folder)]
        for folder in (out, reference)
    ]
    assert exact[0] == exact[1]


@pytest.mark.parametrize(
    ("settings", "status", "says"),
    [
        (["train.epoch=3"], 2, "error: unknown key train.epoch (did you mean epochs?)"),
        (["model.name=lennet"], 2, "error: model.name is 'lennet', which is not one of ours (did you mean"),
        (["data.placement=in_place"], 2, 'error: data.placement is "in_place", but engine.name = "inline"'),
        (["data.train=/nowhere"], 2, "error: cannot read /nowhere as Parquet"),
        (["schedule.max_lr=1e38"], 3, "error: "),
    ],
)  # fmt: skip
def test_nonsense_ends_in_one_line_and_a_status(digits, tmp_path, settings, status, says):
    done = train(digits, tmp_path / "run", *settings, engine="inline")
    assert done.returncode == status
    assert says in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.soak
@pytest.mark.jvm
@pytest.mark.parametrize(("settings", "status"), [((), 0), (("schedule.max_lr=1e38",), 3)])
def test_jobs_are_submitted_from_another_directory_and_leave_their_status(digits, tmp_path, settings, status):
    done = submit(submission("train.py", *arguments(digits, tmp_path / "run", *settings)), tmp_path)
    assert done.returncode == status, done.stdout
    assert "Traceback" not in done.stdout
    if status == 0:
        words = ["--model", str(tmp_path / "run" / "model"), "--data", f"{digits}/test.parquet"]
        scored = submit(submission("evaluate.py", *words), tmp_path)
        assert scored.returncode == 0, scored.stdout
        accuracy = json.loads((tmp_path / "run" / "summary.json").read_text())["test_accuracy"]
        assert f"{accuracy:.4f}" in scored.stdout


def in_group(group: int) -> bool:
    """Return whether a process group has a process that has not ended, reaped or not."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                state, _, of = (process / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(of) == group and state not in "ZX":
                return True
    return False


CTRL_C = (signal.SIGINT, "all", 130, {"KeyboardInterrupt", "Cancelled"})
"""As a terminal sends it."""
SIGTERM = (signal.SIGTERM, "spark-submit", 143, {"Terminated", "Cancelled"})
"""As a scheduler ends what it started."""

ON_OLDEST_SPARK = importlib.metadata.version("pyspark").startswith("3.")
"""Then one signal is no soak test: .ci/run has this file on it, beside `make test` on the newest."""


@pytest.mark.jvm
@pytest.mark.parametrize(
    ("sent", "to", "status", "says", "engine"),
    [
        pytest.param(
            *CTRL_C, "allreduce", id="Ctrl-C, allreduce", marks=() if ON_OLDEST_SPARK else pytest.mark.soak
        ),
        pytest.param(*SIGTERM, "tree", id="SIGTERM, tree", marks=pytest.mark.soak),
        pytest.param(*CTRL_C, "tree", id="Ctrl-C, tree", marks=pytest.mark.soak),
        pytest.param(*SIGTERM, "allreduce", id="SIGTERM, allreduce", marks=pytest.mark.soak),
    ],
)
def test_a_signal_ends_a_run_in_a_line_and_leaves_its_model_but_no_other_file(
    digits, tmp_path, sent, to, status, says, engine
):
    hold, shards = Hold(folder=tmp_path / "hold", at=6), tmp_path / "local"
    words = arguments(digits, tmp_path / "run", *LONG, engine=engine, model=hold.settings)
    command = submission("train.py", *words, *("--set", "engine.segment_steps=2"))
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(SPARK_LOCAL_DIRS=str(shards)), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            hold.wait(workers=2, process=process)
            assert list(shards.rglob("sparksgd-*"))
            (os.killpg if to == "all" else os.kill)(process.pid, sent)
            said, _ = process.communicate(timeout=200)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        servers.wait_for(lambda: not in_group(process.pid), "the end of all its processes")
    assert process.returncode == status, said
    assert "Traceback" not in said, said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] in says
    assert summary["steps"] in (4, 5)  # whole segments, or all steps before that which was held
    assert not list(shards.rglob("sparksgd-*"))
    load_model(tmp_path / "run" / "model", trust=["holding"])


def test_sigterm_ends_a_run_without_spark_and_the_same_command_goes_on_from_there(digits, tmp_path):
    out, hold = tmp_path / "run", Hold(folder=tmp_path / "hold", at=6)
    words = arguments(digits, out, "train.steps=8", engine="inline", model=hold.settings)
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), *words]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        hold.wait(process=process)
        process.terminate()
        _, said = process.communicate(timeout=100)
    assert (process.returncode, "Traceback" in said) == (143, False), said
    assert json.loads((out / "summary.json").read_text())["status"] == "Terminated"
    hold.go()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=True)
    assert "resumed from step 5 of" in again.stderr
    assert "0 steps were lost" in again.stderr
    assert [line["step"] for line in metrics(out) if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_finished_run_is_not_trained_again_nor_taken_for_another(digits, reference, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    before = (out / "summary.json").stat().st_mtime_ns
    again = train(digits, out, engine="inline")
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True), again.stdout
    refused = train(digits, out, "optimizer.lr=0.01", engine="inline")
    assert refused.returncode == 2
    assert "error: --out" in refused.stdout
    assert "optimizer.lr is 0.01, but was 0.02" in refused.stdout
    assert (out / "summary.json").stat().st_mtime_ns == before


def test_a_finished_run_is_not_trained_again_in_a_folder_that_can_only_be_read(
    digits, reference, tmp_path, monkeypatch
):
    def create(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    out = tmp_path / "run"
    shutil.copytree(reference, out)
    monkeypatch.setattr("sparksgd.storage.LocalLocation.create", create)
    again = train(digits, out, engine="inline")
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True), again.stdout
    (out / "summary.json").unlink()
    refused = train(digits, out, engine="inline")
    assert refused.returncode == 2
    assert f"error: --out is {out}, which cannot be written: Read-only file system" in refused.stdout


def test_a_folder_that_another_run_writes_to_is_refused(digits, tmp_path):
    with Lease(location(tmp_path), Holder.here("first"), renew_s=0.01).held():
        refused = train(digits, tmp_path, engine="inline")
    assert refused.returncode == 2
    assert f"error: --out is {tmp_path}, but run first (process {os.getpid()} on " in refused.stdout
    assert "wait for its end, name another folder, or pass --if-running wait" in refused.stdout
    assert location(tmp_path).files() == []


def test_a_job_may_wait_for_another_run_and_then_judges_what_is_there(
    digits, reference, tmp_path, monkeypatch
):
    first, out = Lease(location(tmp_path / "run"), Holder.here("first")), tmp_path / "run"
    first.take()

    def finishes(_):
        if not (out / "summary.json").exists():
            shutil.copytree(reference, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lease-*"))
            first.release()

    monkeypatch.setattr("sparksgd.runs.folder.Lease", partial(Lease, sleep=finishes))
    waited = run_job("train.py", *arguments(digits, out, engine="inline"), "--if-running", "wait")
    assert waited.returncode == 0, waited.stdout
    assert "waiting for the end of run first" in waited.stdout
    assert "nothing to do" in waited.stdout


def test_a_run_that_is_killed_leaves_a_model_and_the_steps_that_made_it(digits, tmp_path, monkeypatch):
    out, hold = tmp_path / "run", Hold(folder=tmp_path / "hold", at=12)  # after the first evaluation
    words = arguments(digits, out, *LONG, engine="inline", model=hold.settings)
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), *words]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environ = environment(TMPDIR=str(temporary))
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, env=environ)
    try:
        hold.wait(process=process)
    finally:
        process.kill()
        process.wait()
    about = json.loads((out / "model" / "model.json").read_text())
    load_model(out / "model", trust=["holding"])
    assert not about["finished"]
    assert about["version"] <= metrics(out)[-1]["step"]
    assert not (out / "summary.json").exists()
    assert len(list(temporary.glob("sparksgd-*/shard-*"))) == 8  # of rows to train on, and to evaluate on
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    next_run = train(digits, tmp_path / "next", "train.steps=1", engine="inline")
    assert (next_run.returncode, "removed 2 folders that killed runs had left" in next_run.stdout) == (
        0,
        True,
    )
    assert not list(temporary.iterdir())


@pytest.mark.soak
@pytest.mark.jvm
def test_shards_of_a_killed_driver_and_its_executors_are_removed_by_the_next_run(digits, tmp_path):
    hold, local = Hold(folder=tmp_path / "hold", at=6), tmp_path / "local"
    words = arguments(digits, tmp_path / "run", *LONG, model=hold.settings)
    environ = environment(SPARK_LOCAL_DIRS=str(local))
    with subprocess.Popen(
        submission("train.py", *words), cwd=tmp_path, env=environ, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            hold.wait(workers=2, process=process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert len(list(local.rglob("sparksgd-*/shard-*"))) == 8
    hold.go()  # a worker that outlived the driver ends now
    again = submission("train.py", *arguments(digits, tmp_path / "next", "train.steps=1"))
    done = subprocess.run(
        again, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=True,
    )  # fmt: skip
    assert "removed 2 folders that killed runs had left" in done.stdout
    assert not list(local.rglob("sparksgd-*"))


def test_jobs_run_code_that_a_folder_names_only_if_they_are_told_to_trust_it(digits, tmp_path):
    out, again = tmp_path / "run", str(tmp_path / "again")
    done = train(digits, out, "model.name=sparksgd.models:LeNet", "train.steps=2", engine="inline")
    assert done.returncode == 0, done.stdout  # what one's own configuration names needs no trust
    data = ["--data", f"{digits}/test.parquet"]
    for job, words in (
        ("evaluate.py", ["--model", str(out / "model"), *data]),
        ("train.py", ["--replay", str(out), "--out", again]),
    ):
        refused = run_job(job, *words)
        assert (refused.returncode, "Traceback" in refused.stdout) == (2, False)
        assert "model.name is 'sparksgd.models:LeNet', but sparksgd.models is not trusted" in refused.stdout
        refused = run_job(job, *words, "--trust", "models", "--trust", "*")
        assert refused.returncode == 2
        assert "a package to trust is '*', but must be the name of one package" in refused.stdout
    assert not (tmp_path / "again").exists()
    replayed = run_job("train.py", "--replay", str(out), "--out", again, "--trust", "sparksgd.models")
    assert (replayed.returncode, "the same 2 steps, the same parameters" in replayed.stdout) == (0, True)
    refused = run_job("train.py", *arguments(digits, tmp_path / "more"), "--trust", "sparksgd")
    assert (refused.returncode, "--trust is for --replay" in refused.stdout) == (2, True)


def test_evaluate_refuses_code_that_was_changed_if_it_is_told_to_be_strict(digits, tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text("from sparksgd.models import LeNet\nclass Net(LeNet): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    done = train(digits, tmp_path / "run", "model.name=own_nets:Net", "train.steps=1", engine="inline")
    assert done.returncode == 0, done.stdout
    (tmp_path / "own_nets.py").write_text("from sparksgd.models import LeNet\nclass Net(LeNet): other = 1\n")
    words = ["--model", str(tmp_path / "run" / "model"), "--data", f"{digits}/test.parquet"]
    refused = run_job("evaluate.py", *words, "--trust", "own_nets", "--strict")
    assert refused.returncode == 2
    assert "the code of model.name = 'own_nets:Net' is not that of the training" in refused.stdout
    assert "and strict was asked for" in refused.stdout


@pytest.mark.parametrize("job", sorted(path.name for path in (ROOT / "jobs").glob("*.py")))
def test_the_command_line_in_a_jobs_docstring_parses(job):
    path = ROOT / "jobs" / job
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring is not None
    lines = [line.strip() for line in docstring.splitlines() if f"jobs/{job}" in line]
    assert lines
    module = module_of(job)
    for line in lines:
        words = shlex.split(line)
        module.parser().parse_args(words[words.index(f"jobs/{job}") + 1 :])
