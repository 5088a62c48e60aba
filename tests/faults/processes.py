"""Processes whose output goes to files: scripts forked from a server that has imported torch already, and commands.

child = start("--run.dir=x", hook=Hook(at=7))  # `python train.py --run.dir=x`, killed at its 7th operation
done = child.end()                             # a CompletedProcess; returncode 137
"""

import atexit
import contextlib
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.errors import run_main
from tests.faults.hook import Hook, install
from tests.runs import ROOT

KILLED = 128 + signal.SIGKILL  # the exit code of a process that was killed
MARK, WORD = "GLASSGPT_FAULTS", str(os.getpid())  # in the environment of every command, so of all that it starts
OUTPUT = tempfile.TemporaryDirectory()
commands: list[subprocess.Popen[bytes]] = []


class Running:
    """A process. `wait(seconds)` is its return code, or None if it is still running then."""

    def __init__(self, pid: int | None, wait: Callable[[float], int | None], out: Path, err: Path) -> None:
        assert pid is not None
        self.pid, self.wait, self.out, self.err = pid, wait, out, err

    def poll(self, within: float = 0) -> int | None:
        """Its exit code as a shell reports it, or None if it is still running after so many seconds."""
        code = self.wait(within)
        return 128 - code if code is not None and code < 0 else code

    def send(self, number: int) -> None:
        """Send it a signal."""
        kill(self.pid, number)

    def texts(self) -> tuple[str, str]:
        """Its stdout and stderr so far."""
        return self.out.read_text("utf-8", "replace"), self.err.read_text("utf-8", "replace")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition, named `what` in the error; fail if the process ends first."""
        deadline = time.monotonic() + allowed(90)
        while not condition():
            code = self.poll()
            assert code is None or condition(), (f"ended with {code} before: {what}", *self.texts())
            assert time.monotonic() < deadline, (f"too late: {what}", *self.texts())
            time.sleep(0.002)

    def end(self, within: float = 120) -> subprocess.CompletedProcess[str]:
        """Wait for its end."""
        code = self.poll(allowed(within))
        assert code is not None, (f"still running after {allowed(within)} s", *self.texts())
        return subprocess.CompletedProcess("", code, *self.texts())


def start_server() -> None:
    """Start multiprocessing's fork server, which imports everything."""
    paths = [path for name in ("data", "model", "training", "inspection") for path in (ROOT / name).rglob("*.py")]
    ours = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    others = ["train", "sample", "attend", "matplotlib.backends.backend_agg", "matplotlib.figure", "torch._dynamo"]
    multiprocessing.get_context("forkserver").set_forkserver_preload([*ours, *others, __name__])
    multiprocessing.forkserver.ensure_running()


def output_files() -> list[Path]:
    """Files for stdout and stderr."""
    folder = Path(tempfile.mkdtemp(dir=OUTPUT.name))
    files = [folder / "out", folder / "err"]
    for file in files:
        file.touch()
    return files


def start(
    *argv: object, script: str = "train.py", hook: Hook | None = None, env: Mapping[str, str] = {}, cwd: Path = ROOT
) -> Running:
    """Fork a process that runs `script` with these arguments; `hook` is a fault that it injects into itself."""
    files = output_files()
    args = ([script, *map(str, argv)], files, env, cwd, hook)
    process = multiprocessing.get_context("forkserver").Process(target=become, args=args)
    process.start()

    def wait(seconds: float) -> int | None:
        process.join(seconds)
        return process.exitcode

    return Running(process.pid, wait, *files)


def become(command: list[str], files: list[Path], env: Mapping[str, str], cwd: Path, hook: Hook | None) -> None:
    """Turn this forked process into `python SCRIPT ...`."""
    os.setsid()
    for descriptor, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(cwd)
    os.environ.update(env)
    if hook:
        install(hook)
    sys.argv = command
    try:
        run_main(importlib.import_module(command[0].removesuffix(".py")).main)
    finally:
        atexit._run_exitfuncs()


def run_script(*argv: object, **how: Any) -> subprocess.CompletedProcess[str]:
    """`start` a process and wait for its end."""
    return start(*argv, **how).end()


def launch(*command: object, env: Mapping[str, str] = {}, **how: Any) -> Running:
    """Start a command as a user, a scheduler or torchrun does. `how`: further arguments of `Popen`."""
    files = output_files()
    with files[0].open("wb") as out, files[1].open("wb") as err:
        how = {"cwd": ROOT, "stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, **how}
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", MARK: WORD, **env}
        process = subprocess.Popen([*map(str, command)], start_new_session=True, env=variables, **how)
    commands.append(process)

    def wait(seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        return process.returncode

    return Running(process.pid, wait, *files)


def train(*argv: object, **how: Any) -> Running:
    """`python train.py ...` without the fork server."""
    return launch(sys.executable, ROOT / "train.py", *argv, **how)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_all() -> None:
    """End whatever a test has left."""
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    for pid in living():
        kill(pid)
    while commands:
        commands.pop().wait(30)


def living() -> list[int]:
    """The commands that are still running, and every process that they have started, orphans included."""
    pids = map(int, filter(str.isdecimal, os.listdir("/proc")))
    return [pid for pid in pids if environment(pid).get(MARK) == WORD]


def nobody_left(within: float = 10) -> None:
    """Assert that every process of every command ends in time."""
    deadline = time.monotonic() + allowed(within)
    while left := living():
        assert time.monotonic() < deadline, [(pid, proc(pid, "cmdline")) for pid in left]
        time.sleep(0.02)


def allowed(seconds: float) -> float:
    """Seconds that something promised within `seconds` may take here and now: longer on a busy machine."""
    return seconds * max(1.0, 1.5 * os.getloadavg()[0] / (os.cpu_count() or 1))


def proc(pid: int, name: str) -> str:
    """A file of /proc about a process; empty for one that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes().decode("utf-8", "replace")
    return ""


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    return dict(word.split("=", 1) for word in proc(pid, "environ").split("\0") if "=" in word)
