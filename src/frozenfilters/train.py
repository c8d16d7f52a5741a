"""Training: one plain loop, made cheap by what it leaves out.

The data set lies on the device, losses stay there until the epoch ends (one synchronisation an epoch), images are channels_last,
frozen weights never reach the optimiser. Everything random comes from `seed`; torch's global generator is left as it was found.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import machine
from .batches import as_batches
from .measure import accuracy


class DivergedError(ArithmeticError):
    """The loss is no number any more. `study.run` records it as the trial's result."""


class Callback:
    """Hooks into `fit`; each gets the running `State`. Gradients of the step are still there in `on_step_end`."""

    def on_train_begin(self, state: State) -> None: ...
    def on_backward_end(self, state: State) -> None: ...
    def on_step_end(self, state: State) -> None: ...
    def on_epoch_end(self, state: State) -> None: ...
    def on_train_end(self, state: State) -> None: ...


@dataclass
class State:
    """What a callback sees."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    epochs: int
    steps: int  # in the whole training
    epoch: int = 0
    step: int = 0
    loss: Tensor | None = None  # of the current batch, on the device
    stop: bool = False  # a callback may end the training after this epoch
    history: History = field(default_factory=lambda: History())


class History(list):
    """One dict per epoch: epoch, loss, lr, seconds and, with a validation set, val_accuracy."""

    @property
    def frame(self):
        """The epochs as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(self)


def cosine(progress: float) -> float:
    """Learning-rate factor (1 + cos(pi t)) / 2 at the share t of the training done, stepped every batch.

    >>> [round(cosine(t), 3) for t in (0, 0.5, 1)]
    [1.0, 0.5, 0.0]
    """
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": cosine,
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
}


def resolve_precision(precision: str, model: nn.Module, device: torch.device) -> torch.dtype | None:
    """The autocast type: None for "float32", torch.bfloat16 for "bfloat16"; "auto" is bfloat16 where it pays.

    It pays on a GPU that computes in bfloat16, and on a CPU with native bfloat16 unless the network has depthwise convolutions
    (measured: those get slower there).

    Raises:
        ValueError: for another word.
    """
    if precision not in ("float32", "bfloat16", "auto"):
        raise ValueError(f"precision={precision!r} is none of 'float32', 'bfloat16', 'auto'")
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    depthwise = any(isinstance(m, nn.Conv2d) and m.groups > 1 and m.groups == m.in_channels for m in model.modules())
    return torch.bfloat16 if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() and not depthwise else None


@contextlib.contextmanager
def _deterministic(on: bool):
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if on:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def fit(
    model: nn.Module,
    train,
    val=None,
    *,
    epochs: int = 10,
    lr: float = 0.01,
    batch_size: int = 256,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    schedule: str | Callable[[float], float] = "cosine",
    warmup: float = 0.0,
    label_smoothing: float = 0.0,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    params: Iterable[dict] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    crop: int = 0,
    flip: bool = False,
    ema: float | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    precision: str = "float32",
    deterministic: bool = False,
    callbacks: Sequence[Callback] = (),
    progress: bool = False,
) -> History:
    """Train `model` in place and return its history.

    Args:
        model: a network on [0, 1] images (see `models.normalized`); whatever has `requires_grad=False` stays bit-identical.
        train, val: an `ImageSet`, a torch `Dataset`, or any iterable of (x, y) batches. `val` is measured after every epoch.
        epochs, lr, batch_size, momentum, nesterov, weight_decay: SGD, torch's meaning; weight decay on every learned parameter.
        schedule: "cosine", "linear", "constant", or a function of the share of the training done, applied every step.
        warmup: share of the training in which the learning rate rises linearly to its schedule.
        label_smoothing: of the cross-entropy; `loss` replaces it by another function (output, target) -> mean loss.
        optimizer: another optimiser, `optimizer(params, lr=...)`, instead of SGD.
        params: parameter groups for the optimiser (each dict may carry its own lr and weight_decay); default: one group of all.
        crop, flip: augmentation of an `ImageSet` on the device.
        ema: decay per step of an exponential moving average of the weights, which replaces them at the end.
        seed: order, augmentation and dropout.
        device: default: where the model is if that is a GPU, else `machine.default_device()`; the model is moved there.
        precision: "float32", "bfloat16" (autocast) or "auto" (see `resolve_precision`).
        deterministic: only algorithms that give the same bits every time (slower on a GPU).
        callbacks: objects with any of `Callback`'s methods.
        progress: a bar with the time left, on a terminal.

    Raises:
        ValueError: nothing to train, or impossible arguments.
        DivergedError: the mean loss of an epoch is not finite.

    >>> from frozenfilters import data, models
    >>> digits = data.load("digits").subset(200)
    >>> net = models.normalized(models.convmixer(width=8, depth=1, in_channels=1), [0.3], [0.4])
    >>> len(fit(net, digits, epochs=2, seed=0))
    2
    """
    if epochs < 1:
        raise ValueError(f"epochs={epochs} must be at least 1")
    learned = [p for p in model.parameters() if p.requires_grad]
    if not learned:
        raise ValueError("model: every parameter is frozen, there is nothing to train; thaw something, or only measure it")
    where = learned[0].device
    device = torch.device(device or (machine.default_device() if where.type == "cpu" else where))
    factor = schedule if callable(schedule) else SCHEDULES.get(schedule)
    if factor is None:
        raise ValueError(f"schedule={schedule!r} is none of {', '.join(SCHEDULES)}; pass one of them or a function of the share done")
    generator = torch.Generator().manual_seed(seed)
    loader = as_batches(
        train,
        batch_size,
        shuffle=True,
        generator=generator,
        **({"crop": crop, "flip": flip, "device": device} if hasattr(train, "images") else {}),
    )
    model.to(device, memory_format=torch.channels_last)
    groups = list(params) if params is not None else [{"params": learned}]
    if optimizer is None:
        opt = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=weight_decay)
    else:
        opt = optimizer(groups, lr=lr)
    base = [group["lr"] for group in opt.param_groups]
    criterion = loss or (lambda output, target: F.cross_entropy(output, target, label_smoothing=label_smoothing))
    average = (
        torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema), use_buffers=False)
        if ema
        else None
    )
    half = resolve_precision(precision, model, device)
    state = State(model, opt, epochs, epochs * len(loader))

    def tell(hook: str) -> None:
        for callback in callbacks:
            if hasattr(callback, hook):
                getattr(callback, hook)(state)

    from tqdm.auto import tqdm

    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        _deterministic(deterministic),
        tqdm(total=state.steps, disable=not progress, unit="step", leave=False) as bar,
    ):
        torch.manual_seed(seed)
        tell("on_train_begin")
        for state.epoch in range(1, epochs + 1):
            model.train()
            total, seen, began = torch.zeros((), device=device), 0, time.perf_counter()
            for x, y in loader:
                t = state.step / state.steps
                for group, top in zip(opt.param_groups, base, strict=True):
                    group["lr"] = top * factor(t) * (min(1.0, (state.step + 1) / (warmup * state.steps)) if warmup else 1.0)
                x, y = x.to(device, memory_format=torch.channels_last, non_blocking=True), y.to(device, non_blocking=True)
                opt.zero_grad(set_to_none=True)
                with torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None):
                    state.loss = criterion(model(x), y)
                state.loss.backward()
                tell("on_backward_end")
                opt.step()
                state.step += 1
                if average is not None:
                    average.update_parameters(model)
                total += state.loss.detach() * len(y)
                seen += len(y)
                tell("on_step_end")
                bar.update()
            mean = (total / seen).item()  # the one synchronisation of the epoch
            if not math.isfinite(mean):
                raise DivergedError(
                    f"the loss is {mean} in epoch {state.epoch} of {epochs} (lr={base[0]}): the training diverged; a smaller lr or a warm-up helps"
                )
            state.history.append(
                {"epoch": state.epoch, "loss": mean, "lr": opt.param_groups[0]["lr"], "seconds": time.perf_counter() - began}
            )
            if val is not None:
                state.history[-1]["val_accuracy"] = accuracy(model, val, device=device)
            tell("on_epoch_end")
            if state.stop:
                break
        if average is not None:
            with torch.no_grad():
                for p, q in zip(model.parameters(), average.module.parameters(), strict=True):
                    if p.requires_grad:
                        p.copy_(q)
        tell("on_train_end")
    return state.history
