"""LeNet has the shape and the initialisation that its docstring promises."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from sparksgd.models import LeNet


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_default_has_as_many_parameters_as_systemml_s_example() -> None:
    # (25 + 1) 32 + (25 x 32 + 1) 64 + (64 x 7 x 7 + 1) 512 + (512 + 1) 10
    assert count(LeNet()) == 832 + 51_264 + 1_606_144 + 5_130 == 1_663_370


def test_the_classic_one_has_431_080_parameters() -> None:
    # (25 + 1) 20 + (25 x 20 + 1) 50 + (50 x 4 x 4 + 1) 500 + (500 + 1) 10
    assert count(LeNet(maps=(20, 50), hidden=500, padding=0)) == 520 + 25_050 + 400_500 + 5_010 == 431_080


@pytest.mark.parametrize(("padding", "side"), [(2, 28), (0, 28), (2, 20), (1, 17)])
def test_images_become_one_logit_per_class(padding: int, side: int) -> None:
    net = LeNet(maps=(2, 3), hidden=4, classes=7, padding=padding, side=side)
    assert net(torch.zeros(5, side * side)).shape == (5, 7)


def test_bytes_and_the_same_image_as_floats_give_the_same_logits() -> None:
    torch.manual_seed(0)
    net = LeNet(maps=(2, 3), hidden=4).eval()
    image = torch.randint(0, 256, (3, 784), dtype=torch.uint8)
    assert torch.equal(net(image), net(image.float() / 255))


def test_the_initialisation_is_he_s() -> None:
    torch.manual_seed(0)
    net = LeNet()
    for layer, deviation in [
        (net.conv1, sqrt(2 / 25)),
        (net.conv2, sqrt(2 / 800)),
        (net.hidden, sqrt(2 / 3136)),
        (net.output, sqrt(1 / 512)),
    ]:
        few = 5 / sqrt(2 * layer.weight.numel())  # five standard errors of a standard deviation
        assert layer.weight.std().item() == pytest.approx(deviation, rel=few)
        assert not layer.bias.any()


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    net = LeNet(maps=(2, 3), hidden=64)
    image = torch.rand(2, 784)
    assert not torch.equal(net(image), net(image))
    net.eval()
    assert torch.equal(net(image), net(image))
