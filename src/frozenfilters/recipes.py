"""ExplainFix's recipes: random mixtures of smooth basis filters (Gaudio et al., arXiv 2303.10408).

The paper's claim is that frozen filters work when they are *steered*, that is, random mixtures ``W = sum_l w_l B_l`` of basis filters, and not when they are
single basis filters. GHaar mixes three cosine waves and a constant with a random frequency, Psine mixes powers of sine waves. The paper's tables use
``ghaar`` and ``psine``; the rest are the relatives of its code, kept for the atlas. All follow the fill convention of ``fills``; the streams are ours.
"""

import functools
import math

import torch
from torch import Tensor

from .bases import dct, dct_steered, ghaar_filter, normalized, psine_terms, shape_of
from .fills import Size, rand, randn, uniform


def ghaar(kernel_size: Size, n: int = 1, *, generator: torch.Generator) -> Tensor:
    """The paper's GHaar: ``(h, v, d) ~ U(-1, 1)^3``, a = 0, ``f ~ U(0, 2 (k - 1))`` per filter, not normalised. See :func:`ghaar_filter`.

    Its norm is about 2.1 at k = 3 and 3.4 at k = 5, and it is low-pass on average.

    >>> ghaar(3, n=64, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([64, 3, 3])
    """
    h, v, d = rand(n, 3, generator=generator, low=-1).unbind(1)
    return ghaar_filter(kernel_size, h, v, d, f=rand(n, generator=generator, high=2 * (max(shape_of(kernel_size, 2)) - 1)))


def haar(kernel_size: Size, n: int, generator: torch.Generator) -> Tensor:
    """The code's ``haar`` recipe: as :func:`ghaar`, but ``f ~ U(0, j + 1)`` with j the filter's number, and unit norm. Aliasing makes f random.

    >>> haar(3, 2, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3, 3])
    """
    h, v, d = rand(n, 3, generator=generator, low=-1).unbind(1)
    f = rand(n, generator=generator) * torch.arange(1, n + 1)
    return ghaar_filter(kernel_size, h, v, d, f=f, normalize=True)


def ghaar_grid(kernel_size: Size, n: int, generator: torch.Generator, step: int = 1) -> Tensor:
    """GHaar on the DCT grid with four fixed atoms: ``sum_l w_l B[idx_l]``, ``w ~ N(0, 1)``, ``idx = {0, s, s k, s k + s}`` (GHaar4.s1 and GHaar4.s2).

    Raises:
        ValueError: a side of the kernel is not larger than ``step``.

    >>> ghaar_grid(3, 2, torch.Generator().manual_seed(0), step=2).shape
    torch.Size([2, 3, 3])
    """
    rows, columns = shape_of(kernel_size, 2)
    if min(rows, columns) <= step:
        raise ValueError(f"kernel_size={kernel_size!r} has no frequency {step}; every side must be at least {step + 1}, or take another bank")
    return dct_steered(kernel_size, randn(n, 4, generator=generator), torch.tensor([0, step, step * columns, step * columns + step]))


def ghaar_mixed(kernel_size: Size, n: int, generator: torch.Generator, atoms: int | None = None) -> Tensor:
    """Mixtures of distinct random DCT atoms, chosen anew for each filter, ``w ~ N(0, 1)`` (GHaar2.ms, GHaar4.ms, GHaarR.ms).

    Args:
        atoms: how many per filter, at most all; None draws ``R = round(2^U(0, log2 k^2))`` once for the whole call, that is, per layer.

    >>> ghaar_mixed((1, 5), 2, torch.Generator().manual_seed(0), atoms=2).shape
    torch.Size([2, 1, 5])
    """
    m = math.prod(shape_of(kernel_size))
    if atoms is None:
        atoms = round(2 ** (rand(1, generator=generator).item() * math.log2(m)))
    indices = rand(n, m, generator=generator).argsort(1)[:, : min(atoms, m)]
    return dct_steered(kernel_size, randn(*indices.shape, generator=generator), indices)


ghaar4_s1 = functools.partial(ghaar_grid, step=1)
ghaar4_s2 = functools.partial(ghaar_grid, step=2)
ghaar2_ms = functools.partial(ghaar_mixed, atoms=2)
ghaar4_ms = functools.partial(ghaar_mixed, atoms=4)


def psine(kernel_size: Size, n: int, generator: torch.Generator) -> Tensor:
    """The paper's Psine: polynomials of ``L = int(3 + 2^(6u))`` sine waves, 4 to 66 of them, unit norm. See :func:`psine_filter`.

    Per filter ``fmax ~ U(1, 5)``; per term ``f ~ fmax U(0, 1)^2``, ``t ~ 2 pi U(0, 1)^2``, ``p = 1 + U(0, 1) ((L - 1)/2 - 1)``, ``w = 2 r / sum(r) - 1`` with
    ``r ~ U(0, 1)``. Nearly flat spectrum.

    >>> psine(3, 4, torch.Generator().manual_seed(0)).shape
    torch.Size([4, 3, 3])
    """
    shape = shape_of(kernel_size, 2)
    lengths = (3 + 2 ** (6 * rand(n, generator=generator))).long()
    top = rand(n, generator=generator, low=1, high=5)

    def terms(owner: Tensor, length: Tensor) -> Tensor:
        count = len(owner)
        f = top[owner, None] * rand(count, 2, generator=generator)
        t = rand(count, 2, generator=generator, high=2 * math.pi)
        p = 1 + rand(count, generator=generator) * ((length - 1) / 2 - 1)
        return psine_terms(shape, 2 * _shares(owner, n, generator) - 1, f, t, p)

    return normalized(_sum_terms(terms, lengths, shape))


def polynomial(kernel_size: Size, n: int, generator: torch.Generator) -> Tensor:
    """Psine's looser sibling: free vectors ``U(-1/2, 3/2)`` instead of sines, ``L = int(2^(6u))``, positive weights that sum to 1.

    The powers reach 32, so the values reach 1e11; we bring each filter to [-1, 1] and unit norm as Psine does (our reading).

    >>> polynomial(3, 4, torch.Generator().manual_seed(0)).shape
    torch.Size([4, 3, 3])
    """
    shape = shape_of(kernel_size, 2)
    lengths = (2 ** (6 * rand(n, generator=generator))).long()

    def terms(owner: Tensor, length: Tensor) -> Tensor:
        down, along = (rand(len(owner), k, generator=generator, low=-0.5, high=1.5) for k in shape)
        p = 1 + rand(len(owner), generator=generator) * ((length - 1) / 2 - 1)
        w = _shares(owner, n, generator)
        return w[:, None, None] * (down[:, :, None] * along[:, None, :]) ** torch.round(p)[:, None, None]

    return normalized(_sum_terms(terms, lengths, shape))


def _shares(owner: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Random positive numbers that sum to 1 over the terms of each filter."""
    r = rand(len(owner), generator=generator)
    return r / torch.zeros(n, dtype=torch.float64).index_add_(0, owner, r)[owner]


def _sum_terms(terms, lengths: Tensor, shape: tuple[int, ...], block: int = 2**14) -> Tensor:
    """Filters that are sums of a different number of terms each; ``owner[i]`` is the filter that term i belongs to. A block of filters at a time."""
    bank = torch.zeros(len(lengths), *shape, dtype=torch.float64)
    for chunk in torch.arange(len(lengths)).split(block):
        owner = chunk.repeat_interleave(lengths[chunk])
        bank.index_add_(0, owner, terms(owner, lengths[owner]))
    return bank


def dct_fill0(kernel_size: Size, n: int, generator: torch.Generator, channels: tuple[int, int]) -> Tensor:
    """The code's DCT2fill0: per input channel, k^2 random output channels get one DCT filter each, every other kernel is zero.

    Raises:
        ValueError: fewer than k^2 output channels.

    >>> w = dct_fill0(2, 12, torch.Generator().manual_seed(0), channels=(6, 2)); int((w.flatten(1).norm(dim=1) > 0).sum())
    8
    """
    basis, (out, inp) = dct(kernel_size), channels
    if out < len(basis):
        raise ValueError(f"channels={channels}: this recipe needs at least {len(basis)} output channels; take another bank")
    chosen = rand(out, inp, generator=generator).argsort(0)[: len(basis)]  # (k^2, I/g): which output gets filter j, for each input
    bank = torch.zeros(out, inp, *basis.shape[1:], dtype=torch.float64)
    bank[chosen, torch.arange(inp)] = basis[:, None]
    return bank.flatten(0, 1)


def fillzero(weight: Tensor, generator: torch.Generator) -> Tensor:
    """The code's FillZero: replace zeros only, keep the rest.

    A kernel that is zero everywhere is redrawn from PyTorch's default; a zero (``|x| <= 1e-8``) in any other kernel becomes ``N(mean, std)`` of that kernel,
    zeros included.

    Args:
        weight: ``(O, I/g, *kernel)``, not changed.

    Returns:
        ``(O I/g, *kernel)`` float64.

    >>> fillzero(torch.zeros(2, 1, 3, 3), torch.Generator().manual_seed(0)).count_nonzero().item()
    18
    """
    kernel, fan_in = tuple(weight.shape[2:]), weight[0].numel()
    old = weight.detach().double().cpu().reshape(-1, *kernel)
    zero = old.abs() <= 1e-8
    flat = old.flatten(1)
    mean, std = (s.reshape(-1, *[1] * len(kernel)) for s in (flat.mean(1), flat.std(1) if flat.shape[1] > 1 else torch.zeros(len(flat))))
    filled = torch.where(zero, mean + std * randn(*old.shape, generator=generator), old)
    empty = zero.flatten(1).all(1).reshape(-1, *[1] * len(kernel))
    return torch.where(empty, uniform(kernel, len(old), fan_in, generator), filled)
