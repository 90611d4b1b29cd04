"""Predictive checks: data of the model pass, data of another kind fail by the statistic that sees it."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from helpers.checks import linear_gaussian
from helpers.guides import MASK, OfWhatWasSeen, conditional, conditional_data
from scipy.stats import beta, kstest

import pyro_vae as pv
from pyro_vae.diagnose import judge_predictive_check, predictive_check, prior_check
from pyro_vae.errors import DataError, SettingsError

MODEL = linear_gaussian()
DISCREPANCY = "mean log p(x|z)"


def kurtosis(x):
    deviation = x - x.mean()
    return (deviation**4).mean() / (deviation**2).mean() ** 2


def test_data_of_the_model_pass():
    """Twenty data sets: a posterior p-value is extreme no more often than twice a uniform one (Meng 1994)."""
    found = [predictive_check(MODEL.as_vae(), MODEL.sample(40), draws=300, seed=s) for s in range(20)]
    p = np.array([f.p_value.values[f.family == "table"] for f in found])
    assert ((p < 0.01) | (p > 0.99)).sum() <= 8, "of 140"
    assert sum(judge_predictive_check(f).level == "fine" for f in found) >= 19
    assert abs(np.mean([f.z_score.mean() for f in found])) < 0.5


@pytest.mark.slow
def test_prior_p_values_of_data_of_the_model_are_uniform():
    found = [prior_check(MODEL.as_vae(), MODEL.sample(20), draws=299, seed=s) for s in range(60)]
    for name in ("mean", "sd", "largest", "sd of row means"):
        p = [float(f.p_value.sel(statistic=name)) for f in found]
        assert kstest(p, "uniform").pvalue > 1e-4
    assert sum(judge_predictive_check(f).level == "fine" for f in found) >= 50
    assert DISCREPANCY not in found[0].statistic


def test_a_wrong_variance_is_seen_by_the_sd_and_not_by_the_mean():
    x = MODEL.sample(200)
    x = x.mean(0) + 1.5 * (x - x.mean(0))
    for check in (prior_check, predictive_check):
        found = check(MODEL.as_vae(), x, draws=400)
        assert found.p_value.sel(statistic="sd") < 0.01, "in the check of inferred latents less so"
        assert found.z_score.sel(statistic="sd") > 2.5
        assert judge_predictive_check(found).level == "bad"
    assert 0.01 < prior_check(MODEL.as_vae(), x, draws=400).p_value.sel(statistic="mean") < 0.99


@pytest.mark.parametrize("check", [prior_check, predictive_check])
def test_one_bad_column_is_named_first(check):
    """Five columns in a table whose mean and sd hide that one of them has another spread."""
    x = MODEL.sample(200)
    x[:, 3] = x[:, 3].mean() + 2.5 * (x[:, 3] - x[:, 3].mean())
    named = pv.data.Data(x, columns=["ash", "hue", "flavour", "alcohol", "colour"])
    found = check(MODEL.as_vae(), named, draws=300)
    assert "mean" not in found.statistic.values, "columns with names have no unit in common"
    finding = judge_predictive_check(found)
    assert finding.level == "bad"
    assert "of 20 statistics of single columns, the farthest off are the sd of alcohol (" in finding.why
    columns = found.isel(statistic=found.family == "column")
    assert (np.diff(np.abs(columns.z_score)) <= 0).all(), "the worst first"
    one = columns.sel(statistic="sd of alcohol")
    assert one.observed[0].item() == pytest.approx(float(x[:, 3].std(correction=0)))
    assert float(found.column_p_value) == pytest.approx(1 / 301)
    pixels = pv.data.Data(x, columns=named.columns, image_shape=(5, 1))
    assert "mean" in check(MODEL.as_vae(), pixels, draws=20).statistic.values
    assert "sd of column 3" in judge_predictive_check(check(MODEL.as_vae(), x, draws=300)).why


def test_the_p_value_of_all_columns_is_uniform_for_data_of_the_model():
    p = [float(prior_check(MODEL.as_vae(), MODEL.sample(15), draws=39, seed=s).column_p_value) for s in range(60)]
    assert kstest(np.array(p) - 1 / 80, "uniform").pvalue > 1e-4


def test_noise_that_is_too_small_is_seen_by_the_discrepancy_though_each_latent_fits_its_datum():
    """Noise half as large: the latents fit each datum, data are likelier at them than replicates are."""
    narrow = pv.exact.LinearGaussian(MODEL.weight, MODEL.bias, 0.5 * MODEL.scale)
    found = predictive_check(MODEL.as_vae(), narrow.sample(200), draws=400)
    assert found.p_value.sel(statistic=DISCREPANCY) == 0
    assert judge_predictive_check(found).level == "bad"
    assert DISCREPANCY in judge_predictive_check(found).why


def test_heavy_tails_are_seen_by_a_statistic_of_the_users_own():
    """Noise of the right variance but from Student's t with 3 degrees of freedom."""
    z = torch.randn(300, 2).double()
    t = torch.distributions.StudentT(3.0).sample((300, 5)).double() / 3**0.5
    x = z @ MODEL.weight.T + MODEL.bias + MODEL.scale * t
    statistics = {"kurtosis of what is left": lambda x: kurtosis(left_over(x)), "mean": torch.mean}
    found = prior_check(MODEL.as_vae(), x, statistics=statistics, draws=400)
    assert found.p_value.sel(statistic="kurtosis of what is left") == 0
    assert 0.001 < found.p_value.sel(statistic="mean") < 0.999
    finding = judge_predictive_check(found)
    assert finding.level == "bad"
    assert "kurtosis" in finding.why
    assert prior_check(MODEL.as_vae(), MODEL.sample(300), statistics=statistics).p_value.min() > 0.01


def left_over(x):
    """The data off the plane of the decoder."""
    basis = torch.linalg.qr(MODEL.weight).Q
    centred = x - MODEL.bias
    return centred - centred @ basis @ basis.T


def test_replicates_have_the_moments_of_the_predictive_distributions():
    x = MODEL.sample(30)
    statistics = {"mean": torch.mean, "square": lambda x: (x**2).mean()}
    found = predictive_check(MODEL.as_vae(), x, statistics=statistics, draws=2000)
    mean = MODEL.posterior(x).mean @ MODEL.weight.T + MODEL.bias
    variance = (MODEL.weight @ MODEL.precision.inverse() @ MODEL.weight.T).diagonal() + MODEL.scale**2
    truth = {"mean": mean.mean(), "square": (mean**2 + variance).mean()}
    of_prior = MODEL.bias.mean(), (MODEL.bias**2 + (MODEL.weight**2).sum(1) + MODEL.scale**2).mean()
    new = prior_check(MODEL.as_vae(), x, statistics=statistics, draws=2000)
    for i, name in enumerate(statistics):
        for table, right, wrong in (found, truth[name], of_prior[i]), (new, of_prior[i], truth[name]):
            made = table.replicated.sel(statistic=name)
            error = float(made.std(ddof=1)) / 2000**0.5
            assert abs(float(made.mean()) - float(right)) < 5 * error
            assert abs(float(made.mean()) - float(wrong)) > 5 * error, "power"
    assert found.observed.sel(statistic="mean").values == pytest.approx(float(x.mean()))


def test_missing_cells_are_left_out_of_data_and_replicates():
    x = MODEL.sample(40)
    mask = torch.rand(40, 5) > 0.3
    seen = torch.where(mask, x, torch.nan)
    statistics = {"missing": lambda x: x.isnan().sum(), "first": lambda x: x[:, 0].nanmean()}
    tables = []
    for junk in (0.0, 1e6):
        data = pv.data.Data(torch.where(mask, x, torch.tensor(junk).double()), mask=mask)
        tables.append(predictive_check(MODEL.as_vae(), data, statistics=statistics, draws=20))
        assert (tables[-1].observed.sel(statistic="missing") == int((~mask).sum())).all()
        assert (tables[-1].replicated.sel(statistic="missing") == int((~mask).sum())).all()
        assert tables[-1].observed.sel(statistic="first").values == pytest.approx(float(seen[:, 0].nanmean()))
    assert tables[0].equals(tables[1]), "what is missing may hold anything"
    default = prior_check(MODEL.as_vae(), data, draws=20)
    assert default.observed.sel(statistic="mean").values == pytest.approx(float(seen.nanmean()))
    with pytest.raises(SettingsError, match=r"'m' returns nan; it must be a finite number; missing values are NaN"):
        prior_check(MODEL.as_vae(), data, statistics={"m": torch.mean})


def test_the_discrepancy_scores_what_was_seen_only():
    """With the exact posterior of what was seen, -2s² log p(x|z) has a known mean over data of the model."""
    vae = MODEL.as_vae()
    vae.encoder = OfWhatWasSeen(MODEL)
    x = MODEL.sample(3000)
    found = predictive_check(vae, pv.data.Data(x, mask=MASK.expand(3000, 5)), draws=20)
    # Data and replicates at the same latents are alike where these are the exact posterior's.
    truth = -3 * (0.5 + 0.5 * np.log(2 * np.pi) + np.log(float(MODEL.scale)))
    for name in ("observed", "replicated"):
        assert float(found[name].sel(statistic=DISCREPANCY).mean()) == pytest.approx(truth, abs=0.1)


def test_contexts_are_those_of_the_data():
    data = conditional_data(200)
    for check in (prior_check, predictive_check):
        assert judge_predictive_check(check(conditional(), data, draws=400)).level == "fine"
    moved = pv.data.Data(data.x, context=data.context + 2)
    assert judge_predictive_check(prior_check(conditional(), moved, draws=400)).level == "bad", "power"


def test_p_values_and_their_errors():
    """20 draws: p = 0 has an error still, and few draws cannot condemn a model that is near."""
    x = MODEL.sample(30)
    found = prior_check(MODEL.as_vae(), x, statistics={"zeros": lambda x: (x == 0).sum(), "mean": torch.mean}, draws=20)
    assert found.p_value.sel(statistic="zeros") == 0.5, "ties count half"
    assert (found.p_value_se > 0).all()
    assert judge_predictive_check(found).level == "doubtful"
    assert "more replicates" in judge_predictive_check(found).next
    assert judge_predictive_check(prior_check(MODEL.as_vae(), x + 50, draws=20)).level == "bad", "but one far off"


def test_chunks_nothing_moved_same_seed(tmp_path):
    vae, x = MODEL.as_vae(), MODEL.sample(30)
    state = torch.get_rng_state()
    found = predictive_check(vae, x, draws=50, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.equals(predictive_check(vae, x, draws=50, seed=3))
    assert not found.equals(predictive_check(vae, x, draws=50, seed=4))
    small = predictive_check(vae, x, draws=50, seed=3, chunk=20)
    assert (abs(small.p_value - found.p_value) < 0.5).all()
    found.to_netcdf(tmp_path / "check.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "check.nc", engine="h5netcdf") as read:
        assert read.equals(found)


def test_every_likelihood_can_be_checked():
    from helpers.members import FEATURES, LATENTS, LIKELIHOODS, make

    for name, constructor in LIKELIHOODS.items():
        vae = pv.VAE(
            prior=pv.priors.StandardNormal(LATENTS).double(),
            decoder=make(constructor),
            encoder=pv.posteriors.DiagNormal(pv.nn.mlp(FEATURES, [8], 2 * LATENTS)).double(),
        )
        x = vae.decoder(torch.randn(10, LATENTS).double()).sample()
        found = predictive_check(vae, x, draws=20)
        assert found.p_value.notnull().all(), name
        if name in {"Poisson", "Bernoulli"}:
            assert found.observed.sel(statistic="share of zeros")[0] == float((x == 0).double().mean())


def test_what_cannot_be_is_refused():
    vae, x = MODEL.as_vae(), MODEL.sample(3)
    with pytest.raises(SettingsError, match="draws is 10"):
        predictive_check(vae, x, draws=10)
    for wrong in ({}, [torch.mean], {"mean": 3}):
        with pytest.raises(SettingsError, match="statistics must be functions of a data set, by name"):
            prior_check(vae, x, statistics=wrong)
    with pytest.raises(SettingsError, match="'rows' does not return a single number"):
        prior_check(vae, x, statistics={"rows": lambda x: x.mean(1)})
    with pytest.raises(DataError, match="not finite"):
        prior_check(vae, torch.full((3, 5), torch.inf))


def test_the_figure_has_a_panel_for_each_statistic():
    from pyro_vae import plots

    found = predictive_check(MODEL.as_vae(), MODEL.sample(30), draws=50)
    shown = [axes for axes in plots.predictive_check(found).axes if axes.get_visible()]
    assert [axes.get_xlabel() for axes in shown] == found.statistic.values.tolist()
    title = plots.predictive_check(found).get_suptitle()
    assert "the 12 of 20 statistics of columns that are farthest off: each p-value is for one statistic" in title
    of_table = predictive_check(MODEL.as_vae(), MODEL.sample(9), statistics={"mean": torch.mean}, draws=20)
    assert "columns" not in plots.predictive_check(of_table).get_suptitle()


def test_few_replicates_are_no_excuse_for_a_model_far_off():
    judged = judge_predictive_check(prior_check(MODEL.as_vae(), MODEL.sample(30) + 50, draws=20))
    assert judged.level == "bad"
    assert "more replicates" not in judged.next


def test_a_statistic_that_changes_the_data_is_refused():
    x = MODEL.sample(9)
    before = x.clone()
    with pytest.raises(SettingsError, match="statistic 'zero' changes the data"):
        prior_check(MODEL.as_vae(), x, statistics={"zero": lambda x: x.mul_(0).sum()})
    assert torch.equal(x, before)


def test_the_error_of_a_p_value_is_that_of_its_beta_distribution():
    found = prior_check(MODEL.as_vae(), MODEL.sample(30), draws=40)
    above = found.p_value.values * 40
    assert np.allclose(found.p_value_se, beta(above + 1, 41 - above).std())


def test_what_is_said_has_errors_and_no_digits_beyond_them():
    torch.manual_seed(0)
    table = pd.DataFrame(MODEL.sample(30).numpy(), columns=list("abcde"))
    table["a"] = 0.0
    finding = judge_predictive_check(predictive_check(MODEL.as_vae(), table, draws=200))
    assert finding.why.startswith("the mean log p(x|z) is "), "no 'of 1 statistics'"
    assert re.search(r"; two-sided, p is at most 0\.\d+ \(doubtful below 0\.05\)", finding.why)
    assert "the share of zeros of a (1.0, in replicates 0 ± 0)" in finding.why
    assert re.search(r"for all of them p < 0.005, corrected for those of the table, p is at most 0\.01 ", finding.why)
    right = judge_predictive_check(prior_check(MODEL.as_vae(), MODEL.sample(30), draws=200))
    assert re.search(r"for all of them p = 0\.\d+ ± 0\.0\d+ \(over 200 draws\)", right.why)


def test_the_correction_counts_all_statistics():
    many = {str(i): torch.mean for i in range(10)} | {"sd": lambda x: x.std()}
    found = prior_check(MODEL.as_vae(), MODEL.sample(30), statistics=many, draws=999)
    for share, level in ((0.0015, "fine"), (0.0, "doubtful")):
        found.p_value[:], found.z_score[:] = 0.5, 0.0
        found.p_value[10] = share
        assert judge_predictive_check(found).level == level, "a two-sided .005, and .002, of 11"


def test_a_finding_says_the_exact_corrected_p_value_and_which_latents_were_drawn():
    """The two-sided p-value of none of R replicates above is 2 / (R + 2), once for each statistic."""
    for check, latents in ((prior_check, "prior"), (predictive_check, "posterior")):
        found = check(MODEL.as_vae(), MODEL.sample(30), statistics={"mean": torch.mean}, draws=98)
        assert found.attrs["latents"] == latents
        assert judge_predictive_check(found).about == f"{latents} predictive check"
    only = prior_check(MODEL.as_vae(), MODEL.sample(30), statistics={"mean": torch.mean}, draws=98)
    for below, expected in ((0, "0.02"), (3, "0.08")):
        only.p_value[:] = below / 98
        assert f"p is at most {expected} (" in judge_predictive_check(only).why


def test_a_statistic_that_never_differs_is_0_standard_deviations_off():
    found = prior_check(MODEL.as_vae(), MODEL.sample(30), statistics={"one": lambda x: x.new_ones(())}, draws=20)
    assert found.z_score.sel(statistic="one") == 0
    assert found.p_value.sel(statistic="one") == 0.5


def test_the_sd_of_a_table_is_that_of_numpy():
    x = MODEL.sample(7)
    assert pv.diagnose.STATISTICS["sd"](x).item() == pytest.approx(x.numpy().std(), rel=1e-12)


def test_of_what_replicates_never_show_the_farthest_comes_first():
    """No replicate of a density has an exact 0: all are infinitely far in its sds, and the shares tell them apart."""
    table = pd.DataFrame(MODEL.sample(40).numpy(), columns=list("abcde"))
    table.loc[:11, "a"], table.loc[:29, "d"] = 0.0, 0.0
    found = predictive_check(MODEL.as_vae(), table, draws=100)
    columns = found.statistic.values[found.family.values == "column"]
    assert columns[:2].tolist() == ["share of zeros of d", "share of zeros of a"]


def test_a_few_zeros_of_a_density_are_no_fault_of_the_model():
    """Up to a fifth of the rows: numbers that were rounded to 0. A probability mass at 0 is compared in any case."""
    table = pd.DataFrame(MODEL.sample(40).numpy(), columns=list("abcde"))
    table.loc[:7, "a"] = 0.0
    found = predictive_check(MODEL.as_vae(), table, draws=50)
    assert not any("share of zeros" in name for name in found.statistic.values)
    assert found.attrs["column_statistics"] == 20
    of_table = predictive_check(MODEL.as_vae(), torch.tensor(table.to_numpy()), draws=50)
    assert "share of zeros" not in of_table.statistic.values
    table.loc[8, "a"] = 0.0
    assert predictive_check(MODEL.as_vae(), table, draws=50).attrs["column_statistics"] == 21


def test_what_some_replicates_show_too_is_doubtful_however_many_standard_deviations_off():
    """Extremes have long tails: 4.1 sd with p = .016 is no proof."""
    x = pv.data.Data(MODEL.sample(30), columns=list("abcde"))
    found = prior_check(MODEL.as_vae(), x, draws=500)
    columns = found.family.values == "column"
    found.z_score[np.flatnonzero(columns)[0]] = 9.0
    for as_far, level in ((1, "bad"), (8, "doubtful"), (40, "fine")):
        found["column_p_value"] = as_far / 501
        assert judge_predictive_check(found).level == level
    table = prior_check(MODEL.as_vae(), MODEL.sample(30), statistics={"mean": torch.mean}, draws=500)
    table.z_score[:] = 9.0
    for above, level in ((0, "bad"), (500, "bad"), (2, "doubtful"), (498, "doubtful"), (250, "fine")):
        table.p_value[:] = above / 500
        assert judge_predictive_check(table).level == level
