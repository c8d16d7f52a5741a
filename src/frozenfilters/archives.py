"""Readers of the packed archives: one function per layout.

Every reader takes ``(path, split, digest)`` and returns the fields of an :class:`frozenfilters.data.ImageSet` that depend on the file:
``images``, ``labels``, ``classes``, ``extra``. The files are checked first
(:mod:`frozenfilters.integrity`).

Legend: tensors of pictures are uint8 ``(N, C, H, W)`` or, where sizes differ, a tuple of N tensors ``(C, H, W)``. A table of boxes is a
dict of equally long numpy arrays ``image`` (index of the picture), ``label``, ``xmin``, ``ymin``, ``xmax``, ``ymax`` (pixels).
"""

from __future__ import annotations

import csv
import hashlib
import io
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from frozenfilters.catalogue import MissingError, Record, info
from frozenfilters.integrity import decoded, file_sha256, verify

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CARDS = ("nine", "ten", "jack", "queen", "king", "ace")
CELLS = ("RBC", "WBC", "Platelets")
MAPS = ("8k_mars", "8k_earth_daymap", "8k_earth_nightmap")
FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia"),
    *("Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax"),
)
SIGNS = (
    *("limit 20", "limit 30", "limit 50", "limit 60", "limit 70", "limit 80", "end of limit 80", "limit 100", "limit 120", "no passing"),
    *("no passing for lorries", "right of way at the next crossing", "priority road", "yield", "stop", "no vehicles", "no lorries", "no entry"),
    *("general caution", "bend left", "bend right", "double bend", "bumpy road", "slippery road", "road narrows on the right", "road work"),
    *("traffic signals", "pedestrians", "children", "bicycles", "ice or snow", "wild animals", "end of all limits", "turn right ahead"),
    *("turn left ahead", "ahead only", "straight or right", "straight or left", "keep right", "keep left", "roundabout"),
    *("end of no passing", "end of no passing for lorries"),
)


def picture(data: bytes) -> np.ndarray:
    """Decode a JPEG, WebP or PNG file to ``(H, W)`` or ``(H, W, 3)``."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)))


def chw(array: np.ndarray) -> torch.Tensor:
    """``(H, W)`` or ``(H, W, C)`` to a contiguous tensor ``(C, H, W)`` of its own memory."""
    return torch.from_numpy(np.array(array[None] if array.ndim == 2 else array.transpose(2, 0, 1), order="C"))


def tiles(sheet: np.ndarray, columns: int) -> np.ndarray:
    """Cut a picture of 32x32 tiles ``(32 r, 32 columns, 3)`` into ``(r columns, 3, 32, 32)``."""
    return np.ascontiguousarray(sheet.reshape(-1, 32, columns, 32, 3).transpose(0, 2, 4, 1, 3)).reshape(-1, 3, 32, 32)


def table(archive: zipfile.ZipFile, name: str) -> list[dict[str, str]]:
    """The rows of a CSV file inside a zip archive."""
    with archive.open(name) as file:
        return list(csv.DictReader(io.TextIOWrapper(file, "utf-8")))


def box_table(image, label, boxes) -> dict[str, np.ndarray]:
    """A table of boxes from indices ``(n,)``, labels ``(n,)`` and corners ``(n, 4)`` = xmin, ymin, xmax, ymax.

    Example:
        >>> box_table([0], [3], [[1, 2, 5, 6]])["xmax"]
        array([5.], dtype=float32)
    """
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    columns = {"image": np.asarray(image, dtype=np.int64), "label": np.asarray(label, dtype=np.int64)}
    return columns | {side: boxes[:, i].copy() for i, side in enumerate(("xmin", "ymin", "xmax", "ymax"))}


def _long(values) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values).astype(np.int64).reshape(-1))


def _cifar10_jpeg(path: Path, split: str, digest: str) -> dict:
    from PIL import features

    with np.load(path) as z:
        labels = z[f"{split}_label"]

    def decode() -> np.ndarray:
        with np.load(path) as z:
            data, offset = z[f"{split}_jpeg"].tobytes(), z[f"{split}_offset"]
        sheet = np.empty((len(labels), 3, 32, 32), dtype=np.uint8)
        for i, image in enumerate(sheet):
            image[:] = picture(data[offset[i] : offset[i + 1]]).transpose(2, 0, 1)
        return sheet

    images = decoded(f"cifar10-jpeg-{split}-{digest[:16]}-jpg{features.version('jpg')}", len(labels), decode)
    return {"images": images, "labels": _long(labels), "classes": CIFAR10, "extra": {}}


def _cifar10_exact_part(path: Path, split: str, digest: str) -> dict:
    with zipfile.ZipFile(path) as z:
        images = tiles(picture(z.read({"train": "train_0000-3999.webp", "test": "test_0000-0999.webp"}[split])), 50)
        member = f"{split}_label.npy"
        labels = np.load(io.BytesIO(z.read(member))) if member in z.namelist() else None
    if labels is None:  # the catalogue's archive holds pixels only: its image i is image i of the JPEG copy
        neighbour = path.with_name("cifar10_jpeg.npz")
        if not neighbour.exists():
            remedy = f"put it there, or run: {info('cifar10-exact-part').how}"
            raise MissingError(f"{path} has no labels; they are the first ones of {neighbour}, which is missing. To fix it: {remedy}")
        with np.load(neighbour) as z:
            labels = z[f"{split}_label"][: len(images)]
    return {"images": torch.from_numpy(images[: len(labels)]), "labels": _long(labels), "classes": CIFAR10, "extra": {}}


def _gtsrb32(path: Path, split: str, digest: str) -> dict:
    with np.load(path) as z:
        labels = _long(z[f"{split}_label"])
        images = torch.from_numpy(tiles(picture(z[f"{split}_webp"].tobytes()), 43))[: len(labels)]
        extra = {"names": tuple(z[f"{split}_name"].tolist()), "size": torch.as_tensor(z[f"{split}_size"].astype(np.int64))}
        extra["boxes"] = box_table(np.arange(len(labels)), labels, z[f"{split}_box"])
    return {"images": images, "labels": labels, "classes": SIGNS, "extra": extra}


def _nuclei(path: Path, split: str, digest: str) -> dict:
    kind = {"train": "gray", "test": "rgb"}[split]
    with zipfile.ZipFile(path) as z:
        rows = [row for row in table(z, "index.csv") if row["kind"] == kind]
        images = tuple(chw(picture(z.read(f"images/{row['image_id']}.webp"))) for row in rows)
        masks = tuple(torch.from_numpy(picture(z.read(f"labels/{row['image_id']}.png")).astype(np.int32)) for row in rows)
    extra = {"masks": masks, "names": tuple(row["image_id"] for row in rows), "nuclei": _long([row["nuclei"] for row in rows])}
    extra["mean_intensity"] = torch.tensor([float(row["mean_intensity"]) for row in rows])
    return {"images": images, "labels": torch.full((len(rows),), int(kind == "rgb")), "classes": ("grey", "colour"), "extra": extra}


def held_out(patient: str) -> bool:
    """Whether a patient belongs to the test split: SHA-256 of the decimal patient number, as an integer, is divisible by five.

    Example:
        >>> [p for p in range(61, 81) if held_out(str(p))]
        [72, 74, 78]
    """
    return int(hashlib.sha256(patient.encode()).hexdigest(), 16) % 5 == 0


def _chest_xray(path: Path, split: str, digest: str) -> dict:
    from PIL import features

    with zipfile.ZipFile(path) as z:
        rows = [row for row in table(z, "labels.csv") if held_out(row["patient_id"]) == (split == "test")]
        places = {row["image_id"]: i for i, row in enumerate(rows)}
        boxes = [row for row in table(z, "boxes.csv") if row["image_id"] in places]

    def decode() -> np.ndarray:
        with zipfile.ZipFile(path) as z:
            return np.stack([picture(z.read(f"images/{name}.jpg"))[None] for name in places])

    corners = [(float(b["x"]), float(b["y"]), float(b["x"]) + float(b["width"]), float(b["y"]) + float(b["height"])) for b in boxes]
    finding = [FINDINGS.index({"Infiltrate": "Infiltration"}.get(b["finding"], b["finding"])) for b in boxes]
    extra = {
        "findings": torch.tensor([[int(row[name]) for name in FINDINGS] for row in rows]).reshape(len(rows), len(FINDINGS)),
        "finding_names": list(FINDINGS),
        "patient_id": _long([int(row["patient_id"]) for row in rows]),
        "age": _long([int(row["age"]) for row in rows]),
        **{key: tuple(row[column] for row in rows) for key, column in (("names", "image_id"), ("sex", "sex"), ("view", "view"))},
        "boxes": box_table([places[b["image_id"]] for b in boxes], finding, corners),
    }
    images = decoded(f"chest-xray-{split}-{digest[:16]}-jpg{features.version('jpg')}", len(rows), decode)
    return {"images": images, "labels": _long([row["group"] == "Pneumonia" for row in rows]), "classes": ("no finding", "pneumonia"), "extra": extra}


def _pneumonia(path: Path, split: str, digest: str) -> dict:
    with np.load(path) as z:
        images, labels = torch.from_numpy(z[f"{split}_images"])[:, None], _long(z[f"{split}_labels"])
    return {"images": images, "labels": labels, "classes": ("normal", "pneumonia"), "extra": {}}


def _spoken_digits(path: Path, split: str, digest: str) -> dict:
    with np.load(path) as z:
        audio, offset, digit, speaker, index = (z[key] for key in ("audio", "offset", "digit", "speaker", "index"))
        extra = {"speakers": z["speakers"].tolist(), "rate": int(z["rate"])}
    chosen = np.flatnonzero((index < 5) == (split == "test"))
    sounds = tuple(torch.from_numpy(audio[offset[i] : offset[i + 1]].copy()) for i in chosen)
    extra |= {"speaker": _long(speaker[chosen]), "index": _long(index[chosen])}
    return {"images": sounds, "labels": _long(digit[chosen]), "classes": tuple("0123456789"), "extra": extra}


def _boxes(classes: tuple[str, ...], path: Path, split: str, digest: str) -> dict:
    with zipfile.ZipFile(path) as z:
        places = {row["image_id"]: i for i, row in enumerate(row for row in table(z, "index.csv") if row["split"] == split)}
        boxes = [row for row in table(z, "boxes.csv") if row["image_id"] in places]
        images = tuple(chw(picture(z.read(f"images/{name}.jpg"))) for name in places)
    corners = [[float(b[side]) for side in ("xmin", "ymin", "xmax", "ymax")] for b in boxes]
    found = box_table([places[b["image_id"]] for b in boxes], [classes.index(b["class"]) for b in boxes], corners)
    single = np.bincount(found["image"], minlength=len(images)) == 1
    labels = np.full(len(images), -1)
    labels[found["image"]] = found["label"]
    return {"images": images, "labels": _long(np.where(single, labels, -1)), "classes": classes, "extra": {"names": tuple(places), "boxes": found}}


def _large_images(path: Path, split: str, digest: str) -> dict:
    images = tuple(chw(picture(path.with_name(f"{name}.jpg").read_bytes())) for name in MAPS)
    return {"images": images, "labels": torch.arange(3), "classes": ("Mars", "Earth by day", "Earth by night"), "extra": {"names": MAPS}}


READERS: dict[str, Callable[[Path, str, str], dict]] = {
    "cifar10-jpeg": _cifar10_jpeg,
    "cifar10-exact-part": _cifar10_exact_part,
    "gtsrb32": _gtsrb32,
    "nuclei": _nuclei,
    "chest-xray": _chest_xray,
    "pneumonia": _pneumonia,
    "spoken-digits": _spoken_digits,
    "playing-cards": partial(_boxes, CARDS),
    "blood-cells": partial(_boxes, CELLS),
    "large-images": _large_images,
}


def locate(record: Record, looked: list[Path]) -> list[Path] | None:
    """The archive's files in the first of the folders `looked` that has them all, else ``None``."""
    return next(([base / file for file, _ in record.files] for base in looked if all((base / file).exists() for file, _ in record.files)), None)


def read(record: Record, paths: list[Path], split: str) -> dict:
    """Verify the files of a packed archive and decode one split.

    Returns:
        the fields of an ``ImageSet`` except ``name``, ``split`` and ``sha256``.
    """
    notes = [verify(path, expected, record.name) for path, (_, expected) in zip(paths, record.files, strict=True)]
    own = [note for note in notes if note is not None]
    fields = READERS[record.name](paths[0], split, file_sha256(paths[0]))
    partial_note = "partial" if any(note.get("partial") for note in own) else ""
    return fields | {"note": ", ".join(filter(None, (record.note, partial_note))), "source": "self-packed" if own else "archive"}
