"""Log-weights ``log p(x, z) - log q(z | x)``, the basis of all estimators of this package."""

from functools import partial
from typing import Any

import pyro
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.core.compatibility import in_a_line
from pyro_vae.core.traces import PARTICLES, Program, replayed, samples, traces
from pyro_vae.core.validation import takes_settings
from pyro_vae.elbo.copies import Copies, Detached, Gated
from pyro_vae.elbo.weights import Weights
from pyro_vae.errors import ModelError

PARTICLE_DIMS = (-2, -3, -4, -5)
"""Candidate dimensions of the plate of particles; the first one that no plate of the user occupies is used."""


@takes_settings
def log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1,
    path_gradient: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Draw particles and return the log-weight of each particle and datum.

    .. math:: \\log w_{ki} = \\log p(x_i, z_{ki}) - \\log q(z_{ki} | x_i), \\qquad z_{ki} \\sim q(z | x_i)

    The mean over particles is an estimate of the ELBO of each datum. The log-weights are not scaled by n/m: scale a
    bound after computing it, since scaled log-weights inside a log-mean-exp do not give a bound.

    A discrete site y of the guide with ``infer={"enumerate": "parallel"}`` is summed out exactly, without q(y|x):

    .. math:: \\log w_{ki} = \\log \\sum_y p(x_i, y, z_{kiy}) / q(z_{kiy} | x_i, y)

    Args:
        model: a Pyro model with one or more latent sites; all sites must lie in one plate over data.
        guide: the guide of the model.
        args: the arguments of model and guide; ``x`` first.
        num_particles: the number of particles K, at least 1; all are drawn at once, in a plate to the left of the data.
        path_gradient: whether to keep the gradient through ``z`` only ("sticking the landing"):
            log q is differentiated with respect to its sample, not to its parameters.

    Returns:
        Log-weights in nats, shape ``(K, batch)``.

    Raises:
        ModelError: if a site is masked by a handler, enumerated in the model only, or lies in no plate over data; the
            message names the estimator of Pyro to use instead. Also if only the dimension of particles makes shapes
            not fit.

    References:
        | Importance Weighted Autoencoders (Burda, Grosse & Salakhutdinov, 2015), https://arxiv.org/abs/1509.00519
        | Sticking the Landing (Roeder, Wu & Duvenaud, 2017), https://arxiv.org/abs/1703.09194

    Example:
        >>> import torch, pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.randn(5, 2), torch.zeros(5), 0.5)
        >>> x, vae = linear.sample(3), linear.as_vae()
        >>> weights = log_weights(vae.model, vae.guide, x, num_particles=4)
        >>> bool(((weights - linear.log_marginal(x)).abs() < 1e-5).all())
        True
    """
    return weigh(model, guide, *args, num_particles=num_particles, path_gradient=path_gradient, **kwargs).log


def weigh(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1,
    path_gradient: bool = False,
    detached: bool = False,
    given_globals: bool = False,
    **kwargs: Any,
) -> "Weights":
    """Draw particles and return the terms of the log-weights of each particle and datum.

    Model and guide run once. The model sees a copy of each latent, so that an estimator can weight or
    stop the gradient from the model, particle by particle; ``drawn`` are the latents themselves.

    Args:
        model: a Pyro model, as in :func:`log_weights`.
        guide: the guide of the model.
        args: the arguments of model and guide; ``x`` first.
        num_particles: the number of particles K, at least 1.
        path_gradient: as in :func:`log_weights`.
        detached: whether to stop the gradient through the latents, both from the model and from later sites of the
            guide, for score-function estimators.
        given_globals: whether to accept latent sites outside the plate over data, such as the mean of a group. The
            log-weights of a particle are then conditional on its draw of these sites; the log-weight of this draw is
            ``Weights.shared``.

    Returns:
        The terms, as :class:`Weights`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> weigh(vae.model, vae.guide, torch.ones(3, 5), num_particles=4).likelihood.shape
        torch.Size([4, 3])
    """
    copies = Detached() if detached else Gated() if path_gradient else None
    run = partial(_weigh, model, guide, num_particles, copies, given_globals, args, kwargs)
    for dim in PARTICLE_DIMS[:-1]:
        try:
            return run(dim)
        except (RuntimeError, ValueError, IndexError) as error:
            if "collide at dim" not in str(error):
                _refuse_if_particles_fail(error, model, guide, args, kwargs)
                raise
    return run(PARTICLE_DIMS[-1])


SHAPES = ("must match the size", "broadcast", "hape mismatch", "out of range")
"""Torch and Pyro use these words in errors about shapes that do not fit."""


def _refuse_if_particles_fail(error: Exception, model: Program, guide: Program, args: Any, kwargs: Any) -> None:
    """Raise a ModelError if shapes do not fit with a dimension of particles, but do without it."""
    if not any(part in str(error) for part in SHAPES):
        return
    try:
        traces(model, guide, *args, **kwargs)
    except Exception:  # the error has another reason
        return
    raise ModelError(
        f"model or guide fails with particles, a dimension to the left of the data ({in_a_line(error)}); index latents "
        "from the right (z[..., 0]), and unsqueeze global sites where they meet vectors (mean.unsqueeze(-1))"
    ) from error


def _weigh(
    model: Program,
    guide: Program,
    num_particles: int,
    copies: "Copies | None",
    given_globals: bool,
    args: Any,
    kwargs: Any,
    dim: int,
) -> "Weights":
    detached = isinstance(copies, Detached)
    model, guide = at_particles(model, num_particles, dim), at_particles(guide, num_particles, dim)
    guide = poutine.enum(guide, first_available_dim=dim - 1)  # affects only sites with infer={"enumerate": "parallel"}
    guide_trace = poutine.trace(guide if copies is None else copies(guide)).get_trace(*args, **kwargs)
    drawn = {name: site["value"] for name, site in samples(guide_trace)}
    latents = {name: value.detach() if detached else value.view_as(value) for name, value in drawn.items()}
    model_trace = replayed(model, with_values(guide_trace, latents), *args, **kwargs)
    return Weights(model_trace, guide_trace, latents, copies=copies, given_globals=given_globals)


def with_values(trace: Trace, values: dict[str, Tensor]) -> Trace:
    """Return a copy of a trace with other values."""
    other = trace.copy()
    for name, value in values.items():
        other.nodes[name] = {**other.nodes[name], "value": value}
    return other


def at_particles(program: Program, num_particles: int, dim: int = -2) -> Program:
    """Wrap a program so that it draws K particles of each datum at once, in a plate at ``dim``.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> at_particles(vae.guide, 4)(torch.ones(3, 5)).shape
        torch.Size([4, 3, 2])
    """
    return pyro.plate(PARTICLES, num_particles, dim=dim)(program)


def without_enumeration(guide: Program) -> Program:
    """Return a guide that samples its enumerated sites instead.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> without_enumeration(vae.guide)(torch.ones(3, 5)).shape
        torch.Size([3, 2])
    """
    return poutine.infer_config(guide, config_fn=lambda _: {"enumerate": None})
