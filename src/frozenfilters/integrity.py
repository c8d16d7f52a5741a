"""Is this file the one that it should be, and has it been decoded before? SHA-256 sums, sidecars and the cache of decoded pictures.

An archive is accepted if its SHA-256 is the one in :mod:`frozenfilters.catalogue`, or if the sidecar ``<file>.source.json`` that
:mod:`frozenfilters.pack` writes beside an archive of its own vouches for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from frozenfilters.catalogue import CorruptError, cache_folder


@lru_cache(maxsize=64)
def _digest(path: str, size: int, mtime: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file; hashed once per process as long as size and time of change stay the same."""
    stat = path.stat()
    return _digest(str(path), stat.st_size, stat.st_mtime_ns)


def array_sha256(*arrays) -> str:
    """SHA-256 over the bytes of tensors, arrays or tuples of them, one after another in C order.

    Example:
        >>> array_sha256(torch.zeros(2, dtype=torch.uint8))[:8]
        '96a296d2'
    """
    digest = hashlib.sha256()
    for array in arrays:
        for part in array if isinstance(array, tuple) else (array,):
            digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()


def sidecar(path: Path) -> Path:
    """Where :mod:`frozenfilters.pack` notes what it packed into `path`."""
    return path.with_name(path.name + ".source.json")


def verify(path: Path, expected: str, name: str, remedy: str | None = None) -> dict | None:
    """Check one archive file.

    Returns:
        ``None`` for the file of the catalogue, the contents of the sidecar for a self-packed one.

    Raises:
        CorruptError: if the SHA-256 is neither; the message has both sums and the remedy.
    """
    found = file_sha256(path)
    if found == expected:
        return None
    note = json.loads(sidecar(path).read_text()) if sidecar(path).exists() else {}
    if note.get("file_sha256") == found:
        return note
    raise CorruptError(
        f"{path} is damaged or another file: sha256 expected {note.get('file_sha256', expected)}, found {found}. "
        f"To fix it: {remedy or f'copy it again, or remove it and run: python -m frozenfilters data pack {name} SOURCE'}"
    )


def decoded(key: str, length: int, decode: Callable[[], np.ndarray]) -> torch.Tensor:
    """`decode()`, or its result from the user's cache folder when an earlier process left it there (an ``.npy`` file, written atomically).

    Args:
        key: names the result; must hold the archive's sum and the decoder's version.
        length: number of pictures expected; a cached file of another length is ignored.
        decode: makes the array; its result is kept if the cache folder can be written to, and silently not kept otherwise.
    """
    path = cache_folder() / "decoded" / f"{key}.npy"
    try:
        array = np.load(path)
        if len(array) == length and array.dtype == np.uint8:
            return torch.from_numpy(array)
    except (OSError, ValueError, EOFError):
        pass
    array = decode()
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            temporary = file.name
            np.save(file, array)
        os.replace(temporary, path)
    except OSError:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
    return torch.from_numpy(array)
