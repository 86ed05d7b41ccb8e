"""A module that holds its run at a step, wherever that runs, so that a test can strike there.

It needs nothing but torch, so that it can be shipped alone; tests/hosts/holds.py is the test's side of it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import nn

LONGEST_S = 900.0
"""What waits longer was left behind by a test that was killed."""


class HeldNet(nn.Module):
    """A small net for images, uint8[B, inputs], whose training waits at one of its turns for a file `go`.

    Batch-norm's counter tells it which turn it computes.  Each process that waits leaves `held-PID` in the
    folder; once `go` is there, nobody waits any more.

    Args:
        folder: of these files; all processes of the run see it.
        at: the first turn that waits, from 1.
        inputs: pixels of an image.
        classes: how many labels.
    """

    def __init__(self, folder: str, at: int, inputs: int = 784, classes: int = 10) -> None:
        super().__init__()
        self.folder, self.at = Path(folder), at
        self.hidden = nn.Linear(inputs, 16)
        self.norm = nn.BatchNorm1d(16)
        self.output = nn.Linear(16, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32[B, classes]."""
        if self.training and int(self.norm.num_batches_tracked) + 1 >= self.at:
            self._hold()
        hidden = self.norm(self.hidden(image.float().flatten(1) / 255))  # [B, 16]
        return self.output(torch.relu(hidden))

    def _hold(self) -> None:
        deadline = time.monotonic() + LONGEST_S
        while not (self.folder / "go").exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"held for {LONGEST_S:.0f} s, and nobody left {self.folder}/go")
            (self.folder / f"held-{os.getpid()}").touch()
            time.sleep(0.02)  # the test leaves a file; nobody tells of that
