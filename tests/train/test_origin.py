"""Where a divergence came from: each kind planted, and found."""

import pyro.distributions as dist
import pytest
import torch
from helpers.members import FEATURES, LATENTS

import pyro_vae as pv
from pyro_vae.core.rows import Rows
from pyro_vae.train.divergence_report import broken_weights, origin

N, SIZE, ROW = 16, 200, 11
X = torch.randn(N, FEATURES, generator=torch.Generator().manual_seed(4))
NUMBERS = list(range(100, 100 + N))
MARKED = X.clone()
MARKED[ROW, 0] = 5.0
"""Its row is the only one whose first number is above 4."""


class Encoder(pv.Conditional):
    """A normal whose loc and scale are changed at the marked row, or at all."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = pv.nn.mlp(FEATURES, [8], 2 * LATENTS), change

    def forward(self, x):
        loc, raw = self.net(x).chunk(2, -1)
        loc, scale = self.change(x[..., :1] > 4, loc, raw.exp())
        return dist.Normal(loc, scale, validate_args=False).to_event(1)


class Decoder(pv.Conditional):
    """Whatever the function of the network's outputs gives."""

    def __init__(self, of):
        super().__init__()
        self.net, self.of = pv.nn.mlp(LATENTS, [8], FEATURES), of

    def forward(self, z):
        return self.of(self.net(z))


def vae_of(encoder=None, decoder=None, prior=None):
    torch.manual_seed(0)
    return pv.VAE(
        prior=prior or pv.priors.StandardNormal(LATENTS),
        decoder=decoder or pv.likelihoods.Normal(pv.nn.mlp(LATENTS, [8], FEATURES), scale=0.5),
        encoder=encoder or pv.posteriors.DiagNormal(pv.nn.mlp(FEATURES, [8], 2 * LATENTS)),
    )


def found(vae, x=MARKED, loss=None, **given):
    return origin(vae, loss or pv.elbo.Trace_ELBO(), Rows(x, **given), size=SIZE, numbers=NUMBERS)


def with_one(value, name="model.decoder.net.2.weight"):
    vae = vae_of()
    with torch.no_grad():
        dict(vae.named_parameters())[name][1, 1] = value
    return vae


def huge(row=ROW, value=1e30):
    x = X.clone()
    x[row, 3] = value
    return x


def scaled(by):
    vae = vae_of()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(by)
    return vae


def only(marked, value, otherwise):
    return torch.where(marked, value, otherwise)


def uniform(low, high):
    return dist.Uniform(low, high, validate_args=False).to_event(1)


ROOT = "the gradient of guide.encoder.net.0.weight (and of 3 more) is not finite while the loss is"

PLANTED = {
    "a weight": (lambda: found(with_one(torch.nan)), "before this step: 1 of 48 values in model.decoder.net.2.weight"),
    "a scale of 0": (
        lambda: found(vae_of(Encoder(lambda m, loc, s: (loc, only(m, 0.0, s))))),
        "the scale of q(z|x) is 0 for row 111, latent 0",
    ),
    "a scale below 0": (
        lambda: found(vae_of(Encoder(lambda m, loc, s: (loc, only(m, -1.0, s))))),
        "the scale of q(z|x) is -1 for row 111, latent 0",
    ),
    "a loc": (
        lambda: found(vae_of(Encoder(lambda m, loc, s: (only(m, torch.inf, loc), s)))),
        "the loc of q(z|x) is inf for row 111, latent 0",
    ),
    "one latent": (
        lambda: found(
            vae_of(Encoder(lambda m, loc, s: (loc, torch.where(m & (torch.arange(LATENTS) == 2), torch.nan, s))))
        ),
        "the scale of q(z|x) is nan for row 111, latent 2",
    ),
    "a huge number": (lambda: found(vae_of(), huge()), "row 111"),
    "what the huge number is": (lambda: found(vae_of(), huge()), "its largest value is 1e+30"),
    "a datum outside of the support": (
        lambda: found(vae_of(decoder=Decoder(lambda y: uniform(y - 20, 4 + 0 * y)))),
        "log p(x|z) is -inf for row 111, feature 0 (x is 5, low",
    ),
    "the likelihood's scale": (
        lambda: found(vae_of(decoder=Decoder(lambda y: dist.Normal(y, 0 * y, validate_args=False).to_event(1)))),
        "the scale of p(x|z) is 0, for every row",
    ),
    "a prior": (
        lambda: found(vae_of(Encoder(lambda m, loc, s: (only(m, 1e25, loc), s)))),
        "log p(z) is -inf for row 111, latent 0 (z is 1e+25, loc 0, scale 1)",
    ),
    "weights that ran away": (lambda: found(scaled(1e25)), "for every row; the largest weight is"),
    "a gradient, by one row": (
        lambda: found(vae_of(Encoder(lambda m, loc, s: (loc, s + (loc * ~m).abs().sqrt())))),
        f"{ROOT}, caused by row 111",
    ),
    "a gradient, whatever the row": (
        lambda: found(vae_of(Encoder(lambda m, loc, s: (loc, s + (loc * 0).abs().sqrt())))),
        f"{ROOT}, and every row alone reproduces it",
    ),
    "of two rows": (
        lambda: found(vae_of(Encoder(lambda m, loc, s: (loc, only(m, 0.0, s)))), MARKED.roll(-8, 0).maximum(MARKED)),
        "the scale of q(z|x) is 0 for row 103, latent 0, and for 1 more",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found(name):
    run, sentence = PLANTED[name]
    assert sentence in run()


@pytest.mark.parametrize("row", [0, 7, N - 1])
@pytest.mark.parametrize("loss", [pv.elbo.Trace_ELBO(), pv.elbo.IWAE(4), pv.elbo.AnalyticKL(), pv.elbo.note_objective])
def test_the_row_is_found_wherever_it_is_and_whatever_is_minimized(row, loss):
    assert f"for row {100 + row}" in found(vae_of(), huge(row), loss)


def test_an_estimator_that_alone_is_not_finite_is_told_by_row():
    """The parts are all finite: what is not is what a user's own loss makes of them."""

    def loss(model, guide, x, size=None):
        guide(x, size)
        return (x[:, 0] - 5.0).abs().log().sum() + sum(p.sum() for p in model.parameters())

    assert found(vae_of(), loss=loss) == "the loss is -inf, caused by row 111"


def test_without_numbers_rows_are_those_of_the_batch():
    text = origin(vae_of(), pv.elbo.Trace_ELBO(), Rows(huge()))
    assert "for row 11 of the batch" in text


def test_missing_values_and_contexts_are_passed_on():
    mask = torch.ones_like(X, dtype=torch.bool)
    mask[ROW, 3] = False
    assert "it did not recur" in found(vae_of(), huge(), mask=mask)
    mask[ROW, 3], mask[2, 1] = True, False
    assert "for row 111" in found(vae_of(), huge(), mask=mask)


def test_nothing_is_changed_by_looking():
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.BatchNorm1d(FEATURES), torch.nn.Dropout(0.2), pv.nn.mlp(FEATURES, [8], 6))
    vae = vae_of(pv.posteriors.DiagNormal(encoder))
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    random = torch.get_rng_state()
    elbo = pv.elbo.Beta(pv.elbo.ELBO(), pv.elbo.Linear(10))
    for x in (X, huge()):
        found(vae, x, elbo)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert elbo.step.item() == 0
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert vae.training


def test_what_does_not_come_again_is_said_to_be_so():
    assert found(vae_of(), X) == "it did not recur at the same data and weights with new noise"


def test_buffers_may_hold_infinities_but_no_nan():
    vae = vae_of()
    vae.decoder.register_buffer("bound", torch.tensor([torch.inf, 0.0]))
    assert broken_weights(vae) == ""
    vae.decoder.bound[1] = torch.nan
    assert broken_weights(vae) == "the weights were not finite before this step: 1 of 2 values in model.decoder.bound"
