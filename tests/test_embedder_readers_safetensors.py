"""safetensors, single files."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from embedder.errors import MalformedError, TruncatedError, UnsupportedError
from embedder.opening import open_checkpoint
from reader_contract import ReaderContract, Weights


class TestSafetensors(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        path = folder / "model.safetensors"
        save_file(dict(weights), path)
        return path


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2", "F64"])
def test_every_float_type_gives_its_values(tmp_path: Path, dtype: str) -> None:
    stored = {
        "BF16": ml_dtypes.bfloat16,
        "F16": np.float16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F64": np.float64,
    }[dtype]
    values = np.array([[1.5, -2.0, 0.0], [0.25, 3.0, -0.5]]).astype(stored)
    entry = {"dtype": dtype, "shape": [2, 3], "data_offsets": [0, values.nbytes]}
    path = write_raw(tmp_path / "x", {"w": entry}, values.tobytes())
    with open_checkpoint(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensors[0].read(), values.astype(np.float64))


def test_a_header_that_promises_more_than_the_file_is_named_truncated(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 4_000_000]}
    path = write_raw(tmp_path / "x.safetensors", {"w": entry}, bytes(100))
    with pytest.raises(TruncatedError, match=r"promises 4,000,000 bytes .* has 100"):
        open_checkpoint(path)


def test_a_shape_of_a_quintillion_elements_is_refused_without_allocating(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 16]}
    path = write_raw(tmp_path / "x.safetensors", {"w": entry}, bytes(16))
    with pytest.raises(MalformedError, match="takes 4,000,000,000,000,000,000 bytes and has 16"):
        open_checkpoint(path)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
    }
    path = write_raw(tmp_path / "x.safetensors", header, bytes(24))
    with pytest.raises(MalformedError, match="'b' lies at 8–24 where byte 16 comes next"):
        open_checkpoint(path)


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    with pytest.raises(MalformedError, match="4 bytes follow the last tensor"):
        open_checkpoint(write_raw(tmp_path / "x.safetensors", header, bytes(20)))


def test_a_stored_type_that_is_not_known_is_named(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}
    with pytest.raises(UnsupportedError, match="'a' is stored as F6_E2M3"):
        open_checkpoint(write_raw(tmp_path / "x.safetensors", header, bytes(3)))


def test_a_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    text = b'{"w\xff":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
    with open_checkpoint(write_raw(tmp_path / "x.safetensors", text, bytes(16))) as checkpoint:
        assert checkpoint.tensors[0].name == "w\udcff"
