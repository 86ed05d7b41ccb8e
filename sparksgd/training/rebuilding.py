"""Whether a module that is built again from its name is the trained one, once it has what was saved.

A saved model is its name, its arguments, the run's seed, and values (see saved_state.py).  What no value
tells, must be the same whenever the module is built: the classes of its parts, its functions, what objects
of its own hold.
"""

from __future__ import annotations

import hashlib
import logging
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sparksgd.arithmetic.changes import bits
from sparksgd.arithmetic.copies import copied, parts
from sparksgd.arithmetic.generators import generators_seeded
from sparksgd.arithmetic.numerics import thread_count
from sparksgd.arithmetic.seeds import seed32
from sparksgd.config import Config
from sparksgd.data.schema import RowSchema
from sparksgd.engines.forward import forward
from sparksgd.engines.held import is_opaque
from sparksgd.errors import ModelError, SparkSGDError
from sparksgd.imports.torch_code import users_torch_code
from sparksgd.models.outputs import tensors_of
from sparksgd.models.own_metrics import values_of_rows
from sparksgd.training.composition import (
    Told,
    code_told,
    first_difference,
    name_of,
    other_structure,
    structure,
    value_told,
)
from sparksgd.training.modules import build_module
from sparksgd.training.plain_values import is_plain, is_torchs
from sparksgd.training.saved_state import (
    differing_tensors,
    differing_values,
    load_state,
    saved_state,
    values_of,
)

__all__ = ["Sample", "built_again", "check_rebuilding", "other_when_filled", "try_metrics"]

log = logging.getLogger("sparksgd")

_BUILDS = 4
"""How often a small module is built again: a choice of two is the same in half of the cases."""
_SMALL = 10**6
"""Elements of parameters of a small module."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Some rows, and how to compute of them, to compare outputs by."""

    records: npt.NDArray[Any]
    """[B]."""

    schema: RowSchema
    """Of a record."""

    threads: int
    """How many threads torch uses."""

    dtype: torch.dtype
    """Of the parameters."""


def check_rebuilding(config: Config, module: nn.Module, sample: Sample) -> frozenset[str]:
    """Build a module again as `load_model` will, and refuse it if it is another one.

    Args:
        config: names the module.
        module: built from that name; not changed.
        sample: rows.

    Returns:
        The paths of the tensors, arrays and plain values that were others, see `saved_state`.

    Raises:
        ModelError: what differs, and the next move.
    """
    drawn: frozenset[str] = frozenset()
    built = structure(module)
    builds = _BUILDS if sum(p.numel() for p in module.parameters()) <= _SMALL else 1
    for _ in range(builds):
        rebuilt = built_again(config)
        if rebuilt is None:
            return drawn
        drawn |= differing_values(module, rebuilt) | set(differing_tensors(module, rebuilt))
        fill = partial(load_state, saved=saved_state(module, drawn))
        different = other_when_filled(module, rebuilt, built, fill, sample)
        if different is not None:
            raise ModelError(
                f"model.name is {config.model.name!r}, which gives another module whenever it is built, so a "
                f"saved model could not be loaded, nor the run be repeated: {different}. Let it depend on "
                f"the arguments of the model, or draw it from torch's, numpy's or Python's global "
                f"generators, which train.seed seeds; or train a module made in Python, by module="
            )
    return drawn


def built_again(config: Config) -> nn.Module | None:
    """Return the module of a configuration, built again; None, with a warning, if this process cannot."""
    try:
        return build_module(config.model, config.train.seed)
    except SparkSGDError as error:
        log.warning("the module cannot be built twice in one process, so it is not compared: %s", error)
        return None


def other_when_filled(
    trained: nn.Module,
    rebuilt: nn.Module,
    built: Mapping[str, str],
    fill: Callable[[nn.Module], object],
    sample: Sample,
) -> str | None:
    """Return how a module that was built again differs once it has what was saved; None: it is the same.

    Args:
        trained: the module; not changed.
        rebuilt: the other one.
        built: the structure that it must have.
        fill: gives a module what was saved.
        sample: rows.
    """
    different = other_structure(rebuilt, built)
    if different is not None:
        return different
    try:
        fill(rebuilt)
        return _difference(trained, rebuilt, sample)
    except ModelError as error:
        return str(error)


def _difference(trained: nn.Module, rebuilt: nn.Module, sample: Sample) -> str | None:
    """Return how a module that was built again, and has what was saved, differs; None: it is the same.

    Args:
        trained: the module; not changed.
        rebuilt: of the same structure; it is in evaluation mode afterwards.
        sample: rows, of which the outputs must be the same to the bit.
    """
    if different := differing_tensors(trained, rebuilt):
        return f"{different[0]} differs, and cannot be saved beside the weights"
    copy = copied(trained)
    same = dict(values_of(rebuilt))
    for path, value in values_of(copy):  # in memory of the same layout: else sums may be rounded otherwise
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized:
            value.data = same[path].detach().clone()
    outputs = _outputs(copy, sample)
    if isinstance(outputs, SparkSGDError):
        return None  # nothing to compare with
    again = _outputs(rebuilt, sample)
    if again == outputs or _outputs(copy, sample) != outputs:
        return None  # the same, or no two evaluations are
    if isinstance(again, SparkSGDError):
        return f"its outputs cannot be computed: {str(again).splitlines()[0]}"
    found = first_difference(_all_parts(trained), _all_parts(rebuilt))
    return "its outputs differ" if found is None else f"its outputs differ, and {found}"


def _outputs(module: nn.Module, sample: Sample) -> bytes | SparkSGDError:
    """Return the bytes of a module's outputs in evaluation mode, or the error that it raised."""
    seed = seed32(0, "rebuilding")
    try:
        with users_torch_code("the module's eval()"):
            module.eval()
        with torch.no_grad(), thread_count(sample.threads), generators_seeded(seed):
            output, _ = forward(module, _no_loss, sample.schema, sample.records, sample.dtype)
    except SparkSGDError as error:
        return error
    return b"".join(bits(tensor.to_dense()).tobytes() for tensor in tensors_of(output).values())


def try_metrics(names: Sequence[str], module: nn.Module, sample: Sample) -> None:
    """Compute metrics of the user's own of some rows, by a copy of the module.

    Args:
        names: of the metrics.
        module: gives the outputs.
        sample: the rows.

    Raises:
        UserCodeError: one raised.
        ModelError: one does not give a number for each row.
    """
    if not names:
        return
    copy = copied(module)
    with users_torch_code("the module's eval()"):
        copy.eval()
    with torch.no_grad(), thread_count(sample.threads), generators_seeded(seed32(0, "metrics")):
        output, _ = forward(copy, _no_loss, sample.schema, sample.records, sample.dtype)
        for name in names:
            values_of_rows(name, output, torch.from_numpy(sample.schema.label_array(sample.records).copy()))


def _no_loss(output: object, label: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(label))


def _all_parts(module: nn.Module) -> dict[str, Told]:
    """Return what is told of all that a module holds, but for what is saved: its tensors and plain values."""
    return dict(_told("", module, set(), is_own=True))


def _told(path: str, value: Any, seen: set[int], *, is_own: bool) -> Iterator[tuple[str, Told]]:
    if isinstance(value, torch.Tensor | np.ndarray) or is_plain(value):
        if not is_own:
            yield path.lstrip("."), value_told(value)
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    inner = list(parts(value))
    if isinstance(value, nn.Module):
        inner = [(step, part) for step, part in inner if not is_torchs(step.removeprefix("."))]
    elif isinstance(value, types.FunctionType):
        code = hashlib.sha256(code_told(value.__code__).encode()).hexdigest()
        yield f"{path.lstrip('.')}'s code", Told(text=f"code of digest {code[:8]}")
        inner += [("'s defaults", value.__defaults__), ("'s keywords", value.__kwdefaults__)]
    is_container = isinstance(value, Mapping | list | tuple)
    if isinstance(value, set | frozenset):
        yield path.lstrip("."), value_told(sorted(map(repr, value)))
        return
    if not is_container:
        yield path.lstrip("."), Told(text=name_of(value))
        if not inner and " at 0x" not in repr(value):  # an enum, a date, a path, a dtype
            yield f"{path.lstrip('.')}'s value", value_told(value)
    if not is_opaque(value) or isinstance(value, nn.Module):
        inside = is_own and (is_container or isinstance(value, nn.Module))
        for step, part in inner:
            yield from _told(path + step, part, seen, is_own=inside)
