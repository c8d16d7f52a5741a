"""Speed on a GPU: the cells of chapter 12 that want one. Wall time, synchronised, interleaved; every size is an argument, so that
the same code runs in small on a CPU (which proves the code, not the speed).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from . import lcnets, many, measure, models, train
from .rivals import lines


def clock(device: str) -> Callable[[], float]:
    """Wall time after all work on the device is done."""

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    return now


def need(device: str) -> None:
    """Raise where the device is missing, with what to do."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError(
            "no CUDA device: these cells need a GPU; on a CPU run the cpu preset, or pass device='cpu' to try the code in small"
        )


def images(n: int, size: int) -> SimpleNamespace:
    """Random images: the arithmetic of a step does not depend on what they show."""
    g = torch.Generator().manual_seed(0)
    return SimpleNamespace(images=torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=g), labels=torch.arange(n) % 10)


def _recipe(device: str, batch: int) -> dict:
    return {
        "epochs": 1,
        "batch_size": batch,
        "crop": 4,
        "flip": True,
        "device": device,
        "precision": "bfloat16" if device != "cpu" else "float32",
    }


def graphs(
    rounds: int = 3, device: str = "cuda", n: int = 12800, batch: int = 128, members: int = 8, size: int = 32, width: int = 16
) -> list[dict]:
    """One epoch of ResNet-20 (batch 128): eager, as one CUDA graph, and eight members in one graph; time for each member."""
    need(device)
    data, recipe = images(n, size), _recipe(device, batch)

    def eager() -> None:
        train.fit(models.resnet20(width=width), data, **recipe)

    def together(count: int) -> Callable[[], None]:
        def run() -> None:
            done = many.fit_many(
                [{"model": lambda: models.resnet20(width=width), "seed": s} for s in range(count)], data, workers=1, fuse=False, **recipe
            )
            for result in done:
                if isinstance(result, Exception):
                    raise result

        return run

    table = measure.step_ratio(
        {"eager": eager, "one graph": together(1), f"{members} members, one graph": together(members)},
        rounds=rounds,
        warmup=1,
        clock=clock(device),
    )
    found = lines("graphs", table)
    for line in found:
        count = members if "members" in line["variant"] else 1
        line |= {key: line[key] / count for key in ("ratio", "low", "high")}  # of one member's share
        line["images_per_second"] = n * count / line["seconds"]
    return found


def rates(
    rounds: int = 5, device: str = "cuda", batch: int = 512, rates: tuple = (1, 8, 64, 128), size: int = 32, width: int = 16
) -> list[dict]:
    """A training step of LC-ResNet-20 in each execution against the plain network, with peak memory; sequential where it fits."""
    need(device)
    x, y = (
        torch.rand(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last),
        torch.randint(0, 10, (batch,), device=device),
    )
    found = []
    for rate in rates:
        steps = {"plain": _step(models.resnet20(width=width), x, y)}
        for execution in ("composed", "gram", "sequential"):
            net = models.resnet20(width=width)
            lcnets.lc(net, rate, execution=execution)
            steps[f"{execution}, E = {rate}"] = _step(net, x, y)
        peaks = {name: _peak(step, device) for name, step in steps.items()}
        steps = {name: step for name, step in steps.items() if peaks[name] is not None}
        for line in lines("rates", measure.step_ratio(steps, rounds=rounds, clock=clock(device))):
            found.append(line | {"peak_bytes": peaks[line["variant"]], "peak_ratio": peaks[line["variant"]] / max(1, peaks["plain"])})
    return found


def imagenet(rounds: int = 1, device: str = "cuda", rate: int = 128, batch: int = 64, size: int = 224) -> list[dict]:
    """The cell that the LC paper could not run: learnable LC at E = 128 in a ResNet-18 at ImageNet size (out of memory there)."""
    from torchvision.models import resnet18

    need(device)
    x, y = torch.rand(batch, 3, size, size, device=device), torch.randint(0, 10, (batch,), device=device)
    plain, composed = resnet18(num_classes=10), resnet18(num_classes=10)
    lcnets.lc(composed, rate, frozen=False, execution="composed")
    steps = {"plain ResNet-18": _step(plain, x, y), f"learnable LC, E = {rate}, composed": _step(composed, x, y)}
    peaks = {name: _peak(step, device) for name, step in steps.items()}
    if None in peaks.values():
        raise RuntimeError(f"CUDA out of memory at batch {batch}: pass a smaller batch")
    return [
        line | {"peak_bytes": peaks[line["variant"]]}
        for line in lines("imagenet", measure.step_ratio(steps, rounds=rounds, clock=clock(device)))
    ]


def recipe(
    rounds: int = 1,
    device: str = "cuda",
    n: int = 50000,
    epochs: int = 75,
    batch: int = 256,
    rate: int = 8,
    members: int = 8,
    size: int = 32,
    width: int = 16,
) -> list[dict]:
    """The LC paper's whole training (75 epochs, batch 256, CIFAR-10 in size) of an LC-ResNet-20: one seed, and eight seeds together."""
    need(device)
    data, options = images(n, size), _recipe(device, batch) | {"epochs": epochs, "lr": 0.01, "weight_decay": 0.01, "label_smoothing": 0.1}

    def build() -> nn.Module:
        net = models.resnet20(width=width)
        lcnets.lc(net, rate)
        return net

    def together(count: int) -> Callable[[], None]:
        def run() -> None:
            for result in many.fit_many([{"model": build, "seed": s} for s in range(count)], data, workers=1, fuse=False, **options):
                if isinstance(result, Exception):
                    raise result

        return run

    steps = {"one training": together(1), f"{members} trainings together": together(members)}
    table = measure.step_ratio(steps, rounds=rounds, warmup=0, clock=clock(device))
    found = lines("recipe", table)
    found[0]["images_per_second"] = n * epochs * members / found[0]["seconds"]
    return [
        {
            **found[0],
            "variant": "one training",
            "ratio": 1.0,
            "low": 1.0,
            "high": 1.0,
            "seconds": table.seconds.iloc[0],
            "images_per_second": n * epochs / table.seconds.iloc[0],
        },
        *found,
    ]


def _step(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    net = net.to(x.device, memory_format=torch.channels_last).train()
    opt = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.01, 0.9)

    def step() -> None:
        opt.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()

    return step


def _peak(step: Callable[[], None], device: str) -> int | None:
    """Bytes at the highest point of one step; 0 on a CPU, None where it does not fit."""
    if not device.startswith("cuda"):
        step()
        return 0
    try:
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


CELLS: dict[str, Callable[..., list[dict]]] = {"graphs": graphs, "rates": rates, "imagenet": imagenet, "recipe": recipe}
