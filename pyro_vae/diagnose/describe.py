"""Describe the components of a VAE, and how their KL is computed."""

from typing import Any

import torch
import xarray as xr
from rich.table import Table
from torch import Tensor, nn

from pyro_vae.core.compatibility import called, drawn
from pyro_vae.core.component import Distribution, evaluating
from pyro_vae.core.device import seeded
from pyro_vae.core.format import Console
from pyro_vae.core.vae import VAE
from pyro_vae.data.values import as_tensor
from pyro_vae.elbo.kl import family, kl_provenance


@torch.no_grad()
def describe(vae: VAE, *, context: Any = None, console: Console | None = None) -> xr.Dataset:
    """Print and return a table of the components, and how their KL is computed.

    .. math:: KL(q(z|x) \\,\\|\\, p(z)) \\text{ in closed form, or } \\log q(z|x) - \\log p(z) \\text{ of a sample}

    The KL is looked up in the registry that Pyro and torch use.

    Args:
        vae: a VAE.
        context: one or more rows of the context of a conditional VAE, shape ``(datum, c)``.
        console: the console to print to; by default standard output.

    Returns:
        A dataset over ``part`` (prior, decoder, encoder) of ``class``, ``distribution``, ``event_shape``,
        ``parameters`` and, as an attribute, ``kl``: "analytic" or "Monte Carlo".

    Raises:
        DataError: if the context is not a table of finite numbers.
        ModelError: if the components do not fit each other or the context.

    Example:
        >>> import io, pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> vae = pv.VAE(
        ...     prior=pv.priors.StandardNormal(2),
        ...     decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [8], 5)),
        ...     encoder=pv.posteriors.DiagNormal(pv.nn.mlp(5, [8], 4)),
        ... )
        >>> describe(vae, console=Console(file=io.StringIO())).attrs["kl"]
        'analytic'
    """
    given = () if context is None else (vae.like(as_tensor(context, source="context")[:1]),)
    with seeded(0, vae.like(torch.zeros(())).device), evaluating(vae, 1):
        prior, likelihood, x = _sample(vae, *given)
        vae.check(x, *given)
        posterior = vae.encoder(x, *given)
        kl = ", ".join(sorted(set(kl_provenance(vae.model, vae.guide, x, None, *given).values())))
    shown = {"prior": (vae.prior, prior), "decoder": (vae.decoder, likelihood), "encoder": (vae.encoder, posterior)}
    table = _dataset(shown).assign_attrs(kl=kl)
    (console or Console()).print(_table(table))
    return table


def _sample(vae: VAE, *given: Tensor) -> tuple[Distribution, Distribution, Tensor]:
    """Return the prior, the likelihood at one draw of z, and one draw of x."""
    prior = called("prior", vae.prior, *given)
    z = drawn("prior", prior, () if prior.batch_shape else (1,))
    likelihood = called("decoder", vae.decoder, z, *given)
    return prior, likelihood, drawn("decoder", likelihood)


def _dataset(shown: dict[str, tuple[nn.Module, Distribution]]) -> xr.Dataset:
    columns = {
        "class": [type(part).__name__ for part, _ in shown.values()],
        "distribution": [family(d) for _, d in shown.values()],
        "event_shape": [" × ".join(map(str, d.event_shape)) for _, d in shown.values()],
        "parameters": [sum(p.numel() for p in part.parameters()) for part, _ in shown.values()],
    }
    return xr.Dataset({name: ("part", values) for name, values in columns.items()}, {"part": list(shown)})


def _table(described: xr.Dataset) -> Table:
    table = Table("part", *(str(name).replace("_", " ") for name in described.data_vars))
    for part in described.part.values:
        row = described.sel(part=part)
        table.add_row(str(part), *(str(row[name].item()) for name in described.data_vars))
    table.caption = f"KL(q(z|x) ‖ p(z)): {described.attrs['kl']}"
    return table
