"""What is known to be wrong of a configuration's names before there is a session, or a row is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sparksgd.config import Config
from sparksgd.errors import ConfigError
from sparksgd.models.losses import check_loss, has_accuracy, loss_kind
from sparksgd.training.early_stopping import check_judged, check_named_metrics
from sparksgd.training.modules import check_model

__all__ = ["check_names"]


def check_names(
    config: Config,
    *,
    evaluates: bool,
    has_module: bool = False,
    has_loss: bool = False,
    may_come: Callable[[str], bool] | None = None,
) -> None:
    """Refuse a module, a loss or metrics that a configuration cannot name; no module is built.

    The optimiser, the schedule and the rule are refused by `allowed_engines`.

    Args:
        config: names them.
        evaluates: whether there are rows to evaluate on, beside those that `config.data` holds out.
        has_module: whether a module is given in Python, in place of the one that is named.
        has_loss: whether a loss is given in Python, to which the name does not lead.
        may_come: says of a Python module that is not found whether a session, which is not started yet,
            brings it; None: none does.

    Raises:
        ConfigError: as the training would raise it.
    """
    if not has_module:
        with _found_later(may_come):
            check_model(config.model)
    if not has_loss:
        with _found_later(may_come):
            check_loss(config.loss)
    kind = loss_kind(config.loss)
    evaluates = evaluates or config.data.held_out_by is not None
    check_judged(config, evaluates=evaluates, classifies=has_accuracy(kind))
    check_named_metrics(config, kind, None)


@contextmanager
def _found_later(may_come: Callable[[str], bool] | None) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        missing = error.__cause__
        if may_come is None or not isinstance(missing, ModuleNotFoundError) or missing.name is None:
            raise
        if not may_come(missing.name):
            raise
