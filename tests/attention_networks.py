"""Transformers."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from network import (
    Network,
    Shapes,
    Torch,
    affine,
    affine_shapes,
    attend,
    images,
    layer_norm,
    norm_shapes,
    tokens,
)


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

        x = functional.embedding(x, w[f"{prefix}embed_tokens.weight"])
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
            x = x + affine(w, f"{p}.self_attn.o_proj", attend(q, k, v, heads, rotary=channels))
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
    shapes: Shapes = {f"{prefix}wte.weight": (11, width), f"{prefix}wpe.weight": (77, width)}
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

        x = (
            functional.embedding(x, w[f"{prefix}wte.weight"])
            + w[f"{prefix}wpe.weight"][: x.shape[1]]
        )
        for i in range(layers):
            p = f"{prefix}h.{i}"
            joint = turned(f"{p}.attn.c_attn", layer_norm(w, f"{p}.ln_1", x))
            q, k, v = (joint[..., n * width : (n + 1) * width] for n in range(3))
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
        f"{e}.position_embeddings.weight": (77, width),
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
            functional.embedding(x, w[f"{e}.word_embeddings.weight"])
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
        f"{e}.position_embeddings.weight": (77, width),
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
        x = (
            functional.embedding(x, w[f"{e}.word_embeddings.weight"])
            + w[f"{e}.position_embeddings.weight"][: x.shape[1]]
        )
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


def gpt_neox(*, prefix: str = "gpt_neox.") -> Network:
    """Attention and hidden units read the stream beside each other; half of a head is turned."""
    width, heads, channels, layers = 16, 4, 4, 2
    shapes: Shapes = {f"{prefix}embed_in.weight": (11, width)}
    for i in range(layers):
        p = f"{prefix}layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= norm_shapes(f"{p}.{norm}", width)
        shapes |= affine_shapes(f"{p}.attention.query_key_value", 3 * width, width)
        shapes |= affine_shapes(f"{p}.attention.dense", width, width)
        shapes |= affine_shapes(f"{p}.mlp.dense_h_to_4h", 20, width)
        shapes |= affine_shapes(f"{p}.mlp.dense_4h_to_h", width, 20)
    shapes |= norm_shapes(f"{prefix}final_layer_norm", width) | {"embed_out.weight": (11, width)}

    def forward(w: Torch, x: Tensor) -> Tensor:
        x = functional.embedding(x, w[f"{prefix}embed_in.weight"])
        for i in range(layers):
            p = f"{prefix}layers.{i}"
            joint = affine(
                w, f"{p}.attention.query_key_value", layer_norm(w, f"{p}.input_layernorm", x)
            )
            joint = joint.reshape(*x.shape[:2], heads, 3, channels)
            q, k, v = (joint[:, :, :, place].flatten(2) for place in range(3))
            seen = affine(w, f"{p}.attention.dense", attend(q, k, v, heads, rotary=2))
            h = affine(
                w, f"{p}.mlp.dense_h_to_4h", layer_norm(w, f"{p}.post_attention_layernorm", x)
            )
            x = x + seen + affine(w, f"{p}.mlp.dense_4h_to_h", functional.gelu(h))
        x = layer_norm(w, f"{prefix}final_layer_norm", x)
        return functional.linear(x, w["embed_out.weight"])

    return Network(
        shapes, tokens, forward, {"model_type": "gpt_neox", "num_attention_heads": heads}
    )


def phi(*, prefix: str = "model.") -> Network:
    """Attention and hidden units read the stream through one norm; half of a head is turned."""
    width, heads, layers = 12, 3, 2
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (11, width)}
    for i in range(layers):
        p = f"{prefix}layers.{i}"
        shapes |= norm_shapes(f"{p}.input_layernorm", width)
        for module in ("q_proj", "k_proj", "v_proj", "dense"):
            shapes |= affine_shapes(f"{p}.self_attn.{module}", width, width)
        shapes |= affine_shapes(f"{p}.mlp.fc1", 20, width) | affine_shapes(
            f"{p}.mlp.fc2", width, 20
        )
    shapes |= norm_shapes(f"{prefix}final_layernorm", width) | affine_shapes("lm_head", 11, width)

    def forward(w: Torch, x: Tensor) -> Tensor:
        x = functional.embedding(x, w[f"{prefix}embed_tokens.weight"])
        for i in range(layers):
            p = f"{prefix}layers.{i}"
            h = layer_norm(w, f"{p}.input_layernorm", x)
            q, k, v = (affine(w, f"{p}.self_attn.{role}_proj", h) for role in "qkv")
            seen = affine(w, f"{p}.self_attn.dense", attend(q, k, v, heads, rotary=2))
            x = x + seen + affine(w, f"{p}.mlp.fc2", functional.gelu(affine(w, f"{p}.mlp.fc1", h)))
        return affine(w, "lm_head", layer_norm(w, f"{prefix}final_layernorm", x))

    return Network(shapes, tokens, forward, {"model_type": "phi", "num_attention_heads": heads})


OPT_NAMES = ("self_attn_layer_norm", "final_layer_norm", "fc1", "fc2")
CLIP_NAMES = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")


def opt(*, prefix: str = "model.decoder.") -> Network:
    width, heads, layers = 12, 3, 2
    shapes: Shapes = {
        f"{prefix}embed_tokens.weight": (11, width),
        f"{prefix}embed_positions.weight": (77, width),
    }
    for i in range(layers):
        shapes |= shapes_before_norms(f"{prefix}layers.{i}", width, OPT_NAMES)
    shapes |= norm_shapes(f"{prefix}final_layer_norm", width)

    def forward(w: Torch, x: Tensor) -> Tensor:
        table = w[f"{prefix}embed_tokens.weight"]
        x = (
            functional.embedding(x, table)
            + w[f"{prefix}embed_positions.weight"][2 : 2 + x.shape[1]]
        )
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
        f"{p}.embeddings.position_embedding.weight": (77, width),
    }
    for i in range(layers):
        shapes |= shapes_before_norms(f"{p}.encoder.layers.{i}", width, CLIP_NAMES)
    shapes |= norm_shapes(f"{p}.final_layer_norm", width)
    shapes[f"{prefix}text_projection.weight"] = (5, width)

    def forward(w: Torch, x: Tensor) -> Tensor:
        embedded = functional.embedding(x, w[f"{p}.embeddings.token_embedding.weight"])
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
        first = w[f"{p}.embeddings.class_embedding"].expand(x.shape[0], 1, -1)
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
        x = torch.cat([w["cls_token"].expand(x.shape[0], -1, -1), x], dim=1) + w["pos_embed"]
        for i in range(layers):
            p = f"blocks.{i}"
            joint = affine(w, f"{p}.attn.qkv", layer_norm(w, f"{p}.norm1", x))
            joint = joint.reshape(*x.shape[:2], 3, heads, width // heads)
            q, k, v = (part.flatten(2) for part in joint.unbind(2))
            x = x + affine(w, f"{p}.attn.proj", attend(q, k, v, heads))
            h = functional.gelu(affine(w, f"{p}.mlp.fc1", layer_norm(w, f"{p}.norm2", x)))
            x = x + affine(w, f"{p}.mlp.fc2", h)
        return affine(w, "head", layer_norm(w, "norm", x)[:, 0])

    return Network(shapes, images, forward, {"num_attention_heads": heads})
