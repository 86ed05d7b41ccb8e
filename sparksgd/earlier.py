"""What an output folder holds from an earlier run, and whether that is what is asked for now.

A nightly job that is started twice trains once; one whose data or configuration changed is refused,
so that yesterday's model is never taken for today's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, Literal

from sparksgd.config import Config
from sparksgd.errors import ConfigError
from sparksgd.participation import MODEL, RECORD, SUMMARY
from sparksgd.storage import Location, unanswered

__all__ = ["IfExists", "is_done"]

log = logging.getLogger("sparksgd")

IfExists = Literal["skip", "fail", "overwrite"]
_PATHS = ("data.train", "data.test")  # the same files may have another path: fingerprints tell


def is_done(out: Location, config: Config, fingerprints: Mapping[str, str], if_exists: IfExists) -> bool:
    """Return whether a folder holds a finished run of this configuration, these files and this code.

    Args:
        out: the folder.
        config: what is to be trained.
        fingerprints: of the files trained on and evaluated on, and of the user's code, by the key that
            names them; of what is repeated, if anything is.
        if_exists: "skip" asks this question; "fail" refuses any finished run; "overwrite" wants none.

    Raises:
        ConfigError: it holds a finished run of another configuration, other files or other code.
        ClusterError: its file system does not answer.
    """
    if if_exists == "overwrite":
        return False
    try:
        summary, record = (json.loads((out / name).read_bytes()) for name in (SUMMARY, RECORD))
        status, parameters = summary["status"], summary["parameters_sha256"]
        then, files = Config.from_dict(record["config"]).experiment(), dict(record["fingerprints"])
        has_model = _has_model(out, parameters)
    except FileNotFoundError:
        return False
    except OSError as error:
        refusal = ConfigError(f"--out {out} cannot be read: {error.strerror}; name another folder")
        raise unanswered(error, refusal) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--out {out} holds what is no run of this version ({type(error).__name__}: {error}): name "
            f"another folder, or pass --if-exists overwrite"
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
    """Return whether the model of these parameters is there."""
    try:
        model = json.loads((out / MODEL).read_bytes())
    except FileNotFoundError:
        return False
    return bool(parameters == model["parameters_sha256"]) and (out / "model" / model["weights"]).exists()


def _differences(
    then: Mapping[str, Any], files: Mapping[str, str], config: Config, fingerprints: Mapping[str, str]
) -> list[str]:
    now = config.experiment()
    found = [
        f"{key} is {now.get(key)!r}, but was {then.get(key)!r}"
        for key in sorted((then.keys() | now.keys()) - set(_PATHS))
        if then.get(key) != now.get(key)
    ]
    for key in sorted(files.keys() | fingerprints.keys()):
        if files.get(key) != fingerprints.get(key):
            if key in _PATHS:
                found.append(f"the files of {key} are others, or were changed since ({now.get(key)})")
            elif key in now:
                if now[key] == then.get(key):  # else that is told already
                    found.append(f"the code of {key} was changed since ({now[key]})")
            else:
                found.append(f"the {key} is another, or only one of them is one")
    return found
