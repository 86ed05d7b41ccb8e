"""Optimisers of torch without its compiler.

torch wraps the methods of its optimisers.  The wrapper imports torch._dynamo, the compiler, only to switch it
off, which costs a second and 75 MB in every process.  After `without_compiler()` the method is called without
the wrapper, as long as nothing else in the process has imported the compiler.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["without_compiler"]

_COMPILER = "torch._dynamo"
_DISABLED = "__dynamo_disable"  # where torch._disable_dynamo keeps the wrapped function


def without_compiler() -> None:
    """Let the optimisers of this process work without torch's compiler, as long as it is not loaded.

    This changes classes of torch for the whole process.  So only the start of a process calls it.  If a torch
    version wraps its methods in another way, nothing changes, except that methods take longer.
    """
    if _COMPILER in sys.modules:
        return
    for method in vars(Optimizer).values():
        if _wrapper_of(method) == "inner":  # of torch._disable_dynamo
            _put_off(method)
    for base in vars(torch.optim).values():
        step: Any = vars(base).get("step") if inspect.isclass(base) else None
        if _wrapper_of(step) == "_use_grad":  # of torch.optim.optimizer._use_grad_for_differentiable
            base.step = _put_off_step(step)  # as torch does itself, for its hooks


def _wrapper_of(method: Any) -> str | None:
    """Return the name of the function that wraps a method."""
    return method.__code__.co_name if hasattr(method, "__wrapped__") and hasattr(method, "__code__") else None


def _put_off(method: Any) -> None:
    """Make a wrapper call its function directly, until the compiler is loaded."""
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
    """Return a step that does what the wrapper does, without the compiler."""
    inner = step.__wrapped__  # type: ignore[attr-defined]  # as functools.wraps leaves it

    @functools.wraps(step)
    def by_itself(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if _COMPILER in sys.modules:
            return step(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return inner(self, *args, **kwargs)

    return by_itself
