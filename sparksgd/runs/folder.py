"""What a run writes to its folder: the model, a line for each step, a summary.

checkpoints/         the state of the run, so that it can go on (checkpoints.py)
model/weights.pt     state_dict, for torch.load(weights_only=True)
model/constants.pt   tensors and plain values that are in no state_dict, by path, if there are any
model/model.json     how to rebuild the module, and which columns feed it
metrics.jsonl        a line for each step and each evaluation: exact fields, then "timing"
run.json             the configuration, and fingerprints of the data and the code; with a digest of all fields
trace.jsonl          what chance decided, if anything was chance
summary.json         the run in one table, with a digest of all fields; sizes and digests of metrics and trace

During a run, model/ has the weights of some seconds ago, in weights-STEP.pt.  model.json names this file, so
that the two always match, even if the run is killed.

One run at a time writes to a folder: it holds the lease of it, in .lease-NUMBER.json (see `lease.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any

from sparksgd.config import Config
from sparksgd.engines.protocol import StepReport, VirtualCost
from sparksgd.engines.trace import TraceEvent, event_line, first_line
from sparksgd.errors import ClusterError, DataError
from sparksgd.runs.checkpoints import CheckpointFolder, trained_anew
from sparksgd.runs.earlier import Found
from sparksgd.runs.growing import Growing, Kept
from sparksgd.runs.holder import Holder, attempt_here
from sparksgd.runs.json_files import finite, write_record
from sparksgd.runs.lease import IfRunning, Lease, remove_leases, unwritable
from sparksgd.runs.model import check_saved, constants_beside, model_of, save_model
from sparksgd.runs.names import CHECKPOINTS, METRICS, MODEL, RUN, RUN_BEFORE, SUMMARY, TRACE, WEIGHTS
from sparksgd.solvers.protocol import CHANCES
from sparksgd.solvers.rules import family_of
from sparksgd.storage import Location, Throttle, location, remove_parts
from sparksgd.storage.reading import read_beginning
from sparksgd.training.state import NO_RESULTS, EvaluationReport, Observer, Training
from sparksgd.training.value_rules import TEXT, WHOLE, MapOf, Table

__all__ = ["RunFolder", "summary"]

log = logging.getLogger("sparksgd")

_WEIGHTS_OF_A_RUN = re.compile(r"(weights|constants)(-\d+)?\.pt")
_SECONDS_BETWEEN_SAVES = 10.0
_SAVING_SHARE = 0.05


def summary(training: Training, wall_s: float) -> dict[str, Any]:
    """Return the run's summary: its result, its speed, and what its bits depend on."""
    last = training.last_evaluation
    driver, *workers = training.numerics
    different = {str(index): w for index, w in enumerate(workers) if driver.differences(w)}
    config, changes = training.config, training.numerics_changes
    came = training.participation
    return {
        "status": _status(training),
        **({"stopped_by": training.stopped_by} if training.stopped_by is not None else {}),
        **({"best_step": training.restored.step} if training.restored else {}),
        **(NO_RESULTS if last is None else _finite_results(last)),
        "train_rows": training.rows.rows,
        "bad_rows_skipped": training.rows.bad.total(),
        "epochs": training.turns / training.plan.sampling.turns_per_epoch,
        "steps": training.version,
        "rows_per_second": training.step_times.rows_per_second,
        "wall_s": wall_s,
        "engine": training.engine,
        "step_mode": training.mode,
        "num_workers": len(workers),
        "num_shards": config.train.num_shards,
        "rows_per_step": config.train.rows_per_step,
        "parameters": training.flat.parameters.numel(),
        "parameters_sha256": training.flat.parameters_sha256(),
        "buffers_sha256": training.flat.buffers_sha256(),
        "data_digest": training.rows.data_digest,
        "numerics": asdict(driver)
        | ({"workers": {index: asdict(w) for index, w in different.items()}} if different else {})
        | ({"changes": [asdict(change) for change in changes]} if changes else {}),
        "retried_steps": training.recovery.retries,
        "rebuilt_shards": training.recovery.rebuilt_shards,
        "strangers": training.recovery.strangers,
        "sent_bytes_per_worker_step": training.sent_bytes_per_worker_step,
        "start_up_s": training.start_up.seconds(),
        "step_time_s": training.step_times.medians_s(),
        "solver": config.solver.name,
        "turns": training.turns,
        "backup_workers": config.solver.arguments.get("backup_workers", 0),
        "times_dealt": 1 + training.plan.deal,
        **({"resumed": [asdict(each) for each in training.resumed]} if training.resumed else {}),
        "arrivals": training.participation.by_worker(),
        **({"staleness": dict(sorted(came.staleness.items()))} if came.staleness else {}),
        **({"ignored_messages": came.ignored} if came.staleness else {}),
        **(
            {}
            if (server := came.server()) is None
            else {"server": server | {"lost_workers": came.lost_workers}}
        ),
        **({} if training.virtual_s is None else _virtual_end(training, training.virtual_s)),
    }


def _finite_results(report: EvaluationReport) -> dict[str, float | None]:
    return {name: None if value is None else finite(value) for name, value in report.named().items()}


def _virtual_end(training: Training, virtual_s: float) -> dict[str, float]:
    lost_workers = training.participation.lost_workers
    return {"virtual_s": virtual_s, "sent_bytes": training.sent_bytes, "lost_workers": lost_workers}


def _virtual(cost: VirtualCost) -> dict[str, float]:
    lost = {"lost_workers": cost.lost_workers} if cost.lost_workers else {}
    return {"virtual_s": cost.ends_s, "sent_bytes": cost.sent_bytes, **lost}


def _status(training: Training) -> str:
    if training.error is not None:
        return type(training.error).__name__
    return "finished" if training.is_finished else "stopped"


class RunFolder(Observer):
    """Observes a run and writes its folder; holds its lease during the run, or as long as `held` says.

    Args:
        folder: created if it does not exist; the files of an earlier run in it are replaced.
        fingerprints: of the data files and of the user's code, by the keys that name them.
        run_id: names the run, also in its logs.
        called: how errors call the folder: as the caller's argument or option.
    """

    def __init__(
        self,
        folder: str | Path | Location,
        fingerprints: Mapping[str, str] | None = None,
        run_id: str | None = None,
        called: str = "out",
    ) -> None:
        self.folder, self._called = location(folder), called
        self.fingerprints = dict(fingerprints or {})
        self.run_id = run_id or uuid.uuid4().hex[:12]
        self._started = time.perf_counter()
        self._metrics: Growing | None = None
        self._trace: Growing | None = None
        self._recalled: dict[str, Kept] = {}
        self._origin: Location | None = None
        self._archives = False
        self._checkpoints: CheckpointFolder | None = None
        self._events = self._deal = 0
        self._saves = Throttle(_SECONDS_BETWEEN_SAVES, _SAVING_SHARE)
        self._weights: str | None = None
        self._is_held = False
        self._lease: Lease
        self._unwritable: OSError | None = None
        self._run = ExitStack()
        self._steps: int | None = None

    def after_interruption(self) -> str:
        """Return where the run ended, and what the same command will do."""
        if self._steps is None:
            return "before the first step"
        last = None if self._checkpoints is None else self._checkpoints.last
        if last is None:
            return f"at step {self._steps}, and there is no checkpoint: the same command begins anew"
        return f"at step {self._steps}: the same command goes on from step {last}"

    @contextmanager
    def held(self, if_running: IfRunning = "refuse") -> Iterator[None]:
        """Let no other run write to the folder during the block.

        A folder that cannot be written is refused by `require_writable` alone: a finished run can be read in
        it.

        Args:
            if_running: what to do if another run holds it: "wait" for its end, or "refuse".

        Raises:
            ConfigError: another run holds it.
        """
        lease, place = Lease(self.folder, Holder.here(self.run_id), called=self._called), self.folder
        self._lease = lease
        with ExitStack() as stack:
            try:
                stack.enter_context(lease.held(if_running))
                for folder in (place, place / "model", place / CHECKPOINTS):
                    remove_parts(folder)
                self.folder = place.patient().guarded(lease.check)
            except OSError as error:
                self._unwritable = error
            self._is_held = True
            try:
                yield
            finally:
                self.folder, self._is_held, self._unwritable = place, False, None

    def require_writable(self) -> None:
        """Refuse, before hours of training, a folder that its results could not go to; it must be held.

        Raises:
            ConfigError: nothing can be written there.
            ClusterError: its file system does not answer.
        """
        error = self._unwritable
        if error is not None:
            raise unwritable(self.folder, error, self._called) from error

    def move_aside(self) -> None:
        """Rename what is there to NAME.1, or the first number that is free; the folder stays held.

        A link that leads to it stays, and leads to the new folder.

        Raises:
            ClusterError: it cannot be moved; or another run holds the folder now.
        """
        with self._told():
            aside = self.folder.moved_aside()
            self._lease.take_along()
            remove_leases(location(aside))  # they came along
        log.info("%s %s held another run: it is in %s now", self._called, self.folder, aside)

    def checkpoints(self, config: Config, found: Found) -> CheckpointFolder:
        """Return where the run's checkpoints go, and the one that it goes on from.

        Args:
            config: of the run.
            found: what its folder, or another, holds of it.
        """
        about = {"run_id": self.run_id, "config": config.to_dict(), "fingerprints": self.fingerprints}
        self._origin, self._archives = found.origin, found.archives
        self._checkpoints = CheckpointFolder(
            self.folder / CHECKPOINTS, about, found.starts, found.last_step, called=self._called
        )
        return self._checkpoints

    def memory(self) -> dict[str, Any]:
        """Return how far the files have grown; others can read that much from now on."""
        files = {METRICS: self._metrics, TRACE: self._trace}
        grown = {name: file.memory() for name, file in files.items() if file is not None}
        return {"files": grown, "events": self._events, "deal": self._deal}

    def recall(self, memory: dict[str, Any]) -> None:
        """Let the files go on where they were.

        Raises:
            DataError: it is nothing that `memory` returned.
        """
        file = Table({"bytes": WHOLE, "sha256": TEXT})
        Table({"files": MapOf(TEXT, file), "events": WHOLE, "deal": WHOLE})(memory, "observers.RunFolder")
        self._recalled = {
            name: Kept(**memory["files"][name]) for name in (METRICS, TRACE) if name in memory["files"]
        }
        self._events, self._deal = memory["events"], memory["deal"]
        if self._events and TRACE not in self._recalled:
            raise DataError(f"observers.RunFolder counts {self._events} events, but has no {TRACE}")

    def started(self, training: Training) -> None:
        """Remove the files of an earlier run, or go on with them, and begin metrics.jsonl."""
        with ExitStack() as unless_begun, self._told():
            if not self._is_held:
                unless_begun.enter_context(self.held())
                self.require_writable()
            if self._archives:  # not before: a run that is refused must not take the model before it away
                self._archives = False
                self.move_aside()
            kept = {name: self._kept(name, about) for name, about in self._recalled.items()}
            if training.resumed and METRICS not in kept:
                log.warning("the checkpoint says nothing of %s: it begins after its step", METRICS)
            self._begin(training, kept)
            self._run = unless_begun.pop_all()

    def _kept(self, name: str, about: Kept) -> bytes:
        """Return the part of a file that belongs to the checkpoint.

        Raises:
            DataError: it holds something else.
        """
        file = (self._origin or self.folder) / name
        way_out = "Restore it, or move it away: then the run goes on without those lines"
        if name == TRACE:  # the run could not be replayed, nor could its end be checked
            way_out = f"Restore it, or {trained_anew(self._called)}"
        try:
            kept = read_beginning(file, about.bytes)
        except FileNotFoundError as error:
            if name == TRACE:
                raise DataError(
                    f"{file} is not there, but says who took part in the steps before the checkpoint: "
                    f"without it nobody could replay the run. {way_out}"
                ) from error
            log.warning("%s is not there: it begins after the checkpoint's step", file)
            return b""
        if (len(kept), hashlib.sha256(kept).hexdigest()) != (about.bytes, about.sha256):
            raise DataError(
                f"{file} is damaged: its first {about.bytes:,} bytes are not those that the run wrote "
                f"before its checkpoint. {way_out}"
            )
        return kept

    def _begin(self, training: Training, kept: Mapping[str, bytes]) -> None:
        for name in (SUMMARY, RUN_BEFORE) if training.resumed else (SUMMARY, MODEL, TRACE, RUN_BEFORE):
            (self.folder / name).remove()
        if self._checkpoints is not None and not training.resumed:
            self._checkpoints.clear()
        if not training.resumed:
            self._remove_weights()
        about = {
            "run_id": self.run_id,
            "config": training.config.to_dict(),
            "data_digest": training.rows.data_digest,
            "test_digest": None if training.test_rows is None else training.test_rows.data_digest,
            "fingerprints": self.fingerprints,
            "model_name": training.model_name,
            "attempt": attempt_here(),
        }
        write_record(self.folder / RUN, about)
        self._metrics = Growing(self.folder / METRICS, kept.get(METRICS, b""))
        if TRACE in kept:
            self._trace = Growing(self.folder / TRACE, kept[TRACE])

    def _remove_weights(self, but: Sequence[str] = ()) -> None:
        model = self.folder / "model"
        for file in model.files():
            if _WEIGHTS_OF_A_RUN.fullmatch(file.path) and file.path not in but:
                (model / file.path).remove()

    def stepped(self, training: Training, report: StepReport) -> None:
        """Write the line of a step; before it, what chance decided."""
        if report.trace and training.needs & CHANCES:  # else every shard takes part in every step
            self._write_trace(training, report)
        exact = {
            "kind": "step",
            "step": report.step,
            "turn": report.turn,
            "epoch": report.epoch,
            "version": report.version,
            "rows": report.rows,
            **({"weight": report.weight} if report.weight != report.rows else {}),
            "shards": report.shards,
            "loss": report.loss,
            "lr": report.lr,
            "deal": report.deal,
            "took_part": list(report.took_part),
            **({"staleness": list(report.staleness)} if report.staleness else {}),
            **({"ignored": report.ignored} if report.ignored else {}),
            **(_virtual(report.virtual) if report.virtual else {}),
        }
        workers = [
            {"worker": w.worker, "host": w.host, "rows": w.rows, "compute": w.compute_s}
            for w in sorted(report.workers, key=lambda w: w.worker)
        ]
        timing = asdict(report.timing) | {"workers": workers}
        if report.server is not None:
            timing |= {"server": asdict(report.server)}
        if report.arrivals:
            timing |= {"late": list(report.late), "arrivals": [asdict(one) for one in report.arrivals]}
        self._line(exact | {"timing": timing})
        if report.step == training.version:
            self._keep(training)

    def evaluated(self, training: Training, report: EvaluationReport) -> None:
        """Write an evaluation's line."""
        exact = {
            "kind": "evaluation",
            "step": report.step,
            "turn": report.turn,
            "epoch": report.epoch,
            "rows": report.rows,
            **_finite_results(report),
        }
        self._line(exact | {"timing": {"total": report.time_s}})
        with self._later():
            self._lines().flush()

    def ended(self, training: Training) -> None:
        """Write the model, as the last good step left it, and the summary."""
        self._steps = training.version
        about = {"run_id": self.run_id} | summary(training, time.perf_counter() - self._started)
        with self._run, self._told():
            try:
                with ExitStack() as each:  # if one cannot be written, the others still are
                    for lines in (self._trace, self._metrics):
                        if lines is not None:
                            each.callback(lines.close)
                    self._save(training, WEIGHTS)
                if training.error is None:
                    check_saved(self.folder / "model", training)
            except BaseException as error:
                if training.error is None:  # so that nobody takes it for finished
                    training.error, about["status"] = error, type(error).__name__
                raise
            finally:
                files = {METRICS: self._metrics, TRACE: self._trace}
                about["files"] = {
                    name: asdict(file.kept()) for name, file in files.items() if file and file.is_known
                }
                write_record(self.folder / SUMMARY, about)

    def _keep(self, training: Training) -> None:
        """Write what must be there if the run is killed."""
        with self._later():
            if self._trace is not None:
                self._trace.flush()
            self._lines().flush()
            if not training.is_over and self._saves.is_due():
                with self._saves.done():
                    self._save(training, f"weights-{training.version}.pt")

    @contextmanager
    def _later(self) -> Iterator[None]:
        """Warn if the output does not answer; it is asked again later."""
        try:
            yield
        except OSError as error:
            log.warning("%s cannot be written now, but training goes on: %s", self.folder, error.strerror)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn an OSError into an error of ours."""
        try:
            yield
        except OSError as error:
            is_full = error.errno in (ENOSPC, EDQUOT)
            full = "; free some space, and run the same command again" if is_full else ""
            raise ClusterError(
                f"{self._called} is {self.folder}, which cannot be written: {error.strerror}{full}"
            ) from error

    def _save(self, training: Training, weights: str) -> None:
        before, self._weights = self._weights, weights
        save_model(self.folder / "model", model_of(training), weights)
        if before != weights:
            self._remove_weights(but=(weights, constants_beside(weights)))

    def _write_trace(self, training: Training, report: StepReport) -> None:
        """Write the events of a step to the trace; the first ones begin the file."""
        events = list(report.trace)
        if report.deal != self._deal:
            first = next(number for number, event in enumerate(events) if event.version == report.version)
            deal = TraceEvent(kind="deal", turn=events[first].turn, version=report.version)
            events[first:first] = [deal] * (report.deal - self._deal)
            self._deal = report.deal
        with self._told():
            if self._trace is None:
                self._trace = Growing(self.folder / TRACE)
                self._trace.write(first_line(family_of(training.config.solver)) + "\n")
            first, self._events = self._events, self._events + len(events)
            lines = [event_line(first + number, event) + "\n" for number, event in enumerate(events)]
            self._trace.write("".join(lines))

    def _line(self, values: dict[str, Any]) -> None:
        with self._told():
            self._lines().write(json.dumps(values) + "\n")

    def _lines(self) -> Growing:
        assert self._metrics is not None
        return self._metrics
