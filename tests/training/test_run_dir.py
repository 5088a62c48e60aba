"""The run folder: its name, its lock, and what it refuses to write through."""

import os
import shlex
import shutil
from pathlib import Path

import pytest

from common.errors import CONFIG, DATA, IN_USE, UserError
from tests.runs import TINY, error_line, python, script
from training.config import RunConfig, RunSettings
from training.run_dir import lock_folder, open_run_dir, save_config


def test_default_folder_is_the_next_free_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/mine", "runs/mine-2", "runs/mine-3"):
        with open_run_dir(RunConfig(), "mine") as config:
            assert config.run.dir == expected
            save_config(config)


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "samples.txt").write_text("mine")
    done = script("train.py", *TINY, f"--run.dir={tmp_path}")
    assert "holds other files, such as samples.txt" in error_line(done, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.txt"]


def test_failed_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for options in ((), ("--run.dir=a/b",)):
        error_line(script("train.py", *TINY, "--data.source=nowhere.txt", *options), DATA)
    assert not list(tmp_path.iterdir())


def test_quoted_commands_and_checkpoints_on_another_disk(tmp_path: Path) -> None:
    folder = tmp_path / "my run's (1)"
    (tmp_path / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    options = ("--log.attention=off", f"--data.source={tmp_path / 'fox.txt'}", f"--run.dir={folder}")
    *_, last = script("train.py", *TINY, *options).stdout.splitlines()
    assert shlex.split(last) == ["python", "sample.py", str(folder)]
    shutil.move(folder / "checkpoints", tmp_path / "disk")
    (folder / "checkpoints").symlink_to(tmp_path / "disk")
    done = script("train.py", f"--run.resume={folder}", "--train.steps=7")
    assert done.returncode == 0 and (tmp_path / "disk" / "000007").is_dir(), done.stderr


def test_folder_in_use_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys, train\n"
        "from common.errors import UserError\n"
        "try: train.main([f'--run.dir={sys.argv[1]}'])\n"
        "except UserError as error: print(error.exit_code, 'torch' in sys.modules, error)\n"
    )
    with lock_folder(tmp_path):
        out = python(program, tmp_path).stdout
    assert out.startswith(f"{IN_USE} False ") and f"in use by process {os.getpid()};" in out
    with lock_folder(tmp_path):
        pass


def test_restarted_job_resumes_its_own_run_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = RunConfig(run=RunSettings(dir="given"))
    for job, restarts in (("one", "0"), ("one", "1"), ("two", "1")):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        if job == "two":  # its first start was refused: the folder holds another job's run
            with pytest.raises(UserError, match="already holds a run"), open_run_dir(config, "mine"):
                pass
            continue
        with open_run_dir(config, "mine") as opened:
            assert opened.run.resume == ("given" if restarts == "1" else "")
            save_config(opened)
