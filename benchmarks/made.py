"""Files that the benchmarks make for themselves: random weights of a given shape."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

SPREAD = 0.02
"""Standard deviation of the weights, as transformers are started with."""

_VOCABULARY, _WIDTH, _HIDDEN, _LAYERS = 32_000, 2048, 7424, 14


def transformer_shapes() -> dict[str, tuple[int, ...]]:
    """Return the 129 tensors of a transformer of a billion parameters, by name."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _WIDTH)}
    for layer in range(_LAYERS):
        block = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{block}.self_attn.{name}.weight"] = (_WIDTH, _WIDTH)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{block}.mlp.{name}.weight"] = (_HIDDEN, _WIDTH)
        shapes[f"{block}.mlp.down_proj.weight"] = (_WIDTH, _HIDDEN)
        shapes[f"{block}.input_layernorm.weight"] = (_WIDTH,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (_WIDTH,)
    shapes["model.norm.weight"] = (_WIDTH,)
    shapes["lm_head.weight"] = (_VOCABULARY, _WIDTH)
    return shapes


def large_transformer(file: Path, seed: int) -> Path:
    """Write 2 GB of bfloat16 as safetensors, a tensor at a time; return the file."""
    rng = np.random.default_rng(seed)
    header: dict[str, object] = {}
    place = 0
    for name, shape in transformer_shapes().items():
        end = place + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for shape in transformer_shapes().values():
            values = gaussian(rng, shape).astype(ml_dtypes.bfloat16)
            out.write(values.tobytes())
    return file


def gaussian(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return normal weights of a shape."""
    return np.asarray(rng.standard_normal(shape, np.float32) * np.float32(SPREAD))


def trained_looking(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return weights with the heavier tails of training: no random start is drawn like that."""
    values = rng.standard_t(6, shape) * (SPREAD / np.sqrt(6 / 4))
    return np.asarray(values, np.float32)


def small_files(folder: Path, seed: int, count: int = 1000) -> int:
    """Write many networks of 100 kB as safetensors; return how many."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        weights = {
            "0.weight": gaussian(rng, (96, 96)),
            "0.bias": gaussian(rng, (96,)),
            "1.weight": gaussian(rng, (128, 96)),
            "1.bias": gaussian(rng, (128,)),
            "2.weight": gaussian(rng, (24, 128)),
            "2.bias": gaussian(rng, (24,)),
        }
        save_file(weights, folder / f"{number:04}.safetensors")
    return count


def two_millions(folder: Path, seed: int) -> tuple[Path, Path, Path]:
    """Write three networks of a million parameters: one, its child at drift .05, a stranger."""
    rng = np.random.default_rng(seed)
    shapes = {f"{layer}.weight": (256, 256) for layer in range(15)} | {"head.weight": (64, 256)}
    base, stranger = (
        {name: trained_looking(rng, shape) for name, shape in shapes.items()} for _ in range(2)
    )
    child = {name: values + 0.05 * gaussian(rng, values.shape) for name, values in base.items()}
    files = tuple(folder / f"{name}.safetensors" for name in ("base", "child", "stranger"))
    for file, weights in zip(files, (base, child, stranger), strict=True):
        save_file(weights, file)
    return files[0], files[1], files[2]


def external_onnx(folder: Path, seed: int, parts: int = 10) -> Path:
    """Write an ONNX model of 1 GB a part, whose data files are one file under several names."""
    import onnx  # 0.3 s, so only where it is used

    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shape, tensors = (4096, 4096), 16
    first = folder / "weights-0.bin"
    with first.open("wb") as out:
        for _ in range(tensors):
            out.write(gaussian(rng, shape).tobytes())
    size = 4 * shape[0] * shape[1]
    graph = onnx.GraphProto(name="made")
    for part in range(parts):
        if part:
            os.link(first, folder / f"weights-{part}.bin")
        for place in range(tensors):
            where = {"location": f"weights-{part}.bin", "offset": place * size, "length": size}
            tensor = graph.initializer.add(
                name=f"layer.{part}.{place}", data_type=onnx.TensorProto.FLOAT, dims=shape
            )
            _keep_outside(tensor, where)
    model = folder / "model.onnx"
    onnx.save(onnx.ModelProto(ir_version=8, graph=graph), model)
    return model


def _keep_outside(tensor: Any, where: Mapping[str, object]) -> None:
    tensor.data_location = 1  # EXTERNAL
    for key, value in where.items():
        tensor.external_data.add(key=key, value=str(value))


@dataclass(frozen=True, slots=True)
class TransformerShape:
    """Sizes of a made-up transformer with gated maps, as Llama's.

    Args:
        width: Units of the residual stream.
        hidden: Units of a gated map.
        layers: Number of blocks.
        vocabulary: Number of tokens.
        heads: Heads of an attention.
    """

    width: int
    hidden: int
    layers: int
    vocabulary: int
    heads: int

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return the matrices as ONNX multiplies by them, in × out."""
        shapes = {"table": (self.vocabulary, self.width)}
        for layer in range(self.layers):
            for name in ("query", "key", "value", "output"):
                shapes[f"{layer}.{name}"] = (self.width, self.width)
            for name in ("gate", "up"):
                shapes[f"{layer}.{name}"] = (self.width, self.hidden)
            shapes[f"{layer}.down"] = (self.hidden, self.width)
        shapes["head"] = (self.width, self.vocabulary)
        return shapes

    @property
    def parameters(self) -> int:
        """Values of all matrices."""
        return sum(rows * columns for rows, columns in self.matrices().values())


def bfloat16_file(file: Path, seed: int, size_bytes: int = 1 << 30) -> Path:
    """Write normal weights as bfloat16; return the file."""
    rng = np.random.default_rng(seed)
    with file.open("wb") as out:
        while out.tell() < size_bytes:
            out.write(gaussian(rng, (1 << 24,)).astype(ml_dtypes.bfloat16).tobytes())
    return file


def transformer_onnx(folder: Path, shape: TransformerShape, values: Path) -> Path:
    """Write a transformer as ONNX whose data files are one file under several names.

    Args:
        folder: Where it goes; on the disk of `values`.
        shape: Its sizes.
        values: bfloat16 values, as many as the largest matrix has, or more.
    """
    import onnx  # 0.3 s, so only where it is used

    folder.mkdir(parents=True)
    graph = onnx.helper.make_graph(_nodes(shape), "made", *_ends(), _small(shape))
    part, place, room = 0, 0, values.stat().st_size
    os.link(values, folder / "weights-0.bin")
    for name, dims in shape.matrices().items():
        size = 2 * dims[0] * dims[1]
        if place + size > room:
            part, place = part + 1, 0
            os.link(values, folder / f"weights-{part}.bin")
        tensor = graph.initializer.add(name=name, data_type=onnx.TensorProto.BFLOAT16, dims=dims)
        where = {"location": f"weights-{part}.bin", "offset": place, "length": size}
        _keep_outside(tensor, where)
        place += size
    opset = [onnx.helper.make_opsetid("", 21)]
    model = folder / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), model)
    return model


def _ends() -> tuple[list[Any], list[Any]]:
    """Return what a transformer's graph takes and gives."""
    from onnx import TensorProto, helper

    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"])
    scores = helper.make_tensor_value_info("scores", TensorProto.BFLOAT16, None)
    return [tokens], [scores]


def _small(shape: TransformerShape) -> list[Any]:
    """Return the tensors that lie in the graph itself."""
    from onnx import TensorProto, helper, numpy_helper

    kind, ones = TensorProto.BFLOAT16, [1.0] * shape.width
    gains = [f"{layer}.{name}" for layer in range(shape.layers) for name in ("first", "second")]
    made = [helper.make_tensor(f"{g}.gain", kind, (shape.width,), ones) for g in (*gains, "last")]
    apart = np.array([0, 0, shape.heads, shape.width // shape.heads], np.int64)
    together = np.array([0, 0, shape.width], np.int64)
    return [
        *made,
        numpy_helper.from_array(apart, "apart"),
        numpy_helper.from_array(together, "together"),
    ]


def _nodes(shape: TransformerShape) -> list[Any]:
    """Return the graph of a transformer, token by token into scores; positions play no part."""
    from onnx import helper

    made: list[Any] = []

    def add(op: str, inputs: str, output: str, **attributes: Any) -> str:
        made.append(helper.make_node(op, inputs.split(), [output], **attributes))
        return output

    stream = add("Gather", "table tokens", "stream")
    for layer in range(shape.layers):
        at = f"{layer}."
        read = add("LayerNormalization", f"{stream} {at}first.gain", f"{at}read", axis=-1)
        for role in ("query", "key", "value"):
            add("MatMul", f"{read} {at}{role}", f"{at}{role}.flat")
            add("Reshape", f"{at}{role}.flat apart", f"{at}{role}.apart")
            order = [0, 2, 3, 1] if role == "key" else [0, 2, 1, 3]
            add("Transpose", f"{at}{role}.apart", f"{at}{role}.heads", perm=order)
        add("MatMul", f"{at}query.heads {at}key.heads", f"{at}scores")
        add("Softmax", f"{at}scores", f"{at}shares", axis=-1)
        add("MatMul", f"{at}shares {at}value.heads", f"{at}seen.heads")
        add("Transpose", f"{at}seen.heads", f"{at}seen.apart", perm=[0, 2, 1, 3])
        add("Reshape", f"{at}seen.apart together", f"{at}seen")
        add("MatMul", f"{at}seen {at}output", f"{at}told")
        stream = add("Add", f"{stream} {at}told", f"{at}middle")
        read = add("LayerNormalization", f"{stream} {at}second.gain", f"{at}again", axis=-1)
        add("MatMul", f"{read} {at}gate", f"{at}gate.in")
        add("Sigmoid", f"{at}gate.in", f"{at}gate.open")
        add("Mul", f"{at}gate.in {at}gate.open", f"{at}gate.out")
        add("MatMul", f"{read} {at}up", f"{at}up.out")
        add("Mul", f"{at}gate.out {at}up.out", f"{at}units")
        add("MatMul", f"{at}units {at}down", f"{at}down.out")
        stream = add("Add", f"{stream} {at}down.out", f"{at}stream")
    add("LayerNormalization", f"{stream} last.gain", "normed", axis=-1)
    add("MatMul", "normed head", "scores")
    return made
