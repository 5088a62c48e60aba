"""wandb: what is logged arrives, and none of its failures stops training."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.runs import TINY, script
from tests.training.helpers import make_trainer
from training.trackers import WandbTracker
from training.trainer import Trainer


class FakeWandb(types.ModuleType):
    """wandb and its run, of which one function raises an error."""

    Settings, setup, Image = SimpleNamespace, id, Path

    def __init__(self, fail_at: str = "") -> None:
        super().__init__("wandb")
        self.fail_at, self.rows, self.exit_code = fail_at, list[tuple[int, dict[str, Any]]](), -1

    def fail(self, moment: str) -> None:
        if self.fail_at == moment:
            raise ConnectionError("no\x1b[2J answer\nfrom the server")

    def Html(self, text: str, inject: bool) -> str:
        return text

    def init(self, **options: Any) -> FakeWandb:
        self.fail("init")
        return self

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.fail("log")
        self.rows.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.fail("finish")
        self.exit_code = exit_code


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    trainer = make_trainer()
    config = replace(trainer.config, run=replace(trainer.config.run, dir=str(tmp_path)))
    trainer.config = replace(config, log=replace(config.log, wandb="offline", every=2))
    trainer.callbacks = [WandbTracker()]
    return trainer


@pytest.mark.parametrize("moment", ["import", "init", "log", "finish"])
def test_failing_wandb_prints_one_line_and_training_continues(
    moment: str, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None if moment == "import" else FakeWandb(moment))  # type: ignore[arg-type]
    trainer.run()
    error = capsys.readouterr().err
    assert trainer.state.step == 6
    assert error.count("wandb failed (") == error.count("\n") == 1 and "training continues without it" in error
    assert moment == "import" or "ConnectionError: no\\x1b[2J answer)" in error


def test_keys_and_steps(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "loss.png").write_bytes(b"")
    more = {"sample": "<b>", "head_scores": {"induction": [[0.1, 0.9], [0.2, 0.3]]}}
    trainer.callbacks = [SimpleNamespace(on_eval=lambda trainer, metrics: metrics.update(more)), *trainer.callbacks]
    trainer.final_metrics = {"final_val_loss": 1.5, "final_train_loss": 1.0, "unigram": 2.0}
    trainer.run()
    steps = {step: values for step, values in wandb.rows if "train/loss" in values}
    assert list(steps) == [2, 4, 6] and set(steps[2]) == {"train/loss", "train/lr", "train/grad_norm"}
    evals = [values for _, values in wandb.rows if "val/loss" in values]
    assert len(evals) == 6 and evals[0]["heads/induction"] == 0.9 and evals[0]["sample"] == "<pre>&lt;b&gt;</pre>"
    final = wandb.rows[-1][1]
    assert final.keys() == {"val/final_loss", "train/final_loss", "baseline/unigram", "plots/loss"}
    assert final["val/final_loss"] == 1.5
    assert wandb.exit_code == 0


@pytest.mark.slow
def test_real_wandb_offline(tmp_path: Path) -> None:
    """A run and its resumption are one run of wandb: two folders with the same id."""
    (tmp_path / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    folder = tmp_path / "run"
    argv = (*TINY, "--log.attention=off", f"--data.source={tmp_path}/fox.txt", f"--run.dir={folder}")
    done = script("train.py", *argv, "--log.wandb=offline", "--run.stop_at_step=4")
    assert done.returncode == 0 and "wandb" not in done.stderr, done.stderr
    done = script("train.py", f"--run.resume={folder}")
    assert done.returncode == 0 and "wandb" not in done.stderr, done.stderr
    assert script("sample.py", folder, "--tokens=5").returncode == 0
    paths = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(paths) == 2 and len({path.name for path in paths}) == 1
    content = b"".join(path.read_bytes() for path in paths)
    for name in (b"train/loss", b"val/loss", b"plots/loss", b"val/final_loss"):
        assert name in content
