"""The family is what it says, since so many tests lean on it."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from conftest import Family
from embedder.surgery import pruned, quantised
from lineage.simulate import (
    Weights,
    glyphs,
    logits,
    make_family,
    new_network,
    of_matrices,
    reordered,
    train,
    with_classes,
)


def loaded(family: Family, stem: str) -> Weights:
    found: Weights = load_file(family.file(stem))
    return found


def drift(x: Weights, y: Weights) -> float:
    """Return ‖Y − X‖ / ‖X‖ over all tensors."""
    step = sum(float(np.sum((y[name] - x[name]) ** 2)) for name in x)
    return float(np.sqrt(step / sum(float(np.sum(values**2)) for values in x.values())))


def accuracy(weights: Weights, shift: float = 0.0) -> float:
    pictures, labels = glyphs(np.random.default_rng(99), 2000, shift)
    return float(np.mean(np.argmax(logits(weights, pictures)[-1], axis=1) == labels))


def outputs(weights: Weights) -> NDArray[np.float32]:
    return logits(weights, glyphs(np.random.default_rng(98), 200)[0])[-1]


class TestTraining:
    def test_the_founders_have_learnt(self, family: Family) -> None:
        for stem in ("base-a", "twin-b"):
            assert accuracy(loaded(family, stem)) > 0.99

    def test_the_founders_have_left_their_random_start(self) -> None:
        rng = np.random.default_rng(5)
        start = new_network(rng)
        assert drift(start, train(start, rng, steps=1500, rate=1e-2)) > 0.5

    def test_the_founders_are_strangers(self, family: Family) -> None:
        base, twin = loaded(family, "base-a"), loaded(family, "twin-b")
        for name in ("body.0.weight", "body.1.weight", "head.weight"):
            assert abs(np.corrcoef(base[name].ravel(), twin[name].ravel())[0, 1]) < 0.15

    def test_a_fine_tune_moved_a_little_and_learnt_its_own_data(self, family: Family) -> None:
        for child, parent, shift in (("legal", "base-a", 0.5), ("chat", "base-a", -0.5)):
            before, after = loaded(family, parent), loaded(family, child)
            assert 0.001 < drift(before, after) < 0.1
            assert accuracy(after, shift) >= accuracy(before, shift)

    def test_training_leaves_its_start_as_it_is(self) -> None:
        rng = np.random.default_rng(1)
        start = new_network(rng)
        before = {name: values.copy() for name, values in start.items()}
        train(start, rng, steps=3, rate=1e-2)
        for name, values in before.items():
            np.testing.assert_array_equal(start[name], values)

    def test_the_gradients_are_those_of_the_loss(self) -> None:
        # One step of Adam from nothing moves every value by the rate, against its gradient's sign.
        rng = np.random.default_rng(2)
        start = new_network(rng)
        pictures, labels = glyphs(np.random.default_rng(3), 64)
        moved = train(start, np.random.default_rng(3), steps=1, rate=1e-3)

        def loss(weights: Weights) -> float:
            scores = logits(weights, pictures)[-1].astype(np.float64)
            scores -= scores.max(axis=1, keepdims=True)
            chosen = scores[np.arange(64), labels] - np.log(np.exp(scores).sum(axis=1))
            return -float(np.mean(chosen))

        for name, place in (("body.0.weight", (3, 4)), ("body.1.weight", (5, 6))):
            slopes = []
            for way in (1e-2, -1e-2):
                nudged = {key: values.copy() for key, values in start.items()}
                nudged[name][place] += way
                slopes.append(loss(nudged))
            step = moved[name][place] - start[name][place]
            if slopes[0] != slopes[1]:
                assert np.sign(step) == -np.sign(slopes[0] - slopes[1])


class TestOperations:
    def test_a_reordered_network_computes_the_same(self, family: Family) -> None:
        base, other = loaded(family, "base-a"), loaded(family, "base-reordered")
        assert not np.array_equal(base["body.0.weight"], other["body.0.weight"])
        scale = np.abs(outputs(base)).max()
        np.testing.assert_allclose(outputs(other), outputs(base), atol=1e-5 * scale)
        for name, values in base.items():
            np.testing.assert_array_equal(np.sort(other[name], None), np.sort(values, None))

    def test_a_quantised_network_lies_on_a_lattice(self, family: Family) -> None:
        legal, coarse = loaded(family, "legal"), loaded(family, "legal-int8")
        for name, values in legal.items():
            if values.ndim < 2:
                np.testing.assert_array_equal(coarse[name], values)
                continue
            steps = np.abs(values).max(axis=1, keepdims=True) / 127
            places = coarse[name] / steps
            np.testing.assert_allclose(places, np.round(places), atol=1e-3)
            assert np.abs(coarse[name] - values).max() <= steps.max() / 2 * 1.001
            assert max(len(np.unique(row)) for row in coarse[name]) <= 255
        assert accuracy(coarse) > 0.97

    def test_an_operation_on_matrices_leaves_everything_else(self) -> None:
        weights = new_network(np.random.default_rng(4))
        for name, values in of_matrices(weights, np.negative).items():
            changed = -1 if values.ndim == 2 else 1
            np.testing.assert_array_equal(values, changed * weights[name])

    def test_a_pruned_network_has_its_smallest_half_set_to_zero(self, family: Family) -> None:
        base, thin = loaded(family, "base-a"), loaded(family, "base-pruned")
        for name, values in base.items():
            if values.ndim < 2:
                continue
            gone = thin[name] == 0
            assert np.mean(gone) == pytest.approx(0.5, abs=0.01)
            np.testing.assert_array_equal(thin[name][~gone], values[~gone])
            assert np.abs(values[gone]).max() <= np.abs(values[~gone]).min()

    def test_an_extended_network_keeps_its_old_rows(self, family: Family) -> None:
        base, grown = loaded(family, "base-a"), loaded(family, "base-12-classes")
        assert grown["head.weight"].shape == (12, 96)
        np.testing.assert_array_equal(grown["head.weight"][:10], base["head.weight"])
        np.testing.assert_array_equal(grown["head.bias"][:10], base["head.bias"])
        for name in ("body.0.weight", "body.1.weight", "body.0.bias", "body.1.bias"):
            np.testing.assert_array_equal(grown[name], base[name])
        np.testing.assert_array_equal(outputs(grown)[:, :10], outputs(base))

    def test_a_cast_network_is_the_nearest_in_half_precision(self, family: Family) -> None:
        chat, half = loaded(family, "chat"), load_file(family.file("chat-fp16"))
        for name, values in chat.items():
            np.testing.assert_array_equal(half[name], values.astype(np.float16))

    def test_a_copy_in_another_format_has_the_same_bits_under_other_names(
        self, family: Family
    ) -> None:
        base = loaded(family, "base-a")
        with np.load(family.file("base-copy")) as copied:
            assert set(copied.files).isdisjoint(base)
            for found, values in zip(copied.values(), base.values(), strict=True):
                assert any(np.array_equal(found, other) for other in base.values())
                assert values.dtype == np.float32

    def test_operations_leave_their_parent_as_it_is(self) -> None:
        rng = np.random.default_rng(6)
        weights = new_network(rng)
        before = {name: values.copy() for name, values in weights.items()}
        for child in (
            of_matrices(weights, quantised),
            of_matrices(weights, partial(pruned, share=0.5)),
            with_classes(weights, rng, 2),
            reordered(weights, rng),
        ):
            assert set(child) == set(weights)
        for name, values in before.items():
            np.testing.assert_array_equal(weights[name], values)


class TestFamily:
    def test_a_seed_gives_the_same_family_to_the_last_bit(
        self, family: Family, tmp_path: Path
    ) -> None:
        make_family(tmp_path / "again")
        for file in family.folder.glob("*.safetensors"):
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()

    def test_births_and_strangers_name_every_model(self, family: Family) -> None:
        births = (*family.births, *family.strangers)
        stems = {stem for birth in births for stem in (birth.child, birth.parent)}
        assert stems == {Path(name).stem for name in family.names}
        assert len({birth.child for birth in births}) == len(births)
