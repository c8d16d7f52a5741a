"""Whole networks of linear combinations: `lc` puts LC blocks into any network, `lr_matched` makes a plain one their control.

Paper: Gavrikov & Keuper, arXiv 2301.11360. The control is ours: the paper has none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import surgery
from .layers import LCConv2d


def lc(
    model: nn.Module, rate: float = 1, *, where=surgery.spatial, shared: bool = False, generator: torch.Generator | None = None, **options
) -> list[str]:
    """Replace every spatial convolution of `model` by an LC block, in place; returns the replaced names.

    Args:
        model: any network; its convolutions' interfaces stay as they are.
        rate: the LC rate E.
        where: rule (name, module) -> bool; see `surgery`.
        shared: one frozen random tensor for all layers of a kernel size (the first version's weight sharing; slices are the
            leading corners, which is our reading: the paper does not print the order).
        generator: random numbers of all layers, in order.
        **options: further arguments of `LCConv2d` (execution, between, bank, frozen, depthwise).

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
    >>> lc(net, rate=2), sum(p.numel() for p in net.parameters() if p.requires_grad)
    (['0'], 172)
    """
    stores: dict[tuple, Tensor] = {}
    if shared:
        for name, m in model.named_modules():
            if isinstance(m, nn.Conv2d) and where(name, m):
                size = (m.groups * max(1, round(rate * m.out_channels / m.groups)), m.in_channels // m.groups)
                old = stores.get(m.kernel_size, torch.empty(0, 0)).shape
                stores[m.kernel_size] = torch.empty(max(size[0], old[0]), max(size[1], old[1]), *m.kernel_size, dtype=m.weight.dtype)
        for store in stores.values():
            store.uniform_(-1, 1, generator=generator)

    def make(conv: nn.Conv2d) -> LCConv2d:
        store = stores[conv.kernel_size].to(conv.weight.device) if shared else None
        return LCConv2d.like(conv, rate=rate, shared=store, generator=generator, **options)

    return surgery.swap(model, make, where=where)


def lr_matched(model: nn.Module, rate: float, lr: float, weight_decay: float = 0.0, *, where=surgery.spatial) -> list[dict]:
    """Make a plain network the control of a frozen LC network of this rate; returns the optimiser's parameter groups.

    To its filters W an LC block does three things: the gradient is multiplied by S = F^T F, whose mean is c I with
    c = rate * out_channels / (3 fan_in); and W starts sqrt(3) smaller. The control takes the mean of both, learning rate c lr
    (weight decay divided by c, so that lr * decay stays) and W / sqrt(3), and leaves out the random rest of S. What still
    differs between the two is what linear combinations add beyond a learning rate.

    Args:
        model: the plain network; its spatial filters are rescaled in place.
        rate, lr, weight_decay: of the LC network to imitate.
        where: the convolutions that `lc` would replace.

    >>> net = nn.Sequential(nn.Conv2d(3, 9, 3), nn.Conv2d(9, 4, 1))
    >>> groups = lr_matched(net, rate=9, lr=0.1)
    >>> [len(g["params"]) for g in groups], groups[0]["lr"]
    ([1, 3], 0.1)
    """
    groups, matched = [], set()
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d) and where(name, conv):
            c = rate * conv.out_channels / (3 * conv.weight[0].numel())
            with torch.no_grad():
                conv.weight /= math.sqrt(3)
            matched.add(id(conv.weight))
            groups.append({"params": [conv.weight], "lr": lr * c, "weight_decay": weight_decay / c})
    if not groups:
        raise ValueError("lr_matched: the rule `where` matched no convolution")
    return [
        *groups,
        {"params": [p for p in model.parameters() if p.requires_grad and id(p) not in matched], "lr": lr, "weight_decay": weight_decay},
    ]
