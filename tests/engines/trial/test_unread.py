"""A counter that nothing reads is no state; one that something reads, now or later, is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparksgd.engines.trial.unread import is_only_counted
from tests.engines.trials import Around, refused, tried


class Counts(Around):
    """Counts what a function says.

    Args:
        count: called with the module and its input.
    """

    def __init__(self, count: Callable[[Any, torch.Tensor], object]) -> None:
        super().__init__()
        self.calls, self.rows, self.part, self.count = 0, 0.0, Around(), count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count(self, x)
        return super().forward(x) + self.part(x)


def once(module: Any, x: torch.Tensor) -> None:
    module.calls += 1


def rows_of_it(module: Any, x: torch.Tensor) -> None:
    module.rows += float(len(x) * max(1, x.shape[1] // 2))


def plainly(module: Any, x: torch.Tensor) -> None:
    module.calls = module.calls + 1


def both(module: Any, x: torch.Tensor) -> None:
    once(module, x)
    module.calls -= 2
    module.rows += 1


ONLY_COUNTED = {"once": once, "rows": rows_of_it, "plainly": plainly, "both": both}


@pytest.mark.parametrize("how", ONLY_COUNTED)
def test_what_is_only_counted_is_fine(how: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sparksgd")
    module = Counts(ONLY_COUNTED[how])
    assert tried(module).shapes[""] == (4, 1)
    assert (module.calls, module.rows) == (0, 0.0)
    assert (
        f"nothing reads {'rows' if how == 'rows' else 'calls'}, which counts: it stays as it was"
        in caplog.text
    )


def compares(module: Any, x: torch.Tensor) -> None:
    module.calls += 1
    if module.calls > 100_000_000:
        module.part = None


def hands_on(module: Any, x: torch.Tensor) -> None:
    module.calls += 1
    module.rows = module.calls


def by_name(module: Any, x: torch.Tensor) -> None:
    module.calls += 1
    if getattr(module, "ca" + "lls") > 100_000_000:
        module.part = None


def by_dictionary(module: Any, x: torch.Tensor) -> None:
    module.calls += 1
    if dict(module.__dict__)["call" + "s"] > 100_000_000:
        module.part = None


def doubles(module: Any, x: torch.Tensor) -> None:
    module.calls += module.calls + 1


def as_it_adds(module: Any, x: torch.Tensor) -> None:
    module.calls += (step := 1)
    module.rows += step + (module.calls > 3)


def by_a_lambda(module: Any, x: torch.Tensor) -> None:
    module.calls += 1
    read = lambda: module.calls  # noqa: E731  # a function in a function
    if read() > 100_000_000:
        module.part = None


READ = [compares, hands_on, by_name, by_dictionary, doubles, as_it_adds, by_a_lambda]


@pytest.mark.parametrize("count", READ)
def test_what_is_read_anywhere_is_refused(count: Any) -> None:
    refused(Counts(count), "calls", "changes as the module trains")
    assert not is_only_counted("calls", [count])


class Tells(Counts):
    """Another method reads it."""

    def scale(self) -> float:
        return self.calls / 2


class TellsByProperty(Counts):
    """A property does."""

    @property
    def seen(self) -> int:
        return self.calls


@pytest.mark.parametrize("kind", [Tells, TellsByProperty])
def test_whoever_reads_it(kind: type[Counts]) -> None:
    refused(kind(once), "calls changes as the module trains")
