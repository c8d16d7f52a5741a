"""Random filters that need no data and no theory, and the package's one way to draw random numbers.

Papers: Gavrikov and Keuper, *The Power of Linear Combinations* (arXiv 2301.11360) for frozen uniform filters; Juefei-Xu et al., *Local Binary Convolutional
Neural Networks* (arXiv 1608.06049) for sparse signs; Zheng and Lucey (arXiv 2401.12511) for impulses, boxes and blobs.

A fill is ``fill(kernel_size, n, generator) -> (n, *kernel)`` in float64 on the CPU. The numbers come from the generator, on its own device, and from nowhere
else: without one a fill raises. Fills that depend on more than the kernel name it: ``fan_in`` = I/g * prod(kernel), ``channels`` = (O, I/g).
"""

import math

import torch
from torch import Tensor

from .bases import gabor_filter, shape_of

Size = int | tuple[int, ...]


def need(generator: torch.Generator | None, what: str = "this bank") -> torch.Generator:
    """The generator, or a ValueError that says how to get one."""
    if generator is None:
        raise ValueError(f"generator=None: {what} is random; give generator=torch.Generator().manual_seed(...)")
    return generator


def spawn(generator: torch.Generator) -> torch.Generator:
    """A new stream on the same device, seeded by the next number of this one.

    >>> a, b = (spawn(torch.Generator().manual_seed(0)) for _ in range(2)); a.initial_seed() == b.initial_seed()
    True
    """
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device).item()
    return torch.Generator(generator.device).manual_seed(seed)


def rand(*size: int, generator: torch.Generator | None, low: float = 0.0, high: float = 1.0) -> Tensor:
    """float64 uniform numbers, drawn on the generator's device, returned on the CPU."""
    return low + (high - low) * torch.rand(*size, generator=need(generator), dtype=torch.float64, device=generator.device).cpu()


def randn(*size: int, generator: torch.Generator | None) -> Tensor:
    """float64 standard normal numbers, drawn on the generator's device, returned on the CPU."""
    return torch.randn(*size, generator=need(generator), dtype=torch.float64, device=generator.device).cpu()


def choose(n: int, high: int, generator: torch.Generator | None) -> Tensor:
    """n integers from 0 to high - 1, with repetition."""
    return torch.randint(high, (n,), generator=need(generator), device=generator.device).cpu()


def uniform(kernel_size: Size, n: int, fan_in: int, generator: torch.Generator) -> Tensor:
    """PyTorch's default, Kaiming uniform with a = sqrt(5): ``w ~ U(-1, 1) / sqrt(fan_in)``, variance ``1 / (3 fan_in)``.

    >>> uniform(3, 4, 36, torch.Generator().manual_seed(0)).shape
    torch.Size([4, 3, 3])
    """
    return rand(n, *shape_of(kernel_size), generator=generator, low=-1, high=1) / math.sqrt(fan_in)


def normal(kernel_size: Size, n: int, fan_in: int, generator: torch.Generator) -> Tensor:
    """A normal fill of the same variance, ``w ~ N(0, 1 / (3 fan_in))``.

    >>> normal((1, 5), 2, 10, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 1, 5])
    """
    return randn(n, *shape_of(kernel_size), generator=generator) / math.sqrt(3 * fan_in)


def orthogonal(kernel_size: Size, n: int, generator: torch.Generator, channels: tuple[int, int] | None = None) -> Tensor:
    """The layer as a random orthogonal matrix: rows ``(O, I/g prod(kernel))`` orthonormal, or the columns if there are more rows (as
    ``nn.init.orthogonal_``).

    Args:
        channels: (O, I/g) with O I/g = n; by default every kernel is a row of its own.

    >>> w = orthogonal(3, 8, torch.Generator().manual_seed(0), channels=(4, 2)).reshape(4, -1)
    >>> torch.allclose(w @ w.T, torch.eye(4, dtype=torch.float64))
    True
    """
    shape = shape_of(kernel_size)
    rows = n if channels is None else channels[0]
    return _orthonormal(rows, n * math.prod(shape) // rows, generator).reshape(n, *shape)


def random_basis(kernel_size: Size, generator: torch.Generator) -> Tensor:
    """A random orthonormal basis, ``(prod(kernel), *kernel)``: the control for "is it the cosines or just k^2 orthogonal atoms".

    >>> b = random_basis(3, torch.Generator().manual_seed(0)).flatten(1); torch.allclose(b @ b.T, torch.eye(9, dtype=torch.float64))
    True
    """
    shape = shape_of(kernel_size)
    return _orthonormal(math.prod(shape), math.prod(shape), generator).reshape(-1, *shape)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Uniform (Haar measure) over the matrices with orthonormal rows, or columns if rows > columns."""
    q, r = torch.linalg.qr(randn(max(rows, columns), min(rows, columns), generator=generator))
    q = q * r.diagonal().sign()
    return q if rows > columns else q.T


def impulse(kernel_size: Size, n: int, generator: torch.Generator) -> Tensor:
    """One 1 at a random place, 0 elsewhere: the convolution shifts each channel.

    >>> impulse(3, 5, torch.Generator().manual_seed(0)).sum((1, 2))
    tensor([1., 1., 1., 1., 1.], dtype=torch.float64)
    """
    shape = shape_of(kernel_size)
    return torch.eye(math.prod(shape), dtype=torch.float64)[choose(n, math.prod(shape), generator)].reshape(n, *shape)


def sparse(kernel_size: Size, n: int, generator: torch.Generator, density: float = 0.5) -> Tensor:
    """Sparse signs (local binary convolution): each weight is 0 with probability ``1 - density``, else -1 or 1 with equal odds.

    >>> sparse(3, 5, torch.Generator().manual_seed(0)).unique()
    tensor([-1.,  0.,  1.], dtype=torch.float64)
    """
    if not 0 < density <= 1:
        raise ValueError(f"density={density}: the share of non-zero weights must be in (0, 1]")
    u = rand(n, *shape_of(kernel_size), generator=generator, low=-1)
    return u.sign() * (u.abs() < density)


def box(kernel_size: Size, n: int, generator: torch.Generator, side: int = 2) -> Tensor:
    """A box of ones with ``side`` pixels a side, wholly inside the kernel, at a random place.

    >>> box(4, 3, torch.Generator().manual_seed(0)).sum((1, 2))
    tensor([4., 4., 4.], dtype=torch.float64)
    """
    shape = shape_of(kernel_size)
    bank = torch.ones(n, *shape, dtype=torch.float64)
    for axis, k in enumerate(shape):
        width = min(side, k)
        offset = torch.arange(k) - choose(n, k - width + 1, generator)[:, None]
        bank *= ((offset >= 0) & (offset < width)).reshape(n, *(k if i == axis else 1 for i in range(len(shape))))
    return bank


def blob(kernel_size: Size, n: int, generator: torch.Generator, sigma: float = 0.5) -> Tensor:
    """A Gaussian blob ``exp(-|p - q|^2 / (2 sigma^2))`` around a random point q of the kernel.

    >>> blob((5,), 2, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 5])
    """
    shape = shape_of(kernel_size)
    bank = torch.ones(n, *shape, dtype=torch.float64)
    for axis, k in enumerate(shape):
        distance = torch.arange(k) - rand(n, 1, generator=generator, high=k - 1)
        bank *= torch.exp(-(distance**2) / (2 * sigma**2)).reshape(n, *(k if i == axis else 1 for i in range(len(shape))))
    return bank


def gabor(kernel_size: Size, n: int, generator: torch.Generator) -> Tensor:
    """Random Gabor filters of unit norm.

    Direction ``U(0, pi)``, frequency ``U(1/(2k), 1/2)`` cycles per pixel, phase ``U(0, 2 pi)``, width ``U(k/8, k/3)`` (these ranges are ours).

    >>> gabor(7, 4, torch.Generator().manual_seed(0)).shape
    torch.Size([4, 7, 7])
    """
    k = max(shape_of(kernel_size, 2))
    theta, frequency, phase, sigma = rand(4, n, generator=generator)
    low = min(1 / (2 * k), 0.5)
    return gabor_filter(kernel_size, math.pi * theta, low + (0.5 - low) * frequency, 2 * math.pi * phase, k / 8 + (k / 3 - k / 8) * sigma)
