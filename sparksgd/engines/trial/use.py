"""How a module will be used, and what the trial found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from sparksgd.config import OptimizerConfig, ScheduleConfig
from sparksgd.data.schema import RowSchema
from sparksgd.engines.trial.probe import TRIED_ROWS
from sparksgd.models.losses import Loss
from sparksgd.models.outputs import Output

__all__ = ["Found", "Use"]


@dataclass(frozen=True, kw_only=True)
class Use:
    """How a module will be used."""

    loss: Loss
    """One value per row."""

    schema: RowSchema
    """Of a record."""

    dtype: torch.dtype = torch.float32
    """Type of the parameters."""

    classifies: bool = False
    """Whether labels are classes.  Those out of range are tried as 0: they are bad rows, found later."""

    piece_rows: int = TRIED_ROWS
    """Rows of a backward pass."""

    evaluates: bool = True
    """Whether there are test rows."""

    has_pieces: bool = True
    """Whether a step has several pieces."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Which class of torch.optim, and its arguments."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Which class of torch.optim.lr_scheduler, and its arguments."""

    rows_mix: bool = False
    """See ModelConfig.rows_mix."""

    seed: int = 0
    """Of the experiment."""

    threads: int = 1
    """How many threads torch uses."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a trial found."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the module's tensors by their names, in training: [B, ...]."""

    outputs: tuple[Output, ...] = ()
    """What it gives of a row in evaluation."""

    channels_last: bool = False
    """See Plan.channels_last."""

    harmless: frozenset[str] = frozenset()
    """See Plan.harmless."""

    float16: bool = False
    """See Plan.float16."""

    optimiser_bytes: int = 0
    """Bytes of what the optimiser keeps after some steps."""
