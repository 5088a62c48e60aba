"""The model, bottom-up: norms, causal self-attention, MLP, block, GPT.

It maps tokens to logits and knows nothing else: no loss, no optimizer, no tokenizer, no file. Weights start as
`initialise` says; what each operation computes stands in `model/functional.py`.

Shapes: B batch, T positions, C = d_model, H heads, G key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from model import chunked_attention as thrift
from model import functional
from model.config import ModelConfig
from model.kv_cache import KVCache

Angles = tuple[Tensor, Tensor]


class LayerNorm(nn.Module):
    """Mean 0, variance 1, then a learned gain and, where the preset has biases, a learned shift."""

    def __init__(self, width: int, eps: float, bias: bool, fused: bool) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps, self.fused = eps, fused

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        norm = functional.fused_layer_norm if self.fused else functional.layer_norm
        return norm(x, self.gain, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Mean square 1, then a learned gain."""

    def __init__(self, width: int, eps: float, fused: bool) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.eps, self.fused = eps, fused

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        norm = functional.fused_rms_norm if self.fused else functional.rms_norm
        return norm(x, self.gain, self.eps)


def block_norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    """The norm that stands before attention, MLP and head."""
    preset, fused = config.architecture, config.attention != "eager"
    if preset.norm == "rms":
        return RMSNorm(config.d_model, preset.norm_eps, fused)
    return LayerNorm(config.d_model, preset.norm_eps, preset.biases, fused)


class AttentionWeights(nn.Module):
    """Which positions each query reads. A module of its own, so that a hook can read the very weights that are used."""

    def forward(self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B H S D"]) -> Float[Tensor, "B H T S"]:
        return functional.attention_pattern(q, k)


class CausalSelfAttention(nn.Module):
    """Every position asks (query), offers (key), and hands over (value); each head reads by its own measure."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        preset, fused = config.architecture, config.attention != "eager"
        self.layer, self.fused, self.dropout = layer, fused, config.dropout
        self.chunked = config.attention == "chunked"
        self.n_heads, self.n_kv_heads, self.d_head = config.n_heads, config.kv_heads, config.width_of_head
        self.qkv = nn.Linear(config.d_model, (self.n_heads + 2 * self.n_kv_heads) * self.d_head, bias=preset.biases)
        self.out = nn.Linear(self.n_heads * self.d_head, config.d_model, bias=preset.biases)
        self.q_norm = RMSNorm(self.d_head, preset.norm_eps, fused) if preset.qk_norm else None
        self.k_norm = RMSNorm(self.d_head, preset.norm_eps, fused) if preset.qk_norm else None
        self.weights = AttentionWeights()

    def project(
        self, x: Float[Tensor, "B T C"], angles: Angles | None
    ) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B G T D"], Float[Tensor, "B G T D"]]:
        """Queries, keys and values of each head; with rotary positions, queries and keys turned by their place."""
        H, G, D = self.n_heads, self.n_kv_heads, self.d_head
        q, k, v = self.qkv(x).unflatten(-1, (H + 2 * G, D)).transpose(1, 2).split([H, G, G], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = functional.apply_rope(q, *angles), functional.apply_rope(k, *angles)
        return q, k, v

    def forward(
        self, x: Float[Tensor, "B T C"], angles: Angles | None = None, cache: KVCache | None = None
    ) -> Float[Tensor, "B T C"]:
        q, k, v = self.project(x, angles)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        dropout = self.dropout if self.training else 0.0
        if not self.fused:
            k, v = functional.repeat_kv(k, self.n_heads), functional.repeat_kv(v, self.n_heads)
            y = nn.functional.dropout(self.weights(q, k), dropout) @ v
        elif self.chunked and cache is None:
            y = thrift.chunked_attention(q, k, v, dropout)
        else:
            y = functional.sdpa(q, k, v, dropout, None if cache is None else cache.allowed)
        return self.out(y.transpose(1, 2).flatten(-2))  # the heads side by side again, then mixed


class MLP(nn.Module):
    """Two projections with a bend between them, at each position alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        preset, width = config.architecture, config.width_of_mlp
        self.activation = {
            ("gelu", False): functional.gelu,
            ("gelu", True): functional.fused_gelu,
            ("relu2", False): functional.relu2,
            ("relu2", True): functional.relu2,
            ("swiglu", False): functional.swiglu,
            ("swiglu", True): functional.fused_swiglu,
        }[preset.activation, config.attention != "eager"]
        gates = 2 if preset.activation == "swiglu" else 1
        self.up = nn.Linear(config.d_model, gates * width, bias=preset.biases)
        self.down = nn.Linear(width, config.d_model, bias=preset.biases)
        self.thrifty = config.attention == "chunked"

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        if self.thrifty:
            return thrift.bent(self.activation, self.up(x), self.down)
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """Attention moves information between positions, the MLP works on it in place; both add to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = block_norm(config)
        self.attention = CausalSelfAttention(config, layer)
        self.norm2 = block_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "B T C"], angles: Angles | None = None, cache: KVCache | None = None
    ) -> Float[Tensor, "B T C"]:
        x = x + self.dropout(self.attention(self.norm1(x), angles, cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """A decoder-only transformer: for each position, the logits of the token that comes next.

    Args:
        config: the shape; its `kernels` must not be `auto`, which `training/device.py` decides.
        vocab_size: V, the tokenizer's number of tokens.
        seed: of the generator that draws the first weights.

    Raises:
        ValueError: if the configuration contradicts itself.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int = 0) -> None:
        super().__init__()
        if found := config.problems():
            raise ValueError("; ".join(found))
        preset = config.architecture
        self.config, self.vocab_size = config, vocab_size
        self.token_embedding = nn.Embedding(vocab_size, config.d_model)
        self.position_embedding = (
            nn.Embedding(config.context, config.d_model) if preset.positions == "learned" else None
        )
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = block_norm(config)
        self.head = nn.Linear(config.d_model, vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight  # tied: what is read can be written as it is
        if not self.head.weight.is_meta:  # a model without memory has nothing to draw
            self.initialise(seed)

    def initialise(self, seed: int) -> None:
        """Draw the first weights: matrices from N(0, 0.02²), biases 0, gains 1 (Radford et al. 2019, section 2.3).

        What writes into the residual stream starts at N(0, 0.02² / 2L), so that the sum over 2L writers keeps its
        size, or, in the preset `glass`, at zero, so that every block begins as the identity; there the token
        embeddings, which are the head as well, start at N(0, 0.2²) and the last gain at 1/4.
        """
        preset = self.config.architecture
        generator = torch.Generator(device=self.token_embedding.weight.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.constant_(parameter, 1.0 if name.endswith("gain") else 0.0)
                continue
            std = preset.embedding_std if name == "token_embedding.weight" else 0.02
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                std = 0.0 if preset.zero_outputs else 0.02 / math.sqrt(2 * self.config.n_layers)
            nn.init.normal_(parameter, std=std, generator=generator)
        nn.init.constant_(self.final_norm.gain, preset.final_gain)

    def forward(self, tokens: Int[Tensor, "B T"], cache: KVCache | None = None) -> Float[Tensor, "B T V"]:
        """Logits (B, T, V): row t scores every token as the successor of tokens[:, : t + 1]."""
        return self.head(self.features(tokens, cache))

    def features(self, tokens: Int[Tensor, "B T"], cache: KVCache | None = None) -> Float[Tensor, "B T C"]:
        """What the head reads: the residual stream after all blocks, normalised.

        With a cache, `tokens` are the positions that come after those which the cache holds.
        """
        count, context = tokens.shape[1], self.config.context
        assert count <= context, f"{count} positions in a context of {context}"
        positions = torch.arange(count, device=tokens.device) if cache is None else cache.positions(count)
        x = self.token_embedding(tokens)
        angles = None
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        else:
            angles = functional.precompute_rope(
                positions, self.config.width_of_head, self.config.architecture.rope_theta
            )
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, angles, cache)
        if cache is not None:
            cache.advance(count)
        return self.final_norm(x)
