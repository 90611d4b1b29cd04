"""What the ELBO loses, and to what, against closed forms, quadrature and importance sampling."""

from functools import partial

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
import zuko
from helpers.checks import linear_gaussian, small_vae
from helpers.guides import off_centre
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnose import judge_gaps
from pyro_vae.diagnose.free import diagonal
from pyro_vae.diagnose.gaps import mean_gap, optimizer_converged
from pyro_vae.errors import DataError, ModelError, SettingsError

MODEL = linear_gaussian()
SETTINGS = {"steps": 250, "num_particles": 1000}
broken = partial(off_centre, MODEL)


def off(found, name, truth):
    """How many standard errors each datum's number lies from the truth, with rounding and the optimizer's rest."""
    truth = np.asarray(truth)
    return np.abs(found[name].values - truth) / np.sqrt(found[f"{name}_se"].values ** 2 + 5e-4**2)


def adds_up(found):
    return float(abs(found.gap - found.approximation_gap - found.amortization_gap).max()) < 1e-10


@pytest.fixture(scope="module")
def x():
    torch.manual_seed(0)
    return MODEL.sample(12)


@pytest.fixture(scope="module")
def truth():
    """What the best diagonal normal loses in any case."""
    a = MODEL.precision
    return float(0.5 * (a.diagonal().log().sum() - a.logdet()))


def test_the_exact_guide_loses_nothing(x):
    found = pv.inference_gaps(MODEL.as_vae(), x, **SETTINGS)
    assert float(max(abs(found[n]).max() for n in ("gap", "approximation_gap", "amortization_gap"))) < 1e-4
    assert float(abs(found.closed).max()) < 2e-3, "what the optimizer of full normals lacks"
    assert judge_gaps(found).level == "fine"


def test_the_best_diagonal_guide_loses_its_familys_part_only(x, truth):
    found = pv.inference_gaps(MODEL.as_vae(diagonal=True), x, steps=250, num_particles=4000)
    assert off(found, "approximation_gap", truth).max() < 5
    assert off(found, "amortization_gap", 0.0).max() < 5
    assert off(found, "closed", truth).max() < 5
    assert float(abs(found.richer_gap).max()) < 1e-3, "the posterior itself is found"
    assert found.attrs["family"] == "DiagNormal"
    assert found.attrs["log_evidence_from"] == "linear-Gaussian"
    assert adds_up(found)
    assert float(found.approximation_gap_se.max()) < truth / 6, "power: no gap would be seen"


@pytest.mark.parametrize(("shift", "factor", "level"), [(0.0, 0.3, "bad"), (1.5, 1.0, "bad"), (0.0, 0.6, "doubtful")])
def test_a_broken_encoder_is_amortization(x, truth, shift, factor, level):
    vae = broken(shift, factor)
    found = pv.inference_gaps(vae, x, **SETTINGS)
    exact = MODEL.elbo(x, MODEL.best_diagonal(x)) - MODEL.elbo(x, vae.encoder(x))
    assert off(found, "amortization_gap", exact.detach()).max() < 5
    assert off(found, "approximation_gap", truth).max() < 5
    assert off(found, "gap", (MODEL.log_marginal(x) - MODEL.elbo(x, vae.encoder(x))).detach()).max() < 5
    assert adds_up(found)
    judged = judge_gaps(found)
    assert judged.level == level
    assert "encoder" in judged.next


def test_a_family_too_small_is_told_from_its_encoder(truth):
    """Strong correlations a posteriori, which no diagonal normal has."""
    weight = torch.tensor([[1.0, 0.95], [0.95, 1.0], [1.0, 1.0]], dtype=torch.float64)
    model = pv.exact.LinearGaussian(weight, torch.zeros(3).double(), 0.2)
    x = model.sample(5)
    judged = judge_gaps(pv.inference_gaps(model.as_vae(diagonal=True), x, **SETTINGS))
    assert judged.level == "bad"
    assert "FullNormal" in judged.next
    assert "encoder" not in judged.next


def hidden(latents: int = 3):
    """A linear-Gaussian VAE that does not look like one, so that no oracle is found."""
    model = linear_gaussian(features=5, latents=latents)
    vae = model.as_vae(diagonal=True)
    vae.decoder.net = nn.Sequential(vae.decoder.net, nn.Identity())
    return model, vae


def test_without_an_oracle_the_evidence_is_importance_weighted():
    model, vae = hidden()
    x = model.sample(8)
    found = pv.inference_gaps(vae, x, **SETTINGS)
    assert found.attrs["log_evidence_from"].startswith("importance-weighted")
    assert off(found, "log_evidence", model.log_marginal(x)).max() < 5
    assert off(found, "approximation_gap", model.log_marginal(x) - model.elbo(x, model.best_diagonal(x))).max() < 5
    assert float(found.khat.max()) < 0.7
    assert adds_up(found)


def test_quadrature_is_the_oracle_of_two_latents_and_the_order_holds():
    vae = small_vae(latents=2)
    x = torch.randn(10, 6, dtype=torch.float64)
    found = pv.inference_gaps(vae, x, **SETTINGS)
    assert found.attrs["log_evidence_from"] == "quadrature"
    order = [found[n].values for n in ("log_evidence", "richer_elbo", "best_elbo", "elbo")]
    errors = [found[f"{n}_se"].values for n in ("richer_gap", "closed", "amortization_gap")]
    for above, below, error in zip(order, order[1:], errors, strict=False):
        assert (above >= below - 5 * error - 1e-9).all()
    assert float(found.amortization_gap.min()) > 0.05, "an untrained encoder"


def test_missing_values_leave_the_likelihood(x):
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[:, -1] = False
    smaller = pv.exact.LinearGaussian(MODEL.weight[:-1], MODEL.bias[:-1], MODEL.scale)
    found = pv.inference_gaps(MODEL.as_vae(), pv.data.Data(x, mask=mask), **SETTINGS)
    assert off(found, "log_evidence", smaller.log_marginal(x[:, :-1])).max() < 5
    q = MODEL.as_vae().encoder(torch.where(mask, x, 0.0))
    assert off(found, "elbo", smaller.elbo(x[:, :-1], q).detach()).max() < 5


def test_given_evidence_is_taken_with_its_error(x, tmp_path):
    value = MODEL.log_marginal(x) + 0.5
    found = pv.inference_gaps(MODEL.as_vae(), x, log_evidence=value, steps=2)
    assert abs(found.gap - 0.5).max() < 1e-9
    assert found.attrs["log_evidence_from"] == "given"
    labelled = xr.Dataset({"log_evidence": ("datum", value.numpy()), "mcse": ("datum", np.full(len(x), 0.2))})
    assert np.allclose(pv.inference_gaps(MODEL.as_vae(), x, log_evidence=labelled, steps=2).gap_se, 0.2)
    found.to_netcdf(tmp_path / "found.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "found.nc", engine="h5netcdf") as read:
        assert read.equals(found)
    with pytest.raises(DataError, match="one number per datum"):
        pv.inference_gaps(MODEL.as_vae(), x, log_evidence=value[:2])


def posteriors():
    full = pv.posteriors.FullNormal
    low_rank = pv.posteriors.LowRankNormal
    return {
        "FullNormal": lambda: full(pv.nn.mlp(5, [], full.outputs(2))),
        "LowRankNormal": lambda: low_rank(pv.nn.mlp(5, [], low_rank.outputs(2, rank=1))),
        "Flow": lambda: pv.posteriors.Flow(zuko.flows.NICE(2, context=4, transforms=2), net=pv.nn.mlp(5, [], 4)),
        "DiagNormal": lambda: pv.posteriors.Refined(pv.nn.mlp(5, [], 4), steps=3),
    }


@pytest.mark.parametrize("name", posteriors())
def test_every_kind_of_posterior_adds_up_and_keeps_the_order(x, name):
    torch.manual_seed(0)
    vae = MODEL.as_vae()
    vae.encoder = posteriors()[name]().double()
    found = pv.inference_gaps(vae, x[:4], **SETTINGS)
    assert adds_up(found)
    assert found.attrs["family"] == name
    for difference in ("richer_gap", "closed", "amortization_gap"):
        assert (found[difference] > -5 * found[f"{difference}_se"] - 1e-9).all(), difference
    if name in ("FullNormal", "LowRankNormal"):
        assert float(abs(found.approximation_gap).max()) < 2e-3, "the posterior is in the family"
    assert float(abs(found.richer_gap).max()) < 2e-3


class Student(nn.Module):
    """A q whose family nobody can tell."""

    def forward(self, x):
        return dist.StudentT(4.0, x[..., :2], 1.0).to_event(1)


def test_a_family_that_is_not_known_is_refused(x):
    vae = MODEL.as_vae()
    vae.encoder = Student()
    with pytest.raises(ModelError, match="the variational family of encoder Student is unknown"):
        pv.inference_gaps(vae, x)


@pytest.mark.parametrize(
    "setting", [{"steps": 1}, {"rate": 0.0}, {"particles": 0}, {"num_particles": 3}, {"seed": 2**80}]
)
def test_settings_out_of_range_are_refused(x, setting):
    with pytest.raises(SettingsError, match=next(iter(setting))):
        pv.inference_gaps(MODEL.as_vae(), x, **setting)


def test_nothing_is_moved_and_the_seed_decides(x):
    vae = broken(0.3, 0.8)
    before, state = {n: v.clone() for n, v in vae.state_dict().items()}, torch.get_rng_state()
    found = [pv.inference_gaps(vae, x, steps=5, num_particles=50, seed=seed) for seed in (0, 0, 1)]
    assert all(torch.equal(v, before[n]) for n, v in vae.state_dict().items())
    assert all(p.grad is None for p in vae.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert found[0].identical(found[1])
    assert not found[0].equals(found[2])


def test_small_parts_give_the_same_within_errors(x):
    whole, parts = (pv.inference_gaps(broken(0.5, 0.8), x, **SETTINGS, chunk=c) for c in (2**22, 20_000))
    error = np.sqrt(whole.gap_se**2 + parts.gap_se**2)
    assert float((abs(whole.gap - parts.gap) / error).max()) < 5
    assert parts.sizes["datum"] == len(x)


@pytest.mark.slow
def test_the_order_of_cremer_et_al_on_digits():
    """Two latents, exact log p(x) ≥ full ≥ diagonal ≥ amortized for every datum; most is lost by the encoder."""
    digits = pv.data.digits().x
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [128], 64), scale=0.5),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(64, [128], 4)),
    )
    pv.fit(vae, digits, epochs=60, progress=False, device="cpu")
    found = pv.inference_gaps(vae, digits[:300])
    print(
        {
            n: (float(found[n].mean()), float((found[f"{n}_se"] ** 2).sum() ** 0.5 / 300))
            for n in found
            if n[-3:] != "_se"
        }
    )
    for name in ("richer_gap", "closed", "amortization_gap"):
        assert (found[name] > -5 * found[f"{name}_se"] - 1e-3).all(), name
        assert float(found[name].mean()) > 0
    assert float(found.amortization_gap.mean()) > float(found.approximation_gap.mean())


def test_each_part_takes_its_own_given_evidence(x):
    value = MODEL.log_marginal(x) + torch.arange(12)
    found = pv.inference_gaps(MODEL.as_vae(), x, log_evidence=value, steps=2, particles=500, chunk=15_000)
    assert np.allclose(found.gap, np.arange(12), atol=1e-9)


def test_importance_weighted_evidence_is_that_of_quadrature_where_no_normal_is_exact():
    """A mask hides the oracle; the bound of the best q would be below the truth by its gap."""
    vae, x = small_vae(latents=2, scale=0.4), torch.randn(10, 6, dtype=torch.float64)
    truth = pv.exact.quadrature_log_marginal(vae, x, points=321).numpy()
    found = pv.inference_gaps(vae, pv.data.Data(x, mask=torch.ones_like(x, dtype=torch.bool)), steps=100)
    assert off(found, "log_evidence", truth).max() < 5
    assert off(found, "log_evidence", truth - found.richer_gap.values).max() > 5, "power"


@pytest.mark.parametrize("steps", [4, 10, 20, 40, 250])
@pytest.mark.parametrize(("shift", "factor"), [(0.0, 0.3), (1.5, 0.5), (6.0, 3.0)])
def test_too_few_steps_are_either_within_the_error_or_said(x, truth, shift, factor, steps):
    """Also five steps that leap over the optimum, so that the second half gains nothing."""
    vae = broken(shift, factor)
    found = pv.inference_gaps(vae, x, steps=steps, num_particles=500)
    amortized = float((MODEL.elbo(x, MODEL.best_diagonal(x)) - MODEL.elbo(x, vae.encoder(x))).mean().detach())
    judged = judge_gaps(found)
    for name, exact in ("approximation_gap", truth), ("amortization_gap", amortized), ("richer_gap", 0.0):
        gap = mean_gap(found, name)
        within = gap.low - 1e-3 <= exact <= gap.high + 1e-3
        assert within or "has not converged" in judged.why, (name, gap)
    assert optimizer_converged(found) == (steps == 250)
    if steps < 250:
        assert judged.level != "fine"
        assert judged.next.startswith(f"first use more than {steps} steps")


def test_the_figure_says_that_the_optimizer_has_not_converged(x):
    for steps, said in (4, True), (250, False):
        figure = pv.plots.gaps(pv.inference_gaps(broken(1.5, 0.5), x, steps=steps, num_particles=50))
        assert ("NOT CONVERGED" in figure.axes[0].get_title()) == said
        assert "over draws" in figure.axes[0].get_title()


def test_the_bounds_are_not_measured_on_the_draws_that_they_are_chosen_by(monkeypatch):
    """Of two q that are equally good, on either side of the best, the better by chance would look better than it is."""
    x, vae = MODEL.sample(400), broken(-1.0, 1.0)
    best = MODEL.best_diagonal(x)

    def mirrored(vae, rows, start, **settings):
        return diagonal(best.mean + best.stddev, best.stddev)

    monkeypatch.setattr("pyro_vae.diagnose.gaps.climb", mirrored)
    found = pv.inference_gaps(vae, x, num_particles=50)
    exact = (MODEL.elbo(x, best) - MODEL.elbo(x, vae.encoder(x))).detach()
    assert exact.min() > 0.5, "power: both are off by a standard deviation"
    for name, truth in ("best_elbo", MODEL.elbo(x, best) - exact), ("amortization_gap", 0.0):
        z = (found[name] - torch.as_tensor(truth).detach().numpy()) / found[f"{name}_se"].where(found[f"{name}_se"] > 0)
        assert abs(float(z.mean() * z.count() ** 0.5)) < 5, name


def judged(approximation, amortization, error=0.0, khat=0.1, latents=2, optimization=0.0, richer=0.0):
    """The level of 100 data with these gaps, each with this error; thresholds for two latents are .1 and .6."""
    gaps = {"approximation_gap": approximation, "amortization_gap": amortization, "closed": 0.0, "khat": khat}
    gaps["gap"] = np.asarray(approximation) + np.asarray(amortization)
    gaps |= {"optimization_error": optimization, "richer_optimization_error": richer}
    table = {name: ("datum", np.full(100, value)) for name, value in gaps.items()}
    table |= {f"{name}_se": ("datum", np.full(100, error)) for name in gaps}
    attrs = {"threshold_fine": 0.05, "threshold_bad": 0.3, "threshold_share": 0.05, "threshold_khat": 0.7}
    attrs |= {"latents": latents, "family": "DiagNormal", "log_evidence_from": "given", "threshold_optimization": 0.01}
    attrs |= {"steps": 400}
    return judge_gaps(xr.Dataset(table, {"datum": range(100)}, attrs)).level


def test_the_thresholds_of_the_verdict():
    assert judged(0.09, 0.09) == "fine"
    assert judged(0.09, 0.09, latents=1) == "doubtful", "they are per latent"
    assert judged(0.09, 0.11) == "doubtful"
    assert judged(0.61, 0.0) == "bad"
    assert judged(0.09, 0.0, error=0.04) == "fine", "the mean of 100 has a tenth of the error"
    assert judged(0.09, 0.0, error=0.06) == "doubtful"
    assert judged(0.01, 0.09, optimization=0.009) == "fine"
    assert judged(0.01, 0.09, optimization=0.011) == "doubtful", "the encoder may lose more"
    assert judged(0.61, 0.0, optimization=0.011) == "doubtful", "the family may lose less"
    assert judged(0.09, 0.61, optimization=0.5) == "bad", "the encoder loses at least that"
    assert judged(0.01, 0.01, optimization=0.021) == "doubtful", "not converged"
    assert judged(0.01, 0.01, richer=0.021) == "doubtful"
    one = np.where(np.arange(100) == 7, 500.0, 0.3)
    assert judged(one, 0.0) == "doubtful", "bad by one datum alone"
    assert judged(one + (np.arange(100) == 8) * 500, 0.0) == "bad", "and by two"
    few = np.where(np.arange(100) < 6, 0.7, 0.0)
    assert judged(few, 0.0) == "doubtful", "six of 100 data lose much"
    assert judged(0.0, 0.0, khat=np.where(np.arange(100) < 6, 0.8, 0.1)) == "doubtful"
