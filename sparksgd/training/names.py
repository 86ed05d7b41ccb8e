"""Which names in a configuration lead to nothing, or take other arguments; no session, no rows are needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sparksgd.config import Config
from sparksgd.models.losses import check_loss, has_accuracy, loss_kind
from sparksgd.models.own_metrics import own_metrics
from sparksgd.training.early_stopping import check_judged, check_named_metrics, check_own_metrics
from sparksgd.training.modules import check_model

__all__ = ["check_names"]


def check_names(
    config: Config,
    *,
    evaluates: bool,
    has_module: bool = False,
    has_loss: bool = False,
    brings_files: Callable[[], bool] | None = None,
) -> None:
    """Refuse a module, a loss or metrics that a configuration cannot name; no module is built.

    The optimiser, the schedule and the rule are refused by `allowed_engines`.

    Args:
        config: names them.
        evaluates: whether there are rows to evaluate on, beside those that `config.data` holds out.
        has_module: whether a module is given in Python, in place of the one that is named.
        has_loss: whether a loss is given in Python, to which the name does not lead.
        brings_files: says whether a session that is not started yet brings files.  The user's code may be
            among them, before older code of the same name, or read them: it is imported in that session
            first.  None: there is no such session.

    Raises:
        ConfigError: as the training would raise it.
    """
    checks: list[tuple[str, Callable[[], None]]] = []
    if not has_module:
        checks.append((config.model.name, partial(check_model, config.model)))
    if not has_loss:
        checks.append((config.loss.name, partial(check_loss, config.loss)))
    for name, check in checks:
        if ":" not in name:
            check()
    kind = loss_kind(config.loss)
    evaluates = evaluates or config.data.held_out_by is not None
    check_judged(config, evaluates=evaluates, classifies=has_accuracy(kind))
    check_named_metrics(config, kind, None)
    of_user = [check for name, check in checks if ":" in name]
    if own_metrics([*config.train.metrics, config.early_stopping.metric]):
        of_user.append(partial(check_own_metrics, config))
    if of_user and not (brings_files is not None and brings_files()):
        for check in of_user:
            check()
