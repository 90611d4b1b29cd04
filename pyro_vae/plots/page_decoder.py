"""Write a decoder as plain layers and formulas that a web page can run."""

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from pyro_vae import likelihoods
from pyro_vae.errors import ModelError
from pyro_vae.likelihoods import Likelihood
from pyro_vae.nn import StandardizedContext, WithoutContext

Layer: TypeAlias = dict[str, Any]

ELEMENTWISE: dict[type[nn.Module], tuple[str, ...]] = {
    nn.ReLU: (),
    nn.Tanh: (),
    nn.Sigmoid: (),
    nn.SiLU: (),
    nn.Softplus: ("beta", "threshold"),
    nn.LeakyReLU: ("negative_slope",),
    nn.ELU: ("alpha",),
}
"""Activations that ``explorer.js`` has, and their settings that it needs."""

SILENT = (nn.Identity, nn.Dropout)
"""Layers that change nothing in evaluation mode."""

LOCATED = (likelihoods.Normal, likelihoods.StudentT, likelihoods.Laplace, likelihoods.HeteroscedasticNormal)
"""Likelihoods whose mean is the first number that the network gives for a feature."""

PLAIN = (
    likelihoods.Bernoulli, likelihoods.ContinuousBernoulli, likelihoods.Poisson, likelihoods.NegativeBinomial,
)  # fmt: skip
"""Likelihoods whose mean has a formula in ``explorer.js`` without a setting."""


def page_decoder(decoder: nn.Module, features: int) -> dict[str, Any]:
    """Write a decoder as what ``explorer.js`` runs: the layers of its network, the mean of each feature, and its units.

    Args:
        decoder: a likelihood on a network of linear layers, activations and layer normalizations.
        features: how many features a datum has.

    Returns:
        ``layers``, ``heads`` (of consecutive features), and ``center`` and ``unit`` where the VAE standardizes.

    Raises:
        ModelError: if the decoder has a part that the page cannot run, naming it.

    Example:
        >>> decoder = likelihoods.Normal(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)))
        >>> written = page_decoder(decoder, 3)
        >>> [layer["op"] for layer in written["layers"]], written["heads"]
        (['Linear', 'ReLU', 'Linear'], [{'size': 3, 'at': 0, 'mean': 'location'}])
    """
    if not isinstance(decoder, Likelihood):
        raise _unknown(decoder)
    written: dict[str, Any] = {"layers": _layers(decoder.net), "heads": _heads(decoder, features)}
    if decoder.standardize is not None:
        units = decoder.standardize
        written |= {name: _array(getattr(units, name), np.float64) for name in ("center", "unit")}
    return written


def _layers(net: nn.Module) -> list[Layer]:
    kind = type(net)
    if isinstance(net, nn.Sequential):
        return [layer for part in net for layer in _layers(part)]
    if kind in SILENT:
        return []
    if isinstance(net, WithoutContext):
        return [{"op": "First", "count": net.features}, *_layers(net.net)]
    if isinstance(net, StandardizedContext):
        units = {name: _array(getattr(net.standardize, name), np.float64) for name in ("center", "unit")}
        return [{"op": "StandardizeFrom", "first": net.features, **units}, *_layers(net.net)]
    if kind is nn.Linear:
        return [{"op": "Linear", **_weights(net)}]
    if isinstance(net, nn.LayerNorm) and kind is nn.LayerNorm and len(net.normalized_shape) == 1:
        return [{"op": "LayerNorm", "eps": net.eps, **_weights(net)}]
    if kind in ELEMENTWISE:
        return [{"op": kind.__name__, **{name: getattr(net, name) for name in ELEMENTWISE[kind]}}]
    raise _unknown(net)


def _weights(layer: nn.Module) -> dict[str, np.ndarray]:
    """The weight and the bias, as far as the layer has them."""
    return {name: _array(value, np.float32) for name, value in layer.named_parameters()}


def _array(value: torch.Tensor, dtype: Any) -> np.ndarray:
    found: np.ndarray = value.detach().cpu().double().numpy().astype(dtype)
    return found


def _heads(likelihood: Likelihood, features: int) -> list[Layer]:
    """How the mean of each block of features follows from the network's numbers."""
    if type(likelihood) is not likelihoods.Blocks:
        return [{"size": features, "at": 0, **_mean(likelihood)}]
    heads, at = [], 0
    for block, size in zip(likelihood.blocks, likelihood.sizes, strict=True):
        assert isinstance(block, Likelihood)
        heads.append({"size": size, "at": at, **_mean(block)})
        at += size * block.numbers
    return heads


def _mean(likelihood: Likelihood) -> Layer:
    kind = type(likelihood)
    if kind in LOCATED:
        return {"mean": "location"}
    if kind in PLAIN:
        return {"mean": kind.__name__}
    if isinstance(likelihood, likelihoods.Binomial) and kind is likelihoods.Binomial:
        return {"mean": "Binomial", "total_count": likelihood.total_count}
    if isinstance(likelihood, likelihoods.Categorical) and kind is likelihoods.Categorical:
        return {"mean": "Categorical", "levels": likelihood.levels}
    if isinstance(likelihood, likelihoods.ZeroInflated) and kind is likelihoods.ZeroInflated:
        return {"mean": "ZeroInflated", "counts": _mean(likelihood.counts)}
    raise _unknown(likelihood)


def _unknown(part: nn.Module) -> ModelError:
    convolutional = any(isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) for layer in part.modules())
    name = "convolutional network" if convolutional else type(part).__name__
    return ModelError(f"the page cannot run this decoder, as it has a {name}")


def count_bytes(written: Any) -> int:
    """Count the bytes of all arrays inside dicts and lists.

    Example:
        >>> count_bytes({"layers": [{"weight": np.zeros((2, 3), np.float32)}], "heads": []})
        24
    """
    if isinstance(written, np.ndarray):
        return written.nbytes
    parts = written.values() if isinstance(written, dict) else written if isinstance(written, list) else ()
    return sum(map(count_bytes, parts))
