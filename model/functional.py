"""The mathematics of a transformer, each operation written out from its formula.

`sdpa` is the exception: it computes the same as `attention_pattern(q, k) @ v` with PyTorch's fused kernel. The causal
mask is `causal_mask`; `chunked_attention.py` adds it to some queries at a time.

Shapes: B batch, H heads, G key/value heads, T query positions, S key positions, D head size, C model size, F MLP size.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def causal_mask(T: int, S: int, device: torch.device) -> Bool[Tensor, "T S"]:
    """True where query i may attend to key j. The T queries are the last of the S positions."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def causal_bias(T: int, S: int, scores: Tensor) -> Float[Tensor, "T S"]:
    """`causal_mask` to be added to the scores: 0 where it is True, -inf where it is False. Faster than masking all scores."""
    return scores.new_zeros(T, S).masked_fill_(~causal_mask(T, S, scores.device), -torch.inf)


def attention_pattern(q: Float[Tensor, "B H T D"], k: Float[Tensor, "B H S D"]) -> Float[Tensor, "B H T S"]:
    """softmax(QKᵀ / √D + mask): how much each query attends to each key (Vaswani et al. 2017, equation 1).

    Each row sums to 1 and is exactly 0 for keys after the query. The scale keeps the variance of the scores independent of
    D (3.2.1).
    """
    scores = q @ k.transpose(-2, -1)
    scores = scores / math.sqrt(q.shape[-1])
    bias = causal_bias(q.shape[-2], k.shape[-2], scores)
    return (scores + bias).softmax(dim=-1)


def sdpa(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S D"]
) -> Float[Tensor, "B H T D"]:
    """`attention_pattern(q, k) @ v` in one kernel, for grouped keys and values too."""
    (H, T), (G, S) = q.shape[1:3], k.shape[1:3]
    if T == 1:  # decoding: the heads of a group become the queries of one head, so that keys are not repeated
        grouped = q.reshape(-1, G, H // G, q.shape[-1])
        return F.scaled_dot_product_attention(grouped, k, v).reshape(q.shape)
    k, v = repeat_kv(k, H), repeat_kv(v, H)
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # is_causal aligns the mask with the first key; with a KV cache the queries are the last positions
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(T, S, q.device))


def repeat_kv(x: Float[Tensor, "B G S D"], n_heads: int) -> Float[Tensor, "B H S D"]:
    """Repeat each key/value head for the H / G query heads of its group (Ainslie et al. 2023, section 2.2)."""
    return x if x.shape[1] == n_heads else x.repeat_interleave(n_heads // x.shape[1], dim=1)


def layer_norm(
    x: Float[Tensor, "*batch C"], weight: Float[Tensor, "C"], bias: Float[Tensor, "C"] | None, eps: float
) -> Float[Tensor, "*batch C"]:
    """Layer normalization (Ba et al. 2016, equation 4)."""
    centered = x - x.mean(dim=-1, keepdim=True)
    variance = centered.square().mean(dim=-1, keepdim=True)
    normalized = centered * torch.rsqrt(variance + eps)
    return normalized * weight if bias is None else normalized * weight + bias


def rms_norm(x: Float[Tensor, "*batch C"], weight: Float[Tensor, "C"], eps: float) -> Float[Tensor, "*batch C"]:
    """Root mean square normalization (Zhang & Sennrich 2019, equation 4): layer norm without mean and bias."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def precompute_rope(
    positions: Int[Tensor, "T"], d_head: int, theta: float
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T D"]]:
    """Cosines and sines of the angles position * theta^(-2i/D) of pair i of the features (Su et al. 2021, equation 15).

    The pairs are (i, i + D/2), as in Hugging Face, not neighbours."""
    frequencies = 1 / theta ** (torch.arange(0, d_head, 2, device=positions.device, dtype=torch.float32) / d_head)
    angles = positions[:, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(
    x: Float[Tensor, "B H T D"], cos: Float[Tensor, "T D"], sin: Float[Tensor, "T D"]
) -> Float[Tensor, "B H T D"]:
    """Rotate each pair (x_i, x_{i + D/2}) by its angle, so that q·k depends only on the distance of the positions."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """GELU in the tanh approximation that GPT-2 uses (Hendrycks & Gimpel 2016, section 2), with 1 + tanh(y) = 2σ(2y)."""
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU (So et al. 2021, Primer)."""
    return x.relu().square()


def silu(x: Tensor) -> Tensor:
    """SiLU, also called Swish (Elfwing et al. 2017)."""
    return x * torch.sigmoid(x)
