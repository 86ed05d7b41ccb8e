"""The settings of torch and numpy that decide bits: a process has one of each, which any code may change.

A module's forward may not: the next piece would be computed by other ones, and the caller's own code, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Self

import numpy as np
import torch

from sparksgd.arithmetic.numerics import thread_count
from sparksgd.errors import ModelError

__all__ = [
    "HeldSettings",
    "Settings",
    "changed_settings",
    "driver_settings",
    "set_by_the_user",
    "settings_now",
    "without_autocast",
]

Settings = tuple[Any, ...]
"""The values, in the order of `_SETTINGS`; it can be pickled."""


def _flushes_denormals() -> bool:
    return sys.float_info.min * _QUARTER == 0.0


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by torch.backends, for one of them
        return _BY_BACKEND


def _set_matmul_precision(value: str) -> None:
    if value != _BY_BACKEND:
        torch.set_float32_matmul_precision(value)


_BY_BACKEND = "by backend"
_QUARTER = float("0.25")  # no constant, which would be computed when this is compiled

# Name, what reads it, what sets it, the value that torch begins with; ...: a run may go on with another.
_SETTINGS: tuple[tuple[str, Callable[[], Any], Callable[[Any], object] | None, Any], ...] = (
    ("torch.set_num_threads", torch.get_num_threads, torch.set_num_threads, ...),  # train.threads says it
    ("torch.set_grad_enabled", torch.is_grad_enabled, torch._C._set_grad_enabled, True),
    ("torch.set_default_dtype", torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    (
        "torch.autocast",
        partial(torch.is_autocast_enabled, "cpu"),
        lambda value: torch.set_autocast_enabled("cpu", value),
        False,
    ),
    (
        "torch.autocast's dtype",
        partial(torch.get_autocast_dtype, "cpu"),
        lambda value: torch.set_autocast_dtype("cpu", value),
        torch.bfloat16,
    ),
    ("torch.autocast's cache", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, True),
    (
        "torch.use_deterministic_algorithms",
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,  # use_deterministic_algorithms imports the compiler
        0,
    ),
    (
        "torch.set_float32_matmul_precision",
        _matmul_precision,
        _set_matmul_precision,
        "highest",
    ),
    ("torch.set_flush_denormal", _flushes_denormals, torch.set_flush_denormal, False),
    ("torch.backends.mkldnn", torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, True),
    ("torch.backends.nnpack", torch._C._get_nnpack_enabled, torch._C._set_nnpack_enabled, True),
    ("sdpa_kernel (flash)", torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash, True),
    ("sdpa_kernel (math)", torch._C._get_math_sdp_enabled, torch._C._set_sdp_use_math, True),
    ("torch.inference_mode", torch.is_inference_mode_enabled, None, False),
    (
        "torch.set_default_device, or a torch function mode,",
        torch._C._len_torch_function_stack,
        lambda modes: None if modes else torch.set_default_device(None),
        0,
    ),
    ("a torch dispatch mode", torch._C._len_torch_dispatch_stack, None, 0),
    ("numpy.seterr", np.geterr, lambda value: np.seterr(**value), ...),  # it warns or raises, and no more
)
_GETTERS = tuple(getter for _, getter, _, _ in _SETTINGS)


def without_autocast() -> AbstractContextManager[object]:
    """Return a block without autocast on the CPU, also where it is on around it."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


def settings_now() -> Settings:
    """Return this process's settings, of this thread where a thread has its own."""
    return tuple([getter() for getter in _GETTERS])


def driver_settings(threads: int) -> Settings:
    """Return the settings that all workers of a run shall have: this process's, with gradients.

    Args:
        threads: how many torch shall use.
    """
    with torch.inference_mode(False), torch.enable_grad(), thread_count(threads):
        return settings_now()


def set_by_the_user(settings: Settings | None) -> dict[str, str]:
    """Return {name: value} of the settings that are not as torch begins, and shape a run's bits.

    Args:
        settings: None: they are as torch begins.
    """
    if settings is None:
        return {}
    return {
        name: str(value)
        for (name, _, _, first), value in zip(_SETTINGS, settings, strict=True)
        if first is not ... and value != first
    }


def changed_settings(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return "name was value, but is value" for each setting that differs, see `set_by_the_user`."""
    first = {name: str(value) for name, _, _, value in _SETTINGS}
    return [
        f"{name} was {was}, but is {is_now}"
        for name in dict.fromkeys([*before, *now])
        if (was := before.get(name, first.get(name))) != (is_now := now.get(name, first.get(name)))
    ]


def _apply(settings: Settings) -> list[str]:
    """Make the settings these; return the names of those that differed."""
    different = []
    for (name, getter, setter, _), value in zip(_SETTINGS, settings, strict=True):
        if getter() != value:
            different.append(name)
            if setter is not None:
                setter(value)
    return different


class HeldSettings:
    """The settings of a block: those that a run's driver has.  Afterwards, those from before.

    Args:
        settings: the driver's; None: this process's.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings

    def __enter__(self) -> Self:
        self._before = settings_now()
        self._held = self._before
        if self._settings is not None and self._settings != self._before:
            _apply(self._settings)
            self._held = settings_now()
        return self

    @contextmanager
    def blamed(self, what: str) -> Iterator[None]:
        """Put back what the user's code changes in the block, and refuse it.

        Args:
            what: which of the user's code runs.

        Raises:
            ModelError: a setting has changed; also if something else was raised, maybe for that reason.
        """
        try:
            yield
        except Exception as error:
            self._require(what, error)
            raise
        self._require(what)

    def _require(self, what: str, error: Exception | None = None) -> None:
        if settings_now() != self._held:
            (first, *_) = _apply(self._held)
            raise ModelError(
                f"{what} changed {first} and left it so: later rows would be computed otherwise on this "
                f"worker. Set it before the training, or put it back before forward returns"
            ) from error

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if failed is not None or self._held != self._before:  # else the last `blamed` has looked
            _apply(self._before)
