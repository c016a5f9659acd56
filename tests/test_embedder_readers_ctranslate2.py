"""CTranslate2 files, written as the package's converter serialises them. The reader was also
checked on a Transformer that ctranslate2 4.8 saved plain and as int8, int16 and float16."""

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from embedder.checkpoint import Kind
from embedder.errors import CheckpointError, MalformedError, TruncatedError, UnsupportedError
from embedder.opening import open_checkpoint
from reader_contract import WEIGHTS, ReaderContract, Weights

TYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<H", len(raw) + 1) + raw + b"\0"


def write(
    path: Path,
    variables: Mapping[str, np.ndarray],
    *,
    version: int = 6,
    aliases: Mapping[str, str] | None = None,
    end: bytes = b"",
) -> Path:
    """Write a `model.bin` of a version."""
    out = struct.pack("<I", version) + text("TransformerSpec") + struct.pack("<I", 7)
    out += struct.pack("<I", len(variables))
    for name, values in variables.items():
        out += text(name) + struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
        if version >= 4:
            out += struct.pack("<BI", TYPES.index(str(values.dtype)), values.nbytes)
        else:
            out += struct.pack("<BI", values.itemsize, values.size)
        out += values.tobytes()
    if version >= 3:
        out += struct.pack("<I", len(aliases or {}))
        out += b"".join(text(name) + text(target) for name, target in (aliases or {}).items())
    path.write_bytes(out + end)
    return path


def variables(weights: Weights) -> dict[str, np.ndarray]:
    return {
        "encoder/embeddings_0/weight": weights["embedding"],
        "encoder/conv1/weight": weights["conv"],
        "encoder/layer_0/linear_0/weight": weights["dense"],
        "encoder/layer_0/linear_0/bias": weights["bias"],
        "encoder/num_heads": np.array(8, np.int16),
    }


class TestCTranslate2(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        return write(folder / "model.bin", variables(weights))


class TestCTranslate2BeforeVersion4(ReaderContract):
    damage_rounds = 30

    def write(self, folder: Path, weights: Weights) -> Path:
        return write(folder / "model.bin", variables(weights), version=2)


def test_int8_rows_are_divided_by_their_scales(tmp_path: Path) -> None:
    values = WEIGHTS["conv"]
    scale = 127 / np.abs(values).reshape(5, -1).max(axis=1)
    stored = np.rint(values * scale[:, None, None, None]).astype(np.int8)
    found: dict[str, np.ndarray] = {"w/weight": stored, "w/weight_scale": scale.astype(np.float32)}
    with open_checkpoint(write(tmp_path / "x", found)) as model:
        weight, scales = model.tensors
        expected = stored / scale[:, None, None, None]
        np.testing.assert_allclose(weight.read(), expected, rtol=1e-6)
        assert weight.encoding.quantised
        assert scales.kind is Kind.SCALE
        assert model.parameters == values.size


def test_int16_has_one_scale(tmp_path: Path) -> None:
    stored = np.array([[1024, -512]], np.int16)
    found: dict[str, np.ndarray] = {
        "w/weight": stored,
        "w/weight_scale": np.array(1024, np.float32),
    }
    with open_checkpoint(write(tmp_path / "x", found)) as model:
        np.testing.assert_array_equal(model.tensors[0].read(), [[1.0, -0.5]])


def test_other_names_of_a_variable_are_not_counted_twice(tmp_path: Path) -> None:
    aliases = {"decoder/projection/weight": "encoder/embeddings_0/weight"}
    with open_checkpoint(write(tmp_path / "x", variables(WEIGHTS), aliases=aliases)) as model:
        assert model.parameters == sum(values.size for values in WEIGHTS.values())
        assert model.declared["specification"] == "TransformerSpec"


def test_weights_packed_in_four_bits_are_named(tmp_path: Path) -> None:
    found: dict[str, np.ndarray] = {
        "a/weight": np.ones((4, 4), np.float32),
        "w/weight": np.ones((4, 2), np.int32),
        "w/weight_scale": np.ones((4, 1), np.float16),
        "w/weight_zero": np.ones((4, 1), np.int32),
    }
    with open_checkpoint(write(tmp_path / "x", found)) as model:
        assert model.parameters == 16
        assert model.limits == ["'w/weight' is packed in 4 bits (AWQ), which we do not unpack"]


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    found: dict[str, np.ndarray] = {
        "w": np.ones((4, 4), np.int8),
        "w_scale": np.ones(3, np.float32),
    }
    with pytest.raises(MalformedError, match="4 rows and 3 scales"):
        open_checkpoint(write(tmp_path / "x", found))


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        (
            struct.pack("<B2I", 2, 4, 3),
            struct.pack("<B2I", 2, 10**9, 10**9),
            MalformedError,
            "takes 4,000,000,000,000,000,000 bytes and has 48",
        ),
        (struct.pack("<BI", 0, 48), struct.pack("<BI", 0, 1 << 31), TruncatedError, "ends at byte"),
        (struct.pack("<BI", 0, 48), struct.pack("<BI", 9, 48), UnsupportedError, "unknown type 9"),
        (struct.pack("<I", 6), struct.pack("<I", 7), UnsupportedError, "binary version 7"),
        (
            struct.pack("<II", 7, 1),
            struct.pack("<II", 7, 1 << 31),
            MalformedError,
            "promises 2,147,483,648 variables",
        ),
        (struct.pack("<II", 7, 1), struct.pack("<II", 7, 9), TruncatedError, "in the list"),
    ],
)
def test_files_that_cannot_be_are_refused(
    tmp_path: Path, old: bytes, new: bytes, error: type[CheckpointError], message: str
) -> None:
    path = write(tmp_path / "x", {"w": np.ones((4, 3), np.float32)})
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(error, match=message):
        open_checkpoint(path)


def test_bytes_after_the_last_variable_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match="7 bytes follow"):
        open_checkpoint(write(tmp_path / "x", variables(WEIGHTS), end=bytes(7)))
