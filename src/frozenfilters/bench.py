"""Speed and memory as ratios: what each part of the engine costs against what a user would write, both run here and now.

Seconds of two machines cannot be compared, ratios of one process can: the variants run A, B, C, A, B, C, ... in one process, one
thread, CPU time, with the same allocator setting on every side; each ratio is the median over rounds, its range the spread. Bytes
and operations are counted, not timed. `python -m frozenfilters bench` and chapter 12 call the same cells.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import lcnets, measure, models, surgery
from .machine import tuned
from .rivals import BATCH, epochs, inputs, lines, loops
from .starts import imports, kernels, notebooks


def stepper(
    model: nn.Module, batch: int = BATCH, size: int = 32, channels: int = 3, half: bool = False, lr: float = 0.01
) -> Callable[[], Tensor]:
    """One training step of `model` on fixed random images as a closure: forward, loss, backward, SGD with momentum."""
    model = model.to(memory_format=torch.channels_last).train()
    g = torch.Generator().manual_seed(0)
    x = torch.rand(batch, channels, size, size, generator=g).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,), generator=g)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr, 0.9, weight_decay=5e-4)

    def step() -> Tensor:
        opt.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        return loss

    return step


def lc_resnet20(rate: float, execution: str) -> nn.Module:
    """ResNet-20 whose spatial convolutions are LC blocks of this rate and execution."""
    net = models.resnet20()
    lcnets.lc(net, rate, execution=execution, generator=torch.Generator().manual_seed(0))
    return net


def linear_combinations(rounds: int = 7) -> list[dict]:
    """A training step of LC-ResNet-20 in each execution, against the plain network."""
    steps = {
        "plain": stepper(models.resnet20()),
        "composed, E = 8": stepper(lc_resnet20(8, "composed")),
        "gram, E = 8": stepper(lc_resnet20(8, "gram")),
        "gram, E = 1,000,000": stepper(lc_resnet20(10**6, "gram")),
        "sequential, E = 8": stepper(lc_resnet20(8, "sequential")),
    }
    found = lines("lc", measure.step_ratio(steps, rounds=rounds))
    steps = {"composed, E = 16": stepper(lc_resnet20(16, "composed")), "sequential, E = 16": stepper(lc_resnet20(16, "sequential"))}
    return found + lines("lc", measure.step_ratio(steps, rounds=max(2, rounds // 2), warmup=1))


def frozen_steps(rounds: int = 7) -> list[dict]:
    """A training step with frozen filters against learned ones, in nets where that pays much and where it pays little."""
    from .backward import lean

    def resnet18() -> nn.Module:
        return models.small_stem(_zoo("resnet18")(num_classes=10))

    found = []
    for name, make, batch in (
        ("ResNet-18", resnet18, 32),
        ("ResNet-20", models.resnet20, BATCH),
        ("ConvMixer, k = 9", lambda: models.convmixer(128, 4, 9), 32),
    ):
        learned, frozen, exact = make(), make(), make()
        for net in (frozen, exact):  # biases too: torch computes a bias's gradient together with the weight's, or not at all
            surgery.freeze(net, bias=True)
        lean(exact)
        steps = {
            f"{name} learned": stepper(learned, batch),
            f"{name} frozen": stepper(frozen, batch),
            f"{name} frozen, lean": stepper(exact, batch),
        }
        found += lines("frozen", measure.step_ratio(steps, rounds=rounds, warmup=1))
    return found


def memory(rounds: int = 1) -> list[dict]:
    """Bytes that autograd keeps between forward and backward, counted exactly."""
    from .backward import lean

    x = torch.rand(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)

    def kept(net: nn.Module) -> int:
        net = net.to(memory_format=torch.channels_last).train()
        return measure.saved_bytes(lambda: net(x), exclude=net)

    frozen = models.resnet20()
    surgery.freeze(frozen)
    plain = kept(models.resnet20())
    values = {
        "plain": plain,
        "composed, E = 8": kept(lc_resnet20(8, "composed")),
        "sequential, E = 8": kept(lc_resnet20(8, "sequential")),
        "frozen": kept(frozen),
    }
    lean(frozen)
    values["frozen, lean"] = kept(frozen)
    pairs = [("composed, E = 8", "sequential, E = 8"), ("sequential, E = 8", "plain"), ("frozen", "plain"), ("frozen, lean", "plain")]
    return [{"cell": "memory", "variant": a, "against": b, "ratio": values[a] / values[b], "bytes": values[a]} for a, b in pairs]


def operations(rounds: int = 1) -> list[dict]:
    """Floating-point operations of one training step at batch 128, counted."""
    x = torch.rand(BATCH, 3, 32, 32)
    frozen = models.resnet20()
    surgery.freeze(frozen)
    nets = {
        "plain": models.resnet20(),
        "frozen": frozen,
        "composed, E = 8": lc_resnet20(8, "composed"),
        "sequential, E = 8": lc_resnet20(8, "sequential"),
    }
    counts = {name: measure.flops(net, x, backward=True) for name, net in nets.items()}
    return [{"cell": "operations", "variant": n, "against": "plain", "ratio": c / counts["plain"], "flops": c} for n, c in counts.items()]


def folded(rounds: int = 9) -> list[dict]:
    """Inference of LC-ResNet-20 (E = 8, batch 256) as trained and folded into plain convolutions."""
    net = lc_resnet20(8, "sequential").to(memory_format=torch.channels_last).eval()
    flat = models.fold(net).to(memory_format=torch.channels_last)
    x = torch.rand(256, 3, 32, 32).contiguous(memory_format=torch.channels_last)

    def run(model: nn.Module) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            with torch.inference_mode():
                return model(x)

        return forward

    return lines("folded", measure.step_ratio({"as trained": run(net), "folded": run(flat)}, rounds=rounds))


def members(rounds: int = 3, count: int = 8) -> list[dict]:
    """Eight tiny networks (widths 4, 8, 16, one block a stage, batch 4) as one grouped network, against one after another."""
    from . import many

    g = torch.Generator().manual_seed(0)
    data = SimpleNamespace(images=torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8, generator=g), labels=torch.arange(128) % 10)

    def train(fuse: bool) -> Callable[[], object]:
        made = [{"model": lambda: models.CifarResNet(8, 4), "seed": seed} for seed in range(count)]
        return lambda: many.fit_many(made, data, epochs=1, batch_size=4, fuse=fuse, workers=1)

    return lines("members", measure.step_ratio({"one after another": train(False), "fused": train(True)}, rounds=rounds, warmup=1))


def floors(rounds: int = 5) -> list[dict]:
    """How near the machine's floor a step of ResNet-20 is: its operations per second against the best rate of one 3 x 3 convolution."""
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    x = torch.rand(64, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    frozen = models.resnet20()
    surgery.freeze(frozen)

    def best() -> None:
        with torch.inference_mode():
            conv(x)

    nets = {"ResNet-20 learned": models.resnet20(), "ResNet-20 frozen": frozen}
    work = {"best convolution": measure.flops(conv, x)} | {
        name: measure.flops(net, torch.rand(BATCH, 3, 32, 32), backward=True) for name, net in nets.items()
    }
    table = measure.step_ratio({"best convolution": best, **{name: stepper(net) for name, net in nets.items()}}, rounds=rounds)
    floor = table.seconds.iloc[0] / work["best convolution"]  # seconds per operation at the best rate
    return [
        {
            "cell": "floors",
            "variant": line.step,
            "against": "its arithmetic at the best convolution's rate",
            "ratio": line.seconds / (work[line.step] * floor),
            "flops_per_second": work[line.step] / line.seconds,
            "rounds": rounds,
        }
        for line in table.itertuples()
        if line.step in nets
    ]


def _zoo(name: str):
    from torchvision import models as zoo

    return getattr(zoo, name)


CELLS: dict[str, Callable[..., list[dict]]] = {
    "operations": operations,
    "memory": memory,
    "lc": linear_combinations,
    "frozen": frozen_steps,
    "folded": folded,
    "inputs": inputs,
    "epochs": epochs,
    "members": members,
    "loops": loops,
    "floors": floors,
    "kernels": kernels,
    "imports": imports,
    "notebooks": notebooks,
}
SLOW = ("notebooks",)  # only where asked for: the rest takes less than three minutes


def run(cells: list[str] | None = None, rounds: int | None = None):
    """Measure the cells (all by default) with one thread and the tuned allocator; a DataFrame, one line per variant.

    Raises:
        ValueError: for an unknown cell, listing them.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    chosen = cells or [name for name in CELLS if name not in SLOW]
    for name in chosen:
        if name not in CELLS:
            raise ValueError(f"cell {name!r} is none of {', '.join(CELLS)}")
    found = []
    with tuned(threads=1), contextlib.closing(tqdm(total=len(chosen), unit="cell", disable=not sys.stderr.isatty())) as bar:
        for name in chosen:
            start = time.perf_counter()
            own = {"rounds": 1} if name == "epochs" else {}  # half a minute a round
            lines = CELLS[name](**(own if rounds is None else {"rounds": rounds}))
            found += [{**line, "wall_seconds": round(time.perf_counter() - start, 1)} for line in lines]
            bar.update()
    return pd.DataFrame(found)
