"""Paddle: the contract, programs of both forms, hostile files.

Paddle itself cannot be installed here, so the writer below is our own, made after the format's
description; that it is right shows on the real files of the corpus, which are bit-equal to their
ONNX renderings.
"""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedder.checkpoint import Checkpoint, Kind, Tensor
from embedder.errors import MalformedError, TruncatedError, UnsupportedError
from embedder.opening import open_checkpoint
from embedder.readers.protobuf import encode_varint
from reader_contract import ReaderContract, Weights

Array = NDArray[np.generic]
RNG = np.random.default_rng(15)

TYPES = {"bool": 0, "int16": 1, "int32": 2, "int64": 3, "float16": 4, "float32": 5, "float64": 6}
TYPES |= {"uint8": 20, "int8": 21}

Op = tuple[str, dict[str, Sequence[str]], Sequence[str], dict[str, Any]]


def random(*shape: int) -> NDArray[np.float32]:
    return RNG.normal(size=shape).astype(np.float32)


def number(at: int, value: int) -> bytes:
    return encode_varint(at << 3) + encode_varint(value & (1 << 64) - 1)


def content(at: int, value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return encode_varint(at << 3 | 2) + encode_varint(len(value)) + value


def described(dtype: int, shape: Sequence[int]) -> bytes:
    return number(1, dtype) + b"".join(number(2, length) for length in shape)


def record(values: Array, *, dtype: int | None = None, shape: Sequence[int] | None = None) -> bytes:
    kind = TYPES[values.dtype.name] if dtype is None else dtype
    description = described(kind, values.shape if shape is None else shape)
    head = struct.pack("<IQ", 0, 0) + struct.pack("<Ii", 0, len(description)) + description
    return head + values.tobytes()


def write_parameters(path: Path, weights: dict[str, Array]) -> Path:
    path.write_bytes(b"".join(record(weights[name]) for name in sorted(weights)))
    return path


def variable(name: str, shape: Sequence[int], *, kept: bool) -> bytes:
    kind = number(1, 7) + content(3, content(1, described(5, shape)))
    return content(3, content(1, name) + content(2, kind) + number(3, int(kept)))


def attribute(name: str, value: Any) -> bytes:
    if isinstance(value, bool):
        return content(4, content(1, name) + number(2, 6) + number(10, int(value)))
    if isinstance(value, int):
        return content(4, content(1, name) + number(2, 0) + number(3, value))
    return content(4, content(1, name) + b"".join(number(6, each) for each in value))


def slots(at: int, given: dict[str, Sequence[str]]) -> bytes:
    return b"".join(
        content(at, content(1, slot) + b"".join(content(2, name) for name in names))
        for slot, names in given.items()
    )


def write_program(
    path: Path, shapes: dict[str, Sequence[int]], ops: Sequence[Op], kept: Sequence[str]
) -> Path:
    block = number(1, 0)
    for name, shape in shapes.items():
        block += variable(name, shape, kept=name in kept)
    for op, inputs, outputs, attributes in ops:
        block += content(
            4,
            slots(1, inputs)
            + slots(2, {"Out": outputs})
            + content(3, op)
            + b"".join(attribute(name, value) for name, value in attributes.items()),
        )
    path.write_bytes(content(1, block))
    return path


def write_model(folder: Path, weights: dict[str, Array], ops: Sequence[Op]) -> Path:
    path = write_parameters(folder / "inference.pdiparams", weights)
    shapes: dict[str, Sequence[int]] = {name: values.shape for name, values in weights.items()}
    for _, _, outputs, _ in ops:
        shapes |= {name: (-1, 8) for name in outputs if name not in shapes}
    write_program(folder / "inference.pdmodel", shapes, ops, list(weights))
    return path


def tensor_named(checkpoint: Checkpoint, name: str) -> Tensor:
    return next(tensor for tensor in checkpoint.tensors if tensor.name == name)


class TestPaddle(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        # A parameter file begins with a tensor; the format is told by the first one.
        return write_parameters(folder / "inference.pdiparams", dict(weights))


class TestPaddleWithItsProgram(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        given: dict[str, Array] = {**weights, "dense": weights["dense"].T.copy()}
        ops: list[Op] = [
            ("lookup_table_v2", {"Ids": ["ids"], "W": ["embedding"]}, ["a"], {}),
            ("conv2d", {"Input": ["x"], "Filter": ["conv"]}, ["b"], {}),
            ("matmul_v2", {"X": ["x"], "Y": ["dense"]}, ["c"], {"trans_x": False}),
            ("elementwise_add", {"X": ["c"], "Y": ["bias"]}, ["d"], {}),
        ]
        return write_model(folder, given, ops)


@pytest.mark.parametrize("damaged", ["cut", "random"])
def test_a_damaged_program_is_told_and_not_needed(tmp_path: Path, damaged: str) -> None:
    path = TestPaddleWithItsProgram().write(
        tmp_path,
        {
            "embedding": random(11, 6),
            "conv": random(5, 4, 3, 2),
            "dense": random(7, 9),
            "bias": random(7),
        },
    )
    program = tmp_path / "inference.pdmodel"
    good = program.read_bytes()
    for place in range(1, len(good), 7):
        bad = bytearray(good[:place] if damaged == "cut" else good)
        if damaged == "random":
            bad[place : place + 3] = RNG.bytes(3)
        program.write_bytes(bad)
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.parameters == 66 + 120 + 63 + 7


def test_kinds_and_order_come_from_the_program(tmp_path: Path) -> None:
    weights: dict[str, Array] = {
        "a.w": random(9, 7),
        "b.w": random(7, 9),
        "c.w": random(4, 6, 3, 2),
        "d.w": random(12, 1, 3, 3),
        "bn.b": random(7),
        "bn.m": random(7),
        "bn.s": random(7),
        "bn.v": random(7),
        "e.b": random(7),
        "f.w": random(9, 7),
    }
    ops: list[Op] = [
        ("matmul_v2", {"X": ["x"], "Y": ["a.w"]}, ["1"], {"trans_y": False}),
        ("matmul_v2", {"X": ["1"], "Y": ["b.w"]}, ["2"], {"trans_y": True}),
        ("conv2d_transpose", {"Input": ["2"], "Filter": ["c.w"]}, ["3"], {"groups": 1}),
        ("depthwise_conv2d", {"Input": ["3"], "Filter": ["d.w"]}, ["4"], {"groups": 12}),
        (
            "batch_norm",
            {
                "X": ["4"],
                "Scale": ["bn.s"],
                "Bias": ["bn.b"],
                "Mean": ["bn.m"],
                "Variance": ["bn.v"],
            },
            ["5", "bn.m", "bn.v"],
            {},
        ),
        ("elementwise_add", {"X": ["5"], "Y": ["e.b"]}, ["6"], {"axis": 1}),
        ("transpose2", {"X": ["f.w"]}, ["turned"], {"axis": [1, 0]}),
        ("mul", {"X": ["6"], "Y": ["turned"]}, ["7"], {}),
    ]
    path = write_model(tmp_path, weights, ops)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.limits == []
        assert checkpoint.files == (path, tmp_path / "inference.pdmodel")
        found = {tensor.name: (tensor.kind, tensor.axes) for tensor in checkpoint.tensors}
        for name, values in weights.items():
            np.testing.assert_array_equal(tensor_named(checkpoint, name).read(), values)
    assert found == {
        "a.w": (Kind.WEIGHT, (1, 0)),
        "b.w": (Kind.WEIGHT, ()),
        "c.w": (Kind.WEIGHT, (1, 0, 2, 3)),
        "d.w": (Kind.WEIGHT, ()),
        "bn.b": (Kind.NORM, ()),
        "bn.m": (Kind.STATISTIC, ()),
        "bn.s": (Kind.NORM, ()),
        "bn.v": (Kind.STATISTIC, ()),
        "e.b": (Kind.BIAS, ()),
        "f.w": (Kind.WEIGHT, ()),
    }


@pytest.mark.parametrize("axis", [-1, 1])
def test_quantised_weights_have_their_scales_applied(tmp_path: Path, axis: int) -> None:
    stored = RNG.integers(-127, 128, (9, 7)).astype(np.int8)
    scale = RNG.uniform(0.5, 2, 1 if axis < 0 else 7).astype(np.float32)
    ops: list[Op] = [
        (
            "dequantize_linear",
            {"X": ["w"], "Scale": ["scale"]},
            ["real"],
            {"quant_axis": axis, "bit_length": 8},
        ),
        ("matmul_v2", {"X": ["x"], "Y": ["real"]}, ["y"], {}),
    ]
    path = write_model(tmp_path, {"w": stored, "scale": scale}, ops)
    with open_checkpoint(path) as checkpoint:
        tensor = tensor_named(checkpoint, "w")
        assert (tensor.kind, tensor.encoding.quantised) == (Kind.WEIGHT, True)
        np.testing.assert_allclose(tensor.read(), stored * (scale / 127), rtol=1e-6)
        assert tensor_named(checkpoint, "scale").kind is Kind.SCALE
        assert checkpoint.parameters == 63


def json_program(weights: dict[str, Array]) -> dict[str, Any]:
    def tensor(at: int, shape: Sequence[int]) -> dict[str, Any]:
        kind = {"#": "0.t_dtensor", "D": [{"#": "0.t_f32"}, list(shape), "NCHW", [], 0]}
        return {"%": at, "TT": kind}

    ops: list[dict[str, Any]] = [
        {"#": "p", "A": [0, 1, 1, name], "O": tensor(at, values.shape), "OA": [1, 0, 1]}
        for at, (name, values) in enumerate(weights.items(), 1)
    ]
    ops += [
        {
            "#": "1.matmul",
            "A": [{"AT": {"#": "0.a_bool", "D": False}, "N": "transpose_y"}],
            "I": [{"%": 50}, {"%": 1}],
            "O": [tensor(51, (-1, 7))],
        },
        {"#": "1.add", "A": [], "I": [{"%": 51}, {"%": 2}], "O": [tensor(52, (-1, 7))]},
        {
            "#": "1.batch_norm_",
            "A": [],
            "I": [{"%": at} for at in (52, 3, 4, 5, 6)],
            "O": [tensor(53, (-1, 7))],
        },
    ]
    blocks = [{"#": "block_0", "args": [], "ops": ops}]
    return {
        "base_code": {"magic": "pir", "version": 1},
        "program": {"regions": [{"#": "region_0", "blocks": blocks}]},
    }


def test_a_program_of_paddle_3_tells_kinds_and_order(tmp_path: Path) -> None:
    weights: dict[str, Array] = {
        "w": random(9, 7),
        "b": random(7),
        "m": random(7),
        "v": random(7),
        "s": random(7),
        "o": random(7),
    }
    path = write_parameters(tmp_path / "inference.pdiparams", weights)
    (tmp_path / "inference.json").write_text(json.dumps(json_program(weights)))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.limits == []
        found = {tensor.name: (tensor.kind, tensor.axes) for tensor in checkpoint.tensors}
    assert found == {
        "w": (Kind.WEIGHT, (1, 0)),
        "b": (Kind.BIAS, ()),
        "m": (Kind.STATISTIC, ()),
        "v": (Kind.STATISTIC, ()),
        "s": (Kind.NORM, ()),
        "o": (Kind.NORM, ()),
    }


@pytest.mark.parametrize(
    "text", ['{"program": 3}', "{", "[" * 100_000, '{"program": {"regions": [{"blocks": [{}]}]}}']
)
def test_json_that_is_no_program_is_told_and_not_needed(tmp_path: Path, text: str) -> None:
    path = write_parameters(tmp_path / "inference.pdiparams", {"w": random(9, 7)})
    (tmp_path / "inference.json").write_text(text)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.parameters == 63
        assert "the program inference.json cannot be read" in checkpoint.limits[0]


def test_a_program_of_another_model_is_told_and_not_used(tmp_path: Path) -> None:
    path = write_model(tmp_path, {"w": random(9, 7)}, [])
    write_parameters(path, {"w": random(7, 9)})
    with open_checkpoint(path) as checkpoint:
        assert [tensor.name for tensor in checkpoint.tensors] == ["tensor.0"]
        assert "whose shapes are not those of the 1 tensors here" in checkpoint.limits[0]


@pytest.mark.parametrize(
    "dtype", ["float16", "float64", "int8", "uint8", "int16", "int32", "int64"]
)
def test_every_type_gives_its_values(tmp_path: Path, dtype: str) -> None:
    values = np.array([[1, 2, 0], [4, 3, 5]], dtype)
    path = write_parameters(tmp_path / "x", {"a": random(2, 2), "b": values})
    with open_checkpoint(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensors[1].read(), values)


def test_levels_of_sequences_are_passed_over(tmp_path: Path) -> None:
    values = random(2, 3)
    plain = record(values)
    levels = struct.pack("<IQ", 0, 1) + struct.pack("<Q", 16) + bytes(16)
    (tmp_path / "x").write_bytes(record(random(1, 2)) + levels + plain[12:])
    with open_checkpoint(tmp_path / "x") as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensors[1].read(), values)


def test_a_file_cut_short_is_named_and_its_beginning_may_be_read(tmp_path: Path) -> None:
    path = write_parameters(tmp_path / "x", {"a": random(7, 9), "b": random(7, 9)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(TruncatedError, match=r"tensor\.1 ends at byte"):
        open_checkpoint(path)
    with open_checkpoint(path, allow_partial=True) as checkpoint:
        assert checkpoint.parameters == 63
        assert "1 tensors before it are read" in checkpoint.limits[0]


def test_a_shape_of_a_quintillion_elements_is_refused_without_allocating(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(record(random(4), shape=(10**9, 10**9)))
    with pytest.raises(TruncatedError, match="ends at byte 4,000,000,000,000,000,0"):
        open_checkpoint(tmp_path / "x")


@pytest.mark.parametrize(
    ("bad", "error", "problem"),
    [
        (record(random(4), dtype=77), UnsupportedError, "type number 77"),
        (record(random(4), shape=(-1, 4)), MalformedError, "impossible shape"),
        (record(random(4), shape=(1,) * 40), MalformedError, "impossible shape"),
        (b"\1" + record(random(4))[1:], MalformedError, "has the version 1; 0 was"),
        (struct.pack("<IQ", 0, 1 << 40), MalformedError, "levels of sequences"),
        (struct.pack("<IQQ", 0, 1, 1 << 60), TruncatedError, "ends at byte 1,152"),
        (struct.pack("<IQIi", 0, 0, 0, -5), MalformedError, "-5 bytes"),
        (struct.pack("<IQIi", 0, 0, 0, 1) + b"\x08", MalformedError, "not a valid protocol"),
        (struct.pack("<IQIi", 0, 0, 0, 2) + b"\x10\x02", MalformedError, "has no type"),
    ],
)
def test_impossible_tensors_are_refused(
    tmp_path: Path, bad: bytes, error: type[Exception], problem: str
) -> None:
    (tmp_path / "x").write_bytes(record(random(2, 2)) + bad)
    with pytest.raises(error, match=problem):
        open_checkpoint(tmp_path / "x")
