"""The trial leaves no trace but a line in the log."""

from __future__ import annotations

import logging
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparksgd.arithmetic.settings import settings_now
from tests.engines.trials import Around, refused, rows, tried


class Wild(Around):
    """Draws from all global generators, sets threads, and keeps a generator of its own."""

    def __init__(self, *, draws: bool) -> None:
        super().__init__()
        self.chance, self.draws = torch.Generator().manual_seed(3), draws

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = random.random() + np.random.rand()
        if self.draws:
            noise += torch.rand(1, generator=self.chance)
        torch.set_num_threads(1)
        return self.inner(F.dropout(x, 0.1)) + 0 * noise


@pytest.mark.parametrize("is_refused", [False, True])
def test_the_caller_s_objects_are_as_they_were(is_refused: bool) -> None:
    module = Wild(draws=is_refused).eval()
    module.inner.train()
    module.inner.weight.grad = torch.ones(1, 6)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    records, schema = rows()
    data = records.copy()
    states = [torch.get_rng_state(), module.chance.get_state()]
    numbers, words, settings = np.random.get_state()[1].copy(), random.getstate(), settings_now()
    if is_refused:
        refused(module, "chance changes as the module trains", data=(records, schema))
    else:
        tried(module, data=(records, schema))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert (module.training, module.inner.training) == (False, True)
    assert torch.equal(module.inner.weight.grad, torch.ones(1, 6))
    assert all(
        torch.equal(*two)
        for two in zip(states, [torch.get_rng_state(), module.chance.get_state()], strict=True)
    )
    assert np.array_equal(np.random.get_state()[1], numbers)
    assert (random.getstate(), settings_now()) == (words, settings)
    assert np.array_equal(records, data)


def test_one_line_says_what_was_found(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        tried(nn.Linear(6, 1))
    (line,) = [record.message for record in caplog.records]
    assert line.startswith(
        "trial: 4 steps of 5 rows, evaluations of 1 and 5; 2 of 2 parameters get a gradient; rows do not mix"
    )


def test_no_compiler_is_imported() -> None:
    code = (
        "import sys; from torch import nn; from tests.engines.trials import tried; "
        "tried(nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.Linear(6, 1))); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
