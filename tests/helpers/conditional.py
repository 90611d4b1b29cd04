"""Conditional VAEs and data with missing values, for tests of several rooms."""

import torch
from torch import nn

import pyro_vae as pv
from helpers.checks import linear_gaussian
from pyro_vae.evidence.exact import LinearGaussian

MASK = torch.tensor([[True, True, False, True, False]])


def seen_features():
    """The oracle, and the one with its unseen features integrated out: their rows of W and b leave."""
    model, seen = linear_gaussian(), MASK[0]
    return model, LinearGaussian(model.weight[seen], model.bias[seen], model.scale)


def conditional_vae(contexts=2):
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.ContextNormal(pv.nn.mlp(contexts, [8], 2 * 3)),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(3 + contexts, [8], 6), learn_scale=True),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(6 + contexts, [8], 2 * 3)),
    )


def guided(vae, guide):
    """The VAE with a function for its encoder."""

    class Encoder(nn.Module):
        def forward(self, x, context=None):
            return guide(x, context)

    vae.encoder = Encoder()
    return vae
