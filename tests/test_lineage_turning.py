"""Rotated streams and heads in another basis are turned back, and nothing else is."""

from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (numpy then knows bfloat16)
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from command import answer_of
from embedder.architecture import Architecture, Builder, Op
from embedder.describing import describe
from embedder.opening import open_checkpoint
from embedder.rotation import rotated, with_bases
from embedder.symmetry import disguised
from lineage.aligning import align, insides_of
from lineage.turning import turned_back
from lineage.verdict import Relation

Weights = dict[str, NDArray[np.float32]]
Change = Callable[[Weights, Architecture, np.random.Generator], Mapping[str, NDArray[np.floating]]]

WORDS, WIDE, HEADS, KEYS, CHANNELS, UNITS = 300, 256, 4, 2, 64, 512


def llama(seed: int, *, tails: float = 0.5) -> Weights:
    """Return a language model of two blocks as Hugging Face names it, with heavy tails."""
    rng = np.random.default_rng(seed)

    def drawn(*shape: int) -> NDArray[np.float32]:
        values = rng.normal(size=shape) * np.exp(rng.normal(0, tails, shape))
        return np.asarray(values / np.sqrt(shape[-1]), np.float32)

    found = {"model.embed_tokens.weight": drawn(WORDS, WIDE), "lm_head.weight": drawn(WORDS, WIDE)}
    gains = ["model.norm"]
    for layer in range(2):
        block = f"model.layers.{layer}"
        rows = {"q": HEADS * CHANNELS, "k": KEYS * CHANNELS, "v": KEYS * CHANNELS}
        for role, count in rows.items():
            found[f"{block}.self_attn.{role}_proj.weight"] = drawn(count, WIDE)
        found[f"{block}.self_attn.o_proj.weight"] = drawn(WIDE, HEADS * CHANNELS)
        for role in ("gate", "up"):
            found[f"{block}.mlp.{role}_proj.weight"] = drawn(UNITS, WIDE)
        found[f"{block}.mlp.down_proj.weight"] = drawn(WIDE, UNITS)
        gains += [f"{block}.input_layernorm", f"{block}.post_attention_layernorm"]
    for name in gains:
        found[f"{name}.weight"] = np.exp(rng.normal(0, 0.4, WIDE)).astype(np.float32)
    return found


def trained(weights: Weights, drift: float) -> Weights:
    """Return weights whose matrices have moved."""
    rng = np.random.default_rng(1)
    return {
        name: (w + drift * w.std() * rng.normal(size=w.shape) * (w.ndim > 1)).astype(np.float32)
        for name, w in weights.items()
    }


def saved(weights: Mapping[str, NDArray[np.floating]], path: Path, dtype: str = "float32") -> Path:
    save_file({name: np.ascontiguousarray(w, dtype) for name, w in weights.items()}, path)
    return path


def turned_and_disguised(
    weights: Weights, architecture: Architecture, rng: np.random.Generator
) -> Mapping[str, NDArray[np.floating]]:
    return disguised(rotated(weights, architecture, rng), architecture, rng)


def heads_alone(
    weights: Weights, architecture: Architecture, rng: np.random.Generator
) -> Mapping[str, NDArray[np.floating]]:
    """Return the weights with values and outputs alone turned, as quantisers do."""
    changed: Mapping[str, NDArray[np.floating]] = weights
    for step in architecture.steps:
        if step.op is Op.ATTENTION:
            heads = architecture.groups[step.inside].size
            channels = weights[step.tensors["key"]].shape[0] // heads
            same = np.stack([np.eye(channels)] * heads)
            turns = np.linalg.qr(rng.normal(size=same.shape))[0]
            changed = with_bases(changed, architecture, step, same, turns)
    return changed


CHANGES: dict[str, Change] = {
    "rotated": rotated,
    "rotated and disguised": turned_and_disguised,
    "values turned": heads_alone,
}


class TestCompare:
    def changed(self, base: Path, weights: Weights, change: Change) -> Weights:
        with open_checkpoint(base) as checkpoint:
            architecture = describe(checkpoint)
        found = change(weights, architecture, np.random.default_rng(0))
        return {name: values.astype(np.float32) for name, values in found.items()}

    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        return saved(llama(0), tmp_path / "base.safetensors")

    @pytest.mark.parametrize("other_first", [False, True])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("change", CHANGES)
    def test_a_copy_has_the_same_weights(
        self, base: Path, change: str, dtype: str, other_first: bool
    ) -> None:
        copy = self.changed(base, llama(0), CHANGES[change])
        pair = base, saved(copy, base.parent / "copy.safetensors", dtype)
        answer = answer_of("compare", *(pair[::-1] if other_first else pair))
        assert answer["relation"] == Relation.SAME_WEIGHTS
        assert "rotate" in answer["operations"]
        assert "repackage" not in answer["operations"]
        assert ("reorder" in answer["operations"]) == (change == "rotated and disguised")

    @pytest.mark.parametrize("other_first", [False, True])
    @pytest.mark.parametrize("change", CHANGES)
    def test_a_fine_tune_is_one_and_as_far_as_it_went(
        self, base: Path, change: str, other_first: bool
    ) -> None:
        child = self.changed(base, trained(llama(0), 0.05), CHANGES[change])
        pair = base, saved(child, base.parent / "child.safetensors")
        answer = answer_of("compare", *(pair[::-1] if other_first else pair))
        assert answer["relation"] == Relation.FINE_TUNE
        assert "rotate" in answer["operations"]
        assert answer["distance"] == pytest.approx(0.05, abs=0.006)

    @pytest.mark.parametrize("other_first", [False, True])
    def test_rotation_does_not_make_trained_weights_look_drawn(
        self, base: Path, other_first: bool
    ) -> None:
        """Rotated values are sums of many and look normal: the model that was not rotated tells."""
        saved(llama(0, tails=0.3), base)
        child = self.changed(base, trained(llama(0, tails=0.3), 0.05), rotated)
        pair = base, saved(child, base.parent / "child.safetensors")
        answer = answer_of("compare", *(pair[::-1] if other_first else pair))
        assert answer["relation"] == Relation.FINE_TUNE

    def test_a_quantised_copy_is_one(self, base: Path) -> None:
        copy = self.changed(base, llama(0), rotated)
        for name, values in copy.items():
            if values.ndim > 1:
                step = np.abs(values).max(axis=1, keepdims=True) / 127
                copy[name] = np.rint(values / step) * step
        saved(copy, base.parent / "copy.safetensors")
        answer = answer_of("compare", base, base.parent / "copy.safetensors")
        assert answer["relation"] == Relation.QUANTISED
        assert "rotate" in answer["operations"]
        assert answer["distance"] < 0.02

    def test_names_do_not_matter(self, base: Path) -> None:
        copy = self.changed(base, llama(0), rotated)
        renamed = {name.removeprefix("model."): values for name, values in copy.items()}
        saved(renamed, base.parent / "copy.safetensors")
        answer = answer_of("compare", base, base.parent / "copy.safetensors")
        assert answer["relation"] == Relation.SAME_WEIGHTS

    def test_a_stranger_stays_one(self, base: Path) -> None:
        other = self.changed(base, llama(9), rotated)
        saved(other, base.parent / "other.safetensors")
        answer = answer_of("compare", base, base.parent / "other.safetensors")
        assert answer["relation"] == Relation.UNRELATED

    def test_what_was_not_turned_is_left_as_it_is(self, base: Path) -> None:
        saved(
            self.changed(base, trained(llama(0), 0.5), disguised), base.parent / "far.safetensors"
        )
        with (
            open_checkpoint(base) as one,
            open_checkpoint(base.parent / "far.safetensors") as other,
        ):
            ours, theirs = insides_of(one), insides_of(other)
            assert ours is not None
            assert theirs is not None
            found = align(ours, theirs, one, other)
        assert found is not None
        assert found.operations == ("reorder", "rescale")


def transformer(
    *,
    rotary: bool = False,
    interleaved: bool = False,
    norm: str = "rms",
    joint: bool = False,
    by_head: bool = False,
) -> Architecture:
    builder = Builder("made").input("tokens", 90).embedding("table", "tokens", "stream", 24)
    for layer in ("0", "1"):
        plain = ("query", "key", "value", "output")
        roles = {role: f"{layer}.{role}" for role in (("joint", "output") if joint else plain)}
        roles |= {f"{role}_bias": f"{name}.bias" for role, name in roles.items()}
        builder.norm("stream", norm, gain=f"{layer}.gain", target=f"{layer}.in")
        keys = 0 if joint else 2
        builder.attention(
            *(roles, f"{layer}.in", "stream"),
            inside=f"{layer}.heads",
            heads=4,
            channels=6,
            key_heads=keys,
            rotary=rotary,
            interleaved=interleaved,
            fixed=by_head,
            by_head=by_head,
        )
        builder.norm("stream", norm, gain=f"{layer}.more.gain", target=f"{layer}.read")
        parts = (f"{layer}.gate", f"{layer}.up", f"{layer}.down")
        builder.gated(*parts, f"{layer}.read", "stream", 40, inside=f"{layer}.units")
    builder.norm("stream", norm, gain="gain", target="last")
    return builder.linear("head", "last", "next", 90, named=True).build()


DESIGNS = {
    "rotary": transformer(rotary=True),
    "rotary, neighbours": transformer(rotary=True, interleaved=True),
    "no rotary": transformer(),
    "layer norm": transformer(norm="layer", joint=True),
    "head by head": transformer(rotary=True, norm="layer", joint=True, by_head=True),
}


def drawn(architecture: Architecture, seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    found = {}
    for name, axes in architecture.axes.items():
        shape = [
            axis.before * architecture.groups[axis.group].size * axis.inner
            for axis in axes
            if axis is not None
        ]
        values = rng.normal(size=shape)
        if name.endswith("gain"):
            values = np.exp(values / 2)
        found[name] = values.astype(np.float32)
    return found


@pytest.mark.parametrize("design", DESIGNS)
class TestTurnedBack:
    def test_what_was_turned_comes_back(self, design: str) -> None:
        architecture = DESIGNS[design]
        ours = drawn(architecture, 0)
        theirs = {
            name: w.astype(np.float32)
            for name, w in rotated(ours, architecture, np.random.default_rng(1)).items()
        }
        found = turned_back(ours, theirs, architecture)
        assert found.turned
        assert found.plain == ("" if "layer norm" in design or "head" in design else "first")
        for name, values in found.weights.items():
            np.testing.assert_allclose(values, ours[name], atol=2e-4 * np.abs(ours[name]).max())

    def test_what_was_not_stays_bit_by_bit(self, design: str) -> None:
        architecture = DESIGNS[design]
        ours = drawn(architecture, 0)
        for theirs in (ours, trained(ours, 0.4)):
            found = turned_back(ours, theirs, architecture)
            assert not found.turned
            assert found.weights is theirs

    def test_heads_that_were_cut_off_stand_in_nobodys_way(self, design: str) -> None:
        architecture = DESIGNS[design]
        ours = drawn(architecture, 0)
        for name in ("0.key", "0.key.bias", "0.joint", "0.joint.bias"):
            if name in ours:
                ours[name][: 18 if design == "head by head" else 6] = 0
        ours["1.output"][:, :6] = 0
        theirs = dict(rotated(ours, architecture, np.random.default_rng(1)))
        found = turned_back(ours, theirs, architecture)
        assert found.turned
        np.testing.assert_allclose(found.weights["1.up"], ours["1.up"], atol=1e-3)

    def test_weights_out_of_reach_are_no_error(self, design: str) -> None:
        architecture = DESIGNS[design]
        ours = drawn(architecture, 0)
        large = {name: values * np.float32(1e30) for name, values in ours.items()}
        infinite = {name: np.full_like(values, np.inf) for name, values in ours.items()}
        for theirs in (large, infinite):
            found = turned_back(ours, theirs, architecture)
            assert not found.turned
            assert found.weights is theirs
