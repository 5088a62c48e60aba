"""wandb: what is logged arrives, and none of its failures stops training."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from tests.runs import TINY, script
from tests.training.helpers import make_trainer
from training.trackers import WandbTracker
from training.trainer import Trainer


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """In place of the package."""
    fake = MagicMock()
    fake.Html.side_effect = lambda text, inject: text
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    trainer = make_trainer()
    config = replace(trainer.config, run=replace(trainer.config.run, dir=str(tmp_path)))
    trainer.config = replace(config, log=replace(config.log, wandb="offline", every=2))
    trainer.callbacks = [WandbTracker()]
    return trainer


@pytest.mark.parametrize("moment", ["setup", "init", "init.return_value.log", "init.return_value.finish"])
def test_failing_wandb_prints_one_line_and_training_continues(
    moment: str, trainer: Trainer, wandb: MagicMock, capsys: pytest.CaptureFixture[str]
) -> None:
    error = ConnectionError("no\x1b[2J answer\nfrom the server")
    wandb.configure_mock(**{f"{moment}.side_effect": error})
    trainer.run()
    assert trainer.state.step == 6
    line = "wandb failed (ConnectionError: no\\x1b[2J answer); training continues without it\n"
    assert capsys.readouterr().err == line


def test_missing_wandb_is_one_line(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    trainer.run()
    assert trainer.state.step == 6 and capsys.readouterr().err.startswith("wandb failed (ModuleNotFoundError: ")


def test_keys_and_steps(trainer: Trainer, tmp_path: Path, wandb: MagicMock) -> None:
    (tmp_path / "loss.png").write_bytes(b"")
    more = {"sample": "<b>", "head_scores": {"induction": [[0.1, 0.9], [0.2, 0.3]]}}
    trainer.callbacks = [SimpleNamespace(on_eval=lambda trainer, metrics: metrics.update(more)), *trainer.callbacks]
    trainer.final_metrics = {"final_val_loss": 1.5, "final_train_loss": 1.0, "unigram": 2.0}
    trainer.run()
    run = wandb.init.return_value
    *logged, final = [(call.kwargs.get("step"), call.args[0]) for call in run.log.call_args_list]
    steps = {step: values for step, values in logged if "train/loss" in values}
    assert list(steps) == [2, 4, 6] and set(steps[2]) == {"train/loss", "train/lr", "train/grad_norm"}
    evals = [values for _, values in logged if "val/loss" in values]
    assert len(evals) == 6 and evals[0]["heads/induction"] == 0.9 and evals[0]["sample"] == "<pre>&lt;b&gt;</pre>"
    assert final[1].keys() == {"val/final_loss", "train/final_loss", "baseline/unigram", "plots/loss"}
    assert final[1]["val/final_loss"] == 1.5
    run.finish.assert_called_once_with(exit_code=0)


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
