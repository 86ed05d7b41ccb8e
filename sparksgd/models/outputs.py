"""What a module gives for some rows: one tensor, several in a tuple, or several by name in a dictionary.

Legend: B rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparksgd.errors import ModelError
from sparksgd.imports import shown

__all__ = ["OUTPUT_DTYPES", "Output", "arrays_of", "outputs_of", "shapes_of", "tensors_of"]

OUTPUT_DTYPES = ("float32", "float64")

_MAY_BE = "a tensor, a tuple of tensors, or a dictionary of tensors by their names"
_SINGLES = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)


@dataclass(frozen=True, kw_only=True)
class Output:
    """A tensor that a module gives: some numbers of each row."""

    name: str
    """In a dictionary or a named tuple; output_0, output_1, ... in a tuple; "" of a tensor by itself."""

    length: int | None
    """How many numbers a row has; None: one, [B] or [B, 1]."""

    dtype: str
    """float32, or float64 where that does not hold the numbers; one of OUTPUT_DTYPES."""


def tensors_of(output: object) -> dict[str, torch.Tensor]:
    """Return the tensors of a module's output by their names, see `Output.name`.

    Raises:
        ModelError: it is something else, or holds something else.
    """
    if isinstance(output, torch.Tensor):
        return {"": output}
    found: dict[Any, Any]
    if isinstance(output, Mapping):
        found = dict(output)
    elif isinstance(output, tuple | list):
        names = getattr(output, "_fields", None) or [f"output_{number}" for number in range(len(output))]
        found = dict(zip(names, output, strict=True))
    else:
        raise ModelError(f"the module gives a {type(output).__name__}, but must give {_MAY_BE}")
    if not found:
        raise ModelError(f"the module gives an empty {type(output).__name__}, but must give {_MAY_BE}")
    for name, value in found.items():
        if not isinstance(name, str) or not name:
            raise ModelError(f"the module gives a dictionary with the key {shown(name)}, but must give texts")
        if not isinstance(value, torch.Tensor):
            raise ModelError(
                f"the module gives a {type(output).__name__} with a {type(value).__name__} as {name}, but "
                f"must give {_MAY_BE}: leave {name} out"
            )
    return found


def shapes_of(output: object) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's tensors by their names."""
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(output).items()}


def outputs_of(output: object) -> tuple[Output, ...]:
    """Return what a module gives for each row; the tensors are [B, ...]."""
    return tuple(
        Output(
            name=name,
            length=_length(tensor.shape[1:]) if not tensor.is_complex() else 2 * math.prod(tensor.shape[1:]),
            dtype="float32" if tensor.dtype in _SINGLES else "float64",
        )
        for name, tensor in tensors_of(output).items()
    )


def _length(shape: Sequence[int]) -> int | None:
    length = math.prod(shape)
    return None if length == 1 and len(shape) < 2 else length


def arrays_of(outputs: Sequence[Output], output: object, rows: int) -> list[npt.NDArray[np.floating]]:
    """Return the numbers of a module's outputs: [B] where a row has one, else [B, N], row by row.

    Complex numbers are two: their real and their imaginary part.

    Args:
        outputs: what the module gave in the training.
        output: what it gives now.
        rows: B.

    Raises:
        ModelError: it gives something else.
    """
    tensors = tensors_of(output)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = {each.name for each in outputs}
    if tensors.keys() != wanted:
        raise ModelError(
            f"the module gives {_named(tensors)} for {rows} rows, but gave {_named(wanted)} in the training: "
            f"let it give the same for any rows"
        )
    found = []
    for each in outputs:
        tensor = tensors[each.name].detach().to_dense()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        size = 1 if each.length is None else each.length
        if tensor.shape[:1] != (rows,) or tensor.numel() != rows * size:
            raise ModelError(
                f"the module gives {shapes[each.name]}{each.name and ' as '}{each.name} for {rows} rows, but "
                f"must give {size} numbers for each row, as in the training"
            )
        numbers = tensor.to(getattr(torch, each.dtype), copy=True)  # it may be the module's own memory
        found.append(numbers.reshape((rows,) if each.length is None else (rows, size)).numpy())
    return found


def _named(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "one tensor"
