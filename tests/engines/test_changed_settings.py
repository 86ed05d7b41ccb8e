"""A setting of torch or numpy that forward leaves changed is refused, and put back."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from keeping_nets import net, sets
from two_workers import train_here

from sparksgd.errors import ModelError


def sets_threads() -> None:
    torch.set_num_threads(2 if torch.get_num_threads() == 1 else 1)


LEAKS = {
    "torch.set_num_threads": sets_threads,
    "torch.set_default_dtype": partial(torch.set_default_dtype, torch.float64),
    "torch.set_grad_enabled": partial(torch.set_grad_enabled, False),
    "torch.use_deterministic_algorithms": partial(torch.set_deterministic_debug_mode, 2),
    "torch.set_float32_matmul_precision": partial(torch.set_float32_matmul_precision, "medium"),
    "torch.set_flush_denormal": partial(torch.set_flush_denormal, True),
    "torch.set_default_device": partial(torch.set_default_device, "cpu"),
    "torch.autocast": partial(torch.set_autocast_enabled, "cpu", True),
    "torch.backends.mkldnn": partial(setattr, torch.backends.mkldnn, "enabled", False),
    "numpy.seterr": partial(np.seterr, all="raise"),
}


@pytest.mark.parametrize("when", ["in the trial", "later", "in evaluation"])
@pytest.mark.parametrize("name", LEAKS)
def test_a_setting_that_forward_leaves_changed_is_refused_and_put_back(
    tmp_path: Path, name: str, when: str
) -> None:
    if name == "torch.set_grad_enabled" and when == "in evaluation":
        pytest.skip("gradients are off there, and on again at its end")

    def use(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        is_due = {
            "in the trial": torch.is_grad_enabled(),
            "later": len(x) == 3 and torch.is_grad_enabled(),
            "in evaluation": not torch.is_grad_enabled(),
        }[when]
        if is_due:
            LEAKS[name]()
        return y

    from sparksgd.arithmetic.settings import settings_now

    before = settings_now()
    with pytest.raises(ModelError, match=f"^the module or its loss.* changed {name}"):
        train_here(tmp_path, module=net(sets(), use), tested=True)
    assert settings_now() == before
