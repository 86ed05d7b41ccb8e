"""Every layer of torch.nn that computes something, each in a small net that trains; executors import them.

A net takes float32[B, 24] features and gives float[B, 2]: linear, the layer, linear.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

FEATURES = 24


def widened(features: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Return the features in the type of a module's first parameter: tests also train in float64."""
    return features.to(next(module.parameters()).dtype)


class Around(nn.Module):
    """A layer between two linear ones.

    Args:
        layer: takes [B, *shape], gives [B, ...].
        shape: of one row.
        outputs: how many numbers the layer gives for a row; None: found out.
    """

    def __init__(self, layer: nn.Module, *shape: int, outputs: int | None = None) -> None:
        super().__init__()
        self.shape = shape or (FEATURES,)
        size = torch.Size(self.shape).numel()
        self.before = nn.Linear(FEATURES, size)
        self.layer = layer
        if outputs is None:
            mode = layer.training
            layer.eval()
            with torch.no_grad():
                outputs = layer(torch.ones(2, *self.shape)).flatten(1).shape[1]
            layer.train(mode)
        self.after = nn.Linear(outputs, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = self.before(widened(features, self.before)).view(-1, *self.shape)
        return self.after(self.layer(x).flatten(1))


class First(nn.Module):
    """A recurrent layer without its last state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


class Cell(nn.Module):
    """A recurrent cell over the steps of [B, T, F]."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class ToItself(nn.Module):
    """A layer of several arguments, given [B, ...] and the same backwards."""

    def __init__(self, layer: nn.Module, times: int = 2) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = [x, x.flip(1).tanh(), x.flip(1).sin()][: self.times]
        output = self.layer(*given)
        return output[0] if isinstance(output, tuple) else output


class Indexed(nn.Module):
    """An embedding of numbers 0..5 that are made of the features; [B, 6] of them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            outputs = layer(torch.ones(2, 6).long()).flatten(1).shape[1]
        self.after = nn.Linear(outputs, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        indices = (features[:, :6] * 3).long().abs() % 6
        return self.after(self.layer(indices).flatten(1))


class Unpooled(nn.Module):
    """Max-pooling, and back to where the maxima were."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool1d(2, return_indices=True)
        self.unpool = nn.MaxUnpool1d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.unpool(*self.pool(x))


class Likelihood(nn.Module):
    """The adaptive softmax's log-probabilities of four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.AdaptiveLogSoftmaxWithLoss(FEATURES, 4, cutoffs=[2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer.log_prob(x)


def _activations() -> dict[str, Callable[[], nn.Module]]:
    plain = (
        nn.ELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardtanh, nn.Hardswish, nn.LeakyReLU, nn.LogSigmoid,
        nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.CELU, nn.GELU, nn.Sigmoid, nn.SiLU, nn.Mish, nn.Softplus,
        nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.GLU, nn.Identity,
    )  # fmt: skip
    by_axis = (nn.Softmin, nn.Softmax, nn.LogSoftmax)
    return {
        **{kind.__name__: lambda kind=kind: Around(kind()) for kind in plain},
        **{kind.__name__: lambda kind=kind: Around(kind(dim=1)) for kind in by_axis},
        "Threshold": lambda: Around(nn.Threshold(0.1, 2.0)),
        "Softmax2d": lambda: Around(nn.Softmax2d(), 2, 3, 4),
    }


def _convolutions() -> dict[str, Callable[[], nn.Module]]:
    return {
        "Conv1d": lambda: Around(nn.Conv1d(2, 3, 3), 2, 12),
        "Conv1d, dilated": lambda: Around(nn.Conv1d(2, 2, 3, dilation=2, groups=2), 2, 12),
        "Conv2d": lambda: Around(nn.Conv2d(2, 3, 2), 2, 3, 4),
        "Conv2d, grouped": lambda: Around(nn.Conv2d(2, 4, 2, groups=2, padding=1), 2, 3, 4),
        "Conv2d, circular": lambda: Around(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), 2, 3, 4),
        "Conv3d": lambda: Around(nn.Conv3d(2, 2, 2), 2, 2, 2, 3),
        "ConvTranspose1d": lambda: Around(nn.ConvTranspose1d(2, 3, 3), 2, 12),
        "ConvTranspose2d": lambda: Around(nn.ConvTranspose2d(2, 2, 2), 2, 3, 4),
        "ConvTranspose3d": lambda: Around(nn.ConvTranspose3d(2, 2, 2), 2, 2, 2, 3),
        "Unfold": lambda: Around(nn.Unfold((2, 2)), 2, 3, 4),
        "Fold": lambda: Around(nn.Fold((3, 3), (2, 2)), 4, 4),
        "PixelShuffle": lambda: Around(nn.PixelShuffle(2), 4, 2, 3),
        "PixelUnshuffle": lambda: Around(nn.PixelUnshuffle(2), 1, 4, 6),
        "ChannelShuffle": lambda: Around(nn.ChannelShuffle(2), 4, 2, 3),
        "Upsample": lambda: Around(nn.Upsample(scale_factor=2, mode="bilinear"), 2, 3, 4),
        "UpsamplingNearest2d": lambda: Around(nn.UpsamplingNearest2d(scale_factor=2), 2, 3, 4),
        "UpsamplingBilinear2d": lambda: Around(nn.UpsamplingBilinear2d(scale_factor=2), 2, 3, 4),
    }


def _pools() -> dict[str, Callable[[], nn.Module]]:
    shapes = {"1d": (2, 12), "2d": (2, 3, 4), "3d": (2, 2, 2, 3)}
    found = {
        f"{name}{dims}": lambda name=name, dims=dims: Around(getattr(nn, name + dims)(2), *shapes[dims])
        for name in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")
        for dims in shapes
    }
    return found | {
        "LPPool1d": lambda: Around(nn.Sequential(nn.Softplus(), nn.LPPool1d(2, 2)), 2, 12),
        "LPPool2d": lambda: Around(nn.Sequential(nn.Softplus(), nn.LPPool2d(2, 2)), 2, 3, 4),
        "MaxUnpool1d": lambda: Around(Unpooled(), 2, 12),
        "ReflectionPad1d": lambda: Around(nn.ReflectionPad1d(2), 2, 12),
        "ReflectionPad2d": lambda: Around(nn.ReflectionPad2d(1), 2, 3, 4),
        "ReplicationPad1d": lambda: Around(nn.ReplicationPad1d(2), 2, 12),
        "ReplicationPad2d": lambda: Around(nn.ReplicationPad2d(1), 2, 3, 4),
        "ReplicationPad3d": lambda: Around(nn.ReplicationPad3d(1), 2, 2, 2, 3),
        "ZeroPad2d": lambda: Around(nn.ZeroPad2d(1), 2, 3, 4),
        "ConstantPad1d": lambda: Around(nn.ConstantPad1d(1, 0.5), 2, 12),
        "CircularPad2d": lambda: Around(nn.CircularPad2d(1), 2, 3, 4),
    }


def _norms() -> dict[str, Callable[[], nn.Module]]:
    return {
        "LayerNorm": lambda: Around(nn.LayerNorm(24)),
        "RMSNorm": lambda: Around(nn.RMSNorm(24)),
        "GroupNorm": lambda: Around(nn.GroupNorm(2, 6), 6, 4),
        "InstanceNorm1d": lambda: Around(nn.InstanceNorm1d(2, affine=True), 2, 12),
        "InstanceNorm2d": lambda: Around(nn.InstanceNorm2d(2), 2, 3, 4),
        "InstanceNorm3d": lambda: Around(nn.InstanceNorm3d(2), 2, 2, 2, 3),
        "LocalResponseNorm": lambda: Around(nn.LocalResponseNorm(2), 2, 3, 4),
        "BatchNorm1d, fixed": lambda: Around(nn.BatchNorm1d(24).eval()),
    }


def _sequences() -> dict[str, Callable[[], nn.Module]]:
    def attention(**given: object) -> nn.Module:
        return nn.MultiheadAttention(6, 2, batch_first=True, **given)

    def encoder(**given: object) -> nn.Module:
        return nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True, **given)

    def decoder() -> nn.Module:
        return nn.TransformerDecoderLayer(6, 2, 8, dropout=0.0, batch_first=True)

    def transformer() -> nn.Module:
        return nn.Transformer(6, 2, 1, 1, 8, dropout=0.0, batch_first=True)

    return {
        "RNN": lambda: Around(First(nn.RNN(6, 4, batch_first=True)), 4, 6),
        "GRU": lambda: Around(First(nn.GRU(6, 4, batch_first=True)), 4, 6),
        "GRU, both ways": lambda: Around(First(nn.GRU(6, 3, batch_first=True, bidirectional=True)), 4, 6),
        "LSTM": lambda: Around(First(nn.LSTM(6, 4, num_layers=2, batch_first=True)), 4, 6),
        "LSTM, projected": lambda: Around(First(nn.LSTM(6, 4, proj_size=2, batch_first=True)), 4, 6),
        "RNNCell": lambda: Around(Cell(nn.RNNCell(6, 4)), 4, 6),
        "GRUCell": lambda: Around(Cell(nn.GRUCell(6, 4)), 4, 6),
        "LSTMCell": lambda: Around(Cell(nn.LSTMCell(6, 4)), 4, 6),
        "MultiheadAttention": lambda: Around(ToItself(attention(), times=3), 4, 6),
        "MultiheadAttention, with biases": lambda: Around(
            ToItself(attention(add_bias_kv=True, add_zero_attn=True), times=3), 4, 6
        ),
        "TransformerEncoderLayer": lambda: Around(encoder(), 4, 6),
        "TransformerEncoderLayer, norm first": lambda: Around(encoder(norm_first=True), 4, 6),
        "TransformerDecoderLayer": lambda: Around(ToItself(decoder()), 4, 6),
        "TransformerEncoder": lambda: Around(
            nn.TransformerEncoder(encoder(), 2, enable_nested_tensor=False), 4, 6
        ),
        "TransformerDecoder": lambda: Around(ToItself(nn.TransformerDecoder(decoder(), 2)), 4, 6),
        "Transformer": lambda: Around(ToItself(transformer()), 4, 6),
        "Embedding": lambda: Indexed(nn.Embedding(6, 3)),
        "Embedding, padded": lambda: Indexed(nn.Embedding(6, 3, padding_idx=1)),
        "Embedding, sparse": lambda: Indexed(nn.Embedding(6, 3, sparse=True)),
        "EmbeddingBag": lambda: Indexed(nn.EmbeddingBag(6, 3, mode="mean")),
        "EmbeddingBag, max": lambda: Indexed(nn.EmbeddingBag(6, 3, mode="max")),
    }


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: Around(nn.Linear(24, 5)),
    "Bilinear": lambda: Around(ToItself(nn.Bilinear(24, 24, 3))),
    "CosineSimilarity": lambda: Around(ToItself(nn.CosineSimilarity(dim=2)), 4, 6),
    "PairwiseDistance": lambda: Around(ToItself(nn.PairwiseDistance()), 4, 6),
    "Flatten": lambda: Around(nn.Flatten(), 2, 3, 4),
    "Unflatten": lambda: Around(nn.Unflatten(1, (2, 12))),
    "AdaptiveLogSoftmaxWithLoss": lambda: Around(Likelihood()),
    "Dropout, 0": lambda: Around(nn.Dropout(0.0)),
    **_activations(),
    **_convolutions(),
    **_pools(),
    **_norms(),
    **_sequences(),
}
"""Rows do not mix, and nothing is random: each trains as on one process, whatever the shards."""

LAZY: dict[str, Callable[[], nn.Module]] = {
    "LazyLinear": lambda: Around(nn.LazyLinear(5), outputs=5),
    "LazyConv1d": lambda: Around(nn.LazyConv1d(3, 3), 2, 12, outputs=30),
    "LazyConv2d": lambda: Around(nn.LazyConv2d(3, 2), 2, 3, 4, outputs=18),
    "LazyConvTranspose1d": lambda: Around(nn.LazyConvTranspose1d(3, 3), 2, 12, outputs=42),
    "LazyInstanceNorm1d": lambda: Around(
        nn.LazyInstanceNorm1d(affine=True, track_running_stats=False), 2, 12, outputs=24
    ),
}
"""Their parameters get a shape when the first rows come."""

LAZY_NORMS: dict[str, Callable[[], nn.Module]] = {
    "LazyBatchNorm1d": lambda: Around(nn.LazyBatchNorm1d(), outputs=24),
}
"""As above, and they normalise over rows."""

RANDOM: dict[str, Callable[[], nn.Module]] = {
    "Dropout": lambda: Around(nn.Dropout(0.3)),
    "Dropout1d": lambda: Around(nn.Dropout1d(0.3), 2, 12),
    "Dropout2d": lambda: Around(nn.Dropout2d(0.3), 2, 3, 4),
    "Dropout3d": lambda: Around(nn.Dropout3d(0.3), 2, 2, 2, 3),
    "AlphaDropout": lambda: Around(nn.AlphaDropout(0.3)),
    "FeatureAlphaDropout": lambda: Around(nn.FeatureAlphaDropout(0.3), 2, 12),
    "RReLU": lambda: Around(nn.RReLU()),
    "FractionalMaxPool2d": lambda: Around(nn.FractionalMaxPool2d(2, output_size=2), 2, 3, 4),
    "MultiheadAttention, dropout": lambda: Around(
        ToItself(nn.MultiheadAttention(6, 2, dropout=0.3, batch_first=True), times=3), 4, 6
    ),
    "TransformerEncoderLayer, dropout": lambda: Around(
        nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 4, 6
    ),
    "LSTM, dropout": lambda: Around(First(nn.LSTM(6, 4, 2, dropout=0.3, batch_first=True)), 4, 6),
}
"""They draw numbers: two runs with the same shards are equal."""

NORMS_OVER_ROWS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: Around(nn.BatchNorm1d(24)),
    "BatchNorm1d, [B, C, L]": lambda: Around(nn.BatchNorm1d(2), 2, 12),
    "BatchNorm2d": lambda: Around(nn.BatchNorm2d(2), 2, 3, 4),
    "BatchNorm3d": lambda: Around(nn.BatchNorm3d(2), 2, 2, 2, 3),
    "BatchNorm1d, cumulative": lambda: Around(nn.BatchNorm1d(24, momentum=None)),
    "BatchNorm1d, without statistics": lambda: Around(nn.BatchNorm1d(24, track_running_stats=False)),
}
"""They normalise a piece by itself: equal to one process where one shard has all rows of a step."""
