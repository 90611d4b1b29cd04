"""Overfitting is a finding: by paired errors, in ``fit``, ``check`` and the command line, which stops in time."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from test_callbacks import StandIn

import pyro_vae as pv
from pyro_vae.callbacks import EarlyStopping
from pyro_vae.cli import main
from pyro_vae.diagnose import converged, judge_converged, judge_overfitting, overfitting
from pyro_vae.errors import DataError


class Values(pv.callbacks.Callback):
    """Keeps the ELBO of each validation datum after each epoch."""

    def __init__(self):
        self.each = []

    def epoch(self, run):
        self.each.append(run.values["validation"].clone())


@pytest.fixture(scope="module")
def overfitted():
    """24 rows of noise and a network with room to learn them by heart."""
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(3),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(3, [64], 6), learn_scale=True),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(6, [64], 6)),
    )
    values, iterates = Values(), pv.diagnose.Iterates(x[:24])
    adam = partial(torch.optim.Adam, lr=1e-2)
    fit = partial(pv.fit, vae, x[:24], validation_data=x[24:], optimizer=adam, epochs=120, engine="eager")
    return fit(callbacks=[values, iterates], progress=False), values.each, iterates


def test_the_fall_is_that_of_paired_differences_from_the_best_epoch(overfitted):
    fit, each, _ = overfitted
    best = int(torch.stack([values.mean() for values in each]).argmax())
    apart = torch.stack([each[best] - values for values in each])
    found = overfitting(fit.history)
    assert found.best_epoch.item() == best + 1 < 100
    assert found.fall.item() == pytest.approx(apart[-10:].mean().item())
    errors = apart.std(1) / math.sqrt(len(each[0]))
    assert found.fall_se.item() == pytest.approx(errors[-10:].mean().item())
    assert found.below_best.values[best:] == pytest.approx(apart.mean(1)[best:].numpy())
    assert fit.history.attrs["weights_epoch"] == 120


def test_it_is_bad_and_nothing_then_says_to_train_longer(overfitted):
    history = overfitted[0].history
    finding = judge_overfitting(overfitting(history))
    assert finding.level == "bad", finding
    assert "EarlyStopping" in finding.next
    advice = judge_converged(converged(history.assign(train_elbo=history.train_elbo + 0.1 * history.epoch)))
    assert advice.level == "bad"
    assert advice.next.startswith("do not train longer")
    alone = history.drop_vars([name for name in history if name.startswith("validation_below")])
    alone = judge_converged(converged(alone.assign(train_elbo=alone.train_elbo + alone.epoch))).next
    assert alone == "train longer; pass validation_data to fit, to detect overfitting"


def test_iterates_know_of_the_validation_data_that_fit_had(overfitted):
    fit, _, iterates = overfitted
    by_fit, by_iterates = converged(fit), converged(iterates)
    for name in ("fall", "fall_se", "epochs_after_kept"):
        assert by_iterates[name].values == pytest.approx(by_fit[name].values, rel=1e-12)
    assert by_iterates.fall > 3 * by_iterates.fall_se
    assert judge_converged(by_iterates).next.startswith("do not train longer")
    assert "fall" not in converged(pv.diagnose.Iterates.history(iterates)), "power: what was noted says nothing of it"


def test_weights_that_the_validation_data_chose_are_not_told_to_train_longer():
    epochs = np.arange(40.0)
    rising = history(np.zeros(40), np.zeros(40), weights_epoch=30).assign(train_elbo=("epoch", epochs))
    stopped = judge_converged(converged(rising))
    assert stopped.level == "doubtful"
    assert stopped.next.startswith("nothing: the validation ELBO chose these weights, and later weights were no better")
    for epoch in (40, 0):  # the last one's, and those of none, as an average's are
        last = judge_converged(converged(rising.assign_attrs(weights_epoch=epoch)))
        assert (last.level, last.next) == ("bad", "train longer")


def history(validation, below, error=0.01, **attrs):
    columns = {"train_elbo": np.arange(len(below)) * 1.0, "validation_elbo": validation, "validation_below_best": below}
    columns["validation_below_best_se"] = np.full(len(below), error)
    return xr.Dataset(
        {name: ("epoch", np.asarray(values)) for name, values in columns.items()},
        {"epoch": range(1, len(below) + 1)},
        attrs,
    )


@pytest.mark.parametrize(
    ("below", "error", "attrs", "level"),
    [
        ([0, 0, 0.5], 0.01, {}, "bad"),
        ([0, 0, 0.5], 0.24, {}, "doubtful"),
        ([0, 0, 0.5], 0.3, {}, "fine"),
        ([0, 0, 0.09], 0.01, {}, "fine"),
        ([0, 0, 7.0], 0.01, {"weights_epoch": 2}, "fine"),
        ([0, 5.0, 7.0], 0.01, {"weights_epoch": 2}, "bad"),
        ([0, 0.05, 7.0], 0.01, {"weights_epoch": 2}, "fine"),
        ([0, 0.3, 7.0], 0.16, {"weights_epoch": 2}, "fine"),
        ([0, 3.0, 0], 0.01, {}, "fine"),
    ],
)
def test_the_level_follows_error_threshold_and_the_weights_that_are_kept(below, error, attrs, level):
    validation = -np.array(below) + np.arange(3) * 1e-6
    assert judge_overfitting(overfitting(history(validation, below, error, **attrs))).level == level


@pytest.mark.parametrize(("epoch", "fall"), [(1, 0.0), (2, 5.0), (3, math.nan), (0, math.nan)])
def test_the_fall_of_the_weights_that_are_kept_is_that_of_their_epoch(epoch, fall):
    """Of the last weights, and of those of no epoch, there is none besides the fall of the end."""
    found = overfitting(history([3.0, 2.0, 1.0], [0.0, 5.0, 7.0], 0.25, weights_epoch=epoch))
    assert found.kept_fall.item() == pytest.approx(fall, nan_ok=True)
    assert math.isnan(found.kept_fall_se) == math.isnan(fall)
    assert found.train_rise.item() == 1.5


def test_what_is_said_where_the_last_epoch_is_the_best_or_the_best_is_kept():
    last = judge_overfitting(overfitting(history([1.0, 2.0, 3.0], [0, 0, 0])))
    told = "the validation ELBO was best after the last of 3 epochs; the training ELBO ended -1 nats from it"
    assert (last.level, last.why) == ("fine", told)
    kept = judge_overfitting(overfitting(history([1.0, 3.0, 2.0], [0, 0, 1.0], 0.25, weights_epoch=2)))
    assert "those after epoch 2, selected by the validation ELBO" in kept.why
    assert kept.why.endswith(
        "The validation ELBO of selected weights is too high: hold out other data for a final number"
    )


def test_a_history_without_validation_is_refused():
    with pytest.raises(DataError, match="pass validation_data= to fit"):
        overfitting(history([1.0], [0.0]).drop_vars("validation_below_best"))


@pytest.mark.parametrize(("steps", "stops_at"), [(0, 4), (60, 7)])
def test_early_stopping_waits_for_epochs_and_for_steps(steps, stops_at):
    run = StandIn(EarlyStopping(3, steps=steps))
    better = torch.zeros(len(run.watched["train"]), dtype=torch.float64)
    epochs = 0
    while not run.stopped:
        run.run_epoch(better - epochs)  # ten steps
        epochs += 1
    assert epochs == stops_at


def test_the_command_line_stops_by_the_validation_elbo_and_keeps_the_best_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).numpy())
    flags = ["fit", "--data", "x.npy", "--hidden", "[32]", "--latent_dim", "2", "--optimizer.lr", "0.02"]
    flags += ["--patience", "40", "--engine", "eager"]
    assert main([*flags, "--out", "run"]) == 0
    told = xr.load_dataset("run/history.nc")
    assert "EarlyStopping" in told.attrs["stopped"]
    kept = told.attrs["weights_epoch"]
    assert 0 < kept <= told.sizes["epoch"] - 40
    assert f"with the weights after epoch {kept}, selected on the validation data" in capsys.readouterr().out
    assert judge_overfitting(overfitting(told)).level == "fine"
    assert main(["fit", "--resume", "run", "--epochs", "400"]) == 2
    assert "stops by its validation ELBO, not after a number of epochs; raise --steps" in capsys.readouterr().err


def test_of_the_kept_weights_fall_and_error_are_those_of_one_epoch():
    below, errors = [0.0, 5.0, 7.0, 9.0], [0.1, 0.2, 0.3, 0.4]
    table = history([3.0, 2.0, 1.0, 0.0], below, errors, weights_epoch=3)
    found = overfitting(table)
    assert (found.kept_fall.item(), found.kept_fall_se.item()) == (7.0, 0.3)
