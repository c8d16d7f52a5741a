"""Build a packed archive from an official release: ``pack(name, source, out)``.

Who does not have the study's archives makes equivalent ones. :mod:`frozenfilters.releases` reads the release; here the result is read
back, compared with what the study's own archive holds, and only then put in place. What is compared: SHA-256 of the decoded arrays
where the copy is lossless, else counts, labels and the names of the images. A sidecar ``<file>.source.json`` lets
:func:`frozenfilters.data.load` accept the file and mark its rows ``self-packed``.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from frozenfilters.archives import READERS
from frozenfilters.catalogue import NAMES, VARIABLE, DataError, MissingError, destination, info, is_writable
from frozenfilters.integrity import array_sha256, file_sha256, sidecar

# what the archives of the study hold; computed from them by `facts`
EXPECTED: dict[str, dict] = {
    "cifar10-jpeg": {
        "train examples": 50000,
        "train examples per class": [5000] * 10,
        "train labels": "f5cfe00b0f00968c0cc5ff3b1d2de51b10e33efa277c2986f4e0fa63e58c9f4f",
        "train first exact pixels": "28afc872aa454f5edfb44b9dc53187ac9e792b2e75c81b091face3432c78e91b",
        "test examples": 10000,
        "test examples per class": [1000] * 10,
        "test labels": "cbb7365de8ed11f05cc4c3a1e7f78144127c5e851efd83762fb18202461230bb",
        "test first exact pixels": "f167149948fc8fe0b9a76ba86421e987817f98b63761ba9415c5d42664d51f03",
    },
    "cifar10-exact-part": {
        "train examples": 4000,
        "train decoded sha256": "de766da53782aba078d4ac3a44a1a7be68a316fa07b9a653d132482d7f405b62",
        "test examples": 1000,
        "test decoded sha256": "09f27c48f8ef1306c9e28f5fba4eef29d6fbd627be8a3fd7debb22e135c49a66",
    },
    "gtsrb32": {
        "train examples": 4300,
        "train examples per class": [100] * 43,
        "train names sha256": "90d48933fa1427ebbbd43d14338ad65c405050b30fc2388ab8813804c752bf8f",
        "test examples": 1290,
        "test examples per class": [30] * 43,
        "test names sha256": "b4d42b816d961ec166bf1900d433b7b3ab3af736d8299f32b2f3c20d3931af06",
    },
    "nuclei": {
        "train examples": 557,
        "train pixels sha256": "8b1bd1282d095f1e214f06aa95d9187cd6f715bbf76d2b1aa50bc74bb5dab897",
        "train foreground sha256": "f3c64f7aa3cd52b3e1b1398a5a0175146ad9c21e2a1b82323eb88a683605d11c",
        "train nuclei": 24436,
        "test examples": 107,
        "test pixels sha256": "d065a7c82b21e34e046f2abf559a5fffa6476ef98d0802723c4c63d5bb477e76",
        "test foreground sha256": "3e05b5760dce4933dde145312736e3c5b8366a58fd7fa8276e0a48ea7875d680",
        "test nuclei": 4550,
    },
    "chest-xray": {
        "train examples": 768,
        "train examples per class": [386, 382],
        "train names sha256": "92536666df60e22ad3462bc490246ec13368e1960e5de8c2c60d7304f6d37ee5",
        "train boxes per class": [0, 1, 0, 0, 1, 0, 0, 0, 2, 1, 0, 0, 31, 1],
        "train findings": [72, 12, 21, 78, 70, 3, 6, 3, 141, 11, 17, 19, 382, 8],
        "test examples": 232,
        "test examples per class": [114, 118],
        "test names sha256": "7dd3e1388c61f17cd571acdf335228bdb6f3cf6171d4d5a83d3376c9a48fae6b",
        "test boxes per class": [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 0],
        "test findings": [41, 4, 12, 18, 20, 7, 2, 0, 46, 8, 3, 8, 118, 4],
    },
    "pneumonia": {
        "train examples": 4708,
        "train sha256 in any order": "0de1603818379bda29340312677055a65985e5d2b23622f53caee0c23cac7b2b",
        "val examples": 524,
        "val sha256 in any order": "f593d410db37b69d600bf3f31c8c2731bc51ebe6aa99493b74bc44f20f228c60",
        "test examples": 624,
        "test sha256 in any order": "af189bb7617eff1632bdc47b7cfb5c822e8abe53593efabf36ead93a99f08b83",
    },
    "spoken-digits": {
        "train examples": 2700,
        "train decoded sha256": "5d4a6ca7ad4a496b0cf05863b3083b7aaf19e6fa18f44fa78efac42ac6239660",
        "test examples": 300,
        "test decoded sha256": "71f63c9faee94627a53c1de4a1b88a6877dc916a64114769ea94874189a71fea",
    },
    "playing-cards": {
        "train examples": 296,
        "train names sha256": "ec0fb5f5b3e1f9a53e2a226dad15766162e18be355c8ca6de2bbff7ec13ee7db",
        "train boxes per class": [89, 82, 89, 80, 95, 92],
        "test examples": 67,
        "test names sha256": "0736687a3eefb9bea9753ff88ef205352de26f410cb0e3726bb2c23f58037f5e",
        "test boxes per class": [26, 18, 24, 26, 23, 26],
    },
    "blood-cells": {
        "train examples": 205,
        "train names sha256": "efae5680ef9a99d7d35f0982b80a0eb1cb0036427e37dd7e8f328f51f7053b79",
        "train boxes per class": [2381, 214, 209],
        "val examples": 87,
        "val names sha256": "e652b0cba8806f9471ee103442c73864f12a770dafab6c1d1d1fe3864d3ddc48",
        "val boxes per class": [967, 87, 83],
        "test examples": 72,
        "test names sha256": "21f05edfe27b355c5f48c044739185ee16bf89c8c575eaec407d95cf5bb784d3",
        "test boxes per class": [805, 71, 69],
    },
    "large-images": {
        "train examples": 3,
        "train sizes": [[3, 4096, 8192], [3, 4096, 8192], [3, 4096, 8192]],
    },
}


def facts(name: str, split: str, fields: dict) -> dict:
    """What must be the same in every equivalent archive of `name`.

    Args:
        name: of the data set.
        split: of the fields.
        fields: what the reader of the archive returned: ``images``, ``labels``, ``classes``, ``extra``.

    Returns:
        counts (int or list) and SHA-256 sums, by a name that an error message can use.
    """
    images, labels, extra = fields["images"], fields["labels"], fields["extra"]
    found = {"examples": len(labels)}
    if name in ("cifar10-exact-part", "spoken-digits"):
        found["decoded sha256"] = array_sha256(images, labels)
    if name == "pneumonia":  # the order differs: compare as a set
        found["sha256 in any order"] = _lines_sha256(sorted(array_sha256(i, j) for i, j in zip(images, labels, strict=True)))
    if name == "nuclei":  # numbering of the nuclei may differ: compare pixels and foreground
        found |= {"pixels sha256": array_sha256(images), "foreground sha256": array_sha256(tuple(mask > 0 for mask in extra["masks"]))}
        found["nuclei"] = int(extra["nuclei"].sum())
    if name == "large-images":
        found["sizes"] = [list(image.shape) for image in images]
    if name in ("cifar10-jpeg", "gtsrb32", "chest-xray"):
        found["examples per class"] = labels.bincount(minlength=len(fields["classes"])).tolist()
    if name in ("gtsrb32", "chest-xray", "playing-cards", "blood-cells"):
        found["names sha256"] = _lines_sha256(extra["names"])
    if name in ("chest-xray", "playing-cards", "blood-cells"):
        found["boxes per class"] = np.bincount(extra["boxes"]["label"], minlength=len(extra.get("finding_names", fields["classes"]))).tolist()
    if name == "chest-xray":
        found["findings"] = extra["findings"].sum(0).tolist()
    return {f"{split} {key}": value for key, value in found.items()}


def _lines_sha256(lines) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def pack(name: str, source: str | Path, out: str | Path | None = None, *, partial: bool = False) -> Path:
    """Build the packed archive `name` from its official release.

    Args:
        name: one of the packed data sets, e.g. ``"spoken-digits"``.
        source: the release, a file or folder; ``frozenfilters.data.info(name).source`` says which.
        out: data folder to write to (the archive goes into the usual subfolder of it); by default what ``FROZENFILTERS_DATA`` names, or
            the user's cache folder where that may not be written to.
        partial: accept a release that is smaller than, or differs from, the one that the study used; the archive is then marked.

    Returns:
        the archive (for ``large-images`` the folder of the three pictures).

    Raises:
        DataError: if `name` is not packed, the archive exists, the folder may not be written to, or the result differs from what is
            expected; the message then names every count and sum that differs.
        MissingError: if the release or a part of it is not there.

    Example:
        >>> pack("digits", ".")
        Traceback (most recent call last):
        ...
        frozenfilters.catalogue.DataError: name='digits' is not a packed data set; packed are: cifar10-jpeg, ...
    """
    record = info(name)
    if record.kind != "archive":
        raise DataError(f"name={name!r} is not a packed data set; packed are: {', '.join(n for n in NAMES if info(n).kind == 'archive')}. Try: {record.how}")
    source = Path(source).expanduser()
    if not source.exists():
        raise MissingError(f"source={str(source)!r} does not exist; expected {record.source}")
    out = Path(out).expanduser() if out else destination()
    if not is_writable(out):
        raise DataError(f"out={str(out)!r} may not be written to; give out= (--out) a folder that may, and set {VARIABLE} to it")
    if there := [str(out / file) for file, _ in record.files if (out / file).exists()]:
        raise DataError(f"{', '.join(there)} exists and is not overwritten; remove it first, or give another out= (--out)")
    from frozenfilters.releases import BUILDERS

    try:
        files, found = BUILDERS[name](source)
    except DataError:
        raise
    except (OSError, ValueError, LookupError, EOFError, SyntaxError, tarfile.TarError, pickle.UnpicklingError) as error:
        raise DataError(f"source={str(source)!r} cannot be read as {record.source}: {type(error).__name__}: {error}") from error
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".packing-", dir=out) as scratch:
        built = [Path(scratch) / file for file in files]
        for path, data in zip(built, files.values(), strict=True):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        decoded = {}
        for split in record.splits:
            fields = READERS[name](built[0], split, file_sha256(built[0]))
            decoded[split] = array_sha256(fields["images"], fields["labels"], fields["extra"].get("masks", ()))
            found |= facts(name, split, fields)
        _compare(name, found, partial)
        for path, file in zip(built, files, strict=True):
            note = {"name": name, "source": "self-packed", "partial": partial, "file_sha256": file_sha256(path), "decoded_sha256": decoded, "facts": found}
            sidecar(path).write_text(json.dumps(note, indent=1) + "\n")
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(sidecar(path), sidecar(out / file))  # the sidecar first: an archive is never there without it
            os.replace(path, out / file)
    first = out / record.files[0][0]
    return first if len(files) == 1 else first.parent


def _compare(name: str, found: dict, partial: bool) -> None:
    wrong = [f"{key}: expected {value}, found {found.get(key)}" for key, value in EXPECTED[name].items() if found.get(key) != value]
    if wrong and not partial:
        differs = "; ".join(wrong)
        raise DataError(f"{name} from this release is not what the study used: nothing written; {differs}. To keep it all the same: pack(..., partial=True)")
