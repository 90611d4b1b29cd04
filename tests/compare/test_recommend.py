"""What is recommended, and how sure that is said to be; errors of times and distances; bad input of comparisons."""

from functools import cache

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from helpers.checks import linear_gaussian, small_vae

import pyro_vae as pv
from pyro_vae.compare.cost import median_seconds
from pyro_vae.compare.gradient_moments import Moments, alignment, square_of_mean, squares
from pyro_vae.core.format import format_estimate
from pyro_vae.errors import ModelError, PyroVAEError, SettingsError


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
        gradient_khat=(table.efficiency.dims, np.zeros(shape)),
    )


@pytest.mark.parametrize(
    ("efficiency", "error", "says"),
    [
        ([4.0, 2.0], [0.1, 0.1], "certain over 20 draws: the next, e1 at K = 1, is 12 standard errors behind"),
        ([4.0, 3.9], [0.1, 0.1], "not certain: 20 draws do not separate it from e1 at K = 1"),
        ([4.0, 2.0], [np.nan, np.nan], "± ? in squared signal-to-noise"),
        ([4.0, 2.0], [np.nan, 0.1], "This is not certain"),
        ([np.inf, 2.0], [np.nan, 0.1], "Train with e0 at K = 1: of 2 choices for the ELBO its gradient has no noise"),
        ([np.inf, 2.0], [np.nan, 0.1], "infinitely far behind"),
        ([np.inf, np.inf], [np.nan, np.nan], "This is not certain"),
        ([4.0], [0.1], "Train with e0 at K = 1: its gradient carries"),
        ([4.0], [0.1], "There is no other estimator of the ELBO to compare it with."),
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
    ("number", "says"),
    [
        ({"gradient_bias": np.nan}, "12 standard errors behind: the bias of its gradient is unknown"),
        ({"gradient_khat": np.nan}, "20 draws are too few to detect a heavy tail of the gradient; use at least 25"),
        (
            {"gradient_khat": 0.71},
            "heavy tail, so the error of its variance is unreliable, with e0 at K = 1 (k̂ = 0.71)",
        ),
        ({"gradient_khat": 0.69}, "This is certain over 20 draws"),
    ],
)
def test_nothing_is_sure_where_errors_do_not_say_it(number, says):
    table = judged([4.0, 2.0], [0.1, 0.1])
    ((name, value),) = number.items()
    said = pv.recommend(
        table.assign({name: table[name] * 0 + value if name != "gradient_bias" else table[name] + value})
    )
    assert says in said
    assert said.startswith("Train with e0 at K = 1")
    if "certain over" not in says:
        assert "This is not certain, although the next, e1 at K = 1, is" in said


class Heavy(pv.elbo.STL):
    """Unchanged in value; the gradient of each evaluation is scaled by a number of mean 1 and infinite variance."""

    def bound(self, w):
        value = super().bound(w)
        scale = 1 + 0.3 * dist.StudentT(1.3).sample()
        return value.detach() + scale * (value - value.detach())


def test_a_heavy_tail_is_seen_and_makes_nothing_sure():
    """A light tail beside it, of estimators many errors apart, is sure."""
    model = linear_gaussian()
    vae, x = model.as_vae(diagonal=True), model.sample(10)
    vae.encoder.net.bias.data += 0.3
    two = {"TraceMeanField_ELBO": pv.elbo.TraceMeanField_ELBO(), "ScoreFunction": pv.elbo.ScoreFunction()}
    heavy = pv.compare_elbos(vae, x, {**two, "heavy": Heavy()}, draws=100, particles=(2,))
    light = heavy.sel(estimator=[*two])
    assert (light.gradient_khat.sel(parameter_group=["Θ", "φ"]) < 0.7).all()
    quiet = light.assign(efficiency_se=0.05 * light.efficiency)  # of times that a busy machine does not blur
    assert "This is certain over 100 draws" in pv.recommend(quiet)
    assert (heavy.gradient_khat.sel(estimator="heavy", parameter_group=["Θ", "φ"]) > 0.7).all()
    said = pv.recommend(heavy.assign(efficiency_se=1e-3 * heavy.efficiency))  # an error that saw no outlier
    assert "This is not certain, although the next" in said
    assert "heavy tail, so the error of its variance is unreliable, with heavy at K = 2" in said


# --- One bound at a time ---


def no_kl(model, guide, x, size=None):
    """A user's loss that lost its KL: the signal of its gradient is the largest."""
    return pv.elbo.Beta(pv.elbo.ELBO(), 0.0).differentiable_loss(model, guide, x, size)


def test_losses_of_other_objectives_are_not_ranked_but_told_of():
    """Each of these had "sure" said of it."""
    vae, x = small_vae(), torch.randn(10, 6)
    rivals = {
        "note_objective": pv.elbo.note_objective,
        "no_kl": no_kl,
        "beta": pv.elbo.Beta(pv.elbo.AnalyticKL(), 50.0),
    }
    elbos = {"Trace_ELBO": pv.elbo.Trace_ELBO(), "ELBO": pv.elbo.ELBO(), **rivals}
    table = pv.compare_elbos(vae, x, elbos, draws=30)
    best = table.assign(efficiency=table.efficiency.where(~table.estimator.isin([*rivals]), 1e9))
    said = pv.recommend(best)
    assert said.startswith(("Train with Trace_ELBO", "Train with ELBO"))
    assert "of 2 choices for the ELBO" in said
    own = table.value.sel(estimator="ELBO", particles=1)
    for name in rivals:
        apart = table.value.sel(estimator=name, particles=1) - own
        side = "above" if apart.mean() > 0 else "below"
        changed = f"Training with {name} at K = 1 changes the objective" + (
            " to Beta(ELBO, beta=50)" * (name == "beta")
        )
        error = (apart.std(ddof=1) / 30**0.5).item()
        lies = format_estimate(abs(apart.mean().item()), error, "nats per datum", over="30 draws")
        assert f"{changed}: its value lies {lies} {side} that of the ELBO, and a small step along " in said
    alone = pv.recommend(best.sel(estimator=["no_kl", "note_objective"]))
    assert "no other estimator of no_kl at K = 1 to compare it with" in alone
    assert "sure" not in alone
    with pytest.raises(SettingsError, match=r"target is 'IWAE\(8\)'; the comparison has estimators of ELBO, note_obj"):
        pv.recommend(table, target="IWAE(8)")


def test_the_bound_with_most_estimators_is_taken_where_there_is_no_elbo():
    table = compared(5, (8,), Renyi=pv.elbo.Renyi(), IWAE=pv.elbo.IWAE(), DReG=pv.elbo.DReG())
    said = pv.recommend(table)
    assert "of 2 choices for IWAE(8)" in said
    assert "Training with Renyi at K = 8 changes the objective to Renyi(8, alpha=0.5): its value lies " in said
    assert "raises the ELBO" not in said, "there is no gradient of the ELBO to compare with"
    other = pv.recommend(table, target="Renyi(8, alpha=0.5)")
    assert other.startswith("Train with Renyi at K = 8: its gradient")
    assert "Training with IWAE at K = 8 or DReG at K = 8 changes the objective to IWAE(8)" in other


TARGETS = {
    "ELBO": [
        pv.elbo.ELBO(3), pv.elbo.STL(), pv.elbo.AnalyticKL(5), pv.elbo.ScoreFunction(4), pv.elbo.IWAE(1),
        pv.elbo.DReG(1), pv.elbo.Renyi(1, alpha=0.3), pv.elbo.Renyi(5, alpha=1.0), pv.elbo.CIWAE(4, mix=1.0),
        pv.elbo.CIWAE(1, mix=0.5),
        pv.elbo.MIWAE(3, groups=3), pv.elbo.Thermodynamic(4, partitions=1), pv.elbo.Beta(pv.elbo.IWAE(1), 1.0),
        pv.elbo.FreeBits(pv.elbo.ELBO(), 0.0), pv.elbo.TCVAE(pv.elbo.ELBO(), 1.0),
        pv.elbo.InfoVAE(pv.elbo.ELBO(), alpha=0.0, weight=1.0),
    ],
    "IWAE(6)": [
        pv.elbo.IWAE(6), pv.elbo.DReG(6), pv.elbo.VIMCO(6), pv.elbo.Renyi(6, alpha=0.0), pv.elbo.CIWAE(6, mix=0.0),
        pv.elbo.MIWAE(12, groups=2), pv.elbo.PIWAE(6, groups=1),
    ],
    "Beta(IWAE(6), beta=0.5)": [pv.elbo.Beta(pv.elbo.DReG(6), 0.5)],
    "Renyi(6, alpha=0.5)": [pv.elbo.Renyi(6)],
    "PIWAE(6, groups=2)": [pv.elbo.PIWAE(6, groups=2)],
    "CIWAE(6, mix=0.5)": [pv.elbo.CIWAE(6)],
    "CIWAE(2, mix=0.5)": [pv.elbo.CIWAE(2)],
}  # fmt: skip


@pytest.mark.parametrize(("target", "loss"), [(t, loss) for t, losses in TARGETS.items() for loss in losses], ids=repr)
def test_estimators_of_one_bound_have_one_mean(target, loss):
    """By value, in 4,000 draws of one datum: what they are said to estimate is what they estimate."""
    assert loss.target() == target
    model = linear_gaussian()
    vae, x = model.as_vae(diagonal=True), model.sample(1).expand(4000, -1)
    if target not in ("ELBO", "IWAE(6)"):
        return
    alike = pv.elbo.ELBO() if target == "ELBO" else pv.elbo.IWAE(6)
    with torch.no_grad():
        one, other = (each.bound(each.weigh(vae.model, vae.guide, x)) for each in (loss, alike))
    assert abs((one.mean() - other.mean()) / (one.var() / 4000 + other.var() / 4000).sqrt()) < 5
    if target == "IWAE(6)":
        with torch.no_grad():
            elbo = pv.elbo.ELBO(6)
            wrong = elbo.bound(elbo.weigh(vae.model, vae.guide, x))
        assert abs((one.mean() - wrong.mean()) / (one.var() / 4000 + wrong.var() / 4000).sqrt()) > 5, "power"


def test_pyros_own_estimators_have_a_target_and_a_subclass_has_its_own():
    class Mine(pv.elbo.TraceMeanField_ELBO):
        """Who knows what it estimates?"""

    elbos = {"pyro": pv.elbo.Trace_ELBO(), "hand": pv.elbo.HandDerivedELBO(), "mine": Mine(), "IWAE": pv.elbo.IWAE()}
    table = compared(2, (1, 4), **elbos)
    assert table.target.values.tolist() == [
        ["ELBO", "ELBO"], ["ELBO", "ELBO"], ["mine at K = 1", "mine at K = 4"], ["ELBO", "IWAE(4)"],
    ]  # fmt: skip
    saved = table.drop_vars("target").assign_coords(bound=("estimator", ["ELBO", "ELBO", "mine", "IWAE"]))
    assert "IWAE at K = 4 changes the objective" in pv.recommend(saved), "saved before K was part of it"


@pytest.mark.slow
def test_alignment_is_the_cosine_of_the_means_though_noise_is_shared():
    """Over 300 repeats, means (1, 0) and (3, 4) with the same noise: 0.6, and the stated error is the spread."""
    generator, found, stated = torch.Generator().manual_seed(0), [], []
    for _ in range(300):
        first, second = (Moments([2], 50, like=torch.zeros(())) for _ in range(2))
        for noise in torch.randn(50, 2, generator=generator):
            first.add([torch.tensor([1.0, 0.0]) + noise])
            second.add([torch.tensor([3.0, 4.0]) + noise])
        cosine, error = alignment(first, second, [[0]])
        found.append(cosine.item())
        stated.append(error.item())
    found = np.array(found)
    assert abs(found.mean() - 0.6) < 5 * found.std() / 300**0.5 + 0.005, "a ratio of means is biased by O(1/n)"
    assert np.mean(stated) == pytest.approx(found.std(), rel=0.3)


@pytest.mark.parametrize(
    ("bias", "says"),
    [
        (-0.8, "lies 0.800 ± 0.010 nats per datum (over 20 draws) below log p(x)"),
        (0.8, "above log p(x)"),
        (0.01, "its bound is log p(x)"),
    ],
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
    assert "This is certain" not in said


def test_noise_of_the_clock_is_in_the_error_of_what_decides(monkeypatch):
    """The error of a median of normal times is that of its spread over repeats, within a third."""
    from pyro_vae.compare import cost

    generator = np.random.default_rng(0)

    def measured():
        spent = iter(np.cumsum(np.stack([np.ones(41), generator.normal(1.0, 0.1, 41)], 1).ravel()))
        monkeypatch.setattr(cost.time, "perf_counter", lambda: next(spent))
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
    with pytest.raises(ModelError, match="a plate that subsamples 2 of the 5 rows"):
        pv.compare_elbos(pv.Pair(model, guide), x, {"e": pv.elbo.ELBO()}, draws=4)
    assert pv.elbo.IWAE(4).loss(model, guide, x).isfinite(), "to train with, it is fine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"particles": 8}, "particles is 8; pass a sequence"),
        ({"particles": [True]}, r"particles is \[True\]"),
        ({"particles": [1.5]}, r"particles is \[1\.5\]"),
        ({"draws": 2.5}, r"draws is 2\.5"),
        ({"draws": "5"}, "draws is '5'"),
        ({"elbos": pv.elbo.STL()}, "elbos is a STL; pass a dict of estimators"),
        ({"elbos": [pv.elbo.STL()]}, "elbos is a list"),
        ({"log_evidence": "a"}, "log_evidence holds a value that is not a number"),
        ({"log_evidence": np.full(10, np.nan)}, "not finite"),
        ({"size": 12.5}, r"size is 12\.5"),
        ({"elbos": {"v": pv.elbo.VIMCO()}, "particles": (1,)}, "none of the estimators applies .*VIMCO"),
    ],
)
def test_bad_settings_of_a_comparison_are_one_sentence(settings, message):
    with pytest.raises(PyroVAEError, match=message) as refused:
        pv.compare_elbos(small_vae(), torch.randn(10, 6), **settings)
    assert "\n" not in str(refused.value)


def test_numbers_of_particles_may_be_an_array():
    table = compared(particles=np.array([1, 4]), draws=2)
    assert table.particles.values.tolist() == [1, 4]


def test_rounding_is_no_variance_of_a_gradient_of_many_numbers():
    gradient = torch.full((100_000,), 0.1).double()
    moments = Moments([40_000, 60_000], 30, like=gradient)
    for _ in range(30):
        moments.add(gradient.split([40_000, 60_000]))
    assert squares(moments, [[0], [0, 1]]).variance.tolist() == [0, 0]
    moments = Moments([100_000], 2, like=gradient)
    for factor in (1.0, 1 + 1e-5):
        moments.add([gradient * factor])
    assert squares(moments, [[0]]).variance.item() == pytest.approx(1000 * 1e-10 / 2, rel=1e-2)
