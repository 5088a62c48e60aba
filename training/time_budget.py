"""`--train.minutes M`: choose the model size, batch and number of steps that are expected to learn most in M minutes.

`search` measures the steps of a few sizes and estimates each size's loss from a fitted formula. The result is an
ordinary config, which is saved with the run and reproduces it without the clock. `Deadline` looks at the clock during the
run and moves the end and the falls of the learning rate that are still to come.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch

from common.errors import UserError
from data.prepare import TokenizedCorpus, check_min_length
from model.gpt import GPT
from training.config import RunConfig, replace_options
from training.device import DistContext, clock, measure_matmul_flops, resolve_attention, should_compile
from training.distributed import clip_grad_norm
from training.flops import step_flops
from training.loss import cross_entropy_sum
from training.metrics import print_line
from training.optimizer import Optimizer
from training.trainer import FINAL_TARGETS, Callback, Trainer, micro_batch_rows

SIZES = (
    (3, 2, 64, 64, 32),
    (2, 4, 128, 160, 16),
    (3, 4, 128, 160, 16),
    (4, 6, 192, 128, 16),
    (6, 4, 256, 192, 12),
    (6, 6, 384, 256, 8),
    (8, 8, 512, 256, 16),
    (12, 12, 768, 512, 16),
)
"""Layers, heads, d_model, context and batch size. The loss formula was fitted to the first, to 4 layers of 128 with a
context of 128, and to the fourth to sixth, with batches of 16, 8, 12, 8 and 8."""
LOSS_FIT = (1.32828, 102.276, 0.52, 1164.24, 0.63)
"""E, A, alpha, B, beta of `expected_loss`, fitted to Tiny Shakespeare by character; error 0.4% median, 2.8% at most."""
OPTIM: dict[str, Any] = {
    **{"optim.lr": 0.01, "optim.muon_lr": 0.025, "optim.momentum": 0.9, "optim.warmup_steps": 10},
    **{"optim.schedule": "linear", "optim.decay_fraction": 1.0, "optim.decay_at": "", "optim.min_lr_ratio": 0.0},
}
"""Optimizer settings, measured on texts of 70 kB to 55 MB (benchmarks/NOTES.md)."""
REPEAT_VALUE = 15.4
"""R* of Muennighoff et al. 2023, section 6.1: the number of repetitions after which repeating a text teaches little."""
MAX_PARAMETERS_PER_TOKEN = 10  # of the training text: larger models overfit it
ASSUMED_MFU = 0.3  # until a step is measured
EVAL_TOKENS = 20_000
EVAL_SECONDS = 0.3  # of an evaluation besides its forward passes: a sample, an attention file, a checkpoint
FIXED_SECONDS = 2.0  # of the start and the end besides forward passes: baselines, plots, the page
ABLATION_PASSES, ABLATION_TOKENS = 98, 6300  # at most, of forward passes for the ablation of one head, about
MIN_STEPS = 50
ROUNDS = 6  # of measuring, for 0.5% of the time each
FALLS = 20  # of the learning rate to 0, the last at the end
FIRST_LOOK, LOOK_EVERY = 0.1, 0.02  # share of the time


def search(
    config: RunConfig, ctx: DistContext, data: TokenizedCorpus, elapsed: float, given: set[str], max_epochs: float
) -> tuple[RunConfig, Deadline]:
    """Choose model, batch and steps for `train.minutes`; also returns the callback that ends the run in time.

    Args:
        elapsed: seconds of the time that have passed so far.
        given: options that keep their value, such as `model.d_model`.
        max_epochs: of the text, unless these are fewer than `MIN_STEPS` steps.

    Raises UserError if the time that was given is too short, there are several processes (2), or the text is too short (3).
    """
    if ctx.world_size > 1:
        raise UserError("train.minutes is for one process: start without torchrun, or set train.steps")
    minutes, start = config.train.minutes, time.perf_counter()
    end = start + 60 * minutes - elapsed
    vocab_size, n_train, n_val = data.tokenizer.vocab_size, len(data.train), len(data.val)
    all_sizes = dict.fromkeys(with_size(config, given, *size) for size in SIZES)
    sizes = [size for size in all_sizes if not size.model.problems()]  # some are valid: one has the default's head size
    check_min_length(data, min(size.model.context for size in sizes))
    sizes = [size for size in sizes if size.model.context < n_train]
    sizes = [size for size in sizes if count_parameters(size) <= MAX_PARAMETERS_PER_TOKEN * n_train] or sizes[:1]
    flops, tokens = [step_flops(size, vocab_size) for size in sizes], max_epochs * n_train
    assumed, speeds = ASSUMED_MFU * measure_matmul_flops(ctx), dict[int, list[float]]()  # FLOP/s of measured sizes
    while True:  # measure the best size until it is a measured one, then these in turn
        seconds = [flops[i] / estimate_speed(speeds, i, assumed) for i in range(len(sizes))]
        runs = [fit_steps(*each, end, tokens, n_val, given) for each in zip(sizes, seconds, strict=True)]
        best = min(range(len(sizes)), key=lambda i: expected_loss(runs[i][0], n_train))
        is_over = time.perf_counter() > start + 1.8 * minutes  # 3% of the time
        if best in speeds and (is_over or sum(map(len, speeds.values())) >= ROUNDS):
            break
        i = min(speeds, key=lambda k: len(speeds[k])) if best in speeds else best
        speeds.setdefault(i, []).append(flops[i] / measure_step(sizes[i], vocab_size, ctx, 0.3 * minutes))
    (chosen, last_step, most), step_seconds = runs[best], seconds[best]
    model, steps = chosen.model, max(MIN_STEPS, chosen.train.steps)
    missing = (steps - chosen.train.steps) * step_seconds
    if missing and "train.minutes" in given:
        least = math.ceil(10 * minutes + missing / 6) / 10
        raise UserError(f"train.minutes is {minutes:g}, too short for {MIN_STEPS} steps: give at least {least}")
    length = f"about {minutes + missing / 60:.0f} min for {MIN_STEPS} steps" if missing else f"{minutes:g} min"
    shape = f"the best model has {model.n_layers} layers and d_model {model.d_model}"
    print_line(f"plan    {length} (--train.minutes for more or less): {shape}")
    compiled = should_compile(chosen.train, steps * flops[best], ctx.device)  # `Deadline` uses the time that it saves
    chosen = replace_options(chosen, {"train.compile": "on" if compiled else "off"})
    return plan_decay(chosen, 0, steps), Deadline(last_step + missing, most)


def with_size(
    config: RunConfig, given: set[str], n_layers: int, n_heads: int, d_model: int, context: int, batch_size: int
) -> RunConfig:
    """The config with one of `SIZES`, and what the loss formula assumes; options that are given keep their value."""
    chosen = {
        **{"model.n_layers": n_layers, "model.n_heads": n_heads, "model.d_model": d_model, "model.context": context},
        **{"model.n_kv_heads": 0, "model.d_head": 0, "model.d_mlp": 0, "train.batch_size": batch_size},
        **{"train.micro_batch_size": 0, "train.eval_tokens": EVAL_TOKENS, **OPTIM},
    }
    own = {option: value for option, value in chosen.items() if option not in given}
    return replace_options(config, {**own, "train.minutes": 0.0})


def estimate_speed(speeds: dict[int, list[float]], i: int, assumed: float) -> float:
    """FLOP/s of the i-th size: the median of its rounds, or twice that of the nearest size, so that it is measured."""
    if not speeds:
        return assumed
    nearest = min(speeds, key=lambda k: abs(k - i))
    return statistics.median(speeds[nearest]) * (1 if nearest == i else 2)


def fit_steps(
    size: RunConfig, step_seconds: float, end: float, max_tokens: float, n_val: int, given: set[str]
) -> tuple[RunConfig, float, float]:
    """As many steps as fit before `end` (negative if not even the rest fits); when the last one should be over, and the
    most steps that are useful, with `max_tokens`."""
    model, step_tokens, seconds = size.model, size.train.batch_size * size.model.context, end - time.perf_counter()
    token_seconds = step_seconds / (3 * step_tokens)  # the forward pass is a third of a step
    evals = min(20, max(4, round(seconds / 12)))
    eval_seconds = EVAL_SECONDS + min(size.train.eval_tokens, n_val) * token_seconds
    ablations = min(ABLATION_PASSES * model.context, ABLATION_TOKENS) * model.n_layers * model.n_heads
    final_seconds = FIXED_SECONDS + (min(FINAL_TARGETS, n_val) + ablations) * token_seconds
    most = max(MIN_STEPS, max_tokens / step_tokens)
    steps = math.floor(min(most, (seconds - evals * eval_seconds - final_seconds) / step_seconds))
    every = math.ceil(max(MIN_STEPS, steps) / evals)
    chosen = {"train.eval_every": every, "train.save_every": every, "train.steps": steps}
    kept = {name: value for name, value in chosen.items() if name not in given - {"train.steps"}}
    return replace_options(size, kept), end - final_seconds - 2 * eval_seconds, most


def count_parameters(size: RunConfig) -> int:
    """Parameters of the matrices in the blocks: 12 · layers · d_model² (Kaplan et al. 2020, table 1)."""
    return 12 * size.model.n_layers * size.model.d_model**2


def expected_loss(run: RunConfig, n_train: int) -> float:
    """E + A / parameters^α + B / tokens^β in nats/token (Hoffmann et al. 2022, equation 2); infinite with too few steps."""
    if run.train.steps < MIN_STEPS:
        return math.inf
    e, a, alpha, b, beta = LOSS_FIT
    tokens: float = run.train.steps * run.train.batch_size * run.model.context
    repetitions = tokens / n_train - 1
    if repetitions > 0:  # tokens of new text that teach as much (Muennighoff et al. 2023, equation 5)
        tokens = n_train * (1 - REPEAT_VALUE * math.expm1(-repetitions / REPEAT_VALUE))
    return e + a / count_parameters(run) ** alpha + b / tokens**beta


def measure_step(config: RunConfig, vocab_size: int, ctx: DistContext, seconds: float) -> float:
    """Seconds of a training step without compiling, measured on random tokens for about `seconds`; a micro-batch that would
    take long is measured with fewer sequences and scaled."""
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
    """Ends the run by the clock, since other programs change the speed of a machine from minute to minute.

    Each look replaces the number of steps and the falls of the learning rate that are still to come. No learning rate of
    a step that is done changes, so the config that is saved with each checkpoint reproduces the run. A cosine is left as planned.

    Args:
        end: when the last step should be over, by `time.perf_counter`.
        most: the largest number of steps.
    """

    def __init__(self, end: float, most: float) -> None:
        self.start, self.end, self.most = time.perf_counter(), end, most
        self.next_look, self.first_step_end = FIRST_LOOK, 0.0

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        config, step, now = trainer.config, trainer.state.step, time.perf_counter()
        if step == 1:  # it compiles, which says nothing about the others
            self.first_step_end = now
            return
        used = (now - self.start) / (self.end - self.start)
        if used >= self.next_look and config.optim.schedule == "linear":
            self.next_look = used + LOOK_EVERY
            left = (self.end - now) * (step - 1) / (now - self.first_step_end)
            trainer.config = plan_decay(config, step, max(step, int(min(self.most, step + left))))


def plan_decay(config: RunConfig, step: int, steps: int) -> RunConfig:
    """The config with `steps` steps, and what is still to come after `step` of the falls along `decay_fraction` of them."""
    falls = [int(at) for at in config.optim.decay_at.split() if int(at) <= step]
    for n in range(len(falls) + 1, FALLS):
        left = config.optim.decay_fraction * (1 - (n - 0.5) / FALLS)
        falls.append(max(step, round(steps * (1 - left))))
    return replace_options(config, {"train.steps": steps, "optim.decay_at": " ".join(map(str, falls))})
