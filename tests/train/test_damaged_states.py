"""A checkpoint with a right checksum but a wrong state is refused in a sentence that names its file."""

import copy
import functools
import math
import shutil

import pytest
import torch

import pyro_vae as pv
from pyro_vae.errors import DataError
from pyro_vae.train.checkpoint.tensor_file import read_tree, write_tree

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))


def trained(folder, epochs, **given):
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [], 3)),
        encoder=pv.posteriors.DiagNormal(torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 4))),
    )
    vae.encoder.net[0].register_buffer("hidden", torch.ones(2), persistent=False)
    return pv.fit(
        vae, X[:8], validation_data=X[8:], epochs=epochs, checkpoints=folder, batch_size=4, progress=False,
        device="cpu", engine="eager", **given,
    )  # fmt: skip


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    trained(folder, 2)
    (path,) = sorted(folder.glob("checkpoints/*"))[-1:]
    return path


ODD = {
    "progress": {
        "step": ["x", -5, 10**30, 3, 4.0], "seen": ["x", -1, 10**9], "total": ["x", math.nan],
        "seconds": [None, math.nan], "epochs": [5, [{}], [{"step": "x"}] * 2, None], "stopped": [5],
        "values": ["x", [[]], {"validation": 7}],
        "best": [[1], "x", [math.nan] * 3, [1, torch.zeros(3)]],
    },
    "tree": {
        "progress": [None], "random": [7, ["x"], [{"cpu": torch.zeros(3, dtype=torch.uint8), "cuda": None}]],
        "engine": [7], "estimator": [[torch.zeros(2)], 7], "buffers": [{}, 7], "callbacks": [5], "vae": ["x"],
        "good": [5], "optimizer": [7, {}], "weights": [7],
    },
    "buffers": {"net.0.hidden": [torch.zeros(1), torch.full((2,), math.nan), 7]},
    "group": {"lr": ["x", math.nan, -1.0, None], "betas": [[1.0, 1.0], 7], "eps": ["x"]},
    "state": {"exp_avg": [torch.zeros(7), None, 7], "exp_avg_sq": [torch.full((4,), math.nan)], "step": ["x"]},
    "about": {"begun_with": [[1], None], "trained_on": ["x", 7]},
}  # fmt: skip
CASES = [(where, name, value) for where, names in ODD.items() for name, values in names.items() for value in values]


@pytest.mark.parametrize(("where", "name", "value"), CASES, ids=lambda value: f"{value!s:.20}")
def test_a_state_of_another_kind_is_refused(where, name, value, killed, tmp_path):
    tree, about = read_tree(killed)
    tree, about = copy.deepcopy(tree), copy.deepcopy(about)
    key = next(key for key in tree["buffers"] if key.endswith(name)) if where == "buffers" else name
    optimizer = tree["optimizer"]
    places = {"group": optimizer["param_groups"][0], "about": about, "tree": tree, "progress": tree["progress"]}
    places |= {
        "buffers": tree["buffers"],
        "state": max(optimizer["state"].values(), key=lambda s: s["exp_avg"].numel()),
    }
    if value is None:
        del places[where][key]
    else:
        places[where][key] = value
    refused(killed, tmp_path, tree, about)


def refused(killed, tmp_path, tree, about):
    shutil.copytree(killed.parent.parent, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / killed.name
    write_tree(path, tree, about)
    with pytest.raises(DataError, match=r".*; ") as caught:
        trained(tmp_path / "run", 3, resume=tmp_path / "run")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("gamma", "x"), ("last_epoch", "x"), ("step", 7), ("base_lrs", 7)])
def test_a_damaged_schedule_is_refused(name, value, tmp_path):
    def schedule(parameters):
        return torch.optim.lr_scheduler.ExponentialLR(torch.optim.SGD(parameters, lr=1e-3), 0.9)

    trained(tmp_path, 1, optimizer=schedule)
    (path,) = sorted(tmp_path.glob("checkpoints/*"))[-1:]
    tree, about = read_tree(path)
    tree["scheduler"][name] = value
    write_tree(path, tree, about)
    with pytest.raises(DataError, match=r"safetensors: the state of the training is damaged"):
        trained(tmp_path, 2, optimizer=schedule, resume=tmp_path)


def test_a_damaged_state_to_roll_back_to_is_refused(killed, tmp_path):
    tree, about = read_tree(killed)
    tree["good"] = {name: value for name, value in copy.deepcopy(tree).items() if name not in ("good", "vae")}
    tree["good"]["optimizer"]["state"][0].pop("exp_avg")
    tree["good"]["progress"]["epochs"] = 5
    refused(killed, tmp_path, tree, about)


def test_what_is_lost_of_a_bug_is_not(killed, tmp_path, monkeypatch):
    """Lack of memory is no damage of a file."""
    monkeypatch.setattr("pyro_vae.train.run.restore", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    shutil.copytree(killed.parent.parent, tmp_path / "run")
    with pytest.raises(torch.OutOfMemoryError):
        trained(tmp_path / "run", 3, resume=tmp_path / "run")


def test_a_layer_that_the_loss_never_reaches_is_no_damage(tmp_path):
    """Fused SGD takes no step if only some parameters have a momentum."""

    def run(epochs, **given):
        torch.manual_seed(0)
        encoder = torch.nn.Linear(3, 4)
        encoder.unused = torch.nn.Linear(2, 2)
        vae = pv.VAE(
            prior=pv.priors.StandardNormal(2),
            decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [], 3)),
            encoder=pv.posteriors.DiagNormal(encoder),
        )
        sgd = functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True)
        pv.fit(vae, X, epochs=epochs, optimizer=sgd, progress=False, device="cpu", engine="eager", **given)
        return vae

    run(1, checkpoints=tmp_path)
    resumed, whole = run(2, resume=tmp_path), run(2)
    assert torch.equal(resumed.encoder.net.weight, whole.encoder.net.weight)
