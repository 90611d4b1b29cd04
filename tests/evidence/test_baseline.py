"""Baselines beside the evidence: each against its closed form, and a VAE that loses to them is told so."""

import importlib
import re

import numpy as np
import pytest
import torch
from scipy import stats

import pyro_vae as pv
from pyro_vae.data import Data
from pyro_vae.errors import DataError
from pyro_vae.evidence import baseline, judge_baseline

baseline_module = importlib.import_module("pyro_vae.evidence.baseline")  # the function has the module's name


def linear():
    torch.manual_seed(0)
    return pv.exact.LinearGaussian(torch.randn(6, 2).double(), torch.ones(6).double(), 0.5)


def test_each_gaussian_is_that_of_scipy_and_the_pair_is_exact():
    exact = linear()
    train, x = exact.sample(200), exact.sample(80)
    found = baseline(exact.as_vae(), x, train=train, num_particles=10)
    apart, own = train.numpy(), x.numpy()
    independent = stats.norm(apart.mean(0), apart.std(0)).logpdf(own).sum(1)
    full = stats.multivariate_normal(apart.mean(0), np.cov(apart.T, bias=True)).logpdf(own)
    ppca = pv.exact.LinearGaussian.fit(train, 2).log_marginal(x).numpy()
    each = found.log_likelihood
    assert each.sel(baseline="independent Gaussians").values == pytest.approx(independent, abs=1e-4)
    assert each.sel(baseline="full-covariance Gaussian").values == pytest.approx(full, abs=1e-4)
    assert each.sel(baseline="probabilistic PCA (2)").values == pytest.approx(ppca, abs=1e-4)
    apart = exact.log_marginal(x).numpy() - independent
    assert found.difference[0].item() == pytest.approx(apart.mean(), abs=1e-4)
    assert found.difference_se[0].item() == pytest.approx(apart.std(ddof=1) / np.sqrt(80), abs=1e-4)
    assert judge_baseline(found).level == "fine"


def test_principal_components_are_those_of_standardized_columns_where_these_describe_the_data_better():
    """Of columns as they are, two latents follow the two of the largest numbers and nothing else."""
    exact = linear()
    units = torch.tensor([1e3, 1e2, 10, 1, 1, 1]).double()
    train, x = exact.sample(200) * units, exact.sample(80) * units
    found = baseline(exact.as_vae(), x, train=train, num_particles=10)
    sd = train.std(0, correction=0)
    ppca = pv.exact.LinearGaussian.fit(train / sd, 2).log_marginal(x / sd) - sd.log().sum()
    each = found.log_likelihood.sel(baseline="probabilistic PCA (2)").values
    assert each == pytest.approx(ppca.numpy(), abs=1e-4)
    as_they_are = pv.exact.LinearGaussian.fit(train, 2).log_marginal(x).numpy()
    assert each.mean() > as_they_are.mean() + 1


@pytest.mark.parametrize(
    ("features", "rows", "expected"),
    [
        (6, 30, ["full-covariance Gaussian", "probabilistic PCA (2)"]),
        (6, 29, ["probabilistic PCA (2)"]),
        (4, 20, ["full-covariance Gaussian", "probabilistic PCA (2)"]),
        (3, 15, ["full-covariance Gaussian"]),
    ],
)
def test_a_covariance_takes_five_rows_for_each_column_and_pca_fewer_latents_than_columns(features, rows, expected):
    exact = pv.exact.LinearGaussian(torch.randn(features, 2).double(), torch.ones(features).double(), 0.5)
    found = baseline(exact.as_vae(), exact.sample(5), train=exact.sample(rows), num_particles=5)
    assert found.baseline.values.tolist() == ["independent Gaussians", *expected]


def test_of_many_training_rows_some_are_drawn(monkeypatch):
    monkeypatch.setattr(baseline_module, "MOST_ROWS", 40)
    exact = linear()
    for rows, fitted in ((40, 40), (41, 40)):
        found = baseline(exact.as_vae(), exact.sample(5), train=exact.sample(rows), num_particles=5)
        assert found.attrs["fitted_to"] == f"{fitted} training data"
    monkeypatch.setattr(baseline_module, "make_generator", None)
    baseline(exact.as_vae(), exact.sample(5), train=exact.sample(40), num_particles=5)  # few are taken as they are


def counts_vae():
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(1),
        decoder=pv.likelihoods.Poisson(torch.nn.Linear(1, 3)),
        encoder=pv.posteriors.DiagNormal(torch.nn.Linear(3, 2)),
    )


def test_countable_columns_have_their_frequencies_and_poisson():
    train = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 4.0], [1.0, 1.0, 2.0], [0.0, 1.0, 0.0]])
    x = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 9.0]])
    found = baseline(counts_vae(), x, train=train, num_particles=2)
    assert found.baseline.values.tolist() == ["column frequencies", "independent Poisson"]
    mean = train.double().mean(0).numpy()
    rest = stats.geom(1 / (mean + 1.5), loc=-1).pmf(x.numpy())
    met = np.array([[3, 4, 2], [1, 4, 0]])
    assert found.log_likelihood[0].values == pytest.approx(np.log((met + rest) / 5).sum(1))
    rate = (train.sum(0).numpy() + 0.5) / 5
    assert found.log_likelihood[1].values == pytest.approx(stats.poisson(rate).logpmf(x.numpy()).sum(1))


def test_frequencies_are_a_distribution():
    """Two rows, 0 and 3: p(0) has half of the two, and a third of the geometric distribution of mean 2."""
    train = torch.tensor([[0.0, 7.0, 2.0], [3.0, 1.0, 4.0]])
    values = torch.arange(100.0)
    x = torch.stack([values, 0 * values, 0 * values], 1)
    each = baseline(counts_vae(), x, train=train, num_particles=2).log_likelihood[0]
    assert float(np.exp(each - each[0]).sum()) * (1 + 1 / 3) / 3 == pytest.approx(1)


def test_missing_cells_are_left_out():
    train, mask = torch.randn(50, 6).double(), torch.ones(20, 6, dtype=torch.bool)
    mask[:, 2] = False
    x = torch.randn(20, 6).double()
    found = baseline(linear().as_vae(), Data(x, mask=mask), train=train, num_particles=2)
    own, seen = x.numpy()[:, [0, 1, 3, 4, 5]], train.numpy()[:, [0, 1, 3, 4, 5]]
    expected = stats.norm(seen.mean(0), seen.std(0)).logpdf(own).sum(1)
    assert found.baseline.values.tolist() == ["independent Gaussians"]
    assert found.log_likelihood[0].values == pytest.approx(expected, rel=1e-3)


def test_a_vae_that_loses_to_independent_columns_is_bad():
    exact = linear()
    vae, x = exact.as_vae(), exact.sample(60)
    with torch.no_grad():
        vae.decoder.fixed_scale.mul_(8)
    finding = judge_baseline(baseline(vae, x, num_particles=50))
    assert finding.level == "bad"
    assert "four fifths" in finding.why
    assert "probabilistic PCA (2) describes new data better: check" in finding.next


@pytest.mark.parametrize(("worse", "level"), [(42, "doubtful"), (33, "fine"), (12, "fine")])
def test_a_mean_that_few_data_decide_is_doubtful_where_most_are_worse(worse, level):
    """Of 60 data: 42 and 12 are beyond two standard errors of a half, and 33 are not."""
    exact = linear()
    found = baseline(exact.as_vae(), exact.sample(60), train=exact.sample(90), num_particles=50)
    of_each = np.where(np.arange(60) < worse, -1.0, 10.0) + (np.arange(60) == 59)
    found.log_likelihood[1] = found.log_evidence - of_each
    found.difference[1], found.difference_se[1] = 1.5, 2.0
    finding = judge_baseline(found)
    assert finding.level == level
    assert f"better for {60 - worse} of 60 data" in finding.why
    assert f"{'-1' if worse > 30 else '+10'} at the median and +11 for datum 59)" in finding.why
    assert ("few data decide the mean" in finding.next) == (level == "doubtful")
    found.log_likelihood[0], found.difference[0], found.difference_se[0] = found.log_likelihood[1], 1.5, 2.0
    of_independent = judge_baseline(found)
    assert of_independent.level == "doubtful"
    assert ("few data decide the mean" in of_independent.next) == (worse != 33)


def test_the_figure_says_over_what_and_its_labels_do_not_overlap():
    exact = linear()
    figure = pv.plots.estimates(baseline(exact.as_vae(), exact.sample(60), train=exact.sample(90), num_particles=5))
    assert figure.get_suptitle() == "bars: ± 2 standard errors, over data, in pairs"
    figure.draw_without_rendering()
    for axes in figure.axes:
        labels = axes.get_xticklabels()
        assert labels[0].get_text() == "independent Gaussians"
        assert {label.get_rotation() for label in labels} == {30}


def judged(differences, errors):
    """The finding of a comparison whose paired differences are given."""
    exact = linear()
    found = baseline(exact.as_vae(), exact.sample(60), train=exact.sample(90), num_particles=5)
    found.difference[:], found.difference_se[:] = differences, errors
    found.elbo_difference[:], found.elbo_difference_se[:] = [-739.4, -0.66, 2.0], [13.2, 0.25, 0.1]
    return judge_baseline(found)


def test_each_difference_has_its_error_and_ties_are_named():
    finding = judged([3.0, -0.31, 0.55], [0.47, 0.25, 0.18])
    assert finding.level == "fine"
    assert re.search(
        r"not distinguishable within 2 standard errors: full-covariance Gaussian "
        r"\(the VAE is better for \d+ of 60 data, by [+-][\d.]+ at the median and [+-][\d.]+ for datum \d+\)$",
        finding.why,
    )
    assert "+3.00 ± 0.47 over independent Gaussians, -0.31 ± 0.25 over full-covariance Gaussian" in finding.why
    assert "(paired, s.e. over data; the ELBO is -739 ± 13, -0.66 ± 0.25, +2.00 ± 0.10)" in finding.why
    assert "not distinguishable" not in judged([3.0, 2.0, 0.55], [0.47, 0.25, 0.18]).why


@pytest.mark.parametrize(
    ("differences", "level"),
    [
        ([-1.0, 2.0, 2.0], "bad"),
        ([1.0, -2.1, 2.0], "doubtful"),
        ([0.9, 2.0, 2.0], "doubtful"),
        ([-0.9, 2, 2], "doubtful"),
    ],
)
def test_the_level_is_that_of_two_standard_errors(differences, level):
    finding = judged(differences, [0.49, 1.0, 0.1])
    assert finding.level == level
    assert bool(finding.next) == (level != "fine")


def test_one_row_is_refused():
    with pytest.raises(DataError, match="1 datum"):
        baseline(linear().as_vae(), torch.ones(1, 6).double())


def test_check_holds_it_and_takes_the_training_data():
    exact = linear()
    tree = pv.check(exact.as_vae(), exact.sample(30), train=exact.sample(90), gold=0, draws=4, budget=60)
    assert tree["baseline"].attrs["fitted_to"] == "90 training data"
    assert "baselines" in tree["findings"].about.values


def test_rounding_adds_a_twelfth_of_the_squared_step_and_a_constant_column_takes_the_tables_step():
    """A number rounded to steps of s lies anywhere within s: its variance there is s² / 12."""
    constant, halves = torch.full((4,), 3.0).double(), torch.tensor([0.0, 0.5, 0.5, 2.0]).double()
    found = baseline_module._rounding(torch.stack([constant, halves], 1))
    assert found.numpy() == pytest.approx([0.25 / 12, 0.25 / 12], rel=1e-12)
    assert baseline_module._rounding(constant[:, None]).item() == pytest.approx(1 / 12), "where nothing has a step, 1"
    scale = np.sqrt(halves.numpy().var() + 0.25 / 12)
    density = baseline_module._normal(halves, found[1])(torch.tensor([1.5]).double())
    assert density.item() == pytest.approx(stats.norm(halves.mean(), scale).logpdf(1.5), rel=1e-12)


def test_evidence_that_is_there_is_used_and_that_of_other_data_is_refused():
    exact = linear()
    vae, x = exact.as_vae(), exact.sample(30)
    known = pv.log_evidence(vae, x, num_particles=30)
    found = baseline(vae, x, evidence=known)
    assert found.log_evidence.equals(known.log_evidence)
    assert found.attrs["num_particles"] == 30
    with pytest.raises(DataError, match="evidence belongs to other data than x"):
        baseline(vae, exact.sample(30), evidence=known)
