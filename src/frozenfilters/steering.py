"""Random filters with a prescribed or measured second-order structure.

Papers: Trockman, Willmott and Kolter, *Understanding the Covariance Structure of Convolutional Filters* (arXiv 2210.03651); Gaudio et al., *ExplainFix*
(arXiv 2303.10408) for GuidedSteer, the kernel density of a trained layer. The spectrum dial is ours.

Three ways to say how the k^2 weights of a filter hang together: a formula (:func:`covariance_matrix`), one knob (:func:`spectrum`), a trained network
(:func:`steer`, :func:`transfer`). All follow the fill convention of ``fills``: ``fill(kernel_size, n, generator) -> (n, *kernel)``.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .bases import dct, shape_of
from .fills import Size, choose, randn

KINDS = ("kde", "gaussian", "dct", "dct-mean")


def grid(shape: tuple[int, ...]) -> Tensor:
    """Integer positions of a kernel's weights, ``(prod(shape), axes)``, last axis fastest."""
    return torch.cartesian_prod(*(torch.arange(k, dtype=torch.float64) for k in shape)).reshape(-1, len(shape))


def covariance_matrix(kernel_size: Size, s: float, t: float | None = None, *, form: str = "psd", zero_mean: bool = False) -> Tensor:
    """A closed-form covariance of the weights of one filter, scaled to mean variance 1.

    ``form="psd"``, the default and ours: ``Sigma = D R D`` with ``R[p, q] = exp(-|p - q|^2 / (2 t))`` and ``D = diag(exp(-|p - c|^2 / (4 s)))``; neighbours
    are alike, the centre is loud, and it is positive semidefinite by construction.

    ``form="recollected"``, two axes only: the paper's construction as it could be reconstructed, its code and tables being out of reach. With
    ``Z(p) = exp(-|p - c|^2 / (2 s))``, z = vec Z, and B whose row p is Z moved to p with wrap-around: ``(1 z^T + z 1^T) * (B - z z^T / 2)`` elementwise,
    symmetrised, negative eigenvalues clipped. Which of the factors is the sum and which the product is uncertain.

    Args:
        s: variance of the envelope, in pixels^2. t: variance of the correlation, by default s.
        zero_mean: remove the constant part, ``J Sigma J`` with ``J = I - 1 1^T / k^2``.

    Returns:
        ``(prod(kernel), prod(kernel))`` float64, symmetric, positive semidefinite, trace = prod(kernel).

    >>> sigma = covariance_matrix(5, s=1.0)
    >>> sigma.shape, round(sigma.trace().item(), 6), bool(torch.linalg.eigvalsh(sigma).min() > -1e-12)
    (torch.Size([25, 25]), 25.0, True)
    """
    shape, t = shape_of(kernel_size), s if t is None else t
    if s <= 0 or t <= 0:
        raise ValueError(f"s={s}, t={t}: variances must be positive")
    p = grid(shape)
    if form == "psd":
        centre = torch.tensor([(k - 1) / 2 for k in shape], dtype=torch.float64)
        envelope = torch.exp(-(p - centre).square().sum(1) / (4 * s))
        sigma = envelope[:, None] * torch.exp(-(p[:, None] - p).square().sum(2) / (2 * t)) * envelope
    elif form == "recollected":
        sigma = psd(recollected(shape_of(kernel_size, 2), s))
    else:
        raise ValueError(f'form={form!r}: give "psd" or "recollected"')
    if zero_mean and len(p) > 1:
        j = torch.eye(len(p), dtype=torch.float64) - 1 / len(p)
        sigma = j @ sigma @ j
    return sigma * len(p) / sigma.trace()


def recollected(shape: tuple[int, int], s: float) -> Tensor:
    """The recollected form before symmetrising and clipping, see :func:`covariance_matrix`. Shape ``(k^2, k^2)``."""
    size = torch.tensor(shape, dtype=torch.float64)
    centre, p = size // 2, grid(shape)
    z = torch.exp(-(p - centre).square().sum(1) / (2 * s))
    moved = torch.remainder(p - p[:, None] + centre, size) - centre  # (p, q): q - p, wrapped
    b = torch.exp(-moved.square().sum(2) / (2 * s))
    return (z + z[:, None]) * (b - z * z[:, None] / 2)


def psd(sigma: Tensor) -> Tensor:
    """The nearest symmetric positive semidefinite matrix: symmetrise, clip negative eigenvalues.

    >>> psd(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    tensor([[1., 0.],
            [0., 0.]])
    """
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
    return vectors * values.clamp_min(0) @ vectors.T


def schedule(depth: float, start: float = 0.25, rate: float = 0.5, bend: float = 1.0) -> float:
    """Envelope variance over depth, ``s(d) = s0 + v d + a d^2 / 2``, d in [0, 1]. The paper's constants are unknown; these are the middle of its grid.

    >>> schedule(0.0), schedule(1.0)
    (0.25, 1.25)
    """
    return start + rate * depth + bend * depth**2 / 2


def gaussian(kernel_size: Size, sigma: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n filters ``~ N(0, Sigma)``, through the eigenvectors, so that a singular Sigma is fine. ``(n, *kernel)`` float64.

    >>> gaussian(3, torch.eye(9, dtype=torch.float64), 2, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3, 3])
    """
    values, vectors = torch.linalg.eigh(sigma)
    return (randn(n, len(sigma), generator=generator) * values.clamp_min(0).sqrt() @ vectors.T).reshape(n, *shape_of(kernel_size))


def covariance(
    kernel_size: Size,
    n: int,
    generator: torch.Generator,
    fan_in: int | None = None,
    depth: float = 0.0,
    *,
    s: float | None = None,
    t: float | None = None,
    form: str = "psd",
    zero_mean: bool = False,
) -> Tensor:
    """Covariance-structured filters ``~ N(0, Sigma(s(depth)) / (3 fan_in))``, see :func:`covariance_matrix` and :func:`schedule`.

    Args:
        fan_in: by default that of a depthwise layer, prod(kernel); the mean variance is then PyTorch's. s: overrides the schedule.

    >>> covariance(7, 4, torch.Generator().manual_seed(0), depth=0.5).shape
    torch.Size([4, 7, 7])
    """
    sigma = covariance_matrix(kernel_size, schedule(depth) if s is None else s, t, form=form, zero_mean=zero_mean)
    return gaussian(kernel_size, sigma / (3 * (len(sigma) if fan_in is None else fan_in)), n, generator)


def spectrum(kernel_size: Size, n: int, generator: torch.Generator, fan_in: int | None = None, *, beta: float = 1.0) -> Tensor:
    """The spectrum dial: DCT coefficients ``~ N(0, s_uv^2)`` with ``s_uv^2`` proportional to ``(1 + u^2 + v^2)^-beta``.

    beta = 0 is white noise, a large beta only box filters, beta < 0 high-pass: one knob for how smooth frozen filters are. Mean variance ``1 / (3 fan_in)``.
    Another beta: ``functools.partial(spectrum, beta=2)`` is a bank.

    >>> spectrum(3, 2, torch.Generator().manual_seed(0), beta=50.0)[0].std().item() < 1e-6
    True
    """
    shape = shape_of(kernel_size)
    power = (1 + grid(shape).square().sum(1)) ** -beta
    power = power / power.mean() / (3 * (math.prod(shape) if fan_in is None else fan_in))
    return torch.tensordot(randn(n, len(power), generator=generator) * power.sqrt(), dct(shape), 1)


def kernels_of(weight: Tensor) -> Tensor:
    """A convolution's weight ``(O, I/g, *kernel)`` as its kernels ``(O I/g, *kernel)``, float64 on the CPU."""
    return weight.detach().double().cpu().flatten(0, 1)


def resample(kernels: Tensor, kernel_size: Size) -> Tensor:
    """Kernels ``(n, *kernel)`` at another size, linear in each axis, corners on corners.

    >>> resample(torch.tensor([[[0.0, 2.0], [4.0, 6.0]]]), 3)[0, 1]
    tensor([2., 3., 4.])
    """
    shape = shape_of(kernel_size, kernels.ndim - 1)
    if shape == tuple(kernels.shape[1:]):
        return kernels
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape)]
    return functional.interpolate(kernels[:, None], shape, mode=mode, align_corners=True)[:, 0]


def empirical_covariance(kernels: Tensor) -> Tensor:
    """Covariance of the weights over kernels, ``(n, *kernel) -> (prod(kernel), prod(kernel))``, centred, divided by n - 1.

    >>> empirical_covariance(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor([[ 0.5000, -0.5000],
            [-0.5000,  0.5000]])
    """
    if len(kernels) < 2:
        raise ValueError(f"kernels of shape {tuple(kernels.shape)}: a covariance needs at least two kernels")
    return torch.cov(kernels.flatten(1).T).reshape(kernels[0].numel(), -1)


def interpolate(sigmas: Sequence[Tensor], depth: float) -> Tensor:
    """The covariance at a depth in [0, 1], linear between layers that are spread evenly over it (positive semidefinite if they are).

    >>> interpolate([torch.zeros(1, 1), torch.ones(1, 1)], 0.25)
    tensor([[0.2500]])
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth}: relative depth must be in [0, 1]")
    place = depth * (len(sigmas) - 1)
    low = min(int(place), max(len(sigmas) - 2, 0))
    return torch.lerp(sigmas[low], sigmas[min(low + 1, len(sigmas) - 1)], place - low)


def transfer(weights: Sequence[Tensor]):
    """A bank with the covariances of a trained network's layers, for a network of any depth and kernel size.

    Args:
        weights: convolution weights ``(O, I/g, *kernel)`` of the trained network, first layer first.

    Returns:
        A fill with a ``depth``: it resamples the trained kernels to the asked size, interpolates their covariances over depth, and draws ``N(0, Sigma)``. The
        scale is the trained network's; use ``gain="match"`` for another width.

    >>> small = [torch.randn(8, 1, 5, 5, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    >>> transfer(small)(9, 4, torch.Generator().manual_seed(0), depth=0.5).shape
    torch.Size([4, 9, 9])
    """
    if not weights:
        raise ValueError("weights=[]: give at least one trained convolution weight")
    return functools.partial(_transferred, [kernels_of(w) for w in weights])


def _transferred(sources: list[Tensor], kernel_size: Size, n: int, generator: torch.Generator, depth: float = 0.0) -> Tensor:
    sigma = interpolate([empirical_covariance(resample(k, kernel_size)) for k in sources], depth)
    return gaussian(kernel_size, sigma, n, generator)


def steer(weight: Tensor, kind: str = "kde"):
    """A bank of filters like those of a trained layer (GuidedSteer): the kernels' distribution is kept, who owned which kernel is not.

    * ``"kde"``: kernel density, scipy's default: a random trained kernel plus ``N(0, n^(-2/(k^2+4)) cov)``. The original fits it in the eigenbasis of ``F^T
      F``; a Gaussian kernel density does not change under a rotation, so we need no basis.
    * ``"gaussian"``: ``N(mean, cov)``, full second-order statistics and no more.
    * ``"dct"``: DCT coefficients ``~ N(0, E c_j^2)``, the layer's power spectrum and no more. ``"dct-mean"``: ``N(mean_j, std_j)``, the original's
    DCT2steering.

    It carries what the trained layer knows: label it as pre-trained information. For a whole network: ``freeze(fresh, init={name: steer(layer.weight) for
    name, layer in layers(twin).items()}, generator=g)``.

    Args:
        weight: ``(O, I/g, *kernel)`` of the trained layer.

    >>> twin = torch.randn(16, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    >>> steer(twin, "dct")(3, 5, torch.Generator().manual_seed(1)).shape
    torch.Size([5, 3, 3])
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    kernels = kernels_of(weight)
    if len(kernels) < 2:
        raise ValueError(f"weight of shape {tuple(weight.shape)} has one kernel; steering needs at least two")
    if kind in ("kde", "gaussian"):
        return functools.partial(_like_kernels, kernels, kind == "kde")
    coefficients = kernels.flatten(1) @ dct(tuple(kernels.shape[1:])).flatten(1).T
    mean, std = (coefficients.mean(0), coefficients.std(0)) if kind == "dct-mean" else (torch.zeros(1), coefficients.square().mean(0).sqrt())
    return functools.partial(_like_spectrum, mean, std, tuple(kernels.shape[1:]))


def _like_kernels(kernels: Tensor, kde: bool, kernel_size: Size, n: int, generator: torch.Generator) -> Tensor:
    _same_size(tuple(kernels.shape[1:]), kernel_size)
    sigma = empirical_covariance(kernels)
    if not kde:
        return kernels.mean(0) + gaussian(kernel_size, sigma, n, generator)
    factor = len(kernels) ** (-1 / (len(sigma) + 4))
    return kernels[choose(n, len(kernels), generator)] + gaussian(kernel_size, factor**2 * sigma, n, generator)


def _like_spectrum(mean: Tensor, std: Tensor, shape: tuple[int, ...], kernel_size: Size, n: int, generator: torch.Generator) -> Tensor:
    _same_size(shape, kernel_size)
    return torch.tensordot(mean + std * randn(n, len(std), generator=generator), dct(shape), 1)


def _same_size(have: tuple[int, ...], asked: Size) -> None:
    if shape_of(asked) != have:
        raise ValueError(f"kernel_size={asked!r}, but the trained kernels are {have}; use transfer(...), which resamples, or steer from a layer of that size")
