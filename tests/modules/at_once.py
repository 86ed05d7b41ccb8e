"""Checkpoints that are written before the next step begins, and as often as they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import pytest


class _AtOnce(ThreadPoolExecutor):
    """Gives nothing back before it is done."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(call, *args, **kwargs)
        wait([future])
        return future


@contextmanager
def written_at_once() -> Iterator[None]:
    """Let a checkpoint be written before the next step begins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparksgd.training.checkpointing.ThreadPoolExecutor", _AtOnce)
        yield


@contextmanager
def every_checkpoint() -> Iterator[None]:
    """Let checkpoints take all the time that they like, so that none is left out."""
    with pytest.MonkeyPatch.context() as patch, written_at_once():
        patch.setattr("sparksgd.training.checkpointing.SHARE", 1e9)
        yield
