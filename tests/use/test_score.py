"""``pv.score``: exact log p(x), ELBO and reconstruction, and p-values that are uniform for fresh rows."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.checks import linear_gaussian, small_vae
from helpers.conditional import conditional_vae
from scipy import stats

import pyro_vae as pv
from pyro_vae.core.device import derive_seed
from pyro_vae.errors import CalibrationWarning, DataError, ModelError, SettingsError
from pyro_vae.use import score as home


def exact_reconstruction(model, x):
    """``E_q log N(x | W z + b, s²)`` under the best diagonal q, term by term."""
    q = model.best_diagonal(x)
    square = ((x - model.bias - q.mean @ model.weight.T) ** 2).sum(-1) + (q.variance @ (model.weight**2).T).sum(-1)
    return -0.5 * len(model.bias) * torch.log(2 * math.pi * model.scale**2) - square / (2 * model.scale**2)


@pytest.fixture(scope="module")
def scored():
    """400 rows under a guide that is not exact, with the exact values of each."""
    torch.manual_seed(1)
    model = linear_gaussian()
    x = model.sample(400)
    truth = {
        "log_px": model.log_marginal(x),
        "elbo": model.elbo(x, model.best_diagonal(x)),
        "reconstruction": exact_reconstruction(model, x),
    }
    return pv.score(model.as_vae(diagonal=True), x, num_particles=1000, draws=200), truth


@pytest.mark.parametrize("name", ["log_px", "elbo", "reconstruction"])
def test_each_score_is_exact_within_its_monte_carlo_error(scored, name):
    """400 independent z-scores: their mean shows a bias of a quarter of an error, their variance a wrong error."""
    found, truth = scored
    z = (found[name].values - truth[name].numpy()) / found[f"{name}_mcse"].values
    assert abs(z.mean()) * math.sqrt(len(z)) < 5
    assert 0.7 < z.var() < 1.4
    assert abs(z).max() < 6


def test_of_an_exact_guide_every_bound_is_log_p():
    model = linear_gaussian()
    x = model.sample(20)
    found = pv.score(model.as_vae(), x, num_particles=30, draws=2)
    for name in ("log_px", "elbo"):
        assert found[name].values == pytest.approx(model.log_marginal(x).numpy(), abs=1e-10)
        assert (found[f"{name}_mcse"] < 1e-10).all()
    assert (found.khat == 0).all()
    assert found.log_px.attrs["units"] == found.elbo.attrs["units"] == "nats"


def test_log_p_is_that_of_log_evidence_by_every_method():
    model = linear_gaussian()
    vae, x = model.as_vae(diagonal=True), model.sample(6)
    for method in ("iw", "psis", "ais", "ais_prior"):
        settings = {"method": method, "num_particles": 25, "temperatures": 5, "leapfrog": 2}
        seed = derive_seed(3, "log p(x) of the data", 0)
        found, known = pv.score(vae, x, **settings, seed=3), pv.log_evidence(vae, x, **settings, seed=seed)
        assert np.array_equal(found.log_px, known.log_evidence)
        assert np.array_equal(found.log_px_mcse, known.mcse)
        assert np.array_equal(found.khat, known.khat)
        assert found.attrs["method"] == method
        assert found.attrs["data_hash"] == known.attrs["data_hash"]
    with pytest.raises(SettingsError, match="method is 'bdmc'; it must be iw, psis, ais or ais_prior"):
        pv.score(vae, x, method="bdmc")


def test_pieces_give_the_scores_of_the_whole():
    """An exact guide has no noise, so that a row that got lost or swapped between pieces is seen."""
    model = linear_gaussian()
    vae, x = model.as_vae(), model.sample(23)
    whole, pieces = (pv.score(vae, x, num_particles=30, draws=4, chunk=chunk) for chunk in (2**20, 4 * 5 * 3))
    assert pieces.elbo.values == pytest.approx(whole.elbo.values, abs=1e-10)
    truth = exact_reconstruction(model, x).numpy()  # of another q: an exact one only has noise here
    assert np.corrcoef(pieces.reconstruction, truth)[0, 1] > 0.5


def test_pieces_hold_few_numbers(monkeypatch):
    """Of 5 features and 4 draws, 60 numbers at a time are 3 rows."""
    sizes = []

    def recorded(model, guide, x, *more, **settings):
        sizes.append(len(x))
        return weigh(model, guide, x, *more, **settings)

    model, weigh = linear_gaussian(), home.weigh
    monkeypatch.setattr(home, "weigh", recorded)
    pv.score(model.as_vae(), model.sample(8), num_particles=30, draws=4, chunk=60)
    assert sizes == [3, 3, 2]


def test_a_seed_gives_the_scores_again_and_leaves_the_generator_alone():
    vae, x = small_vae(), torch.randn(5, 6).double()
    before = torch.get_rng_state()
    one, same, other = (pv.score(vae, x, held_out=x + 1, draws=5, num_particles=30, seed=s) for s in (0, 0, 1))
    assert one.identical(same)
    assert (one.elbo != other.elbo).all()
    assert torch.equal(before, torch.get_rng_state())


# p-values


def test_the_p_value_counts_the_held_out_rows_that_are_as_improbable():
    model = linear_gaussian()
    x, known = model.sample(30), model.sample(50)
    found = pv.score(model.as_vae(), x, held_out=known, num_particles=2, draws=2)
    below = model.log_marginal(known)[None] <= model.log_marginal(x)[:, None]
    assert np.array_equal(found.p_value, (1 + below.sum(1).numpy()) / 51)
    assert (found.held_out_rows == 50).all()
    assert found.attrs["held_out"] == 50


def p_values_of_fresh_rows(number, held_out):
    """Independent p-values, each of a fresh row and of held-out rows of its own, by a poor guide and two particles.

    Rows are compared with those that miss the same values, so that each number in base 2 makes a set of its own.
    """
    model = linear_gaussian(10, 3)
    observed = torch.tensor([[bool(i >> bit & 1) for bit in range(10)] for i in range(1, number + 1)])
    data = pv.data.Data(model.sample(number), mask=observed)
    known = pv.data.Data(model.sample(number * held_out), mask=observed.repeat(held_out, 1))
    found = pv.score(model.as_vae(diagonal=True), data, held_out=known, num_particles=2, draws=2)
    assert (found.held_out_rows == held_out).all()
    return found.p_value.values


def uniform(p, held_out):
    """The chi-squared p-value of the hypothesis that p is uniform on 1 / (n + 1), …, 1."""
    counts = np.bincount(np.rint(p * (held_out + 1)).astype(int), minlength=held_out + 2)
    return 0.0 if counts[0] else stats.chisquare(counts[1:]).pvalue


def test_p_values_of_fresh_rows_are_uniform():
    """1000 independent p-values of 9 held-out rows each: uniform on 0.1, …, 1 in spite of Monte-Carlo error.

    One that leaves a 1 out is seen by the values that it takes; where log p(x) of the data is 0.3 standard deviations
    too low, the test fails at its level of 1e-4 in at least 95 % of repetitions. The generator that makes the rows has
    the seed that ``score`` is given, too, which must not tie its draws to them.
    """
    assert uniform(p_values_of_fresh_rows(1000, 9), 9) > 1e-4


def test_the_test_of_uniformity_has_the_power_that_it_states():
    generator, rejected = np.random.default_rng(0), 0
    for _ in range(200):
        data, known = generator.normal(-0.3, 1, (1000, 1)), generator.normal(0, 1, (1000, 9))
        rejected += uniform((1 + (known <= data).sum(1)) / 10, 9) < 1e-4
        sharp = (known <= data).sum(1) / 9  # without the 1s
        assert uniform(sharp, 9) < 1e-4
    assert rejected >= 0.95 * 200


def test_rows_that_were_trained_on_calibrate_nothing():
    """Principal components of 15 rows in 12 dimensions fit these rows far better than fresh ones."""
    truth = linear_gaussian(12, 3)
    train, fresh, known = truth.sample(15), truth.sample(500), truth.sample(500)
    vae = pv.exact.LinearGaussian.fit(train, 8).as_vae()
    wrong, right = (pv.score(vae, fresh, held_out=h, num_particles=2, draws=2).p_value.values for h in (train, known))
    assert (wrong <= 0.1).mean() > 0.5, "alarms for most fresh rows"
    assert stats.binomtest(int((right <= 0.1).sum()), 500, 0.1).pvalue > 1e-4


def trained():
    model = linear_gaussian(6, 3)
    x = model.sample(40)
    vae = small_vae()
    pv.fit(vae, x[:20], epochs=1, progress=False, engine="eager", device="cpu")
    return vae, x


def test_rows_that_were_trained_on_are_refused_on_both_sides():
    vae, x = trained()
    with pytest.raises(DataError, match="held_out overlaps the training data of model 'vae': 5 of its 10 rows"):
        pv.score(vae, x[30:], held_out=x[15:25])
    with pytest.raises(DataError, match="data overlaps the training data of model 'vae': 5 of its 10 rows"):
        pv.score(vae, x[15:25], held_out=x[30:])
    alone = pv.score(vae, x[:20], num_particles=30, draws=2)
    assert alone.attrs["trained_on"].startswith("20 of its 20 rows")
    assert "p_value" not in alone


INLIERS, OUTLIERS, HELD_OUT, LEVEL, SHIFT = 200, 20, 999, 0.01, 4.5


def test_planted_outliers_are_found():
    """At p ≤ 0.01: 18 of 20 outliers (their chance is 95 %), and 0 of 200 inliers.

    log p(x) is a constant minus half a squared Mahalanobis distance, which is χ² of 10 degrees for inliers. Outliers
    are shifted by s along an axis that no latent explains, which makes theirs non-central by s² / 0.8²: that gives the
    chance that one of them is found. The share of inliers below the 10th of 999 held-out rows is of Beta(10, 990).
    """
    torch.manual_seed(0)
    model = pv.exact.LinearGaussian(torch.eye(10, 3).double(), torch.zeros(10).double(), 0.8)
    x, known = model.sample(INLIERS + OUTLIERS), model.sample(HELD_OUT)
    x[INLIERS:, 9] += SHIFT
    found = pv.score(model.as_vae(diagonal=True), x, held_out=known)
    alarms = found.p_value.values <= LEVEL
    right, wrong = int(alarms[INLIERS:].sum()), int(alarms[:INLIERS].sum())
    power = stats.ncx2.sf(stats.chi2.isf(LEVEL, 10), 10, SHIFT**2 / 0.8**2)
    assert stats.binom.ppf(1e-3, OUTLIERS, power) <= right <= stats.binom.isf(1e-3, OUTLIERS, power)
    assert wrong <= stats.betabinom.isf(1e-3, INLIERS, 10, 990)
    assert power == pytest.approx(0.953, abs=1e-3)
    assert (right, wrong) == (18, 0)


# What data may be


def test_rows_are_labelled_as_the_users_are():
    vae = linear_gaussian().as_vae()
    frame = pd.DataFrame(np.zeros((3, 5)), columns=list("abcde"), index=["u", "v", "w"])
    assert list(pv.score(vae, frame, draws=2).datum.values) == ["u", "v", "w"]
    assert list(pv.score(vae, frame.to_numpy(), draws=2).datum.values) == [0, 1, 2]
    some = pv.data.Data(torch.zeros(4, 5)).rows(torch.tensor([3, 1]))
    assert list(pv.score(vae, some, draws=2).datum.values) == [3, 1]
    assert pv.score(vae, frame, draws=2).to_dataframe().loc["v", "log_px"] < 0


def with_gaps(x, *columns):
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[:, list(columns)] = False
    return pv.data.Data(x, mask=mask)


def joined(*parts):
    return pv.data.Data(torch.cat([p.x for p in parts]), mask=torch.cat([p.mask for p in parts]))


def test_rows_are_compared_with_those_that_miss_the_same_values():
    """The last two columns carry much density: compared with complete rows, incomplete ones look improbable."""
    model = pv.exact.LinearGaussian(torch.eye(5, 2).double(), torch.zeros(5).double(), 0.01)
    vae, whole, gaps, other = model.as_vae(), model.sample(40), model.sample(20), model.sample(1)
    held_out = joined(with_gaps(whole[:30]), with_gaps(gaps[:10], 3, 4))
    data = joined(with_gaps(whole[30:]), with_gaps(gaps[10:], 3, 4))
    found = pv.score(vae, data, held_out=held_out)
    assert list(found.held_out_rows) == [30] * 10 + [10] * 10
    known = pv.score(vae, held_out).log_px.values
    rank = (known[None, 30:] <= found.log_px.values[10:, None]).sum(1)
    assert (abs(found.p_value.values[10:] - (1 + rank) / 11) < 2 / 11).all()
    assert (found.p_value.values[10:] > 0.1).mean() > 0.5
    with pytest.warns(CalibrationWarning, match="1 of 21 data have no p-value") as caught:
        alone = pv.score(vae, joined(data, with_gaps(other, 0)), held_out=held_out)
    assert caught[0].filename == __file__, "where it was called"
    assert np.isnan(alone.p_value.values[-1])
    assert alone.held_out_rows.values[-1] == 0
    assert np.isfinite(alone.p_value.values[:-1]).all()


def test_a_mask_of_all_observed_is_no_mask():
    model = linear_gaussian()
    x, known = model.sample(10), model.sample(20)
    plain = pv.score(model.as_vae(), x, held_out=with_gaps(known), draws=2)
    assert (plain.held_out_rows == 20).all()


def test_ranks_of_infinite_and_undefined_numbers():
    """What cannot be told never makes a p-value smaller."""
    one = np.zeros(4), np.zeros(4)
    log_px, known = np.array([-np.inf, -1.0, np.inf, np.nan]), np.array([-np.inf, np.nan, 0.0, np.inf])
    p, count = home.conformal_p_values(log_px, known, *one)
    assert p == pytest.approx([3 / 5, 3 / 5, 1, np.nan], nan_ok=True)
    assert list(count) == [4] * 4


def test_a_context_reaches_every_score():
    """With its context as its only sight of x, a VAE scores rows by it."""
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.ContextNormal(pv.nn.mlp(1, [], 4)),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(3, [], 4)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(5, [], 4)),
    )
    x, c = torch.randn(6, 4), torch.arange(6.0)[:, None]
    found = pv.score(vae, pv.data.Data(x, context=c), held_out=pv.data.Data(x + 1, context=c), draws=2)
    known = pv.log_evidence(vae, pv.data.Data(x, context=c), seed=derive_seed(0, "log p(x) of the data", 0))
    assert np.array_equal(found.log_px, known.log_evidence)


MISTAKES = {
    "a stream held out": (DataError, "held_out is a stream, but must be in memory", {"held_out": "stream"}),
    "one draw": (SettingsError, "draws is 1; it must be a whole number of at least 2", {"draws": 1}),
    "no chunk": (SettingsError, "chunk is 0", {"chunk": 0}),
    "one particle": (SettingsError, "num_particles is 1", {"num_particles": 1}),
    "a mistyped setting": (SettingsError, "did you mean held_out", {"heldout": torch.zeros(3, 5)}),
    "other columns held out": (ModelError, "4", {"held_out": torch.zeros(3, 4)}),
    "NaN held out": (DataError, "held_out: 15 of 15 values are not finite", {"held_out": torch.zeros(3, 5) / 0}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_scored_is_refused_in_one_sentence(name, tmp_path):
    error, sentence, given = MISTAKES[name]
    np.save(tmp_path / "x.npy", np.zeros((3, 5), np.float32))
    stream = pv.data.stream(tmp_path / "x.npy")
    given = {key: stream if isinstance(value, str) else value for key, value in given.items()}
    settings = {"data": torch.zeros(3, 5), **given}
    with pytest.raises(error, match=sentence) as caught, warnings.catch_warnings():
        pv.score(linear_gaussian().as_vae(), **settings)
    assert "\n" not in str(caught.value)


def test_a_stream_is_scored_piece_by_piece_and_its_sample_calibrates(tmp_path, monkeypatch):
    """With the exact guide log p(x) has no error, so that pieces are seen to be the rows in their order."""
    monkeypatch.setattr("pyro_vae.use.score.AT_ONCE", 7)
    model = linear_gaussian()
    x, fresh = model.sample(30).float(), model.sample(40).float()
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "fresh.npy", fresh.numpy())
    held_out = pv.data.stream(tmp_path / "fresh.npy").sample(10_000)
    found = pv.score(model.as_vae(), pv.data.stream(tmp_path / "x.npy"), held_out=held_out, draws=2)
    whole = pv.score(model.as_vae(), x, held_out=fresh, draws=2)
    np.testing.assert_allclose(found.log_px, model.log_marginal(x.double()), atol=1e-4)
    assert np.array_equal(found.p_value, whole.p_value)
    assert found.attrs["data_hash"] == whole.attrs["data_hash"]
    assert (found.held_out_rows == 40).all()


def test_a_mask_and_a_context_are_taken_beside_the_data_or_in_them():
    torch.manual_seed(0)
    vae, x, context = conditional_vae(), torch.randn(6, 6), torch.randn(6, 2)
    mask = torch.rand(6, 6) > 0.3
    beside = pv.score(vae, x, context=context, mask=mask, num_particles=20, draws=2)
    within = pv.score(vae, pv.data.Data(x, context=context, mask=mask), num_particles=20, draws=2)
    assert beside.log_px.values.tolist() == within.log_px.values.tolist()
    other = pv.score(vae, x, context=context + 1, mask=mask, num_particles=20, draws=2)
    assert (abs(other.log_px - beside.log_px) > 1e-3).all(), "power"
