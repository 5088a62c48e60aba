"""The training loop: what is saved and logged, non-finite steps, signals, patience, prefetching."""

import copy
import json
import math
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import DISK_OR_MEMORY, NON_FINITE, UserError
from common.files import read_metrics
from tests.runs import user_error
from tests.training.helpers import TRAIN, make_trainer
from training.checkpoint import TrainState
from training.metrics import MetricsLogger, ProgressBar
from training.setup import Checkpointer, get_callbacks
from training.signals import SIGNALS
from training.trainer import Callback, Prefetcher, Trainer, derive_seed

EIGHT = replace(TRAIN, steps=8, batch_size=4, eval_every=4, save_every=100)


def record(trainer: Trainer) -> Any:
    """A callback that keeps what the loop reported, and when it saved."""
    kept = SimpleNamespace(steps=[], evals=[], saves=[], exit_code=None)
    kept.on_step = lambda trainer, metrics: kept.steps.append(metrics)
    kept.on_eval = lambda trainer, metrics: kept.evals.append(metrics)
    kept.on_save = lambda trainer: kept.saves.append(trainer.state.step)
    kept.on_exit = lambda trainer, exit_code: setattr(kept, "exit_code", exit_code)
    trainer.callbacks = [kept]
    return kept


def break_steps(trainer: Trainer, steps: set[int]) -> None:
    """Make the logits of these training steps NaN."""

    def hook(model: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        return logits * math.nan if model.training and trainer.state.step in steps else logits

    trainer.model.register_forward_hook(hook)


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_non_finite_steps_are_skipped_or_end_the_run(allowed: int) -> None:
    trainer = make_trainer(replace(EIGHT, skip_nonfinite_steps=allowed))
    break_steps(trainer, {2, 5})
    kept = record(trainer)
    if allowed < 2:
        step = 5 if allowed else 2
        with pytest.raises(UserError, match=rf"step {step} \(seed 1\)") as caught:
            trainer.run()
        assert caught.value.exit_code == kept.exit_code == NON_FINITE
        assert trainer.state.step == step and trainer.state.skipped_steps == allowed
        return
    trainer.run()
    assert trainer.state.step == 8 and trainer.state.skipped_steps == 2 and kept.exit_code == 0
    assert [line["step"] for line in kept.steps if "skipped" in line] == [3, 6]
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_gradients_that_overflow_in_fp16_lower_the_loss_scale(capsys: pytest.CaptureFixture[str]) -> None:
    """Such steps are not counted; at a scale of 1 they are those of a model that diverges."""
    train = replace(EIGHT, dtype="fp16")
    trainer = make_trainer(train)
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**40})
    before, scale = copy.deepcopy(trainer.model.state_dict()), 2.0**40
    while "skipped" in (metrics := trainer.train_step()):
        assert metrics["loss_scale"] == (scale := scale / 2) and trainer.state.skipped_steps == 0
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
        trainer.state.step = 0
    assert 1 < scale < 2.0**30 and metrics == pytest.approx(make_trainer(EIGHT).train_step(), rel=0.01)
    diverging = make_trainer(train, state=TrainState(scaler={**trainer.scaler.state_dict(), "scale": 4.0}))
    next(diverging.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    diverging.callbacks = [ProgressBar(diverging.state, 8)]
    with user_error(NON_FINITE, r"the loss is 3\.\d+ and the gradient norm \w+ at step 2 "):
        diverging.run()
    skipped = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert (
        len(skipped) == 2 and skipped[1] == "step 2 skipped: its gradient overflowed in fp16; the loss scale falls to 1"
    )


def test_skipped_step_changes_neither_weights_nor_optimizer_state() -> None:
    trainer = make_trainer(replace(EIGHT, skip_nonfinite_steps=1))
    break_steps(trainer, {1})
    trainer.train_step()
    states = (trainer.model.state_dict(), trainer.optimizer.state_dict())
    before, tokens = copy.deepcopy(states), trainer.state.tokens_seen
    trainer.train_step()
    assert trainer.state.step == 2 and trainer.state.tokens_seen == tokens
    assert all(torch.equal(now[name], old[name]) for now, old in zip(states, before, strict=True) for name in old)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_evaluations_saves_and_hooks() -> None:
    trainer = make_trainer(EIGHT)
    kept, hooks = record(trainer), list[str]()
    partial = SimpleNamespace(on_end=lambda trainer: hooks.append("end"))  # hooks that are missing are not called
    trainer.callbacks = [partial, kept]
    trainer.run()
    assert hooks == ["end"] and kept.exit_code == 0
    assert [line["step"] for line in kept.evals] == [4, 8]
    assert kept.saves[0] == 0 and kept.saves[-1] == 8 and len(kept.saves) == len(set(kept.saves))
    assert [line["step"] for line in kept.steps] == list(range(1, 9))
    assert kept.steps[0].keys() == {"step", "loss", "lr", "grad_norm"}


@pytest.mark.parametrize("signum", [*SIGNALS, 0])
def test_stopped_run_finishes_the_step_and_saves(signum: int) -> None:
    """By a signal, or by `run.stop_at_step`, which is no failure."""
    trainer = make_trainer(EIGHT, stop_at_step=0 if signum else 3)
    kept, handler = record(trainer), signal.getsignal(signal.SIGINT)
    if signum:
        stopper = SimpleNamespace(on_step=lambda _, line: signal.raise_signal(signum) if line["step"] == 3 else None)
        trainer.callbacks = [stopper, kept]
    with pytest.raises(SystemExit) as caught:
        trainer.run()
    assert caught.value.code == kept.exit_code == (128 + signum if signum else 0) and trainer.is_stopped
    assert trainer.state.step == 3 and kept.saves == [0, 3]
    assert signal.getsignal(signal.SIGINT) is handler


def test_signal_interrupts_an_evaluation_which_is_repeated() -> None:
    train = replace(EIGHT, batch_size=2, eval_tokens=10_000)
    trainer = make_trainer(train)
    kept, calls = record(trainer), 0

    def count(module: nn.Module, *_: Any) -> None:
        nonlocal calls
        calls += not module.training
        if calls == 2:
            signal.raise_signal(signal.SIGTERM)

    trainer.model.register_forward_hook(count)
    with pytest.raises(SystemExit):
        trainer.run()
    assert calls == 2 and kept.evals == [] and kept.saves == [0, 4]
    again = make_trainer(train, state=trainer.state)
    repeated = record(again)
    again.run()
    assert [line["step"] for line in repeated.evals] == [4, 8]


def test_patience_ends_the_run_and_nan_is_never_best() -> None:
    trainer = make_trainer(replace(EIGHT, eval_every=1, patience=2))
    losses = iter([math.nan, 3.0, -math.inf, 2.5, 2.5, math.inf, 1.0])
    trainer.validation_loss = lambda indices, stop=None: (next(losses), 1)  # type: ignore[method-assign]
    trainer.run()
    assert (trainer.state.step, trainer.state.best_step, trainer.state.best_loss) == (6, 4, 2.5)


def test_prefetcher_reads_ahead_and_raises_errors_at_their_step() -> None:
    third = threading.Event()

    def read(step: int) -> Any:
        if step == 2:
            third.set()
            raise OSError("unreadable")
        return 10 * step

    prefetcher = Prefetcher(read)
    assert prefetcher.get(0) == 0 and third.wait(5)
    assert prefetcher.get(1) == 10
    with pytest.raises(OSError, match="unreadable"):
        prefetcher.get(2)
    assert prefetcher.get(7) == 70  # any step may follow


def test_derived_seeds_are_stable_and_distinct() -> None:
    assert derive_seed(1, "dropout", 2, 3) == 3829333276522255221
    assert len({derive_seed(s, "dropout", t, r) for s in range(3) for t in range(3) for r in range(3)}) == 27


def test_telemetry_in_metrics_jsonl(tmp_path: Path) -> None:
    trainer = make_trainer(EIGHT)
    trainer.config = replace(trainer.config, log=replace(trainer.config.log, every=3))
    trainer.callbacks = [MetricsLogger(tmp_path, TrainState())]
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [3, 6, 8]
    for line in steps:
        assert list(line) == ["step", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "peak_memory_mb"]
        assert line["tokens_per_second"] > 0 and 0 < line["mfu"] < 1.5 and line["peak_memory_mb"] > 50
    assert [list(line) for line in lines if "val_loss" in line] == [["step", "val_loss", "tokens_seen"]] * 2


def test_nothing_is_written_where_a_moved_folder_was(tmp_path: Path) -> None:
    run, trainer = tmp_path / "run", make_trainer(EIGHT)
    mover = SimpleNamespace(on_step=lambda *_: trainer.state.step == 1 and run.rename(tmp_path / "moved"))
    recorder = SimpleNamespace(on_eval=lambda *_: (run / "attention").mkdir(parents=True))
    trainer.config = replace(trainer.config, run=replace(trainer.config.run, dir=str(run)))
    trainer.callbacks = [mover, *get_callbacks(trainer, Callback(), recorder)]
    with pytest.raises(UserError, match="cannot write"):
        trainer.run()
    assert not run.exists()


@pytest.mark.parametrize(("exit_code", "is_told"), [(143, True), (1, False)])
def test_signal_after_the_last_step_is_told_how_to_resume(
    exit_code: int, is_told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(EIGHT)
    checkpointer = Checkpointer(trainer.config, trainer.ctx)
    checkpointer.saved_config = trainer.config
    checkpointer.on_exit(trainer, exit_code)
    assert ("resume with" in capsys.readouterr().out) == is_told


@pytest.mark.parametrize("is_replaced", [False, True])
def test_run_stops_once_its_folder_is_gone(is_replaced: bool, tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    trainer = make_trainer(EIGHT)
    trainer.config = replace(trainer.config, log=replace(trainer.config.log, every=1))
    mover = SimpleNamespace(on_step=lambda _, line: run.rename(moved) and is_replaced and shutil.copytree(moved, run))
    trainer.callbacks = [mover, MetricsLogger(run, TrainState())]
    with user_error(DISK_OR_MEMORY, "cannot write"):
        trainer.run()
    assert trainer.state.step == 1
    assert run.exists() == is_replaced and not read_metrics(run / "metrics.jsonl")


def test_running_out_of_memory_is_advice() -> None:
    trainer = make_trainer(EIGHT)
    trainer.model.register_forward_hook(lambda *_: torch.empty(1 << 50))
    with pytest.raises(UserError, match="micro_batch_size 2"):
        trainer.run()
