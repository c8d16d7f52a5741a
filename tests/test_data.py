"""frozenfilters.data: what every ImageSet promises, every error a reader can meet, and the real archives where they are at hand."""

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from frozenfilters import archives, catalogue, data, integrity, official

REAL = os.environ.get("FROZENFILTERS_DATA")
real = pytest.mark.skipif(not REAL, reason="FROZENFILTERS_DATA is not set")


@pytest.fixture(autouse=True)
def alone(request, monkeypatch, tmp_path, tmp_path_factory):
    """No test sees the machine's own data or cache; the tests of the real archives share one cache."""
    shared = request.node.name.startswith("test_real")
    monkeypatch.delenv("FROZENFILTERS_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "shared" if shared else tmp_path / "xdg"))


@pytest.fixture
def locked(tmp_path):
    """A data folder without write permission."""
    folder = tmp_path / "locked"
    folder.mkdir()
    yield folder
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)


def lock(folder):
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return listing(folder)


def listing(folder):
    return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in Path(folder).rglob("*"))


def ragged(n=6):
    images = tuple(torch.full((3, 4 + i, 8), 10 * i, dtype=torch.uint8) for i in range(n))
    masks = tuple(torch.arange(8, dtype=torch.int32).expand(4 + i, 8).contiguous() for i in range(n))
    boxes = archives.box_table([0, 0, 2, 5], [1, 0, 1, 1], [[0, 0, 2, 2], [1, 1, 3, 3], [2, 2, 4, 6], [0, 1, 8, 9]])
    extra = {"masks": masks, "boxes": boxes, "names": tuple("abcdef"[:n]), "score": torch.arange(n), "about": ["whole set"]}
    return data.ImageSet("mine", "train", images, torch.arange(n) % 2, ("even", "odd"), extra=extra)


def write_idx(path, array, compress=True):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(head + array.tobytes()) if compress else head + array.tobytes())


def fake_mnist(root, compress=True):
    rng = np.random.default_rng(0)
    for part, n in (("train", 20), ("t10k", 10)):
        end = ".gz" if compress else ""
        write_idx(root / f"MNIST/raw/{part}-images-idx3-ubyte{end}", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), compress)
        write_idx(root / f"MNIST/raw/{part}-labels-idx1-ubyte{end}", np.arange(n, dtype=np.uint8) % 10, compress)


# --- the ImageSet -----------------------------------------------------------------------------------------------------------------------


def test_digits():
    train, test = data.load("digits"), data.load("digits", "test")
    assert (len(train), len(test), train.channels, train.num_classes) == (1437, 360, 1, 10)
    assert train.images.dtype == torch.uint8 and train.images.is_contiguous() and train.labels.dtype == torch.int64
    assert set(train.images.unique().tolist()) <= {round(level * 255 / 16) for level in range(17)} and train.images.max() == 255
    assert abs(test.labels.bincount() - 36).max() <= 1
    assert (train.source, train.note) == ("embedded", "")
    assert train.sha256.startswith("12df1cc03d6e") and test.sha256.startswith("7cf9d8b958f2")  # the split is fixed for ever
    assert train.sha256 == hashlib.sha256(train.images.numpy().tobytes() + train.labels.numpy().tobytes()).hexdigest()


def test_subset_is_stratified_and_deterministic():
    train = data.load("digits")
    part, again, other = train.subset(100), train.subset(100), train.subset(100, seed=1)
    assert len(part) == 100 and part.labels.bincount().tolist() == [10] * 10 or abs(part.labels.bincount() - 10).max() <= 1
    assert torch.equal(part.images, again.images) and not torch.equal(part.images, other.images)
    assert part.sha256 == train.sha256 and part.note == "100 of 1,437 images"
    assert train.subset(None) is train and train.subset(len(train)) is train
    assert len(train.subset(7)) == 7


@pytest.mark.parametrize("n", [0, 361, -1])
def test_subset_out_of_range(n):
    with pytest.raises(data.DataError, match=f"n={n} is not between 1 and the 360 examples of digits"):
        data.load("digits", "test").subset(n)


def test_take_keeps_everything_together():
    part = ragged().take([5, 0, 1])
    assert [image.shape[1] for image in part.images] == [9, 4, 5] and part.labels.tolist() == [1, 0, 1]
    assert part.extra["names"] == ("f", "a", "b") and part.extra["score"].tolist() == [5, 0, 1] and part.extra["about"] == ["whole set"]
    assert part.extra["boxes"]["image"].tolist() == [0, 1, 1] and part.extra["boxes"]["label"].tolist() == [1, 1, 0]
    assert part.extra["boxes"]["ymax"].tolist() == [9, 2, 3] and part.extra["masks"][0].shape == (9, 8)
    assert len(ragged().take([1]).extra["boxes"]["image"]) == 0


def test_resize_stacks_and_scales():
    small = ragged().resize((2, 4))
    assert small.images.shape == (6, 3, 2, 4) and small.images.dtype == torch.uint8 and small.images[3].unique().tolist() == [30]
    assert small.extra["masks"].shape == (6, 2, 4) and small.extra["masks"].dtype == torch.int32
    assert small.extra["boxes"]["xmax"].tolist() == [1, 1.5, 2, 4] and small.extra["boxes"]["ymax"].tolist() == [1, 1.5, 2, 2]
    digits = data.load("digits", "test")
    assert digits.resize(8) is digits and digits.resize(16).shape == (1, 16, 16) and digits.resize(16).images.is_contiguous()


def test_sound_cannot_be_resized_but_read():
    sound = data.ImageSet("s", "train", (torch.tensor([0, -32768], dtype=torch.int16), torch.ones(5, dtype=torch.int16)), torch.tensor([0, 1]), ("a", "b"))
    assert sound.channels == 1 and sound[0][0].tolist() == [0, -1] and sound.subset(1).note == "1 of 2 recordings"
    with pytest.raises(data.DataError, match="holds sound"):
        sound.resize(8)


def test_mean_std():
    digits = data.load("digits", "test")
    mean, std = digits.mean_std()
    pixels = digits.images.double() / 255
    assert mean == pytest.approx([pixels.mean().item()]) and std == pytest.approx([pixels.std(correction=0).item()])
    flat = torch.cat([image.flatten(1) for image in ragged().images], 1).double() / 255
    mean, std = ragged().mean_std()
    assert mean == pytest.approx(flat.mean(1).tolist()) and std == pytest.approx(flat.std(1, correction=0).tolist())


def test_to_and_dataloader():
    batch, labels = next(iter(torch.utils.data.DataLoader(data.load("digits"), batch_size=5)))
    assert batch.shape == (5, 1, 8, 8) and batch.dtype == torch.float32 and batch.max() <= 1 and labels.dtype == torch.int64
    moved = ragged().to("meta")
    assert moved.labels.is_meta and moved.images[0].is_meta and moved.extra["masks"][1].is_meta and moved.extra["names"] == tuple("abcdef")


def test_repr_says_what_it_is():
    assert repr(data.load("digits", "test")) == "ImageSet(digits, test: 360 x (1, 8, 8), 10 classes, embedded)"


def test_importing_is_cheap():
    code = "import sys, frozenfilters.data; print([m for m in ('torchvision', 'pandas', 'sklearn', 'PIL', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_ledger_notes_what_a_trial_loads():
    used = {}
    token = data.LEDGER.set(used)
    try:
        test = data.load("digits", "test")
        data.load("digits", "train")
    finally:
        data.LEDGER.reset(token)
    assert used["digits"]["source"] == "embedded" and used["digits"]["sha256"]["test"] == test.sha256 and set(used["digits"]["sha256"]) == {"train", "test"}


# --- errors -----------------------------------------------------------------------------------------------------------------------------


def test_unknown_name():
    with pytest.raises(data.UnknownNameError, match="name='fashion_minst' is no data set; did you mean 'fashion-mnist'"):
        data.load("fashion_minst")
    with pytest.raises(data.DataError, match="Known: digits, mnist"):
        data.info("zzzzzz")


@pytest.mark.parametrize(("name", "split", "has"), [("digits", "val", "train, test"), ("large-images", "test", "train"), ("pneumonia", "dev", "train, val")])
def test_wrong_split(name, split, has):
    with pytest.raises(data.DataError, match=f"split='{split}': {name} has the splits {has}"):
        data.load(name, split)


@pytest.mark.parametrize(("name", "command"), [("cifar10-jpeg", "data pack cifar10-jpeg SOURCE"), ("mnist", "data get mnist"), ("gtsrb", "data get gtsrb")])
def test_missing(name, command, monkeypatch, tmp_path):
    with pytest.raises(data.MissingError) as caught:
        data.load(name)
    assert "FROZENFILTERS_DATA is not set" in str(caught.value) and f"python -m frozenfilters {command}" in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError) and isinstance(caught.value, data.DataError)
    monkeypatch.setenv("FROZENFILTERS_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(data.MissingError, match=f"no such folder: {tmp_path}/nowhere"):
        data.load(name)


def test_corrupt_archive_names_both_sums(tmp_path):
    file = tmp_path / "chest-xray" / "pneumoniamnist_rebuilt.npz"
    file.parent.mkdir()
    file.write_bytes(b"not an archive")
    with pytest.raises(data.CorruptError) as caught:
        data.load("pneumonia", root=tmp_path)
    message = str(caught.value)
    assert "expected ce8250bf" in message and hashlib.sha256(b"not an archive").hexdigest() in message and "data pack pneumonia SOURCE" in message


def test_corrupt_original(tmp_path):
    fake_mnist(tmp_path)
    with pytest.raises(data.CorruptError, match="remove it and run: python -m frozenfilters data get mnist"):
        data.load("mnist", root=tmp_path)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x09abc"))
    with pytest.raises(data.CorruptError, match="cut.gz cannot be read"):
        official.read_idx(tmp_path / "cut.gz")
    (tmp_path / "not.gz").write_bytes(b"hello")
    with pytest.raises(data.CorruptError, match="not.gz cannot be read"):
        official.read_idx(tmp_path / "not.gz")


# --- torchvision's sets -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("below", ["mnist", ""])
def test_originals_are_read_in_place_from_a_read_only_folder(locked, monkeypatch, compress, below):
    fake_mnist(locked / below, compress)
    before = lock(locked)
    monkeypatch.setattr(official, "verify", lambda *args, **kwargs: None)
    monkeypatch.setenv("FROZENFILTERS_DATA", str(locked))
    train, test = data.load("mnist"), data.load("mnist", "test", download=True)
    assert train.images.shape == (20, 1, 28, 28) and test.labels.tolist() == list(range(10)) and train.source == "torchvision"
    assert listing(locked) == before and not catalogue.cache_folder().exists()


def test_download_goes_where_it_may(locked, monkeypatch, tmp_path):
    before = lock(locked)
    monkeypatch.setattr(official, "_open", lambda name, split, place, download: fake_mnist(place, compress=False))
    with pytest.raises(data.MissingError):
        data.load("mnist", root=locked)  # never without being asked
    assert not catalogue.cache_folder().exists()
    assert len(data.load("mnist", root=locked, download=True)) == 20
    assert listing(locked) == before and (catalogue.cache_folder() / "mnist/MNIST/raw").is_dir()
    assert len(data.load("mnist", root=locked)) == 20  # and is found again
    (tmp_path / "open").mkdir()
    shutil.rmtree(catalogue.cache_folder())
    data.load("mnist", root=tmp_path / "open", download=True)
    assert (tmp_path / "open/mnist/MNIST/raw").is_dir() and not catalogue.cache_folder().exists()


def test_failed_download(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(official, "_open", fail)
    with pytest.raises(data.DataError, match="the download of cifar10 to .* failed: no route to host"):
        data.load("cifar10", root=tmp_path, download=True)


def test_cifar_and_svhn_layouts(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    fakes = {
        "cifar10": SimpleNamespace(data=pixels, targets=[0, 1, 2, 9], classes=[]),
        "cifar100": SimpleNamespace(data=pixels, targets=[0, 1, 2, 99], classes=[f"c{i}" for i in range(100)]),
        "svhn": SimpleNamespace(data=pixels.transpose(0, 3, 1, 2), labels=np.array([1, 2, 3, 0])),
    }
    monkeypatch.setattr(official, "_open", lambda name, split, place, download: fakes[name])
    for name, marker in (("cifar10", "cifar10/cifar-10-batches-py"), ("cifar100", "cifar-100-python"), ("svhn", "svhn/train_32x32.mat")):
        (tmp_path / marker).mkdir(parents=True)
        found = data.load(name, root=tmp_path)
        assert found.images.is_contiguous() and torch.equal(found.images, torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())) and found.note == ""
    assert data.load("cifar100", root=tmp_path).classes[99] == "c99" and data.load("cifar10", root=tmp_path).classes[9] == "truck"
    with pytest.raises(data.MissingError):
        data.load("svhn", "test", root=tmp_path)


def test_incomplete_cifar_is_reported(tmp_path):
    (tmp_path / "cifar10/cifar-10-batches-py").mkdir(parents=True)
    with pytest.raises(data.CorruptError, match="incomplete or damaged"):
        data.load("cifar10", root=tmp_path)


def test_gtsrb_in_torchvisions_layout(tmp_path):
    base = tmp_path / "gtsrb/gtsrb"
    head = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    for label in (0, 1):
        folder = base / f"GTSRB/Training/{label:05d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (20 + label, 30), (label, 2, 3)).save(folder / "00000_00000.ppm")
        (folder / f"GT-{label:05d}.csv").write_text(head + f"00000_00000.ppm;{20 + label};30;5;6;15;25;{label}\n")
    (base / "GTSRB/Final_Test/Images").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(base / "GTSRB/Final_Test/Images/00000.ppm")
    (base / "GT-final_test.csv").write_text(head + "00000.ppm;9;9;1;2;7;8;42\n")
    train, test = data.load("gtsrb", root=tmp_path), data.load("gtsrb", "test", root=tmp_path)
    assert [tuple(image.shape) for image in train.images] == [(3, 30, 20), (3, 30, 21)] and train.labels.tolist() == [0, 1]
    assert test.labels.tolist() == [42] and test.extra["boxes"]["ymax"].tolist() == [8] and len(test.classes) == 43
    assert train.resize(32).images.shape == (2, 3, 32, 32)


# --- your own folder --------------------------------------------------------------------------------------------------------------------


def own(folder, sizes=((8, 8),), n=10):
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", sizes[i % len(sizes)], (i, label, 0)).save(folder / name / f"{i:02d}.png")


def test_folder(tmp_path):
    own(tmp_path / "pets")
    train, test = data.load(f"folder:{tmp_path}/pets"), data.load(f"folder:{tmp_path}/pets", "test")
    assert (len(train), len(test)) == (16, 4) and test.labels.tolist() == [0, 0, 1, 1] and train.classes == ("cat", "dog")
    assert not set(train.extra["names"]) & set(test.extra["names"]) and train.source == "folder" and "pets" in train.note
    own(tmp_path / "split/train"), own(tmp_path / "split/test", n=3)
    assert (len(data.load(f"folder:{tmp_path}/split")), len(data.load(f"folder:{tmp_path}/split", "test"))) == (20, 6)


def test_folder_of_several_sizes(tmp_path):
    own(tmp_path / "a", sizes=((8, 8), (8, 9)))
    with pytest.raises(data.DataError, match=r"2 different sizes.*folder:.*/a@64"):
        data.load(f"folder:{tmp_path}/a")
    assert data.load(f"folder:{tmp_path}/a@12").shape == (3, 12, 12)


def test_folder_errors(tmp_path):
    with pytest.raises(data.MissingError, match="there is no folder .*nothing"):
        data.load(f"folder:{tmp_path}/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.DataError, match="one subfolder per class"):
        data.load(f"folder:{tmp_path}/empty")


# --- catalogue and caches ---------------------------------------------------------------------------------------------------------------


def test_available_and_info(tmp_path):
    table = data.available(tmp_path).set_index("name")
    assert list(table.columns) == ["source", "found", "where", "note"] and tuple(table.index) == data.NAMES
    assert table.found["digits"] and not table.found["nuclei"] and "data pack nuclei" in table["where"]["nuclei"]
    assert all(data.info(name).licence and data.info(name).origin and data.info(name).about for name in data.NAMES)
    assert all(bool(data.info(name).source) == (data.info(name).kind == "archive") == (name in archives.READERS) for name in data.NAMES)


def test_decoded_cache(monkeypatch):
    calls = []

    def decode():
        calls.append(1)
        return np.arange(6, dtype=np.uint8).reshape(2, 3)

    first = integrity.decoded("key", 2, decode)
    assert torch.equal(integrity.decoded("key", 2, decode), first) and len(calls) == 1
    file = catalogue.cache_folder() / "decoded/key.npy"
    assert [path.name for path in file.parent.iterdir()] == ["key.npy"]
    file.write_bytes(file.read_bytes()[:-1])  # damaged: decoded anew
    assert torch.equal(integrity.decoded("key", 2, decode), first) and len(calls) == 2

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(integrity.os, "replace", full)
    assert torch.equal(integrity.decoded("other", 2, decode), first)  # cannot be kept, works all the same
    assert [path.name for path in file.parent.iterdir()] == ["key.npy"]


def test_file_sums_are_remembered_until_the_file_changes(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(b"a")
    os.utime(file, ns=(1, 1))
    assert integrity.file_sha256(file) == hashlib.sha256(b"a").hexdigest()
    file.write_bytes(b"b")
    os.utime(file, ns=(2, 2))
    assert integrity.file_sha256(file) == hashlib.sha256(b"b").hexdigest()


# --- the real archives ------------------------------------------------------------------------------------------------------------------

COUNTS = {
    "mnist": (60000, 10000),
    "fashion-mnist": (60000, 10000),
    "cifar10-jpeg": (50000, 10000),
    "cifar10-exact-part": (4000, 1000),
    "gtsrb32": (4300, 1290),
    "nuclei": (557, 107),
    "chest-xray": (768, 232),
    "pneumonia": (4708, 524, 624),
    "spoken-digits": (2700, 300),
    "playing-cards": (296, 67),
    "blood-cells": (205, 87, 72),
    "large-images": (3,),
}


def load_real(name, split="train"):
    if data.available(REAL).set_index("name").found[name]:
        return data.load(name, split, root=REAL)
    return pytest.skip(f"{name} is not under FROZENFILTERS_DATA")


@real
@pytest.mark.parametrize("name", COUNTS)
def test_real_counts(name):
    before = listing(REAL)
    for split, count in zip(data.info(name).splits, COUNTS[name], strict=True):
        found = load_real(name, split)
        assert len(found) == len(found.images) == count and found.labels.dtype == torch.int64 and found.source != "self-packed"
        assert found.labels.max() < found.num_classes and len(found.sha256) == 64
        for key, value in found.extra.items():
            assert not isinstance(value, (tuple, torch.Tensor)) or len(value) == count, key
    assert listing(REAL) == before


@real
def test_real_cifar10_jpeg():
    train, test = load_real("cifar10-jpeg"), load_real("cifar10-jpeg", "test")
    assert train.labels.bincount().tolist() == [5000] * 10 and test.labels.bincount().tolist() == [1000] * 10
    from PIL import features

    if features.version("jpg") == "6.2":  # another decoder may differ by a grey level
        assert integrity.array_sha256(train.images.permute(0, 2, 3, 1)) == "5aaf8a2cf2e577ff4dbb15e4f368840fab5aca1812bcc69682005f8dc661d466"
        assert integrity.array_sha256(test.images.permute(0, 2, 3, 1)) == "b7018a062865e9348a704e72416eb53c816b43cc8ac42ab43276a2b967508ab6"
    exact = load_real("cifar10-exact-part")
    assert torch.equal(exact.labels, train.labels[:4000])
    assert 5 < (exact.images.int() - train.images[:4000].int()).abs().float().mean() < 7
    data._archive.cache_clear()
    start = time.perf_counter()
    again = data.load("cifar10-jpeg", "test", root=REAL)  # from the cache of decoded pictures
    assert time.perf_counter() - start < 2 and again.sha256 == test.sha256


@real
def test_real_shapes_and_extras():
    nuclei = load_real("nuclei", "test")
    assert all(mask.shape == image.shape[1:] and mask.dtype == torch.int32 for mask, image in zip(nuclei.extra["masks"], nuclei.images, strict=True))
    assert all(int(mask.max()) == int(n) for mask, n in zip(nuclei.extra["masks"], nuclei.extra["nuclei"], strict=True))
    small = nuclei.subset(5).resize(64)
    assert small.images.shape == (5, 3, 64, 64) and small.extra["masks"].shape == (5, 64, 64)
    chest, held = load_real("chest-xray"), load_real("chest-xray", "test")
    assert chest.images.shape == (768, 1, 224, 224) and chest.extra["findings"].shape == (768, 14) and len(chest.extra["finding_names"]) == 14
    assert not set(chest.extra["patient_id"].tolist()) & set(held.extra["patient_id"].tolist())
    assert torch.equal(chest.extra["findings"][:, 12], chest.labels)
    digits = load_real("spoken-digits", "test")
    assert digits.extra["rate"] == 8000 and digits.extra["index"].max() == 4 and len(digits.extra["speakers"]) == 6 and digits.images[0].dtype == torch.int16
    cards = load_real("playing-cards")
    assert int((cards.labels >= 0).sum()) == 180 and cards.extra["boxes"]["image"].max() < 296
    signs = load_real("gtsrb32")
    assert signs.images.shape[1:] == (3, 32, 32) and signs.extra["boxes"]["image"].tolist() == list(range(4300)) and len(signs.classes) == 43


@real
def test_real_archive_with_a_flipped_byte(tmp_path):
    load_real("pneumonia")
    file = tmp_path / "chest-xray/pneumoniamnist_rebuilt.npz"
    file.parent.mkdir()
    content = bytearray((Path(REAL) / "chest-xray/pneumoniamnist_rebuilt.npz").read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(data.CorruptError, match="sha256 expected ce8250bf"):
        data.load("pneumonia", root=tmp_path)


@real
def test_real_exact_part_needs_its_labels(tmp_path):
    load_real("cifar10-exact-part")
    (tmp_path / "cifar10").mkdir()
    shutil.copy(Path(REAL) / "cifar10/cifar10_lossless_part.zip", tmp_path / "cifar10")
    with pytest.raises(data.MissingError, match="has no labels"):
        data.load("cifar10-exact-part", root=tmp_path)
