"""Comparisons over seeds: the error of their mean, what is told apart by pairs, and ``pyro-vae compare --seeds``."""

import copy
import dataclasses
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from helpers.checks import linear_gaussian

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.cli.report import comparison_table
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.compare.recommend import _Candidate, _errors_ahead
from pyro_vae.compare.seeds import stacked
from pyro_vae.errors import SettingsError

FAST = ["--epochs", "2", "--hidden", "[4]", "--latent_dim", "2", "--batch_size", "16", "--draws", "3"]
ONE = ["--elbos", "[HandDerivedELBO, TraceMeanField_ELBO]", "--particles", "[2]"]


def comparison(seed, **variables):
    """One as compare_elbos gives it, of 2,000 estimators, so that each is a trial of its own."""
    about = {"seed": seed, "draws": 9, "size": 5, "dtype": "torch.float64", "left_out": ""}
    columns = {name: ("estimator", values) for name, values in variables.items()}
    table = xr.Dataset(columns, {"estimator": np.arange(len(next(iter(variables.values()))))}, about)
    return table.assign(value=(("estimator", "draw"), np.zeros((table.sizes["estimator"], 9)))).assign_coords(
        noise_seed=("draw", np.arange(9) + 100 * seed), datum_elbo=("datum", np.zeros(5))
    )


@pytest.mark.parametrize(("between", "within"), [(3.0, 1.0), (0.0, 1.0)])
def test_the_error_is_that_of_the_mean_over_seeds_and_draws(between, within):
    """By 2,000 trials of 5 seeds: the mean squared error of the mean is what is said.

    Power: without the spread of seeds the ratio were 0.1, without that of draws 0.9 (z = -3) or 0, not divided by the
    number of seeds 5.
    """
    noise, trials, seeds = np.random.default_rng(0), 2000, 5
    each = [
        comparison(s, elbo=noise.normal(7, np.hypot(between, within), trials), elbo_se=np.full(trials, within))
        for s in range(seeds)
    ]
    mean = pv.over_seeds(each)
    squared = (mean.elbo.values - 7) ** 2
    said = mean.elbo_se.values**2
    np.testing.assert_allclose(mean.elbo, np.mean([one.elbo for one in each], 0), rtol=1e-14)
    if between:  # the floor of draws binds in few of them
        z = (squared - said).mean() / ((squared - said).std() / np.sqrt(trials))
        assert abs(z) < 5
        assert said.mean() == pytest.approx((between**2 + within**2) / seeds, rel=0.07)
    else:  # nothing smaller is believed than what the draws allow
        assert said.min() == pytest.approx(within**2 / seeds, rel=1e-12)
        assert (squared / said).mean() < 1 + 5 * np.sqrt(2 / trials)


def test_against_the_oracle():
    """With the exact posterior an ELBO is log p(x) without noise: mean and error are those of three log p(x)."""
    model, vaes = linear_gaussian(), []
    x = model.sample(30)
    for seed in range(3):
        other = copy.deepcopy(model)
        other.weight = other.weight + 0.2 * torch.randn(5, 2, generator=torch.Generator().manual_seed(seed))
        vaes.append(other)
    each = [pv.compare_elbos(one.as_vae(), x, {"ELBO": pv.elbo.ELBO()}, draws=3, seed=s) for s, one in enumerate(vaes)]
    each[1]["peak_memory"] += 1000
    mean = pv.over_seeds(each)
    exact = np.array([one.log_marginal(x).mean().item() for one in vaes])
    assert mean.elbo.item() == pytest.approx(exact.mean(), rel=1e-10)
    assert mean.elbo_se.item() == pytest.approx(exact.std(ddof=1) / np.sqrt(3), rel=1e-6)
    assert abs(mean.bias.item()) < 1e-9
    assert mean.attrs["seeds"] == [0, 1, 2]
    assert stacked(each).noise_seed.shape == (3, 3)
    assert mean.peak_memory.item() == max(one.peak_memory.item() for one in each)


def test_what_has_no_spread_or_no_error_of_its_own_has_the_other():
    """An infinite value has no spread, and a single draw may have no error."""
    first = comparison(0, elbo=np.array([np.inf, 1.0]), elbo_se=np.array([0.5, np.nan]))
    second = comparison(1, elbo=np.array([np.inf, 3.0]), elbo_se=np.array([0.5, 0.1]))
    np.testing.assert_allclose(pv.over_seeds([first, second]).elbo_se, [0.5 / np.sqrt(2), 1.0], rtol=1e-12)


def judged(*by_seed, error):
    """Comparisons whose efficiencies are given, a row for each seed, the same for Θ and φ."""
    names = [f"e{i}" for i in range(len(by_seed[0]))]
    vae = linear_gaussian().as_vae(diagonal=True)
    table = pv.compare_elbos(vae, linear_gaussian().sample(6), {name: pv.elbo.ELBO() for name in names}, draws=5)
    dims, shape = table.efficiency.dims, table.efficiency.shape
    return [
        table.assign(
            efficiency=(dims, np.broadcast_to(np.reshape(row, (-1, 1, 1)), shape)),
            efficiency_se=(dims, np.broadcast_to(error * np.reshape(row, (-1, 1, 1)), shape)),
            gradient_khat=(dims, np.zeros(shape)),
        ).assign_attrs(seed=s)
        for s, row in enumerate(by_seed)
    ]


def test_estimators_are_told_apart_seed_by_seed():
    """Trainings whose efficiencies differ tenfold, one estimator twice as good in each: sure, by pairs alone."""
    told = pv.recommend(pv.over_seeds(judged([4, 2], [40, 20], [0.4, 0.2], error=0.01)))
    assert told.startswith("Train with e0 at K = 1")
    assert "certain over 5 draws of each of 3 seeds: the next, e1 at K = 1, is 4 standard errors behind" in told
    told = pv.recommend(pv.over_seeds(judged([4, 2], [40, 20], [0.4, 0.2], error=0.05)))
    assert "not separate it from e1 at K = 1 (under 3 standard errors, by Student's t over seeds)" in told
    told = pv.recommend(pv.over_seeds(judged([4, 2], [20, 40], [0.4, 0.2], error=0.05)))
    assert "not certain: 5 draws of each of 3 seeds do not separate it from e1" in told, (
        "the one is not best with each seed"
    )
    told = pv.recommend(pv.over_seeds(judged([np.inf, 2], [np.inf, 2], error=0.05)))
    assert "gradient has no noise" in told
    assert "is infinitely far behind" in told
    told = pv.recommend(pv.over_seeds(judged([4, 2], [40, 20], [0.4, 0.2], error=0.5)))
    assert "not certain" in told, "seeds that agree by chance do not make noisy draws sure"


@pytest.mark.parametrize("seeds", [2, 5])
def test_equal_estimators_are_told_apart_as_seldom_as_is_said(seeds):
    """By 2,000 trials of estimators whose trainings differ, and the one is better in half of them: 2 errors, 4.6 %.

    Power: without Student's t it were 30 % (2 seeds) or 12 %, with a freedom too much 18 % or 3 %.
    """
    noise, trials = np.random.default_rng(0), 2000
    one, other = noise.normal(0, 5, (2, trials, seeds))
    each = [_Candidate("", 1, "all", row, np.full(seeds, 1e-6)) for row in (*one, *other)]
    apart = np.array([_errors_ahead(a, b) for a, b in zip(each[:trials], each[trials:], strict=True)])
    expected = 0.0455 * trials
    assert abs((np.abs(apart) > 2).sum() - expected) < 5 * np.sqrt(expected)
    assert abs(apart.mean()) < 5 / np.sqrt(trials)
    assert _errors_ahead(each[0], each[trials]) == pytest.approx(-_errors_ahead(each[trials], each[0]))


def test_moments_stay_in_their_order_and_what_is_read_back_has_a_mean(tmp_path):
    """One seed has no middle, as where it was stopped early: joined by name it would come before the start."""
    first, second = judged([4, 2], [8, 3], error=0.1)
    along = [
        xr.concat([one] * len(names), xr.Variable("moment", names), combine_attrs="drop_conflicts")
        for one, names in ((first, ["start", "end"]), (second, ["start", "middle", "end"]))
    ]
    together = stacked(along)
    assert together.moment.values.tolist() == ["start", "middle", "end"]
    assert pv.over_seeds(along).moment.values.tolist() == ["start", "end"]
    stacked([first, second]).to_netcdf(tmp_path / "seeds.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "seeds.nc", engine="h5netcdf") as each:
        again = pv.over_seeds([each.sel(seed=seed) for seed in each.seed])
        with pytest.raises(SettingsError, match="stacks several seeds; select one"):
            pv.recommend(each)
    assert again.efficiency.equals(pv.over_seeds([first, second]).efficiency)
    assert pv.recommend(again) == pv.recommend(pv.over_seeds([first, second]))


def test_of_devices_that_differ_all_are_told():
    """A table needs one, and those of a cluster may differ."""
    first, second = judged([4, 2], [8, 3], error=0.1)
    mean = pv.over_seeds([first, second.assign_attrs(device="CUDA (another)")])
    assert mean.attrs["device"] == f"{first.attrs['device']}; CUDA (another)"
    assert "CUDA (another)" in comparison_table(mean).title


def test_what_not_every_seed_has_is_left_out_and_named():
    first, second = judged([4, 2], [4, 2], error=0.1)
    mean = pv.over_seeds([first, second.isel(estimator=[0])])
    assert mean.estimator.values.tolist() == ["e0"]
    assert "estimator e1: not in every seed" in mean.attrs["left_out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda each: each[:1], "comparisons holds 1 comparison; pass a list with at least 2 seeds"),
        (lambda each: [each[0], each[0]], "the seeds [0, 0]; use a different seed= for each"),
        (lambda each: [each[0], each[1].assign_attrs(draws=7)], "differ in draws: ['7', '9']; it must be equal in all"),
        (
            lambda each: [each[0], each[1].isel(datum=slice(3))],
            "are of [3, 5] data; compare on the same held-out data",
        ),
        (lambda each: [each[0], each[1].expand_dims(moment=["end"])], "have no moment in common"),
        (lambda each: [each[0], each[1].assign_coords(estimator=[7, 8])], "have no estimator in common"),
        (lambda each: [each[0], "the other"], "comparisons[1] is not a comparison of one training"),
        (lambda each: [pv.over_seeds(each), each[0]], "comparisons[0] is not a comparison of one training"),
        (lambda each: stacked(each), "pass a list with at least 2 seeds"),
    ],
    ids=["one", "the same twice", "other draws", "other data", "moments", "estimators", "no data", "a mean", "no list"],
)
def test_what_has_no_mean_is_refused(change, message):
    each = [comparison(seed, elbo=np.zeros(2), elbo_se=np.ones(2)) for seed in (0, 1)]
    with pytest.raises(SettingsError) as error:
        pv.over_seeds(change(each))
    assert message in str(error.value)


# --- The command ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", np.random.default_rng(0).normal(size=(60, 3)))
    return tmp_path


def compare(out, *flags):
    code = main(["compare", "--data", "data.npy", "--out", out, *FAST, *ONE, *flags])
    with xr.open_dataset(f"{out}/comparison.nc", engine="h5netcdf") as table:
        return code, table.load()


@pytest.mark.slow
def test_the_command_compares_over_seeds(folder, capsys, monkeypatch):
    code, mean = compare("two", "--seeds", "[3, 5]")
    assert code == 0
    assert {path.name for path in Path("two").iterdir()} == {
        "comparison.nc", "comparison.png", "elbos_by_datum.png", "seeds.nc", "seeds", "sweep.json", "config.yaml",
        "SHA256SUMS",
    }  # fmt: skip
    shown = capsys.readouterr()
    assert "3 draws of each of 2 seeds" in shown.out
    assert all(f"At the {moment} of training" in shown.out for moment in ("start", "middle", "end"))
    assert "seed 3: Trained for 2 epochs" in shown.err
    with xr.open_dataset("two/seeds.nc", engine="h5netcdf") as each:
        first, second = (each.sel(seed=seed, drop=True).load() for seed in (3, 5))
    np.testing.assert_allclose(mean.elbo, (first.elbo + second.elbo) / 2, rtol=1e-12)
    assert (mean.elbo_se > np.abs(first.elbo - second.elbo) / 2 - 1e-12).all(), "which is the spread of two"
    assert mean.attrs["seeds"].tolist() == [3, 5]
    monkeypatch.setattr(RunFolder, "figure", lambda *_: None)
    _, alone = compare("three", "--seeds", "[3]")
    assert first.elbo.equals(alone.elbo), "each seed is as if alone"
    main(["compare", "--config", "two/config.yaml", "--out", "again"])
    with xr.open_dataset("again/comparison.nc", engine="h5netcdf") as again:
        assert again.elbo.equals(mean.elbo), "the settings that are kept make it again"


def test_a_seed_that_diverges_is_left_out_and_told_of(folder, capsys, monkeypatch):
    from pyro_vae.cli import compare as cli_compare
    from pyro_vae.errors import DivergenceError

    trained = cli_compare.train

    def diverges_with_1(settings, *arguments, **more):
        if settings.seed == 1:
            raise DivergenceError("the loss became nan in epoch 1")
        return trained(settings, *arguments, **more)

    monkeypatch.setattr(cli_compare, "train", diverges_with_1)
    monkeypatch.setattr(RunFolder, "figure", lambda *_: None)
    code, mean = compare("run", "--seeds", "[0, 1, 2]")
    told = capsys.readouterr().err
    assert code == 0
    assert "seed 1: the loss became nan in epoch 1" in told
    assert "2 of 3 seeds finished" in told
    assert mean.attrs["seeds"].tolist() == [0, 2]
    assert mean.attrs["diverged"] == "seed 1: the loss became nan in epoch 1"


def test_a_seed_that_cannot_be_evaluated_takes_no_other_with_it(folder, capsys, monkeypatch):
    from pyro_vae.cli import compare as cli_compare
    from pyro_vae.errors import ModelError

    compared = cli_compare._compare_moments

    def fails_with_1(settings, *arguments, **more):
        if settings.seed == 1:
            raise ModelError("the encoder cannot be called")
        return compared(settings, *arguments, **more)

    monkeypatch.setattr(cli_compare, "_compare_moments", fails_with_1)
    monkeypatch.setattr(RunFolder, "figure", lambda *_: None)
    code, mean = compare("run", "--seeds", "[0, 1]", "--epochs", "1")
    assert code == 0
    assert mean.attrs["seed"] == 0
    assert "seed 1: the encoder cannot be called" in capsys.readouterr().err


def test_where_every_seed_diverges_nothing_is_written(folder, capsys):
    flags = ["--optimizer", "SGD", "--optimizer.lr", "1e12", "--seeds", "[0, 1]"]
    assert main(["compare", "--data", "data.npy", "--out", "none", *FAST, *ONE, *flags]) == 2
    assert "every seed failed; the first error: seed 0: " in capsys.readouterr().err
    assert not Path("none").exists()


@pytest.mark.slow
def test_a_seed_whose_numbers_are_not_finite_leaves_a_comparison(folder, capsys):
    """A held-out row beyond single precision's squares: the numbers of each seed are kept, and nothing is drawn."""
    held_out = np.zeros((4, 3), dtype=np.float32)
    held_out[3] = 1e30
    np.save("held.npy", held_out)
    with pytest.warns(UserWarning, match="Encountered NaN"):
        code, mean = compare("run", "--seeds", "[0, 1]", "--validation_data", "held.npy")
    assert code == 0
    assert mean.elbo.isnull().all()
    assert {"seeds.nc", "config.yaml"} <= {path.name for path in Path("run").iterdir()}
    assert "cannot be compared: they are not finite" in capsys.readouterr().out.replace("\n", " ")


def test_an_estimator_that_does_not_hold_is_refused_before_training(folder, capsys, monkeypatch):
    from pyro_vae.cli import compare as cli_compare

    monkeypatch.setattr(cli_compare, "train", lambda *_, **__: pytest.fail("trained first"))
    flags = ["--prior", "Laplace", "--elbos", "[HandDerivedELBO]", "--seeds", "[0, 1]"]
    assert main(["compare", "--data", "data.npy", "--out", "none", *FAST, *flags]) == 2
    assert "HandDerivedELBO is derived for normals" in capsys.readouterr().err
    assert not Path("none").exists()


def test_one_seed_has_nothing_beside_it(folder, capsys):
    assert main(["compare", "--data", "data.npy", "--out", "none", *FAST, "--workers", "2"]) == 2
    assert "need several trainings, and there is one; pass --seeds" in capsys.readouterr().err


def test_a_seed_that_is_interrupted_is_not_compared(folder, monkeypatch):
    """Who stops it does not want to wait for that, and it is in no mean."""
    from pyro_vae.cli import compare as cli_compare

    trained, compared = cli_compare.train, []

    def interrupted(settings, *arguments, **more):
        return dataclasses.replace(trained(settings, *arguments, **more), interrupted=True)

    monkeypatch.setattr(cli_compare, "train", interrupted)
    monkeypatch.setattr(cli_compare, "_compare_moments", lambda *_, **__: compared.append(1))
    assert main(["compare", "--data", "data.npy", "--out", "none", *FAST, *ONE, "--seeds", "[0, 1]"]) == 130
    assert not compared


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_keeps_the_seeds_that_are_whole(number, folder, capsys, monkeypatch):
    from pyro_vae.cli import compare as cli_compare

    trained = cli_compare.train

    def stopped_at_2(settings, *arguments, **more):
        if settings.seed == 2:
            assert signal.getsignal(number) is not signal.SIG_DFL, "it would end all"
            signal.raise_signal(number)
        return trained(settings, *arguments, **more)

    monkeypatch.setattr(cli_compare, "train", stopped_at_2)
    monkeypatch.setattr(RunFolder, "figure", lambda *_: None)
    code, mean = compare("run", "--seeds", "[0, 1, 2]")
    assert code == 130
    assert mean.attrs["seeds"].tolist() == [0, 1]
    assert "2 of 3 seeds finished" in capsys.readouterr().err
    assert main(["compare", "--data", "data.npy", "--out", "none", *FAST, *ONE, "--seeds", "[2, 0]"]) == 130
    assert not Path("none").exists()


def test_a_run_has_its_seed(folder, capsys):
    assert main(["fit", "--data", "data.npy", "--out", "run", *FAST[:-2]]) == 0
    assert main(["compare", "--run", "run", "--out", "out", "--seeds", "[0, 1]"]) == 2
    assert "RUN already sets seeds; leave --seeds out, or leave RUN out" in capsys.readouterr().err
