"""A module's parameters and gradients are views of two vectors; its running statistics are a third."""

from __future__ import annotations

import copy
import hashlib
import struct

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparksgd.arithmetic.flat import FlatModule, Weights, mixes_rows
from sparksgd.errors import ModelError


class Tied(nn.Module):
    """Parameters: 2 x 2 of `first`, used twice, and 2 of `last`'s bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.last = nn.Linear(2, 2)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def filled(module: nn.Module) -> nn.Module:
    """Number a module's parameters 1, 2, 3... in the order of named_parameters."""
    start = 1
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.arange(start, start + parameter.numel()).view(parameter.shape))
            start += parameter.numel()
    return module


def test_the_vector_holds_the_parameters_in_the_order_of_named_parameters() -> None:
    flat = FlatModule(filled(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))))
    assert flat.parameters.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert flat.parameters.dtype == torch.float32


def test_parameters_and_gradients_are_views_of_the_vectors() -> None:
    module = filled(nn.Linear(2, 1))
    flat = FlatModule(module)
    flat.parameters.mul_(10)
    assert module.weight.tolist() == [[10, 20]]
    assert module.bias.tolist() == [30]
    module(torch.tensor([[5.0, 7.0]])).sum().backward()
    assert flat.gradient.tolist() == [5, 7, 1]
    flat.gradient.zero_()
    assert module.weight.grad.tolist() == [[0, 0]]


def test_a_convolution_is_channels_last_and_the_same() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten())
    plain[2].bias = None
    flat, twin = FlatModule(copy.deepcopy(plain)), FlatModule(plain)
    weight, images = flat.module[0].weight, torch.rand(2, 3, 6, 6)
    with twin.new_gradient() as expected:
        plain(images).square().sum().backward()
    with flat.new_gradient() as gradient, flat.channels_last():
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert flat.module[:3](images).is_contiguous(memory_format=torch.channels_last)
        flat.module(images).square().sum().backward()
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert weight.is_contiguous()
    assert weight.data_ptr() == flat.parameters.data_ptr()


def test_what_a_convolution_makes_of_one_channel_lies_channels_last_too() -> None:
    flat = FlatModule(nn.Sequential(nn.Conv2d(1, 4, 3)))
    with flat.channels_last():
        made = flat.module(torch.rand(2, 1, 6, 6))
    assert made.stride() == (4 * 4 * 4, 1, 4 * 4, 4)


def test_convolutions_that_share_a_weight_get_it_back() -> None:
    module = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    module[1].weight = module[0].weight
    flat = FlatModule(module)
    with flat.channels_last():
        assert module[1].weight.data_ptr() != flat.parameters.data_ptr()
    assert module[1].weight.data_ptr() == flat.parameters.data_ptr()
    assert module[1].weight.is_contiguous()


def test_a_new_gradient_is_the_sum_of_its_backward_passes_and_the_views_stay() -> None:
    table = nn.Embedding(3, 2, sparse=True)
    module = filled(nn.ModuleList([nn.Linear(2, 1), table, nn.Linear(1, 1)]))  # the last one is not used
    flat = FlatModule(module)
    flat.gradient.fill_(9)
    with flat.new_gradient() as gradient:
        for _ in range(2):
            module[0](torch.tensor([[5.0, 7.0]])).sum().backward()
            table(torch.tensor([2])).sum().backward()
    assert gradient.tolist() == [10, 14, 2, 0, 0, 0, 0, 2, 2, 0, 0]
    with pytest.raises(ZeroDivisionError), flat.new_gradient():
        raise ZeroDivisionError
    assert flat.gradient.tolist() == [9] * 11
    assert module[0].weight.grad.data_ptr() == flat.gradient.data_ptr()


def test_each_part_of_a_new_gradient_is_told_of_when_it_is_there_the_last_layer_first() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.Linear(5, 1))
    module.unused = nn.Parameter(torch.ones(4))
    flat = FlatModule(module)
    images = torch.rand(2, 2, 6, 6)

    def layers() -> torch.Tensor:
        return module[4](module[3](module[2](module[1](module[0](images))))).sum()

    with flat.channels_last(), flat.new_gradient() as whole:
        layers().backward()
    told: list[int] = []
    ends = np.cumsum([parameter.numel() for parameter in flat.trainable])

    def take_part(vector: np.ndarray, parameter: int) -> None:
        part = slice(ends[parameter] - flat.trainable[parameter].numel(), ends[parameter])
        assert vector[part].tobytes() == whole[part].tobytes()
        told.append(parameter)

    with flat.channels_last(), flat.new_gradient(take_part) as gradient:
        layers().backward()
    assert gradient.tobytes() == whole.tobytes()
    names = [name for name, _ in module.named_parameters()]
    assert sorted(names[number] for number in told) == sorted(set(names) - {"unused"})
    layer_of = [names[number][0] for number in told]
    assert layer_of == sorted(layer_of, reverse=True)
    layers().backward()
    assert len(told) == len(names) - 1  # nobody is told any more


def test_parts_that_a_backward_pass_makes_twice_are_told_of_twice() -> None:
    layer = nn.Linear(2, 2)
    flat, told = FlatModule(nn.Sequential(layer)), []
    values = torch.ones(1, 2, requires_grad=True)
    with flat.new_gradient(lambda _, parameter: told.append(parameter)) as gradient:
        once = checkpoint(layer, values, use_reentrant=True)
        checkpoint(layer, once, use_reentrant=True).sum().backward()
    with flat.new_gradient() as whole:
        layer(layer(values)).sum().backward()
    assert sorted(told) == [0, 0, 1, 1]
    np.testing.assert_allclose(gradient, whole)


def test_a_frozen_parameter_is_not_in_the_vector() -> None:
    module = filled(nn.Linear(2, 2))
    module.weight.requires_grad_(False)
    flat = FlatModule(module)
    assert flat.parameters.tolist() == [5, 6]
    flat.parameters.zero_()
    assert module.weight.tolist() == [[1, 2], [3, 4]]


def test_a_tied_parameter_is_counted_once_and_stays_tied() -> None:
    module = filled(Tied())
    flat = FlatModule(module)
    assert flat.parameters.tolist() == [1, 2, 3, 4, 5, 6]
    assert module.first.weight is module.last.weight
    flat.parameters[0] = 9
    assert module.last.weight[0, 0] == module.first.weight[0, 0] == 9


def test_the_parameters_digest_is_of_their_little_endian_bytes() -> None:
    flat = FlatModule(filled(nn.Linear(2, 1)))
    assert flat.parameters_sha256() == hashlib.sha256(struct.pack("<3f", 1, 2, 3)).hexdigest()


def test_the_buffers_digest_is_of_all_buffers_bytes_in_order() -> None:
    flat = FlatModule(nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2)))
    fresh = struct.pack("<2f2fq", 0, 0, 1, 1, 0)  # running_mean, running_var, num_batches_tracked
    assert flat.buffers_sha256() == hashlib.sha256(fresh).hexdigest()
    assert FlatModule(nn.Linear(1, 1)).buffers_sha256() == hashlib.sha256(b"").hexdigest()


def test_statistics_are_each_norm_s_mean_then_variance_and_counters_apart() -> None:
    module = normed()
    module[1].running_mean.copy_(torch.tensor([1.0, 2, 3]))
    module[1].running_var.copy_(torch.tensor([4.0, 5, 6]))
    module[1].num_batches_tracked.fill_(7)
    flat = FlatModule(module)
    assert flat.statistics().tolist() == [1, 2, 3, 4, 5, 6]
    assert flat.counters().tolist() == [7]
    flat.load_buffers(np.array([6, 5, 4, 3, 2, 1], np.float32), np.array([8]))
    assert module[1].running_mean.tolist() == [6, 5, 4]
    assert module[1].running_var.tolist() == [3, 2, 1]
    assert module[1].num_batches_tracked == 8


def test_a_norm_without_running_statistics_has_none_but_still_mixes_rows() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False))
    flat = FlatModule(module)
    assert (len(flat.statistics()), len(flat.counters())) == (0, 0)
    assert mixes_rows(module)


def test_only_a_batch_norm_that_trains_mixes_rows() -> None:
    module = normed()
    assert mixes_rows(module)
    module[1].eval()
    assert not mixes_rows(module)
    assert not mixes_rows(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))


def test_weights_are_a_copy_that_training_does_not_touch() -> None:
    flat = FlatModule(filled(normed()))
    weights = flat.weights(4)
    flat.parameters.zero_()
    flat.load_buffers(np.full(6, 9, np.float32), np.array([5]))
    assert weights.version == 4
    assert weights.parameters.tolist() == list(range(1, 20))
    assert weights.statistics.tolist() == [0, 0, 0, 1, 1, 1]
    assert weights.counters.tolist() == [0]
    flat.load(weights)
    assert flat.parameters.tolist() == list(range(1, 20))
    assert flat.statistics().tolist() == [0, 0, 0, 1, 1, 1]
    assert flat.counters().tolist() == [0]


def test_weights_that_were_loaded_stay_apart_from_the_module() -> None:
    flat = FlatModule(nn.Linear(1, 1))
    weights = Weights(
        version=0,
        parameters=np.array([1, 2], np.float32),
        statistics=np.empty(0, np.float32),
        counters=np.empty(0, np.int64),
    )
    flat.load(weights)
    flat.parameters.mul_(5)
    assert weights.parameters.tolist() == [1, 2]


def test_constants_are_all_buffers_but_batch_norm_s() -> None:
    module = normed()
    module.register_buffer("mask", torch.ones(2))
    assert [name for name, _ in FlatModule(module).constants()] == ["mask"]


def test_a_float64_module_is_flat_in_float64_where_asked() -> None:
    assert FlatModule(nn.Linear(2, 1).double(), torch.float64).parameters.dtype == torch.float64


@pytest.mark.parametrize(
    ("module", "phrases"),
    [
        (nn.ReLU(), ["ReLU has no trainable parameter"]),
        (nn.Linear(1, 1).requires_grad_(False), ["Linear has no trainable parameter", "requires_grad false"]),
        (nn.LazyLinear(3), ["weight has no shape yet", "run one batch through it first"]),
        (nn.Linear(1, 1).double(), ["parameter weight is torch.float64", "must be torch.float32"]),
        (nn.Linear(1, 1).half(), ["parameter weight is torch.float16", "module.float()"]),
        (nn.Linear(1, 1, device="meta"), ["weight is on meta, so it has no values", "on the CPU"]),
    ],
    ids=["nothing to train", "all frozen", "lazy", "float64", "float16", "no values"],
)
def test_a_module_that_cannot_be_one_vector_is_refused(module: nn.Module, phrases: list[str]) -> None:
    with pytest.raises(ModelError) as refused:
        FlatModule(module)
    for phrase in phrases:
        assert phrase in str(refused.value)


class Pairs(nn.Module):
    """Three numbers, then four that are two complex ones."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.pairs = nn.Parameter(torch.ones(2, 2))
        self.quads = nn.ParameterList([nn.Parameter(torch.ones(4))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = torch.view_as_complex(self.pairs)
        return (one * torch.view_as_complex(self.quads[0].view(2, 2))).real.sum() * (x @ self.scale)


def test_a_parameter_at_an_odd_place_is_viewed_as_complex_numbers() -> None:
    flat = FlatModule(filled(Pairs()))
    flat.parameters[3:7] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.view_as_complex(flat.module.pairs).tolist() == [1 + 2j, 3 + 4j]
    with torch.no_grad():
        flat.module.pairs[1, 1] = 5.0
    assert flat.parameters.tolist()[3:7] == [1.0, 2.0, 3.0, 5.0]
    with flat.new_gradient() as gradient:
        flat.module(torch.ones(1, 3)).sum().backward()
    # real((1+2i)(8+9i) + (3+5i)(10+11i)) = 8 - 18 + 30 - 55 = -35, times the sum of the scale, 1 + 2 + 3
    assert gradient.tolist() == [-35.0] * 3 + [8 * 6.0, -9 * 6.0, 10 * 6.0, -11 * 6.0] + [
        1 * 6.0, -2 * 6.0, 3 * 6.0, -5 * 6.0,
    ]  # fmt: skip


def test_parameters_of_torch_s_own_layers_are_views_of_one_storage() -> None:
    flat = FlatModule(nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 2)))
    assert {p.untyped_storage().data_ptr() for p in flat.trainable} == {
        flat.parameters.untyped_storage().data_ptr()
    }
