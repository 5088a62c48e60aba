"""How a program ends: its exit code, its exit handlers, and a signal at the wrong moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import TURN

ENDING = """
import atexit, gc, sys
from common.errors import UserError, run_main

class Late:
    def __del__(self):
        print("taken down")

def main(argv):
    atexit.unregister(gc.freeze)  # with it nothing that Python collects is taken down anyway
    print("said", end="")
    {}

atexit.register(print, ", handled", end="")
late = Late()
run_main(main)
"""


@pytest.mark.parametrize(
    ("last", "code"),
    [("pass", 0), ("raise UserError('no', 4)", 4), ("raise KeyboardInterrupt", 130), ("sys.exit()", 0), ("1 / 0", 1)],
)
def test_a_process_of_many_ends_with_its_code_and_without_taking_python_down(last: str, code: int) -> None:
    """Threads of gloo that still hold a tensor would abort it, or wait for what waits for them."""
    command = [sys.executable, "-c", ENDING.format(last)]
    for rank in ({}, {"RANK": "0"}):
        ended = subprocess.run(command, env={**os.environ, **rank}, capture_output=True, text=True, timeout=60)
        assert ended.returncode == code, ended.stderr
        assert ended.stdout == "said, handled" + ("" if rank else "taken down\n")
        assert ("ZeroDivisionError" in ended.stderr) == (code == 1)


LOST = """
import os, signal, sys
from common.errors import UserError, end_if_asked, run_main

def main(argv):
    try:
        os.kill(os.getpid(), signal.{})
        import nothing_of_this_name
    except BaseException:
        pass
    print("went on", flush=True)
    {}
    print("to the end")

run_main(main)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("end_if_asked()", ""),
        ("pass", "to the end\n"),
        ("raise ImportError('loaded twice')", ""),
        ("raise UserError('waited for nobody', 8)", ""),
    ],
)
def test_a_signal_that_an_importer_took_for_a_missing_module_still_ends_the_program(
    name: str, then: str, said: str
) -> None:
    """Before anything is left behind; where nobody looks, at the end; or by what comes of it."""
    command = [sys.executable, "-c", LOST.format(name, then)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 128 + signal.Signals[name] and not ended.stderr
    assert ended.stdout == "went on\n" + said


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_waits_for_what_is_being_imported_and_not_for_longer(name: str, tmp_path: Path) -> None:
    """An exception in the middle of torch's import aborts the process, or is taken for something else."""
    (tmp_path / "slow_to_come.py").write_text(
        f"import os, signal, time\nos.kill(os.getpid(), signal.{name})\ntime.sleep(0.3)\nprint('came')"
    )
    program = (
        f"import sys, time\nsys.path.append({str(tmp_path)!r})\nfrom common.errors import run_main\n"
        "def main(argv):\n    import slow_to_come\n    time.sleep(30)\n    print('went on')\nrun_main(main)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20)
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + signal.Signals[name], "came\n", "")


def test_no_alarm_is_left_behind_when_the_program_ends_while_something_is_imported(tmp_path: Path) -> None:
    (tmp_path / "last.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)")
    program = (
        f"import atexit, sys, time\nsys.path.append({str(tmp_path)!r})\nfrom common.errors import run_main\n"
        "def slow():\n    time.sleep(0.3)\n    print('all')\natexit.register(slow)\n"
        "def main(argv):\n    import last\nrun_main(main)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20)
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + signal.SIGTERM, "all\n", "")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_during_exit_handlers_ends_the_program_without_a_word(name: str) -> None:
    program = (
        "import atexit, os, signal\nfrom common.errors import run_main\n"
        f"atexit.register(lambda: os.kill(os.getpid(), signal.{name}))\nrun_main(lambda argv: print('all', flush=True))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.Signals[name], "all\n", "")


def test_of_many_processes_with_a_wrong_setting_those_that_are_silent_let_the_first_one_speak() -> None:
    """torchrun ends all of them as soon as one has ended."""
    program = "from common.errors import UserError, run_main\ndef main(argv):\n raise UserError('no')\nrun_main(main)"
    for rank, least, said in (("1", TURN, ""), ("0", 0, "error: no\n")):
        begun, place = time.monotonic(), {"RANK": rank, "LOCAL_RANK": rank}
        ended = subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, **place}, capture_output=True, text=True, timeout=60
        )
        assert (ended.returncode, ended.stderr) == (2, said)
        assert time.monotonic() - begun >= least
