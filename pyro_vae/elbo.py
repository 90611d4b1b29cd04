"""Log-weights, and the estimators of the evidence lower bound made of them."""

from typing import Any

import pyro
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_vae.errors import ModelError
from pyro_vae.hand import HandDerivedELBO, note_objective
from pyro_vae.kl import AnalyticKL, kl_provenance
from pyro_vae.traces import Program, Site, samples, traces

__all__ = [
    "AnalyticKL",
    "HandDerivedELBO",
    "TraceMeanField_ELBO",
    "Trace_ELBO",
    "kl_provenance",
    "log_weights",
    "note_objective",
]


def log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1,
    path_gradient: bool = False,
    **kwargs: Any,
) -> Tensor:
    """The log-weight of every particle of every datum, from which importance-weighted estimators are made.

    .. math:: \\log w_{ki} = \\log p(x_i, z_{ki}) - \\log q(z_{ki} | x_i), \\qquad z_{ki} \\sim q(z | x_i)

    They are not scaled by n/m: a bound is formed first and scaled after, since a scale inside a
    logarithm of a mean gives no bound. Their mean over particles is the ELBO of each datum.

    Args:
        model: a Pyro model whose latents all lie in one plate over data, the rightmost batch dimension.
        guide: its guide.
        args: handed to both; ``x`` first.
        num_particles: K, at least 1; all are drawn at once, in a plate to the left of the data.
        path_gradient: keep only the gradient that flows through ``z`` ("sticking the landing"):
            q is differentiated as a function of its sample, not of its parameters.

    Returns:
        Log-weights in nats, shape ``(K, batch)``.

    Raises:
        ModelError: if a site is masked by a handler, or lies in no plate over data.

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

    def particles(program: Program) -> Program:
        return pyro.plate("particles", num_particles, dim=-2)(program)

    model_trace, guide_trace = traces(particles(model), particles(guide), *args, **kwargs)
    for name, site in (*samples(model_trace), *samples(guide_trace)):
        _refuse_site(name, site)
    log_p = sum(site["fn"].log_prob(site["value"]) for _, site in samples(model_trace))
    log_q = sum(_score(site, path_gradient) for _, site in samples(guide_trace))
    return log_p - log_q


def _refuse_site(name: str, site: Site) -> None:
    if site["mask"] is not None:
        raise ModelError(f"site {name} is masked by a handler, which log-weights do not see; mask its distribution")
    if all(frame.dim != -1 for frame in site["cond_indep_stack"]):
        raise ModelError(f"site {name} lies in no plate over data, so it has no log-weight per datum; use Trace_ELBO")


def _score(site: Site, path_gradient: bool) -> Tensor:
    log_q = site["fn"].log_prob(site["value"])
    if not path_gradient:
        return log_q
    # At a detached sample only the parameters are left to differentiate: take that part away.
    through_parameters = site["fn"].log_prob(site["value"].detach())
    return log_q - (through_parameters - through_parameters.detach())
