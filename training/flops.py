"""Parameters of a model by part, and FLOPs of its matrix products.

A multiplication and an addition count as two FLOPs, as on data sheets. Norms, activations and the softmax are a few per
mille of the FLOPs (though not of the time) and are left out.
"""

from model.config import ModelConfig
from model.gpt import meta_model
from training.config import RunConfig


def count_parameters(config: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Parameters by part; an LM head that is the token embedding counts once."""
    words = {"norm": "norms", "embedding": "embeddings", "attention": "attention", "mlp": "MLP", "lm_head": "LM head"}
    parts = dict.fromkeys(("embeddings", "attention", "MLP", "norms", "LM head"), 0)
    for name, parameter in meta_model(config, vocab_size).named_parameters():
        parts[next(part for word, part in words.items() if word in name)] += parameter.numel()  # the first word counts
    return {part: count for part, count in parts.items() if count}


def block_matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """Shapes of a block's matrices: queries, keys and values; output; MLP up, with the gate if there is one; MLP down."""
    d_model, d_mlp = config.d_model, config.d_mlp
    q, kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    gates = 2 if config.architecture.activation == "swiglu" else 1
    return [(d_model, q + 2 * kv), (q, d_model), (d_model, gates * d_mlp), (d_mlp, d_model)]


def flops_per_token(config: ModelConfig, vocab_size: int) -> int:
    """FLOPs of one token's forward pass in a full context.

    Products with parameters take 2 FLOPs for each parameter (Kaplan et al. 2020, appendix B, table 1; Hoffmann et al.
    2022, appendix F, who count the LM head too, as here). Attention scores and weighted sums take 4·T·H·D in each
    layer: the whole square, as both papers count it, although the causal mask discards half of it.
    """
    products = 2 * sum(m * n for m, n in block_matrices(config))
    attention = 4 * config.context * config.n_heads * config.d_head
    return config.n_layers * (products + attention) + 2 * config.d_model * vocab_size


def step_flops(config: RunConfig, vocab_size: int) -> int:
    """FLOPs of a training step, over all processes and without the optimizer.

    The backward pass takes twice the forward pass: Y = XW needs two products, for the gradients of X and W.
    """
    return 3 * config.train.batch_size * config.model.context * flops_per_token(config.model, vocab_size)
