"""A fingerprint as bytes, for the catalogue and for export, and back.

The bytes are a safetensors file: five arrays and one JSON text in its metadata, so that other
tools can read it, and reading it runs no code.
"""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from embedder.checkpoint import Kind
from embedder.errors import MalformedError
from embedder.fingerprint import METHOD, Fingerprint, TensorPrint
from embedder.statistics import Summary

SCHEMA = "lineage/fingerprint/1"
_SCALARS = ("norm", "mean", "minimum", "maximum", "zeros", "not_finite", "skewness", "kurtosis")
_PROFILES = (("quantiles", 7), ("row_norms", 8), ("column_norms", 8))


def to_bytes(fingerprint: Fingerprint) -> bytes:
    """Return a fingerprint as bytes; `from_bytes` gives it back, equal to the last bit."""
    tensors = fingerprint.tensors
    head = {
        "schema": SCHEMA,
        "method": fingerprint.method,
        "format": fingerprint.format,
        "sha256": fingerprint.sha256,
        "size_bytes": fingerprint.size_bytes,
        "parameters": fingerprint.parameters,
        "adapter": fingerprint.adapter,
        "declared": fingerprint.declared,
        "limits": fingerprint.limits,
        "tensors": [_head_of(tensor) for tensor in tensors],
    }
    summaries = [tensor.summary for tensor in tensors]
    arrays: dict[str, NDArray[Any]] = {
        "scalars": np.array(
            [[float(getattr(found, name)) for name in _SCALARS] for found in summaries], np.float64
        ).reshape(len(tensors), len(_SCALARS)),
        "sketches": _joined([tensor.sketch for tensor in tensors]),
        "sample_sketches": _joined([tensor.sample_sketch for tensor in tensors]),
        "vector": fingerprint.vector,
    }
    for name, width in _PROFILES:
        rows = [getattr(found, name) for found in summaries]
        arrays[name] = np.array(rows, np.float32).reshape(len(tensors), width)
    return bytes(save(arrays, {"fingerprint": json.dumps(head, default=str)}))


def _head_of(tensor: TensorPrint) -> list[Any]:
    return [
        tensor.name.encode("utf-8", "backslashreplace").decode("utf-8"),
        tensor.shape,
        tensor.dtype,
        tensor.kind.value,
        tensor.quantised,
        tensor.constant,
        tensor.bits.hex(),
        tensor.values.hex(),
        tensor.narrow,
        tensor.summary.levels,
        tensor.sketch.size,
        tensor.sample_sketch.size,
    ]


def _joined(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate([np.zeros(0, np.float32), *parts])


def from_bytes(raw: bytes) -> Fingerprint:
    """Return the fingerprint that `to_bytes` wrote.

    Raises:
        MalformedError: The bytes are no fingerprint, or one of another method.
    """
    try:
        header_bytes = int.from_bytes(raw[:8], "little")
        head = json.loads(json.loads(raw[8 : 8 + header_bytes])["__metadata__"]["fingerprint"])
        arrays = load(raw)
        if head["method"] != METHOD:
            raise MalformedError(
                "fingerprint",
                f"made by method {head['method']}; this program uses method {METHOD}",
                "add the model again",
            )
        tensors = tuple(_prints(head["tensors"], arrays))
        return Fingerprint(
            format=head["format"],
            sha256=head["sha256"],
            size_bytes=head["size_bytes"],
            parameters=head["parameters"],
            tensors=tensors,
            vector=arrays["vector"],
            adapter=head["adapter"],
            declared=head["declared"],
            limits=tuple(head["limits"]),
            method=head["method"],
        )
    except (SafetensorError, KeyError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, MalformedError):
            raise
        raise MalformedError("fingerprint", f"not a fingerprint of ours ({error})") from error


def _prints(heads: list[list[Any]], arrays: dict[str, NDArray[Any]]) -> list[TensorPrint]:
    found = []
    at = sample_at = 0
    for place, head in enumerate(heads):
        scalars = dict(zip(_SCALARS, arrays["scalars"][place].tolist(), strict=True))
        summary = Summary(
            **{**scalars, "not_finite": int(scalars["not_finite"])},
            levels=head[9],
            **{name: arrays[name][place] for name, _ in _PROFILES},
        )
        found.append(
            TensorPrint(
                name=head[0],
                shape=tuple(head[1]),
                dtype=head[2],
                kind=Kind(head[3]),
                quantised=head[4],
                constant=head[5],
                bits=bytes.fromhex(head[6]),
                values=bytes.fromhex(head[7]),
                narrow=head[8],
                summary=summary,
                sketch=arrays["sketches"][at : at + head[10]],
                sample_sketch=arrays["sample_sketches"][sample_at : sample_at + head[11]],
            )
        )
        at += head[10]
        sample_at += head[11]
    return found
