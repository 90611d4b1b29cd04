"""What is recommended, and how sure that is said to be; errors of times and distances; bad input of comparisons."""

from functools import cache

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from checks import linear_gaussian, small_vae

import pyro_vae as pv
from pyro_vae._cost import median_seconds
from pyro_vae._moments import Moments, square_of_mean
from pyro_vae.errors import ModelError, PyroVAEError


def compared(draws=20, particles=(1, 8), **elbos):
    model = linear_gaussian()
    vae = model.as_vae(diagonal=True)
    vae.encoder.net.bias.data += 0.3
    elbos = elbos or {"ELBO": pv.elbo.ELBO(), "STL": pv.elbo.STL()}
    return pv.compare_elbos(vae, model.sample(10), elbos, particles=particles, draws=draws)


@cache
def compared_alike(number):
    """A comparison of so many estimators, all one, whose numbers are then replaced."""
    return compared(particles=(1,), **{f"e{i}": pv.elbo.ELBO() for i in range(number)})


def judged(efficiency, error):
    """A comparison of one number of particles, its efficiencies and their errors given, the same for Θ and φ."""
    table = compared_alike(len(efficiency))
    shape = table.efficiency.shape
    return table.assign(
        efficiency=(table.efficiency.dims, np.broadcast_to(np.reshape(efficiency, (-1, 1, 1)), shape)),
        efficiency_se=(table.efficiency.dims, np.broadcast_to(np.reshape(error, (-1, 1, 1)), shape)),
    )


@pytest.mark.parametrize(
    ("efficiency", "error", "says"),
    [
        ([4.0, 2.0], [0.1, 0.1], "sure by 20 draws: the next, e1 at K = 1, is 12 standard errors behind"),
        ([4.0, 3.9], [0.1, 0.1], "not sure: 20 draws do not tell it from e1 at K = 1"),
        ([4.0, 2.0], [np.nan, np.nan], "± ? in squared signal-to-noise"),
        ([4.0, 2.0], [np.nan, 0.1], "This is not sure"),
        ([np.inf, 2.0], [np.nan, 0.1], "Train with e0 at K = 1: of 2 choices its gradient has no noise"),
        ([np.inf, 2.0], [np.nan, 0.1], "behind by as much as can be"),
        ([np.inf, np.inf], [np.nan, np.nan], "This is not sure"),
        ([4.0], [0.1], "Train with e0 at K = 1: its gradient carries"),
        ([4.0], [0.1], "There was no other to compare it with."),
        ([0.0, np.nan], [0.1, 0.1], "No estimator can be recommended"),
    ],
)
def test_what_is_said_of_efficiencies(efficiency, error, says):
    said = pv.recommend(judged(efficiency, error))
    assert says in said
    assert "nan" not in said


def test_the_weaker_of_theta_and_phi_decides():
    table = judged([4.0, 3.0], [0.01, 0.01])
    weak = table.efficiency.copy()
    weak.loc[{"estimator": "e0", "parameter_group": "φ"}] = 1.0
    assert pv.recommend(table).startswith("Train with e0")
    assert pv.recommend(table.assign(efficiency=weak)).startswith("Train with e1")


@pytest.mark.parametrize(
    ("bias", "says"),
    [(-0.8, "lies 0.8 ± 0.01 nats per datum below log p(x)"), (0.8, "above log p(x)"), (0.01, "its bound is log p(x)")],
)
def test_where_the_bound_lies(bias, says):
    table = judged([4.0, 2.0], [0.1, 0.1])
    assert says in pv.recommend(table.assign(bias=table.bias * 0 + bias, bias_se=table.bias * 0 + 0.01))


def test_each_moment_has_its_line():
    both = xr.concat([compared(), compared()], xr.Variable("moment", ["start", "end"]), combine_attrs="drop_conflicts")
    lines = pv.recommend(both).splitlines()
    assert [line.split(":")[0] for line in lines] == ["At the start", "At the end"]


def test_two_draws_are_not_sure_of_anything():
    said = pv.recommend(compared(draws=2))
    assert "nan" not in said
    assert "This is sure" not in said


def test_noise_of_the_clock_is_in_the_error_of_what_decides(monkeypatch):
    """The error of a median of normal times is that of its spread over repeats, within a third."""
    from pyro_vae import _cost

    generator = np.random.default_rng(0)

    def measured():
        spent = iter(np.cumsum(np.stack([np.ones(41), generator.normal(1.0, 0.1, 41)], 1).ravel()))
        monkeypatch.setattr(_cost.time, "perf_counter", lambda: next(spent))
        (median,), (error,) = median_seconds([lambda: None], torch.device("cpu"), 41)
        return median, error

    medians, errors = zip(*(measured() for _ in range(300)), strict=True)
    assert np.mean(errors) == pytest.approx(np.std(medians), rel=0.3)
    monkeypatch.undo()
    table = compared()
    relative = np.hypot(2 * table.gradient_snr_se / table.gradient_snr, table.seconds_se / table.seconds)
    assert (table.efficiency_se / table.efficiency).values == pytest.approx(relative.values)


def test_noise_does_not_bias_the_square_of_a_mean():
    """Over 400 repeats; the coverage of the errors made of it is in test_coverage.py."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(400):
        first, second = (Moments([3], 40, like=torch.zeros(())) for _ in range(2))
        for moments, mean in ((first, 1.0), (second, 0.5)):
            for row in mean + torch.randn(40, 3, generator=generator):
                moments.add([row])
        found.append(square_of_mean(first.means() - second.means(), [3], [[0]]).item())
    assert abs(np.mean(found) - 0.75) < 5 * np.std(found) / 20
    assert abs(np.mean(found) - 0.75 - 6 / 40) > 5 * np.std(found) / 20, "power: without the noise taken off"


def test_objectives_pass_on_what_is_known_of_the_estimator_inside_and_copies_count_their_own_steps():
    beta = pv.elbo.Beta(pv.elbo.IWAESTL(4), 1.0)
    assert "Tucker" in beta.known_bias
    assert not pv.elbo.Beta(pv.elbo.IWAE(4), 1.0).known_bias
    annealed = pv.elbo.Beta(pv.elbo.ELBO(), pv.elbo.Linear(10))
    for copied in annealed.with_particles(4), annealed.reference():
        copied.advance()
        assert (annealed.step, copied.step) == (0, 1)
    vae, x = small_vae(), torch.randn(10, 6)
    table = pv.compare_elbos(
        vae, x, {"a": pv.elbo.Beta(pv.elbo.IWAE(4), 0.5), "b": pv.elbo.Beta(pv.elbo.DReG(4), 0.5)}, draws=100
    ).sel(parameter_group="φ")
    assert ((table.gradient_bias / table.gradient_bias_se) < 5).all(), "both are unbiased for the weighted bound"


def test_a_plate_that_draws_its_own_rows_is_refused():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=2) as i:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[i])

    def guide(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x), subsample_size=2):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    x = torch.randn(5, 2)
    with pytest.raises(ModelError, match="a plate that draws 2 of the 5 rows itself"):
        pv.compare_elbos(pv.Pair(model, guide), x, {"e": pv.elbo.ELBO()}, draws=4)
    assert pv.elbo.IWAE(4).loss(model, guide, x).isfinite(), "to train with, it is fine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"particles": 8}, "particles is 8; give a sequence"),
        ({"particles": [True]}, r"particles is \[True\]"),
        ({"particles": [1.5]}, r"particles is \[1\.5\]"),
        ({"draws": 2.5}, r"draws is 2\.5"),
        ({"draws": "5"}, "draws is '5'"),
        ({"elbos": pv.elbo.STL()}, "elbos is a STL; give a name for each"),
        ({"elbos": [pv.elbo.STL()]}, "elbos is a list"),
        ({"log_evidence": "a"}, "log_evidence holds what is no number"),
        ({"log_evidence": np.full(10, np.nan)}, "not finite"),
        ({"size": 12.5}, r"size is 12\.5"),
        ({"elbos": {"v": pv.elbo.VIMCO()}, "particles": (1,)}, "no estimator is left to compare .*VIMCO"),
    ],
)
def test_bad_settings_of_a_comparison_are_one_sentence(settings, message):
    with pytest.raises(PyroVAEError, match=message) as refused:
        pv.compare_elbos(small_vae(), torch.randn(10, 6), **settings)
    assert "\n" not in str(refused.value)


def test_numbers_of_particles_may_be_an_array():
    table = compared(particles=np.array([1, 4]), draws=2)
    assert table.particles.values.tolist() == [1, 4]
