"""Metrics as users write them."""

from __future__ import annotations

import torch


def first_logit(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Give the logit of class 0."""
    return output[:, 0]


first_logit.higher_is_better = False


def right(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Give whether a row is predicted right."""
    return output.argmax(1) == label


right.higher_is_better = True


class Within:
    """Whether a number is near the label; an object will do."""

    def __init__(self, distance: float) -> None:
        self.distance = distance

    def __call__(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return (output.reshape(-1) - label).abs() <= self.distance


within_one = Within(1.0)


def without_direction(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return label


def of_one(output: torch.Tensor) -> torch.Tensor:
    return output


def mean(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return output.mean()


def raises(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    raise ValueError("no such class")


def distance(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Give a loss of no known kind."""
    return (output.reshape(-1) - label).abs()
