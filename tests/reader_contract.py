"""What every reader must do, whatever its format. Subclass it once per format.

A subclass writes the given weights in its format with the format's own library, and inherits
the tests: the values come back, in slices of any size; a file cut short or damaged anywhere gives
values or one of our errors, never another exception; the file's name plays no part.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from embedder.checkpoint import Checkpoint, Kind, Tensor
from embedder.errors import CheckpointError
from embedder.opening import open_checkpoint

Weights = Mapping[str, NDArray[np.float32]]

WEIGHTS: dict[str, NDArray[np.float32]] = {
    "embedding": np.random.default_rng(1).normal(size=(11, 6)).astype(np.float32),
    "conv": np.random.default_rng(2).normal(size=(5, 4, 3, 2)).astype(np.float32),
    "dense": np.random.default_rng(3).normal(size=(7, 9)).astype(np.float32),
    "bias": np.random.default_rng(4).normal(size=(7,)).astype(np.float32),
}
"""out × in × space; no two axes of a tensor are equal, so that a wrong order shows."""


class ReaderContract:
    """Tests that every reader passes."""

    damage_rounds = 60
    """Damaged copies that are tried; fewer for slow readers."""
    cuts = 40
    """Places at which the file is cut."""

    def write(self, folder: Path, weights: Weights) -> Path:
        """Write the weights in this format and return what to open."""
        raise NotImplementedError("write the weights with the format's own library")

    def damaged_file(self, opened: Path) -> Path:
        """Return the file to cut and damage: the one that is opened, or one in the folder."""
        return opened

    @pytest.fixture
    def written(self, tmp_path: Path) -> Path:
        return self.write(tmp_path, WEIGHTS)

    def test_the_values_come_back(self, written: Path) -> None:
        with open_checkpoint(written) as checkpoint:
            found = weights_by_shape(checkpoint)
        for name, values in WEIGHTS.items():
            match = [tensor for tensor in found if tensor.shape == values.shape]
            assert any(np.array_equal(tensor, values) for tensor in match), name

    def test_parameters_are_counted(self, written: Path) -> None:
        with open_checkpoint(written) as checkpoint:
            assert checkpoint.parameters == sum(values.size for values in WEIGHTS.values())

    def test_matrices_are_weights_and_vectors_are_not(self, written: Path) -> None:
        with open_checkpoint(written) as checkpoint:
            for tensor in checkpoint.tensors:
                if tensor.canonical_shape == WEIGHTS["bias"].shape:
                    assert tensor.kind in (Kind.BIAS, Kind.NORM)
                if tensor.canonical_shape == WEIGHTS["dense"].shape:
                    assert tensor.kind is Kind.WEIGHT

    @pytest.mark.parametrize("most", [1, 5, 64, 1 << 18])
    def test_slices_of_any_size_make_up_the_tensor(self, written: Path, most: int) -> None:
        with open_checkpoint(written) as checkpoint:
            for tensor in checkpoint.tensors:
                np.testing.assert_array_equal(assembled(tensor, most), tensor.read())

    def test_the_name_of_the_file_plays_no_part(self, written: Path, tmp_path: Path) -> None:
        if written.is_dir():
            pytest.skip("a folder is known by the files in it")
        renamed = written.rename(tmp_path / "x.weights")
        with open_checkpoint(renamed) as checkpoint:
            assert checkpoint.parameters == sum(values.size for values in WEIGHTS.values())

    def test_a_file_cut_anywhere_is_an_error_of_ours(self, written: Path) -> None:
        file = self.damaged_file(written)
        content = file.read_bytes()
        for length in np.linspace(0, len(content) - 1, self.cuts).astype(int):
            file.write_bytes(content[:length])
            self.read_or_refuse(written)

    def test_a_file_damaged_anywhere_is_values_or_an_error_of_ours(self, written: Path) -> None:
        file = self.damaged_file(written)
        content = bytearray(file.read_bytes())
        rng = np.random.default_rng(7)
        for _ in range(self.damage_rounds):
            damaged = content.copy()
            # Half of the damage goes to the first kilobyte, where headers are.
            reach = min(len(content), 1024) if rng.random() < 0.5 else len(content)
            for place in rng.integers(0, reach, size=rng.integers(1, 9)):
                damaged[place] = rng.integers(0, 256)
            file.write_bytes(damaged)
            self.read_or_refuse(written)

    def read_or_refuse(self, path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numbers such as NaN may well come out of damage
            try:
                with open_checkpoint(path) as checkpoint:
                    for tensor in checkpoint.tensors:
                        for block in tensor.blocks():
                            assert block.values.dtype in (np.float32, np.float64)
            except CheckpointError as error:
                assert str(error)  # noqa: PT017  either outcome is right


def assembled(tensor: Tensor, most: int) -> NDArray[np.generic]:
    """Return a tensor put together from its blocks."""
    values = np.full(tensor.shape or (1,), np.nan, np.float64)
    for block in tensor.blocks(most):
        run = slice(block.start, block.start + len(block.values))
        place: tuple[int | slice, ...] = (*block.prefix, run)
        with np.errstate(invalid="ignore"):  # a signalling NaN complains when it is cast
            values[place] = block.values
    return values.reshape(tensor.shape)


def weights_by_shape(checkpoint: Checkpoint) -> list[NDArray[np.generic]]:
    """Return the values of all tensors as out × in × space."""
    return [np.array(tensor.canonical()) for tensor in checkpoint.tensors]
