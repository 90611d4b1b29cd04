"""The engine on a GPU."""

import pyro
import pytest
import torch
from helpers.engine_checks import BATCH, ROWS, data_of, vae_of
from helpers.members import FEATURES
from pyro.infer import SVI, Trace_ELBO

import pyro_vae as pv
from pyro_vae.train.compiled.optimizers import WholeOptimizer


@pytest.mark.cuda
def test_on_cuda_it_trains_as_eager_does(cuda):
    results = []
    for compiled in (False, True):
        pyro.clear_param_store()
        vae = vae_of(dtype=torch.float32).to(cuda)
        optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2, fused=True)
        x = data_of(dtype=torch.float32).to(cuda)
        torch.manual_seed(1)
        if compiled:
            svi = pv.CompiledSVI(vae.model, vae.guide, optimizer, Trace_ELBO())
            losses = svi.run(x, steps=100, batch_size=BATCH, size=ROWS).tolist()
        else:
            svi, losses = SVI(vae.model, vae.guide, WholeOptimizer(optimizer), Trace_ELBO()), []
            while len(losses) < 100:
                losses += [svi.step(x[index], ROWS) for index in torch.randperm(ROWS, device=cuda).split(BATCH)]
        results.append((losses[:100], {n: p.detach() for n, p in vae.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)


@pytest.mark.cuda
def test_on_cuda_nothing_waits_for_the_gpu_inside_the_loop(cuda):
    vae = vae_of(dtype=torch.float32).to(cuda)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2, fused=True)
    svi = pv.CompiledSVI(vae.model, vae.guide, optimizer, Trace_ELBO())
    x = torch.randn(512, FEATURES, device=cuda)
    svi.run(x, steps=200, batch_size=BATCH, size=512)
    torch.cuda.set_sync_debug_mode("error")
    try:
        svi.run(x, steps=320, batch_size=BATCH, size=512)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_on_cuda_streamed_data_give_the_same(cuda, monkeypatch):
    from pyro_vae.train.compiled import feed

    losses = []
    for fits in (True, False):
        monkeypatch.setattr("pyro_vae.train.compiled.cuda.fits", lambda *_, fits=fits: fits)
        vae = vae_of(dtype=torch.float32).to(cuda)
        optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2, fused=True)
        torch.manual_seed(1)
        svi = pv.CompiledSVI(vae.model, vae.guide, optimizer, Trace_ELBO())
        losses.append(svi.run(data_of(dtype=torch.float32), steps=60, batch_size=BATCH, size=ROWS).tolist())
    assert feed.Feed is not None
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
