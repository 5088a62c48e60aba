"""The run folder: its name, its lock, its mark, and what it refuses to write through."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import CHECKPOINT, CONFIG, IN_USE, UserError
from tests.runs import ROOT, said, script
from training.config import RunConfig, RunSettings
from training.run_dir import claim_run_dir, open_run_dir, save_config

HOLD = """
import sys, time
from pathlib import Path
from training.run_dir import lock_folder
lock = lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that has locked a folder."""
    folder = tmp_path / "busy"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    yield folder, process
    process.kill()
    process.wait()


def test_a_run_without_a_folder_takes_the_next_free_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/mine", "runs/mine-2", "runs/mine-3"):
        config, lock = claim_run_dir(RunConfig(), "mine")
        assert config.run.dir == expected
        save_config(config)
        lock.close()


def test_a_name_that_another_trainer_is_about_to_use_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: tuple[Path, subprocess.Popen[str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(holder[0])
    config, lock = claim_run_dir(RunConfig(), "mine")
    assert config.run.dir == "runs/mine-2"
    lock.close()


def test_a_second_trainer_is_refused_at_once_and_the_first_is_named(
    holder: tuple[Path, subprocess.Popen[str]],
) -> None:
    folder, process = holder
    script("train.py", "--train.steps=x")  # what is imported is imported
    start = time.process_time()  # the processor's time: the tests share the machine with others
    line = said(script("train.py", f"--run.dir={folder}"), IN_USE)
    assert time.process_time() - start < 2
    assert f"in use by process {process.pid};" in line


def test_the_lock_dies_with_its_process(holder: tuple[Path, subprocess.Popen[str]]) -> None:
    folder, process = holder
    process.kill()
    process.wait()
    _, lock = claim_run_dir(RunConfig(run=RunSettings(dir=str(folder))), "x")
    assert (folder / "lock").read_text().splitlines()[0] == str(os.getpid())
    lock.close()


def test_the_lock_is_taken_before_torch_is_loaded(holder: tuple[Path, subprocess.Popen[str]]) -> None:
    program = (
        "import sys; sys.argv = ['train.py', f'--run.dir={sys.argv[1]}']\n"
        "import train\n"
        "from common.errors import UserError\n"
        "try: train.main(sys.argv[1:])\n"
        "except UserError as error: sys.exit(0 if error.exit_code == 7 and 'torch' not in sys.modules else 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(holder[0])], cwd=ROOT, timeout=60)
    assert done.returncode == 0


def test_processes_other_than_the_first_lock_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with open_run_dir(RunConfig(run=RunSettings(dir=str(tmp_path / "none"))), "x"):
        assert not (tmp_path / "none").exists()


def test_a_restarted_job_goes_on_with_its_own_run_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = RunConfig(run=RunSettings(dir="asked"))
    for job, count in (("one", "0"), ("one", "1"), ("two", "1")):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        if job == "two":  # its first start was refused: the folder holds the run of somebody else
            with pytest.raises(UserError) as caught:
                claim_run_dir(asked, "mine")
            assert caught.value.exit_code == CONFIG
        config, lock = claim_run_dir(RunConfig(), "mine")
        assert config.run.dir == ("runs/mine" if job == "one" else "runs/mine-2")
        assert config.run.resume == (config.run.dir if (job, count) == ("one", "1") else "")
        save_config(config)
        lock.close()
        if job == "one":
            config, lock = claim_run_dir(asked, "mine")
            assert config.run.resume == ("asked" if count == "1" else "")
            save_config(config)
            lock.close()


@pytest.mark.parametrize("name", ["samples.txt", "attention", "checkpoints", "lock", "config.writing"])
def test_nothing_is_written_through_a_link_out_of_the_folder(name: str, tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    folder.mkdir()
    (folder / "config.toml").write_text("")
    (folder / name).symlink_to(outside / "precious" if "." in name or name == "lock" else outside)
    line = said(script("train.py", f"--run.resume={folder}"), CHECKPOINT)
    assert name in line and "link" in line
    assert [p.name for p in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_text() == "precious"


def test_a_link_within_the_folder_is_fine(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "run-1").mkdir()
    (folder / "wandb" / "latest-run").symlink_to("run-1")
    _, lock = claim_run_dir(RunConfig(run=RunSettings(dir=str(folder))), "x")
    lock.close()
