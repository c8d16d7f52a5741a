"""What Jupyter starts in place of a kernel: asks the zygote for one and stands in for it.

Run as `python -I -S zygote_client.py SOCKET -f CONNECTION_FILE...`, the tail being ipykernel's. It hands over the folder, the environment and the standard
streams that Jupyter gave it, forwards signals, and ends as the kernel ends; when it is killed, the zygote kills the kernel. When no zygote answers, or the
zygote declines, it becomes an ordinary kernel. Nothing but the standard library is imported, so that this takes milliseconds.
"""
import json
import os
import signal
import socket
import struct
import sys

PATIENCE = 20           # seconds to wait for an answer; the zygote is ready before anybody knows its address
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def number(server: socket.socket) -> int:
    """The next number from the zygote: 1 or 0 for yes or no, then the kernel's exit status."""
    data = server.recv(4)                               # sent in one piece
    if len(data) < 4:
        raise ConnectionError("the zygote is gone")
    return struct.unpack("!i", data)[0]


def ask(address: str, *argv: str) -> socket.socket | None:
    """The connection to a zygote that forked a kernel for us, or None."""
    request = json.dumps({"argv": argv, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()
    server = socket.socket(socket.AF_UNIX)
    try:
        server.settimeout(PATIENCE)
        server.connect(address)
        socket.send_fds(server, [struct.pack("!I", len(request))], [0, 1, 2])
        server.sendall(request)
        if number(server):
            return server
    except OSError:
        pass
    server.close()
    return None


def stand_in(server: socket.socket) -> int:
    """Forward signals until the kernel ends; its status, negative for a signal as in `subprocess`."""
    for n in FORWARDED:
        signal.signal(n, lambda n, _: server.send(bytes([n])))
    launcher = int(os.environ.get("JPY_PARENT_PID") or 0)
    server.settimeout(1)
    while True:
        try:
            return number(server)
        except TimeoutError:
            if launcher > 1 and os.getppid() != launcher:               # as an ordinary kernel does: nobody is left to talk to
                return 1
        except OSError:
            return 1


def leave(status: int) -> None:
    """End with this status: by the same signal, if one ended the kernel."""
    if status < 0:
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    connection = ask(*sys.argv[1:])
    if connection is None:
        os.execv(sys.executable, [sys.executable, "-m", "ipykernel_launcher", *sys.argv[2:]])
    leave(stand_in(connection))
