"""What several tests need: a z-score, small VAEs, and losses and gradients at a given seed."""

import math
from collections.abc import Iterable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch import Tensor

import pyro_vae as pv


def mostly_slow(rows: Iterable[Any], ordinary: int = 3) -> list[Any]:
    """Each row as a parameter, each so-manieth in the ordinary run and the others slow."""
    return [
        pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=() if i % ordinary == 0 else pytest.mark.slow)
        for i, row in enumerate(rows)
    ]


def z_score(samples: Tensor, truth: float | Tensor) -> float:
    """How many standard errors the mean of independent samples lies from the truth."""
    return ((samples.mean() - truth) / (samples.std() / math.sqrt(len(samples)))).item()


def small_vae(features: int = 6, latents: int = 3, *, seed: int = 0, **likelihood) -> pv.VAE:
    """The note's VAE, in double precision."""
    torch.manual_seed(seed)
    likelihood = {"scale": 0.7, **likelihood}
    return pv.VAE(
        prior=pv.priors.StandardNormal(latents),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(latents, [8], features), **likelihood),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(features, [8], 2 * latents)),
    ).double()


def linear_gaussian(features: int = 5, latents: int = 2, *, scale: float = 0.8) -> pv.exact.LinearGaussian:
    """An oracle whose posterior is correlated, so that no diagonal normal is exact."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(features, latents, generator=generator, dtype=torch.float64)
    bias = torch.randn(features, generator=generator, dtype=torch.float64)
    return pv.exact.LinearGaussian(weight, bias, scale)


def loss_and_gradients(loss, vae: pv.VAE, x: Tensor, size: int | None = None, *, seed: int = 1):
    """The differentiable loss and its gradient by every parameter, with the noise of a seed."""
    torch.manual_seed(seed)
    value = getattr(loss, "differentiable_loss", loss)(vae.model, vae.guide, x, size)
    parameters = dict(vae.named_parameters())
    gradients = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True)
    return value.detach(), dict(zip(parameters, gradients, strict=True))


def normal_log_density(x: Tensor, mean: Tensor, scale: Tensor | float) -> Tensor:
    """log N(x | mean, diag(scale²)), summed over the last dimension: written out, as in the note."""
    scale = torch.as_tensor(scale, dtype=x.dtype).expand_as(x + mean)
    return (-0.5 * ((x - mean) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def untimed(table: xr.Dataset) -> xr.Dataset:
    """A comparison without what depends on the clock."""
    timed = ["seconds", "seconds_se", "variance_seconds", "efficiency", "efficiency_se", "speedup", "speedup_se"]
    return table.drop_vars([*timed, "seed_efficiency", "seed_efficiency_se"], errors="ignore")


def beta_on_the_model(vae, beta):
    """What a user writes who scales only the model's latent site."""

    def model(x, size=None):
        with pyro.plate("data", len(x), subsample=x):
            with pyro.poutine.scale(scale=beta):
                z = pyro.sample("z", vae.prior())
            pyro.sample("x", vae.decoder(z), obs=x)

    return model


class StudentPrior(pv.priors.StandardNormal):
    def forward(self):
        return dist.StudentT(5.0, self.loc, self.scale).to_event(1)
