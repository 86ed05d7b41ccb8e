"""When evaluations end a run, and the weights of the best one.

Everything follows from the run's evaluations, which every engine makes after the same steps, and which a
checkpoint keeps.  So a run ends after the same step on every engine, and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparksgd.config import Config, EarlyStoppingConfig
from sparksgd.errors import ConfigError
from sparksgd.solvers.protocol import RoundSolver
from sparksgd.training.state import EvaluationReport, Training

__all__ = ["best_of", "check_judged", "keep_best", "keeps_best", "restore_best", "why_over"]


def check_judged(config: Config, *, evaluates: bool, classifies: bool) -> None:
    """Refuse a run that is to be judged by what none of its evaluations has.

    Args:
        config: says what ends the run, and what moves its schedule.
        evaluates: whether there are rows to evaluate on.
        classifies: whether evaluations have an accuracy.

    Raises:
        ConfigError: with what to set.
    """
    stops = config.early_stopping.patience is not None
    for is_asked, given, metric, otherwise in (
        (stops, "early_stopping.patience is set", config.early_stopping.metric, "early_stopping.metric=loss"),
        (
            config.schedule.metric is not None,
            'schedule.name is "ReduceLROnPlateau"',
            config.schedule.metric,
            "schedule.mode=min, for the loss",
        ),
    ):
        if is_asked and not evaluates:
            raise ConfigError(
                f"{given}, but there are no rows to evaluate on: set data.validation_fraction=0.1 to hold "
                f"some out, or give test rows"
            )
        if is_asked and metric == "accuracy" and not classifies:
            raise ConfigError(
                f"{given} and judges by the accuracy, but the loss has no classes: set {otherwise}"
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
        return f"no evaluation has a {config.metric} that is a number"
    best = evaluations[found]
    count = "the last evaluation has" if later == 1 else f"the last {later} evaluations have"
    return f"{count} no better {config.metric} than {_value(config, best):.6g}, after step {best.step}"


def keeps_best(config: EarlyStoppingConfig) -> bool:
    """Return whether a run ends with the weights of its best evaluation."""
    return config.patience is not None and config.keep_best


def keep_best(training: Training, solver: RoundSolver) -> None:
    """Keep the weights of the newest evaluation, if it is the best one, and the run ends with those."""
    config = training.config.early_stopping
    if keeps_best(config) and best_of(config, training.evaluations) is training.evaluations[-1]:
        training.best_weights = solver.readout()


def restore_best(training: Training) -> None:
    """Give the module the weights of the best evaluation, if they were kept."""
    if training.best_weights is not None:
        training.flat.load(training.best_weights)
        training.best = best_of(training.config.early_stopping, training.evaluations)


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
    return best - value if config.metric == "loss" else value - best


def _value(config: EarlyStoppingConfig, report: EvaluationReport) -> float:
    value = report.loss if config.metric == "loss" else report.accuracy
    assert value is not None, "check_judged comes first"
    return value
