"""Parameters of a model by part, and FLOPs of its matrix products by formula.

A multiplication and an addition count as two FLOPs, as on data sheets. Norms, activations and the softmax are a few per
mille of the FLOPs (though not of the time) and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.config import ModelConfig
from model.gpt import GPT
from training.config import RunConfig
from training.muon import NEWTON_SCHULZ_STEPS

ASSUMED_FLOPS = 1.5e11
"""FLOP/s that a small CPU is assumed to reach in training."""


def count_parameters(config: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Parameters by part; the LM head is the token embedding and counts once."""
    with torch.device("meta"):
        model = GPT(config, vocab_size)
    parts = dict.fromkeys(("embeddings", "attention", "MLP", "norms"), 0)
    for name, parameter in model.named_parameters():
        module = name.split(".")[2] if name.startswith("blocks.") else ""
        part = {"attention": "attention", "mlp": "MLP"}.get(module, "norms")
        part = "norms" if "norm" in name else "embeddings" if "embedding" in name else part
        parts[part] += parameter.numel()
    return parts


@dataclass(frozen=True)
class FlopsPerToken:
    """FLOPs of one token's forward pass in a full context.

    Products with parameters take 2 FLOPs for each parameter (Kaplan et al. 2020, appendix B, table 1; Hoffmann et al.
    2022, appendix F, who count the LM head too, as here). Attention scores and weighted sums take 4·T·H·D in each
    layer: the whole square, as both papers count it, although the causal mask discards half of it.
    """

    projections: int
    """Queries, keys, values and output."""
    attention: int
    """Scores and weighted sums; proportional to the context."""
    mlp: int
    lm_head: int

    @property
    def forward(self) -> int:
        return self.projections + self.attention + self.mlp + self.lm_head

    @property
    def backward(self) -> int:
        """Twice the forward pass: Y = XW needs two products, for the gradients of X and W (Kaplan et al. 2020)."""
        return 2 * self.forward


def flops_per_token(config: ModelConfig, vocab_size: int) -> FlopsPerToken:
    """FLOPs of a token of this model."""
    heads, kv_heads, d_head = config.n_heads, config.n_kv_heads, config.d_head
    gates = 2 if config.architecture.activation == "swiglu" else 1
    return FlopsPerToken(
        projections=config.n_layers * 2 * config.d_model * d_head * (2 * heads + 2 * kv_heads),
        attention=config.n_layers * 4 * config.context * heads * d_head,
        mlp=config.n_layers * 2 * config.d_model * config.d_mlp * (gates + 1),
        lm_head=2 * config.d_model * vocab_size,
    )


def muon_flops(config: ModelConfig) -> int:
    """FLOPs of Muon's orthogonalization in one step, independent of the batch (Jordan et al. 2024).

    Each round computes X Xᵀ, its square, and their product with X: 4m²n + 2m³ for an m x n matrix with m ≤ n.
    """
    d_model, heads, kv_heads = config.d_model, config.n_heads, config.n_kv_heads
    gates = 2 if config.architecture.activation == "swiglu" else 1
    matrices = (
        (d_model, (heads + 2 * kv_heads) * config.d_head),
        (d_model, heads * config.d_head),
        (d_model, gates * config.d_mlp),
        (d_model, config.d_mlp),
    )
    return config.n_layers * NEWTON_SCHULZ_STEPS * sum(4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3 for s in matrices)


def estimate_train_seconds(config: RunConfig, vocab_size: int, world_size: int) -> float:
    """Rough time of all steps of a run at `ASSUMED_FLOPS`, before anything is measured."""
    cost = flops_per_token(config.model, vocab_size)
    tokens = config.train.steps * config.train.batch_size * config.model.context
    return tokens * (cost.forward + cost.backward) / ASSUMED_FLOPS / world_size
