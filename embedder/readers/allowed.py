"""The names that a pickle may import, and what is built in their place.

Nothing on these lists is ever imported or called. A name of the first kind has a function of ours
in its place (`ARRAY_MAKERS`, `TENSOR_MAKERS`, `_BUILTINS`). A name of the second kind becomes a
`Bag`: its arguments and state under the label of its class. That is safe for any name whatever;
the lists are short all the same, because a name that no training framework writes is the mark of
a file that wants to run something, and such a file is refused.
"""

import re
from functools import partial
from typing import TypeGuard

from embedder.readers.array_records import ARRAY_MAKERS
from embedder.readers.tensor_records import TENSOR_MAKERS, TENSOR_NAMES
from embedder.readers.unpickling import Bag, Make, Table


def _dict(*args: object) -> Table:
    if args and isinstance(args[0], Table):
        return args[0]
    table = Table()
    if args and isinstance(args[0], list):
        # Python 2 passed a list of pairs. They are taken out of it: a list that is passed a
        # million times would otherwise be copied as often.
        table.pairs += [(pair[0], pair[1]) for pair in args[0] if _is_pair(pair)]
        args[0].clear()
    return table


def _is_pair(found: object) -> TypeGuard[list[object] | tuple[object, ...]]:
    return isinstance(found, list | tuple) and len(found) == 2


def _tuple(*args: object) -> object:
    return args[0] if args else ()


def _list(*args: object) -> object:
    # An empty one is appended to later; a full one is only ever looked at.
    return args[0] if args else []


def _reconstructor(*args: object) -> Bag:
    return Bag("object", args[1:])


_BUILTINS: dict[str, Make] = {
    "builtins.dict": _dict,
    "builtins.list": _list,
    "builtins.set": _list,
    "builtins.frozenset": _list,
    "builtins.tuple": _tuple,
    "collections.OrderedDict": _dict,
    "copyreg._reconstructor": _reconstructor,
}

_VALUES = frozenset(
    {f"builtins.{name}" for name in ("bool", "bytearray", "bytes", "complex", "float", "int")}
    | {f"builtins.{name}" for name in ("object", "range", "slice", "str")}
    | {"collections.Counter", "collections.defaultdict", "collections.deque"}
    | {"argparse.Namespace", "types.SimpleNamespace", "decimal.Decimal", "fractions.Fraction"}
    | {"datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta"}
    | {"datetime.timezone", "uuid.UUID", "functools.partial"}
    | {
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    }
    | {"pathlib.WindowsPath", "pathlib._local.WindowsPath"}
    | {f"numpy.{name}" for name in ("bool_", "float16", "float32", "float64", "int8", "int16")}
    | {f"numpy.{name}" for name in ("int32", "int64", "uint8", "uint16", "uint32", "uint64")}
    | {f"ml_dtypes.{name}" for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")}
    | {f"ml_dtypes.{name}" for name in ("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")}
    | {"ml_dtypes._ml_dtypes_ext.bfloat16"}
    # Activations, which configs hold as functions.
    | {f"torch.{name}" for name in ("relu", "sigmoid", "tanh")}
    | {f"torch._C._nn.{name}" for name in ("gelu", "silu", "leaky_relu")}
)
"""Plain values that lie beside the weights: settings, dates, paths, counters."""

_CLASSES = (
    # Modules, and the settings that trainers save beside a state dict. A module's weights are
    # in the state that its bag is given.
    "torch.nn.",
    "torch.optim.",
    "torch.ao.",
    "torch.quantization.",
    "torch.distributions.",
    "torch.amp.",
    "torch.cuda.amp.",
    "torch.utils.data.",
    "torchvision.",
    "torchaudio.",
    "torch_geometric.",
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
    "lightning_utilities.",
    "transformers.",
    "sentence_transformers.",
    "tokenizers.",
    "peft.",
    "accelerate.",
    "diffusers.",
    "timm.",
    "fairseq.",
    "fastai.",
    "mmcv.",
    "mmengine.",
    "detectron2.",
    "monai.",
    "nemo.",
    "speechbrain.",
    "apex.",
    "deepspeed.",
    "megatron.",
    "omegaconf.",
    "yacs.config.",
    "easydict.",
    "addict.",
    "ultralytics.",
    "e3nn.",
    "openff.",
    "numpy.random.",
    "numpy.dtypes.",
    "typing.",
    # TorchScript names the classes of its modules so; their code is in the archive and not read.
    "__torch__.",
)
"""Beginnings of module names whose classes become bags."""

_CLASS_NAME = re.compile(r"_*[A-Z]\w*|__\w+_ctor|__bit_generator_ctor")
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg", "UserDict": "collections"}


def allowed(path: str) -> Make | None:
    """Return what stands in for `module.name` in a pickle, or None if the file is refused.

    Example:
        >>> allowed("posix.system") is None
        True
        >>> allowed("pytorch_lightning.utilities.parsing.AttributeDict")(1).args
        (1,)
    """
    module, _, name = path.rpartition(".")
    path = f"{_PYTHON_2.get(module, module)}.{name}"
    for makers in (TENSOR_MAKERS, ARRAY_MAKERS, _BUILTINS):
        if path in makers:
            return makers[path]
    if path in _VALUES or path in TENSOR_NAMES:
        return partial(_bag, path)
    if path.startswith(_CLASSES) and (
        _CLASS_NAME.fullmatch(name) or path.startswith(("torch.nn.functional.", "__torch__."))
    ):
        return partial(_bag, path)
    return None


def _bag(path: str, *args: object) -> Bag:
    return Bag(path, args)
