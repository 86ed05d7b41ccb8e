"""Which submodules, parameters and buffers a module has: forward may change values, but not these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sparksgd.errors import ModelError

__all__ = ["Structure"]


class Structure:
    """The parts of a module by identity, as they are now.

    Args:
        module: not changed.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts = [
            _Part(path, part)
            for path, part in module.named_modules()
            if not isinstance(part, torch.jit.ScriptModule)  # its parts are in C++, and made anew when asked
        ]

    def check(self, doing: str = "forward") -> None:
        """Refuse that a submodule or parameter was made, removed or replaced, or a buffer made or removed.

        Raises:
            ModelError: which one, and what to do.
        """
        for part in self._parts:
            if not part.is_same():
                raise ModelError(f"{part.difference(doing)}, so other workers would not have it: {_ADVICE}")

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor that the modules have now, by its path: registered, or in an attribute."""
        for part in self._parts:
            yield from part.tensors()

    def restore(self) -> None:
        """Put back every submodule, parameter and buffer."""
        for part in self._parts:
            part.restore()

    def restore_buffers(self) -> None:
        """Put back every buffer."""
        for part in self._parts:
            part.restore_buffers()


_ADVICE = (
    "make all of them in __init__, or run one batch through the module before the training; forward may then "
    "change their values"
)


_REGISTERED = {"_parameters", "_buffers", "_modules"}


class _Part:
    """One module of the tree, without its submodules."""

    def __init__(self, path: str, part: nn.Module) -> None:
        self._path, self._part = path, part
        self._modules = dict(part._modules)
        self._parameters = dict(part._parameters)
        self._buffers = dict(part._buffers)
        self._ids = self._identities()

    def _identities(self) -> list[Any]:
        part = self._part
        found: list[Any] = []
        if part._modules:
            found += part._modules
            found += map(id, part._modules.values())
        for name, parameter in part._parameters.items():
            found += (name, id(parameter), parameter is not None and parameter.requires_grad)
        for name, buffer in part._buffers.items():
            found += (name, buffer is None)
        return found

    def is_same(self) -> bool:
        return self._identities() == self._ids

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors that it has now; those of attributes also if a list or dictionary holds them."""
        part, prefix = self._part, f"{self._path}." if self._path else ""
        attributes = {name: held for name, held in vars(part).items() if name not in _REGISTERED}
        for name, held in [*part._parameters.items(), *part._buffers.items(), *attributes.items()]:
            several = list(held.values()) if isinstance(held, dict) else held
            for each in several if isinstance(several, (list, tuple)) else [several]:
                if isinstance(each, torch.Tensor):
                    yield f"{prefix}{name}", each

    def difference(self, doing: str) -> str:
        """Return what was done to which one."""
        part = self._part
        for kind, before, after in (
            ("submodule", self._modules, part._modules),
            ("parameter", self._parameters, part._parameters),
            ("buffer", self._buffers, part._buffers),
        ):
            told = _difference(kind, before, after)
            if told is not None:
                what, name = told
                return f"{doing} {what} {kind} {self._path}{'.' if self._path else ''}{name}"
        return f"{doing} changed which parameters of {self._path or 'the module'} require a gradient"

    def restore(self) -> None:
        self.restore_buffers()
        if not self.is_same():
            _put_back(self._part._modules, self._modules)
            _put_back(self._part._parameters, self._parameters)

    def restore_buffers(self) -> None:
        now = self._part._buffers
        if now.keys() != self._buffers.keys() or any(now[k] is not v for k, v in self._buffers.items()):
            _put_back(now, self._buffers)


def _difference(kind: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return what was done to the first one that differs, and its name."""
    for name in [*before, *(name for name in after if name not in before)]:
        old, new = before.get(name), after.get(name)
        if old is None and new is not None:
            return "made", name
        if (old is not None and new is None) or name not in after:
            return "removed", name
        if old is not new and kind != "buffer":
            return "replaced", name
    return None


def _put_back(now: dict[str, Any], before: Mapping[str, Any]) -> None:
    now.clear()
    now.update(before)
