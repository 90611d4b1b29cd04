"""Detection of models that share one generative model and differ in their guides only."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr
from torch import nn

from pyro_vae.core.format import format_estimate
from pyro_vae.core.pair import Amortized
from pyro_vae.core.vae import VAE
from pyro_vae.data.repeats import clustered_error


def generative_hash(vae: VAE) -> str:
    """Hash the structure and weights of prior and decoder, independent of dtype and encoder.

    Equal hashes mean equal p(x, z), hence equal log p(x). If the prior uses the encoder, as
    :class:`~pyro_vae.priors.VampPrior` does, the hash includes the encoder.

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


def generative_attribute(vae: Amortized) -> dict[str, str]:
    """Return the dataset attribute with the hash of the generative model; empty for a Pair, which has no hash.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.37).as_vae()
        >>> list(generative_attribute(vae)), generative_attribute(pv.Pair(vae.model, vae.guide))
        (['generative'], {})
    """
    return {"generative": generative_hash(vae)} if isinstance(vae, VAE) else {}


def _settings(module: nn.Module) -> list[tuple[str, object]]:
    """The plain attributes of a module, which its ``repr`` may omit."""
    plain = (bool, int, float, str, tuple)
    return [
        (name, value)
        for name, value in vars(module).items()
        if name != "training" and not name.startswith("_") and isinstance(value, plain)
    ]


@dataclass(frozen=True)
class Guides:
    """Two estimates of the evidence of one generative model, from two guides.

    Args:
        best: the name of the model with the higher estimate.
        other: the name of the model with the lower estimate.
        difference: the difference between the sums over data, in nats; the true difference is 0.
        error: the standard error of the difference over data.

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
    """Pair each estimate with the best estimate of the same prior and decoder.

    Args:
        found: the results of :func:`pyro_vae.log_evidence` for the same data, by model name.
        number: the distinct row of each datum, from :func:`pyro_vae.data.repeats.distinct_rows`.

    Example:
        >>> first = xr.Dataset({"log_evidence": ("datum", [1.0, 2.0])}, attrs={"generative": "a"})
        >>> [pair.difference for pair in guides_of_one_model({"a": first, "b": first.drop_attrs()}, np.arange(2))]
        []
        >>> second = (first - 1).assign_attrs(first.attrs)
        >>> [pair.difference for pair in guides_of_one_model({"a": first, "b": second}, np.arange(2))]
        [-2.0]
    """
    groups = dict[str, list[str]]()
    for name, evidence in found.items():
        if "generative" in evidence.attrs:
            groups.setdefault(str(evidence.attrs["generative"]), []).append(name)
    pairs = []
    for names in groups.values():
        best, *others = sorted(names, key=lambda name: -float(found[name].log_evidence.sum()))
        for other in others:
            by_datum = (found[other].log_evidence - found[best].log_evidence).values.astype(float)
            error = len(by_datum) * float(clustered_error(by_datum, number))
            pairs.append(Guides(best, other, float(by_datum.sum()), error))
    return pairs
