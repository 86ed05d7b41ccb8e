"""A vector that is mapped twice is as one of which a copy is kept: the same is found, the same stands."""

from __future__ import annotations

import copy
import ctypes
import gc
import mmap
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparksgd.arithmetic import mapped_twice as module_here
from sparksgd.arithmetic.changes import ChangedElements
from sparksgd.arithmetic.flat import FlatModule
from sparksgd.arithmetic.mapped_twice import MappedTwice, mapped_twice
from sparksgd.errors import ModelError

PAGE = mmap.PAGESIZE // 4  # elements
PAGES = 40
SIZE = PAGES * PAGE - 100


def mapped(values: torch.Tensor | None = None) -> MappedTwice:
    found = mapped_twice(torch.zeros(SIZE) if values is None else values)
    assert found is not None, "the tests need Linux with /proc"
    return found


def written(one: MappedTwice) -> list[int]:
    found = one.written()
    assert found is not None
    return found.tolist()


def own_maps() -> int:
    return Path("/proc/self/maps").read_text().count("sparksgd-parameters")


def own_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# Numbers as bytes: zeros of both signs, ones, and two NaN of other payloads
WORDS = st.sampled_from([0, -(2**31), 0x3F800000, 0x7FC00000, 0x7FC00001])
PLACES = st.sampled_from([0, 1, PAGE - 101])
WRITES = st.lists(st.tuples(st.integers(0, PAGES - 1), PLACES, WORDS), max_size=9)
STEPS = st.lists(st.tuples(WRITES, st.lists(WRITES, min_size=1, max_size=3)), max_size=5)


@settings(deadline=None, max_examples=150)
@given(STEPS)
def test_it_finds_what_a_copy_and_a_comparison_find(steps: list[tuple[list[Any], list[list[Any]]]]) -> None:
    one = mapped()
    stands = np.zeros(SIZE, np.int32)
    for of_solver, pieces in steps:
        for page, place, word in of_solver:
            one.stands[page * PAGE + place] = stands[page * PAGE + place] = word
        one.stand_at(one.vector)
        assert one.words.tobytes() == stands.tobytes()
        for of_module in pieces:
            expected = stands.copy()
            for page, place, word in of_module:
                one.words[page * PAGE + place] = expected[page * PAGE + place] = word
            if not one.is_copied:
                assert written(one) == sorted({page for page, _, _ in of_module})
            part = ChangedElements.between(stands, expected)
            assert one.is_changed() == (part is not None)
            assert one.words.tobytes() == expected.tobytes()
            assert one.stands.tobytes() == stands.tobytes()
            one.restore()
            assert one.words.tobytes() == one.stands.tobytes() == stands.tobytes()


PRESENT, SWAPPED, OF_FILE, SOFT_DIRTY, EXCLUSIVE = (1 << bit for bit in (63, 62, 61, 55, 56))


@pytest.mark.parametrize(
    ("entry", "is_written"),
    [
        (0, False),  # not read yet
        (PRESENT | EXCLUSIVE | SOFT_DIRTY | 12345, True),
        (PRESENT | 12345, True),  # shared with a forked process
        (SWAPPED | 99, True),  # a page of the module's own, on disk
        (PRESENT | OF_FILE | SOFT_DIRTY | 12345, False),
        (SWAPPED | OF_FILE | 99, False),  # one of the file's that moves
    ],
)
def test_a_page_is_written_where_it_is_there_and_not_the_files(
    monkeypatch: pytest.MonkeyPatch, entry: int, is_written: bool
) -> None:
    one = mapped()
    entries = np.zeros(PAGES, np.uint64)
    entries[7] = entry
    monkeypatch.setattr(module_here.os, "pread", lambda *_: entries.tobytes())
    assert written(one) == ([7] if is_written else [])


def test_the_module_sees_what_the_solver_writes_at_once_where_it_wrote_nothing() -> None:
    one = mapped(torch.arange(float(SIZE)))
    assert one.seen.equal(torch.arange(float(SIZE)))
    one.vector.mul_(2)
    assert one.seen.equal(2 * torch.arange(float(SIZE)))
    assert written(one) == []
    assert not one.is_changed()


def test_a_page_of_the_modules_own_shows_the_next_point() -> None:
    one = mapped()
    one.stand_at(one.vector)
    one.seen[3] = 1
    one.vector.fill_(2)
    assert (one.seen[3], one.seen[PAGE]) == (1, 2)
    one.stand_at(one.vector)
    assert one.seen.equal(torch.full([SIZE], 2.0))


def test_another_point_is_written_where_the_solver_writes() -> None:
    one = mapped()
    one.seen[3] = 1
    one.stand_at(torch.full([SIZE], 7.0))
    assert one.seen.equal(torch.full([SIZE], 7.0))
    assert one.vector.equal(torch.full([SIZE], 7.0))
    assert not one.is_changed()


def test_a_module_that_writes_many_pages_gets_copies_from_then_on() -> None:
    one = mapped()
    one.seen[: 5 * PAGE] += 0  # the same values: an eighth of the pages
    assert not one.is_changed()
    assert not one.is_copied
    assert written(one) == []
    one.seen[: 6 * PAGE] += 0
    assert not one.is_changed()
    assert one.is_copied
    one.vector.fill_(4)
    one.stand_at(one.vector)
    assert one.seen.equal(torch.full([SIZE], 4.0))
    one.seen[-1] = 5
    assert one.is_changed()
    one.restore()
    assert one.seen.equal(torch.full([SIZE], 4.0))
    assert not one.is_changed()


# Where the system cannot do it


class Deaf(mmap.mmap):
    """Gives no page back."""

    def madvise(self, *_: Any) -> None:
        pass


class Shared(mmap.mmap):
    """Is never private."""

    def __new__(cls, file: int, size: int, *_: Any) -> Shared:
        return super().__new__(cls, file, size)


class Apart(mmap.mmap):
    """Is never the file's."""

    def __new__(cls, file: int, size: int, *_: Any) -> Apart:
        return super().__new__(cls, -1, size)


def refusing(name: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> None:
        raise PermissionError(name)

    return refuse


def no_pagemap(path: Any, *rest: Any) -> int:
    if path == "/proc/self/pagemap":
        raise PermissionError(path)
    return os_open(path, *rest)


os_open = os.open

BROKEN: dict[str, tuple[object, str, object]] = {
    "another system": (module_here.sys, "platform", "darwin"),
    "no files in memory": (module_here.os, "memfd_create", refusing("memfd_create")),
    "no room": (module_here.os, "posix_fallocate", refusing("posix_fallocate")),
    "no mapping": (module_here.mmap, "mmap", refusing("mmap")),
    "no pagemap": (module_here.os, "open", no_pagemap),
    "a pagemap without entries": (module_here.os, "pread", lambda *_: b""),
    "a pagemap of zeros": (module_here.os, "pread", lambda _, size, __: bytes(size)),
    "a pagemap of ones": (module_here.os, "pread", lambda _, size, __: b"\xff" * size),
    "a pagemap where all is written": (module_here.os, "pread", lambda _, size, __: b"\x80" * size),
    "pages that stay": (module_here.mmap, "mmap", Deaf),
    "a private mapping that is shared": (module_here.mmap, "mmap", Shared),
    "mappings of other pages": (module_here.mmap, "mmap", Apart),
}


@pytest.mark.parametrize(("where", "name", "value"), BROKEN.values(), ids=BROKEN)
def test_where_the_system_does_not_do_it_there_is_none(
    monkeypatch: pytest.MonkeyPatch, where: object, name: str, value: object
) -> None:
    gc.collect()
    before = own_maps()
    with monkeypatch.context() as patched:
        patched.setattr(where, name, value)
        assert mapped_twice(torch.zeros(SIZE)) is None
        flat = FlatModule(nn.Linear(700, 700))
        flat.map_twice()
    assert not flat.is_mapped
    flat.standing.at(flat.parameters.numpy())
    with flat.standing.piece() as made:
        flat.module.bias.data[0] += 1
    assert made.changes is not None
    assert flat.module.weight.data_ptr() == flat.parameters.data_ptr()
    gc.collect()
    assert own_maps() == before


@pytest.mark.parametrize("read", [refusing("pread"), lambda *_: b""], ids=["no pagemap", "a short one"])
def test_if_the_system_stops_telling_all_bytes_are_compared(
    monkeypatch: pytest.MonkeyPatch, read: Callable[..., bytes]
) -> None:
    one = mapped()
    one.seen[0] = 1
    monkeypatch.setattr(module_here.os, "pread", read)
    assert one.written() is None
    one.seen[2 * PAGE] = 3
    assert one.is_changed()
    one.restore()
    assert not one.seen.any()
    one.seen[7] = 0
    assert not one.is_changed()
    one.vector.fill_(2)
    one.stand_at(one.vector)
    assert one.seen.equal(torch.full([SIZE], 2.0))


def test_memory_that_the_module_has_locked_is_copied_to() -> None:
    one = mapped()
    if ctypes.CDLL(None).mlock(ctypes.c_void_p(one.seen.data_ptr()), ctypes.c_size_t(mmap.PAGESIZE)):
        pytest.skip("no memory may be locked here")
    one.seen[0], one.seen[2 * PAGE] = 1, 3
    assert one.is_changed()
    one.restore()
    assert one.is_copied
    assert not one.seen.any()
    one.vector.fill_(2)
    one.stand_at(one.vector)
    assert one.seen.equal(torch.full([SIZE], 2.0))
    one.seen[0] = 3
    assert one.is_changed()


# Forks


def in_child(work: Callable[[], object], meanwhile: Callable[[], object]) -> Any:
    """Fork; let this process do something, then the child something else; return what the child returns."""
    go, went = os.pipe()
    said, say = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)  # torch's threads are not in the child, which would wait for them
        try:
            os.read(go, 1)
            os.write(say, pickle.dumps(work()))
        finally:
            os._exit(0)
    os.close(say)
    try:
        meanwhile()
    finally:
        os.write(went, b".")
        found = os.read(said, 65536)
        os.waitpid(child, 0)
        for end in (go, went, said):
            os.close(end)
    return pickle.loads(found)


@pytest.mark.parametrize("advice", [module_here._POPULATE_WRITE, 9999], ids=["Linux", "Linux before 5.14"])
def test_a_forked_process_keeps_the_parameters_and_writes_its_own(
    monkeypatch: pytest.MonkeyPatch, advice: int
) -> None:
    monkeypatch.setattr(module_here, "_POPULATE_WRITE", advice)
    one = mapped(torch.ones(SIZE))
    one.seen[1] = 5
    values = one.seen.numpy()

    def child() -> tuple[set[float], int]:
        found = set(values.tolist())
        values[:] = 9
        return found, len(written(one))

    def parent() -> None:
        assert one.is_changed()
        one.restore()
        one.vector.fill_(3)
        one.stand_at(one.vector)

    found = in_child(child, parent)
    assert found == ({1.0, 5.0}, PAGES)
    assert one.seen.equal(torch.full([SIZE], 3.0))
    assert one.vector.equal(torch.full([SIZE], 3.0))
    one.seen[1] = 5
    assert one.is_changed()


def test_a_fork_is_no_change() -> None:
    one = mapped()
    in_child(lambda: None, lambda: None)
    assert not one.is_changed()
    one.vector.fill_(3)
    one.stand_at(one.vector)
    assert one.seen.equal(torch.full([SIZE], 3.0))


def test_a_forked_process_tells_of_its_own_pages() -> None:
    one = mapped()

    def child() -> tuple[list[int], int]:
        one.restore()
        files = own_files()
        one.seen.numpy()[3 * PAGE] = 1
        return written(one), own_files() - files

    def parent() -> None:
        one.restore()
        one.seen.numpy()[5 * PAGE] = 1
        assert written(one) == [5]

    assert in_child(child, parent) == ([3], 0)
    assert written(one) == [5]


def test_a_forked_process_that_goes_on_training_is_refused() -> None:
    one, point = mapped(), torch.ones(SIZE)

    def child() -> list[str]:
        said = []
        for attempt in (lambda: one.stand_at(point), one.is_changed):
            try:
                attempt()
            except ModelError as error:
                said.append(str(error))
        return said

    said = in_child(child, lambda: None)
    assert [message[:13] for message in said] == ["forward forks"] * 2
    assert not one.vector.any()


# How long it lives


def test_the_memory_lives_as_long_as_a_tensor_sees_it_and_no_longer() -> None:
    gc.collect()
    before, files = own_maps(), own_files()
    flat = FlatModule(nn.Linear(700, 700))
    flat.map_twice()
    place = flat.parameters.data_ptr()
    flat.map_twice()
    assert (flat.is_mapped, flat.parameters.data_ptr()) == (True, place)
    gc.collect()
    assert own_maps() - before == 2
    row, strip = flat.module.weight.data[0], flat.parameters[:5]
    values = row.tolist()
    del flat
    gc.collect()
    assert own_maps() - before == 2
    assert (row.tolist(), strip.tolist()) == (values, values[:5])
    del row, strip
    gc.collect()
    assert (own_maps(), own_files()) == (before, files)


def test_copies_of_the_module_have_memory_of_their_own() -> None:
    flat = FlatModule(nn.Linear(700, 700))
    flat.map_twice()
    for made in (copy.deepcopy(flat.module), pickle.loads(pickle.dumps(flat.module))):
        assert made.weight.equal(flat.module.weight)
        made.weight.data.fill_(1)
        assert not flat.module.weight.equal(made.weight)
    flat.standing.at(flat.parameters.numpy())
    with flat.standing.piece() as piece:
        pass
    assert piece.changes is None


def test_a_small_module_is_copied_as_before() -> None:
    flat = FlatModule(nn.Linear(300, 300))
    flat.map_twice()
    assert not flat.is_mapped
