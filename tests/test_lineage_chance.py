"""The law of chance, its corrections and its power."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinship import measured, network
from lineage.chance import (
    chance_of,
    corrected,
    has_power,
    shipped_controls,
    spread_of,
    tensor_variance,
)


def test_the_shipped_law_says_where_it_comes_from() -> None:
    law = shipped_controls()
    assert law.pairs > 2000
    assert 0 <= law.mean < 0.05
    assert 0.1 < law.kappa < 1
    assert "another start" in law.source


def test_strangers_with_independent_values_stay_within_the_law() -> None:
    # The law allows for what strangers trained on the same data share, so these lie well inside.
    standardised = []
    for seed in range(60):
        pairs = measured(network(2 * seed), network(2 * seed + 1)).pairs
        total = sum(pair.size for pair in pairs)
        cosine = sum(pair.size * pair.cosine for pair in pairs) / total
        standardised.append(cosine / spread_of(pairs))
    assert np.std(standardised) < 1
    assert np.max(np.abs(standardised)) < 3


def test_chance_falls_as_agreement_grows() -> None:
    found = [chance_of(cosine, 0.05).p for cosine in np.linspace(-0.2, 1, 30)]
    assert all(later <= earlier for earlier, later in pairwise(found))
    assert 0 < found[-1] < 1e-80


def test_what_lies_below_the_controls_is_called_extrapolated() -> None:
    law = shipped_controls()
    for cosine in np.linspace(0, 0.5, 40):
        found = chance_of(float(cosine), 0.05)
        assert found.extrapolated == (found.p < 1 / (law.pairs + 1))


def test_sketches_widen_the_law() -> None:
    first, second = network(1), network(2)
    exact, estimated = measured(first, second), measured(first, second, exact=False)
    assert spread_of(estimated.pairs) > spread_of(exact.pairs)
    for pair in exact.pairs:
        assert tensor_variance(pair, 0.3) > tensor_variance(pair, 0.0)


@given(st.floats(1e-12, 1), st.integers(1, 100_000))
def test_the_correction_is_a_probability_and_grows_with_the_search(p: float, n: int) -> None:
    assert p <= corrected(p, n) <= min(1.0, n * p) * (1 + 1e-9)
    assert corrected(p, n) <= corrected(p, n + 1) * (1 + 1e-9)


@pytest.mark.parametrize(("spread", "enough"), [(0.05, True), (0.11, True), (0.12, False)])
def test_power_is_that_of_a_child_at_drift_one(spread: float, enough: bool) -> None:
    # A child whose step is as long as its parent and orthogonal to it has the cosine 1/√2.
    assert has_power(spread) is enough
