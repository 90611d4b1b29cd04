"""The terms of the log-weights of each particle and datum."""

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.core.traces import PARTICLES, Site, data_frames, global_sites, samples, validate_unmasked
from pyro_vae.elbo.copies import Copies
from pyro_vae.errors import ModelError

ADVICE = "use Trace_ELBO, which needs no log-weight per datum"


@dataclass(frozen=True, eq=False)
class Weights:
    """The terms of the log-weights in nats, from one run of model and guide with ``K`` particles per datum.

    Args:
        model_trace: the trace of the model at the guide's latents.
        guide_trace: the trace of the guide.
        latents: the latents that the model saw, by site: copies of ``drawn``, possibly detached.
        temperature: the factor of ``log p(z) - log q(z|x)``.
        copies: the latents that later sites of the guide saw; None if these are the latents themselves.
        given_globals: whether global sites, outside the plate over data, are allowed. Everything but ``shared`` is then
            conditional on their draws: particle k of each datum belongs to draw k.

    Example:
        >>> import torch, pyro_vae as pv
        >>> from pyro_vae.elbo.log_weights import weigh
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> w = weigh(vae.model, vae.guide, torch.ones(3, 5))
        >>> torch.equal(w.log, w.likelihood + w.prior - w.posterior)
        True
    """

    model_trace: Trace
    guide_trace: Trace
    latents: dict[str, Tensor]
    temperature: float | Tensor = 1.0
    copies: Copies | None = None
    given_globals: bool = False

    def refuse(self) -> None:
        """Raise an error if a site has no log-weight per datum, or the model observes no data."""
        self.dims, self._observed  # noqa: B018

    def tempered(self, temperature: float | Tensor) -> "Weights":
        """Return a copy with ``log p(z) - log q(z|x)`` multiplied by ``temperature``."""
        return replace(self, temperature=self.temperature * temperature)

    @cached_property
    def likelihood(self) -> Tensor:
        """``log p(x | z)``, shape ``(K, batch)``."""
        return self._sum(site for _, site in samples(self.model_trace) if site["is_observed"])

    @cached_property
    def prior(self) -> Tensor:
        """``log p(z)``, shape ``(K, batch)``, times the temperature."""
        return self.temperature * self._sum(s for _, s in self._local(self.model_trace) if not s["is_observed"])

    @cached_property
    def global_sites(self) -> list[str]:
        """The latent sites that share no plate with the data."""
        return global_sites(self.model_trace, self.guide_trace)

    @cached_property
    def shared(self) -> Tensor:
        """``log p(g) - log q(g)`` of the global sites, times the temperature, shape ``(K,)``; 0 if there are none."""
        if not self.global_sites:
            return self.likelihood.new_zeros(len(self.likelihood))
        log_p = self._shared_sum(self.model_trace, {n: self.model_trace.nodes[n]["value"] for n in self.global_sites})
        log_q = self.log_q_shared_at(self.drawn) if self.copies is None else self.copies.log_q_shared(self)
        return self.temperature * (log_p - log_q)

    def log_q_shared_at(self, values: dict[str, Tensor]) -> Tensor:
        """Return ``log q`` of the global sites at other values, shape ``(K,)``."""
        return self._shared_sum(self.guide_trace, values)

    def _shared_sum(self, trace: Trace, values: dict[str, Tensor]) -> Tensor:
        sites = ((name, trace.nodes[name]) for name in self.global_sites)
        return torch.stack([self._particles(s["scale"] * s["fn"].log_prob(values[name])) for name, s in sites]).sum(0)

    def _particles(self, value: Tensor) -> Tensor:
        """Sum values of a global site over all dimensions but the particles; shape ``(K,)``."""
        return value.movedim(self.dims[0], 0).flatten(1).sum(1)

    def by_particle(self, value: Tensor, name: str) -> Tensor:
        """Sum values of the shape of a latent over all dimensions but the particles; shape ``(K,)``."""
        event = self.guide_trace.nodes[name]["fn"].event_dim
        value = value.flatten(-event).sum(-1) if event else value
        return self._particles(value) if name in self.global_sites else self.by_datum(value).sum(1)

    def _local(self, trace: Trace) -> Iterator[tuple[str, Site]]:
        """Iterate over the sites within the plate over data."""
        return ((name, site) for name, site in samples(trace) if name not in self.global_sites)

    @cached_property
    def drawn(self) -> dict[str, Tensor]:
        """The latents that the guide drew, by site, with their full gradient, which penalties need."""
        return {name: site["value"] for name, site in samples(self.guide_trace)}

    @property
    def device(self) -> torch.device:
        """The device of the data."""
        device: torch.device = self._observed["value"].device
        return device

    @cached_property
    def posterior(self) -> Tensor:
        """``log q(z | x)``, shape ``(K, batch)``, times the temperature."""
        return self.temperature * (self.log_q_at(self.drawn) if self.copies is None else self.copies.log_q(self))

    @cached_property
    def score(self) -> Tensor:
        """``log q(z | x)`` at fixed latents, without temperature and scales, shape ``(K, batch)``."""
        self.validate_not_enumerated()
        sites = ((site["fn"], site["value"].detach()) for _, site in samples(self.guide_trace))
        return torch.stack([self.by_datum(fn.log_prob(value)) for fn, value in sites]).sum(0)

    @cached_property
    def log(self) -> Tensor:
        """The log-weights, shape ``(K, batch)``; enumerated sites are summed out."""
        return self.log_by_class.logsumexp(0) if self.enumerated else self.joint - self.posterior

    @cached_property
    def enumerated(self) -> list[str]:
        """The enumerated sites of the guide, such as the class of a datum."""
        return [name for name, site in samples(self.guide_trace) if "_enumerate_dim" in site["infer"]]

    @cached_property
    def log_by_class(self) -> Tensor:
        """``log p(x, y, z_y) - log q(z_y | x, y)`` of each value y of the enumerated sites, shape ``(C, K, batch)``.

        It is minus infinity at impossible values of y, such as the other classes of a labelled datum.
        """
        names = ", ".join(self.enumerated)
        if self.copies is not None or isinstance(self.temperature, Tensor) or self.temperature != 1:
            raise ModelError(
                f"site {names} is enumerated, for which path gradients, score gradients and KL weights are not "
                "implemented; use ELBO, IWAE or M2"
            )
        drawn = (site for name, site in self._local(self.guide_trace) if name not in self.enumerated)
        log = self._terms(site for _, site in self._local(self.model_trace)) - self._terms(drawn)
        return log.expand(*self._classes, *log.shape[-2:]).flatten(0, -3)

    @cached_property
    def log_q_by_class(self) -> Tensor:
        """``log q(y | x)`` of each value of the enumerated sites, shape ``(C, K, batch)``."""
        log_q = self._terms(self.guide_trace.nodes[name] for name in self.enumerated)
        return log_q.expand(*self._classes, *log_q.shape[-2:]).flatten(0, -3)

    @property
    def _classes(self) -> list[int]:
        """The number of values of each enumerated site, in the order of their dimensions."""
        sites = (self.guide_trace.nodes[name] for name in self.enumerated)
        sizes = {
            s["infer"]["_enumerate_dim"]: s["value"].shape[s["infer"]["_enumerate_dim"] - s["fn"].event_dim]
            for s in sites
        }
        return [sizes[dim] for dim in sorted(sizes)]

    @cached_property
    def joint(self) -> Tensor:
        """``log p(x | z)`` plus the temperature times ``log p(z)``, shape ``(K, batch)``."""
        return self.likelihood + self.prior

    @cached_property
    def dims(self) -> tuple[int, tuple[int, ...]]:
        """The dimension of the particles, and the dimensions of the plates over data that all sites share."""
        observed, sites = self._observed, [*self._local(self.model_trace), *self._local(self.guide_trace)]
        if self.global_sites and not self.given_globals:
            _raise_for_globals(self.global_sites)
        for name, site in [*samples(self.model_trace), *samples(self.guide_trace)]:
            _validate_site(name, site, plates=name not in self.global_sites)
        plates = ({(f.name, f.dim) for f in data_frames(site)} for _, site in sites)
        shared = set.intersection(*plates) if sites else set()
        if not shared:
            raise ModelError(f"the sites {sorted(dict(sites))} share no plate over data; {ADVICE}")
        particle = next(f.dim for f in observed["cond_indep_stack"] if f.name == PARTICLES)
        return particle, tuple(sorted(dim for _, dim in shared))

    @cached_property
    def size(self) -> int:
        """The size n of the data set, from the full sizes of the plates."""
        frames = {f.dim: f for f in data_frames(self._observed)}
        return math.prod(frames[dim].full_size or frames[dim].size for dim in self.dims[1])

    @property
    def _observed(self) -> Site:
        for _, site in samples(self.model_trace):
            if site["is_observed"]:
                return site
        raise ModelError("the model observes no data, so it has no evidence; condition a site with obs=x")

    @cached_property
    def _common_scale(self) -> Any:
        """The scale of all observed sites; if they differ, the scale of the plates alone."""
        scales = [site["scale"] for _, site in samples(self.model_trace) if site["is_observed"]]
        first = self._observed["scale"]
        if len(scales) == 1 or (not any(isinstance(s, Tensor) for s in scales) and len(set(scales)) == 1):
            return first
        frames = {f.dim: f for f in data_frames(self._observed)}
        return math.prod((frames[d].full_size or frames[d].size) / frames[d].size for d in self.dims[1])

    @property
    def scale(self) -> Any:
        """The factor n/m of each bound, times the scale of the whole model, if any."""
        return self._common_scale

    def total(self, bound: Tensor) -> Tensor:
        """Sum a bound of shape ``(batch,)`` over data, scale it, and add the part of the global sites; shape ``()``."""
        scale = self.scale
        if isinstance(scale, Tensor) and scale.dim():
            if self.global_sites:
                raise ModelError(
                    f"each datum has its own scale, but the global site {self.global_sites[0]} belongs to all data; "
                    "use one scale for all data"
                )
            scale = self.by_datum(scale.expand(self._observed["fn"].batch_shape))[0]
        total = (scale * bound).sum()
        return total + self.shared.mean() if self.global_sites else total

    def common_temperature(self) -> Any:
        """Return the factor of the log-densities of all latents.

        Raises:
            ModelError: if the factor differs between latent sites.
        """
        factors = [_relative_scale(site, self._common_scale) for _, site in samples(self.guide_trace)]
        if len({id(t) if isinstance(t, Tensor) else t for t in factors}) > 1:
            raise ModelError("the latent sites have different scales, for which DReG is not derived; use IWAE")
        return self.temperature * factors[0]

    def kl_pairs(self) -> Iterator[tuple[str, Site, Site, Any]]:
        """Iterate over the latents: name, site in the guide, site in the model, and factor of the log-densities."""
        for name, q in samples(self.guide_trace):
            if name in self.model_trace.nodes:
                factor = self.temperature * _relative_scale(q, self._common_scale)
                yield name, q, self.model_trace.nodes[name], factor

    def by_site(self, value: Tensor, name: str) -> Tensor:
        """Reshape values of shape ``(K, batch)`` so that they broadcast with the latent of a site."""
        particle, data = self.dims
        sizes = [f.size for dim in data for f in data_frames(self._observed) if f.dim == dim]
        value = value.unflatten(1, sizes)
        rank = -min(particle, *data)
        value = value.reshape(*value.shape, *[1] * (rank - value.dim()))
        value = value.movedim(tuple(range(1 + len(data))), (particle, *data))
        return value[(..., *[None] * self.guide_trace.nodes[name]["fn"].event_dim)]

    def by_event(self, value: Tensor, name: str) -> Tensor:
        """Sum values of the shape of a latent over its event and other plates; shape ``(K, batch)``.

        The values of a global site are divided equally among the data of the batch.
        """
        if name in self.global_sites:
            batch = self.likelihood.shape[1]
            return (self.by_particle(value, name) / batch).unsqueeze(1).expand(-1, batch)
        event = self.guide_trace.nodes[name]["fn"].event_dim
        return self.by_datum(value.flatten(-event).sum(-1) if event else value)

    def log_q_at(self, values: dict[str, Tensor]) -> Tensor:
        """Return ``log q`` of other values under the distributions of the guide, shape ``(K, batch)``."""
        return self._sum({**site, "value": values[name]} for name, site in self._local(self.guide_trace))

    def _sum(self, sites: Iterable[Site]) -> Tensor:
        self.validate_not_enumerated()
        return self._terms(sites)

    def validate_not_enumerated(self) -> None:
        """Raise an error if a site is enumerated, since log-weights then have no prior or posterior part."""
        if self.enumerated:
            raise ModelError(
                f"site {', '.join(self.enumerated)} is enumerated, so log-weights do not split into likelihood, "
                "prior and posterior; use ELBO, IWAE or M2, which need only the log-weights"
            )

    def _terms(self, sites: Iterable[Site]) -> Tensor:
        """Sum the log-densities of sites; shape ``(*enumerated, K, batch)``, one dimension per enumerated site."""
        self.refuse()
        scale = self._common_scale
        terms = [self.by_datum(s["fn"].log_prob(s["value"])) * _relative_scale(s, scale) for s in sites]
        if not terms:  # all latents are global
            return self._observed["value"].new_zeros(())
        return functools.reduce(torch.add, terms)

    def by_datum(self, value: Tensor) -> Tensor:
        """Reshape the values of a site to ``(K, batch)``, summed over its other plates."""
        particle, data = self.dims
        if self.enumerated:
            return self._by_class(value)
        if value.dim() == 2:
            return value
        return value.movedim((particle, *data), tuple(range(1 + len(data)))).flatten(1, len(data)).flatten(2).sum(-1)

    def _by_class(self, value: Tensor) -> Tensor:
        """Reshape to ``(*enumerated, K, batch)``; size 1 for the enumerated sites that the value does not depend on."""
        particle, data = self.dims
        classes = sorted(self.guide_trace.nodes[name]["infer"]["_enumerate_dim"] for name in self.enumerated)
        value = value.reshape(*[1] * (-classes[0] - value.dim()), *value.shape)
        front = (*classes, particle, *data)
        value = value.movedim(front, tuple(range(len(front)))).flatten(len(classes) + 1, len(front) - 1)
        return value.unsqueeze(-1).flatten(len(classes) + 2).sum(-1)


def _relative_scale(site: Site, common: Any) -> Any:
    """Return the scale of a site divided by the scale of the data: a temperature, part of the density."""
    scale = site["scale"]
    if scale is common or (isinstance(scale, float | int) and isinstance(common, float | int) and scale == common):
        return 1.0
    ratio = scale / common
    return ratio.reshape(-1) if isinstance(ratio, Tensor) and ratio.dim() > 1 else ratio


def _raise_for_globals(names: list[str]) -> None:
    raise ModelError(
        f"site {names[0]} lies in no plate over data, so it has no log-weight per datum; {ADVICE}, or ELBO or STL, "
        "and evaluate the Pair conditioned on a draw of this site (pair.condition)"
    )


def _validate_site(name: str, site: Site, *, plates: bool) -> None:
    validate_unmasked(name, site)
    if site["infer"].get("enumerate") and "_enumerate_dim" not in site["infer"]:
        raise ModelError(
            f"site {name} is enumerated, but not in parallel in the guide, so it has no log-weight; set "
            'infer={"enumerate": "parallel"} in the guide, or use TraceEnum_ELBO'
        )
    if plates and not data_frames(site):
        raise ModelError(f"site {name} lies in no plate over data, so it has no log-weight per datum; {ADVICE}")
