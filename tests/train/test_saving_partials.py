"""Parts that are partial functions, and functions, are described, saved and loaded; what is not known is not called."""

import warnings
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import DataError, ModelError, SettingsError, WeightsOnlyWarning

likelihoods = pv.likelihoods


def narrow(net):
    return likelihoods.Normal(net, scale=0.3)


def scaled(net, scale):
    return likelihoods.Normal(net, scale=scale)


class Own(nn.Module):
    """A likelihood with an activation and a family of its own."""

    def __init__(self, net, activation=torch.tanh, family=dist.Laplace):
        super().__init__()
        self.net, self.activation, self.family = net, activation, family

    def forward(self, z):
        return self.family(loc=self.activation(self.net(z)), scale=torch.tensor(0.5)).to_event(1)


def vae_of(decoder):
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=decoder,
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(6, [4], 4)),
    )


def blocks(make):
    return likelihoods.Blocks(pv.nn.mlp(2, [4], 6), [(make, 4), (likelihoods.Bernoulli, 2)])


def own(**settings):
    return Own(pv.nn.mlp(2, [4], 6), **settings)


DECODERS = {
    "activation of a network": (
        lambda: likelihoods.Normal(pv.nn.mlp(2, [4], 6, activation=partial(nn.Softplus, beta=2.0))), [],
    ),
    "a partial of a class": (lambda: blocks(partial(likelihoods.Normal, scale=0.3)), []),
    "a partial of a partial": (lambda: blocks(partial(partial(likelihoods.Normal, scale=0.3), learn_scale=True)), []),
    "a function": (lambda: blocks(narrow), [narrow]),
    "a partial of a function": (lambda: blocks(partial(scaled, scale=0.2)), [scaled]),
    "torch's function": (own, [Own]),
    "a partial of torch's function": (lambda: own(activation=partial(nn.functional.softplus, beta=2.0)), [Own]),
    "a partial of a distribution": (lambda: own(family=partial(dist.StudentT, 4.0)), [Own]),
    "a module": (lambda: own(activation=nn.Tanh()), [Own]),
}  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_it_is_saved_and_loaded(name, tmp_path):
    make, handed = DECODERS[name]
    vae, z = vae_of(make()), torch.randn(5, 2)
    pv.save(vae, tmp_path / "vae.safetensors")
    again = pv.load(tmp_path / "vae.safetensors", classes=handed)
    x = vae.decoder(z).sample()
    assert torch.equal(vae.decoder(z).log_prob(x), again.decoder(z).log_prob(x))
    if handed:
        with pytest.raises(DataError, match=rf"contains .*{handed[0].__name__}, a class that is not part of this"):
            pv.load(tmp_path / "vae.safetensors")


def test_what_has_no_name_is_saved_as_weights(tmp_path):
    with pytest.warns(WeightsOnlyWarning, match=r"vae\.decoder\.activation is the function .*<lambda>"):
        pv.save(vae_of(own(activation=partial(lambda x, k: x * k, k=2.0))), tmp_path / "vae.safetensors")


@pytest.mark.parametrize("function", [torch.load, torch.from_file, torch.hub.load, eval])
def test_no_other_function_is_loaded(function, tmp_path):
    """A file that names it is refused before anything is called."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WeightsOnlyWarning)
        pv.save(vae_of(own(activation=function)), tmp_path / "vae.safetensors")
    with pytest.raises(DataError, match=r"contains only weights|not part of this library"):
        pv.load(tmp_path / "vae.safetensors", classes=[Own])


def test_only_classes_of_parts_and_functions_are_handed_over(tmp_path):
    pv.save(vae_of(own()), tmp_path / "vae.safetensors")
    for wrong in ("Own", dict, eval):
        with pytest.raises(SettingsError, match="must hold module classes"):
            pv.load(tmp_path / "vae.safetensors", classes=[wrong])


@pytest.mark.parametrize("prior", [pv.priors.StandardNormal, partial(pv.priors.StandardNormal, 2)])
def test_a_part_that_is_not_made_yet_is_told_so(prior):
    with pytest.raises(ModelError, match=r"the prior is .*the class StandardNormal, which must be called"):
        pv.VAE(prior=prior, decoder=own(), encoder=pv.posteriors.DiagNormal(pv.nn.mlp(6, [4], 4)))
