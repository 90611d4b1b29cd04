"""Masks and contexts reach everything that is given them, each against numbers had another way."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers.checks import linear_gaussian, small_vae, z_score
from helpers.conditional import MASK, conditional_vae, guided, seen_features
from torch import nn

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.compare.swap import rank
from pyro_vae.core.component import masked
from pyro_vae.core.device import derive_seed, seeded
from pyro_vae.data import Data
from pyro_vae.train import per_datum_elbo

quiet_fit = partial(pv.fit, progress=False, device="cpu")
LAST = torch.tensor([True, True, True, True, True, False])


def conditional():
    """A conditional VAE whose every part depends much on the context, and data with one."""
    vae = conditional_vae().double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(2.0)
    return vae, Data(torch.randn(40, 6).double(), context=torch.randn(40, 2).double())


def incomplete():
    vae, x = small_vae(), 2 * torch.randn(40, 6).double()
    return vae, Data(x, mask=LAST.expand(40, 6))


def other(data):
    """The same data without what is to be seen: the context of another row, or nothing missing."""
    return Data(data.x, context=None if data.context is None else data.context.roll(1, 0))


def test_the_evidence_of_data_with_missing_values_is_that_of_the_marginal_model():
    """Exactly, with the exact posterior of what was seen."""
    full, marginal = seen_features()
    own = marginal.as_vae().encoder
    vae = guided(full.as_vae(), lambda x, _: own(x[..., MASK[0]]))
    x = full.sample(30)
    data = Data(x, mask=MASK.expand(30, 5))
    exact = marginal.log_marginal(x[:, MASK[0]]).numpy()
    assert abs(pv.log_evidence(vae, data, num_particles=5).log_evidence - exact).max() < 1e-10
    assert float(rank({"a": vae}, data, num_particles=5).log_evidence[0]) == pytest.approx(exact.mean(), abs=1e-10)
    assert abs(full.log_marginal(x).numpy() - exact).max() > 0.1, "power"


def test_the_evidence_of_a_conditional_model_is_given_its_context():
    """Against an average over the prior at each datum's context, with that prior as the guide."""
    vae, data = conditional()
    vae = guided(vae, lambda _, context: vae.prior(context))
    with torch.no_grad():
        z = vae.prior(data.context).sample((20_000,))
        logs = vae.decoder(z, data.context).log_prob(data.x)
        exact = logs.logsumexp(0) - np.log(len(z))
        error = (logs - exact).exp().std(0) / len(z) ** 0.5
    found = pv.log_evidence(vae, data, num_particles=2000)
    apart = (found.log_evidence.values - exact.numpy()) / np.hypot(found.mcse.values, error.numpy())
    clear = found.mcse.values < 0.1
    assert clear.sum() > 20
    assert abs(apart[clear]).max() < 5
    wrong = pv.log_evidence(vae, other(data), num_particles=2000).log_evidence.values
    assert abs(wrong - exact.numpy())[clear].max() > 1, "power"


def test_the_evidence_drops_nothing_out():
    vae = small_vae()
    vae.decoder.net = nn.Sequential(nn.Dropout(0.5), vae.decoder.net)
    vae.encoder.net = nn.Sequential(nn.Dropout(0.5), vae.encoder.net)
    still = small_vae()
    x = torch.randn(10, 6).double()
    assert vae.training
    first, again = (pv.log_evidence(vae, x, num_particles=20).log_evidence for _ in range(2))
    assert (first == again).all()
    assert (first == pv.log_evidence(still, x, num_particles=20).log_evidence).all()
    assert vae.training


@pytest.mark.parametrize("make", [conditional, incomplete])
def test_a_comparison_sees_mask_and_context(make):
    vae, data = make()
    table = pv.compare_elbos(vae, data, {"Trace_ELBO": pv.elbo.Trace_ELBO(), "STL": pv.elbo.STL()}, draws=100)
    exact = per_datum_elbo(vae, data, num_particles=10_000).mean().item()
    without = per_datum_elbo(vae, other(data), num_particles=2000).mean().item()
    for estimator in table.estimator.values:
        found = table.sel(estimator=estimator)
        assert abs(found.elbo.item() - exact) < 5 * found.elbo_se.item()
        assert abs(found.elbo.item() - without) > 5 * found.elbo_se.item(), "power"


def test_the_elbo_of_a_datum_is_by_hand_that_of_its_context_and_of_what_was_seen():
    """What the comparison is held against: each datum by itself, written out."""
    for vae, data in (conditional(), incomplete()):
        given = () if data.context is None else (data.context,)
        seen = torch.ones_like(data.x) if data.mask is None else data.mask.double()
        with torch.no_grad():
            q, p = vae.encoder(data.x * seen, *given), vae.prior(*given)
            z = q.sample((4000,))
            parts = (vae.decoder(z, *given).base_dist.log_prob(data.x) * seen).sum(-1)
            by_hand = (parts + p.log_prob(z) - q.log_prob(z)).mean(1)
        found = per_datum_elbo(vae, data, num_particles=4000).mean()
        assert abs(z_score(by_hand, found)) < 7, "both are sampled"


def test_the_datatrees_log_likelihood_is_of_what_was_seen():
    full, _ = seen_features()
    x = full.sample(4)
    tree = pv.to_datatree(full.as_vae(), Data(x, mask=MASK.expand(4, 5)), draws=20)
    z = torch.as_tensor(tree["posterior"].z.values[0])
    each = full.as_vae().decoder(z).base_dist.log_prob(x)
    found = torch.as_tensor(tree["log_likelihood"].x.values[0])
    assert torch.allclose(found, each[..., MASK[0]].sum(-1), atol=1e-10)
    assert not torch.allclose(found, each[..., ~MASK[0]].sum(-1), atol=1e-2), "power"


def test_the_datatrees_draws_are_given_each_datums_context():
    """Sign of the context decides everything: parts whose mean is the context, with little noise."""

    class OfContext(pv.Conditional):
        def forward(self, *given):
            *_, context = given
            loc = context.expand(*given[0].shape[:-1], -1) if len(given) > 1 else context
            return pv.likelihoods.Normal(nn.Identity(), scale=0.01)(loc.contiguous())

    vae = pv.VAE(prior=OfContext(), decoder=OfContext(), encoder=OfContext())
    context = torch.tensor([[1.0, 2.0], [-1.0, 5.0], [3.0, -7.0]])
    tree = pv.to_datatree(vae, Data(torch.zeros(3, 2), context=context), draws=50, prior_draws=200)
    for group, name in ("posterior", "z"), ("posterior_predictive", "x"):
        assert abs(tree[group][name].values[0] - context.numpy()).max() < 0.1
    z, x = tree["prior"].z.values[0], tree["prior_predictive"].x.values[0]
    assert abs(z - x).max() < 0.1, "latents and data of one draw have one context"
    nearest = abs(x[:, None] - context.numpy()).sum(-1)
    assert nearest.min(1).max() < 0.2
    assert np.bincount(nearest.argmin(1), minlength=3).min() > 30, "each datum's context has its share"


def test_a_mask_of_images_drops_pixels():
    net = nn.Sequential(nn.Linear(2, 12), nn.Unflatten(-1, (3, 4)))
    likelihood, x = pv.likelihoods.Normal(net)(torch.randn(5, 2)), torch.randn(5, 3, 4)
    mask = torch.rand(5, 3, 4) > 0.5
    kept = masked(likelihood, mask)
    assert kept.event_shape == (3, 4)
    assert kept.batch_shape == (5,)
    expected = (likelihood.base_dist.log_prob(x) * mask).sum((1, 2))
    assert torch.allclose(kept.log_prob(x), expected, atol=1e-5)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=pv.likelihoods.Normal(net),
        encoder=pv.posteriors.DiagNormal(nn.Sequential(nn.Flatten(-2), nn.Linear(12, 4))),
    )
    assert per_datum_elbo(vae, Data(x, mask=mask)).shape == (5,)


def test_the_mask_of_validation_data_counts():
    """With values far off under the mask, an ELBO that sees them is far lower."""
    vae, x = small_vae(), torch.randn(20, 6).double()
    hidden = torch.where(LAST, x, 1000.0)
    data = Data(hidden, mask=LAST.expand(20, 6))
    history = quiet_fit(vae, x, validation_data=data, epochs=1).history
    zero = Data(torch.where(LAST, x, 0.0), mask=LAST.expand(20, 6))
    with seeded(derive_seed(0, "evaluation"), torch.device("cpu")):  # as fit evaluates with its seed 0
        expected = per_datum_elbo(vae, zero).mean().item()
    assert history.validation_elbo[-1].item() == pytest.approx(expected, rel=1e-9)
    seen = quiet_fit(small_vae(), x, validation_data=Data(zero.x), epochs=1).history
    assert seen.validation_elbo[-1].item() != pytest.approx(expected, rel=1e-3), "power"


# --- Figures ---


def test_figures_of_a_conditional_vae():
    vae, data = conditional()
    shown = plots.reconstructions(vae, data, count=5)
    lines = [line.get_ydata() for line in shown.axes[0].lines]
    with torch.no_grad():
        own = vae.decoder(vae.encoder(data.x, data.context).mean, data.context).mean
    for i in range(5):
        assert lines[i] == pytest.approx(data.x[i].numpy())
        assert lines[5 + i] == pytest.approx(own[i].numpy())
    dots = np.concatenate([c.get_offsets() for c in plots.latent_space(vae, data).axes[0].collections])
    assert dots.shape == (40, 2)
    one = plots.prior_samples(vae, context=data.context[:1], count=4)
    two = plots.prior_samples(vae, context=data.context[1:2], count=4)
    first, second = (np.stack([line.get_ydata() for line in f.axes[0].lines]) for f in (one, two))
    assert abs(first - second).max() > 1e-3, "the context matters"


def test_figures_drop_nothing_out_and_take_masks():
    vae, x = linear_gaussian().as_vae(), linear_gaussian().sample(3)
    vae.decoder.net = nn.Sequential(nn.Dropout(0.5), vae.decoder.net)
    data = Data(x, mask=MASK.expand(3, 5))
    first, again = ([line.get_ydata() for line in plots.reconstructions(vae, data).axes[0].lines] for _ in range(2))
    assert np.array_equal(first, again, equal_nan=True)
    expected = linear_gaussian().posterior(torch.where(MASK, x, 0.0)).mean
    found = plots.latent_space(vae, data).axes[0].collections[0].get_offsets()
    assert np.asarray(found) == pytest.approx(expected.numpy(), abs=1e-9)


def test_a_datum_far_out_does_not_squeeze_the_others_and_is_counted():
    model = linear_gaussian()
    x = model.sample(60)
    near = plots.latent_space(model.as_vae(), x).axes[0]
    far = plots.latent_space(model.as_vae(), torch.cat([x, 1e4 * torch.ones(1, 5).double()])).axes[0]
    assert "outside" not in near.get_title()
    assert "(1 of 61 are outside the figure)" in far.get_title()
    assert np.ptp(far.get_xlim()) < 5 * np.ptp(near.get_xlim())


def test_labels_of_many_values_are_numbers_on_a_scale_and_few_are_classes():
    model = linear_gaussian()
    x = model.sample(60)
    numbers = plots.latent_space(model.as_vae(), x, labels=torch.linspace(25, 346, 60))
    assert numbers.axes[1].get_ylabel() == "label"
    assert numbers.axes[0].get_legend() is None
    assert numbers.axes[0].collections[0].get_array().tolist() == pytest.approx(torch.linspace(25, 346, 60).tolist())
    classes = plots.latent_space(model.as_vae(), x, labels=torch.arange(60) % 10)
    assert [text.get_text() for text in classes.axes[0].get_legend().get_texts()] == [str(i) for i in range(10)]
    assert len(classes.axes) == 1
