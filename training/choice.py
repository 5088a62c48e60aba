"""What a run leaves to the machine, decided by measuring it: number format, face of attention, threads, compiling.

Rules (`training/device.py`) serve the machines that we know. Another one may multiply bf16 slowly, or have so many cores
that a small model is faster on a few of them. So before a run of some length one layer of its shape is taken forward
and back in every way that is open. The rule's way stays unless another is clearly faster every time: neither a tie nor
a moment's other work decides. What was found is kept in the cache folder, so that the same command goes the same way
on the same machine, to the bit. A resumed run goes on as it began.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from data.config import cache_folder
from model.config import ATTENTION_IMPLEMENTATIONS, AttentionImplementation
from model.gpt import GPT
from training.config import RunConfig
from training.device import (
    ASSUMED_FLOPS,
    DistContext,
    bf16_is_fast,
    compile_model,
    forward_backward,
    no_sync,
    resolve_attention,
    set_deterministic,
)
from training.flops import flops_per_token
from training.hardware import cpu_name
from training.timing import once
from training.way import DTYPES, Choice, Way, parsed, recall, remember

WORTH = 20.0
"""A run whose steps take less than so many seconds, as far as can be told before, goes by the rules."""
MARGIN = 1.2
"""So many times as fast as the rule's way must another be to be taken."""
ROUNDS = 3
"""Passes of each way, in turn."""
HOPELESS = 2.0
"""A way that takes so many times the time of the rule's is not tried again."""
TOKENS, PASS = 2048, 0.1
"""Of a pass, at most, and the seconds that it may take by the rule; but at least one window."""
VOCABULARY = 256
"""The head is one more product for every way alike; a small one leaves the layer's differences to be seen."""
TRIED: tuple[AttentionImplementation, ...] = ("sdpa", "chunked")
"""The face that writes every step out is never the fastest."""
FEW_THREADS = 4
"""So many always pay; of more, half are tried, and half of these, as long as fewer are faster."""
T = TypeVar("T")


def choose_way(config: RunConfig, ctx: DistContext, vocab_size: int, rows: int, begun: Mapping[str, str]) -> Choice:
    """The way that a run takes on this machine, the same on every process.

    Args:
        rows: windows that a process holds in memory at once.
        begun: the way that a resumed run took before, as its checkpoint says (`Origin.how`); empty for a new run.
    """
    rule = by_rule(config, ctx, vocab_size)
    if begun.get("device") == ctx.device.type:
        return replace(rule, way=as_begun(config, ctx, rule.way, begun))
    if rule.seconds(config, ctx.world_size) < WORTH:
        return rule
    path = remembered_in(config, ctx, rows, rule.way)
    choice = recall(path, rule.way.threads) or measure(config, ctx, rule, rows)
    choice = parsed(ctx.broadcast_str(json.dumps(asdict(choice))))
    if ctx.is_main_process:
        remember(path, choice)
    return choice


def by_rule(config: RunConfig, ctx: DistContext, vocab_size: int) -> Choice:
    """What `training/device.py` says of machines like this one; the time is taken to be that of a small processor."""
    kernels = resolve_attention(config.model, ctx.device, ctx.dtype).attention
    dtype = next(name for name, dtype in DTYPES.items() if dtype == ctx.dtype)
    cost = flops_per_token(config.model, vocab_size)
    return Choice(Way(dtype, kernels, torch.get_num_threads()), (cost.forward + cost.backward) / ASSUMED_FLOPS)


def as_begun(config: RunConfig, ctx: DistContext, rule: Way, begun: Mapping[str, str]) -> Way:
    """The way of a run before it was resumed, as far as the user leaves it open and this machine can go it."""
    names = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
    dtype, kernels, threads = names.get(begun.get("dtype", "")), begun.get("attention", ""), begun.get("threads", "")
    way = rule
    if config.train.dtype == "auto" and (dtype == "fp32" or (dtype == "bf16" and bf16_is_fast(ctx.device))):
        way = replace(way, dtype=dtype)
    if config.model.attention == "auto" and kernels in ATTENTION_IMPLEMENTATIONS:
        way = replace(way, attention=kernels)
    if threads_are_open(config, ctx) and threads.isdecimal() and 0 < int(threads) < rule.threads:
        way = replace(way, threads=int(threads))
    return way


def threads_are_open(config: RunConfig, ctx: DistContext) -> bool:
    """Whether nobody has said how many threads to take."""
    alone = ctx.device.type == "cpu" and ctx.world_size == 1
    return alone and config.run.threads == 0 and "OMP_NUM_THREADS" not in os.environ


def measure(config: RunConfig, ctx: DistContext, rule: Choice, rows: int) -> Choice:
    """The fastest way, by trying those that are open; the rule's own where none is clearly faster."""
    usual, context = rule.way, config.model.context
    formats = DTYPES if config.train.dtype == "auto" else (usual.dtype,)
    faces = TRIED if config.model.attention == "auto" else (usual.attention,)
    ways = [Way(dtype, kernels, usual.threads) for dtype in formats for kernels in faces]
    rows = max(1, min(rows, TOKENS // context, int(PASS * config.model.n_layers / rule.token / context)))

    def tried(ways: list[Way]) -> dict[Way, list[float]]:
        return timed({way: layer(config, ctx, way, rows) for way in ways}, ctx)

    with torch.random.fork_rng([ctx.device] if ctx.device.type == "cuda" else []):
        seconds = tried([usual, *(way for way in ways if way != usual)])
        best = clearly_fastest(seconds)
        found = {way: statistics.median(times) for way, times in seconds.items()}
        while threads_are_open(config, ctx) and best.threads > FEW_THREADS:
            fewer = replace(best, threads=best.threads // 2)
            pair = tried([best, fewer])
            found[fewer] = found[best] * statistics.median(pair[fewer]) / statistics.median(pair[best])
            if clearly_fastest(pair) == best:
                break
            best = fewer
    usual.machine(ctx)  # the threads as they were
    token = found[best] * config.model.n_layers / (rows * context)
    return Choice(best, token, {way.apart_from(best): time / found[best] for way, time in found.items() if way != best})


def layer(config: RunConfig, ctx: DistContext, way: Way, rows: int) -> Callable[[], None]:
    """A forward and a backward pass of one layer of the model's shape."""
    shape = replace(way.model(config.model), n_layers=1)
    model = GPT(shape, VOCABULARY, config.run.seed).to(ctx.device)
    tokens = torch.randint(VOCABULARY, (rows, shape.context), device=ctx.device)
    return lambda: forward_backward(model, tokens, way.machine(ctx))


def timed(works: Mapping[T, Callable[[], None]], ctx: DistContext) -> dict[T, list[float]]:
    """The seconds of each in every round, in turn, after one pass that does not count; hopeless ones leave early."""
    for work in works.values():
        work()
    first = next(iter(works))
    seconds: dict[T, list[float]] = {way: [] for way in works}
    for _ in range(ROUNDS):
        for way, work in works.items():
            if all(time < HOPELESS * other for time, other in zip(seconds[way], seconds[first], strict=False)):
                seconds[way].append(once(work, ctx))
    return seconds


def clearly_fastest(seconds: Mapping[T, list[float]], margin: float = MARGIN) -> T:
    """The fastest of those that were faster than the first by the margin in every round; the first where none was."""
    first, *others = seconds
    better = [
        way
        for way in others
        if len(seconds[way]) == len(seconds[first])
        and all(margin * time < other for time, other in zip(seconds[way], seconds[first], strict=True))
    ]
    return min(better, key=lambda way: statistics.median(seconds[way]), default=first)


def compiled_if_faster(model: nn.Module, example: Tensor, ctx: DistContext) -> nn.Module:
    """The model through torch.compile; as it was if that fails, or was faster in every round.

    A model whose weights are split is not measured: its blocks are compiled in place.
    """
    fast = compile_model(model, example, ctx)
    if fast is model:
        return model
    works = {stepped: partial(forward_backward, stepped, example, ctx) for stepped in (fast, model)}
    with no_sync(model):
        seconds = timed(works, ctx)
    if ctx.all_reduce_max(int(clearly_fastest(seconds, margin=1.0) is fast)):
        return fast
    set_deterministic(False)
    return model


def remembered_in(config: RunConfig, ctx: DistContext, rows: int, rule: Way) -> Path:
    """The file for what was found on a machine and a shape like these; anything that counts gives it another name."""
    name = torch.cuda.get_device_name(ctx.device) if ctx.device.type == "cuda" else cpu_name()
    here = (name, os.cpu_count(), ctx.world_size, torch.__version__, threads_are_open(config, ctx))
    key = json.dumps([*here, asdict(rule), asdict(config.model), config.train.dtype, rows])
    return cache_folder() / "ways" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
