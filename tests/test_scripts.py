"""sample.py and the scripts as a user meets them: what they print and what they refuse."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import attend
from common.errors import quote_arg
from tests.runs import ROOT, TINY, error_line, output, process, python, script


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run over several documents, by characters."""
    root = tmp_path_factory.mktemp("scripts")
    for k in range(6):
        (root / f"text{k}.txt").write_text(f"Tale {k}. The fox met the hen. The hen met the fox. " * 8)
    output("train.py", *TINY, f"--data.source={root / '*.txt'}", f"--run.dir={root / 'run'}")
    return root / "run"


def test_same_seed_same_text(run: Path) -> None:
    options = ("--prompt=The ", "--tokens=40")
    first, again, other = (script("sample.py", run, *options, f"--seed={s}").stdout for s in (1, 1, 2))
    assert first == again != other
    assert first.startswith("The ") and len(first) > len("The \n")
    assert len({script("sample.py", run, "--temperature=0", f"--seed={s}", *options).stdout for s in (1, 2)}) == 1


def test_character_that_the_vocabulary_lacks_is_named(run: Path) -> None:
    assert "\N{FOX FACE}" in error_line(script("sample.py", run, "--prompt=a \N{FOX FACE}"), 2)


@pytest.mark.parametrize(("given", "used"), [(None, "1000"), ("7", "7")])
def test_threads_wait_without_long_spinning(given: str | None, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", given or "")  # restored at the end of the test
    if given is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    for name in ("train.py", "sample.py", "attend.py", "export.py"):
        assert script(name, "--help").returncode == script(name, "-h").returncode == 0
        assert os.environ["GOMP_SPINCOUNT"] == used


@pytest.mark.parametrize("name", ["sample.py", "attend.py"])
def test_folder_without_a_run_is_named(name: str, tmp_path: Path) -> None:
    assert "has no checkpoint" in error_line(script(name, tmp_path), 4)
    (tmp_path / "one" / "checkpoints" / "000006").mkdir(parents=True)
    assert f"it contains {tmp_path / 'one'}" in error_line(script(name, tmp_path), 4)
    assert "is not a folder" in error_line(script(name, tmp_path / "nothing"), 4)
    assert "is not a run folder" in error_line(script("train.py", f"--run.resume={tmp_path}"), 4)


@pytest.mark.parametrize(
    "words", ["train", "sample", "export", "attend", *(f"attend {name}" for name in attend.COMMANDS)]
)
def test_every_option_has_its_help(words: str) -> None:
    name, *command = words.split()
    shown = script(f"{name}.py", *command, "--help").stdout
    options = re.findall(r"(--[\w.-]+) [^\n]*?[\s│]+(\S[^\n]*)", shown)
    assert options and not [option for option, text in options if text.startswith("(default")]
    if name == "attend":
        assert f"python attend.py {''.join(command) or '[COMMAND]'} RUN" in shown and "A run folder" in shown
        assert command or all(word in shown for word in (*attend.COMMANDS, "--prompt"))


def test_ascii_terminal(run: Path) -> None:
    """No UTF-8, no display: the same words, in the characters that there are."""
    env = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "DISPLAY": ""}
    done = process("attend.py", run, "--prompt", "The fox met", env=env)
    assert done.returncode == 0 and done.stdout.isascii(), done.stderr
    assert process("sample.py", run, "--tokens=20", env=env).stdout == script("sample.py", run, "--tokens=20").stdout


def test_closed_pipe_is_not_an_error(run: Path) -> None:
    command = f"{sys.executable} sample.py {run} --tokens=300 --samples=40 | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("--- 1 ---\n", "")


@pytest.mark.parametrize("argv", [("-P", "train.py"), ("-I", "sample.py"), ("-I", "attend.py")])
def test_scripts_find_their_modules_with_a_safe_path(argv: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / argv[1]).symlink_to(ROOT / argv[1])
    command = [sys.executable, argv[0], argv[1], "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr


ON_WINDOWS = (
    "import os, signal, sys; sys.modules.update(fcntl=None, resource=None)\n"
    "for module, name in ((os, 'getuid'), (os, 'posix_fadvise'), (os, 'sysconf'), (signal, 'SIGHUP')): delattr(module, name)\n"
    "sys.argv.pop(0); sys.path.insert(0, ''); import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
)
"""Runs a script without what Windows lacks."""


def test_scripts_need_nothing_that_windows_lacks(tmp_path: Path) -> None:
    (tmp_path / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    run = str(tmp_path / "run")
    train = ("train.py", *TINY, f"--data.source={tmp_path / 'fox.txt'}", f"--run.dir={run}", "--train.steps=2")
    for argv in (train, ("sample.py", run), ("attend.py", "summary", run)):
        done = python(ON_WINDOWS, *argv)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "peak_memory_mb" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_arguments_are_quoted_for_the_shell_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (quote_arg("a b'c"), quote_arg(Path("a/b"))) == ("'a b'\"'\"'c'", "a/b")
    monkeypatch.setattr("os.name", "nt")
    assert (quote_arg("C:\\a b"), quote_arg("a\\b")) == ('"C:\\a b"', "a\\b")
