"""What no piece reads from another one may change: the training is that of one process."""

from __future__ import annotations

import enum
import re
import warnings
from collections import Counter, OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from keeping_nets import keeps_activation, longest, net, sets, warns_once
from torch import nn
from two_workers import by_plain_torch, train_here

from sparksgd.errors import ModelError

MASKS: dict[int, torch.Tensor] = {}


def counts(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.t += 1
    return y


def caches_a_mask(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    width = x.shape[1]
    if width not in core.masks:
        core.masks[width] = torch.linspace(0, 1, width)
    return y + (x * core.masks[width]).sum(1, keepdim=True)


def clears_its_list(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.seen.clear()
    core.seen.append(y)
    return y + sum(core.seen)


def builds_a_new_number(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    core.scale = float(str(core.scale))
    return y * core.scale


def caches_globally(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if x.shape[1] not in MASKS:
        MASKS[x.shape[1]] = torch.linspace(0, 1, x.shape[1])
    return y + (x * MASKS[x.shape[1]]).sum(1, keepdim=True)


def caches_by_version(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    weight = core.linear.weight
    if weight._version != core.seen:
        core.cached, core.seen = torch.tanh(weight), weight._version
    return y + x @ core.cached.T


def caches_by_length(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Look up a table whose length is that of the longest row: it differs from piece to piece."""
    if longest(x) not in core.tables:
        core.tables[longest(x)] = torch.arange(longest(x) + 1) / 10
    return y * (1 + core.tables[longest(x)][(x.abs() > 0.8).sum(1)][:, None])


def grows_a_table(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if core.table is None or longest(x) >= len(core.table):
        core.table = torch.arange(longest(x) + 1) / 10
    return y * (1 + core.table[(x.abs() > 0.8).sum(1)][:, None])


class Tables:
    """Keeps tables, as a helper that is no module does."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[int, torch.Tensor]] = {"ramps": {}}


def caches_in_a_helper(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    table = core.helper.kept["ramps"].setdefault(longest(x), torch.linspace(0, 1, longest(x) + 1))
    return y + table[0]


HARMLESS = {
    "a counter that nothing reads": (sets(t=0), counts),
    "a cache by a length that differs": (sets(tables={}), caches_by_length),
    "a table that grows": (sets(table=None), grows_a_table),
    "a cache of a helper": (lambda core: setattr(core, "helper", Tables()), caches_in_a_helper),
    "a weight that is cached by its version": (sets(seen=-1), caches_by_version),
    "a global cache": (sets(), caches_globally),
    "the last activation": (sets(last=None), keeps_activation),
    "a new attribute": (sets(), keeps_activation),
    "a cache by shape": (sets(masks={}), caches_a_mask),
    "a flag": (sets(warned=False), warns_once),
    "a list that is cleared": (sets(seen=[]), clears_its_list),
    "an equal number": (sets(scale=0.1), builds_a_new_number),
}


class Kind(enum.Flag):
    """Makes new members of itself when they are asked for."""

    ONE = enum.auto()
    TWO = enum.auto()


@lru_cache
def ramp(width: int) -> torch.Tensor:
    return torch.linspace(0, 1, width)


def uses_libraries(core: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    both = Kind.ONE | Kind.TWO
    found = OrderedDict(Counter([both, Path("a"), np.float32(1), re.sub("a+", "b", "caat")]))
    assert len(found) == 4
    with nn.utils.parametrize.cached(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.warn("once", stacklevel=1)
        return y + (x * ramp(x.shape[1])).sum(1, keepdim=True) + nn.Identity()(y)


HARMLESS["classes of libraries"] = (sets(), uses_libraries)


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_no_piece_reads_from_another_trains_as_in_one_process(tmp_path: Path, kind: str) -> None:
    begin, use = HARMLESS[kind]
    all_rows = {"rows_per_step": 48, "epochs": 5}
    one, two = (
        train_here(tmp_path, num_workers, module=net(begin, use), train=all_rows) for num_workers in (1, 2)
    )
    assert one.flat.parameters_sha256() == two.flat.parameters_sha256()
    expected = by_plain_torch(tmp_path, net(begin, use), 5)
    assert one.flat.parameters.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    in_parts = train_here(tmp_path, module=net(begin, use), train=all_rows | {"rows_per_backward": 5})
    assert in_parts.flat.parameters.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def cached_at_first(core: Any) -> None:
    core.cached, core.seen = torch.tanh(core.linear.weight.detach()), core.linear.weight._version


def test_a_weight_that_was_cached_before_the_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"core\.cached or core\.seen changes as the module trains"):
        train_here(tmp_path, module=net(cached_at_first, caches_by_version))


def test_the_caller_s_module_keeps_its_own_attributes(tmp_path: Path) -> None:
    module = net(sets(last="mine", masks={"other": 1}), keeps_activation)
    hook = module.core.linear.register_forward_hook(lambda *_: None)
    train_here(tmp_path, module=module)
    assert (module.core.last, module.core.masks) == ("mine", {"other": 1})
    assert hook.id in module.core.linear._forward_hooks
