"""The operations of a transformer, each written out from its formula beside the library kernel that computes the same.

Every operation has two faces: `explicit` shows each step, `fused` calls one kernel. Tests prove that they agree in
value and in gradient. Nothing here knows a device, a file or a configuration.

Shapes: B batch, H heads, G key/value heads, T query positions, S key positions, D head width, C model width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def causal_mask(T: int, S: int, device: torch.device) -> Bool[Tensor, "T S"]:
    """True where query row i may read key column j. The queries are the last T of the S positions."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def attention_pattern(q: Float[Tensor, "B H T D"], k: Float[Tensor, "B H S D"]) -> Float[Tensor, "B H T S"]:
    """How much each query reads each key: softmax(Q Kᵀ / √D + mask), Vaswani et al. 2017, equation 1.

    Row i sums to 1 and is exactly 0 for every key that comes later than query i.
    """
    T, D = q.shape[-2:]
    S = k.shape[-2]
    scores = q @ k.transpose(-2, -1)  # how well each query matches each key
    scores = scores / math.sqrt(D)  # a sum of D products grows like √D; undo that, or softmax saturates
    if T == 1:
        return scores.softmax(dim=-1)  # the newest position may read all
    forbidden = torch.zeros_like(scores[0, 0]).masked_fill(~causal_mask(T, S, q.device), -torch.inf)
    return (scores + forbidden).softmax(dim=-1)  # nobody reads the future


def sdpa(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S D"],
    dropout: float = 0.0,
    allowed: Bool[Tensor, "1 S"] | None = None,
) -> Float[Tensor, "B H T D"]:
    """`attention_pattern(q, k) @ v` in one kernel that never holds the weights, heads shared as in `repeat_kv`.

    Args:
        allowed: which keys a single query reads; without it the newest, which is the last of them, reads all.
    """
    (H, T), (G, S) = q.shape[1:3], k.shape[1:3]
    if T == 1:  # Heads that share keys stand as queries side by side: nothing is copied.
        side_by_side = q.reshape(-1, G, H // G, q.shape[-1])
        y = F.scaled_dot_product_attention(side_by_side, k, v, attn_mask=allowed, dropout_p=dropout)
        return y.reshape(q.shape)
    k, v = repeat_kv(k, H), repeat_kv(v, H)
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    # The kernel's own mask counts from the first key; with a cache the queries are the last ones.
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(T, S, q.device), dropout_p=dropout)


def repeat_kv(x: Float[Tensor, "B G S D"], n_heads: int) -> Float[Tensor, "B H S D"]:
    """Repeat each of the G key/value heads for the H / G query heads that share it (Ainslie et al. 2023)."""
    return x if x.shape[1] == n_heads else x.repeat_interleave(n_heads // x.shape[1], dim=1)


def layer_norm(
    x: Float[Tensor, "*batch C"], gain: Float[Tensor, "C"], bias: Float[Tensor, "C"] | None, eps: float
) -> Float[Tensor, "*batch C"]:
    """Layer normalisation (Ba et al. 2016, equation 4): mean 0 and variance 1, then a learned gain and shift."""
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    normalised = centred * torch.rsqrt(variance + eps)
    return normalised * gain if bias is None else normalised * gain + bias


def fused_layer_norm(
    x: Float[Tensor, "*batch C"], gain: Float[Tensor, "C"], bias: Float[Tensor, "C"] | None, eps: float
) -> Float[Tensor, "*batch C"]:
    """`layer_norm` in one kernel."""
    return F.layer_norm(x, gain.shape, gain, bias, eps)


def rms_norm(x: Float[Tensor, "*batch C"], gain: Float[Tensor, "C"], eps: float) -> Float[Tensor, "*batch C"]:
    """Root-mean-square normalisation (Zhang & Sennrich 2019, equation 4): layer norm without mean and shift."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * gain


def fused_rms_norm(x: Float[Tensor, "*batch C"], gain: Float[Tensor, "C"], eps: float) -> Float[Tensor, "*batch C"]:
    """`rms_norm` in one kernel."""
    return F.rms_norm(x, gain.shape, gain.to(x.dtype), eps)


def precompute_rope(
    positions: Int[Tensor, "T"], width: int, theta: float
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T D"]]:
    """Cosine and sine of the angle by which each position turns each pair of features (Su et al. 2021, equation 15).

    Pair i of D/2 turns by position * theta^(-2i/D): the first pairs tell neighbours apart, the last ones far places.
    """
    frequencies = theta ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    angles = positions[:, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(
    x: Float[Tensor, "B H T D"], cos: Float[Tensor, "T D"], sin: Float[Tensor, "T D"]
) -> Float[Tensor, "B H T D"]:
    """Turn the pairs (x_i, x_{i + D/2}) by the angle of their place; query·key then depends on distance alone."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU that GPT-2 was trained with (Hendrycks & Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def fused_gelu(x: Tensor) -> Tensor:
    """`gelu` in one kernel."""
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """The square of the positive part (So et al. 2021, Primer)."""
    return x.relu().square()


def swiglu(gate_and_up: Float[Tensor, "*batch twoF"]) -> Float[Tensor, "*batch F"]:
    """One half, passed through SiLU, gates the other (Shazeer 2020, equation 6)."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def fused_swiglu(gate_and_up: Float[Tensor, "*batch twoF"]) -> Float[Tensor, "*batch F"]:
    """`swiglu` with the library's SiLU."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up
