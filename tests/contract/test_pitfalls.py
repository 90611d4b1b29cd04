"""Where Pyro, torch and ArviZ bite a VAE library: each is held by a test named after the bite.

The tests show the bite first, where it can be shown, so that they say when upstream has mended it.
"""

import ast
import copy
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.checks import StudentPrior, beta_on_the_model, linear_gaussian, loss_and_gradients, small_vae, z_score
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam

import pyro_vae as pv
from pyro_vae.elbo import AnalyticKL, HandDerivedELBO, kl_provenance, log_weights
from pyro_vae.errors import ModelError, SettingsError

PACKAGE = Path(pv.__file__).parent


def weights(vae):
    return {name: p.detach().clone() for name, p in vae.named_parameters()}


def moved(before, vae):
    return {name for name, p in vae.named_parameters() if not torch.equal(before[name], p)}


def test_01_a_sampled_kl_is_said_and_can_be_refused():
    vae, x = small_vae(), torch.randn(5, 6).double()
    vae.prior = StudentPrior(3).double()
    values = {loss_and_gradients(TraceMeanField_ELBO(), vae, x, seed=s)[0].item() for s in range(2)}
    assert len(values) == 2, "Pyro samples it without a warning (which would be an error here)"
    assert kl_provenance(vae.model, vae.guide, x) == {"z": "Monte Carlo"}
    kl = pv.compare_elbos(small_vae(), x, draws=2).kl.values.tolist()
    assert kl == ["Monte Carlo", "analytic", "by hand"] + 4 * ["Monte Carlo"]
    with pytest.raises(ModelError, match="Normal from StudentT at site z has no closed form"):
        AnalyticKL().loss(vae.model, vae.guide, x)
    AnalyticKL(strict=False).loss(vae.model, vae.guide, x)
    fine = small_vae()
    strict, _ = loss_and_gradients(AnalyticKL(num_particles=3), fine, x, 50)
    pyros = TraceMeanField_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    assert strict.item() == pytest.approx(loss_and_gradients(pyros, fine, x, 50)[0].item(), abs=1e-11)


def test_02_a_scale_on_the_models_latent_alone_is_refused():
    vae, x = small_vae(), torch.randn(5, 6).double()
    model = beta_on_the_model(vae, 0.1)

    def value(loss, guide):
        torch.manual_seed(1)
        return loss.differentiable_loss(model, guide, x).item()

    assert abs(value(Trace_ELBO(num_particles=500), vae.guide) - value(TraceMeanField_ELBO(500), vae.guide)) > 1
    for strict in AnalyticKL(), HandDerivedELBO():
        with pytest.raises(ModelError, match=r"scaled by 0\.1 in the model and by 1\.0 in the guide"):
            value(strict, vae.guide)

    def guide(x, size=None):
        with pyro.plate("data", len(x), subsample=x), pyro.poutine.scale(scale=0.1):
            pyro.sample("z", vae.encoder(x))

    by_hand = value(HandDerivedELBO(), guide)
    assert by_hand == pytest.approx(value(AnalyticKL(), guide), abs=1e-12)
    assert by_hand == pytest.approx(value(TraceMeanField_ELBO(), guide), abs=1e-12)


class RowByRow(pv.Conditional):
    """A guide with a μ and σ of its own for every row, so that one gradient holds one draw per row."""

    def __init__(self, loc, scale, rows):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.full((rows, 1), loc, dtype=torch.float64))
        self.log_scale = torch.nn.Parameter(torch.full((rows, 1), scale, dtype=torch.float64).log())

    def forward(self, x):
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


def test_05_sticking_the_landing_has_no_gradient_at_the_exact_posterior():
    """Closed forms, a = |w|²/s²: the μ-gradient has variance 1 + a in Trace_ELBO, a²/(1 + a) with the analytic KL."""
    a, rows, model = 4.0, 40_000, pv.exact.LinearGaussian(torch.ones(4, 1).double(), torch.zeros(4).double(), 1.0)
    x = model.sample(1)
    exact = model.posterior(x)

    def gradients(loss, shift=0.0):
        vae = model.as_vae()
        vae.encoder = RowByRow(exact.mean.item() + shift, exact.stddev.item(), rows)
        found = loss_and_gradients(loss, vae, x.expand(rows, 4), seed=int(10 * shift))[1]
        return found["guide.encoder.loc"].squeeze(), found["guide.encoder.log_scale"].squeeze()

    path = lambda m, g, x, _: -log_weights(m, g, x, path_gradient=True).sum()  # noqa: E731
    plain = lambda m, g, x, _: -log_weights(m, g, x).sum()  # noqa: E731
    assert max(g.abs().max() for g in gradients(path)) < 1e-12
    for loss, variance in (plain, 1 + a), (Trace_ELBO(), 1 + a), (TraceMeanField_ELBO(), a**2 / (1 + a)):
        by_mu = gradients(loss)[0]
        assert abs(z_score(by_mu**2, variance)) < 5
        assert abs(z_score(by_mu**2, 1.1 * variance)) > 5, "power: 10 % more variance is seen"
    assert abs(z_score(gradients(path, 0.4)[0], 0.0)) > 5, "away from the landing it is not zero"
    same = zip(gradients(path, 0.4), gradients(plain, 0.4), strict=True)
    assert all(abs(z_score(landed - usual, 0.0)) < 5 for landed, usual in same), "but unbiased"


def trained(vae, x, steps=60):
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(steps)]
    return sum(losses[-10:]) < sum(losses[:10])


def test_08_every_vae_trains_its_own_weights():
    """Three in one process, one after the other, the third a deep copy of the trained first."""
    x = linear_gaussian(features=6, latents=3).sample(50)
    first, second = small_vae(seed=1), small_vae(seed=2)
    vaes = [first, second]
    for vae in (first, second, None):
        if vae is None:
            vaes.append(vae := copy.deepcopy(first))
        before = {id(v): weights(v) for v in vaes}
        assert trained(vae, x)
        assert moved(before[id(vae)], vae) == set(before[id(vae)]), "all of its weights"
        for other in vaes:
            assert other is vae or not moved(before[id(other)], other)
    assert len(pyro.get_param_store()) == 3 * len(list(first.parameters()))


def test_08_pyro_module_would_train_nothing():
    """The bite itself: a second module under one name trains the first one's weights."""
    first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    pyro.module("net", first)
    pyro.module("net", second)
    assert pyro.get_param_store()["net$$$weight"].unconstrained() is first.weight


def test_08_a_replaced_parameter_is_the_one_that_trains():
    x, vae = torch.randn(20, 6).double(), small_vae()
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(x)
    layer = vae.encoder.net[0]
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    before = weights(vae)
    svi.step(x)
    assert moved(before, vae) == set(before)


def test_08_parameters_of_vaes_that_are_gone_leave_the_store():
    x = torch.randn(20, 6).double()
    for seed in range(5):
        trained(small_vae(seed=seed), x, steps=2)
    last = small_vae()
    trained(last, x, steps=2)
    assert len(pyro.get_param_store()) <= 2 * len(list(last.parameters()))


def test_08_an_encoder_shared_by_two_vaes_trains_from_both():
    x, first = torch.randn(20, 6).double(), small_vae()
    second = pv.VAE(prior=first.prior, decoder=small_vae(seed=5).decoder, encoder=first.encoder)
    trained(first, x, 2)
    before = weights(second)
    trained(second, x, 2)
    assert moved(before, second) == set(before)
    del first
    trained(small_vae(seed=9), x, 2)
    before = weights(second)
    trained(second, x, 2)
    assert moved(before, second) == set(before)


def test_08_frozen_parameters_stay_and_make_no_noise():
    x, vae = torch.randn(20, 6).double(), small_vae()
    vae.model.requires_grad_(False)
    before = weights(vae)
    trained(vae, x, 3)
    assert moved(before, vae) == {name for name in before if name.startswith("guide")}


def test_08_a_parameter_that_pyro_would_copy_is_refused():
    vae = small_vae()
    vae.encoder.net[0].weight = torch.nn.Parameter(torch.randn(6, 8).double().T)
    with pytest.raises(ModelError, match=r"encoder\.net\.0\.weight is not contiguous"):
        Trace_ELBO().loss(vae.model, vae.guide, torch.randn(5, 6).double())


def test_09_the_plate_scales_by_n_over_m_and_never_draws_its_own_subset():
    vae, x = small_vae(), torch.randn(5, 6).double()
    trace = pyro.poutine.trace(vae.model).get_trace(x, 65)
    assert trace.nodes["x"]["scale"] == trace.nodes["z"]["scale"] == 13
    assert pyro.poutine.trace(vae.guide).get_trace(x, 65).nodes["z"]["scale"] == 13
    assert pyro.poutine.trace(vae.model).get_trace(x).nodes["x"]["scale"] == 1
    assert trace.nodes["x"]["value"] is x, "the rows given, all of them, in their order"
    with pytest.raises(SettingsError, match="size is 4 but the batch has 5 rows"):
        vae.model(x, 4)


def test_10_fit_steps_one_optimizer_over_all_parameters():
    vae, made = small_vae(learn_scale=True), []

    def optimizer(parameters):
        made.append(torch.optim.Adam(parameters, lr=1e-2))
        return made[-1]

    pv.fit(vae, torch.randn(20, 6), optimizer=optimizer, epochs=2, batch_size=5, progress=False, device="cpu")
    assert len(made) == 1
    assert {id(p) for p in made[0].param_groups[0]["params"]} == {id(p) for p in vae.parameters()}
    assert all(state["step"] == 8 for state in made[0].state.values()), "4 batches an epoch, one step each"


def calls_in(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    imports = {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
    }
    return names | imports


def test_10_nothing_in_the_package_unpickles():
    unpickling = ("torch.load", "torch.save", "pickle", "cloudpickle", "joblib.load", "joblib.dump", "joblib.Memory")
    forbidden = (*unpickling, "shelve", "marshal")
    between_processes = PACKAGE / "train" / "distributed" / "launch.py"  # by pipes to workers of one training; no file
    for path in PACKAGE.rglob("*.py"):
        found = {name for name in calls_in(path) if name.startswith(forbidden) or "param_store().load" in name}
        assert not found or (path == between_processes and found <= {"pickle", "pickle.dumps", "pickle.loads"}), path
        assert "allow_pickle=True" not in path.read_text(encoding="utf-8")
    assert "np.load" in calls_in(PACKAGE / "data" / "readers.py"), "power: the walk sees calls"


def test_11_watching_validation_data_changes_nothing():
    data, held_out = torch.randn(64, 6), torch.randn(20, 6)
    runs = []
    for validation in (None, held_out):
        vae = small_vae()
        result = pv.fit(vae, data, validation_data=validation, epochs=3, batch_size=16, progress=False, device="cpu")
        runs.append((weights(vae), result.history.objective.values.tolist()))
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(runs[0][0][name], runs[1][0][name]) for name in runs[0][0])
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(held_out.double())
    before = weights(vae)
    svi.step(held_out.double())
    assert moved(before, vae), "the bite: evaluating with svi.step trains"


def test_13_gradients_by_torch_func_work():
    """``pyro.module`` calls ``requires_grad_`` inside the transform, which fails."""
    vae, x = small_vae(), torch.randn(5, 6).double()
    module = HandDerivedELBO()(vae.model, vae.guide)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters):
        torch.manual_seed(1)
        return torch.func.functional_call(module, parameters, (x,))

    by_func = torch.func.grad(loss)(parameters)
    _, by_autograd = loss_and_gradients(HandDerivedELBO(), vae, x)
    assert all((by_func[name] - by_autograd[name]).abs().max() < 1e-12 for name in by_autograd)


def test_14_the_posterior_predictive_is_not_the_data():
    vae, x = linear_gaussian().as_vae(), linear_gaussian().sample(30)
    bitten = Predictive(vae.model, guide=vae.guide, num_samples=3)(x)["x"]
    assert torch.equal(bitten[0], x), "the bite: Pyro's predictive given x is x"
    tree = pv.to_datatree(vae, x, draws=2000)
    drawn = torch.as_tensor(tree["posterior_predictive"]["x"].values)[0]
    assert (drawn != x).all()
    # Exactly, x̃ has mean W E[z|x] + b and covariance W A⁻¹ Wᵀ + s² I.
    model = linear_gaussian()
    mean = model.posterior(x).mean @ model.weight.T + model.bias
    variance = (model.weight @ model.precision.inverse() @ model.weight.T).diagonal() + model.scale**2
    z = (drawn.mean(0) - mean) / (variance / 2000).sqrt()
    assert z.abs().max() < 5
    assert ((drawn.mean(0) - x) / (variance / 2000).sqrt()).abs().max() > 5, "power"
    assert ((drawn.var(0) / variance).mean() - 1).abs() < 5 * (2 / 2000 / 150) ** 0.5 * 3


def best_mean_field_log_weights(rho, draws, repeats):
    """Log-weights of the best mean-field q for a bivariate normal of correlation ρ: q has variances 1 - ρ²."""
    precision = torch.tensor([[1.0, -rho], [-rho, 1.0]]).double() / (1 - rho**2)
    z = (1 - rho**2) ** 0.5 * torch.randn(draws, repeats, 2).double()
    log_p = -0.5 * torch.einsum("...i,ij,...j", z, precision, z)
    return log_p + 0.5 * (z**2).sum(-1) / (1 - rho**2)


@pytest.mark.parametrize(("rho", "expected"), [(0.5, 0.479), (0.7, 0.647)])
def test_16_khat_of_the_best_mean_field_q_is_the_correlation(rho, expected):
    khat = pv.diagnose.psis(best_mean_field_log_weights(rho, 4000, 20))[1]
    assert khat.shape == (20,)
    assert abs(khat.mean() - expected) < 0.1


def test_16_khat_has_the_right_sign():
    """q with variance v against N(0, 1): weights exp(z² (1/v - 1) / 2) have a tail of k = 1 - v."""
    v = 0.4
    z = v**0.5 * torch.randn(4000, 20).double()
    log_weights = 0.5 * z**2 * (1 / v - 1)
    assert abs(pv.diagnose.psis(log_weights)[1].mean() - (1 - v)) < 0.1
    assert pv.diagnose.psis(-log_weights)[1].mean() < -0.5, "the bite: with the other sign all looks well"


def test_18_a_bare_torch_distribution_is_refused_by_name():
    class Bare(torch.nn.Module):
        def forward(self, x):
            return torch.distributions.Normal(x[..., :3], 1.0)

    vae = small_vae()
    vae.encoder = Bare()
    with pytest.raises(ModelError, match=r"the encoder returned torch\.distributions\.normal\.Normal"):
        Trace_ELBO().loss(vae.model, vae.guide, torch.randn(5, 6).double())
    vae.encoder = small_vae().encoder
    assert isinstance(vae.encoder(torch.randn(5, 6).double()), dist.Distribution)


def test_22_arviz_imports_and_reads_what_we_make():
    """In a fresh process, where warnings are errors: the tested set holds together."""
    code = (
        "from pyro_vae.core.arviz import az, array_stats; assert callable(az.summary) and callable(array_stats.psislw)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
    from pyro_vae.core.arviz import az

    vae, x = linear_gaussian().as_vae(), linear_gaussian().sample(2)
    summary = az.summary(pv.to_datatree(vae, x, draws=50), var_names=["z"], kind="stats")
    assert len(summary) == 2 * 2, "a row per datum and latent"


def test_24_timings_say_their_threads_and_are_medians_of_turns(monkeypatch):
    from pyro_vae.compare import cost

    table = pv.compare_elbos(small_vae(), torch.randn(5, 6), draws=2)
    assert table.attrs["threads"] == 1, "a small network is evaluated by one, however many torch has"
    assert {"torch", "pyro", "pyro_vae", "python", "device"} <= set(table.attrs)
    # A clock whose 20th interval is a disturbance of an hour: a median does not see it, a mean would.
    ticks = iter(range(10_000))
    monkeypatch.setattr(cost.time, "perf_counter", lambda: (t := next(ticks)) + 3600 * (t > 38))
    seconds = pv.compare_elbos(small_vae(), torch.randn(5, 6), draws=2).seconds.values
    assert (seconds == 1).all()
