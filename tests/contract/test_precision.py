"""Each log-density keeps its digits in single precision, as docs/precision.md says."""

from functools import cache, partial

import pyro.distributions as dist
import pytest
import torch
from helpers.members import BASES, exported
from helpers.precision import BOUND, SUBJECTS, Subject, measure, of_network, scaled
from helpers.precision_page import PAGE, read
from torch import nn

import pyro_vae as pv

NAMES = [(room, name) for room, subjects in SUBJECTS.items() for name in subjects]


@cache
def measured(room, name):
    return measure(SUBJECTS[room][name])


@pytest.mark.parametrize(("room", "name"), NAMES)
def test_single_precision_is_enough(room, name):
    found = measured(room, name)
    assert found.value < BOUND
    assert found.gradient < BOUND


@pytest.mark.parametrize(("room", "name"), NAMES)
def test_the_page_has_these_figures(room, name):
    """Below a hundredth of the bound they may be rounded otherwise elsewhere."""
    found, published = measured(room, name), read(PAGE.read_text(encoding="utf-8"))[room, name]
    for field in ("value", "gradient"):
        mine, theirs = (max(getattr(one, field), BOUND / 100) for one in (found, published))
        assert 0.2 < mine / theirs < 5, "run `make precision`"
    assert found.bf16 == pytest.approx(published.bf16, rel=0.1, abs=1e-4), "run `make precision`"


def test_the_page_has_every_member_and_no_other():
    assert list(read(PAGE.read_text(encoding="utf-8"))) == NAMES
    for room in SUBJECTS:
        named = {name.split(",")[0] for name in SUBJECTS[room]}
        assert named == exported(getattr(pv, room)) - BASES


class Pyros(pv.likelihoods.Likelihood):
    """A likelihood made of a distribution of Pyro's own."""

    def __init__(self, net, make):
        super().__init__(net)
        self.make = make

    def features(self, out):
        return self.make(out)


PYROS = {
    "Poisson": lambda out: dist.Poisson(out.clamp(max=20).exp()),
    "Binomial, total_count=1e+07": lambda out: dist.Binomial(10**7, logits=out),
    "Bernoulli": lambda out: dist.Bernoulli(logits=out),
}


@pytest.mark.parametrize("name", PYROS)
def test_pyros_own_is_not_precise_enough(name):
    """What the classes here are for, and that the measure sees it."""
    subject = SUBJECTS["likelihoods"][name]
    own = Subject(partial(of_network, partial(Pyros, make=PYROS[name])), subject.truth, subject.points, "")
    found = measure(own)
    assert max(found.value, found.gradient) > 10 * BOUND


def test_pyros_student_t_is_not_precise_enough():
    subject = SUBJECTS["likelihoods"]["StudentT, df=1e+06"]

    class Own(pv.likelihoods.StudentT):
        def features(self, out):
            return dist.StudentT(self.df, *self.loc_and_scale(out))

    assert measure(Subject(partial(scaled, partial(Own, df=1e6)), subject.truth, subject.points, "")).value > 10 * BOUND


@pytest.mark.parametrize(
    ("part", "features"),
    [
        (pv.likelihoods.Normal(nn.Linear(2, 3)), 3),
        (pv.likelihoods.Poisson(nn.Linear(2, 3)), 3),
        (pv.posteriors.DiagNormal(nn.Linear(2, 6)), 3),
        (pv.posteriors.FullNormal(nn.Linear(2, 5)), 2),
        (pv.priors.ContextNormal(nn.Linear(2, 6)), 3),
    ],
    ids=lambda part: type(part).__name__,
)
def test_no_density_is_computed_in_bfloat16(part, features):
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        d = part(torch.zeros(4, 2))
        assert part.net(torch.zeros(4, 2)).dtype is torch.bfloat16
        assert d.log_prob(torch.ones(4, features)).dtype is torch.float32
