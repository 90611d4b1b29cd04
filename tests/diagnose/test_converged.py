"""Has SVI converged? Runs that have, runs that have not, and what averaging gains, against probabilistic PCA."""

from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import linalg, optimize, special, stats

import pyro_vae as pv
from pyro_vae.diagnose import Iterates, converged, judge_converged
from pyro_vae.diagnose.convergence import PHIS, _standard_errors
from pyro_vae.diagnose.iterates import BLOCKS, _Block
from pyro_vae.errors import DataError, SettingsError


@pytest.fixture(scope="module")
def x():
    generator = torch.Generator().manual_seed(0)
    weight = torch.linalg.qr(torch.randn(8, 2, generator=generator)).Q * torch.tensor([2.0, 1.2])
    return torch.randn(500, 2, generator=generator) @ weight.T + 0.5 * torch.randn(500, 8, generator=generator)


def linear_vae(seed: int) -> pv.VAE:
    torch.manual_seed(seed)
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [], 8), learn_scale=True),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(8, [], 4)),
    )


def trained(x, *, epochs: int, seed: int = 0, rate: float = 1e-2):
    vae, iterates = linear_vae(seed), Iterates(x)
    adam = partial(torch.optim.Adam, lr=rate, fused=True)
    settings = {"epochs": epochs, "batch_size": 50, "optimizer": adam, "seed": seed, "engine": "eager"}
    fit = pv.fit(vae, x, **settings, callbacks=[iterates], progress=False, device="cpu")
    return fit, iterates


@pytest.fixture(scope="module")
def runs(x):
    return [trained(x, epochs=120, seed=seed) for seed in range(2)]


def log_likelihood(vae: pv.VAE, x: torch.Tensor) -> float:
    with torch.no_grad():
        return pv.exact.LinearGaussian.of(vae.double()).log_marginal(x.double()).mean().item()


def test_runs_that_have_converged_are_fine(runs):
    found = converged([iterates for _, iterates in runs])
    assert float(found.rhat.sel(quantity="elbo")) < found.attrs["threshold_rhat"]
    assert judge_converged(found).level == "fine"
    assert found.quantity.values.tolist() == ["elbo", "log_likelihood", "kl"]
    assert found.attrs["tail"] == 60


def test_averaging_comes_nearer_to_the_exact_maximum(runs, x):
    """Dhaka et al. (2020): here the loss against probabilistic PCA's exact maximum falls to less than a third."""
    exact = pv.exact.LinearGaussian.fit(x.double(), 2).log_marginal(x.double()).mean().item()
    last = np.array([exact - log_likelihood(fit.vae, x) for fit, _ in runs])
    averaged = np.array([exact - log_likelihood(iterates.average(), x) for _, iterates in runs])
    print("loss in nats per datum, last and averaged iterate:", last, averaged)
    assert (averaged > -1e-9).all()
    assert averaged.mean() < last.mean() / 3


@pytest.mark.slow
def test_averaging_comes_six_times_nearer_to_pca_on_digits():
    """The exact maximum is .0057067 nats per datum; SVI at a constant rate ends .08 below, its average .003."""
    digits = pv.data.digits().x.double()
    exact = pv.exact.LinearGaussian.fit(digits, 2).log_marginal(digits).mean().item()
    assert exact == pytest.approx(0.0057067, abs=1e-6)
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [], 64), scale=0.3, learn_scale=True),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(64, [], 4)),
    )
    iterates, adam = Iterates(digits), partial(torch.optim.Adam, lr=1e-2, fused=True)
    settings = {"epochs": 200, "optimizer": adam, "engine": "eager", "progress": False, "device": "cpu"}
    pv.fit(vae, digits.float(), callbacks=[iterates], **settings)
    assert float(converged(iterates).rhat.max()) < 1.1
    last, averaged = (exact - log_likelihood(v, digits) for v in (vae, iterates.average()))
    print("loss in nats per datum, last and averaged iterate:", last, averaged)
    assert 0 < averaged < last / 6


def test_what_is_found_is_written_as_netcdf(runs, tmp_path):
    found = converged([iterates for _, iterates in runs])
    found.to_netcdf(tmp_path / "found.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "found.nc", engine="h5netcdf") as read:
        assert read.equals(found)


def test_a_run_stopped_too_early_is_bad(x):
    for run in trained(x, epochs=20, rate=2e-3):
        found = converged(run)
        judged = judge_converged(found)
        assert judged.level == "bad"
        assert "train longer" in judged.next
        assert float(found.rhat.sel(quantity="elbo")) > 1.5


def test_a_fit_its_history_and_its_iterates_are_all_taken(runs):
    fit, iterates = runs[0]
    found = [converged(run) for run in (fit, fit.history, [fit], iterates, iterates.history())]
    assert found[0].equals(found[1])
    assert found[0].equals(found[2])
    assert found[3].equals(found[4])
    assert "own_rhat" not in found[0]
    assert found[3].own_rhat.shape == (1, 8 * 2 + len(iterates._index))


def series(values, start: int = 1) -> xr.Dataset:
    return xr.Dataset({"train_elbo": ("epoch", values)}, {"epoch": range(start, start + len(values))})


def autoregressive(rho: float, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values, steps = np.zeros(n), rng.normal(size=n)
    values[0] = steps[0] / np.sqrt(1 - rho**2)
    for t in range(1, n):
        values[t] = rho * values[t - 1] + steps[t]
    return values


@pytest.mark.parametrize(("rho", "least"), [(0.0, 0.92), (0.5, 0.92), (0.9, 0.9)])
def test_the_slopes_error_covers_for_short_dependent_series(rho, least):
    """By the effective sample size, only .62 of these 400 runs of 40 epochs were covered at .9."""
    runs = [series(autoregressive(rho, 40, seed)) for seed in range(400)]
    found = converged(runs, tail=1.0)
    z = (found.slope / found.slope_se).values
    assert (np.abs(z) < 2).mean() > least - 5 * np.sqrt(least * (1 - least) / 400)
    assert abs(z.mean()) < 5 * z.std() / np.sqrt(400)
    seen = ((found.slope.values + 8 * found.elbo.values.std() / 39) / found.slope_se.values > 2).mean()
    assert seen > 0.8, "power: a rise of 8 standard deviations"


def test_a_known_slope_is_found():
    found = converged(series(0.01 * np.arange(300) + 0.1 * autoregressive(0.5, 300, 0)), tail=1.0)
    assert abs(float(found.slope[0]) - 0.01) < 5 * float(found.slope_se[0])
    assert float(found.slope[0]) > 5 * float(found.slope_se[0]), "power"
    assert float(found.rise[0]) == pytest.approx(299 * float(found.slope[0]))
    assert judge_converged(found).level == "bad"


def test_judgements_of_known_series():
    noise = [0.02 * autoregressive(0.3, 100, seed) for seed in range(3)]
    time = np.arange(100)
    assert judge_converged(converged(series(noise[0]))).level == "fine"
    falling = judge_converged(converged(series(noise[0] - 0.02 * time)))
    assert (falling.level, "falls" in falling.next) == ("doubtful", True)
    noisy = judge_converged(converged(series(30 * noise[0])))
    assert (noisy.level, "noise" in noisy.next) == ("doubtful", True)
    apart = judge_converged(converged([series(noise[0]), series(noise[1] + 0.5), series(noise[2])]))
    assert (apart.level, "seeds" in apart.next) == ("doubtful", True)
    assert judge_converged(converged([series(n) for n in noise])).level == "fine"


def test_the_average_is_the_mean_of_the_last_weights(x):
    """Its bounded memory holds: 100 epochs in at most 16 sums, and the tail begins at most one sum late."""
    vae, iterates = linear_vae(0), Iterates(x[:4])
    iterates.begin(vae)
    for epoch in range(1, 101):
        with torch.no_grad():
            vae.decoder.net[0].bias.fill_(epoch)
        iterates.look(epoch)
    assert len(iterates._blocks) <= 16
    assert sum(block.count for block in iterates._blocks) == 100
    for tail in (1.0, 0.5, 0.1):
        average = iterates.average(tail).decoder.net[0].bias[0].item()
        assert abs(average - (100 - 50 * tail + 0.5)) <= 4
    assert iterates.average(1.0).decoder.net[0].bias[0].item() == pytest.approx(50.5)
    assert vae.decoder.net[0].bias[0].item() == 100


def test_looking_changes_nothing(x):
    fits = [pv.fit(linear_vae(0), x, epochs=2, callbacks=hooks, progress=False) for hooks in ([], [Iterates(x)])]
    assert all(torch.equal(a, b) for a, b in zip(*(f.vae.parameters() for f in fits), strict=True))


def test_a_resumed_run_goes_on_with_what_was_noted(x, tmp_path):
    whole, first, second = (Iterates(x[:8], data=8) for _ in range(3))
    settings = {"progress": False, "device": "cpu", "engine": "eager", "seed": 4}
    pv.fit(linear_vae(0), x, epochs=20, callbacks=[whole], **settings)
    pv.fit(linear_vae(0), x, epochs=12, callbacks=[first], checkpoints=pv.Checkpoints(tmp_path), **settings)
    vae = linear_vae(0)
    pv.fit(vae, x, epochs=20, callbacks=[second], resume=tmp_path, **settings)
    assert first.history().sizes["epoch"] == 12
    xr.testing.assert_identical(whole.history(), second.history())
    assert torch.equal(whole.average().decoder.net[0].weight, second.average().decoder.net[0].weight)
    pv.fit(vae, x, epochs=1, callbacks=[second], **settings)
    assert second.history().epoch.values.tolist() == [1], "another training is begun anew"


def test_bad_runs_are_refused(x):
    with pytest.raises(SettingsError, match="a trend needs 10"):
        converged(series(np.ones(12)))
    with pytest.raises(SettingsError, match="tail is 2"):
        converged(series(np.ones(40)), tail=2)
    with pytest.raises(SettingsError, match="nats is 0"):
        converged(series(np.ones(40)), nats=0)
    with pytest.raises(DataError, match="a run is a str"):
        converged("run")
    with pytest.raises(DataError, match="recorded no epoch"):
        converged(Iterates(x))
    with pytest.raises(DataError, match="there are no runs"):
        converged([])


def test_a_run_that_broke_down_is_refused():
    for wrong in (np.nan, -np.inf):
        values = np.ones(40)
        values[33:] = wrong
        with pytest.raises(DataError, match="run 1 diverged: its ELBO is not finite in epoch 34"):
            converged([series(np.ones(40)), series(values)])


def test_the_run_that_decides_is_told():
    noise = 0.02 * autoregressive(0.3, 100, 0)
    judged = judge_converged(converged([series(noise), series(noise - 0.02 * np.arange(100))]))
    assert "rose by -0.9" in judged.why


def test_a_jump_between_two_places_has_an_infinite_rhat():
    assert converged(series(np.repeat([1.0, 2.0], 20)), tail=1.0).rhat == np.inf


def test_runs_apart_by_less_than_matters_are_fine():
    noise = 0.002 * autoregressive(0.3, 100, 0)
    found = converged([series(noise), series(noise[::-1] + 0.05)])
    assert float(found.rhat[0]) > 2
    assert judge_converged(found).level == "fine"


def test_what_is_noted_is_the_kl_and_the_likelihood(x):
    vae, iterates = linear_vae(0), Iterates(x, data=500, num_particles=200)
    iterates.begin(vae)
    iterates.look(1)
    with torch.no_grad():
        kl = torch.distributions.kl_divergence(vae.encoder(x), vae.prior()).mean()
    elbo, likelihood, noted = iterates.history().value.values[0]
    assert noted == pytest.approx(float(kl), rel=0.02)
    assert elbo == pytest.approx(likelihood - noted)


def test_blocks_of_iterates_have_one_length_but_for_the_last_and_their_exact_means():
    iterates = Iterates(torch.zeros(1, 1))
    iterates._forget()
    for number in range(300):
        iterates._blocks.append(_Block(number, 1, [torch.tensor([float(number)]).double()]))
        if len(iterates._blocks) > BLOCKS:
            iterates._halve()
        counts = [block.count for block in iterates._blocks]
        assert len(counts) <= BLOCKS
        assert sum(counts) == number + 1
        whole = [count for count in counts if count > 1][:-1]
        assert not whole or (len(set(whole)) == 1 and whole[0] & (whole[0] - 1) == 0), "a power of two"
    for block in iterates._blocks:
        assert block.mean[0].item() == pytest.approx(block.first + (block.count - 1) / 2, rel=1e-12)


@pytest.mark.parametrize("kind", ["mean", "slope"])
def test_the_standard_error_is_that_of_a_mixture_over_autocorrelations(kind):
    """By inverses, determinants and root finding instead of Cholesky factors, QR and bisection."""
    time = np.arange(30.0)
    design = np.ones((30, 1)) if kind == "mean" else np.stack([np.ones(30), time - time.mean()], 1)
    values = autoregressive(0.6, 30, seed=3)
    freedom, pick = 30 - design.shape[1], np.linalg.pinv(design)[-1]
    scales, log_weights = [], []
    for phi in np.sin(np.pi / 2 * np.arange(1 - PHIS, PHIS, 2) / PHIS):
        covariance = linalg.toeplitz(phi ** np.arange(30)) / (1 - phi**2)
        inverse = np.linalg.inv(covariance)
        information = design.T @ inverse @ design
        residual = values - design @ np.linalg.solve(information, design.T @ inverse @ values)
        square = residual @ inverse @ residual
        halves = np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(information)[1] + freedom * np.log(square)
        log_weights.append(-halves / 2)
        scales.append(np.sqrt(square / freedom * (pick @ covariance @ pick)))
    weights = special.softmax(log_weights)

    def covered(half):
        return weights @ (2 * stats.t.cdf(half / np.array(scales), freedom) - 1) - 0.95

    expected = optimize.brentq(covered, 1e-9, 1e3) / 2
    assert _standard_errors(design, values[None])[0] == pytest.approx(expected, rel=1e-8)
