"""Imputation is the exact conditional of the linear-Gaussian model; observed values stay what they are."""

from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from helpers.conditional import conditional_vae
from helpers.members import FEATURES, LIKELIHOODS, make
from torch import nn
from torch.utils.data import TensorDataset

import pyro_vae as pv
from pyro_vae.core.rows import Rows
from pyro_vae.data import Data
from pyro_vae.errors import DataError
from pyro_vae.evidence.weights import guide_log_weights, smoothed
from pyro_vae.use import features, posterior


def conditional(model, x, mask):
    """The mean and the standard deviation of each missing value given the observed ones of its row; exact."""
    covariance = model.weight @ model.weight.T + model.scale**2 * torch.eye(len(model.bias)).double()
    mean, sd = x.clone(), torch.zeros_like(x)
    for i, here in enumerate(mask):
        gain = torch.linalg.solve(covariance[here][:, here], covariance[here][:, ~here]).T
        mean[i, ~here] = model.bias[~here] + gain @ (x[i, here] - model.bias[here])
        sd[i, ~here] = (covariance[~here][:, ~here] - gain @ covariance[here][:, ~here]).diagonal().sqrt()
    return mean.numpy(), sd.numpy()


def gaps(share, features=10, latents=3, scale=0.3, rows=40):
    torch.manual_seed(1)
    weight, bias = torch.randn(features, latents).double(), torch.randn(features).double()
    model = pv.exact.LinearGaussian(weight, bias, scale)
    x, mask = model.sample(rows), torch.rand(rows, features) > share
    mask[:, 0] = True
    return model, x, mask


def of_seeds(vae, x, mask, seeds=8, **settings):
    """Imputations by seed, and which values were missing."""
    found = [pv.impute(vae, x, mask=mask, seed=seed, **settings) for seed in range(seeds)]
    return found, ~mask.numpy()


def worst(found, exact, name, missing):
    """The farthest of the means over seeds from the truth, in standard errors over seeds."""
    values = np.stack([one[name].values[missing] for one in found])
    return np.abs((values.mean(0) - exact[missing]) / (values.std(0, ddof=1) / len(values) ** 0.5)).max()


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_it_is_the_exact_conditional(share):
    """Mean and sd of every missing value; of the means, each run by its own Monte-Carlo error too."""
    model, x, mask = gaps(share)
    vae, (mean, sd) = model.as_vae(diagonal=True), conditional(model, x, mask)
    found, missing = of_seeds(vae, x, mask)
    z = np.stack([((one.x - mean) / one.x_mcse).values[missing] for one in found])
    assert np.abs(z).max() < 5
    assert 0.6 < z.std() < 1.2, "the error says how far it is off; parts in fixed shares make it slightly large"
    t = [worst(found, exact, name, missing) for name, exact in (("x", mean), ("x_sd", sd))]
    assert max(t) < 12, "of 8 seeds, by a t-distribution of 7: 5 sigma is 11.6"
    relative = np.stack([one.x_sd.values[missing] for one in found]).mean(0) / sd[missing] - 1
    assert np.abs(relative).max() < 0.05
    assert np.nanmax([one.khat.max() for one in found]) < 0.8


def plain(vae, rows, draws):
    """Draws of the guide without weights, or with: what imputation was before its proposal was adapted."""
    z = vae.posterior(rows).sample((draws,))
    weights = z.new_full(z.shape[:2], 1 / draws)
    yield torch.arange(len(rows)), posterior.Weighted(z, vae.likelihood(z, rows), weights, weights[0])


def without_noise(part):
    mean = part.mean
    return mean, torch.zeros_like(mean)


def test_the_tests_see_a_guide_without_weights_and_an_sd_without_noise(monkeypatch):
    model, x, mask = gaps(0.2)
    vae, (mean, sd) = model.as_vae(diagonal=True), conditional(model, x, mask)
    monkeypatch.setattr("pyro_vae.use.impute.weighted_posterior", plain)
    found, missing = of_seeds(vae, x, mask, 1)
    assert np.abs(((found[0].x - mean) / found[0].x_mcse).values[missing]).max() > 50
    monkeypatch.undo()
    monkeypatch.setattr(features, "_moments", without_noise)
    found, missing = of_seeds(vae, x, mask, 1)
    assert (found[0].x_sd.values[missing] / sd[missing] - 1).min() < -0.3


def test_the_proposal_is_adapted_where_the_guide_alone_has_no_weights():
    """Of half-missing rows with eight latents and little noise k̂ of the guide is 10 and more; so many latents work."""
    model, x, mask = gaps(0.5, features=30, latents=8, scale=0.1, rows=12)
    vae, (mean, _) = model.as_vae(diagonal=True), conditional(model, x, mask)
    khat = smoothed(guide_log_weights(vae, Rows(x * mask, mask=mask), 1000))[1]
    assert khat.median() > 3
    found = pv.impute(vae, x, mask=mask)
    assert float(found.khat.max()) < 0.9
    assert np.abs(((found.x - mean) / found.x_mcse).values[~mask.numpy()]).max() < 5


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_observed_values_come_back_to_the_bit(dtype):
    model, x, mask = gaps(0.2, rows=8)
    given = (1000 * x.numpy()).astype(dtype) if dtype == np.int64 else x.numpy().astype(dtype)
    vae = model.as_vae(diagonal=True).float()
    found = pv.impute(vae, given, mask=mask, draws=30)
    assert (found.x.values[mask.numpy()] == given[mask.numpy()]).all()
    assert (found.missing.values == ~mask.numpy()).all()
    assert (found.x_sd.values[mask.numpy()] == 0).all()


def test_a_table_keeps_its_double_precision_its_names_and_its_row_labels():
    model, x, mask = gaps(0.2, features=4, rows=8)
    table = pd.DataFrame(x.numpy(), columns=list("abcd"), index=[f"r{i}" for i in range(8)]).where(mask.numpy())
    found = pv.impute(model.as_vae(diagonal=True).float(), table, draws=30)
    filled = pv.as_table(found)
    pd.testing.assert_frame_equal(filled[["a", "b", "c", "d"]].where(mask.numpy()), table)
    assert filled[["a", "b", "c", "d"]].notna().all().all()
    gone = [name for name, lacks in zip("abcd", (~mask).any(0), strict=True) if lacks]
    assert [name for name in filled if name.endswith("_sd")] == [f"{name}_sd" for name in gone]
    whole = mask.all(1).numpy()
    assert (filled.khat.isna() == whole).all()


def test_a_mask_says_the_same_as_nan_and_numpys_numbers_as_pythons():
    model, x, mask = gaps(0.3, rows=6)
    vae = model.as_vae(diagonal=True)
    found = pv.impute(vae, x, mask=mask, draws=50, seed=3)
    for data in (x.masked_fill(~mask, torch.nan), Data(torch.where(mask, x, 7.0), mask=mask)):
        assert found.identical(pv.impute(vae, data, draws=np.int64(50), seed=torch.tensor(3)))
    assert not np.allclose(found.x_mcse, pv.impute(vae, x, mask=mask, draws=50, seed=4).x_mcse)


def test_a_stream_is_imputed_as_in_memory(tmp_path):
    model, x, mask = gaps(0.3, rows=30)
    vae, table = model.as_vae(diagonal=True), x.masked_fill(~mask, torch.nan)
    np.save(tmp_path / "x.npy", table.numpy())
    settings = {"draws": 50, "chunk": 4000}  # blocks of eight rows
    streamed = pv.impute(vae, pv.data.stream(tmp_path / "x.npy"), **settings)
    for name, values in pv.impute(vae, table, **settings).items():
        np.testing.assert_array_equal(streamed[name], values)


def test_the_size_of_blocks_changes_no_more_than_noise_does():
    model, x, mask = gaps(0.2)
    vae, missing = model.as_vae(diagonal=True), ~mask.numpy()
    one, other = (pv.impute(vae, x, mask=mask, chunk=chunk) for chunk in (2**16, 2**22))
    error = np.hypot(one.x_mcse, other.x_mcse).values[missing]
    assert np.abs((one.x - other.x).values[missing] / error).max() < 5


def test_completed_tables_have_the_covariance_of_the_missing_values():
    """Two values missing of one row, whose exact conditional correlation is far from 0."""
    model, x, _ = gaps(0.2, rows=1)
    mask = torch.ones(1, 10, dtype=torch.bool)
    mask[0, 1:3] = False
    drawn = pv.impute(model.as_vae(diagonal=True), x, mask=mask, draws=4000, imputations=4000).imputed.values[:, 0]
    assert (drawn[:, [0, *range(3, 10)]] == x[0, [0, *range(3, 10)]].numpy()).all()
    covariance = model.weight @ model.weight.T + model.scale**2 * torch.eye(10).double()
    here = mask[0]
    gain = torch.linalg.solve(covariance[here][:, here], covariance[here][:, ~here]).T
    exact = (covariance[~here][:, ~here] - gain @ covariance[here][:, ~here]).numpy()
    correlation = exact[0, 1] / np.sqrt(exact[0, 0] * exact[1, 1])
    found = np.corrcoef(drawn[:, 1], drawn[:, 2])[0, 1]
    assert abs(correlation) > 0.1
    assert abs(np.arctanh(found) - np.arctanh(correlation)) < 5 * np.sqrt(2 / 4000)
    assert abs(drawn[:, 1].std() ** 2 / exact[0, 0] - 1) < 5 * np.sqrt(2 * 2 / 4000)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_fills_in_values_and_takes_its_completed_tables(name):
    decoder = make(LIKELIHOODS[name])
    encoder = pv.posteriors.DiagNormal(pv.nn.mlp(FEATURES, [8], 6)).double()
    vae = pv.VAE(prior=pv.priors.StandardNormal(3).double(), decoder=decoder, encoder=encoder)
    x = torch.as_tensor(pv.sample(vae, 6).x.values)
    mask = torch.rand(6, FEATURES) > 0.3
    mask[:, 0] = True
    found = pv.impute(vae, x, mask=mask, draws=50, imputations=2)
    assert np.isfinite(found.x).all()
    for table in found.imputed.values:
        assert np.array_equal(table[mask.numpy()], x[mask].numpy())
        pv.data.rows_for(vae, table)  # every value is one that the likelihood takes
    picked = name in ("Bernoulli", "Categorical", "Blocks")
    assert ("x_probability" in found) == picked
    if name in ("Bernoulli", "Categorical"):
        pv.data.rows_for(vae, found.x.values)
        assert np.isnan(found.x_sd.values[~mask.numpy()]).all()
        assert ((found.x_probability > 0) & (found.x_probability <= 1)).all()


def test_categories_are_filled_in_by_name_with_the_exact_probability():
    """The code does not depend on z, so that its probability is that of the decoder, to the bit but for rounding."""
    decoder = pv.likelihoods.Blocks(
        nn.Linear(1, 5), [(pv.likelihoods.Normal, 2), (partial(pv.likelihoods.Categorical, levels=3), 1)]
    )
    with torch.no_grad():
        decoder.net.weight[2:] = 0
        decoder.net.bias[2:] = torch.tensor([0.5, 0.1, 0.3]).log()
    encoder = pv.posteriors.DiagNormal(nn.Linear(3, 2))
    vae = pv.VAE(prior=pv.priors.StandardNormal(1), decoder=decoder, encoder=encoder)
    table = pd.DataFrame(
        {"a": [0.1, 0.2, 0.3], "b": [1.0, None, 2.0], "kind": pd.Categorical(["u", "v", None], list("uvw"))}
    )
    found = pv.impute(vae, table, draws=50)
    assert found.x_probability.sel(datum=2, feature="kind").item() == pytest.approx(5 / 9, abs=1e-6)
    assert found.x_probability.sel(datum=0, feature="kind").item() == 1
    assert found.x_probability.sel(feature="a").isnull().all()
    filled = pv.as_table(found)
    assert filled.kind.tolist() == ["u", "v", "u"]
    assert "kind_sd" not in filled
    assert filled.kind_probability.tolist() == pytest.approx([1, 1, 5 / 9])
    assert pv.as_table(found, decode=False).kind.tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", ["StandardNormal", "Laplace", "StudentT", "GaussianMixture"])
def test_it_is_the_conditional_of_a_nonlinear_model_by_quadrature(name):
    """One latent, a network, numbers beside bits: E[x|x_o] and P(bit|x_o) as sums over a grid of z."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 4))
    decoder = pv.likelihoods.Blocks(
        net, [(partial(pv.likelihoods.Normal, scale=0.3), 3), (pv.likelihoods.Bernoulli, 1)]
    )
    encoder = pv.posteriors.DiagNormal(nn.Linear(4, 2))
    vae = pv.VAE(prior=getattr(pv.priors, name)(1), decoder=decoder, encoder=encoder).double()
    x, mask = torch.as_tensor(pv.sample(vae, 12).x.values), torch.tensor([True, True, False, False])
    found = pv.impute(vae, x, mask=mask.expand(12, 4), draws=4000)
    z = torch.linspace(-40, 40, 40_001).double().view(-1, 1, 1)
    with torch.no_grad():
        rows = Rows(x, None, mask.expand(12, 4))
        weights = (vae.prior().log_prob(z) + vae.likelihood(z.expand(-1, 12, 1), rows).log_prob(x)).softmax(0)
        mean = vae.decoder(z[:, 0]).mean
    exact = (weights.T @ mean).numpy()
    assert np.abs((found.x.values - exact)[:, 2] / found.x_mcse.values[:, 2]).max() < 5
    likely = np.where(found.x.values == 1, exact, 1 - exact)
    assert np.abs((found.x_probability.values - likely)[:, 3] / found.x_probability_mcse.values[:, 3]).max() < 5
    spread = (weights.T @ (mean**2 + 0.09)).numpy() - exact**2
    np.testing.assert_allclose(found.x_sd.values[:, 2], np.sqrt(spread[:, 2]), rtol=0.15)
    assert found.khat.max() < 0.7


def test_weights_of_a_heavy_tail_are_seen():
    """Of 1,000 weights u^-k with k = 0.8, few data pass for light by chance; of an exponential tail most do."""
    u = torch.rand(1000, 200).double()
    assert posterior._has_light_tail(-0.8 * u.log()).double().mean() < 0.02
    assert posterior._has_light_tail((-u.log()).log()).double().mean() > 0.4
    assert posterior._has_light_tail(torch.zeros(1000, 2)).all()


def test_what_can_be_read_only_once_is_read_once():
    model, x, mask = gaps(0.2, features=4, rows=8)
    frame = pd.DataFrame(x.numpy(), columns=list("abcd")).where(mask.numpy())
    once = pa.RecordBatchReader.from_stream(pa.Table.from_pandas(frame, preserve_index=False))
    vae = model.as_vae(diagonal=True)
    assert pv.impute(vae, once, draws=30).x.identical(pv.impute(vae, frame, draws=30).x)
    labelled = TensorDataset(x, torch.zeros(8))
    assert pv.encode(vae, labelled).identical(pv.encode(vae, x))


def test_a_context_belongs_to_its_row():
    vae, x, context = conditional_vae().double(), torch.randn(6, 6).double(), torch.randn(6, 2).double()
    mask = torch.rand(6, 6) > 0.3
    mask[:, 0] = True
    whole = pv.impute(vae, x, context=context, mask=mask, draws=4000)
    order = torch.arange(5, -1, -1)
    other = pv.impute(vae, x[order], context=context[order], mask=mask[order], draws=4000)
    gap = (other.x.values[::-1] - whole.x.values)[~mask.numpy()]
    assert np.abs(gap / np.hypot(whole.x_mcse, other.x_mcse.values[::-1]).values[~mask.numpy()]).max() < 5
    wrong = pv.impute(vae, x, context=context[order], mask=mask, draws=4000)
    error = np.hypot(whole.x_mcse, wrong.x_mcse).values[~mask.numpy()]
    assert np.abs((wrong.x - whole.x).values[~mask.numpy()] / error).max() > 5, "power: the context matters"


def test_a_row_with_nothing_observed_is_refused():
    vae = gaps(0.2)[0].as_vae()
    with pytest.raises(DataError, match="row 1 has no observed value"):
        pv.impute(vae, [[0.0] * 10, [np.nan] * 10])


def fitted(table):
    vae = pv.exact.LinearGaussian(torch.ones(table.shape[1], 1), torch.zeros(table.shape[1]), 0.5).as_vae().float()
    pv.fit(vae, table, epochs=1, progress=False, engine="eager", device="cpu")
    return vae


def test_observed_categories_come_back_by_their_names():
    vae = fitted(pd.DataFrame({"a": np.arange(6.0), "kind": list("bgrbgr")}))
    new = pd.DataFrame({"kind": list("grgr"), "a": [0.5, np.nan, 1.5, 2.5]})
    for data in (new, pv.data.load(new, missing="nan"), pv.data.load(new[["a", "kind"]], missing="nan")):
        assert pv.as_table(pv.impute(vae, data, draws=30)).kind.tolist() == list("grgr")


def test_what_was_loaded_comes_back_to_the_bit_too(tmp_path):
    table = pd.DataFrame({"b": [0.1, 16777217.0, 3.0, 4.0], "a": [1.1, 2.0, 5.0, np.nan], "kind": list("uvvu")})
    vae = fitted(pd.DataFrame({"a": np.arange(6.0), "b": np.arange(6.0), "kind": list("uvvuvv")}))
    table.to_csv(tmp_path / "a.csv", index=False)
    found = pv.as_table(pv.impute(vae, pv.data.load(tmp_path / "a.csv", missing="nan"), draws=30))
    assert found.b.tolist() == table.b.tolist()
    assert found.a.tolist()[:3] == table.a.tolist()[:3]
    assert found.kind.tolist() == table.kind.tolist()
    whole = np.array([[16777217, 0, 1], [5, 6, 0]])  # of integers, without a mask
    assert pv.impute(vae, whole, draws=30).x.values.tolist() == whole.tolist()


def test_a_mask_follows_the_columns_of_a_table():
    vae = fitted(pd.DataFrame({"a": np.arange(4.0), "b": np.arange(4.0)}))
    table, seen = pd.DataFrame({"b": [5.0, np.nan], "a": [1.0, 2.0]}), np.array([[True, True], [False, True]])
    found = pv.impute(vae, table, mask=seen, draws=30)
    assert found.identical(pv.impute(vae, table[["a", "b"]], mask=seen[:, ::-1].copy(), draws=30))
    assert found.missing.values.tolist() == [[False, False], [False, True]]
    latents = pv.encode(vae, table.fillna(7.0), mask=seen)
    assert latents.identical(pv.encode(vae, pv.data.load(table.fillna(7.0)), mask=seen))
    assert latents.identical(pv.encode(vae, table[["a", "b"]].fillna(7.0), mask=seen[:, ::-1].copy()))
