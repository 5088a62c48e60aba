"""Checks of the training step that `test_step_mutants.py` runs: on the real code, and on code broken on purpose.

The step is written a second time here, from the textbook. Each check builds its trainer anew, so that it sees what a
test has patched, and fails with an AssertionError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data import dataloader as batches
from data.dataloader import IGNORE_INDEX
from data.prepare import TokenizedCorpus, prepare
from model.config import ModelConfig
from model.gpt import GPT
from tests.model.checks import relative_difference
from training import optimizer as optim
from training.checkpoint import TrainState
from training.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from training.device import DistContext
from training.optimizer import Optimizer
from training.trainer import Trainer

STEPS = 6
LINES = ("the fox runs", "a dog", "the lazy dog sleeps under the old tree", "one", "two more words for the end")
"""Documents of unequal length: windows with unequal numbers of targets."""
OPTIM = OptimConfig("adamw", lr=0.01, weight_decay=0.3, warmup_steps=3, grad_clip=0.2, decay_fraction=1.0)
"""Rates that differ from step to step, and gradients that are all too long."""


@cache
def corpus() -> TokenizedCorpus:
    with TemporaryDirectory() as folder:
        text = Path(folder, "lines.txt")
        text.write_text("\n<|endoftext|>\n".join(LINES * 9))
        return prepare(DataConfig(source=str(text), tokenizer="char", val_fraction=0.2), progress=False)


def trainer(micro_batch_size: int = 0, dropout: float = 0.0, step: int = 0) -> Trainer:
    model_config = ModelConfig("gpt2", 1, n_heads=2, d_model=8, context=12, attention="eager", dropout=dropout)
    train = TrainConfig(steps=STEPS, batch_size=6, micro_batch_size=micro_batch_size, eval_every=1, eval_tokens=200)
    config = RunConfig(model=model_config, optim=OPTIM, train=train)
    data = corpus()
    model = GPT(model_config, data.tokenizer.vocab_size, seed=3)
    ctx = DistContext(torch.device("cpu"), torch.float32)
    optimizer = Optimizer(model, OPTIM)
    return Trainer(config, ctx, data, model, model, optimizer, TrainState(step=step))


def batch_of(one: Trainer, step: int) -> batches.Batch:
    return batches.get_batch(
        one.data.train, one.train_sequences, one.config.run.seed, step, one.config.train.batch_size
    )


def mean_loss(model: GPT, rows: batches.Batch) -> Tensor:
    """Nats of a target, on average over those that count."""
    logits = model(rows.tokens)
    total = F.cross_entropy(logits.flatten(0, 1), rows.targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (rows.targets != IGNORE_INDEX).sum()


def check_gradient() -> None:
    """That of the mean over all counted targets of the batch, however it is cut into pieces."""
    for step, micro_batch_size in ((0, 0), (1, 4), (2, 1)):
        one = trainer(micro_batch_size)
        rows = batch_of(one, step)
        counts = (rows.targets != IGNORE_INDEX).sum(dim=1)
        assert len(counts.unique()) > 1, "all rows count alike: a mean of means would be the mean"
        told = one.forward_backward(rows, int(counts.sum()))
        found = {name: p.grad.clone() for name, p in one.model.named_parameters() if p.grad is not None}
        one.model.zero_grad()
        wanted = mean_loss(one.model, rows)
        wanted.backward()
        assert math.isclose(float(told), float(wanted.detach()), rel_tol=1e-6)
        for name, p in one.model.named_parameters():
            assert p.grad is not None and relative_difference(found[name], p.grad) <= 1e-5, name


def check_steps() -> None:
    """Weights after some steps: the batch of each step, its clipped gradient, its rate, and AdamW by its formula."""
    one, other = trainer(), trainer()
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    start = {name: p.detach().clone() for name, p in other.model.named_parameters()}
    for step in range(STEPS):
        told = one.train_step()
        other.model.zero_grad(set_to_none=True)
        loss = mean_loss(other.model, batch_of(other, step))
        loss.backward()
        assert math.isclose(float(told["loss"]), float(loss.detach()), rel_tol=1e-5), f"the loss of step {step}"
        by_hand(other.model, step, moments)
    counted = sum(int((batch_of(one, step).targets != IGNORE_INDEX).sum()) for step in range(STEPS))
    assert (one.state.step, one.state.tokens_seen) == (STEPS, counted)
    found = dict(one.model.named_parameters())
    for name, p in other.model.named_parameters():
        assert relative_difference(found[name].detach() - start[name], p.detach() - start[name]) <= 1e-4, name


@torch.no_grad()
def by_hand(model: GPT, step: int, moments: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Clip to the norm that is allowed (Pascanu et al. 2013), then AdamW (Loshchilov & Hutter 2019, algorithm 2)."""
    parameters: Mapping[str, Any] = dict(model.named_parameters())
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters.values()))
    assert norm > OPTIM.grad_clip, "a gradient that is not clipped proves nothing about clipping"
    rate = OPTIM.lr * optim.get_lr_scale(step, STEPS, OPTIM)
    for name, p in parameters.items():
        gradient = p.grad * (OPTIM.grad_clip / norm)
        first, second = moments.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
        first = OPTIM.beta1 * first + (1 - OPTIM.beta1) * gradient
        second = OPTIM.beta2 * second + (1 - OPTIM.beta2) * gradient.square()
        moments[name] = first, second
        if p.dim() > 1:  # matrices decay, gains and biases don't
            p.mul_(1 - rate * OPTIM.weight_decay)
        unbiased = first / (1 - OPTIM.beta1 ** (step + 1)), second / (1 - OPTIM.beta2 ** (step + 1))
        p.sub_(rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8))


def dropped(step: int, seed: int) -> list[Tensor]:
    """Which activations a step drops, when `seed` is the global generator's."""
    one, seen = trainer(dropout=0.5, step=step), []
    for module in one.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda m, inputs, out: seen.append(out == 0))
    torch.random.default_generator.manual_seed(seed)
    one.train_step()
    return seen


def check_dropout() -> None:
    """Another pattern at each step, and the same whenever that step is made."""
    first, again, next_one = dropped(0, seed=1), dropped(0, seed=2), dropped(1, seed=1)
    assert first and all(map(torch.equal, first, again)), "a resumed run would drop other activations"
    assert not any(map(torch.equal, first, next_one)), "every step drops the same activations"


def check_epochs() -> None:
    """The steps of an epoch learn from each window once, those of the next one in another order."""
    one = trainer()
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def note(rows: batches.Batch, counted: int) -> Tensor:
        seen.extend(zip(map(tuple, rows.tokens.tolist()), map(tuple, rows.targets.tolist()), strict=True))
        for p in one.model.parameters():
            p.grad = torch.ones_like(p)
        return torch.ones(())

    one.forward_backward = note  # type: ignore[method-assign]
    n = len(one.train_sequences)
    while len(seen) < 2 * n:
        one.train_step()
    every = batches.read_sequences(one.data.train, one.train_sequences, torch.arange(n).numpy())
    whole = sorted(zip(map(tuple, every.tokens.tolist()), map(tuple, every.targets.tolist()), strict=True))
    assert sorted(seen[:n]) == sorted(seen[n : 2 * n]) == whole
    assert seen[:n] != seen[n : 2 * n]


def check_best() -> None:
    """The best loss, its step, and how many evaluations have passed since; a best one is saved."""
    one, saves = trainer(), []
    losses = iter([3.0, 2.0, 2.0, 4.0, 1.5, 2.5])
    one.validation_loss = lambda indices, stop=None: (next(losses), 100)  # type: ignore[method-assign]
    course = []

    def save() -> None:
        saves.append(one.state.step)

    def note(found: dict[str, Any]) -> None:
        course.append((one.state.best_loss, one.state.best_step, one.state.evals_without_improvement))

    one.run(lambda line: None, note, save)
    course.append((one.state.best_loss, one.state.best_step, one.state.evals_without_improvement))
    assert course[1:] == [(3.0, 1, 0), (2.0, 2, 0), (2.0, 2, 1), (2.0, 2, 2), (1.5, 5, 0), (1.5, 5, 1)], course
    assert {1, 2, 5, 6} <= set(saves) and not {3, 4} & set(saves), saves


def check_evaluation() -> None:
    """The mean over all counted targets of the part, without dropout, and nothing is learned from it."""
    one = trainer(micro_batch_size=4, dropout=0.5)
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    one.model.train()
    seen = one.validation_loss(one.val_part)
    assert one.model.training and all(p.grad is None for p in one.model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in one.model.named_parameters())
    rows = batches.read_sequences(one.data.val, one.val_sequences, one.val_part)
    counts = (rows.targets != IGNORE_INDEX).sum(dim=1)
    assert len(counts.unique()) > 1 and len(counts) % 4, "a mean of means would be the mean"
    one.model.eval()
    with torch.no_grad():
        wanted = float(mean_loss(one.model, rows))
    assert seen is not None and seen[1] == int(counts.sum()) and math.isclose(seen[0], wanted, rel_tol=1e-5)
