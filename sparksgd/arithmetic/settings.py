"""The settings of torch and numpy that decide bits: a process has one of each, which any code may change.

A module's forward may not: the next piece would be computed by other ones, and the caller's own code, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import numpy as np
import torch

from sparksgd.arithmetic.numerics import thread_count
from sparksgd.errors import ModelError

__all__ = ["HeldSettings", "Settings", "driver_settings", "settings_now"]

Settings = tuple[Any, ...]
"""The values, in the order of `_SETTINGS`; it can be pickled."""


def _keeps_denormals() -> bool:
    return sys.float_info.min * _QUARTER != 0.0


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

_SETTINGS: tuple[tuple[str, Callable[[], Any], Callable[[Any], object] | None], ...] = (
    ("torch.set_num_threads", torch.get_num_threads, torch.set_num_threads),
    ("torch.set_grad_enabled", torch.is_grad_enabled, torch._C._set_grad_enabled),
    ("torch.set_default_dtype", torch.get_default_dtype, torch.set_default_dtype),
    (
        "torch.autocast",
        partial(torch.is_autocast_enabled, "cpu"),
        lambda value: torch.set_autocast_enabled("cpu", value),
    ),
    (
        "torch.autocast's dtype",
        partial(torch.get_autocast_dtype, "cpu"),
        lambda value: torch.set_autocast_dtype("cpu", value),
    ),
    ("torch.autocast's cache", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (
        "torch.use_deterministic_algorithms",
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,  # use_deterministic_algorithms imports the compiler
    ),
    (
        "torch.set_float32_matmul_precision",
        _matmul_precision,
        _set_matmul_precision,
    ),
    ("torch.set_flush_denormal", _keeps_denormals, lambda value: torch.set_flush_denormal(not value)),
    ("torch.backends.mkldnn", torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    ("torch.backends.nnpack", torch._C._get_nnpack_enabled, torch._C._set_nnpack_enabled),
    ("sdpa_kernel (flash)", torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash),
    ("sdpa_kernel (math)", torch._C._get_math_sdp_enabled, torch._C._set_sdp_use_math),
    ("torch.inference_mode", torch.is_inference_mode_enabled, None),
    (
        "torch.set_default_device, or a torch function mode,",
        torch._C._len_torch_function_stack,
        lambda modes: None if modes else torch.set_default_device(None),
    ),
    ("a torch dispatch mode", torch._C._len_torch_dispatch_stack, None),
    ("numpy.seterr", np.geterr, lambda value: np.seterr(**value)),
)
_GETTERS = tuple(getter for _, getter, _ in _SETTINGS)


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


def _apply(settings: Settings) -> list[str]:
    """Make the settings these; return the names of those that differed."""
    different = []
    for (name, getter, setter), value in zip(_SETTINGS, settings, strict=True):
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
