"""`train.py --plan`: what a run would take, on this machine or on GPUs by name, before anything is trained.

It reads the configuration and what is prepared already; it writes nothing and prints one page. Operations stand in
`training/flops.py`, memory in `training/footprint.py`, time in `training/speed.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from common.errors import CONFIG, UserError, escape_control_chars
from data.dataloader import pack_documents
from data.found import Found, find
from model.config import ATTENTION_IMPLEMENTATIONS
from training.config import RunConfig
from training.device import DistContext, get_dist_context, resolve_attention, should_compile
from training.flops import count_parameters, flops_per_token, muon_flops
from training.footprint import Footprint, footprint
from training.hardware import GPUS, PlanTarget
from training.speed import Speed, measured, reckoned
from training.time_budget import choose
from training.trainer import FINAL_TARGETS, micro_batch_rows

SPARED = 0.8
"""Share of a GPU's memory that is planned with: libraries, what the allocator holds back, and what a GPU computes in
fp32 where a processor does not, have the rest."""
HELD_BACK = 1.6
"""So many times what is there at once a process grows to on a processor: the C library keeps what is given back."""
POWERS = (2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of GPUs that are tried where one is not enough."""
SUMMED = ("weights", "gradients", "moments", "copies", "activations", "loss")
NAMED = {"copies": "weights in bf16", "loss": "logits, loss, and what passes"}


@dataclass(frozen=True)
class Plan:
    """A run as it would be on some machine."""

    config: RunConfig
    """Its `model.attention` decided."""
    place: PlanTarget
    ctx: DistContext
    text: Found
    rows: int
    """PackedSequences that a process holds at once."""

    def pieces(self, rows: int) -> int:
        """Micro-batches of a process in a step, with so many windows at once."""
        return -(-self.config.train.batch_size // (self.place.count * rows))

    def memory(self, attention: str, rows: int) -> Footprint:
        """What a process needs with one of the two faces and so many windows at once."""
        config = replace(self.config, model=replace(self.config.model, attention=attention))  # type: ignore[arg-type]
        return footprint(config, self.text.vocab_size, self.ctx, rows, self.pieces(rows))

    def most(self, memory: Footprint, rows: int) -> int:
        """Bytes that a process has to have, as this run shares the model."""
        split = self.config.train.sharding == "fsdp" and self.place.count > 1
        return memory.sharded(self.place.count, self.pieces(rows)) if split else memory.peak


def plan(config: RunConfig, place: PlanTarget, name: str) -> None:
    """Print what a run would take.

    Args:
        name: of the run, for the first line.

    Raises:
        UserError: for what would keep the run from starting there (exit code 2).
    """
    if "RANK" in os.environ:
        raise UserError(
            "--plan is for one process: leave torchrun out and name the GPUs, such as --plan 8xh100", CONFIG
        )
    if config.train.batch_size % place.count:
        raise UserError(
            f"train.batch_size is {config.train.batch_size}, which {place.count} processes cannot share evenly", CONFIG
        )
    one = planned(with_minutes(config, place), place)
    print("\n".join(heading(one, name)) + "\n", flush=True)
    print("\n".join([*parts_page(one), "", *operations_page(one)]) + "\n", flush=True)
    memory: dict[str, Footprint] = {kernels: one.memory(kernels, one.rows) for kernels in ATTENTION_IMPLEMENTATIONS}
    print("\n".join(memory_page(one, memory)), flush=True)
    limit = available(place, one.ctx)
    chosen = memory[one.config.model.attention]
    fits = one.most(chosen, one.rows) <= limit
    print("\n".join(verdict(one, chosen, limit)) + "\n", flush=True)
    if place.gpu is not None:
        pace = reckoned(one.config, one.text.vocab_size, place.gpu, place.count, chosen, one.pieces(one.rows))
    elif fits:
        pace = measured(one.config, one.text.vocab_size, one.ctx, one.rows)
    else:
        print("time       not measured, for it does not fit")
        return
    print("\n".join(time_page(one, pace)))


def with_minutes(config: RunConfig, place: PlanTarget) -> RunConfig:
    """The config with model and steps chosen, where it gives the minutes to spend; says what there was to choose."""
    if not config.train.minutes:
        return config
    if place.gpu is not None:
        raise UserError("train.minutes is measured on the machine that trains; leave out the name after --plan", CONFIG)
    text = find(config.data)
    if text.train is None or text.val is None:
        raise UserError("train.minutes has to know the text: it is prepared by the first run without --plan", CONFIG)
    ctx = get_dist_context(config.train.dtype, config.run.threads)
    config, lines, _ = choose(config, ctx, text.vocab_size, len(text.train), len(text.val), 0.0)
    print("\n".join(lines) + "\n", flush=True)
    return config


def planned(config: RunConfig, place: PlanTarget) -> Plan:
    """The run with all that the machine decides decided."""
    ctx, text = get_dist_context(config.train.dtype, config.run.threads), find(config.data)
    rows = micro_batch_rows(config, place.count)
    if place.gpu is None:
        model = resolve_attention(config.model, ctx.device, ctx.dtype)
    else:
        low = config.train.dtype != "fp32" and place.gpu.bf16 > 0
        ctx = replace(ctx, dtype=torch.bfloat16 if low else torch.float32)
        model = resolve_attention(config.model, torch.device("cuda"), ctx.dtype)
    return Plan(replace(config, model=model), place, ctx, text, rows)


def heading(one: Plan, name: str) -> list[str]:
    """What is planned, where, on what text."""
    config, place, text = one.config, one.place, one.text
    train, model = config.train, config.model
    where = f"this machine: {one.ctx.describe()}"
    if place.gpu is not None:
        where = f"{place.count} x {place.gpu.name}, {'bf16' if one.ctx.dtype == torch.bfloat16 else 'fp32'}"
    tokens = train.steps * train.batch_size * model.context
    epochs, known = "", f"not prepared yet; vocabulary of {text.vocab_size:,} ({text.how})"
    if text.train is not None:
        known = f"{len(text.train):,} training tokens; vocabulary of {text.vocab_size:,}"
        if len(text.train) > model.context:
            windows = len(pack_documents(text.train, model.context))
            epochs = f", {train.steps * train.batch_size / windows:.2f} epochs"
    shape = f"{model.n_layers} layers, {model.n_heads} heads, width {model.d_model}, context {model.context}"
    return [
        f"plan       {escape_control_chars(name)} on {where}, {model.attention} attention",
        f"data       {escape_control_chars(config.data.source)}: {known}",
        f"model      {model.preset}: {shape}",
        f"run        {train.steps:,} steps of {train.batch_size} x {model.context} tokens: {tokens:,} tokens{epochs}",
    ]


def parts_page(one: Plan) -> list[str]:
    """Parameters by part."""
    parts = count_parameters(one.config.model, one.text.vocab_size)
    total = sum(parts.values())
    named = {"embeddings": "embeddings, which are the head too"}
    lines = [f"{'parameters':<36}{total:>16,}"]
    return lines + [f"  {named.get(part, part):<34}{n:>16,}{n / total:>8.1%}" for part, n in parts.items()]


def operations_page(one: Plan) -> list[str]:
    """Operations of a token, a step and the run, over all processes."""
    config = one.config
    cost = flops_per_token(config.model, one.text.vocab_size)
    tokens = config.train.batch_size * config.model.context
    rows = {"forward": cost.forward * tokens, "backward": cost.backward * tokens}
    if config.optim.optimizer == "muon":
        rows["Muon"] = muon_flops(config.model) * one.place.count
    rows["sum"] = sum(rows.values())
    rows["scores and weighted sums of these"] = 3 * cost.square * tokens
    lines = [f"{'operations of matrix products':<36}{'a token':>12}{'a step':>12}{'the run':>12}{'share':>8}"]
    for name, step in rows.items():
        numbers = (step / tokens, step, step * config.train.steps)
        lines.append(f"  {name:<34}{''.join(f'{scaled(n):>12}' for n in numbers)}{step / rows['sum']:>8.1%}")
    return lines


def memory_page(one: Plan, memory: Mapping[str, Footprint]) -> list[str]:
    """Memory by part, of each face of attention, as every process would have it."""
    count, chosen = one.place.count, one.config.model.attention
    whose = "memory" if count == 1 else f"memory of each of {count} processes"
    titles = "".join(f"{kernels + (' *' if kernels == chosen else ''):>12}" for kernels in memory)
    rows = {NAMED.get(part, part): [getattr(m, part) for m in memory.values()] for part in SUMMED}
    rows["sum"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    rows["at once, at most" + (", with DDP" if count > 1 else "")] = [m.peak for m in memory.values()]
    if count > 1:
        rows["with train.sharding fsdp, about"] = [m.sharded(count, one.pieces(one.rows)) for m in memory.values()]
    shown = [
        (name, "".join(f"{scaled(n) + 'B':>12}" for n in numbers)) for name, numbers in rows.items() if any(numbers)
    ]
    head = f"{whose}, {counted(one.rows, 'window')} at once"
    return [f"{head:<48}{titles}", *(f"  {name:<46}{numbers}" for name, numbers in shown)]


def verdict(one: Plan, memory: Footprint, limit: float) -> list[str]:
    """Whether it fits, and if not, what would."""
    where = one.place.gpu.name if one.place.gpu else "this machine"
    have = f"the {scaled(limit)}B of {where} that are free for it"
    if one.most(memory, one.rows) <= limit:
        return [f"  it fits into {have}"]
    least = one.memory(one.config.model.attention, 1)
    if (rows := windows_that_fit(one, memory, least, limit)) > 0:
        would = f"--train.micro_batch_size {rows} would, with the step's batch as it is"
    else:
        would = other_place(one, least, limit)
    return [f"  IT DOES NOT FIT into {have}", f"  {would}"]


def windows_that_fit(one: Plan, memory: Footprint, least: Footprint, limit: float) -> int:
    """The largest micro-batch below the wanted one that fits, perhaps a little less; 0 where not even one window does.

    What is kept grows in a line with the windows; the gradient of earlier micro-batches is there besides.
    """
    spare = limit - one.most(least, 1)
    growth = memory.activations + memory.loss - least.activations - least.loss
    if spare < 0 or one.rows == 1:
        return 0
    return max(1, min(one.rows - 1, 1 + int(spare * (one.rows - 1) / max(1, growth))))


def other_place(one: Plan, least: Footprint, limit: float) -> str:
    """Where a run would fit of which not even one window does here."""
    count, windows = one.place.count, one.config.train.batch_size
    split = least.sharded(count, one.pieces(1))
    if count > 1 and one.config.train.sharding == "none" and split <= limit:
        return f"--train.micro_batch_size 1 --train.sharding fsdp would: about {scaled(split)}B"
    enough = [n for n in POWERS if count < n <= windows and least.sharded(n, -(-windows // n)) <= limit]
    if one.place.gpu and enough:
        return f"{enough[0]} of them would, with --train.sharding fsdp and --train.micro_batch_size 1"
    larger = [name for name, gpu in GPUS.items() if least.peak <= SPARED * gpu.memory]
    hint = f"; with one window at once it would fit {', '.join(larger)}" if larger else ""
    return f"not even one window does: lower model.context or the size of the model{hint}"


def time_page(one: Plan, pace: Speed) -> list[str]:
    """Time of a step and of the run."""
    config = one.config
    train, context = config.train, config.model.context
    cost = flops_per_token(config.model, one.text.vocab_size)
    tokens = train.batch_size * context
    rate = tokens * (cost.forward + cost.backward) / pace.step
    evaluations = -(-train.steps // train.eval_every)
    held = len(one.text.val) if one.text.val is not None else FINAL_TARGETS
    looked = evaluations * min(train.eval_tokens, held) + min(FINAL_TARGETS, held)
    looking = looked / context * pace.window
    share = "" if one.place.gpu else f", {rate / pace.products:.0%} of what a large one reaches alone"
    lines = [
        f"time       {pace.how}",
        f"  a step   {duration(pace.step)}: {tokens / pace.step:,.0f} tokens/s; "
        f"products at {scaled(rate)}FLOP/s{share}",
        f"  the run  {duration(train.steps * pace.step + looking)}, of which {duration(looking)} for "
        f"{counted(evaluations + 1, 'evaluation')}; without start, samples, saving and what is shown of attention",
    ]
    device = torch.device("cuda") if one.place.gpu else one.ctx.device
    measured = train.compile == "on" and not one.place.gpu
    if should_compile(train, train.steps * pace.step, device) and not measured:
        lines.append("  this run would be compiled, which is not reckoned with: expect it to be faster")
    return lines


def available(place: PlanTarget, ctx: DistContext) -> float:
    """Bytes that may be there at once."""
    if place.gpu is not None:
        return SPARED * place.gpu.memory
    if ctx.device.type == "cuda":
        return float(torch.cuda.mem_get_info(ctx.device)[0])
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            found = {line.split(":")[0]: int(line.split()[1]) for line in file}
        return found["MemAvailable"] * 1024 / HELD_BACK
    except (OSError, KeyError, ValueError, IndexError):  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / HELD_BACK


def scaled(number: float) -> str:
    """A number in three digits and a decimal prefix: 1,234,567 is `1.23 M`."""
    for prefix in ("", "k", "M", "G", "T", "P", "E", "Z"):
        if abs(number) < 999.5 or prefix == "Z":
            break
        number /= 1000
    digits = 0 if number >= 99.95 or not prefix else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f} {prefix}"


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would take."""
    for limit, size, unit in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 100 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:,.3g} days" if seconds < 86_400 * 1000 else f"{seconds / 86_400:,.0f} days"


def counted(number: int, thing: str) -> str:
    """`1 window`, `16 windows`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
