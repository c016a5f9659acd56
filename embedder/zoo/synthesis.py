"""Data that a formula makes: textures, sounds, and graphs of pictures."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Whole = NDArray[np.int64]

TEXTURES = 10
"""Kinds of textures: five directions of stripes, each fine and coarse."""
SOUNDS = 6
"""Tone, rising and falling chirp, two tones, beating tone, noise band."""
RATE_HZ, FRAMES, BINS = 8000, 16, 8
_HOP = 128


def textures(count: int, side: int, *, seed: int) -> tuple[Floats, Whole]:
    """Return noisy stripes and which of ten kinds each is.

    Args:
        count: How many.
        side: Of the square pictures, in pixels.
        seed: Decides everything.

    Returns:
        (count, side, side) and (count,).

    Example:
        >>> pictures, kinds = textures(5, 8, seed=0)
        >>> pictures.shape, kinds.shape
        ((5, 8, 8), (5,))
    """
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, TEXTURES, count)
    angle = np.pi * (kinds % 5) / 5 + rng.normal(0, 0.12, count)
    # Waves across the picture: 1.2 or 2.4, both below what pixels can show.
    waves = 1.2 * (1 + kinds // 5) * np.exp(rng.normal(0, 0.1, count))
    phase = rng.uniform(0, 2 * np.pi, count)
    rows, columns = np.mgrid[:side, :side] / side
    along = np.cos(angle)[:, None, None] * rows + np.sin(angle)[:, None, None] * columns
    stripes = np.sin(2 * np.pi * waves[:, None, None] * along + phase[:, None, None])
    noisy = stripes + rng.normal(0, 0.8, stripes.shape)
    return noisy.astype(np.float32), kinds.astype(np.int64)


def sounds(count: int, *, low: bool, seed: int) -> tuple[Floats, Whole]:
    """Return log-power spectrograms of made sounds and which of six kinds each is.

    Args:
        count: How many.
        low: Whether pitches lie between 300 and 900 Hz, and not between 700 and 2,100 Hz.
        seed: Decides everything.

    Returns:
        (count, 16 frames, 8 bins) and (count,).

    Example:
        >>> sounds(3, low=False, seed=0)[0].shape
        (3, 16, 8)
    """
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, SOUNDS, count)
    time = np.arange(FRAMES * _HOP) / RATE_HZ
    span = time[-1]
    pitch = np.exp(rng.uniform(0, np.log(3), count)) * (300 if low else 700)
    waves = np.stack([_wave(k, p, time, span, rng) for k, p in zip(kinds, pitch, strict=True)])
    waves += rng.normal(0, 0.7, waves.shape) * np.exp(rng.normal(0, 0.3, (count, 1)))
    frames = waves.reshape(count, FRAMES, _HOP) * np.hanning(_HOP)
    power = np.abs(np.fft.rfft(frames, axis=2)) ** 2
    # Bins of 62.5 Hz up to 4 kHz, joined to eight bands of equal width.
    bands = power[:, :, 1 : BINS * 8 + 1].reshape(count, FRAMES, BINS, 8).mean(axis=3)
    return np.log(bands + 1e-3).astype(np.float32), kinds.astype(np.int64)


def _wave(
    kind: int, pitch: float, time: NDArray[np.float64], span: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return one sound without its background."""
    turns = 2 * np.pi * pitch * time
    if kind in (1, 2):
        way = 0.9 if kind == 1 else -0.6
        turns = turns * (1 + 0.5 * way * time / span)
    start = rng.uniform(0, 2 * np.pi)
    wave = np.sin(turns + start)
    if kind == 3:
        wave = 0.7 * wave + 0.7 * np.sin(1.7 * turns)
    if kind == 4:
        wave = wave * (1 + np.sin(2 * np.pi * 20 * time + start))
    if kind == 5:
        drift = np.cumsum(rng.normal(0, 0.5, time.shape))
        wave = np.sin(turns + drift)
    return np.asarray(wave)


def _with_own(neighbours: NDArray[np.float64]) -> Floats:
    """Return rows of neighbours with the node itself, each of sum 1."""
    with_self = np.minimum(neighbours + np.eye(neighbours.shape[-1]), 1)
    shares = with_self / with_self.sum(axis=-1, keepdims=True)
    return np.asarray(shares, dtype=np.float32)


def grid_graphs(pictures: Floats) -> tuple[Floats, Floats]:
    """Return 8 × 8 pictures as graphs: 16 squares of 2 × 2 pixels, joined to those beside them.

    Args:
        pictures: (n, 8, 8).

    Returns:
        Nodes (n, 16, 6), four pixels and the place of each, and neighbours (n, 16, 16), rows of
        sum 1 with the node itself.

    Example:
        >>> nodes, neighbours = grid_graphs(np.zeros((2, 8, 8), np.float32))
        >>> nodes.shape, neighbours.shape
        ((2, 16, 6), (2, 16, 16))
    """
    count = len(pictures)
    squares = pictures.reshape(count, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(count, 16, 4)
    place = np.stack(np.meshgrid(np.arange(4), np.arange(4), indexing="ij"), axis=-1).reshape(16, 2)
    far = np.abs(place[:, None] - place[None]).sum(axis=2)
    neighbours = np.broadcast_to(_with_own((far == 1).astype(np.float64)), (count, 16, 16))
    places = np.broadcast_to(place.astype(np.float32), (count, 16, 2))
    return np.concatenate([squares, places], axis=2), np.ascontiguousarray(neighbours)


def nearest_graphs(pictures: Floats, nodes: int = 16, near: int = 4) -> tuple[Floats, Floats]:
    """Return pictures as graphs of their brightest pixels, each joined to the nearest others.

    Args:
        pictures: (n, H, W).
        nodes: How many pixels.
        near: How many others each is joined to.

    Returns:
        Nodes (n, nodes, 3), row, column and brightness, and neighbours (n, nodes, nodes).
    """
    count, _, width = pictures.shape
    flat = pictures.reshape(count, -1)
    chosen = np.argsort(-flat, axis=1, kind="stable")[:, :nodes]
    rows, columns = chosen // width, chosen % width
    bright = np.take_along_axis(flat, chosen, axis=1)
    place = np.stack([rows, columns], axis=2).astype(np.float64)
    far = ((place[:, :, None] - place[:, None]) ** 2).sum(axis=3)
    far[:, np.arange(nodes), np.arange(nodes)] = np.inf
    closest = np.argsort(far, axis=2, kind="stable")[:, :, :near]
    neighbours = np.zeros((count, nodes, nodes))
    np.put_along_axis(neighbours, closest, 1, axis=2)
    values = np.stack([rows, columns, bright], axis=2).astype(np.float32)
    return values, _with_own(neighbours)
