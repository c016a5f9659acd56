"""Descriptions from names and shapes: right where they are given, and errors where they are not."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from attention_networks import bert, clip_text, clip_vision, gpt2, llama
from convolution_networks import resnet
from embedder.anchors import anchored
from embedder.architecture import Architecture, Gauge, Op
from embedder.coding import identity_code
from embedder.describing import describe
from embedder.errors import ArchitectureError
from embedder.opening import open_checkpoint
from embedder.rotation import channels_of, rotated
from embedder.symmetry import flipped, permuted, random_orders, reordered, rescaled
from embedder.zoo.designs import Config
from embedder.zoo.nets import architecture_of, shapes_of
from embedder.zoo.plan import populations
from network import Network
from networks import FAMILIES

Weights = dict[str, NDArray[np.floating]]


def change_of(network: Network, architecture: Architecture, weights: Weights) -> float:
    """Return the largest change of an output, relative, after all symmetries one by one."""
    before = network.output(weights)
    rng = np.random.default_rng(0)
    changed = weights
    for operation in (permuted, rescaled, flipped, rotated):
        changed = operation(changed, architecture, rng)
    return float(np.abs(network.output(changed) - before).max() / np.abs(before).max())


class TestFamilies:
    @pytest.mark.parametrize("name", list(FAMILIES))
    def test_the_function_is_kept_under_all_that_the_description_allows(self, name: str) -> None:
        network = FAMILIES[name]()
        found = describe(network.shapes, config=network.config)
        weights = network.weights()
        assert change_of(network, found, weights) < 1e-11
        back = {
            group: order[::-1]
            for group in random_orders(found, np.random.default_rng(1))
            for order in [np.arange(found.groups[group].size)]
        }
        moved = reordered(weights, found, back)
        same = {tensor for tensor in weights if np.array_equal(moved[tensor], weights[tensor])}
        # What runs over named units alone stays: the bias of a head.
        named = {g for g, group in found.groups.items() if group.gauge == Gauge.NAMED}
        for tensor in same:
            assert {axis.group for axis in found.axes[tensor] if axis} <= named
        assert found.unexplained == ()

    @pytest.mark.parametrize("name", list(FAMILIES))
    def test_what_is_described_has_a_code_that_no_symmetry_changes(self, name: str) -> None:
        """Heads that are their tables had none: the words they write were no words they read."""
        network = FAMILIES[name]()
        found = describe(network.shapes, config=network.config)
        weights, rng = network.weights(), np.random.default_rng(0)
        before = identity_code(anchored(weights, found)).vector
        for operation in (permuted, rescaled, flipped, rotated):
            weights = operation(weights, found, rng)
        after = identity_code(anchored(weights, found)).vector
        assert np.linalg.norm(after - before) < 1e-5

    @pytest.mark.parametrize("name", list(FAMILIES))
    def test_another_prefix_changes_nothing_but_names(self, name: str) -> None:
        network = FAMILIES[name]()
        plain = describe(network.shapes, config=network.config)
        wrapped = {f"module.net.{tensor}": shape for tensor, shape in network.shapes.items()}
        found = describe(wrapped, config=network.config)
        assert [step.op for step in found.steps] == [step.op for step in plain.steps]
        assert [
            [axis and (axis.before, axis.inner, axis.power) for axis in axes]
            for axes in found.axes.values()
        ] == [
            [axis and (axis.before, axis.inner, axis.power) for axis in axes]
            for axes in plain.axes.values()
        ]

    def test_confidence_is_full_only_where_the_config_says_what_it_is(self) -> None:
        network = llama()
        assert describe(network.shapes, config=network.config).confidence == 1
        alone = {"num_attention_heads": 4}
        assert describe(network.shapes, config=alone).confidence == pytest.approx(0.9)
        assert describe(gpt2().shapes).confidence == pytest.approx(0.9 * 0.8)

    def test_a_config_of_another_family_with_these_names_is_an_error(self) -> None:
        # Gemma's tensors have Llama's names, and its norms multiply by one plus the gain.
        with pytest.raises(ArchitectureError, match="the config says gemma, not llama"):
            describe(llama().shapes, config={"model_type": "gemma"})

    def test_heads_come_from_a_table_of_rotary_positions(self) -> None:
        shapes = llama().shapes | {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}
        found = describe(shapes)
        assert found.groups["model.layers.0.self_attn.heads"].size == 2
        assert found.unexplained == ()

    def test_heads_come_from_the_gain_of_their_norm(self) -> None:
        network = llama(normed=True)
        found = describe(network.shapes)
        assert found.groups["model.layers.0.self_attn.heads"].size == 2
        assert found.unexplained == ()
        with pytest.raises(ArchitectureError, match="16 rows of queries are no whole heads"):
            describe(network.shapes | {"model.layers.0.self_attn.q_norm.weight": (5,)})

    def test_pictures_and_text_are_two_streams_of_one_model(self) -> None:
        both = clip_text().shapes | clip_vision().shapes | {"logit_scale": ()}
        found = describe(both, config={"model_type": "clip"})
        assert found.unexplained == ()
        assert {"text", "picture", "shared"} <= found.groups.keys()
        assert found.axes["text_projection.weight"][0] == found.axes["visual_projection.weight"][0]

    def test_heads_that_do_not_divide_the_rows_are_an_error(self) -> None:
        with pytest.raises(ArchitectureError, match="16 rows of queries are no 3 heads"):
            describe(llama().shapes, config={"num_attention_heads": 3})

    def test_what_no_step_uses_is_named_and_lowers_the_confidence(self) -> None:
        network = llama()
        size = sum(int(np.prod(shape)) for shape in network.shapes.values())
        shapes = network.shapes | {"model.layers.0.adapter.weight": (size, 1)}
        found = describe(shapes, config=network.config)
        assert found.unexplained == ("model.layers.0.adapter.weight",)
        assert found.confidence == pytest.approx(0.5)

    @pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
    def test_a_missing_tensor_is_an_error_that_names_it(self, tensor: str) -> None:
        network = llama()
        del network.shapes[tensor]
        with pytest.raises(ArchitectureError, match=f"{tensor}: the model has no such tensor"):
            describe(network.shapes, config=network.config)

    def test_a_tensor_of_another_shape_is_an_error_that_names_it(self) -> None:
        network = llama()
        shapes = network.shapes | {"model.layers.1.mlp.up_proj.weight": (20, 17)}
        with pytest.raises(ArchitectureError, match=r"up_proj\.weight: axis 1 has 17 places"):
            describe(shapes, config=network.config)

    def test_a_tensor_without_values_is_an_error(self) -> None:
        network = llama()
        shapes = network.shapes | {"model.norm.weight": (0,)}
        with pytest.raises(ArchitectureError, match=r"model\.norm\.weight: has no values"):
            describe(shapes, config=network.config)

    def test_units_that_no_head_reads_are_outputs(self) -> None:
        network = bert(labels=0)
        found = describe(network.shapes, config=network.config)
        assert found.groups["pooled"].gauge == found.groups["stream"].gauge == Gauge.NAMED
        headed = describe(bert().shapes, config=network.config)
        assert headed.groups["stream"].gauge == Gauge.ORDER
        without = {name: s for name, s in resnet().shapes.items() if not name.startswith("fc.")}
        assert describe(without).groups["layer2.0.stream"].gauge == Gauge.NAMED

    def test_old_names_of_gains_are_known(self) -> None:
        network = bert()
        renamed = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): shape
            for name, shape in network.shapes.items()
        }
        assert describe(renamed, config=network.config).unexplained == ()

    def test_a_checkpoint_brings_its_config(self, tmp_path: Path) -> None:
        network = llama()
        save_file(network.weights(dtype="float32"), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(
            '{"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}'
        )
        with open_checkpoint(tmp_path) as checkpoint:
            found = describe(checkpoint)
        assert (found.family, found.confidence) == ("llama", 1)
        assert found.axes == describe(network.shapes, config=network.config).axes


# Width of the queries, rows of the keys, heads: as published in the models' config.json.
CONFIGS = {
    "bert": [
        *[(768, 768, 12), (1024, 1024, 16), (128, 128, 2), (256, 256, 4), (512, 512, 8)],
        *[(384, 384, 12), (312, 312, 12), (2560, 2560, 32)],
    ],
    "gpt2": [
        *[(768, 768, 12), (1024, 1024, 16), (1280, 1280, 20), (1600, 1600, 25)],
        *[(1088, 1088, 17), (1536, 1536, 12), (2048, 2048, 16), (2560, 2560, 32)],
    ],
    "distilbert": [(768, 768, 12)],
    "opt": [
        *[(768, 768, 12), (2048, 2048, 32), (2560, 2560, 32), (4096, 4096, 32)],
        *[(5120, 5120, 40), (7168, 7168, 56), (9216, 9216, 72)],
    ],
    "gpt_neox": [
        *[(512, 512, 8), (768, 768, 12), (1024, 1024, 16), (2048, 2048, 8), (2048, 2048, 16)],
        *[(2560, 2560, 32), (4096, 4096, 32), (5120, 5120, 40), (6144, 6144, 64)],
    ],
    "phi": [(2048, 2048, 32), (2560, 2560, 32)],
    "clip text": [(512, 512, 8), (768, 768, 12), (1024, 1024, 16), (1280, 1280, 20)],
    "clip vision": [(768, 768, 12), (1024, 1024, 16), (1280, 1280, 16), (1664, 1664, 16)],
    "vit": [
        *[(192, 192, 3), (384, 384, 6), (768, 768, 12), (1024, 1024, 16), (1280, 1280, 16)],
        *[(1408, 1408, 16), (1152, 1152, 16)],
    ],
    "llama": [
        *[(4096, 4096, 32), (4096, 1024, 32), (5120, 5120, 40), (5120, 1024, 40)],
        *[(8192, 1024, 64), (16384, 1024, 128), (6656, 6656, 52), (3072, 1024, 24)],
        *[(2048, 256, 32), (2048, 512, 32), (2048, 2048, 32), (2048, 256, 16)],
        *[(896, 128, 14), (1536, 256, 12), (3584, 512, 28), (576, 192, 9), (960, 320, 15)],
        *[(288, 288, 6), (512, 512, 8), (768, 768, 12)],
    ],
}


def test_usual_heads_are_those_of_most_published_configs() -> None:
    right = []
    for family, configs in CONFIGS.items():
        for rows, keys, heads in configs:
            shapes = one_block(family, rows, keys)
            found = describe(shapes)
            (step,) = [step for step in found.steps if step.op == Op.ATTENTION]
            right.append(rows // channels_of(found, step) == heads)
    assert np.mean(right) >= 0.8


def one_block(family: str, rows: int, keys: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a family with one block, of a width."""
    network = FAMILIES[family]()
    width = max(network.shapes.values(), key=len)[0] if family == "vit" else 0
    width = width or network.shapes[next(iter(network.shapes))][-1]
    key_rows = {"llama": 8}.get(family, 0)
    sizes = {width: rows, 3 * width: 3 * rows} | ({key_rows: keys} if key_rows else {})
    return {
        name: tuple(sizes.get(size, size) for size in shape)
        for name, shape in network.shapes.items()
        if ".1." not in name
        or not any(part in name for part in ("layers.", "h.", "layer.", "blocks."))
    }


VALUES = [None, 0, -3, 4, 3, "4", "gelu", ["x"], True, 2.5, "llama", "bert", {"a": 1}]
DECLARED = ["model_type", "num_attention_heads", "head_dim", "hidden_act", "n_head"]


@given(
    st.sampled_from(list(FAMILIES)),
    st.integers(0, 10**6),
    st.dictionaries(st.sampled_from(DECLARED), st.sampled_from(VALUES)),
)
@settings(deadline=None, max_examples=150)
def test_a_damaged_model_is_described_or_refused(
    name: str, seed: int, config: dict[str, object]
) -> None:
    rng, shapes = np.random.default_rng(seed), dict(FAMILIES[name]().shapes)
    for _ in range(int(rng.integers(3))):
        tensor, kind = str(rng.choice(list(shapes))), int(rng.integers(3))
        size = tuple(int(length) for length in rng.integers(0, 20, int(rng.integers(5))))
        if kind == 0:
            del shapes[tensor]
        elif kind == 1:
            shapes[tensor] = size
        else:
            shapes[f"{tensor}x"] = shapes.pop(tensor)
    try:
        found = describe(shapes, config=config)
    except ArchitectureError:
        return
    assert set(found.axes) | set(found.unexplained) <= set(shapes)
    found.check(shapes)


@pytest.mark.parametrize("config", dict.fromkeys(p.config for p in populations()), ids=repr)
class TestZoo:
    """The networks of the zoo are described from the names and shapes in a file alone."""

    def test_each_axis_runs_over_the_units_that_the_design_says(self, config: Config) -> None:
        made = architecture_of(config)
        # A safetensors file holds them in the order of the alphabet.
        found = describe(dict(sorted(shapes_of(config).items())))
        ours, theirs = (
            {
                name: [
                    ("", 0, 0) if axis is None else (a.root(axis.group), axis.before, axis.inner)
                    for axis in axes
                ]
                for name, axes in a.axes.items()
            }
            for a in (made, found)
        )
        names = {
            (axis[0], other[0])
            for name in ours
            for axis, other in zip(ours[name], theirs[name], strict=True)
        }
        assert found.unexplained == ()
        assert len(names) == len(dict(names)) == len({other for _, other in names})
        for name in ours:
            assert [a[1:] for a in ours[name]] == [b[1:] for b in theirs[name]]
