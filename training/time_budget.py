"""`--train.minutes M`: the model, batch and number of steps that learn most in M minutes on this machine.

How well a size learns from so many tokens was measured once and put into one formula (`expected_loss`;
`python -m benchmarks.sizes` measures and fits it again). How fast this machine is, is measured anew, for the sizes in
question only. What comes out is an ordinary config: written down with the run, and reproducible without the clock. Its
number of steps alone is settled later, halfway (`training/pace.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from common.errors import CONFIG, DATA, UserError
from training.config import RunConfig
from training.device import COMPILE_SECONDS, DistContext, has_compiler, resolve_attention
from training.speed import Speed, measured
from training.trainer import FINAL_TARGETS


@dataclass(frozen=True)
class Size:
    """A model and its batch."""

    n_layers: int
    n_heads: int
    d_model: int
    context: int
    batch_size: int
    seconds: float
    """Of a step on two cores of an EPYC in bf16. Only how sizes compare is used, for those that are not measured."""
    losses: tuple[tuple[int, float], ...] = ()
    """(steps, nats/token) over the whole validation split of Tiny Shakespeare by character."""

    @property
    def weights(self) -> int:
        """Parameters of the blocks' matrices (Kaplan et al. 2020, table 1: 12 · layers · width²)."""
        return 12 * self.n_layers * self.d_model**2

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.context


SIZES = (
    Size(3, 2, 64, 64, 16, 0.028, ((1_071, 1.7248), (3_214, 1.6389), (8_571, 1.582))),
    Size(4, 4, 128, 128, 8, 0.058, ((517, 1.7203), (1_552, 1.5665), (4_138, 1.4943))),
    Size(4, 6, 192, 128, 12, 0.165, ((182, 1.8082), (545, 1.6071), (1_455, 1.5095))),
    Size(6, 4, 256, 192, 8, 0.38, ((79, 2.0356), (237, 1.7127), (632, 1.5566))),
    Size(6, 6, 384, 256, 8, 0.95, ((50, 2.2177), (95, 1.9064), (253, 1.6407))),
    Size(8, 8, 512, 256, 16, 4.0),
    Size(12, 12, 768, 512, 16, 24.0),
)
"""From the smallest. The last two were not trained for the fit, which goes on to them."""
TABLE_TEXT = 1_003_856
"""Training tokens of Tiny Shakespeare."""

ENTROPY, OF_SIZE, SIZE_POWER, OF_TOKENS, TOKEN_POWER = 1.32828, 102.276, 0.52, 1164.24, 0.63
"""The five numbers of `expected_loss`, fitted to the table; off by 0.4% in the median and 2.8% at most."""
RECIPE = {
    **{"lr": 0.006, "muon_lr": 0.025, "momentum": 0.8, "warmup_steps": 10},
    **{"schedule": "linear", "decay_fraction": 0.5, "min_lr_ratio": 0.0},
}
"""Of the optimizer; the table was measured with it."""
REPEATS_WORTH = 15.4
"""R* of Muennighoff et al. 2023, section 6.1: how often a text is read until reading it again teaches little."""
EVALUATED = 20_000
"""Validation tokens of an evaluation."""
BEGIN = 0.6
"""Seconds from the plan to the first step."""
LOOK = 0.3
"""Seconds of an evaluation besides its forward passes: a sample, a record of attention, a checkpoint."""
FINISH = 1.4
"""Seconds from the last step to the end besides forward passes: what counting words gives, pictures, the page."""
PASSES_A_HEAD = 49
"""Forward passes of a window, about, that it takes to find out what a head is good for."""
FEWEST_STEPS = 50
FEWEST_EVALUATIONS, MOST_EVALUATIONS = 4, 20
MANY_EPOCHS = 10
MEASURING = 1 / 100
"""Of the time, but at least a second: what steps of a size are measured for. Other work comes and goes in seconds."""
AGAIN = 8.0
"""Seconds that compiling takes once more when the run begins, from what was kept when it was measured."""


@dataclass(frozen=True)
class Offer:
    """What a size could do in the time."""

    size: Size
    step: float
    """Seconds."""
    steps: int
    evaluations: int
    epochs: float
    loss: float
    """Expected, on the scale of Tiny Shakespeare."""
    fixed: float
    """Seconds that are not steps."""
    finish: float
    """Seconds of those from the last step on, and of two evaluations: so many more come late in a run than early."""
    compiled: bool = False


def useful_tokens(read: float, text: int) -> float:
    """Tokens of new text that would teach as much as reading a text of `text` tokens until `read` are read.

    text · (1 + R* · (1 - exp(-R / R*))), R the number of repetitions (Muennighoff et al. 2023, equation 5).
    """
    if read <= text:
        return read
    return text * (1 + REPEATS_WORTH * -math.expm1(-(read / text - 1) / REPEATS_WORTH))


def expected_loss(weights: int, tokens: float) -> float:
    """Nats/token on Tiny Shakespeare by character: E + A / weights^α + B / tokens^β (Hoffmann et al. 2022, eq. 2).

    Args:
        tokens: as `useful_tokens` counts them.
    """
    return ENTROPY + OF_SIZE / weights**SIZE_POWER + OF_TOKENS / tokens**TOKEN_POWER


def choose(
    config: RunConfig, ctx: DistContext, vocab_size: int, text: int, held_out: int, spent: float
) -> tuple[RunConfig, list[str], float]:
    """The config with what `train.minutes` decides decided, the plan in lines, and when the last step should be over.

    That moment is one of `time.perf_counter()`; until it is about to come the number of steps may change
    (`training/pace.py`).

    Args:
        text: training tokens.
        held_out: validation tokens.
        spent: seconds that the command has taken already.

    Raises:
        UserError: if the time is too short, several processes would share the work (exit code 2), or the text is too
            short (3).
    """
    sizes = candidates(ctx, text)
    end, known = time.perf_counter() + 60 * config.train.minutes - spent, dict[Size, Speed]()

    def offered(size: Size, speeds: Mapping[Size, Speed], less: float = 0.0) -> Offer:
        return offer(size, speeds, end - time.perf_counter() - less, text, held_out)

    def learned(one: Offer) -> tuple[float, float]:
        return one.loss, one.step

    while True:
        offers = [offered(size, known) for size in sizes]
        best = min(offers, key=learned)
        if best.size in known:
            break
        known[best.size] = speed(best.size, switched(config, "off"), ctx, vocab_size)
    if may_compile(config, ctx, best):
        fast = {best.size: speed(best.size, switched(config, "on"), ctx, vocab_size)}
        # once more, for a machine that others use is not as fast as it was half a minute ago
        known[best.size] = speed(best.size, switched(config, "off"), ctx, vocab_size)
        offers = [offered(size, known) for size in sizes]
        compiled = replace(offered(best.size, fast, AGAIN), compiled=True)
        best = compiled if config.train.compile == "on" else min([*offers, compiled], key=learned)
        offers = [best if one.size == best.size else one for one in offers]
    if best.steps < FEWEST_STEPS:
        gone = 60 * config.train.minutes - (end - time.perf_counter())
        raise too_short(config.train.minutes, gone + best.fixed + FEWEST_STEPS * best.step)
    return decided(config, best), page(config, ctx, offers, best), end - best.finish


def candidates(ctx: DistContext, text: int) -> list[Size]:
    """The sizes whose windows a text of `text` tokens fills; `UserError` as `choose` says."""
    if ctx.world_size > 1:
        raise UserError("train.minutes measures one process: leave torchrun out, or set train.steps yourself", CONFIG)
    sizes = [size for size in SIZES if size.context < text]
    if not sizes:
        raise UserError(
            f"the training text is {text} tokens long, too short for train.minutes: give it more text", DATA
        )
    return sizes


def too_short(minutes: float, least: float) -> UserError:
    """What to say where nothing can be learned in the time; `least` seconds would do."""
    return UserError(
        f"train.minutes is {minutes:g}, which is too short: starting, measuring and looking at what "
        f"was learned take {least:.0f} s here with {FEWEST_STEPS} steps; give at least {math.ceil(least / 6) / 10}",
        CONFIG,
    )


def switched(config: RunConfig, compiler: Literal["on", "off"]) -> RunConfig:
    """The config with torch.compile on or off."""
    return replace(config, train=replace(config.train, compile=compiler))


def may_compile(config: RunConfig, ctx: DistContext, best: Offer) -> bool:
    """Whether it is measured how much faster the compiler makes a step: it takes half a minute to say so."""
    asked, long = config.train.compile, best.steps * best.step > COMPILE_SECONDS
    return asked == "on" or (asked == "auto" and long and has_compiler(ctx.device))


def decided(config: RunConfig, best: Offer) -> RunConfig:
    """The config of a run of that size; it says nothing of minutes any more."""
    size = best.size
    model = shaped(config, size).model
    every = -(-best.steps // best.evaluations)
    train = replace(
        config.train,
        minutes=0.0,
        steps=best.steps,
        batch_size=size.batch_size,
        micro_batch_size=0,
        eval_every=every,
        eval_tokens=EVALUATED,
        save_every=every,
        compile="on" if best.compiled else "off",
    )
    return replace(config, model=model, train=train, optim=replace(config.optim, **RECIPE))  # type: ignore[arg-type]


def shaped(config: RunConfig, size: Size) -> RunConfig:
    """The config with that model and batch."""
    shape = {"n_layers": size.n_layers, "n_heads": size.n_heads, "d_model": size.d_model, "context": size.context}
    model = replace(config.model, **shape, n_kv_heads=0, d_head=0, d_mlp=0)  # type: ignore[arg-type]
    return replace(config, model=model, train=replace(config.train, batch_size=size.batch_size, micro_batch_size=0))


def speed(size: Size, config: RunConfig, ctx: DistContext, vocab_size: int) -> Speed:
    """How fast that size is here; compiled if `train.compile` is on."""
    config = shaped(config, size)
    config = replace(config, model=resolve_attention(config.model, ctx.device, ctx.dtype))
    return measured(config, vocab_size, ctx, size.batch_size, max(1.0, MEASURING * 60 * config.train.minutes))


def offer(size: Size, known: Mapping[Size, Speed], seconds: float, text: int, held_out: int) -> Offer:
    """What a size could do in `seconds`; where its speed is not measured, as fast as the next one that is."""
    if size in known:
        step, window = known[size].step, known[size].window
    else:
        near = min(known, key=lambda other: abs(math.log(other.seconds / size.seconds)), default=None)
        step = size.seconds * (known[near].step / near.seconds if near else 1.0)
        window = step / size.batch_size / 3  # the backward pass costs twice the forward pass
    evaluations = min(MOST_EVALUATIONS, max(FEWEST_EVALUATIONS, round(seconds / 30)))
    look = LOOK + min(EVALUATED, held_out) / size.context * window
    passes = min(FINAL_TARGETS, held_out) / size.context + PASSES_A_HEAD * size.n_layers * size.n_heads
    finish = FINISH + passes * window
    fixed = BEGIN + evaluations * look + finish
    steps = max(0, int((seconds - fixed) / step))
    tokens = useful_tokens(steps * size.tokens, text)
    loss = expected_loss(size.weights, tokens) if steps >= FEWEST_STEPS else math.inf
    return Offer(size, step, steps, evaluations, steps * size.tokens / text, loss, fixed, finish + 2 * look)


def page(config: RunConfig, ctx: DistContext, offers: list[Offer], best: Offer) -> list[str]:
    """The plan in lines: what each size could do, and which one is taken."""
    lines = [
        f"plan    {config.train.minutes:g} min on {machine.describe()}; what each size would do with that",
        "          layers  heads  width  context  batch    steps  epochs   loss",
    ]
    for one in offers:
        size = one.size
        shape = f"{size.n_layers:>6}{size.n_heads:>7}{size.d_model:>7}{size.context:>9}{size.batch_size:>7}"
        mark = ">" if one is best else " "
        learned = f"{one.loss:>7.2f}" if math.isfinite(one.loss) else f"{'-':>7}"  # too few steps to say
        lines.append(f"        {mark} {shape}{one.steps:>9,}{one.epochs:>8.2f}{learned}")
    kind = "compiled steps" if best.compiled else "steps"
    lines.append(
        f"        taken: {best.steps:,} {kind} of {1000 * best.step:.3g} ms, and {best.fixed:.0f} s for the rest "
        "(loss: as on Tiny Shakespeare by character)"
    )
    if best.epochs > MANY_EPOCHS:
        lines.append(
            f"        the text is read {best.epochs:.0f} times over, which a model may learn by heart: more text would "
            "help, or --train.patience 2, --model.dropout 0.2"
        )
    return lines
