"""The life of a result: a grid of points, one trial for each, one JSON line for each trial, never measured twice.

A row's key is the SHA-256 of the trial's syntax tree (comments, docstrings and layout do not count), of whatever else of the
notebook it refers to, and of every argument it was called with, defaults bound. So an edited trial is a new measurement and an
unchanged one is never repeated. Rows are appended to a file of the run's own, a line at a time: any number of processes and
machines may write at once, and merging is copying files. `frozenfilters.study` is the public door to this module.
"""

from __future__ import annotations

import itertools
import json
import math
import numbers
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import pandas as pd

from . import PROTOCOL
from .keys import bind, code_of, key_of, plain
from .stamp import stamp

SCHEMA = 1
ARRAY_LIMIT = 200_000  # bytes of one row's arrays
DONE = ("ok", "diverged")  # a diverged training is a result; an error is tried again
MISTAKES = (ValueError, TypeError, LookupError, AttributeError, ImportError, FileNotFoundError)
PLAN: ContextVar[list | None] = ContextVar("PLAN", default=None)  # set by `chapters.plan`: run() only lists its points


class ResultsError(RuntimeError):
    """A results folder that cannot be used, with what to do about it."""


def grid(**axes) -> list[dict]:
    """All combinations of the axes' values, the last axis fastest; a plain value (or a string) is an axis of one.

    >>> grid(bank=["random", "dct"], seed=range(2), epochs=3)[:2]
    [{'bank': 'random', 'seed': 0, 'epochs': 3}, {'bank': 'random', 'seed': 1, 'epochs': 3}]
    """
    values = [list(v) if isinstance(v, Iterable) and not isinstance(v, (str, dict)) else [v] for v in axes.values()]
    for name, v in zip(axes, values, strict=True):
        if not v:
            raise ValueError(f"grid axis {name!r} is empty: give it at least one value")
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*values)]


def read(folder: str | Path) -> list[dict]:
    """All rows under a results folder, in the order of time. A torn last line (a killed writer's) is skipped with a warning."""
    rows = []
    for path in sorted(Path(folder).rglob("*.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or "key" not in row:
                    raise ValueError("no key")
            except ValueError:
                warnings.warn(f"{path.name} line {number} is torn or not a row: skipped; its trial will be measured again", stacklevel=2)
                continue
            if row.get("schema", 0) > SCHEMA or not row.get("schema"):
                raise ResultsError(
                    f"{path} line {number} has schema {row.get('schema')!r}; this version reads up to {SCHEMA}: update the package, or move the file away"
                )
            rows.append(row | {"file": path.name, "folder": str(path.parent)})
    return sorted(rows, key=lambda r: (r["stamp"].get("time", ""), r["file"]))


def load(folder: str | Path, keys: Iterable[str] | None = None) -> pd.DataFrame:
    """The measured rows as a table, one line per key: parameters, metrics, seconds, status, stamp.*, key, code, protocol, file.

    Of several rows with one key the first done one counts (two writers measured the same point); failed rows are left out
    unless nothing else is known. `keys` keeps only those, in that order.
    """
    best: dict[str, dict] = {}
    for row in read(folder):
        old = best.get(row["key"])
        if old is None or _rank(row) > _rank(old):
            best[row["key"]] = row
    chosen = best.values() if keys is None else [best[k] for k in dict.fromkeys(keys) if k in best]
    flat = [
        {
            **r["params"],
            **r["metrics"],
            **{k: r.get(k) for k in ("status", "error", "seconds", "key", "code", "protocol", "trial", "file", "folder")},
            "arrays": bool(r.get("arrays")),
            **{f"stamp.{k}": v for k, v in r["stamp"].items()},
        }
        for r in chosen
    ]
    return pd.DataFrame(flat)


def _rank(row: dict) -> tuple:
    return (row["protocol"] == PROTOCOL, row["status"] in DONE)


def arrays(row) -> dict[str, np.ndarray]:
    """The small arrays (spectra, curves) that the trial of this row returned beside its numbers.

    Raises:
        ResultsError: if the row has none, or its .npz file is not beside the rows.
    """
    path = Path(row["folder"]) / f"{row['key']}.npz"
    if not path.exists():
        raise ResultsError(
            f"row {row['key'][:12]} has no arrays: {path} does not exist; copy the .npz files together with the .jsonl files"
        )
    with np.load(path) as z:
        return dict(z)


def _split_metrics(result: dict, trial: str) -> tuple[dict, dict]:
    if not isinstance(result, dict):
        raise TypeError(f"{trial} returned {type(result).__name__}; a trial returns a dict of numbers and small arrays")
    metrics, small = {}, {}
    for name, value in result.items():
        if hasattr(value, "detach"):
            value = value.detach().cpu().numpy()
        if isinstance(value, np.ndarray) and value.ndim:
            small[name] = value
        elif isinstance(value, (numbers.Number, np.generic, np.ndarray)):
            value = value.item() if isinstance(value, (np.generic, np.ndarray)) else value
            metrics[name] = value if math.isfinite(value) else None
        elif isinstance(value, str) or value is None:
            metrics[name] = value
        else:
            raise TypeError(f"{trial} returned {name}={type(value).__name__}; only numbers, short strings and arrays can be kept")
    size = sum(a.nbytes for a in small.values())
    if size > ARRAY_LIMIT:
        raise ValueError(
            f"{trial} returned arrays of {size} bytes ({', '.join(small)}); at most {ARRAY_LIMIT} are kept for a row: return a summary"
        )
    return metrics, small


def _measure(trial: Callable, arguments: dict, key: str, code: str, chapter: str, folder: Path) -> tuple[dict, Exception | None]:
    """One trial, one row, and what went wrong if anything did."""
    from . import data

    row = {
        "schema": SCHEMA,
        "key": key,
        "chapter": chapter,
        "trial": trial.__name__,
        "code": code[:16],
        "protocol": PROTOCOL,
        "params": {k: plain(v) for k, v in arguments.items()},
        "status": "ok",
        "metrics": {},
    }
    start, used, problem = time.perf_counter(), {}, None
    token = data.LEDGER.set(used)
    try:
        row["metrics"], small = _split_metrics(trial(**arguments), trial.__name__)
        if small:
            temporary = folder / f".{key}.{uuid.uuid4().hex}.tmp.npz"
            np.savez_compressed(temporary, **small)
            os.replace(temporary, folder / f"{key}.npz")
            row["arrays"] = sorted(small)
    except ArithmeticError as e:  # train.DivergedError: the loss left the numbers; that is a result
        row |= {"status": "diverged", "error": str(e)}
    except Exception as e:  # noqa: BLE001  whatever it was, it is recorded
        row |= {"status": "failed", "error": f"{type(e).__name__}: {e}"[:2000]}
        problem = e
    finally:
        data.LEDGER.reset(token)
    row["seconds"] = round(time.perf_counter() - start, 3)
    row["stamp"] = stamp(arguments.get("device"), used)
    return row, problem


def _in_worker(*args) -> tuple[dict, Exception | None]:
    from . import machine

    with machine.tuned(threads=1):
        return _measure(*args)


class Shard:
    """One run's own append-only file of rows, made at the first row; each row is on the disk before the next trial starts."""

    def __init__(self, folder: Path):
        self.path = folder / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}-{uuid.uuid4().hex[:6]}.jsonl"

    def append(self, row: dict) -> None:
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            with open(self.path, "a+b", buffering=0) as f:
                if f.seek(0, os.SEEK_END):  # what a full disk tore must not take the next row with it
                    f.seek(-1, os.SEEK_END)
                    line = line if f.read(1) == b"\n" else b"\n" + line
                while line:
                    line = line[f.write(line) :]
                os.fsync(f.fileno())
        except OSError as e:
            raise ResultsError(
                f"cannot write {self.path}: {e.strerror}; rows measured so far are safe. Free the disk or choose another folder "
                "with out=... or FROZENFILTERS_RESULTS, and run again: it resumes"
            ) from e


def _seconds(budget) -> float:
    if budget is None:
        return math.inf
    try:
        return float(budget) if isinstance(budget, (int, float)) else pd.Timedelta(budget).total_seconds()
    except ValueError as e:
        raise ValueError(f"budget={budget!r} is not a time; write seconds or '9min', '2h', '90s'") from e


def _part(shard: str | None, total: int) -> Sequence[int]:
    if shard is None:
        return range(total)
    try:
        i, n = (int(s) for s in shard.split("/"))
        if not 1 <= i <= n:
            raise ValueError
    except ValueError:
        raise ValueError(f"shard={shard!r} must look like '3/8', the third of eight parts") from None
    return range(i - 1, total, n)


def run(
    trial: Callable,
    points: list[dict],
    out: str | Path,
    *,
    budget: str | float | None = None,
    shard: str | None = None,
    workers: int | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Measure every point of the grid that has no row yet, and return the table of all points that have one.

    Args:
        trial: function of plain arguments that returns a dict of numbers (and small arrays); self-contained.
        points: list of argument dicts (see `grid`).
        out: folder of rows; made if missing. Its name is the chapter's.
        budget: stop starting trials when the time is nearly over ("9min", "2h" or seconds); run again to go on.
        shard: "3/8" measures only the third of eight parts of the grid.
        workers: processes with one thread each (default: the variable FROZENFILTERS_WORKERS, or 1: in this process).
        progress: a bar with the time left (default: on a terminal).

    Raises:
        ResultsError: the folder cannot be written while there is something to measure.
        TypeError, ValueError: grid, trial, shard or budget do not fit; or the first trial to end made a mistake of that kind (an
            unknown data set). A trial that fails later, or from want of memory, is a row that says so, and the grid goes on.
    """
    folder, code, seconds = Path(out), code_of(trial), _seconds(budget)
    bound = [bind(trial, p) for p in points]
    keys = [key_of(code, b) for b in bound]
    done = _done(folder)
    if (planned := PLAN.get()) is not None:
        planned.append(
            {
                "trial": trial.__name__,
                "code": code,
                "folder": folder,
                "keys": list(dict.fromkeys(keys)),
                "present": sum(k in done for k in dict.fromkeys(keys)),
            }
        )
        return load(folder, keys)
    todo = [i for i in dict.fromkeys(keys.index(keys[j]) for j in _part(shard, len(keys))) if keys[i] not in done]
    if todo:
        _measure_all(trial, bound, keys, code, todo, folder, seconds, workers, progress)
    table = load(folder, keys)
    table = table[table.protocol == PROTOCOL] if len(table) else table
    failed = table[table.status == "failed"] if len(table) else table
    for _, row in failed.iterrows():
        warnings.warn(f"{trial.__name__} failed at {row.key[:12]}: {row.error}; it will be tried again by the next run", stacklevel=2)
    missing = len(set(keys)) - len(table)
    if missing:
        print(f"{missing} of {len(set(keys))} points are not measured yet; run again to go on")
    return table[table.status != "failed"].reset_index(drop=True) if len(table) else table


def _done(folder: Path) -> set[str]:
    return {r["key"] for r in read(folder) if r["status"] in DONE and r["protocol"] == PROTOCOL} if folder.exists() else set()


def _measure_all(trial, bound, keys, code, todo, folder, budget, workers, progress) -> None:
    from joblib import Parallel, delayed, parallel_config
    from tqdm.auto import tqdm

    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{uuid.uuid4().hex}.probe"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise ResultsError(
            f"cannot write to the results folder {folder}: {e.strerror}; {len(todo)} trials are not measured yet. Make it writable, or choose "
            "another with the parameter out=... or the variable FROZENFILTERS_RESULTS"
        ) from e
    varied = [k for k in bound[0] if any(bound[i][k] != bound[todo[0]][k] for i in todo)]
    shard, start, spent, good = Shard(folder), time.monotonic(), [], []
    workers = workers or int(os.environ.get("FROZENFILTERS_WORKERS", "1"))
    terminal = sys.stderr.isatty() and "ipykernel" not in sys.modules
    bar = tqdm(
        total=len(todo), desc=folder.name, unit="trial", disable=not (terminal if progress is None else progress), dynamic_ncols=True
    )

    def waiting():
        for i in todo:
            left = budget - (time.monotonic() - start)
            if left <= 0 or (spent and left < float(np.median(spent))):
                return
            if keys[i] not in _done(folder):  # another process may have measured it meanwhile
                yield i

    def keep(row: dict, problem: Exception | None) -> None:
        if isinstance(problem, MISTAKES) and not good:
            raise problem  # a wrong name or a missing data set: said at once, before anything was measured
        good.append(row["status"] in DONE)
        shard.append(row)
        spent.append(row["seconds"])
        bar.update()
        if bar.disable and "ipykernel" not in sys.modules:
            rate = (time.monotonic() - start) / len(spent)
            shown = ", ".join(f"{k}={v}" for k, v in row["params"].items() if k in varied)
            print(
                f"[{len(spent)}/{len(todo)}] {shown} {row['status']} in {row['seconds']:.1f} s, about {rate * (len(todo) - len(spent)):.0f} s left",
                flush=True,
            )

    try:
        if workers == 1:
            for i in waiting():
                keep(*_measure(trial, bound[i], keys[i], code, folder.name, folder))
        else:
            with parallel_config(backend="loky", inner_max_num_threads=1):
                tasks = (delayed(_in_worker)(trial, bound[i], keys[i], code, folder.name, folder) for i in waiting())
                for result in Parallel(n_jobs=workers, return_as="generator_unordered", pre_dispatch="n_jobs", batch_size=1)(tasks):
                    keep(*result)
    except KeyboardInterrupt:
        print(f"\ninterrupted: {len(spent)} trials measured and safe in {shard.path}; run again to resume", file=sys.stderr)
        raise
    finally:
        bar.close()
    if "ipykernel" in sys.modules or terminal:
        print(f"{folder.name}: measured {len(spent)} of {len(todo)} trials in {time.monotonic() - start:.0f} s")
