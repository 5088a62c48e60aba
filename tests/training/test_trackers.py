"""Trackers: what is logged arrives, and none of their failures stops training."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from matplotlib.image import imsave
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.runs import TINY, script
from tests.training.helpers import make_trainer
from training.checkpoint import TrainState
from training.trackers import TensorBoardTracker, Tracker, WandbTracker
from training.trainer import Trainer

TENSORBOARD = "torch.utils.tensorboard"


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


@pytest.mark.parametrize(("tracker", "module"), [(WandbTracker, "wandb"), (TensorBoardTracker, TENSORBOARD)])
def test_missing_package_is_one_line(
    tracker: type[Tracker],
    module: str,
    trainer: Trainer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    trainer.callbacks = [tracker()]
    trainer.run()
    line = capsys.readouterr().err
    assert (
        trainer.state.step == 6 and line.startswith(f"{tracker.name} failed (ModuleNotFoundError: ") and module in line
    )


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


def test_tensorboard_reads_back_what_was_logged(trainer: Trainer, tmp_path: Path) -> None:
    """Also of a run that was resumed at step 4 after it had logged step 6."""
    imsave(tmp_path / "loss.png", np.zeros((4, 6, 3)))
    for step in (0, 4):
        run = make_trainer(state=TrainState(step, last_eval_step=step))
        run.config, run.final_metrics = trainer.config, {"final_val_loss": 1.5, "unigram": 2.0}
        sample = SimpleNamespace(on_eval=lambda trainer, metrics: metrics.update(sample="<b>"))
        run.callbacks = [sample, TensorBoardTracker()]
        run.run()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
    assert [event.step for event in events.Scalars("val/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("val/final_loss")] == [1.5] * len(events.Images("plots/loss"))
    assert events.Tensors("sample/text_summary")[0].tensor_proto.string_val == [b"<pre>&lt;b&gt;</pre>"]


def test_variables_of_wandb_take_precedence(
    trainer: Trainer, tmp_path: Path, wandb: MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    trainer.run()
    given = wandb.init.call_args.kwargs
    assert {name: given[name] for name in ("project", "name", "mode", "resume")} == {
        **{"project": "glassgpt", "name": tmp_path.name, "mode": "offline", "resume": "allow"}
    }
    for name in ("PROJECT", "NAME", "DIR", "MODE", "RESUME", "SILENT", "RUN_ID"):
        monkeypatch.setenv(f"WANDB_{name}", name)
    for mode, project in (("online", ""), ("offline", "typed")):
        log = replace(trainer.config.log, wandb=mode, wandb_project=project)
        trainer.config, trainer.callbacks = replace(trainer.config, log=log), [WandbTracker()]
        trainer.run()
        own = {"mode", "project"} if project else set()
        assert wandb.init.call_args.kwargs.keys() == {"config", "allow_val_change", "id", "settings"} | own
        assert wandb.init.call_args.kwargs["id"] == "RUN_ID" and "silent" not in wandb.Settings.call_args.kwargs
    monkeypatch.delenv("WANDB_RUN_ID")
    trainer.callbacks = [WandbTracker()]
    trainer.run()
    assert wandb.init.call_args.kwargs["id"] == "RUN_ID"  # the same run again


@pytest.mark.slow
def test_real_wandb_offline(tmp_path: Path) -> None:
    """A run and its resumption are one run of wandb: two folders with the same id."""
    (tmp_path / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    folder = tmp_path / "run"
    argv = (*TINY, "--log.attention=off", f"--data.source={tmp_path}/fox.txt", f"--run.dir={folder}")
    for options in ((*argv, "--log.wandb=offline", "--run.stop_at_step=4"), (f"--run.resume={folder}",)):
        done = script("train.py", *options)
        assert done.returncode == 0 and "wandb" not in done.stderr, done.stderr
    assert script("sample.py", folder, "--tokens=5").returncode == 0
    paths = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(paths) == 2 and len({path.name for path in paths}) == 1
    content = b"".join(path.read_bytes() for path in paths)
    for name in (b"train/loss", b"val/loss", b"plots/loss", b"val/final_loss"):
        assert name in content
