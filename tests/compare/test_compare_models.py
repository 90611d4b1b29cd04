"""Models compared by held-out evidence: against differences by hand; data that were trained on are refused."""

import re
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from helpers.checks import linear_gaussian, small_vae, z_score

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.compare.models import _about_difference, judge_models, stacking_weights
from pyro_vae.compare.swap import rank, ranking_table
from pyro_vae.data import Data, Rows, repeats
from pyro_vae.data.fingerprint import Trained, data_hash, row_hashes, trained_on, validate_not_trained_on
from pyro_vae.data.repeats import clustered_error, distinct_rows, warn_of_duplicates
from pyro_vae.errors import DataError, DuplicateRowsWarning, ModelError, SettingsError
from pyro_vae.evidence.exact import LinearGaussian
from pyro_vae.evidence.generative import generative_hash

quiet_fit = partial(pv.fit, progress=False, device="cpu", epochs=1)
RIGHT = linear_gaussian()
WRONG = LinearGaussian(RIGHT.weight, RIGHT.bias, RIGHT.scale * 1.2)


@pytest.fixture(scope="module")
def x():
    torch.manual_seed(1)
    return RIGHT.sample(400)


@pytest.fixture(scope="module")
def table(x):
    return pv.compare_models({"wrong": WRONG.as_vae(), "right": RIGHT.as_vae()}, x)


def test_every_number_is_that_by_hand(table, x):
    right, wrong = RIGHT.log_marginal(x).numpy(), WRONG.log_marginal(x).numpy()
    apart = wrong - right
    assert table.index.tolist() == ["right", "wrong"], "the truth wins"
    assert table["rank"].tolist() == [0, 1]
    assert table.elpd.tolist() == pytest.approx([right.sum(), wrong.sum()], rel=1e-12)
    assert table.se.tolist() == pytest.approx([20 * right.std(ddof=1), 20 * wrong.std(ddof=1)], rel=1e-9)
    assert table.elpd_diff.tolist() == pytest.approx([0, apart.sum()], abs=1e-8)
    assert table.dse.tolist() == pytest.approx([0, 20 * apart.std(ddof=1)], rel=1e-9)
    assert table.dse["wrong"] < table.se["wrong"] / 2, "pairing is what makes it sharp"
    assert table.mcse.max() < 1e-9
    assert table.p_worse["wrong"] > 1 - 1e-6
    assert np.isnan(table.p_worse["right"])
    assert not table.warning.any()


def test_a_best_model_is_fine_only_if_other_starts_agree(table, x):
    """Without a second estimate a missed mode could be the whole difference."""
    judged = judge_models(table)
    assert judged.level == "doubtful"
    assert "right: no check for missed modes was run" in judged.why
    vaes = {"right": RIGHT.as_vae(), "wrong": WRONG.as_vae()}
    found = {name: pv.log_evidence(vae, x) for name, vae in vaes.items()}
    checked = {name: pv.evidence.cross_check(vae, x, found[name]) for name, vae in vaes.items()}
    assert judge_models(pv.compare_models(checked, x)).level == "fine"
    low = checked["wrong"].assign(difference=checked["wrong"].difference - 1)
    assert judge_models(pv.compare_models({**checked, "wrong": low}, x)).level == "doubtful", "it missed a mode"
    assert judge_models(pv.compare_models({**checked, "wrong": found["wrong"]}, x)).level == "doubtful"


def test_it_has_the_shape_of_arvizs_comparison(table):
    from pyro_vae.core.arviz import az

    draws = {name: pv.to_datatree(one.as_vae(), RIGHT.sample(150), draws=50) for name, one in MODELS.items()}
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what LOO warns here is the reason that it is not used
        theirs = az.compare(draws)
    shared = {"rank", "elpd", "elpd_diff", "weight", "se", "dse", "warning"}
    assert set(theirs.columns) & shared <= set(table.columns)
    assert {"rank", "elpd", "elpd_diff", "weight", "se", "dse"} <= set(theirs.columns)
    assert az.plot_compare(table, backend="none") is not None


MODELS = {"right": RIGHT, "wrong": WRONG}


def test_psis_loo_of_the_same_models_is_far_from_their_elpd(x):
    """Why it is not what is reported: it is of the data given their own latents."""
    import warnings

    from pyro_vae.core.arviz import az

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loo = az.loo(pv.to_datatree(RIGHT.as_vae(), x, draws=1000), pointwise=True)
    truth = RIGHT.log_marginal(x).sum().item()
    error = np.sqrt(400) * (loo.elpd_i.values.flatten() - RIGHT.log_marginal(x).numpy()).std(ddof=1)
    assert abs(loo.elpd - truth) > 5 * error


def test_ties_are_told_as_ties(x):
    """Once exactly, and once where the difference is noise: held out from halfway between the two models."""
    same = pv.compare_models({"a": RIGHT.as_vae(), "b": RIGHT.as_vae()}, x)
    assert same.elpd_diff.tolist() == [0, 0]
    assert same.weight.tolist() == [0.5, 0.5]
    assert same.diag_diff["b"].startswith("tied")
    assert not same.warning.any(), "of two that are the same, a bias that is rounding is more than their error"
    assert judge_models(same).level == "doubtful"
    near = LinearGaussian(RIGHT.weight, RIGHT.bias + 0.01, RIGHT.scale)
    close = pv.compare_models({"a": RIGHT.as_vae(), "b": near.as_vae()}, x)
    assert 0 < -close.elpd_diff.iloc[1] < 2 * close.dse.iloc[1]
    assert "tied" in close.diag_diff.iloc[1]
    assert "tied within 2 standard errors" in judge_models(close).why


def test_monte_carlo_errors_have_columns_of_their_own(x):
    few = pv.compare_models({"a": RIGHT.as_vae(diagonal=True), "b": WRONG.as_vae()}, x, num_particles=20)
    found = pv.log_evidence(RIGHT.as_vae(diagonal=True), x, num_particles=20)
    own = float((found.mcse**2).sum()) ** 0.5
    assert few.mcse["a"] == pytest.approx(own, rel=1e-9)
    bias = float(found.bias.sum()) if "bias" in found else -(own**2) / 2
    assert few.mc_bias["a"] == pytest.approx(bias, rel=1e-9)
    assert few.diff_mcse.iloc[1] == pytest.approx(own, rel=1e-6), "the other has none"


def test_the_bias_that_is_stated_is_the_bias(x):
    """By 40 estimates with few particles, whose bias is above the error of a single one."""
    exact, vae, found = RIGHT.log_marginal(x).sum().item(), RIGHT.as_vae(diagonal=True), []
    for seed in range(40):
        one = pv.log_evidence(vae, x, num_particles=8, seed=seed)
        found.append((float(one.log_evidence.sum()) - exact, -float((one.mcse**2).sum()) / 2))
    off, stated = torch.tensor(found).double().T
    assert z_score(off, 0.0) < -5
    assert abs(z_score(off - stated, 0.0)) < 5
    assert stated.mean() == pytest.approx(off.mean().item(), rel=0.3)


def test_the_bias_of_a_bad_guide_is_warned_of(x):
    narrow = RIGHT.as_vae(diagonal=True)
    with torch.no_grad():
        narrow.encoder.net.bias[2:] -= 1.5
    table = pv.compare_models({"narrow": narrow, "wrong": WRONG.as_vae()}, x, num_particles=10)
    assert table.warning["narrow"]
    assert not table.warning["wrong"]
    assert judge_models(table).level == "doubtful"
    smooth = pv.compare_models({"narrow": narrow, "wrong": WRONG.as_vae()}, x, method="psis", num_particles=200)
    assert "k̂ > 0.7" in smooth.diag_elpd["narrow"]
    assert smooth.diag_elpd["wrong"] == ""


def test_estimates_made_before_are_taken(x):
    vaes = {name: model.as_vae() for name, model in MODELS.items()}
    found = {name: pv.log_evidence(vae, x) for name, vae in vaes.items()}
    mixed = {"right": found["right"], "wrong": vaes["wrong"]}
    numbers = ["elpd", "elpd_diff", "dse"]
    expected = pv.compare_models(vaes, x)[numbers]
    for given in (found, mixed):
        assert pv.compare_models(given, x)[numbers].equals(expected)
    with pytest.raises(DataError, match="'right'] is the evidence of data other than x_test"):
        pv.compare_models(found, x[:100])
    simulated = pv.log_evidence(vaes["right"], x, method="bdmc", temperatures=1, num_particles=2)
    with pytest.raises(DataError, match="is the evidence of simulated data"):
        pv.compare_models(found | {"right": simulated}, x)


def test_the_weights_are_those_of_the_best_mixture():
    """Against a grid, where half of the data are of each model."""
    each = np.log([[0.6, 0.1, 0.5, 0.2], [0.1, 0.5, 0.2, 0.4]])
    grid = np.linspace(0, 1, 100_001)
    score = np.log(np.exp(each[0])[:, None] * grid + np.exp(each[1])[:, None] * (1 - grid)).sum(0)
    assert stacking_weights(each)[0] == pytest.approx(grid[score.argmax()], abs=1e-4)


# --- Data that were trained on ---


def test_held_out_data_that_were_trained_on_are_refused():
    x = torch.randn(300, 6)
    vae, other = small_vae(), small_vae(seed=1)
    history = quiet_fit(vae, x[:200]).history
    assert history.attrs["data_hash"] == data_hash(row_hashes(Rows(x[:200])))
    pv.compare_models({"a": vae, "b": other}, x[200:], num_particles=2)
    for held_out in (x[:200], x[190:], x[:200].flip(0), x[:200].double().numpy(), x[199:201]):
        with pytest.raises(
            DataError, match=r"x_test overlaps the training data of model 'a': .*; use held-out data"
        ) as caught:
            pv.compare_models({"b": other, "a": vae}, held_out, num_particles=2)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"10 of its 110 rows \(the first is row 0, counted from 0\)"):
        pv.compare_models({"b": other, "a": vae}, x[190:], num_particles=2)


def test_what_was_trained_on_goes_along_with_copies_and_adds_up():
    import copy

    x = torch.randn(90, 6)
    vae = small_vae()
    quiet_fit(vae, x[:30])
    twin = copy.deepcopy(vae)
    quiet_fit(twin, x[30:60])
    assert len(vae.trained_on.rows) == 30
    assert len(twin.trained_on.rows) == 60
    for part in (x[:30], x[30:60]):
        with pytest.raises(DataError, match="overlaps the training data"):
            validate_not_trained_on(twin, row_hashes(Rows(part)), name="twin")
    validate_not_trained_on(twin, row_hashes(Rows(x[60:])), name="twin")
    assert "trained_on" not in vae.state_dict()
    assert small_vae().trained_on is None


def test_what_was_trained_on_is_written_with_the_weights(tmp_path):
    x, vae, again = torch.randn(40, 6), small_vae(), small_vae(seed=1)
    quiet_fit(vae, x)
    with RunFolder(tmp_path / "run") as run:
        run.weights("weights.safetensors", vae)
        run.weights("untrained.safetensors", again)
    pv.load(tmp_path / "run" / "weights.safetensors", into=again)
    assert np.array_equal(again.trained_on.rows, vae.trained_on.rows)
    with pytest.raises(DataError, match="x_test overlaps the training data of model 'again': 7 of its 7 rows"):
        pv.compare_models({"again": again, "other": small_vae()}, x[:7])
    pv.load(tmp_path / "run" / "untrained.safetensors", into=again)
    assert again.trained_on is None
    with pytest.raises(DataError, match="fingerprint of the training data is damaged"):
        Trained.from_text("{}")


def test_rows_that_meet_by_chance_pass():
    """Five binary features have 32 values: all of the held-out rows lie among the training rows."""
    x = (torch.rand(400, 5) < 0.5).float()
    vae = small_vae()
    vae.trained_on = Trained.on(row_hashes(Rows(x[:300])))
    assert vae.trained_on.twins > 0.99
    validate_not_trained_on(vae, row_hashes(Rows(x[300:])), name="vae")
    with pytest.raises(DataError):
        validate_not_trained_on(vae, row_hashes(Rows(x[:300])), name="vae")
    some = torch.cat([torch.randn(250, 5), x[:20]])
    vae.trained_on = Trained.on(row_hashes(Rows(some)))
    assert 0 < vae.trained_on.twins < 0.1
    with pytest.raises(DataError, match="50 of its 60"):
        validate_not_trained_on(vae, row_hashes(Rows(torch.cat([some[:50], torch.randn(10, 5)]))), name="vae")


def test_a_context_is_part_of_the_row():
    x, context = torch.zeros(5, 3), torch.arange(10.0).reshape(5, 2)
    first, second = row_hashes(Rows(x, context)), row_hashes(Rows(x, context + 100))
    assert len(np.unique(first)) == 5
    assert not np.isin(first, second).any()


def bernoulli():
    vae = small_vae(5)
    vae.decoder = pv.likelihoods.Bernoulli(vae.decoder.net)
    return vae


def test_what_is_missing_is_part_of_the_row_and_is_no_0():
    x, mask = torch.zeros(2, 3), torch.tensor([[True, True, True], [True, True, False]])
    seen, plain, other = row_hashes(Rows(x, mask=mask)), row_hashes(Rows(x)), row_hashes(Rows(x + ~mask, mask=mask))
    assert seen[0] == plain[0], "nothing of it is missing"
    assert seen[1] != plain[1]
    assert np.array_equal(seen, other), "what is missing may hold anything"
    vae = bernoulli()
    few = pv.log_evidence(vae, Data(torch.zeros(4, 5), mask=torch.rand(4, 5) > 0.4), num_particles=2)
    with pytest.raises(DataError, match="'few'] is the evidence of data other than x_test"):
        pv.compare_models({"few": few, "vae": vae}, torch.zeros(4, 5))


def test_what_is_known_of_a_vae_is_known_of_its_evidence():
    """A density beside a probability, and data that were trained on, are seen where datasets are given too."""
    x = (RIGHT.sample(30) > 0).double()
    models = {"density": RIGHT.as_vae(), "probability": bernoulli()}
    found = {name: pv.log_evidence(vae, x, num_particles=20) for name, vae in models.items()}
    assert {name: one.attrs["kind"] for name, one in found.items()} == {name: name for name in models}
    assert {one.attrs["trained_on"] for one in found.values()} == {""}
    assert judge_models(pv.compare_models(found, x)).level == "bad"
    models["density"].trained_on = Trained.on(row_hashes(Rows(x)))
    found["density"] = pv.log_evidence(models["density"], x, num_particles=20)
    with pytest.raises(DataError, match=r"x_test overlaps the training data of model 'density' \(30 of its 30 rows"):
        pv.compare_models(found, x)


@pytest.mark.parametrize(("errors", "tied"), [(1.5, True), (1.9, True), (2.1, False)])
def test_two_standard_errors_are_told_apart(errors, tied):
    apart = torch.randn(200).double().numpy()
    apart = (apart - apart.mean()) / apart.std(ddof=1)
    apart -= errors / np.sqrt(200)  # the sum is so many standard errors √200 below 0
    x = RIGHT.sample(200)
    own = pv.log_evidence(RIGHT.as_vae(), x, num_particles=2)
    table = pv.compare_models({"best": own, "other": own.assign(log_evidence=own.log_evidence + apart)}, x)
    assert table.elpd_diff["other"] / table.dse["other"] == pytest.approx(-errors)
    assert ("tied" in table.diag_diff["other"]) == tied


@pytest.mark.parametrize(("khat", "told"), [(0.69, ""), (0.71, "3 k̂ > 0.7")])
def test_k_hats_above_the_threshold_are_counted(khat, told):
    x = RIGHT.sample(20)
    own = pv.log_evidence(RIGHT.as_vae(), x, method="psis", num_particles=25)
    high = own.assign(khat=own.khat.copy(data=np.where(np.arange(20) < 3, khat, 0.1)))
    table = pv.compare_models({"high": high, "own": own}, x)
    assert table.diag_elpd["high"] == told
    assert table.warning["high"] == bool(told)


# --- Kinds, feature by feature ---


def of_blocks(*blocks):
    torch.manual_seed(0)
    outputs = pv.likelihoods.Blocks.outputs(sum(n for _, n in blocks), blocks=blocks)
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=pv.likelihoods.Blocks(torch.nn.Linear(2, outputs), list(blocks)),
        encoder=pv.posteriors.DiagNormal(torch.nn.Linear(5, 4)),
    )


@pytest.fixture(scope="module")
def swapped():
    normal, poisson = pv.likelihoods.Normal, pv.likelihoods.Poisson
    return {"a": of_blocks((normal, 2), (poisson, 3)), "b": of_blocks((poisson, 3), (normal, 2))}


def test_blocks_of_different_kinds_are_not_comparable_feature_by_feature(swapped):
    """Both are "both": only column 2 is of one kind under the two of them."""
    counts = torch.arange(100.0).reshape(20, 5)
    table = pv.compare_models(swapped, counts, num_particles=5)
    assert table.kind.to_dict() == {"a": "both", "b": "both"}
    assert "not in the same units" in table.attrs["caution"]
    found = judge_models(table)
    assert found.level == "bad"
    assert "features 0-1 are a density under a and a probability under b" in found.why
    assert "features 3-4 are a density under b and a probability under a" in found.why
    named = Data(counts, columns=["age", "height", "visits", "falls", "nights"])
    assert "features age, height are a density under a" in judge_models(pv.compare_models(swapped, named)).why
    ranked = rank(swapped, counts, num_particles=5)
    assert ranked.attrs["caution"].endswith("features 3-4 are a density under b and a probability under a.")
    same = {"a": swapped["a"], "c": of_blocks((pv.likelihoods.Laplace, 2), (pv.likelihoods.NegativeBinomial, 3))}
    alike = pv.compare_models(same, counts, num_particles=5)
    assert alike.attrs["caution"] == ""
    assert judge_models(alike).level != "bad"


def test_saved_evidence_says_the_kind_of_each_feature_or_that_it_is_not_known(swapped, tmp_path):
    counts = torch.arange(100.0).reshape(20, 5)
    found = {name: pv.log_evidence(vae, counts, num_particles=5) for name, vae in swapped.items()}
    assert found["a"].attrs["countable"] == "density:2 probability:3"
    for name, one in found.items():
        one.to_netcdf(tmp_path / f"{name}.nc", engine="h5netcdf")
        found[name] = xr.load_dataset(tmp_path / f"{name}.nc", engine="h5netcdf")
    assert judge_models(pv.compare_models(found, counts)).level == "bad"
    before = {name: one.drop_attrs() for name, one in found.items()}
    for name, one in found.items():
        before[name].attrs = {key: value for key, value in one.attrs.items() if key != "countable"}
    table = pv.compare_models(before, counts)
    assert table.kind.to_dict() == {"a": "not known", "b": "not known"}
    judged = judge_models(table)
    assert judged.level == "doubtful"
    assert "it is unknown which features of a, b are densities" in judged.why or table.warning.any()
    assert table.attrs["not_known"] == "a, b"


# --- Duplicated rows ---


def test_errors_of_rows_that_occur_several_times_are_those_of_the_distinct_rows():
    """60 rows twenty times are 60 rows: the sum and its error are both twenty times as large."""
    x = RIGHT.sample(60)
    models = {"right": RIGHT.as_vae(), "wrong": WRONG.as_vae()}
    once = pv.compare_models(models, x)
    with pytest.warns(DuplicateRowsWarning, match="x_test: only 60 of 1200 rows are distinct; standard"):
        many = pv.compare_models(models, x.repeat(20, 1))
    for name in "elpd", "elpd_diff", "se", "dse":
        assert many[name].to_numpy() == pytest.approx(20 * once[name].to_numpy(), rel=1e-12, abs=1e-9), name
    assert many.p_worse.iloc[1] == pytest.approx(once.p_worse.iloc[1], rel=1e-9)
    assert many.weight.to_numpy() == pytest.approx(once.weight.to_numpy(), abs=1e-6)
    assert many.diag_diff.iloc[1] == once.diag_diff.iloc[1], "N < 100 counts distinct rows"
    assert "N < 100" in many.diag_diff.iloc[1]
    assert (many.attrs["data"], many.attrs["distinct"]) == (1200, 60)
    assert "1200 held-out data (60 distinct rows)" in judge_models(many).why
    ranked = rank(models, x)
    with pytest.warns(DuplicateRowsWarning, match="x: only 60 of 120 rows are distinct"):
        twice = rank(models, x.repeat(2, 1))
    for name in "log_evidence", "se", "difference", "difference_se":
        assert twice[name].values == pytest.approx(ranked[name].values, rel=1e-12, abs=1e-12), name
    assert "120 data in 60 distinct rows" in ranking_table(twice).title


def test_fit_and_check_warn_of_duplicates():
    x, vae = RIGHT.sample(20), small_vae(5)
    with pytest.warns(DuplicateRowsWarning, match="validation data: only 20 of 40 rows are distinct; .* too small"):
        quiet_fit(vae, RIGHT.sample(20), validation_data=x.repeat(2, 1))
    with pytest.warns(DuplicateRowsWarning, match="x: only 20 of 40 rows are distinct"):
        pv.check(vae, x.repeat(2, 1), draws=25, budget=1e-9, progress=False)


def test_a_row_with_another_context_or_mask_is_another_row():
    """Five rows twice, of which one has another context or mask the second time."""
    x = RIGHT.sample(5).repeat(2, 1)
    context, mask = torch.zeros(10, 1), torch.ones(10, 5, dtype=torch.bool)
    assert distinct_rows(Rows(x, context)).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    context[7], mask[7, 1] = 1, False
    assert distinct_rows(Rows(x, context)).tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 3, 4]
    assert distinct_rows(Rows(x, mask=mask)).tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 3, 4]


def test_two_standard_errors_cover_the_truth_where_rows_occur_several_times():
    """Over 1,000 data sets of 80 distinct rows, each 1 to 10 times, by exact evidence: 95 % in a normal approximation.

    Power: errors that take all rows for independent cover less than 75 %.
    """
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    truth = (WRONG.log_marginal(big := RIGHT.sample(1_000_000)) - RIGHT.log_marginal(big)).mean().item()
    x = RIGHT.sample(80 * 1000)
    each = (WRONG.log_marginal(x) - RIGHT.log_marginal(x)).reshape(1000, 80).numpy()
    covered, naive = [], []
    for values in each:
        number = np.repeat(np.arange(80), torch.randint(1, 11, (80,), generator=generator).numpy())
        off = abs(values[number].mean() - truth)
        covered.append(off < 2 * clustered_error(values[number], number))
        naive.append(off < 2 * values[number].std(ddof=1) / np.sqrt(len(number)))
    assert 0.90 < np.mean(covered) < 0.975
    assert np.mean(naive) < 0.75


def test_countable_rows_that_meet_by_chance_are_no_duplicates():
    """Five bits have 32 values: the errors stay those of independent rows, and nothing is warned of."""
    x = (torch.rand(400, 5) < 0.5).float()
    vaes = {"a": bernoulli(), "b": bernoulli()}
    with torch.no_grad():
        vaes["b"].decoder.net[-1].bias.add_(0.3)
    table = pv.compare_models(vaes, x, num_particles=50)
    each = pv.log_evidence(vaes["a"], x, num_particles=50).log_evidence.values
    assert table.se["a"] == pytest.approx(20 * each.std(ddof=1), rel=1e-12)
    assert table.attrs["distinct"] == 400
    wide = distinct_rows(Rows((torch.rand(100, 40) < 0.5).float().repeat(3, 1)))
    assert wide.max() == 99
    with pytest.warns(DuplicateRowsWarning, match="x: only 100 of 300 rows are distinct; drop them"):
        warn_of_duplicates(wide, source="x", remedy="drop them")
    correlated = (torch.rand(400, 1) < 0.5).float().expand(400, 5)  # two values only, and no copies
    assert len(np.unique(distinct_rows(Rows(correlated), np.full(400, np.log(0.5))))) == 400


# --- Guides ---


def test_two_guides_of_one_model_are_named_as_such(x):
    """An exact guide beside a narrow one: the truth of the difference is 0, whatever the estimate says."""
    narrow = RIGHT.as_vae(diagonal=True)
    with torch.no_grad():
        narrow.encoder.net.bias[2:] -= 1.5
    table = pv.compare_models({"narrow": narrow, "exact": RIGHT.as_vae(), "wrong": WRONG.as_vae()}, x, num_particles=25)
    assert table.elpd["exact"] - table.elpd["narrow"] > 10
    assert "the model of exact with another guide" in table.diag_elpd["narrow"]
    assert table.warning["narrow"]
    judged = judge_models(table)
    assert judged.level == "bad"
    apart = table.elpd["narrow"] - table.elpd["exact"]
    assert f"narrow and exact are one generative model: their difference, {apart:.3g}" in judged.why
    assert "comes from their guides" in judged.why
    assert "may come from the guides, not the models: narrow (" in judged.why
    saved = {
        name: pv.log_evidence(vae, x, num_particles=25) for name, vae in {"n": narrow, "e": RIGHT.as_vae()}.items()
    }
    assert judge_models(pv.compare_models(saved, x)).level == "bad", "seen in datasets too"
    other = pv.compare_models({"right": RIGHT.as_vae(), "wrong": WRONG.as_vae()}, x)
    assert other.attrs["same_model"] == ""
    assert "one generative model" not in judge_models(other).why


def test_a_measured_bias_as_large_as_the_difference_is_warned_of():
    x = RIGHT.sample(200)
    own = pv.log_evidence(RIGHT.as_vae(), x, num_particles=2)
    apart = torch.randn(200).double().numpy() - 0.5
    per_datum = np.full(200, -0.3)
    biased = own.assign(
        log_evidence=own.log_evidence + apart, bias=("datum", per_datum), bias_se=("datum", per_datum * 0)
    )
    biased.attrs["generative"] = "another"
    table = pv.compare_models({"own": own, "biased": biased}, x)
    assert table.mc_bias["biased"] == pytest.approx(-60)
    assert table.diag_elpd["biased"] == "mc_bias > dse; mc_bias > half of elpd_diff"
    judged = judge_models(table)
    assert judged.level == "doubtful"
    assert "not the models: biased (mc_bias > dse; mc_bias > half of elpd_diff; mc_bias -60)" in judged.why
    small = biased.assign(bias=biased.bias / 100)
    assert not pv.compare_models({"own": own, "biased": small}, x).warning.any()
    unknown = biased.assign(bias=biased.bias * np.nan, mcse=own.mcse * 0 + 0.1)
    assert pv.compare_models({"own": own, "biased": unknown}, x).mc_bias["biased"] == pytest.approx(-1.0)


def test_the_hash_of_a_generative_model_sees_prior_decoder_and_their_settings():
    vae, again = small_vae(), small_vae()
    again.encoder.net[0].weight.data += 1
    assert generative_hash(vae) == generative_hash(again) == generative_hash(small_vae().float().double())
    for change in (
        lambda v: v.decoder.net[0].weight.data.add_(1e-3),
        lambda v: v.decoder.fixed_scale.add_(1e-3),
        lambda v: setattr(v, "prior", pv.priors.Laplace(3).double()),
    ):
        other = small_vae()
        change(other)
        assert generative_hash(other) != generative_hash(vae)
    vamp, twin = (small_vae() for _ in range(2))
    for one in (vamp, twin):
        torch.manual_seed(0)
        one.prior = pv.priors.VampPrior(torch.randn(20, 6), components=4).double()
    assert generative_hash(vamp) == generative_hash(twin)
    twin.encoder.net[0].weight.data += 1
    assert generative_hash(vamp) != generative_hash(twin), "its prior is made of the encoder"


# --- Refusals ---

VAE = RIGHT.as_vae()
MISTAKES = {
    "one model": (lambda x: pv.compare_models({"a": VAE}, x), SettingsError, "at least two models"),
    "no names": (lambda x: pv.compare_models([VAE, VAE], x), SettingsError, "at least two models"),
    "one datum": (lambda x: pv.compare_models({"a": VAE, "b": VAE}, x[:1]), DataError, "x_test holds 1 datum"),
    "another width": (lambda x: pv.compare_models({"a": VAE, "b": VAE}, x[:, :4]), ModelError, "4"),
    "simulated data": (
        lambda x: pv.compare_models({"a": VAE, "b": VAE}, x, method="bdmc"),
        SettingsError,
        "method is 'bdmc'; it must be iw, psis, ais or ais_prior",
    ),
    "no model": (lambda x: pv.compare_models({"a": VAE, "b": 3}, x), SettingsError, r"models\['b'\] is an int"),
    "no evidence": (
        lambda x: pv.compare_models({"a": VAE, "b": pv.fit(small_vae(5), x, epochs=1, progress=False).history}, x),
        SettingsError,
        "lacks log_evidence",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_in_one_sentence(mistake, x):
    call, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message) as caught:
        call(x)
    assert "\n" not in str(caught.value)


def test_models_of_different_kinds_are_not_to_be_compared():
    counts = torch.randint(0, 5, (50, 6)).float()
    poisson = small_vae()
    poisson.decoder = pv.likelihoods.Poisson(pv.nn.mlp(3, [8], 6)).double()
    table = pv.compare_models({"density": small_vae(), "probability": poisson}, counts, num_particles=10)
    assert table.kind.to_dict() == {"density": "density", "probability": "probability"}
    assert "not in the same units" in table.attrs["caution"]
    assert judge_models(table).level == "bad"


def test_data_with_missing_values_are_compared():
    x = RIGHT.sample(60)
    mask = torch.tensor([True, True, False, True, False]).expand(60, 5)
    part = [LinearGaussian(m.weight[mask[0]], m.bias[mask[0]], m.scale) for m in (RIGHT, WRONG)]
    exact = [one.log_marginal(x[:, mask[0]]) for one in part]
    vaes = {"right": RIGHT.as_vae(), "wrong": WRONG.as_vae()}
    table = pv.compare_models(vaes, Data(x, mask=mask), method="ais", num_particles=30, leapfrog=4)
    assert abs(table.elpd["right"] - exact[0].sum().item()) < 5 * table.mcse["right"]
    apart = (exact[1] - exact[0]).sum().item()
    assert abs(table.elpd["wrong"] - table.elpd["right"] - apart) < 5 * table.diff_mcse.max()


def test_the_figure_shows_the_differences_and_their_errors(table):
    axes = plots.models(table).axes[0]
    drawn = axes.containers[0]
    line, _, (bars,) = drawn.lines
    assert line.get_xdata().tolist() == table.elpd_diff.tolist()
    ends = bars.get_segments()[1][:, 0]
    assert ends.tolist() == pytest.approx([table.elpd_diff.iloc[1] + s * 2 * table.dse.iloc[1] for s in (-1, 1)])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["right", "wrong"]
    assert "nats" in axes.get_xlabel()


def test_of_many_rows_a_sample_of_hashes_is_kept_that_sees_the_same_overlap(monkeypatch):
    monkeypatch.setattr("pyro_vae.data.fingerprint.KEPT", 200)
    torch.manual_seed(0)
    vae, old, new = RIGHT.as_vae(), RIGHT.sample(4000), RIGHT.sample(1000)
    vae.trained_on = Trained.on(row_hashes(Rows(old[2000:])), Trained.on(row_hashes(Rows(old[:2000]))))
    assert len(vae.trained_on.rows) == 200
    assert trained_on(vae, row_hashes(Rows(new))) == ""
    half = torch.cat([new[:500], old[:500]])
    told = trained_on(vae, row_hashes(Rows(half)))
    count, n = map(int, re.findall(r"\d+", told)[:2])
    assert 20 < n < 90, "about 1000 × 200 / 4000 rows can be told"
    assert abs(count - n / 2) < 5 * (n / 4) ** 0.5
    assert "rows that can be checked (of 1000)" in told


def test_a_ranking_refuses_data_that_were_trained_on():
    x = RIGHT.sample(20)
    vae = RIGHT.as_vae(diagonal=True)
    pv.fit(vae, x, epochs=1, batch_size=20, progress=False, device="cpu")
    with pytest.raises(DataError, match="x overlaps the training data of model 'one': 20 of its 20 rows"):
        rank({"one": vae}, x, num_particles=5)


@pytest.mark.parametrize(
    ("difference", "error", "distinct", "share", "told"),
    [
        (-3.9, 1.0, 200, 1.0, "|elpd_diff| < 4"),
        (-4.1, 1.0, 200, 1.0, ""),
        (-7.9, 1.0, 200, 0.5, "|elpd_diff| < 4"),
        (-8.1, 1.0, 200, 0.5, ""),
        (-8.1, 5.0, 200, 0.5, "tied"),
        (-8.1, 1.0, 99, 1.0, "N < 100"),
    ],
)
def test_what_is_told_of_a_difference(difference, error, distinct, share, told):
    """``share`` is that of the distinct rows: of rows that occur twice, half of the difference counts."""
    assert _about_difference(pd.Series({"elpd_diff": difference, "dse": error}), distinct, share) == told


@pytest.mark.parametrize(("pairs", "found"), [(349, False), (350, False), (351, True)])
def test_repeats_count_beyond_three_times_chance_and_five_standard_deviations(pairs, found, monkeypatch):
    """Where 100 pairs are expected by chance, their standard deviation is 10."""
    monkeypatch.setattr(repeats, "_pairs_by_chance", lambda table: 100.0)
    twice = torch.arange(pairs).repeat(2)
    rows = Rows(torch.cat([twice, -1 - torch.arange(50)])[:, None].double())
    assert (len(np.unique(distinct_rows(rows))) < len(rows)) is found


def test_models_may_order_the_columns_differently():
    def table(seed):
        generator = np.random.default_rng(seed)
        columns = {"u": generator.normal(size=60), "v": generator.poisson(3, 60), "w": generator.normal(size=60)}
        return pd.DataFrame(columns).astype(float)

    def trained(order):
        torch.manual_seed(0)
        blocks = [(pv.likelihoods.Poisson if column == "v" else pv.likelihoods.Normal, 1) for column in order]
        net = pv.nn.mlp(1, [4], pv.likelihoods.Blocks.outputs(3, blocks=blocks))
        vae = pv.VAE(
            prior=pv.priors.StandardNormal(1),
            decoder=pv.likelihoods.Blocks(net, blocks),
            encoder=pv.posteriors.DiagNormal(pv.nn.mlp(3, [4], 2)),
        )
        pv.fit(vae, table(0)[list(order)], epochs=1, progress=False)
        return vae

    first, second, test = trained("uvw"), trained("vuw"), table(5)
    known = pv.log_evidence(first, test, num_particles=50)
    found = pv.compare_models({"first": known, "second": second}, test, num_particles=50)
    assert not found.attrs["unlike"]
    assert found.elpd["first"] == pytest.approx(known.log_evidence.sum().item())
    assert not rank({"first": first, "second": second}, test, num_particles=50).attrs["caution"]
