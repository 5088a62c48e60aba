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


class FakeRun:
    def __init__(self, fail_at: str) -> None:
        self.fail_at, self.rows, self.exit_code = fail_at, list[Any](), -1

    def log(self, values: dict[str, Any], step: int) -> None:
        self.fail("log")
        self.rows.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.fail("finish")
        self.exit_code = exit_code

    def fail(self, moment: str) -> None:
        if self.fail_at == moment:
            raise ConnectionError("no\x1b[2J answer\nfrom the server")


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that replaces wandb by a module that fails at a given moment."""

    def install(fail_at: str = "") -> FakeRun:
        run, module = FakeRun(fail_at), types.ModuleType("wandb")

        def init(**options: Any) -> FakeRun:
            run.fail("init")
            return run

        module.init, module.Settings, module.setup = init, SimpleNamespace, id  # type: ignore[attr-defined]
        module.Html, module.Image = (lambda text, inject: text), Path  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "wandb", None if fail_at == "import" else module)  # type: ignore[arg-type]
        return run

    return install


def trainer_in(folder: Path) -> Trainer:
    trainer = make_trainer()
    config = trainer.config
    run, log = replace(config.run, dir=str(folder)), replace(config.log, wandb="offline", every=2)
    trainer.config = replace(config, run=run, log=log)
    trainer.callbacks = [WandbTracker()]
    return trainer


@pytest.mark.parametrize("moment", ["import", "init", "log", "finish"])
def test_failing_wandb_prints_one_line_and_training_continues(
    moment: str, fake_wandb: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_wandb(moment)
    trainer = trainer_in(tmp_path)
    trainer.run()
    error = capsys.readouterr().err
    assert trainer.state.step == 6
    assert error.count("wandb failed (") == error.count("\n") == 1 and "training continues without it" in error
    assert moment == "import" or "ConnectionError: no\\x1b[2J answer)" in error


def test_keys_and_steps(fake_wandb: Any, tmp_path: Path) -> None:
    run = fake_wandb()
    trainer = trainer_in(tmp_path)
    (tmp_path / "loss.png").write_bytes(b"")

    def add(trainer: Trainer, metrics: dict[str, Any]) -> None:
        metrics |= {"sample": "<b>", "head_scores": {"induction": [[0.1, 0.9], [0.2, 0.3]]}}

    trainer.callbacks = [SimpleNamespace(on_eval=add), *trainer.callbacks]
    trainer.final_metrics = {"final_val_loss": 1.5, "unigram": 2.0}
    trainer.run()
    steps = {step: values for step, values in run.rows if "train/loss" in values}
    assert list(steps) == [2, 4, 6] and set(steps[2]) == {"train/loss", "train/lr", "train/grad_norm"}
    evals = [values for _, values in run.rows if "val/loss" in values]
    assert len(evals) == 6 and evals[0]["heads/induction"] == 0.9 and evals[0]["sample"] == "<pre>&lt;b&gt;</pre>"
    final = run.rows[-1][1]
    assert final.keys() == {"val/final_loss", "baseline/unigram", "plots/loss"} and final["val/final_loss"] == 1.5
    assert run.exit_code == 0


def test_stopped_run_is_marked_as_failed(fake_wandb: Any, tmp_path: Path) -> None:
    run, trainer = fake_wandb(), trainer_in(tmp_path)
    trainer.stop.signum = 15
    with pytest.raises(SystemExit):
        trainer.run()
    assert run.exit_code == 143


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
    paths = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(paths) == 2 and len({path.name for path in paths}) == 1
    content = b"".join(path.read_bytes() for path in paths)
    for name in (b"train/loss", b"val/loss", b"plots/loss", b"val/final_loss"):
        assert name in content
