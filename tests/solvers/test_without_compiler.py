"""Optimisers work without torch's compiler, and make the bits that they make with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sparksgd.solvers import flat_optimizer

NAMES = [kind.__name__ for kind in flat_optimizer.ELEMENTWISE]

PROGRAM = """
import sys
import torch
from sparksgd.solvers.without_compiler import without_compiler

{before}
without_compiler()
torch.manual_seed(0)
starts = torch.randn(5)
for name in {names}:
    weights, hooked = torch.nn.Parameter(starts.clone()), []
    optimizer = getattr(torch.optim, name)([weights], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.register_step_post_hook(lambda *arguments: hooked.append(torch.is_grad_enabled()))
    for _ in range(3):
        optimizer.zero_grad()
        weights.square().sum().backward()
        optimizer.step()
        schedule.step()
    optimizer.load_state_dict(optimizer.state_dict())
    {between}
    optimizer.step()
    print(name, hooked, weights.tolist())
print("torch._dynamo" in sys.modules)
"""
LOADED = "import torch._dynamo"


def said(before: str = "", between: str = "", names: list[str] = NAMES) -> list[str]:
    """Return the lines that the program prints in a fresh interpreter."""
    program = PROGRAM.format(names=names, before=before, between=between)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.soak
def test_the_compiler_is_not_loaded_and_the_bits_are_those_with_it() -> None:
    *made, loaded = said()
    assert loaded == "False"
    assert [line.split()[0] for line in made] == NAMES
    assert all("[True, True, True, True]" in line for line in made)
    assert said(before=LOADED) == [*made, "True"]


@pytest.mark.soak
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_who_loads_the_compiler_later_gets_the_same(name: str) -> None:
    made, _ = said(names=[name])
    assert said(between=LOADED, names=[name]) == [made, "True"]
