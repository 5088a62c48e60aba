"""How long a step takes: measured here for a few seconds, or reckoned for a GPU that is not here.

`train.py --plan` asks it. What is measured is the real loop on random tokens (`training/footprint.py`).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from data.dataloader import get_batch
from model.gpt import GPT
from training.config import RunConfig
from training.device import DistContext, compile_model, measure_matmul_flops
from training.flops import flops_per_token, muon_flops
from training.footprint import Footprint, stand_in
from training.hardware import GPU
from training.timing import median, once
from training.trainer import Trainer

SECONDS = 4.0
"""That steps are measured for."""
AT_LEAST, AT_MOST = 3, 60
"""Steps that are measured."""
WARM_UP = 2
"""Steps before: the first ones allocate memory and choose kernels."""
UTILISATION = 0.4
"""Share of the data sheet's peak that the products of a GPT of some size are taken to reach in eager mode."""
CALL_SECONDS = 6e-6
"""Time that a processor is taken to need to set a GPU on one operation: a small model on a large GPU waits for that."""


@dataclass(frozen=True)
class Speed:
    """Seconds, and how they are known."""

    step: float
    """Of an optimizer step on all processes together."""
    window: float
    """Of one window in an evaluation, spread over all processes."""
    how: str
    products: float
    """Operations a second that this machine, or the data sheet, reaches in one large matrix product."""


def reckoned(config: RunConfig, vocab_size: int, gpu: GPU, world: int, memory: Footprint, pieces: int) -> Speed:
    """The speed on GPUs, from their data sheet; the exchange between them is taken to hide behind the backward pass.

    Weights, gradients and moments are read and written once a step at the memory's full speed.
    """
    low = config.train.dtype != "fp32" and gpu.bf16 > 0
    peak = gpu.bf16 if low else gpu.fp32
    cost = flops_per_token(config.model, vocab_size)
    windows = config.train.batch_size / world
    each = config.model.context / (UTILISATION * peak)
    optimizer = (2 * memory.weights + memory.gradients + 2 * memory.moments) / gpu.bandwidth
    if config.optim.optimizer == "muon":
        optimizer += muon_flops(config.model) / (UTILISATION * peak)
    computing = windows * each * (cost.forward + cost.backward) + optimizer
    calls = memory.attention * pieces + memory.moves
    how = (
        f"reckoned from the data sheet: {UTILISATION:.0%} (assumed) of {peak / 1e12:g} TFLOP/s in "
        f"{'bf16' if low else 'fp32'}, and {gpu.bandwidth / 1e9:,.0f} GB/s"
    )
    if calls * CALL_SECONDS > computing:
        how = f"reckoned from {calls:,} calls of {CALL_SECONDS * 1e6:g} µs (assumed): too small to fill the GPU"
    return Speed(max(computing, calls * CALL_SECONDS), each * cost.forward / world, how, peak)


def measured(config: RunConfig, vocab_size: int, ctx: DistContext, rows: int, seconds: float = SECONDS) -> Speed:
    """The speed of the real loop here, on random tokens, in one process.

    A micro-batch that would take long is measured on fewer windows, and the time taken to grow with their number. The
    model is compiled if `train.compile` is on.

    Args:
        rows: windows of a micro-batch.
        seconds: that steps are measured for, about.
    """
    cost = flops_per_token(config.model, vocab_size)
    products = measure_matmul_flops(ctx)
    window = config.model.context * (cost.forward + cost.backward) / (0.3 * products)
    some = max(1, min(rows, int(seconds / 2 / window)))
    whole = some == rows
    pieces = -(-config.train.batch_size // rows) if whole and config.train.batch_size * window < seconds / 2 else 1
    model = GPT(config.model, vocab_size, config.run.seed).to(ctx.device)
    stepped: nn.Module = model
    if config.train.compile == "on":
        example = torch.zeros(some, config.model.context, dtype=torch.long, device=ctx.device)
        stepped, _ = compile_model(model, example, ctx)
    trainer = stand_in(config, vocab_size, ctx, model, some, pieces, stepped=stepped)
    step = steps(trainer, ctx, seconds)
    done = min(some * pieces, config.train.batch_size)
    if done < config.train.batch_size:
        moving = optimizer_seconds(trainer, ctx, some)
        step = moving + max(0.0, step - moving) * config.train.batch_size / done
    indices = np.arange(some) % len(trainer.val_sequences)
    forward = median(lambda: trainer.validation_loss(indices), ctx, AT_LEAST) / some
    how = "measured here" if done == config.train.batch_size else f"measured here on {done} windows"
    return Speed(step, forward, how, products)


def steps(trainer: Trainer, ctx: DistContext, seconds: float) -> float:
    """The median time of a step, measured for about that many seconds."""
    first = [once(trainer.train_step, ctx) for _ in range(WARM_UP)]
    count = max(AT_LEAST, min(AT_MOST, int(seconds / first[-1])))
    return median(trainer.train_step, ctx, count)


def optimizer_seconds(trainer: Trainer, ctx: DistContext, rows: int) -> float:
    """The median time that the optimizer takes of a step."""
    found = []
    for step in range(AT_LEAST):
        trainer.forward_backward(get_batch(trainer.data.train, trainer.train_sequences, 0, step, rows), 1)
        found.append(once(trainer.optimizer.step, ctx))
    return statistics.median(found)
