"""The GPT model, bottom-up: norms, causal self-attention, MLP, block, GPT.

It maps tokens to logits. Loss, optimizer, tokenizer and files are elsewhere; the formulas are in `model/functional.py`.

Shapes: B batch, T positions, C = d_model, H heads, G key/value heads, D = d_head, F = d_mlp, GF = F or 2F, V vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model import functional
from model.chunked_attention import checkpointed_mlp, chunked_attention
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.ngram_embedding import NgramEmbedding

Rope = tuple[Tensor, Tensor]  # cosines and sines (T, D) of the rotary position embeddings


class LayerNorm(nn.Module):
    """Layer normalization (Ba et al. 2016)."""

    def __init__(self, size: int, eps: float, bias: bool, eager: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.eps, self.eager = eps, eager

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        if self.eager:
            return functional.layer_norm(x, self.weight, self.bias, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Root mean square normalization (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float, eager: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.eager = eps, eager

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        if self.eager:
            return functional.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Dropout(nn.Dropout1d):
    """Dropout with one mask for all positions of a sequence (Gal & Ghahramani 2016).

    A mask of its own for each position is no better here, and drawing it takes up to half of a step on a CPU.
    """

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def make_norm(config: ModelConfig) -> LayerNorm | RMSNorm | nn.Identity:
    """The norm before attention, MLP and LM head."""
    preset, eager = config.architecture, config.attention == "eager"
    if preset.norm == "none":
        return nn.Identity()
    if preset.norm == "rms":
        return RMSNorm(config.d_model, preset.norm_eps, eager)
    return LayerNorm(config.d_model, preset.norm_eps, preset.biases, eager)


class AttentionPattern(nn.Module):
    """Masked softmax of the attention scores. A module, so that forward hooks can read and replace the pattern."""

    def forward(self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B H S D"]) -> Float[Tensor, "B H T S"]:
        return functional.attention_pattern(q, k)


class CausalSelfAttention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2), with grouped keys and values.

    The causal mask is added in `functional.attention_pattern`, in parts in `chunked_attention`, and by the kernel in sdpa.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        preset, eager = config.architecture, config.attention == "eager"
        self.layer, self.attention_implementation = layer, config.attention
        self.n_heads, self.n_kv_heads, self.d_head = config.n_heads, config.n_kv_heads, config.d_head
        self.qkv = nn.Linear(config.d_model, (self.n_heads + 2 * self.n_kv_heads) * self.d_head, bias=preset.biases)
        self.out = nn.Linear(self.n_heads * self.d_head, config.d_model, bias=preset.biases)
        self.q_norm = RMSNorm(self.d_head, preset.norm_eps, eager) if preset.qk_norm else None
        self.k_norm = RMSNorm(self.d_head, preset.norm_eps, eager) if preset.qk_norm else None
        self.pattern = AttentionPattern()

    def project(
        self, x: Float[Tensor, "B T C"], rope: Rope | None
    ) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B G T D"], Float[Tensor, "B G T D"]]:
        """Queries, keys and values of each head, with QK norm and rotary embeddings applied where the preset has them."""
        H, G, D = self.n_heads, self.n_kv_heads, self.d_head
        q, k, v = self.qkv(x).unflatten(-1, (H + 2 * G, D)).transpose(1, 2).split([H, G, G], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = functional.apply_rope(q, *rope), functional.apply_rope(k, *rope)
        return q, k, v

    def forward(
        self, x: Float[Tensor, "B T C"], rope: Rope | None = None, cache: KVCache | None = None
    ) -> Float[Tensor, "B T C"]:
        q, k, v = self.project(x, rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        if self.attention_implementation == "eager":
            k, v = functional.repeat_kv(k, self.n_heads), functional.repeat_kv(v, self.n_heads)
            y = self.pattern(q, k) @ v
        elif self.attention_implementation == "chunked" and cache is None:
            y = chunked_attention(q, k, v)
        else:
            y = functional.sdpa(q, k, v)
        return self.out(y.transpose(1, 2).flatten(-2))  # concatenate the heads and project


class MLP(nn.Module):
    """Position-wise feed-forward network (Vaswani et al. 2017, section 3.3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        preset = config.architecture
        self.kind, self.attention_implementation = preset.activation, config.attention
        gates = 2 if self.kind == "swiglu" else 1
        self.up = nn.Linear(config.d_model, gates * config.d_mlp, bias=preset.biases)
        self.down = nn.Linear(config.d_mlp, config.d_model, bias=preset.biases)

    def activation(self, hidden: Float[Tensor, "*batch GF"]) -> Float[Tensor, "*batch F"]:
        """GELU, squared ReLU, or SwiGLU: SiLU of one half times the other half (Shazeer 2020, equation 6)."""
        if self.kind == "relu2":
            return functional.relu2(hidden)
        if self.kind == "gelu":
            written_out = self.attention_implementation == "eager" or torch.compiler.is_compiling()  # then faster
            return functional.gelu(hidden) if written_out else F.gelu(hidden, approximate="tanh")
        gate, up = hidden.chunk(2, dim=-1)
        return (functional.silu(gate) if self.attention_implementation == "eager" else F.silu(gate)) * up

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        if self.attention_implementation != "chunked":
            return self.down(self.activation(self.up(x)))
        if self.kind == "relu2":  # the gradients of ReLU and square both need the ReLU's output only
            return checkpointed_mlp(torch.square, self.up(x).relu(), self.down)
        return checkpointed_mlp(self.activation, self.up(x), self.down)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP if there is one, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = make_norm(config)
        self.attention = CausalSelfAttention(config, layer)
        self.norm2 = make_norm(config) if config.architecture.has_mlp else nn.Identity()
        self.mlp = MLP(config) if config.architecture.has_mlp else None
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "B T C"], rope: Rope | None = None, cache: KVCache | None = None
    ) -> Float[Tensor, "B T C"]:
        x = x + self.dropout(self.attention(self.norm1(x), rope, cache))
        return x + self.dropout(self.mlp_out(x))

    def mlp_out(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """What the MLP adds to the residual stream `x`; zeros if there is none."""
        return torch.zeros_like(x) if self.mlp is None else self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder-only transformer: for each position, the logits of the next token.

    `config.attention` must not be `auto`, which `training/device.py` resolves. `seed` decides the initial weights.
    An invalid configuration raises ValueError.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int = 0) -> None:
        super().__init__()
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        learned = config.architecture.positions == "learned"
        self.config, self.vocab_size = config, vocab_size
        self.token_embedding = nn.Embedding(vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.context, config.d_model) if learned else None
        self.ngram_embedding = NgramEmbedding(config, vocab_size) if config.ngrams > 1 else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = make_norm(config)
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False)
        self.tie_weights()
        if not self.lm_head.weight.is_meta:
            self.init_weights(seed)

    def tie_weights(self) -> None:
        """Let the LM head share the token embedding's weights, unless the config unties them (Press & Wolf 2017)."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight

    def init_weights(self, seed: int) -> None:
        """Initialize matrices from N(0, 0.02²), biases with 0, norm weights with 1 (Radford et al. 2019, section 2.3).

        Projections into the residual stream start at N(0, 0.02² / 2L), so that the sum of 2L of them keeps its
        variance. The preset `glass` differs as its `Architecture` says.
        """
        preset = self.config.architecture
        generator = torch.Generator(device=self.token_embedding.weight.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
                continue
            std = preset.embedding_std if name == "token_embedding.weight" else 0.02
            if name.startswith("ngram_embedding"):
                std = 0.0
            elif name.endswith(("attention.out.weight", "mlp.down.weight")):
                std = 0.0 if preset.zero_outputs else 0.02 / math.sqrt(2 * self.config.n_layers)
            nn.init.normal_(parameter, std=std, generator=generator)
        if not isinstance(self.final_norm, nn.Identity):
            nn.init.constant_(self.final_norm.weight, preset.final_norm_weight)

    def forward(self, tokens: Int[Tensor, "B T"], cache: KVCache | None = None) -> Float[Tensor, "B T V"]:
        """Logits of the next token, of which row t depends on tokens[:, : t + 1] and the positions in the cache only."""
        return self.lm_head(self.hidden_states(tokens, cache))

    def hidden_states(self, tokens: Int[Tensor, "B T"], cache: KVCache | None = None) -> Float[Tensor, "B T C"]:
        """The residual stream after the last block and the final norm: the input of the LM head."""
        T, context = tokens.shape[1], self.config.context
        assert context >= T, f"{T} positions in a context of {context}"
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + T, device=tokens.device)
        x = self.token_embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        if self.ngram_embedding is not None:
            x = x + self.ngram_embedding(tokens if cache is None else cache.update_tokens(tokens))[:, -T:]
        rope = self.rope(positions)
        for block in self.blocks:
            x = block(x, rope, cache)
        if cache is not None:
            cache.length += T
        return self.final_norm(x)

    def rope(self, positions: Int[Tensor, "T"]) -> Rope | None:
        """The rotary angles of these positions, if the model has any."""
        if self.config.architecture.positions != "rotary":
            return None
        return functional.precompute_rope(positions, self.config.d_head, self.config.architecture.rope_theta)


class _SkipInit(TorchFunctionMode):
    """Skips `torch.nn.init`: on the meta device it would import torch's compiler, which takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def meta_model(config: ModelConfig, vocab_size: int) -> GPT:
    """A model on the `meta` device: names and shapes without memory."""
    with torch.device("meta"), _SkipInit():
        return GPT(config, vocab_size)
