"""The rivals: what a user would write, run beside ours. A DataLoader with torchvision's transforms, a plain loop, Accelerate, Lightning."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from . import batches, measure, train

BATCH = 128


def lines(cell: str, table, items: int | None = None) -> list[dict]:
    """step_ratio's table as plain dicts; every variant against the first."""
    base = table.step.iloc[0]
    found = []
    for line in table.itertuples():
        found.append(
            {
                "cell": cell,
                "variant": line.step,
                "against": base,
                "ratio": line.ratio,
                "low": line.low,
                "high": line.high,
                "seconds": line.seconds,
                "rounds": line.rounds,
            }
        )
        if items:
            found[-1]["items_per_second"] = items / line.seconds
    return found[1:]


def inputs(rounds: int = 5, n: int = 4096) -> list[dict]:
    """One epoch of random crops, flips and normalisation at 32 x 32: torchvision's transforms in a DataLoader against the gather."""
    import numpy as np
    from PIL import Image
    from torchvision import transforms as T

    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels, labels = images.permute(0, 2, 3, 1).numpy().copy(), np.zeros(n, dtype=np.int64)
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)

    class Cifar(torch.utils.data.Dataset):  # what torchvision.datasets.CIFAR10 does
        transform = T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(mean, std)])

        def __len__(self) -> int:
            return n

        def __getitem__(self, i: int):
            return self.transform(Image.fromarray(pixels[i])), int(labels[i])

    loader = torch.utils.data.DataLoader(Cifar(), BATCH, shuffle=True)
    data = SimpleNamespace(images=images, labels=torch.from_numpy(labels))
    gather = batches.Batches(data, BATCH, crop=4, flip=True, shuffle=True, mean=mean, std=std, generator=torch.Generator().manual_seed(0))
    steps = {"torchvision v1 DataLoader": lambda: sum(len(y) for _, y in loader), "gather": lambda: sum(len(y) for _, y in gather)}
    return lines("inputs", measure.step_ratio(steps, rounds=rounds, warmup=1), n)


USER_LOOP = """
import json, sys, time
import numpy as np, torch
from PIL import Image
from torch import nn
from torchvision import transforms as T
torch.set_num_threads(1)
n, rate = int(sys.argv[1]), int(sys.argv[2])
import frozenfilters as ff
net = ff.models.resnet20()
if rate:
    ff.lc(net, rate, execution="sequential")        # two nn.Conv2d in a row, as anyone would write it
pixels = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
tf = T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))])
class Data(torch.utils.data.Dataset):
    def __len__(self): return n
    def __getitem__(self, i): return tf(Image.fromarray(pixels[i])), i % 10
loader = torch.utils.data.DataLoader(Data(), 128, shuffle=True)
opt = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.01, 0.9, weight_decay=5e-4, nesterov=True)
def epoch():
    total = 0.0
    for x, y in loader:
        opt.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        total += loss.item()
epoch()
start = time.process_time(); epoch(); print(json.dumps(n / (time.process_time() - start)))
"""

ENGINE_LOOP = """
import json, sys, time
from types import SimpleNamespace
import torch
torch.set_num_threads(1)
import frozenfilters as ff
n, rate, precision = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
net = ff.normalized(ff.models.resnet20(), (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
if rate:
    ff.lc(net, rate)
data = SimpleNamespace(images=torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8), labels=torch.arange(n) % 10)
with ff.tuned(threads=1):
    ff.fit(net, data, epochs=1, batch_size=128, crop=4, flip=True, precision=precision)
    start = time.process_time()
    ff.fit(net, data, epochs=1, batch_size=128, crop=4, flip=True, precision=precision)
print(json.dumps(n / (time.process_time() - start)))
"""


def epochs(rounds: int = 3, n: int = 384, rate: int = 8) -> list[dict]:
    """CPU time of an image over a whole epoch of LC-ResNet-20: a plain user loop and `fit`, each in its own process."""

    def speed(code: str, *words) -> float:
        done = subprocess.run(
            [sys.executable, "-c", code, str(n), str(rate), *words],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise RuntimeError(f"the loop's own process failed: {done.stderr.strip().splitlines()[-1:]}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    variants = {"engine, float32": (ENGINE_LOOP, "float32"), "engine, bfloat16": (ENGINE_LOOP, "bfloat16")}
    times = {name: [] for name in ("user loop", *variants)}
    for _ in range(rounds):
        times["user loop"].append(1 / speed(USER_LOOP))
        for name, (code, precision) in variants.items():
            times[name].append(1 / speed(code, precision))
    found = []
    for name in variants:
        ratios = [a / b for a, b in zip(times[name], times["user loop"], strict=True)]
        found.append(
            {
                "cell": "epochs",
                "variant": f"{name}, E = {rate}",
                "against": "user loop",
                "ratio": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "images_per_second": 1 / statistics.median(times[name]),
                "rounds": rounds,
            }
        )
    return found


def loops(rounds: int = 5, steps: int = 40) -> list[dict]:
    """What a loop costs beside its network: `fit` and, where installed, Accelerate and Lightning, against a plain user loop on a tiny network."""
    from importlib.util import find_spec

    g = torch.Generator().manual_seed(0)
    data = SimpleNamespace(
        images=torch.randint(0, 256, (16 * steps, 1, 8, 8), dtype=torch.uint8, generator=g), labels=torch.arange(16 * steps) % 10
    )
    ready = [(x, y) for x, y in batches.Batches(data, 16)]

    def tiny() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))

    def user(prepare=lambda *things: things, backward=lambda loss: loss.backward()) -> Callable[[], None]:
        net = tiny()
        net, opt = prepare(net, torch.optim.SGD(net.parameters(), 0.01, 0.9))

        def epoch() -> None:
            total = 0.0
            for x, y in ready:
                opt.zero_grad()
                loss = F.cross_entropy(net(x), y)
                backward(loss)
                opt.step()
                total += loss.item()

        return epoch

    net = tiny()
    variants = {"plain loop": user(), "fit": lambda: train.fit(net, ready, epochs=1)}
    if find_spec("accelerate"):
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        variants["Accelerate"] = user(accelerator.prepare, accelerator.backward)
    if find_spec("lightning"):
        variants["Lightning"] = _lightning(tiny, ready)
    return lines("loops", measure.step_ratio(variants, rounds=rounds, warmup=1))


def _lightning(make: Callable[[], nn.Module], ready: list) -> Callable[[], None]:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make()

        def training_step(self, batch, _):
            x, y = batch
            loss = F.cross_entropy(self.net(x), y)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01, 0.9)

    module = Module()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lambda: L.Trainer(max_epochs=1, accelerator="cpu", **quiet).fit(module, ready)
