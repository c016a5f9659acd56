"""Flax files. They are written with msgpack as `flax.serialization` does it; the reader was also
checked on files of flax 0.12 itself (variables, train state, chunked arrays), value by value."""

from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import pytest

from embedder.checkpoint import Kind
from embedder.errors import CheckpointError, MalformedError, TruncatedError, UnsupportedError
from embedder.opening import open_checkpoint
from embedder.readers import messagepack
from embedder.readers.flax import open_flax
from reader_contract import ReaderContract, Weights


def packed(values: np.ndarray) -> msgpack.ExtType:
    """Return an array as Flax packs it."""
    parts = (values.shape, values.dtype.name, values.tobytes())
    return msgpack.ExtType(1, msgpack.packb(parts, use_bin_type=True))


def chunked(values: np.ndarray, size: int) -> dict[str, Any]:
    """Return an array as Flax packs one that is larger than a chunk."""
    flat = values.reshape(-1)
    chunks = [flat[start : start + size] for start in range(0, flat.size, size)]
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(axis): length for axis, length in enumerate(values.shape)},
        "chunks": {str(place): packed(chunk) for place, chunk in enumerate(chunks)},
    }


def write(path: Path, tree: object) -> Path:
    path.write_bytes(msgpack.packb(tree, use_bin_type=True))
    return path


class TestFlax(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        tree = {
            "params": {
                "Embed_0": {"embedding": packed(weights["embedding"])},
                "Conv_0": {"kernel": packed(weights["conv"].transpose(2, 3, 1, 0))},
                "Dense_0": {
                    "kernel": packed(weights["dense"].T),
                    "bias": packed(weights["bias"]),
                },
            }
        }
        return write(folder / "flax_model.msgpack", tree)


class TestChunkedFlax(ReaderContract):
    damage_rounds = 30

    def write(self, folder: Path, weights: Weights) -> Path:
        tree = {
            "embedding": chunked(weights["embedding"], 7),
            "Conv_0": {"kernel": chunked(weights["conv"].transpose(2, 3, 1, 0), 11)},
            "Dense_0": {"kernel": chunked(weights["dense"].T, 13), "bias": packed(weights["bias"])},
        }
        return write(folder / "flax_model.msgpack", tree)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def test_bfloat16_and_scalars_are_read(tmp_path: Path) -> None:
    values = np.array([[1.5, -2.0]], ml_dtypes.bfloat16)
    scalar = packed(np.array(3, np.int32))
    tree = {"w": packed(values), "step": msgpack.ExtType(3, scalar.data), "none": None}
    with open_checkpoint(write(tmp_path / "x", tree)) as model:
        weight, step = model.tensors
        np.testing.assert_array_equal(weight.read(), values.astype(np.float32))
        assert weight.encoding.name == "BF16"
        assert step.kind is Kind.BUFFER
        assert model.parameters == 2


def test_a_train_state_is_told_apart_from_its_weights(tmp_path: Path) -> None:
    layer = {"kernel": packed(ones(4, 3)), "bias": packed(ones(3))}
    tree = {
        "params": {"Dense_0": layer},
        "batch_stats": {"BatchNorm_0": {"mean": packed(ones(3))}},
        "opt_state": {"0": {"mu": {"Dense_0": layer}}},
        "step": 5,
    }
    with open_checkpoint(write(tmp_path / "x", tree)) as model:
        assert model.parameters == 18
        kinds = [tensor.kind for tensor in model.tensors]
        assert kinds == [
            Kind.WEIGHT,
            Kind.BIAS,
            Kind.STATISTIC,
            Kind.OPTIMISER,
            Kind.OPTIMISER,
        ]


@pytest.mark.parametrize(
    ("parent", "kernel", "bias", "canonical"),
    [
        ("Conv_0", (3, 5, 4, 6), (6,), (6, 4, 3, 5)),
        ("Conv_0", (7, 4, 6), (6,), (6, 4, 7)),
        ("attention/query", (8, 2, 4), (2, 4), (8, 2, 4)),
        ("attention/out", (2, 4, 8), (8,), (2, 4, 8)),
        ("stack", (12, 4, 6), (12, 6), (12, 6, 4)),
        ("Dense_0", (4, 6), (6,), (6, 4)),
    ],
)
def test_kernels_become_out_in_space(
    tmp_path: Path,
    parent: str,
    kernel: tuple[int, ...],
    bias: tuple[int, ...],
    canonical: tuple[int, ...],
) -> None:
    tree: dict[str, Any] = {"kernel": packed(ones(*kernel)), "bias": packed(ones(*bias))}
    for name in reversed(parent.split("/")):
        tree = {name: tree}
    with open_checkpoint(write(tmp_path / "x", tree)) as model:
        assert model.tensors[0].canonical_shape == canonical


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a"])
def test_nesting_without_measure_is_refused(tmp_path: Path, opening: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\x81\xa1w" + opening * 100_000 + b"\xc0")
    with pytest.raises(MalformedError, match="nested deeper than 100"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "header", [b"\xdd\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
)
def test_lengths_beyond_the_file_are_refused_without_allocating(
    tmp_path: Path, header: bytes
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\x81\xa1w" + header + bytes(1000))
    with pytest.raises(TruncatedError, match="are promised at byte"):
        open_checkpoint(path)


def test_more_values_than_a_model_has_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messagepack, "MOST_VALUES", 1000)
    with pytest.raises(MalformedError, match="more than 1,000 values"):
        open_checkpoint(write(tmp_path / "x", {"w": [0] * 2000}))


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        (((10**9, 10**9), "float32", bytes(16)), MalformedError, "takes 4,000,000,000,000,000,000"),
        (((-1, 2), "float32", bytes(8)), MalformedError, "impossible shape"),
        ((("a",), "float32", bytes(8)), MalformedError, "impossible shape"),
        (((2,), "float31", bytes(8)), UnsupportedError, "'float31'"),
        (((2,), 7, bytes(8)), MalformedError, "not a list of shape, type and bytes"),
        (("x", "y"), MalformedError, "not a list of shape, type and bytes"),
    ],
)
def test_arrays_that_cannot_be_are_refused(
    tmp_path: Path, parts: tuple[Any, ...], error: type[CheckpointError], message: str
) -> None:
    array = msgpack.ExtType(1, msgpack.packb(parts, use_bin_type=True))
    with pytest.raises(error, match=message):
        open_checkpoint(write(tmp_path / "x", {"w": array}))


@pytest.mark.parametrize("missing", ["shape", "chunks"])
def test_chunks_without_a_shape_or_a_part_are_refused(tmp_path: Path, missing: str) -> None:
    array = chunked(ones(4, 3), 5)
    del array[missing]["0"]
    with pytest.raises(MalformedError, match=r"no shape and chunks|takes|impossible"):
        open_checkpoint(write(tmp_path / "x", {"w": array}))


def test_a_list_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match="not a map"):
        open_flax(write(tmp_path / "x", [1, 2]))
