"""Model configuration. Does not import torch, so that errors in options are reported at once."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from common.ranges import BelowOne, NonNegativeFloat, NonNegativeInt, PositiveInt, out_of_range

AttentionImplementation = Literal["eager", "sdpa", "chunked"]
ATTENTION_IMPLEMENTATIONS: tuple[AttentionImplementation, ...] = get_args(AttentionImplementation)


@dataclass(frozen=True)
class Architecture:
    """What a preset decides."""

    norm: Literal["none", "layer", "rms"]
    positions: Literal["none", "learned", "rotary"]
    activation: Literal["gelu", "relu2", "swiglu"]
    qk_norm: bool  # RMS norm of queries and keys (Henry et al. 2020)
    biases: bool
    embedding_std: float  # of the initial token embeddings; larger ones keep tokens distinguishable early in training
    final_norm_weight: float  # initial; below 1 it keeps the first logits of large embeddings small
    zero_outputs: bool  # initialize projections into the residual stream with 0: every block starts as the identity
    mlp_ratio: int  # d_mlp / d_model, where d_mlp is not given
    norm_eps: float
    rope_theta: float
    has_mlp: bool = True


PRESETS = {
    # Ours: learns fastest on two CPU cores (measurements in benchmarks/NOTES.md).
    "glass": Architecture("layer", "rotary", "relu2", True, False, 0.2, 0.25, True, 4, 1e-5, 10_000.0),
    # Exactly GPT-2 (Radford et al. 2019).
    "gpt2": Architecture("layer", "learned", "gelu", False, True, 0.02, 1.0, False, 4, 1e-5, 10_000.0),
    # Exactly Llama 2 (Touvron et al. 2023).
    "llama": Architecture("rms", "rotary", "swiglu", False, False, 0.02, 1.0, False, 3, 1e-5, 10_000.0),
    # Exactly Qwen3 (Qwen team 2025), dense.
    "qwen3": Architecture("rms", "rotary", "swiglu", True, False, 0.02, 1.0, False, 3, 1e-6, 1_000_000.0),
}


@dataclass(frozen=True)
class ModelConfig:
    """Model settings."""

    preset: Literal["glass", "gpt2", "llama", "qwen3"] = "glass"  # glass learns fastest; the others are Hugging Face's.
    n_layers: PositiveInt = 4  # Number of transformer blocks.
    n_heads: PositiveInt = 4  # Number of attention heads per block.
    n_kv_heads: NonNegativeInt = 0  # Number of key/value heads (grouped-query attention); 0 means n_heads.
    d_model: PositiveInt = 128  # Size of the residual stream.
    d_head: NonNegativeInt = 0  # Size of an attention head; 0 means d_model / n_heads.
    d_mlp: NonNegativeInt = 0  # Hidden size of the MLP; 0 means the preset's multiple of d_model.
    context: PositiveInt = 128  # Context length in tokens.
    dropout: BelowOne = 0.0  # Dropout probability in training, of a feature of a block's outputs in a whole sequence.
    norm: Literal["preset", "none", "layer", "rms"] = "preset"  # none: without norm of queries and keys, too.
    positions: Literal["preset", "none", "learned", "rotary"] = "preset"  # Position embeddings.
    mlp: Literal["preset", "none"] = "preset"  # none: an attention-only model.
    ngrams: PositiveInt = 1  # Longest n-gram with an embedding of its own, added to the token's; 1: none.
    ngram_rows: PositiveInt = 8192  # Rows of the embedding of each length, which n-grams share by a hash.
    tie_embeddings: bool = True  # The LM head shares its weights with the token embedding.
    norm_eps: NonNegativeFloat = 0.0  # Added to the variance in norms; 0 means the preset's.
    rope_theta: NonNegativeFloat = 0.0  # Base of the rotary angles; 0 means the preset's.
    attention: Literal["auto", AttentionImplementation] = "auto"
    """Attention implementation. `eager`: every operation written out; `sdpa`: PyTorch's fused kernels; `chunked`:
    memory-efficient, 128 queries at a time; `auto`: the best for this machine."""
    init: str = ""  # Start from the weights of a run, a checkpoint, a Hugging Face folder or a name on its hub.

    def __post_init__(self) -> None:
        """Resolve sizes given as 0. Invalid sizes are left for `problems` to report."""
        if self.n_heads < 1 or self.d_model < 1:
            return
        d_head = self.d_model // self.n_heads if self.d_model % self.n_heads == 0 else 0
        d_mlp = self.architecture.mlp_ratio * self.d_model if self.architecture.has_mlp else 0
        defaults = {"n_kv_heads": self.n_heads, "d_head": d_head, "d_mlp": d_mlp}
        for name, value in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or value)

    @property
    def architecture(self) -> Architecture:
        """The preset's, with the options that differ from it."""
        options = {name: getattr(self, name) for name in ("norm", "positions", "norm_eps", "rope_theta")}
        preset = replace(
            PRESETS[self.preset], **{k: value for k, value in options.items() if value not in ("preset", 0)}
        )
        return replace(preset, has_mlp=self.mlp == "preset", qk_norm=preset.qk_norm and preset.norm != "none")

    @property
    def description(self) -> str:
        """The preset, options that differ from it, and sizes."""
        n_grams = f"up to {self.ngrams}" if self.ngrams > 1 else "preset"
        options = {"norm": self.norm, "positions": self.positions, "MLP": self.mlp, "n-grams": n_grams}
        changes = ", ".join(f"{name} {value}" for name, value in options.items() if value != "preset")
        return (
            f"{self.preset}{changes and f' ({changes})'}: {self.n_layers} layers, {self.n_heads} heads, "
            f"d_model {self.d_model}, context {self.context}"
        )

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each."""
        if problems := out_of_range(self, "model."):
            return problems
        C, H, G = self.d_model, self.n_heads, self.n_kv_heads
        if self.d_head == 0:
            problems.append(f"model.d_model is {C}, which is not divisible by {H} heads; use {-(-C // H) * H}")
        if H % G:
            problems.append(
                f"model.n_heads is {H}, which is not divisible by {G} key/value heads; use a divisor of {H}"
            )
        if self.architecture.positions == "rotary" and self.d_head % 2:
            problems.append(f"the head size is {self.d_head}; rotary positions need an even one (set model.d_head)")
        if self.rope_theta and self.architecture.positions != "rotary":
            problems.append(
                f"model.rope_theta is {self.rope_theta}, but the model has no rotary positions; leave it at 0"
            )
        if self.d_mlp and not self.architecture.has_mlp:
            problems.append(f"model.d_mlp is {self.d_mlp}, but model.mlp is none; leave it at 0")
        return problems
