"""What a run leaves in its folder: the model, a line per step, a summary.

model/weights.pt     state_dict, for torch.load(weights_only=True)
model/model.json     what rebuilds the module and feeds it
metrics.jsonl        a line per step and per evaluation: exact fields, then "timing"
record.json          what the run is: its configuration, and fingerprints of its data and code
summary.json         the run in one table

While a run goes on, model/ has the weights of some seconds ago, in weights-STEP.pt; model.json names the
file, so that the two always belong together, whenever the run may be killed.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import pickle
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparksgd.config import ModelConfig
from sparksgd.engines.protocol import StepReport
from sparksgd.errors import ClusterError, DataError
from sparksgd.losses import Loss, loss_named
from sparksgd.participation import METRICS, MODEL, RECORD, SUMMARY
from sparksgd.rows import Feature, RowSchema
from sparksgd.storage import Lines, Location, Seldom, location
from sparksgd.training import EvaluationReport, Training, build_module

__all__ = ["RunFolder", "SavedModel", "load_model", "save_model", "summary"]

log = logging.getLogger("sparksgd")

_FORMAT = 2
_WEIGHTS = "weights.pt"
_EARLIER = re.compile(r"weights(-\d+)?\.pt")
_SECONDS_BETWEEN_SAVES = 10.0
_SAVING_SHARE = 0.05
_NOT_WHOLE = (OSError, ValueError, RuntimeError, LookupError, TypeError, EOFError, pickle.UnpicklingError)
"""What reading half a model, or another thing, raises."""


def save_model(folder: str | Path | Location, training: Training, weights: str = _WEIGHTS) -> None:
    """Write a trained module's weights and what rebuilds it.

    Args:
        folder: made if need be.
        training: the run.
        weights: name of the file of weights.
    """
    folder = location(folder)
    state = {name: tensor.detach().clone() for name, tensor in training.module.state_dict().items()}
    stream = io.BytesIO()
    torch.save(state, stream)
    (folder / weights).write_bytes(stream.getvalue())
    schema = training.plan.schema
    about = {
        "format": _FORMAT,
        "weights": weights,
        "finished": training.is_finished,
        "model": {"name": training.model_name, "arguments": dict(training.config.model.arguments)},
        "features": [asdict(feature) for feature in schema.features],
        "label": {"name": schema.label, "dtype": schema.label_dtype, "classes": schema.classes},
        "loss": training.config.loss.name,
        "version": training.version,
        "parameters_sha256": training.flat.parameters_sha256(),
        "buffers_sha256": training.flat.buffers_sha256(),
        "state_sha256": _sha256(state),
    }
    _write_json(folder / "model.json", about)


def _sha256(state: Mapping[str, torch.Tensor]) -> str:
    """Return the digest of a whole state_dict: frozen parameters and all buffers count, too."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        values = tensor.detach().contiguous().view(-1).view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A trained module with what it takes to use it."""

    module: nn.Module
    """In evaluation mode."""

    schema: RowSchema
    """What a row must be."""

    loss: Loss
    """What it was trained with."""


def load_model(folder: str | Path | Location, module: nn.Module | None = None) -> SavedModel:
    """Read a model back; of a run that was ended early, with a warning.

    Args:
        folder: the run's model/, a path or URI.
        module: the untrained module, where it was not built from a configuration's name.

    Raises:
        DataError: the folder does not hold a whole model.
    """
    folder = location(folder)
    try:
        about = json.loads((folder / "model.json").read_bytes())
        if about["format"] != _FORMAT:
            raise DataError(f"{folder} is of format {about['format']}, but this version reads {_FORMAT}")
        state = torch.load(io.BytesIO((folder / about["weights"]).read_bytes()), weights_only=True)
        schema = RowSchema(
            features=tuple(Feature(**feature) for feature in about["features"]),
            label=about["label"]["name"],
            label_dtype=about["label"]["dtype"],
            classes=about["label"]["classes"],
        )
        if module is None:
            if about["model"]["name"] is None:
                raise DataError(f"{folder} was trained from a module given in Python: pass it as module=")
            module = build_module(ModelConfig(**about["model"]), seed=0)
        module.load_state_dict(state)
        if _sha256(state) != about["state_sha256"]:
            raise DataError(
                f"{folder}/{about['weights']} and model.json are not of one run: their digests differ"
            )
        loss = loss_named(about["loss"])
    except _NOT_WHOLE as error:
        raise DataError(f"{folder} holds no whole model: {type(error).__name__}: {error}") from error
    if not about["finished"]:
        log.warning("%s is of a run that did not finish: weights of step %d", folder, about["version"])
    return SavedModel(module=module.eval(), schema=schema, loss=loss)


def summary(training: Training, wall_s: float) -> dict[str, Any]:
    """Return the run's summary: what was reached, how fast, and what its bits depend on."""
    last = training.last_evaluation
    driver, *workers = training.numerics
    different = {str(index): w for index, w in enumerate(workers) if driver.differences(w)}
    config, changes = training.config, training.numerics_changes
    return {
        "status": "finished" if training.is_finished else f"{type(training.error).__name__}",
        "test_accuracy": None if last is None else last.accuracy,
        "test_loss": None if last is None else _finite(last.loss),
        "train_rows": training.rows.rows,
        "bad_rows_skipped": training.rows.bad.total(),
        "epochs": training.version / training.plan.sampling.steps_per_epoch,
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
        "backup_workers": config.solver.backup_workers,
        "times_dealt": 1 + training.plan.deal,
        "arrivals": training.participation.by_worker(),
    }


class RunFolder:
    """Observes a run and writes its folder.

    Args:
        folder: made if need be; the files of an earlier run in it are replaced.
        fingerprints: of the files trained on and evaluated on, and of the user's code, by the keys that
            name them.
        run_id: names the run, in its logs, too.
    """

    def __init__(
        self,
        folder: str | Path | Location,
        fingerprints: Mapping[str, str] | None = None,
        run_id: str | None = None,
    ) -> None:
        self.folder = location(folder)
        self._fingerprints = dict(fingerprints or {})
        self._run_id = run_id or uuid.uuid4().hex[:12]
        self._started = time.perf_counter()
        self._metrics: Lines | None = None
        self._saves = Seldom(_SECONDS_BETWEEN_SAVES, _SAVING_SHARE)
        self._weights: str | None = None

    def started(self, training: Training) -> None:
        """Begin metrics.jsonl; what an earlier run left goes."""
        with self._told():
            self._begin(training)

    def _begin(self, training: Training) -> None:
        for name in (SUMMARY, MODEL):
            (self.folder / name).remove()
        model = self.folder / "model"
        for file in model.files():
            if _EARLIER.fullmatch(file.path):
                (model / file.path).remove()
        record = {
            "run_id": self._run_id,
            "config": training.config.to_dict(),
            "data_digest": training.rows.data_digest,
            "fingerprints": self._fingerprints,
            "model_name": training.model_name,
        }
        _write_json(self.folder / RECORD, record)
        self._metrics = (self.folder / METRICS).lines()

    def stepped(self, training: Training, report: StepReport) -> None:
        """Write a step's line."""
        exact = {
            "kind": "step",
            "step": report.step,
            "epoch": report.epoch,
            "version": report.version,
            "rows": report.rows,
            "shards": report.shards,
            "loss": report.loss,
            "lr": report.lr,
            "deal": report.deal,
            "took_part": list(report.took_part),
        }
        workers = [
            {"worker": w.worker, "host": w.host, "rows": w.rows, "compute": w.compute_s}
            for w in sorted(report.workers, key=lambda w: w.worker)
        ]
        timing = asdict(report.timing) | {"workers": workers}
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
            "epoch": report.epoch,
            "rows": report.rows,
            "test_loss": _finite(report.loss),
            "test_accuracy": report.accuracy,
        }
        self._line(exact | {"timing": {"total": report.time_s}})
        with self._later():
            self._lines().flush()

    def ended(self, training: Training) -> None:
        """Write the model, as the last good step left it, and the summary."""
        about = {"run_id": self._run_id} | summary(training, time.perf_counter() - self._started)
        with self._told():
            try:
                with ExitStack() as each:  # what cannot be written keeps nothing else from it
                    if self._metrics is not None:
                        each.callback(self._metrics.close)
                    self._save(training, _WEIGHTS)
            except BaseException as error:
                if training.error is None:  # nobody may take it for finished
                    training.error, about["status"] = error, type(error).__name__
                raise
            finally:
                _write_json(self.folder / SUMMARY, about)

    def _keep(self, training: Training) -> None:
        """Write what a killed run should leave."""
        with self._later():
            self._lines().flush()
            if training.version < training.total_steps and self._saves.is_due():
                with self._saves.done():
                    self._save(training, f"weights-{training.version}.pt")

    @contextmanager
    def _later(self) -> Iterator[None]:
        """Let an output that does not answer be, and say so: it is asked again."""
        try:
            yield
        except OSError as error:
            log.warning("%s cannot be written now, training goes on: %s", self.folder, error.strerror)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tell what failed as an error of ours."""
        try:
            yield
        except OSError as error:
            raise ClusterError(f"--out {self.folder} cannot be written: {error.strerror}") from error

    def _save(self, training: Training, weights: str) -> None:
        before, self._weights = self._weights, weights
        save_model(self.folder / "model", training, weights)
        if before not in (None, weights):
            (self.folder / "model" / before).remove()

    def _line(self, values: dict[str, Any]) -> None:
        with self._told():
            self._lines().write(json.dumps(values) + "\n")

    def _lines(self) -> Lines:
        assert self._metrics is not None
        return self._metrics


def _finite(value: float) -> float | None:
    """Return a number that JSON has; it has neither infinity nor NaN."""
    return value if math.isfinite(value) else None


def _write_json(file: Location, values: dict[str, Any]) -> None:
    file.write_bytes((json.dumps(values, indent=2) + "\n").encode())
