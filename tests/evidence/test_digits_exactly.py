"""What estimators gain on digits, by exact log p(x): two latents, so that quadrature gives it."""

from functools import partial

import pytest
import torch

import pyro_vae as pv
from pyro_vae.evidence.exact import quadrature_log_marginal
from pyro_vae.train import per_datum_elbo

pytestmark = pytest.mark.slow
SEEDS = range(3)


def trained(train, *, elbo=None, seed=0, scale=0.5, epochs=60, batch_size=128):
    torch.manual_seed(seed)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [128], 64), scale=scale),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(64, [128], 4)),
    )
    adam = partial(torch.optim.Adam, lr=2e-3, fused=True)
    settings = {"epochs": epochs, "batch_size": batch_size, "optimizer": adam, "seed": seed}
    pv.fit(vae, train, elbo=elbo, **settings, progress=False, device="cpu")
    return vae


def test_iwae_has_the_better_evidence_and_the_worse_elbo():
    """Burda et al. (2015): by more than half a nat of held-out -log p(x), while -ELBO gets worse by more (s = 0.3)."""
    train, test = pv.data.split(pv.data.digits())
    nll, minus_elbo = {}, {}
    for name, elbo in {"ELBO": pv.elbo.ELBO(), "IWAE": pv.elbo.IWAE(50)}.items():
        vaes = [trained(train.x, elbo=elbo, seed=seed, scale=0.3, batch_size=64) for seed in SEEDS]
        exact = (quadrature_log_marginal(vae, test.x, points=321, tolerance=0.05) for vae in vaes)
        nll[name] = -torch.stack([log_p.mean() for log_p in exact])
        minus_elbo[name] = -torch.stack([per_datum_elbo(vae, test.x, num_particles=200).mean() for vae in vaes])
    print({name: (nll[name].tolist(), minus_elbo[name].tolist()) for name in nll})
    assert nll["IWAE"].mean() < nll["ELBO"].mean() - 0.5
    assert (nll["IWAE"] < nll["ELBO"]).all()
    assert (minus_elbo["IWAE"] > minus_elbo["ELBO"] + 0.5).all(), "the reversal"
