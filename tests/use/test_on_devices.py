"""What is made of a table's rows is exact on a CPU and on a GPU; the same tests are rehearsed on the CPU."""

import numpy as np
import pytest
import torch

import pyro_vae as pv


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device(request.param)


@pytest.fixture
def linear():
    """A linear-Gaussian model and rows of it, which lie in main memory."""
    torch.manual_seed(0)
    model = pv.exact.LinearGaussian(torch.randn(6, 2).double(), torch.arange(6).double(), 0.5)
    return model, model.sample(50)


def z_scores(found, name, exact):
    return np.abs((found[name] - exact.numpy()) / found[f"{name}_mcse"]).values


def test_encode(linear, device):
    model, x = linear
    found = pv.encode(model.as_vae().to(device), x)
    assert found.z.values == pytest.approx(model.posterior(x).mean.numpy(), abs=1e-9)


def test_score(linear, device):
    model, x = linear
    found = pv.score(model.as_vae().to(device), x, num_particles=30, draws=2)
    assert found.log_px.values == pytest.approx(model.log_marginal(x).numpy(), abs=1e-9)


def test_reconstruct(linear, device):
    model, x = linear
    found = pv.reconstruct(model.as_vae().to(device), x, draws=400)
    assert z_scores(found, "x", model.posterior(x).mean @ model.weight.T + model.bias).max() < 5


def test_impute(linear, device):
    """The first value given the other five: by regression on the exact covariance."""
    model, x = linear
    covariance = model.weight @ model.weight.T + model.scale**2 * torch.eye(6).double()
    gain = torch.linalg.solve(covariance[1:, 1:], covariance[1:, 0])
    mask = torch.arange(6) > 0
    found = pv.impute(model.as_vae(diagonal=True).to(device), x, mask=mask.expand_as(x))
    exact = model.bias[0] + (x - model.bias)[:, 1:] @ gain
    assert np.abs(found.x.values - x.numpy())[:, 1:].max() < 1e-12, "what is observed stays"
    assert z_scores(found.isel(feature=0), "x", exact).max() < 5
    assert z_scores(found.isel(feature=0), "x", x[:, 0]).max() > 5, "power"


def test_sample(linear, device):
    model, _ = linear
    x = torch.from_numpy(pv.sample(model.as_vae().to(device), 4000).x.values)
    covariance = model.weight @ model.weight.T + model.scale**2 * torch.eye(6).double()
    assert ((x.mean(0) - model.bias) / (covariance.diagonal() / len(x)).sqrt()).abs().max() < 5
    assert (x.var(0) / covariance.diagonal() - 1).abs().max() < 5 * (2 / len(x)) ** 0.5


def test_a_walk(linear, device):
    model, x = linear
    found = pv.interpolate(model.as_vae().to(device), x[:1], x[1:2], steps=3)
    ends = model.posterior(x[:2]).mean @ model.weight.T + model.bias
    assert found.x.values[[0, -1]] == pytest.approx(ends.numpy(), abs=0.5)


def test_a_transformer(linear, device):
    """Fitted on the device, it encodes and decodes a table in main memory."""
    x = linear[1].float().numpy()
    settings = {"n_components": 2, "hidden": (16,), "epochs": 150, "random_state": 0}
    fitted = pv.sklearn.VAETransformer(**settings, device=str(device)).fit(x)
    assert next(fitted.vae_.parameters()).device.type == device.type
    again = fitted.inverse_transform(fitted.transform(x))
    assert ((again - x) ** 2).sum() < 0.5 * ((x - x.mean(0)) ** 2).sum(), "it explains more than half of the variance"
