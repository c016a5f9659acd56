"""GGUF: the contract, every block type, byte orders, split files, hostile headers."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter, quants

from embedder.checkpoint import Checkpoint, Kind
from embedder.errors import MalformedError, MissingPartError, TruncatedError, UnsupportedError
from embedder.opening import open_checkpoint
from embedder.readers import gguf_header
from embedder.readers.gguf import open_gguf
from reader_contract import WEIGHTS, ReaderContract, Weights, assembled

RNG = np.random.default_rng(13)


def write_gguf(
    path: Path, weights: Weights, *, endian: GGUFEndian = GGUFEndian.LITTLE, **facts: Any
) -> Path:
    writer = GGUFWriter(path, "llama", endianess=endian)
    for key, value in facts.items():
        getattr(writer, key)(value)
    for name, values in weights.items():
        writer.add_tensor(name, values.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def fact(key: str, kind: int, value: bytes) -> bytes:
    return text(key.encode()) + struct.pack("<I", kind) + value


def entry(name: bytes, shape: Sequence[int], kind: int, offset: int = 0) -> bytes:
    return (
        text(name)
        + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        + struct.pack("<IQ", kind, offset)
    )


def write_raw(
    path: Path,
    *,
    facts: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    content: bytes = b"",
    version: int = 3,
) -> Path:
    """Write a file of which any part may be wrong."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(facts))
    header += b"".join(facts) + b"".join(tensors)
    path.write_bytes(header + bytes(-len(header) % 32) + content)
    return path


class TestGguf(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        return write_gguf(folder / "model.gguf", weights)


class TestGgufOfABigEndianMachine(ReaderContract):
    damage_rounds = 20

    def write(self, folder: Path, weights: Weights) -> Path:
        return write_gguf(folder / "model.gguf", weights, endian=GGUFEndian.BIG)


def test_rows_are_the_last_axis_so_that_a_matrix_is_out_times_in(tmp_path: Path) -> None:
    dense = WEIGHTS["dense"]
    with open_checkpoint(write_gguf(tmp_path / "m", {"dense": dense})) as checkpoint:
        tensor = checkpoint.tensors[0]
        assert (tensor.shape, tensor.axes, tensor.kind) == ((7, 9), (), Kind.WEIGHT)


DECODED = sorted(quants._type_traits, key=int)


@pytest.mark.parametrize("kind", DECODED, ids=[kind.name for kind in DECODED])
def test_every_block_type_in_slices_of_any_size(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    values, size = gguf.GGML_QUANT_SIZES[kind]
    rows, row = 5, 3 * max(values, 32)
    stored = RNG.integers(0, 256, (rows, row // values * size), np.uint8)
    with np.errstate(all="ignore"):  # random scales may be NaN
        expected = quants.dequantize(stored, kind)
    path = write_raw(
        tmp_path / "m",
        tensors=[entry(b"w", (row, rows), int(kind))],
        content=stored.tobytes(),
    )
    with open_checkpoint(path) as checkpoint:
        tensor = checkpoint.tensors[0]
        assert tensor.encoding.name == kind.name
        assert tensor.encoding.quantised == (kind.name != "BF16")
        np.testing.assert_array_equal(tensor.read(), expected)
        for most in (1, 7, values, values + 1, 2 * values + 5):
            np.testing.assert_array_equal(assembled(tensor, most), expected)


PLAIN = {"F64": "f8", "F32": "f4", "F16": "f2", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8"}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_types_are_not_quantised(tmp_path: Path, kind: str) -> None:
    values = np.array([[1, -2, 0], [4, 3, -5]], PLAIN[kind])
    path = write_raw(
        tmp_path / "m",
        tensors=[entry(b"w", (3, 2), GGMLQuantizationType[kind])],
        content=values.tobytes(),
    )
    with open_gguf(path) as checkpoint:
        tensor = checkpoint.tensors[0]
        assert not tensor.encoding.quantised
        np.testing.assert_array_equal(tensor.read(), values.astype(np.float64))


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_blocks_of_a_big_endian_machine_are_turned(tmp_path: Path, name: str) -> None:
    kind = GGMLQuantizationType[name]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    stored = RNG.integers(0, 256, (4, 2 * size), np.uint8)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(stored, kind)
    turned = stored.reshape(-1, size).copy()
    # Each block holds its 16-bit scales at these places.
    for place in {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}[name]:
        turned[:, [place, place + 1]] = turned[:, [place + 1, place]]
    header = b"GGUF" + struct.pack(">IQQ", 3, 1, 0)
    header += struct.pack(">Q", 1) + b"w" + struct.pack(">IQQIQ", 2, 2 * values, 4, kind, 0)
    path = tmp_path / "m"
    path.write_bytes(header + bytes(-len(header) % 32) + turned.tobytes())
    with open_checkpoint(path) as checkpoint:
        tensor = checkpoint.tensors[0]
        np.testing.assert_array_equal(tensor.read(), expected)
        np.testing.assert_array_equal(assembled(tensor, values), expected)


def test_other_blocks_of_a_big_endian_machine_are_named(tmp_path: Path) -> None:
    header = b"GGUF" + struct.pack(">IQQ", 3, 1, 0)
    header += struct.pack(">Q", 1) + b"w" + struct.pack(">IQIQ", 1, 256, 10, 0)
    path = tmp_path / "m"
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(84))
    with pytest.raises(UnsupportedError, match="'w' is stored as Q2_K in a big-endian file"):
        open_checkpoint(path)


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_are_read(tmp_path: Path, version: int) -> None:
    path = write_raw(
        tmp_path / "m", version=version, tensors=[entry(b"w", (2, 2), 0)], content=bytes(16)
    )
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.parameters == 4


def test_another_version_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="GGUF version 1; we read versions 2 and 3"):
        open_checkpoint(write_raw(tmp_path / "m", version=1))


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K"])
def test_a_block_type_that_the_package_cannot_decode_is_named(tmp_path: Path, kind: str) -> None:
    number = GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[number]
    path = write_raw(tmp_path / "m", tensors=[entry(b"w", (values,), number)], content=bytes(size))
    with pytest.raises(UnsupportedError, match=f"'w' is stored as {kind}, which"):
        open_checkpoint(path)


def test_a_block_type_that_nobody_knows_is_named(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "m", tensors=[entry(b"w", (32,), 999)], content=bytes(64))
    with pytest.raises(UnsupportedError, match="block type number 999"):
        open_checkpoint(path)


def test_facts_are_declared_and_words_are_only_counted(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m",
        {"w": WEIGHTS["dense"]},
        add_name="a name",
        add_license="mit",
        add_base_model_count=1,
        add_tags=["one", "two"],
        add_tokenizer_model="gpt2",
        add_token_list=[f"word{number}" for number in range(5000)],
        add_token_scores=[float(number) for number in range(5000)],
    )
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.declared["vocabulary"] == {"model": "gpt2", "size": 5000}
        assert checkpoint.declared["metadata"] == {
            "general.architecture": "llama",
            "general.name": "a name",
            "general.license": "mit",
            "general.base_model.count": 1,
            "general.tags": ["one", "two"],
            "tokenizer.ggml.model": "gpt2",
        }


def test_an_adapter_says_so(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m", {"w": WEIGHTS["dense"]}, add_type="adapter")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.adapter


def test_a_large_vocabulary_is_walked_over_through_a_small_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_header, "_WINDOW_BYTES", 64)
    words = [f"{'x' * (number % 200)}{number}" for number in range(2000)]
    path = write_gguf(
        tmp_path / "m", {"w": WEIGHTS["dense"]}, add_token_list=words, add_name="behind"
    )
    with open_checkpoint(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensors[0].read(), WEIGHTS["dense"])
        assert checkpoint.declared["vocabulary"]["size"] == 2000


def test_arrays_in_arrays_are_walked_over(tmp_path: Path) -> None:
    inner = struct.pack("<IQ", 4, 2) + struct.pack("<II", 1, 2)
    path = write_raw(
        tmp_path / "m",
        facts=[fact("general.nested", 9, struct.pack("<IQ", 9, 2) + inner + inner)],
        tensors=[entry(b"w", (2, 2), 0)],
        content=bytes(16),
    )
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.declared["metadata"] == {}


def test_arrays_in_arrays_without_end_are_refused(tmp_path: Path) -> None:
    nested = struct.pack("<IQ", 9, 1) * 1000
    with pytest.raises(MalformedError, match="inside too many others"):
        open_checkpoint(write_raw(tmp_path / "m", facts=[fact("a", 9, nested)]))


def test_the_alignment_is_obeyed(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m", "llama")
    writer.add_custom_alignment(256)
    for name in ("a", "b"):
        writer.add_tensor(name, WEIGHTS["dense"].copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(tmp_path / "m") as checkpoint:
        for tensor in checkpoint.tensors:
            np.testing.assert_array_equal(tensor.read(), WEIGHTS["dense"])


@pytest.mark.parametrize("alignment", [0, 7, 1 << 30])
def test_an_impossible_alignment_is_refused(tmp_path: Path, alignment: int) -> None:
    facts = [fact("general.alignment", 4, struct.pack("<I", alignment))]
    with pytest.raises(MalformedError, match=f"general.alignment is {alignment}"):
        open_checkpoint(write_raw(tmp_path / "m", facts=facts))


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ([entry(b"w", (4, 4), 0, 8)], "not a multiple of the alignment, 32"),
        ([entry(b"a", (16,), 0), entry(b"b", (16,), 0, 32)], "'b' begins at byte 32 .* inside"),
        ([entry(b"a", (16,), 0), entry(b"a", (16,), 0, 64)], "'a' is there twice"),
        ([entry(b"w", (33,), 8)], "rows of 33 values, which is not a multiple of the 32"),
        ([entry(b"w", (10**9, 10**10), 0)], "no file is that large"),
        ([entry(b"w", (1,) * 9, 0)], "has 9 axes; 8 are allowed"),
        ([entry(b"w", (4,), 0, 1 << 63)], "no file is that large"),
    ],
)
def test_impossible_tensors_are_refused(
    tmp_path: Path, tensors: Sequence[bytes], problem: str
) -> None:
    with pytest.raises(MalformedError, match=problem):
        open_checkpoint(write_raw(tmp_path / "m", tensors=tensors, content=bytes(256)))


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ([fact("a", 9, struct.pack("<IQ", 8, 1 << 60))], "counts 1,152,.* entries of an array"),
        ([fact("a", 9, struct.pack("<IQ", 4, 1 << 61))], "entries of an array"),
        ([fact("a", 8, struct.pack("<Q", 1 << 62))], "bytes of one text"),
        ([fact("a", 99, b"")], "type 99, which does not exist"),
        ([text(b"k" * 70_000) + bytes(100)], "counts 70,000 bytes of one text"),
    ],
)
def test_a_header_that_promises_more_than_can_be_is_refused(
    tmp_path: Path, facts: Sequence[bytes], problem: str
) -> None:
    with pytest.raises(MalformedError, match=problem):
        open_checkpoint(write_raw(tmp_path / "m", facts=facts, content=bytes(64)))


@pytest.mark.parametrize("counts", [(1 << 60, 0), (0, 1 << 60), (900_000, 0), (0, 9_000)])
def test_counts_are_held_against_the_file(tmp_path: Path, counts: tuple[int, int]) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(100))
    with pytest.raises(MalformedError, match=r"the header counts [0-9,]+ (tensors|facts)"):
        open_checkpoint(path)


def two_tensors(path: Path, present: int) -> Path:
    return write_raw(
        path,
        tensors=[entry(b"a", (8, 1), 0), entry(b"b", (8, 2), 0, 32)],
        content=bytes(present),
    )


def test_a_file_cut_short_says_how_much_is_there(tmp_path: Path) -> None:
    with pytest.raises(
        TruncatedError, match=r"2 tensors, 24 values\) and promises 96 bytes of tensors, and 40"
    ):
        open_checkpoint(two_tensors(tmp_path / "m.gguf", 40))


def test_the_first_of_several_chunks_is_told_to_be_joined(tmp_path: Path) -> None:
    with pytest.raises(TruncatedError, match="first of several chunks: join them in order"):
        open_checkpoint(two_tensors(tmp_path / "m.gguf.part00", 40))


def test_what_is_wholly_there_can_be_read(tmp_path: Path) -> None:
    path = two_tensors(tmp_path / "m.gguf", 40)
    with open_checkpoint(path, allow_partial=True) as checkpoint:
        assert [tensor.name for tensor in checkpoint.tensors] == ["a"]
        assert checkpoint.limits == [
            "m.gguf: the header is complete (2 tensors, 24 values) and promises 96 bytes of "
            "tensors, and 40 are there; 1 of 2 tensors are left out"
        ]


def write_split(folder: Path, tensors: int = 3) -> list[Path]:
    writer = GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=1)
    for number in range(tensors):
        writer.add_tensor(f"w{number}", np.full((2, 32), number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("m-*.gguf"))


def read_all(checkpoint: Checkpoint) -> dict[str, float]:
    return {tensor.name: float(tensor.read()[1, 31]) for tensor in checkpoint.tensors}


@pytest.mark.parametrize("part", [0, 2])
def test_any_file_of_a_split_model_stands_for_the_whole(tmp_path: Path, part: int) -> None:
    files = write_split(tmp_path)
    with open_checkpoint(files[part]) as checkpoint:
        assert read_all(checkpoint) == {"w0": 0.0, "w1": 1.0, "w2": 2.0}
        assert checkpoint.files == tuple(files)


def test_a_missing_file_of_a_split_model_is_named(tmp_path: Path) -> None:
    files = write_split(tmp_path)
    files[1].unlink()
    with pytest.raises(MissingPartError, match=r"part 2 of 3 is not there: m-00002-of-00003\.gguf"):
        open_checkpoint(files[0])
    with open_checkpoint(files[0], allow_partial=True) as checkpoint:
        assert read_all(checkpoint) == {"w0": 0.0, "w2": 2.0}
        assert checkpoint.limits == ["part 2 of 3 is missing: m-00002-of-00003.gguf"]


def test_a_renamed_file_of_a_split_model_says_what_it_needs(tmp_path: Path) -> None:
    files = write_split(tmp_path)
    renamed = files[0].rename(tmp_path / "x.gguf")
    with pytest.raises(MissingPartError, match="is part 1 of 3, and its name does not say"):
        open_checkpoint(renamed)


def test_files_of_two_sets_do_not_mix(tmp_path: Path) -> None:
    files = write_split(tmp_path)
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(MalformedError, match="part 2 of 3 by its name and says part 3 of 3"):
        open_checkpoint(files[0])


def test_a_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "m", tensors=[entry(b"w\xff", (2, 2), 0)], content=bytes(16))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors[0].name == "w\udcff"
