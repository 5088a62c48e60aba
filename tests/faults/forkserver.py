"""Fresh processes without the seconds that torch takes to load: multiprocessing's fork server has imported everything.

child = server.start("--run.dir=x", hook=Hook(at=7))      # `python train.py --run.dir=x`, killed at its 7th operation
done = child.end()                                        # a CompletedProcess; returncode 137
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from common.errors import run_main
from tests.faults.hook import Hook, install
from tests.faults.started import ROOT, Running, shell_code


class Child(Running):
    """A process that the server has forked."""

    def __init__(self, process: Any, out: Path, err: Path) -> None:
        self.process, self.pid, self.out, self.err = process, process.pid, out, err

    def poll(self, within: float = 0) -> int | None:
        self.process.join(within)
        return shell_code(self.process.exitcode)


class ForkServer:
    """Starts the server in a `with`; kills what it has forked at the end."""

    def __enter__(self) -> ForkServer:
        self.context = multiprocessing.get_context("forkserver")
        packages = [str(ROOT / name) for name in ("data", "model", "training", "inspection")]
        ours = [module.name for path in packages for module in pkgutil.walk_packages([path], f"{Path(path).name}.")]
        others = ["matplotlib.backends.backend_agg", "matplotlib.figure", "torch._dynamo", __name__]
        self.context.set_forkserver_preload(["train", "sample", "attend", *ours, *others])
        threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        with pytest.MonkeyPatch.context() as patch:  # a fork takes only one thread along
            for name, value in {**threads, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"}.items():
                patch.setenv(name, value)
            multiprocessing.forkserver.ensure_running()
        self.children: list[Child] = []
        self.temporary, self.numbers = tempfile.TemporaryDirectory(), itertools.count()
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.process.kill()
            child.process.join()
        self.temporary.cleanup()

    def start(
        self,
        *argv: object,
        script: str = "train.py",
        hook: Hook | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        powerless: bool = False,
    ) -> Child:
        """Fork a process that runs `script` with these arguments.

        Args:
            hook: a fault that the process injects into itself.
            env: in addition to the current environment.
            powerless: without root's rights, so that permissions hold for it too.
        """
        out, err = (Path(self.temporary.name) / f"{next(self.numbers)}.{name}" for name in ("out", "err"))
        command, variables = [script, *map(str, argv)], {**os.environ, **(env or {})}
        process = self.context.Process(target=become, args=(command, (out, err), variables, cwd, hook, powerless))
        process.start()
        self.children.append(Child(process, out, err))
        return self.children[-1]

    def run(self, *argv: object, timeout: float = 120, **how: Any) -> subprocess.CompletedProcess[str]:
        """Start a process and wait for its end."""
        return self.start(*argv, **how).end(timeout)


def become(
    command: list[str], files: tuple[Path, Path], env: dict[str, str], cwd: Path, hook: Hook | None, powerless: bool
) -> None:
    """Turn this forked process into `python SCRIPT ...`."""
    os.setsid()
    for descriptor, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if powerless:  # give up every capability (capabilities(7)), such as root's to write where nobody may
        version_3, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None, use_errno=True).capset(version_3, none) == 0, os.strerror(ctypes.get_errno())
    if hook:
        install(hook)
    sys.argv = command
    try:
        run_main(importlib.import_module(command[0].removesuffix(".py")).main)
    finally:
        atexit._run_exitfuncs()
