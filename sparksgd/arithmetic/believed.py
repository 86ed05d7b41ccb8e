"""What a pickle from a file may make: plain values, tensors, and objects of packages that the caller trusts.

A pickle calls what it names, and sets what attributes it likes on that.  So the list is short: no function
of a trusted package, no module of torch's (some run source that they keep), nothing whose import does
anything.  So one that was read from a file is read with an unpickler whose `find_class` asks `believed`, in
a block of `only_classes_of`.  What travels inside a run, over Spark's own channels, needs no such limit.
"""

from __future__ import annotations

import functools
import importlib
import pickle
import pickletools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["NotBelieved", "believed", "check_believed", "only_classes_of"]


class NotBelieved(pickle.UnpicklingError):
    """A pickle names what it may not."""


def check_believed(data: bytes) -> None:
    """Refuse a pickle of our own that could not be read in a block of `only_classes_of`.

    Args:
        data: as Python's pickler writes it, of protocol 4 or 5; it is not read.

    Raises:
        NotBelieved: see `believed`.
    """
    pushed: list[Any] = []
    memo: list[Any] = []
    for operation, argument, _ in pickletools.genops(data):
        if "UNICODE" in operation.name:
            pushed.append(argument)
        elif operation.name in ("BINGET", "LONG_BINGET"):
            assert isinstance(argument, int)
            pushed.append(memo[argument])
        elif operation.name == "MEMOIZE":
            memo.append(pushed[-1] if pushed else None)
        elif operation.name == "STACK_GLOBAL":
            believed(pushed[-2], pushed[-1], _found)
            pushed.append(None)
        else:
            pushed.append(None)


def _found(module: str, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


def believed(module: str, name: str, find: Callable[[str, str], Any]) -> Any:
    """Return what a pickle names, if it may; outside of `only_classes_of`, whatever it names.

    Args:
        module: its module, which is imported if it may be.
        name: its name there; it may have dots.
        find: finds it.

    Raises:
        NotBelieved: it is neither plain nor a class of a trusted package.
    """
    packages = _packages.get()
    if packages is None or (module, name) in _PLAIN:
        return find(module, name)
    is_ours, is_torchs = _is_of(module, packages), module in ("torch", "numpy", "numpy.dtypes")
    is_optimizers = _is_of(module, frozenset(("torch.optim",)))
    found = find(module, name) if is_ours or is_torchs or is_optimizers else None
    if isinstance(found, type):
        home = found.__module__  # mymodels.os.system is not of mymodels
        if is_ours and _is_of(home, packages):
            return found
        if is_optimizers and issubclass(found, (Optimizer, LRScheduler)) and home.startswith("torch.optim."):
            return found
        if is_torchs and issubclass(found, (np.generic, np.dtype)) and home.startswith("numpy"):
            return found
    if is_torchs and type(found) in (torch.dtype, torch.layout, torch.memory_format):
        return found
    raise NotBelieved(
        f"it names {module}.{name}, which is neither plain nor a class of "
        f"{', '.join(sorted(packages)) or 'a package'} that the configuration names"
    )


def _is_of(module: str, packages: frozenset[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@contextmanager
def only_classes_of(packages: frozenset[str]) -> Iterator[None]:
    """In the block, let `believed` find nothing but plain values, tensors, and objects of some packages.

    Args:
        packages: names of packages or modules, with dots if they are within others.
    """
    token = _packages.set(packages)
    try:
        yield
    finally:
        _packages.reset(token)


_packages: ContextVar[frozenset[str] | None] = ContextVar("packages", default=None)

_PLAIN = frozenset(
    (module, name)
    for module, names in {
        "builtins": "bool bytearray bytes complex dict float frozenset int list range set slice str tuple",
        "collections": "Counter OrderedDict defaultdict deque",
        "functools": "partial",
        "itertools": "count",
        "logging": "getLogger",
        "pathlib": "Path PosixPath PurePosixPath",
        "re": "_compile",
        "copyreg": "__newobj__ _reconstructor",
        "_codecs": "encode",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "random": "Random",
        "types": "MappingProxyType SimpleNamespace",
        "numpy": "dtype ndarray",
        "numpy._core.multiarray": "_reconstruct scalar",
        "numpy.core.multiarray": "_reconstruct scalar",
        "numpy._core.numeric": "_frombuffer",
        "numpy.random._pickle": "__bit_generator_ctor __generator_ctor __randomstate_ctor",
        "numpy.random.bit_generator": "SeedSequence __pyx_unpickle_SeedSequence",
        "numpy.random._mt19937": "MT19937",
        "numpy.random._pcg64": "PCG64 PCG64DXSM",
        "numpy.random._philox": "Philox",
        "numpy.random._sfc64": "SFC64",
        "sparksgd.arithmetic.generators": "global_generator",
        "sparksgd.arithmetic.reductions": "_bound _identity _set_tensor_state _storage_of "
        "_tensor_of _weak_reference",
        "sparksgd.solvers.carrying": "_bare _cell _fill_cell _fill_function _function _method",
        "torch": "Generator Size Tensor device finfo iinfo",
        "torch._C": "Generator",
        "torch.nn.parameter": "Buffer Parameter",
        "torch._utils": "_rebuild_parameter _rebuild_tensor _rebuild_tensor_v2 _rebuild_sparse_tensor",
        "torch.serialization": "_get_layout",
    }.items()
    for name in names.split()
)
