"""What a run takes, from its sizes alone; and an error for want of memory is told as ours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparksgd.config import Config
from sparksgd.engines import memory
from sparksgd.engines.inline import InlineEngine
from sparksgd.engines.kinds import ALLREDUCE, INLINE, KINDS, STAGES, TREE
from sparksgd.engines.memory import Places, RunSizes, takes, total
from sparksgd.errors import OutOfMemory, UserCodeError
from sparksgd.imports import out_of_memory_told, users_code

MB = 10**6
MIB = 1 << 20


def test_the_driver_of_a_tree_holds_what_arrives_and_what_it_sends() -> None:
    found = takes(TREE, RunSizes(weights=40 * MB), Places(num_workers=2, sums=2))
    assert total(found.driver_heap) == 110 * MIB + 1.4 * (2 * 40 * MB + 3 * 80 * MB)
    assert total(found.executor_heap) == 110 * MIB + 1.4 * (2 * 40 * MB + 6 * 40 * MB)
    assert (found.results, found.largest_result) == (80 * MB, 40 * MB)


def test_in_local_mode_one_heap_holds_what_all_tasks_return() -> None:
    found = takes(
        TREE, RunSizes(weights=40 * MB), Places(num_workers=2, workers_per_executor=2, in_driver=True, sums=2)
    )
    assert total(found.driver_heap) == 110 * MIB + 1.4 * (2 * 40 * MB + (2 * 4 + 2) * 40 * MB)
    assert found.executor_heap == ()


def test_allreduce_returns_parameters_and_optimiser_by_strips_or_from_one_worker() -> None:
    places = Places(num_workers=4)
    strips = takes(ALLREDUCE, RunSizes(weights=40 * MB, optimiser=80 * MB), places)
    whole = takes(ALLREDUCE, RunSizes(weights=40 * MB, optimiser=80 * MB, by_strips=False), places)
    assert (strips.results, strips.largest_result) == (120 * MB, 30 * MB)
    assert (whole.results, whole.largest_result) == (120 * MB, 120 * MB)
    assert total(whole.worker_python) > total(strips.worker_python)
    assert total(whole.executor_heap) > total(strips.executor_heap)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nothing_takes_less_if_something_is_larger(kind) -> None:
    small = {"weights": 4 * MB, "optimiser": 4 * MB, "constants": MB, "record": 100, "piece_rows": 10}
    places = {"num_workers": 2, "sums": 2, "shards_of_worker": 1}
    before = takes(kind, RunSizes(**small), Places(**places))
    for name in small:
        after = takes(kind, RunSizes(**small | {name: 100 * small[name]}), Places(**places))
        assert total(after.driver_python) >= total(before.driver_python)
        assert total(after.worker_python) >= total(before.worker_python)
        assert total(after.driver_python) + total(after.worker_python) > total(before.driver_python) + total(
            before.worker_python
        )
    more = takes(kind, RunSizes(**small, has_local_models=True), Places(**places))
    assert kind is INLINE or total(more.worker_python) > total(before.worker_python)


DRIVER, TWO, ONE = Places(), Places(num_workers=2, shards_of_worker=2, sums=2), Places(num_workers=2, sums=2)
APART = Places(num_workers=2, shards_of_worker=2, sums_of_worker=2, sums=3)


@pytest.mark.parametrize(
    ("measured_mib", "kind", "parameters", "states", "places", "more"),
    [
        (412, INLINE, 437_000, 1, DRIVER, {}),
        (576, INLINE, 1_600_000, 1, DRIVER, {}),
        (1561, INLINE, 9_500_000, 1, DRIVER, {}),
        (1238, INLINE, 10_060_000, 1, DRIVER, {}),
        (1277, INLINE, 10_060_000, 2, DRIVER, {}),
        (2563, INLINE, 25_100_000, 1, DRIVER, {}),
        (3886, INLINE, 40_000_000, 1, DRIVER, {}),
        (337, TREE, 437_000, 1, TWO, {}),
        (743, TREE, 10_060_000, 1, TWO, {}),
        (743, TREE, 10_060_000, 1, ONE, {}),
        (782, TREE, 10_060_000, 1, APART, {}),
        (1374, TREE, 25_100_000, 1, TWO, {}),
        (898, TREE, 10_060_000, 1, TWO, {"has_local_models": True}),
        (1013, TREE, 10_060_000, 1, TWO, {"has_local_models": True, "message_vectors": 2}),
        (344, ALLREDUCE, 437_000, 1, TWO, {}),
        (914, ALLREDUCE, 10_060_000, 1, TWO, {}),
        (917, ALLREDUCE, 10_060_000, 2, ONE, {}),
        (1710, ALLREDUCE, 25_100_000, 1, TWO, {}),
    ],
)
def test_a_python_process_was_measured_to_take_what_is_said_or_up_to_a_fifth_less(
    measured_mib, kind, parameters, states, places, more
) -> None:
    sizes = RunSizes(weights=4 * parameters, optimiser=4 * states * parameters, **more)
    found = takes(kind, sizes, places)
    said_mib = total(found.driver_python if kind is INLINE else found.worker_python) / MIB
    assert measured_mib <= said_mib <= 1.2 * measured_mib


def test_stages_return_the_sums_of_every_worker() -> None:
    places = Places(num_workers=3, sums_of_worker=2, sums_of_task=2, sums=5)
    assert takes(STAGES, RunSizes(weights=MB, message_vectors=2), places).results == 10 * MB


def test_an_evaluation_reads_512_rows_at_once() -> None:
    sizes = RunSizes(weights=MB, record=1000, piece_rows=10)
    assert sizes.rows == 10_000
    assert RunSizes(weights=MB, record=1000, piece_rows=10, evaluates=True).rows == 512_000


def test_a_run_in_this_process_is_refused_with_the_arithmetic(monkeypatch) -> None:
    InlineEngine.check_memory(RunSizes(weights=MB), 4)
    monkeypatch.setattr(memory, "machine_bytes", lambda: 10**9)
    with pytest.raises(
        OutOfMemory, match=r"has 1.0 GB of memory, but the run takes .*24 x 100.0 MB \(weights\)"
    ):
        InlineEngine.check_memory(RunSizes(weights=100 * MB), 4)


def test_a_module_whose_trial_has_no_room_is_refused_before_it(monkeypatch, tmp_path) -> None:
    from spark_helpers import write_rows

    from sparksgd.training.in_process import train_in_process

    rows = write_rows(tmp_path / "rows", 40)
    monkeypatch.setattr(memory, "machine_bytes", lambda: 10**9)
    module = nn.Linear(16, 4_000_000)
    with pytest.raises(OutOfMemory, match=r"the trial before the training takes .*24 x 272.0 MB \(weights\)"):
        train_in_process(Config.from_dict({"engine": {"name": "inline"}}), rows, module=module)


def test_what_shards_keep_counts_once_where_they_live_and_more_often_with_checkpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = RunSizes(weights=MB, has_local_models=True, keeps_shards=True)
    monkeypatch.setattr(memory, "machine_bytes", lambda: 10**9)
    memory.require_here(sizes, 8)
    with pytest.raises(OutOfMemory, match=r"24.8 x 30\.0 MB \(what each shard keeps, in checkpoints\)"):
        memory.require_here(replace(sizes, shard_state=30 * MB), 8)


def test_the_machine_has_memory_of_its_own() -> None:
    assert memory.machine_bytes() > 10**8


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 1.49 GiB for an array"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_want_of_memory_in_a_users_module_is_told_with_the_settings(error) -> None:
    says = r"the module found no memory: .*spark.executor.memoryOverhead"
    with pytest.raises(OutOfMemory, match=says), users_code("the module"):
        raise error
    says = "the driver's Python found no memory"
    with pytest.raises(OutOfMemory, match=says), out_of_memory_told("the driver's Python"):
        raise error


def test_other_errors_are_told_as_before() -> None:
    with pytest.raises(UserCodeError), users_code("the module"):
        raise RuntimeError("shapes do not match")
    with pytest.raises(KeyError), out_of_memory_told("the driver's Python"):
        raise KeyError("other")


def test_torchs_own_words_are_known() -> None:
    with pytest.raises(OutOfMemory, match="the module found no memory"), users_code("the module"):
        torch.empty(1 << 55)


def test_on_spark_the_driver_reads_no_more_rows_than_the_trial() -> None:
    sizes = RunSizes(weights=100 * MB, record=600_000, piece_rows=8192)
    driver = total(takes(TREE, sizes, Places(num_workers=2)).driver_python)
    assert driver < 375 * MIB + 25 * 100 * MB + 3 * 600_000 * 1024 + 100 * MB
    assert total(takes(TREE, sizes, Places(num_workers=2)).worker_python) > 3 * 600_000 * 8192
