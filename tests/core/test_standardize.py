"""Standardization as a part of the model: the networks see standard units, and densities stay in those of the data."""

import copy
import pickle
import warnings

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from helpers.checks import loss_and_gradients
from helpers.members import FEATURES, LATENTS, LIKELIHOODS, POSTERIORS, make
from sklearn import datasets
from sklearn.datasets import load_wine

import pyro_vae as pv
from pyro_vae.core.standardize import Standardize
from pyro_vae.data import Data, mask_nan, mean_and_sd
from pyro_vae.errors import ConstantColumnsWarning, ModelError, SettingsError

CENTER, UNIT = torch.tensor([3.0, -2e3, 1e6, 0.5, 0.0, -7.0]), torch.tensor([2.0, 1e2, 1e5, 0.01, 1.0, 30.0])
UNITS = Standardize(CENTER.double(), UNIT.double())


def standardizing(decoder, encoder, standardize=UNITS, prior=None):
    prior = pv.priors.StandardNormal(LATENTS) if prior is None else prior
    return pv.VAE(prior=prior, decoder=decoder, encoder=encoder, standardize=standardize).double()


def pair(likelihood="Normal", posterior="DiagNormal"):
    """The same VAE in standard units, and given the data in their own."""
    parts = make(LIKELIHOODS[likelihood]), make(POSTERIORS[posterior])
    inside = pv.VAE(prior=pv.priors.StandardNormal(LATENTS), decoder=parts[0], encoder=parts[1]).double()
    return inside, standardizing(*map(copy.deepcopy, parts))


def of_real_numbers(likelihood):
    """Which of the columns are standardized."""
    if likelihood == "Blocks":
        return torch.tensor([True, True, False, False, False, False])
    return torch.full(
        (FEATURES,), likelihood.split(",")[0] in ("Normal", "HeteroscedasticNormal", "StudentT", "Laplace")
    )


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_likelihood_is_the_density_of_the_data_in_their_own_units(likelihood):
    inside, outside = pair(likelihood)
    z = torch.randn(4, LATENTS).double()
    standard = inside.decoder(z).sample()
    real = of_real_numbers(likelihood)
    x = torch.where(real, CENTER + UNIT * standard, standard)
    exact = inside.decoder(z).log_prob(standard) - UNIT.double().log()[real].sum()
    assert (outside.decoder(z).log_prob(x) - exact).abs().max() < 1e-8
    mean = inside.decoder(z).mean
    assert torch.allclose(outside.decoder(z).mean, torch.where(real, CENTER + UNIT * mean, mean), rtol=1e-12)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_an_encoder_sees_standard_units(posterior):
    inside, outside = pair(posterior=posterior)
    standard, z = torch.randn(4, FEATURES).double(), torch.randn(4, LATENTS).double()
    one, other = inside.encoder(standard), outside.encoder(CENTER + UNIT * standard)
    assert (one.log_prob(z) - other.log_prob(z)).abs().max() < 1e-7


def test_columns_that_are_no_real_numbers_are_given_to_the_encoder_as_they_are():
    _, outside = pair("Blocks")
    assert outside.encoder.standardize.center.tolist() == [3.0, -2e3, 0.0, 0.0, 0.0, 0.0]
    assert outside.encoder.standardize.unit.tolist() == [2.0, 1e2, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "loss", [pv.elbo.Trace_ELBO(), pv.elbo.AnalyticKL(), pv.elbo.DReG(3), pv.elbo.HandDerivedELBO()]
)
def test_an_elbo_and_its_gradient_are_those_of_standardized_data_but_for_the_jacobian(loss):
    inside, outside = pair()
    standard = torch.randn(5, FEATURES).double()
    value, gradient = loss_and_gradients(loss, inside, standard, seed=1)
    other, slope = loss_and_gradients(loss, outside, CENTER + UNIT * standard, seed=1)
    assert abs(other - value - 5 * UNIT.double().log().sum()) < 1e-6
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(gradient.values(), slope.values(), strict=True))


@pytest.mark.parametrize("table", ["wine", "breast_cancer", "diabetes", "iris", "digits"])
def test_held_out_evidence_is_that_of_data_standardized_by_hand_but_for_the_jacobian(table):
    x = torch.tensor(getattr(datasets, f"load_{table}")().data[:300])
    train, held_out = x[::2], x[1::2]
    varies = train.std(0) > 0
    train, held_out = train[:, varies], held_out[:, varies]
    features = train.shape[1]
    units = mean_and_sd(train).double()
    torch.manual_seed(0)
    parts = (
        pv.likelihoods.Normal(pv.nn.mlp(2, [16], features), learn_scale=True),
        pv.posteriors.DiagNormal(pv.nn.mlp(features, [16], 4)),
    )
    by_hand = pv.VAE(prior=pv.priors.StandardNormal(2), decoder=parts[0], encoder=parts[1])
    inside = standardizing(*copy.deepcopy(parts), units, pv.priors.StandardNormal(2))
    by_hand.double()
    for vae, data in ((by_hand, units(train)), (inside, train)):
        pv.fit(vae, data, epochs=20, batch_size=30, seed=1, engine="eager", progress=False)
    one = pv.log_evidence(by_hand, units(held_out), num_particles=50).log_evidence - units.unit.log().sum().item()
    other = pv.log_evidence(inside, held_out, num_particles=50).log_evidence
    assert float(abs(one - other).max()) < 1e-5
    assert float(abs(one).max()) > 1


def test_what_is_missing_is_the_mean_to_the_encoder_and_no_part_of_the_density():
    inside, outside = pair()
    standard = torch.randn(5, FEATURES).double()
    x = (CENTER + UNIT * standard).double()
    mask = torch.rand(5, FEATURES) > 0.4
    one, other = pv.data.rows_of(standard, mask=mask), pv.data.rows_of(x, mask=mask)
    z = outside.posterior(other).sample()
    assert (inside.posterior(one).log_prob(z) - outside.posterior(other).log_prob(z)).abs().max() < 1e-9
    jacobian = (mask * UNIT.double().log()).sum(-1)
    assert (inside.log_joint(z, one) - jacobian - outside.log_joint(z, other)).abs().max() < 1e-8


def test_a_vamp_prior_holds_its_pseudo_inputs_in_standard_units():
    x = (CENTER + UNIT * torch.randn(20, FEATURES)).double()
    x[3:9, 2] = torch.nan
    prior = pv.priors.VampPrior(mask_nan(Data(x)), components=20)
    vae = standardizing(make(LIKELIHOODS["Normal"]), make(POSTERIORS["DiagNormal"]), prior=prior)
    missing = vae.prior.pseudo_inputs[:, 2] == 0
    assert int(missing.sum()) == 6
    assert float(vae.prior.pseudo_inputs.detach().abs().max()) < 5
    given = {tuple(row.tolist()) for row in x.nan_to_num(1e6).round(decimals=6)}
    assert {tuple(row.tolist()) for row in vae.prior.inputs.detach().round(decimals=6)} == given
    z = torch.randn(3, LATENTS).double()
    exact = vae.encoder(vae.prior.inputs).log_prob(z.unsqueeze(1)).logsumexp(1) - np.log(20)
    assert (vae.prior().log_prob(z) - exact).abs().max() < 1e-12
    before = vae.prior.pseudo_inputs.detach().clone()
    vae.encoder = make(POSTERIORS["DiagNormal"])  # bound again, and standardized once
    assert torch.equal(vae.prior.pseudo_inputs, before)


def test_copies_files_and_new_parts_keep_the_units(tmp_path):
    _, vae = pair("Blocks")
    x = vae.decoder(torch.randn(4, LATENTS).double()).sample()
    z = torch.randn(4, LATENTS).double()
    pv.save(vae, tmp_path / "vae.safetensors")
    for other in (pv.load(tmp_path / "vae.safetensors"), copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):  # noqa: S301
        assert torch.equal(other.decoder(z).log_prob(x), vae.decoder(z).log_prob(x))
        assert torch.equal(other.encoder(x).log_prob(z), vae.encoder(x).log_prob(z))
    before, vae.encoder = vae.encoder, make(POSTERIORS["DiagNormal"])
    assert torch.equal(vae.encoder.standardize.center, before.standardize.center)
    vae.decoder = make(LIKELIHOODS["Blocks"])
    assert torch.equal(vae.decoder.standardize.unit, before.standardize.unit)


def test_compiled_training_is_eager_training():
    x = (CENTER + UNIT * torch.randn(60, FEATURES)).float()
    ends = []
    for engine in ("eager", "compiled"):
        _, vae = pair("Normal, learned scale")
        vae.float()
        pv.fit(vae, x, epochs=3, batch_size=20, engine=engine, seed=3, progress=False)
        ends.append(torch.cat([p.flatten() for p in vae.parameters()]))
    assert (ends[0] - ends[1]).abs().max() < 1e-5


def test_the_mean_and_sd_leave_out_what_is_missing():
    x = np.array([[1.0, 10.0], [3.0, np.nan], [5.0, 30.0]])
    units = mean_and_sd(mask_nan(Data(torch.tensor(x))))
    assert units.double().center.tolist() == [3.0, 20.0]
    assert torch.allclose(units.unit, torch.tensor([(8 / 3) ** 0.5, 10.0], dtype=torch.float64), rtol=1e-15)


def test_constant_columns_are_named_and_keep_their_unit():
    frame = pd.DataFrame({"a": [1.0, 2.0], "dull": [0.1 + 0.2, 0.3], "b": [7.0, 7.0]})
    with pytest.warns(ConstantColumnsWarning, match=r"2 of 3 columns have at most one distinct value \('dull', 'b'\)"):
        units = mean_and_sd(frame)
    assert units.unit.tolist() == [0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    "data",
    [
        load_wine().data,
        np.random.default_rng(0).random((200, 3)) * [1, 1e6, 1e-4],
        1e5 * np.random.default_rng(1).normal(size=(200, 2)),
    ],
    ids=["wine", "0…1 beside 1e6", "1e5 randn"],
)
def test_the_standard_model_trains_on_any_scale(data):
    """It beats independent normals on wine, whose columns hang together, and ends at them where columns do not."""
    x = torch.tensor(data, dtype=torch.float32)
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [32], x.shape[1]), learn_scale=True),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(x.shape[1], [32], 4)),
        standardize=mean_and_sd(x),
    )
    fit = pv.fit(
        vae, x, epochs=20, batch_size=20, engine="eager", progress=False, optimizer=lambda p: torch.optim.Adam(p, 1e-2)
    )
    independent = torch.distributions.Normal(x.double().mean(0), x.double().std(0, correction=0))
    baseline = float(independent.log_prob(x.double()).sum(-1).mean())
    gain = float(fit.history.train_elbo[-1]) - baseline
    assert gain > (1.0 if x.shape[1] == 13 else -0.1)


def test_what_cannot_be_standardized_is_refused():
    decoder, encoder = make(LIKELIHOODS["Normal"]), make(POSTERIORS["DiagNormal"])

    class Own(pv.Conditional):
        def forward(self, x):
            return encoder(x)

    with pytest.raises(ModelError, match="the encoder is an Own, which does not support standardization"):
        standardizing(decoder, Own())
    with pytest.raises(
        ModelError, match=r"standardize is a bool; give pyro_vae\.data\.mean_and_sd of the training data"
    ):
        standardizing(decoder, encoder, True)
    with pytest.raises(SettingsError, match="each unit finite and above 0"):
        Standardize(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ModelError, match=r"a row has shape \(4,\), but the standardized columns have shape \(6,\)"):
        standardizing(decoder, encoder).encoder(torch.zeros(3, 4).double())
    with pytest.raises(ModelError, match="the blocks have 6 columns but the data 3"):
        standardizing(make(LIKELIHOODS["Blocks"]), encoder, Standardize(torch.zeros(3), torch.ones(3)))


def test_no_warning_where_nothing_is_constant():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean_and_sd(1e9 + np.arange(6.0).reshape(3, 2))


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_gap_anywhere_is_the_center_also_where_the_parts_are_tried(row):
    """Of a column far from 0, whose gap in units of its spread would be -2000."""
    x = 2020 + torch.randn(20, 2)
    x[row, 0] = torch.nan
    data = mask_nan(Data(x))
    torch.manual_seed(0)
    encoder = pv.posteriors.DiagNormal(torch.nn.Linear(2, 2))
    with torch.no_grad():
        encoder.net.weight.fill_(0.5)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(1), decoder=pv.likelihoods.Normal(torch.nn.Linear(1, 2)), encoder=encoder,
        standardize=mean_and_sd(data),
    )  # fmt: skip
    assert len(pv.data.rows_for(vae, data)) == 20
    pv.fit(vae, data, epochs=1, engine="eager", progress=False)


class SoftLaplace(pv.likelihoods.Likelihood):
    """A law of real numbers that knows neither how it is rescaled nor, of Pyro, its variance."""

    def features(self, out):
        return dist.SoftLaplace(out, torch.ones(()))


class Mixture(pv.likelihoods.Likelihood):
    def features(self, out):
        normals = dist.Normal(torch.stack([out - 1, out + 1], -1), 0.5)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(*out.shape, 2).to(out)), normals)


@pytest.mark.parametrize("own", [SoftLaplace, Mixture])
def test_a_likelihood_of_the_user_s_own_is_standardized_too(own):
    net = torch.nn.Linear(LATENTS, FEATURES)
    inside = pv.VAE(
        prior=pv.priors.StandardNormal(LATENTS), decoder=own(net), encoder=make(POSTERIORS["DiagNormal"])
    ).double()
    outside = standardizing(copy.deepcopy(inside.decoder), make(POSTERIORS["DiagNormal"]))
    z = torch.randn(4, LATENTS).double()
    standard = inside.decoder(z).sample()
    exact = inside.decoder(z).log_prob(standard) - UNIT.double().log().sum()
    assert (outside.decoder(z).log_prob(CENTER + UNIT * standard) - exact).abs().max() < 1e-8
    if own is Mixture:
        of_data, of_standard = outside.decoder(z), inside.decoder(z)
        assert torch.allclose(of_data.mean, CENTER + UNIT * of_standard.mean)
        assert torch.allclose(of_data.variance, UNIT**2 * of_standard.variance)
    pv.fit(outside, CENTER + UNIT * torch.randn(20, FEATURES), epochs=1, engine="eager", progress=False)


def test_units_are_kept_in_double_precision():
    exact = torch.tensor([0.1, 0.7], dtype=torch.float64)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(1), decoder=pv.likelihoods.Normal(torch.nn.Linear(1, 2)),
        encoder=pv.posteriors.DiagNormal(torch.nn.Linear(2, 2)), standardize=Standardize(exact, exact + 1),
    ).double()  # fmt: skip
    for part in (vae.decoder, vae.encoder):
        assert torch.equal(part.standardize.center, exact)
        assert torch.equal(part.standardize.unit, exact + 1)


def test_the_linear_gaussian_oracle_is_of_decoders_in_the_units_of_the_data():
    _, outside = pair()
    outside.decoder.net = torch.nn.Linear(LATENTS, FEATURES).double()
    with pytest.raises(ModelError, match="that does not standardize"):
        pv.exact.LinearGaussian.of(outside)
