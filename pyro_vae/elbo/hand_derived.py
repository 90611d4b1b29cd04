"""The ELBO derived in the note, and the objective as the note prints it."""

import functools
import math
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Normal

from pyro_vae.core.traces import Program, Site, TensorELBO, samples, traces
from pyro_vae.core.validation import takes_settings
from pyro_vae.elbo.kl import base, family, validate_scales
from pyro_vae.errors import ModelError


class _Reparameterize(Messenger):
    """Computes equation (25), ``z = μ + σ ⊙ ε``, with the same noise that Pyro would draw."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "z" and not msg["done"]:
            mu, sigma = _normal(msg["fn"], "posterior q(z|x)")
            msg["value"] = mu + sigma * torch.randn(mu.shape, dtype=mu.dtype, device=mu.device)
            msg["done"] = True


def _normal(fn: Any, role: str) -> tuple[Tensor, Tensor]:
    """The location and scale of a normal, the only use of ``torch.distributions``."""
    normal = base(fn)
    if not isinstance(normal, Normal):
        raise ModelError(
            f"HandDerivedELBO is derived for normals, but the {role} is {family(fn)}; "
            "use TraceMeanField_ELBO or Trace_ELBO"
        )
    return normal.loc, normal.scale


class HandDerivedELBO(TensorELBO):
    """The ELBO of the note, equations (22), (23) and (25), written out in plain torch.

    .. math::
        \\mathcal L_i = \\frac1V \\sum_v \\log \\mathcal N(x_i | f(\\mu + \\sigma \\odot \\epsilon_v), s^2 I)
        + \\frac12 \\sum_j (1 + \\log \\sigma_j^2 - \\sigma_j^2 - \\mu_j^2)

    Model and guide must have a latent site ``z``, normal in the guide and N(0, I) in the model, and an observed
    site ``x``, normal with independent features. With the same random numbers, value and gradient equal those of
    Pyro's ``TraceMeanField_ELBO``. It is a ``pyro.infer.ELBO``: use it in ``SVI(..., loss=HandDerivedELBO())``. Losses
    are returned as tensors, which avoids a GPU synchronization.

    Args:
        num_particles: the number of particles V, at least 1.
        vectorize_particles: whether to draw all particles at once (with different random numbers).

    Raises:
        ModelError: when called on a pair of model and guide for which the formulas do not hold.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> vae = pv.exact.LinearGaussian(torch.randn(5, 2), torch.zeros(5), 0.5).as_vae(diagonal=True)
        >>> x, losses = torch.randn(3, 5), []
        >>> for elbo in HandDerivedELBO(7), pv.elbo.TraceMeanField_ELBO(7):
        ...     _ = torch.manual_seed(1)
        ...     losses.append(elbo.differentiable_loss(vae.model, vae.guide, x).item())
        >>> abs(losses[0] - losses[1]) < 1e-4
        True
    """

    @takes_settings
    def __init__(self, num_particles: int = 1, *, vectorize_particles: bool = False) -> None:
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        self._standard: list[tuple[Tensor, Any, int]] = []

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        with _Reparameterize():
            model_trace, guide_trace = traces(model, guide, *args, **kwargs)
        _validate_sites(model_trace, guide_trace)
        self._validate_prior(model_trace.nodes["z"])
        return model_trace, guide_trace

    def _validate_prior(self, site: Site) -> None:
        """Raise an error unless the prior is N(0, I); tensors that were validated before are not read again.

        Reading values synchronizes with the GPU, and a fixed prior has the same tensors at each step.
        """
        loc, scale = _normal(site["fn"], "prior p(z)")
        if loc.requires_grad or scale.requires_grad:
            raise ModelError(
                "HandDerivedELBO is derived for the prior N(0, I), but this prior is learned; use AnalyticKL"
            )
        keys = [] if loc.is_inference() else [_key(loc), _key(scale)]
        if keys and len(self._standard) == 2 and all(_same(*pair) for pair in zip(keys, self._standard, strict=True)):
            return
        if bool((loc != 0).any() | (scale != 1).any()):
            raise ModelError("HandDerivedELBO is derived for the prior N(0, I), but this is not; use AnalyticKL")
        self._standard = [] if any(key[0].requires_grad for key in keys) else keys

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Return minus the ELBO, summed over data and scaled by n/m; a tensor of shape ``()``."""
        pairs = self._get_traces(model, guide, args, kwargs)
        return -torch.stack([_scaled_sum(*_hand_derived(*pair)) for pair in pairs]).sum() / self.num_particles


def _key(tensor: Tensor) -> tuple[Tensor, Any, int]:
    """The tensor that owns the memory, the offset in it, and its version (the number of in-place changes)."""
    owner = tensor if tensor._base is None else tensor._base
    return owner, tensor.storage_offset(), owner._version


def _same(first: tuple[Tensor, Any, int], second: tuple[Tensor, Any, int]) -> bool:
    return first[0] is second[0] and first[1:] == second[1:]


def _validate_sites(model_trace: Trace, guide_trace: Trace) -> None:
    model_sites, guide_sites = (sorted(dict(samples(trace))) for trace in (model_trace, guide_trace))
    if model_sites != ["x", "z"] or guide_sites != ["z"] or not model_trace.nodes["x"]["is_observed"]:
        raise ModelError(
            f"HandDerivedELBO is derived for a latent z and an observed x, but the model has {model_sites} and "
            f"the guide {guide_sites}; use Trace_ELBO"
        )
    sites = [model_trace.nodes["x"], model_trace.nodes["z"], guide_trace.nodes["z"]]
    if any(site["mask"] is not None for site in sites):
        raise ModelError("HandDerivedELBO is derived without masks, but a site has one; use TraceMeanField_ELBO")
    validate_scales("z", sites[2], sites[1])


def _event_sum(value: Tensor, event_dim: int) -> Tensor:
    return value.flatten(-event_dim).sum(-1) if event_dim else value


def _minus_kl(site: Site) -> Tensor:
    """Minus equation (22): ``½ Σ (1 + log σ² - σ² - μ²)``."""
    mu, sigma = _normal(site["fn"], "posterior q(z|x)")
    return 0.5 * _event_sum(1 + 2 * sigma.log() - sigma**2 - mu**2, site["fn"].event_dim)


def _hand_derived(model_trace: Trace, guide_trace: Trace) -> tuple[tuple[Tensor, Any], ...]:
    """The terms of equation (23), each with the scale of its site."""
    x, z = model_trace.nodes["x"], guide_trace.nodes["z"]
    f, s = _normal(x["fn"], "likelihood p(x|z)")
    square = -((x["value"] - f) ** 2) / (2 * s**2)
    log_likelihood = _event_sum(square - s.log() - 0.5 * math.log(2 * math.pi), x["fn"].event_dim)
    return (log_likelihood, x["scale"]), (_minus_kl(z), z["scale"])


def _printed(model_trace: Trace, guide_trace: Trace) -> tuple[tuple[Tensor, Any], ...]:
    """The terms of equation (26) as printed."""
    x, z = model_trace.nodes["x"], guide_trace.nodes["z"]
    f, _ = _normal(x["fn"], "likelihood p(x|z)")
    return (-_event_sum((x["value"] - f) ** 2, x["fn"].event_dim), x["scale"]), (_minus_kl(z), z["scale"])


def _scaled_sum(*terms: tuple[Tensor, Any]) -> Tensor:
    return torch.stack([(scale * value).sum() for value, scale in terms]).sum()


@functools.cache
def _shared_estimator(num_particles: int) -> HandDerivedELBO:
    """The estimator of all calls; sharing it means that a prior is validated once, not at each step."""
    return HandDerivedELBO(num_particles)


def note_objective(model: Program, guide: Program, *args: Any, num_particles: int = 1, **kwargs: Any) -> Tensor:
    """Compute minus equation (26) of the note as printed, a loss for ``SVI(..., loss=)``.

    .. math::
        \\mathrm{printed}_i = -\\frac1V \\sum_v \\|f(z_v) - x_i\\|^2
        + \\frac12 \\sum_j (1 + \\log \\sigma_j^2 - \\sigma_j^2 - \\mu_j^2)

    It lacks the factor ``1 / 2s²`` and the constant of the Gaussian log-density. Thus it is the objective of a β-VAE
    with ``β = 1 / 2s²``, and equals the ELBO, up to a constant, only at ``s² = ½``:

    .. math::
        \\mathrm{printed}_i = 2 s^2 \\, \\mathrm{ELBO}_{i, \\beta = 1 / 2 s^2} + s^2 D \\log 2 \\pi s^2,
        \\qquad \\mathrm{ELBO}_i = \\mathrm{printed}_i - \\tfrac D2 \\log \\pi
        \\text{ at } s^2 = \\tfrac12

    It does not depend on s, so s cannot be learned with it.

    Args:
        model: a Pyro model that :class:`HandDerivedELBO` takes.
        guide: the guide of the model.
        args: the arguments of model and guide: ``x`` and optionally ``size``.
        num_particles: the number of particles V, at least 1.

    Returns:
        Minus the printed objective, summed over data and scaled by n/m; a tensor of shape ``()``.

    Raises:
        ModelError: if the formula does not hold for the pair of model and guide.

    References:
        | beta-VAE (Higgins et al., 2017), https://openreview.net/forum?id=Sy2fzU9gl

    Example:
        >>> import math, pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), math.sqrt(0.5))
        >>> vae, x, losses = linear.as_vae(diagonal=True), torch.ones(3, 5), []
        >>> for loss in note_objective, HandDerivedELBO().differentiable_loss:
        ...     _ = torch.manual_seed(0)
        ...     losses.append(loss(vae.model, vae.guide, x).item())
        >>> print(round(losses[1] - losses[0], 3), round(3 * 5 / 2 * math.log(math.pi), 3))
        8.585 8.585
    """
    pairs = _shared_estimator(num_particles)._get_traces(model, guide, args, kwargs)
    return -torch.stack([_scaled_sum(*_printed(*pair)) for pair in pairs]).sum() / num_particles
