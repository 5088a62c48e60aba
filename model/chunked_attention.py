"""Memory-efficient attention and MLP for training; on CPUs in bf16 also the fastest. The plain steps are in functional.py.

Attention processes a chunk of queries at a time, each against only the keys that it may attend to (Rabe & Staats
2021). Large intermediate results are recomputed in the backward pass, as in Dao et al. 2022, algorithm 4.

Shapes: B batch, H heads, G key/value heads, T positions, D head size, R queries of a chunk, S keys up to the last
query of the chunk, C model size, F MLP size.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from model import functional

CHUNK_SIZE = 128  # queries per chunk
RECOMPUTE_ABOVE = 1 << 22  # results of more elements than this are recomputed in the backward pass


def chunked_attention(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G T D"], v: Float[Tensor, "B G T D"]
) -> Float[Tensor, "B H T D"]:
    """`attention_pattern(q, k) @ v` in the dtype of `v`, for grouped keys and values too."""
    k, v = functional.repeat_kv(k, q.shape[1]), functional.repeat_kv(v, q.shape[1])
    if torch.compiler.is_compiling():  # the compiler generates faster code from the plain formula
        return functional.attention_pattern(q, k) @ v
    with torch.autocast(q.device.type, enabled=False):  # autocast on GPUs would compute the softmax in fp32
        y: Tensor = ChunkedAttention.apply(q.to(v.dtype), k.to(v.dtype), v)
    return y


def chunk_slices(T: int) -> Iterator[tuple[slice, slice]]:
    """For each chunk: its queries, and the keys up to its last query."""
    for start in range(0, T, CHUNK_SIZE):
        end = min(start + CHUNK_SIZE, T)
        yield slice(start, end), slice(0, end)


def chunk_pattern(q: Float[Tensor, "B H R D"], k: Float[Tensor, "B H S D"]) -> Float[Tensor, "B H R S"]:
    """`functional.attention_pattern` for the last R of S positions, with operations in place."""
    R, D = q.shape[-2:]
    scores = (q @ k.transpose(-2, -1)).mul_(1 / math.sqrt(D))
    scores[..., -R:] += functional.causal_bias(R, R, scores)  # all queries of the chunk may attend to earlier keys
    return scores.softmax(dim=-1)


class ChunkedAttention(torch.autograd.Function):
    """Attention that computes one chunk of the pattern P = softmax(S) at a time; small patterns are kept for the backward pass.

    The backward pass computes, from dY: dV = Pᵀ dY, dP = dY Vᵀ, dS = P ∘ (dP - rowsum(dP ∘ P)), dQ = dS K / √D and
    dK = dSᵀ Q / √D.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "B H T D"]:
        B, H, T, D = q.shape
        y = q.new_empty(B, T, H, D).transpose(1, 2)  # this layout lets the caller concatenate the heads without a copy
        keep, patterns = B * H * T * T <= RECOMPUTE_ABOVE, list[Tensor]()
        for rows, keys in chunk_slices(T):
            pattern = chunk_pattern(q[:, :, rows], k[:, :, keys])
            if keep:
                patterns.append(pattern)
            y[:, :, rows] = pattern @ v[:, :, keys]
        ctx.save_for_backward(q, k, v, *patterns)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Float[Tensor, "B H T D"]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *patterns = ctx.saved_tensors
        B, H, T, D = q.shape
        dq, dk, dv = q.new_zeros(3, B, T, H, D).transpose(2, 3)
        for i, (rows, keys) in enumerate(chunk_slices(T)):
            pattern = patterns[i] if patterns else chunk_pattern(q[:, :, rows], k[:, :, keys])
            dp = dy[:, :, rows] @ v[:, :, keys].transpose(-2, -1)
            dv[:, :, keys] += pattern.transpose(-2, -1) @ dy[:, :, rows]
            # a private kernel for want of a public one: the written-out formula would read memory four times
            ds = torch.ops.aten._softmax_backward_data(dp, pattern, -1, pattern.dtype).mul_(1 / math.sqrt(D))
            dq[:, :, rows] = ds @ k[:, :, keys]
            dk[:, :, keys] += ds.transpose(-2, -1) @ q[:, :, rows]
        return dq, dk, dv


def checkpointed_mlp(
    activation: Callable[[Tensor], Tensor], hidden: Float[Tensor, "*batch F"], down: Callable[[Tensor], Tensor]
) -> Float[Tensor, "*batch C"]:
    """`down(activation(hidden))` that recomputes a large activation in the backward pass instead of keeping it.

    `torch.utils.checkpoint` took as much memory as no recomputation (benchmarks/NOTES.md).
    """
    active = activation(hidden)
    if active.numel() <= RECOMPUTE_ABOVE or torch.compiler.is_compiling():  # the compiler decides about recomputation
        return down(active)
    source, address = hidden.detach(), active.data_ptr()

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.data_ptr() == address else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else activation(source).view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return down(active)
