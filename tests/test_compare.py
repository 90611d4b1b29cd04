"""``compare_elbos``: its numbers against exact ones, its labels, its verdict."""

import copy

import numpy as np
import pyro
import pytest
import torch
from checks import linear_gaussian, loss_and_gradients, small_vae, untimed

import pyro_vae as pv
from pyro_vae.compare import note_elbos, verdict
from pyro_vae.errors import ModelError, PyroVAEError, SettingsError


def away_from_the_best_guide():
    """An oracle, and a VAE of it whose guide is noisy under every estimator."""
    model = linear_gaussian()
    vae = model.as_vae(diagonal=True)
    vae.encoder.net.bias.data += 0.3
    return model, vae, model.sample(10)


def test_values_cover_the_exact_elbo_by_their_own_error():
    model, vae, x = away_from_the_best_guide()
    table = pv.compare_elbos(vae, x, note_elbos(), draws=400)
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
        noise = table.noise_seed.values[draw].item()
        loss, _ = loss_and_gradients(pv.elbo.Trace_ELBO(), vae, x, 130, seed=noise)
        assert table.value.values[0, 0, draw] == pytest.approx(-loss.item() / 130, abs=1e-12)


@pytest.mark.parametrize(
    ("term", "value_differs", "gradient_differs"),
    [
        (lambda q: 1e-6 * q.variance.sum(-1), True, True),
        (lambda q: 1e-6 * (q.variance - q.variance.detach()).sum(-1), False, True),
        (lambda q: 1e-6 * q.variance.detach().sum(-1), True, False),
        (lambda q: 1e-6 * (q.variance - q.variance.mean(0)).detach()[:, 0], True, False),
    ],
    ids=["both", "gradient alone", "value alone", "of either sign, with mean 0"],
)
def test_planted_errors_are_disagreements(term, value_differs, gradient_differs):
    vae, x = small_vae(), torch.randn(10, 6).double()

    class Wrong(pv.elbo.TraceMeanField_ELBO):
        def differentiable_loss(self, model, guide, x, size):
            right = super().differentiable_loss(model, guide, x, size)
            site = pyro.poutine.trace(guide).get_trace(x, size).nodes["z"]
            return right + (site["scale"] * term(site["fn"])).sum()

    table = pv.compare_elbos(vae, x, {"TraceMeanField_ELBO": Wrong()}, draws=2)
    assert (table.difference.item() > 1e-8) == value_differs
    assert (table.gradient_difference.item() > 1e-10) == gradient_differs
    assert "DISAGREE" in verdict(table)


def test_vectorised_estimators_keep_the_same_noise_when_used_again():
    """Pyro guesses the nesting of plates at first use, and draws noise to do so."""
    vae, x = small_vae(), torch.randn(10, 6)
    used = pv.elbo.TraceMeanField_ELBO(num_particles=3, vectorize_particles=True)
    for _ in range(2):
        assert pv.compare_elbos(vae, x, {"a": used}, draws=2).difference < 1e-12
    used.differentiable_loss(vae.model, vae.guide, x.double())
    assert pv.compare_elbos(vae, x, {"a": used}, draws=2).difference < 1e-12


def test_neighbouring_seeds_share_no_draw():
    vae, x = small_vae(), torch.randn(10, 6)
    first, second = (set(pv.compare_elbos(vae, x, draws=20, seed=s).noise_seed.values.tolist()) for s in (0, 1))
    assert len(first) == len(second) == 20
    assert not first & second


def test_a_partial_is_compared_with_as_many_particles_and_named():
    from functools import partial

    vae, x = small_vae(), torch.randn(10, 6)
    vae.decoder.fixed_scale.fill_(0.5**0.5)
    table = pv.compare_elbos(vae, x, {"printed": partial(pv.elbo.note_objective, num_particles=5)}, draws=2)
    assert table.difference.item() == pytest.approx(3 * np.log(np.pi), abs=1e-6), "the constant of (26) at s² = ½"
    assert table.kl.values.tolist() == ["by hand"]
    unknown = pv.compare_elbos(vae, x, {"mine": lambda *a: pv.elbo.Trace_ELBO().differentiable_loss(*a)}, draws=2)
    assert unknown.kl.values.tolist() == ["unknown"]


@pytest.mark.parametrize(
    ("elbos", "message"),
    [
        ({}, "elbos is empty"),
        ({"renyi": pyro.infer.RenyiELBO(alpha=0)}, "RenyiELBO has no differentiable_loss"),
        ({"a": pv.elbo.Trace_ELBO}, "is a class; give an instance, Trace_ELBO()"),
    ],
)
def test_what_is_no_estimator_is_refused(elbos, message):
    with pytest.raises(PyroVAEError, match=message.replace("(", "\\(").replace(")", "\\)")):
        pv.compare_elbos(small_vae(), torch.randn(10, 6), elbos, draws=2)


def test_it_works_without_gradients_around_it_and_refuses_where_there_can_be_none():
    vae, x = small_vae(), torch.randn(10, 6)
    with torch.no_grad():
        assert pv.compare_elbos(vae, x, draws=2).sel(estimator="TraceMeanField_ELBO").difference < 1e-12
    with pytest.raises(ModelError, match="too coarse to compare in"):
        pv.compare_elbos(small_vae().to(torch.bfloat16), x, draws=2)
    vae.requires_grad_(False)
    with pytest.raises(ModelError, match="every parameter is frozen"):
        pv.compare_elbos(vae, x, draws=2)


def test_same_seed_same_table_and_nothing_is_trained():
    vae, x = small_vae(), torch.randn(10, 6)
    before = copy.deepcopy(vae.state_dict())
    first, again, other = (untimed(pv.compare_elbos(vae, x, draws=3, seed=s)) for s in (0, 0, 9))
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
    assert table.sel(estimator="seven", particles=7).difference < 1e-12, "against seven particles by hand"
    assert table.sel(estimator="printed", particles=1).difference > 0.1
    assert np.isnan(table.sel(estimator="seven", particles=1).elbo), "each with its own number"


def test_an_estimator_that_is_no_sum_over_data_is_refused():
    def joint(model, guide, x, size):
        return pv.elbo.Trace_ELBO().differentiable_loss(model, guide, x, size) ** 2

    with pytest.raises(ModelError, match="joint is not a sum over the plate 'data'"):
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
