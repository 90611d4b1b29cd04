"""Generative models and their guides, written out: the densities of K draws for each of n data, in plain torch.

Each function takes parameters by name, the data and the latents that a guide drew, and returns a :class:`Model`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
Latents = tuple[Tensor, ...]


@dataclass(frozen=True)
class Model:
    """The densities of a model and a guide, each a function of its own parameters and of the latents, shape (K, n).

    ``draw`` gives the latents as functions of φ at fixed noise; ``kl`` the KL in closed form, of each latent in the
    last dimension and site by site; ``encoded`` the location and scale of q; ``scale`` is n/m.
    """

    theta: Parameters
    phi: Parameters
    draw: Callable[[Parameters], Latents]
    likelihood: Callable[[Parameters, Latents], Tensor]
    prior: Callable[[Parameters, Latents], Tensor]
    posterior: Callable[[Parameters, Latents], Tensor]
    kl: Callable[[Parameters, Parameters, Latents], tuple[Tensor, ...]]
    encoded: Callable[[Parameters], tuple[Tensor, Tensor]] | None = None
    squares: Callable[[Parameters, Latents], Tensor] | None = None
    scale: float = 1.0
    beta: float = 1.0

    @property
    def z(self) -> Latents:
        return self.draw(self.phi)

    def joint(self, z: Latents) -> Tensor:
        return self.likelihood(self.theta, z) + self.beta * self.prior(self.theta, z)

    def log_w(self, z: Latents, phi: Parameters) -> Tensor:
        return self.joint(z) - self.beta * self.posterior(phi, z)


def frozen(parameters: Parameters) -> Parameters:
    return {name: value.detach() for name, value in parameters.items()}


def normal(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """log N(x | loc, scale²) of each number."""
    return -0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def kl_of_normals(loc: Tensor, scale: Tensor, prior_loc: Tensor, prior_scale: Tensor) -> Tensor:
    """KL(N(loc, scale²) ‖ N(prior_loc, prior_scale²)) of each number."""
    return (prior_scale / scale).log() + (scale**2 + (loc - prior_loc) ** 2) / (2 * prior_scale**2) - 0.5


def redrawn(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """A draw as a function of location and scale, its noise fixed."""
    return loc + scale * ((z - loc) / scale).detach()


def perceptron(p: Parameters, name: str, given: Tensor) -> Tensor:
    hidden = (given @ p[f"{name}.0.weight"].T + p[f"{name}.0.bias"]).tanh()
    return hidden @ p[f"{name}.2.weight"].T + p[f"{name}.2.bias"]


def beside(given: Tensor, context: Tensor | None) -> Tensor:
    if context is None:
        return given
    return torch.cat([given, context.expand(*given.shape[:-1], -1)], -1)


def vae(theta, phi, x, drawn, *, scale=1.0, context=None, mask=None) -> Model:
    """p(z) N(x | f(z, c), s²), q = N(μ(x, c), σ(x, c)²), without the features whose mask is false.

    The prior is N(0, I), or learned, or of the context, or the mean of q at pseudo-inputs, whose gradient by φ counts.
    """
    seen = torch.ones_like(x) if mask is None else mask.to(x)
    x = torch.where(seen > 0, x, torch.zeros_like(x))

    def encoded(phi, x=x, context=context):
        loc, log_scale = perceptron(phi, "encoder.net", beside(x, context)).chunk(2, -1)
        return loc, log_scale.exp()

    def log_prior(theta, z):
        if "prior.pseudo_inputs" not in theta:
            return normal(z[0], *believed(theta)).sum(-1)
        of_each = [normal(z[0], *encoded(phi, u.expand_as(x))).sum(-1).exp() for u in theta["prior.pseudo_inputs"]]
        return (sum(of_each) / len(of_each)).log()

    def believed(theta):
        if "prior.net.0.weight" in theta:
            loc, log_scale = perceptron(theta, "prior.net", context).chunk(2, -1)
        else:
            zero = x.new_zeros(drawn[0].shape[-1])
            loc, log_scale = theta.get("prior.loc", zero), theta.get("prior.log_scale", zero)
        return loc, log_scale.exp()

    def decoded(theta, z):
        return perceptron(theta, "decoder.net", beside(z[0], context))

    return Model(
        theta=theta,
        phi=phi,
        draw=lambda phi: (redrawn(drawn[0], *encoded(phi)),),
        likelihood=lambda t, z: (seen * normal(x, decoded(t, z), t["decoder.log_scale"].exp())).sum(-1),
        prior=log_prior,
        posterior=lambda phi, z: normal(z[0], *encoded(phi)).sum(-1),
        kl=lambda t, phi, z: (kl_of_normals(*encoded(phi), *believed(t)),),
        encoded=encoded,
        squares=lambda t, z: ((x - decoded(t, z)) ** 2).sum(-1),
        scale=scale,
    )


def hierarchy(theta, phi, x, drawn, *, scale=1.0) -> Model:
    """z₁ ~ N(m, s²), z₂ ~ N(a z₁, ½²), x ~ N(W z₂, .6²); q(z₁ | x), then q(z₂ | z₁, x)."""

    def first(phi):
        return x @ phi["first"].T, (0.3 * x @ phi["spread"].T).exp()

    def second(phi, z1):
        return z1 @ phi["second"].T + x @ phi["skip"].T, phi["log_scale"].exp() + 0 * z1

    def draw(phi):
        z1 = redrawn(drawn[0], *first(phi))
        return z1, redrawn(drawn[1], *second(phi, z1))

    def priors(t, z):
        return (t["loc"], t["log_scale"].exp()), (t["a"] * z[0], torch.full_like(z[0], 0.5))

    def kl(t, phi, z):
        one, two = priors(t, z)
        return kl_of_normals(*first(phi), *one), kl_of_normals(*second(phi, z[0]), *two)

    return Model(
        theta=theta,
        phi=phi,
        draw=draw,
        likelihood=lambda t, z: normal(x, z[1] @ t["weight"].T, torch.full_like(x, 0.6)).sum(-1),
        prior=lambda t, z: sum(normal(value, *p).sum(-1) for value, p in zip(z, priors(t, z), strict=True)),
        posterior=lambda phi, z: (normal(z[0], *first(phi)) + normal(z[1], *second(phi, z[0]))).sum(-1),
        kl=kl,
        scale=scale,
    )


def inner_plates(theta, phi, x, drawn, *, scale=1.0) -> Model:
    """Two scalar latents z_ij ~ N(m, s²) of each datum, three numbers x_il ~ N(a_l (z_i1 + 2 z_i2), s_x²)."""

    def encoded(phi):
        return x @ phi["loc"].T, phi["log_scale"].exp() + torch.zeros(len(x), 2).to(x)

    def decoded(t, z):
        return t["weight"] * (z[0][..., :1] + 2 * z[0][..., 1:])

    return Model(
        theta=theta,
        phi=phi,
        draw=lambda phi: (redrawn(drawn[0], *encoded(phi)),),
        likelihood=lambda t, z: normal(x, decoded(t, z), t["log_scale"].exp()).sum(-1),
        prior=lambda t, z: normal(z[0], t["prior_loc"], t["prior_log_scale"].exp()).sum(-1),
        posterior=lambda phi, z: normal(z[0], *encoded(phi)).sum(-1),
        kl=lambda t, phi, z: (kl_of_normals(*encoded(phi), t["prior_loc"], t["prior_log_scale"].exp()),),
        scale=scale,
    )
