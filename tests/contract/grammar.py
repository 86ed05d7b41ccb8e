"""Small modules by words: which blocks, in which order, changed how; and how they are trained.

    out = last(block_n(... block_1(first(features)))) + the nets that stand beside

A sentence is printed as the call that makes it, so that a failure can be tried by itself.  Every word is
`ORDINARY` (right, never refused) or `EITHER` (right or refused before it does harm).

Legend: B rows, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import contract_changes
import contract_kinds
import contract_layers
import contract_optimizers
import torch
from contract_layers import FEATURES
from hypothesis import strategies as st
from plain_torch import Recipe
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize, prune

WIDTH = 4

Make = Callable[[], nn.Module]
Change = Callable[["Drawn", int], None]


# Blocks: [B, W] -> [B, W]


class Gate(nn.Module):
    """A scale and a shift for each column."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x * self.scale + self.shift


class Plus(nn.Module):
    """A block beside the identity."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        return x + self.block(x)


class Shaped(nn.Module):
    """A layer of [B, *shape]."""

    def __init__(self, layer: nn.Module, *shape: int) -> None:
        super().__init__()
        self.layer, self.shape = layer, shape

    def forward(self, x):
        return self.layer(x.view(-1, *self.shape)).reshape(len(x), WIDTH)


class Looked(nn.Module):
    """Vectors by the sign of the columns."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(2, WIDTH, **given)

    def forward(self, x):
        return x + self.table((x.detach()[:, 0] > 0).long())


class Skips(nn.Module):
    """A branch for the rows above a bound only; none may be."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.bound = nn.Linear(WIDTH, WIDTH), 0.9

    def forward(self, x):
        rows = (x.detach()[:, 0] > self.bound).nonzero()[:, 0]
        return x.index_add(0, rows, self.branch(x[rows])) if len(rows) else x


class Alternates(nn.Module):
    """Another branch in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.one(x) if self.training else self.other(x)


class Bounded(nn.Linear):
    """Weights are clamped in forward."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.3, 0.3)
        return super().forward(x)


class Bound(nn.Linear):
    """Weights are rebound in forward, in training."""

    def forward(self, x):
        if self.training:
            self.weight.data = self.weight.data / self.weight.data.norm(dim=1, keepdim=True).clamp(min=1)
        return super().forward(x)


class Follows(nn.Linear):
    """A frozen average of its weights takes part."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.slow = nn.Parameter(torch.zeros(WIDTH, WIDTH), requires_grad=False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.slow.lerp_(self.weight, 0.2)
        return super().forward(x) + x @ self.slow


class Counts(nn.Linear):
    """A Python counter, without influence."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class CountsAndScales(Counts):
    """A Python counter, with influence."""

    def forward(self, x):
        return super().forward(x) * (1 + self.calls / 8)


class Remembers(nn.Linear):
    """The last output is an attribute."""

    last: torch.Tensor | None = None

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class Minus(nn.Module):
    """Rows minus their mean."""

    def forward(self, x):
        return x - x.mean(0)


class Peaks(nn.Module):
    """Columns divided by the largest value seen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("peak", torch.ones(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.peak.copy_(torch.maximum(self.peak, x.detach().abs().max()))
        return x / self.peak


def _linear(change: Callable[..., object], *given: Any, **more: Any) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        layer = nn.Linear(WIDTH, WIDTH)
        change(layer, *given, **more)
        return layer

    return made


BLOCKS: dict[str, Make] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "residual": lambda: Plus(nn.Sequential(nn.Linear(WIDTH, 3), nn.Tanh(), nn.Linear(3, WIDTH))),
    "gate": Gate,
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "dropout off": lambda: nn.Dropout(0.0),
    "prelu": lambda: nn.PReLU(WIDTH),
    "convolution": lambda: Shaped(nn.Conv1d(1, 1, 3, padding=1), 1, WIDTH),
    "convolution, 2-d": lambda: Shaped(nn.Conv2d(1, 1, 3, padding=1), 1, 2, 2),
    "recurrent": lambda: Shaped(contract_layers.First(nn.GRU(2, 2, batch_first=True)), 2, 2),
    "attention": lambda: Shaped(
        nn.TransformerEncoderLayer(2, 1, 2, dropout=0.0, batch_first=True, norm_first=True), 2, 2
    ),
    "embedding": Looked,
    "embedding, sparse": lambda: Looked(sparse=True),
    "skips": Skips,
    "alternates": Alternates,
    "own function": lambda: _Applied(),
    "weight norm": _linear(parametrizations.weight_norm),
    "orthogonal": _linear(parametrizations.orthogonal),
    "own parametrization": lambda: _doubled(),
    "pruned": _linear(prune.l1_unstructured, "weight", 0.5),
    "frozen": _linear(nn.Linear.requires_grad_, False),
    "frozen norm": lambda: nn.BatchNorm1d(WIDTH).eval(),
    "spectral norm": _linear(parametrizations.spectral_norm),
    "bounded in place": lambda: Bounded(WIDTH, WIDTH),
    "bounded by rebinding": lambda: Bound(WIDTH, WIDTH),
    "bounded embedding": lambda: Looked(max_norm=0.5),
    "follows": Follows,
}
"""Ordinary: right, never refused."""

ODD_BLOCKS: dict[str, Make] = {
    "counts": lambda: Counts(),
    "counts and scales": lambda: CountsAndScales(),
    "remembers": lambda: Remembers(WIDTH, WIDTH),
    "minus mean": Minus,
    "peaks": Peaks,
    "recurrent over rows": lambda: contract_layers.First(nn.GRU(WIDTH, WIDTH)),
    "by frequency": lambda: Looked(scale_grad_by_freq=True),
    "lazy": lambda: nn.LazyLinear(WIDTH),
}
"""Right, or refused."""


class _Applied(nn.Module):
    def forward(self, x):
        return contract_kinds.Cubed.apply(torch.tanh(x))


def _doubled() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(layer, "weight", contract_kinds.Doubled())
    return layer


BESIDE: dict[str, Make] = {
    **contract_kinds.ORDINARY,
    **contract_changes.RIGHT,
    **contract_layers.LAYERS,
}
"""Whole nets, ordinary ones."""

ODD_BESIDE: dict[str, Make] = {name: refused.make for name, refused in contract_changes.REFUSED.items()}
"""Whole nets that are refused, or right."""

ACTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": torch.tanh,
    "gelu": nn.functional.gelu,
    "softplus": nn.functional.softplus,
    "relu": torch.relu,
}


# The net, and what is changed about it


@dataclass(frozen=True)
class Sentence:
    """A module, and how it is trained."""

    blocks: tuple[str, ...] = ()
    act: str = "tanh"
    beside: tuple[str, ...] = ()
    changes: tuple[tuple[str, int], ...] = ()
    """A change, and a number that says of which parameter or layer."""

    loss: str = "pulled"
    optimizer: str = "SGD"
    schedule: str | None = None

    @property
    def is_ordinary(self) -> bool:
        """Return whether no word of it may be refused."""
        words = {*self.blocks, *self.beside, *(name for name, _ in self.changes), self.loss}
        return not words & {*ODD_BLOCKS, *ODD_BESIDE, *ODD_CHANGES, *ODD_LOSSES}

    @property
    def shows_late(self) -> bool:
        """Return whether what is wrong may show after some steps."""
        return any(name in ODD_BESIDE and contract_changes.REFUSED[name].late for name in self.beside)

    def recipe(self) -> Recipe:
        """Return how it is trained."""
        return Recipe(
            loss=f"contract_losses:{self.loss}",
            optimizer=contract_optimizers.OPTIMIZERS[self.optimizer],
            schedule={} if self.schedule is None else contract_optimizers.SCHEDULES[self.schedule],
            steps=3,
        )

    def make(self) -> nn.Module:
        """Return the module."""
        net = Drawn(self.act)
        net.blocks.extend({**BLOCKS, **ODD_BLOCKS}[name]() for name in self.blocks)
        net.beside.extend({**BESIDE, **ODD_BESIDE}[name]() for name in self.beside)
        _leave_zero(net)
        for name, number in self.changes:
            {**CHANGES, **ODD_CHANGES}[name](net, number)
        return net


class Drawn(nn.Module):
    """A stack of blocks, and nets beside it, which are put in: each piece looks at the globals it names."""

    def __init__(self, act: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, 2)
        self.blocks, self.beside = nn.ModuleList(), nn.ModuleList()
        self.act = act

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = self.first(features.to(self.first.bias.dtype))
        for block in self.blocks:
            x = ACTS[self.act](block(x))
        output = self.last(x)
        for net in self.beside:
            output = output + net(features) / 2
        return output


def _leave_zero(net: nn.Module) -> None:
    """Give biases that start at 0 other values.

    With a gradient of 0 (keys of attention) they would hold rounding alone, which Adam with decay enlarges
    a millionfold each step.
    """
    for parameter in net.parameters():
        if parameter.ndim == 1 and not is_lazy(parameter) and not parameter.is_meta and not parameter.any():
            nn.init.uniform_(parameter, 0.1, 0.2)


def _parameter(net: Drawn, number: int) -> nn.Parameter:
    """Return one of the trainable parameters that any net has, which still trains."""
    return [net.first.weight, net.first.bias, net.last.weight, net.last.bias][number % 4]


def _layer(net: Drawn, number: int) -> nn.Module:
    layers = [net.first, *net.blocks, net.last]
    return layers[number % len(layers)]


def _hook(hook: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda net, number: _require_hook(_parameter(net, number), hook)


def _require_hook(parameter: nn.Parameter, hook: Callable[[torch.Tensor], torch.Tensor]) -> None:
    if parameter.requires_grad:
        parameter.register_hook(hook)


def _masks(net: Drawn, number: int) -> None:
    parameter = _parameter(net, number)
    mask = torch.arange(parameter.numel()).view(parameter.shape) % 2
    _require_hook(parameter, lambda gradient: gradient * mask)


def _scales_output(net: Drawn, number: int) -> None:
    _layer(net, number).register_forward_hook(lambda module, given, output: output * 0.5)


def _scales_input(net: Drawn, number: int) -> None:
    _layer(net, number).register_forward_pre_hook(lambda module, given: (given[0] * 2,))


def _scales_gradients(net: Drawn, number: int) -> None:
    net.last.register_full_backward_hook(lambda module, inner, outer: tuple(g * 2 for g in inner))


def _freezes(net: Drawn, number: int) -> None:
    _parameter(net, number).requires_grad_(False)


def _fixes_layer(net: Drawn, number: int) -> None:
    _layer(net, number).eval()


def _adds_head(net: Drawn, number: int) -> None:
    net.head = nn.Linear(number % 3 + 1, 2)


def _ties(net: Drawn, number: int) -> None:
    net.tied = nn.Linear(FEATURES, WIDTH)
    net.tied.weight = net.first.weight
    net.register_forward_hook(
        lambda module, given, output: output + module.tied(given[0].to(output.dtype))[:, :2]
    )


def _shares(net: Drawn, number: int) -> None:
    net.tied = nn.Linear(FEATURES, WIDTH)
    net.double()
    net.double = lambda: net
    net.tied.weight = nn.Parameter(net.first.weight.detach())
    net.register_forward_hook(
        lambda module, given, output: output + module.tied(given[0].to(output.dtype))[:, :2]
    )


def _adds_parameter(values: Callable[[], torch.Tensor]) -> Change:
    def change(net: Drawn, number: int) -> None:
        net.extra = nn.Parameter(values())
        net.register_forward_hook(lambda module, given, output: output + module.extra.sum() / 3)

    return change


def _adds_buffer(net: Drawn, number: int) -> None:
    net.register_buffer("constant", torch.randn(2), persistent=number % 2 == 0)
    net.register_forward_hook(lambda module, given, output: output + module.constant)


def _closes_over_layer(net: Drawn, number: int) -> None:
    layer = net.last
    net.register_forward_hook(lambda module, given, output: output + layer.bias)


def _closes_over_tensor(net: Drawn, number: int) -> None:
    shift = torch.randn(2)
    net.register_forward_hook(lambda module, given, output: output + shift.to(output.dtype))


def _closes_over_parameter(net: Drawn, number: int) -> None:
    shift = nn.Parameter(torch.randn(2))
    net.register_forward_hook(lambda module, given, output: output + shift.to(output.dtype))


def _stores_activation(net: Drawn, number: int) -> None:
    net.first.register_forward_hook(lambda module, given, output: setattr(module, "kept", output))


def _appends(net: Drawn, number: int) -> None:
    seen: list[float] = []
    net.first.register_forward_hook(lambda module, given, output: seen.append(float(output.sum())))


def _attribute(net: Drawn, number: int) -> None:
    _parameter(net, number).scale = 3.0
    net.register_forward_hook(
        lambda module, given, output: output * (1 + sum(getattr(p, "scale", 0) for p in module.parameters()))
    )


def _trains_some(net: Drawn, number: int) -> None:
    net.parameters = lambda recurse=True: iter([*net.first.parameters(), *net.last.parameters()])


CHANGES: dict[str, Change] = {
    "hook scales": _hook(lambda gradient: gradient * 0.25),
    "hook masks": _masks,
    "hook on output": _scales_output,
    "hook on input": _scales_input,
    "hook on gradients": _scales_gradients,
    "freezes": _freezes,
    "fixes a layer": _fixes_layer,
    "unused head": _adds_head,
    "ties": _ties,
    "scalar parameter": _adds_parameter(lambda: torch.ones(())),
    "empty parameter": _adds_parameter(lambda: torch.ones(0, 3)),
    "strided parameter": _adds_parameter(lambda: torch.randn(3, 2).t()),
    "constant buffer": _adds_buffer,
    "hook with a constant": _closes_over_tensor,
    "attribute of a parameter": _attribute,
}
"""Ordinary."""

ODD_CHANGES: dict[str, Change] = {
    "hook clips": _hook(lambda gradient: gradient.clamp(-0.001, 0.001)),
    "hook adds": _hook(lambda gradient: gradient + 0.01),
    "hook on a layer of its own": _closes_over_layer,
    "hook with a parameter": _closes_over_parameter,
    "shares storage": _shares,
    "expanded parameter": _adds_parameter(lambda: torch.ones(1).expand(3)),
    "stores an activation": _stores_activation,
    "appends to a list": _appends,
    "parameters() as a lambda": _trains_some,
}
"""Right, or refused."""

LOSSES = ("pulled", "cross_entropy", "weighted_classes", "smoothed", "robust")
ODD_LOSSES = ("divided_by_rows", "outer", "contrasted", "counting", "margins")

JUMPS_AT_ZERO = {"Adafactor", "Rprop"}
"""Optimisers that divide a gradient by its size: what is 0, and 1e-18 elsewhere, moves a parameter."""


def _words(ordinary: Mapping[str, Any], odd: Mapping[str, Any]) -> st.SearchStrategy[str]:
    """Draw a word; an odd one in one of eight cases."""
    return st.integers(0, 7).flatmap(lambda roll: st.sampled_from([*(ordinary if roll else odd)]))


@st.composite
def sentences(draw: st.DrawFn) -> Sentence:
    """Draw a module, a loss, an optimiser and a schedule."""
    odd = draw(st.booleans())

    def words(ordinary: Mapping[str, Any], rare: Mapping[str, Any]) -> st.SearchStrategy[str]:
        return _words(ordinary, rare) if odd else st.sampled_from([*ordinary])

    schedules = st.none() | st.sampled_from([*contract_optimizers.SCHEDULES])
    optimizer = draw(st.sampled_from([n for n in contract_optimizers.OPTIMIZERS if n not in JUMPS_AT_ZERO]))
    has_momentum = "momentum" in contract_optimizers.OPTIMIZERS[optimizer]
    return Sentence(
        blocks=tuple(draw(st.lists(words(BLOCKS, ODD_BLOCKS), max_size=4))),
        act=draw(st.sampled_from([*ACTS])),
        beside=tuple(draw(st.lists(words(BESIDE, ODD_BESIDE), max_size=1))),
        changes=tuple(draw(st.lists(st.tuples(words(CHANGES, ODD_CHANGES), st.integers(0, 5)), max_size=3))),
        loss=draw(words(dict.fromkeys(LOSSES), dict.fromkeys(ODD_LOSSES))),
        optimizer=optimizer,
        schedule=draw(schedules) if has_momentum else None,
    )
