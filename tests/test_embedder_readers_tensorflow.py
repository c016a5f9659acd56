"""TensorFlow variables. TensorFlow is too large to test with, so the writer here follows the
format's description. Its records have the fields of a real SavedModel's, in the same order, but for
the checksums; the reader itself was checked on that model against its ONNX export, bit for bit."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from embedder.checkpoint import Kind
from embedder.errors import (
    CheckpointError,
    MalformedError,
    MissingPartError,
    TruncatedError,
    UnsupportedError,
)
from embedder.opening import open_checkpoint
from embedder.readers.protobuf import encode_varint
from embedder.readers.sstable import MAGIC, unpack_snappy
from reader_contract import WEIGHTS, ReaderContract, Weights

SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
TYPES = {"float32": 1, "int64": 9, "float16": 19}


def field(number: int, value: int | bytes) -> bytes:
    """Return a field of a protocol-buffer message."""
    if isinstance(value, int):
        return encode_varint(number << 3) + encode_varint(value % (1 << 64))
    return encode_varint(number << 3 | 2) + encode_varint(len(value)) + value


def block(entries: Mapping[bytes, bytes], compression: int = 0) -> bytes:
    """Return a block of a table whose keys leave out what they share with the key before."""
    out, last = b"", b""
    for key, value in entries.items():
        shared = next(
            (
                place
                for place in range(len(last))
                if last[place : place + 1] != key[place : place + 1]
            ),
            len(last),
        )
        for number in (shared, len(key) - shared, len(value)):
            out += encode_varint(number)
        out += key[shared:] + value
        last = key
    out += struct.pack("<II", 0, 1)
    if compression == 1:
        # Literals only, which every decoder of snappy must take.
        runs = [out[start : start + 60] for start in range(0, len(out), 60)]
        packed = b"".join(bytes([len(run) - 1 << 2]) + run for run in runs)
        out = encode_varint(len(out)) + packed
    return out + bytes([compression]) + bytes(4)


def write_table(path: Path, entries: Mapping[bytes, bytes], *, compression: int = 0) -> None:
    """Write a sorted table of up to three entries a block."""
    out, places = b"", {}
    ordered = sorted(entries.items())
    for start in range(0, len(ordered), 3):
        part = dict(ordered[start : start + 3])
        raw = block(part, compression)
        places[max(part)] = encode_varint(len(out)) + encode_varint(len(raw) - 5)
        out += raw
    handles = b""
    for raw in (block({}), block(places)):
        handles += encode_varint(len(out)) + encode_varint(len(raw) - 5)
        out += raw
    path.write_bytes(out + handles.ljust(40, b"\0") + MAGIC)


def entry(shape: tuple[int, ...], *, kind: int, shard: int = 0, offset: int, size: int) -> bytes:
    """Return the record of one tensor."""
    lengths = b"".join(field(2, field(1, length)) for length in shape)
    record = field(1, kind) + field(2, lengths)
    for number, value in ((3, shard), (4, offset), (5, size)):
        record += field(number, value) if value else b""
    return record


def write_bundle(
    prefix: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    shards: int = 1,
    graph: bytes = b"",
    extra: Mapping[bytes, bytes] | None = None,
    compression: int = 0,
) -> Path:
    """Write variables as TensorFlow does and return the index."""
    records = {b"": field(1, shards) + field(3, field(1, 1))}
    contents = [b""] * shards
    for number, (name, values) in enumerate(sorted(tensors.items())):
        shard = number % shards
        place = len(contents[shard])
        kind = TYPES[str(values.dtype)]
        records[name.encode()] = entry(
            values.shape, kind=kind, shard=shard, offset=place, size=values.nbytes
        )
        contents[shard] += values.tobytes()
    if graph:
        text = encode_varint(len(graph)) + bytes(4) + graph
        place = len(contents[0])
        records[b"_CHECKPOINTABLE_OBJECT_GRAPH"] = entry((), kind=7, offset=place, size=len(text))
        contents[0] += text
    for number, content in enumerate(contents):
        prefix.with_name(f"{prefix.name}.data-{number:05d}-of-{shards:05d}").write_bytes(content)
    listing = prefix.with_name(f"{prefix.name}.index")
    write_table(listing, {**records, **(extra or {})}, compression=compression)
    return listing


def as_keras_stores(weights: Weights) -> dict[str, np.ndarray]:
    return {
        "emb/embeddings" + SUFFIX: weights["embedding"],
        "layer_with_weights-0/kernel" + SUFFIX: weights["conv"].transpose(2, 3, 1, 0),
        "layer_with_weights-1/kernel" + SUFFIX: weights["dense"].T,
        "layer_with_weights-1/bias" + SUFFIX: weights["bias"],
    }


class TestVariables(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        return write_bundle(folder / "model.ckpt", as_keras_stores(weights))


class TestVariablesInShardsAndCompressedBlocks(ReaderContract):
    damage_rounds = 30

    def write(self, folder: Path, weights: Weights) -> Path:
        return write_bundle(
            folder / "model.ckpt", as_keras_stores(weights), shards=3, compression=1
        )


class TestSavedModel(ReaderContract):
    damage_rounds = 30

    def write(self, folder: Path, weights: Weights) -> Path:
        model = folder / "saved"
        (model / "variables").mkdir(parents=True)
        (model / "saved_model.pb").write_bytes(saved_model([("half", "Lambda")]))
        write_bundle(model / "variables" / "variables", as_keras_stores(weights))
        return model

    def damaged_file(self, opened: Path) -> Path:
        return opened / "variables" / "variables.index"


def saved_model(layers: list[tuple[str, str]]) -> bytes:
    """Return `saved_model.pb` with a version, a tag and layers."""
    meta = field(4, b"serve") + field(5, b"2.4.1")
    objects = b"".join(
        field(1, field(4, field(3, json.dumps({"name": name, "class_name": kind}).encode())))
        for name, kind in layers
    )
    return field(1, 1) + field(2, field(1, meta) + field(7, objects))


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def test_a_saved_model_says_its_version_and_names_lambda_layers(tmp_path: Path) -> None:
    with open_checkpoint(TestSavedModel().write(tmp_path, WEIGHTS)) as model:
        assert model.declared == {"tensorflow_version": "2.4.1", "tags": ["serve"]}
        assert model.limits == ["holds a Lambda layer whose code was not run: 'half'"]
        assert [file.name for file in model.files] == [
            "saved_model.pb",
            "variables.index",
            "variables.data-00000-of-00001",
        ]


def test_optimiser_slots_and_metrics_are_no_parameters(tmp_path: Path) -> None:
    tensors = {
        "net/kernel" + SUFFIX: ones(3, 4),
        "net/kernel/.OPTIMIZER_SLOT/optimizer/m" + SUFFIX: ones(3, 4),
        "optimizer/learning_rate" + SUFFIX: ones(),
        "keras_api/metrics/0/total" + SUFFIX: ones(),
        "save_counter" + SUFFIX: np.ones((), np.int64),
    }
    with open_checkpoint(write_bundle(tmp_path / "m", tensors)) as model:
        assert model.parameters == 12
        kinds = {tensor.kind for tensor in model.tensors if tensor.name != "net/kernel"}
        assert kinds == {Kind.OPTIMISER}


def test_slots_of_tensorflow_1_lie_below_their_variables(tmp_path: Path) -> None:
    tensors = {
        "bert/dense/kernel": ones(3, 4),
        "bert/dense/kernel/Adam": ones(3, 4),
        "bert/dense/kernel/adam_v": ones(3, 4),
        "global_step": np.ones((), np.int64),
        "bert/word_embeddings": ones(9, 4),
    }
    with open_checkpoint(write_bundle(tmp_path / "m", tensors)) as model:
        assert model.parameters == 48
        shapes = {tensor.name: tensor.canonical_shape for tensor in model.tensors}
        assert shapes["bert/dense/kernel"] == (4, 3)
        assert shapes["bert/word_embeddings"] == (9, 4)


def test_the_object_graph_tells_names_and_slots(tmp_path: Path) -> None:
    def node(key: str, name: str, *, slot: int | None = None) -> bytes:
        texts = field(1, b"VARIABLE_VALUE") + field(2, name.encode()) + field(3, key.encode())
        slots = b"" if slot is None else field(3, field(1, 0) + field(2, b"m") + field(3, slot))
        return field(1, field(2, texts) + slots)

    graph = node("v/0" + SUFFIX, "depthwise_conv2d/depthwise_kernel", slot=1)
    graph += node("v/1" + SUFFIX, "anything")
    tensors = {"v/0" + SUFFIX: ones(3, 5, 4, 1), "v/1" + SUFFIX: ones(3, 5, 4, 1)}
    with open_checkpoint(write_bundle(tmp_path / "m", tensors, graph=graph)) as model:
        first, second = model.tensors
        assert first.canonical_shape == (4, 1, 3, 5)
        assert second.kind is Kind.OPTIMISER
        assert model.limits == []


def test_the_class_of_a_layer_comes_from_the_saved_model(tmp_path: Path) -> None:
    (tmp_path / "variables").mkdir()
    (tmp_path / "saved_model.pb").write_bytes(saved_model([("up", "Conv2DTranspose")]))
    write_bundle(tmp_path / "variables" / "variables", {"up/kernel" + SUFFIX: ones(3, 5, 4, 6)})
    with open_checkpoint(tmp_path) as model:
        assert model.tensors[0].canonical_shape == (4, 6, 3, 5)


def test_a_missing_data_file_is_named_and_the_rest_read_on_request(tmp_path: Path) -> None:
    listing = write_bundle(tmp_path / "m", {"a": ones(3, 4), "b": ones(2, 2)}, shards=2)
    (tmp_path / "m.data-00000-of-00002").unlink()
    with pytest.raises(MissingPartError, match=r"m\.data-00000-of-00002 is missing"):
        open_checkpoint(listing)
    with open_checkpoint(listing, allow_partial=True) as model:
        assert [tensor.name for tensor in model.tensors] == ["b"]
        assert "m.data-00000-of-00002" in model.limits[0]


def test_a_saved_model_without_variables_says_so(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").write_bytes(saved_model([]))
    with pytest.raises(MissingPartError, match=r"no variables/variables\.index"):
        open_checkpoint(tmp_path)


def test_slices_and_texts_are_named(tmp_path: Path) -> None:
    extra = {
        b"parted": entry((4,), kind=1, offset=0, size=0) + field(7, field(1, b"")),
        b"words": entry((2,), kind=7, offset=0, size=8),
        b"\0parted": entry((2,), kind=1, offset=0, size=8),
    }
    with open_checkpoint(write_bundle(tmp_path / "m", {"w": ones(3, 4)}, extra=extra)) as model:
        assert [tensor.name for tensor in model.tensors] == ["w"]
        assert model.limits == [
            "'parted' is stored in slices, which we do not join",
            "'words' holds texts",
        ]


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        (
            entry((10**9, 10**9), kind=1, offset=0, size=48),
            MalformedError,
            "takes 4,000,000,000,000,000,000 bytes and has 48",
        ),
        (entry((3, 4), kind=1, offset=1 << 40, size=48), TruncatedError, "ends at byte"),
        (entry((3, 4), kind=1, offset=-8, size=48), TruncatedError, "ends at byte"),
        (entry((-3, -4), kind=1, offset=0, size=48), MalformedError, "impossible shape"),
        (entry((3, 4), kind=1, shard=7, offset=0, size=48), MalformedError, "data file 7 of 1"),
        (entry((3, 4), kind=1, shard=-1, offset=0, size=48), MalformedError, "data file -1"),
    ],
)
def test_records_that_cannot_be_are_refused(
    tmp_path: Path, record: bytes, error: type[CheckpointError], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_checkpoint(write_bundle(tmp_path / "m", {"w": ones(3, 4)}, extra={b"x": record}))


def test_big_endian_variables_are_named_unsupported(tmp_path: Path) -> None:
    extra = {b"": field(1, 1) + field(2, 1)}
    with pytest.raises(UnsupportedError, match="big-endian"):
        open_checkpoint(write_bundle(tmp_path / "m", {"w": ones(3, 4)}, extra=extra))


def test_a_block_of_snappy_that_promises_too_much_is_refused() -> None:
    with pytest.raises(MalformedError, match="promise"):
        unpack_snappy(encode_varint(1 << 40) + b"\0a", "x")


def test_snappy_copies_are_followed() -> None:
    literal = bytes([9 << 2]) + b"0123456789"
    near, far = bytes([0b000_100_01, 10]), bytes([(5 - 1) << 2 | 2]) + struct.pack("<H", 3)
    farther = bytes([(2 - 1) << 2 | 3]) + struct.pack("<I", 12)
    text = b"0123456789" + b"01234567" + b"56756"
    text += text[-12:][:2]
    packed = encode_varint(len(text)) + literal + near + far + farther
    assert unpack_snappy(packed, "x") == text
