"""A process with the heavy imports done that forks a Jupyter kernel whenever one is asked for.

Run by `warm.kernels()` as `python zygote.py FOLDER PARENT MODULE...`; `zygote_client.py` asks through the UNIX socket in FOLDER. A fork copies everything:
memory, environment, open files, generators. So the child takes over its caller's folder, environment and standard streams, closes what was the zygote's, gets
back Python's own signal handlers and draws new seeds; then it is an ordinary ipykernel. What a library reads once, when it is imported, cannot be taken over:
a caller with another `OMP_NUM_THREADS` or `PYTHONPATH` is declined and gets an ordinary kernel, and so is everybody when an import has started a thread.
"""
from __future__ import annotations

import atexit
import gc
import importlib
import importlib.util
import json
import os
import random
import selectors
import shutil
import signal
import socket
import struct
import sys
import threading
import traceback

READ_AT_IMPORT = ("PYTHON", "LD_", "DYLD_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "MALLOC_", "GLIBC_", "TORCH", "PYTORCH_", "ATEN_",
                  "DNNL_", "ONEDNN_", "PYDEVD_", "MPL", "MATPLOTLIB", "LANG", "LC_", "TZ", "HOME", "XDG_")
KERNEL = ("ipykernel.kernelapp", "ipykernel.debugger", "ipykernel.ipkernel", "ipykernel.zmqshell", "tornado.platform.asyncio", "sqlite3",
          "IPython.core.completerlib", "IPython.core.debugger", "IPython.extensions.storemagic")     # what a kernel has imported before its first cell
QUIET = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)


def fixed(env) -> dict:
    """The part of an environment that libraries read when they are imported.

    >>> fixed({"OMP_NUM_THREADS": "1", "USER": "ada"})
    {'OMP_NUM_THREADS': '1'}
    """
    return {key: value for key, value in env.items() if key.startswith(READ_AT_IMPORT)}


def threads() -> int:
    """Threads of this process, those of C libraries too where the system tells."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()


class Zygote:
    """Listens in `folder` for requests until the process `parent` is gone or SIGTERM comes.

    Attributes:
        env: the environment that the imports saw, and `added` what they left in it.
        kernels: process id -> connection to the client (None once it has hung up).
    """
    def __init__(self, folder: str, parent: int, env: dict):
        self.folder, self.parent, self.env, self.kernels = folder, parent, env, {}
        self.added = {key: value for key, value in os.environ.items() if key not in env}
        self.wake, self.waker = socket.socketpair()
        for end in (self.wake, self.waker):
            end.setblocking(False)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(os.path.join(folder, "socket"))
        self.listener.listen(64)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, self.answer)
        self.selector.register(self.wake, selectors.EVENT_READ, self.reap)
        self.child = None

    def serve(self) -> dict:
        """Answer requests; return, in each forked child, the request that it is to run. In the zygote itself this ends with SystemExit."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.waker.fileno(), warn_on_full_buffer=False)
        while os.getppid() == self.parent:
            for key, _ in self.selector.select(timeout=1):
                key.data(key.fileobj)
                if self.child:
                    return self.child
        sys.exit(0)

    def answer(self, listener: socket.socket) -> None:
        """Fork a kernel for a client, or decline."""
        client, _ = listener.accept()
        streams = []
        try:
            client.settimeout(5)
            head, streams, _, _ = socket.recv_fds(client, 4, 3)
            with client.makefile("rb") as file:
                request = json.loads(file.read(struct.unpack("!I", head)[0]))
            if not self.suits(request) or threads() > 1:
                client.sendall(struct.pack("!i", 0))
                client.close()
                return
            client.sendall(struct.pack("!i", 1))
            self.fork(client, streams, request)
        except (OSError, ValueError, struct.error):                     # a client that died while it asked
            client.close()
        finally:
            for fd in streams if not self.child else ():
                os.close(fd)

    def suits(self, request: dict) -> bool:
        """Whether the imports would have gone the same way for this caller."""
        theirs, ours = {**self.added, **request["env"]}, {**self.added, **self.env}     # the caller may have imported the same libraries meanwhile
        return fixed(theirs) == fixed(ours) and not os.path.exists(os.path.join(request["cwd"], "matplotlibrc"))

    def fork(self, client: socket.socket, streams: list, request: dict) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, QUIET)                 # no handler of the zygote may run in the child
        try:
            pid = os.fork()
            if pid:
                os.setpgid(pid, pid)
                self.kernels[pid] = client
                self.selector.register(client, selectors.EVENT_READ, lambda _: self.listen(pid))
            else:
                try:
                    self.become(client, streams, request)
                except BaseException:                                   # nothing may return into the zygote's loop
                    traceback.print_exc()
                    os._exit(1)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, QUIET)

    def become(self, client: socket.socket, streams: list, request: dict) -> None:
        """In the child: take over what is the caller's, give up what is the zygote's."""
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for n in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(n, signal.SIG_DFL)
        for fd, stream in enumerate(streams):
            os.dup2(stream, fd)
            os.close(stream)
        for mine in (client, self.wake, self.waker, self.listener, self.selector, *filter(None, self.kernels.values())):
            mine.close()
        self.child, self.kernels = request, {}
        os.environ.clear()
        os.environ.update({**self.added, **request["env"]})
        os.chdir(request["cwd"])
        reseed()

    def listen(self, pid: int) -> None:
        """Forward signals of a client to its kernel; kill the kernel of a client that is gone."""
        client = self.kernels.get(pid)
        if client is None:                                              # ended a moment ago
            return
        try:
            data = client.recv(64)
        except OSError:
            data = b""
        for n in data or [signal.SIGKILL]:
            kill(pid, n)
        if not data:
            self.hang_up(pid)

    def hang_up(self, pid: int) -> None:
        client, self.kernels[pid] = self.kernels[pid], None
        self.selector.unregister(client)
        client.close()

    def reap(self, wake: socket.socket | None = None) -> None:
        """Tell the clients of kernels that have ended how they ended."""
        if wake:
            wake.recv(4096)
        for pid in list(self.kernels):
            done, status = os.waitpid(pid, os.WNOHANG if wake else 0)
            if done:
                if client := self.kernels[pid]:
                    try:
                        client.send(struct.pack("!i", os.waitstatus_to_exitcode(status)))
                    except OSError:
                        pass
                    self.hang_up(pid)
                del self.kernels[pid]

    def close(self) -> None:
        """Kill the kernels, remove the folder."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for pid in self.kernels:
            kill(pid, signal.SIGKILL)
        self.reap()
        shutil.rmtree(self.folder, ignore_errors=True)


def kill(pid: int, n: int) -> None:
    """Send a signal to a kernel and what it started; until it is reaped the number is its own."""
    try:
        os.killpg(pid, n)
    except (ProcessLookupError, PermissionError):
        pass


def reseed() -> None:
    """New seeds from the system for the global generators: two kernels must not draw the same numbers."""
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()


def run(argv: list, parent: int) -> None:
    """Be an ipykernel; end the process without freeing memory piece by piece, which takes a second when torch is loaded."""
    sys.argv = [importlib.util.find_spec("ipykernel_launcher").origin, *argv]
    app, status = sys.modules["ipykernel.kernelapp"].IPKernelApp, 0
    try:
        app.launch_instance(argv=[*argv, f"--IPKernelApp.parent_handle={parent}"])
        app.instance().control_thread.stop()                            # ipykernel stops this thread last, though it may still wait for the others: seconds
        app.instance().control_thread.join(5)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:                                                            # as multiprocessing ends its forks
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.__stdout__.flush()
        sys.__stderr__.flush()
        os._exit(status)


def main(folder: str, parent: str, *modules: str) -> None:
    sys.path.pop(0)                                                     # the package's folder: its modules are not top-level ones
    env = dict(os.environ)
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")        # as a kernel has it when matplotlib is imported
    for name in (*KERNEL, *modules):
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    zygote, own = Zygote(folder, int(parent), env), os.getpid()
    gc.collect()
    gc.freeze()                                                         # leaves the shared pages alone
    print("ready", threads(), flush=True)
    try:
        request = zygote.serve()
    finally:
        if os.getpid() == own:
            zygote.close()
    run(request["argv"], own)


if __name__ == "__main__":
    main(*sys.argv[1:])
