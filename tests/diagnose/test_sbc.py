"""Simulation-based calibration: exact guides pass at the stated rate, broken ones do not."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from helpers.checks import linear_gaussian, small_vae
from helpers.guides import MASK, OfWhatWasSeen, altered, conditional, correlated, deaf
from scipy.stats import kstest, norm

import pyro_vae as pv
from pyro_vae.diagnose import _ecdf, calibration, judge_reconstructions, judge_sbc, khat, sbc
from pyro_vae.diagnose.calibration import level_of_latents
from pyro_vae.errors import DataError, ModelError, SettingsError
from pyro_vae.evidence.exact import LinearGaussian

MODEL = linear_gaussian()
LIKELIHOOD = "log p(x|z)"


def test_an_exact_guide_passes_at_the_stated_rate():
    """Of 20 seeds, a test of level .05 refuses more than 5 with probability 3e-4; p-values are uniform."""
    found = [sbc(MODEL.as_vae(), seed=seed) for seed in range(20)]
    assert sum(float(f.joint_p_value) < 0.05 for f in found) <= 5
    for quantity in found[0].quantity.values:
        p = [float(f.p_value.sel(quantity=quantity)) for f in found]
        assert kstest(p, "uniform").pvalue > 1e-4
    assert sum(judge_sbc(f).level == "fine" for f in found) >= 15
    assert not any(judge_sbc(f).level == "bad" for f in found)


BROKEN = {"sd × 0.8": {"factor": 0.8}, "sd × 1.25": {"factor": 1.25}, "a bias of 0.2 sd": {"bias": 0.2}}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_guide_does_not(how):
    found = sbc(altered(MODEL, **BROKEN[how]), simulations=2000)
    assert level_of_latents(found) < 1e-6
    finding = judge_sbc(found)
    assert finding.level == "doubtful", "a small effect, however small its p-value"
    assert finding.why.startswith("on data from the model, not yours, 90 % intervals contain the latents in ")
    word = {"sd × 0.8": "too narrow", "sd × 1.25": "too wide", "a bias of 0.2 sd": "means are off"}[how]
    assert word in finding.next


@pytest.mark.slow
def test_rates_and_power_over_many_seeds():
    """Measured: 2.7 % of 300 exact guides are refused at .05, and each broken one of 20 at the default size."""
    p = np.array([float(sbc(MODEL.as_vae(), seed=seed).joint_p_value) for seed in range(300)])
    assert (p < 0.05).mean() < 0.05 + 5 * (0.05 * 0.95 / 300) ** 0.5
    for how in BROKEN.values():
        p = np.array([float(sbc(altered(MODEL, **how), seed=seed).joint_p_value) for seed in range(20)])
        assert (p < 0.05).sum() >= 19


def test_the_prior_as_guide_passes_by_the_latents_alone_but_not_by_the_likelihood():
    found = [sbc(deaf(MODEL), seed=seed) for seed in range(10)]
    assert sum(level_of_latents(f) < 0.05 for f in found) <= 3, "the ranks of latents are blind to it"
    assert all(float(f.p_value.sel(quantity=LIKELIHOOD)) < 1e-20 for f in found)
    assert all(judge_sbc(f).level == "bad" for f in found)
    assert "too close to the prior" in judge_sbc(found[0]).next


@pytest.mark.parametrize("factor", [1.0, 0.8])
def test_coverage_is_that_of_the_closed_form(factor):
    """A central interval of level c of N(m, f² σ²) holds N(m, σ²) with probability 2 Φ(f Φ⁻¹((1 + c) / 2)) - 1.

    The 399 draws blur its ends by 1/400 each, less than a standard error of 4000 simulations.
    """
    model = LinearGaussian(torch.ones(3, 1).double(), torch.zeros(3).double(), 0.5)
    found = sbc(altered(model, factor=factor), simulations=4000, draws=399)
    level = found.level.values
    truth = 2 * norm.cdf(factor * norm.ppf((1 + level) / 2)) - 1
    z = (found.coverage[0] - truth) / found.coverage_se[0]
    assert abs(z).max() < 5
    assert np.allclose(found.expected_coverage, found.coverage[0])
    assert (abs(found.coverage[0] - level) / found.coverage_se[0]).max() > 5 or factor == 1, "power"


def test_p_values_and_bands_of_uniform_ranks_have_their_rates():
    generator = np.random.default_rng(1)
    ranks = generator.integers(0, 20, size=(200, 3000))
    counts = _ecdf.counts_below(ranks, 20)
    p = np.array([_ecdf.p_value(column, 200)[0] for column in counts.T])
    for rate in (0.01, 0.05, 0.2, 0.5):
        assert abs((p <= rate).mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / 3000) + 0.002
    low, high = _ecdf.band(200, 20, 0.05)
    outside = ((counts < low[:, None]) | (counts > high[:, None])).any(0)
    assert abs(outside.mean() - 0.05) < 5 * np.sqrt(0.05 * 0.95 / 3000)
    assert (outside == (p < 0.05)).mean() > 0.99, "the band says what the p-value says"


def test_ranks_of_ties_are_random():
    """A decoder that does without z: its likelihood ties in every draw, and N(0, I) is the exact guide."""
    model = LinearGaussian(torch.zeros(5, 2).double(), torch.zeros(5).double(), 1.0)
    found = sbc(deaf(model), simulations=1000)
    assert float(found.p_value.sel(quantity=LIKELIHOOD)) > 0.001
    assert set(np.unique(found["rank"].sel(quantity=LIKELIHOOD))) == set(range(100))
    assert judge_sbc(found).level == "fine"


def test_a_tiny_p_value_of_a_small_bias_is_doubtful_and_the_effect_comes_first():
    """A bias of 0.4 sd: 90 % intervals hold 88 %, and 1000 simulations give a p-value below 1e-20."""
    found = sbc(altered(MODEL, bias=0.4), simulations=1000)
    assert float(found.joint_p_value) < 1e-15
    finding = judge_sbc(found)
    assert finding.level == "doubtful"
    assert 0 < finding.why.index("90 % intervals") < finding.why.index("p < 0.001")


def test_coverage_on_reconstructions_is_about_the_given_data():
    """A guide that is right near the origin, where the prior's data lie, and narrow far off, where the user's lie."""
    model = LinearGaussian(torch.ones(5, 1).double(), torch.zeros(5).double(), 0.2)
    vae = model.as_vae()

    class NarrowFarOff(torch.nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, x):
            q = self.encoder(x)
            factor = torch.where(q.mean.abs() > 3.5, 0.2, 1.0)
            return dist.Normal(q.mean, q.stddev * factor).to_event(1)

    vae.encoder = NarrowFarOff(vae.encoder)
    far = 4 * torch.ones(40, 5).double()
    assert judge_sbc(sbc(vae, simulations=500)).level == "fine", "the model's data are not the user's"
    found = sbc(vae, simulations=500, around=far)
    assert found.attrs["latents"] == "data"
    finding = judge_reconstructions(found)
    assert finding.level == "bad"
    assert finding.why.startswith("on reconstructions of these data, 90 % intervals contain the latents in ")
    exact = sbc(model.as_vae(), simulations=500, around=model.sample(500))
    assert abs(exact.expected_coverage - exact.level).max() < 5 * exact.expected_coverage_se.max()


@pytest.mark.parametrize(
    ("held", "error", "level"),
    [
        (0.851, 0.02, "fine"), (0.849, 0.02, "doubtful"), (0.951, 0.001, "doubtful"), (0.841, 0.01, "doubtful"),
        (0.77, 0.01, "bad"), (0.79, 0.01, "doubtful"), (0.93, 0.01, "fine"),
    ],
)  # fmt: skip
def test_the_level_of_coverage_is_that_of_the_thresholds_it_states(held, error, level):
    found = sbc(MODEL.as_vae(), simulations=100, around=torch.zeros(3, 5).double())
    found.expected_coverage.loc[{"level": 0.9}], found.expected_coverage_se.loc[{"level": 0.9}] = held, error
    finding = judge_reconstructions(found)
    assert finding.level == level
    assert "(fine within 5 % of 90 %, bad below 80%;" in finding.why


def test_a_mean_field_guide_of_a_correlated_posterior_is_found_out():
    found = sbc(correlated(0.7).as_vae(diagonal=True))
    assert judge_sbc(found).level == "bad"
    assert found.expected_coverage.sel(level=0.9) < 0.9 - 5 * found.expected_coverage_se.sel(level=0.9)


def test_contexts_reach_the_simulations():
    context = 2 * torch.randn(50, 2)
    assert judge_sbc(sbc(conditional(), context=context)).level == "fine"
    assert judge_sbc(sbc(conditional(heard=False), context=context)).level != "fine", "power"
    with pytest.raises(ModelError, match="context"):
        sbc(conditional())


def test_masks_reach_the_simulations():
    vae, mask = MODEL.as_vae(), MASK.expand(7, 5)
    assert judge_sbc(sbc(vae, mask=mask)).level != "fine", "power: a guide that takes the missing for 0"
    vae.encoder = OfWhatWasSeen(MODEL)
    assert judge_sbc(sbc(vae, mask=mask.numpy())).level == "fine"
    with pytest.raises(DataError, match=r"mask has shape \(4,\) per datum, but the model's data \(5,\)"):
        sbc(vae, mask=mask[:, :4])
    with pytest.raises(DataError, match="pass booleans"):
        sbc(vae, mask=mask.double())
    with pytest.raises(DataError, match="50 contexts and 7 masks"):
        sbc(vae, mask=mask, context=torch.randn(50, 2))


def test_every_member_is_taken():
    from helpers.members import FEATURES, LATENTS, LIKELIHOODS, POSTERIORS, PRIORS, make

    for role, table in {"prior": PRIORS, "decoder": LIKELIHOODS, "encoder": POSTERIORS}.items():
        for name, constructor in table.items():
            vae = small_vae(FEATURES, LATENTS)
            setattr(vae, role, make(constructor))
            found = sbc(vae, simulations=20, draws=9)
            assert found["rank"].shape == (20, LATENTS + 1), name
            assert found.p_value.notnull().all(), name
            assert khat(vae, vae.decoder(torch.randn(3, LATENTS).double()).sample()).khat.notnull().all(), name


def test_discrete_data_and_small_chunks():
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(1),
        decoder=pv.likelihoods.Bernoulli(pv.nn.mlp(1, [4], 6)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(6, [4], 2)),
    )
    found = sbc(vae, simulations=30, draws=9, chunk=100)
    assert found["rank"].shape == (30, 2)
    assert 0 <= int(found["rank"].min()) <= int(found["rank"].max()) <= 9


def test_nothing_is_moved_and_the_same_seed_gives_the_same(tmp_path):
    vae = MODEL.as_vae()
    state = torch.get_rng_state()
    found = sbc(vae, simulations=50, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.equals(sbc(vae, simulations=50, seed=3))
    assert not found.equals(sbc(vae, simulations=50, seed=4))
    found.to_netcdf(tmp_path / "sbc.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "sbc.nc", engine="h5netcdf") as read:
        assert read.equals(found)


@pytest.mark.parametrize(("name", "value"), [("simulations", 19), ("draws", 8), ("chunk", 0), ("draws", 9.5)])
def test_what_cannot_be_is_refused(name, value):
    with pytest.raises(SettingsError, match=f"{name} is {value}"):
        sbc(MODEL.as_vae(), **{name: value})


def test_the_figures_show_what_is_outside():
    from pyro_vae import plots

    found = sbc(deaf(MODEL))
    titles = [axes.get_title() for axes in plots.sbc(found).axes]
    assert any(LIKELIHOOD in title and "outside" in title for title in titles)
    assert any("z[0]" in title and "outside" not in title for title in titles)
    assert plots.coverage(found).axes[0].get_xlabel() == "level of the central interval of q"


class Askew(torch.nn.Module):
    """A guide of which one latent is too narrow, the other too wide."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        q = self.encoder(x)
        factor = torch.tensor([0.7, 1.5]).double()
        return type(q)(q.mean, q.covariance_matrix * factor * factor[:, None])


def test_widths_that_cancel_in_the_mean_are_still_told():
    vae = MODEL.as_vae()
    vae.encoder = Askew(vae.encoder)
    found = sbc(vae, simulations=2000)
    worst = found.p_value.values[:-1].argmin()
    assert f"q of z[{worst}] is too {('narrow', 'wide')[worst]}" in judge_sbc(found).next


def test_means_far_off_are_not_called_narrow_only():
    assert "or its means are far off" in judge_sbc(sbc(altered(MODEL, bias=1.5))).next


def test_a_mask_of_no_rows_is_refused():
    with pytest.raises(DataError, match="at least one row"):
        sbc(MODEL.as_vae(), mask=torch.zeros(0, 5, dtype=torch.bool))


def test_few_draws_do_not_bend_the_coverage():
    found = sbc(MODEL.as_vae(), simulations=3000, draws=9)
    z = (found.coverage - found.level) / found.coverage_se
    assert float(abs(z).max()) < 5
    latents = found.coverage.isel(quantity=slice(-1))
    assert np.allclose(found.expected_coverage, latents.mean("quantity"), rtol=1e-12), "a mean over all latents"
    assert not np.allclose(found.expected_coverage, latents[0], rtol=1e-6), "power"


def test_the_joint_p_value_pays_for_every_quantity():
    found = sbc(altered(MODEL, factor=0.9))
    assert float(found.joint_p_value) == min(1.0, 3 * float(found.p_value.min()))


def test_a_simulation_takes_context_and_mask_of_one_row_and_all_rows_are_taken():
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    context = torch.arange(3.0).unsqueeze(1)
    rows = calibration._sample_contexts(MODEL.as_vae(), context, mask, 100)
    row = rows.context[:, 0].long()
    assert set(row.tolist()) == {0, 1, 2}
    assert torch.equal(rows.mask, mask[row])


def test_a_p_value_beyond_simulation_is_the_sum_over_places():
    assert _ecdf.p_value(np.array([20, 20, 20]), 20) == (pytest.approx(3 * 2 * 0.25**20), 0.0)
