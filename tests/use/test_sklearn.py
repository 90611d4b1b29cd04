"""``pv.sklearn.VAETransformer``: scikit-learn's own checks, and exact answers where a VAE is linear."""

import pickle
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import make_low_rank_matrix
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import parametrize_with_checks

import pyro_vae as pv
from pyro_vae.errors import ConstantColumnsWarning, DataError, ModelError, SettingsError
from pyro_vae.use import sklearn as home
from pyro_vae.use.makers import class_of

QUICK = {"n_components": 2, "hidden": (8,), "epochs": 2, "random_state": 0}


@parametrize_with_checks(
    [pv.sklearn.VAETransformer(**QUICK)], expected_failed_checks=pv.sklearn.expected_failed_checks, xfail_strict=True
)
def test_it_is_an_estimator_of_scikit_learn(estimator, check):
    check(estimator)


def small(**settings):
    return pv.sklearn.VAETransformer(**{**QUICK, **settings})


@pytest.fixture(scope="module")
def low_rank():
    """Standardized rows that two directions explain but for a tail."""
    x = make_low_rank_matrix(400, 6, effective_rank=2, tail_strength=0.1, random_state=0)
    return StandardScaler().fit_transform(x)


@pytest.fixture(scope="module")
def linear(low_rank):
    """A VAE that is a factor model of two latents with isotropic noise, trained to its maximum."""
    return pv.sklearn.VAETransformer(
        2, hidden=(), posterior=pv.posteriors.FullNormal, epochs=150, learning_rate=0.02, standardize=False,
        random_state=0,
    ).fit(low_rank[:300])  # fmt: skip


def test_its_score_is_that_of_probabilistic_pca(linear, low_rank):
    """Which is the maximum of its likelihood, so that held-out rows are as probable under both."""
    known = PCA(2).fit(low_rank[:300])
    assert linear.score(low_rank[:300]) == pytest.approx(known.score(low_rank[:300]), abs=0.05)
    assert linear.score(low_rank[300:]) == pytest.approx(known.score(low_rank[300:]), abs=0.05)


def test_the_log_density_of_each_row_is_exact_within_its_error(linear, low_rank):
    x = low_rank[300:]
    exact = pv.exact.LinearGaussian.of(linear.vae_).log_marginal(torch.as_tensor(x)).detach().numpy()
    error = pv.log_evidence(linear.vae_, x, num_particles=500).mcse.values
    found = linear.score_samples(x)
    assert found.dtype == np.float64
    assert (abs(found - exact) < 5 * error + 1e-9).all()
    assert linear.score(x) == found.mean()
    assert np.array_equal(linear.score_samples(x), found), "the same draws each time"


def test_transform_gives_posterior_means_and_its_inverse_decoded_means(linear, low_rank):
    x = low_rank[300:]
    z = linear.transform(x)
    with torch.no_grad():
        assert z == pytest.approx(linear.vae_.encoder(torch.as_tensor(x)).mean.numpy(), rel=1e-12)
        assert linear.inverse_transform(z) == pytest.approx(
            linear.vae_.decoder(torch.as_tensor(z)).mean.numpy(), rel=1e-12
        )
    assert np.mean((linear.inverse_transform(z) - x) ** 2) < 0.5 * np.mean(x**2)
    again = small()
    assert again.fit_transform(x) == pytest.approx(again.transform(x))


def test_each_row_is_transformed_by_itself(linear, low_rank, monkeypatch):
    """What scikit-learn's checks of subsets and of the order of rows would see, did ``score_samples`` not fail them."""
    x = low_rank[300:]
    whole, back = linear.transform(x), linear.inverse_transform(x[:, :2])
    monkeypatch.setattr(home, "AT_ONCE", 7)
    order = np.random.default_rng(0).permutation(len(x))
    assert linear.transform(x[order]) == pytest.approx(whole[order], rel=1e-12)
    assert linear.inverse_transform(x[order, :2]) == pytest.approx(back[order], rel=1e-12)


def search(low_rank, **settings):
    """A grid over the number of latents, at the end of a pipeline."""
    given = {"hidden": (), "learning_rate": 0.05, "random_state": 0, **settings}
    model = make_pipeline(StandardScaler(), pv.sklearn.VAETransformer(**given))
    return GridSearchCV(model, {"vaetransformer__n_components": [1, 2]}, cv=2), 100 + 5 * low_rank[:200]


def test_a_grid_search_in_a_pipeline_finds_the_number_of_latents(low_rank):
    """The second latent explains much, by held-out log p(x)."""
    grid, x = search(low_rank, epochs=40)
    grid.fit(x)
    assert grid.best_params_ == {"vaetransformer__n_components": 2}
    assert np.diff(grid.cv_results_["mean_test_score"]) > 0.2, "nats"
    assert grid.transform(x).shape == (200, 2)
    assert grid.score(x) == pytest.approx(grid.best_estimator_.score(x))


@pytest.mark.slow
def test_two_processes_give_the_grid_of_one(low_rank):
    grid, x = search(low_rank, epochs=2)
    one, two = (clone(grid).set_params(n_jobs=n).fit(x).cv_results_["mean_test_score"] for n in (1, 2))
    assert two == pytest.approx(one, rel=1e-6)


def test_a_random_state_gives_the_same_vae_again(low_rank):
    one, same, other = (small(random_state=state).fit(low_rank).transform(low_rank) for state in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.allclose(one, other)
    shared = np.random.RandomState(0)
    first, second = (small(random_state=shared).fit(low_rank) for _ in range(2))
    assert first.seed_ != second.seed_
    assert second.fit_.history.attrs["seed"] == second.seed_
    assert np.array_equal(first.transform(low_rank), one), "the first number of RandomState(0), as of 0"
    free = [small(random_state=None).fit(low_rank).seed_ for _ in range(2)]
    assert free[0] != free[1]


def test_fitting_leaves_the_generators_of_torch_alone(low_rank):
    before = torch.get_rng_state()
    small().fit(low_rank).score(low_rank)
    assert torch.equal(before, torch.get_rng_state())


def test_a_copy_keeps_what_was_learned(linear, low_rank):
    again = pickle.loads(pickle.dumps(linear))  # noqa: S301  (made here)
    assert np.array_equal(again.score_samples(low_rank), linear.score_samples(low_rank))
    assert list(again.fit_.history.data_vars) == list(linear.fit_.history.data_vars)
    assert not hasattr(clone(linear), "vae_")


def test_names_of_columns_and_rows_come_back(low_rank):
    frame = pd.DataFrame(low_rank[:20], columns=list("abcdef"), index=[f"row {i}" for i in range(20)])
    model = small().set_output(transform="pandas").fit(frame)
    z = model.transform(frame)
    assert list(z.columns) == list(model.get_feature_names_out()) == ["vaetransformer0", "vaetransformer1"]
    assert list(z.index) == list(frame.index)
    assert list(model.feature_names_in_) == list(frame.columns)
    with pytest.raises(ValueError, match="feature names"):
        model.transform(frame[list("fedcba")])
    permuted, plain = (pv.log_evidence(model.vae_, f, num_particles=30) for f in (frame[list("fedcba")], frame))
    assert np.array_equal(permuted.log_evidence, plain.log_evidence), "the VAE knows its columns by name"


def test_missing_values_leave_the_likelihood(linear, low_rank):
    """log p of the observed columns is the marginal of the same model; training takes gaps, too."""
    x = low_rank[300:].copy()
    x[:, 5] = np.nan
    whole = pv.exact.LinearGaussian.of(linear.vae_)
    part = pv.exact.LinearGaussian(whole.weight[:5], whole.bias[:5], whole.scale)
    exact = part.log_marginal(torch.as_tensor(x[:, :5])).detach().numpy()
    assert abs(linear.score_samples(x) - exact).mean() < 0.1
    x = np.where(np.random.default_rng(0).random(x.shape) < 0.2, np.nan, low_rank[300:])
    x[:, 0] = low_rank[300:, 0]
    gaps = small().fit(x)
    assert get_tags(gaps).input_tags.allow_nan
    assert np.isfinite(gaps.transform(x)).all()
    assert np.isfinite(gaps.inverse_transform(gaps.transform(x))).all()
    with pytest.raises(DataError, match="X: row 1 has no observed value"):
        linear.transform(np.array([[0.0] * 6, [np.nan] * 6]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_keep_their_precision(low_rank, dtype):
    x = low_rank.astype(dtype)
    model = small().fit(x)
    z = model.transform(x)
    assert z.dtype == model.inverse_transform(z).dtype == dtype
    assert {p.dtype for p in model.vae_.parameters()} == {torch.from_numpy(x).dtype}


PARTS = {
    "a posterior": {"posterior": pv.posteriors.FullNormal},
    "a partial posterior": {"posterior": partial(pv.posteriors.LowRankNormal, rank=2)},
    "a prior of the data": {"prior": partial(pv.priors.VampPrior, components=5)},
    "a prior of latents": {"prior": partial(pv.priors.GaussianMixture, components=3)},
    "a likelihood of two numbers": {"likelihood": pv.likelihoods.HeteroscedasticNormal},
    "blocks": {"likelihood": partial(pv.likelihoods.Blocks, blocks=[(pv.likelihoods.Normal, 6)])},
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_may_be_others(low_rank, name):
    model = clone(small(**PARTS[name])).fit(low_rank)
    [(role, factory)] = PARTS[name].items()
    part = {"prior": "prior", "likelihood": "decoder", "posterior": "encoder"}[role]
    assert isinstance(getattr(model.vae_, part), class_of(factory))
    assert model.transform(low_rank).shape == (400, 2)
    assert np.isfinite(model.score(low_rank))


def test_the_default_is_a_standard_normal_with_learned_noise(low_rank):
    vae = small(n_components=3, hidden=(5, 4)).fit(low_rank).vae_
    kinds = [type(part).__name__ for part in (vae.prior, vae.decoder, vae.encoder)]
    assert kinds == ["StandardNormal", "Normal", "DiagNormal"]
    assert any(p.requires_grad and p.numel() == 1 for p in vae.decoder.parameters()), "the scale"
    widths = [[m.out_features for m in part.net if hasattr(m, "out_features")] for part in (vae.encoder, vae.decoder)]
    assert widths == [[5, 4, 6], [4, 5, 6]]


def test_training_takes_enough_steps_and_passes(low_rank, monkeypatch):
    monkeypatch.setattr(home, "STEPS", 9)
    monkeypatch.setattr(home, "PASSES", 2)
    model = small(epochs=None)
    assert model.fit(low_rank).fit_.history.sizes["epoch"] == 3, "of 4 steps each"
    assert clone(model).set_params(batch_size=10).fit(low_rank).fit_.history.sizes["epoch"] == 2
    assert small(epochs=5).fit(low_rank).fit_.history.sizes["epoch"] == 5
    assert clone(model).set_params(batch_size=10).fit(low_rank).fit_.history.attrs["batch_size"] == 10


def test_it_is_silent_unless_it_is_asked_to_speak(low_rank, capfd):
    small().fit(low_rank)
    assert capfd.readouterr() == ("", "")
    small(verbose=True).fit(low_rank)
    assert "Training on" in "".join(capfd.readouterr())


MISTAKES = {
    "no latents": (SettingsError, "n_components is 0; it must be", {"n_components": 0}),
    "no epochs": (SettingsError, "epochs is 0", {"epochs": 0}),
    "no rate": (SettingsError, "learning_rate is 0; it must be", {"learning_rate": 0}),
    "no batch": (SettingsError, "batch_size is 0", {"batch_size": 0}),
    "other data": (DataError, "X: row 0, column 0 is", {"likelihood": pv.likelihoods.Bernoulli}),
    "no state": (ValueError, "cannot be used to seed", {"random_state": "a"}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_settings_are_validated_where_it_is_fitted(low_rank, name):
    error, sentence, settings = MISTAKES[name]
    model = small(**settings)
    with pytest.raises(error, match=sentence):
        model.fit(low_rank)
    assert not hasattr(model, "vae_")


def test_latents_of_another_width_are_refused(linear):
    with pytest.raises(ModelError, match="the decoder was given rows of 3 numbers and was built for 2"):
        linear.inverse_transform(np.zeros((4, 3)))


@pytest.mark.parametrize("by_pipeline", [False, True])
def test_only_constant_columns_of_real_numbers_are_warned_of_at_the_users_line(by_pipeline):
    """Warnings are errors here, so that the counts alone would fail."""
    counts = np.c_[np.arange(20) % 4, np.zeros(20)]
    small(likelihood=pv.likelihoods.Poisson).fit(counts)
    blocks = [(partial(pv.likelihoods.Normal, learn_scale=True), 1), (pv.likelihoods.Poisson, 2)]
    both = partial(pv.likelihoods.Blocks, blocks=blocks)
    model = small(likelihood=both)
    model = make_pipeline(model) if by_pipeline else model
    with pytest.warns(ConstantColumnsWarning, match=r"1 of 1 columns have at most one distinct value \(0\)") as told:
        model.fit(np.c_[np.ones(20), counts])
    assert {warning.filename for warning in told if warning.category is ConstantColumnsWarning} == {__file__}
