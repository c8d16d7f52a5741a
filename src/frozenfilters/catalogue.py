"""What each data set is, where its files lie, and what goes wrong when they do not.

One table, :data:`RECORDS`, holds every fact that the study states about a data set: licence, caveat, file names and SHA-256.
The readers (:mod:`frozenfilters.archives`, :mod:`frozenfilters.official`) and the builder (:mod:`frozenfilters.pack`) look them up here.
Files are searched for in the folder that the variable ``FROZENFILTERS_DATA`` names (never written to when it is read-only), then in the
user's cache folder, ``$XDG_CACHE_HOME/frozenfilters`` or ``~/.cache/frozenfilters``.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "FROZENFILTERS_DATA"


class DataError(ValueError):
    """Anything that keeps a data set from being loaded or packed; the message says what to do."""


class UnknownNameError(DataError):
    """No data set of that name; the message suggests the nearest one."""


class MissingError(DataError, FileNotFoundError):
    """The files are not where they were looked for."""


class CorruptError(DataError):
    """The files are there but are not what they should be."""


@dataclass(frozen=True)
class Record:
    """The facts about one data set.

    Attributes:
        name: as in ``load(name)``.
        about: one line.
        kind: ``"embedded"``, ``"torchvision"``, ``"archive"`` or ``"folder"``.
        splits: the names that ``load(name, split)`` takes.
        note: caveat for every figure footer, ``""`` where the data are exact and complete.
        licence: licence or terms of use.
        origin: who published it (the source of truth).
        files: pairs (path under the data folder, SHA-256).
        source: what ``pack`` wants as its SOURCE (packed archives only).
    """

    name: str
    about: str
    kind: str
    splits: tuple[str, ...] = ("train", "test")
    note: str = ""
    licence: str = ""
    origin: str = ""
    files: tuple[tuple[str, str], ...] = ()
    source: str = ""

    @property
    def how(self) -> str:
        """The command that brings the data here (or why none is needed)."""
        if self.kind == "archive":
            return f"python -m frozenfilters data pack {self.name} SOURCE   (SOURCE: {self.source})"
        if self.kind == "torchvision":
            return f"python -m frozenfilters data get {self.name}"
        return "your own images" if self.kind == "folder" else "nothing to do: it comes with scikit-learn"


_CIFAR = "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"
_CIFAR_LICENCE = "none stated; used for research with citation"
_GTSRB = "Stallkamp, Schlipsing, Salmen, Igel, 2012 (Institut fuer Neuroinformatik, Ruhr-Universitaet Bochum)"
_GTSRB_LICENCE = "published for research, with citation"
_RECORDS = (
    Record("digits", "1,797 handwritten digits, 8x8 grey", "embedded", licence="CC BY 4.0", origin="Alpaydin and Kaynak, UCI, 1998; copy in scikit-learn"),
    Record(
        "mnist",
        "60,000 + 10,000 handwritten digits, 28x28 grey",
        "torchvision",
        licence="commonly given as CC BY-SA 3.0",
        origin="LeCun, Cortes, Burges",
        files=(
            ("MNIST/raw/train-images-idx3-ubyte.gz", "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
            ("MNIST/raw/train-labels-idx1-ubyte.gz", "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            ("MNIST/raw/t10k-images-idx3-ubyte.gz", "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            ("MNIST/raw/t10k-labels-idx1-ubyte.gz", "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        ),
    ),
    Record(
        "fashion-mnist",
        "60,000 + 10,000 pieces of clothing, 28x28 grey",
        "torchvision",
        licence="MIT (Zalando SE)",
        origin="Xiao, Rasul, Vollgraf, arXiv:1708.07747",
        files=(
            ("FashionMNIST/raw/train-images-idx3-ubyte.gz", "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
            ("FashionMNIST/raw/train-labels-idx1-ubyte.gz", "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            ("FashionMNIST/raw/t10k-images-idx3-ubyte.gz", "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            ("FashionMNIST/raw/t10k-labels-idx1-ubyte.gz", "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        ),
    ),
    Record("cifar10", "50,000 + 10,000 photographs of 10 classes, 32x32 colour", "torchvision", licence=_CIFAR_LICENCE, origin=_CIFAR),
    Record("cifar100", "50,000 + 10,000 photographs of 100 classes, 32x32 colour", "torchvision", licence=_CIFAR_LICENCE, origin=_CIFAR),
    Record("svhn", "73,257 + 26,032 house-number digits, 32x32 colour", "torchvision", licence="non-commercial use", origin="Netzer et al., 2011"),
    Record("gtsrb", "26,640 + 12,630 German traffic signs of 43 classes, sizes vary", "torchvision", licence=_GTSRB_LICENCE, origin=_GTSRB),
    Record(
        "cifar10-jpeg",
        "all of CIFAR-10 as JPEG files of quality 75",
        "archive",
        note="CIFAR-10, JPEG copy (lossy)",
        licence=_CIFAR_LICENCE,
        origin=_CIFAR,
        files=(("cifar10/cifar10_jpeg.npz", "decc1dc69f865df0e59d01536bc48798020be0be27adac7e24842f3fccfa92a7"),),
        source="cifar-10-python.tar.gz or the folder cifar-10-batches-py",
    ),
    Record(
        "cifar10-exact-part",
        "the first 4,000 training and 1,000 test images of CIFAR-10, exact pixels",
        "archive",
        note="CIFAR-10, exact pixels, first 4,000 + 1,000 images only",
        licence=_CIFAR_LICENCE,
        origin=_CIFAR,
        files=(("cifar10/cifar10_lossless_part.zip", "44d8232c6c9f25c25185b61406c734c8f690a7dec9220632443c9d1499612088"),),
        source="cifar-10-python.tar.gz or the folder cifar-10-batches-py",
    ),
    Record(
        "gtsrb32",
        "German traffic signs, 100 training and 30 test images of each of 43 classes, 32x32 colour, with boxes",
        "archive",
        note="GTSRB, balanced subset (100 + 30 per class), resized to 32x32",
        licence=_GTSRB_LICENCE,
        origin=_GTSRB,
        files=(("gtsrb32/gtsrb32.npz", "31352066e016ac228785a80b2980d8295963d21d51434771711f6f87d09af310"),),
        source="a folder with GTSRB_Final_Training_Images, GTSRB_Final_Test_Images and GTSRB_Final_Test_GT unpacked in it",
    ),
    Record(
        "nuclei",
        "microscopy images with a mask for each cell nucleus, sizes vary",
        "archive",
        note="BBBC038v1 stage 1 with corrected masks; train: grey images, test: colour images",
        licence="CC0",
        origin="Caicedo et al., 2019 (Broad Bioimage Benchmark Collection)",
        files=(("nuclei/bbbc038_stage1_train.zip", "9e869d7f75e8854f0ef286858de2c863561c33bbb0c644172cce3ddfc7342285"),),
        source="the folder stage1_train",
    ),
    Record(
        "chest-xray",
        "1,000 frontal chest X-rays of 682 patients, 14 findings, 224x224 grey",
        "archive",
        note="NIH ChestX-ray14, 1,000 images, resized to 224x224, JPEG; groups not comparable",
        licence="no restriction; name the NIH Clinical Center as the source and cite the paper",
        origin="Wang et al., CVPR 2017",
        files=(("chest-xray/nih_chestxray_1000.zip", "8c68b62438f6b6de71fc16b2e459fcbbd536b755a653f9d4a9c92d481b0b4971"),),
        source="a folder with the images (in subfolders), Data_Entry_2017.csv and BBox_List_2017.csv",
    ),
    Record(
        "pneumonia",
        "PneumoniaMNIST: children's chest X-rays, normal or pneumonia, 28x28 grey",
        "archive",
        splits=("train", "val", "test"),
        note="PneumoniaMNIST, rebuilt copy (same images, training order differs)",
        licence="CC BY 4.0",
        origin="MedMNIST (Yang et al., 2023); images of Kermany et al., 2018",
        files=(("chest-xray/pneumoniamnist_rebuilt.npz", "ce8250bf5debc3c389b89affcc1d9feac579b26e875a848301e9f937bb0c2eee"),),
        source="pneumoniamnist.npz",
    ),
    Record(
        "spoken-digits",
        "Free Spoken Digit Dataset: 3,000 recordings of 6 speakers, 8 kHz",
        "archive",
        licence="CC BY-SA 4.0",
        origin="Jakobovski and contributors, Free Spoken Digit Dataset",
        files=(("speech/free_spoken_digits.npz", "c937d0a759f2cbc498807086e36edcc8b43a846f64d3469da7ff205fafa6b6bc"),),
        source="the folder recordings with its .wav files",
    ),
    Record(
        "playing-cards",
        "363 photographs of playing cards of six classes with boxes",
        "archive",
        note="playing cards, resized to 256 pixels, JPEG (small set)",
        licence="Apache 2.0",
        origin="EdjeElectronics, TensorFlow object detection tutorial",
        files=(("boxes/playing_cards.zip", "3348ae7dbaaa048d596b92b300ed25cb44644498d96813f7bc0a71bff79f516e"),),
        source="the tutorial's folder images with train/ and test/ (.jpg and Pascal-VOC .xml)",
    ),
    Record(
        "blood-cells",
        "BCCD: 364 microscopy images of blood cells of three classes with boxes",
        "archive",
        splits=("train", "val", "test"),
        note="BCCD, resized to 320x240, JPEG; boxes incomplete at the rim",
        licence="MIT",
        origin="Shenggan, BCCD_Dataset",
        files=(("boxes/blood_cells.zip", "07d1ee88ce08ee2c6880754d558ed143829f397ddfd7df0989816c767f3c3e7d"),),
        source="the folder BCCD with Annotations/, JPEGImages/ and ImageSets/Main/",
    ),
    Record(
        "large-images",
        "three surface maps of 33.5 megapixels without labels: Mars, Earth by day, Earth by night",
        "archive",
        splits=("train",),
        note="Solar System Scope textures, re-encoded JPEG",
        licence="CC BY 4.0 (Solar System Scope)",
        origin="solarsystemscope.com/textures, based on NASA imagery",
        files=(
            ("large/8k_mars.jpg", "27dfce32f22096d3c81e9bece8095c1f11d19f20b731bcb5f6e38009f4a1afd8"),
            ("large/8k_earth_daymap.jpg", "1c634758683d346a406a912dff10970fd710feb69fec1dab9851b251ea4fdafb"),
            ("large/8k_earth_nightmap.jpg", "6fe6047fb33b5264234bfcedccdc9837e8765fc87666513912f752cecdbe7f39"),
        ),
        source="a folder with 8k_mars.jpg, 8k_earth_daymap.jpg and 8k_earth_nightmap.jpg",
    ),
)
RECORDS = {record.name: record for record in _RECORDS}
NAMES = tuple(RECORDS)


def info(name: str) -> Record:
    """The facts about one data set.

    Raises:
        UnknownNameError: if there is no data set of that name.

    Example:
        >>> info("digits").about
        '1,797 handwritten digits, 8x8 grey'
        >>> info("cifar10-jpg")
        Traceback (most recent call last):
        ...
        frozenfilters.catalogue.UnknownNameError: name='cifar10-jpg' is no data set; did you mean 'cifar10-jpeg'? ...
    """
    if name.startswith("folder:"):
        return Record(name, "your own images, one folder per class", "folder", note=f"own images: {Path(name[7:].rpartition('@')[0] or name[7:]).name}")
    if name not in RECORDS:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), NAMES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UnknownNameError(f"name={name!r} is no data set; {hint}Known: {', '.join(NAMES)}, folder:PATH")
    return RECORDS[name]


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/frozenfilters`` or ``~/.cache/frozenfilters`` (not created)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frozenfilters"


def folders(root: str | Path | None = None) -> list[Path]:
    """The folders to look in, in order: `root`, or what ``FROZENFILTERS_DATA`` names, then the cache folder."""
    given = root or os.environ.get(VARIABLE)
    return ([Path(given).expanduser()] if given else []) + [cache_folder()]


def is_writable(folder: Path) -> bool:
    """Whether new files may go under `folder`; a folder without any write permission is left alone even by root."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)


def destination(root: str | Path | None = None) -> Path:
    """The first folder of :func:`folders` that may be written to."""
    for folder in folders(root):
        if is_writable(folder):
            return folder
    raise DataError(f"none of {', '.join(map(str, folders(root)))} may be written to; set {VARIABLE} to a folder that may")


def missing(record: Record, looked: list[Path]) -> MissingError:
    """The error for a data set whose files are in none of `looked`."""
    value = os.environ.get(VARIABLE)
    state = f"{VARIABLE}={value}" if value else f"{VARIABLE} is not set"
    absent = f" (no such folder: {value})" if value and not Path(value).expanduser().is_dir() else ""
    remedy = f"{record.how}; or set {VARIABLE} to the folder that holds it"
    return MissingError(f"{record.name} was not found; looked in {', '.join(map(str, looked))}; {state}{absent}. To fix it: {remedy}")
