"""Latents, reconstructions, samples and walks are those of the model, with the names of the user's data."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.checks import linear_gaussian, small_vae
from helpers.conditional import conditional_vae
from helpers.members import FEATURES, LATENTS, LIKELIHOODS, POSTERIORS, PRIORS, make
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import DataError, ModelError, SettingsError
from pyro_vae.likelihoods._distributions import LogisticLevels

ROWS = [f"r{i}" for i in range(20)]


@pytest.fixture
def table():
    x = linear_gaussian(4).sample(20).numpy()
    return pd.DataFrame(x, columns=list("abcd"), index=ROWS)


def trained(table):
    vae = linear_gaussian(4).as_vae(diagonal=True)
    pv.fit(vae, table, epochs=1, progress=False, engine="eager", device="cpu")
    return vae


def vae_of(likelihood):
    encoder = pv.posteriors.DiagNormal(pv.nn.mlp(FEATURES, [8], 2 * LATENTS)).double()
    return pv.VAE(prior=pv.priors.StandardNormal(LATENTS).double(), decoder=make(likelihood), encoder=encoder)


def test_latents_are_the_mean_and_sd_of_the_encoder():
    vae, x = small_vae(), torch.randn(7, 6).double()
    found, q = pv.encode(vae, x), vae.encoder(x)
    assert set(found) == {"z", "z_sd"}
    np.testing.assert_array_equal(found.z, q.mean.detach())
    np.testing.assert_allclose(found.z_sd, q.stddev.detach(), rtol=1e-15)
    np.testing.assert_allclose(pv.encode(vae, x, chunk=1).z, found.z, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", POSTERIORS)
def test_every_posterior_is_encoded(name):
    encoder = make(POSTERIORS[name])
    decoder = pv.likelihoods.Normal(pv.nn.mlp(LATENTS, [8], FEATURES)).double()
    vae = pv.VAE(prior=pv.priors.StandardNormal(LATENTS).double(), decoder=decoder, encoder=encoder)
    x = torch.randn(3, FEATURES).double()
    found = pv.encode(vae, x, draws=4000)
    z = vae.encoder(x).sample((20_000,))
    error = (z.std(0) / 20_000**0.5).numpy()
    error = np.hypot(error, found.z_mcse) if name == "Flow" else error
    assert np.abs((found.z - z.mean(0).numpy()) / error).max() < 5
    assert np.abs(found.z_sd / z.std(0).numpy() - 1).max() < 0.15
    assert ("z_mcse" in found) == (name == "Flow"), "others know their mean"


def test_reconstructions_are_the_exact_mean_with_the_spread_of_x():
    """E[x̃|x] = W E[z|x] + b and Var = W Cov[z|x] Wᵀ + s², in closed form."""
    model = linear_gaussian()
    x, vae = model.sample(30), model.as_vae()
    found, q = pv.reconstruct(vae, x, draws=400), model.posterior(x)
    mean = q.mean @ model.weight.T + model.bias
    variance = ((model.weight @ q.covariance_matrix) * model.weight).sum(-1) + model.scale**2
    z = ((found.x - mean.numpy()) / found.x_mcse).values
    assert np.abs(z).max() < 5
    assert 0.8 < z.std() < 1.2
    assert np.abs((found.x - mean.numpy() - 5 * found.x_mcse) / found.x_mcse).max() > 5, "power: of five errors more"
    noise = model.scale.item() ** 2
    within = found.x_sd.values**2 - noise
    assert np.abs(within / (variance - noise).numpy() - 1).max() < 5 * (2 / 400) ** 0.5
    assert np.abs(found.x_mcse.values**2 * 400 / (variance - noise).numpy() - 1).max() < 5 * (2 / 400) ** 0.5


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_reconstructs_its_mean_or_its_most_probable_code(name):
    """Against a million draws of x, mean and sd; codes against their frequencies."""
    vae = vae_of(LIKELIHOODS[name])
    x = torch.as_tensor(pv.sample(vae, 3).x.values)
    found = pv.reconstruct(vae, x, draws=4000)
    drawn = vae.decoder(vae.encoder(x).sample((100_000,))).sample()
    codes = np.isnan(found.x_sd.values)
    error = np.hypot((drawn.std(0) / 100_000**0.5).numpy(), found.x_mcse.values)[~codes]
    assert (np.abs(found.x.values - drawn.mean(0).numpy())[~codes] <= 5 * error).all()
    np.testing.assert_allclose(found.x_sd.values[~codes], drawn.std(0).numpy()[~codes], rtol=0.1)
    for i, j in np.argwhere(codes):
        share = (drawn[:, i, j] == found.x.values[i, j]).double().mean().item()
        apart = share - found.x_probability.values[i, j]
        assert abs(apart) < 5 * np.hypot(found.x_probability_mcse.values[i, j], 0.5 / 100_000**0.5)
        assert share > 0.99 * max((drawn[:, i, j] == level).double().mean().item() for level in range(4))
    assert codes.any() == (name in ("Categorical", "Blocks"))


def test_a_distribution_that_knows_no_mean_is_drawn(monkeypatch):
    monkeypatch.setattr(LogisticLevels, "mean", None)  # would fail where it is asked for
    vae = vae_of(LIKELIHOODS["DiscretizedLogisticMixture"])
    found = pv.reconstruct(vae, pv.sample(vae, 3).x.values)
    assert (found.x_mcse * 100**0.5 / found.x_sd).values == pytest.approx(1, rel=0.01)


def test_names_are_found_and_kept(table):
    vae, other = trained(table), table[["d", "a", "c", "b"]]
    for function in (pv.encode, pv.reconstruct, pv.impute):
        found = function(vae, table)
        assert found.datum.values.tolist() == ROWS
        assert found.identical(function(vae, other)), "columns are found by name"
        if "feature" in found.dims:
            assert found.feature.values.tolist() == ["a", "b", "c", "d"]
        with pytest.raises(DataError, match="column 'c' of the training data is missing"):
            function(vae, table[["a", "b", "d"]])
    assert found.sel(datum="r3", feature="b").x.item() == table.loc["r3", "b"]
    assert pv.sample(vae, 3).feature.values.tolist() == ["a", "b", "c", "d"]
    wide = pv.as_table(pv.reconstruct(vae, table))
    assert wide.columns.tolist() == [*"abcd", *(f"{name}_{what}" for what in ("sd", "mcse") for name in "abcd")]
    assert wide.index.tolist() == ROWS
    assert pv.as_table(pv.encode(vae, table.to_numpy())).columns.tolist() == ["z0", "z1", "z0_sd", "z1_sd"]


def test_a_column_that_has_the_name_of_an_error_stays_apart():
    vae = linear_gaussian(2).as_vae()
    wide = pv.as_table(pv.reconstruct(vae, {"a": [0.0], "a_sd": [1.0]}))
    assert wide.columns.tolist() == ["a", "a_sd", "a_sd_", "a_sd_sd", "a_mcse", "a_sd_mcse"]


def test_codes_become_the_names_of_categories(tmp_path):
    blocks = [(pv.likelihoods.Normal, 1), (partial(pv.likelihoods.Categorical, levels=2), 1)]
    encoder = pv.posteriors.DiagNormal(nn.Linear(2, 4))
    decoder = pv.likelihoods.Blocks(nn.Linear(2, 3), blocks)
    vae = pv.VAE(prior=pv.priors.StandardNormal(2), decoder=decoder, encoder=encoder)
    table = pd.DataFrame({"a": np.arange(8.0) / 8, "kind": ["u", "v"] * 4})
    pv.fit(vae, table, epochs=1, progress=False, engine="eager", device="cpu")
    for found in (pv.reconstruct(vae, table), pv.sample(vae, 20), pv.traverse(vae, 0)):
        assert json.loads(found.attrs["categories"]) == {"kind": ["u", "v"]}
        assert set(pv.as_table(found).kind) <= {"u", "v"}
        found.to_netcdf(tmp_path / "saved.nc", engine="h5netcdf")


def test_a_stream_gives_what_memory_gives(tmp_path, table):
    vae = linear_gaussian(4).as_vae(diagonal=True)
    np.save(tmp_path / "x.npy", table.to_numpy().copy())
    batches = [torch.tensor(table.to_numpy()[i : i + 7]) for i in range(0, 20, 7)]
    for stream in (pv.data.stream(tmp_path / "x.npy"), pv.data.stream(batches, size=20)):
        for function, settings in ((pv.encode, {}), (pv.reconstruct, {"draws": 10})):
            whole = function(vae, table.to_numpy(), chunk=400, **settings)
            streamed = function(vae, stream, chunk=400, **settings)
            for name in whole:
                np.testing.assert_allclose(streamed[name], whole[name], rtol=1e-12)
    with pytest.raises(SettingsError, match="a stream holds its own context and mask"):
        pv.encode(vae, stream, mask=np.ones((20, 4), bool))


def test_a_stream_with_other_columns_is_refused(tmp_path, table):
    vae = trained(table)
    table[["b", "a", "c", "d"]].to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="the columns of the stream differ from those of the training data, or their"):
        pv.encode(vae, pv.data.stream(tmp_path / "x.parquet", columns=["b", "a", "c", "d"]))
    ordered = pv.encode(vae, pv.data.stream(tmp_path / "x.parquet", columns=["a", "b", "c", "d"]))
    np.testing.assert_allclose(ordered.z, pv.encode(vae, table).z, rtol=1e-6)


def test_a_mask_hides_what_is_missing():
    vae, x = small_vae(), torch.randn(8, 6).double()
    mask = torch.rand(8, 6) > 0.3
    hidden = pv.encode(vae, torch.where(mask, x, torch.nan), mask=mask)
    np.testing.assert_array_equal(hidden.z, vae.encoder(torch.where(mask, x, 0.0)).mean.detach())
    assert pv.reconstruct(vae, x, mask=mask).identical(
        pv.reconstruct(vae, pv.data.Data(x + 1 - mask.double(), mask=mask))
    )


def test_seeds_decide_the_draws_and_nothing_outside_changes_them():
    vae, x = small_vae(), torch.randn(8, 6).double()
    vae.train()
    before = torch.random.get_rng_state()
    one, same, other = (pv.reconstruct(vae, x, seed=seed) for seed in (1, np.int64(1), 2))
    assert one.identical(same)
    assert not np.allclose(one.x, other.x)
    assert pv.sample(vae, np.int64(3), seed=1).identical(pv.sample(vae, 3, seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert vae.training


def test_each_block_of_rows_has_its_own_draws():
    vae, x = small_vae(), torch.zeros(4, 6).double()
    found = pv.reconstruct(vae, x, draws=5, chunk=60)  # two rows at a time
    assert len(np.unique(found.x.values[:, 0])) == 4


def test_samples_have_the_moments_of_the_model():
    model = linear_gaussian()
    x = pv.sample(model.as_vae(), 20_000, chunk=2**14).x.values
    covariance = (model.weight @ model.weight.T + model.scale**2 * torch.eye(5).double()).numpy()
    error = np.sqrt(np.diag(covariance) / len(x))
    assert np.abs((x.mean(0) - model.bias.numpy()) / error).max() < 5
    assert np.abs(x.var(0) / np.diag(covariance) - 1).max() < 5 * (2 / len(x)) ** 0.5
    assert len(np.unique(x[:, 0])) == len(x), "each block has its own draws"


def test_samples_take_a_context_for_all_rows_or_one_for_each():
    vae = conditional_vae()
    one = pv.sample(vae, 4000, context=[2.0, -1.0]).x.mean("datum")
    each = pv.sample(vae, 4000, context=np.tile([2.0, -1.0], (4000, 1))).x.mean("datum")
    np.testing.assert_array_equal(one, each)
    other = pv.sample(vae, 4000, context=[-2.0, 1.0]).x
    assert (np.abs(other.mean("datum") - one) / (other.std("datum") / 4000**0.5)).max() > 5
    with pytest.raises(DataError, match="context has shape"):
        pv.sample(vae, 3, context=np.zeros((2, 2)))


@pytest.mark.parametrize(
    "call", [lambda vae, **given: pv.sample(vae, 3, **given), lambda vae, **given: pv.traverse(vae, 0, **given)]
)
@pytest.mark.parametrize("of_prior", [False, True])
def test_a_context_that_lacks_or_is_of_another_width_is_told_in_one_sentence(call, of_prior):
    vae = conditional_vae()
    if not of_prior:
        vae.prior = pv.priors.StandardNormal(vae.prior(torch.zeros(1, 2)).event_shape[0])
    with pytest.raises(ModelError, match="needs a context of 2 numbers and got none; pass context="):
        call(vae)
    with pytest.raises(ModelError, match="needs a context of 2 numbers and got one of 3; pass context="):
        call(vae, context=np.zeros(3))
    with pytest.raises(ModelError, match="was built for 2"):
        call(linear_gaussian().as_vae(), context=np.zeros(3))


def test_a_line_between_rows_is_decoded(table):
    model, vae = linear_gaussian(4), trained(table)
    model = pv.exact.LinearGaussian.of(vae)
    z = pv.encode(vae, table).z.values
    for a, b in ((table.iloc[2], table.iloc[5]), (table.iloc[[2]], table.iloc[[5]])):
        found = pv.interpolate(vae, a, b, steps=5)
        assert found.step.values.tolist() == [0, 0.25, 0.5, 0.75, 1]
        assert found.feature.values.tolist() == [*"abcd"]
        middle = torch.as_tensor((z[2] + z[5]) / 2)
        np.testing.assert_allclose(found.x.sel(step=0.5), (model.weight @ middle + model.bias).detach(), rtol=1e-9)
        np.testing.assert_allclose(found.x_sd, model.scale.item(), rtol=1e-9)
    assert pv.as_table(found).index.tolist() == found.step.values.tolist()
    with pytest.raises(DataError, match="a has 20 rows; give one"):
        pv.interpolate(vae, table, table)


def test_rows_in_different_contexts_need_one():
    vae, data = conditional_vae(), pv.data.Data
    a, b = (data(torch.zeros(1, 6), context=torch.tensor([[c, 0.0]])) for c in (0.0, 1.0))
    with pytest.raises(DataError, match="a and b have different contexts"):
        pv.interpolate(vae, a, b)
    assert pv.interpolate(vae, torch.zeros(6), torch.ones(6), context=[1.0, 0.0]).sizes["step"] == 11


def test_a_latent_runs_over_its_priors_quantiles():
    model = linear_gaussian()
    found = pv.traverse(model.as_vae(), np.int64(1), steps=5)
    np.testing.assert_allclose(found.z.values, [[0, z] for z in (-2, -1, 0, 1, 2)], atol=1e-12)
    np.testing.assert_allclose(found.x, found.z.values @ model.weight.numpy().T + model.bias.numpy(), rtol=1e-9)
    ends = pv.traverse(model.as_vae(), 0, quantiles=[0.5, 0.975]).z.sel(latent=0).values
    np.testing.assert_allclose(ends, [0, 1.959964], atol=1e-6)
    for wrong in ({"latent": 2}, {"latent": 0, "quantiles": [0.0, 0.5]}):
        with pytest.raises(SettingsError):
            pv.traverse(model.as_vae(), **wrong)


@pytest.mark.parametrize("name", [name for name in PRIORS if name != "ContextNormal"])
def test_the_quantiles_of_every_prior(name):
    """Shares of a fresh sample below them; the largest error of 10,000 draws is that of the middle, 0.005."""
    prior = make(PRIORS[name])
    decoder = pv.likelihoods.Normal(pv.nn.mlp(LATENTS, [8], FEATURES)).double()
    encoder = pv.posteriors.DiagNormal(pv.nn.mlp(FEATURES, [8], 2 * LATENTS)).double()
    vae = pv.VAE(prior=prior, decoder=decoder, encoder=encoder)
    at = [0.1, 0.5, 0.8]
    found = pv.traverse(vae, 1, quantiles=at)
    drawn = vae.prior().sample((40_000,))[:, 1]
    shares = [(drawn < z).double().mean().item() for z in found.z.sel(latent=1).values]
    assert shares == pytest.approx(at, abs=5 * np.hypot(0.005, 0.0025))
    assert (found.z.sel(latent=[0, 2]).std("quantile") < 1e-12).all()


def test_batch_norm_and_dropout_rest():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 6))
    vae = small_vae()
    vae.encoder = pv.posteriors.DiagNormal(net).double()
    x = torch.randn(9, 6).double()
    whole = pv.encode(vae.train(), x)
    np.testing.assert_allclose(pv.encode(vae, x[:1]).z[0], whole.z[0], rtol=1e-12)
    assert net.training


def test_an_end_of_a_line_that_is_no_table_is_refused_in_a_sentence(table):
    with pytest.raises(
        DataError, match="a: the dict is not a table; give each column as a list with one value per row"
    ):
        pv.interpolate(trained(table), {"a": 1.0}, {"a": 2.0})
