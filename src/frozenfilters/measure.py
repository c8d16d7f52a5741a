"""What is measured of a network: accuracy, robustness in pixel space, size, arithmetic, time.

Networks take images in [0, 1] and own their normalisation (`models.normalized`), so an attack's budget is in pixels.
FGSM: Goodfellow et al., arXiv 1412.6572. PGD: Madry et al., arXiv 1706.06083.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batches import as_batches


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode, each module's own mode restored afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for m, mode in modes:
            m.training = mode


def _device(model: nn.Module, device) -> torch.device:
    return torch.device(device) if device is not None else next((p.device for p in model.parameters()), torch.device("cpu"))


def accuracy(
    model: nn.Module, data, *, attack: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None, batch_size: int = 512, fold: bool = True, device=None
) -> float:
    """Share of all images classified right, in [0, 1]; with `attack`, of all images after it.

    Args:
        model: classifier on [0, 1] images.
        data: an `ImageSet`, a `Dataset` or an iterable of (x, y) batches.
        fold: measure networks of linear combinations in their folded form: the same function, several times faster.
        attack: function (model, x, y) -> x, for instance `functools.partial(fgsm, eps=1 / 255)`.

    >>> data = [(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))]
    >>> accuracy(nn.Identity(), data)
    0.5
    """
    from . import layers, models

    device = _device(model, device)
    if fold and any(isinstance(m, layers.LCConv2d) for m in model.modules()):
        model = models.fold(model)
    right, seen = torch.zeros((), dtype=torch.long, device=device), 0
    with evaluating(model):
        for x, y in as_batches(data, batch_size, **({"device": device} if hasattr(data, "images") else {})):
            x, y = x.to(device), y.to(device)
            if attack is not None:
                x = attack(model, x, y)
            with torch.no_grad():
                right += (model(x).argmax(1) == y).sum()
            seen += len(y)
    if not seen:
        raise ValueError("data: no image to measure on")
    return right.item() / seen


def _pixels(x: Tensor, eps: float) -> None:
    if eps < 0:
        raise ValueError(f"eps={eps} must not be negative; it is the largest change of a pixel on the [0, 1] scale, for instance 1/255")
    if x.min() < 0 or x.max() > 1:
        raise ValueError(
            f"x lies in [{x.min().item():.3g}, {x.max().item():.3g}]: attacks need pixels in [0, 1]; put the normalisation into the model "
            "(models.normalized) and pass plain images"
        )


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return grad


def fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """x + eps sign(dL/dx), clipped to [0, 1]: the fast gradient sign method.

    Args:
        x: images (N, C, H, W) in [0, 1]; y: labels (N,); eps: in pixels on the [0, 1] scale.

    Raises:
        ValueError: for images outside [0, 1] or a negative eps.
    """
    _pixels(x, eps)
    return (x + eps * _gradient(model, x, y).sign()).clamp_(0, 1).detach()


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    steps: int = 10,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`steps` times FGSM with `step_size` (default 2.5 eps / steps), projected onto the eps-ball around x and [0, 1].

    With `generator` it starts at a uniformly random point of the ball, else at x.
    """
    _pixels(x, eps)
    step_size = 2.5 * eps / steps if step_size is None else step_size
    adv = x
    if generator is not None:
        adv = (x + (torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device) * 2 - 1) * eps).clamp(0, 1)
    for _ in range(steps):
        adv = adv + step_size * _gradient(model, adv, y).sign()
        adv = torch.min(torch.max(adv, x - eps), x + eps).clamp(0, 1).detach()
    return adv


def parameters(model: nn.Module) -> dict[str, float]:
    """Counts of parameters: total, learned, frozen, and the frozen share of the total.

    >>> net = nn.Conv2d(1, 2, 3, bias=False).requires_grad_(False)
    >>> parameters(net)
    {'total': 18, 'learned': 0, 'frozen': 18, 'frozen_share': 1.0}
    """
    found = {id(p): p for p in model.parameters()}.values()
    total, learned = sum(p.numel() for p in found), sum(p.numel() for p in found if p.requires_grad)
    return {"total": total, "learned": learned, "frozen": total - learned, "frozen_share": (total - learned) / total if total else 0.0}


def flops(model: nn.Module, x: Tensor, *, backward: bool = False) -> int:
    """Floating-point operations of one forward pass (and one backward pass) on x, counted, not estimated (2 per multiply-add).

    >>> flops(nn.Conv2d(1, 2, 3, bias=False), torch.zeros(1, 1, 5, 5))
    324
    """
    from torch.utils.flop_counter import FlopCounterMode

    modes = model.training
    with FlopCounterMode(display=False) as counter:
        output = model(x)
        if backward:
            output.sum().backward()
    model.train(modes)
    if backward:
        model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def saved_bytes(function: Callable[[], Tensor], exclude: nn.Module | None = None) -> int:
    """Bytes of the distinct storages that autograd keeps between forward and backward; `exclude`d parameters do not count."""
    seen: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (*exclude.parameters(), *exclude.buffers())} if exclude is not None else set()

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = function()
    del output
    return sum(seen.values())


def step_ratio(
    steps: dict[str, Callable[[], object]],
    *,
    rounds: int = 7,
    warmup: int = 2,
    base: str | None = None,
    clock: Callable[[], float] | None = None,
):
    """Run the steps A, B, C, A, B, C, ... and compare each with `base` (the first) round by round.

    CPU time of this process by default (other tenants do not count; use one thread), so that only ratios of one process are
    compared, never seconds of two.

    Returns:
        DataFrame, one line per step: seconds (median), ratio (median of the rounds' ratios), low, high (their range), rounds.

    >>> list(step_ratio({"a": lambda: sum(range(10**5)), "b": lambda: sum(range(10**5))}, rounds=2).columns)
    ['step', 'seconds', 'ratio', 'low', 'high', 'rounds']
    """
    import pandas as pd

    if not steps or rounds < 1:
        raise ValueError(f"steps={list(steps)}, rounds={rounds}: give at least one step and one round")
    base, clock = base or next(iter(steps)), clock or time.process_time
    if base not in steps:
        raise ValueError(f"base={base!r} is none of the steps {list(steps)}")
    for _ in range(warmup):
        for step in steps.values():
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            t = clock()
            step()
            times[name].append(clock() - t)
    lines = []
    for name, mine in times.items():
        ratios = [a / b for a, b in zip(mine, times[base], strict=True)]
        lines.append(
            {
                "step": name,
                "seconds": statistics.median(mine),
                "ratio": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "rounds": rounds,
            }
        )
    return pd.DataFrame(lines)
