"""Metrics of one's own: functions that give a number for each row, of which evaluations tell the mean.

    def within_one(output, label):  # [B, C], [B] -> [B]
        return (output.argmax(1) - label).abs() <= 1

    within_one.higher_is_better = True  # where early_stopping.metric names it

A row counts by its weight.  They are named by import paths, `package.module:function`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparksgd.errors import ConfigError, ModelError
from sparksgd.imports import resolve, shown
from sparksgd.imports.torch_code import users_torch_code

__all__ = ["check_own_metric", "is_own_metric", "own_metric", "own_metrics", "values_of_rows"]


def is_own_metric(name: str) -> bool:
    """Return whether a metric is named by an import path."""
    return ":" in name


def own_metrics(names: Iterable[str]) -> list[str]:
    """Return those of some metrics that are named by import paths."""
    return [name for name in names if is_own_metric(name)]


def own_metric(name: str, key: str = "train.metrics") -> Callable[[Any, torch.Tensor], Any]:
    """Return the function that a metric names.

    Args:
        name: its import path.
        key: of the configuration, that names it.

    Raises:
        ConfigError: it does not exist.
    """
    function: Callable[[Any, torch.Tensor], Any] = resolve(key, name, {})
    return function


def check_own_metric(name: str, key: str, *, judges: bool) -> None:
    """Refuse a function that is no metric.

    Args:
        name: its import path.
        key: of the configuration, that names it.
        judges: whether evaluations are judged by it.

    Raises:
        ConfigError: it does not exist, or is no function of an output and a label; or nothing says whether
            more of it is better.
    """
    function = own_metric(name, key)
    try:
        inspect.signature(function).bind(None, None)
    except ValueError:  # what is compiled may have no signature
        pass
    except TypeError as error:
        raise ConfigError(
            f"{key} names {shown(name)}, which must be a function of the module's output and the label, with "
            f"a number for each row: {error}"
        ) from error
    if judges and not isinstance(getattr(function, "higher_is_better", None), bool):
        attribute = f"{name.partition(':')[2]}.higher_is_better"
        raise ConfigError(
            f"{key} names {shown(name)}, but nothing says which of its values is the best: set {attribute} = "
            f"True, or False, in its module"
        )


def values_of_rows(name: str, output: Any, label: torch.Tensor) -> npt.NDArray[np.float64]:
    """Return what a metric gives for some rows, float64[B].

    Args:
        name: its import path.
        output: what the module gives for them.
        label: [B], or [B, L] of several labels.

    Raises:
        UserCodeError: it raised.
        ModelError: it does not give one number for each row.
    """
    function = own_metric(name)
    with torch.no_grad(), users_torch_code(f"the metric {name}"):
        values = function(output, label)
    if not isinstance(values, torch.Tensor) or values.shape != (len(label),) or values.is_complex():
        told = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise ModelError(
            f"the metric {name} gave {told} for {len(label)} rows, but must give one number for each row, "
            f"({len(label)},): evaluations tell their mean, so take none over rows"
        )
    return values.detach().double().numpy()
