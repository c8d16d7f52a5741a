"""From rows to the book: live smoke runs, executed chapters, one strict build.

`book()` is `make book`. First every notebook runs live at its smallest size into a scratch folder: the proof that it works on this machine. Then each chapter's
page is made by the same notebook with the largest preset whose rows are complete among the measured ones, so nothing is measured again. Then Sphinx, with
warnings as errors. Each step is skipped while what it depends on is unchanged.

Kernels talk over private IPC sockets, because kernels that start at once race for TCP ports.
"""
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nbformat
import papermill
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from . import chapters, pages, study, warm
from .pages import BookError, finish, unearned  # noqa: F401  (`frozenfilters check` asks for `unearned` here)

JUPYTER_BOOK = "import sys; from jupyter_book.cli.main import main; sys.argv[0] = 'jupyter-book'; main()"


@dataclass(frozen=True)
class Shown:
    """What a chapter's page shows: the preset, the folder and keys of its rows, and whether that is only the smoke run made here."""
    preset: str
    results: Path
    keys: tuple
    fallback: bool = False


class PrivateKernel(NBClientEngine):
    """papermill's own engine, with an environment and an IPC socket for each kernel."""
    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, start_timeout=120, env=None, **_):
        with tempfile.TemporaryDirectory(prefix="k-") as folder:            # short: a socket's path may have 107 bytes
            config = Config()
            if os.name == "posix":
                config.KernelManager.transport = "ipc"
                config.KernelManager.ip = f"{folder}/k"                     # the default is shared by all kernels of a folder
            client = PapermillNotebookClient(nb_man, kernel_name=kernel_name, startup_timeout=start_timeout, timeout=None, config=config)
            client.execute(env=env or dict(os.environ))


papermill_engines.register("private", PrivateKernel)


THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}            # of a kernel, unless the caller chose others


def ordinary() -> str:
    """The kernel of whoever does not ask for warm ones."""
    return warm.ORDINARY


@contextlib.contextmanager
def warm_kernels():
    """Yield a function that names the kernel to use: one warm start for all notebooks of a build, made when the first one needs it (see `warm`)."""
    with contextlib.ExitStack() as stack:
        yield cache(lambda: stack.enter_context(warm.kernels({**THREADS, **os.environ})))


def run_smoke(kernel=ordinary) -> None:
    """Run every notebook's smoke preset live into book/_build/smoke, unless nothing it depends on has changed since it last passed."""
    root = study.root()
    jobs = []
    for chapter in study.chapters():
        if _stamp(_scratch(root) / chapter.name) != _smoke_hash(root, chapter):
            shutil.rmtree(_scratch(root) / chapter.name, ignore_errors=True)            # old rows would be a proof of nothing
            jobs.append((chapter, chapter.presets["smoke"], _scratch(root), _scratch(root) / f"{chapter.name}.ipynb"))
    _run_all("smoke", jobs, root, lambda chapter, out: _stamp(_scratch(root) / chapter.name, _smoke_hash(root, chapter)), kernel)


def stamp_smoke() -> None:
    """Note that another tool (nbval in `make test`) has just passed every notebook as stored, with rows written to book/_build/smoke."""
    root = study.root()
    for chapter in study.chapters():
        if not chapter.presets["smoke"] and (_scratch(root) / chapter.name).is_dir():   # as stored = the smoke preset, when it changes nothing
            _no_failed_rows(_scratch(root) / chapter.name)
            _stamp(_scratch(root) / chapter.name, _smoke_hash(root, chapter))


def execute(chapter, parameters: dict, name: str) -> Path:
    """Execute a chapter's notebook with these parameters on the rows of the results folder; return the executed copy, book/_build/runs/chapter-name.ipynb."""
    root = study.root()
    out = root / "book" / "_build" / "runs" / f"{chapter.name}-{name}.ipynb"
    _run_all("run", [(chapter, parameters, study.results(), out)], root)
    return out


def choose(chapter) -> Shown:
    """The largest preset whose rows are complete in the measured results, else the smoke run made here."""
    root = study.root()
    preset, plan = study.shown(chapter, root / "book" / "results")
    if preset != "smoke":
        return Shown(preset, root / "book" / "results", plan.keys)
    return Shown("smoke", _scratch(root), study.plan(chapter, "smoke", _scratch(root)).keys, fallback=True)


def run_pages(kernel=ordinary) -> dict:
    """Execute each chapter with the preset it shows into book/chapters; return {chapter name: Shown}."""
    root = study.root()
    shown = {c.name: choose(c) for c in study.chapters()}
    hashes, jobs = {}, []
    for chapter in study.chapters():
        what = shown[chapter.name]
        note = pages.note(chapter, what)
        rows = sorted(p for p in (what.results / chapter.name).rglob("*") if p.is_file())
        hashes[chapter.name] = _hash(_code_hash(root), chapter.notebook, chapter.presets[what.preset], note, *rows)
        if _stamp(_work(root) / chapter.name) != hashes[chapter.name] or not _page(root, chapter).exists():
            jobs.append((chapter, chapter.presets[what.preset], what.results, _work(root) / f"{chapter.name}.ipynb"))

    def write(chapter, out):
        nb = finish(nbformat.read(out, 4), chapter, pages.note(chapter, shown[chapter.name]))
        _page(root, chapter).parent.mkdir(exist_ok=True)
        nbformat.write(nb, _page(root, chapter))
        _stamp(_work(root) / chapter.name, hashes[chapter.name])

    _run_all("page", jobs, root, write, kernel)
    return shown


def book(smoke: bool = True, open_hint: bool = True) -> Path:
    """Build the whole book; return the path of its first page."""
    root, start = study.root(), time.monotonic()
    toc = (root / "book" / "_toc.yml").read_text()
    for chapter in study.chapters():
        if f"chapters/{chapter.name}" not in toc:
            raise BookError(f"chapter {chapter.number} is not in book/_toc.yml: add the line `- file: chapters/{chapter.name}` to its part.")
    with warm_kernels() as kernel:
        if smoke:
            run_smoke(kernel)
        shown = run_pages(kernel)
    pages.write(root, shown)
    index = _sphinx(root)
    if open_hint:
        print(f"the book is built ({time.monotonic() - start:.0f} s)\nopen {index.as_uri()}")
    return index


def _sphinx(root: Path) -> Path:
    source, build = root / "book", root / "book" / "_build"
    inputs = [p for p in sorted(source.rglob("*")) if p.is_file() and not {"_build", "results", "__pycache__"} & set(p.relative_to(source).parts)]
    now = _hash(_code_hash(root), build / "summary.json", *[part for p in inputs for part in (str(p.relative_to(source)), p)])
    index = build / "html" / "index.html"
    if _stamp(build / "html") == now and index.exists():
        return index
    for old in ("html", ".doctrees", "jupyter_execute"):                # a fresh build takes seconds and leaves nothing of a former one
        shutil.rmtree(build / old, ignore_errors=True)
    done = subprocess.run([sys.executable, "-c", JUPYTER_BOOK, "build", str(source), "-W", "-n", "--keep-going", "-q"], text=True, capture_output=True,
                          env={**os.environ, "PYTHONWARNINGS": "ignore"})
    if done.returncode:
        lines = [line for line in re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr).splitlines() if line.strip()]
        slips = [line for line in lines if "WARNING" in line or "ERROR" in line]
        raise BookError("the pages did not build without warnings:\n" + "\n".join(slips or lines[-40:]))
    _stamp(build / "html", now)
    return index


def _run_all(what: str, jobs: list, root: Path, done=lambda chapter, out: None, kernel=ordinary) -> None:
    """Run (chapter, parameters, results folder, output path) jobs, two at a time where memory allows; `done` after each success; raise naming every failure."""
    failed, name = [], kernel() if jobs else ""

    def one(job):
        chapter, parameters, results, out = job
        start = time.monotonic()
        try:
            _run(chapter.notebook, out, parameters, results, root, name)
            _no_failed_rows(results / chapter.name)
            done(chapter, out)
            print(f"{what} {chapter.name}: ok, {time.monotonic() - start:.0f} s", flush=True)
        except Exception as error:
            failed.append(f"{chapter.notebook.name}: {_explain(error, out, root)}")
            print(f"{what} {chapter.name}: FAILED after {time.monotonic() - start:.0f} s", flush=True)

    with ThreadPoolExecutor(_workers()) as pool:
        list(pool.map(one, jobs))
    if failed:
        raise BookError(f"{len(failed)} of {len(jobs)} notebooks failed ({what} run):\n" + "\n".join(sorted(failed)))


def _run(notebook: Path, out: Path, parameters: dict, results: Path, root: Path, kernel: str) -> None:
    study.check_parameters(parameters, chapters.defaults(notebook))         # papermill itself only warns of an unknown one, and runs the default
    out.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")               # this environment's python3 kernel, not another one's of the same name
    ipython = root / "book" / "_build" / "ipython"                      # nobody's own start-up files, and no chatter of kernels
    (ipython / "profile_default").mkdir(parents=True, exist_ok=True)
    (ipython / "profile_default" / "ipython_kernel_config.py").write_text("c.IPKernelApp.log_level = 50\n")
    env = {**THREADS, **os.environ, "IPYTHONDIR": str(ipython),
           "FROZENFILTERS_ROOT": str(root), "FROZENFILTERS_RESULTS": str(results)}
    papermill.execute_notebook(str(notebook), str(out), parameters, engine_name="private", kernel_name=kernel, progress_bar=sys.stderr.isatty(), env=env)


def _no_failed_rows(folder: Path) -> None:
    rows = study.load(folder)                                           # a failed trial does not stop its notebook; it must stop the book
    failed = rows[rows.status == "failed"] if len(rows) else rows
    if len(failed):
        raise BookError(f"{len(failed)} of {len(rows)} trials failed, the first with {failed.error.iloc[0]}")


def _explain(error: Exception, out: Path, root: Path) -> str:
    if not isinstance(error, PapermillExecutionError):
        return str(error) if isinstance(error, (BookError, study.ParameterError)) else f"{type(error).__name__}: {error}"
    kept = root / "book" / "_build" / "failed" / out.name
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(out, kept)
    first = next((line for line in error.source.splitlines() if line.strip()), "")
    return f"cell [{error.exec_count}] `{first}` raised {error.ename}: {error.evalue}\n    the executed copy with the error: {kept}"


def _workers() -> int:
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        free = 0
    return 2 if (os.cpu_count() or 1) > 1 and free > 3e9 else 1


def _scratch(root): return root / "book" / "_build" / "smoke"


def _work(root): return root / "book" / "_build" / "pages"


def _page(root, chapter): return root / "book" / "chapters" / f"{chapter.name}.ipynb"


def _smoke_hash(root, chapter): return _hash(_code_hash(root), chapter.notebook, chapter.presets["smoke"])


def _code_hash(root: Path) -> str:
    return _hash(platform.python_version(), root / "requirements" / "lock.txt", *sorted(Path(__file__).parent.glob("*.py")))


def _hash(*parts) -> str:
    """sha256 over values and the contents of files."""
    h = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else json.dumps(part, sort_keys=True, default=str).encode()
        h.update(len(data).to_bytes(8, "big") + data)
    return h.hexdigest()


def _stamp(thing: Path, value: str | None = None) -> str | None:
    """Read, or write, the stamp beside a built thing."""
    path = thing.with_name(thing.name + ".stamp")
    if value is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value)
    return path.read_text() if path.exists() else None
