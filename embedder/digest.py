"""Exact identities: of a file's bytes, of a tensor's stored bits, of a tensor's values.

The values are hashed as out × in × space in the narrowest of bf16, fp16 and fp32 that holds them
all, so that the same weights in another format, another layout or a wider type have the same
digest, and a cast is told from a change.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from embedder.checkpoint import Block, Tensor
from embedder.encoding import Plain

DIGEST_BYTES = 16
_CHUNK_BYTES = 1 << 20
_LARGEST_TURNED = 1 << 25
"""Values of the largest tensor that is turned in memory to be hashed: 128 MiB of float32."""


def sha256_of(files: Sequence[Path]) -> str:
    """Return the SHA-256 of a file; of several, that of their sorted digests, one a line.

    The names of the files play no part.
    """
    digests = [_sha256_of_one(file) for file in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def _sha256_of_one(file: Path) -> str:
    state = hashlib.sha256()
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            state.update(view[:count])
    return state.hexdigest()


def combined(parts: Iterable[bytes]) -> bytes:
    """Return one digest of several, whatever their order.

    Example:
        >>> combined([b"a", b"b"]) == combined([b"b", b"a"])
        True
    """
    return blake3(b"".join(sorted(parts))).digest(length=DIGEST_BYTES)


class TensorHasher:
    """Hashes the stored bits and the values of one tensor from its blocks, in one pass.

    Where the values are the stored bytes already (the usual case) they are hashed once.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._bits = blake3()
        self._turned = tensor.order != tuple(range(len(tensor.shape)))
        self._gathered: list[NDArray[np.generic]] = []
        plain = tensor.encoding.name if isinstance(tensor.encoding, Plain) else ""
        self._stored_type = plain if plain in ("BF16", "F16", "F32", "F64") else ""
        self._values = _NarrowHasher(self._stored_type or "F32")

    def add(self, block: Block) -> None:
        """Add the next block; blocks come in stored order."""
        self._bits.update(block.raw)
        if self._turned:
            if self._tensor.size <= _LARGEST_TURNED:
                self._gathered.append(block.values.reshape(-1))
        else:
            self._values.add(block.values, block.raw if self._stored_type else None)

    def bits(self) -> bytes:
        """Return the digest of stored type, stored shape and stored bytes."""
        head = f"{self._tensor.encoding.name} {list(self._tensor.shape)}".encode()
        return _sealed(head, self._bits.digest())

    def values(self) -> tuple[bytes, str]:
        """Return the digest of the values and the narrow type that holds them.

        The digest is empty for a tensor that is stored in another layout and too large to turn.
        """
        if self._turned:
            if self._tensor.size > _LARGEST_TURNED:
                return b"", ""
            whole = np.concatenate(self._gathered or [np.zeros(0, np.float32)])
            self._gathered.clear()
            turned = np.transpose(whole.reshape(self._tensor.shape), self._tensor.order)
            self._values.add(np.ascontiguousarray(turned), None)
        narrow, payload = self._values.result(self._bits.digest)
        shape = [length for length in self._tensor.canonical_shape if length > 1]
        return _sealed(f"{narrow} {shape}".encode(), payload), narrow


def _sealed(head: bytes, payload: bytes) -> bytes:
    return blake3(head + b"\0" + payload).digest(length=DIGEST_BYTES)


class _NarrowHasher:
    """Hashes values in every type that has held all of them so far; the narrowest is kept."""

    def __init__(self, stored_type: str) -> None:
        self._stored_type = stored_type
        own_is_raw = {"BF16": (), "F16": ("BF16",)}
        narrower = own_is_raw.get(stored_type, ("BF16", "F16"))
        if stored_type == "F64":
            narrower = ("BF16", "F16", "F32")
        self._states = {name: blake3() for name in narrower}
        self._own = blake3()
        self._own_is_raw = True

    def add(self, values: NDArray[np.generic], raw: bytes | memoryview | None) -> None:
        """Add values in order; `raw` are the stored bytes where those are the values."""
        if raw is None:
            self._own_is_raw = False
            self._own.update(_as_type(values, self._stored_type))
        for name in list(self._states):
            narrow = _narrowed(values, name)
            if narrow is None:
                del self._states[name]
            else:
                self._states[name].update(narrow)

    def result(self, raw_digest: object) -> tuple[str, bytes]:
        """Return the narrowest type and the digest of the values in it.

        Args:
            raw_digest: Called for the digest of the stored bytes, where those are the values.
        """
        for name, state in self._states.items():
            return name, state.digest()
        if self._own_is_raw and callable(raw_digest):
            return self._stored_type, raw_digest()
        return self._stored_type, self._own.digest()


def _as_type(values: NDArray[np.generic], name: str) -> memoryview:
    """Return the bytes of the values in a plain floating type."""
    if name == "BF16":
        single = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        stored: NDArray[np.generic] = (single >> np.uint32(16)).astype(np.uint16)
    else:
        wide = {"F16": np.float16, "F32": np.float32, "F64": np.float64}[name]
        stored = np.ascontiguousarray(values, dtype=wide)
    return stored.reshape(-1).view(np.uint8).data


def _narrowed(values: NDArray[np.generic], name: str) -> memoryview | None:
    """Return the values in a narrow type, or None if it does not hold them exactly."""
    flat = np.ascontiguousarray(values).reshape(-1)
    # Most tensors fail in their first few values.
    for part in (flat[:64], flat):
        if flat.dtype == np.float64:
            with np.errstate(over="ignore"):
                single = part.astype(np.float32)
            if not np.array_equal(single, part, equal_nan=True):
                return None
        else:
            single = part.astype(np.float32, copy=False)
        if name == "BF16" and (single.view(np.uint32) & np.uint32(0xFFFF)).any():
            return None
        if name == "F16":
            with np.errstate(over="ignore"):
                half = single.astype(np.float16)
            if not np.array_equal(half.astype(np.float32), single, equal_nan=True):
                return None
    return _as_type(flat, name)
