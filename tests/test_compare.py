"""``compare_elbos``: its numbers against exact ones, its labels, its verdict."""

import copy

import pyro
import pytest
import torch
from checks import linear_gaussian, loss_and_gradients, small_vae

import pyro_vae as pv
from pyro_vae.compare import verdict
from pyro_vae.errors import ModelError, SettingsError


def away_from_the_best_guide():
    """An oracle, and a VAE of it whose guide is noisy under every estimator."""
    model = linear_gaussian()
    vae = model.as_vae(diagonal=True)
    vae.encoder.net.bias.data += 0.3
    return model, vae, model.sample(10)


def test_values_cover_the_exact_elbo_by_their_own_error():
    model, vae, x = away_from_the_best_guide()
    table = pv.compare_elbos(vae, x, draws=400)
    exact = model.elbo(x, vae.encoder(x)).mean().item()
    z = (table.elbo - exact) / table.elbo_se
    assert (abs(z) < 5).all()
    assert (abs((table.elbo - exact * 1.05) / table.elbo_se) > 5).all(), "power: 5 % off is seen"
    assert table.elbo_sd.values == pytest.approx(table.value.std("draw", ddof=1).values)
    assert table.elbo_se.values == pytest.approx(table.elbo_sd.values / 400**0.5)


@pytest.mark.parametrize("size", [None, 130])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pyros_analytic_elbo_agrees_with_the_hand_derived_one(dtype, size):
    vae, x = small_vae(learn_scale=True).to(dtype), torch.randn(10, 6)
    table = pv.compare_elbos(vae, x, draws=5, size=size)
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    row = table.sel(estimator="TraceMeanField_ELBO")
    assert row.difference < bound
    assert row.gradient_difference < bound
    assert table.sel(estimator="Trace_ELBO").difference > 0.01, "power: another estimator differs"
    assert table.attrs["dtype"] == str(dtype)
    assert table.attrs["size"] == (size or 10)
    assert table.datum_elbo.mean("datum").values == pytest.approx(table.elbo.values, rel=1e-5)


def test_values_per_datum_add_up_to_the_loss_under_subsampling():
    vae, x = small_vae(), torch.randn(10, 6).double()
    table = pv.compare_elbos(vae, x, {"Trace_ELBO": pv.elbo.Trace_ELBO()}, draws=2, size=130, seed=4)
    for draw in range(2):
        loss, _ = loss_and_gradients(pv.elbo.Trace_ELBO(), vae, x, 130, seed=4 + draw)
        assert table.value.values[0, draw] == pytest.approx(-loss.item() / 130, abs=1e-12)


def test_a_planted_error_in_the_kl_is_a_disagreement():
    class Wrong(pv.elbo.TraceMeanField_ELBO):
        """The KL counted once and a thousandth of a thousandth too much."""

        def differentiable_loss(self, model, guide, x, size):
            return super().differentiable_loss(model, guide, x, size) + 1e-6 * self.kl(model, guide, x, size)

        def kl(self, model, guide, x, size):
            trace = pyro.poutine.trace(guide).get_trace(x, size)
            q, scale = trace.nodes["z"]["fn"], trace.nodes["z"]["scale"]
            return (scale * torch.distributions.kl_divergence(q, small_vae().prior())).sum()

    vae, x = small_vae(), torch.randn(10, 6).double()
    right = verdict(pv.compare_elbos(vae, x, draws=2))
    wrong = verdict(pv.compare_elbos(vae, x, {"TraceMeanField_ELBO": Wrong()}, draws=2))
    assert " agree to " in right
    assert "DISAGREE" in wrong


def test_same_seed_same_table_and_nothing_is_trained():
    vae, x = small_vae(), torch.randn(10, 6)
    before = copy.deepcopy(vae.state_dict())
    first, again, other = (pv.compare_elbos(vae, x, draws=3, seed=s).drop_vars("seconds") for s in (0, 0, 9))
    assert first.identical(again)
    assert not first.value.equals(other.value)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    assert all(p.grad is None for p in vae.parameters())


def test_users_estimators_and_the_printed_objective():
    vae, x = small_vae(), torch.randn(10, 6)
    table = pv.compare_elbos(
        vae, x, {"seven": pv.elbo.TraceMeanField_ELBO(7), "printed": pv.elbo.note_objective}, draws=3
    )
    assert table.estimator.values.tolist() == ["seven", "printed"]
    assert table.sel(estimator="seven").difference < 1e-12, "against seven particles by hand"
    assert table.sel(estimator="printed").difference > 0.1


def test_an_estimator_that_is_no_sum_over_data_is_refused():
    def joint(model, guide, x, size):
        return pv.elbo.Trace_ELBO().differentiable_loss(model, guide, x, size) ** 2

    with pytest.raises(ModelError, match="joint is not a sum over data"):
        pv.compare_elbos(small_vae(), torch.randn(10, 6), {"joint": joint}, draws=2)


def test_too_few_draws_are_refused():
    with pytest.raises(SettingsError, match="draws is 1"):
        pv.compare_elbos(small_vae(), torch.randn(10, 6), draws=1)


def test_it_is_written_and_read_as_netcdf(tmp_path):
    import xarray as xr

    table = pv.compare_elbos(small_vae(), torch.randn(10, 6), draws=3)
    table.to_netcdf(tmp_path / "comparison.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "comparison.nc", engine="h5netcdf") as read:
        assert read.equals(table)
        assert read.attrs["draws"] == 3
