"""Where likelihoods clamp what the network gives: both ends of each limit, what data reach it, and who is told."""

import contextlib
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.data import Data
from pyro_vae.errors import ConstantColumnsWarning, DataError, UnboundedDensityWarning

ID = nn.Identity()
ZERO_INFLATED = pv.likelihoods.ZeroInflated(ID, pv.likelihoods.Poisson)
MIXTURE = partial(pv.likelihoods.DiscretizedLogisticMixture, ID, 1)

# The likelihood, its outputs, the place of one of them, a value x, a number inside the limit and one beyond.
LIMITS = {
    "a Poisson's log-rate": (pv.likelihoods.Poisson(ID), [0.0], 0, 3.0, 19.9, 20.1),
    "a negative binomial's logit": (pv.likelihoods.NegativeBinomial(ID), [0.0, 1.0], 0, 3.0, 19.9, 20.1),
    "a negative binomial's k, above": (pv.likelihoods.NegativeBinomial(ID), [0.0, 1.0], 1, 3.0, 19.9, 20.1),
    "a negative binomial's k, below": (pv.likelihoods.NegativeBinomial(ID), [0.0, 1.0], 1, 3.0, -19.9, -20.1),
    "a zero-inflated log-rate": (ZERO_INFLATED, [0.4, 0.0], 1, 3.0, 19.9, 20.1),
    "a hurdle's log-rate": (pv.likelihoods.Hurdle(ID, pv.likelihoods.Poisson), [0.4, 0.0], 1, 3.0, 19.9, 20.1),
    "log s, above": (MIXTURE(), [0.0, 0.2, 0.0], 2, 1.0, 6.9, 7.1),
    "log s, below": (MIXTURE(), [0.0, 0.2, 0.0], 2, 1.0, -6.9, -7.1),
    "log s of few levels, below": (MIXTURE(levels=2), [0.0, 0.2, 0.0], 2, 0.0, -6.9, -7.1),
    "log s of 16 bits, below": (MIXTURE(levels=65536), [0.0, 0.2, 0.0], 2, 1.0, -12.5, -12.6),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_ends_the_gradient_and_is_reported(name):
    likelihood, numbers, place, x, inside, beyond = LIMITS[name]
    logs = []
    for number, is_beyond in ((inside, False), (beyond, True), (2 * beyond, True)):
        out = torch.tensor([*numbers[:place], number, *numbers[place + 1 :]], requires_grad=True)
        log_prob = likelihood(out).log_prob(torch.tensor([x]))
        (gradient,) = torch.autograd.grad(log_prob, out)
        assert (gradient[place] == 0) == is_beyond
        assert any(over.any() for over in likelihood.beyond(out.detach()).values()) == is_beyond
        logs.append(log_prob.detach())
    assert logs[0] != logs[1] == logs[2], "beyond the limit nothing changes"


@pytest.mark.parametrize("number", [-200.0, -30.0])
def test_counts_have_no_lower_limit(number):
    """A rate of nearly 0 is pulled up by a count."""
    for likelihood, rest in ((pv.likelihoods.Poisson(ID), []), (pv.likelihoods.NegativeBinomial(ID), [0.0])):
        out = torch.tensor([number, *rest], requires_grad=True)
        (gradient,) = torch.autograd.grad(likelihood(out).log_prob(torch.tensor([3.0])), out)
        assert gradient[0] == pytest.approx(3.0)
        assert not any(over.any() for over in likelihood.beyond(out).values())


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (pv.likelihoods.Poisson, ["at most 20", "4.9e8", "raise an error"]),
        (pv.likelihoods.NegativeBinomial, ["at most 20", "[-20, 20]", "4.9e8", "raise an error"]),
        (pv.likelihoods.DiscretizedLogisticMixture, ["[-7, 7]", "9e-4", "0.23 h"]),
    ],
)
def test_limits_are_documented(member, words):
    assert all(word in member.__doc__ for word in words)


@pytest.mark.parametrize("levels", [2, 256, 4096, 65536])
def test_a_level_may_have_most_of_the_probability_whatever_their_number(levels):
    """At the least scale 97 % for 256 levels and more, as the docstring says; for fewer more."""
    x = torch.tensor([(levels // 2) / (levels - 1)])
    out = torch.tensor([0.0, 2 * x.item() - 1, -50.0])
    mass = MIXTURE(levels=levels)(out).log_prob(x).exp()
    assert mass > 0.96


@pytest.mark.parametrize("member", [pv.likelihoods.Poisson, pv.likelihoods.NegativeBinomial])
def test_counts_that_no_rate_reaches_are_refused(member):
    likelihood = member(ID)
    likelihood.refuse(torch.tensor([[4.8e8, 0.0]]))
    with pytest.raises(DataError, match=r"column 1 is 4\.9e\+08, but .* takes whole numbers from 0 to 485,165,195"):
        likelihood.refuse(torch.tensor([[0.0, 4.9e8]]))


def counts_vae(log_rate):
    decoder = pv.nn.mlp(2, [], 3)
    with torch.no_grad():
        decoder[-1].weight.mul_(0.01)
        decoder[-1].bias.fill_(log_rate)
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=pv.likelihoods.Poisson(decoder),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(3, [], 4)),
    )


def test_training_that_ends_at_a_limit_warns():
    settings = {"epochs": 1, "progress": False, "device": "cpu", "engine": "eager"}
    x = torch.poisson(torch.full((12, 3), 4.0))
    with pytest.warns(UserWarning, match="Poisson: for 12 of 12 training rows the network outputs log-rates above 20"):
        pv.fit(counts_vae(40.0), x, **settings)
    pv.fit(counts_vae(1.0), x, **settings)  # warnings are errors here


def test_blocks_name_the_block():
    blocks = [(pv.likelihoods.Bernoulli, 1), (pv.likelihoods.Poisson, 2)]
    found = pv.likelihoods.Blocks(ID, blocks).beyond(torch.tensor([[50.0, 1.0, 21.0]]))
    assert {name: over.tolist() for name, over in found.items()} == {
        "log-rates above 20 in block 1, Poisson": [[False, True]]
    }


def constant_beside_noise(dull: float) -> torch.Tensor:
    return torch.stack([torch.randn(100), torch.full((100,), dull)], 1)


@pytest.mark.parametrize(("dull", "standardize"), [(5.0, True), (0.0, True), (5.0, False)])
def test_a_density_without_bound_is_reported_and_named(dull, standardize):
    """A learned scale of a constant column falls as long as training goes on; that of a fixed one does not."""
    torch.manual_seed(0)
    x, told = Data(constant_beside_noise(dull), columns=["real", "dull"]), UnboundedDensityWarning
    for learned, expected in (
        (True, pytest.warns(told, match=r"1 of 2 columns \('dull'\) has an sd below 0\.001 times")),
        (False, contextlib.nullcontext()),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConstantColumnsWarning)
            units = pv.data.mean_and_sd(x) if standardize else None
        decoder = pv.likelihoods.Normal(nn.Linear(1, 2), per_feature=2 if learned else None)
        vae = pv.VAE(
            prior=pv.priors.StandardNormal(1), decoder=decoder, encoder=pv.posteriors.DiagNormal(nn.Linear(2, 2)),
            standardize=units,
        )  # fmt: skip
        with torch.no_grad():
            decoder.net.weight.zero_()
            decoder.net.bias.copy_(torch.tensor([0.0, 0.0 if standardize else dull]))
            if learned:
                decoder.log_scale.copy_(torch.tensor([0.0, -8.0]))
        with expected:
            pv.fit(vae, x, epochs=1, engine="eager", progress=False, optimizer=lambda p: torch.optim.SGD(p, 0.0))
