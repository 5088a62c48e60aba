"""The preset `glass` for Hugging Face's transformers: Qwen3 with LayerNorm and squared ReLU.

`export.py` copies this file next to the weights; `from_pretrained(FOLDER, trust_remote_code=True)` runs it.
"""

from typing import Any

from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM


class GlassConfig(Qwen3Config):
    """Qwen3's sizes and settings; `rms_norm_eps` is also LayerNorm's."""

    model_type = "glass"


class MLP(nn.Module):
    """Feed-forward network with squared ReLU (So et al. 2021)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x).relu().square())


def norm(config: Any) -> nn.LayerNorm:
    """Layer normalization (Ba et al. 2016)."""
    return nn.LayerNorm(config.hidden_size, config.rms_norm_eps, bias=False)


class GlassForCausalLM(Qwen3ForCausalLM):
    """Attention, rotary positions, KV cache, loss and generation are Qwen3's."""

    config_class = GlassConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp, layer.input_layernorm, layer.post_attention_layernorm = MLP(config), norm(config), norm(config)
        self.model.norm = norm(config)
        self.post_init()
