"""A step of an optimiser of torch, without the label that torch gives it for its profiler.

torch wraps `step` when an optimiser is made: the wrapper opens and closes a label, and calls hooks.  On a
worker whose caches are full of a gradient, the label takes 0.1 ms of a step of 0.5 ms.  Where no profiler
runs and there is no hook, the wrapped function does the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_hooks

__all__ = ["make_step"]


def _nothing(self: Optimizer) -> None:
    """Do nothing."""


_Wrapper: Any = Optimizer.profile_hook_step(_nothing)
_LABELS = _Wrapper.__code__  # all that it returns have the same code


def make_step(optimizer: Optimizer) -> None:
    """Call `optimizer.step()`, or what it wraps if its wrapper would do no more."""
    step: Any = type(optimizer).step
    if (
        getattr(step, "__code__", None) is not _LABELS
        or "step" in vars(optimizer)  # as a schedule of torch sets it
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or optimizer_hooks._global_optimizer_pre_hooks
        or optimizer_hooks._global_optimizer_post_hooks
        or torch._C._autograd._profiler_enabled()
    ):
        optimizer.step()
    else:
        step.__wrapped__(optimizer)
