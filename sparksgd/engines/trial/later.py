"""What steps leave in frozen parameters and buffers: those of the trial, and many more where these count.

A buffer that grows by the same in every step is a counter, by which forward may begin to do something
else.  It is set ahead: beyond a warm-up, and to numbers of steps that most periods divide.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from sparksgd.arithmetic.changes import Words, bits
from sparksgd.arithmetic.flat import FlatModule

__all__ = ["STEPS_LATER", "Later"]

STEPS_LATER = (100, 251_999, 252_000)
"""Periods of 1 to 10, 100 and 1,000 end at the last one."""

_MOST = 1024
"""Most elements of a counter."""


class Later:
    """The parameters and constants that steps leave.

    Args:
        flat: makes the steps.
    """

    def __init__(self, flat: FlatModule) -> None:
        self._flat = flat
        self._noted: list[dict[str, torch.Tensor]] = []

    def note(self) -> None:
        """Note what forward has changed, after each step; of what is no counter, the last values alone."""
        changed = self._flat.changed_constants()
        for noted in self._noted[-1:]:
            for name in [name for name, tensor in noted.items() if not _counts(tensor)]:
                del noted[name]
        self._noted.append(
            {name: tensor.detach().clone() for name, tensor in self._flat.constants() if name in changed}
        )

    @property
    def parameters(self) -> torch.Tensor:
        """Return the parameters, float[P]."""
        return self._flat.parameters

    @property
    def has_changes(self) -> bool:
        """Whether forward has changed a constant."""
        return any(self._noted)

    @property
    def counters(self) -> list[str]:
        """Return the names of what grows by the same in all steps."""
        return list(self._growth())

    def constants(self, steps: int | None = None) -> dict[str, Words]:
        """Return what forward has changed, and how many batches each batch-norm has seen.

        Args:
            steps: after how many the counters shall be; None: as they are.
        """
        found = dict(self._noted[-1]) if self._noted else {}
        more = 0 if steps is None else steps - len(self._noted)
        for name, growth in self._growth().items() if more else ():
            found[name] = _within(found[name].double() + growth * more, found[name].dtype)
        for name, buffer in self._flat.module.named_buffers():
            if name.rpartition(".")[2] == "num_batches_tracked":
                found[name] = buffer
        return {name: bits(tensor.contiguous()).copy() for name, tensor in found.items()}

    def _growth(self) -> dict[str, torch.Tensor]:
        found = {}
        for name, last in self._noted[-1].items() if self._noted else ():
            if not _counts(last):
                continue
            values = [noted[name].double() for noted in self._noted if name in noted]
            steps = [later - earlier for earlier, later in pairwise(values)]
            if len(steps) > 1 and steps[0].any() and all(torch.allclose(steps[0], step) for step in steps):
                found[name] = steps[0]
        return found


def _counts(tensor: torch.Tensor) -> bool:
    has_few_values = (
        tensor.is_floating_point() and tensor.dtype.itemsize == 1
    )  # float8, float4: no arithmetic
    is_number = tensor.dtype is not torch.bool and not tensor.is_complex() and not has_few_values
    return tensor.numel() <= _MOST and is_number


def _within(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return values in a type, at its bounds where they are beyond these."""
    if dtype.is_floating_point:
        return values.to(dtype)
    bounds = torch.iinfo(dtype)
    return values.clamp(bounds.min, bounds.max).to(dtype)
