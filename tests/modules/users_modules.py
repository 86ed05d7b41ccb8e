"""Modules and losses as users write them, some of them faulty; named in tests by import path."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparksgd.data.held_out import Side
from sparksgd.data.schema import RowSchema
from sparksgd.spark.tasks import row_tasks

ENDLESS_S = 3600.0
"""Longer than any test may take: what passes did not wait for who sleeps so long."""


class FadingNet(nn.Module):
    """Some of its weights are so small that a step with decay leaves denormal numbers, or 0."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 10)
        self.small = nn.Parameter(torch.full((1000,), 1.5e-38))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.inner(image.float() / 255) + self.small.sum() * 0


class NormNet(nn.Module):
    """A small net with batch-norm and dropout, for uint8[B, 16] features and 4 classes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.hidden = nn.Linear(16, width)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.3)
        self.output = nn.Linear(width, 4)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.hidden(features.float() / 255)))
        return self.output(self.dropout(hidden))


class DropoutNet(nn.Module):
    """A small net with dropout, for uint8[B, 16] features and 4 classes."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 4))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features.float() / 255)


class FlagNet(DropoutNet):
    """A DropoutNet that obeys flags: a worker that finds one takes it away and does what it says.

    Args:
        folder: where the flags lie.  `kill-executor` kills the executor's JVM, `kill-worker` this
            process, `kill-always` too and stays, `kill-daemon` the daemon that forked it, `raise` raises,
            `exhaust` asks for more memory than there is, `nan` makes a BackwardFlagNet gradient NaN; `sleep`
            sleeps until somebody ends it and `stop` stops, which leave the process in a file `asleep` beside
            the folder: who waits for that file strikes while the step is held.
        width: of the hidden layer.
    """

    def __init__(self, folder: str, width: int = 32) -> None:
        super().__init__(width)
        self.folder = folder

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training:
            self._obey()
        return super().forward(features)

    def _obey(self) -> set[str]:
        """Do what flags say, and return which there were."""
        obeyed = set()
        for flag in Path(self.folder).iterdir():
            try:
                if flag.name != "kill-always":
                    flag.unlink()
            except FileNotFoundError:
                continue  # another worker took it
            name = flag.name
            obeyed.add(name)
            if name == "kill-executor":
                daemon = os.getppid()
                status = Path(f"/proc/{daemon}/status").read_text()
                jvm = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid"))
                os.kill(jvm, signal.SIGKILL)
                time.sleep(60)  # the executor is gone; this process follows it
            elif name == "kill-daemon":
                os.kill(os.getppid(), signal.SIGKILL)
            elif name in ("kill-worker", "kill-always"):
                os.kill(os.getpid(), signal.SIGKILL)
            elif name == "raise":
                raise ValueError("the user's own mistake")
            elif name == "exhaust":
                torch.empty(1 << 55)
            elif name in ("sleep", "stop"):
                asleep = Path(self.folder).with_name("asleep")
                asleep.with_suffix(".new").write_text(str(os.getpid()))
                asleep.with_suffix(".new").rename(asleep)  # whoever finds it reads all of it
                if name == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(ENDLESS_S)
        return obeyed


class EvaluationFlagNet(DropoutNet):
    """A DropoutNet that obeys flags in evaluation: `kill` kills a process, `slow` lets the others take long.

    Args:
        folder: where the flags lie; who finds `kill` takes it away.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if not self.training:
            try:
                Path(self.folder, "kill").unlink()
            except FileNotFoundError:
                if Path(self.folder, "slow").exists():
                    time.sleep(2.0)
            else:
                time.sleep(0.5)  # messages of turns are with the driver by now
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(features)


class BackwardFlagNet(FlagNet):
    """A FlagNet that obeys in its backward pass, when the gradients of the last layer are there."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.layers[:3](features.float() / 255)
        return self.layers[3](_Obeys.apply(hidden, self) if self.training else hidden)


class _Obeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: torch.Tensor, net: FlagNet) -> torch.Tensor:
        ctx.net = net
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(0.05)  # what went out in the meantime has arrived
        return gradient * (np.nan if "nan" in ctx.net._obey() else 1), None


class TwiceNet(DropoutNet):
    """A DropoutNet whose last layer is computed twice, each time with its own part of the gradient."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.layers[:3](features.float() / 255)
        return sum(checkpoint(self.layers[3], part, use_reentrant=True) for part in (hidden, hidden / 2))


class HeadsNet(DropoutNet):
    """A DropoutNet with a second head, which a row in a hundred uses, and a third one, which none uses."""

    def __init__(self) -> None:
        super().__init__()
        self.seldom, self.never = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        found, chosen = super().forward(features), features[:, :1] > 252
        return torch.where(chosen, self.seldom(features.float() / 255), found) if chosen.any() else found


class NoisyLookahead(torch.optim.Optimizer):
    """Slow weights, a counter and another optimiser, which no state_dict has; noise; new tensors as data."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.fast = torch.optim.SGD(self.param_groups[0]["params"], lr=lr, momentum=0.9)
        self.param_groups = self.fast.param_groups
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]
        self.count = 0

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        """Make a step; every third one ends between the slow and the fast weights."""
        self.fast.step()
        self.count += 1
        for p, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
            if self.count % 3 == 0:
                slow.lerp_(p, 0.5)
                p.data = slow.clone()
            p.data = p.data + 1e-3 * torch.randn_like(p) * np.random.rand()
        self.zero_grad()


class TiredSGD(torch.optim.SGD):
    """An optimiser that raises at its fifth step."""

    def step(self, closure: object = None) -> None:
        """Make a step, but for the fifth."""
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 5:
            raise ValueError("the optimiser's own mistake")
        super().step()


def steep(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Ten thousand times the cross-entropy: a rate of 1e37 makes an infinite step of it."""
    return 1e4 * F.cross_entropy(output, label, reduction="none")


def nan_after(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Cross-entropy that is NaN where a logit has grown past 1.5: after some steps."""
    grown = output.detach().abs().amax(1) > 1.5
    return F.cross_entropy(output, label, reduction="none") + torch.where(grown, float("nan"), 0.0)


class TwoColumns(nn.Module):
    """A regression on a vector, float32[B, 2], and a number, int64[B], which come by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, *, number: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.cat([vector, number[:, None].float()], dim=1))


class WideNet(nn.Module):
    """A net for uint8[B, 65536] features and 2 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(65_536, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.output(features.float() / 255)


BIG_ROW_BYTES = 65_536


def keyed_in_small_batches(
    schema: RowSchema, side: Side | None, num_shards: int, deal: int, batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Task: what row_tasks.keyed does, but refuse batches of more than 8 MiB."""
    for batch in batches:
        assert batch.nbytes <= 8 << 20, f"a batch of {batch.num_rows} rows"
        yield from row_tasks.keyed(schema, side, num_shards, deal, [batch])


def big_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Task: make rows of 64 kB from their numbers, for mapInArrow."""
    for batch in batches:
        numbers = batch.column("id").to_pylist()
        images = [np.random.Philox(key=n).random_raw(BIG_ROW_BYTES // 8).tobytes() for n in numbers]
        labels = [image[0] % 2 for image in images]
        yield pa.RecordBatch.from_arrays(
            [pa.array(images, pa.binary()), pa.array(labels, pa.int32())], ["features", "label"]
        )
