"""Train a small module, and compile what that imported; run by the Python of a packed environment.

    ENVIRONMENT/bin/python -I -B packing_trial.py cryptography.x509 ...

It imports nothing of sparksgd, which is not in the environment.  The arguments are further modules to
compile.
"""

from __future__ import annotations

import compileall
import importlib
import py_compile
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

__all__ = ["compile_imported", "main", "train"]

BESIDE_TORCH = (
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "rich.console",
    "rich.progress",
    "rich.table",
)
"""What a training imports from other packages."""


def train() -> None:
    """Train with the layers and optimisers that a first training would use."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    optimizer = torch.optim.Adam(module.parameters())
    torch.optim.SGD(module.parameters())
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8) % 2
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's has no types
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses


def compile_imported() -> None:
    """Write the bytecode of every imported module of this environment."""
    files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    for file in files:
        if file.endswith(".py") and Path(file).is_relative_to(sys.prefix):
            compileall.compile_file(
                file, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
            )


def main(also: Sequence[str]) -> None:
    """Train, import these modules as well, and compile."""
    for name in BESIDE_TORCH:
        importlib.import_module(name)
    train()
    for name in also:
        importlib.import_module(name)
    compile_imported()


if __name__ == "__main__":
    main(sys.argv[1:])
