"""The training step against a second one, from the textbook; and broken in ways that happen by accident.

None of the mutants raises an error: each trains a little worse, or reports something that is not so. Each check builds
its own trainer, so that it sees what a test has patched.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data import dataloader
from data.dataloader import IGNORE_INDEX, Batch, get_batch
from model.gpt import GPT, Dropout
from tests.model.helpers import relative_difference
from tests.training.helpers import OPTIM, TRAIN, corpus, make_trainer
from training import trainer as loop
from training.checkpoint import TrainState
from training.optimizer import Optimizer, get_lr_scale
from training.trainer import Trainer

STEPS = TRAIN.steps


def batch_of(trainer: Trainer, step: int) -> Batch:
    seed, size = trainer.config.run.seed, trainer.config.train.batch_size
    return get_batch(trainer.data.train, trainer.train_sequences, seed, step, size)[0]


def mean_loss(model: GPT, rows: Batch) -> Tensor:
    logits = model(rows.tokens)
    return F.cross_entropy(logits.flatten(0, 1), rows.targets.flatten(), ignore_index=IGNORE_INDEX)


def check_gradient() -> None:
    """The gradient is that of the mean over all valid targets of the batch, whatever the micro-batch size."""
    for micro_batch_size in (0, 4, 1):
        trainer = make_trainer(replace(TRAIN, micro_batch_size=micro_batch_size))
        batches = [batch_of(trainer, step) for step in range(STEPS)]
        rows = max(batches, key=lambda rows: len((rows.targets != IGNORE_INDEX).sum(dim=1).unique()))
        counts = (rows.targets != IGNORE_INDEX).sum(dim=1)
        assert len(counts.unique()) > 1, "with equal counts a mean of means would be right"
        loss = trainer.forward_backward(rows, int(counts.sum()))
        gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
        trainer.model.zero_grad()
        expected = mean_loss(trainer.model, rows)
        expected.backward()
        assert math.isclose(float(loss), float(expected.detach()), rel_tol=1e-6)
        for name, p in trainer.model.named_parameters():
            assert p.grad is not None and relative_difference(gradients[name], p.grad) <= 1e-5, name


def check_steps() -> None:
    """Weights after some steps: each step's batch, clipped gradient (Pascanu et al. 2013), learning rate, and AdamW."""
    trainer, model = make_trainer(), make_trainer().model
    start = [p.detach().clone() for p in model.parameters()]
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == decays]} for decays in (True, False)]
    groups[1]["weight_decay"] = 0.0  # type: ignore[assignment]  # norms and biases
    adamw = torch.optim.AdamW(groups, betas=(OPTIM.beta1, OPTIM.beta2), weight_decay=OPTIM.weight_decay, foreach=False)
    for step in range(STEPS):
        metrics, lr = trainer.train_step(), OPTIM.lr * get_lr_scale(step, STEPS, OPTIM)
        loss = mean_loss(model, batch_of(trainer, step))
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.grad_clip))
        assert norm > OPTIM.grad_clip, "a gradient that is not clipped does not test clipping"
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        adamw.zero_grad()
        expected = {"loss": float(loss.detach()), "grad_norm": norm, "lr": lr}
        for name, value in expected.items():
            assert math.isclose(metrics[name], value, rel_tol=1e-4), f"{name} of step {step}"
    tokens_seen = sum(int((batch_of(trainer, step).targets != IGNORE_INDEX).sum()) for step in range(STEPS))
    assert (trainer.state.step, trainer.state.tokens_seen) == (STEPS, tokens_seen)
    for trained, p, first in zip(trainer.model.parameters(), model.parameters(), start, strict=True):
        assert relative_difference(trained.detach() - first, p.detach() - first) <= 1e-4


def dropout_masks(step: int, seed: int) -> list[Tensor]:
    """Which activations a step drops when `seed` was the global generator's before it."""
    trainer, masks = make_trainer(dropout=0.5, state=TrainState(step=step)), []
    for module in trainer.model.modules():
        if isinstance(module, Dropout):
            module.register_forward_hook(lambda m, inputs, out: masks.append(out == 0))
    torch.random.default_generator.manual_seed(seed)
    trainer.train_step()
    return masks


def check_dropout() -> None:
    """Each step has its own dropout masks, the same ones whenever that step is computed."""
    first, again, other = dropout_masks(0, seed=1), dropout_masks(0, seed=2), dropout_masks(1, seed=1)
    assert first and all(map(torch.equal, first, again)), "a resumed run would drop other activations"
    assert not any(map(torch.equal, first, other)), "every step drops the same activations"


def check_evaluation() -> None:
    """The mean over all valid targets of the subset, without dropout; nothing is learned from it."""
    trainer = make_trainer(replace(TRAIN, micro_batch_size=3), dropout=0.5)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.model.train()
    result = trainer.validation_loss(trainer.eval_subset)
    assert trainer.model.training and all(p.grad is None for p in trainer.model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    starts, counts = dataloader.select_sequences(trainer.val_sequences, trainer.eval_subset)
    rows = dataloader.read_sequences(trainer.data.val, starts, counts, trainer.val_sequences.context)
    counts = (rows.targets != IGNORE_INDEX).sum(dim=1)
    assert len(counts.unique()) > 1 and len(counts) % 3, "with equal counts a mean of means would be right"
    trainer.model.eval()
    with torch.no_grad():
        expected = float(mean_loss(trainer.model, rows))
    assert result is not None and result[1] == int(counts.sum()) and math.isclose(result[0], expected, rel_tol=1e-5)


def mean_of_row_means(real: Any, self: Trainer, rows: Batch, num_targets: int) -> Tensor:
    """Short documents weigh as much as long ones."""
    total = torch.zeros(())
    for tokens, targets in zip(rows.tokens.split(1), rows.targets.split(1), strict=True):
        loss = mean_loss(self.model, Batch(tokens, targets)) / len(rows.tokens)
        loss.backward()
        total += loss.detach()
    return total


def last_micro_batch_only(real: Any, self: Trainer, rows: Batch, num_targets: int) -> Any:
    loss, last = real(self, rows, num_targets), slice(-self.micro_batch_size, None)
    self.model.zero_grad(set_to_none=True)
    loop.cross_entropy_sum(self.model(rows.tokens[last]), rows.targets[last]).div(num_targets).backward()
    return loss


def all_groups_decay(real: Any, self: Optimizer, *args: Any) -> None:
    real(self, *args)
    for group in self.param_groups:
        group["weight_decay"] = OPTIM.weight_decay


def evaluation_with_dropout(real: Any, self: Trainer, *args: Any) -> Any:
    self.model.eval = lambda: self.model  # type: ignore[method-assign]
    return real(self, *args)


def first_batch_twice(real: Any, split: Any, sequences: Any, seed: int, step: int, *rest: Any) -> Any:
    return real(split, sequences, seed, max(0, step - 1), *rest)


Check = Callable[[], None]
MUTANTS: list[tuple[str, Check, object, str, Callable[..., Any]]] = [
    ("sum instead of mean", check_gradient, Trainer, "forward_backward", lambda f, self, rows, n: f(self, rows, 1)),
    ("mean of row means", check_gradient, Trainer, "forward_backward", mean_of_row_means),
    ("last micro-batch only", check_gradient, Trainer, "forward_backward", last_micro_batch_only),
    ("no clipping", check_steps, loop, "clip_grad_norm", lambda f, model, limit: f(model, 0.0)),
    ("norm after clipping", check_steps, loop, "clip_grad_norm", lambda f, *args: (f(*args), f(*args))[1]),
    ("lr of the next step", check_steps, loop, "get_lr_scale", lambda f, step, *rest: f(step + 1, *rest)),
    ("norms and biases decay", check_steps, Optimizer, "__init__", all_groups_decay),
    ("gradients not zeroed", check_steps, Optimizer, "zero_grad", lambda f, self: None),
    ("first batch twice", check_steps, dataloader, "get_batch", first_batch_twice),
    ("dropout seed without step", check_dropout, loop, "derive_seed", lambda f, seed, *rest: f(seed, "dropout")),
    ("dropout not seeded", check_dropout, torch, "manual_seed", lambda f, seed: torch.default_generator),
    ("evaluation with dropout", check_evaluation, Trainer, "validation_loss", evaluation_with_dropout),
    ("last batch left out", check_evaluation, Trainer, "validation_loss", lambda f, self, i, *a: f(self, i[:-2], *a)),
]


@pytest.mark.parametrize(("name", "check", "owner", "attribute", "mutant"), MUTANTS, ids=[m[0] for m in MUTANTS])
def test_mutant_of_the_step_is_noticed(
    name: str, check: Check, owner: Any, attribute: str, mutant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(owner, attribute)
    corpus()
    monkeypatch.setattr(owner, attribute, lambda *args: mutant(real, *args))
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("check", dict.fromkeys(mutant[1] for mutant in MUTANTS), ids=lambda c: c.__name__)
def test_step_is_the_textbooks(check: Check) -> None:
    check()
