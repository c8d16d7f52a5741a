"""The algebra of "frozen k x k filters F, then a learned 1 x 1 mixture P": one convolution with W = P F.

Paper: arXiv 2301.11360 for the block; the algebra is ours. With G = dL/dW, the ordinary weight gradient of that convolution,

    W = P F,    dL/dP = G F^T,    dL/dF = P^T G,    and for linear optimisers dW = G S with S = F^T F.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def plan(rate: float, out_channels: int, fan_in: int, positions: int, depthwise: bool = False) -> str:
    """The cheaper exact form of a frozen LC block, from multiply-adds relative to the plain convolution.

    composed = 1 + 2/3 M / positions,   sequential = rate (2/3 + out_channels / fan_in),   M = rate * out_channels,
    `positions` = batch * output height * output width. The sequential form moves M feature maps through memory, which costs
    another 1.4 in measured time. Below rate 1 (below multiplier 2 for depthwise filters) sequential is always the smaller one.

    >>> plan(8, 16, 144, 128 * 32 * 32), plan(0.5, 16, 144, 128 * 32 * 32), plan(8, 512, 4608, 1)
    ('composed', 'sequential', 'sequential')
    """
    if rate < (2 if depthwise else 1):
        return "sequential"
    composed = 1 + 2 / 3 * rate * out_channels / positions
    sequential = rate * (2 / 3 + out_channels / fan_in)
    return "composed" if composed <= 1.4 * sequential or depthwise else "sequential"


class Compose(torch.autograd.Function):
    """W = P F. Keeps only P and F for the backward pass, so one W can serve several passes while neither changes.

    P (Co, M/g, 1, 1) and F (M, Ci/g, k, k) in g groups; with `depthwise`, F is (Ci m, 1, k, k) and P mixes all of them.
    """

    @staticmethod
    def forward(ctx, P: Tensor, F_: Tensor, groups: int, depthwise: bool, image: Tensor | None, cached: Tensor | None) -> Tensor:
        ctx.save_for_backward(P, F_ if image is None else None, image)
        ctx.groups, ctx.depthwise = groups, depthwise
        return compose(P, F_, groups, depthwise, image) if cached is None else cached.view_as(cached)

    @staticmethod
    def backward(ctx, G: Tensor):
        P, F_, image = ctx.saved_tensors
        need = ctx.needs_input_grad
        with torch.autocast(G.device.type, enabled=False):
            G = G.to(P.dtype)
            if image is not None:  # dP = G F^T as the weight gradient of that 1 x 1 convolution
                found = torch.ops.aten.convolution_backward(
                    G.transpose(0, 1), image, P, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, need[0], False]
                )
                return found[1], None, None, None, None, None
            p, f = _rows(P, F_, ctx.groups, ctx.depthwise)
            g = G.flatten(2).transpose(0, 1) if ctx.depthwise else G.reshape(ctx.groups, p.shape[1], -1)
            dP = dF = None
            if need[0]:
                dP = g @ f.mT  # dP = G F^T
                dP = (dP.transpose(0, 1) if ctx.depthwise else dP).reshape(P.shape)
            if need[1]:
                dF = (p.mT @ g).reshape(F_.shape)  # dF = P^T G
        return dP, dF, None, None, None, None


def bank_image(F_: Tensor) -> Tensor:
    """A frozen dense bank (M, C, k, k) as images (C, M, k, k) in channels_last: mixing filters is a 1 x 1 convolution over their taps.

    Quicker than a matrix product on many CPUs; made once, since a frozen bank does not change.
    """
    return F_.detach().transpose(0, 1).contiguous(memory_format=torch.channels_last)


def _rows(P: Tensor, F_: Tensor, groups: int, depthwise: bool) -> tuple[Tensor, Tensor]:
    """P as (g, out, m) and F as (g, m, taps), so that W = P F is one batched matrix product."""
    if depthwise:
        m = P.shape[1] // groups
        return P.reshape(P.shape[0], groups, m).transpose(0, 1), F_.reshape(groups, m, -1)
    return P.reshape(groups, P.shape[0] // groups, -1), F_.reshape(groups, F_.shape[0] // groups, -1)


def compose(P: Tensor, F_: Tensor, groups: int = 1, depthwise: bool = False, image: Tensor | None = None) -> Tensor:
    """The filters W = P F of the one convolution that equals "F, then 1 x 1 P".

    Args:
        P: mixing weights (out_channels, M / groups, 1, 1).
        F_: bank (M, in_channels / groups, k, k); with `depthwise`, (in_channels * m, 1, k, k) and groups = in_channels.
        groups: groups of both convolutions.
        depthwise: the bank acts on single channels while P mixes all of them.
        image: `bank_image(F_)`, where it is at hand.

    Returns:
        W of shape (out_channels, in_channels / groups, k, k), or (out_channels, in_channels, k, k) with `depthwise`.

    >>> P, F_ = torch.randn(2, 5, 1, 1), torch.randn(5, 3, 3, 3)
    >>> torch.allclose(compose(P, F_), torch.einsum("om,mcij->ocij", P[:, :, 0, 0], F_), atol=1e-6)
    True
    """
    if image is not None:
        W = F.conv2d(image, P).transpose(0, 1)
    else:
        p, f = _rows(P, F_, groups, depthwise)
        W = (p @ f).transpose(0, 1) if depthwise else p @ f
        W = W.reshape(P.shape[0], -1, *F_.shape[2:])
    return W.contiguous(memory_format=torch.channels_last)


class TimesGram(torch.autograd.Function):
    """Identity on W whose gradient G becomes G S: the gradient step that (P, F) would have made."""

    @staticmethod
    def forward(ctx, W: Tensor, S: Tensor) -> Tensor:
        ctx.save_for_backward(S)
        return W.view_as(W)

    @staticmethod
    def backward(ctx, G: Tensor):
        (S,) = ctx.saved_tensors
        with torch.autocast(G.device.type, enabled=False):
            return (G.to(S.dtype).reshape(G.shape[0], -1) @ S).reshape(G.shape), None


def sample_gram(out_channels: int, M: int, shape: torch.Size, generator: torch.Generator | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """W0 and S = F^T F of M Gaussian filters of variance 1/(3n) without drawing them (Bartlett): any M at the cost of an n x n product.

    S is Wishart(M)/(3n); given S, W0 = P0 F with P0 ~ U(-1/sqrt M, 1/sqrt M) has covariance S/(3M), Gaussian to order 1/M.
    """
    n = math.prod(shape)
    kw = {"generator": generator, "dtype": torch.float64}
    L = torch.randn(n, n, **kw).tril(-1)
    freedom = M - torch.arange(n, dtype=torch.float64)
    L.diagonal().copy_((2 * torch._standard_gamma(freedom / 2, generator=generator)).sqrt())  # chi with M, M-1, ... degrees
    L /= math.sqrt(3 * n)
    W = torch.randn(out_channels, n, **kw) @ L.T / math.sqrt(3 * M)
    return W.view(out_channels, *shape).to(like), (L @ L.T).to(like)
