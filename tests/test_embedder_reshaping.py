"""Labels after axes were merged, split or moved: they say where numpy puts the units."""

import math
from itertools import permutations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from embedder.followed import Label, Value
from embedder.reshaping import moved, reshaped

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def units_along(shape: tuple[int, ...], axis: int) -> NDArray[np.intp]:
    """Return an array that holds the number of the unit at each place."""
    line = [1] * len(shape)
    line[axis] = shape[axis]
    return np.broadcast_to(np.arange(shape[axis]).reshape(line), shape)


def said_by(label: Label, place: int, shape: tuple[int, ...], size: int) -> NDArray[np.intp]:
    """Return which unit a label says is at each place."""
    assert label.inner is not None
    one = np.arange(label.before * size * label.inner).reshape(label.before, size, label.inner)
    line = [1] * len(shape)
    line[place] = shape[place]
    number = one // label.inner % size
    return np.broadcast_to(number.reshape(line), shape)


def factors(size: int) -> list[tuple[int, ...]]:
    """Return all shapes of a number of places, without more than three axes."""
    found: list[tuple[int, ...]] = [(size,)]
    found += [(a, size // a) for a in range(1, size + 1) if size % a == 0]
    found += [
        (a, b, size // a // b)
        for a in range(1, size + 1)
        for b in range(1, size + 1)
        if size % (a * b) == 0
    ]
    return found


@given(SHAPES, st.data())
@settings(deadline=None, max_examples=200)
def test_units_that_are_followed_are_where_numpy_puts_them(
    sizes: list[int], data: st.DataObject
) -> None:
    shape = tuple(sizes)
    axis = data.draw(st.integers(0, len(shape) - 1))
    new = data.draw(st.sampled_from(factors(math.prod(shape))))
    size = shape[axis]
    assume(size > 1)
    place = axis - len(shape)
    found, lost = reshaped(Value({place: Label(0)}, shape), {place: size}, new)
    assert bool(lost) != bool(found.labels)
    truth = units_along(shape, axis).reshape(new)
    for at, label in found.labels.items():
        np.testing.assert_array_equal(said_by(label, at, new, size), truth)


@given(SHAPES, st.data())
@settings(deadline=None, max_examples=100)
def test_merged_axes_are_followed_and_come_back(sizes: list[int], data: st.DataObject) -> None:
    shape = tuple(sizes)
    axis = data.draw(st.integers(0, len(shape) - 1))
    assume(shape[axis] > 1)
    place = axis - len(shape)
    flat, lost = reshaped(
        Value({place: Label(0)}, shape), {place: shape[axis]}, (math.prod(shape),)
    )
    assert not lost
    back, lost = reshaped(flat, {-1: shape[axis]}, shape)
    assert not lost
    assert back.labels == {place: Label(0)}


@given(st.permutations(range(4)), st.integers(0, 3))
def test_moved_axes_are_where_numpy_puts_them(order: list[int], axis: int) -> None:
    shape = (2, 3, 4, 5)
    found = moved(Value({axis - 4: Label(0)}, shape), order)
    (at,) = found.labels
    truth = np.transpose(units_along(shape, axis), order)
    assert found.shape == truth.shape
    np.testing.assert_array_equal(said_by(Label(0), at, truth.shape, shape[axis]), truth)


def test_sizes_that_are_not_known_are_not_guessed() -> None:
    value = Value({-2: Label(0)}, (None, 8, None))
    assert reshaped(value, {-2: 8}, (None, None))[1] == [-2]
    assert reshaped(value, {-2: 8}, (None, 8, None))[1] == []
    assert reshaped(Value({-1: Label(0)}), {-1: 8}, (8, 1))[1] == [-1]
    merged, lost = reshaped(Value({-1: Label(0)}, (None, None, 8)), {-1: 8}, (None, 8))
    assert (merged.labels, lost) == ({-1: Label(0)}, [])
    split, lost = reshaped(Value({-1: Label(0, inner=2)}, (None, None, 8)), {-1: 4}, (None, 4, 2))
    assert (split.labels, lost) == ({-2: Label(0)}, [])
    for new in permutations((None, 2, 4)):
        found, lost = reshaped(Value({-1: Label(0)}, (None, 8)), {-1: 8}, new)
        assert lost == [-1]
        assert found.labels == {}
