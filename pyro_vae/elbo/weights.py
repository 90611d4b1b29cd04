"""Log-weights ``log p(x, z) - log q(z | x)``, of which every estimator here is made."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.errors import ModelError
from pyro_vae.traces import Program, Site, replayed, samples

PARTICLES = "_particles"
"""The plate of particles, to the left of the data."""

PARTICLE_DIMS = (-2, -3, -4, -5)
"""Where it may stand: the first that no plate of the user's own stands at."""


def log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1,
    path_gradient: bool = False,
    **kwargs: Any,
) -> Tensor:
    """The log-weight of each particle and datum, of which importance-weighted estimators are made.

    .. math:: \\log w_{ki} = \\log p(x_i, z_{ki}) - \\log q(z_{ki} | x_i), \\qquad z_{ki} \\sim q(z | x_i)

    They are not scaled by n/m: a bound is formed first and scaled after, since a scale inside a
    logarithm of a mean gives no bound. Their mean over particles is the ELBO of each datum.

    Args:
        model: a Pyro model, one latent site or more, whose sites all lie in one plate over data.
        guide: its guide.
        args: handed to both; ``x`` first.
        num_particles: K, at least 1; all are drawn at once, in a plate to the left of the data.
        path_gradient: keep only the gradient that flows through ``z`` ("sticking the landing"):
            q is differentiated as a function of its sample, not of its parameters.

    Returns:
        Log-weights in nats, shape ``(K, batch)``.

    Raises:
        ModelError: if a site is masked by a handler, enumerated, or lies in no plate over data; the
            sentence names the estimator of Pyro's to use instead.

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
    **kwargs: Any,
) -> "Weights":
    """The parts of the log-weights of each particle and datum.

    The model sees a copy of each latent, so that what flows back through it to the guide can be
    weighted particle by particle, once, wherever latents depend on latents. ``detached`` copies let
    nothing flow back, for estimators that do not differentiate through their samples.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> weigh(vae.model, vae.guide, torch.ones(3, 5), num_particles=4).likelihood.shape
        torch.Size([4, 3])
    """
    for dim in PARTICLE_DIMS[:-1]:
        try:
            return _weigh(dim, model, guide, num_particles, path_gradient, detached, (args, kwargs))
        except ValueError as error:
            if "collide at dim" not in str(error):
                raise
    return _weigh(PARTICLE_DIMS[-1], model, guide, num_particles, path_gradient, detached, (args, kwargs))


def _weigh(
    dim: int,
    model: Program,
    guide: Program,
    num_particles: int,
    path_gradient: bool,
    detached: bool,
    given: tuple[Any, Any],
) -> "Weights":
    args, kwargs = given
    model, guide = at_particles(model, num_particles, dim), at_particles(guide, num_particles, dim)
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    latents = {name: site["value"] for name, site in samples(guide_trace)}
    copies = {name: value.detach() if detached else value.view_as(value) for name, value in latents.items()}
    model_trace = replayed(model, with_values(guide_trace, copies), *args, **kwargs)
    scores = _Scores(guide, guide_trace, copies, given)
    scored = scores.path() if path_gradient else scores.at_copies() if detached else (guide_trace,)
    return Weights(model_trace, guide_trace, copies, scored)


def with_values(trace: Trace, values: dict[str, Tensor]) -> Trace:
    """A copy of a trace that holds other values."""
    other = trace.copy()
    for name, value in values.items():
        other.nodes[name] = {**other.nodes[name], "value": value}
    return other


@dataclass(frozen=True)
class _Scores:
    """The sites at which ``log q`` is to be had, with the values at which to have it."""

    guide: Program
    trace: Trace
    copies: dict[str, Tensor]
    given: tuple[Any, Any]

    def at_copies(self) -> tuple[Trace, ...]:
        return (self._at(self.copies),)

    def path(self) -> tuple[Trace, ...]:
        """At a detached sample only the parameters are left to differentiate: that part is to be taken away."""
        return *self.at_copies(), self._at({name: value.detach() for name, value in self.copies.items()})

    def _at(self, values: dict[str, Tensor]) -> Trace:
        """One latent's distribution depends on no other, several may: the guide is then run again."""
        if len(values) == 1:
            return with_values(self.trace, values)
        args, kwargs = self.given
        return replayed(self.guide, with_values(self.trace, values), *args, **kwargs)


@dataclass(frozen=True, eq=False)
class Weights:
    """What one pass over model and guide gives, for ``K`` particles of each datum; all in nats.

    Args:
        model_trace: of the model, at the guide's latents.
        guide_trace: of the guide.
        latents: the latents as the model saw them, by site.
        scored: the guide at these latents; a second trace's score, at detached ones, is taken away.
        temperature: what ``log p(z) - log q(z|x)`` is multiplied by.
        fixed: of the model at latents without a gradient, where an estimator asked for it.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> w = weigh(vae.model, vae.guide, torch.ones(3, 5))
        >>> torch.equal(w.log, w.likelihood + w.prior - w.posterior)
        True
    """

    model_trace: Trace
    guide_trace: Trace
    latents: dict[str, Tensor]
    scored: tuple[Trace, ...]
    temperature: float | Tensor = 1.0
    fixed: Trace | None = None

    def refuse(self) -> None:
        """Refuse sites that have no log-weight per datum, and models without data."""
        self.dims, self._observed  # noqa: B018

    def tempered(self, temperature: float | Tensor) -> "Weights":
        """The same, with ``log p(z) - log q(z|x)`` multiplied once more."""
        return replace(self, temperature=self.temperature * temperature)

    @cached_property
    def likelihood(self) -> Tensor:
        """``log p(x | z)``, shape ``(K, batch)``."""
        return self._sum(site for _, site in samples(self.model_trace) if site["is_observed"])

    @cached_property
    def prior(self) -> Tensor:
        """``log p(z)``, shape ``(K, batch)``, times the temperature."""
        return self.temperature * self._sum(s for _, s in samples(self.model_trace) if not s["is_observed"])

    @cached_property
    def posterior(self) -> Tensor:
        """``log q(z | x)``, shape ``(K, batch)``, times the temperature."""
        whole, *rest = (self._sum(site for _, site in samples(trace)) for trace in self.scored)
        for through_parameters in rest:
            whole = whole - (through_parameters - through_parameters.detach())
        return self.temperature * whole

    @cached_property
    def score(self) -> Tensor:
        """``log q(z | x)`` as it is, whatever the temperature and scales, shape ``(K, batch)``."""
        return torch.stack([self.by_datum(s["fn"].log_prob(s["value"])) for _, s in samples(self.scored[0])]).sum(0)

    @cached_property
    def log(self) -> Tensor:
        """The log-weights, shape ``(K, batch)``."""
        return self.joint - self.posterior

    @property
    def at_fixed_latents(self) -> Tensor:
        """``log p(x, z)``, shape ``(K, batch)``, with gradients by the model's own parameters only."""
        assert self.fixed is not None
        return replace(self, model_trace=self.fixed).joint

    @cached_property
    def joint(self) -> Tensor:
        """``log p(x, z)``, shape ``(K, batch)``, its prior's part times the temperature."""
        return self.likelihood + self.prior

    @cached_property
    def dims(self) -> tuple[int, tuple[int, ...]]:
        """The dimension of the particles, and those of the plates that all sites share: the data."""
        sites = [*samples(self.model_trace), *samples(self.guide_trace)]
        for name, site in sites:
            _refuse_site(name, site)
        shared = set.intersection(*({f.dim for f in _data_frames(site)} for _, site in sites)) if sites else set()
        if not shared:
            raise ModelError(f"the sites {sorted(dict(sites))} share no plate over data; {INSTEAD}")
        particle = next(f.dim for f in self._observed["cond_indep_stack"] if f.name == PARTICLES)
        return particle, tuple(sorted(shared))

    @cached_property
    def size(self) -> int:
        """n, how many data the plates stand for."""
        frames = {f.dim: f for f in _data_frames(self._observed)}
        return math.prod(frames[dim].full_size or frames[dim].size for dim in self.dims[1])

    @property
    def _observed(self) -> Site:
        for _, site in samples(self.model_trace):
            if site["is_observed"]:
                return site
        raise ModelError("the model observes nothing, so there is no evidence to bound; give a site obs=x")

    @cached_property
    def _outer(self) -> Any:
        """The scale that all observed sites have in common; where they differ, that of the plates alone."""
        scales = [site["scale"] for _, site in samples(self.model_trace) if site["is_observed"]]
        first = self._observed["scale"]
        if len(scales) == 1 or (not any(isinstance(s, Tensor) for s in scales) and len(set(scales)) == 1):
            return first
        frames = {f.dim: f for f in _data_frames(self._observed)}
        return math.prod((frames[d].full_size or frames[d].size) / frames[d].size for d in self.dims[1])

    @property
    def scale(self) -> Any:
        """What each datum's bound is multiplied by: n/m, and any scale around the whole model."""
        return self._outer

    def total(self, bound: Tensor) -> Tensor:
        """The sum over data of a bound of shape ``(batch,)``, scaled; shape ``()``."""
        scale = self.scale
        if isinstance(scale, Tensor) and scale.dim():
            scale = self.by_datum(scale.expand(self._observed["fn"].batch_shape))[0]
        return (scale * bound).sum()

    def common_temperature(self) -> Any:
        """What the log-densities of all latents are multiplied by.

        Raises:
            ModelError: if it is one for some and another for others.
        """
        found = [_relative(site, self._outer) for _, site in samples(self.guide_trace)]
        if len({id(t) if isinstance(t, Tensor) else t for t in found}) > 1:
            raise ModelError("latent sites are scaled by different numbers, which DReG is not derived for; use IWAE")
        return self.temperature * found[0]

    def kl_pairs(self) -> Iterator[tuple[str, Site, Site, Any]]:
        """Each latent's sites in guide and model, and its scale beyond that of the data."""
        for name, q in samples(self.guide_trace):
            if name in self.model_trace.nodes:
                yield name, q, self.model_trace.nodes[name], self.temperature * _relative(q, self._outer)

    def by_site(self, value: Tensor, name: str) -> Tensor:
        """The other way: what there is per particle and datum, to multiply a latent of that site with."""
        particle, data = self.dims
        sizes = [f.size for dim in data for f in _data_frames(self._observed) if f.dim == dim]
        value = value.unflatten(1, sizes)
        rank = -min(particle, *data)
        value = value.reshape(*value.shape, *[1] * (rank - value.dim()))
        value = value.movedim(tuple(range(1 + len(data))), (particle, *data))
        return value[(..., *[None] * self.guide_trace.nodes[name]["fn"].event_dim)]

    def _sum(self, sites: Iterator[Site]) -> Tensor:
        self.refuse()
        terms = [self.by_datum(site["fn"].log_prob(site["value"])) * _relative(site, self._outer) for site in sites]
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    def by_datum(self, value: Tensor) -> Tensor:
        """A value per particle and datum of one site, as ``(K, batch)``, its further plates summed over."""
        particle, data = self.dims
        if value.dim() == 2:
            return value
        return value.movedim((particle, *data), tuple(range(1 + len(data)))).flatten(1, len(data)).flatten(2).sum(-1)


def _relative(site: Site, outer: Any) -> Any:
    """A site's scale beyond that of the data: a temperature, which is part of the density."""
    mine = site["scale"]
    if mine is outer or (isinstance(mine, float | int) and isinstance(outer, float | int) and mine == outer):
        return 1.0
    ratio = mine / outer
    return ratio.reshape(-1) if isinstance(ratio, Tensor) and ratio.dim() > 1 else ratio


INSTEAD = "use Trace_ELBO, which needs no log-weight per datum"


def _data_frames(site: Site) -> list[Any]:
    return [f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]


def _refuse_site(name: str, site: Site) -> None:
    if site["mask"] is not None:
        raise ModelError(f"site {name} is masked by a handler, which log-weights do not see; mask its distribution")
    if site["infer"].get("enumerate"):
        raise ModelError(f"site {name} is enumerated, so it has no sampled log-weight; use TraceEnum_ELBO")
    if not _data_frames(site):
        raise ModelError(f"site {name} lies in no plate over data, so it has no log-weight per datum; {INSTEAD}")


def at_particles(program: Program, num_particles: int, dim: int = -2) -> Program:
    """A program that draws K particles of each datum at once, in a plate at ``dim``.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> at_particles(vae.guide, 4)(torch.ones(3, 5)).shape
        torch.Size([4, 3, 2])
    """
    return pyro.plate(PARTICLES, num_particles, dim=dim)(program)
