"""Missing values and contexts, against the linear-Gaussian model with features integrated out in closed form."""

from functools import partial

import pytest
import torch
from helpers.checks import linear_gaussian, loss_and_gradients, small_vae, z_score
from helpers.conditional import MASK, conditional_vae, seen_features

import pyro_vae as pv
from pyro_vae.data import Data, Rows, mask_nan, rows_of
from pyro_vae.errors import DataError, ModelError
from pyro_vae.train import per_datum_elbo

quiet_fit = partial(pv.fit, progress=False, device="cpu")


@pytest.mark.parametrize("loss", [pv.elbo.Trace_ELBO(), pv.elbo.TraceMeanField_ELBO()])
def test_the_elbo_with_missing_features_is_that_of_the_marginal_model(loss):
    """Of 300 copies of three data at once, so that each value is the mean of 300 draws."""
    full, marginal = seen_features()
    x = full.sample(3)
    vae = full.as_vae(diagonal=True)
    mask = MASK.expand(3, 5)
    q = vae.encoder(torch.where(mask, x, 0.0))
    exact = marginal.elbo(x[:, MASK[0]], q).sum().item()

    def masked(model, guide, x, size):
        return loss.differentiable_loss(model, guide, x, size, None, mask.repeat(300, 1))

    many = x.repeat(300, 1)
    values = torch.stack([-loss_and_gradients(masked, vae, many, seed=s)[0] for s in range(20)]) / 300
    assert abs(z_score(values, exact)) < 5
    assert abs(z_score(values, full.elbo(x, q).sum().item())) > 5, "power: the unmasked ELBO is another number"


def test_with_the_exact_posterior_of_what_was_seen_log_weights_are_its_evidence():
    full, marginal = seen_features()
    x, vae = full.sample(3), full.as_vae()
    own = marginal.as_vae().encoder

    class OfWhatWasSeen(pv.Conditional):
        def __init__(self):
            torch.nn.Module.__init__(self)

        def forward(self, x, context=None):
            return own(x[..., MASK[0]])

    vae.encoder = OfWhatWasSeen()
    x[:, 2] = torch.nan
    rows = rows_of(x, mask=MASK.expand(3, 5))
    weights = pv.elbo.log_weights(vae.model, vae.guide, *rows.arguments(), num_particles=4)
    assert (weights - marginal.log_marginal(x[:, MASK[0]])).abs().max() < 1e-11
    assert (per_datum_elbo(vae, Data(x, mask=MASK.expand(3, 5))) - weights[0]).abs().max() < 1e-11


def test_what_is_missing_may_hold_anything_and_changes_nothing():
    vae, x = small_vae(), torch.randn(8, 6).double()
    mask = torch.rand(8, 6) > 0.3
    ends = []
    for junk in (0.0, torch.nan, 1e30):
        data = Data(torch.where(mask, x, torch.tensor(junk, dtype=torch.float64)), mask=mask)
        trained = small_vae()
        quiet_fit(trained, data, validation_data=data, epochs=2, batch_size=4)
        ends.append(trained.state_dict())
        assert pv.compare_elbos(vae, data, {"a": pv.elbo.Trace_ELBO()}, draws=2).elbo_sd > 0
    for end in ends[1:]:
        assert all(torch.equal(ends[0][name], value) for name, value in end.items())
    whole = small_vae()
    quiet_fit(whole, x, epochs=2, batch_size=4)
    assert not torch.equal(whole.state_dict()["model.decoder.net.0.weight"], ends[0]["model.decoder.net.0.weight"])


def test_nan_means_missing_when_the_user_says_so():
    x = torch.tensor([[1.0, torch.nan], [2.0, 3.0]])
    with pytest.raises(DataError, match=r"row 0, column 1 \(nan\)"):
        rows_of(x)
    data = mask_nan(x)
    assert data.mask.tolist() == [[True, False], [True, True]]
    with pytest.raises(DataError, match="row 1 has no observed value"):
        mask_nan(torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]]))
    with pytest.raises(DataError, match="inf"):
        mask_nan(torch.tensor([[1.0, torch.inf]]))
    with pytest.raises(DataError, match="booleans of the data's shape"):
        rows_of(torch.zeros(3, 2), mask=torch.ones(3, 2))


def test_the_datatree_knows_what_was_missing():
    data = mask_nan(torch.tensor([[1.0, torch.nan, 0.0, 0.0, 0.0], [2.0, 3.0, 1.0, 1.0, 1.0]]))
    tree = pv.to_datatree(linear_gaussian().as_vae(), data, draws=3)
    assert tree["observed_data"]["x"].isnull().values.tolist() == [[False, True, False, False, False], [False] * 5]
    assert bool(tree["posterior_predictive"]["x"].notnull().all()), "which it predicts"


def test_a_likelihood_of_dependent_features_refuses_missing_values():
    class Joint(pv.likelihoods.Normal):
        def forward(self, z, context=None):
            import pyro.distributions as dist

            return dist.MultivariateNormal(self.net(z), torch.eye(6).double())

    vae = small_vae()
    vae.decoder = Joint(vae.decoder.net).double()
    with pytest.raises(ModelError, match="missing values need a likelihood of independent features"):
        vae.model(torch.zeros(2, 6).double(), mask=torch.ones(2, 6, dtype=torch.bool))


def test_the_context_reaches_prior_decoder_and_encoder():
    vae, x = conditional_vae(), torch.randn(5, 6)
    here, there = torch.zeros(5, 2), torch.ones(5, 2)
    for part, given in (vae.encoder, (x,)), (vae.decoder, (torch.zeros(5, 3),)), (vae.prior, ()):
        assert not torch.equal(part(*given, here).mean, part(*given, there).mean)
    torch.manual_seed(1)
    value = pv.elbo.Trace_ELBO().loss(vae.model, vae.guide, x, 50, there)
    torch.manual_seed(1)
    q, p = vae.encoder(x, there), vae.prior(there)
    z = q.rsample()
    by_hand = vae.decoder(z, there).log_prob(x) + p.log_prob(z) - q.log_prob(z)
    assert value == pytest.approx(-10 * by_hand.sum().item(), rel=1e-5)
    weights = pv.elbo.log_weights(vae.model, vae.guide, x, None, there, num_particles=7)
    assert weights.shape == (7, 5), "with a particle dimension in front"


def test_a_conditional_vae_learns_what_depends_on_its_context():
    """x is its context, repeated, plus noise: only a model that sees the context can know its sign."""
    context = torch.randn(400, 1).sign()
    x = context.expand(400, 6) + 0.1 * torch.randn(400, 6)
    torch.manual_seed(0)
    vae = conditional_vae(contexts=1)
    adam = partial(torch.optim.Adam, lr=1e-2)
    held_out = Data(x[300:], context=context[300:])
    result = quiet_fit(vae, x[:300], context=context[:300], validation_data=held_out, optimizer=adam, epochs=60)
    assert result.history.validation_elbo[-1] > result.history.validation_elbo[0] + 5
    for sign in (-1.0, 1.0):
        given = torch.full((200, 1), sign)
        generated = vae.decoder(vae.prior(given).sample(), given).mean
        assert (generated.mean() - sign).abs() < 0.1
    tree = pv.to_datatree(vae, held_out, draws=5, prior_draws=500)
    assert tree["prior_predictive"]["x"].shape == (1, 500, 6)
    assert tree["prior_predictive"]["x"].values.std() > 0.9, "draws of both signs"


def test_contexts_that_do_not_fit_are_refused():
    vae, x = conditional_vae(), torch.randn(5, 6)
    with pytest.raises(DataError, match=r"the context has shape \(4, 2\) for 5 data"):
        quiet_fit(vae, x, context=torch.zeros(4, 2), epochs=1)
    with pytest.raises(ModelError, match=r"rows of 6 \+ 3 numbers and was built for 8"):
        quiet_fit(vae, x, context=torch.zeros(5, 3), epochs=1)
    with pytest.raises(ModelError, match="was built for 8"):
        quiet_fit(vae, x, epochs=1)
    with pytest.raises(ModelError, match="needs a context"):
        vae.prior()


def test_rows_are_taken_together():
    rows = Rows(torch.arange(6.0).reshape(3, 2), torch.arange(3.0).unsqueeze(1), torch.eye(3, 2) > 0)
    taken = rows.take(torch.tensor([2, 0]))
    assert taken.x[:, 0].tolist() == [4.0, 0.0]
    assert taken.context.squeeze(1).tolist() == [2.0, 0.0]
    assert taken.mask.tolist() == [[False, False], [True, False]]
    assert [len(part) for part in rows.split(2)] == [2, 1]


def test_refinement_leaves_out_what_is_missing():
    """With its start independent of x, the refined q is that of the model without the unseen features."""
    full, marginal = seen_features()
    x = full.sample(3)
    found = []
    for model, data, mask in (
        (full, x, MASK.expand(3, 5)),
        (marginal, x[:, MASK[0]], None),
        (full, torch.where(MASK, x, 0.0), None),
    ):
        net = torch.nn.Linear(data.shape[1], 4).double()
        torch.nn.init.zeros_(net.weight)
        torch.nn.init.zeros_(net.bias)
        vae = model.as_vae()
        vae.encoder = pv.posteriors.Refined(net, steps=20)
        found.append(pv.core.component.infer(vae.encoder, data, None, mask).mean)
    assert (found[0] - found[1]).abs().max() < 1e-12
    assert (found[0] - found[2]).abs().max() > 1e-2, "power: zeros in the place of the missing are seen"
    tree = pv.to_datatree(vae, Data(x, mask=MASK.expand(3, 5)), draws=4000)
    apart = tree["posterior"].z.mean(("chain", "draw")) - found[0].detach().numpy()
    assert float(abs(apart).max()) < 0.1
