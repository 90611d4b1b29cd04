"""All-reduce the loss and gradient of a global batch whose rows are distributed over processes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from pyro.infer import EnergyDistance, RenyiELBO, Trace_MMD
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_vae.core.traces import Loss, loss_name
from pyro_vae.elbo import Estimator
from pyro_vae.elbo.nested import losses_in
from pyro_vae.errors import ModelError, SettingsError, type_of
from pyro_vae.train.distributed.group import Group, reraise_lost_peer

EXTRA = 4
"""The count of numbers that are reduced with the gradient: the loss, the rows and two requests."""

Wishes: TypeAlias = Callable[[], tuple[bool, bool]]
"""A function that returns whether a process requests a stop of all, and whether a checkpoint."""


def no_wishes() -> tuple[bool, bool]:
    """Request neither a stop nor a checkpoint."""
    return False, False


COUPLE = (RenyiELBO, Trace_MMD, EnergyDistance)
"""Pyro's estimators that are not a sum over the data of a batch."""


def validate_distributable(vae: nn.Module, loss: Loss, batch_size: int, group: Group) -> None:
    """Raise if the loss is not a sum over data, so that parts of a batch would not add up to it.

    Raises:
        SettingsError: if there are more processes than rows in a batch.
        ModelError: if the estimator or a module couples the data of a batch.

    Example:
        >>> import pyro_vae as pv
        >>> validate_distributable(torch.nn.Identity(), pv.elbo.TCVAE(pv.elbo.ELBO()), 8, Group(0, 2))
        Traceback (most recent call last):
        pyro_vae.errors.ModelError: TCVAE(ELBO(1), beta=6) couples the data of a batch, ...
    """
    if group.alone:
        return
    if batch_size < group.ranks:
        raise SettingsError(
            f"batch_size is {batch_size}, but {group.ranks} processes share each batch; use a batch_size of at least "
            f"{group.ranks}, or fewer devices"
        )
    if isinstance(loss, COUPLE) or any(getattr(one, "couples_data", False) for one in losses_in(loss)):
        raise ModelError(
            f"{loss_name(loss)} couples the data of a batch, so the batch cannot be distributed over {group.ranks} "
            "processes; use devices=1, or another objective"
        )
    for name, module in vae.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ModelError(
                f"{name} is {type_of(module)}, whose statistics couple the data of a batch, so the batch "
                f"cannot be distributed over {group.ranks} processes; use LayerNorm, GroupNorm or devices=1"
            )


class GradientAllReduce:
    """A ``loss_and_grads`` for a global batch of which this process has a part.

    .. math:: g = \\sum_r \\frac{m_r}m g_r, \\qquad \\mathcal L = \\sum_r \\frac{m_r}m \\mathcal L_r

    where g_r is the gradient of rank r on its m_r rows, scaled to all n data (``size=n``). Gradient, loss, row count
    and the processes' requests are summed in one all-reduce per step.

    Args:
        group: the processes.
        loss: the estimator.
        loss_and_grads: its function of (model, guide, x, ...).
        parameters: the trained parameters, in the same order on each process.
        wishes: returns the requests of this process; called before each step or chunk of compiled steps.

    Attributes:
        stopped, wanted: whether any process requested a stop, or a checkpoint, before the last step; equal on all.
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
        self.buffer = self.requests = self.answer = torch.zeros(0)
        self.views: list[Tensor] = []

    @property
    def stopped(self) -> bool:
        """Whether any process requested a stop."""
        return len(self.answer) > 0 and bool(self.answer[0] > 0)

    @property
    def wanted(self) -> bool:
        """Whether any process requested a checkpoint."""
        return len(self.answer) > 0 and bool(self.answer[1] > 0)

    def ask(self) -> None:
        """Write this process's requests to the buffer of the next step."""
        for place, wish in zip(self.requests, self.wishes(), strict=False):  # before the first step the buffer is empty
            place.fill_(wish)

    def __call__(self, model: Any, guide: Any, x: Tensor, *args: Any) -> float:
        """Return the loss of the global batch; its gradient is in ``.grad`` of each parameter, on each process."""
        for parameter in self.parameters:
            parameter.grad = None
        loss: Any = 0.0
        if len(x):
            loss = self.loss_and_grads(model, guide, x, *args)
        elif isinstance(self.loss, Estimator):
            self.loss.advance()
        return self._reduced(loss, len(x))

    def traced(self, loss: Tensor, gradients: Sequence[Tensor], rows: int) -> tuple[Tensor, list[Tensor]]:
        """Reduce loss and gradients with operations that can be traced to a graph.

        Args:
            loss: the loss of this process's rows.
            gradients: the gradients of these rows.
            rows: the number of these rows.
        """
        from torch.distributed import _functional_collectives as collectives

        dtype = self.buffer.dtype
        weighted = torch.stack([loss.detach().to(dtype), torch.ones_like(loss, dtype=dtype)]) * rows
        parts = [*(rows * g.flatten().to(dtype) for g in gradients), weighted, self.requests]
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
        with reraise_lost_peer():
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
        extra[2:] = self.requests

    def _begin(self) -> None:
        """Allocate the buffer for the parameters that have a gradient in the first step on any process."""
        found = self.group.all_gather([p.grad is not None for p in self.parameters])
        self.trained = [p for p, *has in zip(self.parameters, *found, strict=True) if any(has)]
        self.buffer = flat_like(self.trained)
        self.views = views_of(self.buffer, self.trained)
        self.requests, self.answer = torch.zeros_like(self.buffer[-2:]), torch.zeros_like(self.buffer[-2:])


def flat_like(parameters: Sequence[Tensor]) -> Tensor:
    """Allocate a vector for all gradients and the extra numbers, in the widest precision among them."""
    widest = torch.float32
    for parameter in parameters:
        widest = torch.promote_types(widest, parameter.dtype)
    return torch.zeros(sum(p.numel() for p in parameters) + EXTRA, dtype=widest, device=parameters[0].device)


def views_of(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Split the vector into views with the shapes of the parameters."""
    pieces = flat[: len(flat) - EXTRA].split([p.numel() for p in parameters])
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
