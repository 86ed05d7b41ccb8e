"""What tells the input of a run from that of another: digests of files, of the user's code, of a replayed
run."""

from __future__ import annotations

from pathlib import Path

from sparksgd.config import Config
from sparksgd.errors import DataError
from sparksgd.imports.sources import code_digests
from sparksgd.storage import fingerprint, has_scheme, unanswered
from sparksgd.training.replay import Replay

__all__ = ["fingerprints_of"]


def fingerprints_of(config: Config, replay: Replay | None = None) -> dict[str, str]:
    """Return what tells the input of a run from that of another, by the key that names it.

    Args:
        config: `data.train` and `data.test` name the files, if any.
        replay: the run to be repeated.

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
    code = {
        "model.name": config.model.name,
        "loss.name": config.loss.name,
        "optimizer.name": config.optimizer.name,
        "schedule.name": config.schedule.name,
        "solver.name": config.solver.name,
    }
    found |= code_digests(code)
    if replay is not None:
        found["replay"] = replay.fingerprint()
    return found
