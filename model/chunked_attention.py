"""The face of attention and MLP that is quick in bf16 on a processor: made by products alone, and thrifty with memory.

Attention takes some queries at a time, each against the keys that it may read and no other (Rabe & Staats 2021). What
is large and quickly computed is not kept for the backward pass but computed again there, as Dao et al. 2022,
algorithm 4, do for the weights. The formulas are those of `model/functional.py`; tests prove that values and gradients agree.

Shapes: B batch, H heads, G key/value heads, T positions, D head width, R queries of a chunk, S keys
up to the chunk's last query, C model width, F MLP width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from model import functional

CHUNK = 128
"""Queries that are taken at a time."""
KEPT = 1 << 22
"""Up to so many numbers a result is kept for the backward pass, for memory is no matter then."""


def chunked_attention(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G T D"], v: Float[Tensor, "B G T D"], dropout: float = 0.0
) -> Float[Tensor, "B H T D"]:
    """`attention_pattern(q, k) @ v`, a chunk of the queries at a time, in the number format of `v`; heads are shared
    as in `functional.repeat_kv`.

    Args:
        dropout: share of the weights that are dropped, as torch's random numbers say.
    """
    k, v = functional.repeat_kv(k, q.shape[1]), functional.repeat_kv(v, q.shape[1])
    if torch.compiler.is_compiling():  # it makes more of the plain formula
        return F.dropout(functional.attention_pattern(q, k), dropout) @ v
    with torch.autocast(q.device.type, enabled=False):  # a GPU would have softmax in fp32
        y: Tensor = ChunkedAttention.apply(q.to(v.dtype), k.to(v.dtype), v, dropout)
    return y


def chunks(T: int) -> Iterator[tuple[slice, slice]]:
    """The queries of each chunk, and the keys that the last of them reads."""
    for start in range(0, T, CHUNK):
        stop = min(start + CHUNK, T)
        yield slice(start, stop), slice(0, stop)


def chunk_weights(q: Float[Tensor, "B H R D"], k: Float[Tensor, "B H S D"]) -> Float[Tensor, "B H R S"]:
    """Vaswani et al. 2017, equation 1, for the queries of the last R of S positions."""
    R, D = q.shape[-2:]
    scores = (q @ k.transpose(-2, -1)).mul_(1 / math.sqrt(D))
    scores[..., -R:] += scores.new_full((R, R), -torch.inf).triu(1)  # earlier keys may be read by the whole chunk
    return scores.softmax(dim=-1)


class ChunkedAttention(torch.autograd.Function):
    """Attention whose weights P = softmax(S) exist one chunk at a time, in both directions.

    From dY the backward pass finds dV = Pᵀ dY, dP = dY Vᵀ, dS = P ∘ (dP - rowsum(dP ∘ P)), dQ = dS K / √D and
    dK = dSᵀ Q / √D. Which weights are dropped is kept, a byte for each.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Float[Tensor, "B H T D"]:
        B, H, T, D = q.shape
        y = q.new_empty(B, T, H, D).transpose(1, 2)  # heads will stand side by side without being copied
        kept: list[Tensor] = []
        masks: list[Tensor] = []
        for rows, keys in chunks(T):
            weights = chunk_weights(q[:, :, rows], k[:, :, keys])
            kept += [weights] * (B * H * T * T <= KEPT)
            if dropout:
                masks.append(torch.empty_like(weights, dtype=torch.bool).bernoulli_(1 - dropout))
                weights = weights * masks[-1] / (1 - dropout)
            y[:, :, rows] = weights @ v[:, :, keys]
        ctx.save_for_backward(q, k, v, *kept, *masks)
        ctx.n_kept, ctx.dropout = len(kept), dropout
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Float[Tensor, "B H T D"]) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *others = ctx.saved_tensors
        kept, masks = others[: ctx.n_kept], others[ctx.n_kept :]
        B, H, T, D = q.shape
        dq, dk, dv = q.new_zeros(3, B, T, H, D).transpose(2, 3)
        for i, (rows, keys) in enumerate(chunks(T)):
            weights = kept[i] if kept else chunk_weights(q[:, :, rows], k[:, :, keys])
            dp = dy[:, :, rows] @ v[:, :, keys].transpose(-2, -1)
            read = weights
            if ctx.dropout:
                read, dp = (x * masks[i] / (1 - ctx.dropout) for x in (weights, dp))
            dv[:, :, keys] += read.transpose(-2, -1) @ dy[:, :, rows]
            ds = torch.ops.aten._softmax_backward_data(dp, weights, -1, weights.dtype).mul_(1 / math.sqrt(D))
            dq[:, :, rows] = ds @ k[:, :, keys]
            dk[:, :, keys] += ds.transpose(-2, -1) @ q[:, :, rows]
        return dq, dk, dv, None


def bent(
    activation: Callable[[Tensor], Tensor], hidden: Float[Tensor, "*batch F"], down: Callable[[Tensor], Tensor]
) -> Float[Tensor, "*batch C"]:
    """`down(activation(hidden))`, where `down` does not keep a large activation: it is computed again from `hidden`."""
    active = activation(hidden)
    if active.numel() <= KEPT or torch.compiler.is_compiling():  # the compiler decides what is computed again
        return down(active)
    source, place = hidden.detach(), active.untyped_storage()._cdata

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.untyped_storage()._cdata == place else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else activation(source).view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return down(active)
