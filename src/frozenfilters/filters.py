"""Filters that nobody learns: all banks by name, and the one function that writes a bank into a weight.

Papers: Gaudio et al., *ExplainFix* (arXiv 2303.10408); Gavrikov and Keuper, *The Power of Linear Combinations* (arXiv 2301.11360). The filters themselves
live in ``bases`` (closed forms), ``fills`` (plain random ones), ``recipes`` (ExplainFix's mixtures) and ``steering`` (prescribed or measured covariance); all
of them are names of this module too.

A **bank** is one of two things. A *basis* is a function ``basis(kernel_size) -> (m, *kernel)``: m fixed filters, which :func:`draw_` deals out to the layer's
kernels from shuffled decks, so that every filter is used equally often. A *fill* is a function ``fill(kernel_size, n, generator) -> (n, *kernel)`` that draws
one filter per kernel. A fill that has a parameter called ``fan_in``, ``channels`` or ``depth`` is told the layer's fan-in ``I/g * prod(kernel)``, its ``(O,
I/g)`` and its relative depth in the network.
"""

import difflib
import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from .bases import cosines, dct, dct4, dct_steered, gabor_filter, ghaar4_filter, ghaar_filter, identity, ones, psine_filter
from .fills import blob, box, gabor, impulse, need, normal, orthogonal, rand, random_basis, sparse, spawn, uniform
from .recipes import dct_fill0, fillzero, ghaar, ghaar2_ms, ghaar4_ms, ghaar4_s1, ghaar4_s2, ghaar_grid, ghaar_mixed, haar, polynomial, psine
from .steering import covariance, covariance_matrix, empirical_covariance, interpolate, resample, schedule, spectrum, steer, transfer

__all__ = [
    "Bank", "BANKS", "blob", "box", "cosines", "covariance", "covariance_matrix", "dct", "dct4", "dct_fill0", "dct_steered", "deal", "draw_",
    "empirical_covariance", "fillzero", "gabor", "gabor_filter", "ghaar", "ghaar4_filter", "ghaar_filter", "ghaar_grid", "ghaar_mixed", "haar",
    "identity", "impulse", "interpolate", "lookup", "need", "normal", "ones", "orthogonal", "polynomial", "psine", "psine_filter", "random_basis",
    "resample", "schedule", "sparse", "spawn", "spectrum", "steer", "transfer", "uniform",
]  # fmt: skip

Bank = str | Tensor | Callable[..., Tensor]


BANKS: dict[str, Callable[..., Tensor]] = {
    "random": uniform,
    "uniform": uniform,
    "normal": normal,
    "orthogonal": orthogonal,
    "random-basis": random_basis,
    "impulse": impulse,
    "sparse": sparse,
    "box": box,
    "blob": blob,
    "gabor": gabor,
    "ones": ones,
    "identity": identity,
    "dct": dct,
    "dct4": dct4,
    "dct.fill0": dct_fill0,
    "haar": haar,
    "ghaar": ghaar,
    "ghaar4.s1": ghaar4_s1,
    "ghaar4.s2": ghaar4_s2,
    "ghaar2.ms": ghaar2_ms,
    "ghaar4.ms": ghaar4_ms,
    "ghaarr.ms": ghaar_mixed,
    "psine": psine,
    "polynomial": polynomial,
    "covariance": covariance,
    "covariance.recollected": functools.partial(covariance, form="recollected"),
    "spectrum": spectrum,
}


def deal(channels: tuple[int, int], m: int, generator: torch.Generator, legacy: bool = False) -> Tensor:
    """Which of m filters each kernel of a layer gets: ``(O, I/g)`` integers.

    Kernels are served in order from shuffled decks of the m filters, so that over the layer every filter occurs equally often (plus or minus one), and a
    stem with three input channels sees them all. ``legacy=True`` is the original's rule: each output channel gets a random order of ``0 .. I/g - 1`` modulo
    m, so that with few inputs only the first ``I/g`` filters are ever used (with one input channel, one random order of ``0 .. O - 1`` modulo m).

    >>> deal((6, 3), 9, torch.Generator().manual_seed(0)).flatten().bincount()
    tensor([2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    out, inp = channels
    if not legacy:
        return rand(-(-out * inp // m), m, generator=generator).argsort(1).flatten()[: out * inp].reshape(out, inp)
    if inp == 1:
        return torch.randperm(out, generator=need(generator), device=generator.device).cpu().reshape(out, 1) % m
    return rand(out, inp, generator=generator).argsort(1) % m


def lookup(name: str) -> Callable[..., Tensor]:
    """The bank of that name, upper or lower case.

    Raises:
        ValueError: no such bank; the message proposes one and lists all.

    >>> lookup("DCT") is dct
    True
    """
    if name.lower() not in BANKS:
        names = [*BANKS, "unchanged", "fillzero"]
        close = difflib.get_close_matches(name.lower(), names, 1)
        raise ValueError(f'bank="{name}" is unknown' + (f'; did you mean "{close[0]}"?' if close else ".") + f" Known: {', '.join(sorted(names))}")
    return BANKS[name.lower()]


@torch.no_grad()
def draw_(
    weight: Tensor,
    bank: Bank,
    *,
    generator: torch.Generator | None = None,
    gain: str | float | None = None,
    legacy: bool = False,
    depth: float = 0.0,
) -> Tensor:
    """Fill a convolution's weight with filters from a bank, in place.

    Args:
        weight: ``(O, I/g, *kernel)``, any device and float type.
        bank: a name in :data:`BANKS`, a tensor ``(m, *kernel)``, or a function ``(kernel_size, n, generator) -> (n, *kernel)``. ``"unchanged"`` keeps what is
            there, ``"fillzero"`` redraws only zeros. A tensor with a generator is dealt from shuffled decks (:func:`deal`), without one in its own order.
        generator: the only source of randomness; may live on another device than the weight.
        gain: ``"match"`` rescales the layer so that its mean square is PyTorch's default variance, ``1 / (3 I/g prod(kernel))``; a number multiplies; None
            keeps the bank's own scale.
        legacy: deal a basis as the original did.
        depth: relative depth of the layer, 0 to 1, for banks that change with it.

    Returns:
        The weight.

    Raises:
        ValueError: unknown name, a random bank without generator, filters of another shape than the kernel.

    >>> conv = torch.nn.Conv2d(3, 8, 3)
    >>> _ = draw_(conv.weight, "dct", generator=torch.Generator().manual_seed(0))
    >>> conv.weight.flatten(2).norm(dim=2).allclose(torch.ones(8, 3))
    True
    """
    if weight.ndim < 3:
        raise ValueError(f"weight of shape {tuple(weight.shape)} has no kernel; draw_ fills convolutions (O, I/g, *kernel)")
    channels, kernel = tuple(weight.shape[:2]), tuple(weight.shape[2:])
    fan_in, n = weight[0].numel(), channels[0] * channels[1]
    name = bank.lower() if isinstance(bank, str) else None
    if name == "unchanged":
        filters = weight
    elif name == "fillzero":
        filters = fillzero(weight, generator)
    else:
        context = {"fan_in": fan_in, "channels": channels, "depth": depth}
        filters = _filters(bank if name is None else lookup(name), kernel, n, generator, legacy, context)
    if filters.numel() != weight.numel() or filters.shape[-len(kernel) :] != weight.shape[2:]:
        raise ValueError(f"bank gave filters of shape {tuple(filters.shape)}; the weight {tuple(weight.shape)} needs {(n, *kernel)}")
    filters = filters.reshape(weight.shape)
    if gain == "match":
        square = filters.double().square().mean()
        filters = filters * (1 / (3 * fan_in * square)).sqrt() if square > 0 else filters
    elif isinstance(gain, int | float):
        filters = filters * gain
    elif gain is not None:
        raise ValueError(f'gain={gain!r}: give "match", a number, or None for the bank\'s own scale')
    return weight.copy_(filters)


def _filters(bank, kernel, n, generator, legacy, context) -> Tensor:
    """One filter per kernel, ``(n, *kernel)``: a fill draws them, a basis (or tensor) is dealt out."""
    ordered = isinstance(bank, Tensor) and generator is None
    if not isinstance(bank, Tensor):
        parameters = inspect.signature(bank).parameters
        known = {"n": n, "generator": generator, **context}
        required = [p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if "generator" in parameters:
            need(generator, f"the bank {getattr(bank, '__name__', bank)!r}")
        if len(required) >= 3 and not set(required[1:3]) <= set(known):  # the caller's own words, such as lambda k, n, g: ...
            return bank(kernel, n, generator, **{name: value for name, value in context.items() if name in parameters})
        filters = bank(kernel, **{name: value for name, value in known.items() if name in parameters})
        if "n" in parameters:
            return filters
        bank = filters
    if len(bank) == 1 or ordered:
        index = torch.arange(n) % len(bank)
    else:
        index = deal(context["channels"], len(bank), generator, legacy).flatten()
    return bank[index.to(bank.device)]
