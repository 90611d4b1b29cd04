"""Evaluate an estimator with a number of particles on one draw of the noise."""

import copy
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from torch import Tensor

from pyro_vae.compare.pair import Subject
from pyro_vae.core.device import seeded
from pyro_vae.core.traces import Loss, differentiable, loss_name, particles_of
from pyro_vae.elbo import STL, AnalyticKL, Estimator, HandDerivedELBO, Trace_ELBO, TraceMeanField_ELBO, note_objective
from pyro_vae.errors import ModelError, SettingsError


@dataclass(frozen=True)
class Cell:
    """An estimator with a number of particles.

    Args:
        name: the user's name of the estimator.
        particles: the number of particles K.
        loss: the estimator with K particles.

    Example:
        >>> Cell("mine", 2, STL(2)).target
        'ELBO'
    """

    name: str
    particles: int
    loss: Loss

    @property
    def target(self) -> str:
        """The bound it estimates; its own name if the bound is unknown, as for a subclass of a Pyro estimator."""
        if isinstance(self.loss, Estimator):
            return self.loss.target()
        known = type(self.loss) in (Trace_ELBO, TraceMeanField_ELBO, HandDerivedELBO)
        return "ELBO" if known else f"{self.name} at K = {self.particles}"

    def reference(self) -> Estimator | None:
        """Return another estimator of the same bound with an unbiased gradient, if one is known."""
        if isinstance(self.loss, Estimator):
            return self.loss.reference()
        return STL(self.particles) if self.target == "ELBO" else None

    def hand_derived(self) -> HandDerivedELBO | None:
        """Return the hand-derived ELBO with the same noise, unless the estimator has another target."""
        if isinstance(self.loss, Estimator) and self.target != "ELBO":
            return None
        vectorized = self.particles > 1 and getattr(self.loss, "vectorize_particles", False)
        hand: Any = with_plates(HandDerivedELBO(self.particles, vectorize_particles=vectorized))
        return hand


def cells(elbos: Mapping[str, Loss], particles: Iterable[int] | None) -> tuple[list[Cell], list[str]]:
    """Combine estimators with numbers of particles; return the cells, and why others were left out.

    With ``particles=None`` each estimator keeps its own number.

    Example:
        >>> found, left_out = cells({"a": STL(3)}, None)
        >>> found[0].particles, left_out
        (3, [])
    """
    found, left_out = [], []
    for name, loss in elbos.items():
        for number in [particles_of(loss)] if particles is None else particles:
            try:
                found.append(
                    Cell(name, number, with_plates(loss if particles is None else with_particles(loss, number)))
                )
            except SettingsError as error:
                left_out.append(f"{name} with {number}: {error}")
    return found, left_out


def with_particles(loss: Loss, particles: int) -> Loss:
    """Copy an estimator with another number of particles; Pyro's estimators then vectorize them.

    Raises:
        SettingsError: if the estimator does not support this number.

    Example:
        >>> with_particles(Trace_ELBO(), 4).num_particles, with_particles(STL(), 4)
        (4, STL(4))
    """
    if isinstance(loss, Estimator):
        return loss.with_particles(particles)
    if isinstance(loss, PyroELBO):
        other = copy.copy(loss)
        other.num_particles, other.vectorize_particles = particles, particles > 1
        return other
    if "num_particles" in inspect.signature(loss).parameters:
        return partial(loss, num_particles=particles)
    if particles == particles_of(loss):
        return loss
    raise SettingsError(f"{loss_name(loss)} takes no num_particles")


def with_plates(loss: Loss) -> Loss:
    """Copy an estimator with the plates of a VAE set; Pyro would draw noise to guess them at first use.

    Example:
        >>> with_plates(Trace_ELBO()).max_plate_nesting
        1
    """
    if not isinstance(loss, PyroELBO) or isinstance(loss, Estimator):
        return loss
    known = copy.copy(loss)
    known.max_plate_nesting = 1 + (known.vectorize_particles and known.num_particles > 1)
    return known


def evaluate(subject: Subject, loss: Loss, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Compute the bound of each datum, and the gradient of the negative bound per datum by each parameter.

    Raises:
        ModelError: if the estimator is not a sum over the plate of the data.

    Example:
        >>> import pyro_vae as pv
        >>> from pyro_vae.compare.pair import subject_of
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> value, gradient = evaluate(subject_of(vae, torch.ones(3, 5), None), STL(), 0)
        >>> value.shape, len(gradient)
        (torch.Size([3]), 5)
    """
    leaves = list(subject.parameters.values())
    with seeded(seed, subject.device):
        if isinstance(loss, Estimator):
            w = loss.weigh(subject.model, subject.guide, *subject.arguments)
            if w.global_sites:
                raise ModelError(f"site {w.global_sites[0]} lies in no plate over data: {loss} has no value per datum")
            parts = loss.bound(w)
            gradients = torch.autograd.grad(-w.total(parts), leaves, materialize_grads=True, allow_unused=True)
            return parts.detach(), [g / subject.size for g in gradients]
        parts, gradients = _by_scales(subject, loss, leaves)
    return parts, [g / subject.size for g in gradients]


def _by_scales(subject: Subject, loss: Loss, leaves: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute the loss per datum and the gradient, by scaling every term of a datum with a weight of 1.

    The loss is linear in these weights, so its derivative by a weight is the datum's part of the loss: one
    evaluation gives all parts.
    """
    x = subject.rows.x
    weights = torch.ones(len(x), dtype=x.dtype, device=x.device, requires_grad=True)
    model, guide = (poutine.scale(program, scale=weights) for program in (subject.model, subject.guide))
    total = differentiable(loss)(model, guide, *subject.arguments)
    parts, *gradients = torch.autograd.grad(total, [weights, *leaves], materialize_grads=True, allow_unused=True)
    if (parts.sum() - total.detach()).abs() > 1e4 * torch.finfo(x.dtype).eps * parts.abs().sum():
        raise ModelError(f"{loss_name(loss)} is not a sum over the plate 'data', so it has no value per datum")
    return -parts / (subject.size / len(x)), tuple(gradients)


def step_of(subject: Subject, loss: Loss) -> None:
    """Evaluate the loss and its gradient once, as in training.

    Example:
        >>> import pyro_vae as pv
        >>> from pyro_vae.compare.pair import subject_of
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> step_of(subject_of(vae, torch.ones(3, 5), None), STL())
    """
    total = differentiable(loss)(subject.model, subject.guide, *subject.arguments)
    torch.autograd.grad(total, list(subject.parameters.values()), allow_unused=True)


def kl_method(loss: Loss, provenance: str) -> str:
    """Say whether an estimator's KL is analytic, sampled or derived by hand, if known.

    Example:
        >>> kl_method(STL(), "analytic"), kl_method(TraceMeanField_ELBO(), "analytic")
        ('Monte Carlo', 'analytic')
    """
    if isinstance(loss, TraceMeanField_ELBO | AnalyticKL):
        return provenance
    by_hand = isinstance(loss, HandDerivedELBO) or loss_name(loss) == note_objective.__name__
    sampled = isinstance(loss, Trace_ELBO | Estimator)
    return "Monte Carlo" if sampled else "by hand" if by_hand else "unknown"
