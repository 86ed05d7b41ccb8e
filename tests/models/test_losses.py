"""A loss gives one value per row, and the values are the textbook's."""

from __future__ import annotations

from math import exp, log
from typing import Any

import pytest
import torch
from torch import nn

from sparksgd.config import LossConfig
from sparksgd.errors import ConfigError, ModelError
from sparksgd.models.losses import LOSSES, Loss, cross_entropy, loss_kind, make_loss

close = pytest.approx


def loss_named(name: str, **arguments: Any) -> Loss:
    return make_loss(LossConfig(name=name, arguments=arguments), seed=0)


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
    output = torch.zeros(4, 2 if loss_kind(LossConfig(name=name)) == "classes" else 1)
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


# Arguments


@pytest.mark.parametrize(
    ("name", "of_torch", "arguments"),
    [
        ("cross_entropy", nn.CrossEntropyLoss, {"label_smoothing": 0.1}),
        ("cross_entropy", nn.CrossEntropyLoss, {"weight": [1.0, 2.0, 0.5]}),
        ("CrossEntropyLoss", nn.CrossEntropyLoss, {}),
        ("NLLLoss", nn.NLLLoss, {}),
    ],
)
def test_arguments_are_those_of_torch_for_classes(
    name: str, of_torch: Any, arguments: dict[str, Any]
) -> None:
    output, label = torch.randn(6, 3).log_softmax(1), torch.tensor([0, 1, 2, 2, 1, 0])
    given = {k: torch.tensor(v) if k in ("weight", "pos_weight") else v for k, v in arguments.items()}
    expected = of_torch(reduction="none", **given)(output, label)
    assert torch.equal(loss_named(name, **arguments)(output, label), expected)


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
@pytest.mark.parametrize(
    ("name", "of_torch", "arguments"),
    [
        ("HuberLoss", nn.HuberLoss, {"delta": 0.3}),
        ("SmoothL1Loss", nn.SmoothL1Loss, {"beta": 2.0}),
        ("L1Loss", nn.L1Loss, {}),
        ("binary_cross_entropy", nn.BCEWithLogitsLoss, {"pos_weight": 3.0}),
        ("binary_cross_entropy", nn.BCEWithLogitsLoss, {"pos_weight": [3.0]}),
    ],
)
def test_numbers_may_be_a_column(
    name: str, of_torch: Any, arguments: dict[str, Any], shape: tuple[int, ...]
) -> None:
    output, label = torch.randn(5), torch.tensor([0, 1, 1, 0, 1])
    given = {k: torch.tensor(v) if k in ("weight", "pos_weight") else v for k, v in arguments.items()}
    expected = of_torch(reduction="none", **given)(output, label.float())
    assert torch.equal(loss_named(name, **arguments)(output.reshape(shape), label), expected)


def focal(output: torch.Tensor, label: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    losses = cross_entropy(output, label)
    return (1 - torch.exp(-losses)) ** gamma * losses


def passed_on(*args: Any, **kwargs: Any) -> torch.Tensor:
    return focal(*args, **kwargs)


class Dumb:
    """Not a loss."""


class Drawn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.rand(2) + 0.5)


class Scaled:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return self.factor * cross_entropy(output, label)


def test_one_s_own_function_or_class_takes_arguments() -> None:
    output, label = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    assert torch.equal(loss_named("test_losses:focal", gamma=1.0)(output, label), focal(output, label, 1.0))
    assert torch.equal(
        loss_named("test_losses:passed_on", gamma=1.0)(output, label), focal(output, label, 1.0)
    )
    expected = 3 * cross_entropy(output, label)
    assert torch.equal(loss_named("test_losses:Scaled", factor=3.0)(output, label), expected)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        (
            "cross_entropy",
            {"label_smothing": 0.1},
            r"no argument of cross_entropy \(did you mean label_smoothing\?\)",
        ),
        (
            "cross_entropy",
            {"reduction": "mean"},
            "of cross_entropy: the trainer adds the rows' losses itself",
        ),
        ("cross_entropy", {"weight": ["a", "b"]}, r"does not take {'weight': \['a', 'b'\]}: "),
        ("cross_entropy", {"ignore_index": 1}, "of cross_entropy: leave such rows out of the data"),
        ("cross_entropy", {"lable_smoothing": [1]}, r"did you mean label_smoothing"),
        ("squared_error", {"delta": 1.0}, "loss.delta is no argument of squared_error"),
        ("test_losses:focal", {"gama": 1.0}, r"loss.gama is no argument of .*did you mean gamma\?"),
        ("test_losses:focal", {"output": 1.0}, "loss.output is no argument of"),
        ("binary_cross_entropy", {"weight": [1.0]}, "because torch's is of a batch: use loss.pos_weight"),
        ("test_losses:Dumb", {}, "a class whose instances cannot be called"),
        ("test_losses:Scaled", {}, "which does not take {}: TypeError: .*missing 1 required"),
        ("math:pi", {}, r"loss.name is 'math:pi', which is 3\.14.*, but must be a function"),
        ("SmoothL1", {}, r"which is not one of ours \(did you mean SmoothL1Loss\?\)"),
    ],
)
def test_what_a_loss_does_not_take_is_refused(name: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        loss_named(name, **arguments)


def test_the_kind_of_a_known_loss_cannot_be_another() -> None:
    assert loss_kind(LossConfig(name="test_losses:focal")) is None
    assert loss_kind(LossConfig(name="test_losses:focal", kind="classes")) == "classes"
    assert loss_kind(LossConfig(name="BCEWithLogitsLoss", kind="binary")) == "binary"
    with pytest.raises(ConfigError, match=r'loss\.kind is "numbers", but .* whose kind is "classes": leave'):
        loss_kind(LossConfig(kind="numbers"))


def test_what_a_class_draws_follows_from_the_seed() -> None:
    config, before = LossConfig(name="test_losses:Drawn"), torch.default_generator.get_state()
    one, same, other = (make_loss(config, seed).factor for seed in (1, 1, 2))  # type: ignore[attr-defined]  # its buffer
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.default_generator.get_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_classes_go_with_outputs_of_16_bits(dtype: torch.dtype) -> None:
    output, label = torch.randn(4, 2).to(dtype), torch.tensor([0, 1, 1, 0])
    expected = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0]), reduction="none")(output.float(), label)
    assert torch.equal(loss_named("cross_entropy", weight=[1.0, 2.0])(output, label), expected)
