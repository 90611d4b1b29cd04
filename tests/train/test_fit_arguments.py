"""``fit`` takes what a user of torch or Pyro brings, or says in one sentence what to write."""

import copy
from functools import partial

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from helpers.checks import small_vae
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.errors import DataError, SettingsError

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
quiet_fit = partial(pv.fit, epochs=2, batch_size=16, progress=False, device="cpu", engine="eager")


@pytest.mark.parametrize(("validation", "expected"), [(X, True), (X[:9], True), (X + 1, False)])
def test_validation_data_that_are_training_data_are_reported(validation, expected, capsys):
    pv.fit(small_vae().double(), X, validation_data=validation, epochs=1, device="cpu", engine="eager")
    shown = " ".join("".join(capsys.readouterr()).split())
    assert (f"{len(validation)} of its {len(validation)} rows" in shown) == expected


def weights(vae):
    return torch.cat([value.flatten() for value in vae.state_dict().values()])


def trained(**settings):
    vae = small_vae()
    quiet_fit(vae, X, **{name: give(vae) for name, give in settings.items()})
    return weights(vae)


adam = partial(torch.optim.Adam, lr=0.01)
steps = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)

ALIKE = {
    "a class": (lambda vae: torch.optim.Adam, lambda vae: lambda parameters: torch.optim.Adam(parameters, lr=1e-3)),
    "an optimizer of its parameters": (lambda vae: adam(vae.parameters()), lambda vae: adam),
    "a schedule of such": (lambda vae: steps(adam(vae.parameters())), lambda vae: lambda p: steps(adam(p))),
    "Pyro's": (lambda vae: pyro.optim.Adam({"lr": 0.01}), lambda vae: adam),
    "Pyro's ClippedAdam": (
        lambda vae: pyro.optim.ClippedAdam({"lr": 0.01, "clip_norm": 0.5}),
        lambda vae: partial(pyro.optim.clipped_adam.ClippedAdam, lr=0.01, clip_norm=0.5),
    ),
    "Pyro's schedule": (
        lambda vae: pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.5}),
        lambda vae: lambda p: steps(adam(p)),
    ),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_every_kind_of_optimizer_is_taken(kind):
    one, other = (trained(optimizer=give) for give in ALIKE[kind])
    assert torch.equal(one, other)
    assert not torch.equal(one, weights(small_vae()))


def test_an_optimizer_goes_on_with_its_state():
    vae, other = small_vae(), small_vae()
    optimizer = adam(vae.parameters())
    quiet_fit(vae, X, optimizer=optimizer)
    quiet_fit(vae, X, optimizer=optimizer)
    for _ in range(2):
        quiet_fit(other, X, optimizer=adam)
    assert {int(state["step"]) for state in optimizer.state.values()} == {12}
    assert not torch.equal(weights(vae), weights(other)), "the moments of Adam were kept"


def test_an_optimizer_of_some_parameters_trains_those():
    vae = small_vae()
    before = copy.deepcopy(vae)
    quiet_fit(vae, X, optimizer=torch.optim.Adam(vae.guide.parameters()))
    assert torch.equal(weights(vae.model), weights(before.model))
    assert not torch.equal(weights(vae.guide), weights(before.guide))


def test_a_class_of_an_estimator_is_taken():
    assert torch.equal(trained(elbo=lambda vae: pv.elbo.STL), trained(elbo=lambda vae: pv.elbo.STL()))
    assert torch.equal(trained(elbo=lambda vae: pv.elbo.Trace_ELBO), trained())


def stepped(loss):
    vae = small_vae()
    svi = pv.CompiledSVI(vae.model, vae.guide, adam(vae.parameters()), loss, backend="eager")
    torch.manual_seed(1)
    svi.run(X, steps=3, batch_size=len(X), size=len(X))
    return weights(vae)


def compared(loss):
    return pv.compare_elbos(small_vae(), X, {"a": loss}, draws=2)


def test_every_way_in_takes_a_class_of_an_estimator():
    assert torch.equal(stepped(pv.elbo.STL), stepped(pv.elbo.STL()))
    assert compared(pv.elbo.STL).value.equals(compared(pv.elbo.STL()).value)
    assert repr(pv.elbo.InfoVAE(pv.elbo.IWAE)) == repr(pv.elbo.InfoVAE(pv.elbo.IWAE()))


@pytest.mark.parametrize(
    ("way_in", "name"),
    [(stepped, "loss"), (compared, r"elbos\['a'\]"), (pv.elbo.Beta, "elbo")],
    ids=["svi", "compare", "Beta"],
)
def test_every_way_in_says_what_estimator_was_meant(way_in, name):
    for given, said in {
        "iwae": rf"{name} is 'iwae'; did you mean {name}=pyro_vae\.elbo\.IWAE\(\)\?",
        3: f"{name} is 3; pass, e.g.,",
        torch.optim.Adam: f"{name} is <class",
        pv.elbo.Beta: f"{name} is a class that needs settings",
    }.items():
        with pytest.raises(SettingsError, match=said) as error:
            way_in(given)
        assert "\n" not in str(error.value)
        assert "Estimator" not in str(error.value).split("has ")[-1], "the base of all is no choice"


def test_estimators_without_names_are_told_how_to_name_them():
    for given, said in ((pv.elbo.STL, "the class STL"), (pv.elbo.STL(), "a STL"), ([pv.elbo.STL()], "a list")):
        with pytest.raises(SettingsError, match=f"elbos is {said}; pass a dict of estimators"):
            pv.compare_elbos(small_vae(), X, given)


REFUSED = [
    ({"optimizer": "adam"}, r"optimizer is 'adam'; did you mean optimizer=torch\.optim\.Adam\?"),
    ({"optimizer": "what"}, r"optimizer is 'what'; pass optimizer=torch\.optim\.Adam"),
    ({"optimizer": 1e-3}, r"pass optimizer=functools\.partial\(torch\.optim\.Adam, lr=0\.001\)"),
    ({"optimizer": torch.optim.lr_scheduler.StepLR}, "StepLR, a schedule; pass optimizer=lambda p:"),
    ({"optimizer": pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0})}, "pass clip_norm= to fit"),
    ({"optimizer": pyro.optim.Adam(lambda name: {"lr": 0.1})}, "settings per parameter name"),
    ({"optimizer": torch.optim.Adam(small_vae().parameters())}, "of another VAE.*vae.parameters"),
    ({"optimizer": lambda parameters: None}, "returned a NoneType; it must return a torch optimizer"),
    ({"elbo": "iwae"}, r"elbo is 'iwae'; did you mean elbo=pyro_vae\.elbo\.IWAE\(\)\?"),
    ({"elbo": "Trace_Elbo"}, r"did you mean elbo=pyro_vae\.elbo\.Trace_ELBO\(\)"),
    ({"elbo": 3}, "elbo is 3; pass, e.g., .* pyro_vae.elbo has .*IWAE"),
    ({"elbo": pv.elbo.Beta}, "elbo is a class that needs settings"),
    ({"elbo": pv.elbo.Estimator}, "elbo is a class that needs settings"),
    ({"lr": 1e-3}, r"fit has no setting lr; give optimizer=functools\.partial\(torch\.optim\.Adam, lr=0\.001\)"),
    ({"epoch": 3}, r"fit has no setting epoch; did you mean epochs=3\?"),
    ({"loss": None}, "fit has no setting loss; give elbo=None"),
    ({"zzz": 1}, "fit has no setting zzz; it takes vae, data, elbo, optimizer, epochs"),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_what_is_not_taken_is_told_in_one_sentence(settings, sentence):
    vae = small_vae()
    before = weights(vae)
    with pytest.raises(SettingsError, match=sentence) as error:
        quiet_fit(vae, X, **settings)
    assert "\n" not in str(error.value)
    assert torch.equal(weights(vae), before)


def test_an_optimizer_with_a_state_is_refused_by_workers():
    vae = small_vae()
    with pytest.raises(SettingsError, match="workers cannot return the state"):
        quiet_fit(vae, X, optimizer=adam(vae.parameters()), devices=2)


def test_a_tensor_data_set_is_taken_without_its_labels():
    vae = small_vae()
    quiet_fit(vae, TensorDataset(X, torch.arange(40)), validation_data=TensorDataset(X))
    assert torch.equal(weights(vae), trained())


class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        return X[i]


PIECES = [DataLoader(X), DataLoader(TensorDataset(X)), Items(), iter(X), (row for row in X)]


@pytest.mark.parametrize("data", PIECES, ids=[type(data).__name__ for data in PIECES])
def test_what_gives_rows_piece_by_piece_is_told_of_streams(data):
    with pytest.raises(DataError, match=r"gives rows in batches; .*pyro_vae\.data\.stream"):
        quiet_fit(small_vae(), data)
    with pytest.raises(DataError, match=r"gives rows in batches; .*one tensor"):
        pv.log_evidence(small_vae(), data)


def test_a_path_is_told_of_load():
    with pytest.raises(DataError, match=r"'rows\.csv' is a path; read it with pyro_vae\.data\.load"):
        quiet_fit(small_vae(), "rows.csv")


def test_predictive_draws_from_the_prior_without_data():
    vae = pv.exact.LinearGaussian(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, -1.0]), 0.5).as_vae()
    for parallel, n in ((False, 60), (True, 4000)):
        drawn = pyro.infer.Predictive(vae.model, num_samples=n, parallel=parallel)(None, size=3)
        assert drawn["z"].shape == (n, 3, 1)
        assert drawn["x"].shape == (n, 3, 2)
        x = drawn["x"].flatten(0, 1)
        truth = torch.tensor([[1.0, 2.0], [2.0, 4.0]]) + 0.25 * torch.eye(2)
        spread = (2 / (3 * n)) ** 0.5
        assert ((x.mean(0) - torch.tensor([3.0, -1.0])) / (truth.diagonal() / (3 * n)).sqrt()).abs().max() < 5
        assert ((torch.cov(x.T) - truth).diagonal() / truth.diagonal() / spread).abs().max() < 5
    given = {"z": torch.full((7, 3, 1), 100.0)}
    assert pyro.infer.Predictive(vae.model, given)(None, size=3)["x"][..., 0].min() > 90


def test_predictive_draws_as_many_rows_as_the_context_has():
    vae = pv.VAE(
        prior=pv.priors.ContextNormal(pv.nn.mlp(2, [], 4)),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(4, [], 3)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(5, [], 4)),
    )
    context = torch.randn(5, 2)
    assert pyro.infer.Predictive(vae.model, num_samples=4)(None, None, context)["x"].shape == (4, 5, 3)
    with pytest.raises(SettingsError, match="size is 3 but the context has 5 rows"):
        vae.model(None, 3, context)


def test_without_data_or_a_size_there_is_nothing_to_draw():
    vae = small_vae()
    with pytest.raises(SettingsError, match="x is None; give size="):
        vae.model(None)
    with pytest.raises(SettingsError, match="size is 0"):
        vae.model(None, size=0)
    with pytest.raises(DataError, match="x is None, but the guide infers z from data"):
        vae.guide(None, size=3)
    assert vae.model(None, size=np.int64(3)).shape == (3, 6)


def first_validation_elbo(data, validation):
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(1),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(1, [], 3)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(3, [], 2)),
    )
    return quiet_fit(vae, data, validation_data=validation).history.validation_elbo.values[0]


def test_validation_data_are_matched_by_name_at_the_first_fit():
    """The columns are 10 apart, so that another order is far off; a category is absent."""
    x = pd.DataFrame({"a": X[:, 0] * 0.1, "b": 10 + X[:, 1], "c": list("uvwv") * 10})
    new = x[x.c != "u"]
    expected = first_validation_elbo(x, pv.data.load(new, like=pv.data.load(x)))
    for given in (new, new[list("cba")], pv.data.load(new[list("cba")])):
        assert first_validation_elbo(x, given) == expected
    assert first_validation_elbo(pv.data.load(x), new[list("cba")]) == expected
    with pytest.raises(DataError, match="validation data: column 'b' of the training data is missing"):
        first_validation_elbo(x, x.drop(columns="b"))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pv.fit(small_vae(), X, pv.elbo.STL()), "fit takes only vae and data without a name; .*elbo=STL"),
        (lambda: pv.log_evidence(small_vae(), X, 100), "only vae and x without a name.* example as num_particles=100"),
    ],
)
def test_a_setting_without_its_name_gets_a_sentence(call, says):
    with pytest.raises(SettingsError, match=says):
        call()
