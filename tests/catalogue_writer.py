"""Models for the tests of the index, and a program that adds some as another process would."""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Checkpoint, tensor_of
from embedder.fingerprint import Fingerprint, take_fingerprint
from embedder.identity import STREAMS, IdentityCode, Tokens, unit_rows
from embedder.matching import MATCHED
from index.catalogue import Entry, open_catalogue

Weights = Mapping[str, NDArray[np.floating]]


def weights_of(seed: int) -> dict[str, NDArray[np.floating]]:
    rng = np.random.default_rng(seed)
    return {f"w{place}": rng.normal(size=(20 + place, 30)).astype(np.float32) for place in range(3)}


def printed(weights: Weights) -> Fingerprint:
    tensors = tuple(tensor_of(name, values) for name, values in weights.items())
    return take_fingerprint(Checkpoint("here", "live", tensors))


def entry_for(name: str, fingerprint: Fingerprint, **changed: Any) -> Entry:
    """Return what goes into a catalogue beside a fingerprint."""
    facts: dict[str, Any] = {
        "location": f"/models/{name}",
        "format": fingerprint.format,
        "sha256": "".join(f"{ord(letter):02x}" for letter in name)[:64].ljust(64, "0"),
        "content": fingerprint.content,
        "identity": fingerprint.identity,
        "parameters": fingerprint.parameters,
        "size_bytes": 123,
        "adapter": False,
        "method": fingerprint.method,
        "added_at": "2026-01-01T00:00:00+00:00",
        "stamp": "[]",
    }
    return Entry(name=name, **{**facts, **changed})


def model(name: str, seed: int, **changed: Any) -> tuple[Entry, Fingerprint]:
    """Return a model as `Catalogue.add` takes it."""
    fingerprint = printed(weights_of(seed))
    return entry_for(name, fingerprint, **changed), fingerprint


def code_of(seed: int, encoder: str = "one") -> IdentityCode:
    """Return an identity code."""
    vector = np.random.default_rng([seed, 7]).normal(size=256)
    return IdentityCode(encoder, (vector / np.linalg.norm(vector)).astype(np.float32))


def units_of(seed: int) -> dict[str, Tokens]:
    """Return units of a model, twenty in each part and no stream."""
    rng = np.random.default_rng([seed, 8])
    codes = rng.normal(size=(len(MATCHED), 20, 64)).astype(np.float32)
    codes /= np.linalg.norm(codes, axis=2, keepdims=True)
    found = {
        part: Tokens(rows, np.arange(20) % 2 == 0)
        for part, rows in zip(MATCHED, codes, strict=True)
    }
    return {**found, STREAMS: Tokens(np.zeros((0, 4096), np.float32), np.zeros(0, bool))}


def units_like(units: Mapping[str, Tokens], noise: float, seed: int) -> dict[str, Tokens]:
    """Return units that lie near others, in another order."""
    rng = np.random.default_rng(seed)
    found = {}
    for part, tokens in units.items():
        codes = tokens.codes + noise * rng.normal(size=tokens.codes.shape) / 8
        order = rng.permutation(len(codes))
        found[part] = Tokens(unit_rows(codes[order]).astype(np.float32), tokens.even[order])
    return found


def near_code(seed: int, units: Mapping[str, Tokens]) -> IdentityCode:
    """Return a code that has a cosine of about .4 with all others of its kind."""
    vector = np.random.default_rng([seed, 9]).normal(size=256)
    vector[0] = 12
    return IdentityCode("one", (vector / np.linalg.norm(vector)).astype(np.float32), units)


def main() -> None:
    """Add models: URL, prefix of their names, first seed, how many."""
    url, prefix, first, count = sys.argv[1:]
    with open_catalogue(url, create=True) as catalogue:
        for seed in range(int(first), int(first) + int(count)):
            catalogue.add(*model(f"{prefix}{seed}", seed))


if __name__ == "__main__":
    main()
