"""Rows and short cuts for the tests of the trial."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparksgd.data.schema import Feature, RowSchema
from sparksgd.engines.trial.trial import Found, Use, try_out
from sparksgd.errors import SparkSGDError
from sparksgd.models.losses import squared_error
from sparksgd.solvers.without_compiler import without_compiler

without_compiler()


def rows(
    number: int = 12, width: int | None = 6, dtype: str = "float32", label: str = "float32", names: str = "x"
) -> tuple[Any, RowSchema]:
    """Return rows that differ, and their schema."""
    features = tuple(Feature(name=name, dtype=dtype, length=width) for name in names.split())
    schema = RowSchema(features=features, label="y", label_dtype=label)
    chance = np.random.default_rng(1)
    records = np.zeros(number, schema.record)
    for feature in features:
        values = chance.standard_normal((number, *feature.shape)) * 3
        records[feature.name] = np.abs(values) if dtype != "float32" else values
    schema.label_array(records)[:] = chance.integers(0, 3, number)
    return records, schema


def tried(module: nn.Module, loss: Any = squared_error, data: Any = None, **use: Any) -> Found:
    """Try a module on rows of six numbers."""
    records, schema = data or rows()
    return try_out(module, records, Use(**{"loss": loss, "schema": schema, "piece_rows": 5, **use}))


def refused(module: nn.Module, *phrases: str, **arguments: Any) -> str:
    """Try a module that must be refused, by an error that says these phrases."""
    with pytest.raises(SparkSGDError) as error:
        tried(module, **arguments)
    for phrase in phrases:
        assert phrase in str(error.value), f"{phrase!r} is not in: {error.value}"
    return str(error.value)


class Around(nn.Module):
    """A linear layer from six numbers, or others, to one, and what a test adds."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)
