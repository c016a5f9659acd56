"""numpy's files: `.npy` holds one array, `.npz` is a zip archive of them.

The header is a Python literal of three entries; it is matched, never evaluated. Arrays of objects
are pickles and go through the same machine as those of PyTorch.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from embedder.checkpoint import Checkpoint, Tensor
from embedder.errors import MalformedError, TruncatedError, UnsupportedError
from embedder.readers.allowed import allowed
from embedder.readers.array_records import PLAIN_OF_CODE, PLAIN_OF_ML_DTYPE, counts, plain_tensor
from embedder.readers.nested import Named, named_tensors
from embedder.readers.pytorch import checkpoint_of
from embedder.readers.unpickling import Unpickler
from embedder.readers.views import Part
from embedder.readers.zipped import ZipArchive
from embedder.storage import OpenFile, Storage

_MAGIC = b"\x93NUMPY"
_LARGEST_HEADER_BYTES = 1 << 16
_DESCR = re.compile(r"""['"]descr['"]\s*:\s*(?:['"]([<>=|]?)(\w+)['"]|(\[))""")
_ORDER = re.compile(r"""['"]fortran_order['"]\s*:\s*(True|False)\b""")
_SHAPE = re.compile(
    r"""['"]shape['"]\s*:\s*\(\s*((?:\d{1,18}L?\s*(?:,\s*\d{1,18}L?\s*)*,?)?)\s*\)"""
)
_TEXT_KINDS = "USaOmMT"
"""numpy's letters for text, objects and times: no numbers, so no tensors."""


def open_npy(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open one array, or the dictionary of arrays in an array of objects.

    Raises:
        RefusedError: A pickle in it imports a name that is not allowed.
        MalformedError: The header is not what numpy writes.
        TruncatedError: The file ends before the array does.
        UnsupportedError: The array is of a type that we cannot decode.
    """
    file = OpenFile(path)
    try:
        found = _read_array(path, file, name="array", file_bytes=file.size_bytes)
    except BaseException:
        file.close()
        raise
    return checkpoint_of(path, "npy", found, on_close=file.close)


def open_npz(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open an archive of arrays; compressed ones are unpacked as they are read.

    Raises:
        RefusedError: The archive is a bomb, or a pickle in it imports a name that is not allowed.
        MalformedError: The archive or a header in it is damaged.
        TruncatedError: A member ends before its array does.
        UnsupportedError: No array in it can be decoded.
    """
    archive = ZipArchive(path)
    found = Named()
    try:
        for member in archive.members:
            name = member.removesuffix(".npy")
            try:
                one = _read_array(
                    path, archive.storage(member), name=name, file_bytes=archive.file.size_bytes
                )
            except UnsupportedError as error:
                found.limits.append(error.problem)
                continue
            found.tensors += one.tensors
            found.aliases |= one.aliases
            found.limits += one.limits
        if found.limits and not found.tensors:
            raise UnsupportedError(path, found.limits[0], "save the arrays as numbers")
    except BaseException:
        archive.close()
        raise
    return checkpoint_of(path, "npz", found, on_close=archive.close)


@dataclass(frozen=True, slots=True)
class _Header:
    """What the header of an array says."""

    order: str
    code: str
    fields: bool
    fortran: bool
    shape: tuple[int, ...]
    size_bytes: int


def _read_array(path: Path, source: Storage, *, name: str, file_bytes: int) -> Named:
    header = _read_header(path, source, name)
    if header.code == "O":
        machine = Unpickler(source, path, allowed=allowed, start=header.size_bytes)
        prefix = "" if name == "array" else name
        return named_tensors(path, machine.load(), file_bytes, prefix=prefix)
    if header.code[:1] in _TEXT_KINDS and not header.fields:
        return Named()
    found = Named()
    content = Part(source, header.size_bytes, source.size_bytes - header.size_bytes)
    tensor = _tensor(path, content, name, header, found.limits)
    found.tensors.append(tensor)
    rest = content.size_bytes - tensor.storage.size_bytes
    if rest:
        found.limits.append(f"{rest:,} bytes follow array {name!r} and were not read")
    return found


def _tensor(path: Path, content: Storage, name: str, header: _Header, limits: list[str]) -> Tensor:
    plain = PLAIN_OF_CODE.get(header.code) or PLAIN_OF_ML_DTYPE.get(header.code)
    if header.code == "V2":
        # numpy saves bfloat16, an extension type that it does not know, as two raw bytes.
        plain = "BF16"
        limits.append(f"array {name!r} is stored as raw bytes in pairs, read as bfloat16")
    if plain is None or header.fields:
        shown = "fields of several types" if header.fields else header.code
        raise UnsupportedError(path, f"array {name!r} is stored as {shown}, which we cannot decode")
    return plain_tensor(
        path,
        name,
        content,
        shape=header.shape,
        plain=plain,
        fortran=header.fortran,
        swapped=header.order == ">",
    )


def _read_header(path: Path, source: Storage, name: str) -> _Header:
    """Return the header of an array: magic, version, length, then a literal of three entries."""
    start = bytes(source.read(0, min(12, source.size_bytes)))
    if len(start) < 12:
        raise TruncatedError(
            path, f"TRUNCATED: array {name!r} ends in its header", "get the file again"
        )
    version = start[6]
    if start[:6] != _MAGIC or version not in (1, 2, 3):
        raise MalformedError(path, f"array {name!r} does not begin as numpy's arrays do")
    width = 2 if version == 1 else 4
    text_start = 8 + width
    size_bytes = text_start + int.from_bytes(start[8:text_start], "little")
    if size_bytes > _LARGEST_HEADER_BYTES:
        raise MalformedError(path, f"the header of array {name!r} has {size_bytes:,} bytes")
    if size_bytes > source.size_bytes:
        raise TruncatedError(
            path, f"TRUNCATED: array {name!r} ends in its header", "get the file again"
        )
    text = bytes(source.read(text_start, size_bytes)).decode("latin-1")
    descr, order, shape = _DESCR.search(text), _ORDER.search(text), _SHAPE.search(text)
    if descr is None or order is None or shape is None:
        raise MalformedError(path, f"the header of array {name!r} is not what numpy writes")
    sizes = [int(size) for size in re.findall(r"\d+", shape[1])]
    return _Header(
        order=descr[1] or "<",
        code=descr[2] or "",
        fields=descr[3] is not None,
        fortran=order[1] == "True",
        shape=counts(path, name, sizes),
        size_bytes=size_bytes,
    )
