"""Files that the benchmarks make for themselves: random weights of a given shape."""

import json
import os
from collections.abc import Mapping
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
