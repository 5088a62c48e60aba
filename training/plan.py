"""`train.py --plan`: parameters, FLOPs, memory and time of a run on this machine or on GPUs by name, without training.

It reads the config and a corpus that is prepared already, writes nothing and prints one page. Memory is a formula; time
is measured here (`time_budget.measure_step`), or assumes a share of a GPU's peak.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from common.errors import CONFIG, UserError, escape_control_chars
from data.dataloader import pack_documents
from data.prepare import CorpusInfo, cache_lookup
from model.chunked_attention import CHUNK_SIZE, RECOMPUTE_ABOVE
from model.config import ATTENTION_IMPLEMENTATIONS, ModelConfig
from training.config import RunConfig
from training.device import DistContext, get_dist_context, measure_matmul_flops, resolve_attention, should_compile
from training.flops import count_parameters, flops_per_token, muon_flops
from training.hardware import GPUS, PlanTarget
from training.time_budget import Corpus, StepTime, measure_step, search
from training.trainer import FINAL_TARGETS, micro_batch_rows

USABLE_MEMORY = 0.8
"""Share of a GPU's memory to plan with; the rest is for libraries and the allocator."""
CPU_OVERHEAD = 1.6
"""Process size per byte of tensors on a CPU, where the C library keeps freed memory."""
ASSUMED_MFU = 0.4
"""Share of the data sheet's peak that a GPT of some size reaches on a GPU without compiling."""
KERNELS_PER_LAYER, LAUNCH_SECONDS = 120, 6e-6
"""GPU kernels of a layer, forward and backward, and the CPU time to launch one: the limit of a small model."""
MEASURE_SECONDS = 4.0
LOSS_CHUNK = 1 << 22
"""Logits that `training/loss.py` converts to fp32 at a time."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process without sharding."""

    parameters: int
    gradients: int
    optimizer: int
    bf16_copies: int
    """Parameters in the dtype of the products."""
    activations: int
    """Kept for the backward pass of one micro-batch."""
    logits: int
    accumulates: bool
    """Whether a step has several micro-batches, so that gradients exist during the forward pass."""

    @property
    def peak(self) -> int:
        """Gradients appear while activations and logits go, so only the larger of the two counts."""
        features = self.activations + self.logits
        largest = features + self.gradients if self.accumulates else max(features, self.gradients)
        return self.parameters + self.optimizer + self.bf16_copies + largest

    def sharded_peak(self, world_size: int, embeddings: int, block: int) -> int:
        """With FSDP, stage 3 of Rajbhandari et al. 2020: shares, gathered embeddings and two blocks, their gradient.

        Args:
            embeddings: bytes of the parameters outside the blocks.
            block: bytes of the parameters of a block.
        """
        gradients = self.gradients if self.accumulates else self.gradients // world_size + max(block, embeddings)
        shares = (self.parameters + self.optimizer) // world_size
        return shares + gradients + embeddings + 2 * block + self.bf16_copies + self.activations + self.logits


def estimate_memory(
    config: RunConfig, vocab_size: int, dtype: torch.dtype, rows: int, world_size: int = 1
) -> MemoryEstimate:
    """Memory of a step with `rows` sequences in a micro-batch; `model.attention` must be resolved."""
    model, parts = config.model, count_parameters(config.model, vocab_size)
    total, matrices, size = sum(parts.values()), parts["attention"] + parts["MLP"], dtype.itemsize
    in_muon = matrices if config.optim.optimizer == "muon" else 0
    tokens = rows * model.context
    rest = 8 * model.d_model + 4 * model.d_head  # embedding, final norm, rotary angles
    logits = tokens * vocab_size
    return MemoryEstimate(
        parameters=4 * total,
        gradients=4 * total,
        optimizer=8 * total - 4 * in_muon,  # Muon keeps one value per parameter, AdamW two
        bf16_copies=size * (matrices + vocab_size * model.d_model) if size < 4 else 0,
        activations=tokens * (model.n_layers * activation_bytes(model, rows, size) + rest),
        logits=size * logits + 3 * 4 * min(logits, LOSS_CHUNK),
        accumulates=config.train.batch_size > rows * world_size,
    )


def activation_bytes(config: ModelConfig, rows: int, size: int) -> int:
    """Bytes that one layer keeps per token for the backward pass, after Korthikanti et al. 2022, section 4.1.

    A test compares it with the tensors that autograd keeps (within 10%). Not included: on a CPU, sdpa with dropout falls
    back to a kernel that keeps the attention pattern.

    Args:
        size: bytes of an element in the dtype of the products (2 or 4).
    """
    preset, context, d_model, d_mlp = config.architecture, config.context, config.d_model, config.d_mlp
    q, kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    eager, chunked = config.attention == "eager", config.attention == "chunked"
    # Norms keep their inputs (and normalized inputs) in fp32; projections keep theirs, and attention q, k, v and output.
    kept = (16 if eager or preset.norm == "rms" else 8) * d_model + size * (2 * d_model + 2 * q + 2 * kv)
    if eager:
        kept += size * 3 * q
    elif kv < q:
        kept += size * (2 * q - (kv if preset.qk_norm else 0))  # repeated keys and values
    if preset.qk_norm:
        kept += size * (q + kv) if eager else 8 * (q + kv) + size * q + (size * (q + kv) if size < 4 else 0)
    pattern = 0
    if eager:
        pattern = config.n_heads * context
    elif chunked and rows * config.n_heads * context**2 <= RECOMPUTE_ABOVE:
        pattern = config.n_heads * (context + min(context, CHUNK_SIZE)) // 2
    hidden = {"gelu": 4, "relu2": 2, "swiglu": 5}[preset.activation]
    if not eager:
        recomputed = chunked and rows * context * d_mlp > RECOMPUTE_ABOVE
        hidden = {"gelu": 2, "relu2": 2, "swiglu": 4}[preset.activation] - recomputed
    kept += size * (pattern + hidden * d_mlp)
    if config.dropout:
        kept += size * (2 * d_model + (2 * pattern if eager else 0)) + (config.n_heads * context // 2 if chunked else 0)
    return kept


@dataclass(frozen=True)
class Plan:
    """A run on a target."""

    config: RunConfig
    """Its `model.attention` is resolved."""
    target: PlanTarget
    ctx: DistContext
    corpus: CorpusInfo

    @property
    def rows(self) -> int:
        """Sequences in a micro-batch."""
        return micro_batch_rows(self.config, self.target.count)

    def memory(self, rows: int, attention: str = "") -> MemoryEstimate:
        """The memory of a process."""
        model = replace(self.config.model, attention=attention or self.config.model.attention)  # type: ignore[arg-type]
        config = replace(self.config, model=model)
        return estimate_memory(config, self.corpus.vocab_size, self.ctx.dtype, rows, self.target.count)

    def peak(self, rows: int, count: int = 0, sharding: str = "", attention: str = "") -> int:
        """Bytes that a process needs, with this plan's number of GPUs, sharding and attention or others."""
        count, memory = count or self.target.count, self.memory(rows, attention)
        if (sharding or self.config.train.sharding) == "none" or count == 1:
            return memory.peak
        parts = count_parameters(self.config.model, self.corpus.vocab_size)
        block = 4 * (parts["attention"] + parts["MLP"]) // self.config.model.n_layers
        return memory.sharded_peak(count, 4 * parts["embeddings"], block)


def plan(config: RunConfig, target: PlanTarget, name: str) -> None:
    """Print what a run would take.

    Raises:
        UserError: for what would keep the run from starting there (exit code 2).
    """
    if "RANK" in os.environ:
        raise UserError("--plan is for one process: start without torchrun and name the GPUs: --plan 8xh100", CONFIG)
    if config.train.batch_size % target.count:
        raise UserError(
            f"train.batch_size is {config.train.batch_size}; it must be a multiple of the {target.count} processes",
            CONFIG,
        )
    planned = resolve(choose_size(config, target), target)
    available = available_memory(target, planned.ctx)
    fits = planned.peak(planned.rows) <= available
    print("\n".join(heading(planned, name)) + "\n")
    print("\n".join([*parameter_lines(planned), "", *flops_lines(planned), "", *memory_lines(planned)]))
    print("\n".join(fit_lines(planned, available)) + "\n", flush=True)
    if target.gpu is None and not fits:
        print("time       not measured, because it does not fit")
    else:
        print("\n".join(time_lines(planned)))


def choose_size(config: RunConfig, target: PlanTarget) -> RunConfig:
    """The config with `train.minutes` replaced by a model and steps."""
    if not config.train.minutes:
        return config
    if target.gpu is not None:
        raise UserError("train.minutes is measured on this machine; leave out the name after --plan", CONFIG)
    corpus = cache_lookup(config.data)
    if corpus.train is None or corpus.val is None:
        raise UserError("train.minutes needs the corpus, which the first run without --plan prepares", CONFIG)
    ctx = get_dist_context(config.train.dtype, config.run.threads)
    sizes = Corpus(corpus.vocab_size, len(corpus.train), len(corpus.val))
    config, lines, _ = search(config, ctx, sizes, 0.0)
    print("\n".join(lines) + "\n", flush=True)
    return config


def resolve(config: RunConfig, target: PlanTarget) -> Plan:
    """Decide dtype and attention as the run would."""
    ctx, device = get_dist_context(config.train.dtype, config.run.threads), torch.device("cuda")
    if target.gpu is None:
        device = ctx.device
    else:
        use_bf16 = config.train.dtype != "fp32" and target.gpu.bf16 > 0
        ctx = replace(ctx, dtype=torch.bfloat16 if use_bf16 else torch.float32)
    model = resolve_attention(config.model, device, ctx.dtype)
    return Plan(replace(config, model=model), target, ctx, cache_lookup(config.data))


def heading(plan: Plan, name: str) -> list[str]:
    """What is planned, where, on which corpus."""
    config, target, corpus = plan.config, plan.target, plan.corpus
    train, model = config.train, config.model
    where = f"this machine: {plan.ctx.describe()}"
    if target.gpu is not None:
        where = f"{target.count} x {target.gpu.name}, {'bf16' if plan.ctx.dtype == torch.bfloat16 else 'fp32'}"
    tokens = train.steps * train.batch_size * model.context
    epochs, known = "", f"not prepared yet; vocabulary of {corpus.vocab_size:,} ({corpus.how})"
    if corpus.train is not None:
        known = f"{len(corpus.train):,} training tokens; vocabulary of {corpus.vocab_size:,}"
        if len(corpus.train) > model.context:
            epochs = f", {train.steps * train.batch_size / len(pack_documents(corpus.train, model.context)):.2f} epochs"
    return [
        f"plan       {escape_control_chars(name)} on {where}, {model.attention} attention",
        f"data       {escape_control_chars(config.data.source)}: {known}",
        f"model      {model.preset}: {model.n_layers} layers, {model.n_heads} heads, d_model {model.d_model}, "
        f"context {model.context}",
        f"run        {train.steps:,} steps of {train.batch_size} x {model.context} tokens: {tokens:,} tokens{epochs}",
    ]


def parameter_lines(plan: Plan) -> list[str]:
    """Parameters by part."""
    parts = count_parameters(plan.config.model, plan.corpus.vocab_size)
    total = sum(parts.values())
    labels = {"embeddings": "embeddings (also the LM head)"}
    lines = [f"  {labels.get(part, part):<34}{n:>16,}{n / total:>8.1%}" for part, n in parts.items()]
    return [f"{'parameters':<36}{total:>16,}", *lines]


def flops_lines(plan: Plan) -> list[str]:
    """FLOPs of a token, a step and the run, over all processes."""
    config, cost = plan.config, flops_per_token(plan.config.model, plan.corpus.vocab_size)
    tokens = config.train.batch_size * config.model.context
    rows = {"forward": cost.forward * tokens, "backward": cost.backward * tokens}
    if config.optim.optimizer == "muon":
        rows["Muon"] = muon_flops(config.model) * plan.target.count
    rows["total"] = sum(rows.values())
    rows["of these in attention scores"] = 3 * cost.attention * tokens
    lines = [f"{'FLOPs of matrix products':<36}{'per token':>12}{'per step':>12}{'whole run':>12}{'share':>8}"]
    for name, step in rows.items():
        numbers = "".join(f"{scaled(n):>12}" for n in (step / tokens, step, step * config.train.steps))
        lines.append(f"  {name:<34}{numbers}{step / rows['total']:>8.1%}")
    return lines


def memory_lines(plan: Plan) -> list[str]:
    """Memory of a process by part, for each attention implementation."""
    chosen, count = plan.config.model.attention, plan.target.count
    estimates = [plan.memory(plan.rows, attention) for attention in ATTENTION_IMPLEMENTATIONS]
    titles = "".join(f"{name + (' *' if name == chosen else ''):>12}" for name in ATTENTION_IMPLEMENTATIONS)
    whose = "memory" if count == 1 else f"memory of each of {count} processes"
    rows = {
        part.replace("_", " "): [getattr(estimate, part) for estimate in estimates]
        for part in ("parameters", "gradients", "optimizer", "bf16_copies", "activations", "logits", "peak")
    }
    if count > 1:
        rows["peak with train.sharding fsdp"] = [
            plan.peak(plan.rows, sharding="fsdp", attention=attention) for attention in ATTENTION_IMPLEMENTATIONS
        ]
    lines = [f"{f'{whose}, micro-batch of {plan.rows}':<48}{titles}"]
    for name, numbers in rows.items():
        if any(numbers):
            lines.append(f"  {name:<46}{''.join(f'{scaled(n) + chr(66):>12}' for n in numbers)}")
    return lines


def fit_lines(plan: Plan, available: float) -> list[str]:
    """Whether the run fits into memory, and if not, what would."""
    where = plan.target.gpu.name if plan.target.gpu else "this machine"
    memory = f"the {scaled(available)}B of {where} that are available"
    if plan.peak(plan.rows) <= available:
        return [f"  it fits into {memory}"]
    return [f"  IT DOES NOT FIT into {memory}", f"  {advice(plan, available)}"]


def advice(plan: Plan, available: float) -> str:
    """What would fit: a smaller micro-batch, FSDP, more GPUs, or another GPU."""
    rows = next((rows for rows in range(plan.rows - 1, 0, -1) if plan.peak(rows) <= available), 0)
    if rows:
        return f"it would with --train.micro_batch_size {rows}; the batch stays the same"
    counts = [plan.target.count * 2**i for i in range(9)]
    for count in counts if plan.target.gpu else []:
        if 1 < count <= plan.config.train.batch_size and plan.peak(1, count, "fsdp") <= available:
            return f"{count} of them would, with --train.sharding fsdp --train.micro_batch_size 1"
    larger = [name for name, gpu in GPUS.items() if plan.memory(1).peak <= USABLE_MEMORY * gpu.memory]
    hint = f"; a micro-batch of 1 would fit on {', '.join(larger)}" if larger else ""
    return f"not even a micro-batch of 1 fits: lower model.context or the size of the model{hint}"


def available_memory(target: PlanTarget, ctx: DistContext) -> float:
    """Bytes of tensors that fit."""
    if target.gpu is not None:
        return USABLE_MEMORY * target.gpu.memory
    if ctx.device.type == "cuda":
        return float(torch.cuda.mem_get_info(ctx.device)[0])
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            entries = {line.split(":")[0]: int(line.split()[1]) for line in file}
        return entries["MemAvailable"] * 1024 / CPU_OVERHEAD
    except (OSError, KeyError, ValueError, IndexError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / CPU_OVERHEAD


def estimate_step(plan: Plan) -> tuple[StepTime, str]:
    """The time of a step, and how it is known."""
    config, gpu, cost = plan.config, plan.target.gpu, flops_per_token(plan.config.model, plan.corpus.vocab_size)
    if gpu is None:
        step = measure_step(config, plan.corpus.vocab_size, plan.ctx, MEASURE_SECONDS)
        peak = measure_matmul_flops(plan.ctx)
        mfu = config.train.batch_size * config.model.context * (cost.forward + cost.backward) / step.step / peak
        return step, f"measured here; MFU {mfu:.0%} of {scaled(peak)}FLOP/s, a large matrix product"
    peak = gpu.bf16 if plan.ctx.dtype == torch.bfloat16 else gpu.fp32
    sequences = config.train.batch_size // plan.target.count
    sequence = config.model.context * cost.forward / (ASSUMED_MFU * peak)
    launches = KERNELS_PER_LAYER * config.model.n_layers * -(-sequences // plan.rows) * LAUNCH_SECONDS
    muon = muon_flops(config.model) / (ASSUMED_MFU * peak) if config.optim.optimizer == "muon" else 0.0
    seconds, how = 3 * sequences * sequence + muon, f"assuming an MFU of {ASSUMED_MFU:.0%} of {scaled(peak)}FLOP/s"
    if launches > seconds:
        seconds, how = launches, "limited by launching kernels: too small a model to fill the GPU"
    return StepTime(seconds, sequence / plan.target.count), how


def time_lines(plan: Plan) -> list[str]:
    """Time of a step and of the run."""
    train, context, corpus = plan.config.train, plan.config.model.context, plan.corpus
    step, how = estimate_step(plan)
    evals = -(-train.steps // train.eval_every)
    n_val = len(corpus.val) if corpus.val is not None else FINAL_TARGETS
    eval_tokens = evals * min(train.eval_tokens, n_val) + min(FINAL_TARGETS, n_val)
    eval_seconds, seconds = eval_tokens / context * step.forward, train.steps * step.step
    lines = [
        f"time       {how}",
        f"  a step   {duration(step.step)}: {train.batch_size * context / step.step:,.0f} tokens/s",
        f"  the run  {duration(seconds + eval_seconds)}, of which {duration(eval_seconds)} for {evals + 1} evaluations; "
        "without start, samples, checkpoints and attention files",
    ]
    device = torch.device("cuda") if plan.target.gpu else plan.ctx.device
    if should_compile(train, seconds, device) and (plan.target.gpu or train.compile == "auto"):
        lines.append("  this run would be compiled, which is not included: expect it to be faster")
    return lines


def scaled(number: float) -> str:
    """A number with three digits and a decimal prefix: 1,234,567 is `1.23 M`."""
    for prefix in ("", "k", "M", "G", "T", "P", "E", "Z"):
        if abs(number) < 999.5 or prefix == "Z":
            break
        number /= 1000
    digits = 0 if number >= 99.95 or not prefix else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f} {prefix}"


def duration(seconds: float) -> str:
    """Seconds in a readable unit: `12.3 ms`, `75 s`, `50 min`, `11.6 days`."""
    for limit, size, unit in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 100 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:,.3g} days" if seconds < 86_400_000 else f"{seconds / 86_400:,.0f} days"
