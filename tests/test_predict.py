"""Draws in ArviZ's schema, against closed forms."""

import pytest
import torch
from checks import linear_gaussian, z_score

import pyro_vae as pv
from pyro_vae.errors import SettingsError

MODEL = linear_gaussian()
DIMS = {
    "posterior": ("z", ("chain", "draw", "datum", "latent")),
    "posterior_predictive": ("x", ("chain", "draw", "datum", "feature")),
    "log_likelihood": ("x", ("chain", "draw", "datum")),
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
    import xarray as xr

    tree[0].to_netcdf(tmp_path / "draws.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "draws.nc", engine="h5netcdf") as read:
        assert read.equals(tree[0])


def test_no_draws_are_refused():
    with pytest.raises(SettingsError, match="draws is 0"):
        pv.to_datatree(MODEL.as_vae(), MODEL.sample(2), draws=0)
