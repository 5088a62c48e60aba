"""The loop: set the rate, step, log, evaluate, save.

Everything it needs is handed in; where it stands is its `TrainState`. A step is a pure function of (weights, moments,
seed, step), so that nothing that happens between steps can change what is learned.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from data.batches import IGNORED, Batch, Windows, batch, document_windows, evaluation_windows, read_windows
from data.prepare import Prepared
from data.shards import TokenSplit
from model.gpt import GPT
from runtime.checkpoint import TrainState
from runtime.config import RunConfig
from runtime.device import Machine
from runtime.errors import INTERRUPTED, NON_FINITE, TERMINATED, UserError
from runtime.optim import Optimizer, lr_at

Tell = Callable[[dict[str, Any]], None]


def loss_sum(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Sum over all counted targets of -log p(target), in nats."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def evaluate(
    model: nn.Module, split: TokenSplit, windows: Windows, indices: Any, rows: int, machine: Machine
) -> tuple[float, int]:
    """Mean loss in nats over every counted target of the windows `indices`, and how many targets that is."""
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=machine.device)
    mine = indices[machine.rank :: machine.world]
    for first in range(0, len(mine), rows):
        chosen = read_windows(split, windows, mine[first : first + rows])
        with machine.autocast():
            logits = model(chosen.tokens.to(machine.device))
        targets = chosen.targets.to(machine.device)
        total[0] += loss_sum(logits, targets)
        total[1] += (targets != IGNORED).sum()
    model.train(was_training)
    total = machine.sum(total)
    return float(total[0] / total[1]), int(total[1])


@dataclass
class Stop:
    """Remembers a signal until the step is done; a second one ends the program at once."""

    signal: int = 0

    def listen(self) -> None:
        """Take over SIGINT and SIGTERM."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.signal == signal.SIGINT else TERMINATED


class Trainer:
    """One run of the loop.

    Args:
        fast: the model as it is stepped: compiled, or shared among processes; `model` is the plain one beneath.
        state: where the run stands; it moves on with every step.
    """

    def __init__(
        self,
        config: RunConfig,
        machine: Machine,
        data: Prepared,
        model: GPT,
        fast: nn.Module,
        optimizer: Optimizer,
        state: TrainState,
    ) -> None:
        self.config, self.machine, self.data = config, machine, data
        self.model, self.fast, self.optimizer, self.state = model, fast, optimizer, state
        self.windows = document_windows(data.train, config.model.context)
        self.val_windows = document_windows(data.val, config.model.context)
        self.val_part = evaluation_windows(self.val_windows, config.train.eval_tokens)
        share = config.train.batch_size // machine.world
        self.rows = min(config.train.micro_batch or share, share)
        self.stop = Stop()

    def run(self, on_step: Tell, on_evaluation: Tell, save: Callable[[], None]) -> None:
        """Train until the last step, the end of patience, or a signal; save whatever was learned.

        Args:
            on_step: told the metrics of a step, every `log.every` steps.
            on_evaluation: told those of an evaluation, before the checkpoint is written.
            save: writes a checkpoint.

        Raises:
            UserError: if the loss is no longer finite (exit code 5).
            SystemExit: after a signal, once the checkpoint is written (130 or 143).
        """
        settings, state = self.config.train, self.state
        self.stop.listen()
        while state.step < settings.steps:
            metrics = self.step()
            last = state.step == settings.steps
            if state.step % self.config.log.every == 0 or last:
                on_step({"step": state.step, "loss": float(metrics["loss"]), "lr": metrics["lr"]})
            due = state.step % settings.eval_every == 0 or last
            best = due and self.evaluate(on_evaluation)
            last |= 0 < settings.patience <= state.stale
            stopping = bool(self.stop.signal)  # asked once: what is stopped for has been saved
            if best or last or stopping or state.step % settings.save_every == 0:
                save()
            if stopping:
                raise SystemExit(self.stop.exit_code)
            if last:
                return

    def step(self) -> dict[str, Any]:
        """One optimizer step on the batch of this step; its loss, before the step, and its learning rate."""
        settings, state, machine = self.config.train, self.state, self.machine
        share = lr_at(state.step, settings.steps, self.config.optim)
        self.optimizer.set_rate(share)
        rows = batch(
            self.data.train,
            self.windows,
            self.config.run.seed,
            state.step,
            settings.batch_size,
            machine.rank,
            machine.world,
        )
        if self.config.model.dropout:  # seeded by the step, so that a resumed run drops the same activations
            torch.manual_seed(hash((self.config.run.seed, state.step, machine.rank)))
        loss, counted = self.gradient(rows)
        norm = self.clip()
        if not math.isfinite(norm):
            raise UserError(
                f"loss {float(loss):.4g}, gradient norm {norm:.4g} at step {state.step} (seed {self.config.run.seed}): "
                f"nothing was saved since; lower optim.lr (now {self.config.optim.lr}) or optim.muon_lr",
                NON_FINITE,
            )
        self.optimizer.step()
        state.step += 1
        state.tokens_seen += counted
        return {"loss": loss, "lr": share * self.config.optim.lr}

    def gradient(self, rows: Batch) -> tuple[Tensor, int]:
        """Leave the gradient of the mean loss over every counted target of the global batch in the parameters."""
        machine = self.machine
        tokens, targets = rows.tokens.to(machine.device), rows.targets.to(machine.device)
        counted = machine.sum((targets != IGNORED).sum())
        total = torch.zeros((), device=machine.device)
        pieces = list(zip(tokens.split(self.rows), targets.split(self.rows), strict=True))
        for i, (inputs, wanted) in enumerate(pieces):
            with machine.last_only(self.fast, i == len(pieces) - 1):
                with machine.autocast():
                    logits = self.fast(inputs)
                loss = loss_sum(logits, wanted) / counted
                (loss * machine.world).backward()  # sharing averages over the processes, and the loss is a sum
            total += loss.detach()
        return machine.sum(total), int(counted)

    def clip(self) -> float:
        """Scale the gradient down to `optim.clip`; its norm before that."""
        limit = self.config.optim.clip or math.inf
        return float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))

    def evaluate(self, on_evaluation: Tell) -> bool:
        """The loss on the fixed part of the validation split; True if it is the best so far."""
        loss, _ = evaluate(self.model, self.data.val, self.val_windows, self.val_part, self.rows, self.machine)
        best = self.state.best_loss is None or loss < self.state.best_loss
        if best:
            self.state.best_loss, self.state.best_step, self.state.stale = loss, self.state.step, 0
        else:
            self.state.stale += 1
        on_evaluation({"step": self.state.step, "val_loss": loss, "tokens_seen": self.state.tokens_seen})
        return best

    def whole_validation(self, at_most: int = 500_000) -> tuple[float, int]:
        """The loss over the whole validation split, or an even part of it above `at_most` targets."""
        indices = evaluation_windows(self.val_windows, at_most)
        return evaluate(self.model, self.data.val, self.val_windows, indices, self.rows, self.machine)
