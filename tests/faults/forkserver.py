"""Fresh processes for the fault suite without the seconds that torch takes to load.

One process, the server, imports everything, opens no thread, and forks a child for each request; the child becomes
`python train.py ...` in all that matters: `run_main`, its own session, stdout and stderr in files, threads and exit
handlers waited for. The tests' side (`ForkServer`, `Child`) and the server's (`main`) talk in lines of JSON over a
socket. When the tests' side goes away, however it ends, the server kills what it started and ends too.

    with ForkServer() as server:
        child = server.start("--run.dir=x", hook=Hook(at=7))      # killed just before the 7th operation of a save
        done = child.end()                                        # a CompletedProcess; returncode 137
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import gc
import importlib
import itertools
import json
import os
import pkgutil
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from tests.faults.hook import Hook, install
from tests.faults.started import ROOT, Running, shell_code


class Child(Running):
    """A process that the server has forked."""

    def __init__(self, server: ForkServer, pid: int, out: Path, err: Path) -> None:
        self.server, self.pid, self.out, self.err = server, pid, out, err
        self.code: int | None = None

    def poll(self, within: float = 0) -> int | None:
        if self.code is None:  # the server tells it once
            code = self.server.ask({"do": "wait", "pid": self.pid, "timeout": within}, within)["code"]
            self.code = None if code is None else shell_code(code)
        return self.code


class ForkServer:
    """The tests' side: starts the server, asks it for processes, ends it."""

    def __enter__(self) -> ForkServer:
        ours, theirs = socket.socketpair()
        threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.faults.forkserver", str(theirs.fileno())],
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal is for the tests alone
            env={**os.environ, **threads, "OMP_WAIT_POLICY": "PASSIVE", "MPLBACKEND": "Agg"},
        )
        theirs.close()
        self.socket, self.numbers = ours, itertools.count()
        self.lines = ours.makefile("r", encoding="utf-8")
        self.temporary = tempfile.TemporaryDirectory()
        ours.settimeout(120)
        hello = self.lines.readline()
        assert hello, "the fork server could not be started; what it says on stderr tells why"
        assert json.loads(hello)["threads"] == 1, hello  # a fork takes only one of them along
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.socket.close()  # which the server takes as its end
        self.process.wait(30)
        self.temporary.cleanup()

    def ask(self, request: Mapping[str, Any], patience: float = 0) -> dict[str, Any]:
        """The answer to a request."""
        self.socket.settimeout(30 + patience)
        self.socket.sendall(json.dumps(request).encode() + b"\n")
        answer: dict[str, Any] = json.loads(self.lines.readline())
        return answer

    def start(
        self,
        *argv: object,
        script: str = "train.py",
        hook: Hook | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        powerless: bool = False,
        largest_file: int = 0,
    ) -> Child:
        """Fork a process that runs `script` with these arguments.

        Args:
            hook: harm that the process does to itself.
            env: on top of the environment of now.
            powerless: root's rights are dropped first, so that permissions hold for it too.
            largest_file: RLIMIT_FSIZE in bytes; 0 sets none.
        """
        out, err = (Path(self.temporary.name) / f"{next(self.numbers)}.{name}" for name in ("out", "err"))
        request = {
            **{"do": "start", "argv": [script, *map(str, argv)], "out": str(out), "err": str(err), "cwd": str(cwd)},
            **{"env": {**os.environ, **(env or {})}, "hook": dataclasses.asdict(hook) if hook else None},
            **{"powerless": powerless, "largest_file": largest_file},
        }
        return Child(self, int(self.ask(request)["pid"]), out, err)

    def run(self, *argv: object, timeout: float = 120, **how: Any) -> subprocess.CompletedProcess[str]:
        """Start a process and wait for its end."""
        return self.start(*argv, **how).end(timeout)


# ---- the side of the server ----


def main(descriptor: int) -> None:
    """Serve requests until the socket closes. In a forked child: run what was asked for, and return."""
    for name in (
        *("train", "sample", "attend", "matplotlib.backends.backend_agg", "matplotlib.figure", "torch._dynamo"),
        *(found.name for part in ("data", "model", "training", "inspection") for found in modules(part)),
    ):
        importlib.import_module(name)
    gc.freeze()  # what is there stays in shared memory
    asked = serve(socket.socket(fileno=descriptor))
    if asked is not None:
        become(asked)


def modules(package: str) -> list[pkgutil.ModuleInfo]:
    """All modules of a package of ours."""
    return list(pkgutil.walk_packages([str(ROOT / package)], f"{package}."))


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Answer requests; the request itself in a forked child, None at the end."""
    threads = len(os.listdir("/proc/self/task"))
    lines, running = connection.makefile("r", encoding="utf-8"), set()
    connection.sendall(json.dumps({"threads": threads}).encode() + b"\n")
    for line in lines:
        request = json.loads(line)
        if request["do"] == "start":
            pid = os.fork()
            if not pid:
                lines.close()
                connection.close()
                return dict(request)
            running.add(pid)
            answer: dict[str, Any] = {"pid": pid}
        else:
            answer = {"code": wait(request["pid"], request["timeout"], connection)}
            if answer["code"] is not None:
                running.discard(request["pid"])
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(json.dumps(answer).encode() + b"\n")
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        wait(pid, 10, None)
    return None


def wait(pid: int, timeout: float, connection: socket.socket | None) -> int | None:
    """The exit status of a child, or None if it lives on; with it ends what it started and left behind.

    Waiting ends early when `connection` stirs: whoever asked has gone away.
    """
    handle = os.pidfd_open(pid)
    try:
        waited: list[Any] = [handle, *([connection] if connection else [])]
        if handle not in select.select(waited, [], [], timeout)[0]:
            return None
    finally:
        os.close(handle)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def become(request: Mapping[str, Any]) -> None:
    """Turn this forked process into `python SCRIPT ...`."""
    from common.errors import run_main

    os.setsid()
    for descriptor, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if request["largest_file"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does on its own
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    if request["powerless"]:
        drop_rights()
    if request["hook"]:
        install(Hook(**request["hook"]))
    sys.argv, code = list(request["argv"]), 0
    try:
        run_main(importlib.import_module(sys.argv[0].removesuffix(".py")).main)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)


def leave(code: int) -> NoReturn:
    """What the interpreter does when a program ends, but for taking itself apart: that would copy all its memory."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def drop_rights() -> None:
    """Give up every capability (capabilities(7)), such as root's to write where nobody may."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    nothing = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 of them
    assert ctypes.CDLL(None, use_errno=True).capset(header, nothing) == 0, os.strerror(ctypes.get_errno())


if __name__ == "__main__":
    main(int(sys.argv[1]))
