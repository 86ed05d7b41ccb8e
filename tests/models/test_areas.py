"""Areas under curves: exact over all rows, with equal scores and weights, however the rows are divided."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sparksgd.errors import ConfigError
from sparksgd.models.metrics import (
    MOST_RANKED,
    Sums,
    add_sums,
    check_metrics,
    check_ranked,
    metric_sums,
    metric_values,
)

AREAS = ["area_under_roc", "area_under_pr"]


def sums_of(scores: Any, label: Any, weights: Any = None) -> Sums:
    output, of_rows = torch.tensor(scores), torch.tensor(label)
    predicted = (output > 0).long() if output.ndim == 1 else output.argmax(1)
    return metric_sums(AREAS, output, of_rows, predicted, weights, 2)


def areas(scores: Any, label: Any, weights: Any = None) -> dict[str, float]:
    return metric_values(AREAS, sums_of(scores, label, weights), 1.0)


def roc_by_pairs(scores: Any, label: Any, weights: Any) -> float:
    """Return the share of pairs of both classes that the scores order rightly, equal ones half."""
    right = total = 0.0
    for one, of_one, its in zip(scores, label, weights, strict=True):
        for other, of_other, others in zip(scores, label, weights, strict=True):
            if of_one == 1 and of_other == 0:
                total += its * others
                right += its * others * ((one > other) + 0.5 * (one == other))
    return right / total


def pr_by_thresholds(scores: Any, label: Any, weights: Any) -> float:
    """Return the sum over thresholds of (recall - the recall before) * precision."""
    found = before = 0.0
    for threshold in sorted(set(scores), reverse=True):
        said = scores >= threshold
        hits = weights[said & (label == 1)].sum()
        recall = hits / weights[label == 1].sum()
        found, before = found + (recall - before) * hits / weights[said].sum(), recall
    return found


def test_areas_of_a_few_rows_are_counted_by_hand() -> None:
    # of 4 pairs, 0.8 and 0.35 above 0.1, and 0.8 above 0.4: the documentation of scikit-learn has this, too
    assert areas([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == pytest.approx(
        {"area_under_roc": 0.75, "area_under_pr": 0.5 * 1 + 0.5 * 2 / 3}
    )
    assert areas([1.0, 1.0, 1.0], [0, 1, 1]) == pytest.approx({"area_under_roc": 0.5, "area_under_pr": 2 / 3})


@pytest.mark.parametrize("cut", [300, 100, 7, 1])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_areas_are_those_of_pairs_and_thresholds_however_rows_are_divided(
    cut: int, is_weighted: bool
) -> None:
    source = np.random.default_rng(5)
    scores, label = source.normal(size=300).round(1), source.integers(0, 2, 300)
    scores[label == 1] += 0.5
    weights = source.random(300) + 0.5
    of_rows = weights if is_weighted else np.ones(300)
    parts = [slice(start, start + cut) for start in range(0, 300, cut)]
    given = [sums_of(scores[part], label[part], of_rows[part] if is_weighted else None) for part in parts]
    for other in given[1:]:
        add_sums(given[0], other)
    assert given[0]["ranked"].shape == (3, len(set(scores)))
    assert metric_values(AREAS, given[0], 300) == pytest.approx(
        {
            "area_under_roc": roc_by_pairs(scores, label, of_rows),
            "area_under_pr": pr_by_thresholds(scores, label, of_rows),
        },
        rel=1e-12,
    )


def test_two_logits_are_ranked_by_their_difference() -> None:
    source = np.random.default_rng(6)
    logits, label = source.normal(size=(50, 2)), source.integers(0, 2, 50)
    assert areas(logits, label) == areas(logits[:, 1] - logits[:, 0], label)


def test_an_area_without_a_class_or_of_nan_is_no_number() -> None:
    only_ones, only_others = areas([0.1, 0.2], [1, 1]), areas([0.1, 0.2], [0, 0])
    assert (math.isnan(only_ones["area_under_roc"]), only_ones["area_under_pr"]) == (True, 1.0)
    assert all(map(math.isnan, only_others.values()))
    assert all(map(math.isnan, areas([0.1, math.nan, 0.2], [0, 1, 1]).values()))
    assert areas([-math.inf, math.inf, 0.0], [0, 1, 0])["area_under_roc"] == 1.0
    assert areas([-0.0, 0.0], [0, 1])["area_under_roc"] == 0.5
    assert areas([0.5], [1])["area_under_pr"] == 1.0


def test_areas_of_too_many_rows_or_of_other_classes_are_refused() -> None:
    check_ranked(AREAS, MOST_RANKED)
    check_ranked(["f1", "log_loss"], 10 * MOST_RANKED)
    with pytest.raises(
        ConfigError, match=r"'area_under_pr', which sorts .*these are 1,000,001, but may be 1,"
    ):
        check_ranked(["f1", "area_under_pr"], MOST_RANKED + 1)
    check_metrics(AREAS, "train.metrics", "binary", None)
    check_metrics(AREAS, "train.metrics", "classes", 2)
    with pytest.raises(
        ConfigError, match=r"'area_under_roc', but the loss .* 'classes', with 3 classes; possible"
    ):
        check_metrics(AREAS, "train.metrics", "classes", 3)
    with pytest.raises(ConfigError, match=r"'area_under_roc', but the loss .* 'several labels'; possible"):
        check_metrics(AREAS, "train.metrics", "several labels", None)
