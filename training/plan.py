"""`train.py --plan`: parameters, FLOPs, memory and time of a run on this machine or on GPUs by name, without training.

It prepares no text, and prints one page. Memory is a formula; time is measured here (`time_budget.measure_step`),
or assumes a share of the peak of a GPU, or of this machine for a large model.
"""

import ctypes
import math
import os
from dataclasses import replace
from datetime import timedelta

import torch
from tqdm import tqdm

from common.errors import UserError, escape_control_chars
from data.corpora import NAMED
from data.hub import PREFIX
from data.prepare import expected_vocab_size
from data.text_files import find_files
from model.chunked_attention import CHUNK_SIZE, RECOMPUTE_ABOVE
from model.config import ModelConfig
from training.config import RunConfig
from training.device import DTYPES, DistContext, get_dist_context, measure_matmul_flops, resolve_attention
from training.flops import block_matrices, count_parameters, step_flops
from training.hardware import GPU
from training.loss import CHUNK
from training.time_budget import measure_step
from training.trainer import micro_batch_rows

USABLE_MEMORY = {"cuda": 0.8, "cpu": 0.6, "mps": 0.6}  # share; the rest is for libraries, the allocator, other programs
ASSUMED_MFU = 0.4  # what a large GPT reaches on a GPU; a small one reaches less
MEASURE_SECONDS = 0.8
format_sizeof = tqdm.format_sizeof  # three digits and a decimal prefix: 1,234,567 is 1.23M


def plan(config: RunConfig, target: tuple[GPU | None, int], name: str) -> None:
    """Print what a run would take; raises `UserError` (2) for what would keep it from starting there.

    `target`: a kind of GPU, or None for this machine, and how many processes.
    """
    if "RANK" in os.environ:
        raise UserError("--plan is for one process: start without torchrun and name the GPUs: --plan 8xh100")
    if config.train.minutes:
        raise UserError("--plan needs --train.steps: with train.minutes a run chooses its model, and prints it")
    gpu, count = target
    micro_batch_rows(config, count)  # refuses a batch that cannot be divided
    ctx = get_dist_context(config.train.dtype, config.run.threads, config.run.device if gpu is None else "auto")
    where = f"this machine: {ctx.describe()}"
    if gpu is not None:
        dtype = gpu.half_dtypes[0] if config.train.dtype == "auto" else config.train.dtype
        ctx = replace(ctx, device=torch.device("cuda"), dtype=DTYPES[dtype])
        where = f"{count} x {gpu.name}, {dtype}"
    config = replace(config, model=resolve_attention(config.model, ctx.device, ctx.dtype))
    vocab_size, source = expected_vocab_size(config.data)
    print(f"plan       {escape_control_chars(name)} on {where}, {config.model.attention} attention")
    print(heading(config, f"{vocab_size:,} ({source})"))
    parts = count_parameters(config.model, vocab_size)
    print_table("parameters", {part: f"{n:,}" for part, n in {**parts, "total": sum(parts.values())}.items()})
    step, tokens = step_flops(config, vocab_size), config.train.batch_size * config.model.context
    rows = {"a token": step / tokens, "a step": step, "the run": step * config.train.steps}
    print_table("FLOPs of matrix products, forward and backward", {key: format_sizeof(n) for key, n in rows.items()})
    if print_memory(config, gpu, count, ctx, vocab_size) or gpu is not None:
        print_time(config, gpu, count, ctx, vocab_size)


def heading(config: RunConfig, vocabulary: str) -> str:
    train, model = config.train, config.model
    tokens = train.steps * train.batch_size * model.context
    missing = ""
    try:
        if config.data.source not in NAMED and not config.data.source.startswith(PREFIX):
            find_files(config.data.source, config.data.encoding)
    except UserError:
        missing = ": no such text on this machine"
    return (
        f"data       {escape_control_chars(config.data.source)}{missing}; vocabulary of {vocabulary}\n"
        f"model      {model.description}\n"
        f"run        {train.steps:,} steps of {train.batch_size} x {model.context} tokens: {tokens:,} tokens"
    )


def print_table(title: str, rows: dict[str, str]) -> None:
    print("\n".join(["", title, *(f"  {label:<24}{value:>16}" for label, value in rows.items())]))


def print_memory(config: RunConfig, gpu: GPU | None, count: int, ctx: DistContext, vocab_size: int) -> bool:
    """Memory of a process by part, and what to do if that is too much; whether it fits."""
    rows = micro_batch_rows(config, count)
    memory = {n: estimate_memory(config, vocab_size, ctx.dtype, n, count) for n in range(rows, 0, -1)}
    whose = "memory" if count == 1 else f"memory of each of {count} processes"
    print_table(
        f"{whose}, micro-batch of {rows}", {part: format_sizeof(n, "B") for part, n in memory[rows].items() if n}
    )
    if gpu is not None:
        total = gpu.memory
    elif ctx.device.type == "cuda":
        total = torch.cuda.get_device_properties(ctx.device).total_memory
    else:
        total = physical_memory()
    available = USABLE_MEMORY[ctx.device.type] * total
    best = next((n for n in memory if memory[n]["peak"] <= available), 0)
    where = f"the {format_sizeof(available, 'B')} of {gpu.name if gpu else 'this machine'} that can be used"
    print(f"  it {'fits' if best == rows else 'DOES NOT FIT'} into {where}")
    if 0 < best < rows:
        print(f"  it would with --train.micro_batch_size {best}; the batch stays the same")
    if not best:
        print("  not even a micro-batch of 1 fits: lower model.context or the size of the model")
    if count > 1 and config.train.sharding == "none":
        print("  --train.sharding fsdp divides parameters, gradients and optimizer state among the processes")
    return best == rows


def physical_memory() -> int:
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX of Windows: its length, then the total
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return status[1]


def estimate_memory(
    config: RunConfig, vocab_size: int, dtype: torch.dtype, rows: int, world_size: int = 1
) -> dict[str, int]:
    """Bytes of a process with micro-batches of `rows`, by part, and their peak; `model.attention` must be resolved."""
    model, size = config.model, dtype.itemsize
    total = sum(count_parameters(model, vocab_size).values())
    matrices = model.n_layers * sum(m * n for m, n in block_matrices(model))
    tokens = rows * model.context
    rest = 8 * model.d_model + 4 * model.d_head  # embedding, final norm, rotary angles
    logits = tokens * vocab_size
    memory = {
        "parameters": 4 * total,
        "gradients": 4 * total,
        # AdamW keeps two values per parameter, Muon one
        "optimizer": 8 * total - (4 * matrices if config.optim.optimizer == "muon" else 0),
        "16-bit copies": size * (matrices + vocab_size * model.d_model) if size < 4 else 0,
        "activations": tokens * (model.n_layers * activation_bytes(model, rows, size) + rest),
        "logits": size * logits + 3 * 4 * min(logits, CHUNK),
    }
    # Gradients appear while activations and logits go: the larger of the two counts, but their sum if gradients of
    # earlier micro-batches are there during the forward pass.
    features, gradients = memory["activations"] + memory["logits"], memory["gradients"]
    accumulates = config.train.batch_size > rows * world_size
    largest = features + gradients if accumulates else max(features, gradients)
    return {**memory, "peak": memory["parameters"] + memory["optimizer"] + memory["16-bit copies"] + largest}


def activation_bytes(config: ModelConfig, rows: int, size: int) -> int:
    """Bytes that one layer keeps per token for the backward pass, after Korthikanti et al. 2022, section 4.1.

    Products are of elements of `size` bytes (2 or 4). A test compares it with memory in use after a forward pass (within 15%).
    """
    preset, context, d_model, d_mlp = config.architecture, config.context, config.d_model, config.d_mlp
    q, kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    eager, chunked = config.attention == "eager", config.attention == "chunked"
    # Norms keep their inputs (and normalized inputs) in fp32; projections keep theirs, and attention q, k, v and output.
    norm = 0 if preset.norm == "none" else 8 if eager or preset.norm == "rms" else 4
    sublayers = 1 + preset.has_mlp
    kept = sublayers * (norm + size) * d_model + size * (2 * q + 2 * kv)
    if eager and not preset.qk_norm:
        kept += size * 2 * (q - kv)  # repeated keys and values
    elif eager or kv < q:
        kept += size * (3 * q if eager else 2 * q)  # copies of queries, or repeated keys and values
    if preset.qk_norm:
        kept += (size if eager else 8 + size) * (q + kv)
    pattern = 0
    if eager:
        pattern = config.n_heads * context
    elif chunked and rows * config.n_heads * context**2 <= RECOMPUTE_ABOVE:
        pattern = config.n_heads * (context + min(context, CHUNK_SIZE)) // 2
    recomputed = chunked and rows * context * d_mlp > RECOMPUTE_ABOVE
    hidden = {"gelu": (3, 2), "relu2": (2, 2), "swiglu": (5, 4)}[preset.activation][not eager] - recomputed
    kept += size * (pattern + hidden * d_mlp)
    return kept


def print_time(config: RunConfig, gpu: GPU | None, count: int, ctx: DistContext, vocab_size: int) -> None:
    """Time of a step and of the run, without compiling."""
    train, flops = config.train, step_flops(config, vocab_size)
    fast = [DTYPES[name] for name in gpu.half_dtypes] if gpu else []
    peak = measure_matmul_flops(ctx) if gpu is None else gpu.half if ctx.dtype in fast else gpu.fp32
    rate = f"{format_sizeof(peak)}FLOP/s"
    if gpu is None and flops / train.batch_size < ASSUMED_MFU * peak * MEASURE_SECONDS / 5:  # 5 sequences at least
        step = measure_step(config, vocab_size, ctx, MEASURE_SECONDS)
        how = f"measured here; MFU {flops / step / peak:.0%} of {rate}, a large matrix product"
    else:
        step = flops / count / (ASSUMED_MFU * peak)
        how = f"assuming an MFU of {ASSUMED_MFU:.0%} of {rate}; a small model reaches less"
    step_tokens, evals = train.batch_size * config.model.context, math.ceil(train.steps / train.eval_every)
    eval_seconds = step * train.eval_tokens / step_tokens / 3  # a forward pass is a third of a step
    run = timedelta(seconds=round(train.steps * step + evals * eval_seconds))
    print(
        f"\ntime       {how}\n"
        f"  a step   {step:.3g} s: {step_tokens / step:,.0f} tokens/s\n"
        f"  the run  {run} with {evals:,} evaluations; without start, compiling, samples and checkpoints"
    )
