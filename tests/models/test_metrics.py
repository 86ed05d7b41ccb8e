"""Metrics have the values that scikit-learn 1.9.1 gives, however the rows are divided and added."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparksgd.arithmetic.addition_tree import add_partial
from sparksgd.engines.replies import Evaluation
from sparksgd.errors import ConfigError
from sparksgd.models.losses import LossKind
from sparksgd.models.metrics import (
    Sums,
    add_sums,
    check_metrics,
    is_less_better,
    metric_sums,
    metric_values,
)

OF_SCIKIT_LEARN: dict[tuple[int | None, bool], dict[str, float]] = {
    (2, False): {
        "f1_macro": 0.7457936135854561, "f1_weighted": 0.7456876942577834,
        "precision_macro": 0.7476482475088844, "recall_macro": 0.7470800889877642,
        "log_loss": 0.5018557503969944, "f1": 0.7426160337552743,
        "precision": 0.7787610619469026, "recall": 0.7096774193548387,
    },
    (2, True): {
        "f1_macro": 0.7510818352435554, "f1_weighted": 0.7510697541292997,
        "precision_macro": 0.751652496441089, "recall_macro": 0.7515998042645204,
        "log_loss": 0.5055675681162486, "f1": 0.7505979433262822,
        "precision": 0.7713970847790337, "recall": 0.7308909663419966,
    },
    (5, False): {
        "f1_macro": 0.4988175416816194, "f1_weighted": 0.5051456543052417,
        "precision_macro": 0.4993120189914615, "recall_macro": 0.5016590829038263,
        "log_loss": 1.255069722637468, "top_2": 0.725, "top_4": 0.9375,
    },
    (5, True): {
        "f1_macro": 0.514788746136656, "f1_weighted": 0.5207219333000407,
        "precision_macro": 0.5151703334941037, "recall_macro": 0.5170657223704774,
        "log_loss": 1.2387700917009077, "top_2": 0.7367152649106373, "top_4": 0.9354962509336556,
    },
    (None, False): {"rmse": 0.5144270024369538, "mae": 0.41727166666882115, "r2": 0.7376129108236841},
    (None, True): {"rmse": 0.5143596227935309, "mae": 0.41706947021291996, "r2": 0.7430661735667359},
}  # fmt: skip


def drawn(classes: int | None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return outputs, labels and weights, as scikit-learn was given them."""
    if classes is None:
        source = np.random.default_rng(9)
        label = source.normal(size=300).round(3) + 1e6
        return label + source.normal(size=300).round(3) * 0.5, label, source.random(300).round(3) + 0.5
    source = np.random.default_rng(classes)
    logits, label = source.normal(size=(240, classes)).round(3), source.integers(0, classes, 240)
    logits[np.arange(240), label] += 1
    return logits, label, source.random(240).round(3) + 0.5


def sums_of(
    names: list[str], output: Any, label: Any, weights: Any, classes: int | None, part: slice = slice(None)
) -> Sums:
    outputs, labels = torch.from_numpy(output[part]), torch.from_numpy(label[part])
    if classes is None:
        predicted = None
    elif outputs.ndim == 1:
        predicted = (outputs > 0).long()
    else:
        predicted = outputs.argmax(1)
    of_part = None if weights is None else weights[part]
    return metric_sums(names, outputs, labels, predicted, of_part, classes)


@pytest.mark.parametrize("cut", [240, 100, 7, 1])
@pytest.mark.parametrize(("classes", "is_weighted"), OF_SCIKIT_LEARN)
def test_every_metric_is_that_of_scikit_learn(classes: int | None, is_weighted: bool, cut: int) -> None:
    expected, (output, label, weights) = OF_SCIKIT_LEARN[classes, is_weighted], drawn(classes)
    given_weights, names = weights if is_weighted else None, list(expected)
    parts = [slice(start, start + cut) for start in range(0, len(label), cut)]
    total = sums_of(names, output, label, given_weights, classes, parts[0])
    for part in parts[1:]:
        add_sums(total, sums_of(names, output, label, given_weights, classes, part))
    found = metric_values(names, total, float(weights.sum()) if is_weighted else len(label))
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_module_of_one_logit_has_the_metrics_of_two_classes() -> None:
    (output, label, _), names = drawn(2), list(OF_SCIKIT_LEARN[2, False])
    one = output[:, 1] - output[:, 0]
    for shaped in (one, one[:, None]):
        predicted = torch.from_numpy((one > 0).astype(np.int64))
        sums = metric_sums(names, torch.from_numpy(shaped), torch.from_numpy(label), predicted, None, 2)
        assert metric_values(names, sums, len(label)) == pytest.approx(OF_SCIKIT_LEARN[2, False], rel=1e-9)


def test_shares_of_nothing_are_0_and_a_class_that_nobody_has_is_left_out() -> None:
    output, label = np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([0, 0])
    names = ["f1", "precision", "recall", "f1_macro", "precision_macro", "recall_macro"]
    found = metric_values(names, sums_of(names, output, label, None, 2), 2)
    assert found == dict.fromkeys(names[:3], 0.0) | dict.fromkeys(names[3:], 1.0)


@pytest.mark.parametrize(("outputs", "expected"), [([0.3, 0.3, 0.3], 1.0), ([1.0, 3.0, 0.3], 0.0)])
def test_labels_that_are_all_equal_have_the_r2_of_scikit_learn(outputs: list[float], expected: float) -> None:
    output, label = np.array(outputs), np.array([0.3, 0.3, 0.3])
    parts = [sums_of(["r2"], output, label, None, None, slice(row, row + 1)) for row in range(3)]
    for other in parts[1:]:
        add_sums(parts[0], other)
    assert metric_values(["r2"], parts[0], 3)["r2"] == expected


def test_top_1_is_the_accuracy_and_nan_is_no_hit() -> None:
    source = np.random.default_rng(0)
    output, label = source.integers(0, 2, (500, 4)).astype(np.float64), source.integers(0, 4, 500)
    found = metric_values(["top_1", "top_3"], sums_of(["top_1", "top_3"], output, label, None, 4), 500)
    assert found["top_1"] == (output.argmax(1) == label).mean()
    nan = np.full((3, 4), np.nan)
    assert metric_values(["top_3"], sums_of(["top_3"], nan, np.array([0, 1, 2]), None, 4), 3)["top_3"] == 0


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40), st.integers(1, 39), st.integers(0, 2**32 - 1))
def test_sums_of_parts_are_those_of_the_whole(values: list[float], cut: int, seed: int) -> None:
    label = np.array(values)
    output = label + np.random.default_rng(seed).normal(size=len(label))
    names, cut = ["rmse", "mae", "r2"], min(cut, len(label) - 1)
    parts = sums_of(names, output, label, None, None, slice(0, cut))
    add_sums(parts, sums_of(names, output, label, None, None, slice(cut, None)))
    whole = sums_of(names, output, label, None, None)
    scale = 1 + np.abs(label).max() ** 2
    for name, array in whole.items():
        assert np.abs(parts[name] - array).max() <= 1e-9 * scale * len(label)


def test_nothing_is_computed_that_nobody_asked_for() -> None:
    output, label, _ = drawn(5)
    assert sums_of([], output, label, None, 5) == {}
    assert sums_of(["loss", "accuracy"], output, label, None, 5) == {}
    assert list(sums_of(["top_2"], output, label, None, 5)) == ["top_2"]


def test_evaluations_are_added_with_what_metrics_need() -> None:
    output, label, _ = drawn(5)
    partials: dict[tuple[int, int], Any] = {}
    for shard, part in enumerate((slice(0, 90), slice(90, 240))):
        sums = sums_of(["f1_macro"], output, label, None, 5, part)
        one = Evaluation(loss=1.0, correct=1.0, rows=len(label[part]), sums=sums)
        add_partial(partials, (shard, shard + 1), one, 2)
    whole = partials[0, 2]
    assert whole.rows == 240
    expected = OF_SCIKIT_LEARN[5, False]["f1_macro"]
    assert metric_values(["f1_macro"], whole.sums, 240)["f1_macro"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("names", "kind", "classes", "says"),
    [
        (["f1_makro"], "classes", 3, r"names 'f1_makro', which is no metric \(did you mean f1_macro\?\)"),
        (
            ["rmse"],
            "classes",
            3,
            "names 'rmse', but the loss is one whose kind is 'classes'; possible",
        ),
        (["f1"], "classes", 3, "whose kind is 'classes', with 3 classes; possible here: loss, accuracy,"),
        (["top_3"], "classes", 3, "names 'top_3', which is always 1: there are 3 classes"),
        (["accuracy"], "numbers", None, "whose kind is 'numbers'; possible here: loss, rmse, mae, r2"),
        (["top_3"], "numbers", None, "names 'top_3', but the loss is one whose kind is 'numbers'"),
        (["r2"], None, None, r"whose kind is not known; possible here: loss\. Set loss\.kind for a loss of"),
        (["top_0"], "classes", 3, "names 'top_0', which is no metric"),
    ],
)
def test_what_evaluations_cannot_have_is_refused(
    names: list[str], kind: LossKind | None, classes: int | None, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        check_metrics(names, "train.metrics", kind, classes)


def test_what_evaluations_have_is_taken() -> None:
    check_metrics(["loss", "accuracy", "f1", "top_1", "recall_macro"], "train.metrics", "binary", 2)
    check_metrics(["f1"], "train.metrics", "classes", None)  # before the number of classes is known
    check_metrics(["loss", "r2"], "train.metrics", "numbers", None)
    assert [is_less_better(name) for name in ("loss", "rmse", "f1", "top_5", "r2")] == [
        True, True, False, False, False,
    ]  # fmt: skip
