"""The tests' own test, for the training step: it is broken in ways that happen by accident, and a check must notice.

None of these breaks ends in an error. Each trains on, a little worse, or reports what is not so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from data import dataloader as batches
from tests.training import step_checks as checks
from training import trainer
from training.optimizer import Optimizer
from training.trainer import Trainer

Patch = pytest.MonkeyPatch
Breaks = Callable[[Patch], None]


def function(name: str, change: Callable[..., Callable[..., Any]]) -> Breaks:
    """A function that the trainer calls becomes what `change` makes of it."""
    return lambda patch: patch.setattr(trainer, name, change(getattr(trainer, name)))


def method(owner: type, name: str, change: Callable[..., Callable[..., Any]]) -> Breaks:
    return lambda patch: patch.setattr(owner, name, change(getattr(owner, name)))


def by_rows(real: Callable[..., Any]) -> Callable[..., Any]:
    """Each row's own mean, averaged over the rows: short documents weigh as much as long ones."""

    def forward_backward(self: Trainer, rows: batches.Batch, counted: int) -> torch.Tensor:
        total = torch.zeros(())
        for tokens, targets in zip(rows.tokens.split(1), rows.targets.split(1), strict=True):
            loss = (
                trainer.cross_entropy_sum(self.wrapped_model(tokens), targets) / (targets != batches.IGNORE_INDEX).sum()
            )
            (loss / len(rows.tokens)).backward()
            total += loss.detach() / len(rows.tokens)
        return total

    return forward_backward


def last_piece(real: Callable[..., Any]) -> Callable[..., Any]:
    """Only the last micro-batch's gradient is left."""

    def forward_backward(self: Trainer, rows: batches.Batch, counted: int) -> torch.Tensor:
        loss = real(self, rows, counted)
        self.model.zero_grad(set_to_none=True)
        last = slice(-self.rows, None)
        (trainer.cross_entropy_sum(self.wrapped_model(rows.tokens[last]), rows.targets[last]) / counted).backward()
        return loss

    return forward_backward


def clipped_too_late(patch: Patch) -> None:
    """The norm is measured before the step, the gradient is scaled after it, when it is gone."""
    clip = trainer.clip_grad_norm
    patch.setattr(trainer, "clip_grad_norm", lambda stepped, limit: clip(stepped, 0.0))
    step = Trainer.train_step
    patch.setattr(
        Trainer, "train_step", lambda self: (step(self), clip(self.wrapped_model, self.config.optim.grad_clip))[0]
    )


def everything_decays(real: Callable[..., None]) -> Callable[..., None]:
    def build(self: Optimizer, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        for part in self.parts:
            for group in part.param_groups:
                group["weight_decay"] = checks.OPTIM.weight_decay

    return build


def nothing_is_forgotten(real: Callable[..., None]) -> Callable[..., None]:
    """The gradient of a step is added to the next one's."""

    def step(self: Optimizer) -> None:
        for part in self.parts:
            part.step()

    return step


def the_last_is_best(real: Callable[..., bool]) -> Callable[..., bool]:
    """What is told beside the best step is the newest loss."""

    def evaluate(self: Trainer, on_evaluation: Any) -> bool:
        seen: list[float] = []
        best = real(self, lambda found: (on_evaluation(found), seen.append(found["val_loss"])))
        self.state.best_loss = seen[-1]
        return best

    return evaluate


def with_dropout(real: Callable[..., Any]) -> Callable[..., Any]:
    """The evaluation's model is never told that it is one."""

    def evaluate(model: torch.nn.Module, *args: Any) -> Any:
        model.eval = lambda: model  # type: ignore[method-assign, assignment, return-value]
        return real(model, *args)

    return evaluate


def seeded(seed: Callable[[int], int]) -> Breaks:
    real = torch.manual_seed
    return lambda patch: patch.setattr(torch, "manual_seed", lambda number: real(seed(number)))


MUTANTS: dict[str, tuple[Breaks, Callable[[], None]]] = {
    "the gradient is a sum, not a mean": (
        method(Trainer, "forward_backward", lambda real: lambda self, rows, counted: real(self, rows, 1)),
        checks.check_gradient,
    ),
    "the gradient is divided by all targets, counted or not": (
        method(
            Trainer, "forward_backward", lambda real: lambda self, rows, counted: real(self, rows, rows.targets.numel())
        ),
        checks.check_gradient,
    ),
    "the gradient is a mean of the rows' means": (method(Trainer, "forward_backward", by_rows), checks.check_gradient),
    "the last micro-batch overwrites the others": (
        method(Trainer, "forward_backward", last_piece),
        checks.check_gradient,
    ),
    "the gradient is clipped after the step": (clipped_too_late, checks.check_steps),
    "the gradient is not clipped": (
        function("clip_grad_norm", lambda real: lambda stepped, limit: real(stepped, 0.0)),
        checks.check_steps,
    ),
    "the rate is the next step's": (
        function("get_lr_scale", lambda real: lambda step, *rest: real(step + 1, *rest)),
        checks.check_steps,
    ),
    "the rate is the last step's": (
        function("get_lr_scale", lambda real: lambda step, *rest: real(max(0, step - 1), *rest)),
        checks.check_steps,
    ),
    "the rate stays at its peak": (
        method(Optimizer, "set_lr_scale", lambda real: lambda self, share: None),
        checks.check_steps,
    ),
    "gains and biases decay": (method(Optimizer, "__init__", everything_decays), checks.check_steps),
    "the gradient is not forgotten": (method(Optimizer, "step", nothing_is_forgotten), checks.check_steps),
    "the first step is made twice": (
        function("get_batch", lambda real: lambda a, b, seed, step, *rest: real(a, b, seed, max(0, step - 1), *rest)),
        checks.check_steps,
    ),
    "the batch is the next epoch's": (
        function("get_batch", lambda real: lambda a, b, seed, step, *rest: real(a, b, seed, step + len(b), *rest)),
        checks.check_steps,
    ),
    "the batch is another seed's": (
        function("get_batch", lambda real: lambda a, b, seed, *rest: real(a, b, seed + 1, *rest)),
        checks.check_steps,
    ),
    "every epoch has the same order": (
        lambda patch: patch.setattr(batches, "epoch_permutation", same_order(batches.epoch_permutation)),
        checks.check_epochs,
    ),
    "batches are drawn with repetition": (
        lambda patch: patch.setattr(
            batches, "sample_indices", lambda windows, seed, step, size: torch.randint(len(windows), (size,)).numpy()
        ),
        checks.check_epochs,
    ),
    "dropout is seeded without the step": (seeded(lambda number: 7), checks.check_dropout),
    "dropout is not seeded": (
        lambda patch: patch.setattr(torch, "manual_seed", lambda number: torch.default_generator),
        checks.check_dropout,
    ),
    "a worse loss overwrites the best": (method(Trainer, "evaluate", the_last_is_best), checks.check_best),
    "an equal loss counts as a better one": (
        method(Trainer, "evaluate", lambda real: lambda self, tell: generous(self, real, tell)),
        checks.check_best,
    ),
    "evaluation drops activations": (function("evaluate", with_dropout), checks.check_evaluation),
    "evaluation averages over windows": (
        function("cross_entropy_sum", lambda real: lambda logits, targets: real(logits[:1], targets[:1])),
        checks.check_evaluation,
    ),
    "evaluation leaves its last batch out": (
        function("evaluate", lambda real: lambda m, s, w, indices, *rest: real(m, s, w, indices[:-2], *rest)),
        checks.check_evaluation,
    ),
}


def same_order(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda seed, epoch, n: real(seed, 0, n)


def generous(self: Trainer, real: Callable[..., bool], tell: Any) -> bool:
    """The best loss is forgotten by a hair before each comparison."""
    if self.state.best_loss is not None:
        self.state.best_loss += 1e-9
    return real(self, tell)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_step_is_noticed(name: str, monkeypatch: Patch) -> None:
    breaks, check = MUTANTS[name]
    checks.corpus()
    breaks(monkeypatch)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("check", dict.fromkeys(check for _, check in MUTANTS.values()), ids=lambda c: c.__name__)
def test_the_real_step_is_the_textbooks(check: Callable[[], None]) -> None:
    check()
