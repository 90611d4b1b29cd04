"""Draws in ArviZ's schema, against closed forms."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from helpers.checks import linear_gaussian, small_vae, z_score

import pyro_vae as pv
from pyro_vae.data import Data, Rows
from pyro_vae.data.fingerprint import data_hash, row_hashes
from pyro_vae.errors import SettingsError
from pyro_vae.evidence.weights import smoothed

MODEL = linear_gaussian()
DIMS = {
    "posterior": ("z", ("chain", "draw", "datum", "latent")),
    "posterior_predictive": ("x", ("chain", "draw", "datum", "feature")),
    "log_likelihood": ("x", ("chain", "draw", "datum")),
    "sample_stats": ("lp", ("chain", "draw", "datum")),
    "prior": ("z", ("chain", "draw", "latent")),
    "prior_predictive": ("x", ("chain", "draw", "feature")),
    "observed_data": ("x", ("datum", "feature")),
}


@pytest.fixture(scope="module")
def tree():
    torch.manual_seed(0)
    x = MODEL.sample(4)
    return pv.to_datatree(MODEL.as_vae(), x, draws=5000, prior_draws=20_000), x


def values(tree, group):
    return torch.as_tensor(tree[group][DIMS[group][0]].values)


def test_groups_and_dims(tree):
    assert set(tree[0].children) == set(DIMS)
    for group, (name, dims) in DIMS.items():
        assert tree[0][group][name].dims == dims
        assert set(tree[0][group].coords) == set(dims)
    assert tree[0]["posterior"].attrs["inference_library"] == "pyro_vae"
    assert torch.equal(values(tree[0], "observed_data"), tree[1])


def test_posterior_draws_have_the_posteriors_moments(tree):
    z, exact = values(tree[0], "posterior")[0], MODEL.posterior(tree[1])
    for i in range(4):
        assert abs(z_score(z[:, i, 0], exact.mean[i, 0])) < 5
        assert abs(z_score(z[:, i, 0] ** 2, exact.mean[i, 0] ** 2 + exact.variance[i, 0])) < 5
        assert abs(z_score(z[:, i, 0], exact.mean[i, 0] + 0.1 * exact.stddev[i, 0])) > 5, "power"


def test_the_log_likelihood_is_that_of_the_data_given_the_draws(tree):
    z, x = values(tree[0], "posterior")[0], tree[1]
    expected = MODEL.as_vae().decoder(z).log_prob(x)
    assert (values(tree[0], "log_likelihood")[0] - expected).abs().max() < 1e-12


def test_the_prior_predictive_has_the_marginals_moments(tree):
    x = values(tree[0], "prior_predictive")[0]
    variance = (MODEL.weight @ MODEL.weight.T).diagonal() + MODEL.scale**2
    assert abs(z_score(x[:, 0], MODEL.bias[0])) < 5
    assert abs(z_score((x[:, 0] - MODEL.bias[0]) ** 2, variance[0])) < 5
    noiseless = variance[0] - MODEL.scale**2
    assert abs(z_score((x[:, 0] - MODEL.bias[0]) ** 2, noiseless)) > 5, "power: means in the place of draws"


def test_it_is_written_and_read_as_netcdf(tree, tmp_path):
    tree[0].to_netcdf(tmp_path / "draws.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "draws.nc", engine="h5netcdf") as read:
        assert read.equals(tree[0])


def test_no_draws_are_refused():
    with pytest.raises(SettingsError, match="draws is 0"):
        pv.to_datatree(MODEL.as_vae(), MODEL.sample(2), draws=0)


# --- Resampled draws ---


def wrong():
    """A guide that is moved by half a standard deviation and more, and a little too wide."""
    vae = MODEL.as_vae(diagonal=True)
    with torch.no_grad():
        vae.encoder.net.bias[:2] += torch.tensor([0.2, -0.2])
        vae.encoder.net.bias[2:] += 0.3
    return vae


def errors_of_moments(tree, x):
    """z-scores over 60 data, each of which has draws of its own: of the mean, the square and the product."""
    z, exact = torch.as_tensor(tree["posterior"].z.values[0]), MODEL.posterior(x)
    apart = z - exact.mean
    covariance = exact.covariance_matrix
    each = {
        "mean": apart[..., 0].mean(0),
        "square": (apart[..., 0] ** 2).mean(0) - covariance[..., 0, 0],
        "product": (apart[..., 0] * apart[..., 1]).mean(0) - covariance[..., 0, 1],
    }
    return {name: z_score(value, 0.0) for name, value in each.items()}


def test_resampled_draws_of_a_wrong_guide_are_the_posteriors():
    x = MODEL.sample(60)
    resampled = pv.to_datatree(wrong(), x, draws=1000, proposals=20_000, posterior="psis")
    assert all(abs(z) < 5 for z in errors_of_moments(resampled, x).values())
    assert resampled["sample_stats"].khat.max() < 0.7
    own = errors_of_moments(pv.to_datatree(wrong(), x, draws=1000), x)
    assert all(abs(z) > 5 for z in own.values()), "power: the guide's own draws have other moments"


def test_what_is_predicted_is_predicted_from_the_resampled_draws():
    x = MODEL.sample(40)
    tree = pv.to_datatree(wrong(), x, draws=500, posterior="psis", chunk=5000 * 5 * 7)
    z, x_new = (torch.as_tensor(tree[g][n].values[0]) for g, n in (("posterior", "z"), ("posterior_predictive", "x")))
    decoder = MODEL.as_vae().decoder
    assert abs(z_score((x_new - decoder(z).mean).mean((0, 2)), 0.0)) < 5
    assert torch.allclose(torch.as_tensor(tree["log_likelihood"].x.values[0]), decoder(z).log_prob(x), atol=1e-10)
    spread = ((x_new - decoder(z).mean) / MODEL.scale).square().mean((0, 2))
    assert abs(z_score(spread, 1.0)) < 5
    shuffled = decoder(z.roll(1, 0)).mean
    assert abs(z_score(((x_new - shuffled) / MODEL.scale).square().mean((0, 2)), 1.0)) > 5, "power"


@pytest.mark.parametrize("posterior", ["guide", "psis"])
def test_draws_carry_their_log_densities(posterior):
    x = MODEL.sample(3)
    tree = pv.to_datatree(wrong(), x, draws=50, posterior=posterior)
    z, stats = torch.as_tensor(tree["posterior"].z.values[0]), tree["sample_stats"]
    log_joint = MODEL.posterior(x).log_prob(z) + MODEL.log_marginal(x)
    assert np.allclose(stats.lp[0], log_joint, atol=1e-9)
    assert np.allclose(stats.log_weight[0], log_joint - wrong().encoder(x).log_prob(z).detach(), atol=1e-9)
    assert stats.khat.dims == stats.ess.dims == ("datum",)


def test_the_effective_size_of_exact_draws_is_their_number_and_of_wrong_ones_less():
    x = MODEL.sample(5)
    exact = pv.to_datatree(MODEL.as_vae(), x, draws=200)["sample_stats"]
    assert np.allclose(exact.ess, 200)
    assert (exact.khat == 0).all()
    assert (pv.to_datatree(wrong(), x, draws=200)["sample_stats"].ess < 180).all()
    few = pv.to_datatree(MODEL.as_vae(), x, draws=10)["sample_stats"]
    assert "khat" not in few, "of fewer than 25 draws there is no tail"
    proposed = pv.to_datatree(MODEL.as_vae(), x, draws=10, proposals=300, posterior="psis")["sample_stats"]
    assert np.allclose(proposed.ess, 300)


def test_missing_values_leave_the_weights():
    """The posterior of what was seen, though the guide takes the missing values for zeros."""
    mask = torch.tensor([True, True, False, True, False])
    x = MODEL.sample(60)
    part = pv.exact.LinearGaussian(MODEL.weight[mask], MODEL.bias[mask], MODEL.scale)
    data = Data(x, mask=mask.expand(60, 5))
    vae = MODEL.as_vae(diagonal=True)
    with torch.no_grad():
        vae.encoder.net.bias[2:] += 0.7
    exact = part.posterior(x[:, mask]).mean[:, 0]
    means = {}
    for posterior in ("guide", "psis"):
        tree = pv.to_datatree(vae, data, draws=500, proposals=20_000, posterior=posterior)
        means[posterior] = torch.as_tensor(tree["posterior"].z.values[0, :, :, 0]).mean(0) - exact
    assert means["psis"].abs().mean() < means["guide"].abs().mean() / 3


# --- Labels and attributes ---


def test_labels_are_the_coordinates():
    labels = {"datum": list("abcd"), "feature": [f"x{i}" for i in range(5)], "latent": ["one", "two"]}
    tree = pv.to_datatree(MODEL.as_vae(), MODEL.sample(4), draws=30, coords=labels)
    assert tree["posterior"].z.sel(datum="b", latent="two").shape == (1, 30)
    assert tree["prior_predictive"].x.sel(feature="x3").shape == (1, 100)
    assert tree["sample_stats"].khat.sel(datum="d").shape == ()
    assert tree["observed_data"].x.coords["feature"].values.tolist() == labels["feature"]
    named = pv.to_datatree(MODEL.as_vae(), Data(MODEL.sample(4), columns=labels["feature"]), draws=2)
    assert named["observed_data"].feature.values.tolist() == labels["feature"], "columns of the data are labels"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coords": {"datum": ["a", "b"]}}, r"coords\['datum'\] has 2 labels for 4; pass one for each"),
        ({"coords": {"feature": 3}}, r"coords\['feature'\] has 1 labels for 5"),
        ({"coords": {"chain": [0]}}, "coords has labels of 'chain'; it may label"),
        ({"coords": ["a"]}, "coords is a list; pass {dimension: its labels}"),
        ({"posterior": "nuts"}, "posterior is 'nuts'; it must be guide or psis"),
        ({"posterior": "psis", "proposals": 24}, "proposals is 24"),
        ({"prior_draws": 0}, "prior_draws is 0"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_sentence(settings, message):
    with pytest.raises(SettingsError, match=message) as caught:
        pv.to_datatree(MODEL.as_vae(), MODEL.sample(4), **settings)
    assert "\n" not in str(caught.value)


def test_data_of_another_width_are_refused_in_one_sentence():
    with pytest.raises(pv.errors.ModelError, match="4") as caught:
        pv.to_datatree(MODEL.as_vae(), MODEL.sample(4)[:, :4])
    assert "\n" not in str(caught.value)


def test_attributes_say_where_draws_come_from(tree):
    for node in (tree[0], *tree[0].children.values()):
        assert node.attrs["inference_library"] == "pyro_vae"
        assert node.attrs["seed"] == 0
        assert node.attrs["data_hash"] == data_hash(row_hashes(Rows(tree[1])))
        assert {"pyro", "torch", "python", "created_at", "posterior_from"} <= set(node.attrs)


def test_nothing_is_moved_and_a_seed_gives_the_same():
    vae, x = small_vae(), torch.randn(4, 6).double()
    vae.decoder.net = torch.nn.Sequential(torch.nn.Dropout(0.5), vae.decoder.net)
    state = torch.random.get_rng_state()
    for posterior in ("guide", "psis"):
        first, again = (pv.to_datatree(vae, x, draws=30, posterior=posterior) for _ in range(2))
        assert first.equals(again)
        assert not first.equals(pv.to_datatree(vae, x, draws=30, posterior=posterior, seed=1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert vae.training
    assert all(p.grad is None for p in vae.parameters())


# --- ArviZ ---


@pytest.mark.parametrize("posterior", ["guide", "psis"])
def test_written_and_read_it_is_the_same_to_the_attributes(posterior, tmp_path):
    labels = {"datum": list("abcd"), "feature": [f"x{i}" for i in range(5)]}
    tree = pv.to_datatree(MODEL.as_vae(), MODEL.sample(4), draws=30, posterior=posterior, coords=labels)
    tree.to_netcdf(tmp_path / "draws.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "draws.nc", engine="h5netcdf") as read:
        assert read.identical(tree)


def test_arviz_takes_it_for_its_own():
    from arviz_base import convert_to_datatree

    from pyro_vae.core.arviz import az

    x = MODEL.sample(4)
    labels = {"datum": list("abcd"), "latent": ["one", "two"]}
    tree = pv.to_datatree(MODEL.as_vae(), x, draws=2000, coords=labels)
    assert convert_to_datatree(tree) is tree
    assert az.extract(tree, var_names="z", num_samples=100, random_seed=0).shape == (4, 2, 100)
    summary = az.summary(tree, var_names=["z"], kind="stats", round_to="none")
    assert summary.loc["z[b, two]", "mean"] == pytest.approx(tree["posterior"].z.values[0, :, 1, 1].mean(), abs=1e-9)
    means = torch.tensor(summary["mean"].tolist()).double().reshape(4, 2)
    exact = MODEL.posterior(x)
    assert ((means - exact.mean) / exact.stddev * 2000**0.5).abs().max() < 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that k̂ is high, as it is for latents of single data
        loo = az.loo(tree, var_name="x", pointwise=True)
    assert loo.n_data_points == 4
    assert loo.n_samples == 2000


def test_arviz_plots_a_datum_and_a_feature_at_a_time_and_notes_say_what_is_no_cross_validation():
    from pyro_vae.core.arviz import az

    tree = pv.to_datatree(MODEL.as_vae(), MODEL.sample(30), draws=50)
    for group, plot in (("posterior", "plot_pair"), ("posterior_predictive", "plot_ppc_pit")):
        assert f"az.{plot} takes one " in tree[group].attrs["note"]
    assert "az.plot_loo_pit cannot estimate" in tree["log_likelihood"].attrs["note"]
    az.plot_pair(tree, var_names=["z"], coords={"datum": 3}, backend="none")
    az.plot_ppc_pit(tree, coords={"feature": 2}, backend="none")
    with pytest.warns(UserWarning, match="Pareto"):
        az.loo(tree, var_name="x")
    with pytest.raises(IndexError):
        az.plot_loo_pit(tree, backend="none")


def test_prior_draws_take_the_contexts_of_all_data():
    """Each as often as the others: of 2000 draws, a third have the context 100."""
    move = torch.nn.Linear(1, 2)
    with torch.no_grad():
        move.weight.copy_(torch.tensor([[1.0], [0.0]]))
    vae = pv.VAE(
        prior=pv.priors.ContextNormal(move),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [], 4)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(5, [], 2)),
    )
    data = Data(torch.zeros(3, 4), context=torch.tensor([[0.0], [0.0], [100.0]]))
    z = pv.to_datatree(vae, data, draws=2, prior_draws=2000)["prior"].z.values[0, :, 0]
    high = torch.as_tensor(z > 50).double()
    assert abs(z_score(high, 1 / 3)) < 5
    assert abs(z_score(high, 1 / 4)) > 5, "power"


def test_what_is_resampled_is_weighed_by_smoothed_weights():
    """The effective size that is told is that of the smoothed weights, 1 / Σ w²."""
    vae, x = wrong(), MODEL.sample(5)
    tree = pv.to_datatree(vae, x, draws=400)["sample_stats"]
    log_weights = torch.as_tensor(tree.log_weight.values[0])
    plain, smooth = (w.softmax(0).square().sum(0).reciprocal() for w in (log_weights, smoothed(log_weights)[0]))
    assert np.abs(tree.ess.values - smooth.numpy()).max() < 1e-6
    assert np.abs(tree.ess.values - plain.numpy()).max() > 0.1, "power"


@pytest.mark.parametrize(
    ("likelihood", "x", "dtype"),
    [
        (lambda net: pv.likelihoods.Poisson(net), [[0, 3, 7], [2, 0, 1]], np.int64),
        (lambda net: pv.likelihoods.Categorical(net, levels=8), [[0, 3, 7], [2, 0, 1]], np.int64),
        (
            lambda net: pv.likelihoods.DiscretizedLogisticMixture(net, components=1, levels=3),
            [[0, 0.5, 1]] * 2,
            np.float32,
        ),
        (lambda net: pv.likelihoods.Normal(net), [[0, 3, 7], [2, 0, 1]], np.float32),
        (lambda net: pv.likelihoods.Poisson(net), [[0, 3, np.nan], [2, 0, 1]], np.float32),
    ],
    ids=["counts", "categories", "grey levels", "real numbers", "counts with a gap"],
)
def test_counts_and_categories_are_integers(likelihood, x, dtype):
    outputs = {"Poisson": 3, "Normal": 3, "Categorical": 24, "DiscretizedLogisticMixture": 9}
    name = type(likelihood(torch.nn.Identity())).__name__
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2), decoder=likelihood(torch.nn.Linear(2, outputs[name])),
        encoder=pv.posteriors.DiagNormal(torch.nn.Linear(3, 4)),
    )  # fmt: skip
    data = Data(torch.tensor(x, dtype=torch.float32))
    tree = pv.to_datatree(vae, pv.data.mask_nan(data) if np.isnan(x).any() else data, draws=5)
    found = {group: tree[group].x for group in ("observed_data", "posterior_predictive", "prior_predictive")}
    assert {array.dtype for array in found.values()} == {np.dtype(dtype)}
    np.testing.assert_array_equal(found["observed_data"], np.array(x, dtype=np.float32))


def test_a_rootogram_of_counts_draws():
    az = pytest.importorskip("arviz_plots")
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2), decoder=pv.likelihoods.Poisson(torch.nn.Linear(2, 3)),
        encoder=pv.posteriors.DiagNormal(torch.nn.Linear(3, 4)),
    )  # fmt: skip
    tree = pv.to_datatree(vae, torch.poisson(torch.full((30, 3), 2.0)), draws=20)
    az.plot_ppc_rootogram(tree.sel(feature=1), backend="none")


@pytest.mark.parametrize(
    ("labels", "told"),
    [(["a", 3, "c", "d"], "int and str"), (["a", None, "c", "d"], "NoneType and str"), ([1j, 2, 3, 4], "complex128")],
)
def test_labels_that_no_file_can_hold_are_refused(labels, told):
    with pytest.raises(SettingsError, match=rf"coords\['datum'\] holds labels of type {told}, which no file can hold"):
        pv.to_datatree(MODEL.as_vae(), MODEL.sample(4), draws=2, coords={"datum": labels})


def test_times_and_text_are_labels_that_come_back_from_a_file(tmp_path):
    times = list(pd.date_range("2024-02-28", periods=4))
    tree = pv.to_datatree(MODEL.as_vae(), MODEL.sample(4), draws=2, coords={"datum": times, "feature": list("abcde")})
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    again = xr.open_datatree(tmp_path / "tree.nc", engine="h5netcdf")["observed_data"]
    assert again.datum.values[1] == np.datetime64("2024-02-29")
    assert again.feature.values.tolist() == list("abcde")
