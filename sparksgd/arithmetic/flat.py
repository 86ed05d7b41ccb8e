"""A module as vectors: its parameters, its gradients and its running statistics.

The vector has the trainable parameters, in the order of `named_parameters`, tied ones once.  Each is a view
of the flat vector, and so is its gradient.  Frozen parameters (`requires_grad` false) are not in it.
The buffers of batch-norm change in training: running means and variances are averaged over the rows, like
a gradient, and counters advance.  What else forward changes, is found by its bytes (changes.py).

Legend: P elements of K parameters, Q running statistics, C counters.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial, reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparksgd.arithmetic.changes import Changes, Copy, Words, bits
from sparksgd.arithmetic.constants import Constants, Slot
from sparksgd.arithmetic.mapped_twice import LEAST_BYTES, mapped_twice
from sparksgd.arithmetic.standing import Standing
from sparksgd.errors import ModelError

__all__ = [
    "FlatModule",
    "FlatParameters",
    "FlatStrip",
    "TakePart",
    "Weights",
    "has_convolutions",
    "is_lazy",
    "mixes_rows",
    "mixes_rows_of_evaluations",
]

TakePart = Callable[[npt.NDArray[np.floating], int], None]
"""Called with a gradient, float[P], and the number of the parameter whose part of it is now computed."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One version of what a module has learnt: workers compute a gradient from it."""

    version: int
    """How many steps made these parameters."""

    parameters: npt.NDArray[np.floating]
    """float32[P]; of a strip, only its part."""

    statistics: npt.NDArray[np.floating]
    """Running means and variances of batch-norm, float32[Q]; float64 if one of them is."""

    counters: npt.NDArray[np.int64]
    """Batches that each batch-norm has seen, int64[C]."""

    constants: Mapping[str, Words] = field(default_factory=dict)
    """The bytes of the frozen parameters and other buffers that forward has ever changed, by name."""


class FlatModule:
    """A module whose trainable parameters and gradients are views of flat vectors.

    Args:
        module: changed in place: its parameters become views.
        dtype: type of every parameter; tests use float64.

    Raises:
        ModelError: a tensor is not on the CPU, of another type or lazy, or none is trainable.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.module = module
        self.dtype = dtype
        # What an own `parameters()` leaves out is constant, as it would be in an optimiser made with it.
        given = {id(parameter) for parameter in module.parameters()}
        trainable = [
            (n, p) for n, p in nn.Module.named_parameters(module) if p.requires_grad and id(p) in given
        ]
        _check(trainable, module, dtype)
        self.trainable = [parameter for _, parameter in trainable]
        self.parts = _parts(parameter.numel() for parameter in self.trainable)
        self.touched: npt.NDArray[np.bool_] | None = None
        """Which parameters the passes of the last `new_gradient` gave a gradient, bool[K]; None: all."""

        size = sum(parameter.numel() for parameter in self.trainable)
        self.parameters = torch.empty(size, dtype=dtype)
        self.gradient = torch.zeros(size, dtype=dtype)
        places = self._places(self.parameters)
        for parameter, values, gradient in zip(
            self.trainable, places, self._views(self.gradient), strict=True
        ):
            values.copy_(parameter.detach())
            parameter.data = values
            parameter.grad = gradient
        self.whole = _parameter(self.parameters, self.gradient)
        norms = [m for m in _training_norms(module) if m.track_running_stats]
        self._statistics = [slot for norm in norms for slot in _slots(norm, "running_mean", "running_var")]
        self._counters = [slot for norm in norms for slot in _slots(norm, "num_batches_tracked")]
        types = (slot.tensor.dtype for slot in self._statistics)
        self._statistics_type = reduce(torch.promote_types, types, dtype)
        moving = [slot.tensor for slot in [*self._statistics, *self._counters]]
        self._constants = Constants(module, {id(tensor) for tensor in [*self.trainable, *moving]})
        self.standing = Standing(module, dict(trainable), self.parameters, self._constants)
        """What stands while forward runs, and what forward changes."""
        self.is_mapped = False
        """Whether the module has its parameters in another mapping than `parameters`; see `map_twice`."""
        self._copies: dict[int, Copy] = {}  # of weights that are computed channels last, by their id

    @contextmanager
    def new_gradient(
        self, take_part: TakePart | None = None, shift: int = 0
    ) -> Iterator[npt.NDArray[np.floating]]:
        """Yield a new vector, float[P]; after the block it holds the gradient of the block's backward passes.

        A parameter that these did not reach has zeros in it, and is not among those in `touched`.

        The backward passes make tensors of their own, which are then copied.  To add them to views of zeros
        would read and write the vector three times more.

        Args:
            take_part: called for each part of the vector as soon as it is computed, during the backward
                pass; the block may then have only one.
            shift: the block back-propagates 2^-shift times its loss, which is undone here, exactly.
        """
        held = [parameter.grad for parameter in self.trainable]
        gradient = torch.empty_like(self.gradient)
        vector, taken = gradient.numpy(), set[int]()

        def take(number: int, view: torch.Tensor, parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            view.copy_(parameter.grad.to_dense())
            if shift:
                view.mul_(2.0**shift)
            taken.add(number)
            if take_part is not None:
                take_part(vector, number)

        with ExitStack() as hooks:
            for parameter in self.trainable:
                parameter.grad = None
            if take_part is not None:
                for number, (parameter, view) in enumerate(self._parts(gradient)):
                    hook = parameter.register_post_accumulate_grad_hook(partial(take, number, view))  # type: ignore[no-untyped-call]  # torch leaves it untyped
                    hooks.callback(hook.remove)
            try:
                yield vector
                reached = [parameter.grad is not None for parameter in self.trainable]
                self.touched = None if all(reached) else np.array(reached)
                for number, (parameter, view) in enumerate(self._parts(gradient)):
                    if parameter.grad is None:
                        view.zero_()
                    elif number not in taken:
                        view.copy_(parameter.grad.to_dense())
                        if shift:
                            view.mul_(2.0**shift)
            finally:
                for parameter, grad in zip(self.trainable, held, strict=True):
                    parameter.grad = grad

    def _parts(self, vector: torch.Tensor) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Yield each parameter with its part of a vector, [P]."""
        return zip(self.trainable, self._views(vector), strict=True)

    def _views(self, vector: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield each parameter's part of a vector, [P], in the parameter's shape."""
        start = 0
        for parameter in self.trainable:
            end = start + parameter.numel()
            yield vector[start:end].view(parameter.shape)
            start = end

    def _places(self, vector: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield each parameter's part of a vector, [P], as the parameter's memory."""
        apart = _viewed_as_pairs(self.module)
        for parameter, values in zip(self.trainable, self._views(vector), strict=True):
            if id(parameter) in apart and values.storage_offset() % 2:
                yield torch.from_numpy(values.numpy())  # the same memory, as a storage that begins there
            else:
                yield values

    def map_twice(self, least_bytes: int = LEAST_BYTES) -> None:
        """Let a solver write `parameters` where the module reads them, without a copy, if the system can.

        Only for a solver that leaves `trainable` alone: from now on these are no views of `parameters`, and
        see what is written there after `standing.at`.

        Args:
            least_bytes: of the parameters; fewer are copied, as before.
        """
        if self.is_mapped or self.parameters.nbytes < least_bytes:
            return
        mapped = mapped_twice(self.parameters)
        if mapped is None:
            return
        for parameter, values in zip(self.trainable, self._places(mapped.seen), strict=True):
            parameter.data = values
        self.parameters, self.is_mapped = mapped.vector, True
        self.whole = _parameter(self.parameters, self.gradient)
        self.standing.hold(mapped)

    def weights(self, version: int, copied: Callable[[Any], Any] = np.copy) -> Weights:
        """Return a copy of everything that training changes; `copied` copies the parameters."""
        return Weights(
            version=version,
            parameters=copied(self.parameters.numpy()),
            statistics=self.statistics(),
            counters=self.counters(),
            constants=self.changed_constants(),
        )

    def statistics(self) -> npt.NDArray[np.floating]:
        """Return a copy of batch-norm's running statistics, float[Q], in the widest of their types."""
        return _flat(self._statistics, self._statistics_type)

    def counters(self) -> npt.NDArray[np.int64]:
        """Return a copy of batch-norm's counters, int64[C]."""
        return _flat(self._counters, torch.int64)

    def load(self, weights: Weights) -> None:
        """Overwrite everything that training changes."""
        self.load_parameters(weights.parameters)
        self.load_buffers(weights.statistics, weights.counters)
        self.load_constants(weights.constants)

    def load_parameters(self, parameters: npt.NDArray[np.floating]) -> None:
        """Overwrite the parameters, float[P]; do nothing if they have these very bytes."""
        values = torch.from_numpy(parameters)
        if values.data_ptr() != self.parameters.data_ptr():
            self.parameters.copy_(values)

    def apply(self, changes: Changes | None, strip: range | None = None) -> None:
        """Let what forward made of parameters and constants be the weights; see `Standing.apply`."""
        self.standing.apply(changes, strip)

    def changed_constants(self) -> dict[str, Words]:
        """Return a copy of the constants that forward has ever changed."""
        return self._constants.current(copy=True)

    def load_constants(self, constants: Mapping[str, Words]) -> None:
        """Overwrite the constants that forward has ever changed; all others get their first values again."""
        self._constants.load(constants)

    def view(self, version: int) -> Weights:
        """Return everything that training changes; parameters and constants as views of their memory."""
        return Weights(
            version=version,
            parameters=self.parameters.numpy(),
            statistics=self.statistics(),
            counters=self.counters(),
            constants=self._constants.current(copy=False),
        )

    def parameters_like(self) -> FlatParameters:
        """Return parameters of the same shapes and attributes, all 0, apart from the module."""
        found = FlatParameters([parameter.shape for parameter in self.trainable], self.dtype)
        for parameter, own in zip(found.trainable, self.trainable, strict=True):
            vars(parameter).update(vars(own))
        return found

    def load_buffers(self, statistics: npt.NDArray[np.floating], counters: npt.NDArray[np.int64]) -> None:
        """Overwrite batch-norm's running statistics, float[Q], and counters, int64[C]."""
        start = 0
        for slot in self._statistics:
            slot.put_back()
            buffer = slot.tensor
            values = statistics[start : start + buffer.numel()]
            buffer.copy_(torch.from_numpy(values).view(buffer.shape))
            start += buffer.numel()
        for slot, value in zip(self._counters, counters, strict=True):
            slot.put_back()
            slot.tensor.fill_(int(value))

    def constants(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the named frozen parameters and buffers, which no optimiser moves."""
        return self._constants.tensors()

    def parameters_sha256(self) -> str:
        """Return the digest of the parameters' little-endian bytes."""
        return _sha256([self.parameters])

    def buffers_sha256(self) -> str:
        """Return the digest of all buffers' bytes, in the order of `named_buffers`."""
        return _sha256(buffer for _, buffer in self.module.named_buffers())

    @contextmanager
    def channels_last(self) -> Iterator[None]:
        """In the block, let 2-d convolutions use copies of their weights that are channels last in memory.

        The output of a convolution has the memory layout of its weights, and torch computes this one faster
        on a CPU: a gradient of LeNet takes 0.6 of the time.
        """
        weights = {id(weight): weight for weight in _convolved(self.module)}.values()
        held = [(weight, weight.data, weight.grad) for weight in weights]
        for weight, values, _ in held:
            copy = self._copies.get(id(weight))
            if copy is None:
                # contiguous() would not change a weight of one input channel, nor the layout of its output.
                last = torch.empty(values.shape, dtype=values.dtype, memory_format=torch.channels_last)
                copy = self._copies[id(weight)] = Copy(last)
            weight.data, weight.grad = copy.data.copy_(values), None
            copy.keep()
            self.standing.bind(weight, copy.data, copy)
        try:
            yield
        finally:
            for weight, values, gradient in held:
                weight.data = values
                self.standing.bind(weight, values)
                if gradient is not None:
                    weight.grad = gradient


class FlatParameters:
    """Parameters as views of one vector, and their gradients, with no module around them.

    Args:
        shapes: of the parameters, in their order.
        dtype: type of every parameter.
    """

    def __init__(self, shapes: Sequence[torch.Size], dtype: torch.dtype) -> None:
        sizes = [shape.numel() for shape in shapes]
        self.parts = _parts(sizes)
        self.parameters = torch.zeros(sum(sizes), dtype=dtype)
        self.gradient = torch.zeros(sum(sizes), dtype=dtype)
        self.whole = _parameter(self.parameters, self.gradient)
        parts = zip(
            torch.split(self.parameters, sizes), torch.split(self.gradient, sizes), shapes, strict=True
        )
        self.trainable = [_parameter(values.view(s), gradient.view(s)) for values, gradient, s in parts]


class FlatStrip:
    """A part of a flat module's vector, and all of its statistics, for a solver that updates only this part.

    Args:
        flat: the module.
        strip: which part of its vector.
    """

    def __init__(self, flat: FlatModule, strip: range) -> None:
        part = slice(strip.start, strip.stop)
        self._flat, self._strip = flat, strip
        self.parameters = flat.parameters[part]
        self.gradient = flat.gradient[part]
        self.whole = _parameter(self.parameters, self.gradient)
        self.trainable = [self.whole]
        first, last = strip.start, strip.stop
        self.parts = [
            slice(min(max(part.start, first), last) - first, min(max(part.stop, first), last) - first)
            for part in flat.parts
        ]
        """The part of each of the module's parameters; many have no element."""

    def parameters_like(self) -> FlatParameters:
        """Return parameters like the module's, see `FlatModule.parameters_like`."""
        return self._flat.parameters_like()

    def weights(self, version: int, copied: Callable[[Any], Any] = np.copy) -> Weights:
        """Return a copy of the strip's parameters and of all statistics."""
        parameters = copied(self.parameters.numpy())
        return replace(self.view(version), parameters=parameters, constants=self._flat.changed_constants())

    def view(self, version: int) -> Weights:
        """Return the same with the strip's parameters, and the constants, as views of their memory."""
        return replace(self._flat.view(version), parameters=self.parameters.numpy())

    def apply(self, changes: Changes | None) -> None:
        """Let what forward made of the strip and of the constants be the weights; see `FlatModule.apply`."""
        self._flat.apply(changes, self._strip)

    def load(self, weights: Weights) -> None:
        """Overwrite the strip, all statistics and the constants."""
        self.parameters.copy_(torch.from_numpy(weights.parameters))
        self.load_buffers(weights.statistics, weights.counters)
        self._flat.load_constants(weights.constants)

    def load_buffers(self, statistics: npt.NDArray[np.floating], counters: npt.NDArray[np.int64]) -> None:
        """Overwrite batch-norm's running statistics, float[Q], and counters, int64[C]."""
        self._flat.load_buffers(statistics, counters)


def has_convolutions(module: nn.Module) -> bool:
    """Return whether the module has a 2-d convolution."""
    return next(_convolved(module), None) is not None


def _convolved(module: nn.Module) -> Iterator[nn.Parameter]:
    weights = (getattr(part, "weight", None) for part in module.modules() if isinstance(part, nn.Conv2d))
    return (weight for weight in weights if isinstance(weight, nn.Parameter))


def mixes_rows(module: nn.Module) -> bool:
    """Return whether the module has a batch-norm that trains."""
    return any(_training_norms(module))


def mixes_rows_of_evaluations(module: nn.Module) -> bool:
    """Return whether the module has a batch-norm that keeps no statistics: it takes those of each batch."""
    return any(isinstance(part, _BatchNorm) and part.running_mean is None for part in module.modules())


def _training_norms(module: nn.Module) -> Iterator[_BatchNorm]:
    return (part for part in module.modules() if isinstance(part, _BatchNorm) and part.training)


def _viewed_as_pairs(module: nn.Module) -> set[int]:
    """Return the parameters that forward may view as complex numbers, by their `id`.

    That needs an even place in the storage.  Layers of torch do not view theirs so.
    """
    holders = (
        part
        for part in module.modules()
        if isinstance(part, nn.ParameterList | nn.ParameterDict)
        or not type(part).__module__.startswith("torch.")
    )
    held = (parameter for part in holders for parameter in part.parameters(recurse=False))
    return {id(parameter) for parameter in held if parameter.numel() % 2 == 0}


def _check(trainable: list[tuple[str, nn.Parameter]], module: nn.Module, dtype: torch.dtype) -> None:
    if not trainable:
        raise ModelError(
            f"{type(module).__name__} has no trainable parameter: "
            f"every one has requires_grad false, or there is none, or parameters() gives none"
        )
    for name, tensor in [*nn.Module.named_parameters(module), *nn.Module.named_buffers(module)]:
        if is_lazy(tensor):
            raise ModelError(f"{name} has no shape yet (a lazy module): run one batch through it first")
        if tensor.device.type == "meta":
            raise ModelError(
                f"{name} is on meta, so it has no values: build the module on the CPU, or load values into "
                f"module.to_empty(device='cpu')"
            )
        if tensor.device.type != "cpu":
            raise ModelError(
                f"{name} is on {tensor.device}, but only the CPU is supported: call module.cpu()"
            )
    for name, parameter in trainable:
        if parameter.dtype != dtype:
            raise ModelError(
                f"parameter {name} is {parameter.dtype}, but must be {dtype}: {_remedy(parameter)}"
            )


def _parts(sizes: Iterable[int]) -> list[slice]:
    """Return each parameter's part of the vector."""
    ends = [0, *itertools.accumulate(sizes)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def _remedy(parameter: torch.Tensor) -> str:
    if parameter.is_complex():
        return "keep it as two real numbers, [..., 2], and use torch.view_as_complex in forward"
    if parameter.dtype in (torch.bfloat16, torch.float16):
        return "call module.float(), and compute under torch.autocast('cpu') in forward"
    return "call module.float()"


def is_lazy(tensor: torch.Tensor) -> bool:
    """Return whether a parameter or a buffer of a lazy module has no shape yet."""
    return isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer)


def _parameter(values: torch.Tensor, gradient: torch.Tensor) -> nn.Parameter:
    """Return a vector as one parameter with its gradient, both in place."""
    parameter = nn.Parameter(values)
    parameter.grad = gradient
    return parameter


def _slots(norm: _BatchNorm, *keys: str) -> list[Slot]:
    return [Slot(norm._buffers, key) for key in keys if norm._buffers.get(key) is not None]


def _flat(slots: list[Slot], dtype: torch.dtype) -> npt.NDArray[Any]:
    tensors = [tensor for slot in slots if (tensor := slot.now()) is not None]
    if not tensors:
        return _none(dtype)
    return torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors]).numpy()


_none = cache(lambda dtype: torch.empty(0, dtype=dtype).numpy())  # a step asks for it several times


def _sha256(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(bits(tensor).data)
    return digest.hexdigest()
