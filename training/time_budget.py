"""`--train.minutes M`: choose the model size, batch and number of steps that are expected to learn most in M minutes.

`search` measures the steps of a few sizes and estimates each size's loss from a fitted formula. The result is an
ordinary config, which is saved with the run and reproduces it without the clock. `Deadline` adjusts the number of steps
once more, just before the learning rate starts to decay.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from common.errors import DATA, UserError
from data.prepare import TokenizedCorpus
from model.gpt import GPT
from training.config import RunConfig
from training.device import DistContext, clock, measure_matmul_flops, resolve_attention, should_compile
from training.distributed import clip_grad_norm
from training.flops import step_flops
from training.loss import cross_entropy_sum
from training.metrics import print_line
from training.optimizer import Optimizer
from training.run_dir import save_config
from training.trainer import FINAL_TARGETS, Callback, Trainer, micro_batch_rows

SIZES = (
    (3, 2, 64, 64, 16),
    (4, 4, 128, 128, 8),
    (4, 6, 192, 128, 12),
    (6, 4, 256, 192, 8),
    (6, 6, 384, 256, 8),
    (8, 8, 512, 256, 16),
    (12, 12, 768, 512, 16),
)
"""Layers, heads, d_model, context and batch size. The loss formula was fitted to runs of the first five."""
LOSS_FIT = (1.32828, 102.276, 0.52, 1164.24, 0.63)
"""E, A, alpha, B, beta of `expected_loss`, fitted to Tiny Shakespeare by character; error 0.4% median, 2.8% at most."""
RECIPE: dict[str, Any] = dict(
    lr=0.006, muon_lr=0.025, momentum=0.8, warmup_steps=10, schedule="linear", decay_fraction=0.5, min_lr_ratio=0.0
)
"""Optimizer settings with which the formula was fitted."""
REPEAT_VALUE = 15.4
"""R* of Muennighoff et al. 2023, section 6.1: the number of repetitions after which repeating a text teaches little."""
ASSUMED_MFU = 0.3  # until a step is measured
EVAL_TOKENS = 20_000
EVAL_SECONDS = 0.3  # of an evaluation besides its forward passes: a sample, an attention file, a checkpoint
FIXED_SECONDS = 2.0  # of the start and the end besides forward passes: baselines, plots, the page
ABLATION_PASSES = 49  # forward passes of a sequence for the ablation of one head, about
MIN_STEPS = 50
MIN_DECAY_FRACTION = 0.2  # of the steps, over which the learning rate decays even if that takes too long


def search(config: RunConfig, ctx: DistContext, data: TokenizedCorpus, elapsed: float) -> tuple[RunConfig, float]:
    """Choose model, batch and steps for `train.minutes`, and print what each size could do.

    Args:
        elapsed: seconds that the command has taken so far.

    Returns:
        The config with everything chosen, and the time (`time.perf_counter`) at which the last step should be over.

    Raises:
        UserError: if the time is too short or there are several processes (exit code 2), or the text is too short (3).
    """
    if ctx.world_size > 1:
        raise UserError("train.minutes is for one process: start without torchrun, or set train.steps")
    minutes, end = config.train.minutes, time.perf_counter() + 60 * config.train.minutes - elapsed
    vocab_size, n_train, n_val = data.tokenizer.vocab_size, len(data.train), len(data.val)
    sizes = [with_size(config, *size) for size in SIZES if size[3] < n_train]
    if not sizes:
        raise UserError(f"the training text has {n_train} tokens, too few for train.minutes: give it more text", DATA)
    flops = [step_flops(size, vocab_size) for size in sizes]
    assumed, speeds = ASSUMED_MFU * measure_matmul_flops(ctx), dict[int, float]()  # FLOP/s of the sizes measured so far
    while True:  # measure the best size; stop once the best is a measured one
        seconds = [flops[i] / estimate_speed(speeds, i, assumed) for i in range(len(sizes))]
        left = end - time.perf_counter()
        runs = [fit_steps(size, step, left, n_val) for size, step in zip(sizes, seconds, strict=True)]
        best = min(range(len(sizes)), key=lambda i: expected_loss(runs[i][0], n_train))
        if best in speeds:
            break
        # For a hundredth of the time, but at least a second: other programs on the machine come and go in seconds.
        speeds[best] = flops[best] / measure_step(sizes[best], vocab_size, ctx, max(1.0, 0.6 * minutes))
    chosen, final_seconds = runs[best]
    if (missing := MIN_STEPS - chosen.train.steps) > 0:
        least = math.ceil(10 * minutes + missing * seconds[best] / 6) / 10
        raise UserError(f"train.minutes is {minutes:g}, too short for {MIN_STEPS} steps: give at least {least}")
    print_line(f"plan    {minutes:g} min on {ctx.describe()}; what each model size could do:")
    print_line(table([run for run, _ in runs], best, n_train))
    compiled = should_compile(chosen.train, chosen.train.steps * flops[best], ctx.device)
    train = replace(chosen.train, compile="on" if compiled else "off")  # `Deadline` uses the time that compiling saves
    return replace(chosen, train=train), end - final_seconds


def with_size(config: RunConfig, n_layers: int, n_heads: int, d_model: int, context: int, batch_size: int) -> RunConfig:
    """The config with one of `SIZES`, and what the loss formula assumes."""
    shape = {"n_layers": n_layers, "n_heads": n_heads, "d_model": d_model, "context": context}
    model = replace(config.model, **shape, n_kv_heads=0, d_head=0, d_mlp=0)  # type: ignore[arg-type]
    train = replace(config.train, minutes=0.0, batch_size=batch_size, micro_batch_size=0, eval_tokens=EVAL_TOKENS)
    return replace(config, model=model, train=train, optim=replace(config.optim, **RECIPE))


def estimate_speed(speeds: dict[int, float], i: int, assumed: float) -> float:
    """FLOP/s of the i-th size: measured, or a little more than those of the nearest size, so that it may get measured."""
    if not speeds:
        return assumed
    return speeds.get(i, 1.25 * speeds[min(speeds, key=lambda k: abs(k - i))])


def fit_steps(size: RunConfig, step_seconds: float, seconds: float, n_val: int) -> tuple[RunConfig, float]:
    """As many steps as fit into `seconds` (negative if not even the rest fits), and the seconds after the last step."""
    model, batch_size = size.model, size.train.batch_size
    token_seconds = step_seconds / (3 * batch_size * model.context)  # the forward pass is a third of a step
    evals = min(20, max(4, round(seconds / 30)))
    eval_seconds = EVAL_SECONDS + min(EVAL_TOKENS, n_val) * token_seconds
    ablations = ABLATION_PASSES * model.n_layers * model.n_heads * model.context
    final_seconds = FIXED_SECONDS + (min(FINAL_TARGETS, n_val) + ablations) * token_seconds
    steps = math.floor((seconds - evals * eval_seconds - final_seconds) / step_seconds)
    every = max(1, math.ceil(steps / evals))
    train = replace(size.train, steps=steps, eval_every=every, save_every=every)
    return replace(size, train=train), final_seconds + 2 * eval_seconds


def expected_loss(run: RunConfig, n_train: int) -> float:
    """E + A / parameters^α + B / tokens^β in nats/token (Hoffmann et al. 2022, equation 2); infinite with too few steps.

    Parameters are those of the matrices in the blocks: 12 · layers · d_model² (Kaplan et al. 2020, table 1).
    """
    if run.train.steps < MIN_STEPS:
        return math.inf
    e, a, alpha, b, beta = LOSS_FIT
    tokens = effective_tokens(run.train.steps * run.train.batch_size * run.model.context, n_train)
    return e + a / (12 * run.model.n_layers * run.model.d_model**2) ** alpha + b / tokens**beta


def effective_tokens(tokens: float, n_train: int) -> float:
    """Tokens of new text that teach as much as `tokens` tokens from a text of `n_train`.

    n · (1 + R* · (1 - exp(-R / R*))) with R repetitions (Muennighoff et al. 2023, equation 5).
    """
    if tokens <= n_train:
        return tokens
    return n_train * (1 + REPEAT_VALUE * -math.expm1(-(tokens / n_train - 1) / REPEAT_VALUE))


def table(runs: list[RunConfig], best: int, n_train: int) -> str:
    """What each size could do in the time; the best one is marked."""
    lines = ["          layers  heads  d_model  context  batch    steps  epochs   loss (as on Tiny Shakespeare)"]
    for i, run in enumerate(runs):
        model, train, steps = run.model, run.train, max(0, run.train.steps)
        shape = f"{model.n_layers:>6}{model.n_heads:>7}{model.d_model:>9}{model.context:>9}{train.batch_size:>7}"
        epochs, loss = steps * train.batch_size * model.context / n_train, expected_loss(run, n_train)
        lines.append(f"        {'>' if i == best else ' '} {shape}{steps:>9,}{epochs:>8.2f}{loss:>7.2f}")
        if i == best and epochs > 10:
            lines[-1] += "  may overfit: use more text, or --train.patience 2, --model.dropout 0.2"
    return "\n".join(lines)


def measure_step(config: RunConfig, vocab_size: int, ctx: DistContext, seconds: float) -> float:
    """Seconds of a training step, measured on random tokens for about `seconds`, without compiling.

    A micro-batch that would take long is measured with fewer sequences and scaled.
    """
    model_config, context = resolve_attention(config.model, ctx.device, ctx.dtype), config.model.context
    sequence_flops = step_flops(config, vocab_size) / config.train.batch_size
    affordable = int(seconds / 4 * ASSUMED_MFU * measure_matmul_flops(ctx) / sequence_flops)
    rows = max(1, min(micro_batch_rows(config, 1), affordable))
    model = GPT(model_config, vocab_size, config.run.seed).to(ctx.device)
    optimizer = Optimizer(model, config.optim)
    tokens = torch.randint(vocab_size, (rows, context + 1), generator=torch.Generator().manual_seed(0)).to(ctx.device)
    times: list[tuple[float, float]] = []  # of forward and backward pass, and of the update
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 60):
        start = clock(ctx)
        with ctx.autocast():
            logits = model(tokens[:, :-1])
        (cross_entropy_sum(logits, tokens[:, 1:]) / (rows * context)).backward()
        middle = clock(ctx)
        clip_grad_norm(model, config.optim.grad_clip)
        optimizer.step()
        times.append((middle - start, clock(ctx) - middle))
    forward_backward, update = (statistics.median(part) for part in zip(*times[2:], strict=True))  # after warming up
    return config.train.batch_size / rows * forward_backward + update


class Deadline(Callback):
    """Adjusts the number of steps once, when the learning rate is about to decay, to the time that steps really take.

    Other processes on the machine change its speed from minute to minute. Before the decay no step depends on the
    number of steps (`optimizer.get_lr_scale`), so the run is still reproducible from its adjusted config.

    Args:
        end: when the last step should be over, by `time.perf_counter`.
    """

    def __init__(self, end: float) -> None:
        self.end, self.start = end, time.perf_counter()

    def on_start(self, trainer: Trainer) -> None:
        self.start = time.perf_counter()

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        config, step, now = trainer.config, trainer.state.step, time.perf_counter()
        if step == decay_start(config):
            trainer.config = adjust_steps(config, step, (self.end - now) * step / (now - self.start))
            save_config(trainer.config)
            print_line(f"plan    {trainer.config.train.steps:,} steps, from the time that {step:,} have taken")


def decay_start(config: RunConfig) -> int:
    """Number of steps after which the linear schedule starts to decay; at least 1."""
    return max(1, int(config.train.steps * (1 - config.optim.decay_fraction)))


def adjust_steps(config: RunConfig, step: int, more: float) -> RunConfig:
    """The config with about `more` steps after step `step`; the first `step` steps keep their learning rates."""
    steps = max(step + int(more), round(step / (1 - MIN_DECAY_FRACTION)), step + 1)
    optim = replace(config.optim, decay_fraction=min(config.optim.decay_fraction, (steps - step) / steps))
    return replace(config, train=replace(config.train, steps=steps), optim=optim)
