"""``fit`` by either engine."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers.engine_checks import BATCH, X, adam, apart, vae_of
from helpers.members import FEATURES, LATENTS
from torch import nn

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.errors import CompileError, DivergenceError, SettingsError
from pyro_vae.train.compiled import steps


def quiet_fit(vae, x, **kwargs):
    return pv.fit(vae, x, progress=False, **{"batch_size": BATCH, "epochs": 3, **kwargs})


@pytest.fixture
def traced_only(monkeypatch):
    """``fit`` replays the trace without compiling it, which takes no time."""
    monkeypatch.setattr(steps, "CompiledSVI", partial(pv.CompiledSVI, backend="eager"))


SETTINGS = {
    "plain": {},
    "clipped": {"clip_norm": 1.0},
    "a schedule": {"optimizer": lambda ps: torch.optim.lr_scheduler.ExponentialLR(adam(ps), 0.5)},
    "analytic KL": {"elbo": pv.elbo.AnalyticKL()},
    "context and mask": {"context": X[:, :2], "mask": X > -1},
}


ORDINARY = ["plain", "context and mask"]


@pytest.mark.parametrize("name", [n if n in ORDINARY else pytest.param(n, marks=pytest.mark.slow) for n in SETTINGS])
def test_fit_gives_the_same_by_both_engines(name, traced_only):
    results = {}
    for engine in ("eager", "compiled"):
        context = 2 if name == "context and mask" else 0
        torch.manual_seed(0)
        vae = pv.VAE(
            prior=pv.priors.StandardNormal(LATENTS),
            decoder=pv.likelihoods.Normal(pv.nn.mlp(LATENTS + context, [8], FEATURES), learn_scale=True),
            encoder=pv.posteriors.DiagNormal(pv.nn.mlp(FEATURES + context, [8], 2 * LATENTS)),
        ).double()
        result = quiet_fit(vae, X, engine=engine, **SETTINGS[name])
        assert result.history.attrs["engine"] == engine
        results[engine] = result.history, dict(vae.named_parameters())
    (eager, parameters), (compiled, own) = results["eager"], results["compiled"]
    for column in ("objective", "train_elbo"):
        assert eager[column].values == pytest.approx(compiled[column].values, rel=1e-10)
    assert apart({n: p.detach() for n, p in parameters.items()}, {n: p.detach() for n, p in own.items()}) < 1e-10


def test_a_last_batch_that_is_scaled_wrong_is_seen(traced_only, monkeypatch):
    original = steps.RowArguments.__call__

    def wrong(self, *batch):
        args, kwargs = original(self, *batch)
        return (args[0], args[1] if len(args[0]) == BATCH else BATCH, *args[2:]), kwargs

    monkeypatch.setattr(steps.RowArguments, "__call__", wrong)
    with pytest.raises(AssertionError):
        test_fit_gives_the_same_by_both_engines("plain", None)


@pytest.mark.slow
def test_fit_compiled_by_inductor_gives_the_same():
    histories = [quiet_fit(vae_of(), X, engine=engine, batch_size=20).history for engine in ("eager", "compiled")]
    assert histories[0].train_elbo.values == pytest.approx(histories[1].train_elbo.values, rel=1e-10)


def test_auto_compiles_where_enough_steps_are_left(traced_only, monkeypatch, capsys):
    assert 8000 < steps.steps_that_pay(2e-3) < 20_000
    short = pv.fit(vae_of(), X, epochs=30, batch_size=BATCH)
    assert short.history.attrs["engine"] == "eager"
    assert short.history.attrs["engine_reason"] == "too few steps for compiling to pay"
    assert "ompil" not in capsys.readouterr().err
    monkeypatch.setattr(steps, "COMPILE_SECONDS", 1e-3)
    long = pv.fit(vae_of(), X, epochs=30, batch_size=BATCH)
    assert long.history.attrs["engine"] == "compiled"
    assert "steps of" in long.history.attrs["engine_reason"]
    assert "Compiling the training step" in capsys.readouterr().err
    assert short.history.train_elbo.values == pytest.approx(long.history.train_elbo.values, rel=1e-10)


class Looking(nn.Module):
    """A layer that looks at a value."""

    def forward(self, x):
        return x if x.sum() > -1e9 else 0 * x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": lambda ps: torch.optim.RMSprop(ps, lr=1e-3)}, "the optimizer is RMSprop"),
        ({}, r"at test_engine_\w+.py:\d+: Python reads the value"),
    ],
    ids=["optimizer", "model"],
)
def test_fit_goes_on_uncompiled_and_says_why(change, message, traced_only, monkeypatch, capsys):
    def vae():
        made = vae_of()
        if not change:
            made.encoder.net = nn.Sequential(Looking(), made.encoder.net)
        return made

    eager = quiet_fit(vae(), X, epochs=30, engine="eager", **change).history
    monkeypatch.setattr(steps, "COMPILE_SECONDS", 1e-3)
    result = pv.fit(vae(), X, epochs=30, batch_size=BATCH, **change)
    said = " ".join(capsys.readouterr().err.split())
    assert "Training continues without compiling: the " in said
    with pytest.raises((CompileError, SettingsError), match=message):
        quiet_fit(vae(), X, engine="compiled", **change)
    assert result.history.attrs["engine"] == "eager"
    assert result.history.train_elbo.values.tolist() == eager.train_elbo.values.tolist(), "exactly: it is the same code"


def test_a_divergence_is_found_at_its_step(traced_only):
    def explodes(parameters):
        return torch.optim.SGD(parameters, lr=1e3)

    messages = []
    for engine in ("eager", "compiled"):
        with pytest.raises(DivergenceError) as caught:
            quiet_fit(vae_of(), X, engine=engine, optimizer=explodes, epochs=20)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(("kwargs", "message"), [({"engine": "fast"}, "engine is 'fast'"), ({"clip_norm": 0}, "clip_")])
def test_fit_refuses_settings_of_the_engine(kwargs, message):
    with pytest.raises(SettingsError, match=message):
        quiet_fit(vae_of(), X, **kwargs)


@pytest.mark.slow
def test_the_command_line_takes_an_engine(tmp_path, monkeypatch, traced_only):
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", X.numpy())
    flags = ["fit", "--data", "data.npy", "--out", "run", "--epochs", "2", "--latent_dim", "2", "--hidden", "[4]"]
    assert main([*flags, "--engine", "compiled"]) == 0
    assert "engine: compiled" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.slow
def test_bf16_is_compiled_for_networks_of_a_usual_size():
    """Gradients of 128 rows in bfloat16 differ by more than single precision's rounding."""
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(8), decoder=pv.likelihoods.Bernoulli(pv.nn.mlp(8, [128], 64)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(64, [128], 16)),
    )  # fmt: skip
    x = (pv.data.split(pv.data.digits())[0].x > 0.5).float()
    settings = {"engine": "compiled", "precision": "bf16", "progress": False, "device": "cpu"}
    history = pv.fit(vae, x, epochs=5, batch_size=128, **settings).history
    assert history.attrs["engine"] == "compiled"
    assert history.objective[-1] > history.objective[0] + 1
