"""Copies of latents, which decide how the gradient of log q(z|x) reaches the parameters of the guide."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

if TYPE_CHECKING:
    from pyro_vae.elbo.weights import Weights


class Copies(Messenger, ABC):
    """Gives the later sites of a guide a copy of each latent; a trace around it records the latent itself."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            msg["value"] = self.copies[msg["name"]] = self.copy(msg["value"])

    @abstractmethod
    def copy(self, value: Tensor) -> Tensor:
        """Return a copy of a latent."""

    @abstractmethod
    def log_q(self, w: "Weights") -> Tensor:
        """Return ``log q(z | x)``, shape ``(K, batch)``, with the gradient that this class defines."""

    @abstractmethod
    def log_q_shared(self, w: "Weights") -> Tensor:
        """Return ``log q`` of the global sites, shape ``(K,)``, with the same gradient."""


class Detached(Copies):
    """Copies without a gradient: the gradient of ``log q`` is the score, with respect to the parameters only."""

    def copy(self, value: Tensor) -> Tensor:
        return value.detach()

    def log_q(self, w: "Weights") -> Tensor:
        return w.log_q_at(self.copies)

    def log_q_shared(self, w: "Weights") -> Tensor:
        return w.log_q_shared_at(self.copies)


class Gated(Copies):
    """Copies that pass a gradient back to their latents, except while the gates are closed.

    A later site depends on the copy twice: when it is drawn and when it is scored. While the gates are closed, the
    slope of ``log q`` at a copy comes from the scores only, at fixed later latents. Thus the guide need not run a
    second time, with another dropout mask, for example.
    """

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def copy(self, value: Tensor) -> Tensor:
        gate = value.view_as(value)
        if gate.requires_grad:
            gate.register_hook(self._gate)
        return gate.view_as(gate)

    def _gate(self, gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient) if self.closed else None

    def log_q(self, w: "Weights") -> Tensor:
        """Return ``log q`` with the path gradient, ``Σ_j (∂ log q / ∂z_j) ∂z_j / ∂φ``, without the score."""
        return self._along_path(w, w.log_q_at, w.by_event)

    def log_q_shared(self, w: "Weights") -> Tensor:
        """Return the same for the global sites."""
        return self._along_path(w, w.log_q_shared_at, w.by_particle)

    def _along_path(
        self, w: "Weights", log_q_at: Callable[[dict[str, Tensor]], Tensor], by: Callable[[Tensor, str], Tensor]
    ) -> Tensor:
        moving = [name for name, z in w.drawn.items() if z.requires_grad]
        values = {name: z.detach().requires_grad_(name in moving) for name, z in w.drawn.items()}
        log_q = log_q_at(values)
        if not (moving and log_q.requires_grad):
            return log_q
        direct, through_later = (self._slopes(log_q, [at[name] for name in moving]) for at in (values, self.copies))
        slopes = zip(moving, direct, through_later, strict=True)
        path = torch.stack([by((slope + later) * w.drawn[name], name) for name, slope, later in slopes]).sum(0)
        return replace_gradient(log_q, path)

    def _slopes(self, log_q: Tensor, at: list[Tensor]) -> tuple[Tensor, ...]:
        self.closed = True
        try:
            return torch.autograd.grad(log_q.sum(), at, retain_graph=True, materialize_grads=True, allow_unused=True)
        finally:
            self.closed = False


def replace_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return ``value`` with the gradient of ``surrogate``.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> y = replace_gradient(x**2, 5 * x)
        >>> y.item(), torch.autograd.grad(y, x)[0].item()
        (9.0, 5.0)
    """
    return value.detach() + (surrogate - surrogate.detach())
