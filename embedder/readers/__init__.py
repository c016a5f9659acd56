"""One file per format, behind one table.

Every reader is a function `open_…(path, *, allow_partial) -> Checkpoint`. The table below says
which module has it; a module is imported when its format is met, so a format whose package is
not installed costs nothing until then. `embedder.sniff` decides by content which line applies.
"""

from collections.abc import Callable
from importlib import import_module
from typing import cast

from embedder.checkpoint import Checkpoint

Reader = Callable[..., Checkpoint]

READERS: dict[str, str] = {
    # folders, as `embedder.discovery.folder_kind` names them
    "huggingface": "embedder.readers.huggingface:open_huggingface",
    "sharded": "embedder.readers.sharded:open_sharded",
    "peft": "embedder.readers.peft:open_peft",
    "saved-model": "embedder.readers.tensorflow:open_saved_model",
    # files, as `embedder.sniff` names them
    "safetensors": "embedder.readers.safetensors:open_safetensors",
    "pytorch": "embedder.readers.pytorch:open_pytorch",
    "pytorch-legacy": "embedder.readers.pytorch:open_pytorch_legacy",
    "pickle": "embedder.readers.pickled:open_pickle",
    "gguf": "embedder.readers.gguf:open_gguf",
    "onnx": "embedder.readers.onnx:open_onnx",
    "tflite": "embedder.readers.tflite:open_tflite",
    "hdf5": "embedder.readers.hdf5:open_hdf5",
    "keras": "embedder.readers.hdf5:open_keras",
    "tensorflow-index": "embedder.readers.tensorflow:open_variables",
    "tfjs": "embedder.readers.tfjs:open_tfjs",
    "flax": "embedder.readers.flax:open_flax",
    "thinc": "embedder.readers.thinc:open_thinc",
    "npy": "embedder.readers.npy:open_npy",
    "npz": "embedder.readers.npy:open_npz",
    "paddle": "embedder.readers.paddle:open_paddle",
    "ctranslate2": "embedder.readers.ctranslate2:open_ctranslate2",
    "zip": "embedder.readers.archive:open_archive",
}
"""Format → `module:function`."""

EXTRAS: dict[str, tuple[str, ...]] = {
    "gguf": ("gguf",),
    "onnx": ("onnx",),
    "tflite": ("tflite",),
    "hdf5": ("h5py",),
    "keras": ("h5py",),
}
"""Format → packages of the extra `formats` that it needs."""


def reader_of(kind: str) -> Reader:
    """Return the reader of a format, importing its module."""
    module, _, function = READERS[kind].partition(":")
    return cast("Reader", getattr(import_module(module), function))
