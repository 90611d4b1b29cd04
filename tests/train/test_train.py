"""``fit``: it reaches known optima, repeats itself, and stops well."""

import math
import signal
from functools import partial
from itertools import count

import numpy as np
import pyro
import pytest
import torch
from helpers.checks import linear_gaussian, small_vae, untimed
from pyro.infer import Trace_ELBO

import pyro_vae as pv
from pyro_vae.cli.demo import linear_check, note_vae
from pyro_vae.errors import DataError, DivergenceError, ModelError, SettingsError
from pyro_vae.evidence.exact import LinearGaussian
from pyro_vae.train import per_datum_elbo

quiet_fit = partial(pv.fit, progress=False, device="cpu")


@pytest.fixture(scope="module")
def digits():
    return pv.data.digits().x.double()


@pytest.mark.slow
def test_a_linear_vae_reaches_probabilistic_pca_on_digits(digits):
    trained, best = linear_check(digits, latents=2)
    assert best == pytest.approx(0.0057067, abs=5e-7)
    assert best - 0.01 < trained < best, "within 0.01 nats per datum, and below"


def linear_vae(variance, latents=16):
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(latents),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(latents, [], 64), scale=math.sqrt(variance)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(64, [], 2 * latents)),
    ).double()


@torch.no_grad()
def kl_per_latent(vae, x):
    q = vae.encoder(x)
    return 0.5 * (q.variance + q.mean**2 - 1 - q.variance.log()).mean(0).sort(descending=True).values


def kept_eigenvalues(x, variance):
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    return eigenvalues[eigenvalues > variance]


# Each variance ordinarily by one way to the optimum, and by the other in the slow run.
SMALL, LARGE = (0.1, 12), (0.3, 4)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize(("variance", "active"), [slow(*SMALL), LARGE])
def test_fit_collapses_the_latents_that_a_fixed_variance_must(digits, variance, active):
    """Latents are active where an eigenvalue of the covariance exceeds s²; their KLs add up to Σ ½ log(λ/s²)."""
    vae = linear_vae(variance)
    for rate, epochs in (2e-2, 100), (1e-2, 100), (3e-3, 100), (3e-4, 40):
        adam = partial(torch.optim.Adam, lr=rate, fused=True)
        quiet_fit(vae, digits, elbo=pv.elbo.TraceMeanField_ELBO(), optimizer=adam, epochs=epochs, batch_size=300)
    kept, kl = kept_eigenvalues(digits, variance), kl_per_latent(vae, digits)
    assert len(kept) == active
    assert int((kl > 0.01).sum()) == active
    assert kl.sum() == pytest.approx(0.5 * (kept / variance).log().sum().item(), rel=0.01)


@pytest.mark.parametrize(("variance", "active"), [slow(*SMALL), slow(*LARGE)])
def test_without_noise_each_kl_is_half_the_log_ratio(digits, variance, active):
    """The exact ELBO maximized by LBFGS: ``½ log(λ/s²)`` for each active latent, to four digits, and 0 for the rest."""
    vae = linear_vae(variance)
    # The ELBO is quadratic in x: 128 points with the mean and covariance of the data stand for all of them.
    root = torch.linalg.cholesky(torch.cov(digits.T, correction=0) + 1e-12 * torch.eye(64)).T * 64**0.5
    points = torch.cat([root, -root]) + digits.mean(0)
    optimizer = torch.optim.LBFGS(vae.parameters(), max_iter=3000, history_size=30, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-9, tolerance_change=1e-14)  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = -LinearGaussian.of(vae).elbo(points, vae.encoder(points)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    kl = kl_per_latent(vae, digits)
    assert (kl[:active] - 0.5 * (kept_eigenvalues(digits, variance) / variance).log()).abs().max() < 5e-5
    assert kl[active:].max() < 5e-5


def test_same_seed_same_numbers():
    data = torch.randn(50, 6)
    first, again, other = (
        quiet_fit(small_vae(), data, validation_data=data[:9], epochs=3, batch_size=20, seed=s) for s in (0, 0, 1)
    )
    numbers = [name for name in first.history.data_vars if name != "seconds"]
    assert first.history[numbers].identical(again.history[numbers])
    assert not np.array_equal(first.history.objective, other.history.objective)


def test_the_callers_random_numbers_are_left_alone():
    vae = small_vae()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    quiet_fit(vae, torch.ones(10, 6), epochs=1, batch_size=5)
    assert torch.equal(torch.rand(3), expected)


def test_history_is_labelled():
    data = torch.randn(50, 6)
    history = quiet_fit(small_vae(), data, validation_data=data[:9], epochs=3, batch_size=20).history
    assert set(history.data_vars) == {
        "objective", "train_elbo", "train_elbo_se", "validation_elbo", "validation_elbo_se", "seconds",
        "validation_below_best", "validation_below_best_se",
    }  # fmt: skip
    assert history.epoch.values.tolist() == [1, 2, 3]
    assert history.step.values.tolist() == [3, 6, 9], "the last, smaller batch is a step too"
    assert history.train_elbo.attrs["units"] == "nats per datum"
    assert history.attrs["estimator"] == "Trace_ELBO"
    assert history.attrs["batch_size"] == 20


def test_the_elbo_of_the_history_is_the_elbo_and_its_error_covers_the_truth():
    model = linear_gaussian()
    data = model.sample(3000)
    frozen = partial(torch.optim.SGD, lr=0.0)
    history = quiet_fit(model.as_vae(diagonal=True), data, optimizer=frozen, epochs=1, batch_size=500).history
    exact = model.elbo(data, model.best_diagonal(data)).mean().item()
    error = history.train_elbo_se.item()
    assert abs(history.train_elbo.item() - exact) < 5 * error
    assert error == pytest.approx(model.log_marginal(data).std().item() / math.sqrt(2048), rel=0.1)
    assert abs(history.objective.item() - exact) < 5 * error


def test_the_objective_weighs_a_smaller_last_batch_by_its_rows():
    """With the exact guide the objective has no noise: it must be the mean over all data, to rounding."""
    model = linear_gaussian()
    data = model.sample(50)
    history = quiet_fit(
        model.as_vae(), data, optimizer=partial(torch.optim.SGD, lr=0.0), epochs=1, batch_size=20
    ).history
    assert history.objective.item() == pytest.approx(model.log_marginal(data).mean().item(), abs=1e-11)


@pytest.mark.parametrize("elbo", [pv.elbo.HandDerivedELBO(2), pv.elbo.TraceMeanField_ELBO(), pv.elbo.note_objective])
def test_any_loss_of_svi_trains(elbo):
    data = linear_gaussian(features=6, latents=3).sample(100).float()
    result = quiet_fit(
        small_vae(), data, elbo=elbo, epochs=15, batch_size=25, optimizer=partial(torch.optim.Adam, lr=1e-2)
    )
    assert result.history.train_elbo[-1] > result.history.train_elbo[0] + 1
    assert result.history.attrs["estimator"] in ("HandDerivedELBO", "TraceMeanField_ELBO", "note_objective")


def test_it_says_where_it_trains_and_shows_the_elbo(capsys):
    pv.fit(small_vae(), torch.randn(40, 6), validation_data=torch.randn(8, 6), epochs=2, batch_size=20, device="cpu")
    shown = capsys.readouterr().err
    assert "Training on CPU (" in shown
    assert "validation" in shown
    assert "epoch 2/2" in shown


def test_a_diverging_rate_stops_at_its_step_and_keeps_the_last_good_weights():
    data, calls = torch.randn(40, 6), []

    class Explodes(torch.optim.SGD):
        """Sound for two epochs of two steps, then infinite."""

        def step(self, closure=None):
            calls.append(1)
            self.param_groups[0]["lr"] = 1e-4 if len(calls) <= 4 else 1e300
            super().step()
            if len(calls) == 4:
                good.update({name: p.detach().clone() for name, p in vae.named_parameters()})

    vae, good = small_vae(), {}
    with pytest.raises(DivergenceError, match=r"at step \d \(epoch 3\).*the weights after epoch 2") as caught:
        quiet_fit(vae, data, optimizer=partial(Explodes, lr=1e-4), epochs=5, batch_size=20)
    assert caught.value.history.sizes["epoch"] == 2
    assert all(torch.equal(good[name], p) for name, p in vae.named_parameters())


def test_divergence_in_the_very_last_step_is_seen():
    vae = small_vae()
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    with pytest.raises(DivergenceError, match="its initial weights"):
        quiet_fit(vae, torch.randn(40, 6), optimizer=partial(torch.optim.SGD, lr=1e300), epochs=1, batch_size=40)
    assert all(torch.equal(before[name], p) for name, p in vae.named_parameters())


def test_ctrl_c_stops_cleanly_and_keeps_what_was_learnt():
    """In the middle of an epoch: the step under way is taken, and none after it."""
    vae, calls = small_vae(), count(1)
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}

    def interrupted_at_step_25(model, guide, *args):
        if next(calls) == 25:
            signal.raise_signal(signal.SIGINT)
        return Trace_ELBO().differentiable_loss(model, guide, *args)

    result = quiet_fit(vae, torch.randn(100, 6), elbo=interrupted_at_step_25, epochs=100_000, batch_size=10)
    assert result.interrupted
    assert result.history.step.values.tolist() == [10, 20, 25]
    assert any(not torch.equal(before[name], p) for name, p in vae.named_parameters())


def with_memory():
    """A VAE whose encoder has running means and drops out."""
    vae = small_vae()
    layers = [torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5), *vae.encoder.net]
    vae.encoder = pv.posteriors.DiagNormal(torch.nn.Sequential(*layers)).double()
    return vae


def test_looking_at_a_model_with_memory_changes_nothing_and_drops_nothing():
    x = 5 + torch.randn(40, 6).double()
    vae = with_memory()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    vae.check(x)
    first, second = per_datum_elbo(vae, x[:1]), untimed(pv.compare_elbos(vae, x, draws=2))
    assert second.identical(untimed(pv.compare_elbos(vae, x, draws=2)))
    pv.to_datatree(vae, x, draws=2)
    assert first.shape == (1,)
    assert not first.requires_grad
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    assert all(part.training for part in vae.modules()), "and it is left in training mode"
    ends = []
    for validation in (None, 100 + x):
        trained = with_memory()
        quiet_fit(trained, x, validation_data=validation, epochs=2, batch_size=10)
        ends.append(trained.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not torch.equal(ends[0]["guide.encoder.net.0.running_mean"], before["guide.encoder.net.0.running_mean"])


def test_each_epoch_visits_every_datum_once_in_a_new_order():
    seen = []

    class Spy(pv.elbo.Trace_ELBO):
        def loss_and_grads(self, model, guide, x, size):
            seen.append(x[:, 0].tolist())
            return super().loss_and_grads(model, guide, x, size)

    data = torch.arange(60.0).reshape(10, 6)
    quiet_fit(small_vae(), data, elbo=Spy(), epochs=2, batch_size=4)
    epochs = [[value for batch in part for value in batch] for part in (seen[:3], seen[3:])]
    assert [len(batch) for batch in seen] == [4, 4, 2] * 2
    assert all(sorted(epoch) == data[:, 0].tolist() for epoch in epochs)
    assert epochs[0] != epochs[1] != data[:, 0].tolist() != epochs[0]


def test_frozen_parameters_do_not_decay():
    vae = small_vae()
    vae.guide.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    adamw = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    quiet_fit(vae, torch.randn(20, 6), optimizer=adamw, epochs=1, batch_size=5)
    moved = {name for name, p in vae.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name in before if name.startswith("model")}


def test_it_trains_where_gradients_are_off_around_it():
    vae = small_vae()
    before = vae.decoder.net[0].weight.detach().clone()
    with torch.no_grad():
        quiet_fit(vae, torch.randn(20, 6), epochs=1)
    assert not torch.equal(before, vae.decoder.net[0].weight)
    with torch.inference_mode(), pytest.raises(SettingsError, match="inference mode"):
        quiet_fit(small_vae(), torch.randn(20, 6), epochs=1)


def test_few_data_make_one_batch():
    assert quiet_fit(small_vae(), torch.randn(20, 6), epochs=1).history.attrs["batch_size"] == 20
    assert quiet_fit(small_vae(), torch.randn(200, 6), epochs=1).history.attrs["batch_size"] == 128


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0; it must be from 1 to the number of training data, 20"),
        ({"batch_size": 21}, "batch_size is 21"),
        ({"epochs": 2.5}, "epochs is 2.5; it must be a whole number"),
        ({"seed": 2**64}, "between -2\\*\\*62"),
        ({"elbo": pyro.infer.RenyiELBO(alpha=0, num_particles=2)}, "RenyiELBO is not a bound on minibatches"),
        ({"elbo": pv.elbo.Trace_ELBO(num_particles=0)}, "num_particles is 0"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS needs a closure"),
        ({"device": "meta"}, "device meta is not available"),
        ({"device": "cuda:99"}, "device cuda:99 is not available"),
        ({"device": "nonsense"}, "device nonsense is not available"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(SettingsError, match=message):
        pv.fit(small_vae(), torch.randn(20, 6), **{"epochs": 1, "batch_size": 5, "progress": False, **settings})


@pytest.mark.parametrize(
    ("data", "validation", "error", "message"),
    [
        (torch.randn(20, 5), None, ModelError, "the encoder was given rows of 5 numbers and was built for 6"),
        (torch.randn(20, 6), torch.randn(4, 7), ModelError, "rows of 7 numbers and was built for 6"),
        (torch.full((20, 6), math.nan), None, DataError, "120 of 120 values are not finite"),
        (torch.randn(20, 6), torch.full((2, 6), math.inf), DataError, r"validation data: 12 of 12 values.*\(inf"),
        (torch.randn(20), None, DataError, "one row per datum"),
        ([[1, 2], [3]], None, DataError, "differ in length"),
        (np.array([["a", "b"]]), None, DataError, "give real numbers"),
    ],
)
def test_data_that_do_not_fit(data, validation, error, message):
    with pytest.raises(error, match=message):
        quiet_fit(small_vae(), data, validation_data=validation, epochs=1, batch_size=2)


def test_nothing_to_train_is_refused():
    with pytest.raises(SettingsError, match="every parameter of the VAE is frozen"):
        quiet_fit(small_vae().requires_grad_(False), torch.randn(20, 6), epochs=1)


def test_parts_that_do_not_fit_each_other():
    x = torch.randn(20, 6)
    vae = small_vae()
    vae.prior = pv.priors.StandardNormal(4).double()
    with pytest.raises(ModelError, match=r"latents of shape \(3,\), the prior has shape \(4,\)"):
        vae.check(x)
    vae = small_vae()
    vae.decoder = small_vae(features=5).decoder
    with pytest.raises(ModelError, match=r"data of shape \(5,\), a row of the data has shape \(6,\)"):
        vae.check(x)
    vae = small_vae()
    vae.decoder = small_vae(latents=2).decoder
    with pytest.raises(ModelError, match="the decoder was given rows of 3 numbers and was built for 2"):
        vae.check(x)
    with pytest.raises(ModelError, match="the prior is an int"):
        pv.VAE(prior=3, decoder=vae.decoder, encoder=vae.encoder)


def test_per_datum_elbo_is_exact_for_the_exact_guide():
    model = linear_gaussian()
    x = model.sample(7)
    chunked = per_datum_elbo(model.as_vae(), x, num_particles=3, chunk=2)
    assert (chunked - model.log_marginal(x)).abs().max() < 1e-11


def test_the_demo_model_is_the_notes():
    assert isinstance(LinearGaussian.of(note_vae(6, 2, [])), LinearGaussian)
