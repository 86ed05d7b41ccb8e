"""State of a module or a loss that is no parameter and no buffer, which would make bits differ.

A counter, a tensor kept as an attribute, a list, a generator of one's own: workers have one each, and what
they hold depends on which shards a worker computed before.  So every piece must leave this state as it was.
Some modules write what they never read from an earlier piece: the last activation, a cache of masks.  The
trial proves that (`harmless_state`); then each piece starts from the first state again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from sparksgd.arithmetic.structure import Structure
from sparksgd.engines.held import ABSENT, TABLES, Held, HeldBytes, Seen, equal, held_of, refusal
from sparksgd.engines.held_names import around, of_tensors

__all__ = ["Watch"]


class Watch:
    """The state of a module and its loss as they are now, to which each piece returns.

    Args:
        module: its parameters, buffers and submodules are not looked at: `FlatModule.standing` does that.
        loss: any callable; all that it holds is looked at.
        harmless: paths of attributes that a piece may leave changed.
        original: the module that this one is a copy of, where another one tells whether it changed.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: object,
        harmless: frozenset[str] = frozenset(),
        original: nn.Module | None = None,
    ) -> None:
        self._harmless = harmless
        told = [module] if original is None else [module, original]
        seen = Seen(id(part) for one in told for part in (*one.modules(), *one.parameters(), *one.buffers()))
        self._tables: list[_Table] = []
        for path, part in module.named_modules():
            self._tables.append(_Table(path, part, seen))
        inner: list[Held] = []
        self._structure = Structure(loss) if isinstance(loss, nn.Module) else None
        if isinstance(loss, nn.Module):
            own = [(path, part) for path, part in loss.named_modules(prefix="loss") if id(part) not in seen]
            tensors = [*loss.named_buffers(prefix="loss"), *loss.named_parameters(prefix="loss")]
            inner += [HeldBytes(path, tensor) for path, tensor in tensors if id(tensor) not in seen]
            seen.update(id(part) for _, part in own)
            self._tables += [_Table(path, part, seen) for path, part in own]
        elif (held := held_of("loss", loss, seen)) is not None:
            inner.append(held)
        inner += of_tensors([*module.named_parameters(), *module.named_buffers()], seen)
        inner += around([module, loss], seen)
        self._inner = inner
        self.functions = seen.followed
        """The functions around, as far as they are the user's."""
        self.scripted = seen.scripted
        """What torch.jit has made, as far as the module, the loss or those functions name it."""
        self._outer = [one for table in self._tables for one in table.inner]
        self._same = [(vars(table.module), table.values) for table in self._tables]

    def changed(self) -> list[str]:
        """Return the paths of the attributes that are not as they were.

        Raises:
            ModelError: the loss made, removed or replaced a submodule, a parameter or a buffer.
        """
        if self._structure is not None:
            self._structure.check("the loss")
        if self._is_same():
            return []
        found = {path: None for table in self._tables for path in table.changed()}
        found |= {one.path: None for one in self._inner if one.is_changed()}
        if not found:
            self._restore()  # equal values, in other objects: what is the same is seen sooner
        return list(found)

    def require_unchanged(self) -> None:
        """Refuse what changed; where that was shown to be harmless, return to the first state.

        Raises:
            ModelError: an attribute changed.
        """
        changed = self.changed()
        for path in changed:
            if path not in self._harmless:
                raise refusal(path)
        if changed:
            self._restore()

    def restore(self) -> None:
        """Return to the first state."""
        if self._structure is not None:
            self._structure.restore()
        if not self._is_same():
            self._restore()

    def _restore(self) -> None:
        for table in self._tables:
            table.restore()
        for one in self._inner:
            if one.is_changed():
                one.restore()

    def value(self, path: str) -> object:
        """Return what an attribute is now."""
        if found := [held.now() for held in self._inner if held.path == path]:
            return found
        for table in self._tables:
            before, _, name = path.rpartition(".")
            if before == table.path:
                inside = [held.now() for held in self._outer if held.path == path]
                return vars(table.module).get(name), inside
        return None

    def number(self, path: str) -> float | None:
        """Return an attribute that is a number; None if it is none."""
        for table in self._tables:
            before, _, name = path.rpartition(".")
            value = vars(table.module).get(name) if before == table.path else None
            if isinstance(value, int | float) and not isinstance(value, bool):
                return value
        return None

    def set_number(self, path: str, value: float) -> None:
        """Set an attribute that is a number."""
        before, _, name = path.rpartition(".")
        for table in self._tables:
            if before == table.path:
                vars(table.module)[name] = value

    def _is_same(self) -> bool:
        try:
            for now, before in self._same:
                if now != before:
                    return False
        except Exception:  # two tensors, or two arrays, of which there is no one answer
            return False
        return not any(one.is_changed() for one in (*self._outer, *self._inner))


class _Table:
    """The attributes of one module."""

    def __init__(self, path: str, module: nn.Module, seen: Seen) -> None:
        self.path, self.module = path, module
        self.values = {
            name: value.copy() if _is_table(name, value) else value for name, value in vars(module).items()
        }  # those in TABLES themselves, so that they are always equal
        self.inner: list[Held] = []
        self._inner_of: dict[str, list[Held]] = {}
        for name, value in vars(module).items():
            if name in TABLES:
                continue
            values = value.values() if _is_table(name, value) and isinstance(value, dict) else [value]
            found = [held for one in values if (held := held_of(self._named(name), one, seen)) is not None]
            if found and not (_is_table(name, value) and isinstance(value, set)):
                self._inner_of[name] = found
                self.inner += found

    def _named(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def changed(self) -> Iterator[str]:
        """Yield the paths of the attributes that changed."""
        now = vars(self.module)
        for name in {**self.values, **now}:
            before = self.values.get(name, ABSENT)
            value = now.get(name, ABSENT)
            if _differ(name, before, value):
                yield self._named(name)
            else:
                yield from (held.path for held in self._inner_of.get(name, ()) if held.is_changed())

    def restore(self) -> None:
        """Return to the first values."""
        now = vars(self.module)
        for name in [name for name in now if name not in self.values]:
            del now[name]
        for name, before in self.values.items():
            if not _differ(name, before, now.get(name, ABSENT)):
                continue
            if _is_table(name, before):
                now[name].clear()
                now[name].update(before)
            else:
                now[name] = before
        for held in self.inner:
            if held.is_changed():
                held.restore()


def _is_table(name: str, value: object) -> bool:
    """Return whether an attribute is a table of torch's own for a module's hooks, or the like."""
    return name in _TORCHS_TABLES and isinstance(value, dict | set)


_TORCHS_TABLES = frozenset(
    name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set) and name not in TABLES
)


def _differ(name: str, before: Any, now: Any) -> bool:
    """Return whether an attribute is another object that may be of another value."""
    if before is now:
        return False
    if _is_table(name, before) and type(before) is type(now):
        if isinstance(before, set):
            return bool(before != now)
        return [id(one) for one in before.values()] != [id(one) for one in now.values()]
    return not equal(before, now)
