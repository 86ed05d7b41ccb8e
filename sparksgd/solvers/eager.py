"""Optimisers that do not import torch's compiler only to tell it to stay out of the way.

Each method of a torch optimiser is wrapped so: at its first call it imports torch._dynamo, which takes a
second and 75 MB of every process, then asks it not to look.  Here the wrapped method is called by itself, for
as long as nobody else in the process has imported the compiler.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["keep_eager"]

_COMPILER = "torch._dynamo"
_DISABLED = "__dynamo_disable"  # where torch._disable_dynamo keeps what it calls


def keep_eager(kind: type[Optimizer]) -> None:
    """Let optimisers of a class work without torch's compiler, as long as the process has not loaded it.

    Where torch wraps its methods in another way, nothing changes but the time that they take.

    Args:
        kind: the class, before the first of its kind is made.
    """
    if _COMPILER in sys.modules:
        return
    for method in vars(Optimizer).values():
        if _wrapper_of(method) == "inner":  # of torch._disable_dynamo
            _put_off(method)
    for base in kind.__mro__:
        step: Any = vars(base).get("step")
        if _wrapper_of(step) == "_use_grad":  # of torch.optim.optimizer._use_grad_for_differentiable
            base.step = _put_off_step(step)  # type: ignore[attr-defined]  # as torch does itself, for its hooks


def _wrapper_of(method: Any) -> str | None:
    """Return the name of the function that wraps a method."""
    return method.__code__.co_name if hasattr(method, "__wrapped__") and hasattr(method, "__code__") else None


def _put_off(method: Any) -> None:
    """Make a wrapper call what it wraps, until somebody has loaded the compiler."""
    wrapped = method.__wrapped__
    if hasattr(wrapped, _DISABLED):
        return

    def by_itself(*args: Any, **kwargs: Any) -> Any:
        if _COMPILER not in sys.modules:
            return wrapped(*args, **kwargs)
        vars(wrapped).pop(_DISABLED, None)
        return method(*args, **kwargs)

    setattr(wrapped, _DISABLED, by_itself)


def _put_off_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step that does what the wrapper does, less the compiler."""
    inner = step.__wrapped__  # type: ignore[attr-defined]  # as functools.wraps leaves it

    @functools.wraps(step)
    def by_itself(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if _COMPILER in sys.modules:
            return step(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return inner(self, *args, **kwargs)

    return by_itself
