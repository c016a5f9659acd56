"""Reordered and trained: told from strangers before anything is aligned, and then measured."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from command import answer_of, lineage
from embedder.architecture import Architecture, Builder
from embedder.checkpoint import Checkpoint
from embedder.matching import MARGIN
from embedder.opening import open_checkpoint
from embedder.rotation import rotated
from embedder.symmetry import disguised as every_symmetry
from embedder.zoo.designs import Config
from embedder.zoo.nets import architecture_of, new_start
from lineage.aligning import Alignment, align, insides_of, margin_between
from lineage.verdict import Relation

Weights = dict[str, NDArray[np.float32]]
Change = Callable[[Weights, Architecture, np.random.Generator], Mapping[str, NDArray[np.floating]]]

SHAPES = {
    "0.weight": (60, 64),
    "0.bias": (60,),
    "2.weight": (40, 60),
    "2.bias": (40,),
    "4.weight": (10, 40),
    "4.bias": (10,),
}


def network(seed: int) -> Weights:
    """Return weights with heavier tails than a start has, as training leaves them."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.laplace(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def trained(weights: Weights, drift: float, seed: int = 1) -> Weights:
    rng = np.random.default_rng(seed)
    return {
        name: (w + drift * w.std() * rng.normal(size=w.shape)).astype(np.float32)
        for name, w in weights.items()
    }


def stored(weights: Mapping[str, NDArray[np.floating]]) -> Weights:
    """Return weights as safetensors takes them."""
    return {name: np.ascontiguousarray(values, np.float32) for name, values in weights.items()}


def disguised(
    weights: Mapping[str, NDArray[np.floating]], seed: int = 2, activation: str = "relu"
) -> Weights:
    """Return a copy that computes the same, in another order, scale or sign."""
    builder = Builder("mlp").input("in", 64)
    for name, source, target, size in (("0", "in", "a", 60), ("2", "a", "b", 40)):
        bias = f"{name}.bias"
        builder.linear(f"{name}.weight", source, target, size, bias=bias, activation=activation)
    architecture = builder.linear("4.weight", "b", "out", 10, bias="4.bias", named=True).build()
    rng = np.random.default_rng(seed)
    return stored(every_symmetry(weights, architecture, rng))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = network(0)
    save_file(base, tmp_path / "base.safetensors")
    save_file(disguised(trained(base, 0.08)), tmp_path / "child.safetensors")
    save_file(disguised(trained(base, 0.5)), tmp_path / "far.safetensors")
    save_file(disguised(network(7)), tmp_path / "stranger.safetensors")
    return tmp_path


class TestCompare:
    def test_a_disguised_fine_tune_is_one(self, folder: Path) -> None:
        answer = answer_of("compare", folder / "base.safetensors", folder / "child.safetensors")
        assert answer["relation"] == Relation.FINE_TUNE
        assert {"reorder", "rescale"} <= set(answer["operations"])
        assert answer["distance"] == pytest.approx(0.08, abs=0.03)
        assert "nearer to their partners than to any other unit" in " ".join(answer["reasons"])
        assert "extrapolated" not in " ".join(answer["limits"])

    def test_one_that_went_far_is_not_decided_and_never_refuted(self, folder: Path) -> None:
        pair = folder / "base.safetensors", folder / "far.safetensors"
        assert lineage("compare", *pair, "--json").answer["relation"] == Relation.CANNOT_SAY
        claim = lineage("verify", pair[1], "--parent", pair[0], "--json").answer["claims"][0]
        assert claim["answer"] == "cannot-say"

    def test_flipped_signs_are_undone_though_the_activation_is_not_known(
        self, folder: Path
    ) -> None:
        flipped = disguised(trained(network(0), 0.08), activation="tanh")
        save_file(flipped, folder / "flipped.safetensors")
        answer = answer_of("compare", folder / "base.safetensors", folder / "flipped.safetensors")
        assert answer["relation"] == Relation.FINE_TUNE
        assert {"reorder", "rescale"} <= set(answer["operations"])

    @pytest.mark.parametrize("other_first", [False, True])
    def test_units_that_were_cut_off_on_one_side_have_no_scale(
        self, folder: Path, other_first: bool
    ) -> None:
        pruned = trained(network(0), 0.02)
        pruned["2.weight"][:, :5] = 0  # nobody hears these
        pruned["0.weight"][5:10], pruned["0.bias"][5:10] = 0, 0  # and these hear nothing
        save_file(disguised(pruned), folder / "pruned.safetensors")
        pair = folder / "base.safetensors", folder / "pruned.safetensors"
        answer = lineage("compare", *pair[:: -1 if other_first else 1], "--json").answer
        assert answer["relation"] == Relation.CANNOT_SAY
        assert answer["agreement"] > 0.9
        assert answer["distance"] == pytest.approx(0.33, abs=0.06)

    def test_a_stranger_stays_one(self, folder: Path) -> None:
        answer = answer_of("compare", folder / "base.safetensors", folder / "stranger.safetensors")
        assert answer["relation"] == Relation.UNRELATED

    def test_the_order_of_the_two_does_not_matter(self, folder: Path) -> None:
        one, other = folder / "base.safetensors", folder / "child.safetensors"
        assert answer_of("compare", other, one)["relation"] == Relation.FINE_TUNE


class TestCatalogue:
    def test_parents_and_verify_see_through_the_disguise(self, folder: Path) -> None:
        catalogue = folder / "catalogue"
        for seed in range(20, 40):
            save_file(network(seed), folder / f"other{seed}.safetensors")
        assert lineage("add", folder, "--catalogue", catalogue).code == 0
        found = answer_of("parents", "child.safetensors", "--catalogue", catalogue)["parents"]
        assert [(p["model"], p["relation"]) for p in found] == [("base.safetensors", "fine-tune")]
        far = answer_of("parents", "far.safetensors", "--catalogue", catalogue)
        assert far["parents"] == []
        (limit,) = [text for text in far["limits"] if "not decided" in text]
        assert "base.safetensors" in limit
        done = lineage(
            *("verify", "child.safetensors", "--parent", "base.safetensors"),
            *("--catalogue", catalogue, "--json"),
        )
        assert done.answer["claims"][0]["answer"] in ("supported", "cannot-say")


def transformer(norm: str, seed: int) -> Weights:
    """Return a language model of two blocks, with heavier tails than a start has."""
    rng = np.random.default_rng(seed)
    return {
        name: (values * np.exp(rng.normal(0, 0.8, values.shape))).astype(np.float32)
        for name, values in new_start(language_model(norm), seed).items()
    }


def language_model(norm: str) -> Config:
    activation = "silu" if norm == "rms" else "gelu"
    sizes = {"heads": 2, "places": 16, "causal": True}
    return Config("transformer", 50, 50, (24, 24), activation, norm, **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["layer", "rms"])
class TestTransformers:
    """Stream, heads and hidden units are all in another order: rows and columns of each matrix."""

    def pair(self, folder: Path, norm: str, drift: float) -> tuple[Path, Path]:
        base, architecture = transformer(norm, 5), architecture_of(language_model(norm))
        child = every_symmetry(trained(base, drift), architecture, np.random.default_rng(0))
        names = folder / "base.safetensors", folder / "child.safetensors"
        for name, weights in zip(names, (base, child), strict=True):
            save_file(stored(weights), name)
        return names

    def test_a_disguised_fine_tune_is_one(self, tmp_path: Path, norm: str) -> None:
        answer = lineage("compare", *self.pair(tmp_path, norm, 0.08), "--json").answer
        assert answer["relation"] == Relation.FINE_TUNE
        assert "reorder" in answer["operations"]
        assert answer["distance"] == pytest.approx(0.08, abs=0.03)

    @pytest.mark.parametrize("change", [every_symmetry, rotated])
    @pytest.mark.parametrize("other_first", [False, True])
    def test_what_looks_like_a_random_start_is_not_decided_in_any_scales_or_bases(
        self, tmp_path: Path, norm: str, other_first: bool, change: Change
    ) -> None:
        start, architecture = (
            new_start(language_model(norm), 3),
            architecture_of(language_model(norm)),
        )
        other = change(trained(start, 0.05), architecture, np.random.default_rng(0))
        for name, weights in (("a", start), ("b", other)):
            save_file(stored(weights), tmp_path / f"{name}.safetensors")
        pair = [tmp_path / f"{name}.safetensors" for name in ("a", "b")]
        answer = lineage("compare", *(pair[::-1] if other_first else pair), "--json").answer
        assert answer["relation"] == Relation.CANNOT_SAY
        assert "look as a random start draws them" in " ".join(answer["limits"])

    def test_a_disguised_copy_has_the_same_weights(self, tmp_path: Path, norm: str) -> None:
        assert answer_of("compare", *self.pair(tmp_path, norm, 0))["relation"] == (
            Relation.SAME_WEIGHTS
        )

    def test_more_words_do_not_stop_the_alignment(self, tmp_path: Path, norm: str) -> None:
        base, child = self.pair(tmp_path, norm, 0.08)
        more = load_file(child)
        for name in ("tokens.weight", "head.weight"):
            more[name] = np.concatenate([more[name], more[name][:5]])
        save_file(more, child)
        answer = lineage("compare", base, child, "--json").answer
        assert answer["relation"] in (Relation.FINE_TUNE, Relation.CANNOT_SAY, Relation.UNRELATED)

    def test_tensors_of_other_names_are_left_alone(self, tmp_path: Path, norm: str) -> None:
        base, child = self.pair(tmp_path, norm, 0.08)
        renamed = {f"model.{name}": values for name, values in load_file(child).items()}
        save_file(renamed, child)
        answer = lineage("compare", base, child, "--json").answer
        assert answer["relation"] in (Relation.FINE_TUNE, Relation.CANNOT_SAY)

    def test_one_that_went_far_is_never_refuted(self, tmp_path: Path, norm: str) -> None:
        answer = lineage("compare", *self.pair(tmp_path, norm, 0.3), "--json").answer
        assert answer["relation"] in (Relation.FINE_TUNE, Relation.CANNOT_SAY)

    def test_a_stranger_stays_one(self, tmp_path: Path, norm: str) -> None:
        base, _ = self.pair(tmp_path, norm, 0)
        architecture = architecture_of(language_model(norm))
        other = every_symmetry(transformer(norm, 9), architecture, np.random.default_rng(0))
        save_file(stored(other), tmp_path / "stranger.safetensors")
        answer = answer_of("compare", base, tmp_path / "stranger.safetensors")
        assert answer["relation"] == Relation.UNRELATED


def margin_of(first: Path, second: Path) -> float:
    with open_checkpoint(first) as one, open_checkpoint(second) as other:
        ours, theirs = insides_of(one), insides_of(other)
    assert ours is not None
    assert theirs is not None
    return margin_between(ours, theirs)


def aligned(first: Checkpoint, second: Checkpoint) -> Alignment | None:
    ours, theirs = insides_of(first), insides_of(second)
    assert ours is not None
    assert theirs is not None
    return align(ours, theirs, first, second)


class TestAlign:
    def test_the_aligned_weights_are_those_of_the_copy(self, tmp_path: Path) -> None:
        base = network(3)
        save_file(base, tmp_path / "base.safetensors")
        save_file(disguised(base), tmp_path / "copy.safetensors")
        with (
            open_checkpoint(tmp_path / "base.safetensors") as one,
            open_checkpoint(tmp_path / "copy.safetensors") as other,
        ):
            found = aligned(one, other)
            assert found is not None
            assert found.moved
            for tensor in found.second.tensors:
                np.testing.assert_allclose(tensor.read(), base[tensor.name], rtol=2e-4, atol=1e-6)

    @pytest.mark.parametrize("seed", range(10))
    def test_strangers_do_not_pass(self, tmp_path: Path, seed: int) -> None:
        save_file(network(2 * seed), tmp_path / "a.safetensors")
        save_file(disguised(network(2 * seed + 1)), tmp_path / "b.safetensors")
        assert margin_of(tmp_path / "a.safetensors", tmp_path / "b.safetensors") < MARGIN / 2

    def test_kin_pass_and_the_further_they_went_the_less(self, tmp_path: Path) -> None:
        base = tmp_path / "base.safetensors"
        save_file(network(3), base)
        margins = []
        for drift in (0.0, 0.2, 0.5, 1.0):
            save_file(disguised(trained(network(3), drift)), tmp_path / "child.safetensors")
            margins.append(margin_of(base, tmp_path / "child.safetensors"))
        assert margins == sorted(margins, reverse=True)
        assert margins[0] > 0.5
        assert margins[2] > MARGIN

    def test_a_new_head_with_other_classes_is_no_hindrance(self, tmp_path: Path) -> None:
        base, child = network(3), trained(network(3), 0.2)
        head = np.random.default_rng(8).laplace(size=(7, 40)) / np.sqrt(40)
        child |= {"4.weight": head.astype(np.float32), "4.bias": np.zeros(7, np.float32)}
        order = np.random.default_rng(9).permutation(60)
        child |= {name: child[name][order] for name in ("0.weight", "0.bias")}
        child["2.weight"] = np.ascontiguousarray(child["2.weight"][:, order])
        for name, weights in (("base", base), ("child", child)):
            save_file(weights, tmp_path / f"{name}.safetensors")
        pair = [tmp_path / f"{name}.safetensors" for name in ("base", "child")]
        assert margin_of(*pair) > MARGIN
        answer = lineage("compare", *pair, "--json").answer
        assert answer["relation"] in (Relation.FINE_TUNE, Relation.CANNOT_SAY)
        assert "partners" in " ".join(answer["reasons"])

    def test_what_is_not_of_one_design_is_not_aligned(self, tmp_path: Path) -> None:
        save_file(network(1), tmp_path / "a.safetensors")
        narrow = {name: w[: len(w) // 2] for name, w in network(1).items()}
        narrow["2.weight"], narrow["4.weight"] = (
            narrow["2.weight"][:, :30],
            narrow["4.weight"][:, :20],
        )
        save_file(
            {n: np.ascontiguousarray(w) for n, w in narrow.items()}, tmp_path / "b.safetensors"
        )
        with (
            open_checkpoint(tmp_path / "a.safetensors") as one,
            open_checkpoint(tmp_path / "b.safetensors") as other,
        ):
            assert aligned(one, other) is None
