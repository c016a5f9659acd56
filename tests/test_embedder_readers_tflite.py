"""TFLite: the contract, kinds and order of axes, quantised and sparse tensors, hostile files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tflite
from numpy.typing import NDArray

from embedder.checkpoint import Checkpoint, Kind, Tensor
from embedder.errors import MalformedError, TruncatedError, UnsupportedError
from embedder.opening import open_checkpoint
from reader_contract import ReaderContract, Weights, assembled
from tflite_writer import Given, Graph, Sparsity, Step, Writer, write_tflite

Array = NDArray[np.generic]
RNG = np.random.default_rng(14)


def random(*shape: int) -> NDArray[np.float32]:
    return RNG.normal(size=shape).astype(np.float32)


def tensor_named(checkpoint: Checkpoint, name: str) -> Tensor:
    return next(tensor for tensor in checkpoint.tensors if tensor.name == name)


def one_layer(path: Path, op: str, weight: Given, *, place: int = 1, **more: Any) -> Path:
    """Write a model of one operator whose weight `w` is the input at a place."""
    inputs = [*["x"] * place, "w"]
    tensors = {"x": Given((1, 4)), "w": weight, "y": Given((1, 4))}
    return write_tflite(path, tensors, [Step(op, inputs, ["y"], **more)])


class TestTflite(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        conv = np.ascontiguousarray(weights["conv"].transpose(0, 2, 3, 1))  # out, space, in
        tensors = {
            "x": Given((1, 9)),
            "ids": Given((1,), type="int32"),
            "y": Given((1, 7)),
            "embedding": Given.of(weights["embedding"]),
            "conv": Given.of(conv),
            "dense": Given.of(weights["dense"]),
            "bias": Given.of(weights["bias"]),
        }
        steps = [
            Step("GATHER", ["embedding", "ids"], ["y"]),
            Step("CONV_2D", ["x", "conv"], ["y"]),
            Step("FULLY_CONNECTED", ["x", "dense", "bias"], ["y"]),
        ]
        return write_tflite(folder / "model.tflite", tensors, steps)


class TestTfliteWithDataBehindTheFlatbuffer(ReaderContract):
    damage_rounds = 30

    def write(self, folder: Path, weights: Weights) -> Path:
        conv = np.ascontiguousarray(weights["conv"].transpose(0, 2, 3, 1))
        tensors = {
            "x": Given((1, 9)),
            "y": Given((1, 7)),
            "embedding": Given.of(weights["embedding"], behind=True),
            "conv": Given.of(conv, behind=True),
            "dense": Given.of(weights["dense"], behind=True),
            "bias": Given.of(weights["bias"], behind=True),
        }
        steps = [
            Step("EMBEDDING_LOOKUP", ["x", "embedding"], ["y"]),
            Step("CONV_2D", ["x", "conv"], ["y"]),
            Step("FULLY_CONNECTED", ["x", "dense", "bias"], ["y"]),
        ]
        return write_tflite(folder / "model.tflite", tensors, steps)


@pytest.mark.parametrize(
    ("op", "place", "order"),
    [
        ("CONV_2D", 1, (0, 2, 3, 1)),
        ("TRANSPOSE_CONV", 1, (0, 2, 3, 1)),
        ("Convolution2DTransposeBias", 1, (0, 2, 3, 1)),
        ("DEPTHWISE_CONV_2D", 1, (1, 2, 3, 0)),
        ("CONV_3D", 1, (2, 3, 4, 1, 0)),
        ("CONV_3D_TRANSPOSE", 1, (2, 3, 4, 0, 1)),
        ("FULLY_CONNECTED", 1, (0, 1)),
        ("BATCH_MATMUL", 1, (0, 2, 1)),
        ("BATCH_MATMUL", 0, (0, 1, 2)),
    ],
)
def test_a_kernel_comes_back_as_out_times_in_times_space(
    tmp_path: Path, op: str, place: int, order: Sequence[int]
) -> None:
    weight = random(*range(5, 5 + len(order)))
    if op == "DEPTHWISE_CONV_2D":
        weight = weight[:, :1]
    stored = np.ascontiguousarray(weight.transpose(order))
    with open_checkpoint(one_layer(tmp_path / "m", op, Given.of(stored), place=place)) as opened:
        tensor = tensor_named(opened, "w")
        assert tensor.kind is Kind.WEIGHT
        np.testing.assert_array_equal(tensor.canonical(), weight)


def adjoined(builder: Any) -> tuple[int, int]:
    tflite.BatchMatMulOptionsStart(builder)
    tflite.BatchMatMulOptionsAddAdjY(builder, True)
    return tflite.BuiltinOptions.BatchMatMulOptions, tflite.BatchMatMulOptionsEnd(builder)


def test_a_right_operand_that_is_turned_at_run_time_is_out_times_in(tmp_path: Path) -> None:
    weight = random(7, 9)
    path = one_layer(tmp_path / "m", "BATCH_MATMUL", Given.of(weight), options=adjoined)
    with open_checkpoint(path) as checkpoint:
        np.testing.assert_array_equal(tensor_named(checkpoint, "w").canonical(), weight)


def test_half_precision_is_followed_through_dequantize(tmp_path: Path) -> None:
    weight = random(5, 4, 3, 2).astype(np.float16)
    tensors = {
        "x": Given((1, 4)),
        "w": Given.of(np.ascontiguousarray(weight.transpose(0, 2, 3, 1))),
        "wide": Given((5, 3, 2, 4)),
        "y": Given((1, 5)),
    }
    steps = [Step("DEQUANTIZE", ["w"], ["wide"]), Step("CONV_2D", ["x", "wide"], ["y"])]
    with open_checkpoint(write_tflite(tmp_path / "m", tensors, steps)) as checkpoint:
        tensor = tensor_named(checkpoint, "w")
        assert (tensor.encoding.name, tensor.encoding.quantised) == ("F16", False)
        np.testing.assert_array_equal(tensor.canonical(), weight.astype(np.float32))


def test_transposes_and_reshapes_before_the_layer_are_undone(tmp_path: Path) -> None:
    weight = random(7, 9)
    tensors = {
        "x": Given((1, 9)),
        "w": Given.of(weight.T.copy().reshape(1, 9, 7)),
        "shape": Given.of(np.array([9, 7], np.int32)),
        "flat": Given((9, 7)),
        "order": Given.of(np.array([1, 0], np.int32)),
        "turned": Given((7, 9)),
        "y": Given((1, 7)),
    }
    steps = [
        Step("RESHAPE", ["w", "shape"], ["flat"]),
        Step("TRANSPOSE", ["flat", "order"], ["turned"]),
        Step("FULLY_CONNECTED", ["x", "turned"], ["y"]),
    ]
    with open_checkpoint(write_tflite(tmp_path / "m", tensors, steps)) as checkpoint:
        found = tensor_named(checkpoint, "w").canonical()
        np.testing.assert_array_equal(found.reshape(7, 9), weight)


def test_kinds_come_from_the_operators_and_not_from_names(tmp_path: Path) -> None:
    tensors = {
        "x": Given((1, 9)),
        "moving_mean": Given.of(random(7, 9)),  # really a weight
        "kernel": Given.of(random(7)),
        "bias": Given.of(random(1, 1, 7)),
        "gain": Given.of(random(7)),
        "half": Given.of(np.array(0.5, np.float32)),
        "positions": Given.of(random(5, 7)),
        "axes": Given.of(np.array([1], np.int32)),
        "words": Given((2,), b"\1\0\0\0abc", "string"),
        "y": Given((1, 7)),
    }
    steps = [
        Step("FULLY_CONNECTED", ["x", "moving_mean", "kernel"], ["y"]),
        Step("PRELU", ["y", "bias"], ["y"]),
        Step("MUL", ["y", "gain"], ["y"]),
        Step("MUL", ["y", "half"], ["y"]),
        Step("ADD", ["y", "positions"], ["y"]),
        Step("MEAN", ["y", "axes"], ["y"]),
    ]
    with open_checkpoint(write_tflite(tmp_path / "m", tensors, steps)) as checkpoint:
        kinds = {tensor.name: tensor.kind for tensor in checkpoint.tensors}
    assert kinds == {
        "moving_mean": Kind.WEIGHT,
        "kernel": Kind.BIAS,
        "bias": Kind.NORM,
        "gain": Kind.NORM,
        "half": Kind.BUFFER,
        "positions": Kind.WEIGHT,
        "axes": Kind.BUFFER,
    }


def test_the_parts_of_an_lstm_are_told_apart(tmp_path: Path) -> None:
    tensors = {
        "x": Given((1, 4)),
        "y": Given((1, 4)),
        **{f"w{place}": Given.of(random(5, 4)) for place in range(1, 9)},
        **{f"b{place}": Given.of(random(5)) for place in range(12, 16)},
        **{f"n{place}": Given.of(random(5)) for place in range(20, 24)},
    }
    names = ["x"] + [
        next((name for name in (f"w{at}", f"b{at}", f"n{at}") if name in tensors), "")
        for at in range(1, 24)
    ]
    steps = [Step("UNIDIRECTIONAL_SEQUENCE_LSTM", names, ["y"])]
    with open_checkpoint(write_tflite(tmp_path / "m", tensors, steps)) as checkpoint:
        kinds = {tensor.name[0]: tensor.kind for tensor in checkpoint.tensors}
    assert kinds == {"w": Kind.WEIGHT, "b": Kind.BIAS, "n": Kind.NORM}


def branches(builder: Any) -> tuple[int, int]:
    tflite.IfOptionsStart(builder)
    tflite.IfOptionsAddThenSubgraphIndex(builder, 1)
    tflite.IfOptionsAddElseSubgraphIndex(builder, 1)
    return tflite.BuiltinOptions.IfOptions, tflite.IfOptionsEnd(builder)


def test_weights_that_are_handed_to_a_branch_are_followed(tmp_path: Path) -> None:
    weight = random(5, 4, 3, 2)
    stored = np.ascontiguousarray(weight.transpose(0, 2, 3, 1))
    tensors = {
        "flag": Given((), type="int8"),
        "x": Given((1, 4)),
        "w": Given.of(stored),
        "y": Given((1, 4)),
    }
    inner = Graph(
        {"a": Given((1, 4)), "b": Given(stored.shape), "c": Given((1, 4))},
        [Step("CONV_2D", ["a", "b"], ["c"])],
        ["a", "b"],
    )
    steps = [Step("IF", ["flag", "x", "w"], ["y"], branches)]
    with open_checkpoint(write_tflite(tmp_path / "m", tensors, steps, inner)) as checkpoint:
        np.testing.assert_array_equal(tensor_named(checkpoint, "w").canonical(), weight)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("axis", [None, 0, 3])
def test_quantised_kernels_have_their_scales_applied(
    tmp_path: Path, dtype: str, axis: int | None
) -> None:
    stored = RNG.integers(0, 100, (5, 3, 2, 4)).astype(dtype)
    count = 1 if axis is None else stored.shape[axis]
    scale = RNG.uniform(0.01, 0.1, count).astype(np.float32)
    zero = RNG.integers(0, 9, count)
    given = Given.of(stored, scale=scale.tolist(), zero=zero.tolist(), axis=axis or 0)
    spread = [1, 1, 1, 1]
    spread[axis or 0] = count
    expected = (stored - zero.reshape(spread)).astype(np.float32) * scale.reshape(spread)
    with open_checkpoint(one_layer(tmp_path / "m", "CONV_2D", given)) as checkpoint:
        tensor = tensor_named(checkpoint, "w")
        assert tensor.encoding.quantised
        np.testing.assert_array_equal(tensor.read(), expected)
        np.testing.assert_array_equal(assembled(tensor, 5), expected)
        np.testing.assert_array_equal(tensor.canonical(), expected.transpose(0, 3, 1, 2))


def test_four_bit_kernels_in_odd_number(tmp_path: Path) -> None:
    values = RNG.integers(-8, 8, (3, 5))
    flat = np.append(values.reshape(-1), 0) & 15
    packed = (flat[0::2] | flat[1::2] << 4).astype(np.uint8)
    scale = np.array([0.5, 0.25, 2.0], np.float32)
    given = Given((3, 5), packed.tobytes(), "int4", scale.tolist(), [0, 0, 0])
    expected = values * scale[:, None]
    with open_checkpoint(one_layer(tmp_path / "m", "FULLY_CONNECTED", given)) as checkpoint:
        tensor = tensor_named(checkpoint, "w")
        np.testing.assert_array_equal(tensor.read(), expected)
        np.testing.assert_array_equal(assembled(tensor, 1), expected)


def test_offsets_of_quantised_layers_are_offsets_with_their_own_scale(tmp_path: Path) -> None:
    tensors = {
        "x": Given((1, 4)),
        "w": Given.of(np.ones((5, 4), np.int8), scale=[0.5], zero=[0]),
        "b": Given.of(np.arange(5, dtype=np.int32), scale=[0.25], zero=[0]),
        "y": Given((1, 5)),
    }
    steps = [Step("FULLY_CONNECTED", ["x", "w", "b"], ["y"])]
    with open_checkpoint(write_tflite(tmp_path / "m", tensors, steps)) as checkpoint:
        tensor = tensor_named(checkpoint, "b")
        assert tensor.kind is Kind.BIAS
        np.testing.assert_array_equal(tensor.read(), np.arange(5) / 4)
        assert checkpoint.parameters == 25


def compress(dense: Array, axis: int) -> tuple[Sparsity, Array]:
    """Return how a matrix is stored with one axis sparse, the other dense and walked first."""
    turned = dense if axis == 1 else dense.T
    segments = np.append(0, np.cumsum((turned != 0).sum(1)))
    indices = np.nonzero(turned)[1]
    levels: list[int | tuple[Array, Array]] = [turned.shape[0], (segments, indices)]
    return Sparsity((1 - axis, axis), levels), turned[turned != 0]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("vector", ["Int32Vector", "Uint16Vector", "Uint8Vector"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_sparse_matrix_is_expanded(tmp_path: Path, axis: int, vector: str, dtype: str) -> None:
    dense = (RNG.normal(size=(7, 9)) * (RNG.random((7, 9)) < 0.3)).astype(dtype)
    sparsity, stored = compress(dense, axis)
    sparsity.vector = vector
    tensors = {
        "x": Given((1, 9)),
        "w": Given((7, 9), stored, dtype, sparsity=sparsity),
        "dense": Given((7, 9)),
        "y": Given((1, 7)),
    }
    steps = [Step("DENSIFY", ["w"], ["dense"]), Step("FULLY_CONNECTED", ["x", "dense"], ["y"])]
    with open_checkpoint(write_tflite(tmp_path / "m", tensors, steps)) as checkpoint:
        tensor = tensor_named(checkpoint, "w")
        assert tensor.kind is Kind.WEIGHT
        np.testing.assert_array_equal(tensor.read(), dense.astype(np.float32))


def test_a_matrix_that_is_sparse_in_blocks_is_expanded(tmp_path: Path) -> None:
    # Blocks of 2 × 3 in a 6 × 6 matrix; two rows of blocks hold something.
    blocks = {(0, 1): random(2, 3), (2, 0): random(2, 3), (2, 1): random(2, 3)}
    dense = np.zeros((6, 6), np.float32)
    for (row, column), values in blocks.items():
        dense[row * 2 : row * 2 + 2, column * 3 : column * 3 + 3] = values
    sparsity = Sparsity(
        order=(0, 1, 2, 3),
        blocks=(0, 1),
        levels=[3, (np.array([0, 1, 1, 3]), np.array([1, 0, 1])), 2, 3],
    )
    stored = np.concatenate([values.reshape(-1) for values in blocks.values()])
    given = Given((6, 6), stored, sparsity=sparsity)
    with open_checkpoint(one_layer(tmp_path / "m", "FULLY_CONNECTED", given)) as checkpoint:
        np.testing.assert_array_equal(tensor_named(checkpoint, "w").read(), dense)


@pytest.mark.parametrize(
    ("sparsity", "shape", "problem"),
    [
        (Sparsity((0, 1), [2, 2]), (2, 3), "visits 4 places and 3 values"),
        (Sparsity((0, 0), [2, 3]), (2, 3), r"order of the walk \[0, 0\] does not fit"),
        (Sparsity((0, 1), [2]), (2, 3), "does not fit 2 axes"),
        (Sparsity((0, 1), [2, 1 << 26]), (2, 3), "leads out of the tensor"),
        (Sparsity((0, 1), [1 << 30, 3]), (2, 3), "level of 1,073,741,824"),
        (Sparsity((0, 1, 2), [2, 3, 0], (0,)), (2, 3), "a block of 0"),
        (Sparsity((0, 1, 2), [2, 3, 1], (5,)), (2, 3), r"blocks \[5\] do not fit"),
        (
            Sparsity((0, 1), [2, (np.array([0, 1, 3]), np.array([0, 1, 9]))]),
            (2, 3),
            "leads out of the tensor",
        ),
        (
            Sparsity((0, 1), [2, (np.array([0, 3, 1]), np.array([0, 1, 2]))]),
            (2, 3),
            "do not fit the level before",
        ),
        (
            Sparsity((0, 1), [2, (np.array([0, 1, 2]), np.array([0, 1, 2]))]),
            (2, 3),
            "do not fit its indices",
        ),
        (
            Sparsity((1, 0), [3, (np.array([0, 1, 2, 3]), np.array([0, 1, 4]))]),
            (2, 3),
            "lies outside the tensor",
        ),
    ],
)
def test_sparse_tensors_whose_parts_do_not_fit_are_refused(
    tmp_path: Path, sparsity: Sparsity, shape: tuple[int, ...], problem: str
) -> None:
    given = Given(shape, random(3), sparsity=sparsity)
    with pytest.raises(MalformedError, match=problem):
        open_checkpoint(one_layer(tmp_path / "m", "FULLY_CONNECTED", given))


def test_a_sparse_tensor_too_large_to_expand_is_refused(tmp_path: Path) -> None:
    given = Given((1 << 20, 1 << 20), random(3), sparsity=Sparsity((0, 1), [1, 3]))
    with pytest.raises(UnsupportedError, match="at most 134,217,728 values of all sparse"):
        open_checkpoint(one_layer(tmp_path / "m", "FULLY_CONNECTED", given))


def test_what_the_file_says_of_itself_is_declared(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "m", "FULLY_CONNECTED", Given.of(random(5, 4)))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.declared == {"version": 3, "description": "made for a test"}


def test_a_shape_of_a_quintillion_elements_is_refused_without_allocating(tmp_path: Path) -> None:
    given = Given((10**9, 10**9), random(4))
    with pytest.raises(MalformedError, match=r"takes 4,000,000,000,000,000,000 bytes and has 16"):
        open_checkpoint(one_layer(tmp_path / "m", "FULLY_CONNECTED", given))


def test_scales_that_do_not_fit_the_axis_are_refused(tmp_path: Path) -> None:
    given = Given.of(np.ones((5, 4), np.int8), scale=[0.5] * 3, zero=[0] * 3)
    with pytest.raises(MalformedError, match="has 3 scales and 3 zero points along axis 0"):
        open_checkpoint(one_layer(tmp_path / "m", "FULLY_CONNECTED", given))


def test_constants_behind_the_end_are_named_and_may_be_left_out(tmp_path: Path) -> None:
    tensors = {
        "x": Given((1, 9)),
        "a": Given.of(random(7, 9)),
        "b": Given.of(random(8, 9), behind=True),
        "y": Given((1, 7)),
    }
    steps = [Step("FULLY_CONNECTED", ["x", name], ["y"]) for name in ("a", "b")]
    path = write_tflite(tmp_path / "m", tensors, steps)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(TruncatedError, match="buffer 2 ends at byte"):
        open_checkpoint(path)
    with open_checkpoint(path, allow_partial=True) as checkpoint:
        assert [tensor.name for tensor in checkpoint.tensors] == ["a"]
        assert checkpoint.limits[0].startswith("a constant is left out: TRUNCATED: buffer 2")


def test_a_type_that_is_not_known_is_named(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "m", "FULLY_CONNECTED", Given.of(np.ones((5, 4), np.int16)))
    content = bytearray(path.read_bytes())
    record = tflite.Model.GetRootAsModel(content, 0).Subgraphs(0).Tensors(1)._tab
    content[record.Pos + record.Offset(6)] = 77
    path.write_bytes(content)
    with pytest.raises(UnsupportedError, match="'w' has the type number 77"):
        open_checkpoint(path)


def test_offsets_that_lead_in_a_circle_end(tmp_path: Path) -> None:
    # Every reference in the file leads to the same place.
    path = one_layer(tmp_path / "m", "FULLY_CONNECTED", Given.of(random(5, 4)))
    content = path.read_bytes()
    for target in range(8, len(content) - 4, 4):
        looped = bytearray(content)
        for place in range(8, len(content) - 4, 4):
            if int.from_bytes(looped[place : place + 4], "little") < len(content) - place:
                looped[place : place + 4] = max(target - place, 4).to_bytes(4, "little")
        path.write_bytes(looped)
        TestTflite().read_or_refuse(path)


def test_a_list_that_is_referred_to_again_and_again_is_refused(tmp_path: Path) -> None:
    # 2,000 subgraphs that are all the same one, in a file of 9 kB.
    many = Writer([Graph({"w": Given.of(random(2, 2))}, [])], repeated=2000)
    with pytest.raises(MalformedError, match="its lists promise more entries than its"):
        open_checkpoint(many.write(tmp_path / "m"))
