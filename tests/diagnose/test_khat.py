"""k̂ and effective sample size, against tails and variances that are known."""

import numpy as np
import pytest
import torch
import xarray as xr
from helpers.checks import linear_gaussian
from helpers.guides import MASK, Altered, OfWhatWasSeen, altered, conditional, conditional_data, correlated
from scipy.stats import genpareto

import pyro_vae as pv
from pyro_vae.diagnose import judge_khat, khat, psis
from pyro_vae.errors import DataError, ModelError, SettingsError
from pyro_vae.evidence.exact import LinearGaussian
from pyro_vae.evidence.psis import _pareto_quantiles, tail_length

MODEL = linear_gaussian()


@pytest.mark.parametrize(("rho", "expected"), [(0.5, 0.479), (0.7, 0.647)])
def test_khat_of_the_best_mean_field_guide_is_the_correlation(rho, expected):
    model = correlated(rho)
    found = khat(model.as_vae(diagonal=True), model.sample(20), num_particles=4000)
    assert abs(found.khat.mean() - expected) < 0.1


@pytest.mark.parametrize("factor", [0.7, 0.5])
def test_khat_of_a_narrow_guide_is_one_less_its_variance(factor):
    """q = N(m, f² σ²): weights grow as exp(z² (1/f² - 1) / 2), whose tail has k = 1 - f²."""
    model = LinearGaussian(torch.ones(3, 1).double(), torch.zeros(3).double(), 0.5)
    found = khat(altered(model, factor=factor), model.sample(20), num_particles=4000)
    assert abs(found.khat.mean() - (1 - factor**2)) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exact_guide_has_no_tail_and_every_draw_counts(dtype):
    model = LinearGaussian(MODEL.weight.to(dtype), MODEL.bias.to(dtype), float(MODEL.scale))
    found = khat(model.as_vae(), MODEL.sample(50), num_particles=200, chunk=1 if dtype == torch.float32 else 10**6)
    assert (found.khat == 0).all()
    assert (abs(found.ess - 200) < 1e-3).all()
    assert (found.ess_se < 1e-3).all()
    assert found.share.values.tolist() == [0, 0]
    assert judge_khat(found).level == "fine"


def test_the_effective_sample_size_is_that_of_the_chi_square():
    """E_q w² = (1 - ρ²) / √(1 - 4ρ²), so ESS / K goes to its inverse, .879 at ρ = .3."""
    model = correlated(0.3)
    found = khat(model.as_vae(diagonal=True), model.sample(60), num_particles=2000)
    truth = np.sqrt(1 - 4 * 0.09) / (1 - 0.09)
    z = (found.ess / 2000 - truth).values
    assert abs(z.mean()) < 5 * z.std(ddof=1) / np.sqrt(60)
    assert abs(z.mean() + 0.02) > 5 * z.std(ddof=1) / np.sqrt(60), "power: an error of 2 % is seen"


@pytest.mark.parametrize("rho", [0.1, 0.3])
def test_the_errors_are_those_that_repeating_shows(rho):
    """The weights have four moments, so that the error of ESS is itself known."""
    model = correlated(rho)
    found = khat(model.as_vae(diagonal=True), model.sample(300), num_particles=1000)
    assert float(found.khat_se.mean()) == pytest.approx(float(found.khat.std(ddof=1)), rel=0.25)
    assert float(found.ess_se.mean()) == pytest.approx(float(found.ess.std(ddof=1)), rel=0.25)


def test_levels_are_right_on_good_and_broken_guides():
    model = correlated(0.3)
    x = model.sample(100)
    assert judge_khat(khat(model.as_vae(diagonal=True), x)).level == "fine"
    assert judge_khat(khat(altered(model, factor=1.3), x)).level == "fine", "too wide covers"
    assert judge_khat(khat(altered(model, factor=0.7), x)).level == "doubtful"
    bad = khat(altered(model, factor=0.4), x)
    assert judge_khat(bad).level == "bad"
    assert "FullNormal" in judge_khat(bad).next
    share = float(bad.share.sel(threshold=0.7))
    assert share == (bad.khat > 0.7).mean()
    assert float(bad.share_se[1]) == pytest.approx((share * (1 - share) / 100) ** 0.5, rel=0.15)


def test_one_bad_datum_is_found_and_the_others_are_not_pooled_with_it():
    class BadFor(Altered):
        def forward(self, x):
            good, bad = self.encoder(x), super().forward(x)
            chosen = (x[..., 0] > 50).unsqueeze(-1).unsqueeze(-1)
            return type(good)(good.mean, torch.where(chosen, bad.covariance_matrix, good.covariance_matrix))

    vae, x = MODEL.as_vae(), MODEL.sample(9)
    x[4, 0] = 100.0
    vae.encoder = BadFor(vae.encoder, factor=0.3)
    found = khat(vae, x)
    assert found.khat[4] > 0.7
    assert (found.khat.drop_sel(datum=4) == 0).all()
    finding = judge_khat(found)
    assert finding.level == "doubtful"
    assert "the worst is datum 4 with" in finding.why


def test_missing_values_and_contexts_are_seen():
    x = MODEL.sample(8)
    data = pv.data.Data(x, mask=MASK.expand(8, 5))
    vae = MODEL.as_vae()
    assert (khat(vae, data).ess < 990).all(), "power: a guide that takes the missing for 0"
    vae.encoder = OfWhatWasSeen(MODEL)
    assert (khat(vae, data).ess > 999.99).all()
    data = conditional_data(8)
    assert (khat(conditional(), data).ess > 999.99).all()
    assert (khat(conditional(heard=False), data).ess < 990).any(), "power: a guide deaf to the context"


def test_weights_without_a_tail_and_weights_that_are_almost_all_zero():
    plateau = torch.where(torch.arange(1000) < 500, 0.0, -3.0).double().unsqueeze(1)
    smoothed, shape = psis(plateau)
    assert shape.tolist() == [0.0]
    assert np.exp(smoothed).sum() == pytest.approx(1)
    few = torch.full((1000, 1), -torch.inf).double()
    few[:3, 0] = torch.tensor([0.0, 1.0, 2.0])
    smoothed, shape = psis(few)
    assert shape.tolist() == [np.inf]
    assert np.exp(smoothed).sum() == pytest.approx(1)


@pytest.mark.parametrize("draws", [25, 99, 100, 225, 226, 500, 1000])
def test_smoothing_is_that_of_arviz(draws):
    """Its ``psislw`` of 0.23 takes ⌈min(S/5, 3√S)⌉ tail draws, as the paper does; log-weights go in as they are."""
    arviz = pytest.importorskip("arviz")
    if not hasattr(arviz, "psislw"):
        pytest.skip("this ArviZ has arviz_stats only")
    torch.manual_seed(0)
    log_weights = torch.randn(draws, 30).double() * torch.linspace(0.1, 3, 30)
    smoothed, khat = psis(log_weights)
    theirs, shape = arviz.psislw(log_weights.T.numpy().copy())
    assert abs(khat - shape).max() < 1e-10
    assert abs(smoothed - theirs).max() < 1e-10


@pytest.mark.parametrize("draws", [100, 225, 400, 2500])
def test_smoothing_is_that_of_arviz_stats_where_it_takes_as_many_tail_draws(draws):
    """It rounds 3√S down, so here S is such that nothing is rounded; it turns the sign of what it is given."""
    from pyro_vae.core.arviz import array_stats

    torch.manual_seed(1)
    log_weights = torch.randn(draws, 30).double() * torch.linspace(0.1, 3, 30)
    smoothed, khat = psis(log_weights)
    theirs, shape = array_stats.psislw(-log_weights.T.numpy())
    assert abs(khat - shape).max() < 1e-10
    assert abs(smoothed - theirs).max() < 1e-10


def test_the_tail_is_rounded_up():
    assert [tail_length(draws) for draws in (25, 26, 99, 225, 226, 1000)] == [5, 6, 20, 45, 46, 95]


def test_parts_of_the_fit_change_nothing(monkeypatch):
    log_weights = 2 * torch.randn(100, 40).double()
    whole = psis(log_weights)
    monkeypatch.setattr("pyro_vae.evidence.psis.CHUNK", 7000)
    assert all(np.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(whole, psis(log_weights), strict=True))


def test_nothing_is_moved_and_the_same_seed_gives_the_same(tmp_path):
    model = correlated(0.5)
    vae, x = model.as_vae(diagonal=True), model.sample(5)
    vae.train()
    state = torch.get_rng_state()
    found = khat(vae, x, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.training
    assert found.equals(khat(vae, x, seed=3))
    assert not found.equals(khat(vae, x, seed=4))
    found.to_netcdf(tmp_path / "khat.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "khat.nc", engine="h5netcdf") as read:
        assert read.equals(found)


def test_what_cannot_be_is_refused():
    vae, x = MODEL.as_vae(), MODEL.sample(3)
    with pytest.raises(SettingsError, match="num_particles is 10; it must be a whole number of at least 25"):
        khat(vae, x, num_particles=10)
    with pytest.raises(ModelError, match="was built for 5"):
        khat(vae, torch.zeros(3, 6))
    with pytest.raises(DataError, match="not finite"):
        khat(vae, torch.full((3, 5), torch.nan))
    x[1] = 1e200
    with pytest.raises(ModelError, match="the importance weights of datum 1 are all 0"):
        khat(vae, x)
    with pytest.raises(ModelError, match="datum 1 are all 0, or one is infinite or NaN"):
        khat(vae, x, chunk=1)


def judged(shape):
    """The level of data with these k̂."""
    shape = np.array(shape)
    shares = [(shape > t).mean() for t in (0.5, 0.7)]
    variables = {"khat": ("datum", shape), "khat_se": ("datum", 0 * shape), "ess": ("datum", 0 * shape)}
    variables |= {"share": ("threshold", shares), "share_se": ("threshold", [0.0, 0.0])}
    return judge_khat(xr.Dataset(variables, attrs={"num_particles": 100})).level


def test_the_thresholds_of_the_verdict():
    assert judged([0.4] * 98 + [0.8] * 2) == "fine"
    assert judged([0.4] * 97 + [0.8] * 3) == "doubtful"
    assert judged([0.4] * 75 + [0.8] * 25) == "doubtful"
    assert judged([0.4] * 74 + [0.8] * 26) == "bad"
    assert judged([0.6] * 100) == "doubtful", "half the data have no variance of weights to speak of"


def test_a_share_of_none_among_few_is_not_certain():
    found = khat(MODEL.as_vae(), MODEL.sample(4))
    assert found.share[1] == 0
    assert 0.1 < float(found.share_se[1]) < 0.3


def test_the_figure_names_the_worst():
    vae, x = altered(correlated(0.6), factor=0.7), correlated(0.6).sample(20)
    found = khat(vae, x, num_particles=100)
    figure = pv_plots().khat(found, x=x, image_shape=(1, 2), worst=3)
    worst = int(found.khat.values.argmax())
    text = [t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text"))]
    assert any(f"datum {worst}" in t for t in text)
    assert len([t for t in text if t.startswith("datum ") and "k̂" in t]) == 3
    with pytest.raises(SettingsError, match="pass x="):
        pv_plots().khat(found, image_shape=(1, 2))
    with pytest.raises(SettingsError, match="pass the data of the diagnostic"):
        pv_plots().khat(found, x=x[:3], image_shape=(1, 2))


def test_the_figure_shows_what_is_infinite():
    model = correlated(0.3)
    found = khat(model.as_vae(diagonal=True), model.sample(4), num_particles=100)
    found.khat[2] = found.khat_se[2] = np.inf
    pv_plots().khat(found).canvas.draw()
    assert "the worst is datum 2 with inf" in judge_khat(found).why


def pv_plots():
    from pyro_vae import plots

    return plots


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.5, 1.0])
def test_the_quantiles_of_a_tail_are_those_of_scipy(shape):
    probability = np.linspace(0.05, 0.95, 7)
    found = _pareto_quantiles(probability, np.array(shape), np.array(2.0))
    assert found == pytest.approx(genpareto(shape, scale=2.0).ppf(probability), rel=1e-10)
    assert np.isnan(_pareto_quantiles(probability, np.array(shape), np.array(0.0))).all()
