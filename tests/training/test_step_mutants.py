"""The training step broken in ways that happen by accident: a check must notice each.

None of the mutants raises an error: each trains a little worse, or reports something that is not so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from data.dataloader import IGNORE_INDEX, Batch
from tests.training import step_checks as checks
from training import trainer as trainer_module
from training.optimizer import Optimizer
from training.trainer import Trainer

Patch = pytest.MonkeyPatch
Mutate = Callable[[Patch], None]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def function(name: str, wrap: Wrap) -> Mutate:
    """Replace a function that the trainer calls."""
    return lambda patch: patch.setattr(trainer_module, name, wrap(getattr(trainer_module, name)))


def method(owner: type, name: str, wrap: Wrap) -> Mutate:
    return lambda patch: patch.setattr(owner, name, wrap(getattr(owner, name)))


def mean_of_row_means(real: Callable[..., Any]) -> Callable[..., Any]:
    """Short documents weigh as much as long ones."""

    def forward_backward(self: Trainer, rows: Batch, num_targets: int) -> torch.Tensor:
        total = torch.zeros(())
        for tokens, targets in zip(rows.tokens.split(1), rows.targets.split(1), strict=True):
            logits = self.wrapped_model(tokens)
            loss = trainer_module.cross_entropy_sum(logits, targets) / (targets != IGNORE_INDEX).sum()
            (loss / len(rows.tokens)).backward()
            total += loss.detach() / len(rows.tokens)
        return total

    return forward_backward


def last_micro_batch_only(real: Callable[..., Any]) -> Callable[..., Any]:
    def forward_backward(self: Trainer, rows: Batch, num_targets: int) -> torch.Tensor:
        loss = real(self, rows, num_targets)
        self.model.zero_grad(set_to_none=True)
        last = slice(-self.micro_batch_size, None)
        logits = self.wrapped_model(rows.tokens[last])
        (trainer_module.cross_entropy_sum(logits, rows.targets[last]) / num_targets).backward()
        return loss

    return forward_backward


def all_groups_decay(real: Callable[..., None]) -> Callable[..., None]:
    def build(self: Optimizer, *args: Any) -> None:
        real(self, *args)
        for group in self.param_groups:
            group["weight_decay"] = checks.OPTIM.weight_decay

    return build


def equal_is_better(real: Callable[..., bool]) -> Callable[..., bool]:
    def evaluate(self: Trainer) -> bool:
        if self.state.best_loss is not None:
            self.state.best_loss += 1e-9
        return real(self)

    return evaluate


def with_dropout(real: Callable[..., Any]) -> Callable[..., Any]:
    def evaluate(model: torch.nn.Module, *args: Any) -> Any:
        model.eval = lambda: model  # type: ignore[method-assign, assignment, return-value]
        return real(model, *args)

    return evaluate


def with_repetition(real: Callable[..., Any]) -> Callable[..., Any]:
    def get_batch(split: Any, sequences: Any, seed: int, step: int, size: int, *rest: Any) -> Batch:
        indices = np.random.default_rng((seed, step)).integers(len(sequences), size=size)
        return trainer_module.read_sequences(split, sequences, indices)

    return get_batch


def first_batch_twice(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b, seed, step, *rest: real(a, b, seed, max(0, step - 1), *rest)


MUTANTS: dict[str, tuple[Mutate, Callable[[], None]]] = {
    "sum-instead-of-mean": (
        method(Trainer, "forward_backward", lambda real: lambda self, rows, num_targets: real(self, rows, 1)),
        checks.check_gradient,
    ),
    "mean-of-row-means": (method(Trainer, "forward_backward", mean_of_row_means), checks.check_gradient),
    "last-micro-batch-only": (method(Trainer, "forward_backward", last_micro_batch_only), checks.check_gradient),
    "no-clipping": (
        function("clip_grad_norm", lambda real: lambda model, limit: real(model, 0.0)),
        checks.check_steps,
    ),
    "norm-after-clipping": (
        function("clip_grad_norm", lambda real: lambda model, limit: (real(model, limit), real(model, limit))[1]),
        checks.check_steps,
    ),
    "lr-of-next-step": (
        function("get_lr_scale", lambda real: lambda step, *rest: real(step + 1, *rest)),
        checks.check_steps,
    ),
    "norms-and-biases-decay": (method(Optimizer, "__init__", all_groups_decay), checks.check_steps),
    "gradients-not-zeroed": (method(Optimizer, "zero_grad", lambda real: lambda self: None), checks.check_steps),
    "first-batch-twice": (function("get_batch", first_batch_twice), checks.check_steps),
    "batches-with-repetition": (function("get_batch", with_repetition), checks.check_epochs),
    "dropout-seed-without-step": (
        function("derive_seed", lambda real: lambda seed, *rest: real(seed, "dropout")),
        checks.check_dropout,
    ),
    "dropout-not-seeded": (
        lambda patch: patch.setattr(torch, "manual_seed", lambda seed: torch.default_generator),
        checks.check_dropout,
    ),
    "equal-is-better": (method(Trainer, "evaluate", equal_is_better), checks.check_best),
    "evaluation-with-dropout": (function("evaluate", with_dropout), checks.check_evaluation),
    "evaluation-without-last-batch": (
        function("evaluate", lambda real: lambda m, s, w, indices, *rest: real(m, s, w, indices[:-2], *rest)),
        checks.check_evaluation,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_of_the_step_is_noticed(name: str, monkeypatch: Patch) -> None:
    mutate, check = MUTANTS[name]
    checks.corpus()
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("check", dict.fromkeys(check for _, check in MUTANTS.values()), ids=lambda c: c.__name__)
def test_step_is_the_textbooks(check: Callable[[], None]) -> None:
    check()
