"""What torch's optimiser made of functions is found and forgotten, beside threads that make objects."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from sparksgd.arithmetic import scripted


class Scripted(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 + 1


def test_every_function_of_the_process_is_found_whoever_names_it(monkeypatch: Any) -> None:
    module = torch.jit.script(Scripted())  # made here: tests freeze what was there before
    method = module.forward
    held = torch.jit.CompilationUnit("def own(x):\n    return x + 1\n").own
    found: list[Any] = []
    monkeypatch.setattr(scripted, "forget_optimised", lambda others: found.extend(others))
    scripted.forget_all_optimised()
    assert {id(module), id(method), id(held)} <= {id(one) for one in found}


def test_a_tuple_that_another_thread_is_making_stays_its_own(monkeypatch: Any) -> None:
    begun, looked_for = threading.Event(), threading.Event()
    made: list[tuple[int, ...]] = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            if number == 3:
                begun.set()
                assert looked_for.wait(60)
            yield number

    thread = threading.Thread(target=lambda: made.append(tuple(numbers())))

    def forget(others: Iterable[Any]) -> None:
        iterator = iter(others)  # what was found is held until the end
        looked_for.set()
        thread.join(60)
        list(iterator)

    monkeypatch.setattr(scripted, "forget_optimised", forget)
    thread.start()
    assert begun.wait(60)
    scripted.forget_all_optimised()
    assert made == [tuple(range(100))]
