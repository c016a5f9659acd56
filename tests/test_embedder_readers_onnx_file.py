"""ONNX files: stored types, data in other files, hostile files."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from embedder.errors import (
    MalformedError,
    MissingPartError,
    RefusedError,
    TruncatedError,
    UnsupportedError,
)
from embedder.opening import open_checkpoint
from embedder.readers import onnx_file
from embedder.readers.onnx import open_onnx
from embedder.readers.protobuf import encode_varint
from onnx_writer import random, tensor_named
from reader_contract import assembled

STORED = {
    "FLOAT16": np.float16,
    "DOUBLE": np.float64,
    "BFLOAT16": None,
    "FLOAT8E4M3FN": None,
    "FLOAT8E5M2": None,
}


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "listed"])
def test_every_float_type_gives_its_values(tmp_path: Path, name: str, raw: bool) -> None:
    values = np.array([[1.5, -2.0, 0.0], [0.25, 3.0, -0.5]])
    kind = TensorProto.DataType.Value(name)
    stored = values.astype(helper.tensor_dtype_to_np_dtype(kind))
    proto = helper.make_tensor("w", kind, [2, 3], stored.tobytes() if raw else stored, raw=raw)
    graph = helper.make_graph([], "g", [], [], [proto])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with open_checkpoint(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensors[0].read(), values)


@pytest.mark.parametrize("name", ["INT4", "UINT4"])
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "listed"])
def test_four_bit_integers_in_odd_number_give_their_values(
    tmp_path: Path, name: str, raw: bool
) -> None:
    values = np.array([[1, 7, 3], [0, 5, 2], [6, 4, 1]])
    if name == "INT4":
        values = values - 4
    kind = TensorProto.DataType.Value(name)
    packed = numpy_helper.from_array(
        values.astype(helper.tensor_dtype_to_np_dtype(kind)), "w"
    ).raw_data
    proto = (
        helper.make_tensor("w", kind, [3, 3], packed, raw=True)
        if raw
        else helper.make_tensor("w", kind, [3, 3], values)
    )
    graph = helper.make_graph([], "g", [], [], [proto])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with open_checkpoint(path) as checkpoint:
        tensor = checkpoint.tensors[0]
        np.testing.assert_array_equal(tensor.read(), values)
        np.testing.assert_array_equal(assembled(tensor, 1), values)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float16", "int64", "uint64", "float64"])
def test_listed_numbers_left_in_the_file_are_read(tmp_path: Path, dtype: str) -> None:
    values = np.array([[0, 1, 100], [7, 3, 90]] * 200, dtype)
    values[::3] = np.asarray(values[::3].astype(np.int64) * (1 if dtype[0] == "u" else -1), dtype)
    kind = helper.np_dtype_to_tensor_dtype(values.dtype)
    proto = helper.make_tensor("w", kind, values.shape, values)
    assert not proto.raw_data
    graph = helper.make_graph([], "g", [], [], [proto])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with open_onnx(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensors[0].read(), values.astype(np.float64))


def test_a_graph_of_millions_of_empty_nodes_is_refused(tmp_path: Path) -> None:
    # 4 MB that would become 200 MB of objects.
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x0a\x3a" + _length(b"\x0a\x00" * 2_000_001))
    with pytest.raises(UnsupportedError, match="its graph is too large: more than 2,000,000"):
        open_checkpoint(path)


def test_millions_of_empty_attributes_in_small_nodes_are_refused(tmp_path: Path) -> None:
    node = b"\x0a" + _length(b"\x2a\x00" * 900)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x0a\x3a" + _length(node * 10_000))
    with pytest.raises(UnsupportedError, match="its graph is too large"):
        open_checkpoint(path)


def test_sparse_initialisers_are_expanded(tmp_path: Path) -> None:
    dense = np.zeros((4, 6), np.float32)
    dense[1, 2], dense[3, 0], dense[3, 5] = 1.5, -2.0, 3.0
    places = np.flatnonzero(dense)
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(dense.reshape(-1)[places], "w"),
        numpy_helper.from_array(places, "w_places"),
        [4, 6],
    )
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        sparse_initializer=[sparse],
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with open_checkpoint(path) as checkpoint:
        tensor = tensor_named(checkpoint, "w")
        np.testing.assert_array_equal(tensor.canonical(), dense.T)
        np.testing.assert_array_equal(assembled(tensor, 4), dense)


def external(path: Path, location: str, **entries: str) -> Path:
    """Write a model whose one weight lies in another file."""
    proto = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 6])
    proto.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        proto.external_data.add(key=key, value=value)
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [], [], [proto])
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


@pytest.mark.parametrize(
    "location",
    ["../secret", "/etc/passwd", "a/../../secret", "C:\\secret", "..\\secret", "a\0b", ""],
)
def test_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(96))
    with pytest.raises(RefusedError, match="outside the model's folder; nothing was read"):
        open_checkpoint(external(tmp_path / "model" / "m.onnx", location))


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(96))
    path = external(tmp_path / "model" / "m.onnx", "link")
    (path.parent / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(RefusedError, match="'link', which is outside"):
        open_checkpoint(path)


def test_a_hubs_cache_that_links_model_and_data_to_one_folder_is_read(tmp_path: Path) -> None:
    blob = external(tmp_path / "blobs" / "1", "m.data")
    (tmp_path / "blobs" / "2").write_bytes(np.arange(24, dtype=np.float32).tobytes())
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "m.onnx").symlink_to(blob)
    (snapshot / "m.data").symlink_to(tmp_path / "blobs" / "2")
    with open_checkpoint(snapshot / "m.onnx") as checkpoint:
        assert tensor_named(checkpoint, "w").read()[3, 5] == 23


def test_a_pipe_in_place_of_the_data_is_not_waited_for(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", "pipe")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MissingPartError, match="'pipe', which is not there"):
        open_checkpoint(path)


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", "weights.bin")
    with pytest.raises(MissingPartError, match=r"'w' lies in 'weights\.bin', which is not there"):
        open_checkpoint(path)


def test_without_a_data_file_the_rest_is_read_if_allowed(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", "weights.bin")
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer.append(numpy_helper.from_array(random(3, 4), "here"))
    path.write_bytes(model.SerializeToString())
    with open_checkpoint(path, allow_partial=True) as checkpoint:
        assert [tensor.name for tensor in checkpoint.tensors] == ["here"]
        assert checkpoint.limits == [
            "the data file 'weights.bin' is missing: its tensors are left out"
        ]


def test_a_data_file_that_is_too_short_is_named(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", "weights.bin", offset="64")
    (tmp_path / "weights.bin").write_bytes(bytes(100))
    with pytest.raises(TruncatedError, match=r"tensor 'w' ends at byte 160 and the file has 100"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"length": "95"}, "takes 96 bytes and has 95"),
        ({"offset": "-8"}, "the offset '-8'; a number"),
        ({"offset": "9" * 50}, "the offset '9999"),
        ({"length": "x"}, "the length 'x'; a number"),
    ],
)
def test_impossible_places_in_a_data_file_are_refused(
    tmp_path: Path, entries: dict[str, str], problem: str
) -> None:
    path = external(tmp_path / "m.onnx", "weights.bin", **entries)
    (tmp_path / "weights.bin").write_bytes(bytes(200))
    with pytest.raises(MalformedError, match=problem):
        open_checkpoint(path)


def test_external_data_is_streamed_and_never_loaded(tmp_path: Path) -> None:
    # 1 TB that is not on the disk: only a reader that reads what is asked for can open it.
    path = tmp_path / "m.onnx"
    proto = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 19, 1 << 19])
    proto.data_location = TensorProto.EXTERNAL
    proto.external_data.add(key="location", value="huge.bin")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [], [], [proto])
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with (tmp_path / "huge.bin").open("wb") as file:
        file.truncate(1 << 40)
    with open_checkpoint(path) as checkpoint:
        block = next(tensor_named(checkpoint, "w").blocks())
        assert 0 < block.values.size <= 1 << 23
        assert not block.values.any()


def test_a_shape_of_a_quintillion_elements_is_refused_without_allocating(tmp_path: Path) -> None:
    proto = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[10**9, 10**9], raw_data=b"1234"
    )
    graph = helper.make_graph([], "g", [], [], [proto])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(MalformedError, match=r"takes 4,000,000,000,000,000,000 bytes and has 4"):
        open_checkpoint(path)


def test_a_sparse_tensor_too_large_to_expand_is_refused(tmp_path: Path) -> None:
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(random(1), "w"), numpy_helper.from_array(np.array([0]), "p"), [1]
    )
    sparse.dims[:] = [10**9, 10**9]
    graph = helper.make_graph([], "g", [], [], sparse_initializer=[sparse])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(UnsupportedError, match="'w' has the shape"):
        open_checkpoint(path)


def test_a_type_that_is_not_known_is_named(tmp_path: Path) -> None:
    proto = TensorProto(name="w", data_type=TensorProto.INT2, dims=[4], raw_data=b"1")
    graph = helper.make_graph([], "g", [], [], [proto])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(UnsupportedError, match=f"'w' has the type number {TensorProto.INT2}"):
        open_checkpoint(path)


def test_graphs_in_graphs_without_end_are_refused(tmp_path: Path) -> None:
    # Longer than what is lifted, so that the walk over the file goes into every one.
    padding = "x" * onnx_file._ENTERED_BYTES
    inner = helper.make_graph([], padding, [], [])
    graph = inner.SerializeToString()
    for _ in range(200):
        attribute = b"\x32" + _length(graph)  # AttributeProto.g
        node = b"\x2a" + _length(attribute)  # NodeProto.attribute
        graph = b"\x0a" + _length(node)  # GraphProto.node
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x0a\x3a" + _length(graph))
    with pytest.raises(MalformedError, match="more than 100 deep"):
        open_checkpoint(path)


def _length(content: bytes) -> bytes:
    return encode_varint(len(content)) + content
