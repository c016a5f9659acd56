"""Networks of convolutions."""

from torch import Tensor
from torch.nn import functional

from network import Network, Shapes, Torch, affine, affine_shapes, images, norm_shapes


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
