"""What an output folder holds when a run begins, and what follows from it.

    holds                             --if-exists skip             fail            overwrite   archive
    nothing                           begin                        begin           begin       begin
    a finished run of this            nothing to do                refuse          begin       nothing to do
    this, its model damaged or gone   go on                        refuse          begin       go on
    this, finished with fewer epochs  go on                        refuse          begin       go on
    this, finished, other test rows   go on                        refuse          begin       go on
    this, ended early                 go on                        go on           begin       go on
    a run of anything else            refuse                       refuse          begin       move it aside
    what is no run of ours            refuse                       refuse          begin       move it aside

A run that goes on without a whole checkpoint begins anew.  From the one of its end it makes no more steps,
and writes its model again.  Other test rows are evaluated with that model, unless evaluations shaped its
parameters: then it is a run of anything else, and so is one without a checkpoint.  Sizes and digests of the
model's files are checked before there is nothing to do.

So a nightly job that is started twice trains once, one that was killed goes on, and nobody takes yesterday's
model for today's.  --resume never begins anew where the table says go on; --resume must refuses what is
neither going on nor done; --resume FOLDER goes on from the checkpoints of another folder.

Where YARN starts an application again, its run is there already: overwrite and fail are read as skip, and
--resume never as auto.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparksgd.config import Config
from sparksgd.errors import ConfigError, DataError, SparkSGDError
from sparksgd.imports import shortened, shown
from sparksgd.runs.asked import Asked, IfExists
from sparksgd.runs.checked_files import FileEntry, checked_bytes, read_unlisted
from sparksgd.runs.checkpoints import Manifest, manifests, of_this
from sparksgd.runs.compared_keys import PATHS, differences, free_keys
from sparksgd.runs.json_files import read_about_run, read_record
from sparksgd.runs.manifest import read_manifest
from sparksgd.runs.names import CHECKPOINTS, METRICS, MODEL, RUN, SUMMARY, TRACE
from sparksgd.storage import Location, location, unanswered
from sparksgd.storage.metrics_lines import metrics_lines

__all__ = ["Found", "earlier_run", "resumable", "with_more_steps"]

log = logging.getLogger("sparksgd")


@dataclass(frozen=True, kw_only=True)
class Found:
    """What follows from what an output folder holds."""

    is_done: bool = False
    """There is nothing to do."""

    archives: bool = False
    """What it holds is to be moved aside first."""

    starts: Sequence[Manifest] = ()
    """The checkpoints that the run may go on from, the last one first; empty: it begins anew."""

    origin: Location | None = None
    """The folder of the run that they are of."""

    last_step: int = 0
    """The last step of the run that they are of."""


def earlier_run(out: Location, asked: Asked) -> Found:
    """Look into an output folder.

    Raises:
        ConfigError: it holds something that is to be kept, or nothing to go on with where that is a must.
        ClusterError: its file system does not answer.
    """
    asked = _asked_again(out, asked)
    if asked.resume not in ("auto", "never", "must"):
        found = _own_run(out, asked, goes_on=True)
        return found if found.is_done else _from_elsewhere(out, asked, found)
    found = _own_run(out, asked, goes_on=asked.resume != "never")
    if asked.resume == "must" and not (found.is_done or found.starts):
        raise ConfigError(
            f"--resume must, but --out {out} holds no run of this with a checkpoint: name its folder, or "
            f"leave --resume out to begin anew"
        )
    return found


def resumable(folder: Location, config: Config, fingerprints: Mapping[str, str], called: str) -> Found:
    """Return the checkpoints of a folder that a run may go on from.

    Args:
        folder: of a run.
        config: what is to be trained.
        fingerprints: see `Asked`.
        called: how errors call the folder.

    Raises:
        ConfigError: there is none, or they are of another configuration, other files or other code.
        ClusterError: its file system does not answer.
    """
    with_checkpoints = _manifests(folder, called)
    if not with_checkpoints:
        raise ConfigError(
            f"{called} {folder} holds no whole checkpoint: name the folder of a run that has made some steps"
        )
    then = with_checkpoints[0].values
    unknown = {key for key in PATHS if (key in then["fingerprints"]) != (key in fingerprints)}
    free = free_keys(config) | unknown  # rows have a digest, too
    different = differences(then, config, fingerprints, free=free)
    if different:
        raise ConfigError(
            f"{called} {folder} holds a run, but not of this: {'; '.join(different)}. Name the folder of "
            f"another run, or begin anew"
        )
    starts = of_this(with_checkpoints, config, fingerprints, free=free)
    return Found(starts=starts, origin=folder, last_step=_last_step(folder))


def with_more_steps(one: Found, other: Found) -> Found:
    """Return which of two runs of the same has made more steps: a job that is submitted again goes on with
    its own."""
    made = [found.starts[0].step if found.starts else -1 for found in (one, other)]
    return one if made[0] >= made[1] else other


def _asked_again(out: Location, asked: Asked) -> Asked:
    """Return what is asked; a later attempt of an application keeps what an earlier one trained."""
    if asked.attempt is None or not _is_of_earlier_attempt(out, *asked.attempt):
        return asked
    if_exists: IfExists = "skip" if asked.if_exists in ("overwrite", "fail") else asked.if_exists
    resume = "auto" if asked.resume == "never" else asked.resume
    if (if_exists, resume) != (asked.if_exists, asked.resume):
        log.info(
            "--out %s holds the run of an earlier attempt of %s: what --if-exists %s and --resume %s ask for "
            "was done then", out, asked.attempt[0], asked.if_exists, asked.resume,
        )  # fmt: skip
    return replace(asked, if_exists=if_exists, resume=resume)


def _is_of_earlier_attempt(out: Location, application: str, attempt: int) -> bool:
    try:
        of_run, before = read_about_run(out)["attempt"]
        return bool(of_run == application and before < attempt)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unreadable(out, error) from error
    except (ValueError, LookupError, TypeError):
        return False


def _unreadable(out: Location, error: OSError) -> SparkSGDError:
    refusal = ConfigError(f"--out {out} cannot be read: {error.strerror}; name another folder")
    return unanswered(error, refusal)


def _from_elsewhere(out: Location, asked: Asked, found: Found) -> Found:
    """Return what follows where --resume names a folder."""
    start = resumable(location(asked.resume), asked.config, asked.fingerprints, "--resume")
    if found.archives and (out / CHECKPOINTS / f"{start.starts[0].name}.json").exists():
        raise ConfigError(
            f"--resume {asked.resume} is --out itself, which --if-exists archive would move away: name "
            f"another --out, or leave --resume out"
        )
    return replace(with_more_steps(found, start), archives=found.archives)


def _own_run(out: Location, asked: Asked, *, goes_on: bool) -> Found:
    """Return what follows from what --out itself holds."""
    if asked.if_exists == "overwrite":
        return Found()
    try:
        about, summary = _about(out), _summary(out)
        _require_one_run(about, summary)
        strays = [] if about else [name for name in (SUMMARY, MODEL, METRICS, TRACE) if (out / name).exists()]
    except OSError as error:
        raise _unreadable(out, error) from error
    except (ValueError, LookupError, TypeError, AttributeError, ConfigError) as error:
        why = f"{type(error).__name__}: {shortened(str(error), 400)}"
        what = f"something that is not a run of this version, or is damaged ({why})"
        return _kept(out, asked, what)
    try:
        with_checkpoints = _manifests(out, "--out") if goes_on else []
    except DataError as error:
        return _kept(out, asked, f"a run whose checkpoints cannot be read ({error})")
    if about is None and not with_checkpoints:
        if strays:
            return _kept(out, asked, f"{' and '.join(strays)}, but no {RUN}: that is no run of this version")
        return Found()
    is_finished = summary is not None and summary["status"] == "finished"
    then = about or with_checkpoints[0].values
    different = differences(then, asked.config, asked.fingerprints)
    if is_finished and asked.if_exists == "fail":
        raise ConfigError(
            f"--out {out} holds a finished run, and --if-exists is fail: name another folder, or pass "
            f"--if-exists overwrite"
        )
    if is_finished and not different:
        damage = _damage(out, summary)
        if damage is None:
            log.info(
                "nothing to do: --out %s holds a finished run of this configuration, these files and this "
                "code, parameters %s", out, summary["parameters_sha256"],
            )  # fmt: skip
            return Found(is_done=True)
        log.warning("--out %s holds a finished run of this, but not its model: %s", out, damage)
    newest = with_checkpoints[0].values if with_checkpoints else then
    free = free_keys(asked.config)
    if is_finished and not with_checkpoints:
        free = frozenset()  # to train it anew would lose what is there
    elif is_finished and not ("data.test" in asked.fingerprints and _is_of_the_end(with_checkpoints[0])):
        free -= {"data.test"}
    different = differences(newest, asked.config, asked.fingerprints, free=free)
    if different:
        what = "a finished run" if is_finished else f"a run that ended early ({_status(summary)})"
        return _kept(out, asked, f"{what}, but not of this: {'; '.join(different)}")
    starts = of_this(with_checkpoints, asked.config, asked.fingerprints, free=free)
    return _going_on(out, asked, summary, starts, goes_on=goes_on)


def _is_of_the_end(manifest: Manifest) -> bool:
    """Return whether no step of its run is left to be made after a checkpoint."""
    return bool(manifest.turns == manifest.values["total_turns"])


def _going_on(
    out: Location, asked: Asked, summary: Any, starts: Sequence[Manifest], *, goes_on: bool
) -> Found:
    """Return that a run of this goes on, or that it begins anew, and say why.

    One that must go on is refused if it cannot.

    Raises:
        ConfigError: it must go on, but has no checkpoint.
    """
    if starts:
        return Found(starts=starts, origin=out, last_step=_last_step(out))
    if _status(summary) == "finished":
        why = "finished, but without its model"
    else:
        why = f"ended early ({_status(summary)})"
    why += ", and --resume is never" if not goes_on else ", without a checkpoint"
    if asked.resume == "must":
        raise ConfigError(
            f"--resume must, but --out {out} holds a run of this that {why}: leave --resume out to train anew"
        )
    log.info("--out %s holds a run of this that %s: training anew", out, why)
    return Found()


def _kept(out: Location, asked: Asked, what: str) -> Found:
    """Refuse to write over what a folder holds; or say that it is to be moved aside."""
    if asked.if_exists == "archive":
        return Found(archives=True)
    raise ConfigError(
        f"--out {out} holds {what}. Name another folder, or pass --if-exists archive to keep it beside "
        f"as NAME.1, or --if-exists overwrite"
    )


def _about(out: Location) -> Any:
    """Return what run.json says, if it is there."""
    try:
        about = read_about_run(out)
    except FileNotFoundError:
        return None
    return {
        "config": Config.from_dict(about["config"]).to_dict(),
        "fingerprints": dict(about["fingerprints"]),
        "run_id": about.get("run_id"),
    }


def _summary(out: Location) -> Any:
    """Return what summary.json says, if it is there."""
    try:
        summary = read_record(out / SUMMARY)
    except FileNotFoundError:
        return None
    return {key: str(summary[key]) for key in ("status", "parameters_sha256")} | {
        "run_id": summary.get("run_id")
    }


def _require_one_run(about: Any, summary: Any) -> None:
    """Refuse a summary that was put beside another run's description.

    Raises:
        ValueError: it is of another run.
    """
    runs = [None if each is None else each["run_id"] for each in (about, summary)]
    if None not in runs and runs[0] != runs[1]:
        raise ValueError(f"{RUN} is of run {shown(runs[0])}, but {SUMMARY} is of run {shown(runs[1])}")


def _status(summary: Any) -> str:
    return "killed" if summary is None else str(summary["status"])


def _manifests(folder: Location, called: str) -> list[Manifest]:
    try:
        return manifests(folder / CHECKPOINTS, called)
    except OSError as error:
        refusal = ConfigError(f"{folder} cannot be read: {error.strerror}; name another folder")
        raise unanswered(error, refusal) from error


def _last_step(folder: Location) -> int:
    """Return the last step that a run's metrics have; 0 if they have none, or cannot be read."""
    try:
        steps = (line for line in metrics_lines(folder / METRICS) if line["kind"] == "step")
        return max((int(step["step"]) for step in steps), default=0)
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def _damage(out: Location, summary: Any) -> str | None:
    """Return why the model of a run's last parameters cannot be loaded; None: it can."""
    folder = out / "model"
    try:
        manifest = read_manifest(folder)
        if manifest.fields["parameters_sha256"] != summary["parameters_sha256"]:
            return f"{out / MODEL} is of other parameters than {SUMMARY}"
        for file in (manifest.weights, manifest.constants):
            if isinstance(file, FileEntry):  # to parse it may need code that was not imported yet
                checked_bytes(folder, file)
            elif file is not None:  # before format 5
                read_unlisted(folder, file)
    except DataError as error:
        return str(error)
    return None
