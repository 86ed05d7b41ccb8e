"""Steadies numpy's and Python's generators: in a block, what is drawn does not depend on how many rows draw.

Noise differs from row to row, so that rows computed together and in parts could not be compared.  Here each
number is the first that a fresh generator gives, so all rows get the same noise.  Operations of torch are
steadied by operations.py, at the same levels.
"""

from __future__ import annotations

import random
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np

__all__ = ["BETWEEN", "HIGH", "LOW", "MIDDLE", "MOST_DRAWS", "Chance"]

MOST_DRAWS = 20_000
"""That are steady in a block: a loop that waits for another number must end."""

MIDDLE, LOW, HIGH = range(3)
"""Which noise: ordinary numbers, small ones, great ones.  A mask that one of them drops shows at another."""
BETWEEN = range(3, 7)
"""Others between them, for branches that a drawn number decides."""

_RandomState, _Generator, _Random = np.random.RandomState, np.random.Generator, random.Random
_default_rng = np.random.default_rng
_SEEDS = {
    _RandomState: (89, 170, 179, 86, 164, 30, 563),
    _Generator: (235, 326, 249, 355, 942, 107, 76),
    _Random: (50, 396, 244, 39, 47, 421, 6),
}
"""By level.  Their first numbers in [0, 1) are near 0.5, 0.05, 0.95, 0.2, 0.35, 0.65 and 0.8; the first ones
of {0, 1} are 1, 0 and 1; and of up to six whole numbers each comes first at some level."""

_PLACES = {
    0: "random random_sample ranf sample tomaxint standard_normal standard_exponential standard_cauchy",
    1: "standard_gamma exponential poisson geometric zipf pareto weibull power rayleigh chisquare standard_t "
    "logseries choice dirichlet",
    2: "uniform normal beta gamma f noncentral_chisquare vonmises laplace gumbel logistic lognormal wald "
    "binomial negative_binomial randint random_integers integers multinomial multivariate_normal "
    "multivariate_hypergeometric",
    3: "triangular hypergeometric noncentral_f",
}
_PLACE_OF_SIZE = {name: place for place, names in _PLACES.items() for name in names.split()}
"""The place of the argument `size` in each of numpy's functions."""

_OF_ARRAYS = ("choice", "dirichlet", "multinomial", "multivariate_normal", "multivariate_hypergeometric")
"""An array among their arguments makes one draw, not one for each element."""
_IN_ORDER = ("permutation", "permuted", "shuffle")
_NUMPY = (*_PLACE_OF_SIZE, "rand", "randn", *_IN_ORDER)
_PYTHONS = (
    "random uniform triangular randint randrange getrandbits randbytes choice choices sample shuffle gauss "
    "normalvariate lognormvariate expovariate vonmisesvariate gammavariate betavariate paretovariate "
    "weibullvariate binomialvariate"
)
_PYTHON = tuple(_PYTHONS.split())


class Chance:
    """Numpy's and Python's generators, wherever a Python file names them, or makes one.

    What a default of a function or an attribute of a class holds stays as it is.
    """

    def __init__(self) -> None:
        self.was_drawn = False
        """Whether anything was drawn in a block."""
        self._draws = 0
        self._numbers: dict[Any, int | float] = {}  # each known one, because a fresh generator takes long
        self._level = MIDDLE
        self._thread: int | None = None
        kinds = [self._steady_kind(kind, names) for kind, names in _METHODS.items()]
        stands_for: dict[int, tuple[object, object]] = {
            id(kind): (kind, steady) for kind, steady in zip(_METHODS, kinds, strict=True)
        }
        stands_for[id(_default_rng)] = _default_rng, self._steady_default(kinds[1])
        for home, kind in ((np.random, _RandomState), (random, _Random)):
            for name in _METHODS[kind]:
                if hasattr(home, name):
                    function = getattr(home, name)
                    stands_for[id(function)] = function, self._steady(kind, name, function)
        self._places = list(_named(stands_for))
        self._originals = {id(steady): original for original, steady in stands_for.values()}

    @contextmanager
    def steady(self, level: int) -> Iterator[None]:
        """In the block, what this thread draws is of a level, and the same for all rows."""
        self._level, self._thread, self._draws = level, threading.get_ident(), 0
        places = [place for place in self._places if place[1] in place[0]]
        held = [(names, name, names[name]) for names, name, _ in places]
        known = set(sys.modules)
        try:
            for names, name, steady in places:
                names[name] = steady
            yield
        finally:
            for names, name, value in held:
                names[name] = value
            self._thread = None
            for file in sys.modules.keys() - known:  # imported in the block, perhaps with a name of ours
                self._put_back(vars(sys.modules[file]))

    def _put_back(self, names: dict[str, Any]) -> None:
        for name, value in list(names.items()):
            original = self._originals.get(id(value))
            if original is not None:
                names[name] = original

    def _steady(self, kind: type, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def steady(*args: Any, **kwargs: Any) -> Any:
            self._draws += 1
            if threading.get_ident() != self._thread or self._draws > MOST_DRAWS:
                return function(*args, **kwargs)
            self.was_drawn = True
            key = kind, name, self._level, args, tuple(kwargs.items())
            try:
                return self._numbers[key]
            except (KeyError, TypeError):  # not yet known, or with an array among its arguments
                pass
            of_kind = _of_python if kind is _Random else _of_numpy
            made = of_kind(kind, name, self._level, args, kwargs)
            if isinstance(made, int | float):
                self._numbers[key] = made
            return made

        return steady

    def _steady_kind(self, kind: Any, names: tuple[str, ...]) -> type:
        def method(name: str) -> Callable[..., Any]:
            own = getattr(kind, name)

            def steady(generator: Any, *args: Any, **kwargs: Any) -> Any:
                drawn = own.__get__(generator)
                if vars(generator).get("_gives_each_piece_the_same"):
                    return drawn(*args, **kwargs)
                return self._steady(kind, name, drawn)(*args, **kwargs)

            return steady

        def begin(generator: Any, *seed: Any, **named: Any) -> None:
            kind.__init__(generator, *seed, **named)
            generator._gives_each_piece_the_same = bool(seed or named)

        methods = {name: method(name) for name in names if hasattr(kind, name)}
        if kind is not _Generator:
            methods["__init__"] = begin
        if kind is _Random:  # a generator that is kept is pickled as one of Python's
            methods["__reduce__"] = lambda generator: (_Random, (), generator.getstate())
        of_kind = {
            "__instancecheck__": lambda _, one: isinstance(one, kind),
            "__subclasscheck__": lambda _, one: issubclass(one, kind),
        }
        steady_kind: Any = type("_SteadyKind", (type(kind),), of_kind)
        made: type = steady_kind(kind.__name__, (kind,), methods)
        return made

    def _steady_default(self, kind: Any) -> Callable[..., Any]:
        def default_rng(seed: Any = None) -> Any:
            if seed is not None:  # it gives each piece the same
                return _default_rng(seed)
            return kind(_default_rng(seed).bit_generator)

        return default_rng


_METHODS: dict[type, tuple[str, ...]] = {_RandomState: _NUMPY, _Generator: _NUMPY, _Random: _PYTHON}


_without: weakref.WeakKeyDictionary[types.ModuleType, int] = weakref.WeakKeyDictionary()
"""How many names an installed module had that named none of them."""


def _named(stands_for: Mapping[int, tuple[object, object]]) -> Iterator[tuple[dict[str, Any], str, object]]:
    """Yield where Python files name one of these objects: the file's variables, the name, what stands for it.

    Files of Python's own keep theirs, and so does numpy, which makes generators from pickles.  Installed
    files are looked through once: there are thousands.
    """
    for file, module in list(sys.modules.items()):
        is_own = file == __name__ or file.startswith("numpy.random.")
        if is_own or (file != "random" and file.partition(".")[0] in sys.stdlib_module_names):
            continue
        names = getattr(module, "__dict__", None)
        is_plain = type(module) is types.ModuleType  # others may have no weak references
        if not isinstance(names, dict) or (is_plain and _without.get(module) == len(names)):
            continue
        found = []
        if not stands_for.keys().isdisjoint(map(id, list(names.values()))):
            found = [
                (name, stands_for[id(value)][1])
                for name, value in list(names.items())
                if id(value) in stands_for and stands_for[id(value)][0] is value
            ]
        yield from ((names, name, steady) for name, steady in found)
        if is_plain and not found and "-packages" in str(names.get("__file__")):
            _without[module] = len(names)


def _fresh(kind: type, level: int) -> Any:
    seed = _SEEDS[kind][level]
    return _default_rng(seed) if kind is _Generator else kind(seed)


def _of_python(kind: type, name: str, level: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name == "shuffle":
        return _reverse(*args, **kwargs)
    if name == "choices":
        return _fresh(kind, level).choices(*args, **{**kwargs, "k": 1}) * kwargs.get("k", 1)
    return getattr(_fresh(kind, level), name)(*args, **kwargs)


def _of_numpy(kind: type, name: str, level: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a function of numpy gives, each element as if it were drawn first."""

    def first(given: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        return getattr(_fresh(kind, level), name)(*given, **named)

    if name in _IN_ORDER:
        return _reversed(name, *args, **kwargs)
    if name in ("rand", "randn"):
        return np.full(args, first((), {})) if args else first((), {})
    place, into = _PLACE_OF_SIZE[name], kwargs.get("out")
    size = args[place] if len(args) > place else kwargs.get("size")
    if name == "choice" and size is not None and not (args[2:3] or (kwargs.get("replace", True),))[0]:
        return first(args, kwargs)  # distinct ones
    named = {key: value for key, value in kwargs.items() if key not in ("size", "out")}
    given = (*args[:place], None, *args[place + 1 :]) if len(args) > place else args
    arrays = {} if name in _OF_ARRAYS else _arrays(given[:place], named)
    if arrays:
        drawn = _each(first, given, named, arrays)
        drawn = np.broadcast_to(drawn, drawn.shape if size is None else _shape(size))
    elif size is None and into is None:
        return first(given, named)
    elif len(args) > place:  # an array of one has the type of many
        one = first((*args[:place], 1, *args[place + 1 :]), named)[0]
        drawn = np.broadcast_to(one, (*_shape(size), *np.shape(one)))
    else:
        one = first(args, {**named, "size": 1})[0]
        drawn = np.broadcast_to(one, (*_shape(size), *np.shape(one)) if into is None else into.shape)
    if into is None:
        return drawn.copy()
    into[...] = drawn
    return into


def _shape(size: Any) -> tuple[int, ...]:
    """Return the shape that an argument `size` means."""
    return tuple(np.atleast_1d(size).tolist())


def _arrays(given: tuple[Any, ...], named: Mapping[str, Any]) -> dict[int | str, np.ndarray[Any, Any]]:
    """Return the arguments that are arrays, by place or by name."""
    arguments: list[tuple[int | str, Any]] = [*enumerate(given), *named.items()]
    return {
        key: np.asarray(value)
        for key, value in arguments
        if not isinstance(value, str | type | np.dtype) and np.ndim(value)
    }


def _each(
    first: Callable[[tuple[Any, ...], Mapping[str, Any]], Any],
    given: tuple[Any, ...],
    named: Mapping[str, Any],
    arrays: Mapping[int | str, np.ndarray[Any, Any]],
) -> np.ndarray[Any, Any]:
    """Return a draw for each element of the arguments; those with equal arguments are equal."""
    known: dict[tuple[Any, ...], Any] = {}

    def draw(*values: Any) -> Any:
        if values not in known:
            own = dict(zip(arrays, values, strict=True))
            known[values] = first(
                tuple(own.get(place, value) for place, value in enumerate(given)),
                {key: own.get(key, value) for key, value in named.items()},
            )
        return known[values]

    wide = np.broadcast_arrays(*arrays.values())
    flat = [draw(*values) for values in zip(*(array.ravel().tolist() for array in wide), strict=True)]
    return np.array(flat).reshape(wide[0].shape)


def _reversed(name: str, values: Any, axis: int | None = None, out: Any = None) -> Any:
    """Return values in the reverse order: a permutation of rows does mix them."""
    if name != "permuted":
        axis = axis or 0
    if name == "shuffle":
        if isinstance(values, np.ndarray):
            values[...] = np.flip(values, axis).copy()
        else:
            _reverse(values)
        return None
    turned = np.flip(
        np.arange(values) if isinstance(values, int | np.integer) else np.asarray(values), axis
    ).copy()
    if out is None:
        return turned
    out[...] = turned
    return out


def _reverse(x: Any) -> None:
    """Reverse in place whatever can be read and written by number."""
    values = x.clone() if hasattr(x, "clone") else x.copy() if hasattr(x, "shape") else list(x)
    for place in range(len(x)):
        x[place] = values[len(x) - 1 - place]
