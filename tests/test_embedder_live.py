"""Models that live in memory.

Keras and Flax are not installed where the tests run; small stand-ins have the attributes that we
rely on.
"""

from collections import namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from embedder.checkpoint import Kind
from embedder.errors import CheckpointError, EmptyModelError, UnsupportedError
from embedder.live import open_live


def test_a_torch_module_gives_its_state_dict() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 5), torch.nn.BatchNorm2d(3))
    checkpoint = open_live(model, "mine")
    assert checkpoint.location == "mine"
    assert [tensor.name for tensor in checkpoint.tensors] == list(model.state_dict())
    for tensor in checkpoint.tensors:
        np.testing.assert_array_equal(tensor.read(), model.state_dict()[tensor.name].numpy())


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool],
)
def test_every_torch_type_gives_its_values(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, 2.0], [0.0, 8.0]]).to(dtype)
    (tensor,) = open_live({"x": values}).tensors
    np.testing.assert_array_equal(tensor.read(), values.to(torch.float64).numpy())


def test_weights_on_the_cpu_are_not_copied() -> None:
    model = torch.nn.Linear(3, 2)
    checkpoint = open_live(model)
    with torch.no_grad():
        model.weight.fill_(7)
    np.testing.assert_array_equal(checkpoint.tensors[0].read(), np.full((2, 3), 7))


def test_views_and_conjugates_are_written_out() -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    views = {"t": base.t(), "s": base[:, ::2], "e": torch.ones(3).expand(2, 3), "0": base[:0]}
    turned = torch.tensor([3 + 4j]).conj()
    found = {tensor.name: tensor.read() for tensor in open_live({**views, "c": turned}).tensors}
    for name, values in views.items():
        np.testing.assert_array_equal(found[name], values.numpy())
    np.testing.assert_array_equal(found["c"], [5])


def test_tied_weights_are_counted_once() -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 4), "head": torch.nn.Linear(4, 5)})
    model["head"].weight = model["embed"].weight
    checkpoint = open_live(model)
    assert checkpoint.parameters == 25
    assert checkpoint.aliases == {"head.weight": "embed.weight"}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_tensors_keep_their_scales() -> None:
    values = torch.randn(3, 4)
    made = {
        "t": torch.quantize_per_tensor(values, 0.05, 3, torch.qint8),
        "c": torch.quantize_per_channel(
            values, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2]), 0, torch.quint8
        ),
    }
    for tensor in open_live(made).tensors:
        wanted = made[tensor.name].dequantize().numpy()
        np.testing.assert_allclose(tensor.read(), wanted, rtol=1e-6)


def test_sparse_and_meta_tensors_are_named() -> None:
    with pytest.raises(UnsupportedError, match=r"w is a torch\.sparse_coo tensor"):
        open_live({"w": torch.eye(2).to_sparse()})
    with pytest.raises(UnsupportedError, match="on meta"):
        open_live(torch.nn.Linear(2, 2, device="meta"))


class Config:
    def to_dict(self) -> dict[str, Any]:
        return {"model_type": "bert"}


def test_the_config_of_a_transformers_model_is_declared() -> None:
    model = torch.nn.Linear(2, 2)
    model.config = Config()  # type: ignore[assignment]
    declared = open_live(model).declared
    assert declared == {"class": "torch.nn.modules.linear.Linear", "config": {"model_type": "bert"}}


@dataclass
class KerasVariable:
    path: str
    value: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> str:
        return str(self.value.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.value


@dataclass
class KerasModel:
    weights: list[KerasVariable] = field(default_factory=list)


def test_a_keras_model_is_turned_to_out_in_space() -> None:
    rng = np.random.default_rng(1)
    dense, conv = rng.normal(size=(4, 5)), rng.normal(size=(3, 2, 4, 6))
    table = rng.normal(size=(9, 4))
    model = KerasModel(
        [
            KerasVariable("net/dense/kernel", dense),
            KerasVariable("net/dense/bias", np.zeros(5)),
            KerasVariable("net/conv2d/kernel", conv),
            KerasVariable("net/embedding/embeddings", table),
            KerasVariable("net/batch_normalization/moving_mean", np.zeros(5)),
        ]
    )
    checkpoint = open_live(model)
    assert checkpoint.format == "live keras"
    found = {tensor.name: tensor for tensor in checkpoint.tensors}
    np.testing.assert_array_equal(found["net/dense/kernel"].canonical(), dense.T)
    np.testing.assert_array_equal(
        found["net/conv2d/kernel"].canonical(), conv.transpose(3, 2, 0, 1)
    )
    np.testing.assert_array_equal(found["net/embedding/embeddings"].canonical(), table)
    assert found["net/dense/bias"].kind is Kind.BIAS
    assert found["net/batch_normalization/moving_mean"].kind is Kind.STATISTIC


@dataclass
class TrainState:
    params: Any
    opt_state: Any


def test_flax_parameters_are_turned_to_out_in_space() -> None:
    kernel = np.random.default_rng(1).normal(size=(4, 5)).astype(ml_dtypes.bfloat16)
    params = MappingProxyType({"Dense_0": {"kernel": kernel, "bias": np.zeros(5, np.float32)}})
    for model in (params, TrainState(params, {"mu": params})):
        found = {tensor.name: tensor for tensor in open_live(model).tensors}
        assert set(found) == {"Dense_0.kernel", "Dense_0.bias"}
        np.testing.assert_array_equal(
            found["Dense_0.kernel"].canonical(), kernel.T.astype(np.float32)
        )


Pair = namedtuple("Pair", ["first", "second"])


def test_containers_of_all_kinds_are_walked() -> None:
    one = np.ones((2, 2), np.float32)
    model = {"list": [one, one + 1], "named": Pair(one + 2, {"x": one + 3}), "text": "no", "n": 5}
    assert [tensor.name for tensor in open_live(model).tensors] == [
        "list.0",
        "list.1",
        "named.first",
        "named.second.x",
    ]


def test_an_optimisers_state_is_no_parameter() -> None:
    one = np.ones((2, 2), np.float32)
    checkpoint = open_live({"model": {"w": one}, "optimizer": {"w": {"mu": one + 1}}})
    assert checkpoint.parameters == 4
    assert checkpoint.tensors[1].kind is Kind.OPTIMISER


def test_text_is_no_tensor_and_nothing_at_all_is_empty() -> None:
    with pytest.raises(EmptyModelError, match="no arrays in this dict"):
        open_live({"names": np.array(["a"])})
    with pytest.raises(EmptyModelError, match="no arrays in this object"):
        open_live(object())


def test_a_mapping_that_holds_itself_is_named() -> None:
    model: dict[str, Any] = {}
    model["me"] = model
    with pytest.raises(CheckpointError, match="nested deeper than 100 levels"):
        open_live(model)
