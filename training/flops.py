"""What a model costs before it is built: parameters by part, and operations by formula.

`train.py --plan` prints them. A multiplication and an addition count as two operations, as FLOP/s are counted on data
sheets. Only matrix products are counted: norms, activations and the softmax are a few per mille of the operations
(though not of the time). Nothing here needs weights.
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
    """Parameters by part, each counted once: the head is the token embedding. Read off a model without memory."""
    with torch.device("meta"):
        model = GPT(config, vocab_size)
    parts = dict.fromkeys(("embeddings", "attention", "MLP", "norms"), 0)
    for name, parameter in model.named_parameters():
        within = {"attention": "attention", "mlp": "MLP"}.get(name.split(".")[2] if "blocks." in name else "", "norms")
        part = "norms" if "norm" in name else "embeddings" if "embedding" in name else within
        parts[part] += parameter.numel()
    return parts


@dataclass(frozen=True)
class FlopsPerToken:
    """Floating-point operations of the matrix products of one token's forward pass, in a full context.

    Those of the weights are 2 for each weight that a token meets (Kaplan et al. 2020, appendix B, table 1; Hoffmann et
    al. 2022, appendix F, who count the head as well, as is done here). Those of the scores and of the weighted sum grow
    with the context T: 4·T·H·D in each layer. That is the whole square, as both of them count it and as the explicit
    face computes it, though the causal mask throws half of it away; a fused kernel may skip that half.
    """

    projections: int
    """Queries, keys, values, and the way back."""
    square: int
    """Scores and weighted sums: what grows with the context."""
    mlp: int
    head: int

    @property
    def forward(self) -> int:
        return self.projections + self.square + self.mlp + self.head

    @property
    def backward(self) -> int:
        """Twice the forward pass: a product Y = XW needs two, for the gradients of X and of W (Kaplan et al. 2020)."""
        return 2 * self.forward


def flops_per_token(config: ModelConfig, vocab_size: int) -> FlopsPerToken:
    """The operations of a token of this model."""
    heads, groups, width = config.n_heads, config.n_kv_heads, config.d_head
    gates = 2 if config.architecture.activation == "swiglu" else 1
    return FlopsPerToken(
        projections=config.n_layers * 2 * config.d_model * width * (2 * heads + 2 * groups),
        square=config.n_layers * 4 * config.context * heads * width,
        mlp=config.n_layers * 2 * config.d_model * config.d_mlp * (gates + 1),
        head=2 * config.d_model * vocab_size,
    )


def estimate_train_seconds(config: RunConfig, vocab_size: int, world_size: int) -> float:
    """Rough time of all steps of a run at `ASSUMED_FLOPS`, before anything is measured."""
    cost = flops_per_token(config.model, vocab_size)
    tokens = config.train.steps * config.train.batch_size * config.model.context
    return tokens * (cost.forward + cost.backward) / ASSUMED_FLOPS / world_size


def muon_flops(config: ModelConfig) -> int:
    """Operations of Muon's orthogonalisation in one step, whatever the batch (Jordan et al. 2024).

    Each round takes X Xᵀ, its square, and their product with X: 4m²n + 2m³ for an m x n matrix with m ≤ n.
    """
    width, heads, groups = config.d_model, config.n_heads, config.n_kv_heads
    gates = 2 if config.architecture.activation == "swiglu" else 1
    matrices = (
        (width, (heads + 2 * groups) * config.d_head),
        (width, heads * config.d_head),
        (width, gates * config.d_mlp),
        (width, config.d_mlp),
    )
    sides = [(min(pair), max(pair)) for pair in matrices]
    return config.n_layers * NEWTON_SCHULZ_STEPS * sum(4 * m * m * n + 2 * m**3 for m, n in sides)
