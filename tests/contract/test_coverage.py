"""Each printed standard error covers the truth as often as it says, or as often as docs/coverage.md says."""

import dataclasses

import pytest
import torch
from helpers.coverage_checks import LEAST, Draws, Row, drawn, figures, misses, run, studies
from helpers.coverage_names import ERROR, EXCEPTIONS, returned, tabled
from helpers.coverage_page import PAGE, read, unmeasured

STUDIES = studies()
NAMES = [f"{study.function}, {study.setting}" for study in STUDIES]


@pytest.fixture(scope="module")
def published():
    return read(PAGE.read_text(encoding="utf-8"))


def test_the_page_names_each_case_and_no_other(published):
    every = {label for study in STUDIES for label in study.labels()}
    assert set(published) | unmeasured(PAGE.read_text(encoding="utf-8")) == every, "run `make coverage`"


def test_the_figures_of_the_page_are_as_expected(published):
    for study in STUDIES:
        for key, row in zip(study.labels(), study.rows.values(), strict=True):
            if key not in published:
                continue
            assert published[key].repetitions >= LEAST, key
            assert not misses(row, published[key], errors=2), key


def test_each_error_that_is_returned_is_in_the_table_or_excepted_with_a_reason():
    found, named = returned(), tabled(label for study in STUDIES for label in study.labels())
    assert len(found) > 50
    assert not found - named - set(EXCEPTIONS), "measure these, or say why not in EXCEPTIONS"
    called = {function for function, _ in found}
    of_called = {key for key in named if key[0] in called and ERROR.match(key[1])}
    assert not of_called - found, "the table names errors that are returned no more"
    assert not set(EXCEPTIONS) - found, "these are returned no more"
    assert all(EXCEPTIONS.values())


QUICK = [pytest.param(study, id=name) for study, name in zip(STUDIES, NAMES, strict=True) if study.quick]


@pytest.mark.parametrize("study", QUICK)
def test_a_few_repetitions_cover_the_truth(study):
    for quantity, found in run(study, study.quick).items():
        assert not misses(study.rows[quantity], found, errors=3), quantity


@pytest.mark.slow
@pytest.mark.parametrize("study", [pytest.param(s, id=name) for s, name in zip(STUDIES, NAMES, strict=True)])
def test_each_error_covers_the_truth(study):
    for quantity, found in run(study).items():
        assert found.repetitions >= LEAST, quantity
        assert not misses(study.rows[quantity], found, errors=2), quantity


@pytest.mark.parametrize("factor", [0.5, 2.0, 10**0.5])
def test_a_wrong_error_is_seen(factor):
    """Half of the error, or a forgotten root: either fails by its coverage or by its spread, in 50 repetitions."""
    torch.manual_seed(0)
    sample = torch.randn(50, 20)
    right = drawn(sample.mean(1), sample.std(1) / 20**0.5, 0.0)
    wrong = drawn(sample.mean(1), factor * sample.std(1) / 20**0.5, 0.0)
    assert not misses(Row(), figures([right]), errors=3)
    assert misses(Row(), figures([wrong]), errors=3)


def test_a_figure_of_dependent_hits_has_the_error_of_its_repetitions():
    hit = (torch.rand(400, 1) < 0.9).expand(-1, 7).numpy()
    alone, together = figures([Draws(hit[:, :1])]), figures([Draws(hit)])
    assert dataclasses.astuple(together)[:3] == pytest.approx(dataclasses.astuple(alone)[:3])
    assert alone.error == pytest.approx((0.9 * 0.1 / 400) ** 0.5, rel=0.2)
