"""The all-reduce engine: the reference's bits, through whatever happens to its workers."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from spark_helpers import (
    LOCAL_CLUSTER,
    AtStep,
    Reports,
    configured,
    digests,
    executor_pids,
    memory_bytes,
    read_files_apart,
    striking,
    undisturbed,
    with_descendants,
    write_rows,
)
from users_modules import ENDLESS_S  # tests/modules

from sparksgd.arithmetic.addition_tree import useful_workers
from sparksgd.data.local_files import ParquetRows
from sparksgd.engines.inline import InlineEngine
from sparksgd.errors import Cancelled, ClusterError, ConfigError, NotFinite, UpdateNotFinite, UserCodeError
from sparksgd.peers.wire import Credentials, connect
from sparksgd.spark.train import train
from sparksgd.training.loop import train as train_inline

pytestmark = pytest.mark.session("local[2]")

FLAG_NET = "model.name=users_modules:FlagNet"
ALLREDUCE = ("engine.name=allreduce", "engine.segment_steps=4")
PLACES = [
    (1, 4, ()),
    (2, 4, ("engine.name=tree",)),
    (2, 4, ("engine.segment_steps=7",)),
    (3, 4, ("engine.encrypt=true",)),
    (4, 4, ("engine.segment_steps=20",)),
    (3, 8, ("engine.segment_steps=none",)),
]
EXPERIMENTS = {
    "LeNet with dropout, and momentum": (
        *("model.name=lenet", "model.side=4", "model.maps=[4, 8]", "model.hidden=32"),
        *("schedule.name=CosineAnnealingLR", "schedule.T_max=20"),
    ),
    "batch-norm and Adam": ("model.name=users_modules:NormNet", "optimizer.name=Adam", "optimizer.lr=0.01"),
    "clipping, which needs the whole gradient": ("solver.clip_norm=0.5",),
    "an optimiser that looks at whole tensors": ("optimizer.name=Adafactor", "optimizer.lr=0.01"),
    "a head that some steps do not touch": (
        *("model.name=users_modules:HeadsNet", "optimizer.name=AdamW", "optimizer.lr=0.01"),
    ),
    "an optimiser of the user's own": ("optimizer.name=users_modules:NoisyLookahead", "optimizer.lr=0.05"),
}


LENET, ADAM, CLIPPING, WHOLE_TENSORS, HEADS, OWN = EXPERIMENTS
QUICK = {
    (LENET, 5), (ADAM, 1), (ADAM, 3), (CLIPPING, 4), (WHOLE_TENSORS, 0), (WHOLE_TENSORS, 2),
    (HEADS, 5), (OWN, 3),
}  # fmt: skip
"""Every experiment and every place are among them."""


@pytest.mark.session("local[5]")
@pytest.mark.parametrize(
    ("experiment", "place"),
    [
        pytest.param(experiment, place, marks=() if (experiment, place) in QUICK else pytest.mark.soak)
        for experiment in EXPERIMENTS
        for place in range(len(PLACES))
    ],
)
def test_every_number_of_workers_ends_at_the_digest_of_the_reference(spark, small, experiment, place):
    workers, shards, cluster = PLACES[place]
    settings = ("train.steps=20", f"train.num_shards={shards}", *EXPERIMENTS[experiment])
    config = configured(*settings, f"engine.num_workers={workers}", *ALLREDUCE, *cluster)
    training = train(spark, config, spark.read.parquet(small))
    inline = train_inline(config, rows=ParquetRows(small), test=None, make_engine=InlineEngine)
    assert digests(training) == digests(inline)
    assert (len(training.step_times), training.recovery.retries) == (20, 0)
    if training.engine == "allreduce" and workers in useful_workers(shards):
        vector = 4 * training.flat.parameters.numel()
        beside = training.sent_bytes_per_worker_step - 2 * (workers - 1) / workers * vector
        assert 0 <= beside <= 256 * (workers - 1)  # a record of loss, rows, statistics for each other


# Of both layers the last is a bucket by itself.
WIDE = ("model.width=66000", "optimizer.lr=0.001", "train.rows_per_step=16")
OVERLAPPING = ("engine.overlap=always", *WIDE)


@pytest.mark.session("local[5]")
@pytest.mark.parametrize(
    ("workers", "settings"),
    [
        (2, ("engine.encrypt=true", "engine.segment_steps=3")),
        (3, ("optimizer.name=Adam",)),
        (2, ("solver.clip_norm=0.5",)),
    ],
    ids=str,
)
def test_gradients_that_go_out_while_others_are_computed_change_no_bit(spark, small, workers, settings):
    sized = ("train.steps=8", f"train.num_shards={workers}", f"engine.num_workers={workers}")
    config = configured(*ALLREDUCE, *OVERLAPPING, *sized, *settings)
    training = train(spark, config, spark.read.parquet(small))
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    vector = 4 * training.flat.parameters.numel()
    assert training.sent_bytes_per_worker_step == pytest.approx(
        2 * (workers - 1) / workers * vector, rel=1e-3
    )


@pytest.mark.parametrize(
    ("shards", "overlap", "said"),
    [
        (2, "auto", 1),
        pytest.param(2, "never", 0, marks=pytest.mark.soak),
        pytest.param(4, "auto", 0, marks=pytest.mark.soak),
    ],
)
def test_sums_begin_early_once_they_have_taken_long(spark, small, caplog, monkeypatch, shards, overlap, said):
    monkeypatch.setattr("sparksgd.spark.engines.allreduce._OVERLAP_PAYS_S", 0.0)
    settings = ("train.steps=12", *WIDE)
    config = configured(*ALLREDUCE, *settings, f"train.num_shards={shards}", f"engine.overlap={overlap}")
    with caplog.at_level(logging.INFO, "sparksgd"):
        training = train(spark, config, spark.read.parquet(small))
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    assert caplog.text.count("from now on it begins before gradients are complete") == said


def test_gradients_that_come_in_parts_go_out_whole(spark, small, caplog):
    config = configured(
        *ALLREDUCE, *OVERLAPPING, "model.name=users_modules:TwiceNet", "train.num_shards=2", "train.steps=8"
    )
    with caplog.at_level(logging.WARNING, "sparksgd"):
        training = train(spark, config, spark.read.parquet(small))
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    assert training.recovery.retries == 0
    assert caplog.text.count("from now on gradients are sent whole") == 1


HANGS = ("engine.peer_timeout_s=4", "engine.max_attempts=50")
"""Another worker, in a hung one's place, must import torch, for which a slow machine may take attempts."""

WAITS_FOR_NOBODY = (f"engine.peer_timeout_s={ENDLESS_S}",)
"""What passes with that has not waited for who is gone."""


@pytest.mark.parametrize(
    "flag", ["kill-worker", "raise", "nan", pytest.param("sleep", marks=pytest.mark.soak)]
)
def test_a_worker_that_fails_when_half_of_its_gradient_has_gone(spark, small, flags, flag):
    config = configured(
        *ALLREDUCE, *OVERLAPPING, "model.name=users_modules:BackwardFlagNet", f"model.folder={flags}",
        "train.num_shards=2", "train.steps=8", *(HANGS if flag == "sleep" else WAITS_FOR_NOBODY),
    )  # fmt: skip
    watch = AtStep(4, lambda _: (flags / flag).touch())
    if flag == "nan":
        with pytest.raises(NotFinite, match=r"the gradient of turn 5 is NaN or infinite in shard \d"):
            train(spark, config, spark.read.parquet(small), observers=[watch])
        assert (watch.training.version, watch.training.recovery.retries) == (3, 0)
    elif flag == "raise":
        with pytest.raises(UserCodeError, match=r"the user's own mistake(?s:.*)in turn 5, on worker \d"):
            train(spark, config, spark.read.parquet(small), observers=[watch])
        assert (watch.training.version, watch.training.recovery.retries) == (4, 0)
    else:
        training = train(spark, config, spark.read.parquet(small), observers=[watch])
        assert training.flat.parameters_sha256() == undisturbed(small, config)
        assert training.recovery.retries >= 1
    assert_nothing_is_left(flags)


@pytest.mark.session("local[5]")
def test_two_runs_at_once_on_the_same_executors_do_not_meet(spark, small):
    frame = spark.read.parquet(small)
    configs = [configured(*ALLREDUCE, "train.steps=12", f"train.seed={seed}") for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        trainings = list(pool.map(lambda config: train(spark, config, frame), configs))
    for training, config in zip(trainings, configs, strict=True):
        assert training.flat.parameters_sha256() == undisturbed(small, config)
        assert (training.recovery.strangers, training.recovery.retries) == (0, 0)


@pytest.mark.session("local[5]")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("engine.encrypt=true",), "pip install 'sparksgd[tls]'"),
        (("engine.ports={taken}-{taken}",), "cannot listen on a port of {taken} to {taken}"),
    ],
)
def test_what_cannot_work_at_the_driver_is_refused_before_rows_are_dealt(
    spark, small, monkeypatch, settings, says
):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.setattr("sparksgd.spark.train.DataFrameRows", None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        config = configured(*ALLREDUCE, *(setting.format(taken=taken) for setting in settings))
        with pytest.raises((ClusterError, ConfigError), match=re.escape(says.format(taken=taken))):
            train(spark, config, spark.read.parquet(small))


@pytest.mark.session("local[5]")
def test_rows_dealt_in_place_reach_the_digest_of_the_tree_engine(spark, tmp_path):
    path = write_rows(tmp_path / "rows", 600, files=6)
    settings = ("train.steps=6", "data.placement=in_place", "train.num_shards=5", "engine.num_workers=3")
    frame = read_files_apart(spark, path)
    tree = train(spark, configured(*settings), frame)
    allreduce = train(spark, configured(*settings, *ALLREDUCE), frame)
    assert digests(tree) == digests(allreduce)
    assert allreduce.sent_bytes > tree.sent_bytes == 0


def test_reports_and_evaluations_are_those_of_the_reference(spark, small):
    config = configured(*ALLREDUCE, "train.steps=20", "train.eval_every=6")
    frame, ours, reference = spark.read.parquet(small), Reports(), Reports()
    training = train(spark, config, frame, frame, observers=[ours])
    rows = ParquetRows(small)
    train_inline(config, rows=rows, test=rows, make_engine=InlineEngine, observers=[reference])
    assert ours.seen == reference.seen
    assert len(training.step_times) == 20


def test_a_python_worker_killed_in_a_segment_costs_that_segment_alone(spark, small, flags):
    config = configured(*ALLREDUCE, "train.steps=12", FLAG_NET, f"model.folder={flags}", *WAITS_FOR_NOBODY)
    kill = AtStep(5, lambda _: (flags / "kill-worker").touch())
    training = train(spark, config, spark.read.parquet(small), observers=[kill])
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    assert training.recovery.retries == 1
    assert_nothing_is_left(flags)


@pytest.mark.parametrize("flag", [pytest.param("sleep", marks=pytest.mark.soak), "stop"])
def test_a_worker_that_hangs_ends_in_bounded_time(spark, small, flags, flag):
    config = configured(*ALLREDUCE, "train.steps=12", FLAG_NET, f"model.folder={flags}", *HANGS)
    hang = AtStep(5, lambda _: (flags / flag).touch())
    training = train(spark, config, spark.read.parquet(small), observers=[hang])
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    assert training.recovery.retries >= 1
    assert_nothing_is_left(flags)


def test_a_user_error_ends_the_run_with_the_remote_traceback_worker_and_step(spark, small, flags):
    config = configured(*ALLREDUCE, FLAG_NET, f"model.folder={flags}")
    watch = AtStep(4, lambda _: (flags / "raise").touch())
    with pytest.raises(UserCodeError, match=r"the user's own mistake(?s:.*)in turn 5, on worker \d"):
        train(spark, config, spark.read.parquet(small), observers=[watch])
    assert (watch.training.version, watch.training.recovery.retries) == (4, 0)


def test_a_user_error_beside_a_worker_that_hangs_is_still_the_users(spark, small, flags):
    config = configured(*ALLREDUCE, FLAG_NET, f"model.folder={flags}", "engine.peer_timeout_s=2")

    def raise_on_one_and_hang_on_the_other(_):
        (flags / "sleep").touch()
        (flags / "raise").touch()

    watch = AtStep(4, raise_on_one_and_hang_on_the_other)
    with pytest.raises(UserCodeError, match=r"the user's own mistake(?s:.*)in turn 5, on worker \d"):
        train(spark, config, spark.read.parquet(small), observers=[watch])
    assert (watch.training.version, watch.training.recovery.retries) == (4, 0)


def test_an_optimiser_of_the_users_that_raises_on_a_worker_ends_the_run(spark, small):
    watch = AtStep(0, lambda _: None)
    config = configured(*ALLREDUCE, "optimizer.name=users_modules:TiredSGD")
    with pytest.raises(UserCodeError, match="the optimiser raised ValueError: the optimiser's own mistake"):
        train(spark, config, spark.read.parquet(small), observers=[watch])
    assert (watch.training.version, watch.training.recovery.retries) == (4, 0)


def test_a_cancelled_job_ends_the_run_and_frees_the_slots(spark, small, flags):
    config = configured(*ALLREDUCE, FLAG_NET, f"model.folder={flags}")
    watch = AtStep(4, lambda _: (flags / "sleep").touch())
    in_the_segment = flags.with_name("asleep").exists
    with (
        striking(in_the_segment, spark.sparkContext.cancelAllJobs),
        pytest.raises(Cancelled, match="cancelled"),
    ):
        train(spark, config, spark.read.parquet(small), observers=[watch])
    assert (watch.training.version, watch.training.recovery.retries) == (4, 0)
    both = spark.sparkContext.parallelize(range(2), 2).barrier().mapPartitions(list)
    assert both.collect() == [0, 1]
    assert_nothing_is_left(flags)


@pytest.mark.soak  # test_faults.py has it of the tree engine, by the same code
def test_a_failure_that_repeats_ends_the_run(spark, small, flags):
    config = configured(*ALLREDUCE, FLAG_NET, f"model.folder={flags}", "engine.max_attempts=2")
    watch = AtStep(4, lambda _: (flags / "kill-always").touch())
    with pytest.raises(ClusterError, match=r"steps 5 to 8.*: failed 2 times"):
        train(spark, config, spark.read.parquet(small), observers=[watch])
    assert watch.training.version == 4


def test_a_loss_that_becomes_nan_stops_the_run_at_the_last_good_weights(spark, small):
    lengths = [50, 1]
    for segment_steps in lengths:
        nan = ("loss.name=users_modules:nan_after", "train.epochs=10")
        config = configured(*ALLREDUCE, *nan, f"engine.segment_steps={segment_steps}")
        watch = AtStep(0, lambda _: None)
        with pytest.raises(NotFinite, match=r"the loss of turn \d+ is nan in shard \d, rows \d") as caught:
            train(spark, config, spark.read.parquet(small), observers=[watch])
        failed_step = int(str(caught.value).split("turn ")[1].split()[0])
        assert watch.training.version == failed_step - 2, segment_steps
        assert len(watch.training.step_times) == failed_step - 1
        good = configured("train.epochs=10", f"train.steps={failed_step - 2}")
        assert watch.training.flat.parameters_sha256() == undisturbed(small, good)
        if len(lengths) == 2:
            lengths.append(failed_step - 1)  # the loss is NaN in a segment's first step
    assert lengths[2] > 1


def test_an_update_that_is_infinite_is_taken_back_on_every_engine(spark, small):
    ends = []
    for segment_steps in (1, 3, 50):
        config = configured(
            *ALLREDUCE,
            "loss.name=users_modules:steep",
            "optimizer.lr=1e-5",
            *("schedule.name=StepLR", "schedule.step_size=5", "schedule.gamma=1e42"),
            f"engine.segment_steps={segment_steps}",
        )
        watch = AtStep(0, lambda _: None)
        with pytest.raises(UpdateNotFinite, match="made a parameter infinite or NaN"):
            train(spark, config, spark.read.parquet(small), observers=[watch])
        ends.append((watch.training.version, digests(watch.training)))
    watch = AtStep(0, lambda _: None)
    with pytest.raises(UpdateNotFinite):
        train_inline(config, rows=ParquetRows(small), test=None, make_engine=InlineEngine, observers=[watch])
    assert watch.training.version == 5
    assert {(watch.training.version, digests(watch.training))} == set(ends)


@pytest.mark.parametrize(
    ("workers", "listens", "chosen", "why"),
    [
        (2, True, "allreduce", "engine: allreduce, because all 2 workers reach each other"),
        (1, True, "tree", "engine: tree, because there is only one worker"),
        (
            2,
            False,
            "tree",
            "engine: tree, because workers cannot sum among themselves: cannot listen on",
        ),
    ],
)
def test_auto_chooses_and_says_why(spark, small, caplog, workers, listens, chosen, why):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ports = f"{port}-{port + 9 * listens}"  # one is enough for the driver alone
    config = configured(
        "engine.name=auto",
        f"engine.num_workers={workers}",
        f"engine.ports={ports}",
        "engine.peer_timeout_s=2",
        "train.steps=3",
    )
    with caplog.at_level(logging.INFO, "sparksgd"):
        training = train(spark, config, spark.read.parquet(small))
    assert training.engine == chosen
    assert why in caplog.text
    assert training.flat.parameters_sha256() == undisturbed(small, config)


@pytest.mark.soak
@pytest.mark.parametrize("encrypt", ["false", "true"])
def test_strangers_at_every_port_are_counted_and_change_nothing(spark, small, caplog, encrypt):
    with socket.create_server(("127.0.0.1", 0)) as free:
        first = free.getsockname()[1]
    config = configured(
        *ALLREDUCE, "train.steps=1000", "train.epochs=80", "engine.segment_steps=50",
        f"engine.ports={first}-{first + 20}", f"engine.encrypt={encrypt}",
    )  # fmt: skip
    crowd = Strangers(range(first, first + 21), Credentials.new(encrypt=encrypt == "true"))
    looks: list[int] = []
    observers = [AtStep(step, lambda _: looks.append(most_resident_bytes())) for step in (50, 1000)]
    observers += [AtStep(50, crowd.come), AtStep(950, crowd.join)]
    training = train(spark, config, spark.read.parquet(small), observers=observers)
    crowd.close()
    assert crowd.let_in == 0
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    assert training.recovery.retries == 0
    assert crowd.knocked.keys() == {"nothing", "garbage", "half", "secret", "gigabyte"}
    assert crowd.knocked.total() >= 8  # the driver and a worker at least
    for door in ("the driver", "worker 0", "worker 1"):
        assert re.search(rf"connections of strangers were dropped: .*\d to {door} \(", caplog.text)
    before, after = looks
    assert after - before < 200 << 20


class Strangers:
    """Connections by who does not know the secret, in a thread while a training runs.

    Args:
        ports: some of them listen.
        credentials: another run's.
    """

    def __init__(self, ports: range, credentials: Credentials) -> None:
        self.knocked: Counter[str] = Counter()
        self.let_in = 0
        self._ports, self._credentials = ports, credentials
        self._silent: list[socket.socket] = []

    def come(self, _) -> None:
        self._thread = threading.Thread(target=self._knock)
        self._thread.start()

    def join(self, _) -> None:
        """Wait until all have come."""
        self._thread.join()

    def close(self) -> None:
        for sock in self._silent:
            sock.close()

    def _knock(self) -> None:
        for port in self._ports:
            for kind in ("nothing", "garbage", "half", "secret", "gigabyte"):
                try:
                    self._silent.append(socket.create_connection(("127.0.0.1", port), timeout=1))
                except OSError:
                    break  # nobody listens there
                self.knocked[kind] += 1
                with suppress(OSError, ClusterError):  # dropped, as it should be
                    self._say(kind, port, self._silent[-1])

    def _say(self, kind: str, port: int, sock: socket.socket) -> None:
        if kind == "garbage":
            sock.sendall(os.urandom(4096))
        elif kind == "half":
            sock.recv(16)
            sock.sendall(bytes(40))
        elif kind == "secret":
            connect(self._credentials, ("127.0.0.1", port), b"hello", "a worker", 1)
            self.let_in += 1
        elif kind == "gigabyte":
            for _ in range(1 << 10):
                sock.sendall(bytes(1 << 20))


def most_resident_bytes() -> int:
    """Return the most memory that this process has had, and each Python worker that it started."""
    return sum(memory_bytes(pid, "VmHWM") for pid in python_workers() | {os.getpid()})


def python_workers() -> set[int]:
    family = with_descendants([os.getpid()])
    return {pid for pid in family if b"pyspark.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def assert_nothing_is_left(flags: Path) -> None:
    """Require that no Python worker listens for others, that the one which hung is gone, and our threads."""
    asleep = flags.with_name("asleep")
    hung = int(asleep.read_text()) if asleep.exists() else None
    deadline = time.monotonic() + 120
    while True:
        listen = [pid for pid in python_workers() if listens(pid)]
        threads = [one.name for one in threading.enumerate() if one.name.startswith("sparksgd-l")]
        if not listen and not threads and (hung is None or not Path(f"/proc/{hung}").exists()):
            return
        assert time.monotonic() < deadline, (listen, threads, hung)
        time.sleep(0.1)


def listens(pid: int) -> bool:
    """Return whether a Python worker, not the daemon that forked it, listens on a port."""
    try:
        parent = re.search(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]
        if b"pyspark.worker" not in Path(f"/proc/{parent}/cmdline").read_bytes():
            return False
        inodes = {str(file.readlink())[8:-1] for file in Path(f"/proc/{pid}/fd").iterdir()}
    except OSError:
        return False  # it ended
    lines = [Path("/proc/net", table).read_text().splitlines()[1:] for table in ("tcp", "tcp6")]
    sockets = [line.split() for of_table in lines for line in of_table]
    return any(words[3] == "0A" and words[9] in inodes for words in sockets)  # LISTEN


@pytest.mark.session(LOCAL_CLUSTER)
@pytest.mark.soak
def test_executors_killed_between_segments_and_in_one_change_no_bit(spark, small, flags):
    config = configured(*ALLREDUCE, "train.steps=20", FLAG_NET, f"model.folder={flags}")
    killers = [
        AtStep(4, lambda _: os.kill(executor_pids()[0], signal.SIGKILL)),
        AtStep(8, lambda _: (flags / "kill-worker").touch()),
        AtStep(12, lambda _: (flags / "kill-executor").touch()),
    ]
    training = train(spark, config, spark.read.parquet(small), observers=killers)
    assert training.flat.parameters_sha256() == undisturbed(small, config)
    assert not any(flags.iterdir())  # both killed somebody in mid-segment
    assert training.recovery.retries >= 3
    assert training.recovery.rebuilt_shards >= 4
    assert len(training.step_times) == 20
