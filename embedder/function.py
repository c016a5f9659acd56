"""The function coder: an encoder and its heads in one file, and what they say of a network.

The encoder turns a weight graph into a code (`embedder.encoder`); heads read from the code alone
what was measured of networks like it. Both were trained together (`embedder.encoder_training`).
The file holds tensors and, as JSON, what they are part of; nothing in it is run, and a coder whose
hash is not the one that it was saved with is refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch_geometric.data import Data

from embedder.encoder import DIMENSION, Encoder, EncoderConfig
from embedder.encoder_input import batch_of
from embedder.errors import MalformedError, NotFoundError
from embedder.writing import write_encoder

FORMAT = "lineage/function-coder/1"
_ENTRY = "lineage"

PROPERTIES = (
    "test_accuracy",
    "gap",
    "fgsm_accuracy",
    "calibration_error",
    "worst_class_accuracy",
)
"""Labels of the zoo that heads predict, beside the task."""


class Measured(Protocol):
    """What is known of one network."""

    @property
    def values(self) -> tuple[float, ...]:
        """What was measured, in the order of `PROPERTIES`; NaN where it was not."""

    @property
    def task(self) -> str:
        """What it was trained on last."""


class Heads(nn.Module):
    """Predicts from codes what was measured, and knows how far to trust each prediction.

    Args:
        tasks: Names of the tasks that it can tell.
        means: (5,) of each property.
        spreads: (5,) standard deviations.
    """

    def __init__(self, tasks: Sequence[str], means: Tensor, spreads: Tensor) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.means, self.spreads = nn.Buffer(means), nn.Buffer(spreads)
        self.values = nn.Sequential(
            nn.Linear(DIMENSION, DIMENSION), nn.GELU(), nn.Linear(DIMENSION, len(PROPERTIES))
        )
        self.task = nn.Linear(DIMENSION, len(self.tasks))
        self.log_variance = nn.Parameter(torch.zeros(len(PROPERTIES) + 1))

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return properties in standard units, (models, 5), and a score for each task."""
        # A code of unit length has numbers of about 1/√128; layers start from numbers of about 1.
        wide = codes * DIMENSION**0.5
        return self.values(wide), self.task(wide)

    def loss(self, codes: Tensor, known: Sequence[Measured]) -> Tensor:
        """Return the loss of all heads, each over its learned variance."""
        values, scores = self(codes)
        measured = torch.tensor([one.values for one in known], dtype=torch.float32)
        there = torch.isfinite(measured)
        wanted = torch.where(there, (measured - self.means) / self.spreads, 0.0)
        error = nn.functional.mse_loss(values, wanted, reduction="none") * there
        each = error.sum(dim=0) / there.sum(dim=0).clamp(min=1)
        place = {task: number for number, task in enumerate(self.tasks)}
        wrong = nn.functional.cross_entropy(
            scores, torch.tensor([place[one.task] for one in known])
        )
        both = torch.cat([each / 2, wrong[None]])
        return (both * torch.exp(-self.log_variance) + self.log_variance / 2).sum()


class Told(NamedTuple):
    """What a coder says of some models.

    Args:
        codes: (models, 128) of unit length.
        values: (models, 5) properties, in their own units.
        tasks: The likeliest task of each.
    """

    codes: NDArray[np.float32]
    values: NDArray[np.float64]
    tasks: list[str]


@dataclass(frozen=True, eq=False)
class FunctionCoder:
    """An encoder and the heads that were trained with it."""

    encoder: Encoder
    heads: Heads

    @torch.no_grad()
    def tell(self, graphs: Sequence[Data], *, batch: int = 64) -> Told:
        """Return codes and predictions for some models."""
        codes, values, tasks = [], [], []
        heads = self.heads
        for start in range(0, len(graphs), batch):
            found = self.encoder(batch_of(graphs[start : start + batch])).codes
            standard, scores = heads(found)
            codes.append(found.numpy())
            values.append((standard * heads.spreads + heads.means).numpy().astype(np.float64))
            tasks += [heads.tasks[place] for place in scores.argmax(dim=1)]
        return Told(np.concatenate(codes), np.concatenate(values), tasks)

    @cached_property
    def version(self) -> str:
        """Names this coder: codes of different ones cannot be compared."""
        return _hash(self._made_of(), self._tensors())

    def save(self, path: Path) -> None:
        """Write the coder to a safetensors file; it is either whole or not there."""
        # One entry alone: safetensors writes several in any order, and bytes would differ.
        facts = {"format": FORMAT, "version": self.version, "made_of": self._made_of()}
        metadata = {_ENTRY: json.dumps(facts)}
        write_encoder(path, lambda beside: save_file(self._tensors(), beside, metadata=metadata))

    @classmethod
    def load(cls, path: Path) -> "FunctionCoder":
        """Read a coder that was saved; it is ready to tell.

        Raises:
            NotFoundError: There is no such file.
            MalformedError: It holds no coder, a damaged one, or one of another version of this
                program.
        """
        facts, tensors = _read(path)
        try:
            coder = _made(facts["made_of"], tensors)
        except (TypeError, KeyError, ValueError, RuntimeError) as error:
            raise MalformedError(path, "is an encoder of another version", _CURE) from error
        if not all(torch.isfinite(values).all() for values in tensors.values()):
            raise MalformedError(path, "holds values that are NaN or infinite", _CURE)
        if coder.version != facts.get("version"):
            raise MalformedError(path, "was changed after it was saved", _CURE)
        return coder

    def _made_of(self) -> dict[str, Any]:
        config = asdict(self.encoder.config)
        return {"encoder": config, "properties": PROPERTIES, "tasks": self.heads.tasks}

    def _tensors(self) -> dict[str, Tensor]:
        parts = {"encoder": self.encoder, "heads": self.heads}
        return {
            f"{part}.{name}": values.detach().contiguous()
            for part, module in parts.items()
            for name, values in module.state_dict().items()
        }


_CURE = "train it anew: lineage train encoder ZOO FILE --code function"


def _made(made_of: Any, tensors: Mapping[str, Tensor]) -> FunctionCoder:
    """Return a coder of these tensors, which must have the shapes that its configuration asks for.

    Raises:
        TypeError, KeyError, ValueError, RuntimeError: They have not.
    """
    config, tasks = made_of["encoder"], made_of["tasks"]
    if tuple(made_of["properties"]) != PROPERTIES or not all(isinstance(t, str) for t in tasks):
        raise ValueError("other properties, or tasks without names")
    if {values.dtype for values in tensors.values()} != {torch.float32}:
        raise ValueError("other numbers than float32")
    if config["rounds"] > len(tensors):
        raise ValueError("more rounds than tensors")
    with torch.device("meta"):  # shapes alone: nothing is allocated for a configuration that lies
        encoder = Encoder(EncoderConfig(**{**config, "levels": tuple(config["levels"])}))
        heads = Heads(tasks, *torch.empty(2, len(PROPERTIES)))
    for part, module in (("encoder.", encoder), ("heads.", heads)):
        own = {name[len(part) :]: v for name, v in tensors.items() if name.startswith(part)}
        module.load_state_dict(own, assign=True)
    coder = FunctionCoder(encoder.eval(), heads.eval())
    if set(coder._tensors()) != set(tensors):
        raise ValueError("tensors that belong to nothing")
    return coder


def _hash(made_of: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    state = blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=6)
    for name, values in sorted(tensors.items()):
        state.update(f"{name} {list(values.shape)}".encode() + values.numpy().tobytes())
    return state.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a coder's file says of itself, and its tensors."""
    if not path.exists():
        raise NotFoundError(path, "no such file")
    try:
        with safe_open(path, framework="pt") as file:
            entry = (file.metadata() or {}).get(_ENTRY, "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise MalformedError(path, f"holds no encoder: {error}") from error
    try:
        facts: Any = json.loads(entry)
    except json.JSONDecodeError as error:
        raise MalformedError(path, f"holds no encoder: {error}") from error
    found = str(facts.get("format", "")) if isinstance(facts, dict) else ""
    if found != FORMAT:
        if found.startswith(FORMAT.rpartition("/")[0] + "/"):
            problem = f"is an encoder of another version: {found}, not {FORMAT}"
            raise MalformedError(path, problem, _CURE)
        raise MalformedError(path, "holds no function encoder", _CURE)
    return facts, tensors


@lru_cache(maxsize=1)
def shipped_function_coder() -> FunctionCoder:
    """Return the coder in this package."""
    with as_file(files("embedder").joinpath("pretrained", "function.safetensors")) as path:
        return FunctionCoder.load(path)
