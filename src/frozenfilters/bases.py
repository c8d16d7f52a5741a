"""Closed-form filters: every number follows from a formula, nothing is drawn.

Papers: Gaudio et al., *ExplainFix* (arXiv 2303.10408) for the cosine bases, GHaar and Psine; Ahmed, Natarajan and Rao (1974) for the DCT; Gabor (1946).
A filter bank is a float64 tensor of shape ``(m, *kernel)``; it becomes float32 only when :func:`frozenfilters.filters.draw_` writes it into a weight.

An image filter of the DCT is an outer product of two cosines, ``B[u * k + v] = b_u b_v^T``: u counts the half waves down the rows, v along the columns,
so ``(u > 0, v = 0)`` sees horizontal edges, ``(0, v > 0)`` vertical ones.
"""

import math

import torch
from torch import Tensor

__all__ = ["cosines", "dct", "dct4", "dct_steered", "gabor_filter", "ghaar4_filter", "ghaar_filter", "identity", "ones", "psine_filter", "shape_of"]


def shape_of(kernel_size: int | tuple[int, ...], ndim: int | None = None) -> tuple[int, ...]:
    """The kernel's shape: an integer k means k x k, a tuple means itself.

    Raises:
        ValueError: a size below 1, or a bank that needs ``ndim`` axes and got another number.

    >>> shape_of(3), shape_of((1, 7)), shape_of((5,))
    ((3, 3), (1, 7), (5,))
    """
    shape = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(int(s) for s in kernel_size)
    if not shape or min(shape) < 1:
        raise ValueError(f"kernel_size={kernel_size!r}: every side must be at least 1; give k or (rows, columns)")
    if ndim is not None and len(shape) != ndim:
        raise ValueError(
            f"kernel_size={kernel_size!r} has {len(shape)} axes, this bank is defined for {ndim}; "
            'at any number of axes work "random", "normal", "orthogonal", "impulse", "sparse", "dct", "covariance" and "spectrum"'
        )
    return shape


def cosines(points: int, count: int | None = None, *, a: float = 0.5, b: float = 0.0) -> Tensor:
    """The general cosine family ``cos(pi (u + b) (m + a) / N)``, amplitude 1, not normalised.

    ``(a, b)`` = (1/2, 0) is type II, (0, 0) type I, (0, 1/2) type III, (1/2, 1/2) type IV. ``count < points`` gives the undercomplete set: the first
    ``count`` waves on ``points`` samples.

    Returns:
        ``(count, points)`` float64, row u = frequency u.

    >>> cosines(2).round(decimals=3)
    tensor([[ 1.0000,  1.0000],
            [ 0.7070, -0.7070]], dtype=torch.float64)
    """
    count = points if count is None else count
    if points < 1 or not 1 <= count <= points:
        raise ValueError(f"points={points}, count={count}: need 1 <= count <= points")
    u, m = torch.arange(count, dtype=torch.float64)[:, None], torch.arange(points, dtype=torch.float64)
    return torch.cos(math.pi * (u + b) * (m + a) / points)


def _outer(factors: list[Tensor]) -> Tensor:
    """All outer products of the factors' rows, last axis fastest: ``(c_i, n_i) -> (prod c_i, *n_i)``."""
    basis = factors[0]
    for axis in factors[1:]:
        basis = torch.einsum("a...,bn->ab...n", basis, axis).flatten(0, 1)
    return basis


def dct(kernel_size: int | tuple[int, ...], count: int | None = None) -> Tensor:
    """The orthonormal DCT-II basis, in any number of dimensions.

    ``b_u[m] = s_u cos(pi u (m + 1/2) / k)`` with ``s_0 = sqrt(1/k)`` and ``s_u = sqrt(2/k)``; all filters but the first sum to zero.

    Args:
        kernel_size: k for k x k, or a tuple.
        count: keep only the first ``count`` frequencies of each axis (the undercomplete basis).

    Returns:
        ``(k * k, k, k)`` float64, index ``u * k + v``; for a tuple ``(prod(shape), *shape)``.

    >>> dct(3).shape, dct((1, 5)).shape, dct(5, count=2).shape
    (torch.Size([9, 3, 3]), torch.Size([5, 1, 5]), torch.Size([4, 5, 5]))
    >>> flat = dct(4).flatten(1)
    >>> torch.allclose(flat @ flat.T, torch.eye(16, dtype=torch.float64))
    True
    """
    factors = []
    for k in shape_of(kernel_size):
        waves = cosines(k, None if count is None else min(count, k)) * math.sqrt(2 / k)
        waves[0] /= math.sqrt(2)
        factors.append(waves)
    return _outer(factors)


def dct4(kernel_size: int | tuple[int, ...]) -> Tensor:
    """The orthonormal DCT-IV basis ``sqrt(2/k) cos(pi (u + 1/2)(m + 1/2) / k)``: like :func:`dct`, but no filter sums to zero.

    >>> bool((dct4(3).sum((1, 2)).abs() > 0.02).all())
    True
    """
    return _outer([cosines(k, a=0.5, b=0.5) * math.sqrt(2 / k) for k in shape_of(kernel_size)])


def dct_steered(kernel_size: int | tuple[int, ...], weights: Tensor, indices: Tensor, power: float | Tensor = 1) -> Tensor:
    """Mixtures of a few DCT filters: ``W = sum_l w_l^p B[idx_l]`` (the power hits the weight, as in the original).

    Args:
        weights: ``(n, L)``. indices: ``(n, L)`` or ``(L,)`` positions in the basis, ``u * k + v``.

    Returns:
        ``(n, *kernel)`` float64.

    >>> dct_steered(4, torch.tensor([[4.0]]), torch.tensor([0]))[0, 0]
    tensor([1., 1., 1., 1.], dtype=torch.float64)
    """
    basis, weights = dct(kernel_size), weights.double() ** power
    coefficients = torch.zeros(len(weights), len(basis), dtype=torch.float64)
    coefficients.scatter_add_(1, indices.expand_as(weights), weights)
    return torch.tensordot(coefficients, basis, 1)


def _column(value: float | Tensor) -> Tensor:
    """A number or a vector of n parameters as ``(n or 1, 1, 1)``, ready to multiply ``(rows, columns)``."""
    return torch.as_tensor(value, dtype=torch.float64).reshape(-1, 1, 1)


def ghaar_filter(
    kernel_size: int | tuple[int, int],
    h: float | Tensor,
    v: float | Tensor,
    d: float | Tensor,
    a: float | Tensor = 0.0,
    f: float | Tensor = 1.0,
    normalize: bool = False,
) -> Tensor:
    """The generalised Haar filter, ``W = h c 1^T + v 1 c^T + d c c^T + a 1 1^T`` with ``c_m = cos(f pi m / (M - 1))``.

    ExplainFix's steered family. Two samples and f = 1 give the Haar triple. ``f`` and ``2 (M - 1) - f`` are the same filter, f = M - 1 is Nyquist. The sum is
    zero only if the cosine's is (odd f) and a = 0.

    Args:
        kernel_size: k or (rows, columns).
        h, v, d, a, f: numbers, or vectors of shape ``(n,)`` for n filters. h makes it vary down the rows.
        normalize: divide each filter by its Frobenius norm.

    Returns:
        ``(rows, columns)`` float64, or ``(n, rows, columns)`` if any parameter is a vector.

    Raises:
        ValueError: ``normalize=True`` and a filter is zero (f = 0 with h + v + d + a = 0).

    >>> ghaar_filter(2, 1, 0, 0)
    tensor([[ 1.,  1.],
            [-1., -1.]], dtype=torch.float64)
    """
    rows, columns = shape_of(kernel_size, 2)
    single = all(not isinstance(p, Tensor) or p.ndim == 0 for p in (h, v, d, a, f))
    h, v, d, a, f = (_column(p) for p in (h, v, d, a, f))
    c_rows = torch.cos(f * math.pi * torch.arange(rows, dtype=torch.float64)[:, None] / max(rows - 1, 1))
    c_columns = torch.cos(f * math.pi * torch.arange(columns, dtype=torch.float64) / max(columns - 1, 1))
    bank = h * c_rows + v * c_columns + d * c_rows * c_columns + a
    if normalize:
        norm = torch.linalg.matrix_norm(bank, keepdim=True)
        if (norm == 0).any():
            raise ValueError("normalize=True: a filter is zero everywhere (f = 0 needs h + v + d + a != 0); change f or use normalize=False")
        bank = bank / norm
    return bank[0] if single else bank


def ghaar4_filter(kernel_size: int | tuple[int, int], a: float, h: float, v: float, d: float) -> Tensor:
    """GHaar on the DCT grid: ``a B[0,0] + h B[1,0] + v B[0,1] + d B[1,1]``, shape ``(rows, columns)``.

    >>> torch.equal(ghaar4_filter(3, 0, 1, 0, 0), dct(3)[3])
    True
    """
    rows, columns = shape_of(kernel_size, 2)
    return dct_steered(kernel_size, torch.tensor([[a, h, v, d]], dtype=torch.float64), torch.tensor([0, columns, 1, columns + 1]))[0]


def psine_filter(kernel_size: int | tuple[int, int], w: Tensor, f: Tensor, t: Tensor, p: Tensor) -> Tensor:
    """A polynomial of sines: ``sum_l w_l (sin(x f_l0 + t_l0) (x) sin(x f_l1 + t_l1))^round(p_l)``, then min-max to [-1, 1], then unit norm.

    x runs over ``linspace(0, pi, k)`` on both axes, the power is taken element by element, halves round to even.

    Args:
        w, p: ``(L,)``. f, t: ``(L, 2)``.

    Returns:
        ``(rows, columns)`` float64.

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> psine_filter(2, one, one.expand(1, 2), one.expand(1, 2), one).norm().item()
    1.0
    """
    return normalized(psine_terms(shape_of(kernel_size, 2), w, f, t, p).sum(0, keepdim=True))[0]


def psine_terms(shape: tuple[int, int], w: Tensor, f: Tensor, t: Tensor, p: Tensor) -> Tensor:
    """The weighted terms of :func:`psine_filter` before they are summed: ``(L,), (L, 2), (L, 2), (L,) -> (L, rows, columns)``."""
    down, along = (torch.sin(torch.linspace(0, math.pi, k, dtype=torch.float64) * f[:, i, None] + t[:, i, None]) for i, k in enumerate(shape))
    return w[:, None, None] * (down[:, :, None] * along[:, None, :]) ** torch.round(p)[:, None, None]


def normalized(bank: Tensor) -> Tensor:
    """Min-max each filter to [-1, 1], then divide by its Frobenius norm: ``(n, rows, columns)``. A constant filter stays constant, of unit norm."""
    low, high = bank.amin((1, 2), keepdim=True), bank.amax((1, 2), keepdim=True)
    bank = torch.where(high > low, 2 * (bank - low) / (high - low).clamp_min(1e-300) - 1, 1.0)
    return bank / torch.linalg.matrix_norm(bank, keepdim=True)


def gabor_filter(
    kernel_size: int | tuple[int, int], theta: float | Tensor, frequency: float | Tensor, phase: float | Tensor = 0.0, sigma: float | Tensor | None = None
) -> Tensor:
    """A wave under a Gaussian, ``exp(-(x^2 + y^2) / (2 sigma^2)) cos(2 pi f (x cos(theta) + y sin(theta)) + phase)``, unit norm.

    Args:
        theta: direction in which it varies; 0 = along the columns (a vertical edge). frequency: cycles per pixel, at most 0.5.
        sigma: width in pixels, by default a quarter of the longer side. Numbers or vectors ``(n,)``.

    Returns:
        ``(n, rows, columns)`` float64.

    >>> gabor_filter(3, 0.0, 0.25, sigma=1.0).shape
    torch.Size([1, 3, 3])
    """
    rows, columns = shape_of(kernel_size, 2)
    y = torch.arange(rows, dtype=torch.float64)[:, None] - (rows - 1) / 2
    x = torch.arange(columns, dtype=torch.float64) - (columns - 1) / 2
    theta, frequency, phase = (_column(p) for p in (theta, frequency, phase))
    sigma = _column(max(rows, columns) / 4 if sigma is None else sigma)
    bank = torch.exp(-(x**2 + y**2) / (2 * sigma**2)) * torch.cos(2 * math.pi * frequency * (x * theta.cos() + y * theta.sin()) + phase)
    return bank / torch.linalg.matrix_norm(bank, keepdim=True).clamp_min(1e-12)


def ones(kernel_size: int | tuple[int, ...]) -> Tensor:
    """ExplainFix's bad control: one filter, every weight 1. Shape ``(1, *kernel)``.

    >>> ones(2)
    tensor([[[1., 1.],
             [1., 1.]]], dtype=torch.float64)
    """
    return torch.ones(1, *shape_of(kernel_size), dtype=torch.float64)


def identity(kernel_size: int | tuple[int, ...]) -> Tensor:
    """One filter with a single 1 at ``k // 2`` of each axis: a convolution that mixes channels and nothing else. Shape ``(1, *kernel)``.

    >>> identity(3)[0, 1]
    tensor([0., 1., 0.], dtype=torch.float64)
    """
    shape = shape_of(kernel_size)
    bank = torch.zeros(1, *shape, dtype=torch.float64)
    bank[(0, *(k // 2 for k in shape))] = 1
    return bank
