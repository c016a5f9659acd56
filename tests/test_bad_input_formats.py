"""Files that mean harm, through the command line: nothing runs, nothing leaves its folder."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import h5py
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save, save_file

import cli
from command import lineage
from hostile import Evil, claim_to_unpack_to
from refusals import assert_refused

pytestmark = pytest.mark.usefixtures("somewhere")

RNG = np.random.default_rng(0)


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Write a model that nothing is wrong with."""
    path = tmp_path / "good.safetensors"
    save_file({"w": normal(40, 30), "v": normal(20, 40)}, path)
    return path


class TestArchives:
    @pytest.mark.parametrize("inner", ["model.safetensors", "w.npy", "archive/data.pkl"])
    def test_an_archive_that_would_unpack_to_a_hundred_times_its_size_is_refused_by_its_directory(
        self, inner: str, good: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "bomb.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("notes", b"x")
            archive.writestr(inner, save({"w": normal(4, 4)}))
        claim_to_unpack_to(path, 3_000_000_000)
        words = ("would unpack to 3,000,000,001", "nothing was unpacked", "unpack it yourself")
        assert_refused(path, *words, good=good)

    @pytest.mark.parametrize(
        "name",
        ["../escaped.safetensors", "/tmp/escaped.safetensors", "a/../../escaped.safetensors"],
    )
    def test_a_member_that_would_leave_the_folder_is_not_written(
        self, name: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inside = tmp_path / "temporary"
        inside.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(inside))
        path = tmp_path / "walk.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, save({"w": normal(4, 4)}))
        assert_refused(
            path, f"{name!r} would be written outside its folder; nothing was unpacked", good=good
        )
        assert list(inside.iterdir()) == []
        assert not list(tmp_path.rglob("escaped*"))
        assert not Path("/tmp/escaped.safetensors").exists()

    def test_a_member_of_an_archive_is_added_by_its_place(self, good: Path, tmp_path: Path) -> None:
        path = tmp_path / "two.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("a", "b"):
                archive.writestr(f"{name}.safetensors", save({"w": normal(20, 30)}))
        assert_refused(path, "2 models in this archive: a.safetensors, b.safetensors", good=good)
        done = lineage("add", f"{path}!b.safetensors", "--json")
        assert done.code == cli.DONE
        assert len(done.answer["added"]) == 1


class TestPickles:
    def write(self, path: Path, kind: str, marker: Path) -> None:
        evil = {"w": torch.zeros(3, 4), "x": Evil(marker)}
        if kind == "zip":
            torch.save(evil, path)
        elif kind == "legacy":
            torch.save(evil, path, _use_new_zipfile_serialization=False)
        else:
            path.write_bytes(pickle.dumps({"w": np.zeros((3, 4)), "x": Evil(marker)}, 4))

    @pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
    def test_a_pickle_that_would_run_a_program_is_refused_and_names_the_import(
        self, kind: str, good: Path, tmp_path: Path
    ) -> None:
        marker = tmp_path / "it-ran"
        path = tmp_path / "evil.pt"
        self.write(path, kind, marker)
        words = ("imports posix.system", "nothing was executed", "if you trust the file")
        assert_refused(path, *words, good=good, beside=marker)

    def test_a_pickled_array_of_objects_is_refused(self, good: Path, tmp_path: Path) -> None:
        marker = tmp_path / "it-ran"
        array = np.empty(1, object)
        array[0] = Evil(marker)
        path = tmp_path / "evil.npy"
        with path.open("wb") as file:
            np.save(file, array, allow_pickle=True)
        assert_refused(path, "posix.system", "nothing was executed", good=good, beside=marker)


class TestOnnx:
    def write(self, path: Path, location: str) -> Path:
        """Write a model whose weights lie in another file."""
        stored = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[8, 4])
        stored.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "128")):
            stored.external_data.add(key=key, value=value)
        node = helper.make_node("MatMul", ["w", "x"], ["y"])
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (("x", [4, 1]), ("y", [8, 1]))
        ]
        graph = helper.make_graph([node], "g", ends[:1], ends[1:], [stored])
        path.write_bytes(helper.make_model(graph).SerializeToString())
        return path

    @pytest.mark.parametrize("how", ["above", "absolute", "link"])
    def test_weights_outside_the_models_folder_are_not_read(
        self, how: str, good: Path, tmp_path: Path
    ) -> None:
        secret = tmp_path / "secret.bin"
        secret.write_bytes(normal(8, 4).tobytes())
        folder = tmp_path / "model"
        folder.mkdir()
        locations = {"above": "../secret.bin", "absolute": str(secret), "link": "w.bin"}
        if how == "link":
            (folder / "w.bin").symlink_to(secret)
        path = self.write(folder / "model.onnx", locations[how])
        words = (locations[how], "outside the model's folder; nothing was read from there")
        assert_refused(path, *words, good=good)

    def test_weights_beside_the_model_are(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "model.onnx", "w.bin")
        (tmp_path / "w.bin").write_bytes(normal(8, 4).tobytes())
        assert lineage("add", path).code == cli.DONE

    def test_a_message_that_claims_more_than_it_has(self, good: Path, tmp_path: Path) -> None:
        weights = numpy_helper.from_array(normal(8, 4), "w")
        weights.dims[:] = [10**9, 10**9]
        graph = helper.make_graph([], "g", [], [], [weights])
        path = tmp_path / "huge.onnx"
        onnx.save(helper.make_model(graph), path)
        assert_refused(path, "4,000,000,000,000,000,000 bytes", good=good)


class TestKerasAndHdf5:
    def keras(self, path: Path, marker: Path) -> Path:
        """Write a Keras model with a layer that holds Python code."""
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file["layers/dense/vars/0"] = normal(12, 10)
        code = f"__import__('os').system('touch {marker}')"
        layer = {"class_name": "Lambda", "config": {"function": ["4wEAAAA=", code, None]}}
        config = {"class_name": "Sequential", "config": {"name": "s", "layers": [layer]}}
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", json.dumps(config))
            archive.writestr("metadata.json", json.dumps({"keras_version": "3.0"}))
            archive.writestr("model.weights.h5", buffer.getvalue())
        return path

    def test_the_code_of_a_lambda_layer_is_not_run_and_the_weights_are_read(
        self, tmp_path: Path
    ) -> None:
        marker = tmp_path / "it-ran"
        path = self.keras(tmp_path / "lambda.keras", marker)
        done = lineage("add", path, "--json")
        assert done.code in (cli.DONE, cli.UNDECIDED)
        assert done.answer["added"] == [path.name]
        assert lineage("info", path, "--json").answer["parameters"] == 120
        assert not marker.exists()

    def test_the_code_of_a_lambda_layer_in_an_older_file_is_not_run_either(
        self, tmp_path: Path
    ) -> None:
        marker = tmp_path / "it-ran"
        path = tmp_path / "lambda.h5"
        layer = {"class_name": "Lambda", "config": {"function": [f"touch {marker}", None, None]}}
        config = {"class_name": "Sequential", "config": {"layers": [layer]}}
        with h5py.File(path, "w") as file:
            file["model_weights/dense/dense/kernel:0"] = normal(12, 10)
            file.attrs["model_config"] = json.dumps(config)
        assert lineage("add", path).code in (cli.DONE, cli.UNDECIDED)
        assert not marker.exists()

    @pytest.mark.parametrize("how", ["link", "external"])
    def test_data_in_another_file_is_not_followed(
        self, how: str, good: Path, tmp_path: Path
    ) -> None:
        secret = tmp_path / "secret.h5"
        with h5py.File(secret, "w") as file:
            file["w"] = normal(12, 10)
        folder = tmp_path / "model"
        folder.mkdir()
        path = folder / "model.h5"
        with h5py.File(path, "w") as file:
            if how == "link":
                file["layer/kernel:0"] = h5py.ExternalLink(str(secret), "/w")
            else:
                where = [(str(secret), 0, h5py.h5f.UNLIMITED)]
                file.create_dataset("layer/kernel:0", (12, 10), "f4", external=where)
        told = {"link": "which was not followed", "external": "which were not opened"}[how]
        assert_refused(path, "layer/kernel:0", told, good=good)

    def test_a_damaged_file_ends_only_its_own_reading(self, good: Path, tmp_path: Path) -> None:
        path = tmp_path / "damaged.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("w", data=normal(60, 50), chunks=(10, 10), compression="gzip")
        content = bytearray(path.read_bytes())
        for place in np.random.default_rng(2).integers(100, len(content), 400):
            content[place] ^= 0xFF
        path.write_bytes(content)
        assert_refused(path, "libhdf5 cannot read it", "get the file again", good=good)


def test_a_model_behind_a_link_is_read_and_a_link_in_a_circle_is_not_followed(
    good: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "here.safetensors").symlink_to(good)
    (folder / "gone.safetensors").symlink_to(tmp_path / "nothing")
    (folder / "circle").symlink_to(folder)
    os.mkfifo(folder / "pipe.safetensors")
    done = lineage("add", folder, "--json")
    assert done.answer["added"] == ["here.safetensors"]
