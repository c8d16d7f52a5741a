"""Warm kernels behave as ordinary ones do, start in their caller's folder and environment, and leave nothing behind."""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import nbformat
import papermill
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from traitlets.config import Config

from frozenfilters import warm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="warm kernels are on by default on Linux only")
WHO = """
import json, os, random, sys, numpy
print(json.dumps({"warm": os.getppid() != int(os.environ["JPY_PARENT_PID"]), "pid": os.getpid(), "cwd": os.getcwd(), "word": os.environ.get("WORD"),
                  "draws": [random.random(), float(numpy.random.rand()), float(sys.modules["torch"].rand(1)) if "torch" in sys.modules else os.getpid()]}))
"""
CHAPTER = """
import os, signal, sys
import numpy as np, torch, matplotlib.pyplot as plt
torch.manual_seed(0); np.random.seed(0)
print(torch.rand(3), np.random.rand(3), torch.get_num_threads(), torch.nn.Conv2d(3, 4, 3)(torch.rand(2, 3, 8, 8)).sum())
print(os.getcwd(), sys.path, sorted(os.environ), os.environ["MPLBACKEND"], sys.argv[0], sys.argv[3:], sys.flags, __name__)
print({str(n): str(signal.getsignal(n)) for n in signal.valid_signals()}, [line for line in open("/proc/self/status") if line[:3] in ("Sig", "Shd")])
kinds = [os.readlink(f"/proc/self/fd/{n}").split(":")[0] for n in range(200) if os.path.lexists(f"/proc/self/fd/{n}")]
print({kind: kinds.count(kind) for kind in kinds if kind != "anon_inode"}, len(os.listdir("/proc/self/task")))
print("to stderr", file=sys.stderr)
plt.plot([1, 2])
"""


@contextmanager
def settings(**values):
    with pytest.MonkeyPatch.context() as patch:
        for key, value in values.items():
            patch.setenv(key, value)
        yield


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    """A warm kernel with torch and pyplot, shared by the tests of this module."""
    with settings(FROZENFILTERS_WARM="1", OMP_NUM_THREADS="1", JUPYTER_PREFER_ENV_PATH="1", IPYTHONDIR=str(tmp_path_factory.mktemp("ipython"))), \
            warm.kernels(modules=("numpy", "torch", "matplotlib.pyplot")) as name:
        assert name == warm.NAME
        yield name


@contextmanager
def light():
    """A warm kernel of the test's own, with numpy only; yields its name and the zygote's folder."""
    with settings(FROZENFILTERS_WARM="1", OMP_NUM_THREADS="1", JUPYTER_PREFER_ENV_PATH="1"), warm.kernels(modules=("numpy",)) as name:
        yield name, Path(os.environ["JUPYTER_PATH"].split(os.pathsep)[0])


def outputs(source, kernel, cwd=None, env=None):
    """What one cell shows."""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        client = NotebookClient(nb, kernel_name=kernel, resources={"metadata": {"path": str(cwd or ".")}},
                                config=Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/k"}}))
        client.execute(env={**os.environ, **(env or {})})
    return nb.cells[0].outputs


def who(kernel, **options):
    return json.loads(outputs(WHO, kernel, **options)[0].text)


def gone(pid, seconds=5):
    """Whether a process ends within some seconds (a zombie has ended)."""
    for _ in range(int(seconds * 20)):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def zygote_of(folder):
    """Process id of the zygote that serves a folder."""
    return next(int(p.parent.name) for p in Path("/proc").glob("[0-9]*/cmdline") if f"zygote.py\0{folder}\0".encode() in p.read_bytes())


@contextmanager
def started(kernel):
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        manager = KernelManager(kernel_name=kernel, transport="ipc", ip=f"{folder}/k")
        manager.start_kernel()
        client = manager.client()
        client.start_channels()
        try:
            client.wait_for_ready(60)
            yield manager, client
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)


def test_a_notebook_shows_the_same(name, tmp_path):
    cold, hot = (outputs(CHAPTER, kernel, cwd=tmp_path) for kernel in ("python3", name))
    assert [o.output_type for o in hot] == ["stream", "stream", "execute_result", "display_data"]
    for a, b in zip(cold, hot, strict=True):
        if "data" in a:
            assert a.data.get("image/png") == b.data.get("image/png")
            assert [t.split(" at ")[0] for t in a.data.values()] == [t.split(" at ")[0] for t in b.data.values()]
        else:
            assert a.text == b.text


def test_two_at_once_draw_different_numbers_in_their_own_folder_and_environment(name, tmp_path):
    for word in "ab":
        (tmp_path / word).mkdir()
    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map(lambda word: who(name, cwd=tmp_path / word, env={"WORD": word}), "ab")
    assert a["warm"] and b["warm"]
    assert (a["cwd"], a["word"], b["cwd"], b["word"]) == (str(tmp_path / "a"), "a", str(tmp_path / "b"), "b")
    assert not set(a["draws"]) & set(b["draws"])
    assert gone(a["pid"]) and gone(b["pid"])


def test_another_environment_at_import_gives_an_ordinary_kernel(name):
    assert not who(name, env={"OMP_NUM_THREADS": "2"})["warm"]


def test_interrupt_and_restart(name):
    with started(name) as (manager, client):
        client.execute("import time\nprint('go', flush=True)\nfor _ in range(600): time.sleep(0.1)")
        while client.get_iopub_msg(timeout=30)["msg_type"] != "stream":                 # an interrupt before the cell runs is nobody's
            pass
        manager.interrupt_kernel()
        assert client.get_shell_msg(timeout=30)["content"]["ename"] == "KeyboardInterrupt"
        manager.restart_kernel(now=True)
        client.wait_for_ready(30)
        assert client.execute_interactive("1 + 1", timeout=30)["content"]["status"] == "ok"


def test_a_crash_is_reported_and_a_killed_client_takes_its_kernel_along(name):
    with pytest.raises(DeadKernelError):
        outputs("import os; os.kill(os.getpid(), 9)", name)
    with started(name) as (manager, client):
        client.execute("import os; os._exit(7)")
        deadline = time.monotonic() + 10
        while manager.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert manager.provisioner.process.poll() == 7
    with started(name) as (manager, client):
        reply = client.execute_interactive("", user_expressions={"pid": "__import__('os').getpid()"}, timeout=10)
        manager.provisioner.process.kill()
        assert gone(int(reply["content"]["user_expressions"]["pid"]["data"]["text/plain"]))


def test_papermill_takes_the_name_and_does_not_store_it(name, tmp_path):
    metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")], metadata=metadata)
    nbformat.write(nb, tmp_path / "in.ipynb")
    done = papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", kernel_name=name, progress_bar=False)
    assert done.cells[0].outputs[0].data["text/plain"] == "2" and warm.NAME not in (tmp_path / "out.ipynb").read_text()


def test_without_a_zygote_an_ordinary_kernel_starts_and_nothing_is_left_behind():
    before = os.environ.get("JUPYTER_PATH")
    with pytest.raises(KeyError), light() as (name, folder):
        assert folder.stat().st_mode & 0o777 == 0o700
        with started(name) as (manager, _):
            os.kill(zygote_of(folder), signal.SIGKILL)
            deadline = time.monotonic() + 5
            while manager.is_alive() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not manager.is_alive(), "the end of the zygote is the end of its kernels, and Jupyter hears of it"
        assert not who(name)["warm"]
        raise KeyError("the block fails")
    assert not folder.exists() and os.environ.get("JUPYTER_PATH") == before


def test_the_zygote_ends_with_its_parent():
    program = "import os, time\nfrom frozenfilters import warm\nwith warm.kernels(modules=()): print(os.environ['JUPYTER_PATH'], flush=True); time.sleep(60)"
    with settings(FROZENFILTERS_WARM="1", OMP_NUM_THREADS="1"):
        parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    folder = Path(parent.stdout.readline().strip().split(os.pathsep)[0])
    zygote = zygote_of(folder)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(zygote) and not folder.exists()


def test_it_can_be_switched_off_and_is_off_where_a_gpu_is(monkeypatch):
    monkeypatch.delenv("FROZENFILTERS_WARM", raising=False)
    monkeypatch.setattr(warm, "_gpu", lambda: False)
    assert warm.available()
    monkeypatch.setattr(warm, "_gpu", lambda: True)
    assert not warm.available()
    monkeypatch.setenv("FROZENFILTERS_WARM", "1")
    assert warm.available()
    monkeypatch.setenv("FROZENFILTERS_WARM", "0")
    with warm.kernels() as name:
        assert name == "python3"
    monkeypatch.setenv("FROZENFILTERS_WARM", "yes")
    with pytest.raises(ValueError, match="neither 0"):
        warm.available()


def test_imports_that_fail_or_start_threads_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("FROZENFILTERS_WARM", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "broken.py").write_text("raise RuntimeError('no such luck')")
    (tmp_path / "threaded.py").write_text("import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()")
    for module, message in {"broken": "no such luck", "threaded": "OMP_NUM_THREADS=1"}.items():
        with pytest.warns(UserWarning, match=message), warm.kernels(modules=(module,)) as name:
            assert name == "python3"


def test_ratios_are_tables(monkeypatch):
    monkeypatch.setattr(warm, "_cpu_seconds", lambda program: float(len(program)))
    assert list(warm.import_ratio(1).columns) == ["torch_s", "package_s", "used_s", "ratio", "used_ratio"]
