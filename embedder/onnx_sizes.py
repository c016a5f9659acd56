"""The sizes of all values in an ONNX graph, as far as they can be inferred."""

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from embedder.onnx_values import GraphValues, parts_of

if TYPE_CHECKING:
    from onnx import ModelProto

_HIDDEN = "not.inferred"

FREE = (11, 29)
"""Where the primes begin that stand for sizes which a graph leaves free, as that of a batch: what
holds for two such choices does not hang on either. Tables of 77 positions are long enough."""


def with_sizes(model: "ModelProto", *, free: int | None = None) -> "ModelProto":
    """Return a model with the sizes of its values, as far as they can be inferred.

    Bodies of functions are left out, and so are slices that may run backwards: where such a one
    meets an axis without places, the inference of sizes ends the whole process.

    Args:
        model: Any.
        free: Sizes that the graph leaves free are primes from here on. Merged axes are followed
            better so, but a graph may not work for such sizes; then some values have none.
    """
    from onnx import ModelProto, shape_inference

    work = ModelProto()
    work.CopyFrom(model)
    del work.functions[:]
    if free is not None:
        _choose_sizes(work, free)
    facts = GraphValues(work.graph)
    nodes = [node for part in parts_of(work.graph) for node in part.node]
    for node in nodes:
        if node.op_type == "Slice" and not facts.runs_forward(node):
            node.domain = _HIDDEN
    with suppress(shape_inference.InferenceError):  # unknown sizes keep units where they are
        work = shape_inference.infer_shapes(work, data_prop=True)
    for part in parts_of(work.graph):
        for node in part.node:
            node.domain = node.domain.replace(_HIDDEN, "")
    return work


def _choose_sizes(model: "ModelProto", first: int) -> None:
    """Give each free size of the inputs a prime of its own; what follows from it is forgotten."""
    sizes, chosen = _primes(first), dict[str, int]()
    for info in model.graph.input:
        for place, size in enumerate(info.type.tensor_type.shape.dim):
            if not size.HasField("dim_value"):
                name = size.dim_param or f"{info.name} {place}"
                if name not in chosen:
                    chosen[name] = next(sizes)
                size.dim_value = chosen[name]
    for part in parts_of(model.graph):
        del part.value_info[:]
        for info in part.output:
            info.type.tensor_type.ClearField("shape")


def _primes(first: int) -> Iterator[int]:
    """Yield all primes from a number on."""
    number = first
    while True:
        if all(number % smaller for smaller in range(2, number)):
            yield number
        number += 1
