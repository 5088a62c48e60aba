"""The training loop.

`Trainer.run` evaluates, saves, steps and logs until the last step. Metrics, text samples, checkpoints, trackers and
attention are callbacks. A step is a pure function of (weights, optimizer state, seed, step), so that nothing a callback
does changes what is learned, and a resumed run continues bit for bit.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import NON_FINITE, UserError
from data import dataloader
from data.corpora import NAMED
from data.dataloader import IGNORE_INDEX, Batch, eval_indices
from data.prepare import TokenizedCorpus
from model.gpt import GPT
from training.checkpoint import Checkpoint, RunEnvironment, TrainState, provenance
from training.config import RunConfig
from training.device import DistContext, advise_on_oom
from training.distributed import clip_grad_norm, gather_weights, is_fsdp, maybe_no_sync
from training.loss import cross_entropy_sum
from training.optimizer import Optimizer, get_lr_scale
from training.signals import SignalHandler

FINAL_TARGETS = 500_000  # validation targets of the final evaluation, at most
PREFETCH_STEPS = 2
OWN_TEXT_PATIENCE = 5  # evaluations without improvement; named corpora are trained to the last step


class Callback:
    """Hooks of the training loop, in the order of `trainer.callbacks`. A callback need not have all of them.

    `metrics` is one dict that the callbacks share: each may add entries for the ones after it.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of a new or resumed run; a new run has saved its initial weights."""

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """After every step: `step` (1 after the first), `loss`, `lr`, `grad_norm`; if skipped, `skipped`, and the next
        `loss_scale` if the gradient overflowed in fp16."""

    def on_eval(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """After an evaluation, before its checkpoint: `step`, `val_loss`, `tokens_seen`; repeated if a signal interrupts it."""

    def on_save(self, trainer: Trainer) -> None:
        """When a checkpoint is due: `Checkpointer` writes it here."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step and its checkpoint; not if the run is stopped or fails."""

    def on_exit(self, trainer: Trainer, exit_code: int) -> None:
        """Last, whether the run ended (0), was stopped by a signal, or failed: release resources here."""


class Prefetcher:
    """Reads the batches of the next steps in a background thread."""

    def __init__(self, read: Callable[[int], tuple[Batch, int]]) -> None:
        self.read, self.thread = read, ThreadPoolExecutor(1, "prefetch")
        self.pending: dict[int, Future[tuple[Batch, int]]] = {}

    def get(self, step: int) -> tuple[Batch, int]:
        """The result of `read(step)`, or its error; the steps after it are read meanwhile."""
        wanted = range(step, step + 1 + PREFETCH_STEPS)
        self.pending = {s: self.pending.get(s) or self.thread.submit(self.read, s) for s in wanted}
        return self.pending.pop(step).result()


class Trainer:
    """Trains a model.

    Args:
        config: settings; a callback may replace it between steps.
        model: the plain model, which is saved and inspected.
        wrapped_model: the model that is trained: `model` itself, or compiled, DDP, or an FSDP copy of it.
        optimizer: of `wrapped_model`'s parameters.
        state: step and counters; updated in place.
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
    ) -> None:
        self.config, self.ctx, self.data = config, ctx, data
        self.model, self.wrapped_model, self.optimizer, self.state = model, wrapped_model, optimizer, state
        # Scales the loss, so that small gradients do not underflow in fp16 (Micikevicius et al. 2018, section 3.2).
        self.scaler = torch.amp.GradScaler(ctx.device.type, enabled=ctx.dtype == torch.float16)
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)
        self.callbacks: Sequence[Any] = ()  # those that log exist on the main process only
        self.resumed_from: Checkpoint | None = None
        self.environment = RunEnvironment(starts_with_eot=True)
        self.sample_tokens: list[int] | None = None  # of the current evaluation
        self.final_metrics: dict[str, float] = {}
        self.train_seconds = 0.0  # without evaluations and checkpoints
        self.train_sequences = dataloader.pack_documents(data.train, config.model.context)
        self.val_sequences = dataloader.pack_documents(data.val, config.model.context)
        self.eval_subset = eval_indices(self.val_sequences, config.train.eval_tokens)
        self.final_subset = eval_indices(self.val_sequences, FINAL_TARGETS)
        self.micro_batch_size = micro_batch_rows(config, ctx.world_size)
        self.batches = Prefetcher(self.read_batch)
        self.saved: tuple[int, int] | None = None  # (step, last evaluated step) of the newest checkpoint
        self.stop = SignalHandler()
        self.is_stopped = False  # by a signal or `run.stop_at_step`

    def run(self) -> None:
        """Train to the last step, until patience runs out, or until a signal; save whatever was learned.

        Raises:
            UserError: if the loss is not finite (exit code 5), memory or the disk is full (6), ...
            SystemExit: after a signal (128 + its number) or at `run.stop_at_step` (0), once the checkpoint is written.
        """
        exit_code = 1
        try:
            self.save()
            self.notify("on_start")
            with advise_on_oom(self.micro_batch_size, self.config.train.batch_size), self.stop.installed():
                self.loop()
            self.notify("on_end")
            exit_code = 0
        except (SystemExit, UserError) as error:
            exit_code = int(error.code or 0) if isinstance(error, SystemExit) else error.exit_code
            raise
        finally:
            self.batches.thread.shutdown(wait=False, cancel_futures=True)
            self.notify("on_exit", exit_code)

    def loop(self) -> None:
        """All processes run it in lockstep: they agree on whether to stop before each step."""
        while True:
            state, train, run = self.state, self.config.train, self.config.run
            is_due = state.step % train.eval_every == 0 or state.step >= train.steps
            evaluated = state.last_eval_step if self.config.model.init else max(state.last_eval_step, 0)
            is_best = is_due and evaluated < state.step and self.evaluate()
            signum = self.ctx.all_reduce_max(self.stop.poll())
            self.is_stopped = signum > 0 or 0 < run.stop_at_step <= state.step
            is_last = self.is_done()
            if is_best or self.is_stopped or is_last or state.step % train.save_every == 0:
                self.save()
            if self.is_stopped:
                self.ctx.all_reduce_max(0)  # wait for all: torchrun ends the others soon after the first one exits
                raise SystemExit(128 + signum if signum else 0)
            if is_last:
                return
            metrics = self.train_step()
            self.notify("on_step", metrics)

    def is_done(self) -> bool:
        """Whether the last step is done, or patience has run out."""
        state, train = self.state, self.config.train
        automatic = 0 if self.config.data.source in NAMED else OWN_TEXT_PATIENCE
        patience = automatic if train.patience < 0 else train.patience
        return state.step >= train.steps or 0 < patience <= state.evals_without_improvement

    def provenance(self) -> dict[str, str]:
        return provenance(self.model, self.data.tokenizer, self.state)

    def notify(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            if (method := getattr(callback, hook, None)) is not None:
                method(self, *args)

    def should_log(self, metrics: dict[str, Any]) -> bool:
        """Whether the metrics of this step are written: every `log.every` steps, at the end, and if it was skipped."""
        step = self.state.step
        return step % self.config.log.every == 0 or step >= self.config.train.steps or "skipped" in metrics

    def save(self) -> None:
        """Write a checkpoint, unless the newest one is of this very state."""
        position = (self.state.step, self.state.last_eval_step)
        if self.saved != position:
            self.state.scaler = self.scaler.state_dict()
            self.notify("on_save")
            self.saved = position

    def read_batch(self, step: int) -> tuple[Batch, int]:
        """This process's rows of a step's batch, and how many valid targets the whole batch has."""
        seed, size, ctx = self.config.run.seed, self.config.train.batch_size, self.ctx
        return dataloader.get_batch(self.data.train, self.train_sequences, seed, step, size, ctx.rank, ctx.world_size)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; its loss (before the update), learning rate and gradient norm."""
        start = time.perf_counter()
        optim, state, seed = self.config.optim, self.state, self.config.run.seed
        self.optimizer.lr_scale = get_lr_scale(state.step, self.config.train.steps, optim)
        rows, num_targets = self.batches.get(state.step)
        if self.config.model.dropout:  # seeded by the step, so that a resumed run drops the same activations
            torch.manual_seed(derive_seed(seed, "dropout", state.step, self.ctx.rank))
        mean_loss = self.forward_backward(rows, num_targets)
        self.scaler.unscale_(self.optimizer)  # type: ignore[arg-type]
        norm = clip_grad_norm(self.wrapped_model, optim.grad_clip)
        loss, grad_norm = torch.stack([mean_loss, norm]).tolist()  # the only wait for the device in a step
        metrics: dict[str, Any] = {"loss": loss, "lr": self.optimizer.lr_scale * optim.lr, "grad_norm": grad_norm}
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.optimizer.step()
            state.tokens_seen += num_targets
        else:
            metrics = self.skip_step(loss, grad_norm)
        self.scaler.update()
        state.step += 1
        self.train_seconds += time.perf_counter() - start
        return {"step": state.step, **metrics}

    def forward_backward(self, rows: Batch, num_targets: int) -> Tensor:
        """Accumulate the gradient of the mean loss over the whole batch's `num_targets` targets; returns that loss."""
        ctx = self.ctx
        tokens, targets = ctx.to_device(rows.tokens), ctx.to_device(rows.targets)
        total = torch.zeros((), device=ctx.device)
        rows_at_once = self.micro_batch_size
        micro_batches = list(zip(tokens.split(rows_at_once), targets.split(rows_at_once), strict=True))
        for i, (inputs, labels) in enumerate(micro_batches):
            with maybe_no_sync(self.wrapped_model, i == len(micro_batches) - 1):
                with ctx.autocast():
                    logits = self.wrapped_model(inputs)
                loss = cross_entropy_sum(logits, labels) / num_targets
                # DDP and FSDP average gradients over processes; the loss is a sum.
                self.scaler.scale(loss * ctx.world_size).backward()
            total += loss.detach()
        return ctx.all_reduce_sum(total)

    def skip_step(self, loss: float, grad_norm: float) -> dict[str, Any]:
        """Drop a gradient that is not finite. Loss and norm are the same on every process, so all decide alike.

        In fp16 a gradient may only have overflowed: its step is not counted, and the loss scale is halved, down to 1. Raises
        UserError (5) if no more steps may be skipped.
        """
        state, train, seed = self.state, self.config.train, self.config.run.seed
        self.optimizer.zero_grad()
        if math.isfinite(loss) and (scale := self.scaler.get_scale()) > 1:
            return {"skipped": state.skipped_steps, "loss_scale": scale * self.scaler.get_backoff_factor()}
        if state.skipped_steps >= train.skip_nonfinite_steps:
            newest = self.saved[0] if self.saved else 0
            raise UserError(
                f"the loss is {loss:.4g} and the gradient norm {grad_norm:.4g} at step {state.step} (seed {seed}); "
                f"the newest checkpoint is of step {newest}. Lower optim.lr "
                f"(now {self.config.optim.lr}) or optim.muon_lr, or allow such steps with train.skip_nonfinite_steps",
                NON_FINITE,
            )
        state.skipped_steps += 1
        return {"skipped": state.skipped_steps}

    def evaluate(self) -> bool:
        """Compute the validation loss and call `on_eval`; True if the loss is the best so far.

        A signal interrupts it; it is then repeated when the run is resumed.
        """
        state = self.state
        val_loss, num_targets = self.validation_loss(self.eval_subset, self.stop)
        if not num_targets:
            return False
        gather_weights(self.wrapped_model, self.model)
        metrics = {"step": state.step, "val_loss": val_loss, "tokens_seen": state.tokens_seen}
        completed = self.stop.run_interruptible(lambda: self.notify("on_eval", metrics))
        if self.ctx.all_reduce_max(not completed):
            return False
        state.last_eval_step = state.step
        is_best = math.isfinite(val_loss) and (state.best_loss is None or val_loss < state.best_loss)
        if is_best:
            state.best_loss, state.best_step, state.evals_without_improvement = val_loss, state.step, 0
        else:
            state.evals_without_improvement += 1
        return is_best

    @torch.no_grad()
    def validation_loss(
        self, indices: np.ndarray, stop: SignalHandler | None = None, split: Literal["val", "train"] = "val"
    ) -> tuple[float, int]:
        """Mean loss in nats over every valid target of some sequences of a split, and how many targets these are.

        The sequences are divided among the processes. Each process runs the same number of forward passes, the last
        ones perhaps on a dummy batch: FSDP communicates in each of them. A signal recorded in `stop` ends it: (nan, 0).
        """
        data, sequences = getattr(self.data, split), getattr(self, f"{split}_sequences")
        ctx, rows = self.ctx, self.micro_batch_size
        model = self.wrapped_model if is_fsdp(self.wrapped_model) else self.model
        totals = torch.zeros(2, dtype=torch.float64)  # sum of losses, number of targets
        own = indices[ctx.rank :: ctx.world_size]
        model.eval()
        try:
            for first in range(0, -(-len(indices) // ctx.world_size), rows):
                if stop is not None and ctx.all_reduce_max(stop.signum):
                    return math.nan, 0
                chosen = own[first : first + rows]
                starts, counts = dataloader.select_sequences(sequences, chosen if len(chosen) else indices[:1])
                batch = dataloader.read_sequences(data, starts, counts, sequences.context)
                with ctx.autocast():
                    logits = model(ctx.to_device(batch.tokens))
                if len(chosen):
                    targets = ctx.to_device(batch.targets)
                    totals[0] += cross_entropy_sum(logits, targets).cpu()  # not every device has float64
                    totals[1] += (batch.targets != IGNORE_INDEX).sum()
            loss_sum, num_targets = ctx.all_reduce_sum(totals).tolist()
            return loss_sum / num_targets, int(num_targets)
        finally:
            model.train()


def derive_seed(seed: int, purpose: str, step: int = 0, rank: int = 0) -> int:
    """The seed of one random generator: the first 63 bits of BLAKE2b over `seed/purpose/step/rank`."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def micro_batch_rows(config: RunConfig, world_size: int) -> int:
    """Sequences that each process holds in memory at once. Raises UserError (2) if the batch cannot be divided evenly."""
    batch_size = config.train.batch_size
    if batch_size % world_size:
        raise UserError(f"train.batch_size is {batch_size}; it must be a multiple of the {world_size} processes")
    per_process = batch_size // world_size
    return min(config.train.micro_batch_size or per_process, per_process)
