"""What tells the input of a run from that of another: digests of files, of the user's code, of a replayed
run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sparksgd.config import Config
from sparksgd.errors import DataError
from sparksgd.imports.given_code import given_code_digest
from sparksgd.imports.sources import code_digests
from sparksgd.storage import fingerprint, has_scheme, unanswered
from sparksgd.training.replay import Replay

__all__ = ["code_fingerprints", "fingerprints_of"]


def fingerprints_of(
    config: Config, replay: Replay | None = None, given: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Return what tells the input of a run from that of another, by the key that names it.

    Args:
        config: `data.train` and `data.test` name the files, if any.
        replay: the run to be repeated.
        given: what was given in Python instead of a name: "module", "loss"; None where it was not.

    Returns:
        Digests of the files, of the user's own code, and of the run to be repeated.

    Raises:
        DataError: a file is missing, or cannot be read.
        ClusterError: its file system does not answer.
    """
    data = {"data.train": config.data.train, "data.test": config.data.test}
    try:
        found = {key: fingerprint(path) for key, path in data.items() if path is not None}
    except OSError as error:
        path = str(error.filename)
        where = "" if has_scheme(path) or Path(path).is_absolute() else f", seen from {Path.cwd()}"
        refusal = DataError(f"cannot read {path} as Parquet: {error.strerror}{where}")
        raise unanswered(error, refusal) from error
    found |= code_fingerprints(config)
    for key, value in (given or {}).items():
        if value is not None:
            parts = [type(part) for part in value.modules()] if isinstance(value, nn.Module) else [value]
            digest = given_code_digest(parts)
            found |= {} if digest is None else {key: digest}
    if replay is not None:
        found["replay"] = replay.fingerprint()
    return found


def code_fingerprints(config: Config) -> dict[str, str]:
    """Return the digests of the user's own code, by the keys that name it.

    Args:
        config: names it.
    """
    return code_digests(
        {
            "model.name": config.model.name,
            "loss.name": config.loss.name,
            "optimizer.name": config.optimizer.name,
            "schedule.name": config.schedule.name,
            "solver.name": config.solver.name,
            "early_stopping.metric": config.early_stopping.metric,
        }
    )
