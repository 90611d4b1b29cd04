"""The posterior, prior and likelihood of a pair, with the latents of all sites joined to one vector per datum."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.core.compatibility import in_a_line, validate_real
from pyro_vae.core.component import Distribution
from pyro_vae.core.device import seeded
from pyro_vae.core.rows import Rows
from pyro_vae.core.traces import PARTICLES, Program, Site, data_frames, samples, validate_unmasked
from pyro_vae.errors import ModelError, PyroVAEError

if TYPE_CHECKING:
    from pyro_vae.core.pair import Pair


UNKNOWN_FAMILY = "so the family of q over the latents of all sites is unknown"


class JoinedPosterior:
    """q(z|x) of all sites as a distribution of batch shape ``(datum,)`` and event shape ``(latent,)``.

    The sites have the order of the model. Discrete latents are joined as floating-point numbers.

    Args:
        pair: a model and its guide, whose latents lie in one plate over data.
        rows: the data.

    Raises:
        ModelError: if a latent lies outside the plate over data, or in a second plate.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> q = JoinedPosterior(pv.Pair(vae.model, vae.guide), Rows(torch.ones(3, 5)))
        >>> z = q.sample((4,))
        >>> z.shape, q.log_prob(z).shape, q.names
        (torch.Size([4, 3, 2]), torch.Size([4, 3]), ['z[0]', 'z[1]'])
    """

    event_dim = 1
    has_rsample = False

    def __init__(self, pair: "Pair", rows: Rows) -> None:
        self.pair, self.rows = pair, rows
        self.batch_shape = torch.Size([len(rows)])
        trace = self._run_once(pair.model)
        self.sites = {name: site for name, site in samples(trace) if not site["is_observed"]}
        plates = {f.name for _, site in samples(trace) if site["is_observed"] for f in data_frames(site)}
        self.shapes = {name: _event_shape(name, site, plates) for name, site in self.sites.items()}
        if not self.shapes:
            raise ModelError("the model has no latent site, so it has neither a prior nor a posterior of latents")
        self.event_shape = torch.Size([sum(shape.numel() for shape in self.shapes.values())])

    @property
    def names(self) -> list[str]:
        """The name of each latent: its site and its index within the site."""
        return [f"{name}[{i}]" if shape else name for name, shape in self.shapes.items() for i in range(shape.numel())]

    @property
    def mean(self) -> Tensor:
        """Raise NotImplementedError: not available in closed form."""
        raise NotImplementedError

    @property
    def variance(self) -> Tensor:
        """Raise NotImplementedError: not available in closed form."""
        raise NotImplementedError

    @property
    def support(self) -> Any:
        """The real numbers; raises a ModelError if a latent is discrete or bounded."""
        self.validate_real()
        return constraints.real

    def validate_real(self) -> None:
        """Raise a ModelError if a latent is discrete or bounded."""
        trace = self._run_once(self.program)
        for name in self.shapes:
            validate_real(trace.nodes[name]["fn"], f"site {name}")

    def as_normal(self) -> Distribution:
        """Return this distribution as a normal one, if the sites are normal and do not depend on each other.

        Raises:
            ModelError: if a site is not normal or depends on another, or one of several is multivariate normal.
        """
        with torch.no_grad(), seeded(0, self.rows.x.device):
            trace = self._run(self.program, (2,))
        parts = {name: _normal_of(name, trace.nodes[name]["fn"]) for name in self.shapes}
        for name, (loc, scale) in parts.items():
            if not (_close(loc[0], loc[1]) and _close(scale[0], scale[1])):
                raise ModelError(f"site {name} of the guide depends on other sites, {UNKNOWN_FAMILY}")
        if all(loc.shape == scale.shape for loc, scale in parts.values()):
            number = len(self.rows)
            loc, scale = (torch.cat([part[i][0].reshape(number, -1) for part in parts.values()], -1) for i in range(2))
            return dist.Normal(loc, scale).to_event(1)
        if len(parts) > 1:
            raise ModelError(f"the guide has several sites, one of them multivariate normal, {UNKNOWN_FAMILY}")
        (loc, scale_tril), *_ = parts.values()
        return dist.MultivariateNormal(loc[0], scale_tril=scale_tril[0])

    @torch.no_grad()
    def sample(self, shape: tuple[int, ...] = ()) -> Tensor:
        """Draw latents of shape ``(*shape, datum, latent)``."""
        trace = self._run(self.program, shape)
        return self._join({name: trace.nodes[name]["value"] for name in self.shapes}, shape)

    def log_prob(self, z: Tensor) -> Tensor:
        """Compute log q(z|x) at draws of shape ``(*shape, datum, latent)``, in nats, shape ``(*shape, datum)``."""
        return self._sum(self.program, z, latents_only=True)

    def log_joint(self, z: Tensor) -> Tensor:
        """Compute log p(x, z) at draws of shape ``(*shape, datum, latent)``, in nats, shape ``(*shape, datum)``."""
        return self._sum(self.pair.model, z)

    def likelihood(self, z: Tensor) -> Distribution:
        """Return p(x|z), the distribution of the site observed as x, at latents ``(*shape, datum, latent)``.

        Raises:
            ModelError: if no site, or more than one, observes x, or its events have another shape than the rows.
        """
        trace = self._run(poutine.condition(self.pair.model, data=self._split(z)), tuple(z.shape[:-2]))
        name, site = _observed({name: s for name, s in samples(trace) if name not in self.shapes}, self.rows.x)
        likelihood, row = site["fn"], self.rows.x.shape[1:]
        validate_unmasked(name, site)
        if likelihood.event_shape != row:
            raise ModelError(
                f"site {name} describes data of shape {tuple(likelihood.event_shape)}, a row of the data has shape "
                f"{tuple(row)}; make them equal (to_event)"
            )
        return likelihood

    @property
    def program(self) -> Program:
        """The Pyro program that defines this distribution."""
        return self.pair.guide

    def _run_once(self, program: Program) -> Trace:
        """Run a program with one particle, and restore the state of the random number generators."""
        with torch.no_grad(), seeded(0, self.rows.x.device):
            return self._run(program, (1,))

    def _run(self, program: Program, shape: tuple[int, ...]) -> Trace:
        """Trace a program in plates of this shape, to the left of the plate over data."""
        for i, size in enumerate(reversed(shape)):
            program = pyro.plate(f"{PARTICLES}{i or ''}", size, dim=-2 - i)(program)
        try:
            return poutine.trace(program).get_trace(*self.rows.arguments())
        except ValueError as error:
            if "collide at dim" in str(error):
                raise ModelError(
                    "a site lies in a second plate inside the plate over data; replace that plate by a dimension of "
                    "the event (to_event)"
                ) from error
            raise

    def _join(self, values: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        lead = (*shape, len(self.rows))
        parts = [values[name].expand(*lead, *event).reshape(*lead, -1) for name, event in self.shapes.items()]
        z = torch.cat(parts, -1)
        return z if z.is_floating_point() else z.to(self.rows.x.dtype)

    def _split(self, z: Tensor) -> dict[str, Tensor]:
        parts = z.split([shape.numel() for shape in self.shapes.values()], -1)
        values = {}
        for part, (name, shape) in zip(parts, self.shapes.items(), strict=True):
            dtype = self.sites[name]["value"].dtype
            value = part.reshape(*z.shape[:-1], *shape)
            values[name] = value if dtype.is_floating_point else value.to(dtype)
        return values

    def _sum(self, program: Program, z: Tensor, *, latents_only: bool = False) -> Tensor:
        trace = self._run(poutine.condition(program, data=self._split(z)), tuple(z.shape[:-2]))
        sites = dict(samples(trace))
        if others := [name for name, site in sites.items() if name not in self.shapes and not site["is_observed"]]:
            raise ModelError(f"the guide samples site {others[0]}, which the model lacks; q(z|x) has no known density")
        scored = {name: site for name, site in sites.items() if name in self.shapes or not latents_only}
        terms = [_log_prob(name, site) for name, site in scored.items()]
        return torch.stack([term.expand(z.shape[:-1]) for term in terms]).sum(0)


class JoinedPrior(JoinedPosterior):
    """p(z) of all sites, joined in the order of :class:`JoinedPosterior`.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> JoinedPrior(pv.Pair(vae.model, vae.guide), Rows(torch.ones(3, 5))).log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    @property
    def program(self) -> Program:
        """The model, run without the draws of the guide."""
        return self.pair.model


@torch.no_grad()
def validate_generative(model: Program, rows: Rows) -> None:
    """Validate that a model can draw data: it observes x in one site, and uses its values nowhere else.

    Args:
        model: a Pyro model; it runs on two rows, with each value 0 and with each value 1 in place of the data.
        rows: data or stand-ins for them, with their context.

    Raises:
        ModelError: if the model fails, observes other data than x, or computes another site from the values of x.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> validate_generative(vae.model, Rows(torch.ones(3, 5)))
    """
    part = rows.take(slice(2))
    zeros, ones = (_draw_from_stand_ins(model, part, value) for value in (0.0, 1.0))
    observed = [name for name, site in zeros.items() if site["infer"].get("was_observed")]
    if len(observed) > 1:
        raise ModelError(
            f"the model observes the sites {', '.join(observed)}, so draws of x would have to be conditioned on the "
            "others; leave out the context that gives their values"
        )
    for name, site in zeros.items():
        if name not in ones or not _close(site["value"], ones[name]["value"]):
            raise ModelError(
                f"the model computes site {name} from the values of x, so it cannot draw x; use x as obs=x only, and "
                "pass other inputs as context"
            )


def _draw_from_stand_ins(model: Program, rows: Rows, value: float) -> dict[str, Site]:
    arguments = Rows(torch.full_like(rows.x, value), rows.context, rows.mask).arguments()
    try:
        with seeded(0, rows.x.device):
            return dict(samples(poutine.trace(poutine.uncondition(model)).get_trace(*arguments)))
    except PyroVAEError:
        raise
    except Exception as error:  # user code may raise anything
        raise ModelError(f"the model fails on rows without data ({in_a_line(error)})") from error


def _close(one: Tensor, other: Tensor) -> bool:
    same = one.shape == other.shape
    return same and torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-6, equal_nan=True)


def _observed(observed: dict[str, Site], x: Tensor) -> tuple[str, Site]:
    """Return the site that observes x: the only observed one, or the one with its values."""
    if len(observed) > 1:
        observed = {name: site for name, site in observed.items() if _is_x(site["value"], x)}
    if len(observed) != 1:
        raise ModelError(
            f"{'no site' if not observed else f'each of the sites {sorted(observed)}'} of the model observes x, so "
            "p(x|z) is not the distribution of one site; observe all of x in one site (obs=x)"
        )
    return next(iter(observed.items()))


def _is_x(value: Tensor, x: Tensor) -> bool:
    return value.shape == x.shape and bool((value == x).all())


def _normal_of(name: str, d: Any) -> tuple[Tensor, Tensor]:
    """Return the mean and the scale or Cholesky factor of a normal distribution."""
    while isinstance(d, torch.distributions.Independent):
        d = d.base_dist
    if isinstance(d, torch.distributions.Normal):
        return d.loc, d.scale
    if isinstance(d, torch.distributions.MultivariateNormal):
        return d.loc, d.scale_tril
    raise ModelError(f"site {name} of the guide is a {type(d).__name__} and not normal, {UNKNOWN_FAMILY}")


def _log_prob(name: str, site: Site) -> Tensor:
    """Compute the log density of a site's value; handlers that would change it are refused."""
    validate_unmasked(name, site)
    scale = site["scale"]
    if not (scale == 1 if isinstance(scale, float | int) else bool((scale == 1).all())):
        raise ModelError(f"site {name} is scaled by a handler (poutine.scale), so its density is unknown; remove it")
    density: Tensor = site["fn"].log_prob(site["value"])
    return density


def _event_shape(name: str, site: Site, plates: set[str]) -> torch.Size:
    """Return the event shape of a site, which must lie in a plate of the observed sites."""
    frames = {frame.name for frame in data_frames(site)}
    if not (frames & plates if plates else frames):
        raise ModelError(
            f"site {name} lies in no plate over data; condition the pair on a draw of this site (pair.condition)"
        )
    return torch.Size(site["value"].shape[2:])
