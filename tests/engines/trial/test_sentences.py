"""What cannot be trained is refused by a sentence that says what to do, not by a traceback."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from torch import nn

from sparksgd.models.losses import squared_error
from tests.engines.trials import Around, refused, rows, tried


def of_default(dtype: torch.dtype) -> nn.Module:
    torch.set_default_dtype(dtype)
    return Around()


def test_another_default_type() -> None:
    try:
        refused(of_default(torch.float64), "torch's default type is torch.float64", "set_default_dtype")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def complex_one() -> nn.Module:
    module = Around()
    module.w = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    return module


def kept_activation() -> nn.Module:
    module = Around()
    module.last = module.inner(torch.ones(1, 6))
    return module


def locked() -> nn.Module:
    module = Around()
    module.inner.lock = threading.Lock()
    return module


@pytest.mark.parametrize(
    ("make", "phrases"),
    [
        (lambda: nn.Linear(6, 1, device="meta"), ["weight is on meta, so it has no values"]),
        (lambda: Around().double(), ["inner.weight is torch.float64", "module.float()"]),
        (lambda: Around().bfloat16(), ["inner.weight is torch.bfloat16", "torch.autocast"]),
        (complex_one, ["parameter w is torch.complex64", "torch.view_as_complex"]),
        (kept_activation, ["last is, or holds, a tensor that was computed, with its graph", "detach it"]),
        (locked, ["inner.lock is a _thread.lock, which cannot be copied to workers"]),
        (lambda: torch.jit.script(nn.Linear(6, 1)), ["the module is scripted by torch.jit"]),
    ],
)
def test_sentences_instead_of_tracebacks(make: Any, phrases: list[str]) -> None:
    refused(make(), *phrases)


def test_a_hook_for_all_modules_is_refused() -> None:
    hook = nn.modules.module.register_module_forward_hook(lambda module, given, output: None)
    try:
        refused(Around(), "torch has a hook for all modules (forward_hooks)")
    finally:
        hook.remove()


class Two(Around):
    """Takes two columns by name."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.inner(a + b)


class Several(Around):
    """Takes whatever comes, in order."""

    def forward(self, *columns: torch.Tensor) -> torch.Tensor:
        return self.inner(sum(columns))


def test_features_that_forward_does_not_take() -> None:
    tried(Two(), data=rows(names="a b"))
    refused(
        Two(),
        "data.features is 'a', 'bb', but forward of Two takes",
        "argument: 'b'",
        data=rows(names="a bb"),
    )
    refused(Several(), "passed by name (*args takes none of them)", data=rows(names="a b"))
    refused(Two(), "none may be called 'self': rename that column", data=rows(names="a self"))


def test_a_loss_that_cannot_be_copied() -> None:
    loss = functools.partial(_with_lock, threading.Lock())
    refused(nn.Linear(6, 1), "loss.args[0] is a _thread.lock, which cannot be copied to workers", loss=loss)


def _with_lock(lock: Any, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return squared_error(output, label)
