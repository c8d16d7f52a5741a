"""Official releases to packed archives: one builder per data set.

Every builder takes the SOURCE that the catalogue names and returns ``(files, facts)``: the archive's files as
``{path under the data folder: bytes}``, and facts about the release itself that :mod:`frozenfilters.pack` checks. Sizes, resampling and
JPEG qualities are those of the study's own archives; which images go into a subset is in ``selections.txt`` or in a rule stated here.
"""

from __future__ import annotations

import csv
import io
import pickle
import tarfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import defaultdict
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from frozenfilters.archives import CARDS, CELLS, CIFAR10, FINDINGS, MAPS
from frozenfilters.catalogue import CorruptError, DataError, MissingError, info
from frozenfilters.integrity import array_sha256
from frozenfilters.official import gtsrb_corners, gtsrb_rows

Built = tuple[dict[str, bytes], dict]
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")


# --- writing ----------------------------------------------------------------------------------------------------------------------------


def _npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def _zip(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        for name, data in members.items():
            z.writestr(zipfile.ZipInfo(name), data)  # a fixed date: the same members give the same bytes
    return file.getvalue()


def _csv(rows: list[dict], columns: list[str]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def _encode(image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def _sheet(images: np.ndarray, columns: int) -> bytes:
    """``(N, 32, 32, 3)`` as one lossless picture, `columns` tiles to a row, the last row filled up with black."""
    images = np.concatenate([images, np.zeros((-len(images) % columns, 32, 32, 3), np.uint8)])
    sheet = images.reshape(-1, columns, 32, 32, 3).swapaxes(1, 2).reshape(-1, columns * 32, 3)
    return _encode(sheet, "WEBP", lossless=True)


def _file(name: str) -> str:
    return info(name).files[0][0]


def _need(path: Path, what: str) -> Path:
    if not path.exists():
        raise MissingError(f"{path} does not exist; expected {what}")
    return path


def _selection(name: str) -> dict[int, list[int]]:
    lines = (resources.files("frozenfilters") / "selections.txt").read_text().splitlines()
    rows = [list(map(int, line.split()[1:])) for line in lines if line.startswith(name + " ")]
    return {first: rest for first, *rest in rows}


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------------------------


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and plain containers, nothing else: a pickle from the net must not run code."""

    def find_class(self, module: str, name: str):
        if name in ("ndarray", "dtype"):
            return getattr(np, name)
        if name == "_reconstruct":
            return np.ndarray(0).__reduce__()[0]
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        raise CorruptError(f"the pickle asks for {module}.{name}, which CIFAR-10's files do not: not the official release")


def cifar10(source: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The official python version: split to (images ``(N, 32, 32, 3)``, labels ``(N,)``), from the tar file or the unpacked folder."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    if source.is_dir():
        place = next((p for p in (source, source / "cifar-10-batches-py") if (p / "test_batch").exists()), source)
        data = [_need(place / name, "a batch of CIFAR-10's python version").read_bytes() for name in names]
    else:
        with tarfile.open(source) as tar:
            members = {Path(member.name).name: member for member in tar.getmembers() if member.isfile()}
            if absent := [name for name in names if name not in members]:
                raise MissingError(f"{source} has no {', '.join(absent)}: it is not cifar-10-python.tar.gz")
            data = [tar.extractfile(members[name]).read() for name in names]
    batches = [_ArraysOnly(io.BytesIO(batch), encoding="latin1").load() for batch in data]
    images = [np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for batch in batches]
    labels = [np.asarray(batch["labels"], dtype=np.uint8) for batch in batches]
    return {"train": (np.concatenate(images[:5]), np.concatenate(labels[:5])), "test": (images[5], labels[5])}


def _cifar10_jpeg(source: Path) -> Built:
    arrays, facts = {"classes": np.array(CIFAR10)}, {}
    for split, (images, labels) in cifar10(source).items():
        jpeg = [_encode(image, "JPEG", quality=75) for image in images]
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(jpeg), np.uint8)
        arrays[f"{split}_offset"] = np.cumsum([0, *map(len, jpeg)])
        arrays[f"{split}_label"] = labels
        first = images[: 4000 if split == "train" else 1000]
        facts |= {f"{split} first exact pixels": array_sha256(first.transpose(0, 3, 1, 2)), f"{split} labels": array_sha256(labels.astype(np.int64))}
    return {_file("cifar10-jpeg"): _npz(**arrays)}, facts


def _cifar10_exact_part(source: Path) -> Built:
    members = {}
    for split, (images, labels) in cifar10(source).items():
        n, name = (4000, "train_0000-3999.webp") if split == "train" else (1000, "test_0000-0999.webp")
        file = io.BytesIO()
        np.save(file, labels[:n])
        members |= {name: _sheet(images[:n], 50), f"{split}_label.npy": file.getvalue()}
    return {_file("cifar10-exact-part"): _zip(members)}, {}


# --- one builder per release ------------------------------------------------------------------------------------------------------------


def gtsrb_frames(tracks: dict[int, set[int]], n: int = 100) -> list[tuple[int, int]]:
    """The rule of the training subset: round by round take frame (29 - 11 round) mod 30 of every track, until there are n.

    Args:
        tracks: track number to its frame numbers (0..29; a higher frame is nearer to the sign).
        n: images of one class.

    Returns:
        sorted pairs (track, frame).

    Example:
        >>> gtsrb_frames({0: set(range(30)), 1: set(range(30))}, n=5)
        [(0, 7), (0, 18), (0, 29), (1, 18), (1, 29)]
    """
    rounds = ((track, (29 - 11 * i) % 30) for i in range(30) for track in sorted(tracks))
    return sorted([(track, frame) for track, frame in rounds if frame in tracks[track]][:n])


def _gtsrb32(source: Path) -> Built:
    chosen: dict[str, list[tuple[Path, dict]]] = {"train": [], "test": []}
    tables = sorted(path for path in source.rglob("GT-*.csv") if path.stem[3:].isdigit())
    if not tables:
        raise MissingError(f"{source} has no GT-00000.csv in any subfolder: unpack GTSRB_Final_Training_Images there")
    for path in tables:
        rows, tracks = gtsrb_rows(path), defaultdict(set)
        for name in rows:
            tracks[int(name[:5])].add(int(name[6:11]))
        names = [f"{track:05d}_{frame:05d}.ppm" for track, frame in gtsrb_frames(tracks)]
        chosen["train"] += [(path.parent / name, rows[name]) for name in names]
    table = next(source.rglob("GT-final_test.csv"), None)
    if table is None:
        raise MissingError(f"{source} has no GT-final_test.csv in any subfolder: unpack GTSRB_Final_Test_GT there")
    places = {path.name: path for path in source.rglob("*.ppm") if len(path.stem) == 5}
    wanted = {f"{number:05d}.ppm" for numbers in _selection("gtsrb32").values() for number in numbers}
    chosen["test"] = [(places[name], row) for name, row in sorted(gtsrb_rows(table).items()) if name in wanted and name in places]
    arrays = {}
    for split, items in chosen.items():
        pictures = [Image.open(path).convert("RGB") for path, _ in items]
        sizes = np.array([picture.size for picture in pictures], dtype=np.uint16).reshape(-1, 2)
        images = [np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR)) for picture in pictures]
        corners = np.array([gtsrb_corners(row) for _, row in items], dtype=np.float64).reshape(-1, 4)
        arrays |= {
            f"{split}_webp": np.frombuffer(_sheet(np.array(images, np.uint8).reshape(-1, 32, 32, 3), 43), np.uint8),
            f"{split}_label": np.array([row["ClassId"] for _, row in items], dtype=np.uint8),
            f"{split}_box": (corners * 32 / np.tile(sizes, 2)).round(2).astype(np.float32),
            f"{split}_size": sizes,
            f"{split}_name": np.array([path.stem for path, _ in items], dtype=str),
        }
    return {_file("gtsrb32"): _npz(**arrays)}, {}


def _nuclei(source: Path) -> Built:
    members, rows = {}, []
    for folder in sorted(path for path in source.iterdir() if (path / "images").is_dir()):
        name = folder.name
        image = np.asarray(Image.open(_need(folder / "images" / f"{name}.png", "an image")).convert("RGB"))
        labels, overlap = np.zeros(image.shape[:2], np.uint16), 0
        masks = sorted((folder / "masks").glob("*.png"))
        for number, path in enumerate(masks, 1):  # a pixel of two nuclei goes to the later one
            mask = np.asarray(Image.open(path).convert("L")) > 0
            overlap += int((labels[mask] > 0).sum())
            labels[mask] = number
        grey = (image[..., 0] == image[..., 1]).all() and (image[..., 1] == image[..., 2]).all()
        rows.append({"image_id": name, "width": image.shape[1], "height": image.shape[0], "kind": "gray" if grey else "rgb", "nuclei": len(masks)})
        rows[-1] |= {"overlap_pixels": overlap, "mean_intensity": round(image.mean(), 2), "foreground_fraction": round((labels > 0).mean(), 4)}
        members |= {f"images/{name}.webp": _encode(image, "WEBP", lossless=True), f"labels/{name}.png": _encode(labels, "PNG")}
    if not rows:
        raise MissingError(f"{source} holds no folder with images/ and masks/ in it: expected {info('nuclei').source}")
    return {_file("nuclei"): _zip(members | {"index.csv": _csv(rows, list(rows[0]))})}, {}


def _chest_xray(source: Path) -> Built:
    entries = next(iter(sorted(source.glob("Data_Entry_2017*.csv"))), source / "Data_Entry_2017.csv")
    boxes = next(iter(sorted(source.glob("BBox_List_2017*.csv"))), source / "BBox_List_2017.csv")
    with open(_need(entries, "the NIH's list of labels"), newline="") as file:
        listed = {row["Image Index"]: row for row in csv.DictReader(file)}
    with open(_need(boxes, "the NIH's list of boxes"), newline="") as file:
        marked = list(csv.reader(file))[1:]
    places = {path.name: path for path in source.rglob("*.png")}
    wanted = [f"{patient:08d}_{number:03d}.png" for patient, numbers in _selection("chest-xray").items() for number in numbers]
    members, rows, found = {}, [], []
    for name in (name for name in wanted if name in places and name in listed):
        image, row = Image.open(places[name]).convert("L"), listed[name]
        members[f"images/{name[:-4]}.jpg"] = _encode(image.resize((224, 224), Image.Resampling.LANCZOS), "JPEG", quality=92)
        findings = row["Finding Labels"].split("|")
        rows.append({"image_id": name[:-4], "patient_id": int(row["Patient ID"]), "follow_up": int(row["Follow-up #"])})
        rows[-1] |= {"age": int(row["Patient Age"].rstrip("Y")), "sex": row["Patient Gender"], "view": row["View Position"]}
        rows[-1] |= {"group": "Pneumonia" if "Pneumonia" in findings else "No_findings"} | {finding: int(finding in findings) for finding in FINDINGS}
        across, down = 224 / image.width, 224 / image.height
        for box in (box for box in marked if box[0] == name):
            x, y, width, height = map(float, box[2:6])
            sides = {"x": x * across, "y": y * down, "width": width * across, "height": height * down}
            found.append({"image_id": name[:-4], "finding": box[1]} | {side: round(value, 2) for side, value in sides.items()})
    if not rows:
        raise MissingError(f"{source} holds none of the {len(wanted)} chosen images, e.g. {wanted[0]}: unpack the NIH's images there")
    tables = {"labels.csv": _csv(rows, list(rows[0])), "boxes.csv": _csv(found, ["image_id", "finding", "x", "y", "width", "height"])}
    return {_file("chest-xray"): _zip(members | tables)}, {}


def _pneumonia(source: Path) -> Built:
    with np.load(source) as z:
        keys = [f"{split}_{what}" for split in ("train", "val", "test") for what in ("images", "labels")]
        if absent := [key for key in keys if key not in z]:
            raise MissingError(f"{source} has no {', '.join(absent)}: it is not MedMNIST's pneumoniamnist.npz (28x28)")
        return {_file("pneumonia"): _npz(**{key: z[key] for key in keys})}, {}


def _spoken_digits(source: Path) -> Built:
    from scipy.io import wavfile

    sounds, digit, speaker, index = [], [], [], []
    for path in sorted(source.glob("*_*_*.wav"), key=lambda path: path.name):
        rate, sound = wavfile.read(path)
        who = path.stem.split("_")
        if rate != 8000 or sound.dtype != np.int16 or sound.ndim != 1 or who[1] not in SPEAKERS:
            raise DataError(f"{path}: expected one of {', '.join(SPEAKERS)}, mono, 16 bit, 8000 Hz; found {who[1]}, {sound.shape}, {sound.dtype}, {rate} Hz")
        sounds.append(sound)
        digit.append(int(who[0]))
        speaker.append(SPEAKERS.index(who[1]))
        index.append(int(who[2]))
    if not sounds:
        raise MissingError(f"{source} holds no DIGIT_SPEAKER_INDEX.wav: expected {info('spoken-digits').source}")
    numbers = {key: np.array(value, np.uint8) for key, value in (("digit", digit), ("speaker", speaker), ("index", index))}
    offset = np.cumsum([0, *map(len, sounds)])
    return {_file("spoken-digits"): _npz(audio=np.concatenate(sounds), offset=offset, speakers=np.array(SPEAKERS), rate=np.int64(8000), **numbers)}, {}


def _voc(classes: tuple[str, ...], items: list[tuple[str, str, Path, Path]], shrink, quality: int) -> bytes:
    """Pictures with Pascal-VOC annotations, made smaller: `items` are (image id, split, picture, annotation)."""
    members, index, boxes = {}, [], []
    for name, split, picture, annotation in items:
        tree, image = ElementTree.parse(annotation), Image.open(_need(picture, "the picture of " + str(annotation)))
        if image.size != tuple(int(tree.findtext(f"size/{side}", "0")) for side in ("width", "height")):
            image = ImageOps.exif_transpose(image)  # annotated the way a viewer turns it
        small = image.convert("RGB").resize(shrink(image.size), Image.Resampling.LANCZOS)
        across, down = small.width / image.width, small.height / image.height
        here = []
        for thing in tree.iter("object"):
            label, corners = thing.findtext("name"), [float(thing.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
            if label not in classes:
                raise DataError(f"{annotation}: class {label!r} is none of {', '.join(classes)}")
            if corners[2] > corners[0] and corners[3] > corners[1]:
                scaled = [round(value * scale, 1) for value, scale in zip(corners, (across, down) * 2, strict=True)]
                here.append({"image_id": name, "class": label} | dict(zip(("xmin", "ymin", "xmax", "ymax"), scaled, strict=True)))
        members[f"images/{name}.jpg"] = _encode(small, "JPEG", quality=quality)
        index.append({"image_id": name, "split": split, "width": small.width, "height": small.height, "boxes": len(here)})
        boxes += here
    tables = {"boxes.csv": _csv(boxes, ["image_id", "class", "xmin", "ymin", "xmax", "ymax"])}
    return _zip(members | tables | {"index.csv": _csv(index, ["image_id", "split", "width", "height", "boxes"])})


def _playing_cards(source: Path) -> Built:
    items = []
    for split in ("train", "test"):
        for annotation in sorted(_need(source / split, info("playing-cards").source).glob("*.xml")):
            pictures = [path for path in annotation.parent.glob(annotation.stem + ".*") if path.suffix.lower() in (".jpg", ".jpeg")]
            items.append((f"{split}_{annotation.stem}", split, pictures[0] if pictures else annotation.with_suffix(".jpg"), annotation))
    shrink = lambda size: tuple(round(side * 256 / max(size)) for side in size)  # noqa: E731
    return {_file("playing-cards"): _voc(CARDS, items, shrink, quality=88)}, {}


def _blood_cells(source: Path) -> Built:
    items = []
    for split in ("train", "val", "test"):
        names = _need(source / "ImageSets" / "Main" / f"{split}.txt", info("blood-cells").source).read_text().split()
        items += [(name, split, source / "JPEGImages" / f"{name}.jpg", _need(source / "Annotations" / f"{name}.xml", "an annotation")) for name in names]
    return {_file("blood-cells"): _voc(CELLS, sorted(items), lambda size: (size[0] // 2, size[1] // 2), quality=90)}, {}


def _large_images(source: Path) -> Built:
    return {f"large/{name}.jpg": _need(source / f"{name}.jpg", "a texture of 8192 x 4096 pixels").read_bytes() for name in MAPS}, {}


BUILDERS = {
    "cifar10-jpeg": _cifar10_jpeg,
    "cifar10-exact-part": _cifar10_exact_part,
    "gtsrb32": _gtsrb32,
    "nuclei": _nuclei,
    "chest-xray": _chest_xray,
    "pneumonia": _pneumonia,
    "spoken-digits": _spoken_digits,
    "playing-cards": _playing_cards,
    "blood-cells": _blood_cells,
    "large-images": _large_images,
}
