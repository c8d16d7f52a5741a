"""Batches from a data set that lies on the device whole: crop, flip and scaling in one indexed read.

The padded images are seen through a strided view of all their windows, (image, flip, dy, dx, row, column and channel), so that a
batch of random crops of randomly mirrored images is a single gather. Same code on CPU and GPU, exact against slicing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

LIMIT = 2 * 2**30  # bytes that the padded and mirrored copy may take; larger sets pad batch by batch


class Batches:
    """Iterate over (x, y) batches: x float (B, C, H, W) in [0, 1], channels_last; y as in the data set.

    Args:
        data: an `ImageSet`, or anything with `images` uint8 (N, C, H, W) and `labels` (N, ...).
        batch_size: images in a batch; the last one may be smaller unless `drop_last`.
        crop: zero padding in pixels before a random crop back to the original size (4 is usual at 32 x 32).
        flip: mirror each image left-right with probability 1/2.
        shuffle: a new order each epoch.
        generator: source of order, crops and flips, on the CPU (the same batches on every device). Needed when anything is random.
        device: where the data set and the batches live.
        mean, std: normalise per channel in the same read (else the values stay in [0, 1]).
        dtype: of x.

    >>> from types import SimpleNamespace
    >>> data = SimpleNamespace(images=torch.zeros(10, 1, 8, 8, dtype=torch.uint8), labels=torch.arange(10))
    >>> [tuple(x.shape) for x, y in Batches(data, 4)]
    [(4, 1, 8, 8), (4, 1, 8, 8), (2, 1, 8, 8)]
    """

    def __init__(
        self,
        data,
        batch_size: int,
        *,
        crop: int = 0,
        flip: bool = False,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        device="cpu",
        mean=None,
        std=None,
        dtype=torch.float32,
    ):
        if not isinstance(data.images, Tensor) or data.images.dtype != torch.uint8 or data.images.dim() != 4:
            raise ValueError(
                f"data={getattr(data, 'name', data)!r}: images must be one uint8 tensor (N, C, H, W); images of several sizes need .resize(size) first"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if (crop or flip or shuffle) and generator is None:
            raise ValueError("crop, flip and shuffle draw random numbers: pass generator=torch.Generator().manual_seed(seed)")
        self.n, self.channels, self.height, self.width = data.images.shape
        self.batch_size, self.crop, self.flip, self.shuffle, self.drop_last = batch_size, crop, flip, shuffle, drop_last
        self.generator, self.device, self.dtype = generator, torch.device(device), dtype
        rows = data.images.permute(0, 2, 3, 1)  # (N, H, W, C)
        size = self.n * (1 + flip) * (self.height + 2 * crop) * (self.width + 2 * crop) * self.channels
        self.resident = size <= LIMIT
        store = _pad(rows, crop, flip) if self.resident else rows
        self.store, self.labels = store.contiguous().to(self.device), data.labels.to(self.device)
        mean, std = torch.tensor(mean or [0.0] * self.channels), torch.tensor(std or [1.0] * self.channels)
        self.scale = (1 / (255 * std)).repeat(self.width).to(self.device, dtype)  # one affine map over a row of pixels
        self.shift = (-mean / std).repeat(self.width).to(self.device, dtype) if bool(mean.any()) else None

    def __len__(self) -> int:
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(self.n, generator=self.generator) if self.shuffle else torch.arange(self.n)
        for i in range(len(self)):
            yield self.batch(order[i * self.batch_size : (i + 1) * self.batch_size])

    def draw(self, index: Tensor) -> Tensor:
        """Where to read the images `index` (B,): (4, B), rows image, mirrored, dy, dx; each with its own random window and flip."""
        n, g = len(index), self.generator
        window = torch.randint(0, 2 * self.crop + 1, (2, n), generator=g) if self.crop else torch.zeros(2, n, dtype=torch.long)
        mirrored = torch.randint(0, 2, (n,), generator=g) if self.flip else torch.zeros(n, dtype=torch.long)
        return torch.stack([index, mirrored, *window])

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The images `index` (B,), cropped and mirrored by fresh draws, and their labels."""
        n = len(index)
        index, mirrored, dy, dx = self.draw(index).to(self.device, non_blocking=True)
        if self.resident:
            rows = self._windows(self.store)[index, mirrored, dy, dx]
        else:
            rows = self._windows(_pad(self.store[index], self.crop, self.flip))[torch.arange(n, device=self.device), mirrored, dy, dx]
        x = rows.to(self.dtype).mul_(self.scale)
        if self.shift is not None:
            x.add_(self.shift)
        return x.view(n, self.height, self.width, self.channels).permute(0, 3, 1, 2), self.labels[index]

    def _windows(self, store: Tensor) -> Tensor:
        """All windows of the padded store (N, flips, H + 2p, W + 2p, C): (N, flips, dy, dx, H, W C), a view."""
        n, flips, height, width, c = store.shape
        p = 2 * self.crop + 1
        return store.as_strided(
            (n, flips, p, p, self.height, self.width * c), (flips * height * width * c, height * width * c, width * c, c, width * c, 1)
        )


def _pad(rows: Tensor, crop: int, flip: bool) -> Tensor:
    rows = F.pad(rows, (0, 0, crop, crop, crop, crop))
    return torch.stack([rows, rows.flip(2)], 1) if flip else rows.unsqueeze(1)


def as_batches(data, batch_size: int = 256, **options):
    """`data` as an iterable of (x, y): an `ImageSet` by `Batches`, a `Dataset` by a `DataLoader`; a loader as it is."""
    if hasattr(data, "images") and hasattr(data, "labels"):
        return Batches(data, batch_size, **options)
    if isinstance(data, torch.utils.data.Dataset):
        loader = {k: v for k, v in options.items() if k in ("shuffle", "drop_last", "generator")}
        return torch.utils.data.DataLoader(data, batch_size, **loader)
    if hasattr(data, "__iter__"):
        return data
    raise TypeError(f"data={type(data).__name__} is neither an ImageSet, a torch Dataset, nor an iterable of (x, y) batches")
