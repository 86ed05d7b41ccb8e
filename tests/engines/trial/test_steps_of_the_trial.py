"""The trial makes steps and evaluations as the training will: what fails or changes there is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from sparksgd.config import OptimizerConfig, ScheduleConfig
from sparksgd.models.losses import cross_entropy
from tests.engines.trials import Around, refused, rows, tried

# What changes


class Grows(Around):
    """Makes a head in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.head = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.head is None:
            self.head = nn.Linear(6, 1)
        return self.inner(x) + self.head(x)


class Replaces(Around):
    """Makes its weight anew."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner.weight = nn.Parameter(self.inner.weight.detach().clone())
        return self.inner(x)


def test_parts_that_forward_makes() -> None:
    refused(Grows(), "forward made submodule head", "in __init__")
    refused(Replaces(), "forward replaced parameter inner.weight")
    module = Around()
    module.parts = {}
    module.forward = functools.partial(_with_hidden_head, module)  # type: ignore[method-assign]
    refused(module, "parts changes as the module trains")


def _with_hidden_head(module: Any, x: torch.Tensor) -> torch.Tensor:
    head = module.parts.setdefault("head", nn.Linear(6, 1))
    return module.inner(x) + head(x)


class Third(Around):
    """Adds rows up in a buffer, in each third step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("thirds", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
            if self.steps % 3 == 0:
                self.thirds += x.sum()
        return self.inner(x)


class Later(Around):
    """Counts in an attribute, from its third step on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
            self.calls += int(self.steps > 2)
        return self.inner(x)


def test_what_shows_only_after_some_steps() -> None:
    refused(Third(), "forward changes thirds, and two pieces of one step leave different values")
    refused(Later(), "calls changes as the module trains")


# Evaluation


class Otherwise(Around):
    """Does another thing in evaluation."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = nn.Linear(6, 3), how

    def forward(self, x: torch.Tensor) -> Any:
        y = self.inner(x)
        if self.training:
            return y
        if self.how == "raises":
            raise LookupError("not trained yet")
        return {"classes": y.argmax(1), "pair": (y, y), "narrow": y[:, :2]}[self.how]


@pytest.mark.parametrize("how", ["raises", "classes", "pair", "narrow"])
def test_evaluation_is_tried(how: str) -> None:
    data = rows(label="int64")
    refused(Otherwise(how), "in evaluation mode", loss=cross_entropy, data=data, classifies=True)


class Squeezed(Around):
    """Drops its dimensions of one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).squeeze()


class OnlyEight(Around):
    """Has a buffer for eight rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + torch.zeros(8, 1)[: len(x)]


def test_one_row_and_the_rows_of_a_piece_are_tried() -> None:
    refused(
        Squeezed(),
        "in evaluation mode the module gives () for one row",
        loss=lambda output, label: (output - label).square(),
    )
    tried(OnlyEight(), piece_rows=8)
    refused(OnlyEight(), "raised RuntimeError", piece_rows=9)


# The optimiser


class Strict(torch.optim.SGD):
    """Raises at its third step."""

    def step(self, closure: Any = None) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 3:
            raise LookupError("no third step")
        return super().step(closure)


def test_the_optimiser_makes_steps() -> None:
    refused(
        nn.Linear(6, 1),
        "its step() raised LookupError: no third step",
        optimizer=OptimizerConfig(name=f"{__name__}:Strict", arguments={"lr": 0.1}),
    )


def test_a_schedule_shorter_than_the_trial() -> None:
    tried(
        nn.Linear(6, 1),
        optimizer=OptimizerConfig(name="SGD", arguments={"lr": 0.1}),
        schedule=ScheduleConfig(name="OneCycleLR", arguments={"max_lr": 0.1, "total_steps": 2}),
    )


# Moved weights


class Narrow(Around):
    """A distribution whose scale must be positive: weights that are moved by much are outside its support."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.01))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -torch.distributions.Normal(self.inner(x), self.scale).log_prob(torch.zeros(1)) / 1e9


def test_a_parameter_near_the_end_of_its_range_is_no_false_alarm() -> None:
    assert tried(Narrow())
