"""NUTS beside q: exact posteriors are found, and a q that is off is told."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from helpers.checks import linear_gaussian, small_vae

import pyro_vae as pv
from pyro_vae.diagnose import gold_standard, judge_nuts, nuts
from pyro_vae.errors import DataError, SettingsError

MODEL = linear_gaussian()
SHORT = {"chains": 2, "warmup": 60, "draws": 220}


def broken(shift: float = 0.0, factor: float = 1.0) -> pv.VAE:
    """The exact guide, moved by so many sds of each latent, its sds multiplied."""
    vae = MODEL.as_vae()
    with torch.no_grad():
        sd = vae.encoder.scale_tril.square().sum(-1).sqrt()
        vae.encoder.net.bias += shift * sd
        vae.encoder.scale_tril *= factor
    return vae


@pytest.fixture(scope="module")
def x():
    torch.manual_seed(0)
    return MODEL.sample(40)


@pytest.fixture(scope="module")
def exact(x):
    return nuts(MODEL.as_vae(), x, data=[3, 17], chains=2, warmup=60, draws=360)


def test_the_draws_have_the_posteriors_moments(exact, x):
    truth = MODEL.posterior(x[[3, 17]])
    mean, sd = truth.mean.numpy(), truth.stddev.numpy()
    for prefix in ("", "q_"):
        assert float(abs((exact[f"{prefix}mean"] - mean) / exact[f"{prefix}mean_se"]).max()) < 5
        assert float(abs((exact[f"{prefix}sd"] - sd) / exact[f"{prefix}sd_se"]).max()) < 5
    assert float(abs((exact["mean"] - mean - 0.3 * sd) / exact["mean_se"]).min()) > 5, "power: .3 sd would be seen"
    assert float(abs((exact["sd"] - 0.7 * sd) / exact["sd_se"]).min()) > 5, "power: sd × .7 would be seen"


def test_correlations_are_the_posteriors(exact, x):
    z = exact.z.isel(datum=0).values.reshape(-1, 2)
    covariance = MODEL.posterior(x[[3]]).covariance_matrix[0]
    rho = float(covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt())
    error = (1 - rho**2) / math.sqrt(float(exact.ess.min()))
    assert abs(np.corrcoef(z.T)[0, 1] - rho) < 5 * error
    assert abs(rho) > 5 * error, "power: no correlation would be seen"


def test_exact_q_is_at_the_floor_and_fine(exact):
    assert float(exact.rhat.max()) < 1.03
    assert float(exact.ess.min()) > 300
    assert int(exact.divergences.sum()) == 0
    assert float((exact.wasserstein / exact.wasserstein_floor).max()) < exact.attrs["threshold_floors"]
    assert 0.3 < float((exact.wasserstein / exact.wasserstein_floor).mean()) < 2
    assert judge_nuts(exact).level == "fine"


def test_labels(exact, tmp_path):
    exact.to_netcdf(tmp_path / "found.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "found.nc", engine="h5netcdf") as read:
        assert read.equals(exact)
    assert exact.z.dims == exact.q.dims == ("chain", "draw", "datum", "latent")
    assert exact.datum.values.tolist() == [3, 17]
    assert exact.wasserstein.attrs["units"] == "sd of the posterior"


@pytest.mark.parametrize(
    ("shift", "factor", "distance"),
    [(0.0, 0.5, 0.5 * math.sqrt(2 / math.pi)), pytest.param(0.5, 1.0, 0.5, marks=pytest.mark.slow)],
)
def test_a_broken_q_is_bad_and_its_distance_known(x, shift, factor, distance):
    found = nuts(broken(shift, factor), x, data=1, **SHORT)
    assert float(abs(found.wasserstein - distance).max()) < 3 * float(found.wasserstein_floor.max())
    judged = judge_nuts(found)
    assert judged.level == "bad"
    assert judged.next


def test_too_few_draws_are_doubtful_not_fine(x):
    judged = judge_nuts(nuts(MODEL.as_vae(), x, data=1, chains=2, warmup=20, draws=20))
    assert judged.level == "doubtful"
    assert "more draws" in judged.next


def test_a_nonlinear_posterior_is_that_of_a_grid():
    """Two latents, a posterior that is not normal: moments by quadrature."""
    vae = small_vae(latents=2, scale=0.4)
    x = torch.randn(1, 6, dtype=torch.float64)
    axis = torch.linspace(-6, 6, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        density = (vae.prior().log_prob(grid) + vae.decoder(grid).log_prob(x)).softmax(0)
    mean = density @ grid
    sd = (density @ (grid - mean) ** 2).sqrt()
    found = nuts(vae, x, **SHORT)
    assert float(abs((found["mean"] - mean.numpy()) / found["mean_se"]).max()) < 5
    assert float(abs((found["sd"] - sd.numpy()) / found["sd_se"]).max()) < 5
    assert judge_nuts(found).level == "bad", "an untrained encoder"


@pytest.mark.slow
def test_missing_values_leave_the_posterior(x):
    mask = torch.ones_like(x[:1], dtype=torch.bool)
    mask[:, -1] = False
    smaller = pv.exact.LinearGaussian(MODEL.weight[:-1], MODEL.bias[:-1], MODEL.scale)
    found = nuts(MODEL.as_vae(), pv.data.Data(x[:1], mask=mask), **SHORT)
    truth = smaller.posterior(x[:1, :-1])
    assert float(abs((found["mean"] - truth.mean.numpy()) / found["mean_se"]).max()) < 5
    assert float(abs((found["sd"] - truth.stddev.numpy()) / found["sd_se"]).max()) < 5


def mirrored() -> pv.VAE:
    """A decoder that sees |z|: the posterior has two modes with 27 nats between them, and q = N(0, 1) covers both."""

    class Absolute(torch.nn.Module):
        def forward(self, z):
            return z.abs() * torch.tensor([2.0, -1.0, 1.0], dtype=z.dtype)

    encoder = pv.posteriors.DiagNormal(torch.nn.Linear(3, 2)).double()
    with torch.no_grad():
        encoder.net.weight.zero_()
        encoder.net.bias.zero_()
    decoder = pv.likelihoods.Normal(Absolute(), scale=0.5).double()
    return pv.VAE(prior=pv.priors.StandardNormal(1).double(), decoder=decoder, encoder=encoder)


def test_a_sampler_that_is_stuck_is_no_gold_standard():
    """Chains in two modes that never meet: R̂ says so, and nothing is said against q."""
    found = nuts(mirrored(), torch.tensor([[3.0, -1.5, 1.5]], dtype=torch.float64), chains=4, warmup=30, draws=40)
    assert float(found.rhat[0, 0]) > 1.5
    judged = judge_nuts(found)
    assert judged.level == "doubtful"
    assert "several modes" in judged.next


def conditional() -> tuple[pv.VAE, torch.Tensor]:
    """The linear-Gaussian model with a context added to its data, and the effect of each context."""
    effect = torch.randn(5, 2, dtype=torch.float64)
    decoder, encoder = torch.nn.Linear(4, 5).double(), torch.nn.Linear(7, 4).double()
    with torch.no_grad():
        decoder.weight.copy_(torch.cat([MODEL.weight, effect], 1))
        decoder.bias.copy_(MODEL.bias)
    return pv.VAE(
        prior=Unconditional(), decoder=pv.likelihoods.Normal(decoder, scale=float(MODEL.scale)).double(),
        encoder=pv.posteriors.DiagNormal(encoder),
    ), effect  # fmt: skip


class Unconditional(torch.nn.Module):
    """N(0, I) whatever the context."""

    def forward(self, context):
        zeros = torch.zeros(*context.shape[:-1], 2, dtype=context.dtype)
        return dist.Normal(zeros, 1.0).to_event(1)


@pytest.mark.slow
def test_a_context_goes_to_the_model(x):
    (vae, effect), context = conditional(), torch.randn(2, 2, dtype=torch.float64)
    centred = x[:2] - context @ effect.T
    found = nuts(vae, pv.data.Data(x[:2], context=context), data=[1], **SHORT)
    truth = MODEL.posterior(centred[1:])
    assert float(abs((found["mean"] - truth.mean.numpy()) / found["mean_se"]).max()) < 5
    gaps = pv.inference_gaps(vae, pv.data.Data(x[:2], context=context), steps=100)
    z = (gaps.log_evidence - MODEL.log_marginal(centred).numpy()) / gaps.log_evidence_se
    assert float(abs(z).max()) < 5


def test_many_data_are_refused_with_what_they_would_cost():
    x = MODEL.sample(10_000)
    with pytest.raises(
        SettingsError, match=r"NUTS for 10,000 data would take about .* hours .* select some, e\.g\. data="
    ):
        nuts(MODEL.as_vae(), x)


@pytest.mark.parametrize(
    ("setting", "error", "said"),
    [
        ({"chains": 1}, SettingsError, "chains is 1"),
        ({"warmup": 0}, SettingsError, "warmup is 0"),
        ({"draws": 5}, SettingsError, "draws is 5"),
        ({"data": 0}, SettingsError, "data is 0"),
        ({"data": [99]}, DataError, "indices from 0 to 39"),
        ({"data": []}, DataError, "at least one"),
    ],
)
def test_bad_settings_are_refused(x, setting, error, said):
    with pytest.raises(error, match=said):
        nuts(MODEL.as_vae(), x, **setting)


def test_nothing_is_moved_and_the_seed_decides(x):
    vae, few = MODEL.as_vae(), {"data": 1, "chains": 2, "warmup": 20, "draws": 20}
    before, state = {n: v.clone() for n, v in vae.state_dict().items()}, torch.get_rng_state()
    found = [nuts(vae, x, seed=seed, **few) for seed in (0, 0, 1)]
    assert all(torch.equal(v, before[n]) for n, v in vae.state_dict().items())
    assert all(p.grad is None for p in vae.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert found[0].identical(found[1])
    assert not found[0].equals(found[2])


@pytest.mark.parametrize("data", [2.5, "ab", [1.7], [1, 1], [[1]], torch.arange(40) == 4, [-1]])
def test_a_choice_of_data_that_is_none_is_refused(x, data):
    with pytest.raises((DataError, SettingsError), match=r"data (selects|is)"):
        nuts(MODEL.as_vae(), x, data=data)


def test_a_number_of_data_may_be_numpys(x):
    assert gold_standard._select(np.int64(2), 40) == [0, 1]
    assert gold_standard._select(torch.tensor([7, 2]), 40) == [7, 2]


def test_chains_that_never_move_have_an_infinite_rhat_and_are_not_sound():
    z = np.zeros((2, 32, 1, 1))
    z[1] = 1.0
    compared = gold_standard._compare(z, np.random.default_rng(0).normal(size=z.shape))
    assert compared["rhat"][0][0, 0] == np.inf


def test_the_floor_knows_how_few_draws_of_a_slow_chain_count():
    rng = np.random.default_rng(0)
    free = rng.normal(size=(2, 1000, 1, 1))
    slow = np.repeat(rng.normal(size=(2, 100, 1, 1)), 10, axis=1)
    floors = [float(gold_standard._compare(z, free)["wasserstein_floor"][0].item()) for z in (free, slow)]
    assert floors[1] / floors[0] == pytest.approx(math.sqrt(11 / 2), rel=0.2)


@pytest.mark.parametrize(
    ("change", "level"),
    [
        ({}, "bad"), ({"rhat": 1.2}, "doubtful"), ({"ess": 50.0}, "doubtful"), ({"divergences": 10}, "doubtful"),
        ({"wasserstein": 0.2}, "doubtful"),
    ],
)  # fmt: skip
def test_what_nuts_itself_has_not_settled_condemns_no_q(change, level):
    """A q far off in one latent of one datum; R̂, draws or divergences of its other latent are not what they should."""
    value = {"rhat": 1.0, "ess": 900.0, "wasserstein_floor": 0.02} | change
    table = {n: (("datum", "latent"), np.array([[good, value[n]]])) for n, good in [("rhat", 1.0), ("ess", 900.0)]}
    table["wasserstein"] = ("datum", "latent"), np.array([[change.get("wasserstein", 0.9), 0.01]])
    table["wasserstein_floor"] = ("datum", "latent"), np.full((1, 2), 0.02)
    table["divergences"] = ("chain", "datum"), np.full((2, 1), change.get("divergences", 0))
    limits = {"rhat": 1.05, "ess": 100, "divergent": 0.01, "fine": 0.1, "bad": 0.25, "floors": 3.0}
    coords = {"chain": range(2), "draw": range(100), "datum": [0], "latent": [0, 1]}
    judged = judge_nuts(xr.Dataset(table, coords, {f"threshold_{n}": v for n, v in limits.items()}))
    poor = level == "doubtful" and "wasserstein" not in change
    assert judged.level == level
    assert ("run NUTS with a longer warmup" in judged.next, "a richer posterior" in judged.next) == (poor, not poor)
