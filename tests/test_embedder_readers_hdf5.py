"""HDF5 as Keras writes it, `.keras` archives, and what a hostile file may try."""

import json
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest

from embedder.checkpoint import Checkpoint, Kind, Tensor
from embedder.errors import CheckpointError, MalformedError, MissingExtraError, RefusedError
from embedder.opening import open_checkpoint
from embedder.readers import hdf5_process, zipped
from reader_contract import WEIGHTS, ReaderContract, Weights

CONFIG = {
    "class_name": "Sequential",
    "config": {
        "name": "net",
        "layers": [
            {"class_name": "Conv2D", "config": {"name": "stem"}},
            {"class_name": "Lambda", "config": {"name": "half", "function": ["payload"]}},
            {"class_name": "Dense", "config": {"name": "head"}},
        ],
    },
}


def as_keras_stores(weights: Weights) -> dict[str, np.ndarray]:
    """Return the arrays as layers hold them: space × in × out, in × out."""
    return {
        "emb/emb/embeddings:0": weights["embedding"],
        "stem/stem/kernel:0": weights["conv"].transpose(2, 3, 1, 0),
        "head/head/kernel:0": weights["dense"].T,
        "head/head/bias:0": weights["bias"],
    }


class TestKerasWeights(ReaderContract):
    damage_rounds = 20
    cuts = 10

    def write(self, folder: Path, weights: Weights) -> Path:
        path = folder / "weights.h5"
        with h5py.File(path, "w") as file:
            file.attrs["keras_version"] = b"2.1.5"
            file.attrs["backend"] = b"tensorflow"
            for name, values in as_keras_stores(weights).items():
                file[name] = values
        return path


class TestCompressedDataSets(ReaderContract):
    damage_rounds = 15
    cuts = 5

    def write(self, folder: Path, weights: Weights) -> Path:
        path = folder / "weights.h5"
        with h5py.File(path, "w") as file:
            for name, values in as_keras_stores(weights).items():
                file.create_dataset(name, data=values, compression="gzip", shuffle=True)
        return path


class TestKerasArchive(ReaderContract):
    damage_rounds = 15
    cuts = 8

    def write(self, folder: Path, weights: Weights) -> Path:
        return write_keras(folder, weights, zipfile.ZIP_STORED)


class TestCompressedKerasArchive(ReaderContract):
    damage_rounds = 6
    cuts = 3

    def write(self, folder: Path, weights: Weights) -> Path:
        return write_keras(folder, weights, zipfile.ZIP_DEFLATED)


def write_keras(folder: Path, weights: Weights, compression: int = zipfile.ZIP_STORED) -> Path:
    """Write a `.keras` archive, whose variables have numbers for names."""
    inside, path = folder / "inside.h5", folder / "model.keras"
    with h5py.File(inside, "w") as file:
        for number, (layer, names) in enumerate(
            {"embedding": ["embedding"], "conv2d_1": ["conv"], "dense": ["dense", "bias"]}.items()
        ):
            stored = [*as_keras_stores(weights).values()][number : number + len(names)]
            group = file.create_group(f"layers/{layer}/vars")
            for place, values in enumerate(stored):
                group[str(place)] = values
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.11.0"}))
        archive.writestr("config.json", json.dumps(CONFIG))
        archive.write(inside, "model.weights.h5")
    inside.unlink()
    return path


def opened(path: Path, fill: Callable[[h5py.File], object]) -> Checkpoint:
    """Write an HDF5 file and open it."""
    with h5py.File(path, "w") as file:
        fill(file)
    return open_checkpoint(path)


def only(checkpoint: Checkpoint, name: str) -> Tensor:
    return next(tensor for tensor in checkpoint.tensors if tensor.name == name)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


# Layout.


def test_plain_data_sets_are_read_without_libhdf5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path / "x", lambda file: file.create_dataset("w", data=ones(3, 2))) as model:
        monkeypatch.setattr(hdf5_process, "CHILD", tmp_path / "there is no child now")
        np.testing.assert_array_equal(model.tensors[0].read(), ones(3, 2))


def test_big_endian_numbers_and_a_user_block_are_read(tmp_path: Path) -> None:
    values = np.arange(6, dtype=">f4").reshape(2, 3)
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", userblock_size=512) as file:
        file["big"] = values
        file["small"] = values.astype("<f2")
        file["double"] = values.astype("<f8")
    moved = tmp_path / "y.keras"
    with zipfile.ZipFile(moved, "w") as archive:
        archive.write(path, "model.weights.h5")
    with open_checkpoint(moved) as model:
        for tensor in model.tensors:
            np.testing.assert_array_equal(tensor.read(), values)


def test_chunks_larger_than_a_piece_come_back(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(6, 1000, 1000)).astype(np.float32)

    def fill(file: h5py.File) -> None:
        file.create_dataset("w", data=values, chunks=(4, 700, 1000), compression="lzf")

    with opened(tmp_path / "x", fill) as model:
        np.testing.assert_array_equal(model.tensors[0].read(), values)


def test_bfloat16_is_read_as_keras_marks_it(tmp_path: Path) -> None:
    values = np.array([[1.5, -2.0, 0.25]], ml_dtypes.bfloat16)

    def fill(file: h5py.File) -> None:
        file["w"] = values.view("V2")
        file["w"].attrs["dtype"] = "bfloat16"

    with opened(tmp_path / "x", fill) as model:
        assert model.tensors[0].encoding.name == "BF16"
        np.testing.assert_array_equal(model.tensors[0].read(), values.astype(np.float32))


def test_int8_kernels_are_divided_by_their_scales(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        file["layers/dense/vars/0"] = np.array([[127, -64], [10, 20]], np.int8)
        file["layers/dense/vars/1"] = ones(2)
        file["layers/dense/vars/2"] = np.array([127.0, 32.0], np.float32)
        file["layers/dense_1/vars/0"] = np.ones((2, 2), np.int8)

    with opened(tmp_path / "x", fill) as model:
        kernel = only(model, "layers/dense/vars/0")
        expected = np.array([[1.0, -2.0], [10 / 127, 0.625]])
        np.testing.assert_allclose(kernel.read(), expected, rtol=1e-6)
        assert kernel.encoding.quantised
        assert only(model, "layers/dense/vars/2").kind is Kind.SCALE
        assert model.parameters == 6
        assert model.limits == [
            "'layers/dense_1/vars/0' holds int8 numbers whose scale we cannot apply"
        ]


@pytest.mark.parametrize(
    ("name", "shape", "canonical"),
    [
        ("a/kernel:0", (3, 5, 4, 6), (6, 4, 3, 5)),
        ("a/depthwise_kernel:0", (3, 5, 4, 2), (4, 2, 3, 5)),
        ("a/depthwise_kernel:0", (3, 5, 4, 1), (4, 1, 3, 5)),
        ("a/pointwise_kernel:0", (1, 1, 4, 6), (6, 4, 1, 1)),
        ("a/kernel:0", (7, 4, 6), (6, 4, 7)),
        ("lstm/recurrent_kernel:0", (4, 16), (16, 4)),
        ("a/embeddings:0", (9, 4), (9, 4)),
        ("layers/conv2d_transpose_2/vars/0", (3, 5, 4, 6), (4, 6, 3, 5)),
        ("layers/depthwise_conv2d/vars/0", (3, 5, 4, 1), (4, 1, 3, 5)),
        ("attention/query/kernel:0", (8, 2, 4), (8, 2, 4)),
        ("attention/query/kernel:0", (8, 4), (4, 8)),
        ("dense_1/dense_1_W", (8, 4), (4, 8)),
        ("anything", (8, 4), (8, 4)),
    ],
)
def test_axes_become_out_in_space(
    tmp_path: Path, name: str, shape: tuple[int, ...], canonical: tuple[int, ...]
) -> None:
    with opened(tmp_path / "x", lambda file: file.create_dataset(name, data=ones(*shape))) as model:
        assert model.tensors[0].canonical_shape == canonical


def test_the_bias_shows_which_axis_of_an_unknown_layer_is_out(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        file["up/kernel:0"], file["up/bias:0"] = ones(3, 5, 4, 6), ones(4)
        file["each/kernel:0"], file["each/bias:0"] = ones(3, 5, 4, 2), ones(8)

    with opened(tmp_path / "x", fill) as model:
        assert only(model, "up/kernel:0").canonical_shape == (4, 6, 3, 5)
        assert only(model, "each/kernel:0").canonical_shape == (4, 2, 3, 5)


def test_optimiser_state_is_no_parameter(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        file["model_weights/head/head/kernel:0"] = ones(4, 3)
        file["model_weights/head/head/moving_mean:0"] = ones(3)
        file["optimizer_weights/Adam/head/kernel/m:0"] = ones(4, 3)

    with opened(tmp_path / "x", fill) as model:
        assert model.parameters == 15
        assert [tensor.kind for tensor in model.tensors] == [
            Kind.WEIGHT,
            Kind.STATISTIC,
            Kind.OPTIMISER,
        ]


def test_the_config_is_declared_and_a_lambda_layer_is_named_not_run(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        file.attrs["model_config"] = json.dumps(CONFIG)
        file.attrs["keras_version"] = "2.4.0"
        file["model_weights/stem/stem/kernel:0"] = ones(3, 3, 1, 2)

    with opened(tmp_path / "x", fill) as model:
        assert model.declared == {
            "keras_version": "2.4.0",
            "model_class": "Sequential",
            "model_name": "net",
        }
        assert model.limits == ["holds a Lambda layer whose code was not run: 'half'"]
    with open_checkpoint(write_keras(tmp_path, WEIGHTS)) as model:
        assert model.declared["keras_version"] == "3.11.0"
        assert model.limits == ["holds a Lambda layer whose code was not run: 'half'"]


# Hostile files.


@pytest.mark.parametrize("whole", [False, True])
def test_tensors_come_in_the_order_of_the_layers(tmp_path: Path, whole: bool) -> None:
    def fill(file: Any) -> None:
        place = file.create_group("model_weights") if whole else file
        place.attrs["layer_names"] = [b"last", b"gone", b"first"]
        for layer in ("first", "last"):
            names = [f"{layer}/kernel:0", f"{layer}/bias:0"]
            place.create_group(layer).attrs["weight_names"] = names
            for name, values in zip(names, (ones(3, 3), ones(3)), strict=True):
                place[layer].create_dataset(name, data=values, compression="gzip")

    with opened(tmp_path / "x", fill) as model:
        layers = [tensor.name.rpartition("/")[0].rpartition("/")[2] for tensor in model.tensors]
        words = [tensor.name.rpartition("/")[2] for tensor in model.tensors]
        assert layers == ["last", "last", "first", "first"]
        assert words == ["kernel:0", "bias:0"] * 2
        assert all((tensor.read() == 1).all() for tensor in model.tensors)


@pytest.mark.parametrize("names", [np.array([1, 2]), "text", [b"", b"w"], [b"../x"], np.zeros(0)])
def test_an_order_that_is_none_changes_nothing(tmp_path: Path, names: Any) -> None:
    def fill(file: Any) -> None:
        file.attrs["layer_names"] = names
        file.create_dataset("w", data=ones(2, 2))

    with opened(tmp_path / "x", fill) as model:
        assert [tensor.name for tensor in model.tensors] == ["w"]


def test_links_to_other_files_are_named_and_never_followed(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["w"] = ones(3, 3)

    def fill(file: h5py.File) -> None:
        file["w"] = ones(2, 2)
        file["outside"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/w")
        file["soft"] = h5py.SoftLink("/outside")

    with opened(tmp_path / "x", fill) as model:
        assert [tensor.name for tensor in model.tensors] == ["w"]
        assert "'outside' is a link to '/w' in the file" in model.limits[0]
        assert model.limits[1] == "'soft' is a soft link to '/outside', which was not followed"


def test_a_file_of_nothing_but_links_is_refused(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        file["outside"] = h5py.ExternalLink("/etc/passwd", "/w")

    with pytest.raises(RefusedError, match=r"nothing but links: 'outside' .* '/etc/passwd'"):
        opened(tmp_path / "x", fill)


def test_external_storage_and_virtual_data_sets_are_named(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(16))

    def fill(file: h5py.File) -> None:
        file["w"] = ones(2, 2)
        file.create_dataset("far", (4,), "f4", external=[(str(tmp_path / "raw"), 0, 16)])
        layout = h5py.VirtualLayout((2, 2), "f4")
        layout[:] = h5py.VirtualSource("other.h5", "w", (2, 2))
        file.create_virtual_dataset("virtual", layout)
        file["words"] = ["not", "numbers"]

    with opened(tmp_path / "x", fill) as model:
        assert [tensor.name for tensor in model.tensors] == ["w"]
        assert sorted(model.limits) == [
            "'far' is stored in other files, which were not opened",
            "'virtual' is a virtual data set, whose sources were not followed",
            "'words' does not hold numbers",
        ]


def test_what_numpy_has_no_type_for_is_named_and_the_rest_read(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        file["w"] = ones(2, 2)
        space = h5py.h5s.create_simple((2,))
        h5py.h5d.create(file.id, b"times", h5py.h5t.UNIX_D32LE, space)
        h5py.h5a.create(file["w"].id, b"dtype", h5py.h5t.UNIX_D32LE, space)
        file["pairs"] = np.zeros(2, [("a", "f4"), ("b", "i4")])

    with opened(tmp_path / "x", fill) as model:
        assert [tensor.name for tensor in model.tensors] == ["w"]
        assert sorted(model.limits) == [
            "'pairs' does not hold numbers",
            "'times' does not hold numbers",
        ]


def test_groups_in_a_loop_come_to_an_end(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        group = file.create_group("a")
        group["back"] = file
        group["w"] = ones(2, 2)
        file["again"] = group["w"]

    with opened(tmp_path / "x", fill) as model:
        assert model.parameters == 4


def test_a_quintillion_values_are_refused_without_allocating(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        file.create_dataset("w", (10**9, 10**9), "f4", chunks=(1000, 1000))

    with pytest.raises(RefusedError, match=r"'w' promises 4,000,000,000,000,000,000 bytes"):
        opened(tmp_path / "x", fill)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("while True: pass", r"found no end within 1 s"),
        ("import os; os.kill(os.getpid(), 11)", r"crashed on it \(signal 11\)"),
        ("import sys; sys.exit(7)", r"cannot read it \(exit status 7\)"),
        ("pass", r"gave no directory"),
    ],
)
def test_a_child_that_hangs_or_dies_is_an_error_for_this_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    child = tmp_path / "child.py"
    child.write_text(body)
    monkeypatch.setattr(hdf5_process, "CHILD", child)
    monkeypatch.setattr(hdf5_process, "TIME_LIMIT_S", 0.6)
    with pytest.raises(MalformedError, match=message):
        opened(tmp_path / "x", lambda file: file.create_dataset("w", data=ones(2, 2)))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces a limit on memory")
def test_a_chunk_that_eats_memory_is_an_error_for_this_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = 512 << 20  # bytes of the one chunk, which libhdf5 must hold as a whole
    monkeypatch.setattr(hdf5_process, "MEMORY_LIMIT_BYTES", 512 << 20)

    def fill(file: h5py.File) -> None:
        packer = zlib.compressobj(1)
        packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(values >> 20))
        shape = (values // 4,)
        made = file.create_dataset("w", shape, "f4", chunks=shape, compression="gzip")
        made.id.write_direct_chunk((0,), packed + packer.flush())

    with (
        opened(tmp_path / "x", fill) as model,
        pytest.raises(MalformedError, match="libhdf5 cannot read it"),
    ):
        model.tensors[0].storage.read(0, 4)


def test_a_child_whose_answer_is_no_directory_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child.py"
    monkeypatch.setattr(hdf5_process, "CHILD", child)
    good = {"name": "w", "group": "", "shape": [2], "type": "<f4", "offset": 0, "stored_bytes": 8}
    wrongs: tuple[dict[str, Any], ...] = (
        {"name": 1},
        {"shape": [-1]},
        {"shape": [2.5]},
        {"shape": [1] * 99},
        {"offset": -8},
        {"offset": 10**12},
        {"type": "<m8"},
        {"type": "f4,,"},
        {"stored_bytes": None},
        {"order": [1]},
    )
    for wrong in wrongs:
        order = wrong.get("order", [])
        answer = {"attributes": {}, "left_out": [], "sets": [{**good, **wrong}], "order": order}
        child.write_text(
            f"import os, sys\nos.write(int(sys.argv[5]), {json.dumps(answer)!r}.encode())"
        )
        with pytest.raises(CheckpointError):
            opened(tmp_path / "x", lambda file: file.create_dataset("w", data=ones(2, 2)))


def test_an_archive_that_inflates_without_measure_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipped, "LARGEST_UNPACKED_BYTES", 1 << 20)
    path = tmp_path / "bomb.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", bytes(4 << 20))
    with pytest.raises(RefusedError, match="bomb"):
        open_checkpoint(path)


def test_members_with_paths_that_lead_out_are_not_unpacked(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = write_keras(inner, WEIGHTS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../outside.txt", "x")
        archive.writestr("/tmp/lineage-outside.txt", "x")
    before = sorted(tmp_path.rglob("*"))
    with open_checkpoint(path) as model:
        assert model.tensors[0].read().size
    assert sorted(tmp_path.rglob("*")) == before


def test_without_h5py_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5_process, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "model-lineage\[formats\]"'):
        opened(tmp_path / "x", lambda file: file.create_dataset("w", data=ones(2, 2)))
