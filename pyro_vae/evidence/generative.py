"""Whether two VAEs are one generative model, with guides of their own."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr
from torch import nn

from pyro_vae.core.format import format_estimate
from pyro_vae.core.pair import Amortised
from pyro_vae.core.vae import VAE
from pyro_vae.data.repeats import clustered_error


def generative_hash(vae: VAE) -> str:
    """One hash of prior and decoder: their structure and their weights, whatever the precision or the encoder.

    Equal hashes mean equal p(x, z), and so equal log p(x). A prior that uses the encoder, as
    :class:`~pyro_vae.priors.VampPrior` does, is hashed with it.

    Args:
        vae: a VAE.

    Example:
        >>> import torch, pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.37)
        >>> generative_hash(linear.as_vae()) == generative_hash(linear.as_vae(diagonal=True).double())
        True
    """
    parts: list[nn.Module] = [vae.model]
    if callable(getattr(vae.prior, "bind", None)):
        parts.append(vae.guide)
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(f"{part!r} {[_settings(module) for module in part.modules()]}".encode())
        for name, value in part.state_dict().items():
            digest.update(f"{name} {tuple(value.shape)}".encode())
            number = value.cpu()
            digest.update((number.float() if number.is_floating_point() else number).contiguous().numpy().tobytes())
    return digest.hexdigest()


def generative_attribute(vae: Amortised) -> dict[str, str]:
    """The attribute of a dataset that tells the generative model; of a Pair, whose program may be any, none.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.37).as_vae()
        >>> list(generative_attribute(vae)), generative_attribute(pv.Pair(vae.model, vae.guide))
        (['generative'], {})
    """
    return {"generative": generative_hash(vae)} if isinstance(vae, VAE) else {}


def _settings(module: nn.Module) -> list[tuple[str, object]]:
    """What a module holds beside tensors, which its ``repr`` may leave out."""
    plain = (bool, int, float, str, tuple)
    return [
        (name, value)
        for name, value in vars(module).items()
        if name != "training" and not name.startswith("_") and isinstance(value, plain)
    ]


@dataclass(frozen=True)
class Guides:
    """Two estimates of the evidence of one generative model, as by two guides.

    Args:
        best: the name of the higher one.
        other: the name of the lower one.
        difference: of their sums over data, in nats; its truth is 0.
        error: its standard error over data.

    Example:
        >>> print(Guides("a", "b", -23.21, 1.52))
        b and a are one generative model: their difference, -23.2 ± 1.5 nats (over data), comes from their guides
    """

    best: str
    other: str
    difference: float
    error: float

    def __str__(self) -> str:
        return (
            f"{self.other} and {self.best} are one generative model: their difference, "
            f"{format_estimate(self.difference, self.error, 'nats', over='data')}, comes from their guides"
        )


def guides_of_one_model(found: Mapping[str, xr.Dataset], number: np.ndarray) -> list[Guides]:
    """Pair each entry with the best one that has the same prior and decoder.

    Args:
        found: name → from :func:`pyro_vae.log_evidence`, of the same data.
        number: the distinct row of each datum, from :func:`pyro_vae.data.repeats.distinct_rows`.

    Example:
        >>> own = xr.Dataset({"log_evidence": ("datum", [1.0, 2.0])}, attrs={"generative": "a"})
        >>> [pair.difference for pair in guides_of_one_model({"a": own, "b": own.drop_attrs()}, np.arange(2))]
        []
        >>> other = (own - 1).assign_attrs(own.attrs)
        >>> [pair.difference for pair in guides_of_one_model({"a": own, "b": other}, np.arange(2))]
        [-2.0]
    """
    alike = dict[str, list[str]]()
    for name, one in found.items():
        if "generative" in one.attrs:
            alike.setdefault(str(one.attrs["generative"]), []).append(name)
    pairs = []
    for names in alike.values():
        best, *others = sorted(names, key=lambda name: -float(found[name].log_evidence.sum()))
        for other in others:
            apart = (found[other].log_evidence - found[best].log_evidence).values.astype(float)
            pairs.append(Guides(best, other, float(apart.sum()), len(apart) * float(clustered_error(apart, number))))
    return pairs
