"""A trained model in a folder: its weights, how to rebuild the module, and which columns feed it.

weights.pt      state_dict, for torch.load(weights_only=True)
constants.pt    tensors and plain values that are in no state_dict, by path, if there are any
model.json      the module's name, arguments, seed and structure, the schema of a row, digests

Nothing of a folder is believed when it is loaded.  It runs no code but that of packages that the caller
trusts (imports/trust.py).  Every field of model.json is checked (manifest.py), and every file with what is
in it (checked_files.py).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparksgd.arithmetic.changes import bits
from sparksgd.data.schema import RowSchema
from sparksgd.errors import ConfigError, DataError, ModelError, SparkSGDError, TrainingError
from sparksgd.imports import out_of_memory_told, resolve
from sparksgd.imports.sources import code_digest
from sparksgd.imports.trust import Trust, trusted
from sparksgd.models import MODELS
from sparksgd.models.losses import LOSSES, Loss, LossKind, loss_kind, loss_of, make_loss
from sparksgd.models.outputs import Output
from sparksgd.runs.checked_files import FileEntry, read_checked, read_unlisted, write_checked
from sparksgd.runs.manifest import FORMAT, Manifest, describe, read_manifest, write_manifest
from sparksgd.runs.names import MANIFEST, WEIGHTS
from sparksgd.storage import Location, location
from sparksgd.training.composition import other_structure, structure
from sparksgd.training.given_loss import given_name
from sparksgd.training.modules import build_module
from sparksgd.training.saved_state import SavedState, load_state, saved_state
from sparksgd.training.torch_parts import assembled, described_parts

if TYPE_CHECKING:  # to load a model needs nothing of the training
    from sparksgd.training.state import Training

__all__ = [
    "SavedModel",
    "check_saved",
    "checked_model",
    "constants_beside",
    "load_model",
    "model_of",
    "save_model",
]

log = logging.getLogger("sparksgd")

_MOST_DENSE_BYTES = 1 << 30
"""A sparse tensor of a format before 5 is made dense for its digest, up to this size."""


def model_of(training: Training) -> SavedModel:
    """Return the trained module of a run, as it can be saved; the module is the run's own."""
    return SavedModel(
        module=training.module,
        schema=replace(training.plan.schema, id=None, weight=None),  # as it is loaded
        loss=training.plan.loss,
        kind=loss_kind(training.config.loss),
        outputs=training.outputs,
        about=describe(training),
        drawn=training.drawn,
    )


def checked_model(training: Training) -> SavedModel:
    """Return the trained module of a run, as it can be saved; what could not be loaded again is told."""
    model = model_of(training)
    saved = saved_state(training.module, training.drawn)
    different = _different_when_loaded(training, model.about["structure"], model.about["parts"], saved)
    if different is None:
        return model
    if training.model_name is None:
        return replace(model, about={**model.about, "parts": None})
    log.warning(
        "%s gave another module when it was built again, so that to load the saved model, the module must be "
        "given: %s", training.model_name, different,
    )  # fmt: skip
    return replace(model, about={**model.about, "differs": different})


def _different_when_loaded(
    training: Training, built: Mapping[str, str], parts: Mapping[str, Any] | None, saved: SavedState
) -> str | None:
    """Return how the module that would be loaded differs from the trained one; None: it is the same."""
    from sparksgd.training.rebuilding import (  # to load a model needs nothing of it
        built_again,
        other_when_filled,
    )

    if training.model_name is not None:
        module = built_again(training.config)
    else:
        module = None if parts is None else assembled(parts, saved.state, "parts")
    if module is None:
        return None
    fill = partial(load_state, saved=saved)
    return other_when_filled(training.module, module, built, fill, training.sample)


def save_model(folder: str | Path | Location, model: SavedModel, weights: str = WEIGHTS) -> None:
    """Write the weights of a trained module, and how to rebuild it.

    Args:
        folder: created if it does not exist.
        model: of a run, or loaded.
        weights: the name of the file of weights.

    Raises:
        ConfigError: the model is neither.
    """
    if not model.about:
        raise ConfigError("the model was neither trained nor loaded by sparksgd, so it cannot be saved")
    folder = location(folder)
    saved = saved_state(model.module, model.drawn)
    files = {"weights": write_checked(folder, weights, saved.state), "constants": None}
    if saved.constants:
        files["constants"] = write_checked(folder, constants_beside(weights), saved.constants)
    entries = {key: None if entry is None else asdict(entry) for key, entry in files.items()}
    about = dict(model.about)
    if about["structure"] != (now := structure(model.module)):
        about |= {"structure": now, "differs": "the module was changed after it was trained or loaded"}
    if about["parts"] is not None:
        about["parts"] = described_parts(model.module)
    write_manifest(folder, {"format": FORMAT, **entries, **about})


def constants_beside(weights: str) -> str:
    """Return the name of the file of what a file of weights leaves out, if there is anything.

    >>> constants_beside("weights-500.pt")
    'constants-500.pt'
    """
    return weights.replace("weights", "constants", 1)


def check_saved(folder: str | Path | Location, training: Training) -> None:
    """Build the module of a saved model again, and compare it with the trained one.

    Raises:
        TrainingError: they differ; the model is then loaded by `load_model(folder, module=...)` alone.
    """
    folder = location(folder)
    manifest = read_manifest(folder)
    different = _different_when_loaded(
        training, manifest.structure or {}, manifest.parts, _values(folder, manifest)
    )
    if different is not None and training.model_name is None:
        log.info("the module is not saved as a whole, since what would be loaded differs: %s", different)
        write_manifest(folder, {**manifest.fields, "parts": None})
    elif different is not None:
        write_manifest(folder, {**manifest.fields, "differs": different})
        raise TrainingError(
            f"the module is trained, but {training.model_name} gave another one when it was built again: "
            f"{different}. Nothing is lost: load_model({str(folder)!r}, module=...) takes a module that is "
            f"built as the trained one. Let the module depend on its arguments, or on torch's, numpy's or "
            f"Python's global generators, which train.seed seeds"
        )


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A trained module, and what is needed to use it."""

    module: nn.Module
    """In evaluation mode."""

    schema: RowSchema
    """What a row must be."""

    loss: Loss | None
    """The loss that it was trained with; None: it was given in Python, and is not known here."""

    kind: LossKind | None
    """What the loss is of; None if that is not known."""

    outputs: tuple[Output, ...] = ()
    """What the module gives of a row; none if that is not known, as of formats before 8."""

    about: Mapping[str, Any] = field(default_factory=dict)
    """What model.json says of it, but for its files."""

    drawn: frozenset[str] = frozenset()
    """Paths of values that are saved beside the weights, see `saved_state`."""


def load_model(
    folder: str | Path | Location,
    module: nn.Module | None = None,
    *,
    loss: Loss | None = None,
    trust: Iterable[str] = (),
    strict: bool = False,
) -> SavedModel:
    """Load a model; warn if its run did not finish, or if its code is not that of the training.

    Args:
        folder: the folder model/ of a run, a path or URI.
        module: the untrained module, if the run was given one in Python that could not be saved whole (see
            training/torch_parts.py), or if you rather build it yourself.  Then nothing that model.name names
            is run; loss.name still is.
        loss: the loss, if the run was given one in Python, or if you rather pass it yourself.  Then nothing
            that loss.name names is run.  Without the loss a model predicts, but is not evaluated.
        trust: packages whose code may run, if model.name or loss.name is of them, as ["mymodels"]; besides
            those of `sparksgd.trust` and of SPARKSGD_TRUST.  Models and losses of sparksgd need no trust.
        strict: refuse a model whose code is not that of the training, or of which no digest was saved.

    Returns:
        The model: its `module` has the trained weights, and computes as in evaluation (`module.eval()`).

    Raises:
        DataError: the folder does not hold a complete model, or names code that is not trusted.
        ConfigError: trust is no list of names of packages, or module no module.
    """
    if not (module is None or isinstance(module, nn.Module)):
        raise ConfigError(f"module is a {type(module).__name__}, but must be a torch.nn.Module")
    folder = location(folder)
    trusting = trusted(trust, where=f"{folder}/{MANIFEST}")
    manifest = read_manifest(folder)
    is_own = loss is not None or manifest.loss.is_given
    names = {} if is_own else {"loss.name": manifest.loss.name}
    if module is None:
        if manifest.model is not None:
            names = {"model.name": manifest.model.name} | names
        elif manifest.parts is None:
            raise DataError(f"{folder} was trained from a module given in Python: pass it as module=")
    users = {
        key: name for key, name in names.items() if name not in (MODELS if key == "model.name" else LOSSES)
    }
    _check_code(folder, manifest, users, trusting, strict)
    with _told_as_incomplete(folder):
        saved = _values(folder, manifest)  # first: for damaged files no code of the user's is run
    _import_code(folder, users, trusting)
    with _told_as_incomplete(folder):
        made = _given(loss, manifest) if is_own else make_loss(manifest.loss, manifest.seed, trusting)
        kind = loss_kind(manifest.loss)
        if module is None:
            module = _built(folder, manifest, saved, trusting)
            load_state(module, saved)
        else:
            _fill_given(module, manifest, saved)
        module.eval()
    if not manifest.finished:
        log.warning("%s is of a run that did not finish: weights of step %d", folder, manifest.version)
    return SavedModel(
        module=module,
        schema=manifest.schema,
        loss=made,
        kind=kind,
        outputs=manifest.outputs,
        about=manifest.about(module),
        drawn=frozenset(saved.constants),
    )


@contextmanager
def _told_as_incomplete(folder: Location) -> Iterator[None]:
    """Turn what is wrong of a model's files, or with its code, into a DataError."""
    try:
        with out_of_memory_told(f"loading {folder}"):
            yield
    except (DataError, ConfigError, ModelError) as error:
        raise DataError(f"{folder} holds no complete model: {error}") from error
    except SparkSGDError:
        raise
    except Exception as error:  # of torch, numpy, or the module's own load_state_dict
        raise DataError(f"{folder} holds no complete model: {type(error).__name__}: {error}") from error


def _values(folder: Location, manifest: Manifest) -> SavedState:
    """Return what the files of a model hold.

    Raises:
        DataError: one is missing, or is not the file that the manifest names.
        ClusterError: its file system does not answer.
    """
    found: dict[str, dict[str, Any]] = {"weights": {}, "constants": {}}
    for key, file in (("weights", manifest.weights), ("constants", manifest.constants)):
        if isinstance(file, FileEntry):
            found[key] = read_checked(folder, file)
        elif file is not None:
            found[key] = read_unlisted(folder, file)
            if _sha256(found[key]) != manifest.digests.get(key):
                raise DataError(f"{file} and {MANIFEST} are of different runs: their digests differ")
    return SavedState(state=found["weights"], constants=found["constants"])


def _given(loss: Loss | None, manifest: Manifest) -> Loss | None:
    """Return the loss that a loader was given, and tell if it is not that of the training."""
    if loss is None:
        return None
    if manifest.loss.is_given and given_name(loss) != manifest.loss.name:
        log.warning("the loss given to load_model is not that of the training: its code or values differ")
    return loss_of(manifest.loss, loss, manifest.seed)


def _check_code(
    folder: Location, manifest: Manifest, users: Mapping[str, str], trusting: Trust, strict: bool
) -> None:
    """Refuse code that is not trusted, and tell of code that is not that of the training; run none of it."""
    for key, name in users.items():
        trusting.check_name(key, name)
    for key, name in users.items():
        then, now = (manifest.code or {}).get(key), code_digest(name)
        if then == now and (then is not None or not strict):
            continue
        if then is None:
            told = f"{folder}/{MANIFEST} has no digest of the code of {key} = {name!r}"
        elif now is None:
            told = f"the code of {key} = {name!r} is not found here"
        else:
            told = (
                f"the code of {key} = {name!r} is not that of the training: it was changed, or is another "
                f"package of the same name"
            )
        if strict:
            raise DataError(
                f"{folder}: {told}, and strict was asked for: put the code of the training first on "
                f"PYTHONPATH, or load without strict if it is known to do the same"
            )
        if then is not None:
            log.warning("%s: %s", folder, told)


def _import_code(folder: Location, users: Mapping[str, str], trusting: Trust) -> None:
    """Import the user's code, which is trusted.

    Raises:
        DataError: it is not found, or cannot be imported.
    """
    for key, name in users.items():
        try:
            resolve(key, name, {}, trusting)
        except ConfigError as error:
            given = "module=" if key == "model.name" else "loss="
            raise DataError(
                f"{folder} needs code that is missing here, or cannot be imported: {error}. Or pass what it "
                f"makes as {given}"
            ) from error


def _built(folder: Location, manifest: Manifest, saved: SavedState, trusting: Trust) -> nn.Module:
    """Return the module of a model, built again from its name, or put together from its parts."""
    if manifest.model is None:
        module = assembled(manifest.parts, saved.state, f"{folder}/{MANIFEST}: parts")
        different = other_structure(module, manifest.structure)
        if different is not None:
            raise DataError(f"its parts are not of its structure: {different}")
        return module
    if manifest.model.name in MODELS:
        _check_sizes(manifest, saved)
    module = build_module(manifest.model, manifest.seed, trusting)
    different = manifest.differs or other_structure(module, manifest.structure)
    if different is not None:
        raise DataError(
            f"it is not of the module that {manifest.model.name} gives: {different}. Pass a module that is "
            f"built as the trained one as module="
        )
    return module


def _check_sizes(manifest: Manifest, saved: SavedState) -> None:
    """Refuse arguments of one of our models that the weights are not of, before memory is taken for it."""
    assert manifest.model is not None
    with torch.device("meta"):
        module = build_module(manifest.model, manifest.seed)
    for name, value in module.state_dict().items():
        shape = getattr(saved.state.get(name), "shape", None)
        if shape != value.shape:
            raise DataError(
                f"{name} is of shape {None if shape is None else tuple(shape)}, but {manifest.model.name} "
                f"with the arguments {dict(manifest.model.arguments)} has it of {tuple(value.shape)}"
            )


def _fill_given(module: nn.Module, manifest: Manifest, saved: SavedState) -> None:
    """Give a module of the caller the values of a model, and tell how it was built otherwise."""
    different = other_structure(module, manifest.structure)
    if different is not None:
        log.warning("the module given to load_model is not built as the trained one: %s", different)
    others = load_state(module, saved)
    if others:
        log.warning(
            "the module given to load_model gets the values that it was trained with: %s", "; ".join(others)
        )


def _sha256(state: Mapping[str, Any]) -> str:
    """Return the digest that formats before 5 have of values."""
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
    if tensor.layout is not torch.strided and tensor.numel() * tensor.element_size() > _MOST_DENSE_BYTES:
        raise DataError(
            f"{name} is a sparse tensor of shape {tuple(tensor.shape)}, which is too large to check"
        )
    dense = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(bits(dense).data)
