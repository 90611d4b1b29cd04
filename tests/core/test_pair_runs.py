"""Checkpoints, exact resume and several workers, for a Pair with a local and a global site."""

from functools import partial

import pyro
import pytest
import torch
from helpers.kills import Kill, Killed
from test_global_sites import SharedMean, of
from test_pair import TwoLayers, oracle, quiet

import pyro_vae as pv


def two_layers(x):
    pyro.clear_param_store()
    torch.manual_seed(0)
    both = TwoLayers()
    with torch.no_grad():
        both.encoder.weight += 0.3
    return pv.Pair(both.model, both.guide)


@pytest.mark.parametrize("make", [two_layers, partial(of, off=0.2)], ids=["two layers", "global"])
def test_a_resumed_pair_has_the_weights_of_one_never_stopped(make, tmp_path):
    data = oracle().sample(20) if make is two_layers else torch.randn(20, 2).double()
    settings = {"epochs": 4, "batch_size": 6, "engine": "eager", "validation_data": data[:5], **quiet}
    whole = make(data)
    expected = pv.fit(whole, data, checkpoints=tmp_path / "whole", **settings)
    stopped = make(data)
    with pytest.raises(Killed):
        pv.fit(
            stopped, data, checkpoints=pv.Checkpoints(tmp_path / "run", minutes=1e-9), callbacks=[Kill(11)], **settings
        )
    again = make(data)
    found = pv.fit(again, data, resume=tmp_path / "run", **settings)
    assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))
    assert not all(map(torch.equal, whole.state_dict().values(), stopped.state_dict().values()))
    for name in ("objective", "train_elbo", "validation_elbo"):
        assert found.history[name].values.tolist() == expected.history[name].values.tolist()


@pytest.mark.slow
def test_two_workers_find_the_posterior_of_the_shared_mean():
    data = 0.5 + torch.randn(40, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    pair = of(data, off=0.3)
    pv.fit(pair, data, elbo=pv.elbo.STL(), epochs=250, batch_size=20, engine="eager", devices=2,
           optimizer=partial(torch.optim.Adam, lr=0.02), **quiet)  # fmt: skip
    marginal = data.mean(0) * 40 / (40 + (0.6**2 + float(pair.model.owner.spread.detach().exp()) ** 2) / 0.8**2)
    assert (pair.model.owner.center - marginal).abs().max() < 0.05
    assert (pair.model.owner.center - SharedMean(data, off=0.3).center).abs().min() > 0.1, "power"
