"""Every data set of the study as one :class:`ImageSet`: ``load(name, split)``.

The default is ``digits``, which needs no download. Everything else is read from the folder that the variable ``FROZENFILTERS_DATA`` names
(which may be read-only) or from the user's cache folder; nothing is downloaded unless asked for, and every set carries the caveat and
the SHA-256 that figures and result rows state. The facts about the sets are in :mod:`frozenfilters.catalogue`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from frozenfilters import archives, official
from frozenfilters.catalogue import NAMES, CorruptError, DataError, MissingError, Record, UnknownNameError, folders, info, missing
from frozenfilters.integrity import array_sha256, sidecar

LEDGER: ContextVar[dict | None] = ContextVar("LEDGER", default=None)  # while a trial runs: what it loaded, for the row's stamp
__all__ = ["LEDGER", "NAMES", "CorruptError", "DataError", "ImageSet", "MissingError", "Record", "UnknownNameError", "available", "info", "load"]


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """One split of one data set, in memory.

    Attributes:
        name: as given to :func:`load`.
        split: ``"train"``, ``"test"``, for some sets ``"val"``.
        images: uint8 ``(N, C, H, W)``, contiguous; where sizes differ a tuple of N tensors ``(C, H, W)``; for sound a tuple of N int16
            tensors ``(samples,)``.
        labels: int64 ``(N,)``; -1 where an image has no label of its own (several boxes).
        classes: names of the labels 0, 1, ...
        note: caveat for figure footers, ``""`` where the data are exact and complete.
        source: ``"embedded"``, ``"torchvision"``, ``"archive"``, ``"self-packed"`` or ``"folder"``.
        sha256: of the decoded arrays of the whole split: bytes of the images, of the labels, and of ``extra["masks"]`` if there are any.
        extra: more per set. A tensor or tuple has one entry per image and follows :meth:`take`; ``extra["boxes"]`` is a table, a dict
            of equally long arrays ``image`` (index), ``label``, ``xmin``, ``ymin``, ``xmax``, ``ymax`` (pixels); lists and numbers
            describe the whole set.

    Tensors are shared between calls of :func:`load`: do not change them in place.
    """

    name: str
    split: str
    images: Tensor | tuple[Tensor, ...]
    labels: Tensor
    classes: tuple[str, ...]
    note: str = ""
    source: str = ""
    sha256: str = ""
    extra: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"ImageSet({self.name}, {self.split}: {len(self):,} x {self.shape}, {self.num_classes} classes, {self.source}{self.note and f'; {self.note}'})"

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """One example: float image ``(C, H, W)`` in [0, 1] (sound: float ``(samples,)`` in [-1, 1)) and its label."""
        image = self.images[i]
        return image.float() / (255 if image.dtype == torch.uint8 else 32768), int(self.labels[i])

    @property
    def shape(self) -> tuple[int, ...] | None:
        """``(C, H, W)``, or ``None`` where sizes differ."""
        return tuple(self.images.shape[1:]) if isinstance(self.images, Tensor) else None

    @property
    def channels(self) -> int:
        """Channels of an image; 1 for sound."""
        return self.images[0].shape[0] if self.images[0].ndim == 3 else 1

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def to(self, device) -> ImageSet:
        """The same set with its tensors on `device`."""
        move = lambda value: value.to(device) if isinstance(value, Tensor) else tuple(map(move, value)) if isinstance(value, tuple) else value  # noqa: E731
        extra = {key: move(value) for key, value in self.extra.items()}
        return dataclasses.replace(self, images=move(self.images), labels=move(self.labels), extra=extra)

    def take(self, index: Sequence[int] | Tensor | np.ndarray) -> ImageSet:
        """The examples `index` ``(n,)``, in that order, with what `extra` says about them."""
        index = torch.as_tensor(np.asarray(torch.as_tensor(index).cpu()), dtype=torch.int64)

        def pick(value):
            if isinstance(value, Tensor):
                return value[index.to(value.device)]
            return tuple(value[i] for i in index.tolist()) if isinstance(value, tuple) else value

        extra = {key: pick(value) for key, value in self.extra.items()}
        if "boxes" in extra:
            extra["boxes"] = _take_boxes(extra["boxes"], index.numpy())
        return dataclasses.replace(self, images=pick(self.images), labels=pick(self.labels), extra=extra)

    def subset(self, n: int | None, seed: int = 0) -> ImageSet:
        """`n` examples, every class keeping its share; the same for the same seed, on every machine.

        Args:
            n: how many; ``None`` for all.
            seed: of the choice.

        Raises:
            DataError: if `n` is larger than the set or below 1.

        Example:
            >>> small = load("digits").subset(100)
            >>> len(small), small.note
            (100, '100 of 1,437 images')
        """
        if n is None or n == len(self):
            return self
        if not 1 <= n <= len(self):
            raise DataError(f"n={n} is not between 1 and the {len(self):,} examples of {self.name} ({self.split}); give n=None for all")
        note = f"{n:,} of {len(self):,} {'images' if self.images[0].dtype == torch.uint8 else 'recordings'}"
        return dataclasses.replace(self.take(official.stratified(self.labels.cpu(), n, seed)), note=", ".join(filter(None, (self.note, note))))

    def resize(self, size: int | tuple[int, int]) -> ImageSet:
        """Every image resized to ``(size, size)`` or ``(height, width)``, stacked: bilinear, antialiased, aspect not kept.

        Boxes are scaled with the images; masks take the nearest label and are stacked to int32 ``(N, H, W)``.

        Example:
            >>> load("digits", "test").resize(16).images.shape
            torch.Size([360, 1, 16, 16])
        """
        from torchvision.transforms.v2.functional import resize

        if self.images[0].ndim != 3:
            raise DataError(f"{self.name} holds sound, which has no height and width: cut or pad the recordings instead of calling resize(size={size!r})")
        size = (size, size) if isinstance(size, int) else tuple(size)
        if self.shape is not None and self.shape[1:] == size:
            return self
        parts = self.images.split(4096) if isinstance(self.images, Tensor) else self.images
        done = [resize(part, list(size), antialias=True) for part in parts]
        extra = dict(self.extra)
        if "masks" in extra:
            nearest = lambda mask: torch.nn.functional.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0].int()  # noqa: E731
            extra["masks"] = torch.stack([nearest(mask) for mask in extra["masks"]])
        if "boxes" in extra:
            old = np.array([image.shape[1:] for image in self.images], dtype=np.float32).reshape(-1, 2)[extra["boxes"]["image"]]
            scale = {"x": size[1] / old[:, 1], "y": size[0] / old[:, 0]}
            extra["boxes"] = {key: value * scale[key[0]] if key[0] in "xy" else value for key, value in extra["boxes"].items()}
        images = torch.cat(done) if isinstance(self.images, Tensor) else torch.stack(done)
        return dataclasses.replace(self, images=images.contiguous(), extra=extra)

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of every channel over all pixels, on the [0, 1] scale."""
        parts = self.images.split(1024) if isinstance(self.images, Tensor) else self.images
        total, square, count = 0, 0, 0
        for part in parts:
            flat = part.transpose(0, 1).flatten(1).double() if part.ndim == 4 else part.reshape(self.channels, -1).double()
            total, square, count = total + flat.sum(1), square + flat.square().sum(1), count + flat.shape[1]
        scale = 255 if self.images[0].dtype == torch.uint8 else 32768
        mean = total / count
        std = (square / count - mean**2).clamp_min(0).sqrt()
        return tuple((mean / scale).tolist()), tuple((std / scale).tolist())


def _take_boxes(boxes: dict[str, np.ndarray], index: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of a table of boxes that lie on the images `index`, renumbered and ordered like them."""
    rows = [np.flatnonzero(boxes["image"] == old) for old in index] or [np.empty(0, np.int64)]
    chosen = {key: value[np.concatenate(rows)] for key, value in boxes.items()}
    return chosen | {"image": np.repeat(np.arange(len(index)), [len(row) for row in rows][: len(index)])}


def load(name: str, split: str = "train", *, root: str | Path | None = None, download: bool = False) -> ImageSet:
    """Load one split of a data set.

    Args:
        name: one of :data:`NAMES`, or ``folder:PATH`` / ``folder:PATH@SIZE`` for your own images.
        split: ``"train"``, ``"test"`` or, where there is one, ``"val"``.
        root: folder to look in, instead of the one that ``FROZENFILTERS_DATA`` names.
        download: let torchvision fetch a set that is not there (only the sets that torchvision has).

    Raises:
        UnknownNameError, MissingError, CorruptError: all of the family :class:`DataError`, each with the remedy.

    Example:
        >>> digits = load("digits")
        >>> digits.images.shape, digits.images.dtype, digits.num_classes
        (torch.Size([1437, 1, 8, 8]), torch.uint8, 10)
        >>> image, label = digits[0]
        >>> image.shape, label
        (torch.Size([1, 8, 8]), 0)
    """
    found = _load(name, split, root, download)
    used = LEDGER.get()
    if used is not None:
        used.setdefault(name, {"source": found.source, "note": found.note, "sha256": {}})["sha256"][split] = found.sha256
    return found


def _load(name: str, split: str, root: str | Path | None, download: bool) -> ImageSet:
    record = info(name)
    if split not in record.splits:
        raise DataError(f"split={split!r}: {name} has the splits {', '.join(record.splits)}")
    if record.kind == "folder":
        return _finish(record, split, official.folder(name, split))
    looked = folders(root)
    if record.kind == "archive":
        paths = archives.locate(record, looked)
        if paths is None:
            raise missing(record, looked)
        return _archive(record, split, tuple(paths), tuple(_state(path) for path in paths))
    if record.kind == "torchvision":
        place = official.find(record, split, looked)
        if place is None:
            place = official.fetch(record, split, looked, root, download)
        return _torchvision(record, split, place)
    return _finish(record, split, official.digits(split))


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file or its sidecar does: the key of the cache."""
    files = (path, sidecar(path))
    return tuple(number for file in files if file.exists() for number in (file.stat().st_size, file.stat().st_mtime_ns))


@lru_cache(maxsize=4)
def _archive(record: Record, split: str, paths: tuple[Path, ...], state: tuple) -> ImageSet:
    return _finish(record, split, archives.read(record, list(paths), split))


@lru_cache(maxsize=4)
def _torchvision(record: Record, split: str, place: Path) -> ImageSet:
    return _finish(record, split, official.torchvision_set(record, split, place))


def _finish(record: Record, split: str, fields: dict) -> ImageSet:
    digest = array_sha256(fields["images"], fields["labels"], fields["extra"].get("masks", ()))
    return ImageSet(record.name, split, sha256=digest, **({"note": record.note} | fields))


def available(root: str | Path | None = None):
    """Which data sets are here.

    Returns:
        a ``pandas.DataFrame`` with the columns ``name``, ``source`` (kind), ``found``, ``where`` (folder or file, else the command that
        brings it) and ``note``. Nothing is decoded, hashed or written.

    Example:
        >>> available().set_index("name").found["digits"].item()
        True
    """
    import pandas

    rows = []
    for record in map(info, NAMES):
        where = None
        if record.kind == "archive":
            paths = archives.locate(record, folders(root))
            where = paths and paths[0]
        elif record.kind == "torchvision":
            where = official.find(record, "train", folders(root))
        found = record.kind == "embedded" or where is not None
        rows.append((record.name, record.kind, found, str(where) if where else record.how, record.note))
    return pandas.DataFrame(rows, columns=["name", "source", "found", "where", "note"])
