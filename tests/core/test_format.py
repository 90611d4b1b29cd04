"""No number has a digit that its error does not allow."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyro_vae.core.format import format_estimate, format_p, format_rounded


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (381.3, 117.2, "380 ± 120"),
        (-23.41421, 0.0345, "-23.414 ± 0.035"),
        (0.1, 0.0996, "0.10 ± 0.10"),
        (38012.0, 1234.0, "38000 ± 1200"),
        (-0.001, 0.3, "0.00 ± 0.30"),
        (1.2e-12, 3e-14, "1.200e-12 ± 0.030e-12"),
        (4.5e12, 3.2e9, "4.5000e12 ± 0.0032e12"),
        (3.0, 1e-12, "3 ± 1e-12"),
        (0.0, 0.0, "0 ± 0"),
        (0.1234, math.nan, "0.12 ± ?"),
        (math.nan, 1.0, "nan ± ?"),
    ],
)
def test_an_error_has_two_digits_and_its_number_ends_where_it_does(value, error, shown):
    assert format_estimate(value, error, over="") == shown


def test_the_unit_and_over_what_the_error_is_follow():
    assert format_estimate(1.0, 0.5, "nats", over="20 draws") == "1.00 ± 0.50 nats (over 20 draws)"
    assert format_estimate(1.0, 0.5, over="", signed=True) == "+1.00 ± 0.50"
    with pytest.raises(TypeError, match="over"):
        format_estimate(1.0, 0.5)


@given(st.floats(-1e30, 1e30), st.floats(1e-30, 1e30))
def test_what_is_read_back_is_within_the_last_digit_shown(value, error):
    number, _, spread = format_estimate(value, error, over="").partition(" ± ")
    assert float(spread) == pytest.approx(error, rel=0.5)
    assert abs(float(number) - value) <= max(0.05 * error, 1e-6 * abs(value)) * 1.0001


@pytest.mark.parametrize(
    ("p", "draws", "shown"),
    [
        (0.0, 500, "p < 0.002"),
        (1.0, 500, "p > 0.998"),
        (0.0, 300, "p < 0.004"),
        (1 / 500, 500, "p = 0.002"),
        (1e-25, 0, "p < 0.001"),
        (0.0, 0, "p < 0.001"),
        (0.0312, 0, "p = 0.031"),
    ],
)
def test_a_p_value_is_never_0_and_claims_no_more_than_its_draws_show(p, draws, shown):
    assert format_p(p, draws) == shown
    if not draws:
        assert format_p(p) == shown


def test_a_number_alone_ends_where_its_error_does():
    assert format_rounded(1.23456, 0.02) == "1.235"
    assert format_rounded(38012, 1234) == "38000"
    assert format_rounded(38012, math.nan) == "38000"
