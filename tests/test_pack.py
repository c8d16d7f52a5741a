"""frozenfilters.pack: tiny imitations of every official release are packed and loaded; real ones are rebuilt from the archives."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from frozenfilters import catalogue, data, integrity, pack, releases
from frozenfilters.archives import CARDS, MAPS

REAL = os.environ.get("FROZENFILTERS_DATA")
real = pytest.mark.skipif(not REAL, reason="FROZENFILTERS_DATA is not set")
PACKED = [name for name in data.NAMES if data.info(name).kind == "archive"]
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    monkeypatch.delenv("FROZENFILTERS_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


# --- imitations of the official releases ------------------------------------------------------------------------------------------------


def cifar(folder, batches=None):
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batches = batches or [(RNG.integers(0, 256, (12, 3072), dtype=np.uint8), [i % 10 for i in range(12)]) for _ in range(6)]
    for name, (pixels, labels) in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], batches, strict=True):
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}, protocol=2))
    return folder.parent


def gtsrb(folder):
    head = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    for label in (0, 7):
        place = folder / f"GTSRB/Final_Training/Images/{label:05d}"
        place.mkdir(parents=True)
        names = [f"{track:05d}_{frame:05d}.ppm" for track in range(5) for frame in range(30)]
        for name in names:
            Image.new("RGB", (40, 64), (label, 9, 9)).save(place / name)
        (place / f"GT-{label:05d}.csv").write_text(head + "".join(f"{name};40;64;5;8;35;56;{label}\n" for name in names))
    place = folder / "GTSRB/Final_Test/Images"
    place.mkdir(parents=True)
    for number in (403, 404, 675):
        Image.new("RGB", (32, 32)).save(place / f"{number:05d}.ppm")
    (folder / "GT-final_test.csv").write_text(head + "".join(f"{number:05d}.ppm;32;32;5;5;27;27;0\n" for number in (403, 404, 675)))
    return folder


def nuclei(folder):
    for name, colour in (("aa", False), ("bb", True)):
        (folder / name / "images").mkdir(parents=True)
        (folder / name / "masks").mkdir()
        pixels = np.repeat(RNG.integers(0, 256, (20, 30, 1), dtype=np.uint8), 3, axis=2)
        pixels[..., 0] += np.uint8(colour)
        Image.fromarray(np.dstack([pixels, np.full((20, 30), 255, np.uint8)])).save(folder / name / "images" / f"{name}.png")
        for i in range(3):
            mask = np.zeros((20, 30), np.uint8)
            mask[5 * i : 5 * i + 6, :10] = 255
            Image.fromarray(mask).save(folder / name / "masks" / f"{i}.png")
    return folder


def chest(folder):
    (folder / "images_001/images").mkdir(parents=True)
    rows = [("00000061_012", "Edema|Pneumonia", 61), ("00001280_004", "No Finding", 1280), ("00000072_000", "Mass", 72), ("00000150_002", "Pneumonia", 150)]
    head = '"Image Index","Finding Labels","Follow-up #","Patient ID","Patient Age","Patient Gender","View Position"\n'
    (folder / "Data_Entry_2017.csv").write_text(head + "".join(f"{name}.png,{what},12,{who},058Y,M,PA\n" for name, what, who in rows))
    (folder / "BBox_List_2017.csv").write_text("Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000061_012.png,Infiltrate,100,200,256,128,,,\n")
    for name, _, _ in rows:
        Image.fromarray(RNG.integers(0, 256, (512, 512), dtype=np.uint8)).save(folder / "images_001/images" / f"{name}.png")
    return folder


def medmnist(folder):
    arrays = {}
    for split, n in (("train", 6), ("val", 2), ("test", 3)):
        arrays |= {f"{split}_images": RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8), f"{split}_labels": (np.arange(n, dtype=np.uint8) % 2)[:, None]}
    folder.mkdir()
    np.savez(folder / "pneumoniamnist.npz", **arrays)
    return folder / "pneumoniamnist.npz"


def speech(folder):
    folder.mkdir()
    for digit in (0, 9):
        for index in (0, 4, 5, 10):
            wavfile.write(folder / f"{digit}_theo_{index}.wav", 8000, RNG.integers(-99, 99, 50 + index, dtype=np.int16))
    return folder


def voc(path, size, objects):
    sides = ("xmin", "ymin", "xmax", "ymax")
    corners = ["".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, box, strict=True)) for _, *box in objects]
    things = "".join(f"<object><name>{label}</name><bndbox>{box}</bndbox></object>" for (label, *_), box in zip(objects, corners, strict=True))
    path.write_text(f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{things}</annotation>")


def cards(folder):
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        Image.new("RGB", (300, 512)).save(folder / split / "one.JPG")
        voc(folder / split / "one.xml", (300, 512), [("queen", 10, 20, 110, 220)])
        Image.new("RGB", (512, 300)).save(folder / split / "two.jpg")
        voc(folder / split / "two.xml", (512, 300), [("ace", 0, 0, 100, 100), ("king", 100, 100, 200, 200)])
    return folder


def cells(folder):
    for sub in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / sub).mkdir(parents=True)
    for i, split in enumerate(("train", "val", "test")):
        (folder / "ImageSets/Main" / f"{split}.txt").write_text(f"BloodImage_{i:05d}\n")
        Image.new("RGB", (64, 48)).save(folder / "JPEGImages" / f"BloodImage_{i:05d}.jpg")
        voc(folder / "Annotations" / f"BloodImage_{i:05d}.xml", (64, 48), [("RBC", 2, 2, 12, 12), ("WBC", 5, 5, 5, 5)])
    return folder


def large(folder):
    folder.mkdir()
    for i, name in enumerate(MAPS):
        Image.new("RGB", (64, 32), (i, 0, 0)).save(folder / f"{name}.jpg")
    return folder


RELEASES = {
    "cifar10-jpeg": cifar,
    "cifar10-exact-part": cifar,
    "gtsrb32": gtsrb,
    "nuclei": nuclei,
    "chest-xray": chest,
    "pneumonia": medmnist,
    "spoken-digits": speech,
    "playing-cards": cards,
    "blood-cells": cells,
    "large-images": large,
}


# --- every data set ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKED)
def test_pack_and_load(name, tmp_path):
    source, out = RELEASES[name](tmp_path / "release"), tmp_path / "data"
    with pytest.raises(data.DataError, match=f"{name} from this release is not what the study used.* expected .*, found "):
        pack.pack(name, source, out)
    assert not [path for path in out.rglob("*") if path.is_file()], "nothing is left behind"
    where = pack.pack(name, source, out, partial=True)
    assert where.exists() and not list(out.glob(".packing*"))
    for split in data.info(name).splits:
        found = data.load(name, split, root=out)
        assert found.source == "self-packed" and found.note.endswith("partial") and len(found) > 0
        note = json.loads(integrity.sidecar(out / data.info(name).files[0][0]).read_text())
        assert note["decoded_sha256"][split] == found.sha256 and note["partial"] and note["facts"][f"{split} examples"] == len(found)
    with pytest.raises(data.DataError, match="exists and is not overwritten"):
        pack.pack(name, source, out, partial=True)


def test_what_is_packed_is_what_was_there(tmp_path):
    out = tmp_path / "data"

    def made(name):
        pack.pack(name, RELEASES[name](tmp_path / name), out, partial=True)
        return [data.load(name, split, root=out) for split in data.info(name).splits]

    train, test = made("cifar10-exact-part")
    official = releases.cifar10(tmp_path / "cifar10-exact-part")
    assert torch.equal(train.images, torch.from_numpy(official["train"][0].transpose(0, 3, 1, 2).copy())) and len(train) == 60 and len(test) == 12
    train, test = made("gtsrb32")
    assert len(train) == 200 and test.extra["names"] == ("00403", "00675") and set(train.labels.tolist()) == {0, 7}
    assert train.extra["names"][:20] == tuple(f"00000_{frame:05d}" for frame in sorted((29 - 11 * i) % 30 for i in range(20)))
    assert train.extra["size"][0].tolist() == [40, 64] and [train.extra["boxes"][side][0] for side in ("xmin", "ymin", "xmax", "ymax")] == [4, 4, 28, 28]
    grey, colour = made("nuclei")
    assert len(grey) == len(colour) == 1 and grey.images[0].shape == (3, 20, 30) and grey.extra["nuclei"].tolist() == [3]
    assert grey.extra["masks"][0][:, 0].tolist() == [1] * 5 + [2] * 5 + [3] * 6 + [0] * 4  # a shared row goes to the later nucleus
    train, test = made("chest-xray")
    everyone = train.extra["names"] + test.extra["names"]
    assert sorted(everyone) == ["00000061_012", "00000150_002", "00001280_004"]  # patient 72 is none of the study's
    part = train if "00000061_012" in train.extra["names"] else test
    i = part.extra["names"].index("00000061_012")
    box = {key: value[part.extra["boxes"]["image"] == i] for key, value in part.extra["boxes"].items()}
    assert part.extra["findings"][i].nonzero().flatten().tolist() == [3, 12] and int(part.labels[i]) == 1 and int(part.extra["age"][i]) == 58
    assert box["xmin"] == pytest.approx(100 * 224 / 512) and box["xmax"] == pytest.approx(356 * 224 / 512) and box["label"] == [8]
    train, test = made("spoken-digits")
    assert test.labels.tolist() == [0, 0, 9, 9] and train.extra["index"].tolist() == [10, 5, 10, 5] and len(train.images[0]) == 60
    train, test = made("playing-cards")
    assert train.images[0].shape == (3, 256, 150) and train.images[1].shape == (3, 150, 256) and train.labels.tolist() == [CARDS.index("queen"), -1]
    assert train.extra["boxes"]["ymax"].tolist() == [110, 50, 100] and train.extra["names"] == ("train_one", "train_two")
    blood = made("blood-cells")[0]
    assert blood.images[0].shape == (3, 24, 32) and blood.extra["boxes"]["xmax"].tolist() == [6] and blood.labels.tolist() == [0]


def test_jpeg_copy_of_cifar_from_the_tar_file(tmp_path):
    release = cifar(tmp_path / "release")
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(release / "cifar-10-batches-py", arcname="cifar-10-batches-py")
    pack.pack("cifar10-jpeg", tmp_path / "cifar-10-python.tar.gz", tmp_path / "data", partial=True)
    train = data.load("cifar10-jpeg", root=tmp_path / "data")
    assert train.images.shape == (60, 3, 32, 32) and train.labels.tolist() == [i % 10 for i in range(12)] * 5


# --- errors -----------------------------------------------------------------------------------------------------------------------------


def test_errors_before_anything_is_read(tmp_path):
    with pytest.raises(data.DataError, match="name='mnist' is not a packed data set.*data get mnist"):
        pack.pack("mnist", tmp_path)
    with pytest.raises(data.MissingError, match="does not exist; expected the folder recordings"):
        pack.pack("spoken-digits", tmp_path / "nowhere")
    with pytest.raises(data.UnknownNameError, match="did you mean 'nuclei'"):
        pack.pack("nuclie", tmp_path)


@pytest.mark.parametrize("name", PACKED)
def test_an_empty_folder_is_no_release(name, tmp_path):
    (tmp_path / "empty").mkdir()
    source = tmp_path / "empty"
    if name == "pneumonia":
        source = source / "other.npz"
        np.savez(source, a=np.zeros(1))
    with pytest.raises(data.MissingError):
        pack.pack(name, source, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_read_only_folder(tmp_path, monkeypatch):
    source, locked = medmnist(tmp_path / "release"), tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    try:
        with pytest.raises(data.DataError, match="may not be written to"):
            pack.pack("pneumonia", source, locked, partial=True)
        monkeypatch.setenv("FROZENFILTERS_DATA", str(locked))
        assert pack.pack("pneumonia", source, partial=True).is_relative_to(catalogue.cache_folder())  # by default the next folder
        assert len(data.load("pneumonia")) == 6 and not list(locked.iterdir())
    finally:
        locked.chmod(0o755)


def test_a_damaged_self_packed_archive_is_noticed(tmp_path):
    file = pack.pack("pneumonia", medmnist(tmp_path / "release"), tmp_path / "data", partial=True)
    data.load("pneumonia", root=tmp_path / "data")
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(content)
    with pytest.raises(data.CorruptError, match="damaged or another file"):
        data.load("pneumonia", root=tmp_path / "data")


def test_a_pickle_cannot_run_code(tmp_path):
    release = cifar(tmp_path / "release")

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    (release / "cifar-10-batches-py/test_batch").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(data.CorruptError, match="not the official release"):
        pack.pack("cifar10-jpeg", release, tmp_path / "data")
    assert not (tmp_path / "pwned").exists()


def test_strange_contents_are_named(tmp_path):
    voc(cards(tmp_path / "cards") / "train/one.xml", (300, 512), [("joker", 1, 1, 2, 2)])
    with pytest.raises(data.DataError, match="class 'joker' is none of nine, ten"):
        pack.pack("playing-cards", tmp_path / "cards", tmp_path / "data")
    wavfile.write(speech(tmp_path / "speech") / "1_theo_0.wav", 16000, np.zeros(9, np.int16))
    with pytest.raises(data.DataError, match="1_theo_0.wav: expected .* 8000 Hz; found theo, .* 16000 Hz"):
        pack.pack("spoken-digits", tmp_path / "speech", tmp_path / "data")
    (tmp_path / "words.npz").write_text("hello")
    with pytest.raises(data.DataError, match="words.npz.* cannot be read as pneumoniamnist.npz"):
        pack.pack("pneumonia", tmp_path / "words.npz", tmp_path / "data")
    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar/other.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("data_batch_1"), io.BytesIO())
    with pytest.raises(data.MissingError, match="has no data_batch_2, .* it is not cifar-10-python.tar.gz"):
        pack.pack("cifar10-jpeg", tmp_path / "tar/other.tar", tmp_path / "data")


def test_expectations_cover_every_packed_set():
    assert list(pack.EXPECTED) == PACKED == list(releases.BUILDERS)
    assert all(f"{split} examples" in pack.EXPECTED[name] for name in PACKED for split in data.info(name).splits)
    assert sum(map(len, releases._selection("chest-xray").values())) == 1000 and len(releases._selection("gtsrb32")) == 43


# --- strict, from the real archives -----------------------------------------------------------------------------------------------------


def load_real(name, split):
    if not data.available(REAL).set_index("name").found[name]:
        pytest.skip(f"{name} is not under FROZENFILTERS_DATA")
    return data.load(name, split, root=REAL)


@real
@pytest.mark.parametrize("name", PACKED)
def test_real_archives_are_what_pack_expects(name):
    for split in data.info(name).splits:
        found = load_real(name, split)
        facts = pack.facts(name, split, {"images": found.images, "labels": found.labels, "classes": found.classes, "extra": found.extra})
        assert facts.items() <= pack.EXPECTED[name].items() and facts


@real
def test_real_spoken_digits_again(tmp_path):
    (tmp_path / "recordings").mkdir()
    for split in ("train", "test"):
        found = load_real("spoken-digits", split)
        for sound, digit, speaker, index in zip(found.images, found.labels, found.extra["speaker"], found.extra["index"], strict=True):
            wavfile.write(tmp_path / f"recordings/{digit}_{found.extra['speakers'][speaker]}_{index}.wav", 8000, sound.numpy())
    pack.pack("spoken-digits", tmp_path / "recordings", tmp_path / "data")
    again = data.load("spoken-digits", "test", root=tmp_path / "data")
    assert again.sha256 == load_real("spoken-digits", "test").sha256 and (again.source, again.note) == ("self-packed", "")


@real
def test_real_exact_part_and_pneumonia_again(tmp_path):
    train, test = load_real("cifar10-exact-part", "train"), load_real("cifar10-exact-part", "test")
    parts = [*(train.take(range(i, i + 800)) for i in range(0, 4000, 800)), test]
    batches = [(part.images.flatten(1).numpy(), part.labels.tolist()) for part in parts]
    pack.pack("cifar10-exact-part", cifar(tmp_path / "release", batches), tmp_path / "data")
    assert data.load("cifar10-exact-part", root=tmp_path / "data").sha256 == train.sha256
    arrays = {}
    for split in ("train", "val", "test"):
        found = load_real("pneumonia", split)
        arrays |= {f"{split}_images": found.images[:, 0].numpy()[::-1], f"{split}_labels": found.labels.numpy()[::-1, None].astype(np.uint8)}
    np.savez(tmp_path / "pneumoniamnist.npz", **arrays)
    pack.pack("pneumonia", tmp_path / "pneumoniamnist.npz", tmp_path / "data")  # another order is the same set
    arrays["train_images"] = arrays["train_images"].copy()
    arrays["train_images"][0, 0, 0] ^= 1
    np.savez(tmp_path / "changed.npz", **arrays)
    with pytest.raises(data.DataError, match="train sha256 in any order: expected 0de1"):
        pack.pack("pneumonia", tmp_path / "changed.npz", tmp_path / "other")
