"""How a script starts and ends: exit codes, signals, exit handlers, and what it imports."""

import signal
from pathlib import Path

import pytest

from tests.runs import TINY, python

ENDING = """
import atexit, gc, sys
from common.errors import UserError, run_main

class Late:
    def __del__(self):
        print("torn down")

def main(argv):
    atexit.unregister(gc.freeze)  # with it nothing is torn down anyway
    print("ran", end="")
    {}

atexit.register(print, ", handled", end="")
late = Late()
run_main(main)
"""


@pytest.mark.parametrize(
    ("last", "code"),
    [("pass", 0), ("raise UserError('no', 4)", 4), ("sys.exit()", 0), ("1 / 0", 1)],
)
def test_exit_code_and_no_teardown_under_torchrun(last: str, code: int) -> None:
    for rank in ({}, {"RANK": "0"}):
        done = python(ENDING.format(last), **rank)
        assert done.returncode == code, done.stderr
        assert done.stdout == "ran, handled" + ("" if rank else "torn down\n")
        assert ("ZeroDivisionError" in done.stderr) == (code == 1)


def test_signal_during_an_import_exits_without_traceback(tmp_path: Path) -> None:
    """Also if the importing code catches every exception."""
    (tmp_path / "slow_module.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('lost')")
    program = ENDING.format("try: import slow_module\n    except BaseException: print('lost')")
    done = python(program, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "ran", "")


FIRST_STEP = """
import sys
import train
from training.trainer import Trainer

def train_step(self):
    real(self)
    print("loaded", *sorted(sys.modules))
    sys.exit()

real, Trainer.train_step = Trainer.train_step, train_step
train.main(sys.argv[1:])
"""


def test_first_step_imports_nothing_unused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The fox met the hen. " * 50)
    done = python(FIRST_STEP, *TINY, f"--data.source={tmp_path / 'text.txt'}", f"--run.dir={tmp_path / 'run'}")
    modules = next((line for line in done.stdout.splitlines() if line.startswith("loaded")), "").split()
    assert "torch" in modules, done.stderr
    unused = {"wandb", "matplotlib", "tiktoken", "tokenizers", "transformers", "pandas", "torch._dynamo", "sympy"}
    assert not unused & set(modules)
