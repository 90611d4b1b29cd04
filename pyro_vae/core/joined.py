"""The posterior and the prior of a pair, with the continuous latents of all sites joined to one vector per datum."""

import math
from typing import TYPE_CHECKING

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.core.compatibility import support_of
from pyro_vae.core.rows import Rows
from pyro_vae.core.traces import PARTICLES, Program, Site, data_frames, samples
from pyro_vae.errors import ModelError

if TYPE_CHECKING:
    from pyro_vae.core.pair import Pair


class JoinedPosterior:
    """q(z|x) of all sites as a distribution of batch shape ``(datum,)`` and event shape ``(latent,)``.

    Args:
        pair: a model and its guide, whose latents are real and lie in one plate over data.
        rows: the data.

    Raises:
        ModelError: if a latent is discrete or bounded, lies outside the plate over data, or lies in a second plate.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> q = JoinedPosterior(pv.Pair(vae.model, vae.guide), Rows(torch.ones(3, 5)))
        >>> z = q.sample((4,))
        >>> z.shape, q.log_prob(z).shape, q.names
        (torch.Size([4, 3, 2]), torch.Size([4, 3]), ['z[0]', 'z[1]'])
    """

    event_dim = 1

    def __init__(self, pair: "Pair", rows: Rows) -> None:
        self.pair, self.rows = pair, rows
        self.batch_shape = torch.Size([len(rows)])
        with torch.no_grad():
            trace = self._run(pair.guide, 1)
        self.shapes = {name: _real_event_shape(name, site) for name, site in samples(trace)}
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

    @torch.no_grad()
    def sample(self, shape: tuple[int, ...] = ()) -> Tensor:
        """Draw latents of shape ``(*shape, datum, latent)``."""
        trace = self._run(self.program, math.prod(shape))
        values = {name: trace.nodes[name]["value"].expand(-1, len(self.rows), *s) for name, s in self.shapes.items()}
        z = torch.cat([value.flatten(2) if value.dim() > 2 else value.unsqueeze(-1) for value in values.values()], -1)
        return z.reshape(*shape, *z.shape[1:])

    def log_prob(self, z: Tensor) -> Tensor:
        """Compute log q(z|x) at draws of shape ``(*shape, datum, latent)``, in nats, shape ``(*shape, datum)``."""
        return self._sum(self.program, z, latents_only=True)

    def log_joint(self, z: Tensor) -> Tensor:
        """Compute log p(x, z) at draws of shape ``(*shape, datum, latent)``, in nats, shape ``(*shape, datum)``."""
        return self._sum(self.pair.model, z)

    @property
    def program(self) -> Program:
        """The Pyro program that defines this distribution."""
        return self.pair.guide

    def _run(self, program: Program, number: int) -> Trace:
        try:
            return poutine.trace(pyro.plate(PARTICLES, number, dim=-2)(program)).get_trace(*self.rows.arguments())
        except ValueError as error:
            if "collide at dim" in str(error):
                raise ModelError(
                    "a site lies in a second plate inside the plate over data; replace that plate by a dimension of "
                    "the event (to_event)"
                ) from error
            raise

    def _sum(self, program: Program, z: Tensor, *, latents_only: bool = False) -> Tensor:
        flat = z.reshape(-1, *z.shape[-2:]) if z.dim() > 2 else z.unsqueeze(0)
        parts = flat.split([shape.numel() for shape in self.shapes.values()], -1)
        values = {
            name: part.unflatten(-1, shape) if shape else part.squeeze(-1)
            for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)
        }
        trace = self._run(poutine.condition(program, data=values), len(flat))
        sites = (site for name, site in samples(trace) if name in self.shapes or not latents_only)
        terms = [site["fn"].log_prob(site["value"]) for site in sites]
        total = torch.stack([term.expand(len(flat), len(self.rows)) for term in terms]).sum(0)
        return total.reshape(z.shape[:-1])


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


def _real_event_shape(name: str, site: Site) -> torch.Size:
    """Return the event shape of a site; raise unless its latents are real and lie in the plate over data."""
    support, frames = support_of(site["fn"]), data_frames(site)
    if not frames:
        raise ModelError(
            f"site {name} lies in no plate over data; condition the pair on a draw of this site (pair.condition)"
        )
    if support is not None and not isinstance(support, type(torch.distributions.constraints.real)):
        kind = "discrete" if support.is_discrete else "bounded"
        raise ModelError(
            f"site {name} has {kind} latents ({type(support).__name__}), but this function needs real "
            "latents; use to_datatree(posterior='psis') for draws, and the methods iw or psis for the evidence"
        )
    return torch.Size(site["value"].shape[2:])
