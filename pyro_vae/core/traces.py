"""Traces of a Pyro model and its guide, and the base class and names of ELBO estimators."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from pyro_vae.errors import ModelError

Program = Callable[..., Any]
Site = dict[str, Any]
Loss: TypeAlias = ELBO | Callable[..., Any]


def replayed(program: Program, trace: Trace, *args: Any, **kwargs: Any) -> Trace:
    """Trace a program at the values of another trace, including the subsampling sites of its plates."""
    return poutine.trace(poutine.replay(program, trace=trace)).get_trace(*args, **kwargs)


def traces(model: Program, guide: Program, *args: Any, **kwargs: Any) -> tuple[Trace, Trace]:
    """Return the traces of the model, replayed against the guide, and of the guide; drop the sites of plates."""
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = replayed(model, guide_trace, *args, **kwargs)
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


def samples(trace: Trace) -> Iterator[tuple[str, Site]]:
    """Iterate over the sample sites of a trace by name.

    The subsampling sites of plates are left out, and so are values that ``pyro.deterministic`` records, which Pyro
    treats as observed.
    """
    sites = ((name, site) for name, site in trace.nodes.items() if site["type"] == "sample")
    return ((n, site) for n, site in sites if not (site_is_subsample(site) or site["infer"].get("_deterministic")))


def validate_unmasked(name: str, site: Site) -> None:
    """Raise a ModelError if a handler masks a site, which its density would not show."""
    if site["mask"] is not None:
        raise ModelError(f"site {name} is masked by a handler, which densities ignore; mask its distribution instead")


PARTICLES = "_particles"
"""The name of the plate of particles, to the left of the plate over data; of more than one, a prefix of the names."""


def data_frames(site: Site) -> list[Any]:
    """Return the vectorized plates around a site, except the plate of particles."""
    return [f for f in site["cond_indep_stack"] if f.vectorized and not f.name.startswith(PARTICLES)]


def global_sites(model_trace: Trace, guide_trace: Trace) -> list[str]:
    """Return the sorted names of latent sites outside all plates over data, such as a group mean.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def guide(x):
        ...     return pyro.sample("mean", dist.Normal(0.0, 1.0))
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> global_sites(*traces(model, guide, torch.zeros(3)))
        ['mean']
    """
    sites = [*samples(model_trace), *samples(guide_trace)]
    plates = {frame.name for _, site in sites if site["is_observed"] for frame in data_frames(site)}
    if not plates:
        return []
    latents = ((name, site) for name, site in sites if not site["is_observed"])
    return sorted({name for name, site in latents if not plates & {frame.name for frame in data_frames(site)}})


class TensorELBO(ELBO, ABC):
    """Base class of estimators whose losses are tensors, which avoids synchronizing with a GPU.

    Subclasses implement ``differentiable_loss``.
    """

    @abstractmethod
    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Return minus the bound, summed over data and scaled by n/m; a tensor of shape ``()``."""

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        return traces(model, guide, *args, **kwargs)

    def __repr__(self) -> str:
        return type(self).__name__

    @torch.no_grad()
    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss without a graph; a tensor of shape ``()``."""
        return self.differentiable_loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss and add its gradient to ``.grad`` of each parameter; a tensor of shape ``()``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.detach()


def differentiable(loss: Loss) -> Callable[..., Any]:
    """Return the function of (model, guide, x, size) whose gradient ``SVI(..., loss=loss)`` follows."""
    if not isinstance(loss, ELBO):
        return loss
    if not hasattr(loss, "differentiable_loss"):
        raise ModelError(f"{loss_name(loss)} has no differentiable_loss, so it cannot be compared; leave it out")
    return loss.differentiable_loss


def loss_name(loss: Loss) -> str:
    """Return the name of an estimator for tables and messages."""
    if isinstance(loss, TensorELBO):
        return repr(loss)
    function = loss.func if isinstance(loss, partial) else loss
    return getattr(function, "__name__", type(function).__name__)


def called(loss: Loss) -> str:
    """Return the name of an estimator without its number of particles.

    Example:
        >>> import pyro_vae as pv
        >>> called(pv.elbo.Renyi(8, alpha=0.0)), called(pv.elbo.Trace_ELBO())
        ('Renyi(alpha=0)', 'Trace_ELBO')
    """
    name = getattr(loss, "called", None)
    return name() if callable(name) else loss_name(loss)


def particles_of(loss: Loss) -> int:
    """Return the number of particles of an estimator."""
    settings = loss.keywords if isinstance(loss, partial) else vars(loss) if isinstance(loss, ELBO) else {}
    return int(settings.get("num_particles", 1))
