"""Parts that do not fit each other, the data or the context: one sentence each, from check, fit and describe alike."""

import pyro.distributions as dist
import pytest
import torch
import zuko
from helpers.checks import small_vae
from helpers.conditional import conditional_vae
from torch import nn

import pyro_vae as pv
from pyro_vae.compare.swap import rank
from pyro_vae.data import Data, Rows, mask_nan
from pyro_vae.errors import DataError, ModelError, SettingsError

X, CONTEXT = torch.zeros(5, 6), torch.zeros(5, 2)


class Times(nn.Module):
    """A hundred times what it is given."""

    def forward(self, x):
        return 100 * x


class Raises(nn.Module):
    def forward(self, context=None):
        raise KeyError("no such\nkey")


class Alone(nn.Module):
    """A prior of the user's own that knows no context, not even as an argument."""

    def forward(self):
        return dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)


def with_part(**parts):
    vae = small_vae()
    for role, part in parts.items():
        setattr(vae, role, part.double())
    return vae


class Positive(nn.Module):
    """A prior on positive latents."""

    def forward(self):
        return dist.Exponential(torch.ones(3).double()).to_event(1)


def test_a_prior_on_half_the_line_is_refused_under_a_guide_on_all_of_it():
    vae = with_part(prior=Positive())
    with pytest.raises(ModelError, match=r"the whole real line as support, the prior part of it \(GreaterThanEq"):
        pv.fit(vae, X, epochs=1, progress=False, device="cpu")
    with pytest.raises(ModelError, match="use a prior on the whole line, or a posterior on the prior's support"):
        vae.check(X)


def flow_of_another_context():
    return pv.posteriors.Flow(zuko.flows.MAF(3, context=5, transforms=1, hidden_features=[8]), net=nn.Linear(6, 4))


def inner_mismatch(first):
    return nn.Sequential(nn.Linear(first, 8), nn.Linear(9, 6))


MISFITS = {
    "a flow of another context": (
        lambda: with_part(encoder=flow_of_another_context()),
        None,
        "the distribution of the encoder cannot be sampled .*make its sizes equal",
    ),
    "a prior that raises": (lambda: with_part(prior=Raises()), None, r"with nothing \(KeyError: 'no such"),
    "a prior that is a layer": (lambda: with_part(prior=nn.ReLU()), None, "the prior cannot be called with nothing"),
    "a prior without a forward": (lambda: with_part(prior=nn.Module()), None, "NotImplementedError"),
    "a prior that knows no context": (
        lambda: with_part(prior=Alone(), decoder=conditional_vae().decoder, encoder=conditional_vae().encoder),
        CONTEXT,
        "the prior cannot be called with a context of 2 numbers .*takes nothing or a context",
    ),
    "a prior of another context": (
        lambda: with_part(prior=pv.priors.ContextNormal(nn.Linear(3, 6)), encoder=conditional_vae().encoder),
        CONTEXT,
        "the prior was given a context of 2 numbers and was built for 3",
    ),
    "layers of an encoder": (
        lambda: with_part(encoder=pv.posteriors.DiagNormal(inner_mismatch(6))),
        None,
        r"the encoder cannot be called with rows of 6 numbers \(RuntimeError: mat1 and mat2",
    ),
    "layers of a decoder": (
        lambda: with_part(decoder=pv.likelihoods.Normal(inner_mismatch(3))),
        None,
        r"the decoder cannot be called with rows of 3 numbers \(RuntimeError: mat1 and mat2",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("caller", ["check", "fit", "describe"])
def test_parts_that_do_not_fit_are_refused_in_one_sentence(misfit, caller):
    make, context, message = MISFITS[misfit]
    vae, data = make(), Data(X, context=context)
    call = {
        "check": lambda: vae.check(X, context),
        "fit": lambda: pv.fit(vae, data, epochs=1, progress=False, device="cpu"),
        "describe": lambda: pv.describe(vae, context=context),
    }
    with pytest.raises(ModelError, match=message) as caught:
        call[caller]()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("context", "error", "message"),
    [
        (torch.zeros(1, 3), ModelError, "was built for"),
        (None, ModelError, "needs a context"),
        ([["a"]], DataError, "context: the values have type"),
        (torch.zeros(3), DataError, "context: the shape is"),
    ],
)
def test_describe_refuses_contexts_that_do_not_fit(context, error, message):
    with pytest.raises(error, match=message):
        pv.describe(conditional_vae(), context=context)


def test_describe_tells_parts_that_do_not_fit_and_takes_lists():
    vae = small_vae()
    vae.prior = pv.priors.StandardNormal(4).double()
    with pytest.raises(ModelError, match="the decoder was given rows of 4 numbers and was built for 3"):
        pv.describe(vae)
    assert pv.describe(conditional_vae(), context=[[0.0, 1.0]]).attrs["kl"] == "analytic"


def test_describe_says_the_distribution_of_each_part():
    vae = small_vae()
    assert pv.describe(vae).distribution.values.tolist() == ["Normal", "Normal", "Normal"]
    vae.prior = pv.priors.Laplace(3).double()
    vae.decoder = pv.likelihoods.Poisson(vae.decoder.net)
    vae.encoder = pv.posteriors.FullNormal(pv.nn.mlp(6, [8], pv.posteriors.FullNormal.outputs(3))).double()
    assert pv.describe(vae).distribution.values.tolist() == ["Laplace", "Poisson", "MultivariateNormal"]


# --- Data outside the support ---

CALLERS = {
    "fit": lambda vae, x: pv.fit(vae, x, epochs=1, progress=False, device="cpu"),
    "validation": lambda vae, x: pv.fit(vae, X, validation_data=x, epochs=1, progress=False, device="cpu"),
    "compare_elbos": lambda vae, x: pv.compare_elbos(vae, x, {"STL": pv.elbo.STL()}, draws=2),
    "log_evidence": lambda vae, x: pv.log_evidence(vae, x, num_particles=2),
    "to_datatree": lambda vae, x: pv.to_datatree(vae, x, draws=2),
    "rank": lambda vae, x: rank({"only": vae}, x, num_particles=2),
    "compare_models": lambda vae, x: pv.compare_models({"one": vae, "other": vae}, x, num_particles=2),
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("name", ["Poisson", "Bernoulli", "ContinuousBernoulli", "DiscretizedLogisticMixture"])
def test_data_outside_the_support_are_refused_by_every_caller(caller, name):
    kind = getattr(pv.likelihoods, name)
    vae = with_part(decoder=kind(pv.nn.mlp(3, [8], kind.outputs(6))))
    x = X.clone()
    CALLERS[caller](vae, x)
    x[3, 4] = -0.5
    columns = list("abcdef")
    with pytest.raises(DataError, match=f"^file.csv: row 3, column 'e' is -0.5, but {name} takes .*1 of 30") as caught:
        CALLERS[caller](vae, Data(x, columns=columns, source="file.csv"))
    assert "\n" not in str(caught.value)
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[3, 4] = False
    CALLERS[caller](vae, Data(x, mask=mask))  # what is missing may hold anything


# --- What is known of data stays with them ---


def test_nan_of_data_become_a_mask_and_the_rest_is_kept():
    x = torch.tensor([[1.0, torch.nan], [2.0, 3.0], [4.0, 5.0]])
    mask = torch.tensor([[True, True], [False, True], [True, True]])
    given = Data(x, torch.arange(3), torch.ones(3, 1), mask, columns=["a", "b"], image_shape=(1, 2), source="file.csv")
    data = mask_nan(given)
    assert data.x.tolist() == [[1, 0], [0, 3], [4, 5]]
    assert data.mask.tolist() == [[True, False], [False, True], [True, True]]
    for name in ("labels", "context", "columns", "image_shape", "source"):
        assert getattr(data, name) is getattr(given, name)
    assert mask_nan(Data(x)).mask.tolist() == [[True, False], [True, True], [True, True]]
    with pytest.raises(DataError, match=r"^file.csv: row 1 has no observed value"):
        mask_nan(Data(torch.full((2, 1), torch.nan).index_fill(0, torch.tensor([0]), 1.0), source="file.csv"))
    with pytest.raises(DataError, match=r"^file.csv: .*column 'b' \(inf"):
        mask_nan(Data(torch.tensor([[1.0, torch.inf]]), columns=["a", "b"], source="file.csv"))


def test_rows_and_splits_of_data_keep_context_mask_and_labels_together():
    numbers = torch.arange(10.0)
    mask = (torch.arange(10)[:, None] % 3) == torch.arange(3)
    data = Data(numbers[:, None].expand(10, 3), numbers.long(), numbers[:, None] + 100, mask, columns=list("abc"))
    for part in (data.rows(torch.tensor([7, 2, 5])), *pv.data.split(data, 0.3, seed=1)):
        index = part.x[:, 0].long()
        assert torch.equal(part.labels, index)
        assert torch.equal(part.context[:, 0], part.x[:, 0] + 100)
        assert torch.equal(part.mask, mask[index])
        assert part.columns == data.columns
    assert data.rows(torch.tensor([7, 2, 5])).x[:, 0].tolist() == [7, 2, 5]


# --- Images with a context ---


def test_images_with_a_context_are_made_flat_with_the_context_behind():
    """Also where images are as many as they are high, which could be mistaken for the context's rows."""
    x, context = torch.randn(3, 3, 4), torch.randn(3, 2)
    net = nn.Linear(12 + 2, 6)
    decoder = pv.likelihoods.Normal(nn.Sequential(nn.Linear(3 + 2, 12), nn.Unflatten(-1, (3, 4))))
    vae = pv.VAE(prior=pv.priors.StandardNormal(3), decoder=decoder, encoder=pv.posteriors.DiagNormal(net))
    q = vae.encoder(x, context)
    for i in range(3):
        out = net(torch.cat([x[i].flatten(), context[i]]))
        assert torch.allclose(q.mean[i], out[:3], atol=1e-6)
        assert torch.allclose(vae.encoder(x[i], context[i]).mean, out[:3], atol=1e-6)
    data = Data(x, context=context)
    pv.fit(vae, data, epochs=1, progress=False, device="cpu")
    assert pv.log_evidence(vae, data, num_particles=5).sizes["datum"] == 3
    vae.encoder = pv.posteriors.DiagNormal(nn.Linear(12, 6))
    with pytest.raises(ModelError, match=r"rows of 3 × 4 \+ 2 numbers and was built for 12"):
        vae.check(x, context)


def test_a_convolutional_encoder_takes_a_context_as_channels():
    net = pv.nn.conv_encoder((2, 5, 4), [6], 3, context=2).double()
    image, context = torch.randn(7, 2, 5, 4).double(), torch.randn(7, 2).double()
    planes = torch.cat([image, context[..., None, None] * torch.ones(5, 4)], 1)
    found = net(torch.cat([image.flatten(1), context], -1))
    assert torch.allclose(found, net.body(planes), atol=1e-12)
    assert not torch.allclose(found, net(torch.cat([image.flatten(1), context.roll(1, 0)], -1)), atol=1e-3), "power"
    with pytest.raises(ModelError, match=r"rows of 40 numbers and was built for 2 × 5 × 4 \+ 2"):
        net(image.flatten(1))
    with pytest.raises(SettingsError, match="context is -1"):
        pv.nn.conv_encoder((2, 5, 4), [6], 3, context=-1)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(3),
        decoder=pv.likelihoods.Normal(pv.nn.conv_decoder(3 + 2, [6], (2, 5, 4))),
        encoder=pv.posteriors.DiagNormal(pv.nn.conv_encoder((2, 5, 4), [6], 6, context=2)),
    )
    rows = Rows(image.flatten(1).float(), context.float())
    assert pv.log_evidence(vae, rows, num_particles=5).log_evidence.notnull().all()


@pytest.mark.parametrize("size", [1e5, 300.0])
def test_columns_of_large_numbers_are_told_to_be_scaled(size):
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [32], 3)),
        encoder=pv.posteriors.DiagNormal(nn.Sequential(pv.nn.mlp(3, [32], 4), Times())),
    )
    with pytest.raises(ModelError, match=r"parameters outside the range of its distribution.*standardize the columns"):
        vae.check(size * torch.ones(5, 3))
    vae.check(torch.ones(5, 3) * 1e-3)
