"""A trained model in a folder: its weights, how to rebuild the module, and which columns feed it.

weights.pt      state_dict, for torch.load(weights_only=True)
constants.pt    tensors and numbers that are in no state_dict, by path, if there are any
model.json      the module's name, arguments and seed, the schema of a row, digests
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
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparksgd.arithmetic.changes import bits
from sparksgd.config import ModelConfig
from sparksgd.data.schema import Feature, RowSchema
from sparksgd.errors import DataError, ModelError
from sparksgd.losses import Loss, loss_named
from sparksgd.runs.json_files import write_json
from sparksgd.runs.names import WEIGHTS
from sparksgd.storage import Location, location
from sparksgd.training.modules import build_module
from sparksgd.training.saved_state import (
    SavedState,
    differing_numbers,
    differing_tensors,
    load_state,
    saved_state,
)

if TYPE_CHECKING:  # to load a model needs nothing of the training
    from sparksgd.training.state import Training

__all__ = ["SavedModel", "constants_beside", "load_model", "save_model"]

log = logging.getLogger("sparksgd")

_FORMAT = 3
_STILL_READ = (2, _FORMAT)  # 2 had no constants, and built the module from seed 0
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
    if training.numbers_to_save is None:
        training.numbers_to_save = _tried(training)
    saved = saved_state(training.module, training.numbers_to_save)
    constants = constants_beside(weights)
    _write(folder / weights, saved.state)
    if saved.constants:
        _write(folder / constants, saved.constants)
    schema = training.plan.schema
    about = {
        "format": _FORMAT,
        "weights": weights,
        "constants": constants if saved.constants else None,
        "finished": training.is_finished,
        "model": {"name": training.model_name, "arguments": dict(training.config.model.arguments)},
        "seed": training.config.train.seed,
        "features": [asdict(feature) for feature in schema.features],
        "label": {"name": schema.label, "dtype": schema.label_dtype, "classes": schema.classes},
        "loss": training.config.loss.name,
        "version": training.version,
        "parameters_sha256": training.flat.parameters_sha256(),
        "buffers_sha256": training.flat.buffers_sha256(),
        "state_sha256": _sha256(saved.state),
        "constants_sha256": _sha256(saved.constants),
    }
    write_json(folder / "model.json", about)


def constants_beside(weights: str) -> str:
    """Return the name of the file of what a file of weights leaves out, if there is anything.

    >>> constants_beside("weights-500.pt")
    'constants-500.pt'
    """
    return weights.replace("weights", "constants", 1)


def _write(file: Location, values: Mapping[str, Any]) -> None:
    stream = io.BytesIO()
    torch.save(dict(values), stream)
    file.write_bytes(stream.getvalue())


def _tried(training: Training) -> frozenset[str]:
    """Rebuild a module as `load_model` will; return which numbers must be saved, and warn of what differs."""
    if training.model_name is None:
        return frozenset()
    try:
        rebuilt = build_module(training.config.model, training.config.train.seed)
        numbers = differing_numbers(training.module, rebuilt)
        load_state(rebuilt, saved_state(training.module, numbers))
        different = differing_tensors(training.module, rebuilt)
    except Exception as error:  # the weights are worth saving all the same
        log.warning("the saved model cannot be rebuilt from its name: %s: %s", type(error).__name__, error)
        return frozenset()
    if different:
        log.warning(
            "the saved model is another one: %s differs when the module is built again from its name, and "
            "cannot be saved beside its weights; register it as a buffer",
            ", ".join(different),
        )
    return numbers


def _sha256(state: Mapping[str, Any]) -> str:
    """Return the digest of a whole state_dict, with frozen parameters and all buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if isinstance(value, torch.Tensor):
            _add(digest, name, value)
        elif isinstance(value, dict) and isinstance(value.get("bytes"), torch.Tensor):
            _add(digest, f"{name} {value.get('numpy')} {value.get('shape')}", value["bytes"])
        else:
            digest.update(f"{name} {type(value).__name__} {value!r}\n".encode())
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, tensor: torch.Tensor) -> None:
    dense = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(bits(dense).data)


def _read(folder: Location, name: str | None) -> dict[str, Any]:
    """Return the values of a file; none if there is none."""
    if name is None:
        return {}
    return dict(torch.load(io.BytesIO((folder / name).read_bytes()), weights_only=True))


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
        if about["format"] not in _STILL_READ:
            raise DataError(
                f"{folder} is of format {about['format']}, but this version reads "
                f"{' and '.join(map(str, _STILL_READ))}"
            )
        state, constants = _read(folder, about["weights"]), _read(folder, about.get("constants"))
        schema = RowSchema(
            features=tuple(Feature(**feature) for feature in about["features"]),
            label=about["label"]["name"],
            label_dtype=about["label"]["dtype"],
            classes=about["label"]["classes"],
        )
        if module is None:
            if about["model"]["name"] is None:
                raise DataError(f"{folder} was trained from a module given in Python: pass it as module=")
            module = build_module(ModelConfig(**about["model"]), seed=about.get("seed", 0))
        load_state(module, SavedState(state=state, constants=constants))
        for name, values in (("weights", state), ("constants", constants)):
            key = "state_sha256" if name == "weights" else "constants_sha256"
            if values and _sha256(values) != about[key]:
                raise DataError(
                    f"{folder}/{about[name]} and model.json are of different runs: their digests differ"
                )
        loss = loss_named(about["loss"])
    except (*_NOT_WHOLE, ModelError) as error:
        raise DataError(f"{folder} holds no complete model: {type(error).__name__}: {error}") from error
    if not about["finished"]:
        log.warning("%s is of a run that did not finish: weights of step %d", folder, about["version"])
    return SavedModel(module=module.eval(), schema=schema, loss=loss)
