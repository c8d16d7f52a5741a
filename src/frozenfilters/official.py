"""Readers of the data sets that need no packed archive: scikit-learn's digits, torchvision's data sets, and a folder of your own images.

MNIST and Fashion-MNIST are read from their original ``.gz`` files in place, so that the folder may be read-only; for the others
torchvision checks and reads the official files. Nothing is downloaded unless asked for.
"""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import torch

from frozenfilters.archives import CIFAR10, SIGNS, box_table, chw
from frozenfilters.catalogue import CorruptError, DataError, MissingError, Record, destination, missing
from frozenfilters.integrity import verify

FASHION = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DIGITS = tuple("0123456789")
_DATASET = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "gtsrb": "GTSRB"}
_MARKER = {  # what lies under torchvision's root when a split is there
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "svhn": "{split}_32x32.mat",
    "gtsrb": {"train": "gtsrb/GTSRB/Training", "test": "gtsrb/GTSRB/Final_Test"},
}


def stratified(labels, n: int, seed: int = 0) -> np.ndarray:
    """Choose `n` of the examples so that every class keeps its share (to within one), in their original order.

    The choice comes from NumPy's legacy generator, whose stream is guaranteed never to change.

    Args:
        labels: integers ``(N,)``.
        n: how many, at most N.
        seed: of the choice.

    Returns:
        indices ``(n,)``, ascending.

    Example:
        >>> stratified([0, 0, 0, 0, 1, 1], 3)
        array([0, 2, 4])
    """
    labels = np.asarray(labels)
    rng = np.random.RandomState(seed)
    values, counts = np.unique(labels, return_counts=True)
    wanted = counts * n / len(labels)
    take = np.floor(wanted).astype(int)
    rest = rng.permutation(len(values))  # ties between classes are broken by chance, not by label
    rest = rest[np.argsort(-np.round(wanted - take, 9)[rest], kind="stable")]
    take[rest[: n - take.sum()]] += 1
    chosen = [rng.permutation(np.flatnonzero(labels == value))[:k] for value, k in zip(values, take, strict=True)]
    return np.sort(np.concatenate(chosen))


def digits(split: str) -> dict:
    """scikit-learn's 1,797 digits: levels 0..16 scaled to 0..255; a fixed stratified split of 1,437 and 360."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    test = stratified(bunch.target, 360, seed=0)
    chosen = test if split == "test" else np.setdiff1d(np.arange(len(bunch.target)), test)
    images = np.rint(bunch.images[chosen, None] * (255 / 16)).astype(np.uint8)
    return _fields(torch.from_numpy(images), bunch.target[chosen], DIGITS, source="embedded")


def _fields(images, labels, classes, extra=None, source="torchvision") -> dict:
    labels = torch.as_tensor(np.array(labels, dtype=np.int64))
    return {"images": images, "labels": labels, "classes": tuple(classes), "extra": extra or {}, "source": source}


# --- torchvision's data sets ------------------------------------------------------------------------------------------------------------


def read_idx(path: Path) -> torch.Tensor:
    """Read an IDX file of bytes, plain or ``.gz``, as LeCun's MNIST page defines it: magic number, sizes (big-endian), data.

    Returns:
        uint8 tensor of the shape that the file states.

    Raises:
        CorruptError: if it is no such file or is cut short.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if data[:3] != b"\0\0\x08":
            raise ValueError("not an IDX file of bytes")
        shape = np.frombuffer(data, ">u4", count=data[3], offset=4).tolist()
        return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape).copy())
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise CorruptError(f"{path} cannot be read ({error}): remove it and get it again") from error


def find(record: Record, split: str, looked: list[Path]) -> Path | None:
    """torchvision's ``root`` for this data set: the first ``FOLDER/name`` or ``FOLDER`` that holds the split, or ``None``."""
    for root in [place for base in looked for place in (base / record.name, base)]:
        if record.files:
            if all(path is not None for path in _idx_files(record, split, root)):
                return root
        else:
            marker = _MARKER[record.name]
            if (root / (marker[split] if isinstance(marker, dict) else marker.format(split=split))).exists():
                return root
    return None


def _idx_files(record: Record, split: str, root: Path) -> list[Path | None]:
    """The original ``.gz`` files of a split under `root`, or else the unpacked ones; ``None`` where there is neither."""
    names = [name for name, _ in record.files if ("/train-" in name) == (split == "train")]
    return [next((path for path in (root / name, root / name.removesuffix(".gz")) if path.exists()), None) for name in names]


def fetch(record: Record, split: str, looked: list[Path], root: str | Path | None, download: bool) -> Path:
    """Download a set that was not found, into the first folder that may be written to.

    Returns:
        torchvision's ``root`` for it.

    Raises:
        MissingError: if `download` is false.
        DataError: if the download failed.
    """
    if not download:
        raise missing(record, looked)
    place = destination(root) / record.name
    try:
        place.mkdir(parents=True, exist_ok=True)
        _open(record.name, split, place, download=True)
    except (RuntimeError, OSError) as error:
        raise DataError(f"the download of {record.name} to {place} failed: {error}. Try again, or put the official files there by hand") from error
    return place


def torchvision_set(record: Record, split: str, place: Path) -> dict:
    """Read one of torchvision's data sets from its root `place`.

    Raises:
        CorruptError: if the files are wrong.
    """
    if record.files:
        paths = _idx_files(record, split, place)
        sums = dict(record.files)
        for path in paths:
            if path.suffix == ".gz":
                verify(path, sums[path.relative_to(place).as_posix()], record.name, remedy=f"remove it and run: {record.how}")
        images, labels = map(read_idx, paths)
        return _fields(images[:, None], labels.numpy(), FASHION if record.name == "fashion-mnist" else DIGITS)
    try:
        data = _open(record.name, split, place, download=False)
    except RuntimeError as error:
        raise CorruptError(f"{record.name} under {place} is incomplete or damaged ({error}): remove it and run: {record.how}") from error
    if record.name == "gtsrb":
        return _gtsrb(data, split, place)
    if record.name == "svhn":
        return _fields(torch.from_numpy(np.ascontiguousarray(data.data)), data.labels, DIGITS)
    images = torch.from_numpy(np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)))
    return _fields(images, data.targets, CIFAR10 if record.name == "cifar10" else data.classes)


def _open(name: str, split: str, place: Path, download: bool):
    from torchvision import datasets

    which = {"split": split} if name in ("svhn", "gtsrb") else {"train": split == "train"}
    return getattr(datasets, _DATASET[name])(place, download=download, **which)


def gtsrb_rows(path: Path) -> dict[str, dict]:
    """One of GTSRB's ``GT-*.csv`` files (semicolons): file name to ``{"Width", "Height", "Roi.X1", ..., "ClassId"}`` as integers."""
    with open(path, newline="") as file:
        rows = csv.DictReader(file, delimiter=";")
        return {row["Filename"]: {key: int(value) for key, value in row.items() if key and key != "Filename" and value} for row in rows}


def gtsrb_corners(row: dict) -> tuple[int, int, int, int]:
    """The box of one row of :func:`gtsrb_rows` as xmin, ymin, xmax, ymax in pixels of the original picture."""
    return tuple(row[key] for key in ("Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2"))


def _gtsrb(data, split: str, place: Path) -> dict:
    from PIL import Image

    samples = sorted((Path(path), label) for path, label in data._samples)
    tables = place.glob("gtsrb/GTSRB/Training/*/GT-*.csv") if split == "train" else [place / "gtsrb/GT-final_test.csv"]
    rows = {(path.parent.name if split == "train" else "", name): row for path in tables for name, row in gtsrb_rows(path).items()}
    images = tuple(chw(np.asarray(Image.open(path).convert("RGB"))) for path, _ in samples)
    labels = [label for _, label in samples]
    corners = [gtsrb_corners(rows[path.parent.name if split == "train" else "", path.name]) for path, _ in samples]
    return _fields(images, labels, SIGNS, {"names": tuple(path.stem for path, _ in samples), "boxes": box_table(range(len(labels)), labels, corners)})


# --- a folder of your own images --------------------------------------------------------------------------------------------------------


def folder(name: str, split: str) -> dict:
    """``folder:PATH`` or ``folder:PATH@SIZE``: one subfolder per class, either under PATH/train and PATH/test or directly under PATH.

    In the second case a stratified fifth (seed 0) is the test split. With SIZE every image is resized to SIZE x SIZE pixels.

    Raises:
        MissingError: if there is no such folder.
        DataError: if there is no image, or sizes differ and no SIZE is given.
    """
    from PIL import Image
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.v2.functional import resize

    text, _, size = name.removeprefix("folder:").rpartition("@")
    if not (text and size.isdigit()):
        text, size = name.removeprefix("folder:"), ""
    path = Path(text).expanduser()
    if not path.is_dir():
        raise MissingError(f"name={name!r}: there is no folder {path.absolute()}; give folder:PATH with one subfolder of images per class")
    own_split = (path / "train").is_dir() and (path / "test").is_dir()
    try:
        found = ImageFolder(path / split if own_split else path)
    except FileNotFoundError as error:
        raise DataError(f"name={name!r}: {error}; put images into one subfolder per class") from error
    samples = found.samples
    if not own_split:
        test = set(stratified(found.targets, round(len(samples) / 5), seed=0).tolist())
        samples = [sample for i, sample in enumerate(samples) if (i in test) == (split == "test")]
    images = [chw(np.asarray(Image.open(file).convert("RGB"))) for file, _ in samples]
    if size:
        images = [resize(image, [int(size), int(size)], antialias=True) for image in images]
    shapes = {tuple(image.shape[1:]) for image in images}
    if len(shapes) > 1:
        some = sorted(shapes)[:2]
        raise DataError(f"name={name!r}: the images have {len(shapes)} different sizes, e.g. {some} (height, width); choose one: 'folder:{path}@64'")
    names = tuple(str(Path(file).relative_to(path)) for file, _ in samples)
    return _fields(torch.stack(images), [label for _, label in samples], found.classes, {"names": names}, source="folder")
