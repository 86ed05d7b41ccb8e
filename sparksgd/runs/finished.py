"""Whether an output folder holds a finished run, and whether it is the run that is asked for now.

A nightly job that is started twice trains once.  If its data or configuration changed, it is refused, so that
nobody takes yesterday's model for today's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from sparksgd.config import Config
from sparksgd.errors import ConfigError, DataError
from sparksgd.imports.sources import code_digests
from sparksgd.runs.json_files import read_about_run, read_json
from sparksgd.runs.names import MODEL, SUMMARY
from sparksgd.solvers.rules import completed
from sparksgd.storage import Location, fingerprint, unanswered
from sparksgd.training.replay import Replay

__all__ = ["IfExists", "fingerprints_of", "is_done"]

log = logging.getLogger("sparksgd")

IfExists = Literal["skip", "fail", "overwrite"]
_PATHS = ("data.train", "data.test")  # not compared: fingerprints identify the files, whatever their path


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
        refusal = DataError(f"cannot read {error.filename} as Parquet: {error.strerror}")
        raise unanswered(error, refusal) from error
    code = {
        "model.name": config.model.name,
        "loss.name": config.loss.name,
        "optimizer.name": config.optimizer.name,
        "schedule.name": config.schedule.name,
    }
    found |= code_digests(code)
    if replay is not None:
        found["replay"] = replay.fingerprint()
    return found


def is_done(out: Location, config: Config, fingerprints: Mapping[str, str], if_exists: IfExists) -> bool:
    """Return whether a folder holds a finished run of this configuration, these files and this code.

    Args:
        out: the folder.
        config: what is to be trained.
        fingerprints: of the data files, of the user's code and of the replayed run, if there is one, by the
            keys that name them.
        if_exists: "skip" compares; "fail" refuses any finished run; "overwrite" returns False.

    Raises:
        ConfigError: it holds a finished run of another configuration, other files or other code.
        ClusterError: its file system does not answer.
    """
    if if_exists == "overwrite":
        return False
    try:
        summary = read_json(out / SUMMARY)
        about = read_about_run(out)
        status, parameters = summary["status"], summary["parameters_sha256"]
        then, files = completed(Config.from_dict(about["config"])).experiment(), dict(about["fingerprints"])
        has_model = _has_model(out, parameters)
    except FileNotFoundError:
        return False
    except OSError as error:
        refusal = ConfigError(f"--out {out} cannot be read: {error.strerror}; name another folder")
        raise unanswered(error, refusal) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise ConfigError(
            f"--out {out} holds something that is not a run of this version ({type(error).__name__}: "
            f"{error}): name another folder, or pass --if-exists overwrite"
        ) from error
    if status != "finished":
        log.info("--out %s holds a run that ended early (%s): training anew", out, status)
        return False
    if if_exists == "fail":
        raise ConfigError(
            f"--out {out} holds a finished run, and --if-exists is fail: name another folder, or pass "
            f"--if-exists overwrite"
        )
    differences = _differences(then, files, config, fingerprints)
    if differences:
        raise ConfigError(
            f"--out {out} holds a finished run, but not of this: {'; '.join(differences)}. Name another "
            f"folder, or pass --if-exists overwrite"
        )
    if not has_model:
        log.info("--out %s holds a finished run of this, but not its model: training anew", out)
        return False
    log.info(
        "nothing to do: --out %s holds a finished run of this configuration, these files and this code, "
        "parameters %s", out, parameters,
    )  # fmt: skip
    return True


def _has_model(out: Location, parameters: str) -> bool:
    """Return whether the folder has the model of these parameters."""
    try:
        model = read_json(out / MODEL)
    except FileNotFoundError:
        return False
    weights = model["weights"]
    name = weights if isinstance(weights, str) else weights["name"]  # a name alone before format 5
    return bool(parameters == model["parameters_sha256"]) and (out / "model" / name).exists()


def _differences(
    then: Mapping[str, Any], files: Mapping[str, str], config: Config, fingerprints: Mapping[str, str]
) -> list[str]:
    now = completed(config).experiment()
    found = [
        f"{key} is {now.get(key)!r}, but was {then.get(key)!r}"
        for key in sorted((then.keys() | now.keys()) - set(_PATHS))
        if then.get(key) != now.get(key)
    ]
    for key in sorted(files.keys() | fingerprints.keys()):
        if files.get(key) != fingerprints.get(key):
            if key in _PATHS:
                found.append(f"the files of {key} are different ones, or were changed since ({now.get(key)})")
            elif key in now:
                if now[key] == then.get(key):  # else the difference is named already
                    found.append(f"the code of {key} was changed since ({now[key]})")
            else:
                found.append("only one of the two is a replay, or they replay different runs")
    return found
