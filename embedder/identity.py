"""Identity codes: one vector a model, alike for a parent and its children, unlike for strangers.

The code is a kernel mean. Each hidden unit gives random features of its codes; their mean over the
units needs no order, and the inner product of two means counts how many units found a partner. What
is trained (`embedder.training`) is in which directions of a code a difference counts: training on
moves the directions that vary most in all models anyway, and leaves the others.

Units are told apart by where they stand, because training moves codes the more the longer their
path: those that read the inputs themselves, those that feed the outputs themselves, and the rest.

Sources: Rahimi and Recht 2007, NeurIPS (random features); Smola et al. 2007, ALT (kernel means);
Pham and Pagh 2013, KDD (products of random features).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.anchors import WIDTH, Units
from embedder.errors import MalformedError
from embedder.units import Gauge
from embedder.writing import write_encoder

Array = NDArray[np.floating[Any]]
Sum = NDArray[np.float64]

KERNEL_PARTS = ("first read", "deep read", "last reach", "deep reach", "heads")
"""Parts that hold single codes: `read` what units read, `reach` what they do."""
PAIR_PARTS = ("hidden pairs", "output pairs")
"""Parts that hold what a unit reads beside what it does; a unit's negative gives the same."""
STREAMS = "streams"
"""The part that holds what residual streams begin with. No row of it stands for a unit, so features
are products of two directions' shares, which add up to a number of the second moment."""
PARTS = (*KERNEL_PARTS, *PAIR_PARTS, STREAMS)
CHANNEL_PARTS = ("channels read", "channels reach")
"""Parts that hold the channels of residual streams, which no code of a model takes: a stream may be
rotated. They are matched one by one (`embedder.matching`)."""

FEATURES = 256
"""Random features of a kernel (half of them cosines, half sines), and products of a pair."""
_DRAWN = {STREAMS: 2 * FEATURES, **dict.fromkeys(PAIR_PARTS, FEATURES)}
"""Directions that are drawn for a part; for kernels half as many, each for a cosine and a sine."""
DIMENSION = 256
"""Numbers of a code."""


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """The codes of some units, as one part takes them.

    Args:
        codes: (units, 64), or (units, 128) for pairs; float32.
        even: (units,) whether a code stands for its negative too.
    """

    codes: NDArray[np.float32]
    even: NDArray[np.bool_]


def tokens_of(units: Sequence[Units]) -> dict[str, Tokens]:
    """Return the codes of a model's units by part; a part that it lacks has none.

    Args:
        units: What `embedder.anchors.anchored` returns.

    Example:
        >>> from embedder.anchors import anchored
        >>> from embedder.architecture import Builder
        >>> b = Builder("mlp").input("in", 3).linear("a", "in", "h", 5, activation="relu")
        >>> mlp = b.linear("b", "h", "out", 2, named=True).build()
        >>> found = tokens_of(anchored({"a": np.ones((5, 3)), "b": np.ones((2, 5))}, mlp))
        >>> {name: len(tokens.even) for name, tokens in found.items() if len(tokens.even)}
        {'first read': 5, 'last reach': 5, 'hidden pairs': 5, 'output pairs': 2}
    """
    found: dict[str, list[tuple[Array, bool]]] = {part: [] for part in (*PARTS, *CHANNEL_PARTS)}
    hidden = [group for group in units if is_hidden(group)]
    first = min((group.depth for group in hidden), default=0)
    last = max((group.depth for group in hidden), default=0)
    for group in units:
        even = group.gauge is Gauge.SIGN
        pairs = np.concatenate([group.forward, group.backward], axis=1)
        if group.channels:
            for part, codes in zip(CHANNEL_PARTS, (group.forward, group.backward), strict=True):
                found[part].append((codes, False))
        elif group.stream:
            found[STREAMS].append((group.forward, False))
        elif group.heads:
            found["heads"].append((group.forward, even))
        elif group.gauge is Gauge.NAMED:
            found["output pairs"].append((pairs, False))
        else:
            found["first read" if group.depth == first else "deep read"].append(
                (group.forward, even)
            )
            if not group.gates:
                where = "last reach" if group.depth == last else "deep reach"
                found[where].append((group.backward, even))
                found["hidden pairs"].append((pairs, False))
    return {part: _joined(part, pieces) for part, pieces in found.items()}


def is_hidden(group: Units) -> bool:
    """Say whether units are told apart by where they stand: not outputs, heads or streams."""
    told = group.heads or group.stream or group.channels
    return group.gauge is not Gauge.NAMED and not told


def _joined(part: str, pieces: Sequence[tuple[Array, bool]]) -> Tokens:
    """Return the codes of several groups as one, without those that are zero."""
    width = 2 * WIDTH if part in PAIR_PARTS else WIDTH
    none = np.zeros((0, width), np.float32)
    codes = np.concatenate([none, *(codes for codes, _ in pieces)], dtype=np.float32)
    even = np.concatenate([np.zeros(0, bool), *(np.full(len(c), flag) for c, flag in pieces)])
    halves = codes.reshape(len(codes), width // WIDTH, WIDTH)
    alive = np.any(halves != 0, axis=2).all(axis=1)
    return Tokens(codes[alive], even[alive])


@dataclass(frozen=True, slots=True, eq=False)
class IdentityCode:
    """What an encoder makes of one model.

    Args:
        encoder: Version of the encoder; codes of different ones cannot be compared.
        vector: (256,) float32 of unit length.
        units: Part → the units that are matched one by one (`embedder.matching`); none where no
            architecture is known.
    """

    encoder: str
    vector: NDArray[np.float32]
    units: Mapping[str, Tokens] = field(default_factory=dict)


@dataclass(frozen=True)
class IdentityCoder:
    """Turns the codes of a model's units into its identity code.

    Args:
        arrays: What was trained, by name; for each part p
            `p/turn` (64 or 128, 64 or 128) what directions are weighed by,
            `p/frequencies` (64, 128), (128, 256) for pairs, or (64, 512) for streams,
            `p/centre` (features,) the mean over models, `p/weight` () its share;
            and `projection` (256, all features).
    """

    arrays: Mapping[str, NDArray[np.float32]]

    @cached_property
    def version(self) -> str:
        """Names this coder: codes of different ones cannot be compared."""
        state = blake2b(digest_size=6)
        for name in sorted(self.arrays):
            state.update(name.encode())
            state.update(np.ascontiguousarray(self.arrays[name]).tobytes())
        return state.hexdigest()

    @cached_property
    def _projection(self) -> NDArray[np.float64]:
        """The projection as it is computed with."""
        return self.arrays["projection"].astype(np.float64)

    def code(self, units: Sequence[Units]) -> NDArray[np.float32]:
        """Return the identity code of a model, (256,) float32 of unit length.

        A model without any unit has a code of zeros, which is near nothing.
        """
        return self.code_of(tokens_of(units))

    def code_of(self, parts: Mapping[str, Tokens]) -> NDArray[np.float32]:
        """Return the identity code of a model whose units are told by part."""
        return self.code_of_sums(
            {part: (self.sum_of(part, parts[part]), len(parts[part].even)) for part in PARTS}
        )

    def sum_of(self, part: str, tokens: Tokens) -> Sum:
        """Return the features of units added up, (256,)."""
        turn, frequencies = (self.arrays[f"{part}/{name}"] for name in ("turn", "frequencies"))
        found = features(part, tokens, turn, frequencies)
        return np.asarray(found.sum(axis=0, dtype=np.float64))

    def code_of_sums(self, sums: Mapping[str, tuple[Sum, int]]) -> NDArray[np.float32]:
        """Return the identity code of a model by what its units add up to.

        Args:
            sums: Part → what `sum_of` returns for all its units, and how many these are.
        """
        means = np.concatenate([self._mean(part, *sums[part]) for part in PARTS])
        code = self._projection @ means
        return np.asarray(code / max(float(np.linalg.norm(code)), 1e-12), np.float32)

    def _mean(self, part: str, total: Sum, count: int) -> Sum:
        """Return what a part adds to the code: centred, of unit length, times its weight."""
        centre = self.arrays[f"{part}/centre"]
        if count == 0:
            return np.zeros(len(centre))
        mean = total / count - centre
        length = max(float(np.linalg.norm(mean)), 1e-12)
        return np.asarray(mean / length * float(self.arrays[f"{part}/weight"]))

    def save(self, path: Path) -> None:
        """Write the coder to a safetensors file; it is either whole or not there."""
        from safetensors.numpy import save_file

        write_encoder(path, lambda beside: save_file(dict(self.arrays), beside))

    @classmethod
    def load(cls, path: Path) -> "IdentityCoder":
        """Read a coder from a safetensors file.

        Raises:
            MalformedError: It holds no coder, or one of another version of this program.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            arrays = load_file(path)
        except (SafetensorError, ValueError) as error:
            raise MalformedError(path, f"holds no encoder: {error}") from error
        expected = {name: values.shape for name, values in untrained().arrays.items()}
        if expected != {name: values.shape for name, values in arrays.items()}:
            raise MalformedError(path, "is an encoder of another version", "train it anew")
        return cls(arrays)


def features(
    part: str,
    tokens: Tokens,
    turn: NDArray[np.float32],
    frequencies: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Return the features of each unit, (units, 256).

    They are computed in float32, whose sines take a twentieth of the time of float64.
    """
    turned = tokens.codes @ turn
    if part == STREAMS:
        once, again = np.split(turned @ frequencies, 2, axis=1)
        return np.asarray(once * again)
    if part in PAIR_PARTS:
        read, reach = (unit_rows(half) for half in np.split(turned, 2, axis=1))
        return np.asarray((read @ frequencies[:WIDTH]) * (reach @ frequencies[WIDTH:]))
    phase = unit_rows(turned) @ frequencies
    sines, odd = np.zeros_like(phase), ~tokens.even
    sines[odd] = np.sin(phase[odd])
    return np.concatenate([np.cos(phase), sines], axis=1)


def untrained(bandwidth: float = 0.8) -> IdentityCoder:
    """Return the coder that training starts from: all directions count alike.

    Args:
        bandwidth: σ of the kernel exp(−‖u − v‖² / 2σ²); .8 leaves half of its peak at a cosine
            of .56. Measured after training: .8 finds .47 of the parents at a drift of 1 to 2, .5
            finds .43.
    """
    rng = np.random.Generator(np.random.PCG64(20260))
    arrays: dict[str, Array] = {}
    for part in PARTS:
        size = 2 * WIDTH if part in PAIR_PARTS else WIDTH
        drawn = rng.normal(size=(size, _DRAWN.get(part, FEATURES // 2)))
        arrays[f"{part}/turn"] = np.eye(size)
        arrays[f"{part}/frequencies"] = drawn / bandwidth if part in KERNEL_PARTS else drawn
        arrays[f"{part}/centre"] = np.zeros(FEATURES)
        arrays[f"{part}/weight"] = np.ones(())
    total = FEATURES * len(PARTS)
    arrays["projection"] = rng.normal(size=(DIMENSION, total)) / np.sqrt(total)
    return IdentityCoder({name: values.astype(np.float32) for name, values in arrays.items()})


def unit_rows(codes: Array) -> Array:
    """Return rows of unit length; rows of zeros stay zeros."""
    lengths = np.linalg.norm(codes, axis=1, keepdims=True)
    return np.asarray(codes / np.maximum(lengths, 1e-12))
