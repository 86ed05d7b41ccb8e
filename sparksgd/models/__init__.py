"""Modules that a configuration can name.  Users name their own by import path."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from sparksgd.models.lenet import LeNet

__all__ = ["MODELS", "LeNet"]

MODELS: dict[str, Callable[..., nn.Module]] = {"lenet": LeNet}
