"""The few networks no zoo has, and what fits any network to small images, pixel inputs and fast inference.

CIFAR ResNet: He et al., arXiv 1512.03385, in the variant of the LC paper (arXiv 2301.11360): shortcuts across stages are
learned 1 x 1 convolutions with BatchNorm. ConvMixer: Trockman & Kolter, arXiv 2201.09792.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, added to the input (through 1 x 1 conv-BN where the shape changes), ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1, kernel_size: int = 3):
        super().__init__()
        k = {"kernel_size": kernel_size, "padding": kernel_size // 2, "bias": False}
        self.conv1, self.bn1 = nn.Conv2d(in_channels, channels, stride=stride, **k), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, **k), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and in_channels == channels
            else nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Stem and three stages of (depth - 2) / 6 basic blocks with width, 2 width, 4 width channels; input (N, C, H, W), any H, W."""

    def __init__(self, depth: int = 20, width: int = 16, num_classes: int = 10, in_channels: int = 3, kernel_size: int = 3):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth} is not 6n + 2 (8, 14, 20, 32, 44, 56, 110): two layers in each block of three stages")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd, so that padding keeps the image size")
        self.conv, self.bn = nn.Conv2d(in_channels, width, kernel_size, padding=kernel_size // 2, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        channels = [width] + [width * 2**stage for stage in range(3) for _ in range((depth - 2) // 6)]
        self.blocks = nn.Sequential(
            *(BasicBlock(a, b, 2 if b != a else 1, kernel_size) for a, b in zip(channels, channels[1:], strict=False))
        )
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3)))


def resnet20(num_classes: int = 10, in_channels: int = 3, width: int = 16, kernel_size: int = 3) -> CifarResNet:
    """ResNet-20 for small images; 98 % of its parameters are spatial filters, the hardest case for frozen ones.

    >>> sum(p.numel() for p in resnet20().parameters())
    272474
    """
    return CifarResNet(20, width, num_classes, in_channels, kernel_size)


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def convmixer(
    width: int = 128, depth: int = 4, kernel_size: int = 5, patch_size: int = 2, num_classes: int = 10, in_channels: int = 3
) -> nn.Sequential:
    """ConvMixer: patch embedding, then `depth` times a residual depthwise k x k convolution and a 1 x 1 convolution.

    Its spatial filters hold k^2 / (k^2 + width) of a block's parameters: little where it is wide, the kind of network that the
    ExplainFix paper's claims are about.

    >>> convmixer(width=8, depth=2)(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 10])
    """

    def block() -> list[nn.Module]:
        depthwise = nn.Conv2d(width, width, kernel_size, groups=width, padding="same")
        return [_Residual(depthwise, nn.GELU(), nn.BatchNorm2d(width)), nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width)]

    stem = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
    return nn.Sequential(
        stem,
        nn.GELU(),
        nn.BatchNorm2d(width),
        *(layer for _ in range(depth) for layer in block()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )


class Normalize(nn.Module):
    """(x - mean) / std per channel, for inputs in [0, 1]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).view(1, -1, 1, 1))
        if not bool((self.std > 0).all()):
            raise ValueError(f"std={tuple(std)} must be positive in every channel")

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.mean.shape[1]:
            raise ValueError(
                f"the input has {x.shape[1]} channels, the network was built for {self.mean.shape[1]}; pass in_channels={x.shape[1]} to the model"
            )
        return (x - self.mean) / self.std


def normalized(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
    """`model` behind its own normalisation, so that everything outside (attacks, corruptions, figures) lives in pixels in [0, 1].

    >>> net = normalized(nn.Flatten(), mean=[0.5], std=[0.25])
    >>> net(torch.ones(1, 1, 1, 1)).item()
    2.0
    """
    return nn.Sequential(Normalize(mean, std), model)


def small_stem(model: nn.Module, pool: bool = False) -> nn.Module:
    """Fit an ImageNet network to small images, in place: the first strided convolution becomes 3 x 3 with stride 1, and the
    max pool right after it goes (`pool=True` keeps it, as the LC paper's low-resolution networks do). Returns the model.

    The new stem is drawn with torch's default initialisation from the global generator.

    Raises:
        ValueError: if the network's first convolution is not a strided one.

    >>> from torchvision.models import resnet18
    >>> net = small_stem(resnet18(num_classes=10))
    >>> net.conv1.stride, type(net.maxpool).__name__
    ((1, 1), 'Identity')
    """
    convs = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    if not convs or convs[0][1].stride == (1, 1):
        raise ValueError(
            f"small_stem: {type(model).__name__} has no strided first convolution to replace; it is fit for small images already"
        )
    name, old = convs[0]
    new = nn.Conv2d(
        old.in_channels, old.out_channels, 3, padding=1, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype
    )
    model.set_submodule(name, new)
    if not pool:
        order = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d))]
        first = order[1:2]
        if first and isinstance(first[0][1], nn.MaxPool2d):
            model.set_submodule(first[0][0], nn.Identity())
    return model


def fold(model: nn.Module) -> nn.Module:
    """A copy for inference: LC blocks become single convolutions and BatchNorm is folded into the convolution before it.

    The same function in eval mode, several times faster for LC networks; for validation, attacks and saliency. BatchNorm is
    folded by torch.fx, in each part that can be traced; the rest keeps it.

    >>> from frozenfilters import lc
    >>> net = resnet20(width=4).eval(); names = lc(net, rate=2)
    >>> x = torch.rand(2, 3, 8, 8)
    >>> torch.allclose(fold(net)(x), net(x), atol=1e-5)
    True
    """
    from torch.fx.experimental.optimization import fuse
    from torch.fx.proxy import TraceError

    from .layers import LCConv2d

    model = copy.deepcopy(model).eval()
    for name, m in list(model.named_modules()):
        if isinstance(m, LCConv2d) and m.between not in ("relu", "bn_relu"):
            if not name:
                return m.fold()
            model.set_submodule(name, m.fold())
    return _fuse(model, fuse, TraceError)


def _fuse(module: nn.Module, fuse, error: type[Exception]) -> nn.Module:
    """BatchNorm into convolutions: of the whole module, or of each child where the whole cannot be traced."""
    if not any(isinstance(m, nn.BatchNorm2d) for m in module.modules()):
        return module
    try:
        return fuse(module, inplace=True)
    except (error, TypeError, RuntimeError, ValueError):
        for name, child in module.named_children():
            setattr(module, name, _fuse(child, fuse, error))
        return module
