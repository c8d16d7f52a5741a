"""Where a number comes from: device, versions, commit, data sets, time."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from . import __version__


@lru_cache
def device_name(device: str | None = None) -> str:
    """What a person would call it: "AMD EPYC" or "NVIDIA H200".

    >>> isinstance(device_name("cpu"), str)
    True
    """
    import torch

    if device is not None and str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@lru_cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "frozenfilters": __version__}


@lru_cache
def commit(folder: str | None = None) -> tuple[str | None, bool | None]:
    """(commit, dirty) of the checkout that holds this package; (None, None) without git. Results do not count as dirt."""
    where = folder or str(Path(__file__).resolve().parent)

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", where, *words], check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        top = git("rev-parse", "--show-toplevel")
        if not (Path(top) / "notebooks" / "presets.yml").exists():  # installed inside somebody else's checkout
            return None, None
        dirty = subprocess.run(
            ["git", "-C", top, "status", "--porcelain", "--untracked-files=all", "--", "src", "notebooks"],
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout
        return git("rev-parse", "HEAD"), bool(dirty.strip())
    except (OSError, subprocess.SubprocessError):
        return None, None


def stamp(device: str | None = None, data: dict | None = None) -> dict:
    """The provenance of one row.

    >>> sorted(stamp())[:4]
    ['commit', 'cores', 'data', 'device']
    """
    import os

    import torch

    from . import machine

    head, dirty = commit()
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "device": device_name(str(device or machine.default_device())),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        **versions(),
        "commit": head,
        "dirty": dirty,
        "data": data or {},
    }
