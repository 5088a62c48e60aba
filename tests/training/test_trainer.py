"""The loop itself: what it does with numbers that are not finite, with signals, and with too little memory."""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.errors import DISK_OR_MEMORY, NON_FINITE, UserError
from data.prepare import prepare
from model.config import ModelConfig
from model.gpt import GPT
from tests.runs import ROOT
from training import signals
from training.checkpoint import TrainState
from training.config import DataConfig, RunConfig, RunSettings, TrainConfig
from training.device import DistContext, advise_on_oom
from training.optimizer import Optimizer
from training.signals import SignalHandler
from training.trainer import Trainer, evaluate

TRAIN = TrainConfig(steps=8, batch_size=4, eval_every=4, save_every=100, eval_tokens=64)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return path


def trainer(text: Path, train: TrainConfig = TRAIN, stop_at_step: int = 0, state: TrainState | None = None) -> Trainer:
    config = RunConfig(
        run=RunSettings(stop_at_step=stop_at_step),
        data=DataConfig(source=str(text), tokenizer="char"),
        model=ModelConfig(n_layers=1, n_heads=2, d_model=16, context=16, attention="eager"),
        train=train,
    )
    data = prepare(config.data, progress=False)
    model = GPT(config.model, data.tokenizer.vocab_size, 1)
    ctx = DistContext(torch.device("cpu"), torch.float32)
    optimizer = Optimizer(model, config.optim)
    return Trainer(config, ctx, data, model, model, optimizer, state or TrainState())


class Poison(nn.Module):
    """A model whose output is not finite at some calls."""

    def __init__(self, model: GPT, calls: set[int]) -> None:
        super().__init__()
        self.model, self.calls, self.called = model, calls, 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.model(tokens)
        self.called += 1
        return logits * float("nan") if self.called - 1 in self.calls else logits


class Told:
    """What a run of the loop told, and when it saved."""

    def __init__(self, one: Trainer) -> None:
        self.steps: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.saves: list[int] = []
        self.save = lambda: self.saves.append(one.state.step)
        self.run = lambda: one.run(self.steps.append, self.evaluations.append, self.save)


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_bad_step_is_passed_over_and_counted_or_ends_the_run(allowed: int, text: Path) -> None:
    one = trainer(text, replace(TRAIN, skip_nonfinite_steps=allowed))
    one.wrapped_model = Poison(one.model, {2, 5})
    before = {name: p.clone() for name, p in one.model.named_parameters()}
    told = Told(one)
    if allowed < 2:
        with pytest.raises(UserError) as caught:
            told.run()
        assert caught.value.exit_code == NON_FINITE
        line, step = str(caught.value), 5 if allowed else 2
        assert f"step {step} " in line and "seed 1" in line and "documents 0" in line and "\n" not in line
        assert one.state.step == step and one.state.skipped_steps == allowed
        return
    told.run()
    assert one.state.step == 8 and one.state.skipped_steps == 2
    assert [line["step"] for line in told.steps if "skipped" in line] == [3, 6]
    assert all(p.isfinite().all() for p in one.model.parameters())
    assert any((p != before[name]).any() for name, p in one.model.named_parameters())


def test_a_step_that_is_passed_over_leaves_no_trace_in_weights_and_moments(text: Path) -> None:
    one = trainer(text, replace(TRAIN, skip_nonfinite_steps=1))
    one.train_step()
    weights = {name: p.clone() for name, p in one.model.named_parameters()}
    moments = {name: value.clone() for name, value in one.optimizer.state_dict().items()}
    one.wrapped_model, tokens = Poison(one.model, {0}), one.state.tokens_seen
    one.train_step()
    assert one.state.step == 2 and one.state.tokens_seen == tokens
    assert all(torch.equal(p, weights[name]) for name, p in one.model.named_parameters())
    assert all(torch.equal(value, moments[name]) for name, value in one.optimizer.state_dict().items())
    assert all(p.grad is None for p in one.model.parameters())


def test_an_infinite_loss_with_a_finite_gradient_is_bad_too(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer(text)
    monkeypatch.setattr(one, "forward_backward", lambda rows, counted: torch.tensor(float("inf")))
    monkeypatch.setattr("training.trainer.clip_grad_norm", lambda stepped, limit: 1.0)
    with pytest.raises(UserError) as caught:
        one.train_step()
    assert caught.value.exit_code == NON_FINITE and one.state.step == 0


def test_the_loop_saves_the_beginning_of_every_evaluation_that_is_best_and_the_end(text: Path) -> None:
    told = Told(trainer(text))
    told.run()
    assert [line["step"] for line in told.evaluations] == [4, 8] and told.saves[-1] == 8
    assert len(told.saves) == len(set(told.saves))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_and_saves(number: signal.Signals, text: Path) -> None:
    one = trainer(text)
    told = Told(one)
    step = one.train_step
    one.train_step = lambda: (os.kill(os.getpid(), number) if one.state.step == 2 else None, step())[1]  # type: ignore[method-assign]
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught:
        told.run()
    assert caught.value.code == 128 + number
    assert one.state.step == 3 and told.saves[-1] == 3
    assert signal.getsignal(number) is handler  # whoever listened before listens again


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = SignalHandler()
        with stop.installed():
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signum == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_breaks_an_evaluation_off_and_it_is_made_again(text: Path) -> None:
    one = trainer(text, replace(TRAIN, batch_size=2, eval_tokens=10_000))
    told = Told(one)
    seen = 0

    def count(module: nn.Module, *_: Any) -> None:
        nonlocal seen
        seen += not module.training
        if seen == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = one.model.register_forward_hook(count)
    with pytest.raises(SystemExit):
        told.run()
    hook.remove()
    assert seen == 2 and told.evaluations == [] and told.saves == [0, 4]
    assert one.state.last_eval_step < 4 and one.is_due()
    again = Told(trainer(text, replace(TRAIN, batch_size=2), state=one.state))
    again.run()
    assert [line["step"] for line in again.evaluations] == [4, 8]


def test_a_signal_while_attention_is_looked_at_breaks_that_off(text: Path) -> None:
    one = trainer(text)
    told = Told(one)

    def observe(line: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("it went on")

    with pytest.raises(SystemExit):
        one.run(told.steps.append, observe, told.save)
    assert told.saves == [0, 4] and one.is_due()


def test_stopping_at_a_step_is_no_failure(text: Path) -> None:
    told = Told(trainer(text, stop_at_step=3))
    with pytest.raises(SystemExit) as caught:
        told.run()
    assert caught.value.code == 0 and told.saves == [0, 3]


def test_the_second_ctrl_c_leaves_at_once_but_not_its_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(signals.os, "_exit", left.append)
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    stop = SignalHandler()
    stop._receive(signal.SIGINT, None)
    now += 0.1
    stop._receive(signal.SIGINT, None)
    assert left == []
    now += 1
    stop._receive(signal.SIGTERM, None)  # a cluster that asks again does not mean "at once"
    assert left == [] and stop.signum == signal.SIGINT
    stop._receive(signal.SIGINT, None)
    assert left == [130]


PAGES = """
import resource
import torch
from training.device import get_dist_context

def pages_cleared():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.zeros(2_000_000) for _ in range(20)]
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

get_dist_context("fp32", threads=1)
print([pages_cleared() for _ in range(4)])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries keep what they like")
@pytest.mark.parametrize("setting", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}], ids=["ours", "the user's"])
def test_what_a_step_frees_is_kept_for_the_next_unless_the_user_says_otherwise(setting: dict[str, str]) -> None:
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PAGES], cwd=ROOT, env={**unset, **setting}, capture_output=True, text=True, check=True
    )
    first, *later = json.loads(done.stdout)
    if setting:
        assert min(later) > first / 2
    else:
        assert later[0] < first / 4


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_names_the_micro_batch_to_try(error: Exception) -> None:
    with pytest.raises(UserError) as caught, advise_on_oom(16, 64):
        raise error
    assert caught.value.exit_code == DISK_OR_MEMORY
    assert "--train.micro_batch_size 8" in str(caught.value) and "64" in str(caught.value)
    with pytest.raises(UserError) as caught, advise_on_oom(1, 64):
        raise error
    assert "micro_batch_size" not in str(caught.value) and "sharding" in str(caught.value)


def test_other_errors_are_bugs_and_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shapes"), advise_on_oom(16, 64):
        raise RuntimeError("shapes do not fit")


def test_evaluation_counts_every_target_once_whatever_the_number_of_processes(text: Path) -> None:
    one = trainer(text)
    seen = evaluate(one.model, one.data.val, one.val_sequences, one.val_part, 3, one.ctx)
    assert seen is not None and seen[1] == int(one.val_sequences.counts[one.val_part].sum())


@pytest.mark.slow
def test_memory_that_really_runs_out_is_one_line(tmp_path: Path) -> None:
    """In a process whose address space is limited: attention weights of gigabytes."""
    (tmp_path / "long.txt").write_text("abcdefghij" * 8000)
    argv = ("--data.tokenizer=char", "--model.n_layers=1", "--model.n_heads=8", "--model.d_model=64")
    argv += ("--model.context=1024", "--train.batch_size=128", "--train.micro_batch_size=64", "--model.attention=eager")
    argv += ("--train.dtype=fp32", "--log.sample_tokens=0", "--train.steps=2", f"--data.source={tmp_path / 'long.txt'}")
    limit = 5 << 30
    done = subprocess.run(
        [sys.executable, "train.py", *argv, f"--run.dir={tmp_path / 'run'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == DISK_OR_MEMORY, done.stderr[-2000:]
    assert "--train.micro_batch_size 32" in done.stderr and "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_is_never_the_best(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer(text)
    for loss, best in ((float("nan"), None), (3.0, 3.0), (4.0, 3.0), (float("-inf"), 3.0), (2.0, 2.0)):
        monkeypatch.setattr(one, "validation_loss", lambda indices, stop, loss=loss: (loss, 1))
        one.state.step += 1
        assert one.evaluate(lambda told: None) == (loss == best)
        assert one.state.best_loss == best
    assert one.state.best_step == 5 and one.state.evals_without_improvement == 0


def test_a_signal_that_comes_while_the_processes_agree_is_not_lost(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer(text)
    told = Told(one)
    agreements = 0

    def largest(self: DistContext, value: int) -> int:
        nonlocal agreements
        agreements += 1
        if agreements == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # too late for this agreement; the next one must know
        return value

    monkeypatch.setattr(DistContext, "all_reduce_max", largest)
    with pytest.raises(SystemExit) as caught:
        told.run()
    assert caught.value.code == 143 and told.saves[-1] == one.state.step < 8
