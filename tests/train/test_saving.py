"""``save`` and ``load``: every part comes back to the bit, and nothing is made that was not asked for."""

import copy
import json
import warnings
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.members import FEATURES, LATENTS, LIKELIHOODS, POSTERIORS, PRIORS, WithContext
from torch import nn

import pyro_vae as pv
from pyro_vae.data.fingerprint import Trained, row_hashes
from pyro_vae.errors import DataError, OutputError, SettingsError, WeightsOnlyWarning
from pyro_vae.train.checkpoint import describe
from pyro_vae.train.checkpoint.describe import describe_vae
from pyro_vae.train.checkpoint.save_load import load, save
from pyro_vae.train.checkpoint.tensor_file import read_tree, write_tree


def vae_of(prior="StandardNormal", likelihood="Normal", posterior="DiagNormal") -> pv.VAE:
    """A VAE of members by their names, none of its weights as it was made, one step of bookkeeping behind it."""
    torch.manual_seed(0)
    vae = pv.VAE(prior=PRIORS[prior](), decoder=LIKELIHOODS[likelihood](), encoder=POSTERIORS[posterior]()).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    vae.trained_on = Trained.on(row_hashes(pv.data.Rows(torch.arange(12.0).reshape(2, 6))))
    return vae


def there_and_back(vae, tmp_path, **how) -> pv.VAE:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(vae, tmp_path / "vae.safetensors")
    before = torch.get_rng_state()
    again = load(tmp_path / "vae.safetensors", **how)
    assert torch.equal(before, torch.get_rng_state()), "loading draws no random number"
    return again


def log_densities(vae: pv.VAE) -> list[torch.Tensor]:
    torch.manual_seed(3)
    x, z = torch.rand(4, FEATURES).double().round(), torch.randn(4, LATENTS).double()
    own = next(vae.parameters()).dtype
    x, z = x.to(own), z.to(own)
    return [vae.prior().log_prob(z), vae.decoder(z).log_prob(x), vae.encoder(x).log_prob(z)]


def assert_the_same(vae: pv.VAE, again: pv.VAE) -> None:
    mine, theirs = vae.state_dict(), again.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    assert repr(vae) == repr(again)
    for one, other in zip(log_densities(vae), log_densities(again), strict=True):
        assert torch.equal(one, other)
    assert again.trained_on.as_text() == vae.trained_on.as_text()
    names = [name for name, _ in vae.named_parameters(remove_duplicate=False)]
    assert names == [name for name, _ in again.named_parameters(remove_duplicate=False)]
    assert not {p.data_ptr() for p in vae.parameters()} & {p.data_ptr() for p in again.parameters()}


PAIRS = (
    [(prior, "Normal", "DiagNormal") for prior in PRIORS]
    + [("StandardNormal", likelihood, "DiagNormal") for likelihood in LIKELIHOODS]
    + [("StandardNormal", "Normal", posterior) for posterior in POSTERIORS]
    + [("VampPrior", "Blocks", "Refined"), ("Flow", "StudentT", "Flow")]
)


@pytest.mark.parametrize("members", PAIRS, ids=" · ".join)
def test_every_member_comes_back_to_the_bit(members, tmp_path):
    vae = vae_of(*members)
    again = there_and_back(vae, tmp_path, classes=[WithContext])
    assert_the_same(vae, again)
    with torch.no_grad():
        next(iter(again.guide.parameters())).view(-1)[0] += 1e-12
    assert not torch.equal(next(iter(again.guide.parameters())), next(iter(vae.guide.parameters()))), "power"


@pytest.mark.slow
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_every_combination_comes_back_to_the_bit(prior, likelihood, posterior, tmp_path):
    vae = vae_of(prior, likelihood, posterior)
    assert_the_same(vae, there_and_back(vae, tmp_path, classes=[WithContext]))


NETS = {
    "layer norm": lambda: pv.nn.mlp(FEATURES, [8, 7], 2 * LATENTS, activation=nn.SiLU, norm=nn.LayerNorm),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(FEATURES, 2 * LATENTS, bias=False)),
    "batch norm": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8, eps=1e-3), nn.Linear(8, 2 * LATENTS)),
    "images": lambda: pv.nn.conv_encoder((1, 2, 3), [4, 5], 2 * LATENTS, activation=lambda: nn.LeakyReLU(0.2)),
    "images and back": lambda: nn.Sequential(pv.nn.conv_decoder(FEATURES, [4], (1, 3, 2)), nn.PReLU()),
    "named": lambda: nn.Sequential(
        OrderedDict(first=nn.Linear(FEATURES, 4), then=nn.Tanh(), last=nn.Linear(4, 2 * LATENTS))
    ),
    "pooled": lambda: nn.Sequential(
        nn.Unflatten(-1, (1, 6)), nn.Conv1d(1, 2, 3, padding="same", padding_mode="circular"), nn.Flatten(),
        nn.GELU("tanh"), nn.Linear(12, 2 * LATENTS), nn.Softplus(2.0), nn.Identity(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("net", NETS)
def test_every_kind_of_network_comes_back(net, tmp_path):
    vae = vae_of()
    vae.encoder = pv.posteriors.DiagNormal(NETS[net]().double()).eval()
    assert_the_same(vae, there_and_back(vae, tmp_path))


def test_what_neither_weights_nor_arguments_tell_comes_back(tmp_path):
    vae = vae_of().float()
    vae.decoder.eval()
    vae.prior.loc += 0.25  # a buffer that no state_dict holds
    vae.encoder.net[0].weight.requires_grad_(False)
    again = there_and_back(vae, tmp_path)
    assert_the_same(vae, again)
    assert torch.equal(again.prior.loc, torch.full((LATENTS,), 0.25))
    assert [m.training for m in vae.modules()] == [m.training for m in again.modules()]
    assert [p.requires_grad for p in vae.parameters()] == [p.requires_grad for p in again.parameters()]


def test_copies_are_saved_too_and_share_nothing_with_the_first(tmp_path):
    vae = vae_of("VampPrior", "Blocks", "Refined")
    copied = copy.deepcopy(vae)
    assert_the_same(copied, there_and_back(copied, tmp_path))
    assert vars(copied.encoder)["_made_of"][0][0] is not vars(vae.encoder)["_made_of"][0][0]


def test_what_is_shared_stays_shared(tmp_path):
    vae = vae_of()
    vae.decoder = pv.likelihoods.Normal(nn.Sequential(vae.encoder.net, vae.encoder.net).double())
    vae.encoder.net[2] = nn.Linear(8, FEATURES).double()
    again = there_and_back(vae, tmp_path)
    assert again.decoder.net[0] is again.decoder.net[1] is again.encoder.net
    assert len(list(again.parameters())) == len(list(vae.parameters()))
    bound = there_and_back(vae_of("VampPrior"), tmp_path)
    assert bound.prior._encoder[0] is bound.encoder


def test_training_data_are_not_in_the_file(tmp_path):
    """A VampPrior is made of them."""
    data = torch.rand(5000, FEATURES)
    vae = vae_of()
    vae.prior = pv.priors.VampPrior(data, components=2).double()
    assert_the_same(vae, there_and_back(vae, tmp_path))
    assert (tmp_path / "vae.safetensors").stat().st_size < 20_000 < data.nbytes


class MyPrior(pv.priors.Prior):
    """A prior of a user: what it is made of is kept without any doing of its own."""

    def __init__(self, latents: int, *, widths: list[float]) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(widths).log())

    def forward(self):
        import pyro.distributions as dist

        return dist.Normal(0.0, self.log_scale.exp()).to_event(1)


class Opaque(nn.Module):
    """A network of a user that does not keep what it was made of."""

    def __init__(self, size):
        super().__init__()
        self.inner = nn.Linear(FEATURES, size)

    def forward(self, x):
        return self.inner(x)


def mine() -> pv.VAE:
    vae = vae_of()
    vae.prior = MyPrior(LATENTS, widths=[1.0, 2.0, 3.0]).double()
    return vae


def test_a_class_of_the_users_is_made_only_when_handed_over(tmp_path):
    vae = mine()
    assert_the_same(vae, there_and_back(vae, tmp_path, classes=[MyPrior]))
    for classes in ((), [Opaque]):
        with pytest.raises(
            DataError,
            match=r"contains .*test_saving\.MyPrior, a class that is not part of this library; .*pass classes",
        ):
            load(tmp_path / "vae.safetensors", classes=classes)
    with pytest.raises(SettingsError, match="must hold module classes"):
        load(tmp_path / "vae.safetensors", classes=["MyPrior"])


def with_attribute(vae):
    vae.prior = pv.priors.StudentT(LATENTS, df=5.0).double()
    vae.prior.df = 7.0
    return vae


def with_network(vae):
    vae.encoder.net = Opaque(2 * LATENTS).double()
    return vae


def with_hook(vae):
    vae.encoder.net.register_forward_hook(lambda *_: None)
    return vae


def with_tied_weights(vae):
    vae.decoder.net[0].bias = vae.encoder.net[0].bias
    return vae


def with_parametrization(vae):
    nn.utils.parametrizations.weight_norm(vae.encoder.net[0])
    return vae


def with_function(vae):
    vae.encoder.net.extra = torch.relu
    return vae


class Configured(nn.Linear):
    """A network of a user that makes its settings itself."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.scale, self.tags, self.table, self.kinds = 1.0, {1, 2}, np.ones(2), [partial(nn.Linear, 3)]


CHANGED = {"scale": 5.0, "tags": {3}, "table": np.zeros(2), "kinds": [partial(nn.Linear, 4)], "spare": None}


@pytest.mark.parametrize("name", CHANGED)
def test_an_attribute_that_was_changed_is_seen(name, tmp_path):
    vae = vae_of()
    vae.encoder.net = Configured(FEATURES, 2 * LATENTS).double()
    assert_the_same(vae, there_and_back(vae, tmp_path, classes=[Configured]))
    setattr(vae.encoder.net, name, CHANGED[name])
    with pytest.warns(WeightsOnlyWarning, match=f"{name} was changed after construction"):
        save(vae, tmp_path / "b")


UNDESCRIBED = {
    with_attribute: "vae.model.prior.df was changed after construction",
    with_network: "vae.encoder.net is an Opaque, which does not store its argument size as an attribute",
    with_hook: "vae.guide.encoder.net._forward_hooks was changed",
    with_tied_weights: "how they are shared, differ",
    with_parametrization: "disagree on whether it has guide.encoder.net.0.parametrizations",
    with_function: "vae.guide.encoder.net.extra was changed",
}


@pytest.mark.parametrize("change", UNDESCRIBED, ids=lambda change: change.__name__)
def test_what_has_no_description_is_saved_as_weights_and_says_so(change, tmp_path):
    vae, path = change(vae_of()), tmp_path / "vae.safetensors"
    with pytest.warns(WeightsOnlyWarning, match="contains only the weights, as ") as caught:
        save(vae, path)
    assert UNDESCRIBED[change] in str(caught[0].message)
    with pytest.raises(DataError, match="contains only weights; pass into=, a VAE built like the saved one"):
        load(path)
    again = change(vae_of())
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.trained_on = None
    assert load(path, into=again) is again
    assert_the_same(vae, again)


def test_another_architecture_is_refused_and_left_as_it_was(tmp_path):
    save(vae_of(), tmp_path / "a")
    for other, said in (
        (vae_of("Normal"), "missing weight model.prior.loc"),
        (vae_of("StandardNormal", "Bernoulli"), "unexpected weight model.decoder.fixed_scale"),
        (vae_of().float(), "is a single float64, not a single float32"),
        (vae_of(likelihood="Categorical"), "unexpected"),
    ):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(DataError, match="the architecture differs") as caught:
            load(tmp_path / "a", into=other)
        assert said in str(caught.value)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in before.items())


TRAPS = [
    "os.system", "builtins.eval", "torch.hub.load", "torch.load", "pyro_vae.cli.main", "pyro_vae.priors.torch",
    "subprocess.Popen", "torch.nn.functional.relu", "torch.nn.init.normal_", "pyro_vae.train.Fit", "sys.modules",
    "zuko.flows.partial", "this.that", "torch.distributions.transforms.weakref", "pyro_vae.__main__.main", "nodots",
    "", "torch.nn.Module.zero_grad", "torch.optim.Adam", "torch.nn.modules.module.torch",
]  # fmt: skip


@pytest.mark.parametrize("path", TRAPS)
@pytest.mark.parametrize("role", ["module", "class", "partial"])
def test_nothing_but_modules_is_ever_made_of_a_file(path, role, tmp_path, monkeypatch):
    """A file whose checksum holds, made to run something."""
    tree, _ = describe_vae(vae_of())
    trap = {"class": path, "arguments": {}, "positional": ["touch sprung"]}
    value = {"module": trap, "class": path, "partial": [path, ["x"], []]}[role]
    tree["made"]["arguments"]["prior"] = {"module": {"class": "torch.nn.Sequential", "modules": {"0": {role: value}}}}
    vae = vae_of()
    write_tree(tmp_path / "a", {**vae.state_dict(), "vae": tree}, {"kind": "VAE"})
    with pytest.raises(DataError) as caught:
        load(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_a_module_that_is_no_vae_is_refused(tmp_path):
    vae = vae_of()
    tree, _ = describe_vae(vae)
    write_tree(tmp_path / "a", {"vae": {**tree, "made": tree["made"]["arguments"]["prior"]["module"]}}, {"kind": "VAE"})
    with pytest.raises(DataError):
        load(tmp_path / "a")


def test_what_holds_no_vae_is_refused(tmp_path):
    write_tree(tmp_path / "a", [1, 2])
    with pytest.raises(DataError, match="contains no VAE"):
        load(tmp_path / "a")
    with pytest.raises(DataError, match=r"contains no weights.safetensors and no checkpoint"):
        load(tmp_path)
    with pytest.raises(OutputError, match="cannot be written"):
        save(vae_of(), tmp_path / "no" / "a")


def test_a_run_folder_gives_its_weights_or_its_newest_checkpoint(tmp_path):
    from pyro_vae.train.checkpoint.rotation import Checkpoints

    one, other = vae_of(), vae_of("Laplace")
    described, _ = describe_vae(one)
    about = {"trained_on": one.trained_on.as_text()}
    Checkpoints(tmp_path).write(7, {"weights": one.state_dict(), "vae": described}, about)
    assert_the_same(one, load(tmp_path))
    save(other, tmp_path / "weights.safetensors")
    assert_the_same(other, load(tmp_path))


def test_the_file_says_what_it_is_made_of(tmp_path):
    save(vae_of(), tmp_path / "a")
    tree, about = read_tree(tmp_path / "a")
    assert about["versions"].keys() == {"pyro_vae", "pyro", "torch", "python"}
    decoder = tree["vae"]["made"]["arguments"]["decoder"]["module"]
    assert decoder["class"] == "pyro_vae.likelihoods.Normal"
    assert decoder["arguments"]["scale"] == 0.7
    assert '"class": "torch.nn.Linear", "arguments": {"in_features": 3' in json.dumps(decoder)


def test_a_run_tries_out_its_description_once(tmp_path, monkeypatch):
    tried, made = [], describe.make_vae
    monkeypatch.setattr(describe, "make_vae", lambda *args: tried.append(1) or made(*args))
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [], 3)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(3, [], 4)),
    )
    kept = pv.Checkpoints(tmp_path, steps=1, minutes=None, keep=9)
    pv.fit(vae, torch.randn(16, 3), batch_size=8, epochs=4, checkpoints=kept, progress=False, device="cpu")
    files = sorted((tmp_path / "checkpoints").iterdir())
    assert (len(files), len(tried)) == (8, 1)
    for path in files:
        assert repr(load(path)) == repr(vae)
    assert torch.equal(load(files[-1]).decoder.net[0].weight, vae.decoder.net[0].weight)


SAVED = Path(__file__).with_name("saved_by_0_1")
"""Files of format 1, written by pyro-vae 0.1, and the log-densities of their VAEs by the last code that wrote them."""


def untrained() -> pv.VAE:
    """A VAE of the architecture of ``weights_only``, of which the hook has no description."""
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [3], 4), scale=0.7),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(4, [3], 4)),
    ).double()


@pytest.mark.parametrize("name", ["plain", "blocks", "tied", "flow", "weights_only"])
def test_a_vae_saved_in_the_first_format_loads(name):
    path, told = SAVED / f"{name}.safetensors", json.loads((SAVED / "log_densities.json").read_text())
    vae = load(path, into=untrained() if name == "weights_only" else None).eval()
    weights, _ = read_tree(path)
    assert all(torch.equal(value, weights[key]) for key, value in vae.state_dict().items())
    x, z = (torch.tensor(told[key], dtype=torch.float64) for key in "xz")
    found = vae.prior().log_prob(z), vae.decoder(z).log_prob(x), vae.encoder(x).log_prob(z)
    for now, then in zip(found, told["log p(z), log p(x|z), log q(z|x)"][name], strict=True):
        torch.testing.assert_close(now, torch.tensor(then, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_what_neither_weights_nor_arguments_tell_comes_back_of_the_first_format():
    vae = load(SAVED / "plain.safetensors")
    assert torch.equal(vae.prior.loc, torch.full((2,), 0.25).double())
    assert (vae.decoder.training, vae.encoder.training) == (False, True)
    assert [name for name, p in vae.named_parameters() if not p.requires_grad] == ["guide.encoder.net.0.weight"]
    tied = load(SAVED / "tied.safetensors")
    assert tied.decoder.net[1] is tied.encoder.net[0]


def test_a_damaged_file_of_the_first_format_is_refused(tmp_path):
    data = bytearray((SAVED / "plain.safetensors").read_bytes())
    for place in range(0, len(data), 97):
        data[place] ^= 1
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(DataError, match="damaged"):
            load(tmp_path / "a")
        data[place] ^= 1


def test_a_run_of_the_first_format_is_loaded_and_not_resumed():
    vae = load(SAVED / "run")
    with pytest.raises(
        DataError, match="was started by an earlier pyro-vae and cannot be resumed by this version; load"
    ):
        pv.fit(vae, torch.tensor([[0.0, 1.0, 1.0, 2.0], [1.0, 0.0, 0.0, 1.0]]), resume=SAVED / "run", progress=False)


@pytest.mark.parametrize("whole", [True, False])
def test_weights_that_are_not_numbers_are_refused(whole, tmp_path):
    vae = vae_of()
    with torch.no_grad():
        vae.decoder.net[0].bias[1] = torch.nan
    save(vae, tmp_path / "vae.safetensors")
    with pytest.raises(DataError, match=r"weight model\.decoder\.net\.0\.bias is not finite"):
        load(tmp_path / "vae.safetensors", **({} if whole else {"into": vae_of()}))
