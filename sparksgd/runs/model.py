"""A trained model in a folder: its weights, how to rebuild the module, and which columns feed it.

weights.pt    state_dict, for torch.load(weights_only=True)
model.json    the module's name and arguments, the schema of a row, digests
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from sparksgd.config import ModelConfig
from sparksgd.data.schema import Feature, RowSchema
from sparksgd.errors import DataError
from sparksgd.losses import Loss, loss_named
from sparksgd.runs.json_files import write_json
from sparksgd.runs.names import WEIGHTS
from sparksgd.storage import Location, location
from sparksgd.training.modules import build_module

if TYPE_CHECKING:  # to load a model needs nothing of the training
    from sparksgd.training.state import Training

__all__ = ["SavedModel", "load_model", "save_model"]

log = logging.getLogger("sparksgd")

_FORMAT = 2
_NOT_WHOLE = (OSError, ValueError, RuntimeError, LookupError, TypeError, EOFError, pickle.UnpicklingError)
"""What it raises to read an incomplete model, or something else."""


def save_model(folder: str | Path | Location, training: Training, weights: str = WEIGHTS) -> None:
    """Write the weights of a trained module, and how to rebuild it.

    Args:
        folder: created if it does not exist.
        training: the run.
        weights: the name of the file of weights.
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
    write_json(folder / "model.json", about)


def _sha256(state: Mapping[str, torch.Tensor]) -> str:
    """Return the digest of a whole state_dict, with frozen parameters and all buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        values = tensor.detach().contiguous().view(-1).view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A trained module, and what is needed to use it."""

    module: nn.Module
    """In evaluation mode."""

    schema: RowSchema
    """What a row must be."""

    loss: Loss
    """The loss that it was trained with."""


def load_model(folder: str | Path | Location, module: nn.Module | None = None) -> SavedModel:
    """Load a model; warn if its run did not finish.

    Args:
        folder: the folder model/ of a run, a path or URI.
        module: the untrained module, if the run did not build it from a name in its configuration.

    Raises:
        DataError: the folder does not hold a complete model.
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
                f"{folder}/{about['weights']} and model.json are of different runs: their digests differ"
            )
        loss = loss_named(about["loss"])
    except _NOT_WHOLE as error:
        raise DataError(f"{folder} holds no complete model: {type(error).__name__}: {error}") from error
    if not about["finished"]:
        log.warning("%s is of a run that did not finish: weights of step %d", folder, about["version"])
    return SavedModel(module=module.eval(), schema=schema, loss=loss)
