"""Whether the output folder takes a checkpoint, gives it back, and lets it be removed; nothing is left."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import torch
from rich.filesize import decimal

from sparksgd.config import Config
from sparksgd.errors import SparkSGDError
from sparksgd.runs.checkpoints import CheckpointFolder
from sparksgd.runs.lease import unwritable
from sparksgd.spark.doctor.findings import Finding, bad, broken, good
from sparksgd.storage import Location, location
from sparksgd.training.checkpoint import Checkpoint, Part, RunIdentity

__all__ = ["look_at_store"]

_MOST_BYTES = 64 << 20
_UNKNOWN_BYTES = 1 << 20
_FLOAT = 4


def look_at_store(out: str, state_bytes: int | None) -> Iterator[Finding]:
    """Write, read and remove a checkpoint in a folder of its own below the output folder.

    Args:
        out: the folder of a run, a path or URI.
        state_bytes: of what a checkpoint of the run would have; 64 MiB of it are written at most; None:
            not known, and 1 MiB is written.
    """
    place, started = location(out), time.perf_counter()
    folder = place / f"doctor-{uuid.uuid4().hex[:8]}"
    values = torch.rand(-(-min(state_bytes or _UNKNOWN_BYTES, _MOST_BYTES) // _FLOAT))
    with ExitStack() as stack:
        try:
            for one in reversed([folder for folder in place.with_parents() if not folder.exists()]):
                stack.callback(_removed, one)
            stack.callback(_removed, folder)
            checkpoints = _checkpoints(folder)
            name = checkpoints.write(
                Checkpoint(step=0, turns=0, parts={"solver": Part(version=1, values={"parameters": values})})
            )
            written_s = time.perf_counter() - started
            stack.callback(checkpoints.remove, name)
            read = checkpoints.read(name).values("solver")["parameters"]
            read_s = time.perf_counter() - started - written_s
            checkpoints.remove(name)
            left = folder.names()
        except OSError as error:
            yield broken("--out", unwritable(place, error, "--out"), "name another folder")
            return
    size = decimal(values.nbytes)
    if not torch.equal(read, values):
        yield bad("--out", f"{place} gave back another checkpoint than was written", "name another folder")
    elif left:
        yield bad(
            "--out", f"{place} keeps what is removed: {', '.join(left)}", "name a folder you may delete in"
        )
    else:
        times = f"written in {written_s:.2f} s, read in {read_s:.2f} s, and removed"
        yield good("--out", f"a checkpoint of {size} {times}: {place}")


def _checkpoints(folder: Location) -> CheckpointFolder:
    about = {"run_id": "doctor", "config": Config().to_dict(), "fingerprints": {}}
    checkpoints = CheckpointFolder(folder, about)
    checkpoints.begin(RunIdentity(experiment={}, data_digest="", total_turns=0, turns_per_epoch=1))
    return checkpoints


def _removed(folder: Location) -> None:
    """Remove a folder if it is empty; what cannot be removed was told before."""
    with suppress(OSError, SparkSGDError):
        folder.remove_folder()
