"""What ONNX Runtime computes with a model as it is written, in one thread."""

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper


def outputs_of(
    model: onnx.ModelProto, feeds: Mapping[str, NDArray[np.generic]]
) -> list[NDArray[np.floating]]:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return list(session.run(None, feeds))


def with_weights(
    model: onnx.ModelProto, weights: Mapping[str, NDArray[np.floating]]
) -> onnx.ModelProto:
    """Return a model with other weights."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in weights:
            values = np.ascontiguousarray(weights[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return copy
