"""The families that are described, each as a small network."""

from collections.abc import Callable
from functools import partial

from attention_networks import (
    bert,
    clip_text,
    clip_vision,
    distilbert,
    gpt2,
    gpt_neox,
    llama,
    opt,
    phi,
    vit,
)
from convolution_networks import mobilenet, resnet
from network import Network

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
    "gpt_neox": gpt_neox,
    "phi": phi,
    "clip text": clip_text,
    "clip vision": clip_vision,
    "vit": vit,
    "resnet": resnet,
    "resnet bottleneck": partial(resnet, bottleneck=True),
    "mobilenet_v2": mobilenet,
}
