"""Arrays and bytes as what `torch.load(weights_only=True)` reads: tensors, numbers, texts, and containers.

an array    {"numpy": its dtype, "shape": [...], "bytes": uint8[n]}
bytes       {"raw": uint8[n]}
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["array_as_plain", "array_of", "as_plain", "bytes_in", "of_plain", "stranger_in"]

_PLAIN = (bool, int, float, str, bytes, np.ndarray, np.generic, torch.Tensor)
_ARRAY, _RAW = {"numpy", "shape", "bytes"}, {"raw"}


def array_as_plain(array: npt.NDArray[Any]) -> dict[str, Any]:
    """Return a copy of an array as plain values and a tensor."""
    values = (
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy() if array.size else np.empty(0, "u1")
    )
    return {
        "numpy": np.lib.format.dtype_to_descr(array.dtype),
        "shape": list(array.shape),
        "bytes": torch.from_numpy(values),
    }


def array_of(saved: Mapping[str, Any]) -> npt.NDArray[Any]:
    """Return the array that `array_as_plain` was given."""
    values = saved["bytes"].numpy().tobytes() if saved["bytes"].numel() else b""
    return np.frombuffer(values, np.lib.format.descr_to_dtype(saved["numpy"])).reshape(saved["shape"]).copy()


def as_plain(value: Any) -> Any:
    """Return a copy of nested values in which every array, numpy number and text of bytes is encoded."""
    if isinstance(value, np.ndarray | np.generic):
        return array_as_plain(np.asarray(value)) | ({} if isinstance(value, np.ndarray) else {"scalar": True})
    if isinstance(value, bytes):
        return {"raw": torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0)}
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, str):
        return str(value)  # torch's version is of a class of its own
    if type(value) is dict or (isinstance(value, Mapping) and not isinstance(value, dict)):
        return {key: as_plain(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(as_plain(inner) for inner in value)
    return copy.deepcopy(value)


def stranger_in(value: Any, path: str) -> str | None:
    """Return the path of a value that `as_plain` cannot encode, and its type; None: there is none."""
    if isinstance(value, Mapping):
        inner = [(one, f"{path}.{key}") for key, one in value.items()]
    elif isinstance(value, list | tuple):
        inner = [(one, f"{path}[{number}]") for number, one in enumerate(value)]
    elif value is None or isinstance(value, _PLAIN):
        return None
    else:
        return f"{path} is a {type(value).__name__}"
    return next((found for one, where in inner if (found := stranger_in(one, where)) is not None), None)


def bytes_in(saved: Any) -> Iterator[bytes]:
    """Yield what was bytes among the values in tables that `as_plain` was given; nothing else is copied."""
    if isinstance(saved, dict):
        if saved.keys() == _RAW:
            yield of_plain(saved)
        elif not saved.keys() >= _ARRAY:
            for inner in saved.values():
                yield from bytes_in(inner)


def of_plain(saved: Any) -> Any:
    """Return the values that `as_plain` was given."""
    if isinstance(saved, dict):
        if _ARRAY <= saved.keys() <= _ARRAY | {"scalar"}:
            return array_of(saved)[()] if "scalar" in saved else array_of(saved)
        if saved.keys() == _RAW and isinstance(saved["raw"], torch.Tensor):
            return saved["raw"].numpy().tobytes()
        if type(saved) is dict:
            return {key: of_plain(inner) for key, inner in saved.items()}
        return saved
    if type(saved) in (list, tuple):
        return type(saved)(of_plain(inner) for inner in saved)
    return saved
