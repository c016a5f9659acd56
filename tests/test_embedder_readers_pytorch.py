"""PyTorch zip archives, TorchScript, and legacy files."""

import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedder.checkpoint import Checkpoint, Kind, Tensor
from embedder.errors import (
    MalformedError,
    RefusedError,
    TruncatedError,
    UnsupportedError,
)
from embedder.opening import open_checkpoint
from hostile import Evil, claim_to_unpack_to
from reader_contract import ReaderContract, Weights, assembled


def save(path: Path, content: object, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def state_dict(weights: Weights) -> "OrderedDict[str, torch.Tensor]":
    return OrderedDict((name, torch.from_numpy(values)) for name, values in weights.items())


def by_name(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in checkpoint.tensors}


class TestPytorch(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        return save(folder / "model.pt", {"model_state_dict": state_dict(weights), "epoch": 3})


class TestPytorchLegacy(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        return save(folder / "model.pth", state_dict(weights), legacy=True)


class Holder(torch.nn.Module):
    def __init__(self, weights: Weights) -> None:
        super().__init__()
        for name, values in weights.items():
            self.register_parameter(name, torch.nn.Parameter(torch.from_numpy(values.copy())))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class TestTorchScript(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        path = folder / "model.jit"
        torch.jit.script(Holder(weights)).save(str(path))  # type: ignore[no-untyped-call]
        return path


class TestCompressedArchive(ReaderContract):
    """torch never compresses, but some tools pack its archives again."""

    def write(self, folder: Path, weights: Weights) -> Path:
        plain = save(folder / "plain.pt", state_dict(weights))
        packed = repack(plain, folder / "packed.pt", compression=zipfile.ZIP_DEFLATED)
        plain.unlink()
        return packed


def repack(
    source: Path,
    target: Path,
    *,
    replaced: dict[str, bytes] | None = None,
    dropped: Iterable[str] = (),
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Write an archive again with members (named by their ends) replaced or left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            last = name.partition("/")[2]
            if last not in dropped:
                new.writestr(name, (replaced or {}).get(last, old.read(name)))
    return target


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_checkpoint_is_refused_by_name_and_runs_nothing(
    tmp_path: Path, legacy: bool
) -> None:
    marker = tmp_path / "ran"
    path = save(tmp_path / "x", {"w": torch.ones(2, 2), "x": Evil(marker)}, legacy=legacy)
    with pytest.raises(RefusedError, match=r"imports posix\.system, .* nothing was executed"):
        open_checkpoint(path)
    assert not marker.exists()


def test_a_model_saved_whole_with_a_class_of_its_own_is_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path / "x", Holder({"dense": np.ones((2, 2), np.float32)}))
    with pytest.raises(RefusedError, match=r"imports test_embedder_readers_pytorch\.Holder"):
        open_checkpoint(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_model_saved_whole_has_the_names_of_its_state_dict(tmp_path: Path, legacy: bool) -> None:
    inner = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    model = torch.nn.Sequential(inner, torch.nn.LSTM(4, 2))
    with open_checkpoint(save(tmp_path / "x", model, legacy=legacy)) as checkpoint:
        found = by_name(checkpoint)
        # An LSTM also lists its weights in `_flat_weights`: aliases.
        assert set(model.state_dict()) == set(found)
        for name, values in model.state_dict().items():
            np.testing.assert_array_equal(found[name].canonical(), values.numpy())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float64, "F64"),
        (torch.float16, "F16"),
        (torch.bfloat16, "BF16"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int64, "I64"),
        (torch.int8, "I8"),
        (torch.uint16, "U16"),
        (torch.bool, "BOOL"),
    ],
)
def test_every_type_gives_its_values(
    tmp_path: Path, dtype: torch.dtype, name: str, legacy: bool
) -> None:
    values = torch.tensor([[1.5, 2.0, 0.0], [0.25, 3.0, 8.0]]).to(dtype)
    content = {"x": values, "w": torch.ones(2, 2)}
    with open_checkpoint(save(tmp_path / "x", content, legacy=legacy)) as checkpoint:
        tensor = by_name(checkpoint)["x"]
        assert tensor.encoding.name == name
        assert tensor.kind is (Kind.WEIGHT if dtype.is_floating_point else Kind.BUFFER)
        np.testing.assert_array_equal(tensor.read(), values.to(torch.float64).numpy())


@pytest.mark.parametrize("legacy", [False, True])
def test_views_of_a_storage_give_their_own_values(tmp_path: Path, legacy: bool) -> None:
    base = torch.arange(120, dtype=torch.float32)
    cube = base.reshape(4, 5, 6)
    views = {
        "row": base[7:19].reshape(3, 4),
        "transposed": cube[0].t(),
        "permuted": cube.permute(2, 0, 1),
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "columns": cube[1][:, 1:4],
        "every second": cube[:, ::2, ::3].transpose(0, 1),
        "expanded": torch.arange(3.0).expand(4, 3),
        "flipped sizes": cube[:1, :, :1].transpose(0, 2),
        "scalar": base[11],
        "empty": cube[:, :0],
    }
    with open_checkpoint(save(tmp_path / "x", views, legacy=legacy)) as checkpoint:
        found = by_name(checkpoint)
        assert set(found) == set(views)
        for name, values in views.items():
            np.testing.assert_array_equal(found[name].canonical(), values.numpy(), err_msg=name)
            for most in (1, 7, 1000):
                np.testing.assert_array_equal(assembled(found[name], most), found[name].read())
    assert found["transposed"].axes == (1, 0)
    assert found["transposed"].shape == (5, 6)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_every_pickle_protocol_is_read(tmp_path: Path, protocol: int, legacy: bool) -> None:
    torch.save(
        {"w": torch.ones(3, 4)},
        tmp_path / "x",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=not legacy,
    )
    with open_checkpoint(tmp_path / "x") as checkpoint:
        assert checkpoint.parameters == 12
        assert checkpoint.format == ("pytorch-legacy" if legacy else "pytorch")


def test_a_tensor_saved_alone_is_read(tmp_path: Path) -> None:
    with open_checkpoint(save(tmp_path / "x", torch.ones(3, 4))) as checkpoint:
        assert [tensor.name for tensor in checkpoint.tensors] == ["tensor"]


def test_tied_tensors_are_counted_once(tmp_path: Path) -> None:
    embedding = torch.randn(10, 4)
    content = {
        "embed": embedding,
        "head": embedding,
        "decoder": embedding.t(),
        "part": embedding[1:],
    }
    with open_checkpoint(save(tmp_path / "x", content)) as checkpoint:
        assert [tensor.name for tensor in checkpoint.tensors] == ["embed", "part"]
        assert checkpoint.aliases == {"head": "embed", "decoder": "embed"}


@pytest.mark.parametrize("legacy", [False, True])
def test_the_optimisers_state_is_no_parameter(tmp_path: Path, legacy: bool) -> None:
    model = torch.nn.Linear(5, 3)
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimiser.step()
    for key in ("optimizer_state_dict", "optimizer", "optimizer_states", "opt", "anything"):
        content = {"net": model.state_dict(), key: optimiser.state_dict(), "epoch": 1}
        with open_checkpoint(save(tmp_path / "x", content, legacy=legacy)) as checkpoint:
            assert checkpoint.parameters == 18
            state = {t.name for t in checkpoint.tensors if t.kind is Kind.OPTIMISER}
            assert {f"{key}.state.0.exp_avg", f"{key}.state.1.exp_avg_sq"} <= state
            assert not any(name.startswith("net") for name in state)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_trainers_save_beside_the_weights_is_passed_over(tmp_path: Path, legacy: bool) -> None:
    import argparse
    import datetime

    content = {
        "state_dict": {"w": torch.ones(2, 3)},
        "hyper_parameters": argparse.Namespace(lr=0.1, path=Path("/x"), dtype=torch.float16),
        "scores": {np.float32(0.5), 1.0},
        "when": datetime.datetime(2024, 1, 1),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "rng": np.random.default_rng(1).bit_generator.state,
    }
    with open_checkpoint(save(tmp_path / "x", content, legacy=legacy)) as checkpoint:
        assert checkpoint.parameters == 6
        assert checkpoint.limits == []


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_tensors_are_decoded_with_their_scales(tmp_path: Path) -> None:
    values = torch.randn(4, 6)
    scales, zeros = torch.rand(6) + 0.1, torch.arange(6)
    made: dict[str, Any] = {
        "tensor": torch.quantize_per_tensor(values, 0.05, 3, torch.qint8),
        "unsigned": torch.quantize_per_tensor(values, 0.05, 100, torch.quint8),
        "wide": torch.quantize_per_tensor(values, 1e-5, 0, torch.qint32),
        "channel": torch.quantize_per_channel(values, scales, zeros, 1, torch.qint8),
        "turned": torch.quantize_per_tensor(values, 0.05, 3, torch.qint8).t(),
        "packed": torch.quantize_per_channel(
            values, scales[:4], zeros[:4] + 0.5, 0, torch.quint4x2
        ),
    }
    with open_checkpoint(save(tmp_path / "x", made)) as checkpoint:
        found = by_name(checkpoint)
        assert checkpoint.parameters == 6 * 24
        for name, tensor in made.items():
            wanted = tensor.dequantize().numpy()
            np.testing.assert_allclose(found[name].canonical(), wanted, rtol=1e-6, err_msg=name)
            assert found[name].encoding.quantised


def test_kinds_of_tensors_that_are_not_read_are_named(tmp_path: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    path = save(tmp_path / "x", {"w": torch.ones(2, 2), "s": sparse})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.limits == ["tensor 's' is a sparse tensor, which is not read yet"]
    with pytest.raises(UnsupportedError, match="'s' is a sparse tensor"):
        open_checkpoint(save(tmp_path / "x", {"s": sparse}))


def test_a_big_endian_file_gives_the_same_values(tmp_path: Path) -> None:
    values = torch.randn(3, 5)
    path = save(tmp_path / "x.pt", {"w": values, "c": values.to(torch.complex64)})
    big = repack(
        path,
        tmp_path / "big.pt",
        replaced={
            "byteorder": b"big",
            "data/0": values.numpy().astype(">f4").tobytes(),
            "data/1": values.numpy().astype(">c8").tobytes(),
        },
    )
    with open_checkpoint(big) as checkpoint:
        np.testing.assert_array_equal(by_name(checkpoint)["w"].read(), values.numpy())
        np.testing.assert_array_equal(by_name(checkpoint)["c"].read(), values.abs().numpy())


def test_a_frozen_script_keeps_its_weights_in_its_constants(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).eval()
    frozen = torch.jit.freeze(torch.jit.script(model))
    frozen.save(str(tmp_path / "x.jit"))
    with open_checkpoint(tmp_path / "x.jit") as checkpoint:
        assert checkpoint.format == "torchscript"
        assert checkpoint.parameters == sum(p.numel() for p in model.parameters())


def test_a_storage_that_is_missing_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"w": torch.ones(2, 2)})
    with pytest.raises(MalformedError, match="no member 'x/data/0'"):
        open_checkpoint(repack(path, tmp_path / "y.pt", dropped=["data/0"]))


def test_a_storage_that_is_too_short_is_truncated(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"w": torch.ones(2, 2)})
    short = repack(path, tmp_path / "y.pt", replaced={"data/0": bytes(15)})
    with pytest.raises(TruncatedError, match=r"'w' of shape .* reaches value 4 of .* 15 bytes"):
        open_checkpoint(short)


def hostile(folder: Path, size: tuple[int, ...], stride: tuple[int, ...]) -> Path:
    """Write a checkpoint of one stored value whose tensor claims another size and stride."""
    path = save(folder / "x.pt", {"w": torch.ones(1)})
    with zipfile.ZipFile(path) as archive:
        program = archive.read("x/data.pkl")
    honest = b"K\x01\x85q\x08K\x01\x85q\x09"
    assert honest in program
    claimed = pickle.dumps(size, 2)[2:-1] + pickle.dumps(stride, 2)[2:-1]
    replaced = {"data.pkl": program.replace(honest, claimed)}
    return repack(path, folder / "y.pt", replaced=replaced)


def test_a_shape_of_a_quintillion_elements_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match="'w' has a shape that no array can have"):
        open_checkpoint(hostile(tmp_path, (10**9, 10**9), (10**9, 1)))
    with pytest.raises(TruncatedError, match="reaches value 1,000,000,000,000"):
        open_checkpoint(hostile(tmp_path, (10**6, 10**6), (10**6, 1)))


def test_a_tensor_that_repeats_one_value_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="repeats a storage of 4 bytes beyond all measure"):
        open_checkpoint(hostile(tmp_path, (10**6, 10**6), (0, 0)))


@pytest.mark.parametrize(
    ("size", "stride"), [((-1,), (1,)), ((1, 1), (1,)), ((1,) * 70, (1,) * 70), ((True,), (1,))]
)
def test_sizes_that_are_no_counts_are_malformed(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    with pytest.raises(MalformedError):
        open_checkpoint(hostile(tmp_path, size, stride))


def test_an_archive_bomb_is_refused_from_its_directory(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"w": torch.ones(2, 2)})
    claim_to_unpack_to(path, 2_000_000_000)
    with pytest.raises(RefusedError, match=r"would unpack to 2,000,\d+,\d+: an archive bomb"):
        open_checkpoint(path)


def test_reading_in_blocks_does_not_hold_the_model(tmp_path: Path) -> None:
    content = {f"layer.{place}": torch.zeros(500, 1000) for place in range(10)}
    path = save(tmp_path / "x.pt", content)
    open_checkpoint(path).close()  # imports what it needs
    tracemalloc.start()
    try:
        with open_checkpoint(path) as checkpoint:
            count = sum(b.values.size for t in checkpoint.tensors for b in t.blocks(10_000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 5_000_000
    assert peak < 3_000_000  # of 20,000,000 bytes
