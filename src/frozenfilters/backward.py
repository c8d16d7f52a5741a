"""A backward pass that does and keeps only what frozen filters need: `lean(model)`, undone by `unlean(model)`.

`requires_grad=False` skips the weight gradient but saves no memory: torch keeps a convolution's input all the same, and ReLU
keeps its output, which is that input. The backward pass of y = F * x + b with a frozen F needs neither,

    dx = F^T * dy  (F alone),    db = sum dy,    and for r = max(y, 0):  dy = dr where r > 0  (one bit for each number)

so a lean convolution keeps nothing but F, and a lean ReLU keeps bits. What remains in memory is what BatchNorm reads again.
The numbers are those of autograd. Two things get faster on a CPU as well: a frozen convolution with a *learned bias* no longer
pays for a weight gradient (torch's kernel computes both or none), and the input gradient of a depthwise convolution, which for
stride 1 is a convolution with the flipped filter, is run as one.
"""
from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONV = {3: F.conv1d, 4: F.conv2d}                         # by the number of dimensions of the weight
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def lean(model: nn.Module) -> list[str]:
    """Make `model`'s frozen convolutions and its ReLUs keep less for the backward pass, in place; returns their names.

    Same classes, parameters, `state_dict` and values: only these modules' own `forward` is replaced, which survives `deepcopy`
    and `pickle`. (A subclass would hide frozen filters from tools that ask for the exact type `nn.Conv2d`.) Whether a filter is
    frozen is asked at every call, so that a thawed one learns again. Left as they are: convolutions of other classes, padding
    other than zeros, functional calls (`F.relu`), and what needs its input by nature (a learned convolution, GELU). The bits
    cost time, about a twelfth of a frozen ResNet-20's step on a CPU: use it where memory is short, or for frozen convolutions
    with a learned bias. `torch.func` transforms and `nn.DataParallel` need `unlean(model)` first.

    Raises:
        ValueError: no convolution with a frozen weight; call `freeze` first.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> net[0].weight.requires_grad_(False) is net[0].weight and lean(net)
    ['0', '2']
    >>> type(net[0]).__name__, unlean(net)
    ('Conv2d', ['0', '2'])
    """
    kinds = (nn.Conv1d, nn.Conv2d)
    convs = {n: m for n, m in model.named_modules() if any(_runs(m, kind) for kind in kinds) and "weight" in m._parameters and not m.weight.requires_grad}
    if not convs:
        raise ValueError(f"lean: {type(model).__name__} has no nn.Conv1d or nn.Conv2d with a frozen weight; call freeze(model) first")
    changed = []
    for name, m in model.named_modules():
        forward = _conv if name in convs else _relu if _runs(m, nn.ReLU) or _runs(m, nn.ReLU6) else None
        if forward is not None:
            m.forward = partial(forward, m)
            changed.append(name)
    return changed


def unlean(model: nn.Module) -> list[str]:
    """Undo `lean`: torch's own forward again, in place; returns the names of the modules that were lean.

    >>> unlean(nn.Conv2d(3, 8, 3))
    []
    """
    found = [(name, m) for name, m in model.named_modules() if _is_lean(m)]
    for _, m in found:
        del m.forward
    return [name for name, _ in found]


def _is_lean(m: nn.Module) -> bool:
    return getattr(m.__dict__.get("forward"), "func", None) in (_conv, _relu)


def _runs(m: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `m` runs `kind`'s own forward: a subclass that computes its weight, or another tool's patch, is left alone."""
    return (isinstance(m, kind) and type(m).forward is kind.forward and getattr(type(m), "_conv_forward", None) is getattr(kind, "_conv_forward", None)
            and ("forward" not in m.__dict__ or _is_lean(m)))


def _conv(m: nn.Conv2d, x: Tensor) -> Tensor:
    padding = _padding(m)
    if m.weight.requires_grad or not torch.is_grad_enabled() or padding is None or x.dim() != m.weight.dim():
        return type(m).forward(m, x)
    return FrozenConv.apply(x, m.weight, m.bias, m.stride, padding, m.dilation, m.groups)


def _relu(m: nn.ReLU | nn.ReLU6, x: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad) or x.element_size() not in INTEGER:
        return type(m).forward(m, x)
    return BitReLU.apply(x, isinstance(m, nn.ReLU6), m.inplace)


def _padding(m: nn.Conv2d) -> tuple[int, ...] | None:
    """Zeros on each side, or None where the convolution pads otherwise."""
    if m.padding_mode != "zeros":
        return None
    if m.padding == "valid":
        return (0,) * len(m.kernel_size)
    if m.padding == "same":
        both = [d * (k - 1) for d, k in zip(m.dilation, m.kernel_size, strict=True)]
        return None if any(p % 2 for p in both) else tuple(p // 2 for p in both)
    return m.padding


class FrozenConv(torch.autograd.Function):
    """Convolution with a constant weight: keeps the weight and no input; the backward pass computes dx and db alone."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, bias: Tensor | None, stride, padding, dilation, groups) -> Tensor:
        ctx.save_for_backward(w)
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        ctx.x = x.shape, x.dtype, torch.channels_last if last else torch.contiguous_format
        ctx.bias = None if bias is None else bias.dtype
        ctx.how = stride, padding, dilation, groups
        return CONV[w.dim()](x, w, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, g: Tensor):
        (w,), (shape, dtype, layout), (stride, padding, dilation, groups) = ctx.saved_tensors, ctx.x, ctx.how
        dx = db = None
        if ctx.needs_input_grad[0]:
            v = w.to(g.dtype)
            if _flips(g, shape, v, stride, padding, dilation, groups):
                rest = [d * (k - 1) - p for d, k, p in zip(dilation, v.shape[2:], padding, strict=True)]
                dx = CONV[w.dim()](g, v.flip(*range(2, v.dim())), None, 1, rest, dilation, groups)
            else:
                unread = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=layout)         # only its shape is used
                how = stride, padding, dilation, False, [0] * len(stride), groups
                dx = torch.ops.aten.convolution_backward(g, unread, v, None, *how, [True, False, False])[0]
            dx = dx.to(dtype)
        if ctx.needs_input_grad[2]:
            db = g.sum([0, *range(2, g.dim())], dtype=ctx.bias)
        return dx, None, db, None, None, None, None


def _flips(g: Tensor, shape: torch.Size, w: Tensor, stride, padding, dilation, groups: int) -> bool:
    """Whether dx is run as a forward convolution of dy with the flipped filter: one filter for each channel, stride 1, and
    channels_last images on a CPU, where it took 0.3 to 1.0 of the time of torch's own for every kernel of 3 to 15 (with
    contiguous images a 15 x 15 takes 15 times as long, and GPUs were not measured: torch's own there)."""
    return (g.device.type == "cpu" and g.dim() == 4 and groups == shape[1] == w.shape[0] > 1 and set(stride) == {1}
            and g.is_contiguous(memory_format=torch.channels_last) and all(d * (k - 1) >= p for d, k, p in zip(dilation, w.shape[2:], padding, strict=True)))


class BitReLU(torch.autograd.Function):
    """max(x, 0), at most 6 if `six`: keeps one bit for each number, whether the gradient passes."""

    @staticmethod
    def forward(ctx, x: Tensor, six: bool, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        y = F.relu6(x, inplace) if six else F.relu(x, inplace)
        passes = _flat(y).to(torch.bool)                                   # y > 0, and NaN, as torch has it
        if six:
            passes &= (_flat(y) - 6).to(torch.bool)
        ctx.save_for_backward(pack(passes))
        ctx.like = y.shape, y.stride()
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        return Gate.apply(g, *ctx.saved_tensors, *ctx.like), None, None


class Gate(torch.autograd.Function):
    """g where its bit is set, else 0; the numbers are ANDed as integers, so that inf and NaN are dropped too. Its own derivative."""

    @staticmethod
    def forward(ctx, g: Tensor, bits: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.like = shape, stride
        if g.stride() != stride:
            g = torch.empty_strided(shape, stride, dtype=g.dtype, device=g.device).copy_(g)
        integer, out = INTEGER[g.element_size()], torch.empty_strided(shape, stride, dtype=g.dtype, device=g.device)
        mask = _flat(out).view(integer)                                    # in place: the engine may then add to `out` itself
        mask.copy_(unpack(bits, g.numel())).bitwise_and_(_flat(g).view(integer))
        return out

    @staticmethod
    def backward(ctx, g: Tensor):
        return Gate.apply(g, *ctx.saved_tensors, *ctx.like), None, None, None


def _flat(t: Tensor) -> Tensor:
    """A dense tensor's numbers in the order of memory, whatever its layout; a view."""
    return t.as_strided((t.numel(),), (1,))


def pack(flags: Tensor) -> Tensor:
    """Eight flags to a byte: bool (n,) -> uint8 (ceil(n / 8),); bit j of byte i is flag j ceil(n / 8) + i, so that everything runs along memory."""
    planes = F.pad(flags, (0, -len(flags) % 8)).view(torch.uint8).view(8, -1)
    return (planes << torch.arange(8, dtype=torch.uint8, device=flags.device)[:, None]).sum(0, dtype=torch.uint8)


def unpack(bits: Tensor, n: int) -> Tensor:
    """The n flags of `pack` as int8 (n,): 0 or -1, none or all of an integer's bits.

    >>> unpack(pack(torch.tensor([True, False, True])), 3)
    tensor([-1,  0, -1], dtype=torch.int8)
    """
    top = bits << torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)[:, None]
    return (top.view(torch.int8) >> 7).view(-1)[:n]
