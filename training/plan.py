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
from model.config import ModelConfig
from training.config import RunConfig
from training.device import DistContext, get_dist_context, measure_matmul_flops, resolve_attention
from training.flops import count_parameters, flops_per_token, muon_flops
from training.hardware import PlanTarget
from training.loss import CHUNK
from training.time_budget import measure_step
from training.trainer import FINAL_TARGETS, micro_batch_rows

USABLE_MEMORY = 0.8
"""Share of a GPU's memory to plan with; the rest is for libraries and the allocator."""
CPU_OVERHEAD = 1.6
"""Process size per byte of tensors on a CPU, where the C library keeps freed memory."""
ASSUMED_MFU = 0.4
"""Share of the data sheet's peak that a large GPT reaches on a GPU; a small one reaches less."""
MEASURE_SECONDS = 4.0


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
        """With FSDP, stage 3 of Rajbhandari et al. 2020: shards, gathered embeddings and two blocks, their gradient.

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
        logits=size * logits + 3 * 4 * min(logits, CHUNK),
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
    """A run on a target; its `model.attention` is resolved."""

    config: RunConfig
    target: PlanTarget
    ctx: DistContext
    corpus: CorpusInfo

    @property
    def rows(self) -> int:
        """Sequences in a micro-batch."""
        return micro_batch_rows(self.config, self.target.count)

    def memory(self, rows: int) -> MemoryEstimate:
        """The memory of a process without sharding."""
        return estimate_memory(self.config, self.corpus.vocab_size, self.ctx.dtype, rows, self.target.count)

    def peak(self, rows: int, count: int = 0, sharding: str = "") -> int:
        """Bytes that a process needs, with this plan's number of GPUs and sharding or others."""
        count = count or self.target.count
        if (sharding or self.config.train.sharding) == "none" or count == 1:
            return self.memory(rows).peak
        parts = count_parameters(self.config.model, self.corpus.vocab_size)
        block = 4 * (parts["attention"] + parts["MLP"]) // self.config.model.n_layers
        return self.memory(rows).sharded_peak(count, 4 * parts["embeddings"], block)


def plan(config: RunConfig, target: PlanTarget, name: str) -> None:
    """Print what a run would take.

    Raises:
        UserError: for what would keep the run from starting there (exit code 2).
    """
    if "RANK" in os.environ:
        raise UserError("--plan is for one process: start without torchrun and name the GPUs: --plan 8xh100", CONFIG)
    if config.train.minutes:
        raise UserError("--plan needs a given model: leave out train.minutes, with which a run prints its own plan")
    if config.train.batch_size % target.count:
        raise UserError(
            f"train.batch_size is {config.train.batch_size}; it must be a multiple of the {target.count} processes",
            CONFIG,
        )
    planned = resolve(config, target)
    available = available_memory(target, planned.ctx)
    fits = planned.peak(planned.rows) <= available
    sections = [heading(planned, name), parameter_lines(planned), flops_lines(planned), memory_lines(planned)]
    where = f"the {scaled(available)}B of {target.gpu.name if target.gpu else 'this machine'} that are available"
    sections[-1] += [f"  it fits into {where}"] if fits else [f"  IT DOES NOT FIT into {where}"]
    sections[-1] += [] if fits else [f"  {advice(planned, available)}"]
    print("\n\n".join("\n".join(lines) for lines in sections) + "\n", flush=True)
    if target.gpu is None and not fits:
        print("time       not measured, because it does not fit")
    else:
        print("\n".join(time_lines(planned)))


def resolve(config: RunConfig, target: PlanTarget) -> Plan:
    """Decide dtype and attention as the run would."""
    ctx = get_dist_context(config.train.dtype, config.run.threads)
    device = ctx.device
    if target.gpu is not None:
        device, use_bf16 = torch.device("cuda"), config.train.dtype != "fp32" and target.gpu.bf16 > 0
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
        f"run        {train.steps:,} steps of {train.batch_size} x {model.context} tokens: "
        f"{train.steps * train.batch_size * model.context:,} tokens{epochs}",
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
    lines = [f"{'FLOPs of matrix products':<36}{'per token':>12}{'per step':>12}{'whole run':>12}"]
    for name, step in rows.items():
        numbers = (step / tokens, step, step * config.train.steps)
        lines.append(f"  {name:<34}" + "".join(f"{scaled(n):>12}" for n in numbers))
    return lines


def memory_lines(plan: Plan) -> list[str]:
    """Memory of a process by part."""
    count, estimate = plan.target.count, plan.memory(plan.rows)
    whose = "memory" if count == 1 else f"memory of each of {count} processes"
    names = ("parameters", "gradients", "optimizer", "bf16_copies", "activations", "logits", "peak")
    rows = {name.replace("_", " "): getattr(estimate, name) for name in names}
    if count > 1:
        rows["peak with train.sharding fsdp"] = plan.peak(plan.rows, sharding="fsdp")
    parts = [f"  {name:<34}{scaled(number) + 'B':>12}" for name, number in rows.items() if number]
    return [f"{whose}, micro-batch of {plan.rows}", *parts]


def advice(plan: Plan, available: float) -> str:
    """What would fit: a smaller micro-batch, or FSDP on more GPUs."""
    rows = next((rows for rows in range(plan.rows - 1, 0, -1) if plan.peak(rows) <= available), 0)
    if rows:
        return f"it would with --train.micro_batch_size {rows}; the batch stays the same"
    for count in (plan.target.count * 2**i for i in range(9)):
        is_possible = plan.target.gpu is not None and 1 < count <= plan.config.train.batch_size
        if is_possible and plan.peak(1, count, "fsdp") <= available:
            return f"{count} of them would, with --train.sharding fsdp --train.micro_batch_size 1"
    return "not even a micro-batch of 1 fits: lower model.context or the size of the model"


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
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / CPU_OVERHEAD


def estimate_step(plan: Plan) -> tuple[float, str]:
    """Seconds of a step, and how they are known."""
    config, gpu, cost = plan.config, plan.target.gpu, flops_per_token(plan.config.model, plan.corpus.vocab_size)
    flops = config.train.batch_size * config.model.context * (cost.forward + cost.backward)
    if gpu is None:
        seconds = measure_step(config, plan.corpus.vocab_size, plan.ctx, MEASURE_SECONDS)
        peak = measure_matmul_flops(plan.ctx)
        mfu = flops / seconds / peak
        return seconds, f"measured here; MFU {mfu:.0%} of {scaled(peak)}FLOP/s, a large matrix product"
    peak = gpu.bf16 if plan.ctx.dtype == torch.bfloat16 else gpu.fp32
    muon = muon_flops(config.model) if config.optim.optimizer == "muon" else 0
    seconds = (flops / plan.target.count + muon) / (ASSUMED_MFU * peak)
    return seconds, f"assuming an MFU of {ASSUMED_MFU:.0%} of {scaled(peak)}FLOP/s; a small model reaches less"


def time_lines(plan: Plan) -> list[str]:
    """Time of a step and of the run, without compiling."""
    train, context, corpus = plan.config.train, plan.config.model.context, plan.corpus
    step, how = estimate_step(plan)
    evals, n_val = -(-train.steps // train.eval_every), FINAL_TARGETS if corpus.val is None else len(corpus.val)
    eval_tokens = evals * min(train.eval_tokens, n_val) + min(FINAL_TARGETS, n_val)
    eval_seconds = eval_tokens / context * step / train.batch_size / 3  # the backward pass takes twice the forward pass
    return [
        f"time       {how}",
        f"  a step   {duration(step)}: {train.batch_size * context / step:,.0f} tokens/s",
        f"  the run  {duration(train.steps * step + eval_seconds)}, of which {duration(eval_seconds)} for {evals + 1} "
        "evaluations; without start, compiling, samples, checkpoints and attention files",
    ]


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
            return f"{seconds / size:.0f} {unit}" if seconds / size >= 100 else f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86_400:,.3g} days"
