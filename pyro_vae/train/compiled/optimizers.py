"""Updates of Adam, AdamW and SGD as operations on tensors, with the state where torch's optimizers keep it."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.errors import CompileError, SettingsError

Maker: TypeAlias = Callable[[Iterable[Tensor]], Any]
Group: TypeAlias = dict[str, Any]

COMPILED = (Adam, AdamW, SGD)
NAMES = "Adam, AdamW and SGD"

NUMBERS = 7
"""What each clock gives for a step; see :meth:`Clock.numbers`."""


class WholeOptimizer(PyroOptim):
    """One torch optimizer over all parameters, where Pyro makes one per tensor.

    Args:
        optimizer: a torch optimizer, or what makes one (or a learning-rate scheduler of one) of the
            parameters, in the order in which the parameter store met them.
        clip_norm: the gradient of all parameters together is scaled down to at most this norm.
    """

    def __init__(self, optimizer: Optimizer | LRScheduler | Maker, clip_norm: float | None = None) -> None:
        super().__init__(type(optimizer), {})
        self.made: Any = optimizer
        self.clip_norm = clip_norm

    @property
    def optimizer(self) -> Any:
        """The torch optimizer, or before the first step what is to make it."""
        return getattr(self.made, "optimizer", self.made)

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self.optimizer, Optimizer):
            met = set(params)  # SVI gives a set, so the order is the store's
            every = dict.fromkeys(p for _, p in pyro.get_param_store().named_parameters())
            self.made = self.made([p for p in every if p in met])
            if not isinstance(self.optimizer, Optimizer):
                raise SettingsError(f"optim made a {type(self.made).__name__} of the parameters; make a torch.optim")
        if self.clip_norm is not None:
            clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], self.clip_norm)
        self.optimizer.step()


def refuse_clip_norm(clip_norm: float | None) -> None:
    """Refuse a norm that nothing can be scaled down to."""
    if clip_norm is not None and not (isinstance(clip_norm, (int, float)) and 0 < clip_norm < math.inf):
        raise SettingsError(f"clip_norm is {clip_norm}; it must be a finite number above 0, or None")


@dataclass
class Member:
    """A parameter, the torch optimizer and group that it belongs to, and how Pyro clips its gradient."""

    parameter: Tensor
    optimizer: Optimizer
    group: Group
    clip: dict[str, float]
    clock: int = 0

    @property
    def state(self) -> dict[str, Tensor]:
        """Where torch keeps what it knows of the parameter's past."""
        return self.optimizer.state[self.parameter]


@dataclass
class Clock:
    """The steps that the parameters of one group have taken."""

    group: Group
    steps: int

    def numbers(self, ahead: int) -> tuple[float, ...]:
        """Those of a step to come, 0 for the next: lr, lr / (1 - β₁ᵗ), 1 / √(1 - β₂ᵗ), 1 - lr · decay, and averages'.

        They are computed in double precision, as torch computes them, and may change from step to step.
        """
        rate, at = float(self.group["lr"]), self.steps + 1 + ahead
        keep = 1 - rate * self.group["weight_decay"]
        if "betas" not in self.group:
            return rate, rate, 1.0, keep, self.group["momentum"], 0.0, 0.0
        first, second = self.group["betas"]
        return rate, rate / (1 - first**at), (1 - second**at) ** -0.5, keep, 1 - first, second, 1 - second


class Updates:
    """What an optimizer does to its parameters in a step.

    Args:
        optim: a :class:`WholeOptimizer`, or a ``PyroOptim`` of Adam, AdamW or SGD, that has taken a step.
        trained: the parameters that had a gradient in it.

    Raises:
        SettingsError: if it is another, or does more than its update.
    """

    def __init__(self, optim: PyroOptim, trained: Sequence[Tensor]) -> None:
        known = {id(p) for p in trained if p.grad is not None}
        self.clip_norm = optim.clip_norm if isinstance(optim, WholeOptimizer) else None
        self.members = [member for member in _members(optim) if id(member.parameter) in known]
        self.clocks: list[Clock] = []
        for optimizer in {id(m.optimizer): m.optimizer for m in self.members}.values():
            _refuse(optimizer)
        for member in self.members:
            _refuse_parameter(member)
            member.clock = self._clock_of(member)
        self.known = [(m, name, own) for m in self.members for name, own in m.state.items() if isinstance(own, Tensor)]
        self.counts = [m.state["step"] for m in self.members if "step" in m.state]

    def recount(self) -> bool:
        """Take the counts of steps from the optimizer's state, where that is still the same tensors."""
        if not all(member.optimizer.state[member.parameter].get(name) is own for member, name, own in self.known):
            return False
        for member in self.members:
            self.clocks[member.clock].steps = int(member.state["step"]) if "step" in member.state else 0
        return True

    def _clock_of(self, member: Member) -> int:
        steps = int(member.state["step"]) if "step" in member.state else 0
        for i, clock in enumerate(self.clocks):
            if clock.group is member.group and clock.steps == steps:
                return i
        self.clocks.append(Clock(member.group, steps))
        return len(self.clocks) - 1

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained, in the optimizer's order."""
        return [member.parameter for member in self.members]

    def spaces(self) -> list[tuple[str, dict[str, Any], list[str]]]:
        """What of the optimizers a trace bakes in, as a :class:`~pyro_vae.train.compiled.watch.Watch` takes it."""
        groups = {id(m.group): m.group for m in self.members}.values()
        fixed = ("weight_decay", "decoupled_weight_decay", "eps", "amsgrad", "maximize", "nesterov", "dampening")
        settings = [("param_groups", group, [name for name in fixed if name in group]) for group in groups]
        states = {id(m.optimizer): m.optimizer for m in self.members}.values()
        return [*settings, *((type(own).__name__, vars(own), ["state"]) for own in states)]

    def numbers(self, steps: int) -> Tensor:
        """What changes from step to step but not with the gradient, shape ``(steps, numbers)``."""
        rows = [[n for clock in self.clocks for n in clock.numbers(ahead)] for ahead in range(steps)]
        precisions = {p.dtype for p in self.parameters}
        return torch.tensor(rows, dtype=precisions.pop() if len(precisions) == 1 else torch.float64)

    def apply(self, gradients: Sequence[Tensor], numbers: Tensor) -> None:
        """Change the parameters and the state in place, as the optimizer's own step would."""
        gradients = [_clipped(m, g) for m, g in zip(self.members, gradients, strict=True)]
        if self.clip_norm is not None:
            total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
            scale = (self.clip_norm / (total + 1e-6)).clamp(max=1.0)
            gradients = [g * scale for g in gradients]
        for member, gradient in zip(self.members, gradients, strict=True):
            own = numbers[NUMBERS * member.clock :][:NUMBERS].to(gradient.dtype).unbind()
            rule = _sgd if isinstance(member.optimizer, SGD) else _adam
            rule(member, -gradient if member.group["maximize"] else gradient, own)

    def advance(self, steps: int) -> None:
        """Count steps taken."""
        for clock in self.clocks:
            clock.steps += steps
        if self.counts:
            torch._foreach_add_(self.counts, steps)


def refuse_optimizer(optim: PyroOptim) -> None:
    """Refuse, before a step is taken, an optimizer that is not compiled.

    Raises:
        SettingsError: naming it.
    """
    if not isinstance(optim, WholeOptimizer):
        kind = optim.pt_optim_constructor
        if kind not in COMPILED:
            raise SettingsError(f"the optimizer is {getattr(kind, '__name__', kind)}; {NAMES} are compiled")
    elif isinstance(optim.optimizer, Optimizer):
        _refuse(optim.optimizer)


def _members(optim: PyroOptim) -> list[Member]:
    if isinstance(optim, WholeOptimizer):
        whole = optim.optimizer
        return [Member(p, whole, group, {}) for group in whole.param_groups for p in group["params"]]
    each = [(p, getattr(own, "optimizer", own)) for p, own in optim.optim_objs.items()]
    return [Member(p, own, own.param_groups[0], dict(optim._get_grad_clip_args(p) or {})) for p, own in each]


def _refuse(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if type(optimizer) not in COMPILED:
        raise SettingsError(f"the optimizer is {name}; {NAMES} are compiled")
    hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
    if hooks:
        raise SettingsError(f"the optimizer, {name}, has hooks, which a compiled step does not call; remove them")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise SettingsError(f"the optimizer, {name}, is differentiable=True, which a compiled step is not")


def _refuse_parameter(member: Member) -> None:
    parameter = member.parameter
    if parameter.is_complex():
        raise SettingsError(f"a parameter of shape {tuple(parameter.shape)} is complex, which is not compiled")
    if getattr(parameter, "_post_accumulate_grad_hooks", None):
        raise SettingsError(f"a parameter of shape {tuple(parameter.shape)} has a hook on its accumulated gradient")


def _clipped(member: Member, gradient: Tensor) -> Tensor:
    """As Pyro's optimizers clip: the norm first, then each value."""
    if gradient.layout != torch.strided:
        raise CompileError("a gradient is sparse, which is not compiled; make it dense")
    if (norm := member.clip.get("clip_norm")) is not None:
        gradient = gradient * (norm / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1.0)
    if (value := member.clip.get("clip_value")) is not None:
        gradient = gradient.clamp(-value, value)
    return gradient


def _adam(member: Member, gradient: Tensor, numbers: Sequence[Tensor]) -> None:
    """Adam (Kingma & Ba, 2014), AdamW (Loshchilov & Hutter, 2017) and AMSGrad (Reddi et al., 2018)."""
    parameter, group, state = member.parameter, member.group, member.state
    _, size, root, keep, first, second, rest = numbers
    if decay := group["weight_decay"]:
        if isinstance(member.optimizer, AdamW) or group.get("decoupled_weight_decay"):
            parameter.mul_(keep)
        else:
            gradient = gradient + decay * parameter
    mean = state["exp_avg"]
    mean.add_((gradient - mean) * first)
    square = state["exp_avg_sq"].mul_(second).add_(rest * gradient * gradient)
    if group["amsgrad"]:
        largest = state["max_exp_avg_sq"]
        square = largest.copy_(torch.maximum(largest, square))
    parameter.sub_(size * (mean / (square.sqrt() * root + group["eps"])))


def _sgd(member: Member, gradient: Tensor, numbers: Sequence[Tensor]) -> None:
    """Stochastic gradient descent with momentum, also Nesterov's (Sutskever et al., 2013)."""
    parameter, group, (rate, _, _, _, momentum, *_) = member.parameter, member.group, numbers
    if decay := group["weight_decay"]:
        gradient = gradient + decay * parameter
    if group["momentum"]:
        # Not add_(gradient, alpha=…): where the gradient is a matrix product, inductor drops alpha.
        buffer = member.state["momentum_buffer"].mul_(momentum).add_((1 - group["dampening"]) * gradient)
        gradient = gradient + momentum * buffer if group["nesterov"] else buffer
    parameter.sub_(rate * gradient)
