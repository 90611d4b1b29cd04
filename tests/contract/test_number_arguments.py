"""Numbers of NumPy and of tensors are taken wherever Python's are, by all public functions and constructors."""

import importlib
import inspect
import math
import types
from collections.abc import Sequence
from typing import Union, get_args, get_origin

import numpy as np
import pytest
import torch
from helpers.checks import small_vae
from torch import nn

import pyro_vae as pv
from pyro_vae.core.device import validate_seed
from pyro_vae.core.validation import above_zero, python_number, takes_settings, whole
from pyro_vae.errors import SettingsError

ROOMS = ["data", "diagnose", "elbo", "evidence", "exact", "likelihoods", "nn", "plots", "posteriors", "priors"]
ROOMS += ["train.callbacks", "compare.swap"]

WHOLE = [np.int64, np.int8, np.uint16, np.array, torch.tensor, lambda n: torch.tensor(n, dtype=torch.int32)]
REAL = [np.float64, np.float32, np.float16, np.array, torch.tensor]


def of_numbers(annotation):
    """Whether an annotation is that of a number, or of a sequence of numbers."""
    if get_origin(annotation) in (types.UnionType, Union):
        return any(map(of_numbers, get_args(annotation))) and torch.Tensor not in get_args(annotation)
    return annotation in (int, float)


def offered():
    """Each public function and class that is defined here."""
    found = {}
    for room in ["", *ROOMS]:
        module = importlib.import_module(f"pyro_vae.{room}".rstrip("."))
        names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        for name in names:
            value = getattr(module, name)
            home = getattr(value, "__module__", None) or ""
            if callable(value) and home.startswith(f"pyro_vae.{room}".rstrip(".")):
                found[f"{home}.{name}"] = value
    return found


def numbers_of(function):
    return [n for n, p in inspect.signature(function).parameters.items() if of_numbers(p.annotation)]


NOT_SETTINGS = {
    "warn_of_duplicates",
    "validate_particles",
    "check_where_possible",
    "note_objective",
}
"""Functions that others call with what was converted before."""

FUNCTIONS = {
    name: value
    for name, value in offered().items()
    if inspect.isfunction(value) and numbers_of(value) and name.rpartition(".")[2] not in NOT_SETTINGS
}


Either = float | torch.Tensor


@takes_settings
def like_others(x, *, epochs: int, rate: float | None = None, particles: Sequence[int] = (1,), scale: Either = 1.0):
    return epochs, rate, particles, scale


def test_the_table_is_not_empty():
    assert len(FUNCTIONS) > 20
    assert {"fit", "compare_elbos", "log_evidence", "check"} <= {name.rpartition(".")[2] for name in FUNCTIONS}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_takes_its_numbers_by_the_one_converter(name):
    """The converter's own wrapper is seen, and that it finds each number of this function."""
    function, wrappers = FUNCTIONS[name], []
    while hasattr(function, "__wrapped__"):
        wrappers.append(function)
        function = function.__wrapped__
    converter = next((w for w in wrappers if w.__code__ is like_others.__code__), None)
    assert converter is not None, "decorate it by takes_settings"
    assert set(numbers_of(function)) <= inspect.getclosurevars(converter).nonlocals["numbers"]


@pytest.mark.parametrize("made", WHOLE)
def test_a_whole_number_is_pythons(made):
    epochs, rate, particles, _ = like_others(None, epochs=made(3), rate=made(2), particles=[made(1), 8])
    assert [type(n) for n in (epochs, rate, *particles)] == [int] * 4
    assert (epochs, rate, particles) == (3, 2, [1, 8])
    assert type(whole("n", made(3), 1)) is int
    assert above_zero("s", made(3)) == 3.0
    assert validate_seed(made(3)) is None


@pytest.mark.parametrize("made", REAL)
def test_a_real_number_is_pythons(made):
    _, rate, _, scale = like_others(None, epochs=1, rate=made(0.5), scale=made(0.5))
    assert type(rate) is float
    assert rate == 0.5
    assert type(scale) is type(made(0.5)), "where a tensor may be given it stays one"
    assert type(above_zero("s", made(0.5))) is float


def test_sequences_of_numbers_are_pythons():
    for given in (np.array([1, 8]), torch.tensor([1, 8])):
        assert like_others(None, epochs=1, particles=given)[2] == (1, 8)
        assert pv.nn.mlp(3, given, 2)[0].out_features == 1


WRONG = [np.float64(2.0), torch.tensor(2.0), np.bool_(True), torch.tensor(True), np.array([2]), "2", np.int64(0)]


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_what_python_refuses_is_refused_of_numpy_too(value):
    with pytest.raises(SettingsError, match=r"n is .*; it must be a whole number of at least 1"):
        whole("n", value, 1)


@pytest.mark.parametrize(
    "value", [np.float64(1.0), np.bool_(True), torch.tensor(0.5), np.float64(math.nan), "1"], ids=repr
)
def test_no_seed_is_no_seed(value):
    with pytest.raises(SettingsError, match=r"seed is .*; it must be a whole number"):
        validate_seed(value)


def converted(settings, whole_by, real_by):
    kinds = {int: whole_by, float: real_by}
    return {name: kinds[type(v)](v) if type(v) in kinds else v for name, v in settings.items()}


CLASSES = {
    name: (value, numbers_of(value))
    for name, value in offered().items()
    if inspect.isclass(value) and numbers_of(value)
}
GIVEN = {  # what a class needs besides, and a value for each number of its constructor
    "Checkpoints": ({"folder": "folder"}, {"steps": 3, "minutes": 2.0, "keep": 2}),
    "Iterates": ({"x": torch.zeros(4, 6)}, {"data": 2, "num_particles": 2, "weights": 3, "seed": 1}),
    "EMA": ({}, {"decay": 0.5, "every": 2}),
    "SWA": ({}, {"start": 2, "every": 2}),
    "EarlyStopping": ({}, {"patience": 2, "steps": 3, "errors": 0.5}),
    "Explosion": ({}, {"spreads": 2.0}),
    "RollBack": ({}, {"factor": 0.5, "times": 2}),
    "Schedule": ({"scheduler": max}, {"every": 2}),
    "Linear": ({}, {"steps": 3, "start": 0.5, "end": 2.0}),
    "Cyclical": ({}, {"steps": 4, "cycles": 2, "ramp": 0.5, "start": 0.5, "end": 2.0}),
    "Beta": ({"elbo": pv.elbo.ELBO()}, {"beta": 0.5}),
    "FreeBits": ({"elbo": pv.elbo.ELBO()}, {"nats": 0.5}),
    "TCVAE": ({"elbo": pv.elbo.ELBO()}, {"beta": 0.5}),
    "M2": ({}, {"num_particles": 3, "weight": 2.0}),
    "InfoVAE": ({"elbo": pv.elbo.ELBO()}, {"alpha": 0.5, "weight": 2.0}),
    "CompiledSVI": (
        {"model": None, "guide": None, "optim": torch.optim.Adam, "loss": pv.elbo.ELBO()},
        {"clip_norm": 0.5},
    ),
    "Binomial": ({"net": nn.Identity()}, {"total_count": 2}),
    "Categorical": ({"net": nn.Identity()}, {"levels": 2}),
    "DiscretizedLogisticMixture": ({"net": nn.Identity()}, {"components": 2, "levels": 4}),
    "HeteroscedasticNormal": ({"net": nn.Identity()}, {"min_scale": 0.5}),
    "Normal": ({"net": nn.Identity()}, {"scale": 0.5, "per_feature": 2}),
    "Laplace": ({"net": nn.Identity()}, {"scale": 0.5, "per_feature": 2}),
    "StudentT": ({"net": nn.Identity()}, {"df": 4.0, "scale": 0.5, "per_feature": 2}),
    "pyro_vae.priors.GumbelSoftmax": ({}, {"latent_dim": 2, "categories": 3, "temperature": 0.5}),
    "pyro_vae.posteriors.categories.GumbelSoftmax": ({"net": nn.Identity()}, {"categories": 3, "temperature": 0.5}),
    "OnSimplex": ({"net": nn.Identity()}, {"latents": 2, "categories": 3}),
    "LowRankNormal": ({"net": nn.Identity()}, {"rank": 2}),
    "Refined": ({"encoder": nn.Identity()}, {"steps": 2, "rate": 0.5, "particles": 4}),
    "VampPrior": ({"data": torch.zeros(5, 2)}, {"components": 2}),
    "WithoutContext": ({"net": nn.Identity()}, {"features": 2}),
    "StandardizedContext": (
        {"net": nn.Identity(), "standardize": pv.data.mean_and_sd(torch.eye(2))},
        {"features": 2},
    ),
}
PRIOR = {"latent_dim": 2, "df": 4.0, "components": 2}
ESTIMATOR = {"num_particles": 4, "mix": 0.5, "groups": 2, "alpha": 0.5, "partitions": 3, "first": 0.125}
ABSTRACT = {"Estimator", "Schedule", "Objective", "Data", "Diagnostic", "CheckInput", "Weights"}
"""Bases, and records that functions make."""


def settings_of(name, numbers):
    short = name.rpartition(".")[2]
    if name in GIVEN:
        return GIVEN[name]
    if ".priors." in name and "latent_dim" in numbers:
        return {}, {n: PRIOR[n] for n in numbers}
    if short in GIVEN:
        return GIVEN[short]
    return {}, {n: ESTIMATOR[n] for n in numbers}


def plain(value):
    """All that an object keeps, as plain values."""
    if isinstance(value, torch.Tensor):
        return "tensor", value.tolist()
    if isinstance(value, nn.Module | pv.elbo.Estimator | pv.callbacks.Callback | pv.elbo.Schedule | pv.Checkpoints):
        as_given = isinstance(value, pv.core.component.Conditional)  # others keep their arguments as they came
        hidden = {"_at"} if as_given else {"_at", "_made_of"}  # a clock
        return {k: plain(v) for k, v in vars(value).items() if k not in hidden}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if type(value) in (bool, int, float, str, type(None)) else type(value).__name__


@pytest.mark.parametrize("name", [name for name in CLASSES if name.rpartition(".")[2] not in ABSTRACT])
def test_every_public_class_is_made_alike_of_numpys_numbers(name):
    cls, numbers = CLASSES[name]
    others, settings = settings_of(name, numbers)
    assert set(settings) == set(numbers), "a value for each number"
    if inspect.isabstract(cls):
        return
    makes = [(lambda n: n, lambda n: n), (np.int64, np.float64), (np.array, np.float32), (torch.tensor, torch.tensor)]
    each = []
    for whole_by, real_by in makes:
        torch.manual_seed(0)
        each.append(plain(cls(**others, **converted(settings, whole_by, real_by))))
    assert each[1] == each[2] == each[3] == each[0]


def test_a_member_of_numpys_numbers_is_saved(tmp_path):
    vae = pv.VAE(
        prior=pv.priors.StudentT(np.int64(2), df=np.float32(5.0)),
        decoder=pv.likelihoods.Blocks(
            pv.nn.mlp(2, np.array([4]), 4),
            [(pv.likelihoods.Normal, np.int64(3)), (pv.likelihoods.Bernoulli, np.int8(1))],
        ),
        encoder=pv.posteriors.LowRankNormal(pv.nn.mlp(4, [4], 8), np.int64(2)),
    )
    pv.save(vae, tmp_path / "vae.safetensors")
    again = pv.load(tmp_path / "vae.safetensors")
    assert again.prior.df == 5.0
    assert torch.equal(again.prior().base_dist.df, vae.prior().base_dist.df)


def test_fit_is_the_same_by_numpys_numbers():
    x = torch.randn(20, 6, dtype=torch.float64)
    settings = {"epochs": 2, "batch_size": 8, "seed": 3, "clip_norm": 1.0, "devices": 1}
    found = []
    for whole_by, real_by in [
        (int, float),
        (np.int64, np.float64),
        (torch.tensor, torch.tensor),
        (np.array, np.float16),
    ]:
        vae = small_vae()
        fitted = pv.fit(vae, x, progress=False, device="cpu", **converted(settings, whole_by, real_by))
        assert type(fitted.history.attrs["batch_size"]) is int
        found.append(torch.cat([v.flatten() for v in vae.state_dict().values()]))
    assert all(torch.equal(one, found[0]) for one in found)


def test_an_evaluation_is_the_same_by_numpys_numbers():
    vae, x = small_vae(), torch.randn(8, 6, dtype=torch.float64)
    one = pv.log_evidence(vae, x, num_particles=50, seed=1, progress=False)
    for made in (np.int64, torch.tensor):
        again = pv.log_evidence(vae, x, num_particles=made(50), seed=made(1), progress=False)
        assert again.identical(one)
        assert type(again.attrs["num_particles"]) is int


def test_what_is_no_number_stays_what_it_is():
    for value in ("a", np.zeros(3), None, nn.Identity()):
        assert python_number(value) is value
