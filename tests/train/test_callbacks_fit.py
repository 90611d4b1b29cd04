"""Callbacks in a training, by either engine; ``test_callbacks.py`` has each against its formula."""

import math
import time
from functools import partial

import pytest
import torch
from helpers import engine_checks  # noqa: F401  (it quiets torch, whose trace of a trace pytest would listen to)
from helpers.callback_checks import flat, flattened, plain, scalars, single
from helpers.kills import Killed
from helpers.members import FEATURES, LATENTS
from test_callbacks import CALLBACKS, SCHEDULES
from torch.optim import SGD, Adam, lr_scheduler

import pyro_vae as pv
from pyro_vae.errors import DivergenceError, SettingsError
from pyro_vae.train.callbacks import EMA, SWA, EarlyStopping, Explosion, RollBack, Schedule, TensorBoard
from pyro_vae.train.checkpoint.rotation import Checkpoints
from pyro_vae.train.compiled import steps

ROWS, BATCH = 64, 8  # 8 steps an epoch
X = torch.randn(80, FEATURES, generator=torch.Generator().manual_seed(3))
ENGINES = ["eager", pytest.param("compiled", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """``fit`` replays the trace without compiling it, which takes no time."""
    monkeypatch.setattr(steps, "CompiledSVI", partial(pv.CompiledSVI, backend="eager"))


def vae_of(encoder=None, dtype=torch.float32):
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(LATENTS),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(LATENTS, [8], FEATURES), learn_scale=True),
        encoder=encoder or pv.posteriors.DiagNormal(pv.nn.mlp(FEATURES, [8], 2 * LATENTS)),
    ).to(dtype)


def fit(*callbacks, vae=None, x=X[:ROWS], epochs=4, **settings):
    settings = {"validation_data": X[ROWS:], "batch_size": BATCH, "engine": "eager", **settings}
    return pv.fit(vae or vae_of(), x, epochs=epochs, progress=False, callbacks=callbacks, **settings)


def sgd(lr):
    return lambda parameters: SGD(parameters, lr=lr)


class At(pv.callbacks.Callback):
    """Does something after a step, once, or after each."""

    def __init__(self, do, step=None):
        self.every, self.do, self.at, self.done = 1, do, step, False

    def step(self, run):
        if self.at is None or (run.step == self.at and not self.done):
            self.done = True
            self.do(run)


def kill(run):
    raise Killed


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("killed_at", [20, 21])
def test_a_killed_training_goes_on_with_its_callbacks(killed_at, engine, tmp_path):
    """Two epochs and a half, another process, and the rest: weights and what is remembered are the same to the bit."""

    def made(logs):
        return [make(tmp_path / logs) for make in CALLBACKS.values()]

    first, second, third = made("whole"), made("killed"), made("killed")
    whole = fit(*first, At(lambda run: None), engine=engine)
    with pytest.raises(Killed):
        fit(*second, At(kill, killed_at), engine=engine, checkpoints=Checkpoints(tmp_path, steps=1, minutes=None))
    time.sleep(1 - time.time() % 1)  # another process takes longer to start; files of one second have no order
    again = fit(*third, At(lambda run: None), engine=engine, resume=tmp_path)
    assert torch.equal(flat(whole.vae), flat(again.vae))
    for one, other in zip(first, third, strict=True):
        assert plain(one.state()) == plain(other.state()), type(one).__name__
    assert again.history.drop_vars("seconds").equals(whole.history.drop_vars("seconds"))
    assert_shown(again, tmp_path / "killed")


def assert_shown(result, folder):
    found = scalars(folder)
    assert set(found) == {*result.history.data_vars, "lr"}
    for name, values in result.history.data_vars.items():
        pairs = zip(result.history.step.values.tolist(), values.values.tolist(), strict=True)
        assert found[name] == [(step, single(value)) for step, value in pairs], name


def test_tensorboard_shows_the_history_of_the_run_folder(tmp_path):
    pytest.importorskip("tensorboard")
    assert_shown(fit(TensorBoard(), checkpoints=tmp_path), tmp_path / "tensorboard")
    with pytest.raises(SettingsError, match="TensorBoard needs a folder"):
        fit(TensorBoard())


def test_tensorboard_takes_back_what_is_rolled_back(tmp_path):
    def explodes(run):
        with torch.no_grad():
            run.vae.decoder.net[-1].bias.add_(100.0)

    result = fit(TensorBoard(tmp_path), Explosion(), RollBack(), At(explodes, 24))
    found = scalars(tmp_path)
    assert found["train_elbo"] == [
        (step, single(elbo))
        for step, elbo in zip(
            result.history.step.values.tolist(), result.history.train_elbo.values.tolist(), strict=True
        )
    ]
    assert [rate for _, rate in found["lr"]] == [single(1e-3)] * 2 + [single(5e-4)] * 2


@pytest.mark.parametrize(("every", "engine"), [(1, "eager"), (5, "eager"), (5, "compiled")])
def test_ema_of_a_training_is_the_weighted_mean_of_its_path(every, engine):
    path = []
    ema = EMA(0.9, every=every)
    result = fit(ema, At(lambda run: path.append(flat(run.vae))), vae=vae_of(dtype=torch.float64), engine=engine)
    looked = torch.arange(every, 33, every)
    weights = 0.9 ** (32 - looked).double()
    expected = (weights / weights.sum()) @ torch.stack(path)[looked - 1]
    assert result.history.attrs["engine"] == engine
    assert torch.allclose(flat(result.vae), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(path[-1], expected, rtol=0, atol=1e-6)
    assert torch.equal(flat(result.vae), flattened(result.vae, ema.averaged_state))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("average", "weight"), [(EMA(0.9, every=1), 0.9), (SWA(1, every=1), 1.0)], ids=["EMA", "SWA"])
def test_the_running_means_of_batch_norm_are_averaged_with_the_weights(average, weight, engine):
    path, vae = [], vae_of(dtype=torch.float64)
    vae.encoder.net.insert(0, torch.nn.BatchNorm1d(FEATURES).double())
    norm = vae.encoder.net[0]
    fit(
        average,
        At(lambda run: path.append((norm.running_mean.clone(), norm.running_var.clone()))),
        vae=vae,
        engine=engine,
    )
    weights = weight ** torch.arange(31, -1, -1).double()
    for i, found in enumerate((norm.running_mean, norm.running_var)):
        values = torch.stack([step[i] for step in path])
        assert torch.allclose(found, weights / weights.sum() @ values, rtol=0, atol=1e-12)
        assert not torch.allclose(found, values[-1], rtol=0, atol=1e-4)
    assert norm.num_batches_tracked == 32


@pytest.mark.parametrize("engine", ENGINES)
def test_early_stopping_says_why_and_gives_the_best_weights(engine):
    """At a rate of 0 nothing grows; at one that is too high the second epoch is worse than the first."""
    result = fit(EarlyStopping(3), optimizer=sgd(0.0), epochs=50, engine=engine)
    assert len(result.history.epoch) == 4
    assert "errors of the difference for 3 epochs" in result.history.attrs["stopped"]
    assert not result.interrupted
    kept = []

    look = pv.callbacks.Callback()
    look.epoch = lambda run: kept.append(flat(run.vae))
    result = fit(EarlyStopping(5), look, optimizer=lambda ps: Adam(ps, lr=0.05), epochs=100, engine=engine)
    elbo = result.history.validation_elbo.values
    assert len(kept) < 100
    best = next(i for i in range(len(kept)) if torch.equal(kept[i], flat(result.vae)))
    assert best == len(kept) - 6
    assert elbo[best] > elbo[-1] - 1
    assert f"that of epoch {best + 1} " in result.history.attrs["stopped"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rate_that_is_too_high_is_rolled_back_until_it_is_not(engine):
    rates = []

    def look(run):
        rates.append(run.optimizer.param_groups[0]["lr"])

    roll_back = RollBack(0.01, times=5)
    result = fit(roll_back, At(look), optimizer=sgd(10.0), epochs=6, engine=engine)
    assert roll_back.divergences >= 1
    assert rates[-1] == pytest.approx(10.0 * 0.01**roll_back.divergences, rel=1e-12)
    assert len(result.history.epoch) == 6
    assert result.history.train_elbo.values[-1] > result.history.train_elbo.values[0]
    with pytest.raises(DivergenceError, match="lower the learning rate"):
        fit(RollBack(0.9, times=2), optimizer=sgd(10.0), engine=engine)


@pytest.mark.parametrize(
    ("schedule", "engine"), [("ExponentialLR", "eager"), ("OneCycleLR", "eager"), ("OneCycleLR", "compiled")]
)
def test_weights_broken_once_are_rolled_back_with_rate_schedule_and_counters(schedule, engine):
    """A fault in the third epoch: it is taken again with half the rate, as one without the fault from then on has."""
    found = {}
    for fault in (False, True):
        rates, elbo = [], pv.elbo.Beta(pv.elbo.ELBO(), pv.elbo.Linear(20))

        def look(run, rates=rates):
            rates.append((run.step, run.optimizer.param_groups[0]["lr"], run.loss.step.item()))

        def breaks(run):
            with torch.no_grad():
                next(run.vae.parameters()).fill_(math.nan)

        callbacks = [RollBack(0.5), At(look), *([At(breaks, 19)] if fault else [])]
        optimizer = lambda ps: SCHEDULES[schedule](Adam(ps, lr=0.01))  # noqa: E731
        fit(*callbacks, elbo=elbo, optimizer=optimizer, engine=engine)
        found[fault] = {step: (rate, count) for step, rate, count in rates}
    assert list(found[True]) == list(found[False]) == list(range(1, 33))
    for step in range(1, 33):
        rate, count = found[False][step]
        expected = rate * (0.5 if step > 16 else 1.0)
        assert found[True][step] == (pytest.approx(expected, rel=1e-12), count)


def test_a_vae_with_a_sparse_buffer_is_put_back_too():
    vae = vae_of()
    vae.decoder.register_buffer("neighbours", torch.eye(3).to_sparse())
    with pytest.raises(DivergenceError, match="lower the learning rate"):
        fit(vae=vae, optimizer=sgd(1e12))


def test_a_roll_back_draws_new_noise_and_is_the_same_again():
    def breaks(run):
        with torch.no_grad():
            next(run.vae.parameters()).fill_(math.nan)

    ends = [flat(fit(RollBack(1.0), *extra).vae) for extra in ([], [At(breaks, 19)], [At(breaks, 19)])]
    assert torch.equal(ends[1], ends[2])
    assert not torch.equal(ends[0], ends[1])


@pytest.mark.parametrize("killed_at", [18, 21, 24])
def test_a_run_killed_within_an_epoch_is_rolled_back_to_where_that_began(killed_at, tmp_path):
    """Broken at step 22: before it, before it and resumed past it, and after the rates were lowered."""

    def breaks(run):
        if run.step == 22 and run.optimizer.param_groups[0]["lr"] == 1e-3:
            with torch.no_grad():
                next(run.vae.parameters()).fill_(math.nan)

    whole = fit(RollBack(), At(breaks))
    saving = Checkpoints(tmp_path, steps=5, minutes=None)
    with pytest.raises(Killed):
        fit(RollBack(), At(breaks), At(kill, killed_at), checkpoints=saving)
    again = fit(roll_back := RollBack(), At(breaks), checkpoints=saving, resume=tmp_path)
    assert roll_back.divergences == 1
    assert torch.equal(flat(whole.vae), flat(again.vae))
    assert again.history.drop_vars("seconds").equals(whole.history.drop_vars("seconds"))


def test_a_divergence_after_a_resume_says_which_weights_are_kept(tmp_path):
    def breaks(run):
        with torch.no_grad():
            next(run.vae.parameters()).fill_(math.nan)

    with pytest.raises(Killed):
        fit(At(kill, 21), checkpoints=Checkpoints(tmp_path, steps=5, minutes=None))
    with pytest.raises(DivergenceError, match="the VAE now has the weights after epoch 2;"):
        fit(At(breaks, 22), resume=tmp_path)


def test_an_explosion_ends_the_training_or_is_rolled_back():
    def explodes(run):
        with torch.no_grad():
            run.vae.decoder.net[-1].bias.add_(100.0)

    with pytest.raises(DivergenceError, match=r"the ELBO fell to .* in epoch 3") as caught:
        fit(Explosion(), At(explodes, 24))
    assert len(caught.value.history.epoch) == 2
    result = fit(Explosion(), RollBack(), At(explodes, 24))
    assert len(result.history.epoch) == 4


def test_a_schedule_too_short_is_refused_before_the_first_step():
    def one_cycle(steps):
        return Schedule(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps))

    fit(one_cycle(32))
    with pytest.raises(SettingsError, match="OneCycleLR ends after 31 steps, but this training takes 32"):
        fit(one_cycle(31), At(kill))


def every(number):
    callback = pv.callbacks.Callback()
    callback.every = number
    return [callback]


@pytest.mark.parametrize(
    ("callbacks", "sentence"),
    [
        ([EMA], r"EMA is a class; pass an instance"), ([3], "int is not a Callback"), (EMA(), "callbacks is an EMA"),
        (None, "callbacks is a NoneType"), ([EMA()] * 2, "is listed twice"), (every(-2), "every of Callback is -2"),
        (every(2.5), "every of Callback is 2.5"), (every(0), "every of Callback is 0"),
    ],
)  # fmt: skip
def test_what_are_no_callbacks_is_refused(callbacks, sentence):
    with pytest.raises(SettingsError, match=sentence):
        pv.fit(vae_of(), X, callbacks=callbacks, progress=False)


def test_a_stream_is_not_watched():
    with pytest.raises(SettingsError, match=r"validation_data is a stream, .* as its sample\(2048\)"):
        fit(validation_data=pv.data.stream(X.numpy()))


def test_a_run_that_was_stopped_within_an_epoch_is_the_same_when_resumed(tmp_path):
    def stop(run):
        run.stop("enough")

    first = fit(At(stop, 19), checkpoints=tmp_path)
    again = fit(At(stop, 19), resume=tmp_path)
    assert first.history.step.values.tolist() == [8, 16, 19]
    assert again.history.drop_vars("seconds").equals(first.history.drop_vars("seconds"))
    assert torch.equal(flat(first.vae), flat(again.vae))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_rates_of_a_schedule_by_steps_are_those_of_its_steps(engine):
    """A rate of 0 from the eleventh step on, and nothing moves from the eleventh step on."""
    path, rates = [], []

    def look(run):
        path.append(flat(run.vae))
        rates.append(run.optimizer.param_groups[0]["lr"])

    ends = {}
    for scale in (1.0, 0.0):
        path.clear()
        make = lambda o, s=scale: lr_scheduler.LambdaLR(o, lambda t: s if t >= 10 else 1.0)  # noqa: E731
        fit(Schedule(make), At(look), optimizer=sgd(1e-3), engine=engine)
        ends[scale] = torch.stack(path)
    moved = (ends[0.0][1:] - ends[0.0][:-1]).abs().amax(1) > 0
    assert moved.tolist() == [step <= 10 for step in range(2, 33)]
    assert torch.equal(ends[0.0][:10], ends[1.0][:10])
    assert rates[-1] == 0.0


def test_a_plateau_of_the_validation_elbo_lowers_the_rate():
    rates = []

    class Look(pv.callbacks.Callback):
        def epoch(self, run):
            rates.append(run.optimizer.param_groups[0]["lr"])

    plateau = partial(lr_scheduler.ReduceLROnPlateau, patience=2, threshold_mode="abs")
    fit(Look(), optimizer=lambda ps: plateau(SGD(ps, lr=1e-12), threshold=1.0), epochs=8)
    assert rates == pytest.approx([1e-12] * 4 + [1e-13] * 3 + [1e-14], rel=1e-9), "three epochs no better, twice"
    with pytest.raises(SettingsError, match="threshold_mode='abs'"):
        fit(optimizer=lambda ps: lr_scheduler.ReduceLROnPlateau(SGD(ps, lr=1e-3)))


# Where a divergence came from


@pytest.mark.parametrize("engine", ENGINES)
def test_the_row_that_makes_a_loss_infinite_is_named(engine):
    x = X[:ROWS].clone()
    x[37, 2] = 1e30
    with pytest.raises(DivergenceError) as caught:
        fit(x=x, engine=engine)
    message = str(caught.value)
    assert "row 37" in message
    assert "its largest value is 1e+30" in message
    assert "the VAE now has its initial weights" in message


class Root(pv.Conditional):
    """A scale whose square root is of 0 for one row: finite, but with no finite gradient."""

    def __init__(self):
        super().__init__()
        self.net = pv.nn.mlp(FEATURES, [8], 2 * LATENTS)

    def forward(self, x):
        loc, raw = self.net(x).chunk(2, -1)
        nothing = ((x[..., :1] - X[41, 0]) * loc).abs().sqrt() * 1e-3
        return pv.posteriors.DiagNormal(torch.nn.Identity())(torch.cat([loc + nothing, raw], -1))


@pytest.mark.parametrize(("seed", "engine"), [(0, "eager"), (1, "eager"), (2, "eager"), (0, "compiled")])
def test_the_row_that_breaks_a_gradient_is_named_though_its_loss_was_finite(engine, seed):
    with pytest.raises(DivergenceError) as caught:
        fit(vae=vae_of(Root()), engine=engine, seed=seed)
    message = str(caught.value)
    assert "is not finite while the loss is, caused by row 41" in message
    assert "the gradient of guide.encoder.net" in message


def test_a_gradient_broken_in_the_last_step_of_an_epoch_is_found_too():
    """One step an epoch: the loss was finite, and the ELBO after it is not."""
    with pytest.raises(DivergenceError, match=r"the ELBO became nan after step 1 .* caused by row 41"):
        fit(vae=vae_of(Root()), batch_size=ROWS)


# Coarser arithmetic


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_learns_what_float32_learns_and_keeps_its_parameters(engine):
    x, ends = pv.exact.LinearGaussian(2 * torch.randn(FEATURES, LATENTS), torch.zeros(FEATURES), 0.5).sample(400), {}
    for precision in ("float32", "bf16"):
        result = fit(
            x=x, epochs=20, batch_size=40, optimizer=lambda ps: Adam(ps, lr=1e-2), precision=precision, engine=engine
        )
        last = result.history.isel(epoch=-1)
        ends[precision] = last.train_elbo.item(), last.train_elbo_se.item(), result.history.train_elbo.values[0]
        assert {p.dtype for p in result.vae.parameters()} == {torch.float32}
        assert result.history.attrs["precision"] == precision
    assert ends["bf16"][0] != ends["float32"][0]
    learned = ends["float32"][0] - ends["float32"][2]
    assert abs(ends["bf16"][0] - ends["float32"][0]) < 0.1 * learned
    assert learned > 5 * ends["float32"][1], "there was something to learn"
