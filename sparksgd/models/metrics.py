"""Metrics of evaluations by name: sums over rows, which workers compute, and numbers that follow from them.

Values are those of scikit-learn's functions (f1_score, log_loss, r2_score, ...).  A row counts by its weight.

    of classes          accuracy, f1_macro, f1_weighted, precision_macro, recall_macro, log_loss, and top_3 or
                        any other number: the share of rows whose label has one of so many greatest logits
    of two classes      f1, precision, recall of class 1, area_under_roc, area_under_pr, too
    of several labels   accuracy (the share of labels that are right, over all rows and labels), f1_macro,
                        f1_weighted, precision_macro, recall_macro: means over the labels
    of numbers          rmse, mae, r2
    of one's own        package.module:function, see `own_metrics`

As there, a share of nothing counts as 0, such as the precision of a class that is never predicted; and the
mean over classes (macro) leaves out those that are neither labels nor predictions; of several labels it does
not.

The areas are exact: equal scores are counted together, and sums are sorted distinct scores with the weight of
each class.  So they grow with the rows, which may be MOST_RANKED.  area_under_pr is scikit-learn's average
precision, the sum of steps, where Spark's own areaUnderPR draws lines between the points.  An area is NaN
where a class that it needs has no row.

Legend: B rows, C classes, L labels of a row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from sparksgd.errors import ConfigError
from sparksgd.imports import did_you_mean, shown
from sparksgd.models.losses import LossKind, has_accuracy, is_of_classes
from sparksgd.models.own_metrics import is_own_metric, own_metric, own_metrics, values_of_rows

__all__ = [
    "MOST_RANKED",
    "Sums",
    "add_sums",
    "can_be_added",
    "check_metrics",
    "check_ranked",
    "is_less_better",
    "metric_sums",
    "metric_values",
    "weight_of_hits",
]

Sums = dict[str, npt.NDArray[np.float64]]
"""What a metric is computed from, by name: `_COUNTS` are hits, labels and predictions of each class,
float64[3, C], and `_OF_LABELS` of each label, float64[3, L]; `_SPREAD` is weight, mean, squared deviations,
least and greatest of labels, float64[5]; `_RANKED` is each score, ascending, with the weights of class 1 and
of class 0 that have it, float64[3, D]; others are float64[1]."""

MOST_RANKED = 1_000_000
"""Rows whose scores an area is computed of: 24 MB at the driver."""

Values = npt.NDArray[np.float64]

_COUNTS, _SPREAD, _SQUARES, _ABSOLUTE, _LOGS = "counts", "spread", "squares", "absolute", "logs"
_OF_LABELS, _RANKED = "of labels", "ranked"


def _shares(parts: Values, wholes: Values) -> Values:
    return np.divide(parts, wholes, out=np.zeros_like(parts), where=wholes > 0)


def _precision(hits: Values, labels: Values, predicted: Values) -> Values:
    return _shares(hits, predicted)


def _recall(hits: Values, labels: Values, predicted: Values) -> Values:
    return _shares(hits, labels)


def _f1(hits: Values, labels: Values, predicted: Values) -> Values:
    return _shares(2 * hits, labels + predicted)


def _macro(of_classes: Callable[[Values, Values, Values], Values]) -> Callable[[Values, bool], float]:
    def mean(counts: Values, are_labels: bool) -> float:
        _, labels, predicted = counts
        return float(of_classes(*counts)[(labels + predicted > 0) | are_labels].mean())

    return mean


def _f1_weighted(counts: Values, are_labels: bool) -> float:
    _, labels, _ = counts
    total = labels.sum()
    return float(_f1(*counts) @ labels / total) if total else 0.0


_OF_CLASSES: Mapping[str, Callable[[Values, bool], float]] = {
    "f1_macro": _macro(_f1),
    "f1_weighted": _f1_weighted,
    "precision_macro": _macro(_precision),
    "recall_macro": _macro(_recall),
}


def _area_under_roc(ranked: Values) -> float:
    _, ones, others = ranked
    pairs = float(ones.sum() * others.sum())
    below = np.cumsum(others) - others / 2  # of equal scores half are below
    return float(ones @ below) / pairs if pairs else math.nan


def _area_under_pr(ranked: Values) -> float:
    _, ones, others = ranked[:, ::-1]
    hits, said = np.cumsum(ones), np.cumsum(ones + others)
    return float(ones @ (hits / said)) / float(hits[-1]) if hits[-1] else math.nan


_AREAS: Mapping[str, Callable[[Values], float]] = {
    "area_under_roc": _area_under_roc,
    "area_under_pr": _area_under_pr,
}
_OF_TWO: Mapping[str, Callable[[Values], float]] = {
    "f1": lambda counts: float(_f1(*counts)[1]),
    "precision": lambda counts: float(_precision(*counts)[1]),
    "recall": lambda counts: float(_recall(*counts)[1]),
}


def _r2(squares: float, spread: Values) -> float:
    _, _, deviations, least, greatest = spread
    if least == greatest:
        return float(squares == 0)
    return 1 - squares / float(deviations)


_OF_NUMBERS: Mapping[str, tuple[str, Callable[[float, Values], float]]] = {
    "rmse": (_SQUARES, lambda squares, spread: math.sqrt(squares / spread[0])),
    "mae": (_ABSOLUTE, lambda absolute, spread: absolute / float(spread[0])),
    "r2": (_SQUARES, _r2),
}
_LEAST = ("loss", "log_loss", "rmse", "mae")
_ALWAYS = ("loss", "accuracy")
_TOP = re.compile(r"top_([1-9][0-9]{0,8})")


def is_less_better(name: str) -> bool:
    """Return whether the best value of a metric is the least one."""
    if is_own_metric(name):
        return not getattr(own_metric(name), "higher_is_better", True)
    return name in _LEAST


def check_metrics(names: Iterable[str], key: str, kind: LossKind | None, classes: int | None) -> None:
    """Refuse a metric that evaluations cannot have; those of one's own are left out.

    Args:
        names: of the metrics.
        key: of the configuration, that names them.
        kind: of the loss.
        classes: how many there are; None: not known yet, or there are none.

    Raises:
        ConfigError: with the names that there are.
    """
    known = {"loss": True}
    of_classes = is_of_classes(kind)
    known |= dict.fromkeys(("accuracy", *_OF_CLASSES), has_accuracy(kind)) | {"log_loss": of_classes}
    known |= dict.fromkeys((*_OF_TWO, *_AREAS), of_classes and classes in (2, None))
    known |= dict.fromkeys(_OF_NUMBERS, kind == "numbers")
    fitting = [name for name, fits in known.items() if fits] + ["top_3"] * of_classes
    for name in names:
        if is_own_metric(name):
            continue
        top = _TOP.fullmatch(name)
        if top is not None and classes is not None and int(top[1]) >= classes:
            raise ConfigError(f"{key} names {shown(name)}, which is always 1: there are {classes} classes")
        if known.get(name, top is not None and of_classes):
            continue
        if name in known or top is not None:
            told = f"whose kind is {'not known' if kind is None else shown(kind)}"
            several = f", with {classes} classes" if name in (*_OF_TWO, *_AREAS) and of_classes else ""
            raise ConfigError(
                f"{key} names {shown(name)}, but the loss is one {told}{several}; possible here: "
                f"{', '.join(fitting)}{'. Set loss.kind for a loss of your own' if kind is None else ''}"
            )
        raise ConfigError(f"{key} names {shown(name)}, which is no metric{did_you_mean(name, fitting)}")


def check_ranked(names: Iterable[str], rows: int) -> None:
    """Refuse an area over more rows than the driver holds scores of.

    Args:
        names: of the metrics.
        rows: how many are evaluated.

    Raises:
        ConfigError: with what to do.
    """
    for name in names:
        if name in _AREAS and rows > MOST_RANKED:
            raise ConfigError(
                f"train.metrics or early_stopping.metric names {shown(name)}, which sorts the scores of the "
                f"rows to evaluate on: these are {rows:,}, but may be {MOST_RANKED:,}. Evaluate on fewer, or "
                f"let Spark compute it of the trained model: BinaryClassificationEvaluator(numBins=0)"
            )


def metric_sums(
    names: Sequence[str],
    output: torch.Tensor,
    label: torch.Tensor,
    prediction: torch.Tensor | None,
    weights: npt.NDArray[np.floating] | None,
    classes: int | None,
) -> Sums:
    """Return what metrics are computed from, over some rows.

    Args:
        names: of the metrics.
        output: of the module: logits [B, C], one logit or number, [B] or [B, 1]; anything for own metrics.
        label: [B], or [B, L] of several labels.
        prediction: the class, int64[B], or labels 0 and 1, [B, L]; None where there are none.
        weights: of the rows, [B]; None: each weighs 1.
        classes: C; None where there are none.
    """
    found: Sums = {}
    if not set(names).difference(_ALWAYS):
        return found
    weight = np.ones(len(label)) if weights is None else weights.astype(np.float64)
    for name in own_metrics(names):
        found[name] = np.array([(weight * values_of_rows(name, output, label)).sum()])
    if found.keys() >= set(names).difference(_ALWAYS):
        return found
    if prediction is not None and prediction.ndim == 2:
        of_label = label.numpy() == 1, prediction.numpy() == 1
        counted = of_label[0] & of_label[1], *of_label
        found[_OF_LABELS] = np.stack([(weight[:, None] * each).sum(0) for each in counted])
        return found
    if classes is None:
        labels = label.double().numpy()
        error = output.reshape(len(label)).double().numpy() - labels
        total = weight.sum()
        mean = (weight * labels).sum() / total
        deviations = (weight * (labels - mean) ** 2).sum()
        found[_SPREAD] = np.array([total, mean, deviations, labels.min(), labels.max()])
        found[_SQUARES] = np.array([(weight * error**2).sum()])
        found[_ABSOLUTE] = np.array([(weight * np.abs(error)).sum()])
        return found
    assert prediction is not None
    if any(name in _OF_CLASSES or name in _OF_TWO for name in names):
        labels, predicted = label.numpy(), prediction.numpy()
        by_class = (labels, weight * (labels == predicted)), (labels, weight), (predicted, weight)
        found[_COUNTS] = np.stack([np.bincount(which, by, classes) for which, by in by_class])
    logits = _logits(output)
    if any(name in _AREAS for name in names):
        of_one = weight * label.numpy()
        found[_RANKED] = _ranked((logits[:, 1] - logits[:, 0]).numpy(), of_one, weight - of_one)
    own = logits.gather(1, label[:, None])
    for name in names:
        top = _TOP.fullmatch(name)
        if top is not None:
            is_first = torch.arange(logits.shape[1]) < label[:, None]  # of equal logits, as of the accuracy
            ahead = (~(logits <= own) | ((logits == own) & is_first)).sum(1).numpy()  # NaN is no hit
            found[name] = np.array([weight[ahead < int(top[1])].sum()])
        elif name == "log_loss":
            losses = F.cross_entropy(logits, label, reduction="none").numpy()
            found[_LOGS] = np.array([(weight * losses).sum()])
    return found


def weight_of_hits(
    prediction: torch.Tensor, label: torch.Tensor, weights: npt.NDArray[np.floating] | None
) -> float:
    """Return the weight of the rows that are predicted right; of several labels, of a row's share that are.

    Args:
        prediction: see `metric_sums`.
        label: see `metric_sums`.
        weights: of the rows, [B]; None: each weighs 1.
    """
    hits = (prediction == label).numpy()
    if hits.ndim == 2:
        rows = hits.sum(1, dtype=np.float64)
        return float((rows if weights is None else rows * weights).sum() / hits.shape[1])
    return float((hits if weights is None else weights[hits]).sum(dtype=np.float64))


def _logits(output: torch.Tensor) -> torch.Tensor:
    """Return logits float64[B, C]; those of a module of one logit are (0, z)."""
    if output.ndim == 2 and output.shape[1] > 1:
        return output.double()
    one = output.reshape(len(output)).double()
    return torch.stack([torch.zeros_like(one), one], 1)


def add_sums(one: Sums, other: Sums) -> None:
    """Add the sums of other rows, in place."""
    for name, values in other.items():
        if name == _SPREAD:
            one[name] = _merged(one[name], values)
        elif name == _RANKED:
            one[name] = _ranked(*np.concatenate([one[name], values], axis=1))
        else:
            one[name] = one[name] + values


def can_be_added(one: Sums, other: Sums) -> bool:
    """Return whether these are sums of the same metrics."""
    return one.keys() == other.keys() and all(
        values.ndim == 2 and values.shape[:1] == (3,) if name == _RANKED else values.shape == one[name].shape
        for name, values in other.items()
    )


def _ranked(scores: Values, ones: Values, others: Values) -> Values:
    """Return distinct scores, ascending, with the weights that have them, float64[3, D]; NaN is the last."""
    distinct, which = np.unique(scores, return_inverse=True)
    return np.stack([distinct, *(np.bincount(which, each, len(distinct)) for each in (ones, others))])


def _merged(one: Values, other: Values) -> Values:
    """Return the spread of all rows (Chan et al. 1979): squares of large numbers would cancel."""
    weight, apart = one[0] + other[0], other[1] - one[1]
    mean = one[1] + apart * other[0] / weight
    deviations = one[2] + other[2] + apart**2 * one[0] * other[0] / weight
    return np.array([weight, mean, deviations, min(one[3], other[3]), max(one[4], other[4])])


def metric_values(names: Iterable[str], sums: Sums, weight: float) -> dict[str, float]:
    """Return metrics by name; not those that every evaluation has, the loss and the accuracy.

    Args:
        names: of the metrics.
        sums: see `metric_sums`.
        weight: of the rows.
    """
    found = {}
    for name in names:
        if name in _ALWAYS:
            continue
        if name in _OF_NUMBERS:
            of, value = _OF_NUMBERS[name]
            found[name] = value(float(sums[of][0]), sums[_SPREAD])
        elif name in _OF_CLASSES:
            are_labels = _OF_LABELS in sums
            found[name] = _OF_CLASSES[name](sums[_OF_LABELS if are_labels else _COUNTS], are_labels)
        elif name in _AREAS:
            ranked = sums[_RANKED]
            found[name] = math.nan if np.isnan(ranked[0, -1]) else _AREAS[name](ranked)
        elif name in _OF_TWO:
            found[name] = _OF_TWO[name](sums[_COUNTS])
        else:
            found[name] = float(sums[_LOGS if name == "log_loss" else name][0]) / weight
    return found
