"""Guides that are exact, and guides broken on purpose, for tests of the diagnostics."""

import math

import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.evidence.exact import LinearGaussian

MASK = torch.tensor([True, True, False, True, False])


class Altered(nn.Module):
    """A guide whose normal answer is made narrower or wider, and moved by a share of its standard deviation."""

    def __init__(self, encoder: nn.Module, *, factor: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.encoder, self.factor, self.bias = encoder, factor, bias

    def forward(self, x, *given):
        q = self.encoder(x, *given)
        covariance = q.covariance_matrix if hasattr(q, "covariance_matrix") else torch.diag_embed(q.variance)
        return dist.MultivariateNormal(q.mean + self.bias * q.stddev, self.factor**2 * covariance)


class Deaf(nn.Module):
    """A guide that answers N(0, I) whatever it is asked."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.latents = latents

    def forward(self, x, *given):
        return dist.Normal(x.new_zeros(len(x), self.latents), 1.0).to_event(1)


class OfWhatWasSeen(nn.Module):
    """The exact posterior of a linear-Gaussian model given the features of MASK alone."""

    def __init__(self, model: LinearGaussian) -> None:
        super().__init__()
        self.own = LinearGaussian(model.weight[MASK], model.bias[MASK], model.scale).as_vae().encoder

    def forward(self, x):
        return self.own(x[..., MASK])


def correlated(rho: float) -> LinearGaussian:
    """A model whose posterior is a bivariate normal of correlation -ρ: precision 4 and 4ρ."""
    square = torch.tensor([[3.0, 4 * rho], [4 * rho, 3.0]]).double()
    return LinearGaussian(torch.linalg.cholesky(square).T.contiguous(), torch.zeros(2).double(), 1.0)


def altered(model: LinearGaussian, **how: float) -> pv.VAE:
    vae = model.as_vae()
    vae.encoder = Altered(vae.encoder, **how)
    return vae


def off_centre(model: LinearGaussian, shift: float, factor: float) -> pv.VAE:
    """The best diagonal guide, its means moved by so many of its sds and its sds multiplied."""
    vae = model.as_vae(diagonal=True)
    means, log_sds = vae.encoder.net.bias.detach().chunk(2)
    means += shift * log_sds.exp()
    log_sds += math.log(factor)
    return vae


def deaf(model: LinearGaussian) -> pv.VAE:
    vae = model.as_vae()
    vae.encoder = Deaf(model.weight.shape[1])
    return vae


class ContextPrior(nn.Module):
    """N(c₁, 1), of one latent."""

    def forward(self, context):
        return dist.Normal(context[..., :1], 1.0).to_event(1)


class ContextPosterior(nn.Module):
    """The exact posterior under ContextPrior and x = w z + u·c + noise, or one that leaves the context out."""

    def __init__(self, weight, of_context, scale: float, heard: bool) -> None:
        super().__init__()
        self.weight, self.of_context, self.scale, self.heard = weight, of_context, scale, heard

    def forward(self, x, context):
        context = context if self.heard else torch.zeros_like(context)
        precision = 1 + (self.weight**2).sum() / self.scale**2
        rest = x - context @ self.of_context.T
        mean = (rest @ self.weight / self.scale**2 + context[..., 0]) / precision
        return dist.Normal(mean.unsqueeze(-1), precision.rsqrt()).to_event(1)


def conditional(*, heard: bool = True) -> pv.VAE:
    """A conditional VAE of 4 features, one latent and a context of two; its guide is exact if it hears the context."""
    generator = torch.Generator().manual_seed(5)
    weight, of_context = (torch.randn(4, n, generator=generator).double() for n in (1, 2))
    net = nn.Linear(3, 4, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.cat([weight, of_context], 1))
    return pv.VAE(
        prior=ContextPrior(),
        decoder=pv.likelihoods.Normal(net, scale=0.7).double(),
        encoder=ContextPosterior(weight[:, 0], of_context, float(torch.tensor(0.7)), heard),
    )


def conditional_data(number: int) -> pv.data.Data:
    """Data of that model."""
    vae, context = conditional(), torch.randn(number, 2).double()
    with torch.no_grad():
        x = vae.decoder(vae.prior(context).sample(), context).sample()
    return pv.data.Data(x, context=context)
