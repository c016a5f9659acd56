"""Paddle parameter files: tensors one behind the other, without names.

Each tensor has a short header with its type and shape. Names, and what a tensor is for, are known
only from the program that lies beside the file. Where there is none, shapes have to do.
"""

import math
import struct
from pathlib import Path

import numpy as np

from embedder.checkpoint import Checkpoint, Tensor
from embedder.encoding import Affine, Encoding, Plain
from embedder.errors import MalformedError, TruncatedError, UnsupportedError
from embedder.readers.dataflow import Dataflow, Layout, Node, Role, Use, strongest, tensor_kind
from embedder.readers.paddle_program import (
    Program,
    Rules,
    dims_of,
    read_json,
    read_message,
    role_in,
)
from embedder.readers.protobuf import VARINT, fields
from embedder.readers.stored import check_shape, stored_tensor
from embedder.storage import OpenFile

_PLAIN = {
    0: "BOOL",
    1: "I16",
    2: "I32",
    3: "I64",
    4: "F16",
    5: "F32",
    6: "F64",
    19: "U64",
    20: "U8",
    21: "I8",
    22: "BF16",
    23: "C64",
    24: "C128",
    32: "F8_E4M3",
    33: "F8_E5M2",
}
"""Number of a type in the file → name of the plain encoding."""

_LARGEST_DESCRIPTION_BYTES = 1 << 16
_LARGEST_PROGRAM_BYTES = 1 << 26
_MOST_TENSORS = 1_000_000
_MOST_PROGRAMS = 4


def open_paddle(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open one Paddle parameter file, with the program beside it if there is one.

    Args:
        path: The file.
        allow_partial: Read the tensors that are there of a file cut short.

    Raises:
        MalformedError: The file breaks a rule of the format.
        TruncatedError: The file ends inside a tensor.
        UnsupportedError: A stored type that we do not know.
    """
    file = OpenFile(path)
    limits: list[str] = []
    try:
        tensors = _records(file, limits, allow_partial=allow_partial)
    except BaseException:
        file.close()
        raise
    program = _program_of(path, tensors, limits)
    if program is not None:
        names = dict(zip(sorted(program[1].parameters), tensors, strict=True))
        tensors = _told_by(program[1], names)
    return Checkpoint(
        location=str(path),
        format="paddle",
        tensors=tuple(tensors),
        files=(path,) if program is None else (path, program[0]),
        declared={} if program is None else {"program": program[0].name},
        limits=limits,
        open_files=[file],
    )


def _records(file: OpenFile, limits: list[str], *, allow_partial: bool) -> list[Tensor]:
    """Return the tensors of a file, with their numbers as names."""
    found: list[Tensor] = []
    place = 0
    while place < file.size_bytes:
        if len(found) >= _MOST_TENSORS:
            raise MalformedError(file.path, f"holds more than {_MOST_TENSORS:,} tensors")
        try:
            tensor, place = _record(file, place, f"tensor.{len(found)}")
        except TruncatedError as error:
            if not allow_partial or not found:
                raise
            limits.append(f"{error.problem}; {len(found)} tensors before it are read")
            break
        found.append(tensor)
    return found


def _record(file: OpenFile, place: int, name: str) -> tuple[Tensor, int]:
    """Return the tensor at a place and the place behind it."""
    version, levels = struct.unpack("<IQ", file.read(place, place + 12))
    if version != 0:
        raise MalformedError(
            file.path, f"{name} at byte {place:,} has the version {version:,}; 0 was expected"
        )
    place += 12
    if levels > _LARGEST_DESCRIPTION_BYTES:
        raise MalformedError(file.path, f"{name} has {levels:,} levels of sequences")
    for _ in range(levels):
        (size_bytes,) = struct.unpack("<Q", file.read(place, place + 8))
        file.part(place + 8, size_bytes, name)
        place += 8 + size_bytes
    version, size_bytes = struct.unpack("<Ii", file.read(place, place + 8))
    if version != 0 or not 0 <= size_bytes <= _LARGEST_DESCRIPTION_BYTES:
        raise MalformedError(
            file.path,
            f"{name} at byte {place:,} has a description of version {version:,} and "
            f"{size_bytes:,} bytes",
        )
    place += 8
    described = file.read(place, place + size_bytes)
    place += size_bytes
    shape, encoding = _described(file.path, name, described)
    size_bytes = math.prod(shape) * encoding.unit_bytes
    storage = file.part(place, size_bytes, name)
    tensor = stored_tensor(file.path, name, shape, encoding=encoding, storage=storage)
    return tensor, place + size_bytes


def _described(path: Path, name: str, described: bytes) -> tuple[tuple[int, ...], Encoding]:
    span = (0, len(described))
    kinds = [
        value
        for number, wire, value, _, _ in fields(described, span, path)
        if number == 1 and wire == VARINT
    ]
    shape = dims_of(described, span, path)
    check_shape(path, name, shape)
    if not kinds:
        raise MalformedError(path, f"{name} has no type")
    if kinds[-1] not in _PLAIN:
        raise UnsupportedError(path, f"{name} has the type number {kinds[-1]}, unknown to us")
    return shape, Plain(_PLAIN[kinds[-1]])


def _program_of(
    path: Path, tensors: list[Tensor], limits: list[str]
) -> tuple[Path, Program] | None:
    """Return the program beside a file whose parameters have just these shapes."""
    shapes = [tensor.shape for tensor in tensors]
    for candidate in _candidates(path):
        try:
            content = candidate.read_bytes()
            is_json = content.lstrip()[:1] == b"{"
            program = (read_json if is_json else read_message)(content, candidate)
        except (OSError, MalformedError) as error:
            limits.append(f"the program {candidate.name} cannot be read: {error}")
            continue
        wanted = [program.parameters[name] for name in sorted(program.parameters)]
        if wanted == shapes:
            return candidate, program
        limits.append(
            f"the program {candidate.name} has {len(wanted)} parameters whose shapes are not those "
            f"of the {len(shapes)} tensors here"
        )
    limits.append("no program lies beside it: tensors have no names and are told apart by shape")
    return None


def _candidates(path: Path) -> list[Path]:
    """Return files that may hold the program, the likeliest first."""
    folder = path.parent
    named = [path.with_suffix(".pdmodel"), path.with_suffix(".json"), folder / "__model__"]
    found = dict.fromkeys([*named, *sorted(folder.glob("*.pdmodel"))])
    return [
        file
        for file in found
        if file.is_file() and 0 < file.stat().st_size <= _LARGEST_PROGRAM_BYTES
    ][:_MOST_PROGRAMS]


def _told_by(program: Program, names: dict[str, Tensor]) -> list[Tensor]:
    """Return the tensors with the names, kinds and scales that a program tells."""
    flow = Dataflow()
    numbers: dict[str, int] = {}

    def number(name: str) -> int:
        if name not in numbers:
            numbers[name] = flow.new_value()
        return numbers[name]

    flow.constants.update(number(name) for name in names)
    for operation in program.operations:
        inputs = tuple(number(name) for name in operation.inputs)
        # An operation that writes over a parameter, as batch_norm does, makes no new value.
        outputs = tuple(number(name) for name in operation.outputs if name not in names)
        flow.add(Node(operation.op, inputs, outputs, operation))
    flow.find_static()
    rules = Rules()
    of_number = {numbers[name]: tensor for name, tensor in names.items()}
    made = []
    for name, tensor in names.items():
        uses = list(flow.uses(numbers[name], tensor.shape, rules))
        made.append(_made(name, tensor, uses, of_number))
    return made


def _made(name: str, tensor: Tensor, uses: list[Use], of_number: dict[int, Tensor]) -> Tensor:
    encoding = tensor.encoding
    for use in uses:
        if use.node.op == "dequantize_linear" and use.place == 0:
            encoding = _scaled(tensor, use, of_number) or encoding
    found: list[tuple[Role, Layout]] = []
    for use in uses:
        role = role_in(use.node, use.place, tensor.shape, use.layout) if use.last else None
        if role is not None:
            found.append((role, use.layout))
    kind, axes = tensor_kind(name, tensor.shape, encoding, strongest(found))
    return Tensor(name, tensor.shape, encoding, tensor.storage, kind, axes)


def _scaled(tensor: Tensor, use: Use, of_number: dict[int, Tensor]) -> Encoding | None:
    """Return the encoding with the scale of a dequantize_linear: value = stored · scale / most."""
    scale = of_number.get(use.node.inputs[1]) if len(use.node.inputs) > 1 else None
    attributes = use.node.source.attributes
    most = attributes.get("qmax") or (1 << int(attributes.get("bit_length") or 8) - 1) - 1
    axis = attributes.get("quant_axis", -1)
    if scale is None or scale.size > max(tensor.shape, default=1) or not isinstance(axis, int):
        return None
    if scale.size > 1 and not (0 <= axis < len(tensor.shape) and tensor.shape[axis] == scale.size):
        return None
    scales = scale.read().reshape(-1).astype(np.float32) / np.float32(most)
    zero = np.zeros(1, np.float32)
    return Affine(tensor.encoding.name, tensor.shape, scales, zero, max(axis, 0))
