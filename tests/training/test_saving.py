"""Writing checkpoints: the order of a save's operations, and what is left when it ends at any of them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training.saving import CheckpointWriter

from common.errors import DISK_OR_MEMORY, NON_FINITE, UserError
from data.tokenizer import ByteTokenizer
from tests.training.checkpoints import ENVIRONMENT, SHAPE, tensors, write
from training import rotation, saving
from training.checkpoint import (
    FILES,
    TrainState,
    list_checkpoints,
    open_checkpoint,
    read_checkpoint,
    step_of_folder,
    verify_checkpoint,
)
from training.config import OptimConfig, RunConfig

OTHER = RunConfig(model=SHAPE, optim=OptimConfig(lr=0.25))
Event = tuple[str, str, Any]


class Killed(BaseException):
    """Ends a save as a signal does: nothing is tidied up."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event], dict[str, int]]:
    """What two saves, of which the second lets the first go, do to the file system, in a process of their own."""
    run = tmp_path_factory.mktemp("saves")
    command = [sys.executable, "-m", "tests.training.disk_log", str(run)]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    return run / "checkpoints", [tuple(event) for event in said["log"]], said["sizes"]


def names(run: Path) -> list[str]:
    """What lies among a run's checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def at(log: list[Event], event: str, path: Path) -> int:
    """When something happened; it must have happened exactly once."""
    found = [number for number, (what, where, _) in enumerate(log) if what == event and where == str(path)]
    assert len(found) == 1, (event, path, found)
    return found[0]


def test_a_save_does_things_in_the_order_that_makes_it_whole_or_absent(
    disk: tuple[Path, list[Event], dict[str, int]],
) -> None:
    root, log, sizes = disk
    temporary, final = root / ".writing-000002", root / "000002"
    mkdir = at(log, "os.mkdir", temporary)
    synced = [at(log, "os.fsync", temporary / name) for name in FILES]
    for name, when in zip(FILES, synced, strict=True):
        assert log[when][2] == sizes[str(final / name)] > 0  # all of it was written by then
    manifest = at(log, "created", temporary / "manifest.json")
    manifest_synced = at(log, "os.fsync", temporary / "manifest.json")
    assert log[manifest_synced][2] == sizes[str(final / "manifest.json")]
    folder_synced = at(log, "os.fsync", temporary)
    renamed = at(log, "os.rename", temporary)
    assert log[renamed][2] == str(final)
    parent = [number for number, (what, where, _) in enumerate(log) if (what, where) == ("os.fsync", str(root))]
    parent_synced = min(number for number in parent if number > renamed)
    verified = at(log, "verified", final)
    assert log[verified][2] is None
    let_go = at(log, "os.rename", root / "000001")
    assert log[let_go][2] == str(root / ".removing-000001")
    order = [mkdir, *sorted(synced), manifest, manifest_synced, folder_synced, renamed, parent_synced, verified, let_go]
    assert order == sorted(order)
    removed = [number for number, (what, _, _) in enumerate(log) if what in ("os.remove", "os.rmdir")]
    assert len(removed) == len(FILES) + 2 and min(removed) > let_go
    assert not {where for what, where, _ in log if what == "created" and not where.startswith(f"{root}/.writing-")}


def test_the_first_save_makes_its_parent_last(disk: tuple[Path, list[Event], dict[str, int]]) -> None:
    root, log, _ = disk
    assert at(log, "os.mkdir", root) < at(log, "os.fsync", root.parent) < at(log, "os.mkdir", root / ".writing-000001")


def test_whatever_a_save_does_is_announced_just_before(disk: tuple[Path, list[Event], dict[str, int]]) -> None:
    _, log, _ = disk
    operations = {"os.fsync": "fsync", "os.rename": "rename", "os.mkdir": "mkdir"}
    operations |= {"os.remove": "remove", "os.rmdir": "remove"}
    for before, (what, where, _) in itertools.pairwise(log):
        if what in operations:
            assert before[:2] == (operations[what], where)
    writes = [where for what, where, _ in log if what == "write"]
    assert {Path(where).name for where in writes} == {*FILES, "manifest.json"}


def test_a_large_file_is_written_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SMALL", 10)
    monkeypatch.setattr(saving, "LARGE", 25)
    chunks = [b"a" * n for n in (3, 3, 60, 0, 4, 4, 4, 10, 1)]
    assert [len(piece) for piece in saving.pieces(chunks)] == [6, 25, 25, 10, 12, 10, 1]
    assert b"".join(saving.pieces(chunks)) == b"".join(chunks)


def test_the_best_and_the_newest_stay_by_step_and_not_by_time(tmp_path: Path) -> None:
    saver = CheckpointWriter(tmp_path, 2)
    for step in (0, 3, 5, 7, 9):
        folder = write(saver, step, best=None if step < 3 else 3)
        saver.wait()
        os.utime(folder, (1e9 - step, 1e9 - step))
    saver.finish()
    assert names(tmp_path) == ["000003", "000007", "000009"]


def test_what_lies_beyond_the_step_is_neither_counted_nor_removed(tmp_path: Path) -> None:
    """A run that was resumed below a damaged checkpoint meets it again when it gets there."""
    saver = CheckpointWriter(tmp_path, 2)
    beyond = write(saver, 900)
    (tmp_path / "checkpoints" / "notes").mkdir()
    for step in (1, 2, 3):
        write(saver, step)
    saver.finish()
    assert names(tmp_path) == ["000002", "000003", "000900", "notes"] and verify_checkpoint(beyond) is None


def test_a_checkpoint_that_is_there_already_is_left_alone(tmp_path: Path) -> None:
    saver = CheckpointWriter(tmp_path, 1)
    folder = write(saver, 4)
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert write(saver, 4) == folder
    saver.finish()
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before and names(tmp_path) == ["000004"]


@pytest.mark.parametrize("name", [*FILES, "manifest.json", ""])
def test_a_damaged_checkpoint_of_the_same_step_gives_way(name: str, tmp_path: Path) -> None:
    saver = CheckpointWriter(tmp_path, 1)
    folder = write(saver, 4)
    if name:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    else:
        rotation.remove(folder)
        folder.write_text("no folder at all")
    assert write(saver, 4) == folder
    saver.finish()
    assert verify_checkpoint(folder) is None and names(tmp_path) == ["000004"]


def test_another_checkpoint_of_the_same_step_takes_its_place(tmp_path: Path) -> None:
    saver = CheckpointWriter(tmp_path, 1)
    write(saver, 4)
    write(saver, 4, config=OTHER)
    saver.finish()
    assert open_checkpoint(tmp_path).config == OTHER and names(tmp_path) == ["000004"]


class Interruption:
    """Stands in for `announce`: raises at the operation of that number, counted from 1."""

    def __init__(self, number: int, error: Callable[[], BaseException]) -> None:
        self.left, self.error = number, error

    def __call__(self, operation: str, path: Path) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error()


def newest(run: Path) -> tuple[int, bytes]:
    """Step and state of the newest checkpoint that is whole, as `open_checkpoint` would find it."""
    folder = next(folder for folder in list_checkpoints(run / "checkpoints")[::-1] if verify_checkpoint(folder) is None)
    return step_of_folder(folder) or 0, (folder / "state.json").read_bytes()


def one_by_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Callable[[], BaseException],
    save: Callable[[CheckpointWriter], object],
) -> int:
    """Break off a save, its verification and its pruning at each operation; how many there are."""
    monkeypatch.setattr(saving, "threading", SimpleNamespace(Thread=AtOnce))
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a matter of power failures, and slow
    for step in (2, 4):
        write(CheckpointWriter(tmp_path / "before", 9), step)
    for number in range(1, 200):
        run = shutil.copytree(tmp_path / "before", tmp_path / str(number))
        interruption = Interruption(number, error)
        with monkeypatch.context() as patch, contextlib.suppress(Killed, UserError):
            for module in (saving, rotation):
                patch.setattr(module, "announce", interruption)
            save(CheckpointWriter(run, 1))
        found = newest(run)  # before any trainer has tidied up
        assert found[0] >= 4
        CheckpointWriter(run, 1)
        assert newest(run) == found and not [name for name in names(run) if name.startswith(".")]
        assert all(verify_checkpoint(folder) is None for folder in list_checkpoints(run / "checkpoints"))
        if interruption.left > 0:
            assert names(run) == [f"{found[0]:06d}"]
            return number - 1
    raise AssertionError("it never came to its end")


class AtOnce:
    """A thread that is done before it is started."""

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...], daemon: bool) -> None:
        self.work, self.args = target, args

    def start(self) -> None:
        self.work(*self.args)

    def join(self) -> None:
        pass


@pytest.mark.parametrize("step", [6, 4])
@pytest.mark.parametrize("error", [Killed, lambda: OSError(errno.ENOSPC, "No space left on device")])
def test_a_save_that_ends_anywhere_loses_nothing(
    step: int,
    error: Callable[[], BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A new step, or another checkpoint of the newest one, with rotation behind it: killed, or the disk full."""
    count = one_by_one(tmp_path, monkeypatch, error, lambda saver: write(saver, step, config=OTHER))
    assert count >= 22  # to the last removal


def test_a_full_disk_is_said_and_tidied_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = CheckpointWriter(tmp_path, 1)
    write(saver, 4)
    saver.finish()

    def full(operation: str, path: Path) -> None:
        if operation == "write" and path.name == "state.json":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "announce", full)
    with pytest.raises(UserError, match=r"checkpoints/000006: No space left on device.*--run\.resume") as caught:
        write(saver, 6)
    assert caught.value.exit_code == DISK_OR_MEMORY and names(tmp_path) == ["000004"]


@pytest.mark.parametrize("where", ["weights", "moments", "best loss"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_never_saved(where: str, bad: float, tmp_path: Path) -> None:
    weights, moments = ({name: value.clone() for name, value in table.items()} for table in tensors())
    state = TrainState(3, best_loss=bad if where == "best loss" else None)
    if where != "best loss":
        (weights if where == "weights" else moments)["blocks.1.mlp.up.weight" + "/exp_avg" * (where == "moments")].view(
            -1
        )[-1] = bad
    named = "best loss" if where == "best loss" else "blocks.1.mlp.up.weight"
    with pytest.raises(UserError, match=named) as caught:
        CheckpointWriter(tmp_path, 1).save(
            RunConfig(model=SHAPE), state, weights, moments, ByteTokenizer(), 257, ENVIRONMENT
        )
    assert caught.value.exit_code == NON_FINITE and not list(tmp_path.iterdir())


def test_large_numbers_are_finite(tmp_path: Path) -> None:
    """Their sum is not, and opposite infinities have none."""
    saving.check_finite({"large": torch.full((4,), 3e38)})
    with pytest.raises(UserError):
        saving.check_finite({"both": torch.tensor([float("inf"), -float("inf")])})


def test_a_disk_that_does_not_keep_what_is_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing older goes for it; the next checkpoint that the disk keeps makes it good."""
    saver = CheckpointWriter(tmp_path, 1)
    write(saver, 1)
    saver.finish()

    def flip(folder: Path) -> None:
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "model.safetensors").write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "forget_cached", flip)
        write(saver, 2)
        with pytest.raises(UserError, match=r"did not keep.*model\.safetensors") as caught:
            saver.finish()
    assert caught.value.exit_code == DISK_OR_MEMORY and names(tmp_path) == ["000001", "000002"]
    assert "did not keep the checkpoint" in capfd.readouterr().err
    write(saver, 3)
    saver.finish()
    assert names(tmp_path) == ["000003"]


def test_what_was_replaced_comes_back_if_the_disk_does_not_keep_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = CheckpointWriter(tmp_path, 1)
    before = write(saver, 4)
    saver.finish()
    monkeypatch.setattr(saving, "forget_cached", lambda folder: (folder / "state.json").write_text("{"))
    write(saver, 4, config=OTHER)
    saver.wait()
    assert (
        verify_checkpoint(before) is None and read_checkpoint(before).config != OTHER and names(tmp_path) == ["000004"]
    )


def test_leftovers_are_swept_when_a_run_begins(tmp_path: Path) -> None:
    saver = CheckpointWriter(tmp_path, 3)
    for step in (1, 2, 3):
        write(saver, step, seed=step)
    saver.finish()
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("not ours")
    (root / ".writing-000009" / "deeper").mkdir(parents=True)
    (root / ".writing-000009" / "deeper" / "link").symlink_to(elsewhere)
    (root / ".removing-000008").symlink_to(elsewhere)
    (root / "000001").rename(root / ".removing-000001")
    (root / "000002").rename(root / ".replaced-000002")
    assert [read_checkpoint(folder).state.step for folder in list_checkpoints(root)] == [2, 3]
    CheckpointWriter(tmp_path, 3)
    assert names(tmp_path) == ["000002", "000003"] and (elsewhere / "precious").exists()
