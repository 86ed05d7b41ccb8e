"""Optimisers work without torch's compiler, make the same bits, and step aside for who wants it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import torch
{before}
from sparksgd.solvers.eager import keep_eager

keep_eager(torch.optim.{name})
torch.manual_seed(0)
weights = torch.nn.Parameter(torch.randn(5))
optimizer = torch.optim.{name}([weights], lr=0.1)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
hooked = []
optimizer.register_step_post_hook(lambda *arguments: hooked.append(torch.is_grad_enabled()))
for _ in range(3):
    optimizer.zero_grad()
    weights.square().sum().backward()
    optimizer.step()
    schedule.step()
optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules, hooked, weights.tolist())
{after}
"""
AFTER = """
import torch._dynamo
keep_eager(torch.optim.{name})
optimizer.zero_grad()
optimizer.step()
assert weights.grad is None
"""


def said(name: str, before: str = "", after: str = "") -> list[str]:
    """Return what the program prints in a fresh interpreter."""
    program = PROGRAM.format(name=name, before=before, after=after.format(name=name))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(" ", 1)


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
def test_the_compiler_is_not_loaded_and_the_bits_are_those_with_it(name: str) -> None:
    loaded, made = said(name, after=AFTER)
    assert loaded == "False"
    assert made.startswith("[True, True, True]")
    assert said(name, before="import torch._dynamo") == ["True", made]
