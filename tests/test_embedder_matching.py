"""Partners among units: a copy has a margin of 1, strangers none, whatever the design."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from embedder.anchors import anchored
from embedder.coding import shipped_coder
from embedder.identity import Tokens, tokens_of
from embedder.matching import (
    FEWEST,
    MARGIN,
    MATCHED,
    agreement,
    evidence,
    margin,
    margin_of_kin,
    packed,
    standing_out,
    turned,
    unpacked,
)
from embedder.rotation import rotated
from embedder.symmetry import disguised
from embedder.zoo.designs import Config
from embedder.zoo.nets import architecture_of, new_start
from embedder.zoo.plan import populations

Weights = dict[str, NDArray[np.floating]]


CONFIGS = [
    config
    for config in dict.fromkeys(population.config for population in populations())
    if sum(config.widths) >= FEWEST
]


def units_of(weights: Weights, config: Config) -> dict[str, Tokens]:
    return turned(tokens_of(anchored(weights, architecture_of(config))), shipped_coder())


def network(config: Config, seed: int) -> Weights:
    """Return a start with heavier tails, as training leaves them."""
    rng = np.random.default_rng(seed)
    return {
        name: (values * np.exp(rng.normal(0, 0.5, values.shape))).astype(np.float64)
        for name, values in new_start(config, seed).items()
    }


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
class TestEveryDesign:
    def test_a_disguised_copy_has_a_margin_of_one(self, config: Config) -> None:
        base = network(config, 1)
        copy = disguised(base, architecture_of(config), np.random.default_rng(2))
        found = margin(units_of(base, config), units_of(copy, config))
        assert found == pytest.approx(1, abs=1e-3)

    def test_another_start_has_none(self, config: Config) -> None:
        one, other = (units_of(network(config, seed), config) for seed in (1, 2))
        assert margin(one, other) < MARGIN / 2
        assert margin_of_kin(one, other) == 0

    def test_it_is_the_same_from_both_sides_and_from_a_catalogue(self, config: Config) -> None:
        base = network(config, 1)
        rng = np.random.default_rng(3)
        child = {n: w + 0.3 * w.std() * rng.normal(size=w.shape) for n, w in base.items()}
        one, other = (units_of(weights, config) for weights in (base, child))
        found = margin(one, other)
        assert margin(other, one) == pytest.approx(found, abs=1e-6)
        # A catalogue may keep two units in three of these.
        assert margin(unpacked(packed(one)), other) == pytest.approx(found, abs=0.1)
        assert MARGIN < found < 1
        assert margin_of_kin(one, other) == found


def test_a_rotated_stream_leaves_the_hidden_units_their_partners() -> None:
    config = next(c for c in CONFIGS if c.kind == "transformer" and c.norm == "rms")
    base = network(config, 1)
    turned_round = rotated(base, architecture_of(config), np.random.default_rng(2))
    assert margin(units_of(base, config), units_of(turned_round, config)) > 0.9


def test_too_few_units_show_nothing() -> None:
    config = replace(CONFIGS[0], kind="mlp", widths=(FEWEST - 1,), residual=False, norm="")
    units = units_of(network(config, 1), config)
    assert margin(units, units) == 0


def test_margins_tell_kin_from_strangers_and_not_one_of_kin_from_another() -> None:
    config = next(c for c in CONFIGS if c.kind == "mlp")
    base, rng = network(config, 1), np.random.default_rng(3)
    near, far = (
        {n: w + drift * w.std() * rng.normal(size=w.shape) for n, w in base.items()}
        for drift in (0.1, 0.4)
    )
    strangers = [network(config, seed) for seed in range(2, 8)]
    query, *others = (units_of(weights, config) for weights in (base, near, far, *strangers))
    scores, margins = standing_out(query, others, np.zeros(len(others)))
    added = scores - evidence(np.array([agreement(query, other) for other in others]))
    assert margins[0] > 1.1 * margins[1] > 1.1 * MARGIN > 1.1 * margins[2:].max()
    assert added[0] == pytest.approx(added[1])
    assert added[1] > added[2:].max()


def test_units_that_are_duplicates_show_nothing() -> None:
    rng = np.random.default_rng(4)
    row = rng.normal(size=64)
    units = Tokens(np.tile(row / np.linalg.norm(row), (30, 1)).astype("f4"), np.zeros(30, bool))
    none = Tokens(units.codes[:0], units.even[:0])
    parts = {**dict.fromkeys(MATCHED, none), "first read": units}
    assert abs(margin(parts, parts)) < 1e-5
