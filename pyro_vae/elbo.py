"""Log-weights, and the estimators of the evidence lower bound made of them."""

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from pyro_vae.errors import ModelError

__all__ = [
    "AnalyticKL",
    "HandDerivedELBO",
    "TraceMeanField_ELBO",
    "Trace_ELBO",
    "kl_provenance",
    "log_weights",
    "note_objective",
]

Program = Callable[..., Any]
Site = dict[str, Any]


def _traces(model: Program, guide: Program, *args: Any, **kwargs: Any) -> tuple[Trace, Trace]:
    """The trace of the guide, and of the model replayed against it, without the plates' own sites."""
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


def _samples(trace: Trace) -> Iterator[tuple[str, Site]]:
    return ((name, site) for name, site in trace.nodes.items() if site["type"] == "sample")


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

    References:
        | Importance Weighted Autoencoders (Burda, Grosse & Salakhutdinov, 2015), https://arxiv.org/abs/1509.00519
        | Sticking the Landing (Roeder, Wu & Duvenaud, 2017), https://arxiv.org/abs/1703.09194

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.randn(5, 2), torch.zeros(5), 0.5)
        >>> x, vae = linear.sample(3), linear.as_vae()
        >>> weights = log_weights(vae.model, vae.guide, x, num_particles=4)
        >>> bool(((weights - linear.log_marginal(x)).abs() < 1e-5).all())
        True
    """

    def particles(program: Program) -> Program:
        return pyro.plate("particles", num_particles, dim=-2)(program)

    model_trace, guide_trace = _traces(particles(model), particles(guide), *args, **kwargs)
    log_p = sum(site["fn"].log_prob(site["value"]) for _, site in _samples(model_trace))
    log_q = sum(_score(site, path_gradient) for _, site in _samples(guide_trace))
    return log_p - log_q


def _score(site: Site, path_gradient: bool) -> Tensor:
    log_q = site["fn"].log_prob(site["value"])
    if not path_gradient:
        return log_q
    # At a detached sample only the parameters are left to differentiate: take that part away.
    through_parameters = site["fn"].log_prob(site["value"].detach())
    return log_q - (through_parameters - through_parameters.detach())


def kl_provenance(model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Whether Pyro has a closed form for each latent site's KL, or samples it without a word.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: handed to both.

    Returns:
        Per latent site ``"analytic"`` or ``"Monte Carlo"``, as ``TraceMeanField_ELBO`` would treat it.

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> x, exact, diagonal = torch.zeros(3, 5), linear.as_vae(), linear.as_vae(diagonal=True)
        >>> kl_provenance(diagonal.model, diagonal.guide, x), kl_provenance(exact.model, exact.guide, x)
        ({'z': 'analytic'}, {'z': 'Monte Carlo'})
    """
    with torch.no_grad(), poutine.block():
        return _provenance(*_traces(model, guide, *args, **kwargs))


def _provenance(model_trace: Trace, guide_trace: Trace) -> dict[str, str]:
    sites = {name: site for name, site in _samples(guide_trace) if name in model_trace.nodes}
    return {name: _kind(site["fn"], model_trace.nodes[name]["fn"]) for name, site in sites.items()}


def _kind(q: Any, p: Any) -> str:
    try:
        kl_divergence(q, p)
    except NotImplementedError:
        return "Monte Carlo"
    return "analytic"


class AnalyticKL(TraceMeanField_ELBO):
    """Pyro's ``TraceMeanField_ELBO``, made strict: what it would get silently wrong is refused.

    .. math:: \\mathcal L_i = E_q \\log p(x_i | z) - KL(q(z | x_i) \\,\\|\\, p(z))

    Refused are a KL without a closed form (Pyro samples it instead), a latent site scaled in the
    model but not alike in the guide (Pyro takes the guide's scale and ignores the model's), and
    more than one latent site (where the KL of the sum need not be the sum of the KLs).

    Args:
        args, kwargs: as ``pyro.infer.TraceMeanField_ELBO`` takes them, ``num_particles`` first.

    Raises:
        ModelError: when called on such a pair.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> vae = linear.as_vae()
        >>> AnalyticKL().loss(vae.model, vae.guide, torch.zeros(3, 5))
        Traceback (most recent call last):
        pyro_vae.errors.ModelError: the KL of MultivariateNormal from Normal at site z has no closed form ...
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._closed_forms: set[Any] = set()

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        latents = dict(_samples(prune_subsample_sites(guide_trace)))
        if len(latents) != 1:
            raise ModelError(f"AnalyticKL takes one latent site, the guide has {list(latents)}; use Trace_ELBO")
        for name, q in latents.items():
            _refuse_unequal_scales(name, q, model_trace.nodes[name])
            self._refuse_sampling(name, q["fn"], model_trace.nodes[name]["fn"])
        return model_trace, guide_trace

    def _refuse_sampling(self, name: str, q: Any, p: Any) -> None:
        pair = (_structure(q), _structure(p))
        if pair not in self._closed_forms:  # looking costs a KL, so each kind of pair is looked at once
            if _kind(q, p) != "analytic":
                families = f"{_family(q)} from {_family(p)}"
                raise ModelError(f"the KL of {families} at site {name} has no closed form in Pyro; use Trace_ELBO")
            self._closed_forms.add(pair)


def _structure(fn: Any) -> tuple[Any, ...]:
    return (type(fn), fn.event_dim, *(_structure(fn.base_dist) if isinstance(fn, Independent) else ()))


def _family(fn: Any) -> str:
    return type(_base(fn)).__name__


def _base(fn: Any) -> Any:
    return _base(fn.base_dist) if isinstance(fn, Independent) else fn


def _refuse_unequal_scales(name: str, q: Site, p: Site) -> None:
    same = q["scale"] == p["scale"]
    if not (same if isinstance(same, bool) else bool(same.all())):
        raise ModelError(
            f"site {name} is scaled by {p['scale']} in the model and by {q['scale']} in the guide; "
            "scale both alike, or the KL is not the one that was meant"
        )


class _HandReparameterised(Messenger):
    """Equation (25) by hand, ``z = μ + σ ⊙ ε``, drawing the noise that Pyro's own sampling would draw."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "z" and not msg["done"]:
            mu, sigma = _normal(msg["fn"], "posterior q(z|x)")
            msg["value"] = mu + sigma * torch.randn(mu.shape, dtype=mu.dtype, device=mu.device)
            msg["done"] = True


def _normal(fn: Any, role: str) -> tuple[Tensor, Tensor]:
    """The location and scale of a normal: all that is taken from ``torch.distributions``."""
    normal = _base(fn)
    if not isinstance(normal, Normal):
        raise ModelError(
            f"HandDerivedELBO is derived for normals, the {role} is {_family(fn)}; "
            "use TraceMeanField_ELBO or Trace_ELBO"
        )
    return normal.loc, normal.scale


class HandDerivedELBO(ELBO):
    """The note's ELBO written out by hand, equations (22), (23) and (25), of any Pyro pair it was derived for.

    .. math::
        \\mathcal L_i = \\frac1V \\sum_v \\log \\mathcal N(x_i | f(\\mu + \\sigma \\odot \\epsilon_v), s^2 I)
        + \\frac12 \\sum_j (1 + \\log \\sigma_j^2 - \\sigma_j^2 - \\mu_j^2)

    It needs a latent site ``z``, normal in the guide and N(0, I) in the model, and an observed
    site ``x``, normal with independent features. With the same random numbers its value and its
    gradient are those of Pyro's ``TraceMeanField_ELBO``. It is a ``pyro.infer.ELBO``: ``SVI(...,
    loss=HandDerivedELBO())`` takes it. What it returns are tensors, so nothing waits for a GPU.

    Args:
        num_particles: V, at least 1.
        vectorize_particles: draw all particles at once (other random numbers than one by one).

    Raises:
        ModelError: when called on a pair that the formulas do not hold for.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> vae = pv.exact.LinearGaussian(torch.randn(5, 2), torch.zeros(5), 0.5).as_vae(diagonal=True)
        >>> x, losses = torch.randn(3, 5), []
        >>> for elbo in HandDerivedELBO(7), TraceMeanField_ELBO(7):
        ...     _ = torch.manual_seed(1)
        ...     losses.append(elbo.differentiable_loss(vae.model, vae.guide, x).item())
        >>> abs(losses[0] - losses[1]) < 1e-4
        True
    """

    def __init__(self, num_particles: int = 1, *, vectorize_particles: bool = False) -> None:
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        self._standard: weakref.WeakSet[Any] = weakref.WeakSet()

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        with _HandReparameterised():
            model_trace, guide_trace = _traces(model, guide, *args, **kwargs)
        _refuse_other_sites(model_trace, guide_trace)
        self._refuse_other_priors(model, model_trace.nodes["z"])
        return model_trace, guide_trace

    def _refuse_other_priors(self, model: Program, site: Site) -> None:
        """N(0, I) is seen in its values, and only once per model while training: looking makes a GPU wait."""
        loc, scale = _normal(site["fn"], "prior p(z)")
        learned, owner = loc.requires_grad or scale.requires_grad, getattr(model, "__self__", model)
        if torch.is_grad_enabled() and not learned and owner in self._standard:
            return
        if learned or bool((loc != 0).any() | (scale != 1).any()):
            raise ModelError("HandDerivedELBO is derived for the prior N(0, I) alone; use TraceMeanField_ELBO")
        if torch.is_grad_enabled():  # without gradients a learned prior cannot be told from a fixed one
            self._standard.add(owner)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the ELBO, summed over data and scaled by n/m; a tensor of shape ``()``."""
        traces = self._get_traces(model, guide, args, kwargs)
        return -torch.stack([_scaled_sum(*_hand_derived(*pair)) for pair in traces]).sum() / self.num_particles

    @torch.no_grad()
    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, with no graph; a tensor of shape ``()``."""
        return self.differentiable_loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, its gradient added to ``.grad`` of every parameter; a tensor of shape ``()``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.detach()


def _refuse_other_sites(model_trace: Trace, guide_trace: Trace) -> None:
    model_sites, guide_sites = (sorted(dict(_samples(trace))) for trace in (model_trace, guide_trace))
    if model_sites != ["x", "z"] or guide_sites != ["z"] or not model_trace.nodes["x"]["is_observed"]:
        raise ModelError(
            f"HandDerivedELBO is derived for a latent z and an observed x; the model has {model_sites}, "
            f"the guide {guide_sites}; use Trace_ELBO"
        )
    sites = [model_trace.nodes["x"], model_trace.nodes["z"], guide_trace.nodes["z"]]
    if any(site["mask"] is not None for site in sites):
        raise ModelError("HandDerivedELBO is derived without masks, a site has one; use TraceMeanField_ELBO")
    _refuse_unequal_scales("z", sites[2], sites[1])


def _event_sum(value: Tensor, event_dim: int) -> Tensor:
    return value.flatten(-event_dim).sum(-1) if event_dim else value


def _minus_kl(site: Site) -> Tensor:
    """Equation (22), with its sign turned: ``½ Σ (1 + log σ² - σ² - μ²)``."""
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
    """The terms of equation (26) as it is printed."""
    x, z = model_trace.nodes["x"], guide_trace.nodes["z"]
    f, _ = _normal(x["fn"], "likelihood p(x|z)")
    return (-_event_sum((x["value"] - f) ** 2, x["fn"].event_dim), x["scale"]), (_minus_kl(z), z["scale"])


def _scaled_sum(*terms: tuple[Tensor, Any]) -> Tensor:
    return torch.stack([(scale * value).sum() for value, scale in terms]).sum()


def note_objective(model: Program, guide: Program, *args: Any, num_particles: int = 1, **kwargs: Any) -> Tensor:
    """Equation (26) of the note as it is printed, with its sign turned: a loss for ``SVI(..., loss=)``.

    .. math::
        \\mathrm{printed}_i = -\\frac1V \\sum_v \\|f(z_v) - x_i\\|^2
        + \\frac12 \\sum_j (1 + \\log \\sigma_j^2 - \\sigma_j^2 - \\mu_j^2)

    It lacks the ``1 / 2s²`` of the Gaussian and its constant. So it is a β-VAE in disguise, with
    ``β = 1 / 2s²``, and the ELBO, up to a constant, only at ``s² = ½``:

    .. math::
        \\mathrm{printed}_i = 2 s^2 \\, \\mathrm{ELBO}_{i, \\beta = 1 / 2 s^2} + s^2 D \\log 2 \\pi s^2,
        \\qquad \\mathrm{ELBO}_i = \\mathrm{printed}_i - \\tfrac D2 \\log \\pi
        \\text{ at } s^2 = \\tfrac12

    No gradient reaches s, which therefore cannot be learned from it.

    Args:
        model: a Pyro model that :class:`HandDerivedELBO` takes.
        guide: its guide.
        args: handed to both: ``x`` and, if any, ``size``.
        num_particles: V, at least 1.

    Returns:
        Minus the printed objective, summed over data and scaled by n/m; a tensor of shape ``()``.

    Raises:
        ModelError: on a pair that the formula does not hold for.

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
    traces = HandDerivedELBO(num_particles)._get_traces(model, guide, args, kwargs)
    return -torch.stack([_scaled_sum(*_printed(*pair)) for pair in traces]).sum() / num_particles
