"""Checkpoints: written whole or not at all, retention, and what is refused when one is read."""

import json
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import CHECKPOINT, CONFIG, DISK_OR_MEMORY, NON_FINITE, RemovedError, UserError
from common.files import retry_if_removed
from data.tokenizer import ByteTokenizer, CharTokenizer
from model.config import ModelConfig
from model.gpt import GPT
from tests.runs import user_error
from training import checkpoint
from training.checkpoint import (
    FILES,
    MANIFEST,
    CheckpointWriter,
    RunEnvironment,
    TrainState,
    list_checkpoints,
    model_weights,
    open_checkpoint,
    sha256_of_weights,
)
from training.config import OptimConfig, RunConfig
from training.device import DistContext

CTX = DistContext(torch.device("cpu"), torch.float32)
SHAPE = ModelConfig(n_layers=2, n_heads=2, d_model=16, context=8, attention="eager")
ENVIRONMENT = RunEnvironment(True, "a corpus", {"device": "cpu", "threads": "1"})
OTHER = RunConfig(model=SHAPE, optim=OptimConfig(lr=0.25))
NORM, UP = "final_norm.weight", "blocks.1.mlp.up.weight"
VOCAB = ByteTokenizer().vocab_size
update_manifest = checkpoint._write_manifest  # it vouches for whatever is in the folder


def tensors() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and AdamW's state of an untrained model."""
    weights = model_weights(GPT(SHAPE, VOCAB, seed=0))
    state = {f"{name}/exp_avg": value / 2 for name, value in weights.items()}
    return weights, {**state, **{f"{name}/step": torch.tensor(3.0) for name in weights}}


def write(writer: CheckpointWriter, step: int, best: int | None = None, config: RunConfig | None = None) -> Path:
    state = TrainState(step, best_loss=None if best is None else 1.0, best_step=best or 0)
    return writer.save(config or RunConfig(model=SHAPE), state, *tensors(), ByteTokenizer(), ENVIRONMENT)


def saved(run: Path, step: int = 3) -> Path:
    return write(CheckpointWriter(run, 9), step, step)


def change_state(folder: Path, **sections: Any) -> None:
    """Change entries of `state.json`: of a section, or of a section of its config."""
    table = json.loads((folder / "state.json").read_text())
    for name, entries in sections.items():
        place = table["config"] if name in table["config"] else table
        place[name] = {**place[name], **entries} if isinstance(entries, dict) else entries
    (folder / "state.json").write_text(json.dumps(table))
    update_manifest(folder)


def refused(run: Path) -> str:
    """The one line that says why a run's newest checkpoint cannot be read whole, as sampling and resuming do."""
    with user_error(CHECKPOINT) as caught:
        found = open_checkpoint(run)
        found.tokenizer()
        found.optimizer_state()
        found.load_model(CTX)(torch.zeros(1, 4, dtype=torch.long))
    return str(caught.value)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ---- written and read back ----


@pytest.mark.parametrize("is_tied", [True, False])
def test_checkpoint_roundtrip(is_tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SHAPE", replace(SHAPE, tie_embeddings=is_tied))
    folder = saved(tmp_path)
    found = open_checkpoint(tmp_path)
    assert found.folder == folder and found.state.step == 3 and found.environment == ENVIRONMENT
    assert found.config == RunConfig(model=SHAPE) and found.environment.starts_with_eot
    now, before = found.optimizer_state(), tensors()[1]
    assert now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)
    model = found.load_model(CTX)
    assert sha256_of_weights(model) == sha256_of_weights(GPT(SHAPE, VOCAB, seed=0))
    assert (model.lm_head.weight is model.token_embedding.weight) == is_tied and not model.training
    assert names(tmp_path) == ["000003"]
    assert sorted(p.name for p in folder.iterdir()) == sorted((*FILES, MANIFEST))


def test_retention_keeps_best_and_newest(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 2)
    (tmp_path / "checkpoints" / "notes").mkdir(parents=True)
    write(writer, 900)  # left from before a resume that skipped it: neither counted nor removed
    for step in (0, 3, 5, 7, 9):
        write(writer, step, best=None if step < 3 else 3)
    assert names(tmp_path) == ["000003", "000007", "000009", "000900", "notes"]


def test_checkpoint_is_chosen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    writer = CheckpointWriter(tmp_path, 9)
    write(writer, 0)
    assert open_checkpoint(tmp_path).state.step == 0  # no evaluation yet
    for step in (3, 5, 7):
        write(writer, step, best=min(step, 5))
    chosen = {"best": 5, "last": 7, "3": 3, "000003": 3, "0": 0}
    assert {which: open_checkpoint(tmp_path, which).state.step for which in chosen} == chosen
    assert open_checkpoint(tmp_path / "checkpoints" / "000007").state.step == 7
    for which in ("4", "bset", "-1", "9" * 5000, "\x1b"):
        with user_error(CONFIG, r"has best, last, 0, 3, 5, 7$"):
            open_checkpoint(tmp_path, which)
    shutil.rmtree(tmp_path / "checkpoints" / "000005")
    assert open_checkpoint(tmp_path).state.step == 7 and "step 7 is used, not the best" in capfd.readouterr().err


@pytest.mark.parametrize("which", ["best", "last"])
def test_reader_beside_a_trainer(which: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What retention removes between listing and loading is never called damaged, and another is read."""
    writer, done = CheckpointWriter(tmp_path, 1), threading.Event()

    def train() -> None:
        for step in range(1, 200):
            write(writer, step, step)
        done.set()

    @retry_if_removed
    def read(argv: list[str]) -> None:
        found = open_checkpoint(tmp_path, *argv)
        found.tokenizer(), found.load_model(CTX)

    write(writer, 0, 0)
    trainer = threading.Thread(target=train)
    trainer.start()
    while not done.is_set():
        read([which])
    trainer.join()
    assert capfd.readouterr().err == ""


def test_no_checkpoint_is_found_while_one_replaces_another(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".removing-000001").mkdir(parents=True)
    with pytest.raises(RemovedError, match="has no checkpoint"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", MANIFEST])
def test_saving_a_step_again_replaces_it(name: str, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 1)
    folder = write(writer, 4)
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    assert write(writer, 4, config=OTHER) == folder
    assert open_checkpoint(tmp_path).config == OTHER and names(tmp_path) == ["000004"]


@pytest.mark.parametrize(("where", "bad"), [("weights", math.nan), ("optimizer", -math.inf)])
def test_nonfinite_numbers_are_never_saved(where: str, bad: float, tmp_path: Path) -> None:
    weights, state = ({name: value.clone() for name, value in table.items()} for table in tensors())
    (weights[UP] if where == "weights" else state[f"{UP}/exp_avg"]).view(-1)[-1] = bad
    with user_error(NON_FINITE, UP):
        CheckpointWriter(tmp_path, 1).save(RunConfig(), TrainState(3), weights, state, ByteTokenizer(), ENVIRONMENT)
    assert not list(tmp_path.iterdir())


# ---- what a save does to the disk; tests/faults/test_saves.py interrupts it at every operation ----


@pytest.mark.skipif(sys.platform != "linux", reason="finds names in /proc")
def test_files_are_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, fsync, rename = list[str](), os.fsync, Path.rename

    def record_fsync(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def record_rename(path: Path, target: Path) -> Path:
        events.append(f"rename {path.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    saved(tmp_path)
    folder = ".writing-000003"
    assert events == [tmp_path.name, *FILES, MANIFEST, folder, f"rename {folder}", "checkpoints"]


def test_disk_that_does_not_keep_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is read back before older checkpoints are removed."""
    writer = CheckpointWriter(tmp_path, 1)

    def damage(folder: Path) -> None:
        update_manifest(folder)
        os.truncate(folder / FILES[0], 9)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="give the same command again"):
        patch.setattr("training.checkpoint._write_manifest", damage)
        write(writer, 1)
    write(writer, 1)
    monkeypatch.setattr("training.checkpoint._write_manifest", damage)
    with user_error(DISK_OR_MEMORY, r"model\.safetensors.* continue with --run.resume"):
        write(writer, 2, config=OTHER)
    assert names(tmp_path) == ["000001"]
    assert open_checkpoint(tmp_path).config != OTHER


def test_leftovers_are_cleaned_up_and_links_not_followed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        saved(tmp_path, step)
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("not ours")
    (root / ".writing-000009" / "deeper").mkdir(parents=True)
    (root / ".writing-000009" / "deeper" / "link").symlink_to(elsewhere)
    (root / ".removing-000008").symlink_to(elsewhere)
    (root / "000001").rename(root / ".removing-000001")
    (root / ".removing-000001" / MANIFEST).unlink()
    (root / "000002").rename(root / ".writing-000002")  # complete: killed just before its rename
    CheckpointWriter(tmp_path, 3)
    assert names(tmp_path) == ["000002", "000003"] and (elsewhere / "precious").exists()


# ---- damaged and hostile checkpoints ----


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_damage_to_any_file_is_noticed(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good, bad = saved(tmp_path, 3), saved(tmp_path, 4)
    content = (bad / name).read_bytes()
    flipped = bytearray(content)
    flipped[len(flipped) // 2] ^= 0x80
    for damaged in (content[:-1], content[: len(content) // 2], b"", bytes(flipped), b"[" * 100_000, b"{}", None):
        if damaged is None:
            (bad / name).unlink()
        else:
            (bad / name).write_bytes(damaged)
        assert open_checkpoint(tmp_path).folder == good
        err = capfd.readouterr().err
        assert err.startswith("skipping") and "000004" in err and err.count("\n") == 1


HUGE = 10**12
ABSURD = (
    *({"model": change} for change in ({"n_layers": HUGE}, {"d_model": HUGE}, {"d_mlp": 3}, {"preset": "gpt2"})),
    *({"vocab_size": HUGE}, {"vocab_size": None}, {"state": {"step": -1}}, {"state": {"step": 4}}, {"state": None}),
    *({"state": {"bogus": 1}}, {"optim": {"lr": -1}}, {"config": 7}, {"format": 2}),
)


@pytest.mark.parametrize("change", ABSURD, ids=str)
def test_absurd_state_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    """Also if the manifest vouches for it, and without memory for what it describes."""
    change_state(saved(tmp_path), **change)
    refused(tmp_path)


CHANGES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "extra": lambda t: t.update({"blocks.2.mlp.up.weight": torch.zeros(2)}),
    "renamed": lambda t: t.update({"\x1b[31m\n": t.pop(UP)}),
    "transposed": lambda t: t.update({UP: t[UP].T.contiguous()}),
    "half": lambda t: t.update({NORM: t[NORM].half()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_of_another_model_are_refused(change: str, tmp_path: Path) -> None:
    path = saved(tmp_path) / "model.safetensors"
    entries = load_file(path)
    CHANGES[change](entries)
    save_file(entries, path)
    update_manifest(path.parent)
    assert path.name in refused(tmp_path)


class Harmful:
    """Makes a folder when it is unpickled."""

    marker = ""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_pickles_in_disguise_are_never_loaded(name: str, tmp_path: Path) -> None:
    harmful, folder = Harmful(), saved(tmp_path)
    harmful.marker = str(tmp_path / "executed")
    torch.save(harmful, folder / name)  # noqa: TID251
    if name != MANIFEST:
        update_manifest(folder)
    refused(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    """A vocabulary of another size; a folder named after another step, which would be taken for newer."""
    folder = saved(tmp_path, 3)
    shutil.copytree(folder, tmp_path / "the best")
    assert open_checkpoint(tmp_path / "the best").state.step == 3
    folder.rename(folder.with_name("000007"))
    assert "holds step 3" in refused(tmp_path)
    other = saved(tmp_path, 8)
    (other / "vocabulary.json").write_bytes(CharTokenizer("abc").to_json())
    update_manifest(other)
    assert "4 tokens" in refused(tmp_path)


def test_only_step_names_are_checkpoints(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = saved(tmp_path, 3).parent
    for name in ("00040\x1b[31m", "7", "0000007", "٠٠٠٠٠٤", "-00001", "1e1000", ".writing-000009", "9" * 200):
        (root / name).mkdir()
    (root / "000009").write_text("a file")
    assert [path.name for path in list_checkpoints(root)] == ["000003"]
    assert all("not a folder" in refused(Path(path)) for path in ("x" * 5000, "nowhere\x1b[31m", "/dev/null"))
    assert open_checkpoint(tmp_path).state.step == 3 and capfd.readouterr().err == ""
