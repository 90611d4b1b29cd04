"""Contexts of any part, and predictions in another one, against a linear-Gaussian model with a context."""

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from helpers.checks import linear_gaussian, z_score
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import DataError, ModelError, SettingsError

D, K, C = 5, 2, 3


@dataclass
class InContext:
    """x = W z + b + B c + ε, z ~ N(A c, I): the oracle without a context, and the effects A and B."""

    of_latents: bool = True
    of_features: bool = True
    of_encoder: bool = True

    def __post_init__(self):
        generator = torch.Generator().manual_seed(4)
        a, b = (torch.randn(n, C, generator=generator, dtype=torch.float64) for n in (K, D))
        self.oracle, self.a, self.b = linear_gaussian(D, K), self.of_latents * a, self.of_features * b
        self.to_mean = torch.linalg.solve(self.oracle.precision, self.oracle.weight.T / self.oracle.scale**2)

    def centered(self, x: Tensor, c: Tensor) -> Tensor:
        """The data whose latents, less A c, and noise are those of the oracle."""
        return x - c @ (self.b + self.oracle.weight @ self.a).T

    def posterior_mean(self, x: Tensor, c: Tensor) -> Tensor:
        return c @ self.a.T + self.oracle.posterior(self.centered(x, c)).mean

    def sample(self, c: Tensor) -> Tensor:
        return self.oracle.sample(len(c)) + c @ (self.b + self.oracle.weight @ self.a).T

    def vae(self) -> pv.VAE:
        """Linear networks; the encoder's is that of the exact posterior, as far as it sees the context."""
        w, m = self.oracle.weight, self.to_mean
        decoder = _linear(torch.cat([w, self.b], 1), self.oracle.bias)
        factor = torch.linalg.cholesky(torch.linalg.inv(self.oracle.precision))
        of_x = torch.cat([m, torch.zeros(3, D).double()])
        of_c = torch.cat([self.a - m @ (self.b + w @ self.a), torch.zeros(3, C).double()])
        constants = torch.cat([-m @ self.oracle.bias, factor.diagonal().log(), factor[1:, :1].flatten()])
        encoder = _linear(torch.cat([of_x, of_c], 1), constants)
        net_of_prior = _linear(torch.cat([self.a, torch.zeros(K, C).double()]), torch.zeros(2 * K).double())
        without = pv.nn.WithoutContext
        return pv.VAE(
            prior=pv.priors.ContextNormal(net_of_prior) if self.of_latents else pv.priors.StandardNormal(K).double(),
            decoder=pv.likelihoods.Normal(
                decoder if self.of_features else without(_linear(w, self.oracle.bias), K), self.oracle.scale.item()
            ),
            encoder=pv.posteriors.FullNormal(encoder if self.of_encoder else without(_linear(of_x, constants), D)),
        ).double()


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    net = nn.Linear(*reversed(weight.shape)).double()
    net.weight.data, net.bias.data = weight.clone(), bias.clone()
    return net


def contexts(n: int) -> Tensor:
    return torch.randn(n, C, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


SUBSETS = list(itertools.product((False, True), repeat=3))


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: f"prior={s[0]:d} decoder={s[1]:d} encoder={s[2]:d}")
def test_a_context_reaches_any_subset_of_the_parts(subset):
    """The encoder that sees it is exact, and its log-weights are log p(x|c); of the other the ELBO is known."""
    model, c = InContext(*subset), contexts(6)
    vae, x = model.vae(), model.sample(c)
    evidence = model.oracle.log_marginal(model.centered(x, c))
    weights = pv.elbo.log_weights(vae.model, vae.guide, x, None, c, num_particles=3000).detach()
    if subset[2] or not any(subset):
        assert (weights - evidence).abs().max() < 1e-10
        found = pv.log_evidence(vae, pv.data.Data(x, context=c), num_particles=10, progress=False)
        np.testing.assert_allclose(found.log_evidence, evidence, atol=1e-10)
        if any(subset[:2]):
            assert (weights - model.oracle.log_marginal(x)).abs().max() > 0.1, "power"
        return
    q = vae.encoder(x, c)
    moved = dist.MultivariateNormal(q.mean - c @ model.a.T, q.covariance_matrix)
    exact = model.oracle.elbo(model.centered(x, c), moved)
    for i in range(len(x)):
        assert abs(z_score(weights[:, i], exact[i])) < 5
        assert abs(z_score(weights[:, i], evidence[i])) > 5, "power: the ELBO is below the evidence"


@pytest.mark.parametrize("subset", [s for s in SUBSETS if s[2]], ids=lambda s: f"prior={s[0]:d} decoder={s[1]:d}")
def test_a_prediction_is_the_exact_one_in_the_other_context(subset):
    """W E[z|x, c] + b + B c', with the variance W Cov[z|x, c] Wᵀ + s²; encoded in c' it would be another (power)."""
    model, c = InContext(*subset), contexts(20)
    vae, x, other = model.vae(), model.sample(c), torch.tensor([1.0, -2.0, 0.5]).double()
    found = pv.predict(vae, x, own_context=c, context=other, draws=1000)
    weight, bias = model.oracle.weight, model.oracle.bias
    mean = model.posterior_mean(x, c) @ weight.T + bias + other @ model.b.T
    assert (np.abs(found.x - mean.numpy()) < 5 * found.x_mcse).all()
    variance = ((weight @ torch.linalg.inv(model.oracle.precision)) * weight).sum(-1) + model.oracle.scale**2
    np.testing.assert_allclose(found.x_sd.values**2, variance.expand(20, D).numpy(), rtol=0.1)
    if any(subset[:2]):
        wrong = model.posterior_mean(x, other.expand(20, C)) @ weight.T + bias + other @ model.b.T
        assert (np.abs(found.x - wrong.numpy()) > 5 * found.x_mcse).any()


def test_its_draws_are_those_of_a_reconstruction():
    """So that in the own context it is one, and differences of a linear decoder are exact."""
    model, c = InContext(), contexts(20)
    vae, x = model.vae(), model.sample(c)
    own, settings = pv.reconstruct(vae, x, context=c, draws=10), {"draws": 10, "own_context": c}
    assert pv.predict(vae, x, context=c, **settings).identical(own)
    other = c.flip(0) + 1
    moved = pv.predict(vae, x, context=other, **settings)
    np.testing.assert_allclose(moved.x - own.x, ((other - c) @ model.b.T).numpy(), atol=1e-12)
    np.testing.assert_allclose(moved.x_mcse, own.x_mcse, rtol=1e-9)
    by_few = pv.predict(vae, x, context=other, chunk=10 * D * 7, **settings)
    again = pv.reconstruct(vae, x, context=c, draws=10, chunk=10 * D * 7)
    np.testing.assert_allclose(by_few.x - again.x, ((other - c) @ model.b.T).numpy(), atol=1e-12)


def test_a_stream_is_predicted_as_memory_is(tmp_path):
    model, c = InContext(), contexts(30)
    vae, x = model.vae(), model.sample(c)
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "c.npy", c.numpy())
    streamed = pv.data.stream(tmp_path / "x.npy", context=tmp_path / "c.npy")
    settings = {"context": c.flip(0), "draws": 10, "chunk": 10 * D * 7}
    np.testing.assert_allclose(
        pv.predict(vae, streamed, **settings).x, pv.predict(vae, x, own_context=c, **settings).x, rtol=1e-12
    )


def test_named_contexts_are_found_by_name():
    """And rows keep their labels: a table has its own context among its columns."""
    table = pd.DataFrame({"a": np.arange(8.0), "b": np.arange(8.0) ** 2, "batch": ["u", "v"] * 4, "age": range(8)})
    table.index = [f"r{i}" for i in range(8)]
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(2 + 3, [8], 2)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(2 + 3, [8], 4)),
    )
    data = pv.data.load(table, context=["batch", "age"])
    pv.fit(vae, data, epochs=1, progress=False, engine="eager", device="cpu")
    by_name = pv.predict(vae, table, context={"age": [30.0], "batch": ["v"]})
    assert by_name.identical(pv.predict(vae, data, context=[0.0, 1.0, 30.0]))
    assert (by_name.datum.values.tolist(), by_name.feature.values.tolist()) == (list(table.index), ["a", "b"])
    each = pv.predict(vae, table, context=table.assign(batch="u"))
    assert not np.allclose(each.x, by_name.x)
    drawn = pv.sample(vae, 5, context={"age": [30.0], "batch": ["v"]})
    assert drawn.identical(pv.sample(vae, 5, context=[0.0, 1.0, 30.0]))
    along = pv.traverse(vae, 0, context={"age": [30.0], "batch": ["v"]})
    assert along.identical(pv.traverse(vae, 0, context=[0.0, 1.0, 30.0]))
    with pytest.raises(DataError, match="'w'"):
        pv.predict(vae, table, context={"age": [30.0], "batch": ["w"]})
    with pytest.raises(DataError, match="age"):
        pv.predict(vae, table, context={"batch": ["v"]})


def test_what_cannot_be_predicted_is_refused():
    model, c = InContext(), contexts(4)
    vae, x = model.vae(), model.sample(c)
    with pytest.raises(DataError, match=r"context has shape \(2, 3\), for 4 rows; give one row, or 4"):
        pv.predict(vae, x, own_context=c, context=c[:2])
    with pytest.raises(ModelError, match=r"the decoder was given rows of 4 × 2 \+ 1 numbers and was built for 5"):
        pv.predict(vae, x, own_context=c, context=[1.0])
    with pytest.raises(SettingsError, match="context is None; pass the context to predict in"):
        pv.predict(vae, x, own_context=c, context=None)
    with pytest.raises(SettingsError, match="not trained on named context columns; give numbers"):
        pv.predict(vae, x, own_context=c, context={"batch": ["u"]})
    plain = linear_gaussian().as_vae()
    with pytest.raises(SettingsError, match="have no context to be encoded in"):
        pv.predict(plain, x, context=[1.0])
