"""Large tensors are multiplied block by block, which gives what the whole would give."""

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from embedder import coding, products
from embedder.anchors import Units, anchored
from embedder.architecture import Architecture, Builder
from embedder.checkpoint import Checkpoint, Kind, Tensor, tensor_of
from embedder.coding import code_of, coded, identity_code, units_of
from embedder.describing import describe
from embedder.encoding import Affine, Encoding, Plain
from embedder.errors import ArchitectureError, TruncatedError
from embedder.matrices import Layout
from embedder.opening import open_checkpoint
from embedder.products import Streamed, Whole, in_order
from embedder.step_weights import MOST_UNITS
from embedder.storage import MemoryStorage, Storage
from embedder.symmetry import permuted, rescaled
from embedder.unit_codes import WIDTH
from embedder.units import Axis
from test_embedder_anchors import ARCHITECTURES, CODER, drawn

Values = NDArray[np.floating]
RNG = np.random.default_rng(4)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture(params=[1, 40, 1 << 19])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of a single row, of a few, and of the whole tensor."""
    size: int = request.param
    monkeypatch.setattr(products, "_BLOCK", size)
    monkeypatch.setattr(products, "_ROWS", 1 if size < 1 << 19 else 64)
    return size


def streamed(weights: dict[str, Values]) -> dict[str, Values | Tensor]:
    """Return matrices as tensors that stay where they are, and vectors as they were."""
    return {
        name: tensor_of(name, values.astype(np.float32)) if values.ndim > 1 else values
        for name, values in weights.items()
    }


def units_in_blocks(weights: dict[str, Values], architecture: Architecture) -> list[Units]:
    shapes = {name: values.shape for name, values in weights.items()}
    return anchored(streamed(weights), architecture, shapes=shapes)


class TestProducts:
    @pytest.mark.parametrize("order", list(permutations(range(4)))[::3])
    @pytest.mark.parametrize("most", [1, 9, 50, 1 << 19])
    def test_blocks_of_any_size_and_order_of_axes_give_the_product(
        self, order: tuple[int, ...], most: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(products, "_BLOCK", most)
        monkeypatch.setattr(products, "_ROWS", 1)
        values = RNG.normal(size=(12, 7, 3, 2)).transpose(order).astype(np.float32)
        row, column, *rest = np.argsort(order)
        layout = Layout(int(row), int(column), tuple(map(int, rest)), Axis("a"), Axis("b"))
        whole = Whole(layout.split(values))
        blocks = Streamed(tensor_of("w", values), layout)
        forward, backward = RNG.normal(size=(7, WIDTH)), RNG.normal(size=(12, WIDTH))
        np.testing.assert_allclose(blocks.times(forward), whole.times(forward), atol=1e-5)
        np.testing.assert_allclose(blocks.back(backward), whole.back(backward), atol=1e-5)

    @pytest.mark.parametrize("scale", [2.0**-200, 2.0**200, 0])
    def test_codes_of_any_length_are_multiplied_alike(self, scale: float) -> None:
        tensor = tensor_of("w", RNG.normal(size=(30, 40)).astype(np.float32))
        blocks = Streamed(tensor, Layout(0, 1, (), Axis("a"), Axis("b")))
        codes = RNG.normal(size=(40, WIDTH))
        found = blocks.times(codes * scale)
        np.testing.assert_array_equal(found, blocks.times(codes) * scale)

    def test_the_number_of_threads_changes_no_bit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(products, "_BLOCK", 500)
        monkeypatch.setattr(products, "_ROWS", 1)
        tensor = tensor_of("w", RNG.normal(size=(300, 40)).astype(np.float32))
        layout = Layout(0, 1, (), Axis("a"), Axis("b"))
        forward, backward = RNG.normal(size=(40, WIDTH)), RNG.normal(size=(300, WIDTH))
        one, two, five = (Streamed(tensor, layout, threads) for threads in (1, 2, 5))
        for other in (two, five):
            assert (one.times(forward) == other.times(forward)).all()
            assert (one.back(backward) == other.back(backward)).all()

    @pytest.mark.parametrize(
        "encoding",
        [
            Plain("BF16"),
            Plain("F16"),
            Plain("F64"),
            Plain("F8_E4M3"),
            Affine("I8", (20, 30), np.full(20, 0.1, np.float32), np.zeros(1, np.float32)),
        ],
        ids=lambda encoding: encoding.name,
    )
    def test_stored_types_are_widened_block_by_block(
        self, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(products, "_BLOCK", 90)
        monkeypatch.setattr(products, "_ROWS", 1)
        raw = RNG.integers(0, 60, 600 * encoding.unit_bytes, dtype=np.uint8)
        tensor = Tensor("w", (20, 30), encoding, MemoryStorage(raw), Kind.WEIGHT)
        layout = Layout(1, 0, (), Axis("a"), Axis("b"))
        codes = RNG.normal(size=(20, WIDTH))
        expected = tensor.read().astype(np.float64).T @ codes
        found = Streamed(tensor, layout).times(codes)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())

    def test_results_come_in_the_order_of_the_items(self) -> None:
        assert list(in_order(lambda number: number**2, range(50), 3)) == [n**2 for n in range(50)]

    def test_an_error_in_a_thread_is_raised(self) -> None:
        with pytest.raises(ZeroDivisionError):
            list(in_order(lambda number: 1 // (number - 9), range(50), 2))


class TestCodes:
    def test_a_model_in_blocks_has_the_code_of_the_whole(
        self, architecture: Architecture, block: int
    ) -> None:
        weights = drawn(architecture)
        code = CODER.code(units_in_blocks(weights, architecture))
        assert np.linalg.norm(code - CODER.code(anchored(weights, architecture))) < 1e-6

    def test_no_order_and_no_scale_changes_the_code(
        self, architecture: Architecture, block: int
    ) -> None:
        weights, rng = drawn(architecture), np.random.default_rng(3)
        other = dict(permuted(rescaled(weights, architecture, rng), architecture, rng))
        codes = [CODER.code(units_in_blocks(each, architecture)) for each in (weights, other)]
        assert np.linalg.norm(codes[0] - codes[1]) < 1e-5

    def test_units_taken_a_few_at_a_time_have_the_same_mean(
        self, architecture: Architecture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        units = anchored(drawn(architecture), architecture)
        monkeypatch.setattr(coding, "_UNITS_AT_ONCE", 7)
        monkeypatch.setattr(coding, "_MANY", 0)
        assert np.linalg.norm(code_of(CODER, units)[0] - CODER.code(units)) < 1e-6

    def test_codes_of_many_units_are_kept_in_float32(
        self, architecture: Architecture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weights = drawn(architecture)
        before = anchored(weights, architecture)
        monkeypatch.setattr("embedder.anchors.MANY_UNITS", 0)
        after = anchored(weights, architecture)
        assert {units.forward.dtype for units in after} == {np.dtype(np.float32)}
        assert np.linalg.norm(CODER.code(before) - CODER.code(after)) < 1e-6


SHAPES = {"0.weight": (1300, 900), "0.bias": (1300,), "2.weight": (1000, 1300), "2.bias": (1000,)}
SHAPES |= {"4.weight": (10, 1000), "4.bias": (10,)}


@pytest.fixture
def large() -> dict[str, NDArray[np.float32]]:
    """Weights of which two matrices are too large to be read as a whole."""
    return {
        name: (RNG.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def refusal(weights: dict[str, NDArray[np.float32]], path: Path) -> str:
    """Return why a model has no code, which `add` takes for none."""
    save_file(weights, path)
    with open_checkpoint(path) as checkpoint:
        assert coded(checkpoint)[0] is None
        with pytest.raises(ArchitectureError) as caught:
            identity_code(units_of(checkpoint))
    return str(caught.value)


class Watched:
    """A storage that remembers how many bytes were asked for at once."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self.size_bytes, self.most = storage, storage.size_bytes, 0

    def read(self, start: int, stop: int) -> bytes | memoryview:
        self.most = max(self.most, stop - start)
        return self._storage.read(start, stop)


class TestLargeModels:
    def test_a_disguised_copy_has_the_same_code(
        self, large: dict[str, NDArray[np.float32]], tmp_path: Path
    ) -> None:
        rng = np.random.default_rng(8)
        network = describe(SHAPES)
        other = permuted(rescaled(large, network, rng), network, rng)
        codes = []
        for name, weights in (("a", large), ("b", other)):
            path = tmp_path / f"{name}.safetensors"
            save_file({n: np.ascontiguousarray(w, np.float32) for n, w in weights.items()}, path)
            with open_checkpoint(path) as checkpoint:
                codes.append(identity_code(units_of(checkpoint)).vector)
        assert np.linalg.norm(codes[0] - codes[1]) < 1e-5

    def test_no_large_tensor_is_read_at_once(self, large: dict[str, NDArray[np.float32]]) -> None:
        tensors, watched = [], []
        for name, values in large.items():
            tensor = tensor_of(name, values)
            watched.append(Watched(tensor.storage))
            tensors.append(Tensor(name, tensor.shape, tensor.encoding, watched[-1], tensor.kind))
        units_of(Checkpoint("x", "live", tuple(tensors)))
        assert all(storage.most > 0 for storage in watched)
        assert max(storage.most for storage in watched) <= 4 * (1 << 19)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_a_value_of_the_last_block_that_is_no_number_is_refused(
        self, value: float, large: dict[str, NDArray[np.float32]], tmp_path: Path
    ) -> None:
        large["2.weight"][-1, -1] = value
        said = refusal(large, tmp_path / "m.safetensors")
        assert said == "2.weight: holds values that are NaN or infinite"

    def test_values_that_no_code_can_be_made_of_are_refused(
        self, large: dict[str, NDArray[np.float32]], tmp_path: Path
    ) -> None:
        huge = {name: np.full_like(values, 3e38) for name, values in large.items()}
        for layer in range(5, 9):
            huge[f"{layer}.weight"] = np.full((10, 10), 3e38, np.float32)
        assert "so large" in refusal(huge, tmp_path / "m.safetensors")

    def test_small_weights_that_no_code_can_be_made_of_are_refused(self) -> None:
        builder, width = Builder("deep").input("in", 8), 8
        for layer in range(12):
            source = f"h{layer - 1}" if layer else "in"
            builder.linear(f"w{layer}", source, f"h{layer}", width, activation="relu")
        network = builder.linear("last", "h11", "out", 3, named=True).build()
        weights = {name: 1e30 * values for name, values in drawn(network).items()}
        with pytest.raises(ArchitectureError, match="so large that its codes are not finite"):
            anchored(weights, network)

    def test_a_file_that_shrinks_while_it_is_read_is_refused(
        self, large: dict[str, NDArray[np.float32]], tmp_path: Path
    ) -> None:
        path = tmp_path / "m.safetensors"
        save_file(large, path)
        with open_checkpoint(path) as checkpoint:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size - 3_000_000)
            assert coded(checkpoint)[0] is None
            with pytest.raises(TruncatedError):
                units_of(checkpoint)

    def test_a_header_that_claims_more_than_the_file_holds_is_refused(
        self, large: dict[str, NDArray[np.float32]], tmp_path: Path
    ) -> None:
        path = tmp_path / "m.safetensors"
        save_file(large, path)
        path.write_bytes(path.read_bytes()[:-5_000_000])
        with pytest.raises(TruncatedError):
            open_checkpoint(path)


class Untouched(dict[str, Tensor]):
    """Weights that nobody may read."""

    def __getitem__(self, name: str) -> Tensor:
        raise AssertionError(name)

    def __iter__(self) -> Iterator[str]:
        raise AssertionError


class TestTooLarge:
    def test_more_units_than_can_be_held_are_refused_before_anything_is_read(self) -> None:
        units = MOST_UNITS + 1
        builder = Builder("wide").input("in", 2).linear("a", "in", "h", units, activation="relu")
        network = builder.linear("b", "h", "out", 2, named=True).build()
        with pytest.raises(ArchitectureError, match=r"4,194,309 units; at most 4,194,304"):
            anchored(Untouched(), network, shapes={"a": (units, 2), "b": (2, units)})

    def test_a_layer_without_units_is_refused_before_anything_is_read(self) -> None:
        builder = Builder("empty").input("in", 2).linear("a", "in", "h", 0, activation="relu")
        network = builder.linear("b", "h", "out", 2, named=True).build()
        with pytest.raises(ArchitectureError, match="a: has no values"):
            anchored(Untouched(), network, shapes={"a": (0, 2), "b": (2, 0)})
