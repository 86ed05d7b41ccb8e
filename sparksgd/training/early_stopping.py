"""When evaluations end a run, and the weights of the best one.

Everything follows from the run's evaluations, which every engine makes after the same steps, and which a
checkpoint keeps.  So a run ends after the same step on every engine, and after a resume.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from sparksgd.config import Config, EarlyStoppingConfig
from sparksgd.errors import ConfigError
from sparksgd.models.losses import LossKind
from sparksgd.models.metrics import check_metrics, is_less_better
from sparksgd.models.own_metrics import check_own_metric, own_metrics
from sparksgd.solvers.protocol import CentralSolver
from sparksgd.training.replay import Replay
from sparksgd.training.state import EvaluationReport, Training

__all__ = [
    "best_of",
    "check_judged",
    "check_named_metrics",
    "check_own_metrics",
    "judge",
    "judged_metrics",
    "keep_best",
    "keeps_best",
    "restore_best",
    "why_over",
]

log = logging.getLogger("sparksgd")


def judged_metrics(config: Config) -> tuple[str, ...]:
    """Return which metrics evaluations must have: those to be told, and the one that they are judged by."""
    judged = [config.early_stopping.metric] if config.early_stopping.patience is not None else []
    return tuple(dict.fromkeys([*config.train.metrics, *judged]))


def check_named_metrics(config: Config, kind: LossKind | None, classes: int | None) -> None:
    """Refuse metrics that evaluations cannot have.

    Args:
        config: names them.
        kind: of the loss.
        classes: how many there are; None: not known yet, or there are none.

    Raises:
        ConfigError: with the key, and the names that there are.
    """
    for key, names in _named(config).items():
        check_metrics(names, key, kind, classes)


def check_own_metrics(config: Config) -> None:
    """Refuse metrics of the user's own that are none; this imports them.

    Raises:
        ConfigError: with the key.
    """
    for key, names in _named(config).items():
        for name in own_metrics(names):
            check_own_metric(name, key, judges=key != "train.metrics")


def _named(config: Config) -> dict[str, Sequence[str]]:
    return {"train.metrics": config.train.metrics, "early_stopping.metric": [config.early_stopping.metric]}


def check_judged(config: Config, *, evaluates: bool, classifies: bool) -> None:
    """Refuse a run that is to be judged by what none of its evaluations has.

    Args:
        config: says what ends the run, and what moves its schedule.
        evaluates: whether there are rows to evaluate on.
        classifies: whether evaluations have an accuracy.

    Raises:
        ConfigError: with what to set.
    """
    moved_by, plateau = config.schedule.metric, 'schedule.name is "ReduceLROnPlateau"'
    for is_asked, given in (
        (config.early_stopping.patience is not None, "early_stopping.patience is set"),
        (bool(config.train.metrics), "train.metrics is set"),
        (moved_by is not None, plateau),
    ):
        if is_asked and not evaluates:
            raise ConfigError(
                f"{given}, but there are no rows to evaluate on: set data.validation_fraction=0.1 to hold "
                f"some out, or give test rows"
            )
    if moved_by == "accuracy" and not classifies:
        raise ConfigError(
            f"{plateau} and judges by the accuracy, but the loss has no classes: set schedule.mode=min, for "
            f"the loss"
        )


def best_of(config: EarlyStoppingConfig, evaluations: Sequence[EvaluationReport]) -> EvaluationReport | None:
    """Return the best evaluation, the first of several; None: there is none that is a number."""
    found, _ = _judged(config, evaluations)
    return None if found is None else evaluations[found]


def why_over(config: EarlyStoppingConfig, evaluations: Sequence[EvaluationReport]) -> str | None:
    """Return why a run ends after these evaluations; None: it goes on."""
    if config.patience is None:
        return None
    found, later = _judged(config, evaluations)
    if later < config.patience:
        return None
    if found is None:
        return f"in no evaluation is the {config.metric} a number"
    best = evaluations[found]
    count = "the last evaluation has" if later == 1 else f"the last {later} evaluations have"
    return f"{count} no better {config.metric} than {_value(config, best):.6g}, after step {best.step}"


def keeps_best(config: EarlyStoppingConfig) -> bool:
    """Return whether a run ends with the weights of its best evaluation."""
    return config.patience is not None and config.keep_best


def judge(training: Training) -> None:
    """End a run whose evaluations get no better."""
    why = why_over(training.config.early_stopping, training.evaluations)
    if why is not None and not training.is_over:
        training.stop("early_stopping")
        log.info("early stopping: %s", why)


def keep_best(training: Training, solver: CentralSolver, replay: Replay | None) -> None:
    """Keep the weights of the newest evaluation, if it is the best one, and the run ends with those.

    Args:
        training: the run.
        solver: has the weights.
        replay: the run that is repeated; then those are kept that it ended with.
    """
    config, newest = training.config.early_stopping, training.evaluations[-1]
    if replay is not None:
        is_kept = newest.step == replay.best_step
    else:
        is_kept = keeps_best(config) and best_of(config, training.evaluations) is newest
    if is_kept:
        training.best_weights = solver.readout()


def restore_best(training: Training) -> None:
    """Give the module the weights of the best evaluation, if they were kept."""
    weights = training.best_weights
    if weights is not None:
        training.flat.load(weights)
        training.restored = next(one for one in training.evaluations if one.step == weights.version)


def _judged(config: EarlyStoppingConfig, evaluations: Sequence[EvaluationReport]) -> tuple[int | None, int]:
    """Return which evaluation is the best one, and how many came after it."""
    found: int | None = None
    for number, report in enumerate(evaluations):
        value = _value(config, report)
        if math.isnan(value):
            continue
        if found is None or _gain(config, value, _value(config, evaluations[found])) > config.min_delta:
            found = number
    return found, len(evaluations) - (0 if found is None else found + 1)


def _gain(config: EarlyStoppingConfig, value: float, best: float) -> float:
    return best - value if is_less_better(config.metric) else value - best


def _value(config: EarlyStoppingConfig, report: EvaluationReport) -> float:
    if config.metric == "loss" or math.isnan(report.loss):  # no metric is worth more than its loss
        return report.loss
    value = report.accuracy if config.metric == "accuracy" else report.metrics[config.metric]
    assert value is not None, "check_metrics comes first"
    return value
