"""Digests, statistics, constants and the fingerprint as a whole."""

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from embedder.checkpoint import Checkpoint, Kind, Tensor, tensor_of
from embedder.constants import formula_of, worth_a_look
from embedder.digest import sha256_of
from embedder.errors import MalformedError
from embedder.fingerprint import Fingerprint, sampled_rows, take_fingerprint, take_print
from embedder.opening import open_checkpoint
from embedder.record import from_bytes, to_bytes
from embedder.sketch import sketch

RNG = np.random.default_rng(0)


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.normal(size=shape).astype(np.float32)


def printed(*tensors: Tensor) -> Fingerprint:
    return take_fingerprint(Checkpoint("here", "live", tensors))


class TestDigests:
    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
    def test_an_upcast_leaves_the_values_digest(self, dtype: type) -> None:
        narrow: NDArray[np.generic] = normal(20, 30).astype(dtype)
        wide = narrow.astype(np.float32)
        a, b = take_print(tensor_of("w", narrow)), take_print(tensor_of("w", wide))
        assert a.values == b.values
        assert a.bits != b.bits
        assert a.narrow == b.narrow != "F32"

    def test_a_cast_that_loses_digits_changes_it(self) -> None:
        wide = normal(20, 30)
        a = take_print(tensor_of("w", wide))
        b = take_print(tensor_of("w", wide.astype(np.float16)))
        assert a.values != b.values
        assert a.narrow == "F32"

    def test_another_layout_leaves_the_values_digest(self) -> None:
        kernel = normal(3, 2, 5, 7)  # H × W × in × out, as TensorFlow stores it
        tensor = tensor_of("k", kernel, axes=(3, 2, 0, 1))
        plain = tensor_of("k", np.ascontiguousarray(np.transpose(kernel, (3, 2, 0, 1))))
        assert take_print(tensor).values == take_print(plain).values
        assert take_print(tensor).shape == (7, 5, 3, 2)

    def test_axes_of_length_one_leave_the_values_digest(self) -> None:
        values = normal(6, 1, 4)
        other = take_print(tensor_of("w", values[:, 0]))
        assert take_print(tensor_of("w", values)).values == other.values

    @given(st.integers(0, 11), st.sampled_from(["next", "nan", "zero"]))
    @settings(deadline=None)
    def test_one_changed_value_changes_both(self, place: int, change: str) -> None:
        values = np.arange(12, dtype=np.float32).reshape(3, 4) + np.float32(0.3)
        changed = values.copy()
        flat = changed.reshape(-1)
        flat[place] = {
            "next": np.nextafter(flat[place], np.float32(100)),
            "nan": np.float32(np.nan),
            "zero": np.float32(0),
        }[change]
        a, b = take_print(tensor_of("w", values)), take_print(tensor_of("w", changed))
        assert a.bits != b.bits
        assert a.values != b.values

    def test_names_order_and_sharding_leave_the_content(self) -> None:
        x, y = normal(4, 5), normal(6)
        one = printed(tensor_of("a", x), tensor_of("b", y))
        other = printed(tensor_of("q", y), tensor_of("p", x))
        assert one.content == other.content

    def test_the_key_of_permuted_values_is_the_same(self) -> None:
        x = normal(40, 50)
        shuffled = RNG.permutation(x.reshape(-1)).reshape(50, 40)
        a, b = take_print(tensor_of("w", x)), take_print(tensor_of("w", shuffled))
        assert a.key == b.key
        assert a.key != take_print(tensor_of("w", normal(40, 50))).key

    def test_the_hash_of_one_file_is_its_sha256(self, tmp_path: Path) -> None:
        file = tmp_path / "x"
        file.write_bytes(b"abc" * 1_000_000)
        assert sha256_of([file]) == hashlib.sha256(file.read_bytes()).hexdigest()

    def test_the_hash_of_files_leaves_out_their_order_and_names(self, tmp_path: Path) -> None:
        first, second, third = (tmp_path / name for name in "abc")
        first.write_bytes(b"1")
        second.write_bytes(b"2")
        third.write_bytes(b"1")
        assert sha256_of([first, second]) == sha256_of([second, third])


class TestStatistics:
    def test_the_norm_is_exact_to_float64(self) -> None:
        values = (RNG.normal(size=(700, 900)) * 1e3).astype(np.float32)
        norm = take_print(tensor_of("w", values)).summary.norm
        exact = np.sqrt(np.sum(values.astype(np.longdouble) ** 2))
        assert norm == pytest.approx(float(exact), rel=1e-13)

    def test_extremes_zeros_and_mean_are_exact(self) -> None:
        values = normal(50, 60)
        values[:25] = 0
        found = take_print(tensor_of("w", values)).summary
        assert (found.minimum, found.maximum) == (values.min(), values.max())
        assert found.zeros == 0.5
        assert found.mean == pytest.approx(values.astype(np.float64).mean(), abs=1e-12)

    def test_profiles_follow_the_axes(self) -> None:
        values = np.outer(np.arange(1, 21), np.ones(30)).astype(np.float32)
        plain = take_print(tensor_of("w", values)).summary
        turned = take_print(tensor_of("w", np.ascontiguousarray(values.T), axes=(1, 0))).summary
        np.testing.assert_allclose(plain.row_norms, turned.row_norms, rtol=1e-6)
        np.testing.assert_allclose(plain.column_norms, turned.column_norms, rtol=1e-6)
        assert plain.row_norms[-1] == pytest.approx(20 * np.sqrt(30), rel=1e-6)

    def test_a_lattice_shows_few_levels(self) -> None:
        values = normal(40, 256)
        coarse = np.round(values * 7 / np.abs(values).max(axis=1, keepdims=True)).astype(np.float32)
        assert take_print(tensor_of("w", coarse)).summary.levels <= 15
        assert take_print(tensor_of("w", values)).summary.levels > 200

    @pytest.mark.parametrize(
        "bits",
        [0x7FC00000, 0x7F800000, 0xFF800000, 0x7F810000],
        ids=["NaN", "+inf", "-inf", "signalling NaN"],
    )
    def test_a_value_that_is_not_finite_is_named_and_not_counted(self, bits: int) -> None:
        values = normal(10, 10).astype(np.float32)
        values.view(np.uint32)[3, 4] = bits
        found = printed(tensor_of("w", values), tensor_of("v", normal(3, 3)))
        assert [tensor.name for tensor in found.counted] == ["v"]
        assert found.limits == ("w: 1 of 100 values are NaN or infinite; not counted",)
        assert np.isfinite(found.vector).all()


class TestConstants:
    def bases(self) -> dict[str, NDArray[np.float64]]:
        time, bins = np.arange(256), np.arange(129)[:, None]
        phase = 2 * np.pi * bins * time / 256
        window = np.hanning(257)[:-1]
        rates = np.arange(400)[:, None] / 10000 ** (np.arange(0, 64, 2) / 64)
        edges = np.linspace(1, 60, 22)
        points = np.arange(64)
        filters = [
            np.maximum(0, np.minimum((points - a) / (b - a), (c - points) / (c - b)))
            for a, b, c in zip(edges, edges[1:], edges[2:], strict=False)
        ]
        return {
            "windowed Fourier basis": np.concatenate([np.cos(phase), -np.sin(phase)]) * window,
            "sinusoids": np.stack([np.sin(rates), np.cos(rates)], -1).reshape(400, 64),
            "mel filters": np.array(filters),
            "zeros and ones": np.eye(30),
            "ramp": np.arange(50.0),
            "all equal": np.full((4, 5), 0.7),
        }

    def test_each_formula_is_named_in_either_layout_and_in_half_precision(self) -> None:
        for name, values in self.bases().items():
            for found in (values, values.T, values.astype(np.float16)):
                assert formula_of(found) == name
                assert worth_a_look(np.asarray(found))

    def test_a_fingerprint_names_them(self) -> None:
        for name, values in self.bases().items():
            assert take_print(tensor_of("w", values.astype(np.float32))).constant == name

    @given(st.integers(0, 2**32 - 1), st.sampled_from([(40, 64), (16, 16), (200, 3, 3), (30,)]))
    @settings(deadline=None)
    def test_random_weights_are_no_constant(self, seed: int, shape: tuple[int, ...]) -> None:
        assert formula_of(np.random.default_rng(seed).normal(size=shape)) == ""

    def test_a_constant_is_not_counted(self) -> None:
        found = printed(tensor_of("eye", np.eye(9, dtype=np.float32)), tensor_of("w", normal(3, 4)))
        assert [tensor.name for tensor in found.counted] == ["w"]
        assert found.parameters == 93


class TestFingerprint:
    def test_a_record_comes_back_to_the_last_bit(self) -> None:
        found = printed(
            tensor_of("w", normal(40, 30)),
            tensor_of("b", normal(40)),
            tensor_of("scalar", np.array(3.0, np.float32)),
            tensor_of("ids", np.arange(5)),
            tensor_of("bad", np.array([[np.nan, 1.0]], np.float32)),
        )
        raw = to_bytes(found)
        assert to_bytes(from_bytes(raw)) == raw
        assert from_bytes(raw).content == found.content

    @pytest.mark.parametrize("raw", [b"", b"x" * 50, bytes(20)])
    def test_bytes_that_are_no_record_are_an_error_of_ours(self, raw: bytes) -> None:
        with pytest.raises(MalformedError, match="not a fingerprint of ours"):
            from_bytes(raw)

    def test_threads_leave_the_fingerprint(self, tmp_path: Path) -> None:
        weights = {f"w{i}": normal(700, 900) for i in range(9)}
        save_file(weights, tmp_path / "x.safetensors")
        records = []
        for threads in (1, 2):
            with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
                records.append(to_bytes(take_fingerprint(checkpoint, threads=threads)))
        assert records[0] == records[1]

    def test_optimiser_state_leaves_no_trace(self) -> None:
        weights, moments = tensor_of("w", normal(5, 6)), normal(5, 6)
        state = tensor_of("m", moments, kind=Kind.OPTIMISER)
        assert to_bytes(printed(weights, state)) == to_bytes(printed(weights))

    def test_the_sample_of_rows_is_what_those_rows_alone_give(self) -> None:
        values = normal(500, 40)
        rows = sampled_rows(500)
        alone = np.zeros_like(values)
        alone[rows] = values[rows]
        found = take_print(tensor_of("w", values)).sample_sketch
        np.testing.assert_allclose(found, sketch(alone), rtol=1e-4, atol=1e-4)
        assert len(rows) == len(set(rows.tolist())) == 32

    def test_an_added_row_changes_the_sample_by_one_at_most(self) -> None:
        for count in range(33, 300):
            before, after = set(sampled_rows(count)), set(sampled_rows(count + 1))
            assert len(before - after) <= 1

    def test_relatives_have_near_vectors_and_strangers_do_not(self) -> None:
        shapes = [(64, 48), (64, 64), (10, 64), (32, 16, 3, 3)]
        base = [normal(*shape) for shape in shapes]
        child = [w + 0.1 * normal(*w.shape) for w in base]
        stranger = [normal(*shape) for shape in shapes]

        def vector(weights: list[NDArray[np.float32]], first: int = 0) -> NDArray[np.float32]:
            order = [*range(first, len(weights)), *range(first)]
            return printed(*(tensor_of(f"t{i}", weights[i]) for i in order)).vector

        assert vector(base) @ vector(child, 2) > 0.9
        assert abs(vector(base) @ vector(stranger)) < 0.35
        assert vector(base) @ vector(base) == pytest.approx(1, abs=1e-5)

    def test_a_model_of_seven_billion_parameters_keeps_at_most_a_megabyte(self) -> None:
        # 291 tensors, as Llama 2 7B has; what is kept of one does not depend on its size.
        tensors = [tensor_of(f"layers.{i}.weight", normal(64, 64)) for i in range(291)]
        assert len(to_bytes(printed(*tensors))) < 1_000_000
