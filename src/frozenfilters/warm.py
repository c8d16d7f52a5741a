"""Notebooks that start in a fraction of a second: kernels forked from a process that has done the imports.

Most of a short notebook's time goes into importing torch, torchvision and seaborn. `kernels()` pays for that once and gives a kernel name that papermill,
nbclient and nbval take like any other. It stays on this machine: a UNIX socket in a private folder, no port.

    with warm.kernels() as name:
        papermill.execute_notebook("a.ipynb", "b.ipynb", kernel_name=name)

and from a shell `python -m frozenfilters.warm pytest --nbval-lax --nbval-kernel-name={kernel} notebooks`.
"""
from __future__ import annotations

import contextlib
import glob
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

NAME, ORDINARY = "frozenfilters-warm", "python3"
MODULES = ("numpy", "torch", "torchvision", "pandas", "sklearn", "matplotlib.pyplot", "seaborn", "tqdm", "yaml", "tabulate")     # the last by torch, at exit


def available() -> bool:
    """Whether warm kernels are safe here: Linux, and no GPU in sight (CUDA does not survive a fork).

    `FROZENFILTERS_WARM=0` says no; `=1` says yes wherever there is fork and UNIX sockets, macOS included.

    >>> import os
    >>> os.environ["FROZENFILTERS_WARM"] = "0"; available()
    False
    >>> del os.environ["FROZENFILTERS_WARM"]
    """
    wish = os.environ.get("FROZENFILTERS_WARM", "")
    if wish not in ("", "0", "1"):
        raise ValueError(f"FROZENFILTERS_WARM={wish!r} is neither 0 (ordinary kernels) nor 1 (warm kernels); unset it to let the machine decide")
    if wish == "0" or os.name != "posix" or not hasattr(os, "fork"):
        return False
    return wish == "1" or (sys.platform == "linux" and not _gpu())


def _gpu() -> bool:
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        return True
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    return not hidden and any(glob.glob(device) for device in ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg"))


@contextlib.contextmanager
def kernels(env: Mapping[str, str] | None = None, modules: Sequence[str] = MODULES, patience: float = 120) -> Iterator[str]:
    """A kernel name whose kernels start warm inside the block; "python3" where that is not `available`.

    All is torn down at the end of the block, and when this process dies.

    Args:
        env: environment of the imports, by default this process's. A kernel started with other values of variables that libraries read when they are
            imported (`zygote.READ_AT_IMPORT`) is an ordinary one.
        modules: what to import beforehand, in this order; missing ones are left out.
        patience: seconds that the imports may take.
    """
    if not available():
        yield ORDINARY
        return
    folder = Path(tempfile.mkdtemp(prefix="warm-"))                         # mode 0700; short: a socket's path may have 107 bytes
    here, zygote = Path(__file__).parent, None
    try:
        spec = {"argv": [sys.executable, "-I", "-S", str(here / "zygote_client.py"), str(folder / "socket"), "-f", "{connection_file}",
                         "--HistoryManager.hist_file=:memory:"],            # as nbclient asks of "python3"
                "display_name": "Python 3 (warm)", "language": "python", "interrupt_mode": "signal"}
        (folder / "kernels" / NAME).mkdir(parents=True)
        (folder / "kernels" / NAME / "kernel.json").write_text(json.dumps(spec))
        with open(folder / "log", "wb") as log:
            zygote = subprocess.Popen([sys.executable, str(here / "zygote.py"), str(folder), str(os.getpid()), *modules], stdin=subprocess.DEVNULL,
                                      stdout=subprocess.PIPE, stderr=log, env=dict(os.environ if env is None else env), start_new_session=True)
        problem = _problem(zygote, folder / "log", patience)
        if problem:
            warnings.warn(f"no warm kernels, ordinary ones start instead: {problem}", stacklevel=3)
            yield ORDINARY
        else:
            with _jupyter_path(folder):
                yield NAME
    finally:
        if zygote:
            zygote.terminate()
            try:
                zygote.wait(10)
            except subprocess.TimeoutExpired:
                zygote.kill()
                zygote.wait()
            zygote.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


def _problem(zygote: subprocess.Popen, log: Path, patience: float) -> str | None:
    """Wait for the zygote; what is wrong with it, if anything."""
    if not select.select([zygote.stdout], [], [], patience)[0]:
        return f"the imports took longer than {patience:.0f} s"
    word = zygote.stdout.readline().split()
    if not word:
        return f"the imports failed: {(log.read_text().strip().splitlines() or ['no message'])[-1]}"
    if int(word[1]) > 1:
        return f"the imports started {int(word[1]) - 1} threads, which do not survive a fork; set OMP_NUM_THREADS=1"
    return None


@contextlib.contextmanager
def _jupyter_path(folder: Path) -> Iterator[None]:
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(folder), before]))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("JUPYTER_PATH", None)
        else:
            os.environ["JUPYTER_PATH"] = before


def ratio(rounds: int = 3):
    """Wall seconds of a notebook that imports torch, torchvision and seaborn, by an ordinary and by a warm kernel, interleaved.

    Returns:
        DataFrame with `ordinary_s`, `warm_s` and `ratio` per round; `.attrs["zygote_s"]` is what starting the zygote cost once.
    """
    import nbformat
    import pandas as pd
    import papermill
    from traitlets.config import Config
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import torch, torchvision, seaborn")],
                                  metadata={"kernelspec": {"name": ORDINARY, "language": "python", "display_name": "Python 3"}})
    with tempfile.TemporaryDirectory(prefix="w-") as folder:
        nbformat.write(nb, f"{folder}/in.ipynb")
        start = time.perf_counter()
        with kernels() as name:
            if name == ORDINARY:
                raise RuntimeError("there are no warm kernels here; see warm.available(), and FROZENFILTERS_WARM=1 to force them")
            zygote_s, rows = time.perf_counter() - start, []
            for i in range(rounds):
                row = {}
                for kernel in ((ORDINARY, name), (name, ORDINARY))[i % 2]:
                    config = Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/{kernel[0]}{i}"}})
                    start = time.perf_counter()
                    papermill.execute_notebook(f"{folder}/in.ipynb", f"{folder}/out.ipynb", kernel_name=kernel, progress_bar=False, config=config)
                    row["warm_s" if kernel == name else "ordinary_s"] = time.perf_counter() - start
                rows.append(row)
    table = pd.DataFrame(rows)[["ordinary_s", "warm_s"]].assign(ratio=lambda t: t.warm_s / t.ordinary_s)
    table.attrs["zygote_s"] = zygote_s
    return table


def import_ratio(rounds: int = 3):
    """CPU seconds of `import torch`, of `import frozenfilters`, and of its first use, each in a fresh process, interleaved.

    Returns:
        DataFrame with `torch_s`, `package_s`, `used_s` (after `freeze`, `lc` and `fit` have been looked up), and `ratio` and `used_ratio` to torch.
    """
    import pandas as pd
    programs = {"torch_s": "import torch", "package_s": "import frozenfilters", "used_s": "import frozenfilters as ff; ff.freeze, ff.lc, ff.fit"}
    table = pd.DataFrame([{name: _cpu_seconds(program) for name, program in programs.items()} for _ in range(rounds)])
    return table.assign(ratio=table.package_s / table.torch_s, used_ratio=table.used_s / table.torch_s)


def _cpu_seconds(program: str) -> float:
    process = subprocess.Popen([sys.executable, "-c", program])
    _, status, usage = os.wait4(process.pid, 0)                             # this process's alone, whatever else runs
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"`{program}` failed with status {process.returncode}; run it by hand to see why")
    return usage.ru_utime + usage.ru_stime


def main(command: Sequence[str]) -> int:
    """Run a command with `{kernel}` in its arguments replaced by the kernel's name."""
    if not command:
        print("usage: python -m frozenfilters.warm COMMAND... ({kernel} in it becomes the kernel's name)", file=sys.stderr)
        return 2
    with kernels() as name:
        return subprocess.run([part.replace("{kernel}", name) for part in command]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
