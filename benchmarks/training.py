"""One training in this process, without a folder: what it learns, and the time of its steps."""

from __future__ import annotations

import time
from dataclasses import dataclass

from training.config import RunConfig


@dataclass(frozen=True)
class Trained:
    """What came of a training."""

    loss: float
    """Nats/token over the whole validation split."""
    seconds: float
    """Of its steps alone."""


def trained(config: RunConfig) -> Trained:
    """Train as `train.py` would, evaluate once, and keep nothing."""
    from data.prepare import prepare
    from model.gpt import GPT
    from training.checkpoint import TrainState
    from training.device import get_dist_context, resolve_attention
    from training.optimizer import Optimizer
    from training.trainer import Trainer

    data, ctx = prepare(config.data), get_dist_context(config.train.dtype, config.run.threads)
    shape = resolve_attention(config.model, ctx.device, ctx.dtype)
    model = GPT(shape, data.tokenizer.vocab_size, config.run.seed)
    trainer = Trainer(config, ctx, data, model, model, Optimizer(model, config.optim), TrainState())
    start = time.perf_counter()
    while trainer.state.step < config.train.steps:
        trainer.train_step()
    seconds = time.perf_counter() - start
    return Trained(trainer.full_validation_loss()[0], seconds)
