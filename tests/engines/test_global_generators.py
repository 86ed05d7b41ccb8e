"""Numbers of the global generators: the same for any number of workers, and the caller's go on as before."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from keeping_nets import net, sets
from two_workers import train_here


def dropout_by_numpy(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    kept = torch.from_numpy(np.random.random(y.shape) < 0.7)
    return y * kept + random.random() * y


@pytest.mark.parametrize("use", [dropout_by_numpy, lambda core, x, y: y + torch.rand_like(y)])
def test_numbers_of_the_global_generators_are_the_same_for_any_number_of_workers(
    tmp_path: Path, use: Callable[..., Any]
) -> None:
    ended = []
    for workers in (1, 2, 2):
        np.random.seed(workers)
        random.seed(workers)
        training = train_here(tmp_path, workers, module=net(sets(), use), tested=True)
        ended.append((training.flat.parameters_sha256(), [one.loss for one in training.evaluations]))
    assert ended[0] == ended[1] == ended[2]
    assert len(set(ended[0][1])) == 2


def test_the_caller_s_generators_are_left_as_they_were(tmp_path: Path) -> None:
    np.random.seed(3)
    np.random.standard_normal()  # half a pair is still to come
    random.seed(3)
    torch.manual_seed(3)
    expected = (np.random.standard_normal(2).tolist(), random.random(), torch.rand(1).item())
    np.random.seed(3)
    np.random.standard_normal()
    random.seed(3)
    torch.manual_seed(3)
    torch_state = torch.get_rng_state()
    module = net(sets(), dropout_by_numpy)
    torch.set_rng_state(torch_state)
    train_here(tmp_path, module=module, tested=True)
    assert (np.random.standard_normal(2).tolist(), random.random(), torch.rand(1).item()) == expected
