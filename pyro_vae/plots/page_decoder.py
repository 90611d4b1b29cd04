"""Export a decoder as plain layers and formulas that a web page can run."""

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
"""Activations implemented in ``explorer.js``, with the settings that they need."""

IDENTITIES = (nn.Identity, nn.Dropout)
"""Layers that are the identity in evaluation mode."""

LOCATION = (likelihoods.Normal, likelihoods.StudentT, likelihoods.Laplace, likelihoods.HeteroscedasticNormal)
"""Likelihoods whose mean is the first output of the network for a feature."""

PLAIN = (
    likelihoods.Bernoulli, likelihoods.ContinuousBernoulli, likelihoods.Poisson, likelihoods.NegativeBinomial,
)  # fmt: skip
"""Likelihoods whose mean has a formula without settings in ``explorer.js``."""


def page_decoder(decoder: nn.Module, features: int) -> dict[str, Any]:
    """Export a decoder for ``explorer.js``: the layers of its network and the mean of each feature.

    Args:
        decoder: a likelihood on a network of linear layers, activations and layer normalizations.
        features: number of features of a datum.

    Returns:
        ``layers``; ``heads``, one per block of consecutive features; ``center`` and ``unit`` if the VAE standardizes.

    Raises:
        ModelError: if the page cannot run a part of the decoder; the message names the part.

    Example:
        >>> decoder = likelihoods.Normal(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)))
        >>> exported = page_decoder(decoder, 3)
        >>> [layer["op"] for layer in exported["layers"]], exported["heads"]
        (['Linear', 'ReLU', 'Linear'], [{'size': 3, 'at': 0, 'mean': 'location'}])
    """
    if not isinstance(decoder, Likelihood):
        raise _unsupported(decoder)
    exported: dict[str, Any] = {"layers": _layers(decoder.net), "heads": _heads(decoder, features)}
    if decoder.standardize is not None:
        units = decoder.standardize
        exported |= {name: _array(getattr(units, name), np.float64) for name in ("center", "unit")}
    return exported


def _layers(net: nn.Module) -> list[Layer]:
    kind = type(net)
    if isinstance(net, nn.Sequential):
        return [layer for part in net for layer in _layers(part)]
    if kind in IDENTITIES:
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
    raise _unsupported(net)


def _weights(layer: nn.Module) -> dict[str, np.ndarray]:
    """Return the weight and the bias of a layer, if it has them."""
    return {name: _array(value, np.float32) for name, value in layer.named_parameters()}


def _array(value: torch.Tensor, dtype: Any) -> np.ndarray:
    array: np.ndarray = value.detach().cpu().double().numpy().astype(dtype)
    return array


def _heads(likelihood: Likelihood, features: int) -> list[Layer]:
    """Return the formula of the mean of each block of features, given the outputs of the network."""
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
    if kind in LOCATION:
        return {"mean": "location"}
    if kind in PLAIN:
        return {"mean": kind.__name__}
    if isinstance(likelihood, likelihoods.Binomial) and kind is likelihoods.Binomial:
        return {"mean": "Binomial", "total_count": likelihood.total_count}
    if isinstance(likelihood, likelihoods.Categorical) and kind is likelihoods.Categorical:
        return {"mean": "Categorical", "levels": likelihood.levels}
    if isinstance(likelihood, likelihoods.ZeroInflated) and kind is likelihoods.ZeroInflated:
        return {"mean": "ZeroInflated", "counts": _mean(likelihood.counts)}
    raise _unsupported(likelihood)


def _unsupported(part: nn.Module) -> ModelError:
    convolutional = any(isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) for layer in part.modules())
    name = "convolutional network" if convolutional else type(part).__name__
    return ModelError(f"the page cannot run this decoder, since it contains a {name}")


def count_bytes(exported: Any) -> int:
    """Count the bytes of all arrays inside dicts and lists.

    Example:
        >>> count_bytes({"layers": [{"weight": np.zeros((2, 3), np.float32)}], "heads": []})
        24
    """
    if isinstance(exported, np.ndarray):
        return exported.nbytes
    parts = exported.values() if isinstance(exported, dict) else exported if isinstance(exported, list) else ()
    return sum(map(count_bytes, parts))
