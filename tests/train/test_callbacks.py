"""Callbacks, each against its formula, in a stand-in for a training; ``test_callbacks_fit.py`` has the real one."""

import copy
import math

import pytest
import torch
from helpers.callback_checks import flat, flattened, plain, scalars, single
from helpers.checks import small_vae, z_score
from torch.optim import SGD, Adam, lr_scheduler, swa_utils

import pyro_vae as pv
from pyro_vae.errors import DivergenceError, SettingsError
from pyro_vae.train.callbacks import EMA, SWA, EarlyStopping, Explosion, RollBack, Schedule, TensorBoard
from pyro_vae.train.callbacks.schedules import advance, validate_no_plateau

CALLBACKS = {
    "EMA": lambda folder: EMA(0.9, every=2, restore=False),
    "SWA": lambda folder: SWA(2, restore=False),
    "EarlyStopping": lambda folder: EarlyStopping(3),
    "Explosion": lambda folder: Explosion(50.0),
    "RollBack": lambda folder: RollBack(0.5),
    "Schedule": lambda folder: Schedule(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)),
    "TensorBoard": lambda folder: TensorBoard(folder),
}


class StandIn:
    """What callbacks see of a training, whose steps are random walks of the weights."""

    def __init__(self, *callbacks, vae=None, lr=0.1, scheduler=None, data=50, folder=None):
        self.vae, self.callbacks, self.folder = vae or small_vae(), callbacks, folder
        self.optimizer = Adam(self.vae.parameters(), lr=lr)
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        self.watched = {"train": torch.zeros(data, 6), "validation": torch.zeros(data, 6)}
        self.generator = torch.Generator().manual_seed(0)
        self.values, self.epochs, self.step, self.rank, self.ranks, self.seed = {}, [], 0, 0, 1, 0
        self.said, self.stopped, self.path = [], "", []
        for callback in callbacks:
            callback.start(self)
        self.good = self.state()

    @property
    def epoch(self):
        return len(self.epochs) + 1

    def say(self, sentence):
        self.said.append(sentence)

    def stop(self, reason):
        self.stopped = reason

    def fail(self, reason):
        raise DivergenceError(reason)

    def state(self):
        optimizer, scheduler = self.optimizer.state_dict(), self.scheduler and self.scheduler.state_dict()
        walk = {"weights": self.vae.state_dict(), "random": self.generator.get_state(), "step": self.step}
        walk |= {"optimizer": optimizer, "scheduler": scheduler, "epochs": self.epochs}
        return copy.deepcopy(walk | {"callbacks": [callback.state() for callback in self.callbacks]})

    def load(self, state):
        state = copy.deepcopy(state)
        self.vae.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.epochs = state["step"], state["epochs"]
        self.generator.set_state(state["random"])
        for callback, own in zip(self.callbacks, state["callbacks"], strict=True):
            callback.load(own)

    def run_epoch(self, values=None, steps=10):
        """Steps and the evaluation after them."""
        for _ in range(steps):
            with torch.no_grad():
                for parameter in self.vae.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=self.generator, dtype=parameter.dtype))
            self.optimizer.step()  # of no gradient
            self.step += 1
            self.path.append(flat(self.vae))
            for callback in self.callbacks:
                if callback.every and self.step % callback.every == 0:
                    callback.step(self)
        if values is None:
            values = torch.randn(len(self.watched["train"]), generator=self.generator, dtype=torch.float64)
        self.values = {"train": values, "validation": values}
        numbers = {"train_elbo": values.mean().item(), "objective": 0.1 * self.step, "seconds": 1 / 3}
        self.epochs.append({**numbers, "step": self.step})
        for callback in self.callbacks:
            callback.epoch(self)
        return self

    def close(self):
        for callback in self.callbacks:
            callback.end(self)
        return self


def keys_are_strings(tree):
    if isinstance(tree, dict):
        return all(isinstance(key, str) and keys_are_strings(value) for key, value in tree.items())
    return all(map(keys_are_strings, tree)) if isinstance(tree, list) else not isinstance(tree, tuple)


def test_every_callback_is_in_the_table():
    assert set(CALLBACKS) == set(pv.callbacks.__all__) - {"Callback"}


@pytest.mark.parametrize("name", CALLBACKS)
def test_what_is_loaded_goes_on_as_what_was_saved(name, tmp_path):
    """Saved after three epochs and loaded into a new one: the same state then, and after three more."""
    whole = StandIn(CALLBACKS[name](tmp_path / "first"))
    for _ in range(3):
        whole.run_epoch()
    saved = whole.state()
    own = saved["callbacks"][0]
    assert keys_are_strings(own)
    fresh = StandIn(CALLBACKS[name](tmp_path / "second"), lr=0.7)
    first = plain(fresh.callbacks[0].state())
    fresh.load(saved)
    assert plain(fresh.callbacks[0].state()) == plain(own)
    for run in (whole, fresh):
        for _ in range(3):
            run.run_epoch()
        run.close()
    assert plain(whole.callbacks[0].state()) == plain(fresh.callbacks[0].state())
    assert torch.equal(flat(whole.vae), flat(fresh.vae))
    assert whole.optimizer.param_groups[0]["lr"] == fresh.optimizer.param_groups[0]["lr"]
    if name not in ("RollBack", "TensorBoard"):
        assert plain(own) != first, "the state tells something"


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_second_training_forgets_the_first(name, tmp_path):
    callback = CALLBACKS[name](tmp_path)
    states = []
    for _ in range(2):
        run = StandIn(callback)
        for _ in range(3):
            run.run_epoch()
        states.append(plain(callback.state()))
        run.close()
    assert states[0] == states[1]


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_draws_no_random_numbers(name, tmp_path):
    before = torch.get_rng_state()
    run = StandIn(CALLBACKS[name](tmp_path), vae=(vae := small_vae()))
    torch.set_rng_state(before)
    run.run_epoch().run_epoch().close()
    assert torch.equal(torch.get_rng_state(), before)
    assert run.vae is vae


# Averages


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_ema_is_the_weighted_mean_of_the_path(decay, every):
    run = StandIn(EMA(decay, every=every))
    for _ in range(4):
        run.run_epoch()
    steps = torch.arange(every, 41, every)
    weights = decay ** (40 - steps).double()
    expected = (weights / weights.sum()) @ torch.stack(run.path)[steps - 1]
    assert torch.allclose(flattened(run.vae, run.callbacks[0].averaged_state), expected, rtol=0, atol=1e-12)
    last = flat(run.vae)
    run.close()
    assert torch.allclose(flat(run.vae), expected, rtol=0, atol=1e-12)
    assert (expected - last).abs().max() > 0.01


@pytest.mark.parametrize(("every", "steps"), [(None, range(20, 51, 10)), (4, range(12, 51, 4))])
def test_swa_is_the_mean_from_an_epoch_on(every, steps):
    run = StandIn(SWA(2, every=every))
    for _ in range(5):
        run.run_epoch()
    expected = torch.stack(run.path)[torch.tensor(steps) - 1].mean(0)
    assert torch.allclose(flat(run.close().vae), expected, rtol=0, atol=1e-12)
    assert f"the average of {len(steps)} samples" in run.said[0]


def test_averages_are_those_of_torch():
    """SWA is torch's; EMA too, from a first look whose share torch does not take away."""
    vae = small_vae()
    run = StandIn(SWA(1, every=1, restore=False), EMA(0.9, every=1, restore=False), vae=vae)
    mean = swa_utils.AveragedModel(vae, multi_avg_fn=swa_utils.get_swa_multi_avg_fn())
    moving = swa_utils.AveragedModel(vae, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    for _ in range(200):
        run.run_epoch(steps=1)
        mean.update_parameters(vae)
        moving.update_parameters(vae)
    for ours, theirs in zip(run.callbacks, (mean, moving), strict=True):
        assert torch.allclose(flattened(vae, ours.averaged_state), flat(theirs.module), rtol=0, atol=1e-7)


def test_an_average_goes_into_the_vae_in_place_with_its_buffers():
    torch.manual_seed(0)
    vae = small_vae()
    vae.encoder.net.insert(1, torch.nn.BatchNorm1d(8).double())
    run = StandIn(SWA(1, every=1), vae=vae)
    norm, means = vae.encoder.net[1], []
    for _ in range(5):
        run.run_epoch(steps=1)
        means.append(norm.running_mean.clone())
        norm(torch.randn(20, 8).double())
    places = {name: value.data_ptr() for name, value in vae.state_dict().items()}
    run.close()
    assert {name: value.data_ptr() for name, value in vae.state_dict().items()} == places
    assert torch.allclose(norm.running_mean, torch.stack(means).mean(0), rtol=0, atol=1e-12)
    assert norm.num_batches_tracked == 5


def test_what_was_not_averaged_is_left_alone():
    run = StandIn(SWA(9)).run_epoch()
    before = flat(run.vae)
    assert torch.equal(flat(run.close().vae), before)
    assert run.said == ["SWA: the training ended before the first sample of the weights."]
    kept = StandIn(EMA(0.9, every=1, restore=False)).run_epoch()
    before = flat(kept.vae)
    assert torch.equal(flat(kept.close().vae), before)


def test_two_that_would_end_with_other_weights_are_refused():
    with pytest.raises(SettingsError, match="EarlyStopping restores the weights of the best epoch at the end, and EMA"):
        StandIn(EarlyStopping(), EMA(restore=False), EMA())
    StandIn(EarlyStopping(), EMA(restore=False), SWA(1, restore=False))


# Early stopping


def stopped_at(callback, rows, epochs=100):
    """After which epoch a callback stops, given the values of each epoch."""
    run = StandIn(callback, data=len(rows(0)), vae=torch.nn.Linear(1, 1))
    for epoch in range(epochs):
        run.run_epoch(rows(epoch), steps=0)
        if run.stopped:
            break
    return len(run.epochs), run


BASE = 100 * torch.randn(80, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("patience", [1, 4, 10])
def test_an_elbo_that_stays_is_stopped_after_exactly_the_patience(patience):
    epochs, run = stopped_at(EarlyStopping(patience), lambda epoch: BASE)
    assert epochs == patience + 1
    assert f"errors of the difference for {patience} epochs" in run.stopped


def test_growth_far_below_the_error_of_the_elbo_is_seen_and_goes_on():
    """0.1 nats per epoch, give or take 0.05 from datum to datum: the ELBO's own standard error is 11."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(60, 80, generator=generator, dtype=torch.float64)
    epochs, run = stopped_at(EarlyStopping(1), lambda epoch: BASE + 0.1 * epoch + noise[epoch], 60)
    assert (epochs, run.stopped) == (60, "")


def test_growth_too_slow_for_one_epoch_counts_when_it_has_summed_up():
    """A quarter of the standard error in each epoch: four in five epochs are not better, and none is too many."""
    spread = torch.linspace(-1, 1, 80).double()
    error = (spread - spread.flip(0)).std() / 80**0.5

    def rows(epoch):
        return BASE + 0.25 * error * epoch + (spread if epoch % 2 else spread.flip(0)) / 2

    epochs, run = stopped_at(EarlyStopping(10), rows, 60)
    assert (epochs, run.stopped) == (60, "")
    assert run.callbacks[0].best > 50


@pytest.mark.parametrize("errors", [0.0, 1.0, 2.0])
def test_noise_is_taken_for_growth_as_often_as_its_error_says(errors):
    """The share of second epochs that seem better, where there is noise only, against Student's t."""
    generator, seem = torch.Generator().manual_seed(3), []
    callback = EarlyStopping(1, errors=errors)
    for _ in range(1000):
        epochs = 100 * BASE + torch.randn(2, 80, generator=generator, dtype=torch.float64)
        seem.append(float(stopped_at(callback, lambda epoch, e=epochs: e[epoch], 2)[1].stopped == ""))
    scipy = pytest.importorskip("scipy.stats")
    assert abs(z_score(torch.tensor(seem).double(), scipy.t(79).sf(errors))) < 5


def test_without_an_error_noise_is_trained_on_for_longer():
    noise = torch.randn(50, 400, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = {
        errors: [stopped_at(EarlyStopping(5, errors=errors), lambda e, own=own: own[e], 400)[0] for own in noise]
        for errors in (0.0, 2.0)
    }
    assert sum(ends[0.0]) > 1.3 * sum(ends[2.0])


def test_the_best_weights_come_back_in_place():
    run = StandIn(EarlyStopping(2))
    for value in (0.0, 1.0, 0.5, 0.5):
        run.run_epoch(BASE + value)
    places = [p.data_ptr() for p in run.vae.parameters()]
    assert run.stopped
    assert not torch.equal(flat(run.vae), run.path[19])
    run.close()
    assert torch.equal(flat(run.vae), run.path[19])
    assert [p.data_ptr() for p in run.vae.parameters()] == places
    (said,) = run.said
    assert said.startswith(
        "EarlyStopping: the VAE has the weights after epoch 2 of 4; no later epoch was better by more than "
    )


def test_early_stopping_without_restoring_keeps_the_last_weights_and_no_copy():
    run = StandIn(EarlyStopping(2, restore=False)).run_epoch(BASE + 1).run_epoch(BASE)
    assert run.callbacks[0].state()["weights"] == {}
    assert torch.equal(flat(run.close().vae), run.path[-1])


def test_an_elbo_that_is_not_finite_is_not_better():
    for broken in (math.nan, math.inf):
        epochs, _ = stopped_at(EarlyStopping(2), lambda epoch, b=broken: BASE if epoch == 0 else BASE * b)
        assert epochs == 3


def test_early_stopping_needs_validation_data():
    class Without(StandIn):
        @property
        def watched(self):
            return {"train": torch.zeros(3, 6)}

        @watched.setter
        def watched(self, value):
            pass

    with pytest.raises(SettingsError, match="EarlyStopping needs at least two validation data"):
        Without(EarlyStopping())


# Schedules

SCHEDULES = {
    "none": None,
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 7]),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=8),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.1, total_iters=7),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 20),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=40),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, step_size_up=4, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 10)], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 3)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=6),
}


def rates(run, count):
    """The learning rates of epochs to come."""
    found = []
    for _ in range(count):
        found.append(run.optimizer.param_groups[0]["lr"])
        run.optimizer.step()
        if run.scheduler is not None:
            run.scheduler.step()
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("after", [0, 5])
def test_a_roll_back_lowers_every_rate_to_come(name, after):
    """Twice after one good state, and once after the next: all that follow are f² and f³ times what they were."""
    plainly, lowered = (StandIn(RollBack(0.25), scheduler=SCHEDULES[name]) for _ in range(2))
    for run in (plainly, lowered):
        rates(run, after)
        run.good = run.state()
    for _ in range(2):
        rates(lowered, 2)
        assert lowered.callbacks[0].diverged(lowered, DivergenceError("the loss became nan"))
    first, second = rates(plainly, 3), rates(lowered, 3)
    assert torch.allclose(second, first * 0.25**2, rtol=1e-12, atol=0)
    lowered.good = lowered.state()
    assert lowered.callbacks[0].diverged(lowered, DivergenceError("the loss became nan"))
    assert torch.allclose(rates(lowered, 8), rates(plainly, 8) * 0.25**3, rtol=1e-12, atol=0)


def test_a_roll_back_goes_to_the_good_state_and_says_where_it_came_from():
    run = StandIn(RollBack(0.5, times=2)).run_epoch()
    run.good = run.state()
    good = flat(run.vae)
    run.run_epoch()
    assert run.callbacks[0].diverged(run, DivergenceError("the loss became nan at step 7: by row 12"))
    assert torch.equal(flat(run.vae), good)
    expected = (
        "RollBack 1 of 2: the loss became nan at step 7: by row 12; rolled back to step 10, at a learning rate of 0.05."
    )
    assert run.said == [expected]


def test_roll_backs_are_counted_across_the_state_that_they_go_back_to():
    run = StandIn(RollBack(0.5, times=2))
    assert [run.callbacks[0].diverged(run, DivergenceError("")) for _ in range(3)] == [True, True, False]
    assert run.optimizer.param_groups[0]["lr"] == 0.1 * 0.25
    assert run.callbacks[0].state() == {"divergences": 2}


def test_each_roll_back_has_its_own_noise_and_the_same_one_again():
    def draws():
        torch.manual_seed(4)
        run, found = StandIn(RollBack(0.5, times=3)), []
        state = torch.get_rng_state()
        for _ in range(3):
            torch.set_rng_state(state)
            run.callbacks[0].diverged(run, DivergenceError(""))
            found.append(torch.rand(()).item())
        return found

    first = draws()
    assert first == draws()
    torch.manual_seed(4)
    assert len({*first, torch.rand(()).item()}) == 4


@pytest.mark.parametrize("every", [1, 4])
def test_a_schedule_by_steps_is_that_of_torch(every):
    make = SCHEDULES["OneCycleLR"]
    run, found = StandIn(Schedule(make, every=every)), []
    for _ in range(32):
        found.append(run.optimizer.param_groups[0]["lr"])
        run.run_epoch(steps=1)
    other = Adam(small_vae().parameters(), lr=0.1)
    schedule, expected = make(other), []
    for _ in range(32):
        expected.append(other.param_groups[0]["lr"])
        other.step()
        schedule.step()
    assert found == [expected[i // every * every] for i in range(32)]


def test_a_roll_back_lowers_the_rates_of_a_schedule_by_steps():
    run = StandIn(RollBack(0.1), Schedule(SCHEDULES["OneCycleLR"]))
    run.callbacks[0].diverged(run, DivergenceError(""))
    found = []
    for _ in range(10):
        found.append(run.optimizer.param_groups[0]["lr"])
        run.run_epoch(steps=1)
    other = StandIn(scheduler=SCHEDULES["OneCycleLR"])
    assert torch.allclose(torch.tensor(found, dtype=torch.float64), rates(other, 10) * 0.1, rtol=1e-12, atol=0)


def test_schedules_that_cannot_be_are_refused():
    make = SCHEDULES["StepLR"]
    with pytest.raises(SettingsError, match="two schedules would set the same learning rate"):
        StandIn(Schedule(make), scheduler=make)
    with pytest.raises(SettingsError, match="two schedules would set the same learning rate"):
        StandIn(Schedule(make), Schedule(make))
    with pytest.raises(SettingsError, match="made a ReduceLROnPlateau"):
        StandIn(Schedule(lambda o: lr_scheduler.ReduceLROnPlateau(o)))
    with pytest.raises(SettingsError, match="cannot make the schedule"):
        StandIn(Schedule(lambda o: lr_scheduler.OneCycleLR(o, 0.1)))
    with pytest.raises(SettingsError, match="the schedule has ended by step"):
        StandIn(Schedule(lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=3))).run_epoch()


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_plateau_is_one_of_the_elbo(mode):
    """Growth keeps the rate, whatever the sign of the ELBO; a plateau lowers it."""
    for level in (-5.0, 5.0):
        optimizer = SGD(small_vae().parameters(), lr=1.0)
        plateau = lr_scheduler.ReduceLROnPlateau(optimizer, mode, patience=2, threshold_mode="abs")
        for epoch in range(10):
            advance(plateau, level + 0.1 * epoch)
        assert optimizer.param_groups[0]["lr"] == 1.0
        for _ in range(3):
            advance(plateau, level)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_a_plateau_by_shares_would_never_be_seen_and_is_refused():
    optimizer = SGD(small_vae().parameters(), lr=1.0)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    for _ in range(20):
        plateau.step(-5.0)
    assert optimizer.param_groups[0]["lr"] == 1.0, "what is refused is what torch does"
    with pytest.raises(SettingsError, match="threshold_mode='abs'"):
        validate_no_plateau(plateau)
    validate_no_plateau(lr_scheduler.ReduceLROnPlateau(optimizer, threshold_mode="abs"))


# Explosions


def test_an_explosion_is_a_fall_by_so_many_spreads():
    spread = BASE.std().item()
    for fall, fails in ((2.9 * spread, False), (3.1 * spread, True)):
        run = StandIn(Explosion(3.0), data=80).run_epoch(BASE - 10).run_epoch(BASE)
        if fails:
            with pytest.raises(
                DivergenceError, match=r"the ELBO fell to .* in epoch 3, more than 3 standard deviations .* of epoch 2"
            ):
                run.run_epoch(BASE - fall)
        else:
            run.run_epoch(BASE - fall)


def test_settings_out_of_their_range_are_refused():
    for make, what in (
        (lambda: EarlyStopping(0), "patience is 0"),
        (lambda: EarlyStopping(errors=-1.0), "errors is -1.0"),
        (lambda: EarlyStopping(errors=math.nan), "errors is nan"),
        (lambda: EMA(1.0), "decay is 1.0"),
        (lambda: EMA(math.nan), "decay is nan"),
        (lambda: EMA(every=0), "every is 0"),
        (lambda: SWA(0), "start is 0"),
        (lambda: SWA(1, every=0), "every is 0"),
        (lambda: RollBack(0.0), "factor is 0.0"),
        (lambda: RollBack(1.5), "factor is 1.5"),
        (lambda: RollBack(times=0), "times is 0"),
        (lambda: Explosion(0.0), "spreads is 0.0"),
        (lambda: Schedule(SCHEDULES["StepLR"], every=0), "every is 0"),
    ):
        with pytest.raises(SettingsError, match=what):
            make()


# TensorBoard


def test_tensorboard_shows_the_history_to_the_last_bit_of_single_precision(tmp_path):
    pytest.importorskip("tensorboard")
    run = StandIn(TensorBoard(), folder=tmp_path, scheduler=SCHEDULES["StepLR"]).run_epoch().run_epoch().close()
    found = scalars(tmp_path / "tensorboard")
    assert set(found) == {"objective", "train_elbo", "seconds", "lr"}
    for name in ("objective", "train_elbo", "seconds"):
        assert found[name] == [(row["step"], single(row[name])) for row in run.epochs]
    assert found["lr"] == [(10, single(0.1)), (20, single(0.1))]


def test_tensorboard_takes_back_what_was_rolled_back_and_resumed(tmp_path):
    pytest.importorskip("tensorboard")
    run = StandIn(TensorBoard(tmp_path)).run_epoch()
    good = run.state()
    run.run_epoch().run_epoch()
    run.load(good)
    run.run_epoch(BASE[:50]).close()
    assert scalars(tmp_path)["train_elbo"] == [(row["step"], single(row["train_elbo"])) for row in run.epochs]


def test_tensorboard_without_a_folder_or_a_package_is_refused(tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match="TensorBoard needs a folder"):
        StandIn(TensorBoard())
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(SettingsError, match=r"pip install 'pyro-vae\[logs\]'"):
        StandIn(TensorBoard(tmp_path))


def test_only_the_first_of_many_processes_writes(tmp_path):
    run = StandIn(TensorBoard(tmp_path / "logs"))
    run.rank = 1
    run.run_epoch().close()
    assert not (tmp_path / "logs").exists()
