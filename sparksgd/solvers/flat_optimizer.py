"""A torch optimiser on flat parameters: its steps, and what it keeps as arrays.

    an optimiser of torch that treats each element by itself
        holds one vector, as long as every step gives every parameter a gradient; from the first other step
        on, one view for each parameter, so that torch skips the parameters without a gradient.  Both give
        the same bits, and so do strips of the vector.
    any other, and any that a schedule of the user's own moves
        holds the parameters themselves, in their shapes.  What a step and the schedule leave in `p.data` is
        taken up into the vector, and `p.grad` is set before each step.

Legend: P elements of K parameters.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from sparksgd.arithmetic.generators import generators_seeded
from sparksgd.arithmetic.settings import HeldSettings, without_autocast
from sparksgd.config import OptimizerConfig
from sparksgd.errors import ConfigError
from sparksgd.imports.torch_code import users_torch_code
from sparksgd.solvers.carrying import CannotCarry, Carrier
from sparksgd.solvers.protocol import Settings, Touched, Vector
from sparksgd.solvers.unlabelled_step import make_step

__all__ = [
    "ELEMENTWISE",
    "FlatOptimizer",
    "Parameters",
    "hooks_of",
    "in_shapes",
    "is_of_torch",
    "means",
    "seeded",
]

# They update each element by itself.  So one vector of all parameters gives the same bits as many tensors,
# and so do strips of the vector.  A test checks this for each of them.
ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.ASGD,
)


class Parameters(Protocol):
    """Parameters as one vector, and as the tensors that are its parts."""

    parameters: torch.Tensor
    gradient: torch.Tensor
    whole: nn.Parameter
    trainable: list[nn.Parameter]
    parts: list[slice]


def is_of_torch(kind: type[Any]) -> bool:
    """Return whether a class is torch's own: it draws no random number, and its state_dict is complete."""
    return kind.__module__.startswith("torch.optim.")


def seeded(kind: type[Any], seed: int) -> AbstractContextManager[None]:
    """Seed the global generators while code of this class runs, where it may draw from them."""
    return nullcontext() if is_of_torch(kind) else generators_seeded(seed)


class FlatOptimizer:
    """An optimiser and its parameters.

    Args:
        parameters: that it moves.
        optimizer: over `parameters.whole` if it is held as a vector, else over `parameters.trainable`.
        config: what it was made of.
    """

    def __init__(self, parameters: Parameters, optimizer: Optimizer, config: OptimizerConfig) -> None:
        self.optimizer, self.parameters, self.config = optimizer, parameters, config
        held = [one for group in optimizer.param_groups for one in group["params"]]
        self.is_elementwise = type(optimizer) in ELEMENTWISE and held[0] is parameters.whole
        """Whether it is held as one vector, of which strips give the same bits."""
        self.schedules: list[object] = []
        """Schedules of the user's own that move it; they are carried with it."""
        self.arguments = {f"optimizer.{key}": value for key, value in config.arguments.items()}
        """What it and they were made with: others that are made alike have the same objects."""
        self._carrier = Carrier()
        if not self.is_elementwise:
            self._carrier.add(optimizer)
        self.watched: Callable[[], AbstractContextManager[object]] = nullcontext
        """What each step is made in: it may look at what the optimiser must leave alone."""
        self._views: list[nn.Parameter] = []  # one for each parameter, once they are needed
        self._given = _identities(optimizer)
        self._attributes = [dict(vars(parameter)) for parameter in parameters.trainable]
        self._hooks = hooks_of(parameters)

    def add(self, schedule: object, arguments: Mapping[str, Any]) -> None:
        """Carry a schedule that was just made with these arguments, and moves it."""
        self.schedules.append(schedule)
        self.arguments |= {f"schedule.{key}": value for key, value in arguments.items()}
        self._carrier.add(schedule)

    @property
    def group(self) -> dict[str, Any]:
        """Return the first parameter group."""
        return self.optimizer.param_groups[0]

    @property
    def lr(self) -> float:
        """Return the learning rate of the first parameter group."""
        return float(self.group["lr"])

    def set(self, settings: Settings) -> None:
        """Set what a schedule says."""
        self.group.update(settings)

    def new_gradient(self) -> torch.Tensor:
        """Return a vector for the gradient of the next step, float[P].

        An optimiser of the user's own may keep its gradients, and change them.  So it gets new ones.
        """
        gradient = self.parameters.gradient
        return gradient if self.is_elementwise else torch.empty_like(gradient)

    def step(
        self,
        gradient: torch.Tensor,
        touched: Touched,
        seed: int,
        then: Callable[[], object] | None = None,
    ) -> None:
        """Make a step.

        Args:
            gradient: float[P], from `new_gradient`.
            touched: the parameters that have a gradient; that of the others is None.
            seed: of what an optimiser of the user's own draws.
            then: called after it, while gradients stand: moves the schedule.

        Raises:
            UserCodeError: the optimiser or the schedule raised.
            ConfigError: it put other parameters into its groups, made one of another shape or type, or
                changed an attribute of one, or its hooks.
            ModelError: it changed a setting of torch or numpy.
        """
        if self.is_elementwise:
            if touched is not None and not self._views:
                self._divide()
            for number, view in enumerate(self._views):
                has_gradient = touched is None or touched[number]
                view.grad = gradient[self.parameters.parts[number]] if has_gradient else None
            self._make_step(seed, then)
            return
        with in_shapes(self.parameters, f"the optimiser {self._name}", gradient, touched):
            self._make_step(seed, then)
            self._refuse_other_parameters()
            self._refuse_frozen()
            self._refuse_attributes()
            self.refuse_hooks(self._hooks)

    def _make_step(self, seed: int, then: Callable[[], object] | None) -> None:
        with self.watched(), self._settings_kept():
            with (
                users_torch_code("the optimiser"),
                seeded(type(self.optimizer), seed),
                without_autocast(),  # around a training it is for forward
            ):
                make_step(self.optimizer)
            if then is not None:
                then()

    @contextmanager
    def _settings_kept(self) -> Iterator[None]:
        if not self.runs_own_code:
            yield
            return
        with HeldSettings() as settings, settings.blamed(f"the optimiser {self._name}"):
            yield

    @property
    def runs_own_code(self) -> bool:
        """Return whether a step runs code of the user's."""
        return bool(self.schedules) or not is_of_torch(type(self.optimizer))

    @property
    def _name(self) -> str:
        moved_by = [type(schedule).__name__ for schedule in self.schedules]
        return " or the schedule ".join([type(self.optimizer).__name__, *moved_by])

    def _refuse_frozen(self) -> None:
        for number, parameter in enumerate(self.parameters.trainable):
            if not parameter.requires_grad:
                raise ConfigError(
                    f"the optimiser {self._name} set requires_grad of parameter {number} "
                    f"to False, which workers would not see: freeze it before the training, or leave its "
                    f"value as it is in step()"
                )

    def _refuse_attributes(self) -> None:
        pairs = zip(self._attributes, self.parameters.trainable, strict=True)
        for number, (before, parameter) in enumerate(pairs):
            now = vars(parameter)
            if now.keys() == before.keys() and all(now[name] is value for name, value in before.items()):
                continue
            for name in {**before, **now}:
                is_same = name in before and name in now and now[name] is before[name]
                if not is_same and not name.startswith("_dynamo"):
                    raise ConfigError(
                        f"the optimiser {self._name} changed the attribute {name!r} of parameter {number}, "
                        f"which workers would not see, and no other process would get: keep it in "
                        f"self.state[parameter]"
                    )

    def refuse_hooks(self, before: list[list[int]]) -> None:
        """Refuse hooks on parameters that are not as before.

        Raises:
            ConfigError: with the parameter's number.
        """
        for number, (known, now) in enumerate(zip(before, hooks_of(self.parameters), strict=True)):
            if known != now:
                raise ConfigError(
                    f"the optimiser {self._name} changed the hooks of parameter {number}, but gradients are "
                    f"computed by workers, which have hooks of their own: register them on the module before "
                    f"the training, or change p.grad in step()"
                )

    def _refuse_other_parameters(self) -> None:
        if _identities(self.optimizer) != self._given:
            raise ConfigError(
                f"the optimiser {self._name} put other objects into param_groups than it "
                f"was given, so the module would not train: let its step change the parameters in "
                f'group["params"]'
            )

    # One view for each parameter

    def _divide(self) -> None:
        """Hold one view for each parameter instead of the whole vector; what is kept is divided, too."""
        kept = self.optimizer.state.pop(self.parameters.whole, None)
        self._hold_views()
        if kept is None:
            return
        for view, part in zip(self._views, self.parameters.parts, strict=True):
            self.optimizer.state[view] = {
                name: value[part] if _is_vector(value) else copy.deepcopy(value)
                for name, value in kept.items()
            }

    def _hold_views(self) -> None:
        parts = self.parameters.parts
        self._views = [nn.Parameter(self.parameters.parameters[part]) for part in parts]
        self.group["params"] = list(self._views)

    def _hold_whole(self) -> None:
        self._views = []
        self.group["params"] = [self.parameters.whole]

    # What it keeps

    def state(self) -> tuple[dict[str, Vector], dict[str, Any]]:
        """Return what it keeps: one value for each element by name, float[P] each, and the rest.

        The rest is the same for every strip of the vectors.  The arrays may be views.

        Raises:
            ConfigError: an attribute cannot be copied.
        """
        if not self.is_elementwise:
            return {}, {"attributes": self._packed()}
        vectors: dict[str, Vector] = {}
        numbers: list[dict[str, Any] | None] = []
        names: list[tuple[str, ...]] = []
        for tensor, part in self._held:
            kept = self.optimizer.state.get(tensor)
            own = {} if kept is None else {name: v for name, v in kept.items() if _is_vector(v)}
            for name, value in own.items():
                if not self._views:
                    vectors[name] = value.numpy()
                    continue
                if name not in vectors:
                    vectors[name] = np.zeros_like(self.parameters.parameters.numpy())
                vectors[name][part] = value.numpy()
            names.append(tuple(own))
            numbers.append(
                None if kept is None else {name: _number(v) for name, v in kept.items() if name not in own}
            )
        groups = [{name: v for name, v in self.group.items() if name != "params"}]
        is_divided = bool(self._views)
        return vectors, {"groups": groups, "divided": is_divided, "vectors": names, "numbers": numbers}

    def state_bytes(self) -> int:
        """Return how many bytes `state` has."""
        vectors, rest = self.state()
        return sum(vector.nbytes for vector in vectors.values()) + len(rest.get("attributes", b""))

    def load_state(self, vectors: Mapping[str, Vector], rest: Mapping[str, Any]) -> None:
        """Continue from the state of another optimiser that was made alike; everything is copied."""
        if not self.is_elementwise:
            self._carrier.unpack(rest["attributes"], self._anchors, self.parameters.parameters)
            return
        if rest["divided"]:
            self._hold_views()
        else:
            self._hold_whole()
        (group,) = rest["groups"]
        self.group.update(copy.deepcopy(dict(group)))
        self.optimizer.state = defaultdict(dict)
        for (tensor, part), names, numbers in zip(self._held, rest["vectors"], rest["numbers"], strict=True):
            if numbers is not None:
                self.optimizer.state[tensor] = {
                    **{name: torch.from_numpy(vectors[name][part].copy()) for name in names},
                    **{name: _tensor(value) for name, value in numbers.items()},
                }

    @property
    def _held(self) -> list[tuple[nn.Parameter, slice]]:
        """The tensors that it holds, each with its part of the vector."""
        if self._views:
            return list(zip(self._views, self.parameters.parts, strict=True))
        return [(self.parameters.whole, slice(None))]

    @property
    def _anchors(self) -> list[object]:
        return [self.optimizer, *self.parameters.trainable, *self.schedules]

    def _packed(self) -> bytes:
        try:
            return self._carrier.packed(self._anchors, self.parameters.parameters)
        except CannotCarry as error:
            raise ConfigError(
                f"the optimiser {self._name} keeps an attribute that cannot be copied to another process: "
                f"{error}: make it of numbers, tensors and containers, or give its class __getstate__ and "
                f"__setstate__"
            ) from error

    # Its mean with others

    def averageable(self) -> tuple[dict[str, Vector], dict[str, float]]:
        """Return copies of what an elementwise optimiser keeps, in a form that can be averaged.

        Returns:
            What it keeps for each element, float32[P] each; and numbers, each for every parameter k: whether
            something is kept for it, `has.k`, and its single numbers, such as a count, `name.k`.
        """
        vectors, rest = self.state()
        count = len(self.parameters.parts)
        kept = rest["numbers"] if rest["divided"] else rest["numbers"] * count
        numbers = {f"{HAS}.{k}": float(kept[k] is not None) for k in range(count)}
        names = {name for each in kept if each for name, value in each.items() if value is not None}
        for name in names:
            for k, each in enumerate(kept):
                numbers[f"{name}.{k}"] = float(each[name]) if each and each[name] is not None else 0.0
        return {name: vector.copy() for name, vector in vectors.items()}, numbers

    def load_averaged(self, vectors: Mapping[str, Vector], numbers: Mapping[str, float]) -> None:
        """Continue from a result of `averageable`, or from a mean of several; everything is copied."""
        count = len(self.parameters.parts)
        names = sorted({name.rpartition(".")[0] for name in numbers} - {HAS})
        each = [
            {name: np.asarray(numbers[f"{name}.{k}"], np.float32) for name in names}
            if numbers[f"{HAS}.{k}"]
            else None
            for k in range(count)
        ]
        is_divided = any(one != each[0] for one in each)
        held = each if is_divided else each[:1]
        named = [() if one is None else tuple(vectors) for one in held]
        groups = [{name: v for name, v in self.group.items() if name != "params"}]
        self.load_state(vectors, {"groups": groups, "divided": is_divided, "vectors": named, "numbers": held})


@contextmanager
def in_shapes(
    parameters: Parameters, who: str, gradient: torch.Tensor | None = None, touched: Touched = None
) -> Iterator[None]:
    """Let the block change the parameters in their shapes, as it likes; take up what it leaves in `p.data`.

    Args:
        parameters: what the block changes.
        who: whose the block is, for the error.
        gradient: of the step, float[P]; None: there was none yet.
        touched: the parameters that have a gradient; that of the others is None.

    Raises:
        ConfigError: the block made a parameter of another shape or type.
    """
    trainable = parameters.trainable
    places = list(zip(trainable, parameters.parts, strict=True))
    values = [_in_place(parameters.parameters, place, one.data, one.shape) for one, place in places]
    gradients = [_in_place(parameters.gradient, place, one.grad, one.shape) for one, place in places]
    for number, (parameter, place) in enumerate(places):
        has_gradient = gradient is not None and (touched is None or touched[number])
        own = gradient[place] if gradient is not None and has_gradient else None
        parameter.grad = None if own is None else own.view(parameter.shape)
    made: dict[int, torch.Tensor] = {}
    try:
        yield
        for number, (parameter, value) in enumerate(zip(trainable, values, strict=True)):
            if not _is_same_memory(parameter.data, value):
                made[number] = _same_form(who, number, parameter.data, value).clone()
    finally:
        for number, (parameter, value, part) in enumerate(zip(trainable, values, gradients, strict=True)):
            if number in made:
                value.copy_(made[number])
            parameter.data, parameter.grad = value, part


def hooks_of(parameters: Parameters) -> list[list[int]]:
    """Return the numbers of each parameter's hooks."""
    return [
        [*(one._backward_hooks or ()), *(one._post_accumulate_grad_hooks or ())]
        for one in parameters.trainable
    ]


def _in_place(
    vector: torch.Tensor, place: slice, held: torch.Tensor | None, shape: torch.Size
) -> torch.Tensor:
    """Return a parameter's part of a vector, in its shape: what is held, if it is that."""
    if held is not None and held.layout is torch.strided:
        address = vector.data_ptr() + place.start * vector.element_size()
        is_plain = held.shape == shape and held.is_contiguous() and held.dtype == vector.dtype
        if is_plain and held.data_ptr() == address:
            return held
    return vector[place].view(shape)


def _same_form(who: str, number: int, made: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return what was made of a parameter, if it can be taken up."""
    if made.shape == value.shape and made.dtype == value.dtype and made.device == value.device:
        return made
    raise ConfigError(
        f"{who} made parameter {number} {made.dtype} of shape {tuple(made.shape)} on {made.device}, but it "
        f"was {value.dtype} of shape {tuple(value.shape)}: let its step keep type and shape"
    )


HAS = "has"


def means(
    vectors: Mapping[str, Vector], numbers: Mapping[str, float], weight: float, parts: Sequence[slice]
) -> tuple[dict[str, Vector], dict[str, float]]:
    """Return the mean of what several optimisers keep: of sums of `averageable` by the weight of their rows.

    An optimiser that keeps nothing for a parameter does not count for it.
    """
    having = [numbers[f"{HAS}.{k}"] for k in range(len(parts))]
    found: dict[str, Vector]
    if all(count == weight for count in having):
        found = {name: vector / np.asarray(weight, vector.dtype) for name, vector in vectors.items()}
    else:
        found = {name: vector.copy() for name, vector in vectors.items()}
        for vector in found.values():
            for part, count in zip(parts, having, strict=True):
                vector[part] /= np.asarray(count or 1, np.float32)
    return found, {name: v / (having[int(name.rpartition(".")[2])] or 1) for name, v in numbers.items()}


def _is_vector(value: object) -> bool:
    """Return whether an elementwise optimiser keeps this for each element: it holds vectors only."""
    return isinstance(value, torch.Tensor) and value.ndim == 1


def _number(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else value


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def _is_same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )


def _identities(optimizer: Optimizer) -> list[int]:
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
