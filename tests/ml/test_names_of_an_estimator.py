"""What is wrong of an Estimator's names is told before rows are read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from sparksgd.errors import ConfigError
from sparksgd.ml import TorchClassifier

HELD_OUT = {"validation_fraction": 0.5}


def net(num_features: int, num_classes: int, hidden: int = 4) -> nn.Module:
    raise AssertionError("it was built")


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"loss": "cross_entrpy"}, "loss.name is 'cross_entrpy', which is not one of ours"),
        ({"optimizer": "SGDD"}, "optimizer.name is 'SGDD'"),
        ({"callbacks": ["nowhere:Class"]}, "callbacks is 'nowhere:Class', but Python finds no module"),
        ({"config": {"model": {"hiden": 3}}}, r"net', which does not take \{'hiden': 3\}: TypeError"),
        ({"config": {"train": {"metrics": ["f2"]}, "data": HELD_OUT}}, "names 'f2', which is no metric"),
        ({"config": {"train": {"metrics": ["f1"]}}}, "there are no rows to evaluate on"),
    ],
)  # fmt: skip
def test_a_wrong_name_is_told_before_rows_are_read(
    params: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparksgd.ml.estimators.refuse_connect", lambda session: None)
    unread: Any = SimpleNamespace(sparkSession=None)
    with pytest.raises(ConfigError, match=says):
        TorchClassifier(module=net, numWorkers=1, **params).fit(unread)
