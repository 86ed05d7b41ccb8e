"""Optimisers and schedules as people write them, beside those of torch; named by import path.

`OPTIMIZERS` and `SCHEDULES` are sections of a configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler

HOME = "contract_optimizers"


class Plain(Optimizer):
    """w -= lr g, for parameters that have a gradient."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        """Make a step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, group["lr"])

    def move(self, parameter: torch.Tensor, lr: float) -> None:
        """Move one parameter."""
        parameter.add_(parameter.grad, alpha=-lr)


class RebindsData(Plain):
    """It gives the parameter another tensor."""

    def move(self, parameter, lr):
        parameter.data = parameter.data - lr * parameter.grad


class RebindsGradient(Plain):
    """It gives the gradient another tensor, with decay."""

    def move(self, parameter, lr):
        parameter.grad = parameter.grad + 0.1 * parameter
        parameter.add_(parameter.grad, alpha=-lr)


class ChangesGradient(Plain):
    """It clips the gradient where it stands."""

    def move(self, parameter, lr):
        parameter.grad.clamp_(-0.01, 0.01)
        super().move(parameter, lr)


class ClearsGradients(torch.optim.SGD):
    """It sets gradients to None at the end of a step."""

    def step(self, closure: object = None) -> None:
        """Make a step."""
        super().step()
        self.zero_grad()


class Lookahead(torch.optim.Adam):
    """Slow weights in Python attributes: no state_dict has them."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, lr=lr)
        self.steps = 0
        self.slow: list[torch.Tensor] | None = None

    def step(self, closure: object = None) -> None:
        """Make a fast step, and each second time one half of the way."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if self.slow is None:
            self.slow = [p.detach().clone() for p in parameters]
        super().step()
        self.steps += 1
        if self.steps % 2 == 0:
            with torch.no_grad():
                for slow, fast in zip(self.slow, parameters, strict=True):
                    fast.copy_(slow.lerp_(fast, 0.5))


class Wraps(Optimizer):
    """An optimiser around another one, whose groups it shares."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        self.inner = torch.optim.SGD(params, lr=lr, momentum=0.9)
        super().__init__(self.inner.param_groups, {"lr": lr})
        self.param_groups = self.inner.param_groups

    def step(self, closure: object = None) -> None:
        """Let the other one make the step."""
        self.inner.step()


class Lion(Plain):
    """The sign of a mixture of gradient and momentum."""

    def move(self, parameter, lr):
        kept = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
        parameter.mul_(1 - lr * 0.1).add_((0.9 * kept + 0.1 * parameter.grad).tanh(), alpha=-lr)
        kept.lerp_(parameter.grad, 0.01)


class ByLayer(Plain):
    """A step as long as the layer's norm tells."""

    def move(self, parameter, lr):
        ratio = parameter.norm() / (parameter.grad.norm() + 1e-6)
        parameter.add_(parameter.grad, alpha=-lr * 0.1 * float(ratio))


class Centralised(Plain):
    """Each output's gradients have mean 0."""

    def move(self, parameter, lr):
        if parameter.ndim > 1:
            parameter.grad.sub_(parameter.grad.mean(dim=tuple(range(1, parameter.ndim)), keepdim=True))
        super().move(parameter, lr)


class OfAllNorms(Plain):
    """One norm over all parameters that have a gradient scales every step."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        """Make a step."""
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in found]).norm()
        for parameter in found:
            parameter.add_(parameter.grad, alpha=-self.param_groups[0]["lr"] / float(norm + 1))


class DecaysAll(Plain):
    """It touches parameters without a gradient, too."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        """Make a step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.99)
        super().step()


class WordsInState(Plain):
    """State under texts, with numbers, None and lists."""

    def move(self, parameter, lr):
        kept = self.state[parameter]
        kept.setdefault("history", []).append(float(parameter.grad.sum()))
        kept["nothing"], kept["count"] = None, kept.get("count", 0) + 1
        self.state["all"] = {"steps": self.state.get("all", {}).get("steps", 0) + 1}
        parameter.add_(parameter.grad, alpha=-lr / kept["count"])


class NarrowState(Plain):
    """Momentum in bfloat16, and sparse."""

    def move(self, parameter, lr):
        kept = self.state[parameter]
        kept["momentum"] = (0.9 * kept.get("momentum", 0) + parameter.grad).bfloat16()
        kept["sparse"] = parameter.grad.to_sparse()
        parameter.add_(kept["momentum"].to(parameter.dtype), alpha=-lr)


class Counts(Plain):
    """Its rate falls with a count that is a Python attribute."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.calls = 0

    def move(self, parameter, lr):
        self.calls += 1
        parameter.add_(parameter.grad, alpha=-lr / (1 + 0.01 * self.calls))


class TwoGroups(torch.optim.SGD):
    """It divides the parameters into groups of its own: no decay for vectors."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        given = list(params)
        groups = [
            {"params": [p for p in given if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in given if p.ndim <= 1], "lr": lr / 2},
        ]
        super().__init__([group for group in groups if group["params"]], lr=lr)


class Langevin(Plain):
    """SGLD: it draws noise."""

    def move(self, parameter, lr):
        super().move(parameter, lr)
        parameter.add_(torch.randn_like(parameter), alpha=0.01)


class WantsClosure(Plain):
    """It evaluates the loss itself, twice."""

    def step(self, closure: Callable[[], torch.Tensor]) -> None:
        """Make a step."""
        closure()
        super().step()
        closure()


class CountedRate(lr_scheduler.LRScheduler):
    """A schedule whose count is an attribute that its state_dict has."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.count = 0
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """Return a rate that falls with the calls."""
        self.count += 1
        return [rate / self.count for rate in self.base_lrs]


class _Looks(lr_scheduler.LRScheduler):
    """A schedule that looks at its optimiser's parameters."""

    def get_lr(self) -> list[float]:
        """Return rates that are as they were."""
        return list(self.base_lrs)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Return all parameters."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


class ByNorms(_Looks):
    """A rate by the norms of a parameter and its gradient."""

    def get_lr(self):
        factors = [p.norm() / (p.grad.norm() + 1) for p in self.parameters if p.grad is not None]
        return [base * float(sum(factors, torch.tensor(1.0)) / (1 + len(factors))) for base in self.base_lrs]


class Decays(_Looks):
    """It decays parameters in place, at its beginning, too."""

    def step(self, epoch=None):
        super().step()
        for parameter in self.parameters:
            parameter.data.mul_(0.9)


class Rebinds(_Looks):
    """It gives parameters other tensors: with a largest norm of rows, one by one."""

    def step(self, epoch=None):
        super().step()
        for parameter in self.parameters:
            parameter.data = torch.renorm(parameter.data, 2, 0, 0.5) if parameter.ndim > 1 else parameter.data


class ReadsState(_Looks):
    """A rate by what the optimiser keeps."""

    def get_lr(self):
        kept = [self.optimizer.state[p].get("momentum_buffer") for p in self.parameters]
        norms = [float(one.norm()) for one in kept if one is not None]
        return [base / (1 + sum(norms)) for base in self.base_lrs]


class ChangesState(_Looks):
    """It restarts the momentum every second time."""

    def step(self, epoch=None):
        super().step()
        if self.last_epoch % 2 == 0:
            self.optimizer.state.clear()


class ByShapes(_Looks):
    """A rate by how many parameters there are, and of what shape."""

    def get_lr(self):
        sizes = [parameter.shape[0] for parameter in self.parameters]
        return [base * len(sizes) / sum(sizes) for base in self.base_lrs]


class WrapsStep(_Looks):
    """It puts a step of its own around the optimiser's, which clips gradients."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        inner = optimizer.step

        def step(closure=None):
            torch.nn.utils.clip_grad_norm_(self.parameters, 0.1)
            return inner(closure)

        optimizer.step = step


class Hooks(_Looks):
    """A hook of the optimiser changes its gradients."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        optimizer.register_step_pre_hook(self.sign)

    def sign(self, *_: object) -> None:
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.sign_()


class ByClosure(lr_scheduler.LambdaLR):
    """A lambda that closes over a parameter."""

    def __init__(self, optimizer):
        first = optimizer.param_groups[0]["params"][0]
        super().__init__(optimizer, lambda turn: 1 / (1 + float(first.detach().norm()) + turn))


class Remembers(_Looks):
    """Attributes of its own: a parameter, and a copy of it."""

    def __init__(self, optimizer):
        self.first = optimizer.param_groups[0]["params"][0]
        self.before = self.first.detach().clone()
        super().__init__(optimizer)

    def get_lr(self):
        moved = float((self.first - self.before).norm())
        self.before = self.first.detach().clone()
        return [base * (1 + moved) for base in self.base_lrs]


class ChangesGradients(_Looks):
    """It leaves nothing of the gradients, which the next step computes anew."""

    def step(self, epoch=None):
        super().step()
        for parameter in self.parameters:
            parameter.grad = None if parameter.grad is None else parameter.grad.zero_()


class SetsMomentum(_Looks):
    """It sets other keys of the groups."""

    def step(self, epoch=None):
        super().step()
        for group in self.optimizer.param_groups:
            group["momentum"] = 0.9 / (1 + self.last_epoch)


class ByScale(Plain):
    """An attribute of each parameter scales its rate, as in fine-tuning layer by layer."""

    def move(self, parameter, lr):
        super().move(parameter, lr * getattr(parameter, "lr_scale", 1.0))


class Masks(Plain):
    """An attribute of the shape of the parameter."""

    def move(self, parameter, lr):
        parameter.grad.mul_(parameter.mask)
        super().move(parameter, lr)


def _of_torch(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, **arguments}


def _own(kind: type[Optimizer]) -> dict[str, Any]:
    return {"name": f"{HOME}:{kind.__name__}"}


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": _of_torch("SGD", lr=0.05),
    "SGD, momentum and decay": _of_torch("SGD", lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD, damped": _of_torch("SGD", lr=0.05, momentum=0.9, dampening=0.1, maximize=True),
    "SGD, foreach": _of_torch("SGD", lr=0.05, momentum=0.9, foreach=True),
    "Adam": _of_torch("Adam", lr=0.01),
    "Adam, amsgrad": _of_torch("Adam", lr=0.01, amsgrad=True, weight_decay=0.1),
    "AdamW": _of_torch("AdamW", lr=0.05, weight_decay=0.1),
    "Adamax": _of_torch("Adamax", lr=0.01, weight_decay=0.1),
    "NAdam": _of_torch("NAdam", lr=0.01, weight_decay=0.1),
    "RAdam": _of_torch("RAdam", lr=0.01, weight_decay=0.1),
    "Adagrad": _of_torch("Adagrad", lr=0.05, lr_decay=0.1, weight_decay=0.1),
    "Adadelta": _of_torch("Adadelta", lr=1.0, weight_decay=0.1),
    "Adafactor": _of_torch("Adafactor", lr=0.05),
    "RMSprop": _of_torch("RMSprop", lr=0.01, momentum=0.9),
    "RMSprop, centered": _of_torch("RMSprop", lr=0.01, centered=True, weight_decay=0.1),
    "Rprop": _of_torch("Rprop", lr=0.01),
    "ASGD": _of_torch("ASGD", lr=0.05, t0=1, weight_decay=0.1),
    "rebinds data": _own(RebindsData),
    "rebinds gradients": _own(RebindsGradient),
    "changes gradients": _own(ChangesGradient),
    "clears gradients": _own(ClearsGradients),
    "Lookahead": _own(Lookahead),
    "wraps another": _own(Wraps),
    "Lion": _own(Lion),
    "by layer": _own(ByLayer),
    "centralised": _own(Centralised),
    "one norm of all": _own(OfAllNorms),
    "decays all": _own(DecaysAll),
    "words in its state": _own(WordsInState),
    "narrow state": _own(NarrowState),
    "counts in Python": _own(Counts),
    "groups of its own": _own(TwoGroups),
}
"""They train as in one process, and may not be refused."""

BY_ATTRIBUTES: dict[str, dict[str, Any]] = {"a rate": _own(ByScale), "a mask": _own(Masks)}
"""They look at attributes of parameters."""

MATRICES_ONLY: dict[str, dict[str, Any]] = {"Muon": _of_torch("Muon", lr=0.05)}
"""They take matrices only; Muon computes in bfloat16."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "LBFGS": (_of_torch("LBFGS"), "LBFGS"),
    "SparseAdam": (_of_torch("SparseAdam"), "SparseAdam"),
    "SGD, fused": (_of_torch("SGD", fused=True), "fused"),
    "wants a closure": (_own(WantsClosure), "WantsClosure"),
}
"""They are refused, by a word that tells what is meant."""

RANDOM: dict[str, dict[str, Any]] = {"draws noise": _own(Langevin)}
"""Two runs are equal."""

SCHEDULES: dict[str, dict[str, Any]] = {
    "StepLR": _of_torch("StepLR", step_size=2),
    "MultiStepLR": _of_torch("MultiStepLR", milestones=[1, 3]),
    "ConstantLR": _of_torch("ConstantLR", factor=0.5, total_iters=2),
    "LinearLR": _of_torch("LinearLR", total_iters=3),
    "ExponentialLR": _of_torch("ExponentialLR", gamma=0.7),
    "PolynomialLR": _of_torch("PolynomialLR", total_iters=5),
    "CosineAnnealingLR": _of_torch("CosineAnnealingLR", T_max=4),
    "CosineAnnealingWarmRestarts": _of_torch("CosineAnnealingWarmRestarts", T_0=2),
    "CyclicLR": _of_torch("CyclicLR", base_lr=0.01, max_lr=0.1, step_size_up=2),
    "OneCycleLR": _of_torch("OneCycleLR", max_lr=0.1, total_steps=4),
    "counts calls": {"name": f"{HOME}:CountedRate"},
}
"""Schedules over SGD with momentum."""

OF_GROUPS: dict[str, dict[str, Any]] = {
    "OneCycleLR": _of_torch("OneCycleLR", max_lr=[0.1, 0.03], total_steps=4),
    "CyclicLR": _of_torch("CyclicLR", base_lr=[0.01, 0.02], max_lr=[0.1, 0.05], step_size_up=2),
    "CosineAnnealingLR": _of_torch("CosineAnnealingLR", T_max=4),
}
"""Schedules over an optimiser that makes two groups."""

LOOKING: dict[str, dict[str, Any]] = {
    kind.__name__: {"name": f"{HOME}:{kind.__name__}"}
    for kind in (
        ByNorms, Decays, Rebinds, ReadsState, ChangesState, ByShapes, WrapsStep, Hooks, ByClosure, Remembers,
        ChangesGradients, SetsMomentum,
    )
}  # fmt: skip
"""Schedules that look at parameters, gradients or the optimiser's state, or change them."""
