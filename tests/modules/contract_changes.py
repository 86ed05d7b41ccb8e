"""Modules that change something in forward, or reach what a copy does not: by kind, right or refused.

Each takes float32[B, 24] features and gives float[B, 2].
"""

from __future__ import annotations

import copy
import os
import random
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from contract_kinds import IN, WIDTH, ExtraState, Net, accumulated
from contract_layers import Around, First, Indexed
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

# Forward changes a parameter: a projection is a part of the step


class Rebinding(Net):
    """Forward rebinds a weight's data."""

    def forward(self, features):
        self.hidden.weight.data = self.hidden.weight.data.clamp(-0.1, 0.1)
        return super().forward(features)


class Clamping(Net):
    """Forward clamps a weight in place, where no version counter tells."""

    def forward(self, features):
        self.hidden.weight.data.clamp_(-0.1, 0.1)
        return super().forward(features)


class Projecting(Net):
    """Forward scales rows of a weight down to a norm, under no_grad, in training only."""

    def forward(self, features):
        if self.training:
            with torch.no_grad():
                self.hidden.weight.copy_(torch.renorm(self.hidden.weight, 2, 0, 0.5))
        return super().forward(features)


class MaxNormConvolution(nn.Conv2d):
    """A convolution with a bound on its filters' norms, as brain-computer interfaces use it."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        return super().forward(x)


class Averaging(Net):
    """A buffer that follows the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(2, WIDTH))

    def forward(self, features):
        if self.training:
            with torch.no_grad():
                self.average.lerp_(self.output.weight, 0.1)
        return super().forward(features)


class Copying(Net):
    """A buffer that is a copy of the step's weights, which forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.zeros(WIDTH, IN))

    def forward(self, features):
        if self.training:
            self.anchor.copy_(self.hidden.weight.detach())
        return super().forward(features) + F.linear(features.to(self.anchor.dtype), self.anchor)[:, :2]


class Teacher(Net):
    """A frozen teacher that follows its student, and is used by it."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(IN, WIDTH).requires_grad_(False)

    def forward(self, features):
        if self.training:
            with torch.no_grad():
                for slow, fast in zip(self.teacher.parameters(), self.hidden.parameters(), strict=True):
                    slow.lerp_(fast, 0.1)
        return super().forward(features) + self.teacher(features.to(self.output.weight.dtype))[:, :2]


class StridedConvolution(nn.Module):
    """What follows a convolution reads memory as if it were channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.output = nn.Conv2d(2, 4, 2), nn.Linear(24, 2)

    def forward(self, features):
        x = self.convolution(features.to(self.output.weight.dtype).view(-1, 2, 3, 4))
        return self.output(torch.as_strided(x, (len(x), 24), (24, 1)))


class LayoutBranch(StridedConvolution):
    """What follows a convolution depends on its memory layout."""

    def forward(self, features):
        x = self.convolution(features.to(self.output.weight.dtype).view(-1, 2, 3, 4))
        return self.output((x if x.is_contiguous() else 2 * x).flatten(1))


class Transposed(Net):
    """A weight that is another tensor's transpose, and one that is a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden.weight = nn.Parameter(torch.randn(IN, WIDTH).t())
        self.output.weight = nn.Parameter(torch.randn(6, WIDTH)[2:4])


def threads_set() -> nn.Module:
    """Forward sets the number of threads, to what it is."""
    net = Net()
    net.hidden.register_forward_hook(lambda module, given, output: torch.set_num_threads(1))
    return net


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "forward rebinds data": Rebinding,
    "forward clamps data in place": Clamping,
    "forward projects in training": Projecting,
    "a convolution of bounded norm": lambda: Around(MaxNormConvolution(2, 3, 2), 2, 3, 4),
    "an embedding of bounded norm": lambda: Indexed(nn.Embedding(6, 4, max_norm=1.0)),
    "spectral_norm": lambda: Around(parametrizations.spectral_norm(nn.Linear(IN, WIDTH))),
    "spectral_norm, the old one": lambda: Around(nn.utils.spectral_norm(nn.Linear(IN, WIDTH))),
    "a buffer averages weights": Averaging,
    "a buffer copies weights": Copying,
    "a frozen teacher follows": Teacher,
    "memory read with strides": StridedConvolution,
    "a branch by memory layout": LayoutBranch,
    "transposed and sliced parameters": Transposed,
    "forward sets threads": threads_set,
}
"""Forward changes something: trains as on one process."""


# What must be refused


class GrowsHead(Net):
    """Forward makes a head when it needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = None

    def forward(self, features):
        if self.head is None:
            self.head = nn.Linear(2, 2).to(self.output.weight.dtype)
        return self.head(super().forward(features))


class LambdaOfSelf(Net):
    """An activation that is a lambda of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.activation = lambda x: torch.tanh(x) * self.scale

    def act(self, x):
        return self.activation(x)


def closure() -> nn.Module:
    """A forward hook that closes over a parameter which no module has."""
    net, scale = Net(), nn.Parameter(torch.ones(2))
    net.output.register_forward_hook(lambda module, given, output: output * scale.to(output.dtype))
    return net


HIDDEN_SCALE = nn.Parameter(torch.ones(2))


class Global(Net):
    """A parameter that is a global of its file."""

    def forward(self, features):
        return super().forward(features) * HIDDEN_SCALE.to(self.output.weight.dtype)


class InList(Net):
    """Layers in an ordinary list, which torch does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = [nn.Linear(2, 2).double()]

    def forward(self, features):
        return self.extra[0](super().forward(features).double())


class Weak(Net):
    """A weak reference to a part of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.link = weakref.ref(self.output)

    def forward(self, features):
        return self.link()(torch.tanh(self.hidden(features.to(self.output.weight.dtype))))


class Autoencoder(Net):
    """Two parameters that share storage: one is the other's transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(WIDTH, WIDTH)
        _keep_double(self)
        self.back = nn.Parameter(self.middle.weight.t())

    def act(self, x):
        return F.linear(torch.tanh(self.middle(x)), self.back)


class Overlapping(Net):
    """Two parameters that are overlapping slices of one vector."""

    def __init__(self) -> None:
        super().__init__()
        vector = torch.ones(WIDTH + 2, dtype=torch.float64)
        self.low, self.high = nn.Parameter(vector[:WIDTH]), nn.Parameter(vector[2:])
        _keep_double(self)

    def act(self, x):
        return torch.tanh(x * self.low) * self.high


def buffer_of_weight() -> nn.Module:
    """A buffer that is the weight itself."""
    net = Net()
    _keep_double(net)
    net.register_buffer("view", net.hidden.weight.detach())
    return net


def _keep_double(net: nn.Module) -> None:
    """Convert the net to float64 now: a later conversion would part what is shared."""
    net.double()
    net.double = lambda: net


class Counter(Net):
    """A Python number counts the calls, and scales the output."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, features):
        self.calls += 1
        return super().forward(features) * (1 + 0.1 * self.calls)


class Rarely(Net):
    """Every fifth call a number changes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.factor = [0], 1.0

    def forward(self, features):
        if self.training:
            self.calls[0] += 1
            if self.calls[0] % 5 == 0:
                self.factor *= 0.9
        return super().forward(features) * self.factor


class Peak(Net):
    """A buffer holds the largest value seen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("peak", torch.zeros(()))

    def forward(self, features):
        self.peak = torch.maximum(self.peak, features.abs().max().to(self.peak.dtype))
        return super().forward(features / self.peak)


class TensorAttribute(Net):
    """A tensor that is neither parameter nor buffer changes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(())

    def forward(self, features):
        self.seen += features.abs().mean()
        return super().forward(features) * (1 + self.seen)


class RepeatedNoise(Net):
    """A factor for each row, the same in each piece: the first rows of all pieces have the same."""

    def act(self, x):
        factors = np.random.default_rng(3).integers(1, 3, (len(x), 1))
        return torch.tanh(x) * torch.from_numpy(factors)


class OwnGenerator(Net):
    """Noise of a generator of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def act(self, x):
        return torch.tanh(x) + torch.randn(x.shape, generator=self.generator, dtype=x.dtype)


class BatchMean(Net):
    """Rows minus their mean."""

    def act(self, x):
        return torch.tanh(x - x.mean(0))


class Sorted(Net):
    """Rows change places with each other."""

    def act(self, x):
        return torch.tanh(x).sort(0).values


class NoisyBatchMean(Net):
    """Rows minus their mean, behind a dropout by numpy."""

    def act(self, x):
        return torch.tanh(x - x.mean(0)) * torch.from_numpy(np.random.random(x.shape) < 0.7).to(x.dtype)


class LittleMixing(Net):
    """A millionth of the other rows."""

    def act(self, x):
        return torch.tanh(x) + 1e-6 * x.mean(0)


class MixesInEvaluation(Net):
    """Rows minus their mean, in evaluation alone."""

    def act(self, x):
        return torch.tanh(x if self.training else x - x.mean(0))


class Unseeded(Net):
    """Dropout by a generator that no seed reaches."""

    def act(self, x):
        return torch.tanh(x) * torch.from_numpy(np.random.default_rng().random(x.shape) < 0.7).to(x.dtype)


class AbsoluteOffset(Net):
    """A weight is read where its memory begins, if it has memory of its own."""

    def forward(self, features):
        x = torch.tanh(self.hidden(features.to(self.output.weight.dtype)))
        return x @ torch.as_strided(self.output.weight, (WIDTH, 2), (1, WIDTH), 0)


class StrideBranch(Transposed):
    """The output depends on the strides of a weight."""

    def forward(self, features):
        return super().forward(features) * self.hidden.weight.stride(0)


class Holding(Net):
    """An attribute that neither copies nor pickles.

    Args:
        held: returns it.
    """

    def __init__(self, held: Callable[[Net], object]) -> None:
        super().__init__()
        self.held = held(self)


class ForwardGenerator(Net):
    """A Python generator that forward draws from."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = (number for number in range(10**6))

    def forward(self, features):
        return super().forward(features) * next(self.numbers)


class NonlinearHook(Net):
    """A hook that clips a gradient: clipped sums are no sum of clipped rows."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden.weight.register_hook(lambda gradient: gradient.clamp(-0.001, 0.001))


class Detached(Net):
    """Nothing that is trained has an influence."""

    def forward(self, features):
        return super().forward(features).detach().requires_grad_()


class CopiesItself(Net):
    """Forward trains a copy of a layer instead of the layer."""

    def forward(self, features):
        x = torch.tanh(self.hidden(features.to(self.output.weight.dtype)))
        return copy.deepcopy(self.output)(x)


def complex_parameter() -> nn.Module:
    """A complex parameter."""
    net = Net()
    net.turn = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    net.register_forward_hook(lambda module, given, output: output * module.turn.real)
    return net


def nothing_trains() -> nn.Module:
    """Every parameter is frozen."""
    return Net().requires_grad_(False)


@dataclass(frozen=True)
class Refused:
    """A kind that cannot be trained on shards."""

    make: Callable[[], nn.Module]
    """Returns the module."""

    word: str
    """What the refusal names: the attribute, or what it does."""

    late: bool = False
    """It may show after some steps, which are right."""

    or_right: bool = False
    """It may be trained as well, if it is right."""

    raises: bool = False
    """It raises by itself on some rows."""


REFUSED: dict[str, Refused] = {
    "forward makes a submodule": Refused(GrowsHead, "head"),
    "a lambda of a parameter": Refused(LambdaOfSelf, "activation|scale|lambda", or_right=True),
    "a hook that closes over a parameter": Refused(closure, "hook|gradient|leaf|tensor", or_right=True),
    "a global parameter": Refused(Global, "gradient|leaf|tensor", or_right=True),
    "layers in a list": Refused(InList, "extra|gradient|leaf|tensor", or_right=True),
    "a weak reference": Refused(Weak, "link", or_right=True),
    "a parameter that is another's transpose": Refused(Autoencoder, "share memory"),
    "parameters that overlap": Refused(Overlapping, "share memory"),
    "a buffer that is a weight": Refused(buffer_of_weight, "share memory", or_right=True),
    "a Python counter": Refused(Counter, "calls"),
    "state that changes every fifth call": Refused(Rarely, "calls|factor", late=True),
    "a buffer of the largest value": Refused(Peak, "peak|row"),
    "running statistics of another norm": Refused(
        lambda: Around(nn.InstanceNorm1d(2, track_running_stats=True), 2, 12), "running_mean"
    ),
    "a tensor attribute that changes": Refused(TensorAttribute, "seen"),
    "a generator of the module's own": Refused(OwnGenerator, "generator"),
    "rows minus their mean": Refused(BatchMean, "row"),
    "rows that are sorted": Refused(Sorted, "row"),
    "rows minus their mean, behind noise": Refused(NoisyBatchMean, "other rows"),
    "a millionth of other rows": Refused(LittleMixing, "other rows"),
    "rows that mix in evaluation": Refused(MixesInEvaluation, "in evaluation mode"),
    "noise that no seed reaches": Refused(Unseeded, "default_rng"),
    "noise that starts anew in each piece": Refused(RepeatedNoise, "other rows"),
    "an absolute offset of memory": Refused(AbsoluteOffset, "output.weight"),
    "a branch by a weight's strides": Refused(StrideBranch, "hidden.weight"),
    "a recurrent layer over rows": Refused(
        lambda: Around(nn.Sequential(nn.Unflatten(1, (6, 4)), First(nn.GRU(4, 3)))), "row"
    ),
    "attention over rows": Refused(
        lambda: Around(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0), 4, 6), "row"
    ),
    "gradients scaled by frequency": Refused(
        lambda: Indexed(nn.Embedding(6, 3, scale_grad_by_freq=True)), "row"
    ),
    "a hook that clips": Refused(NonlinearHook, "row|hook|gradient"),
    "a hook after accumulation": Refused(accumulated, "hook", or_right=True),
    "a lock": Refused(lambda: Holding(lambda net: threading.Lock()), "held"),
    "an open file": Refused(lambda: Holding(lambda net: Path(os.devnull).open()), "held"),  # noqa: SIM115
    "a Python generator": Refused(ForwardGenerator, "numbers"),
    "a view of a weight": Refused(lambda: Holding(lambda net: net.hidden.weight[0]), "held"),
    "an activation kept": Refused(lambda: Holding(lambda net: net.output(torch.ones(WIDTH))), "held"),
    "a scripted module": Refused(lambda: Around(torch.jit.script(nn.Linear(IN, WIDTH))), "script|Script"),
    "nothing has an influence": Refused(Detached, "gradient"),
    "a copy is trained": Refused(CopiesItself, "gradient|leaf|tensor", or_right=True),
    "a complex parameter": Refused(complex_parameter, "turn", or_right=True),
    "extra state": Refused(ExtraState, "_extra_state", or_right=True),
    "every parameter frozen": Refused(nothing_trains, "trainable"),
    "a parameter without data": Refused(lambda: nn.Linear(IN, 2, device="meta"), "meta"),
}
"""They are refused, by a word that tells what is meant."""


# Randomness


class NumpyDropout(Net):
    """Dropout by numpy's generator."""

    def act(self, x):
        return torch.tanh(x) * torch.from_numpy(np.random.random(x.shape) < 0.7).to(x.dtype)


class NumpyNoise(Net):
    """Noise around values, and one factor for each row, by numpy's generators."""

    def act(self, x):
        noise = np.random.normal(x.detach().numpy(), 0.1)
        factors = np.random.randint(1, 3, (len(x), 1))
        return torch.tanh(x) * torch.from_numpy(factors) + torch.from_numpy(noise).to(x.dtype)


class PythonDropout(Net):
    """Dropout by Python's generator."""

    def act(self, x):
        return torch.tanh(x) * random.random()


class NoisyEvaluation(Net):
    """Noise in evaluation, too."""

    def act(self, x):
        return torch.tanh(x) + torch.randn_like(x) / 4


RANDOM: dict[str, Callable[[], nn.Module]] = {
    "dropout by numpy": NumpyDropout,
    "noise by numpy": NumpyNoise,
    "dropout by Python": PythonDropout,
    "noise in evaluation": NoisyEvaluation,
}
"""They draw numbers: two runs with the same shards are equal, evaluations, too."""
