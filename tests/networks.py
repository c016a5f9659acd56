"""Small networks of well-known families, under their published tensor names, run by torch.

Each is a function of its weights, so that a test can change these and compare what comes out.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Shapes = dict[str, tuple[int, ...]]
Weights = Mapping[str, NDArray[np.floating]]
Torch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Network:
    """Shapes of a family's tensors, and what is computed with them."""

    shapes: Shapes
    inputs: Callable[[], Tensor]
    forward: Callable[[Torch, Tensor], Tensor]
    config: dict[str, object]

    def weights(self, seed: int = 0, dtype: str = "float64") -> dict[str, NDArray[np.floating]]:
        """Return random weights: gains and variances around one, the rest small."""
        rng = np.random.default_rng(seed)
        return {name: drawn(name, shape, rng).astype(dtype) for name, shape in self.shapes.items()}

    def output(self, weights: Weights) -> NDArray[np.floating]:
        """Return what the network computes from fixed inputs."""
        found = {name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in weights.items()}
        inputs = self.inputs()
        if inputs.is_floating_point():
            inputs = inputs.to(next(iter(found.values())).dtype)
        with torch.no_grad():
            return np.asarray(self.forward(found, inputs).numpy())


def drawn(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    if name.endswith("running_var"):
        return np.exp(rng.normal(scale=0.3, size=shape))
    if len(shape) == 1 and name.endswith("weight"):
        return 1 + rng.normal(scale=0.3, size=shape)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 4
    return rng.normal(scale=1.5 / np.sqrt(fan_in), size=shape)


def tokens(vocabulary: int = 11) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, vocabulary, (2, 6)))


def images(size: int = 16) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=(2, 3, size, size)))


def affine(w: Torch, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def layer_norm(w: Torch, name: str, x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, *, rotary: bool = False) -> Tensor:
    """Return attention; keys and values may have fewer heads, of the same number of channels."""
    channels = q.shape[-1] // heads

    def split(x: Tensor) -> Tensor:
        x = x.reshape(*x.shape[:-1], -1, channels).transpose(1, 2)
        return x.repeat_interleave(heads // x.shape[1], dim=1)

    q, k, v = split(q), split(k), split(v)
    if rotary:
        q, k = turned_by_position(q), turned_by_position(k)
    found = functional.scaled_dot_product_attention(q, k, v, is_causal=rotary)
    return found.transpose(1, 2).flatten(2)


def turned_by_position(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angle = torch.outer(torch.arange(x.shape[2]), 10.0 ** -torch.arange(half)).to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


# ------------------------------------------------------------------ transformers


def norm_shapes(name: str, size: int, *, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (size,)}
    return shapes | ({f"{name}.bias": (size,)} if bias else {})


def affine_shapes(name: str, out: int, into: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def llama(
    *,
    qkv_bias: bool = False,
    tied: bool = False,
    normed: bool = False,
    prefix: str = "model.",
) -> Network:
    width, heads, key_heads, channels, inner, layers = 16, 4, 2, 4, 20, 2
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (11, width)}
    for i in range(layers):
        p = f"{prefix}layers.{i}"
        shapes |= norm_shapes(f"{p}.input_layernorm", width, bias=False)
        for role, size in (("q", heads), ("k", key_heads), ("v", key_heads)):
            shapes |= affine_shapes(
                f"{p}.self_attn.{role}_proj", size * channels, width, bias=qkv_bias
            )
        for role in ("q", "k") if normed else ():
            shapes |= norm_shapes(f"{p}.self_attn.{role}_norm", channels, bias=False)
        shapes |= affine_shapes(f"{p}.self_attn.o_proj", width, heads * channels, bias=False)
        shapes |= norm_shapes(f"{p}.post_attention_layernorm", width, bias=False)
        for role in ("gate", "up"):
            shapes |= affine_shapes(f"{p}.mlp.{role}_proj", inner, width, bias=False)
        shapes |= affine_shapes(f"{p}.mlp.down_proj", width, inner, bias=False)
    shapes |= norm_shapes(f"{prefix}norm", width, bias=False)
    if not tied:
        shapes["lm_head.weight"] = (11, width)

    def forward(w: Torch, x: Tensor) -> Tensor:
        def rms(name: str, x: Tensor) -> Tensor:
            return functional.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], 1e-6)

        x = w[f"{prefix}embed_tokens.weight"][x]
        for i in range(layers):
            p = f"{prefix}layers.{i}"
            h = rms(f"{p}.input_layernorm", x)
            q, k, v = (affine(w, f"{p}.self_attn.{role}_proj", h) for role in "qkv")
            if normed:
                q, k = (
                    rms(
                        f"{p}.self_attn.{role}_norm", y.reshape(*y.shape[:2], -1, channels)
                    ).flatten(2)
                    for role, y in (("q", q), ("k", k))
                )
            x = x + affine(w, f"{p}.self_attn.o_proj", attend(q, k, v, heads, rotary=True))
            h = rms(f"{p}.post_attention_layernorm", x)
            h = functional.silu(affine(w, f"{p}.mlp.gate_proj", h)) * affine(
                w, f"{p}.mlp.up_proj", h
            )
            x = x + affine(w, f"{p}.mlp.down_proj", h)
        x = rms(f"{prefix}norm", x)
        return functional.linear(x, w[f"{prefix}embed_tokens.weight" if tied else "lm_head.weight"])

    config: dict[str, object] = {
        "model_type": "qwen2" if qkv_bias else "qwen3" if normed else "llama",
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
    }
    return Network(shapes, tokens, forward, config)


def gpt2(*, prefix: str = "transformer.", head: bool = False) -> Network:
    width, heads, layers = 12, 3, 2
    shapes: Shapes = {f"{prefix}wte.weight": (11, width), f"{prefix}wpe.weight": (8, width)}
    for i in range(layers):
        p = f"{prefix}h.{i}"
        shapes |= norm_shapes(f"{p}.ln_1", width) | norm_shapes(f"{p}.ln_2", width)
        for name, into, out in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            shapes |= {f"{p}.{name}.weight": (into, out), f"{p}.{name}.bias": (out,)}
    shapes |= norm_shapes(f"{prefix}ln_f", width)
    if head:
        shapes["lm_head.weight"] = (11, width)

    def forward(w: Torch, x: Tensor) -> Tensor:
        def turned(name: str, x: Tensor) -> Tensor:
            return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

        x = w[f"{prefix}wte.weight"][x] + w[f"{prefix}wpe.weight"][: x.shape[1]]
        for i in range(layers):
            p = f"{prefix}h.{i}"
            q, k, v = turned(f"{p}.attn.c_attn", layer_norm(w, f"{p}.ln_1", x)).chunk(3, dim=-1)
            x = x + turned(f"{p}.attn.c_proj", attend(q, k, v, heads))
            h = functional.gelu(turned(f"{p}.mlp.c_fc", layer_norm(w, f"{p}.ln_2", x)))
            x = x + turned(f"{p}.mlp.c_proj", h)
        x = layer_norm(w, f"{prefix}ln_f", x)
        return functional.linear(x, w["lm_head.weight" if head else f"{prefix}wte.weight"])

    return Network(shapes, tokens, forward, {"model_type": "gpt2", "n_head": heads})


def bert(*, prefix: str = "bert.", labels: int = 3) -> Network:
    width, heads, layers = 12, 3, 2
    e = f"{prefix}embeddings"
    shapes: Shapes = {
        f"{e}.word_embeddings.weight": (11, width),
        f"{e}.position_embeddings.weight": (8, width),
        f"{e}.token_type_embeddings.weight": (2, width),
    } | norm_shapes(f"{e}.LayerNorm", width)
    for i in range(layers):
        p = f"{prefix}encoder.layer.{i}"
        for role in ("query", "key", "value"):
            shapes |= affine_shapes(f"{p}.attention.self.{role}", width, width)
        shapes |= affine_shapes(f"{p}.attention.output.dense", width, width)
        shapes |= norm_shapes(f"{p}.attention.output.LayerNorm", width)
        shapes |= affine_shapes(f"{p}.intermediate.dense", 20, width)
        shapes |= affine_shapes(f"{p}.output.dense", width, 20)
        shapes |= norm_shapes(f"{p}.output.LayerNorm", width)
    shapes |= affine_shapes(f"{prefix}pooler.dense", width, width)
    if labels:
        shapes |= affine_shapes("classifier", labels, width)

    def forward(w: Torch, x: Tensor) -> Tensor:
        x = (
            w[f"{e}.word_embeddings.weight"][x]
            + w[f"{e}.position_embeddings.weight"][: x.shape[1]]
            + w[f"{e}.token_type_embeddings.weight"][0]
        )
        x = layer_norm(w, f"{e}.LayerNorm", x)
        for i in range(layers):
            p = f"{prefix}encoder.layer.{i}"
            q, k, v = (
                affine(w, f"{p}.attention.self.{role}", x) for role in ("query", "key", "value")
            )
            h = affine(w, f"{p}.attention.output.dense", attend(q, k, v, heads))
            x = layer_norm(w, f"{p}.attention.output.LayerNorm", x + h)
            h = affine(
                w, f"{p}.output.dense", functional.gelu(affine(w, f"{p}.intermediate.dense", x))
            )
            x = layer_norm(w, f"{p}.output.LayerNorm", x + h)
        x = torch.tanh(affine(w, f"{prefix}pooler.dense", x[:, 0]))
        return affine(w, "classifier", x) if labels else x

    return Network(shapes, tokens, forward, {"model_type": "bert", "num_attention_heads": heads})


def distilbert(*, prefix: str = "distilbert.") -> Network:
    width, heads, layers = 12, 3, 2
    e = f"{prefix}embeddings"
    shapes: Shapes = {
        f"{e}.word_embeddings.weight": (11, width),
        f"{e}.position_embeddings.weight": (8, width),
    } | norm_shapes(f"{e}.LayerNorm", width)
    for i in range(layers):
        p = f"{prefix}transformer.layer.{i}"
        for role in ("q", "k", "v", "out"):
            shapes |= affine_shapes(f"{p}.attention.{role}_lin", width, width)
        shapes |= norm_shapes(f"{p}.sa_layer_norm", width)
        shapes |= affine_shapes(f"{p}.ffn.lin1", 20, width) | affine_shapes(
            f"{p}.ffn.lin2", width, 20
        )
        shapes |= norm_shapes(f"{p}.output_layer_norm", width)
    shapes |= affine_shapes("pre_classifier", width, width) | affine_shapes("classifier", 3, width)

    def forward(w: Torch, x: Tensor) -> Tensor:
        x = w[f"{e}.word_embeddings.weight"][x] + w[f"{e}.position_embeddings.weight"][: x.shape[1]]
        x = layer_norm(w, f"{e}.LayerNorm", x)
        for i in range(layers):
            p = f"{prefix}transformer.layer.{i}"
            q, k, v = (affine(w, f"{p}.attention.{role}_lin", x) for role in "qkv")
            h = affine(w, f"{p}.attention.out_lin", attend(q, k, v, heads))
            x = layer_norm(w, f"{p}.sa_layer_norm", x + h)
            h = affine(w, f"{p}.ffn.lin2", functional.gelu(affine(w, f"{p}.ffn.lin1", x)))
            x = layer_norm(w, f"{p}.output_layer_norm", x + h)
        return affine(w, "classifier", torch.relu(affine(w, "pre_classifier", x[:, 0])))

    return Network(shapes, tokens, forward, {"model_type": "distilbert", "n_heads": heads})


def block_before_norms(
    w: Torch,
    p: str,
    x: Tensor,
    heads: int,
    names: tuple[str, str, str, str],
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return what a block with a norm before attention and one before its units makes of a stream.

    `names` are those of the two norms and of the two matrices.
    """
    first, second, up, down = names
    h = layer_norm(w, f"{p}.{first}", x)
    q, k, v = (affine(w, f"{p}.self_attn.{role}_proj", h) for role in "qkv")
    x = x + affine(w, f"{p}.self_attn.out_proj", attend(q, k, v, heads))
    h = activation(affine(w, f"{p}.{up}", layer_norm(w, f"{p}.{second}", x)))
    return x + affine(w, f"{p}.{down}", h)


def shapes_before_norms(p: str, width: int, names: tuple[str, str, str, str]) -> Shapes:
    """Return the shapes of such a block."""
    first, second, up, down = names
    shapes = norm_shapes(f"{p}.{first}", width) | norm_shapes(f"{p}.{second}", width)
    for role in ("q", "k", "v", "out"):
        shapes |= affine_shapes(f"{p}.self_attn.{role}_proj", width, width)
    return shapes | affine_shapes(f"{p}.{up}", 20, width) | affine_shapes(f"{p}.{down}", width, 20)


OPT_NAMES = ("self_attn_layer_norm", "final_layer_norm", "fc1", "fc2")
CLIP_NAMES = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")


def opt(*, prefix: str = "model.decoder.") -> Network:
    width, heads, layers = 12, 3, 2
    shapes: Shapes = {
        f"{prefix}embed_tokens.weight": (11, width),
        f"{prefix}embed_positions.weight": (8, width),
    }
    for i in range(layers):
        shapes |= shapes_before_norms(f"{prefix}layers.{i}", width, OPT_NAMES)
    shapes |= norm_shapes(f"{prefix}final_layer_norm", width)

    def forward(w: Torch, x: Tensor) -> Tensor:
        table = w[f"{prefix}embed_tokens.weight"]
        x = table[x] + w[f"{prefix}embed_positions.weight"][2 : 2 + x.shape[1]]
        for i in range(layers):
            x = block_before_norms(w, f"{prefix}layers.{i}", x, heads, OPT_NAMES, functional.relu)
        return functional.linear(layer_norm(w, f"{prefix}final_layer_norm", x), table)

    config: dict[str, object] = {
        "model_type": "opt",
        "num_attention_heads": heads,
        "activation_function": "relu",
    }
    return Network(shapes, tokens, forward, config)


def clip_text(*, prefix: str = "") -> Network:
    width, heads, layers = 12, 3, 2
    p = f"{prefix}text_model"
    shapes: Shapes = {
        f"{p}.embeddings.token_embedding.weight": (11, width),
        f"{p}.embeddings.position_embedding.weight": (8, width),
    }
    for i in range(layers):
        shapes |= shapes_before_norms(f"{p}.encoder.layers.{i}", width, CLIP_NAMES)
    shapes |= norm_shapes(f"{p}.final_layer_norm", width)
    shapes[f"{prefix}text_projection.weight"] = (5, width)

    def forward(w: Torch, x: Tensor) -> Tensor:
        embedded = w[f"{p}.embeddings.token_embedding.weight"][x]
        x = embedded + w[f"{p}.embeddings.position_embedding.weight"][: x.shape[1]]
        for i in range(layers):
            x = block_before_norms(
                w, f"{p}.encoder.layers.{i}", x, heads, CLIP_NAMES, functional.gelu
            )
        x = layer_norm(w, f"{p}.final_layer_norm", x)[:, -1]
        return functional.linear(x, w[f"{prefix}text_projection.weight"])

    config: dict[str, object] = {"model_type": "clip_text_model", "num_attention_heads": heads}
    return Network(shapes, tokens, forward, config)


def clip_vision(*, prefix: str = "") -> Network:
    width, heads, layers, patch = 12, 3, 2, 4
    p = f"{prefix}vision_model"
    shapes: Shapes = {
        f"{p}.embeddings.class_embedding": (width,),
        f"{p}.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        f"{p}.embeddings.position_embedding.weight": (17, width),
    } | norm_shapes(f"{p}.pre_layrnorm", width)
    for i in range(layers):
        shapes |= shapes_before_norms(f"{p}.encoder.layers.{i}", width, CLIP_NAMES)
    shapes |= norm_shapes(f"{p}.post_layernorm", width)
    shapes[f"{prefix}visual_projection.weight"] = (5, width)

    def forward(w: Torch, x: Tensor) -> Tensor:
        patches = functional.conv2d(x, w[f"{p}.embeddings.patch_embedding.weight"], stride=patch)
        first = w[f"{p}.embeddings.class_embedding"].expand(len(x), 1, -1)
        x = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)
        x = layer_norm(w, f"{p}.pre_layrnorm", x + w[f"{p}.embeddings.position_embedding.weight"])
        for i in range(layers):
            x = block_before_norms(
                w, f"{p}.encoder.layers.{i}", x, heads, CLIP_NAMES, functional.gelu
            )
        x = layer_norm(w, f"{p}.post_layernorm", x[:, 0])
        return functional.linear(x, w[f"{prefix}visual_projection.weight"])

    config: dict[str, object] = {"model_type": "clip_vision_model", "num_attention_heads": heads}
    return Network(shapes, images, forward, config)


def vit() -> Network:
    """A vision transformer under the names of timm."""
    width, heads, layers, patch = 12, 3, 2, 4
    shapes: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 17, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(layers):
        p = f"blocks.{i}"
        shapes |= norm_shapes(f"{p}.norm1", width) | norm_shapes(f"{p}.norm2", width)
        shapes |= affine_shapes(f"{p}.attn.qkv", 3 * width, width)
        shapes |= affine_shapes(f"{p}.attn.proj", width, width)
        shapes |= affine_shapes(f"{p}.mlp.fc1", 20, width)
        shapes |= affine_shapes(f"{p}.mlp.fc2", width, 20)
    shapes |= norm_shapes("norm", width) | affine_shapes("head", 5, width)

    def forward(w: Torch, x: Tensor) -> Tensor:
        proj = "patch_embed.proj"
        x = functional.conv2d(x, w[f"{proj}.weight"], w[f"{proj}.bias"], stride=patch)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + w["pos_embed"]
        for i in range(layers):
            p = f"blocks.{i}"
            q, k, v = affine(w, f"{p}.attn.qkv", layer_norm(w, f"{p}.norm1", x)).chunk(3, dim=-1)
            x = x + affine(w, f"{p}.attn.proj", attend(q, k, v, heads))
            h = functional.gelu(affine(w, f"{p}.mlp.fc1", layer_norm(w, f"{p}.norm2", x)))
            x = x + affine(w, f"{p}.mlp.fc2", h)
        return affine(w, "head", layer_norm(w, "norm", x)[:, 0])

    return Network(shapes, images, forward, {"num_attention_heads": heads})


# ------------------------------------------------------------------ convolutions


def batch_norm_shapes(name: str, size: int) -> Shapes:
    return norm_shapes(name, size) | {
        f"{name}.running_mean": (size,),
        f"{name}.running_var": (size,),
    }


def batch_norm(w: Torch, name: str, x: Tensor) -> Tensor:
    return functional.batch_norm(
        x,
        w[f"{name}.running_mean"],
        w[f"{name}.running_var"],
        w[f"{name}.weight"],
        w[f"{name}.bias"],
    )


def resnet(*, bottleneck: bool = False) -> Network:
    """A residual network under the names of torchvision, and of timm's plain ones."""
    kernels = (1, 3, 1) if bottleneck else (3, 3)
    shapes: Shapes = {"conv1.weight": (8, 3, 3, 3)} | batch_norm_shapes("bn1", 8)
    into = 8
    for stage, width in enumerate((8, 12), 1):
        for number in range(2):
            out = width * (2 if bottleneck else 1)
            shapes |= block_shapes(f"layer{stage}.{number}", into, width, out, kernels)
            into = out
    shapes |= affine_shapes("fc", 5, into)

    def forward(w: Torch, x: Tensor) -> Tensor:
        x = functional.conv2d(x, w["conv1.weight"], padding=1)
        x = functional.max_pool2d(functional.relu(batch_norm(w, "bn1", x)), 2)
        for stage in (1, 2):
            for number in range(2):
                stride = 2 if number == 0 and stage > 1 else 1
                x = residual_block(w, f"layer{stage}.{number}", x, stride, kernels)
        return affine(w, "fc", x.mean((2, 3)))

    return Network(shapes, images, forward, {})


def block_shapes(p: str, into: int, width: int, out: int, kernels: tuple[int, ...]) -> Shapes:
    shapes: Shapes = {}
    sizes = [into, *[width] * (len(kernels) - 1), out]
    for k, kernel in enumerate(kernels):
        shapes[f"{p}.conv{k + 1}.weight"] = (sizes[k + 1], sizes[k], kernel, kernel)
        shapes |= batch_norm_shapes(f"{p}.bn{k + 1}", sizes[k + 1])
    if into != out:
        shapes[f"{p}.downsample.0.weight"] = (out, into, 1, 1)
        shapes |= batch_norm_shapes(f"{p}.downsample.1", out)
    return shapes


def residual_block(w: Torch, p: str, x: Tensor, stride: int, kernels: tuple[int, ...]) -> Tensor:
    h = x
    for k, kernel in enumerate(kernels, 1):
        step = stride if k == len(kernels) - 1 else 1
        h = functional.conv2d(h, w[f"{p}.conv{k}.weight"], stride=step, padding=kernel // 2)
        h = batch_norm(w, f"{p}.bn{k}", h)
        h = functional.relu(h) if k < len(kernels) else h
    if f"{p}.downsample.0.weight" in w:
        x = functional.conv2d(x, w[f"{p}.downsample.0.weight"], stride=stride)
        x = batch_norm(w, f"{p}.downsample.1", x)
    return functional.relu(x + h)


def mobilenet() -> Network:
    """MobileNetV2 under the names of torchvision: a stem, three blocks, a last layer."""
    blocks = ((8, 6, 1), (6, 8, 4), (8, 8, 4))  # in, out, growth
    shapes: Shapes = {"features.0.0.weight": (8, 3, 3, 3)} | batch_norm_shapes("features.0.1", 8)
    for number, (into, out, growth) in enumerate(blocks, 1):
        p, wide = f"features.{number}.conv", into * growth
        for place, (first, shape) in enumerate(
            [((wide, into, 1, 1), wide)] * (growth > 1) + [((wide, 1, 3, 3), wide)]
        ):
            shapes[f"{p}.{place}.0.weight"] = first
            shapes |= batch_norm_shapes(f"{p}.{place}.1", shape)
        last = 2 if growth > 1 else 1
        shapes[f"{p}.{last}.weight"] = (out, wide, 1, 1)
        shapes |= batch_norm_shapes(f"{p}.{last + 1}", out)
    shapes["features.4.0.weight"] = (10, 8, 1, 1)
    shapes |= batch_norm_shapes("features.4.1", 10) | affine_shapes("classifier.1", 5, 10)

    def forward(w: Torch, x: Tensor) -> Tensor:
        def unit(name: str, x: Tensor, *, groups: int = 1) -> Tensor:
            weight = w[f"{name}.0.weight"]
            x = functional.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=groups)
            return functional.relu6(batch_norm(w, f"{name}.1", x))

        x = unit("features.0", x)
        for number, (into, out, growth) in enumerate(blocks, 1):
            p, h = f"features.{number}.conv", x
            if growth > 1:
                h = unit(f"{p}.0", h)
            h = unit(f"{p}.{int(growth > 1)}", h, groups=into * growth)
            last = 2 if growth > 1 else 1
            h = batch_norm(w, f"{p}.{last + 1}", functional.conv2d(h, w[f"{p}.{last}.weight"]))
            x = x + h if into == out else h
        return affine(w, "classifier.1", unit("features.4", x).mean((2, 3)))

    return Network(shapes, images, forward, {})


FAMILIES: dict[str, Callable[[], Network]] = {
    "llama": llama,
    "llama tied": partial(llama, tied=True),
    "qwen2": partial(llama, qkv_bias=True),
    "qwen3": partial(llama, normed=True),
    "gpt2": gpt2,
    "gpt2 with head": partial(gpt2, head=True, prefix="transformer."),
    "bert": bert,
    "distilbert": distilbert,
    "opt": opt,
    "clip text": clip_text,
    "clip vision": clip_vision,
    "vit": vit,
    "resnet": resnet,
    "resnet bottleneck": partial(resnet, bottleneck=True),
    "mobilenet_v2": mobilenet,
}


def networks() -> Iterator[tuple[str, Network]]:
    for name, make in FAMILIES.items():
        yield name, make()
