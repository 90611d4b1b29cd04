"""Small networks are evaluated by one thread, wherever that is done; large ones by as many as torch is set to."""

import pytest
import torch
from helpers.checks import small_vae

import pyro_vae as pv
from pyro_vae.core.threads import SMALL_STEP, threads_for_evaluations, threads_for_operations
from pyro_vae.diagnose.importance import khat
from pyro_vae.elbo.per_datum import per_datum_elbo

LOOPS = {
    "evaluation": lambda vae, x: per_datum_elbo(vae, x),
    "comparison": lambda vae, x: pv.compare_elbos(vae, x, {"STL": pv.elbo.STL()}, particles=(2,), draws=2),
    "evidence": lambda vae, x: pv.log_evidence(vae, x, num_particles=25),
    "annealing": lambda vae, x: pv.log_evidence(vae, x, method="ais", num_particles=2, temperatures=2, leapfrog=1),
    "weights": lambda vae, x: khat(vae, x, num_particles=25),
    "calibration": lambda vae, x: pv.diagnose.sbc(vae, simulations=20, draws=9),
    "collapse": lambda vae, x: pv.diagnose.collapse(vae, x, draws=2),
    "predictive": lambda vae, x: pv.diagnose.predictive_check(vae, x, draws=20),
    "gaps": lambda vae, x: pv.inference_gaps(vae, x, steps=2, particles=2, num_particles=50),
    "gold standard": lambda vae, x: pv.diagnose.nuts(vae, x, data=[0], chains=2, warmup=20, draws=20),
    "draws": lambda vae, x: pv.to_datatree(vae, x, draws=2),
}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2, "as it was"
    torch.set_num_threads(before)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_small_network_is_evaluated_by_one_thread(loop, two_threads):
    vae, x = small_vae(), torch.randn(4, 6).double()
    seen = []
    for part in (vae.encoder, vae.decoder):
        part.net.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    LOOPS[loop](vae, x)
    assert set(seen) == {1}


def test_quadrature_of_a_small_decoder_is_made_by_one_thread(two_threads):
    vae, seen = small_vae(latents=1), []
    vae.decoder.net.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    pv.exact.quadrature_log_marginal(vae, torch.randn(4, 6).double())
    assert set(seen) == {1}


@pytest.mark.parametrize(("particles", "expected"), [(1, 1), (100_000, 2)])
def test_uncompiled_steps_of_a_small_network_are_taken_by_one_thread(particles, expected, two_threads):
    """As many particles as make them large are not."""
    vae, seen = small_vae(), []

    def step(*_):
        seen.extend([torch.get_num_threads()] * torch.is_grad_enabled())

    vae.encoder.net.register_forward_pre_hook(step)
    elbo = pv.elbo.ELBO(particles)
    pv.fit(vae, torch.randn(4, 6).double(), elbo=elbo, epochs=1, progress=False, device="cpu", engine="eager")
    assert set(seen) == {expected}


def test_a_large_one_by_as_many_as_there_are(two_threads):
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(3),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(3, [1000], 2000)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(2000, [1000], 6)),
    )
    seen = []
    vae.decoder.net.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    per_datum_elbo(vae, torch.randn(8, 2000))
    assert seen[-1] == 2


def test_the_rule_counts_weights_times_evaluations_and_knows_convolutions(two_threads):
    weights = [torch.empty(1000, 1000)]
    few, many = int(SMALL_STEP / 6e6), int(SMALL_STEP / 6e6) + 1
    for evaluations, expected in ((few, 1), (many, 2)):
        with threads_for_evaluations(weights, evaluations):
            assert torch.get_num_threads() == expected
    with threads_for_evaluations([torch.empty(2, 2, 3, 3)], 1):
        assert torch.get_num_threads() == 2
    assert (threads_for_operations(SMALL_STEP - 1), threads_for_operations(SMALL_STEP)) == (1, 2)
