"""The machine under a training: threads, and an allocator that keeps what it has got.

glibc maps every large tensor into memory and unmaps it again, page fault by page fault, at every step: 10 % of a plain training
step and a third of a sequential LC step are the kernel's. `tuned()` lets freed tensors stay in the heap (and the process at its
peak size) while its block runs. No number changes.
"""
from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

import torch

# mallopt's parameters, what is set, the same as a variable for a new process, and what glibc's own rule ends at once large
# tensors have been freed (its thresholds start at 128 KiB and follow the largest freed block up to these).
TRIM, PAD, MMAP = -1, -2, -3
KEEP = {MMAP: 2**30, TRIM: 2**31 - 1, PAD: 2**28}
BACK = {MMAP: 32 * 2**20, TRIM: 64 * 2**20, PAD: 128 * 2**10}
VARIABLES = {"MALLOC_MMAP_THRESHOLD_": KEEP[MMAP], "MALLOC_TRIM_THRESHOLD_": KEEP[TRIM], "MALLOC_TOP_PAD_": KEEP[PAD]}

_blocks = 0             # how many `tuned` blocks with allocator=True are open: only the outermost sets and restores


def _glibc() -> str | None:
    """glibc's version, or None where another C library runs."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):
        return None


def _mallopt(values: dict[int, int]) -> bool:
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in values.items())


def settings() -> dict[str, object]:
    """What is active: threads, allocator ("heap kept", "as found", or why it cannot be set), C library.

    >>> sorted(settings())
    ['allocator', 'c_library', 'threads']
    """
    glibc = _glibc()
    state = "not glibc: left as it is" if glibc is None else "heap kept" if _blocks else "as found"
    return {"threads": torch.get_num_threads(), "allocator": state, "c_library": glibc or "unknown"}


@contextlib.contextmanager
def tuned(threads: int | None = None, allocator: bool = True) -> Iterator[dict[str, object]]:
    """Settings of the process that make training cheaper, taken back at the end of the block: `with tuned(): fit(...)`.

    Args:
        threads: of torch's operations; None leaves them. Restored exactly.
        allocator: keep freed memory (glibc only; elsewhere nothing happens, and the yielded settings say so). Restored to the
            thresholds that glibc's own rule reaches for large tensors; the rule itself stays off, which is glibc's doing, and
            the kept memory is given back.

    Yields:
        `settings()`.

    Raises:
        ValueError: `threads` is not at least 1.

    >>> with tuned(threads=1) as active:
    ...     active["threads"]
    1
    """
    global _blocks
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads} must be at least 1; None leaves the number as it is")
    before, keep = torch.get_num_threads(), allocator and _glibc() is not None
    if keep and _blocks == 0:
        keep = _mallopt(KEEP)
    _blocks += keep
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield settings()
    finally:
        if threads is not None:
            torch.set_num_threads(before)
        _blocks -= keep
        if keep and _blocks == 0:
            _mallopt(BACK)
            ctypes.CDLL(None).malloc_trim(0)


def environment(jobs: int) -> dict[str, str]:
    """Environment variables for one of `jobs` processes that share this machine: its threads, how they wait, the allocator.

    Threads that wait by spinning steal the cores that the other processes need: they sleep (PASSIVE) when there are others.

    Raises:
        ValueError: `jobs` is not at least 1.

    >>> environment(jobs=10**6)["OMP_NUM_THREADS"], environment(2)["OMP_WAIT_POLICY"]
    ('1', 'PASSIVE')
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1")
    variables = {"OMP_NUM_THREADS": str(max(1, cores() // jobs))}
    if jobs > 1:
        variables["OMP_WAIT_POLICY"] = "PASSIVE"
    return variables | ({name: str(value) for name, value in VARIABLES.items()} if _glibc() else {})


def cores() -> int:
    """Cores that this process may use.

    >>> cores() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_device() -> str:
    """Where a training runs that is not told: FROZENFILTERS_DEVICE, else the first GPU, else the CPU.

    Raises:
        RuntimeError: FROZENFILTERS_DEVICE names a GPU that is not there.

    >>> default_device() in ("cpu", "cuda")
    True
    """
    wanted = os.environ.get("FROZENFILTERS_DEVICE")
    there = torch.cuda.is_available()
    if wanted and wanted.startswith("cuda") and not there:
        raise RuntimeError(f"FROZENFILTERS_DEVICE={wanted}, but torch sees no CUDA device here; unset the variable to run on the CPU")
    return wanted or ("cuda" if there else "cpu")
