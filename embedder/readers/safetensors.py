"""safetensors: an 8-byte length, a JSON table of tensors, then their bytes.

We parse the header ourselves, because the numpy side of the package cannot read FP8 and reads
whole tensors. The rules are those of the format's specification: offsets follow each other
without holes or overlaps and end with the file.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any

from embedder.checkpoint import Checkpoint, Tensor, kind_of
from embedder.encoding import FP4, PLAIN, Encoding, Nibbles, Plain
from embedder.errors import MalformedError, TruncatedError, UnsupportedError
from embedder.storage import OpenFile

_LARGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors package itself


def open_safetensors(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open one safetensors file.

    Args:
        path: The file.
        allow_partial: Read the tensors that are whole in a file that was cut short.

    Raises:
        MalformedError: The header breaks a rule of the format.
        TruncatedError: The file ends before its tensors do.
        UnsupportedError: A stored type that we do not know.
    """
    file = OpenFile(path)
    limits: list[str] = []
    try:
        header, start = read_header(file)
        declared = header.pop("__metadata__", None)
        available = file.size_bytes - start
        whole = _check_offsets(path, header, available)
        if whole is not None and not allow_partial:
            raise whole
        there = [item for item in header.items() if item[1]["data_offsets"][1] <= available]
        if whole is not None:
            limits.append(f"{whole.problem}; {len(there)} of {len(header)} tensors are whole")
        tensors = tuple(
            _tensor(file, start, name, entry)
            for name, entry in sorted(there, key=lambda item: item[1]["data_offsets"])
        )
    except BaseException:
        file.close()
        raise
    return Checkpoint(
        location=str(path),
        format="safetensors",
        tensors=tensors,
        files=(path,),
        declared={"metadata": declared} if isinstance(declared, dict) and declared else {},
        limits=limits,
        open_files=[file],
    )


def read_header(file: OpenFile) -> tuple[dict[str, Any], int]:
    """Return the table of tensors and the place where their bytes begin.

    Raises:
        MalformedError: It is not a table.
        TruncatedError: The file ends inside it.
    """
    (header_bytes,) = struct.unpack("<Q", file.read(0, 8))
    if header_bytes > _LARGEST_HEADER_BYTES:
        raise MalformedError(
            file.path, f"header of {header_bytes:,} bytes; the format allows 100,000,000"
        )
    if 8 + header_bytes > file.size_bytes:
        raise TruncatedError(
            file.path,
            f"TRUNCATED: the header promises {header_bytes:,} bytes and the file has "
            f"{file.size_bytes:,}",
            "get the file again, then run the same command",
        )
    try:
        header = json.loads(file.read(8, 8 + header_bytes).decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise MalformedError(file.path, f"the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise MalformedError(file.path, "the header is not a table of tensors")
    return header, 8 + header_bytes


def _check_offsets(path: Path, header: dict[str, Any], available: int) -> TruncatedError | None:
    """Refuse entries of the wrong form, overlaps and holes; return the error of a short file."""
    for name, entry in header.items():
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("dtype"), str)
            and _are_counts(entry.get("shape"))
            and _are_counts(entry.get("data_offsets"))
            and len(entry["data_offsets"]) == 2
        ):
            raise MalformedError(
                path, f"tensor {name!r} has no valid dtype, shape and data_offsets"
            )
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if start != end or stop < start:
            raise MalformedError(
                path, f"tensor {name!r} lies at {start:,}–{stop:,} where byte {end:,} comes next"
            )
        end = stop
    if end > available:
        return TruncatedError(
            path,
            f"TRUNCATED: the header promises {end:,} bytes of tensors and the file has "
            f"{available:,}",
            "get the file again, then run the same command",
        )
    if end < available:
        raise MalformedError(path, f"{available - end:,} bytes follow the last tensor")
    return None


def _are_counts(found: object) -> bool:
    return isinstance(found, list) and all(
        isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in found
    )


def _tensor(file: OpenFile, start: int, name: str, entry: dict[str, Any]) -> Tensor:
    shape = tuple(entry["shape"])
    first, last = entry["data_offsets"]
    encoding = _encoding(file.path, name, entry["dtype"])
    size_bytes = -(-math.prod(shape) // encoding.unit_values) * encoding.unit_bytes
    if size_bytes != last - first:
        raise MalformedError(
            file.path,
            f"tensor {name!r} of shape {list(shape)} and type {entry['dtype']} takes "
            f"{size_bytes:,} bytes and has {last - first:,}",
        )
    return Tensor(
        name=name,
        shape=shape,
        encoding=encoding,
        storage=file.part(start + first, last - first, f"tensor {name!r}"),
        kind=kind_of(name, shape, encoding),
    )


def _encoding(path: Path, name: str, dtype: str) -> Encoding:
    if dtype in PLAIN:
        return Plain(dtype)
    if dtype == "F4":
        return Nibbles("F4", FP4)
    raise UnsupportedError(path, f"tensor {name!r} is stored as {dtype}, which we cannot decode")
