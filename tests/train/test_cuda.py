"""The demo's training on a GPU agrees with the CPU; the same machinery is tried on the CPU in two precisions."""

from functools import partial

import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.poutine.messenger import Messenger

import pyro_vae as pv
from pyro_vae.cli.demo import note_vae
from pyro_vae.train.compiled.optimizers import WholeOptimizer


class GivenNoise(Messenger):
    """Samples z with noise drawn beforehand: the generators of CPU and GPU give different numbers."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg):
        if msg["name"] == "z" and not msg["done"]:
            normal = msg["fn"].base_dist
            msg["value"] = normal.loc + normal.scale * self.noise
            msg["done"] = True


def losses_of_the_demo(device, dtype, steps=50):
    """Per datum, in the first steps of the demo's training by SVI."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(steps, 128, 8, generator=generator).to(device, dtype)
    data = pv.data.digits().x[:1408].to(device, dtype)
    torch.manual_seed(0)
    vae = note_vae(64, 8, [128]).to(device, dtype)
    svi = SVI(vae.model, vae.guide, WholeOptimizer(torch.optim.Adam(vae.parameters(), lr=2e-3)), Trace_ELBO())
    losses = []
    for step in range(steps):
        with GivenNoise(noise[step]):
            losses.append(svi.step(data.roll(-128 * step, 0)[:128], len(data)) / len(data))
    return losses


def test_single_precision_trains_as_double_does():
    single, double = (losses_of_the_demo("cpu", dtype) for dtype in (torch.float32, torch.float64))
    assert single == pytest.approx(double, rel=1e-4)
    assert single != double, "power: they are different computations"
    assert double[-1] < double[0] - 10, "and it trains"


@pytest.mark.cuda
def test_cuda_trains_as_the_cpu_does(cuda):
    on_cpu, on_cuda = (losses_of_the_demo(device, torch.float32) for device in ("cpu", "cuda"))
    assert on_cuda == pytest.approx(on_cpu, rel=1e-4)


@pytest.mark.cuda
def test_cuda_fit_reaches_the_same_elbo(cuda):
    """Other random numbers on each device, so the ELBOs agree within their errors and not to rounding."""
    train, test = pv.data.split(pv.data.digits())
    final = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        adam = partial(torch.optim.Adam, lr=2e-3, fused=True)
        result = pv.fit(
            note_vae(64, 8, [128]), train.x, validation_data=test.x, epochs=50, optimizer=adam, device=device,
            progress=False,
        )  # fmt: skip
        last = result.history.isel(epoch=-1)
        final[device] = last.validation_elbo.item(), last.validation_elbo_se.item()
        assert result.device.startswith(device.upper())
    assert abs(final["cpu"][0] - final["cuda"][0]) < 5 * (final["cpu"][1] ** 2 + final["cuda"][1] ** 2) ** 0.5


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_cuda_compares_to_rounding(cuda, dtype, bound):
    vae = pv.exact.LinearGaussian(torch.randn(6, 2), torch.zeros(6), 0.5).as_vae(diagonal=True).to(cuda, dtype)
    table = pv.compare_elbos(vae, torch.randn(9, 6), draws=3)
    assert table.sel(estimator="TraceMeanField_ELBO").difference < bound
    assert table.attrs["device"].startswith("CUDA")
