"""The loop: what is due, save, step, log.

Everything it needs is handed in; where it stands is its `TrainState`. A step is a pure function of (weights, moments,
seed, step), so that nothing that happens between steps can change what is learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import NON_FINITE, UserError
from data.dataloader import (
    IGNORE_INDEX,
    Batch,
    PackedSequences,
    batch,
    documents_in_batch,
    eval_indices,
    num_valid_tokens,
    pack_documents,
    read_sequences,
)
from data.prepare import TokenizedCorpus
from data.token_dataset import TokenSplit
from model.gpt import GPT
from training.checkpoint import TrainState
from training.config import RunConfig
from training.device import DistContext
from training.distributed import clip_grad_norm, gather_weights, is_fsdp, maybe_no_sync
from training.loss import cross_entropy_sum
from training.optimizer import Optimizer, get_lr_scale
from training.signals import SignalHandler

Tell = Callable[[dict[str, Any]], None]
FINAL_TARGETS = 500_000
"""Validation targets of the last evaluation, at most."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: TokenSplit,
    windows: PackedSequences,
    indices: Any,
    rows: int,
    ctx: DistContext,
    stop: SignalHandler | None = None,
) -> tuple[float, int] | None:
    """Mean loss in nats over every counted target of the windows `indices`, and how many targets that is.

    Every process reads as many batches as the others, the last ones perhaps empty: where a model is split among them,
    nobody computes alone. None if `stop` broke it off.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=ctx.device)
    mine = indices[ctx.rank :: ctx.world_size]
    share = -(-len(indices) // ctx.world_size)
    for first in range(0, share, rows):
        if stop is not None and ctx.all_reduce_max(stop.signum):
            break
        chosen = mine[first : first + rows]
        read = read_sequences(split, windows, chosen if len(chosen) else indices[:1])
        with ctx.autocast():
            logits = model(ctx.to_device(read.tokens))
        if len(chosen):
            targets = ctx.to_device(read.targets)
            total[0] += cross_entropy_sum(logits, targets)
            total[1] += (targets != IGNORE_INDEX).sum()
    else:
        total = ctx.all_reduce_sum(total)
        model.train(was_training)
        return float(total[0] / total[1]), int(total[1])
    model.train(was_training)
    return None


class Trainer:
    """One run of the loop.

    Args:
        model: the plain model: what is looked at and saved.
        wrapped_model: the model as it is stepped: compiled, shared with other processes, or split among them.
        state: where the run stands; it moves on with every step.
        resumed: whether that is what a checkpoint says.
    """

    def __init__(
        self,
        config: RunConfig,
        ctx: DistContext,
        data: TokenizedCorpus,
        model: GPT,
        wrapped_model: nn.Module,
        optimizer: Optimizer,
        state: TrainState,
        resumed: bool = False,
    ) -> None:
        self.config, self.ctx, self.data = config, ctx, data
        self.model, self.wrapped_model, self.optimizer, self.state = model, wrapped_model, optimizer, state
        self.train_sequences = pack_documents(data.train, config.model.context)
        self.val_sequences = pack_documents(data.val, config.model.context)
        self.val_part = eval_indices(self.val_sequences, config.train.eval_tokens)
        self.rows = micro_batch_rows(config, ctx.world_size)
        self.saved = (state.step, state.last_eval_step) if resumed else (-1, -1)
        self.stop = SignalHandler()
        self.asked = 0  # the signal that the processes have agreed to stop for

    def run(
        self, on_step: Tell, on_evaluation: Tell, save: Callable[[], None], look: Callable[[], None] | None = None
    ) -> None:
        """Train until the last step, the end of patience, or a signal; save whatever was learned.

        All processes pass through here in step: they agree on whether to stop before each step.

        Args:
            on_step: told the metrics of a step, every `log.every` steps.
            on_evaluation: told those of an evaluation, before the checkpoint is written.
            save: writes a checkpoint.
            look: called before each step; it may set another `config`.

        Raises:
            UserError: if the loss is no longer finite (exit code 5), a disk or a file fails, ...
            SystemExit: after a signal (130, 143) or at `run.stop_at_step` (0), once the checkpoint is written.
        """
        state = self.state
        with self.stop.installed():
            while True:
                settings = self.config.train
                best = self.is_due() and self.evaluate(on_evaluation)
                stopping = self.is_asked_to_stop()
                last = state.step >= settings.steps or 0 < settings.patience <= state.evals_without_improvement
                position = (state.step, state.last_eval_step)
                if (best or last or stopping or state.step % settings.save_every == 0) and self.saved != position:
                    save()
                    self.saved = position
                if stopping:
                    self.ctx.all_reduce_max(0)  # nobody leaves before all is saved: torchrun would soon end the others
                    raise SystemExit(128 + self.asked if self.asked else 0)
                if last:
                    return
                if look is not None:
                    look()
                self.tell(self.train_step(), on_step)

    def is_due(self) -> bool:
        """Whether an evaluation of this step is wanted, and has not been made."""
        step, settings = self.state.step, self.config.train
        wanted = step > 0 and (step % settings.eval_every == 0 or step >= settings.steps)
        return wanted and self.state.last_eval_step < step

    def is_asked_to_stop(self) -> bool:
        """Whether any process was sent a signal, or `run.stop_at_step` is reached; the same answer everywhere."""
        self.asked = self.ctx.all_reduce_max(self.stop.signum)  # the handler's own number is never written here
        return bool(self.asked) or 0 < self.config.run.stop_at_step <= self.state.step

    def tell(self, metrics: dict[str, Any], on_step: Tell) -> None:
        """Pass on the metrics of a step that is due; a step that was passed over always is."""
        step = self.state.step
        if "skipped" in metrics:
            on_step({"step": step, **metrics})
        elif step % self.config.log.every == 0 or step >= self.config.train.steps:
            on_step({"step": step, **metrics, "loss": float(metrics["loss"])})

    def train_step(self) -> dict[str, Any]:
        """One optimizer step on the batch of this step; its loss, before the step, and its learning rate."""
        settings, state, ctx, seed = self.config.train, self.state, self.ctx, self.config.run.seed
        share = get_lr_scale(state.step, settings.steps, self.config.optim)
        self.optimizer.set_lr_scale(share)
        rows = batch(
            self.data.train, self.train_sequences, seed, state.step, settings.batch_size, ctx.rank, ctx.world_size
        )
        counted = num_valid_tokens(self.train_sequences, seed, state.step, settings.batch_size)
        if self.config.model.dropout:  # seeded by the step, so that a resumed run drops the same activations
            torch.manual_seed(hash((seed, state.step, ctx.rank)))
        loss = self.forward_backward(rows, counted)
        norm = clip_grad_norm(self.wrapped_model, self.config.optim.grad_clip)
        metrics: dict[str, Any] = {"loss": loss, "lr": share * self.config.optim.lr}
        if math.isfinite(norm) and math.isfinite(float(loss)):
            self.optimizer.step()
            state.tokens_seen += counted
        else:
            metrics = self.pass_over(float(loss), norm)
        state.step += 1
        return metrics

    def forward_backward(self, rows: Batch, counted: int) -> Tensor:
        """Leave the gradient of the mean loss over the whole batch's `counted` targets in the parameters; that loss."""
        ctx = self.ctx
        tokens, targets = ctx.to_device(rows.tokens), ctx.to_device(rows.targets)
        total = torch.zeros((), device=ctx.device)
        pieces = list(zip(tokens.split(self.rows), targets.split(self.rows), strict=True))
        for i, (inputs, wanted) in enumerate(pieces):
            with maybe_no_sync(self.wrapped_model, i == len(pieces) - 1):
                with ctx.autocast():
                    logits = self.wrapped_model(inputs)
                loss = cross_entropy_sum(logits, wanted) / counted
                (loss * ctx.world_size).backward()  # sharing averages over the processes, and the loss is a sum
            total += loss.detach()
        return ctx.all_reduce_sum(total)

    def pass_over(self, loss: float, norm: float) -> dict[str, Any]:
        """Forget a gradient that is not finite; loss and norm are everybody's, so every process decides alike.

        Raises:
            UserError: if no more such steps may be passed over (exit code 5).
        """
        state, settings, seed = self.state, self.config.train, self.config.run.seed
        self.optimizer.zero_grad()
        documents = documents_in_batch(self.data.train, self.train_sequences, seed, state.step, settings.batch_size)
        if state.skipped_steps >= settings.skip_nonfinite_steps:
            raise UserError(
                f"loss {loss:.4g}, gradient norm {norm:.4g} at step {state.step} (seed {seed}, training documents "
                f"{listed(documents)}): nothing was saved since step {max(0, self.saved[0])}; lower optim.lr (now "
                f"{self.config.optim.lr}) or optim.muon_lr, or pass over such steps by train.skip_nonfinite_steps",
                NON_FINITE,
            )
        state.skipped_steps += 1
        return {"skipped": state.skipped_steps, "documents": documents}

    def evaluate(self, on_evaluation: Tell) -> bool:
        """The loss on the fixed part of the validation split; True if it is the best so far.

        A signal breaks it off: it is made again when the run goes on.
        """
        state = self.state
        seen = self.validation_loss(self.val_part, self.stop)
        if seen is None:
            return False
        gather_weights(self.wrapped_model, self.model)
        found = {"step": state.step, "val_loss": seen[0], "tokens_seen": state.tokens_seen}
        told = self.stop.run_interruptible(lambda: on_evaluation(found))
        if self.ctx.all_reduce_max(not told):
            return False
        state.last_eval_step = state.step
        best = math.isfinite(seen[0]) and (state.best_loss is None or seen[0] < state.best_loss)
        if best:
            state.best_loss, state.best_step, state.evals_without_improvement = seen[0], state.step, 0
        else:
            state.evals_without_improvement += 1
        return best

    def validation_loss(self, indices: Any, stop: SignalHandler | None = None) -> tuple[float, int] | None:
        """Mean loss over some windows of the validation split, and how many targets they have."""
        model = self.wrapped_model if is_fsdp(self.wrapped_model) else self.model
        return evaluate(model, self.data.val, self.val_sequences, indices, self.rows, self.ctx, stop)

    def full_validation_loss(self) -> tuple[float, int]:
        """The loss over the whole validation split, or an even part of it above `FINAL_TARGETS`."""
        seen = self.validation_loss(eval_indices(self.val_sequences, FINAL_TARGETS))
        assert seen is not None  # there was nothing to break it off
        return seen


def micro_batch_rows(config: RunConfig, world: int) -> int:
    """PackedSequences that each of `world` processes holds in memory at once."""
    share = config.train.batch_size // world
    return min(config.train.micro_batch_size or share, share)


def listed(numbers: list[int], at_most: int = 8) -> str:
    """Numbers in words: the first few, and how many more."""
    shown = ", ".join(map(str, numbers[:at_most]))
    return f"{shown} and {len(numbers) - at_most} more" if len(numbers) > at_most else shown
