"""A loss gives one value per row, and the values are the textbook's."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from sparksgd.errors import ConfigError, ModelError
from sparksgd.models.losses import LOSSES, cross_entropy, loss_named

close = pytest.approx


def test_cross_entropy_is_minus_the_log_of_the_share_of_the_label() -> None:
    output = torch.tensor([[0.0, 0.0, 0.0], [log(6), log(3), 0.0]])
    losses = loss_named("cross_entropy")(output, torch.tensor([2, 0]))
    assert losses.tolist() == close([log(3), -log(6 / 10)], rel=1e-6)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_squared_error_is_the_square_of_the_difference(shape: tuple[int, ...]) -> None:
    output = torch.tensor([1.0, 2.0, -3.0]).reshape(shape)
    assert loss_named("squared_error")(output, torch.tensor([1.0, 4.0, 3.0])).tolist() == [0.0, 4.0, 36.0]
    assert loss_named("squared_error")(output, torch.tensor([1, 4, 3])).tolist() == [0.0, 4.0, 36.0]


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_binary_cross_entropy_is_the_logistic_loss(shape: tuple[int, ...]) -> None:
    output = torch.tensor([0.0, 2.0]).reshape(shape)
    losses = loss_named("binary_cross_entropy")(output, torch.tensor([1, 0]))
    assert losses.tolist() == close([log(2), log(1 + exp(2))], rel=1e-6)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_gives_one_value_per_row(name: str) -> None:
    output = torch.zeros(4, 1) if name != "cross_entropy" else torch.zeros(4, 2)
    assert loss_named(name)(output, torch.tensor([0, 1, 0, 1])).shape == (4,)


def test_a_loss_of_the_user_s_goes_by_import_path() -> None:
    assert loss_named("torch.nn.functional:l1_loss") is torch.nn.functional.l1_loss


def test_an_unknown_loss_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"loss.name is 'crossentropy'.*did you mean cross_entropy\?"):
        loss_named("crossentropy")


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_cross_entropy_refuses_one_number_for_each_row(shape):
    with pytest.raises(ModelError, match=r"takes a logit for each class: .* or use binary_cross_entropy"):
        cross_entropy(torch.zeros(shape), torch.zeros(3, dtype=torch.long))
