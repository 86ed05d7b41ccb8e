"""Functions of torch.jit compute as they are written, and not as its optimiser makes them after some calls.

The optimiser waits for the second call of a function in a process, and then fuses operations and
differentiates them by formulas of its own: other bits.  A driver that has called a function often, and a
worker that is new, would differ.  So all of the user's code that uses torch runs without the optimiser (see
imports/torch_code.py), and what it has made in a process before is forgotten.

The switch is one of the thread.  Where forward starts threads of its own, or switches the optimiser on, that
never gets beyond watching the calls, which is no optimisation yet and the same in every process.  Nothing
reaches what is optimised already.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["SCRIPTED", "as_written", "forget_optimised"]

SCRIPTED = (torch.jit.ScriptFunction, torch.jit.ScriptModule, torch.jit.CompilationUnit)
"""What torch.jit makes."""

_jit: Any = torch._C
_lock = threading.Lock()
_blocks = 0  # how many threads are in one
_runs_before = 1
_ENDLESS = 1 << 40


def forget_optimised(others: Iterable[Any] = ()) -> None:
    """Forget what the optimiser made of functions: the next call of each compiles it anew.

    Args:
        others: each one of `SCRIPTED`, besides those that `torch.jit.script` has made of a Python function,
            which are known: traced ones, and those of a text.
    """
    functions: list[Any] = []
    for one in (torch.jit._state._python_cu, *others):
        if isinstance(one, torch.jit.ScriptFunction):
            functions.append(one)
        elif isinstance(one, torch.jit.ScriptModule):
            functions += [one._c._get_method(name) for name in one._c._method_names()]
        else:
            functions += one.get_functions()
    for function in functions:
        function._debug_flush_compilation_cache()


@contextmanager
def as_written() -> Iterator[None]:
    """In the block, let the functions of torch.jit that are not optimised yet stay so."""
    global _blocks, _runs_before
    before = torch._C._get_graph_executor_optimize()
    torch._C._set_graph_executor_optimize(False)
    with _lock:
        if not _blocks:
            _runs_before = _jit._jit_set_num_profiled_runs(_ENDLESS)
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks:
                _jit._jit_set_num_profiled_runs(_runs_before)
        torch._C._set_graph_executor_optimize(before)
