"""Outputs and weights of shapes that a loss does not take are refused with both shapes and the next move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import sparksgd
from sparksgd.config import LossConfig
from sparksgd.errors import ConfigError, ModelError, SparkSGDError
from sparksgd.models.losses import Loss, binary_cross_entropy, cross_entropy, make_loss, squared_error

TRANSPOSED = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0), nn.Unflatten(0, (1, -1)))


def apart(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return (output - label) ** 2


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("shapes") / "rows.parquet"
    table = {
        "x": [[row / 4, -row / 8] for row in range(12)],
        "y": [row % 2 for row in range(12)],
        "both": [[row % 2, row % 3 // 2] for row in range(12)],
    }
    pq.write_table(pa.table(table), file)
    return str(file)


def refused(rows: str, module: nn.Module, loss: Mapping[str, Any], label: str) -> SparkSGDError:
    config = {
        "data": {"features": "x", "label": label},
        "loss": loss,
        "engine": {"name": "inline"},
        "train": {"num_shards": 2, "rows_per_step": 6},
    }
    with pytest.raises(SparkSGDError) as error:
        sparksgd.train(config, rows, module=module)
    return error.value


@pytest.mark.parametrize(
    ("module", "loss", "says"),
    [
        (
            nn.Linear(2, 2),
            {"name": "binary_cross_entropy"},
            "the module gives (4, 2) for labels (4,), but binary_cross_entropy takes one logit for each row, "
            "(4,) or (4, 1): let it give that, or use cross_entropy for a logit for each class",
        ),
        (
            nn.Linear(2, 2),
            {"name": "BCEWithLogitsLoss", "pos_weight": [2]},
            "gives (4, 2) for labels (4,), but BCEWithLogitsLoss takes one logit for each row",
        ),
        (
            nn.Linear(2, 2),
            {"name": "squared_error"},
            "squared_error takes one number for each row, (4,) or (4, 1): let it give that, or use a loss of",
        ),
        (TRANSPOSED, {"name": "HuberLoss"}, "gives (1, 4) for labels (4,), but HuberLoss takes one number"),
        (
            nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (2, 2))),
            {"name": "NLLLoss"},
            "gives (4, 2, 2) for labels (4,), but NLLLoss takes a logit for each class, (4, C)",
        ),
        (
            nn.Linear(2, 1),
            {"name": f"{__name__}:apart"},
            "the loss gave (4, 4) for 4 rows, but must give one value per row, (4,): the module gives (4, 1) "
            "for labels (4,); let the loss bring both to one shape",
        ),
    ],
)
def test_outputs(rows: str, module: nn.Module, loss: dict[str, Any], says: str) -> None:
    error = refused(rows, module, loss, "y")
    assert type(error) is ModelError
    assert says in str(error)


@pytest.mark.parametrize(
    ("outputs", "loss", "label", "says"),
    [
        (
            3,
            {"weight": [1, 2]},
            "y",
            "loss.weight has the shape (2,), but the module gives (4, 3): give a list",
        ),
        (1, {"name": "BCEWithLogitsLoss", "pos_weight": [1, 2]}, "y", "for each label, 1 in all"),
        (
            2,
            {"name": "BCEWithLogitsLoss", "kind": "several labels", "pos_weight": [1, 2, 3]},
            "both",
            "loss.pos_weight has the shape (3,), but the module gives (4, 2): give a list with one number",
        ),
    ],
)
def test_weights(rows: str, outputs: int, loss: dict[str, Any], label: str, says: str) -> None:
    error = refused(rows, nn.Linear(2, outputs), loss, label)
    assert type(error) is ConfigError
    assert says in str(error)


def test_what_was_taken_is_taken_still() -> None:
    one, three = torch.tensor([1]), torch.tensor([0, 1, 1])
    for output, label in ((torch.tensor(0.5), one), (torch.zeros(3), three), (torch.zeros(3, 1, 1), three)):
        for loss in (binary_cross_entropy, squared_error):
            assert loss(output, label).shape == label.shape
    pixels = torch.zeros(2, 4, 4, dtype=torch.int64)  # of a loss of the user's own that calls ours
    assert cross_entropy(torch.zeros(2, 3, 4, 4), pixels).shape == (2, 4, 4)
    each = torch.func.vmap(lambda logits, of_one: cross_entropy(logits, of_one))  # labels of ndim 0
    assert torch.equal(each(torch.zeros(3, 2), three), cross_entropy(torch.zeros(3, 2), three))


def test_weights_of_other_shapes_that_torch_takes() -> None:
    weights = [2.0, 3.0]
    output, labels = torch.tensor([[0.5, -1.0]] * 3), torch.tensor([[0, 1], [1, 0], [1, 1]])
    several = LossConfig(name="BCEWithLogitsLoss", kind="several labels", arguments={"pos_weight": weights})
    in_a_row = replace(several, arguments={"pos_weight": [weights]})
    assert torch.equal(make_loss(in_a_row, 0)(output, labels), make_loss(several, 0)(output, labels))
    pixels = torch.zeros(2, 4, 4, dtype=torch.int64)
    classes = make_loss(LossConfig(name="CrossEntropyLoss", arguments={"weight": [1.0, 2.0, 3.0]}), 0)
    assert classes(torch.zeros(2, 3, 4, 4), pixels).shape == (2, 4, 4)


@pytest.mark.parametrize("loss", [binary_cross_entropy, squared_error])
def test_labels_of_another_shape_are_not_spread_over_the_outputs(loss: Loss) -> None:
    with pytest.raises(ModelError, match=r"labels are of shape \(4, 1\), but \w+ takes one for each row"):
        loss(torch.zeros(4, 1), torch.zeros(4, 1))
