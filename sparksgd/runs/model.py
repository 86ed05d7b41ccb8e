"""A trained model in a folder: its weights, how to rebuild the module, and which columns feed it.

weights.pt      state_dict, for torch.load(weights_only=True)
constants.pt    tensors and plain values that are in no state_dict, by path, if there are any
model.json      the module's name, arguments, seed and structure, the schema of a row, digests
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparksgd.arithmetic.changes import bits
from sparksgd.config import ModelConfig
from sparksgd.data.schema import Feature, RowSchema
from sparksgd.errors import DataError, ModelError, TrainingError
from sparksgd.losses import Loss, loss_named
from sparksgd.runs.json_files import write_json
from sparksgd.runs.names import WEIGHTS
from sparksgd.storage import Location, location
from sparksgd.training.composition import other_structure, structure
from sparksgd.training.modules import build_module
from sparksgd.training.saved_state import SavedState, load_state, saved_state

if TYPE_CHECKING:  # to load a model needs nothing of the training
    from sparksgd.training.state import Training

__all__ = ["SavedModel", "check_saved", "constants_beside", "load_model", "save_model"]

log = logging.getLogger("sparksgd")

_FORMAT = 4
_STILL_READ = (2, 3, _FORMAT)
# 2 had no constants, and built the module from seed 0; 3 had neither plain values nor a structure.
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
    saved = saved_state(training.module, training.drawn)
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
        "structure": structure(training.module),
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


def check_saved(folder: str | Path | Location, training: Training) -> None:
    """Build the module of a saved model again, and compare it with the trained one.

    Raises:
        TrainingError: they differ; the model is then loaded by `load_model(folder, module=...)` alone.
    """
    from sparksgd.training.rebuilding import (  # to load a model needs nothing of it
        built_again,
        other_when_filled,
    )

    if training.model_name is None:
        return
    folder = location(folder)
    about = json.loads((folder / "model.json").read_bytes())
    module = built_again(training.config)
    if module is None:
        return
    fill = partial(_fill, folder=folder, about=about)
    different = other_when_filled(training.module, module, about["structure"], fill, training.sample)
    if different is not None:
        write_json(folder / "model.json", about | {"differs": different})
        raise TrainingError(
            f"the module is trained, but {training.model_name} gave another one when it was built again: "
            f"{different}. Nothing is lost: load_model({str(folder)!r}, module=...) takes a module that is "
            f"built as the trained one. Let the module depend on its arguments, or on torch's, numpy's or "
            f"Python's global generators, which train.seed seeds"
        )


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


def _fill(module: nn.Module, folder: Location, about: Mapping[str, Any]) -> list[str]:
    """Give a module the values of a folder; see `load_state`."""
    state, constants = _read(folder, about["weights"]), _read(folder, about.get("constants"))
    for name, values in (("weights", state), ("constants", constants)):
        key = "state_sha256" if name == "weights" else "constants_sha256"
        if values and _sha256(values) != about[key]:
            raise DataError(
                f"{folder}/{about[name]} and model.json are of different runs: their digests differ"
            )
    return load_state(module, SavedState(state=state, constants=constants))


def _built(folder: Location, about: Mapping[str, Any]) -> nn.Module:
    """Return the module that a model names, built again."""
    if about["model"]["name"] is None:
        raise DataError(f"{folder} was trained from a module given in Python: pass it as module=")
    module = build_module(ModelConfig(**about["model"]), seed=about.get("seed", 0))
    different = about.get("differs") or other_structure(module, about.get("structure"))
    if different is not None:
        raise DataError(
            f"{folder} is not of the module that {about['model']['name']} gives: {different}. Pass a module "
            f"that is built as the trained one as module="
        )
    return module


def _given(module: nn.Module, about: Mapping[str, Any]) -> nn.Module:
    different = other_structure(module, about.get("structure"))
    if different is not None:
        log.warning("the module given to load_model is not built as the trained one: %s", different)
    return module


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
    folder, is_built = location(folder), module is None
    try:
        about = json.loads((folder / "model.json").read_bytes())
        if about["format"] not in _STILL_READ:
            raise DataError(
                f"{folder} is of format {about['format']}, but this version reads "
                f"{' and '.join(map(str, _STILL_READ))}"
            )
        schema = RowSchema(
            features=tuple(Feature(**feature) for feature in about["features"]),
            label=about["label"]["name"],
            label_dtype=about["label"]["dtype"],
            classes=about["label"]["classes"],
        )
        module = _built(folder, about) if module is None else _given(module, about)
        others = _fill(module, folder, about)
        if others and not is_built:
            log.warning(
                "the module given to load_model gets the values that it was trained with: %s",
                "; ".join(others),
            )
        loss = loss_named(about["loss"])
    except (*_NOT_WHOLE, ModelError) as error:
        raise DataError(f"{folder} holds no complete model: {type(error).__name__}: {error}") from error
    if not about["finished"]:
        log.warning("%s is of a run that did not finish: weights of step %d", folder, about["version"])
    return SavedModel(module=module.eval(), schema=schema, loss=loss)
