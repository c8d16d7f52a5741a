"""One training step that needs nothing from the host: what to read, how fast to learn and what was lost are tensors.

`fit` decides each of these in Python, batch by batch. Here an epoch's places in the data set (image, mirror, window) and
learning rates are drawn beforehand, by the same generators in the same order, and the step counts for itself. So a whole step
can be recorded as a CUDA graph and replayed, several members' steps side by side in one graph; and several equal networks run
as one `grouped` network can have a learning rate each. Without a GPU the very same step runs as it stands.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batches import Batches, as_batches
from .measure import accuracy, evaluating
from .train import DivergedError, History


def places(batches: Batches) -> Tensor:
    """An epoch's draws of `batches`, (4, N): rows image, mirrored, dy, dx; from its generator, in the order of its own iteration."""
    b = batches
    order = torch.randperm(b.n, generator=b.generator) if b.shuffle else torch.arange(b.n)
    return torch.cat([b.draw(index) for index in order.split(b.batch_size)], 1)


class TensorSGD:
    """torch's SGD with momentum, whose learning rate is a tensor and may differ between the members inside one parameter.

    Args:
        params: parameters; with S members each holds theirs one after another along its first dimension.
        lr, weight_decay: one number for each member.
        momentum, nesterov: torch's meaning.
    """

    def __init__(self, params: Sequence[nn.Parameter], lr: Sequence[float], weight_decay: Sequence[float], momentum: float, nesterov: bool):
        self.params, self.momentum, self.nesterov = list(params), momentum, nesterov
        self.lr, self.weight_decay = self._each(lr), self._each(weight_decay)
        self.buffers = [torch.zeros_like(p) for p in self.params] if momentum else []

    def _each(self, numbers: Sequence[float]) -> float | list[Tensor]:
        if len(set(numbers)) == 1:
            return float(numbers[0])
        return [p.new_tensor(numbers).repeat_interleave(len(p) // len(numbers)).view(-1, *[1] * (p.dim() - 1)) for p in self.params]

    @torch.no_grad()
    def step(self, factor: Tensor) -> None:
        """One update with the learning rates times `factor` (no dimensions, on the parameters' device)."""
        grads = [p.grad for p in self.params]
        if any(g is None for g in grads):
            raise ValueError("a learned parameter got no gradient: it is not used by the network; freeze it, or train this member by fit alone")
        if self.weight_decay:
            grads = torch._foreach_add(grads, torch._foreach_mul(self.params, self.weight_decay))
        if self.momentum:
            torch._foreach_mul_(self.buffers, self.momentum)
            torch._foreach_add_(self.buffers, grads)
            grads = torch._foreach_add(grads, self.buffers, alpha=self.momentum) if self.nesterov else self.buffers
        if isinstance(self.lr, float):
            torch._foreach_sub_(self.params, torch._foreach_mul(grads, factor * self.lr))
        else:
            torch._foreach_sub_(self.params, torch._foreach_mul(torch._foreach_mul(grads, self.lr), factor))


class Step:
    """A training step of one network, or of S equal networks run as one (see `grouped`), and its bookkeeping.

    Args:
        model: takes (B, S C, H, W) images, member after member, and returns (B, S classes); with one member, anything.
        batches: one `Batches` for each member, of the same data set and options (resident, shuffled).
        names: how messages call the members.
        lr, weight_decay: one number for each member; momentum, nesterov, schedule (a function), warmup, epochs: as in `fit`.
        criterion: (output, target) -> mean loss, or None for the cross-entropy with `label_smoothing`.
        half: autocast type or None.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batches], *, epochs: int, lr: Sequence[float], weight_decay: Sequence[float],
                 momentum: float, nesterov: bool, schedule: Callable[[float], float], warmup: float, criterion: Callable | None,
                 label_smoothing: float, half: torch.dtype | None):
        first = batches[0]
        self.model, self.batches, self.members, self.epochs = model, batches, len(batches), epochs
        self.criterion, self.label_smoothing, self.half, self.lr, self.device = criterion, label_smoothing, half, lr, first.device
        self.full, self.rest = divmod(first.n, first.batch_size)
        steps = epochs * len(first)
        share = [(i / steps, (i + 1) / (warmup * steps) if warmup else 1.0) for i in range(steps)]
        self.schedule = torch.tensor([schedule(t) * min(1.0, rise) for t, rise in share], dtype=torch.float64).view(epochs, -1)
        learned = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = TensorSGD(learned, lr, weight_decay, momentum, nesterov)
        self.factors = torch.zeros(len(first), dtype=learned[0].dtype, device=self.device)
        self.places = torch.zeros(self.full, 4, self.members, first.batch_size, dtype=torch.long, device=self.device)
        self.count = torch.zeros(1, dtype=torch.long, device=self.device)
        self.total = torch.zeros(self.members, device=self.device)
        self.results: list[History | Exception] = [History() for _ in batches]

    def start(self, epoch: int) -> None:
        """Draw the epoch's places and rates and send them to the device: the only thing sent."""
        self.model.train()
        self.epoch, self.began = epoch, time.perf_counter()
        table = torch.stack([places(b) for b in self.batches], 1)                                        # (4, S, N)
        whole = self.full * self.batches[0].batch_size
        if self.full:
            self.places.copy_(table[:, :, :whole].unflatten(2, (self.full, -1)).permute(2, 0, 1, 3))     # in place: a graph reads here
        self.last = table[:, :, whole:].to(self.device)
        self.factors.copy_(self.schedule[epoch])
        self.count.zero_()
        self.total.zero_()

    def read(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, S C, H, W) channels_last and y (S, B, ...) at `place` (4, S, B): one gather for all members."""
        b = self.batches[0]
        index, mirrored, dy, dx = place
        rows = b._windows(b.store)[index.T, mirrored.T, dy.T, dx.T].to(b.dtype).mul_(b.scale)            # (B, S, H, W C)
        x = rows.unflatten(3, (b.width, b.channels)).permute(0, 2, 3, 1, 4).flatten(3)                   # (B, H, W, S C)
        return x.permute(0, 3, 1, 2), b.labels[index]

    def losses(self, output: Tensor, y: Tensor) -> Tensor:
        """The mean loss of each member, (S,)."""
        if self.members == 1:
            return (self.criterion or self._cross_entropy)(output, y[0]).view(1)
        output = output.unflatten(1, (self.members, -1))                                                 # (B, S, classes)
        if self.criterion is None and y.dim() == 2 and output.dim() == 3:
            return self._cross_entropy(output.flatten(0, 1), y.T.flatten(), "none").view(-1, self.members).mean(0)
        return torch.stack([(self.criterion or self._cross_entropy)(o, t) for o, t in zip(output.unbind(1), y, strict=True)])

    def _cross_entropy(self, output: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(output, y, label_smoothing=self.label_smoothing, reduction=reduction)

    def __call__(self, place: Tensor | None = None) -> None:
        """One step at `place`, or at the epoch's next full batch. No value leaves the device; safe to capture."""
        x, y = self.read(self.places.index_select(0, self.count).squeeze(0) if place is None else place)
        for p in self.optimizer.params:
            p.grad = None
        with torch.autocast(self.device.type, self.half or torch.bfloat16, enabled=self.half is not None):
            losses = self.losses(self.model(x), y)
        losses.sum().backward()                              # a member's gradient is its own: no other loss depends on its weights
        self.optimizer.step(self.factors.index_select(0, self.count).squeeze(0))
        self.total += losses.detach() * y.shape[1]
        self.count += 1

    def finish(self, val=None) -> None:
        """The partial last batch, then the epoch's line in each member's history: the one synchronisation."""
        torch.autograd.graph.increment_version([*self.optimizer.params, *self.model.buffers()])   # replays change them unseen, and caches of W = P F must know
        if self.rest:
            self(self.last)
        means, seconds = (self.total / self.batches[0].n).tolist(), time.perf_counter() - self.began
        right = self.accuracies(val) if val is not None else [None] * self.members
        for i, mean in enumerate(means):
            if isinstance(self.results[i], Exception):
                continue
            if not math.isfinite(mean):
                self.results[i] = DivergedError(f"the loss is {mean} in epoch {self.epoch + 1} of {self.epochs} (lr={self.lr[i]}): the training diverged; "
                                                "a smaller lr or a warm-up helps")
                continue
            line = {"epoch": self.epoch + 1, "loss": mean, "lr": self.lr[i] * self.schedule[self.epoch, -1].item(), "seconds": seconds}
            self.results[i].append(line | ({"val_accuracy": right[i]} if val is not None else {}))

    def accuracies(self, data) -> list[float]:
        """Share of right answers on all images of `data`, for each member."""
        if self.members == 1:
            return [accuracy(self.model, data, device=self.device)]
        right, seen = torch.zeros(self.members, dtype=torch.long, device=self.device), 0
        with evaluating(self.model), torch.no_grad():
            for x, y in as_batches(data, 512, **({"device": self.device} if hasattr(data, "images") else {})):
                x = x.to(self.device).repeat(1, self.members, 1, 1).contiguous(memory_format=torch.channels_last)
                right += (self.model(x).unflatten(1, (self.members, -1)).argmax(2) == y.to(self.device)[:, None]).sum(0)
                seen += len(y)
        if not seen:
            raise ValueError("val: no image to measure on")
        return (right / seen).tolist()


def run(steps: Sequence[Step], val=None, *, capture: bool = False) -> None:
    """Train all `steps`, which have equally many epochs and batches, side by side to their end; `capture` records them as a CUDA graph."""
    for epoch in range(steps[0].epochs):
        for step in steps:
            step.start(epoch)
        if epoch == 0:
            advance = record(steps) if capture and steps[0].full else lambda: [step() for step in steps]
        for _ in range(steps[0].full):
            advance()
        for step in steps:
            step.finish(val)
        if all(isinstance(result, Exception) for step in steps for result in step.results):
            return


def record(steps: Sequence[Step]) -> Callable[[], None]:
    """One CUDA graph of one step of each member, each on a stream of its own; returns its replay. Leaves every value as it was."""
    moving = [t for step in steps for t in (*step.model.parameters(), *step.model.buffers(), *step.optimizer.buffers, step.count, step.total)]
    kept = [t.detach().clone() for t in moving]
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                        # a capture must not meet anything for the first time
            for _ in range(min(3, steps[0].full)):
                for step in steps:
                    step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph, streams = torch.cuda.CUDAGraph(), [torch.cuda.Stream() for _ in steps]
        with torch.cuda.graph(graph):
            main = torch.cuda.current_stream()
            for step, stream in zip(steps, streams, strict=True):
                stream.wait_stream(main)
                with torch.cuda.stream(stream):
                    step()
            for stream in streams:
                main.wait_stream(stream)
    finally:
        with torch.no_grad():
            for tensor, value in zip(moving, kept, strict=True):
                tensor.copy_(value)
    return graph.replay
