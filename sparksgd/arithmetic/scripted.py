"""Functions of torch.jit are run as written, without torch's optimiser.

The optimiser waits for the second call of a function in a process, and then fuses operations and
differentiates them by formulas of its own: other bits.  A driver that has called a function often, and a
worker that is new, would differ.  So all of the user's code that uses torch runs without the optimiser (see
imports/torch_code.py), and what it has made in a process before is forgotten.

The switch is one of the thread.  In a thread that forward starts, the optimiser counts calls, and never gets
to optimise.  A function that is optimised already stays so in the block: call `forget_optimised` first.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

__all__ = ["SCRIPTED", "as_written", "forget_all_optimised", "forget_optimised", "optimiser_off"]

SCRIPTED = (
    torch.jit.ScriptFunction,
    torch._C.ScriptMethod,
    torch.jit.ScriptModule,
    torch.jit.CompilationUnit,
)
"""What torch.jit makes."""

_torch: Any = torch._C  # the types of some of its functions are wrong
_lock = threading.Lock()
_here = threading.local()  # is_open: whether this thread is in a block
_blocks = 0  # how many blocks are open, in all threads
_runs_before = 1
_ENDLESS = 1 << 40


def forget_optimised(others: Iterable[Any] = ()) -> None:
    """Forget what the optimiser made of functions: the next call of each compiles it anew.

    Args:
        others: functions outside of torch's own compilation unit: of a loaded file, or of a text
            (`CompilationUnit`).
    """
    functions: list[Any] = []
    for one in (torch.jit._state._python_cu, *others):
        if isinstance(one, torch.jit.ScriptModule):
            inner = vars(one).get("_c")  # PYTORCH_JIT=0 makes it an ordinary module
            functions += [] if inner is None else [inner._get_method(name) for name in inner._method_names()]
        elif isinstance(one, torch.jit.CompilationUnit):
            functions += one.get_functions()
        else:
            functions.append(one)
    for function in functions:
        with suppress(RuntimeError):  # of another executor, which the process chose: it keeps no such plans
            function._debug_flush_compilation_cache()


@contextmanager
def as_written() -> Iterator[None]:
    """In the block, let the functions of torch.jit that are not optimised yet stay so."""
    if getattr(_here, "is_open", False) and not _torch._get_graph_executor_optimize():
        yield  # it is so already: a step has many such blocks
        return
    was_open = getattr(_here, "is_open", False)
    with torch.jit.optimized_execution(False), _endless_counting():  # type: ignore[attr-defined]  # it is public
        _here.is_open = True
        try:
            yield
        finally:
            _here.is_open = was_open


@contextmanager
def _endless_counting() -> Iterator[None]:
    """In the block, let the optimiser of any thread count calls without end."""
    global _blocks, _runs_before
    entered = False
    try:
        with _lock:
            if not _blocks:
                _runs_before = _torch._jit_set_num_profiled_runs(_ENDLESS)
            _blocks += 1
            entered = True
        yield
    finally:
        with _lock:
            _blocks -= entered
            if not _blocks:
                _torch._jit_set_num_profiled_runs(_runs_before)


def forget_all_optimised() -> None:
    """Forget what the optimiser made of all functions of this process, whoever names them; some 20 ms.

    They are found by what refers to their types.  `gc.get_objects` would hold tuples that other threads are
    still making, and these threads would fail.
    """
    kinds = {torch.jit.ScriptFunction, torch._C.ScriptMethod, *_kinds(torch.jit.ScriptModule)}
    forget_optimised(found for found in gc.get_referrers(*kinds) if type(found) in kinds)


def _kinds(kind: type[Any]) -> Iterator[type[Any]]:
    """Yield a class and all that inherit from it."""
    yield kind
    for heir in kind.__subclasses__():
        yield from _kinds(heir)


@contextmanager
def optimiser_off() -> Iterator[None]:
    """Run the block `as_written`, whatever was optimised before; afterwards functions are optimised again."""
    forget_all_optimised()
    try:
        with as_written():
            yield
    finally:
        forget_optimised()  # some may still count without end
