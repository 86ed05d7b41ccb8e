"""What a failure says of memory: whose it was, what gives it more; and that it is not tried again."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from sparksgd.engines.kinds import ALLREDUCE, TREE
from sparksgd.engines.memory import Copies, Places, Takes
from sparksgd.errors import ClusterError, OutOfMemory
from sparksgd.spark.cluster.failures import final_error
from sparksgd.spark.cluster.memory import Limits, refuse_too_little
from sparksgd.spark.cluster.memory_failures import out_of_memory
from sparksgd.spark.engines.base import SparkEngine

SESSION = SimpleNamespace(
    applicationId="app-1", _jsc=object(), setJobDescription=lambda _: None, master="yarn"
)
GB = 10**9

ABORTED = (
    "An error occurred while calling o1.get.\n"
    ": org.apache.spark.SparkException: Job aborted due to stage failure: Task 0 in stage 3.0 failed 1 times,"
    " most recent failure: Lost task 0.0 in stage 3.0 (TID 5) (host7 executor 2): {}\n"
    "\tat org.apache.spark.scheduler.DAGScheduler.failJobAndIndependentStages(DAGScheduler.scala:2857)\n"
)
JAVA = "java.lang.OutOfMemoryError: Java heap space\n\tat java.util.Arrays.copyOf(Arrays.java:3481)"
AT_DRIVER = (
    f"An error occurred while calling z:org.apache.spark.api.python.PythonRDD.collectAndServe.\n: {JAVA}"
)
PYTHON = (
    "org.apache.spark.api.python.PythonException: Traceback (most recent call last):\n"
    '  File "replica.py", line 3, in _loaded\n'
    "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 1.49 GiB for an array with shape (4,)\n"
)
TORCH = (
    "RuntimeError: [enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"
)
YARN = (
    "ExecutorLostFailure (executor 2 exited caused by one of the running tasks) Reason: Container killed by "
    "YARN for exceeding physical memory limits. 1.6 GB of 1.5 GB physical memory used."
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ABORTED.format(JAVA), "the heap of executor 2 on host7 is too small.*larger --executor-memory"),
        (AT_DRIVER, "the heap of the driver is too small.*larger --driver-memory"),
        (
            "Could not recover from a failed barrier ResultStage. Most recent failure reason: Stage failed "
            f"because barrier task ResultTask(5, 0) finished unsuccessfully.\n{JAVA}",
            "the heap of an executor is too small.*larger --executor-memory",
        ),
        (ABORTED.format("java.lang.OutOfMemoryError: GC overhead limit exceeded"), "--executor-memory"),
        (
            ABORTED.format("java.lang.OutOfMemoryError: Direct buffer memory"),
            "outside its heap: Direct buffer",
        ),
        (
            ABORTED.format("ExecutorLostFailure (executor 2 exited) Reason: Command exited with code 52"),
            "the heap of executor 2 on host7 is too small .it ended with status 52.*--executor-memory",
        ),
        (
            ABORTED.format("Container exited with a non-zero exit code 52. Error file: prelaunch.err."),
            "ended with status 52",
        ),
        (
            ABORTED.format(YARN),
            "executor 2 on host7 was killed for its memory.*spark.executor.memoryOverhead",
        ),
        (ABORTED.format("The executor with id 2 was OOMKilled"), "killed for its memory.*memoryOverhead"),
        (ABORTED.format(PYTHON), "Python worker of executor 2 on host7 found no memory: numpy.*1.49 GiB"),
        (ABORTED.format(TORCH), "Python worker of executor 2.*can't allocate memory.*memoryOverhead"),
        (ABORTED.format("x.PythonException: Traceback\nMemoryError\n"), "Python worker of executor 2"),
    ],
)
def test_whose_memory_was_too_small_and_what_gives_it_more(text, says):
    error = final_error(RuntimeError(text), SESSION)
    assert type(error) is OutOfMemory
    with pytest.raises(OutOfMemory, match=f"(?s){says}"):
        raise error


def test_in_local_mode_tasks_use_the_heap_of_the_driver():
    text = ABORTED.format(JAVA).replace("executor 2", "executor driver")
    assert "the heap of the driver is too small" in out_of_memory(text, is_local=True)


def test_our_own_error_is_read_back_from_sparks_text():
    text = ABORTED.format("x.PythonException: T\nsparksgd.errors.OutOfMemory: the module found no memory\n")
    assert out_of_memory(text) == "the module found no memory"


@pytest.mark.parametrize(
    "text",
    [
        "Command exited with code 137",
        "ExecutorLostFailure (executor 1 exited caused by one of the running tasks)",
        "Python worker exited unexpectedly (crashed)",
        "ValueError: MemoryErrors are no errors of ours",
        "Command exited with code 523",
    ],
)
def test_other_failures_are_not_about_memory(text):
    assert out_of_memory(ABORTED.format(text)) is None


class Engine(SparkEngine):
    """An engine whose jobs fail, without a cluster."""

    def __init__(self, killed: bool = False) -> None:
        self.recovery = SimpleNamespace(retries=0)
        self._max_attempts, self._context, self._shards = 4, SESSION, None
        self._has_contact = True

        @contextmanager
        def over(*_):
            yield SimpleNamespace(expired=False)

        lost = SimpleNamespace(killed_for_memory=0)
        lost.look = lambda: setattr(lost, "killed_for_memory", int(killed))
        self._cluster = SimpleNamespace(
            job_watch=SimpleNamespace(over=over), lost_executors=lost, is_stopped=lambda: False, num_workers=2
        )

    def _await_slots(self):
        pass

    def _recover(self, shards, missing):
        pass


def failing(engine, error):
    """Run a job that always fails; return how often it ran, and what the engine raised."""
    ran = []

    def job():
        ran.append(1)
        raise error

    with pytest.raises((OutOfMemory, ClusterError)) as raised:
        engine._run(job, None, "step 5")
    return len(ran), raised.value


@pytest.mark.parametrize("text", [ABORTED.format(JAVA), AT_DRIVER, ABORTED.format(PYTHON)])
def test_want_of_memory_is_not_tried_again(text):
    ran, error = failing(Engine(), RuntimeError(text))
    assert (ran, type(error)) == (1, OutOfMemory)


def test_a_lost_executor_is_tried_again_unless_it_was_killed_for_its_memory():
    lost = RuntimeError("ExecutorLostFailure (executor 1 exited)")
    ran, error = failing(Engine(), lost)
    assert (ran, type(error)) == (4, ClusterError)
    ran, error = failing(Engine(killed=True), lost)
    assert (ran, type(error)) == (1, OutOfMemory)


LIMITS = {
    "driver_heap": GB,
    "executor_heap": GB,
    "driver": 16 * GB,
    "executor": 2 * GB,
    "worker": GB,
    "results": GB,
}
SPARK = (Copies("Spark", 1, GB // 4),)
HEAP = (*SPARK, Copies("sums", 1, GB // 4))
TAKES = {"trial": (Copies("weights", 1, GB // 2),), "steps": ()}


@pytest.mark.parametrize(
    ("takes", "says"),
    [
        ({"driver_heap": (Copies("Spark", 1, GB // 4), Copies("sums", 3, GB // 2))},
         r"heap of the driver is 1.0 GB, but the run takes 1 x 250.0 MB \(Spark\) \+ 3 x 500.0 MB \(sums\) = "
         r"1.8 GB: submit with --driver-memory 1792m"),
        ({"executor_heap": (Copies("sums", 3, GB),)}, r"of an executor is 1.0 GB.*--executor-memory 3072m"),
        ({"results": 2 * GB}, r"maxResultSize is 1.0 GB.*--conf spark.driver.maxResultSize=2048m"),
        ({"trial": (Copies("weights", 20, GB),), "spark": SPARK, "driver_heap": HEAP},
         r"memory at the driver is 16.0 GB, but the run takes 20 x 1.0 GB \(weights\) \+ 1 x 250.0 MB "
         r"\(Spark\) = 20.2 GB.*memoryOverhead=20224m"),
        ({"steps": (Copies("weights", 15.6, GB),), "spark": SPARK, "driver_heap": HEAP},
         r"memory at the driver is 16.0 GB, but .*\(sums\) = 16.1 GB.*memoryOverhead="),
        ({"worker_python": (Copies("weights", 0.25, 2 * GB),), "executor_heap": (Copies("sums", 1, GB),) * 2},
         r"heap of an executor is 1.0 GB.*memory of an executor is 2.0 GB, but .* = 3.0 GB.*Overhead=1024m"),
        ({"worker_python": (Copies("weights", 0.75, 2 * GB),)},
         r"(?s)memory of an executor is 2.0 GB, but the run takes 1.5 x 2.0 GB.*memoryOverhead=3072m, or "
         r"with fewer --executor-cores.*pyspark.memory of one Python worker is 1.0 GB, but .* = 1.5 GB"),
        ({"largest_result": 3 * GB}, r"result of one task has 3.0 GB.*use more engine.num_workers"),
    ],
    ids=["driver-memory", "executor-memory", "results", "trial", "steps", "heap", "executor", "one array"],
)  # fmt: skip
def test_a_run_that_takes_more_is_refused_with_the_arithmetic_and_the_option(takes, says):
    places = Places(num_workers=4, workers_per_executor=2)
    refuse_too_little(TREE, Takes(**TAKES), Limits(**LIMITS), places)
    with pytest.raises(OutOfMemory, match=says):
        refuse_too_little(ALLREDUCE, Takes(**TAKES | takes), Limits(**LIMITS), places)


def test_where_nothing_bounds_it_nothing_is_refused():
    limits = Limits(**LIMITS | {"executor_heap": None, "executor": None, "worker": None, "results": None})
    large = (Copies("weights", 9, GB),)
    refuse_too_little(
        TREE,
        Takes(**TAKES, executor_heap=large, worker_python=large, results=9 * GB),
        limits,
        Places(num_workers=4, workers_per_executor=2),
    )


def test_in_local_mode_the_machine_holds_the_driver_and_all_workers():
    places = Places(num_workers=3, workers_per_executor=3, in_driver=True)
    spark = (Copies("Spark", 1, GB // 2),)
    workers = {"worker_python": (Copies("weights", 2, GB),), "spark": spark, "driver_heap": spark}
    limits = Limits(**LIMITS | {"executor_heap": None, "executor": None, "worker": None})
    trial = (Copies("weights", 15, GB),)  # over before the workers begin
    refuse_too_little(TREE, Takes(**TAKES | workers | {"trial": trial}), limits, places)
    steps = (Copies("weights", 9.6, GB),)
    says = (
        r"memory at the driver is 16.0 GB, but the run takes 9.6 x 1.0 GB \(weights\) \+ 1 x 500.0 MB "
        r"\(Spark\) \+ 6 x 1.0 GB \(weights\) = 16.1 GB: submit with fewer engine.num_workers"
    )
    with pytest.raises(OutOfMemory, match=says):
        refuse_too_little(TREE, Takes(**TAKES | workers | {"steps": steps}), limits, places)
