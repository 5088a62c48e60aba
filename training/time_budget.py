"""`--train.minutes M`: choose the model size, batch and number of steps that are expected to learn most in M minutes.

`search` estimates each size's loss from a fitted formula (`expected_loss`) and from step times that it measures here. The
result is an ordinary config, which is saved with the run and reproduces it without the clock. The number of steps is
adjusted once more, by `Deadline`, just before the learning rate starts to decay.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from common.errors import CONFIG, DATA, UserError
from model.gpt import GPT
from training.config import RunConfig
from training.device import DistContext, measure_matmul_flops, resolve_attention, should_compile, synchronize
from training.distributed import clip_grad_norm
from training.flops import flops_per_token
from training.loss import cross_entropy_sum
from training.metrics import print_line
from training.optimizer import Optimizer
from training.run_dir import save_config
from training.trainer import FINAL_TARGETS, Callback, Trainer, micro_batch_rows


@dataclass(frozen=True)
class ModelSize:
    """A model size and its batch size."""

    n_layers: int
    n_heads: int
    d_model: int
    context: int
    batch_size: int
    reference_seconds: float
    """Time of a step on two cores of an EPYC in bf16; only ratios of these are used, for sizes not measured here."""

    @property
    def n_parameters(self) -> int:
        """Parameters of the matrices in the blocks: 12 · layers · d_model² (Kaplan et al. 2020, table 1)."""
        return 12 * self.n_layers * self.d_model**2

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context


SIZES = (
    ModelSize(3, 2, 64, 64, 16, 0.028),
    ModelSize(4, 4, 128, 128, 8, 0.058),
    ModelSize(4, 6, 192, 128, 12, 0.165),
    ModelSize(6, 4, 256, 192, 8, 0.38),
    ModelSize(6, 6, 384, 256, 8, 0.95),
    ModelSize(8, 8, 512, 256, 16, 4.0),
    ModelSize(12, 12, 768, 512, 16, 24.0),
)
"""The loss formula was fitted to runs of the first five (tests/training/test_time_budget.py has their losses)."""
LOSS_FIT = (1.32828, 102.276, 0.52, 1164.24, 0.63)
"""E, A, alpha, B, beta of `expected_loss`, fitted to Tiny Shakespeare by character; error 0.4% median, 2.8% at most."""
RECIPE = {
    **{"lr": 0.006, "muon_lr": 0.025, "momentum": 0.8, "warmup_steps": 10},
    **{"schedule": "linear", "decay_fraction": 0.5, "min_lr_ratio": 0.0},
}
"""Optimizer settings with which the formula was fitted."""
REPEAT_VALUE = 15.4
"""R* of Muennighoff et al. 2023, section 6.1: the number of repetitions after which repeating a text teaches little."""
EVAL_TOKENS = 20_000
STARTUP_SECONDS = 0.6
"""From the plan to the first step."""
EVAL_SECONDS = 0.3
"""Of an evaluation besides its forward passes: a sample, an attention file, a checkpoint."""
FINAL_SECONDS = 1.4
"""From the last step to the end besides forward passes: baselines, plots, the page."""
ABLATION_PASSES = 49
"""Forward passes of a sequence for the ablation of one head, about."""
MIN_STEPS = 50
MIN_EVALS, MAX_EVALS = 4, 20
MANY_EPOCHS = 10
TOLERANCE = 0.01
"""Fraction of the steps by which the plan may be off without being adjusted."""
MIN_DECAY_FRACTION = 0.2
"""The learning rate decays over at least this fraction of the steps, even if that takes too long."""


@dataclass(frozen=True)
class Corpus:
    """Numbers of tokens."""

    vocab_size: int
    n_train: int
    n_val: int


@dataclass(frozen=True)
class Candidate:
    """What a model size could do in the time."""

    size: ModelSize
    step_seconds: float
    steps: int
    evals: int
    epochs: float
    loss: float
    """Expected, in nats/token, on the scale of Tiny Shakespeare by character; infinite with too few steps."""
    overhead: float
    """Seconds that are not spent in steps."""
    final_seconds: float
    """Those of them from the last step on, with the two last evaluations."""


def expected_loss(n_parameters: int, tokens: float) -> float:
    """E + A / parameters^α + B / tokens^β in nats/token (Hoffmann et al. 2022, equation 2).

    Args:
        tokens: equivalent tokens of new text, see `effective_tokens`.
    """
    e, a, alpha, b, beta = LOSS_FIT
    return e + a / n_parameters**alpha + b / tokens**beta


def effective_tokens(tokens: float, n_train: int) -> float:
    """Tokens of new text that teach as much as `tokens` tokens from a text of `n_train`.

    n · (1 + R* · (1 - exp(-R / R*))) with R repetitions (Muennighoff et al. 2023, equation 5).
    """
    if tokens <= n_train:
        return tokens
    return n_train * (1 + REPEAT_VALUE * -math.expm1(-(tokens / n_train - 1) / REPEAT_VALUE))


def search(config: RunConfig, ctx: DistContext, corpus: Corpus, elapsed: float) -> tuple[RunConfig, float]:
    """Choose model, batch and steps for `train.minutes`, and print what each size could do.

    Args:
        elapsed: seconds that the command has taken so far.

    Returns:
        The config with everything chosen, and the time (`time.perf_counter`) at which the last step should be over.

    Raises:
        UserError: if the time is too short or there are several processes (exit code 2), or the text is too short (3).
    """
    sizes, times = fitting_sizes(ctx, corpus), dict[ModelSize, float]()
    deadline = time.perf_counter() + 60 * config.train.minutes - elapsed
    while True:  # measure the best estimate; stop once the best is a measured one
        seconds = deadline - time.perf_counter()
        candidates = [estimate(size, times, seconds, corpus) for size in sizes]
        best = min(candidates, key=lambda candidate: (candidate.loss, candidate.step_seconds))
        if best.size in times:
            break
        # A hundredth of the time, but at least a second: other processes on the machine come and go in seconds.
        measured_seconds = max(1.0, 0.6 * config.train.minutes)
        times[best.size] = measure_step(with_size(config, best.size), corpus.vocab_size, ctx, measured_seconds)
    if best.steps < MIN_STEPS:
        needed = 60 * config.train.minutes - seconds + best.overhead + MIN_STEPS * best.step_seconds
        raise UserError(
            f"train.minutes is {config.train.minutes:g}, which is too short: start, measurement, evaluations and "
            f"{MIN_STEPS} steps take {needed:.0f} s here; give at least {math.ceil(needed / 6) / 10}",
            CONFIG,
        )
    print_line(summary(config, ctx, candidates, best))
    return apply_candidate(config, best, ctx), deadline - best.final_seconds


def fitting_sizes(ctx: DistContext, corpus: Corpus) -> list[ModelSize]:
    """The sizes whose context is shorter than the training text; errors as in `search`."""
    if ctx.world_size > 1:
        raise UserError("train.minutes is for one process: start without torchrun, or set train.steps", CONFIG)
    sizes = [size for size in SIZES if size.context < corpus.n_train]
    if not sizes:
        raise UserError(
            f"the training text is {corpus.n_train} tokens long, too short for train.minutes: give it more text", DATA
        )
    return sizes


def estimate(size: ModelSize, times: Mapping[ModelSize, float], seconds: float, corpus: Corpus) -> Candidate:
    """What `size` could do in `seconds`.

    Args:
        times: measured seconds of a step; the time of another size is scaled from the nearest one of these.
    """
    nearest = min(times, key=lambda s: abs(math.log(s.reference_seconds / size.reference_seconds)), default=None)
    scale = times[nearest] / nearest.reference_seconds if nearest else 1.0
    step = size.reference_seconds * scale
    forward = step / size.batch_size / 3  # of one sequence; the backward pass takes twice as long
    evals = min(MAX_EVALS, max(MIN_EVALS, round(seconds / 30)))
    eval_seconds = EVAL_SECONDS + min(EVAL_TOKENS, corpus.n_val) / size.context * forward
    passes = min(FINAL_TARGETS, corpus.n_val) / size.context + ABLATION_PASSES * size.n_layers * size.n_heads
    final_seconds = FINAL_SECONDS + passes * forward
    overhead = STARTUP_SECONDS + evals * eval_seconds + final_seconds
    steps = max(0, int((seconds - overhead) / step))
    tokens = steps * size.tokens_per_step
    loss = math.inf
    if steps >= MIN_STEPS:
        loss = expected_loss(size.n_parameters, effective_tokens(tokens, corpus.n_train))
    epochs = tokens / corpus.n_train
    return Candidate(size, step, steps, evals, epochs, loss, overhead, final_seconds + 2 * eval_seconds)


def with_size(config: RunConfig, size: ModelSize) -> RunConfig:
    """The config with that model and batch size."""
    shape = {"n_layers": size.n_layers, "n_heads": size.n_heads, "d_model": size.d_model, "context": size.context}
    model = replace(config.model, **shape, n_kv_heads=0, d_head=0, d_mlp=0)  # type: ignore[arg-type]
    return replace(config, model=model, train=replace(config.train, batch_size=size.batch_size, micro_batch_size=0))


def apply_candidate(config: RunConfig, best: Candidate, ctx: DistContext) -> RunConfig:
    """The config of a run of that candidate, without `train.minutes`; `Deadline` uses what compiling saves."""
    compiled = should_compile(config.train, best.steps * best.step_seconds, ctx.device)
    config, eval_every = with_size(config, best.size), -(-best.steps // best.evals)
    train = replace(
        config.train,
        minutes=0.0,
        steps=best.steps,
        eval_every=eval_every,
        eval_tokens=EVAL_TOKENS,
        save_every=eval_every,
        compile="on" if compiled else "off",
    )
    return replace(config, train=train, optim=replace(config.optim, **RECIPE))  # type: ignore[arg-type]


def summary(config: RunConfig, ctx: DistContext, candidates: list[Candidate], best: Candidate) -> str:
    """What each size could do in the time, and which one is chosen."""
    lines = [
        f"plan    {config.train.minutes:g} min on {ctx.describe()}; what each model size could do:",
        "          layers  heads  d_model  context  batch    steps  epochs   loss",
    ]
    for candidate in candidates:
        size = candidate.size
        shape = f"{size.n_layers:>6}{size.n_heads:>7}{size.d_model:>9}{size.context:>9}{size.batch_size:>7}"
        mark = ">" if size == best.size else " "
        loss = f"{candidate.loss:>7.2f}" if math.isfinite(candidate.loss) else f"{'-':>7}"
        lines.append(f"        {mark} {shape}{candidate.steps:>9,}{candidate.epochs:>8.2f}{loss}")
    lines.append(
        f"        chosen: {best.steps:,} steps of {1000 * best.step_seconds:.3g} ms and {best.overhead:.0f} s for "
        "everything else (loss: as on Tiny Shakespeare by character)"
    )
    if best.epochs > MANY_EPOCHS:
        lines.append(
            f"        the text is repeated {best.epochs:.0f} times, so the model may overfit: use more text, or "
            "--train.patience 2, --model.dropout 0.2"
        )
    return "\n".join(lines)


def measure_step(config: RunConfig, vocab_size: int, ctx: DistContext, seconds: float) -> float:
    """Seconds of a training step, measured on random tokens for about `seconds`, without compiling.

    A micro-batch that would take long is measured with fewer sequences and scaled.
    """
    model_config = resolve_attention(config.model, ctx.device, ctx.dtype)
    cost, context = flops_per_token(model_config, vocab_size), model_config.context
    sequence_seconds = context * (cost.forward + cost.backward) / (0.3 * measure_matmul_flops(ctx))
    rows = max(1, min(micro_batch_rows(config, 1), int(seconds / 4 / sequence_seconds)))
    model = GPT(model_config, vocab_size, config.run.seed).to(ctx.device)
    optimizer = Optimizer(model, config.optim)
    tokens = torch.randint(vocab_size, (rows, context + 1), generator=torch.Generator().manual_seed(0)).to(ctx.device)

    def forward_backward() -> None:
        with ctx.autocast():
            logits = model(tokens[:, :-1])
        (cross_entropy_sum(logits, tokens[:, 1:]) / (rows * context)).backward()

    def update() -> None:
        clip_grad_norm(model, config.optim.grad_clip)
        optimizer.step()

    for warm_up in (forward_backward, update, forward_backward, update):
        warm_up()
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 60):
        times.append((timed(forward_backward, ctx), timed(update, ctx)))
    forward_backward_seconds, update_seconds = (statistics.median(part) for part in zip(*times, strict=True))
    return config.train.batch_size / rows * forward_backward_seconds + update_seconds


def timed(work: Callable[[], None], ctx: DistContext) -> float:
    """Seconds that `work` takes, including what it queues on a GPU."""
    synchronize(ctx)
    start = time.perf_counter()
    work()
    synchronize(ctx)
    return time.perf_counter() - start


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
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Adjust the config of the trainer after the last step before the decay, and save it."""
        config, step = trainer.config, trainer.state.step
        if step != decay_start(config):
            return
        now = time.perf_counter()
        adjusted = adjust_steps(config, step, (now - self.start) / step, self.end - now)
        if abs(adjusted.train.steps - config.train.steps) > TOLERANCE * config.train.steps:
            trainer.config = adjusted
            save_config(adjusted)
            print_line(f"plan    {adjusted.train.steps:,} steps, from the time that {step:,} have taken")


def decay_start(config: RunConfig) -> int:
    """Number of steps after which the linear schedule starts to decay; at least 1."""
    return max(1, int(config.train.steps * (1 - config.optim.decay_fraction)))


def adjust_steps(config: RunConfig, step: int, step_seconds: float, seconds_left: float) -> RunConfig:
    """The config with as many steps as the time allows; the first `step` steps keep their learning rates."""
    steps = max(step + int(seconds_left / step_seconds), round(step / (1 - MIN_DECAY_FRACTION)), step + 1)
    optim = replace(config.optim, decay_fraction=min(config.optim.decay_fraction, (steps - step) / steps))
    return replace(config, train=replace(config.train, steps=steps), optim=optim)
