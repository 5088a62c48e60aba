"""What can be set about the model. Free of torch, so that a mistyped option is answered at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

AttentionImplementation = Literal["eager", "sdpa", "chunked"]
ATTENTION_IMPLEMENTATIONS: tuple[AttentionImplementation, ...] = get_args(AttentionImplementation)


@dataclass(frozen=True)
class Architecture:
    """What a preset decides: the choices in which one GPT differs from another."""

    norm: Literal["layer", "rms"]
    positions: Literal["learned", "rotary"]
    activation: Literal["gelu", "relu2", "swiglu"]
    qk_norm: bool
    biases: bool
    embedding_std: float
    """Spread of the first token embeddings; wide ones keep every token recognisable while classes are learned."""
    final_norm_weight: float
    """Initial weight of the final norm; below 1 it keeps the first predictions of wide embeddings unsure."""
    zero_outputs: bool
    """The projections that write into the residual stream start at zero, so that every block starts as the identity."""
    mlp_ratio: int
    norm_eps: float
    rope_theta: float


PRESETS = {
    # Ours: what learned fastest on two cores (benchmarks/NOTES.md has the measurements).
    "glass": Architecture("layer", "rotary", "relu2", True, False, 0.2, 0.25, True, 4, 1e-5, 10_000.0),
    # Exactly GPT-2 (Radford et al. 2019), so that other programs can run what is trained here.
    "gpt2": Architecture("layer", "learned", "gelu", False, True, 0.02, 1.0, False, 4, 1e-5, 0.0),
    # Exactly Qwen3 (Qwen team 2025), dense and with a tied head.
    "qwen3": Architecture("rms", "rotary", "swiglu", True, False, 0.02, 1.0, False, 3, 1e-6, 1_000_000.0),
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model."""

    preset: Literal["glass", "gpt2", "qwen3"] = "glass"
    """`glass` learns fastest; `gpt2` and `qwen3` are exactly those, for other programs to run."""
    n_layers: int = 4
    """Blocks, one after the other."""
    n_heads: int = 4
    """Attention heads in each block."""
    n_kv_heads: int = 0
    """Heads that keys and values are shared among (grouped queries); 0 takes as many as n_heads."""
    d_model: int = 128
    """Width of the residual stream."""
    d_head: int = 0
    """Width of a head; 0 takes d_model / n_heads."""
    d_mlp: int = 0
    """Hidden width of the MLP; 0 takes the preset's multiple of d_model."""
    context: int = 128
    """Tokens that the model can look back on, the current one included."""
    dropout: float = 0.0
    """Share of activations dropped while training."""
    attention: Literal["auto", AttentionImplementation] = "auto"
    """`explicit`: every step written out; `fused`: the library's kernels; `chunked`: attention written out, some
    queries at a time, the rest the library's; `auto`: the fastest for this machine."""

    def __post_init__(self) -> None:
        """Resolve the sizes that are 0 from the others; wrong values stay as they are, for `problems` to report."""
        if self.n_heads < 1 or self.d_model < 1:
            return
        if self.n_kv_heads == 0:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.d_head == 0 and self.d_model % self.n_heads == 0:
            object.__setattr__(self, "d_head", self.d_model // self.n_heads)
        if self.d_mlp == 0:
            object.__setattr__(self, "d_mlp", self.architecture.mlp_ratio * self.d_model)

    @property
    def architecture(self) -> Architecture:
        return PRESETS[self.preset]

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each; empty when all is well."""
        found = [
            f"model.{name} is {value}; it must be at least {least}"
            for name, value, least in (
                ("n_layers", self.n_layers, 1),
                ("n_heads", self.n_heads, 1),
                ("n_kv_heads", self.n_kv_heads, 0),
                ("d_model", self.d_model, 1),
                ("d_head", self.d_head, 0),
                ("d_mlp", self.d_mlp, 0),
                ("context", self.context, 1),
            )
            if value < least
        ]
        if found:
            return found
        if not self.d_head and self.d_model % self.n_heads:
            found.append(
                f"model.d_model is {self.d_model}, which {self.n_heads} heads cannot share evenly; "
                f"take model.d_model {-(-self.d_model // self.n_heads) * self.n_heads}, or another model.n_heads"
            )
        if self.n_heads % self.n_kv_heads:
            found.append(
                f"model.n_heads is {self.n_heads}, which {self.n_kv_heads} key/value heads cannot share evenly; "
                "take a divisor of n_heads as model.n_kv_heads"
            )
        if self.architecture.positions == "rotary" and not found and self.d_head % 2:
            found.append(
                f"the width of a head is {self.d_head}; rotary positions need an even one "
                "(set model.d_head, or change model.d_model)"
            )
        if not 0 <= self.dropout < 1:
            found.append(f"model.dropout is {self.dropout}; it must be at least 0 and below 1")
        return found
