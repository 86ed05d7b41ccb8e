"""Modules as people write them, by kind: shared, frozen, hooked, parametrized, with modes of their own.

Each takes float32[B, 24] features and gives float[B, 2], and trains as on one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from contract_layers import FEATURES
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

IN, WIDTH = FEATURES, 5


class Net(nn.Module):
    """Linear, tanh, linear; kinds change `hidden`, `act` or `output`."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(IN, WIDTH)
        self.output = nn.Linear(WIDTH, 2)

    def act(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.output(self.act(self.hidden(features.to(self.output.weight.dtype))))


# Ordinary: sharing, freezing, heads


class SameTwice(Net):
    """A layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(WIDTH, WIDTH)

    def act(self, x):
        return torch.tanh(self.middle(torch.tanh(self.middle(x))))


class Tied(Net):
    """Two layers with one weight, and a decoder that uses it the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.decoder.weight = self.encoder.weight

    def act(self, x):
        return F.linear(torch.tanh(self.decoder(self.encoder(x))), self.encoder.weight.t())


def frozen() -> nn.Module:
    """A frozen layer, and a frozen bias."""
    net = Net()
    net.hidden.requires_grad_(False)
    net.output.bias.requires_grad_(False)
    return net


class Heads(Net):
    """Three heads: one is used, one only by rows that do not exist, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.rare, self.unused = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)

    def forward(self, features):
        x = torch.tanh(self.hidden(features.to(self.output.weight.dtype)))
        output, of_rare = self.output(x), features[:, 0] > 100
        if of_rare.any():
            output = torch.where(of_rare[:, None], self.rare(x), output)
        return output


class CallsDefaults(Net):
    """Lambdas whose arguments' defaults hold layers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = [lambda x, layer=layer: layer(x) for layer in (self.hidden, self.output)]
        self.last = lambda x, *, scale=self.output.bias: x * scale.sum()

    def forward(self, features):
        first, second = self.calls
        return self.last(second(torch.tanh(first(features.to(self.output.weight.dtype)))))


class OwnStatistics(Net):
    """A handwritten batch-norm, which also counts rows and keeps the largest value."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("peak", torch.zeros(()))
        self.register_buffer("rows", torch.zeros((), dtype=torch.long))

    def forward(self, features):
        x = self.hidden(features.to(self.output.weight.dtype))
        mean = self.mean
        if self.training:
            mean = x.mean(0)
            self.mean.lerp_(mean.detach(), 0.1)
            self.peak = torch.maximum(self.peak, x.detach().abs().max())
            self.rows += len(x)
        return self.output(torch.tanh(x - mean)) / (1 + self.peak)


class Attributed(Net):
    """Each parameter has attributes that an optimiser looks at; the masks are of another shape each."""

    def __init__(self) -> None:
        super().__init__()
        for number, parameter in enumerate(self.parameters()):
            parameter.lr_scale = 0.5**number
            parameter.mask = (torch.arange(parameter.numel()) % 3 > 0).view(parameter.shape).double()


class Experts(Net):
    """Two experts: each row goes to one; a piece of few rows may leave one out."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.rule = "first"

    def forward(self, features):
        x = torch.tanh(self.hidden(features.to(self.output.weight.dtype)))
        chosen = (features[:, 0] > 1.2).long()
        parts = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                parts = parts.index_add(0, rows, expert(x[rows]))
        return self.output(parts)


class Residual(Net):
    """A residual block with a learnt gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(WIDTH))

    def act(self, x):
        return x + torch.sigmoid(self.gate) * torch.tanh(x)


class Containers(nn.Module):
    """Parameters and layers in lists and dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"in": nn.Linear(IN, WIDTH), "out": nn.Linear(WIDTH, 2)})
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))])
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.zeros(2))})

    def forward(self, features):
        x = self.layers["in"](features.to(self.scales[0].dtype))
        return self.layers["out"](torch.tanh(x * self.scales[0] + self.scales[1])) + self.named["shift"]


class Constants(Net):
    """Buffers: one that is saved, one that is not, whole numbers, and Python's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(IN))
        self.register_buffer("drawn", torch.randn(WIDTH, WIDTH), persistent=False)
        self.register_buffer("order", torch.randperm(WIDTH))
        self.slope, self.names = 0.7, ("a", "b")

    def forward(self, features):
        x = features.to(self.mean.dtype) - self.mean
        return self.output((torch.tanh(self.hidden(x)) @ self.drawn)[:, self.order] * self.slope)


class OtherTypes(Net):
    """Buffers of other types, and without memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bytes", torch.arange(WIDTH, dtype=torch.uint8))
        self.register_buffer("mask", torch.arange(WIDTH) > 0)
        self.register_buffer("turn", torch.ones(WIDTH, dtype=torch.complex64) * 1j)
        self.register_buffer("narrow", torch.ones(WIDTH, dtype=torch.bfloat16))
        self.register_buffer("nothing", torch.ones(0, 3))

    def act(self, x):
        scale = self.mask * self.bytes.to(x.dtype) / 4 + self.turn.imag + self.narrow.to(x.dtype)
        return torch.tanh(x * scale) + self.nothing.sum()


class Neighbours(Net):
    """A sparse buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("links", torch.eye(WIDTH).to_sparse())

    def act(self, x):
        return torch.tanh(torch.sparse.mm(self.links.to(x.dtype), x.T).T)


# Ordinary: autograd


class Cubed(torch.autograd.Function):
    """x^3, with its own backward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x * x * gradient


class OwnFunction(Net):
    """A custom autograd function."""

    def act(self, x):
        return Cubed.apply(torch.tanh(x))


class Rounded(Net):
    """A straight-through estimator."""

    def act(self, x):
        return x + (torch.round(4 * x) / 4 - x).detach()


class Checkpointed(Net):
    """Activations that are computed again in the backward pass.

    Args:
        use_reentrant: which of torch's two ways.
    """

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.middle, self.use_reentrant = nn.Linear(WIDTH, WIDTH), use_reentrant

    def act(self, x):
        return checkpoint(self.middle, torch.tanh(x), use_reentrant=self.use_reentrant)


class Pairs(nn.Module):
    """Pairs of weights that are used as complex numbers."""

    def __init__(self, *, cloned: bool) -> None:
        super().__init__()
        self.pairs = nn.Parameter(torch.randn(WIDTH, WIDTH, 2))
        self.cloned = cloned

    def forward(self, x):
        pairs = self.pairs.clone() if self.cloned else self.pairs
        turned = torch.view_as_complex(pairs).conj()
        return torch.view_as_real(torch.complex(x, x) @ turned).sum(2)


def complex_views(*, cloned: bool = False) -> nn.Module:
    """A bias of odd size, and then pairs: in one vector they begin at an odd place."""
    return nn.Sequential(Narrowed(), Pairs(cloned=cloned), nn.Linear(WIDTH, 2))


class Narrowed(nn.Linear):
    """The first layer."""

    def __init__(self) -> None:
        super().__init__(IN, WIDTH)

    def forward(self, features):
        return super().forward(features.to(self.weight.dtype))


class Forces(Net):
    """The gradient of an energy with respect to the features: forward takes gradients, in evaluation, too."""

    def forward(self, features):
        with torch.enable_grad():
            x = features.to(self.output.weight.dtype).requires_grad_()
            energy = self.output(torch.tanh(self.hidden(x))).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return force[:, :2]


class Functional(Net):
    """The layers are called with other weights than their own, by torch.func."""

    def forward(self, features):
        weights = {name: parameter * 2 for name, parameter in self.hidden.named_parameters()}
        x = torch.func.functional_call(self.hidden, weights, (features.to(self.output.weight.dtype),))
        return torch.func.vmap(self.output)(torch.tanh(x))


class Autocast(Net):
    """Matrix products in bfloat16."""

    def forward(self, features):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(features).float()


class HalfAutocast(Net):
    """Matrix products in float16."""

    def forward(self, features):
        with torch.autocast("cpu", torch.float16):
            return super().forward(features).float()


class Backbone(Net):
    """A frozen backbone in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(IN, IN).to(torch.bfloat16).requires_grad_(False)

    def forward(self, features):
        return super().forward(self.backbone(features.to(torch.bfloat16)).float())


# Ordinary: parametrized


class Doubled(nn.Module):
    """w -> 2 w + 1."""

    def forward(self, weight):
        return 2 * weight + 1


def parametrized(change: Callable[[nn.Linear], object]) -> nn.Module:
    """Return a net whose square middle layer was changed."""
    net = SameTwice()
    change(net.middle)
    return net


def shared_parametrized() -> nn.Module:
    """Two layers of one weight, which is parametrized in both."""
    net = Tied()
    parametrize.register_parametrization(net.encoder, "weight", Doubled())
    return net


def pruned_by_hand() -> nn.Module:
    """Two prunings of one weight, and one of a bias."""
    net = Net()
    prune.l1_unstructured(net.hidden, "weight", 0.3)
    prune.ln_structured(net.hidden, "weight", 0.4, n=2, dim=0)
    prune.random_unstructured(net.hidden, "bias", 0.5)
    return net


# Ordinary: hooks


def masked_by_hook() -> nn.Module:
    """Sparse training: a hook takes out some of the weight's gradient."""
    net = Net()
    mask = (torch.arange(WIDTH * IN).view(WIDTH, IN) % 3 > 0).double()
    net.hidden.weight.register_hook(lambda gradient: gradient * mask.to(gradient.dtype))
    return net


def scaled_by_hooks() -> nn.Module:
    """Two hooks on one parameter, one on another."""
    net = Net()
    net.hidden.weight.register_hook(lambda gradient: gradient * 0.5)
    net.hidden.weight.register_hook(lambda gradient: gradient * 3)
    net.output.bias.register_hook(torch.neg)
    return net


def hooked() -> nn.Module:
    """Hooks on modules: before and after forward, and on gradients."""
    net = Net()
    net.hidden.register_forward_pre_hook(lambda module, given: (given[0] * 2,))
    net.hidden.register_forward_hook(lambda module, given, output: output + 1)
    net.output.register_full_backward_hook(lambda module, inner, outer: (inner[0] * 0.5,))
    return net


def accumulated() -> nn.Module:
    """A hook that scales the gradient once it has been accumulated."""
    net = Net()

    def scale(parameter: nn.Parameter) -> None:
        parameter.grad.mul_(0.25)

    net.hidden.weight.register_post_accumulate_grad_hook(scale)
    return net


class HooksInForward(Net):
    """A hook on an activation, registered in each forward pass."""

    def act(self, x):
        x = torch.tanh(x)
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * 0.5)
        return x


class MaskedByAttribute(Net):
    """A mask that is an attribute of the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden.weight.mask = torch.arange(WIDTH * IN).view(WIDTH, IN) % 2

    def forward(self, features):
        weight = self.hidden.weight * self.hidden.weight.mask
        return self.output(torch.tanh(F.linear(features.to(weight.dtype), weight, self.hidden.bias)))


class PlainLambda(Net):
    """An activation that is a lambda, of nothing but its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = lambda x: torch.tanh(x) * 0.5

    def act(self, x):
        return self.activation(x)


# Ordinary: modes


class LowRank(Net):
    """A frozen layer with a trained adapter of rank 2, which evaluation merges into the weight."""

    def __init__(self, merges: bool) -> None:
        super().__init__()
        self.hidden.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, IN) / 5), nn.Parameter(torch.zeros(WIDTH, 2))
        self.merges, self.merged = merges, False

    def train(self, mode: bool = True) -> LowRank:
        super().train(mode)
        if self.merges and self.merged == mode:
            with torch.no_grad():
                self.hidden.weight.add_(self.up @ self.down, alpha=-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, features):
        features = features.to(self.output.weight.dtype)
        x = self.hidden(features)
        if not self.merged:
            x = x + features @ self.down.T @ self.up.T
        return self.output(torch.tanh(x))


class FixedNorm(Net):
    """Batch-norm that stays in evaluation mode, because train() keeps it there."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.norm.running_mean.fill_(0.1)
        self.train()

    def train(self, mode: bool = True) -> FixedNorm:
        super().train(mode)
        self.norm.eval()
        return self

    def act(self, x):
        return torch.tanh(self.norm(x))


class OtherInEvaluation(Net):
    """A module that computes something else in evaluation."""

    def act(self, x):
        return torch.tanh(x) if self.training else F.hardtanh(x)


class CachedInEvaluation(Net):
    """A product of weights that evaluation computes once, and train() throws away."""

    def __init__(self) -> None:
        super().__init__()
        self.cached = None

    def train(self, mode: bool = True) -> CachedInEvaluation:
        self.cached = None
        return super().train(mode)

    def forward(self, features):
        product = self.output.weight @ self.hidden.weight if self.cached is None else self.cached
        if not self.training and self.cached is None:
            self.cached = product
        return features.to(product.dtype) @ product.T


class OnlySome(Net):
    """An adapter whose `parameters()` gives only what is to be trained."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter([self.output.weight, self.output.bias])


class Matrices(nn.Module):
    """Nothing but matrices, one of them unused."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(IN, WIDTH, bias=False), nn.Linear(WIDTH, 2, bias=False)
        self.unused = nn.Linear(WIDTH, 2, bias=False)

    def forward(self, features):
        return self.output(torch.tanh(self.hidden(features.to(self.output.weight.dtype))))


# What a saved state has beside tensors


class ExtraState(Net):
    """Extra state in the state_dict."""

    def get_extra_state(self) -> object:
        return {"words": ["a", "b"]}

    def set_extra_state(self, state: object) -> None:
        assert state == {"words": ["a", "b"]}


def state_hooked() -> nn.Module:
    """A hook that renames an entry of the state_dict."""
    net = Net()
    net._register_state_dict_hook(
        lambda module, state, prefix, rest: state.update({f"{prefix}alias": state[f"{prefix}output.bias"]})
    )
    net._register_load_state_dict_pre_hook(
        lambda state, prefix, *rest: state.pop(f"{prefix}alias", None), with_module=False
    )
    return net


@torch.jit.script
def swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


class Scripted(Net):
    """A scripted function as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.swish = swish

    def act(self, x):
        return self.swish(x)


class ByLength(Net):
    """Tables in a dictionary, by a length that differs from piece to piece."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, torch.Tensor] = {}

    def forward(self, features):
        lengths = (features.abs() > 0.8).sum(1)
        longest = int(10 * features.abs().sum())
        if longest not in self.tables:
            self.tables[longest] = torch.arange(longest + 1) / 100
        return super().forward(features) + self.tables[longest][lengths][:, None]


class CachedByVersion(Net):
    """It computes what it makes of a weight anew where the version of this moves."""

    seen = -1

    def forward(self, features):
        weight = self.hidden.weight
        if weight._version != self.seen:
            self.seen, self.cached = weight._version, torch.tanh(weight)
        return self.output(torch.tanh(F.linear(features.to(weight.dtype), self.cached)))


class CountsCalls(Net):
    """It counts its calls and rows, for nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.rows = 0, 0

    def forward(self, features):
        self.calls += 1
        self.rows += len(features)
        return super().forward(features)


class SparseWords(Net):
    """Words of a dictionary, whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, WIDTH, sparse=True)

    def forward(self, features):
        words = self.words((10 * features.abs()).long().clamp(max=19)).sum(1)
        return super().forward(features) + self.output(words)


ORDINARY: dict[str, Callable[[], nn.Module]] = {
    "plain": Net,
    "a layer used twice": SameTwice,
    "tied weights": Tied,
    "frozen parameters": frozen,
    "several heads, some unused": Heads,
    "experts, some left out by a piece": Experts,
    "a residual block with a gate": Residual,
    "parameters in lists and dictionaries": Containers,
    "constant buffers": Constants,
    "buffers of other types": OtherTypes,
    "a sparse buffer": Neighbours,
    "a custom autograd function": OwnFunction,
    "a straight-through estimator": Rounded,
    "checkpointing": lambda: Checkpointed(use_reentrant=False),
    "checkpointing, reentrant": lambda: Checkpointed(use_reentrant=True),
    "complex views": complex_views,
    "complex views of a clone": lambda: complex_views(cloned=True),
    "forward takes gradients": Forces,
    "functional calls": Functional,
    "weight_norm": lambda: parametrized(parametrizations.weight_norm),
    "orthogonal": lambda: parametrized(parametrizations.orthogonal),
    "an own parametrization": lambda: parametrized(
        lambda layer: parametrize.register_parametrization(layer, "weight", Doubled())
    ),
    "a parametrization of a shared weight": shared_parametrized,
    "weight_norm, the old one": lambda: parametrized(nn.utils.weight_norm),
    "pruned": pruned_by_hand,
    "a hook on a parameter masks": masked_by_hook,
    "hooks on parameters scale": scaled_by_hooks,
    "hooks on modules": hooked,
    "hooks registered in forward": HooksInForward,
    "an attribute of a parameter": MaskedByAttribute,
    "defaults of lambdas": CallsDefaults,
    "a lambda without state": PlainLambda,
    "an adapter": lambda: LowRank(merges=False),
    "an adapter that evaluation merges": lambda: LowRank(merges=True),
    "train() keeps a norm fixed": FixedNorm,
    "other values in evaluation": OtherInEvaluation,
    "a cache of evaluation": CachedInEvaluation,
    "parameters() gives some": OnlySome,
    "hooks on state_dict": state_hooked,
    "scripted functions": Scripted,
    "a cache of tables by length": ByLength,
    "a weight cached by its version": CachedByVersion,
    "a counter that nothing reads": CountsCalls,
    "an embedding with sparse gradients": SparseWords,
}
"""They train as on one process, and may not be refused."""

LOW_PRECISION: dict[str, Callable[[], nn.Module]] = {
    "bfloat16 autocast": Autocast,
    "float16 autocast": HalfAutocast,
    "a frozen bfloat16 backbone": Backbone,
}
"""As above, to the rounding of 16 bits."""
