"""KL per latent, active units and ELBO surgery, against closed forms and quadrature."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
import zuko
from helpers.checks import linear_gaussian, small_vae
from helpers.guides import MASK, OfWhatWasSeen, conditional, conditional_data, correlated, deaf

import pyro_vae as pv
from pyro_vae.core.zuko import FlowDistribution
from pyro_vae.diagnose import collapse, judge_collapse
from pyro_vae.errors import DataError, SettingsError
from pyro_vae.evidence.exact import LinearGaussian

MODEL = linear_gaussian()


def at_fixed_noise(x, variance, latents):
    """The best linear model of given noise s²: W = U (Λ - s²)^½, its columns 0 where λ < s²; and λ."""
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    values, vectors = values.flip(0)[:latents], vectors.flip(1)[:, :latents]
    return LinearGaussian(vectors * (values - variance).clamp(min=0).sqrt(), mean, variance**0.5), values


@pytest.mark.parametrize(("variance", "expected"), [(0.1, 12), (0.3, 4)])
def test_latents_collapse_where_the_noise_is_above_the_eigenvalue(variance, expected):
    """Per dimension the KL is ½ log(λ / s²), and the posterior mean's variance 1 - s² / λ (Lucas et al. 2019)."""
    x = pv.data.digits().x.double()
    model, values = at_fixed_noise(x, variance, 16)
    found = collapse(model.as_vae(diagonal=True), x[:], draws=2)
    above = values > variance
    assert int(found.active.sum()) == int(above.sum()) == expected
    kl = torch.where(above, 0.5 * (values / variance).log(), 0.0)
    assert np.abs(found.kl.values - kl.numpy()).max() < 1e-10
    spread = torch.where(above, 1 - variance / values, 0.0)
    assert np.abs(found.mean_variance.values - spread.numpy()).max() < 1e-10
    assert (found.kl_se == 0).all()
    assert float(found.closed_form_kl) == pytest.approx(float(kl.sum()), abs=1e-9)
    assert abs(float(found.mean_kl) - float(kl.sum())) < 5 * float(found.mean_kl_se)
    assert judge_collapse(found).level == "doubtful"
    assert f"{expected} of 16 latents are active" in judge_collapse(found).why


@pytest.mark.parametrize("diagonal", [True, False])
def test_the_surgery_adds_up_and_the_information_is_bounded(diagonal):
    found = collapse(MODEL.as_vae(diagonal=diagonal), MODEL.sample(40), draws=10)
    assert abs(float(found.residual)) < 1e-10
    assert float(found.mutual_information) < math.log(40) + 1e-12
    assert abs(float(found.mean_kl - found.closed_form_kl)) < 5 * float(found.mean_kl_se)
    assert abs(float(found.mean_kl - 1.02 * found.closed_form_kl)) > float(found.mean_kl_se), "power"
    assert judge_collapse(found).level == "fine"


def test_information_and_marginal_kl_are_those_of_quadrature():
    model = LinearGaussian(torch.tensor([[0.7], [0.4]]).double(), torch.zeros(2).double(), 0.8)
    x = model.sample(6)
    q = model.posterior(x)
    grid = torch.linspace(-10, 10, 8001, dtype=torch.float64)
    each = dist.Normal(q.mean, q.variance.sqrt()).log_prob(grid)  # (datum, grid)
    whole = each.logsumexp(0) - math.log(6)
    step = grid[1] - grid[0]
    information = float((each.exp() * (each - whole)).sum(1).mean() * step)
    marginal = float((whole.exp() * (whole - dist.Normal(0.0, 1.0).log_prob(grid))).sum() * step)
    found = collapse(model.as_vae(), x, draws=20_000)
    for name, truth in ("mutual_information", information), ("marginal_kl", marginal):
        error = float(found[f"{name}_se"])
        assert abs(float(found[name]) - truth) < 5 * error
        assert abs(float(found[name]) - 1.1 * truth) > 5 * error, "power"
    assert float(found.marginal_kl_of_latent[0]) == pytest.approx(float(found.marginal_kl), rel=1e-9), (
        "there is but one"
    )
    assert information + marginal == pytest.approx(float(found.closed_form_kl), abs=1e-8)


def test_data_told_apart_fully_give_all_the_information_there_is():
    model = LinearGaussian(torch.eye(2).double(), torch.zeros(2).double(), 1e-3)
    found = collapse(model.as_vae(), 10 * torch.randn(30, 2).double(), draws=3)
    assert float(found.mutual_information) == pytest.approx(math.log(30), abs=1e-6)
    why = judge_collapse(found).why
    assert "close to log n = 3.40 nats, the largest value" in why
    assert "KL(q(z)‖p(z)) at most" in why
    assert why.count("(over draws)") == 3, "the data are given"


def test_the_prior_as_guide_is_called_collapsed():
    found = collapse(deaf(MODEL), MODEL.sample(20))
    names = ["kl", "mean_variance", "active", "mean_kl", "mutual_information", "marginal_kl", "marginal_kl_of_latent"]
    for name in names:
        assert abs(found[name]).max() < 1e-12, name
    finding = judge_collapse(found)
    assert finding.level == "bad"
    assert "0 of 2 latents are active" in finding.why


def test_errors_are_those_that_repeating_shows():
    vae, x = MODEL.as_vae(diagonal=True), MODEL.sample(10)
    vae.prior = pv.priors.GaussianMixture(2, components=3).double()
    runs = xr.concat([collapse(vae, x, draws=4, seed=s) for s in range(150)], "run")
    for name in ("mean_kl", "mutual_information", "marginal_kl", "kl", "marginal_kl_of_latent"):
        ratio = runs[f"{name}_se"].mean("run") / runs[name].std("run", ddof=1)
        assert (abs(ratio - 1) < 0.3).all(), name


def test_errors_are_of_draws_within_each_datum_not_of_data():
    """The data lie far apart: the error of draws of one population, all independent, would be far too large."""
    vae, x = MODEL.as_vae(diagonal=True), MODEL.sample(8) * torch.linspace(0.2, 6, 8).double().unsqueeze(-1)
    vae.prior = pv.priors.GaussianMixture(2, components=3).double()
    runs = xr.concat([collapse(vae, x, draws=6, seed=s) for s in range(200)], "run")
    for name in ("mean_kl", "marginal_kl", "kl", "marginal_kl_of_latent"):
        ratio = (runs[f"{name}_se"] ** 2).mean("run") ** 0.5 / runs[name].std("run", ddof=1)
        assert (abs(ratio - 1) < 5 * (1 / 400) ** 0.5).all(), name
    kls = collapse(vae, x, draws=6).kl_sd / np.sqrt(8)
    assert (kls > 3 * runs.kl_se.mean("run")).any(), "power: data differ more than draws"


def test_a_kl_without_closed_form_is_sampled():
    """A mixture of one normal, and of normals that are alike, is that normal; a Laplace or t prior has quadrature."""
    vae, x = small_vae(), torch.randn(20, 6).double()
    exact = collapse(vae, x)
    assert exact.attrs["kl_of_latent"] == "closed form"
    mixture = pv.priors.GaussianMixture(3, components=2).double()
    with torch.no_grad():
        mixture.loc.zero_()
        mixture.log_scale.zero_()
    vae.prior = mixture
    found = collapse(vae, x, draws=2000)
    assert found.attrs["kl_of_latent"] == "Monte Carlo"
    assert math.isnan(float(found.closed_form_kl))
    assert (abs(found.kl - exact.kl) < 5 * found.kl_se).all()
    assert (abs(found.kl - 1.2 * exact.kl) > 5 * found.kl_se).any(), "power"
    vae.prior = pv.priors.StudentT(3, df=5.0).double()
    found = collapse(vae, x, draws=2000)
    q, grid = vae.encoder(x), torch.linspace(-12, 12, 6001, dtype=torch.float64)[:, None, None]
    log_q, log_p = (d.log_prob(grid) for d in (q.base_dist, vae.prior().base_dist))
    truth = ((log_q.exp() * (log_q - log_p)).sum(0) * 24 / 6000).mean(0)
    assert (abs(found.kl - truth.detach().numpy()) < 5 * found.kl_se).all()


def test_marginals_of_a_correlated_guide():
    model = correlated(0.7)
    found = collapse(model.as_vae(), x := model.sample(20))
    q = model.posterior(x)
    kl = torch.distributions.kl_divergence(dist.Normal(q.mean, q.stddev), dist.Normal(0.0, 1.0)).mean(0)
    assert np.abs(found.kl.values - kl.numpy()).max() < 1e-12
    assert abs(float(found.kl.sum() - found.closed_form_kl)) > 0.1, "marginals do not add up to the whole, here"


def test_flows_have_no_marginals_but_all_the_rest():
    vae = small_vae()
    flow = zuko.flows.NICE(3, context=4, transforms=2, hidden_features=[8])
    vae.encoder = pv.posteriors.Flow(flow, net=pv.nn.mlp(6, [8], 4)).double()
    found = collapse(vae, torch.randn(7, 6), draws=3)
    assert found.kl.isnull().all()
    assert found.attrs["kl_of_latent"] == "not known"
    assert abs(float(found.residual)) < 1e-10
    assert float(found.mutual_information) + 5 * float(found.mutual_information_se) >= 0


def test_every_prior_and_posterior_is_taken():
    from helpers.members import FEATURES, LATENTS, POSTERIORS, PRIORS, make

    x = torch.randn(6, FEATURES)
    for name, constructor in (PRIORS | POSTERIORS).items():
        vae = small_vae(FEATURES, LATENTS)
        setattr(vae, "prior" if name in PRIORS and constructor is PRIORS[name] else "encoder", make(constructor))
        found = collapse(vae, x, draws=2)
        assert abs(float(found.residual)) < 1e-9, name


def test_missing_values_are_not_seen():
    x = MODEL.sample(20)
    vae = MODEL.as_vae()
    vae.encoder = OfWhatWasSeen(MODEL)
    tables = []
    for junk in (0.0, 1e6):
        tables.append(
            collapse(vae, pv.data.Data(torch.where(MASK, x, torch.tensor(junk).double()), mask=MASK.expand(20, 5)))
        )
    assert tables[0].equals(tables[1])


def test_a_prior_that_depends_on_the_context():
    data = conditional_data(50)
    vae = conditional()
    found = collapse(vae, data)
    q, p = vae.encoder(data.x, data.context), vae.prior(data.context)
    kl = torch.distributions.kl_divergence(q, p)
    assert float(found.kl[0]) == pytest.approx(float(kl.mean()), abs=1e-12)
    assert float(found.mean_variance[0]) == pytest.approx(float((q.mean - p.mean).var(correction=0)), abs=1e-12)
    assert math.isnan(float(found.mutual_information))
    assert judge_collapse(found).level == "fine"

    class OfPrior(torch.nn.Module):
        def forward(self, x, context):
            return p.__class__(p.base_dist, 1) if len(x) == 50 else vae.prior(context)

    vae.encoder = OfPrior()
    assert judge_collapse(collapse(vae, data)).level == "bad", "means that follow the context carry nothing"


def test_blocks_change_nothing_and_nothing_is_moved(tmp_path):
    vae, x = MODEL.as_vae(), MODEL.sample(30)
    state = torch.get_rng_state()
    found = collapse(vae, x, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    small = collapse(vae, x, seed=3, chunk=150)
    for name in found:
        assert np.allclose(found[name], small[name], atol=1e-12, equal_nan=True), name
    several = collapse(vae, x, seed=3, chunk=37, draws=40)
    error = float(several.mutual_information_se + found.mutual_information_se)
    assert abs(float(several.mutual_information - found.mutual_information)) < 5 * error, "with several parts"
    assert not found.equals(collapse(vae, x, seed=4))
    found.to_netcdf(tmp_path / "collapse.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "collapse.nc", engine="h5netcdf") as read:
        assert read.equals(found)


def test_what_cannot_be_is_refused():
    vae = MODEL.as_vae()
    with pytest.raises(SettingsError, match="draws is 1"):
        collapse(vae, MODEL.sample(3), draws=1)
    with pytest.raises(DataError, match="there is only one datum"):
        collapse(vae, MODEL.sample(1))


def test_the_figure_says_how_many_are_active():
    from pyro_vae import plots

    figure = plots.collapse(collapse(deaf(MODEL), MODEL.sample(20)))
    assert any("0 of 2 latents are active" in axes.get_title() for axes in figure.axes)


class Wide(torch.nn.Module):
    """A flow deaf to the data whose sd is 3; means of 256 draws have a variance of .035."""

    def forward(self, x):
        return FlowDistribution(zuko.distributions.DiagNormal(x.new_zeros(len(x), 3), 3 * x.new_ones(len(x), 3)))


def test_noise_in_the_means_of_flows_does_not_make_a_latent_active():
    vae = small_vae()
    vae.encoder = Wide()
    x = torch.randn(300, 6).double()
    assert (vae.encoder(x).mean.var(0) > 0.02).all(), "power"
    found = collapse(vae, x)
    assert (found.mean_variance < 0.01).all()
    assert judge_collapse(found).level == "bad"


def test_spreads_over_data_are_those_of_the_closed_forms():
    """Posterior means of data of the model are normal, so that their variance has the relative error √(2 / n)."""
    vae, x = MODEL.as_vae(diagonal=True), MODEL.sample(2000)
    found = collapse(vae, x, draws=2)
    assert np.allclose(found.mean_variance_se, found.mean_variance * (2 / 2000) ** 0.5, rtol=0.2)
    kl = torch.distributions.kl_divergence(vae.encoder(x).base_dist, dist.Normal(0.0, 1.0)).detach()
    assert np.allclose(found.kl_sd, kl.std(0))
