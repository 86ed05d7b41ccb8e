"""A trained module as an ONNX file, for programs without torch.

Legend: B rows.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from sparksgd.arithmetic.copies import copied
from sparksgd.errors import ConfigError, ModelError
from sparksgd.models.outputs import tensors_of
from sparksgd.runs.model import SavedModel

__all__ = ["to_onnx"]

_SAMPLE_ROWS = 3
"""Of the rows that the export runs the module on: torch takes a size of 1 for a constant."""


def to_onnx(model: SavedModel, path: str | Path) -> None:
    """Write a model's module as an ONNX file, in evaluation mode, of any number of rows.

    Its inputs have the names of the columns of features: float32, int64 or uint8, [B] or [B, N], with 0.0 in
    place of -0.0.  Its outputs are what the module gives: logits, not probabilities; a tensor by itself is
    `output`, others have their names (see `models.outputs`).

    Args:
        model: trained, or loaded.
        path: of the file, on this machine; it is replaced.  Weights of 2 GB or more go into a file beside it.

    Raises:
        ConfigError: a package is missing, or the folder of the file.
        ModelError: torch cannot express the module in ONNX.
    """
    for package in ("onnx", "onnxscript"):  # torch imports both late, and says less
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"to_onnx needs the package {package}, which is not installed: pip install 'sparksgd[onnx]'"
            ) from error
    path = Path(path)
    if not path.parent.is_dir():
        raise ConfigError(f"path is {str(path)!r}, but there is no folder {str(path.parent)!r}: make it")
    features = model.schema.features
    rows = {
        feature.name: torch.zeros((_SAMPLE_ROWS, *feature.shape), dtype=getattr(torch, feature.dtype))
        for feature in features
    }
    module = copied(model.module).eval()
    args, kwargs = (tuple(rows.values()), {}) if len(rows) == 1 else ((), rows)
    any_rows = {0: torch.export.Dim("rows")}
    try:
        with torch.no_grad():
            names = [name or "output" for name in tensors_of(module(*args, **kwargs))]
            program = torch.onnx.export(
                module,
                args,
                kwargs=kwargs,
                input_names=[*rows],
                output_names=names,
                dynamic_shapes=(any_rows,) if len(rows) == 1 else dict.fromkeys(rows, any_rows),
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        program.save(path)
    except Exception as error:
        told = str(error).strip().splitlines() or [""]
        raise ModelError(
            f"torch cannot write {type(module).__name__} as ONNX: {type(error).__name__}: {told[0]}. Let "
            f"forward use operations that torch.export takes, without branches by values of tensors"
        ) from error
