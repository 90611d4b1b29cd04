"""Loss and gradient of a global batch, whose rows are spread over processes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from pyro.infer import EnergyDistance, RenyiELBO, Trace_MMD
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_vae.core.pair import Amortised
from pyro_vae.core.traces import Loss, loss_name
from pyro_vae.elbo import Estimator
from pyro_vae.elbo.nested import losses_in
from pyro_vae.errors import ModelError, SettingsError
from pyro_vae.train.distributed.group import Group, told_if_lost

EXTRA = 4
"""What goes with the gradient: the loss, the rows, and two wishes."""

Wishes: TypeAlias = Callable[[], tuple[bool, bool]]
"""Whether a process wants all to stop, and whether a checkpoint."""


def no_wishes() -> tuple[bool, bool]:
    """Neither to stop nor for a checkpoint."""
    return False, False


COUPLE = (RenyiELBO, Trace_MMD, EnergyDistance)
"""Estimators of Pyro that are no sum over the data of a batch."""


def refuse_spread(vae: nn.Module, loss: Loss, batch_size: int, group: Group) -> None:
    """Refuse what is not a sum over data, so that slices of a batch do not add up to it.

    Raises:
        SettingsError: if there are more processes than rows in a batch.
        ModelError: if an estimator or a module couples the data of a batch.

    Example:
        >>> import pyro_vae as pv
        >>> refuse_spread(torch.nn.Identity(), pv.elbo.TCVAE(pv.elbo.ELBO()), 8, Group(0, 2))
        Traceback (most recent call last):
        pyro_vae.errors.ModelError: TCVAE(ELBO(1), beta=6) couples the data of a batch, ...
    """
    if group.alone:
        return
    if batch_size < group.ranks:
        raise SettingsError(
            f"batch_size is {batch_size} and there are {group.ranks} processes, which share each batch; "
            "take as many rows, or fewer devices"
        )
    if isinstance(loss, COUPLE) or any(getattr(one, "couples_data", False) for one in losses_in(loss)):
        raise ModelError(
            f"{loss_name(loss)} couples the data of a batch, so the batch cannot be spread over {group.ranks} "
            "processes; take devices=1, or another objective"
        )
    for name, module in vae.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ModelError(
                f"{name} is a {type(module).__name__}, whose statistics are of the batch, so it cannot be spread over "
                f"{group.ranks} processes; take LayerNorm or GroupNorm, or devices=1"
            )


class Together:
    """What ``loss_and_grads`` is, for a global batch of which this process holds a slice.

    .. math:: g = \\sum_r \\frac{m_r}m g_r, \\qquad \\mathcal L = \\sum_r \\frac{m_r}m \\mathcal L_r

    with g_r of rank r's m_r rows, which stand for n as all m rows do (``size=n``). Gradient, loss, rows and the
    processes' wishes are added up in one all-reduce per step.

    Args:
        group: the processes.
        loss: the estimator.
        loss_and_grads: its function of (model, guide, x, ...).
        parameters: those that are trained, in the same order on each process.
        wishes: of this process, asked for before each step or each few compiled ones.

    Attributes:
        stopped, wanted: whether any process wanted to stop, or a checkpoint, before the last step; the same on all.
    """

    def __init__(
        self,
        group: Group,
        loss: Loss,
        loss_and_grads: Callable[..., Any],
        parameters: Iterable[Tensor],
        wishes: Wishes = no_wishes,
    ) -> None:
        self.group, self.loss, self.loss_and_grads, self.wishes = group, loss, loss_and_grads, wishes
        self.parameters, self.trained = list(parameters), list[Tensor]()
        self.buffer = self.asked = self.answer = torch.zeros(0)
        self.views: list[Tensor] = []

    @property
    def stopped(self) -> bool:
        """Whether any process wanted to stop."""
        return len(self.answer) > 0 and bool(self.answer[0] > 0)

    @property
    def wanted(self) -> bool:
        """Whether any process wanted a checkpoint."""
        return len(self.answer) > 0 and bool(self.answer[1] > 0)

    def ask(self) -> None:
        """Have the next step tell the others what this process wants."""
        for place, wish in zip(self.asked, self.wishes(), strict=False):  # before the first step there is no place
            place.fill_(wish)

    def __call__(self, model: Any, guide: Any, x: Tensor, *args: Any) -> float:
        """The loss of the global batch; its gradient is in ``.grad`` of each parameter, on each process."""
        for parameter in self.parameters:
            parameter.grad = None
        loss: Any = 0.0
        if len(x):
            loss = self.loss_and_grads(model, guide, x, *args)
        elif isinstance(self.loss, Estimator):
            self.loss.advance()
        return self._reduced(loss, len(x))

    def traced(self, loss: Tensor, gradients: Sequence[Tensor], rows: int) -> tuple[Tensor, list[Tensor]]:
        """The same as operations that a graph takes: loss and gradients of all rows, of those of this process.

        Args:
            loss: of its rows.
            gradients: of its rows.
            rows: how many they are.
        """
        from torch.distributed import _functional_collectives as collectives

        dtype = self.buffer.dtype
        told = torch.stack([loss.detach().to(dtype), torch.ones_like(loss, dtype=dtype)]) * rows
        parts = [*(rows * g.flatten().to(dtype) for g in gradients), told, self.asked]
        whole = collectives.wait_tensor(
            collectives.all_reduce(torch.cat(parts), "sum", dist.distributed_c10d._get_default_group())
        )
        self.answer.copy_(whole[-2:])
        whole = whole / whole[-3]
        return whole[-EXTRA].clone(), [
            v.to(g.dtype) for v, g in zip(views_of(whole, gradients), gradients, strict=True)
        ]

    @torch.no_grad()
    def _reduced(self, loss: Any, rows: int) -> float:
        if not self.buffer.numel():
            self._begin()
        self._fill(loss, rows)
        with told_if_lost():
            dist.all_reduce(self.buffer)
        whole, of, *_ = self.buffer[-EXTRA:].tolist()
        self.answer.copy_(self.buffer[-2:])
        self.buffer.div_(of)
        for parameter, view in zip(self.trained, self.views, strict=True):
            parameter.grad = view.to(parameter.dtype)
        return whole / of

    def _fill(self, loss: Any, rows: int) -> None:
        extra = self.buffer[-EXTRA:]
        if not rows:
            self.buffer.zero_()
        else:
            for parameter, view in zip(self.trained, self.views, strict=True):
                view.zero_() if parameter.grad is None else view.copy_(parameter.grad)
            extra[0] = loss
            extra[1] = 1
            self.buffer.mul_(rows)
        self.ask()
        extra[2:] = self.asked

    def _begin(self) -> None:
        """A place for each parameter that has a gradient in the first step, on any process."""
        found = self.group.gathered([p.grad is not None for p in self.parameters])
        self.trained = [p for p, *has in zip(self.parameters, *found, strict=True) if any(has)]
        self.buffer = flat_like(self.trained)
        self.views = views_of(self.buffer, self.trained)
        self.asked, self.answer = torch.zeros_like(self.buffer[-2:]), torch.zeros_like(self.buffer[-2:])


def flat_like(parameters: Sequence[Tensor]) -> Tensor:
    """A vector for all gradients and what goes with them, in the widest of their precisions."""
    widest = torch.float32
    for parameter in parameters:
        widest = torch.promote_types(widest, parameter.dtype)
    return torch.zeros(sum(p.numel() for p in parameters) + EXTRA, dtype=widest, device=parameters[0].device)


def views_of(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The vector cut up, in the parameters' shapes."""
    pieces = flat[: len(flat) - EXTRA].split([p.numel() for p in parameters])
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]


def spread_parts(vae: Amortised, group: Group) -> None:
    """Weights and buffers of the first process, on all of them."""
    group.spread([*vae.parameters(), *vae.buffers()])
