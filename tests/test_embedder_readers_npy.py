"""numpy's single arrays and archives of arrays."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from embedder.errors import (
    EmptyModelError,
    MalformedError,
    RefusedError,
    TruncatedError,
    UnsupportedError,
)
from embedder.opening import open_checkpoint
from embedder.readers.npy import open_npy
from hostile import Evil, claim_to_unpack_to
from reader_contract import ReaderContract, Weights, assembled


class TestNpz(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        path = folder / "weights.npz"
        np.savez(path, **weights)  # type: ignore[arg-type]
        return path


class TestCompressedNpz(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        path = folder / "weights.npz"
        np.savez_compressed(path, **weights)  # type: ignore[arg-type]
        return path


class TestNpyOfObjects(ReaderContract):
    """A single array cannot hold the contract's four weights; a dictionary in an array can."""

    def write(self, folder: Path, weights: Weights) -> Path:
        path = folder / "weights.npy"
        np.save(path, np.array(dict(weights), dtype=object), allow_pickle=True)
        return path


def save(path: Path, values: NDArray[np.generic]) -> Path:
    with path.open("wb") as file:
        np.save(file, values)
    return path


def with_header(path: Path, text: str, content: bytes = b"") -> Path:
    header = text.encode()
    path.write_bytes(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + content)
    return path


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", ">f8", "<c8", ">c16"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_one_array_gives_its_values(tmp_path: Path, dtype: str, order: str) -> None:
    values = np.random.default_rng(1).normal(size=(3, 4, 5)).astype(dtype)
    stored = np.asarray(values, order="F" if order == "F" else "C")
    # Complex numbers are not counted as weights, so a file of them alone is an empty model.
    with open_npy(save(tmp_path / "x", stored)) as checkpoint:
        (tensor,) = checkpoint.tensors
        wanted = np.abs(values) if "c" in dtype else values
        np.testing.assert_allclose(tensor.canonical(), wanted, rtol=1e-6)
        for most in (1, 7, 1000):
            np.testing.assert_array_equal(assembled(tensor, most), tensor.read())


def test_a_vector_and_bfloat16_saved_by_numpy_are_read(tmp_path: Path) -> None:
    values = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    with open_checkpoint(save(tmp_path / "x", values)) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensors[0].read(), values.astype(np.float32))
        assert "read as bfloat16" in checkpoint.limits[0]
    with open_checkpoint(save(tmp_path / "y", np.asfortranarray(np.ones(3)))) as checkpoint:
        assert checkpoint.tensors[0].shape == (3,)


@pytest.mark.parametrize("archived", [False, True])
def test_a_malicious_array_of_objects_is_refused_and_runs_nothing(
    tmp_path: Path, archived: bool
) -> None:
    marker = tmp_path / "ran"
    path = tmp_path / ("x.npz" if archived else "x.npy")
    content = np.array([np.ones(3), Evil(marker)], dtype=object)
    if archived:
        np.savez(path, good=np.ones((2, 2)), bad=content)
    else:
        np.save(path, content)
    with pytest.raises(RefusedError, match=r"imports posix\.system"):
        open_checkpoint(path)
    assert not marker.exists()


def test_text_and_records_in_an_archive_are_passed_over(tmp_path: Path) -> None:
    records = np.zeros(2, dtype=[("a", "f4"), ("b", "i4")])
    path = tmp_path / "x.npz"
    np.savez(path, w=np.ones((2, 2)), names=np.array(["a", "b"]), records=records)
    with open_checkpoint(path) as checkpoint:
        assert [tensor.name for tensor in checkpoint.tensors] == ["w"]
        assert checkpoint.limits == [
            "array 'records' is stored as fields of several types, which we cannot decode"
        ]
    with pytest.raises(UnsupportedError, match="fields of several types"):
        open_checkpoint(save(tmp_path / "y", records))
    with pytest.raises(EmptyModelError):
        open_checkpoint(save(tmp_path / "z", np.array(["a", "b"])))


def test_a_shape_of_a_quintillion_elements_is_refused(tmp_path: Path) -> None:
    text = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }\n"
    path = with_header(tmp_path / "x", text % "1000000000, 1000000000")
    with pytest.raises(MalformedError, match="a shape that no array can have"):
        open_checkpoint(path)
    path = with_header(tmp_path / "x", text % "1000000000, 1000", bytes(16))
    with pytest.raises(TruncatedError, match="takes 4,000,000,000,000 bytes and has 16"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "{'descr': '<f4', 'fortran_order': False}",
        "{'descr': '<f4', 'fortran_order': 1, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (9**9**9,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,)}" % ("9" * 5000),
        "(" * 5000,
        "    ",
    ],
)
def test_a_header_that_is_not_numpys_is_malformed(tmp_path: Path, text: str) -> None:
    with pytest.raises(MalformedError, match="the header of array 'array' is not what numpy"):
        open_checkpoint(with_header(tmp_path / "x", text))


def test_a_header_that_fills_the_memory_is_malformed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\x93NUMPY\2\0" + b"\xff\xff\xff\xff" + bytes(100))
    with pytest.raises(MalformedError, match=r"has 4,294,967,\d+ bytes"):
        open_checkpoint(path)


def test_an_archive_bomb_is_refused_from_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, w=np.zeros((2, 2)))
    claim_to_unpack_to(path, 2_000_000_000)
    with pytest.raises(RefusedError, match="would unpack to 2,000,000,000: an archive bomb"):
        open_checkpoint(path)


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, w=np.ones((2, 2)))
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\1\2")
    content[entry + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(RefusedError, match=r"member 'w\.npy' is encrypted"):
        open_checkpoint(path)
