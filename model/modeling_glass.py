"""The preset `glass` for transformers, which has no such architecture. `export.py` puts this file beside the weights.

Needs torch and transformers only. There is no key/value cache: each new token runs the whole text, at most `context` tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class GlassConfig(PretrainedConfig):
    model_type = "glass"

    def __init__(self, vocab_size: int = 257, **sizes: Any) -> None:
        self.vocab_size = vocab_size
        self.n_layers, self.n_heads = sizes.pop("n_layers", 2), sizes.pop("n_heads", 4)
        self.n_kv_heads, self.d_head = sizes.pop("n_kv_heads", 4), sizes.pop("d_head", 32)
        self.d_model, self.d_mlp = sizes.pop("d_model", 128), sizes.pop("d_mlp", 512)
        self.context, self.norm_eps = sizes.pop("context", 128), sizes.pop("norm_eps", 1e-5)
        self.rope_theta = sizes.pop("rope_theta", 10_000.0)
        self.num_hidden_layers = self.n_layers  # the name that transformers looks for
        super().__init__(**sizes)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and RMS norms of queries and keys."""

    def __init__(self, config: GlassConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = config.n_heads, config.n_kv_heads, config.d_head
        self.theta, eps = config.rope_theta, config.norm_eps
        self.qkv = nn.Linear(config.d_model, (self.n_heads + 2 * self.n_kv_heads) * self.d_head, bias=False)
        self.out = nn.Linear(self.n_heads * self.d_head, config.d_model, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(self.d_head, eps), nn.RMSNorm(self.d_head, eps)

    def rotate(self, x: Tensor) -> Tensor:
        half = torch.arange(0, self.d_head, 2, device=x.device, dtype=torch.float32) / self.d_head
        angles = torch.arange(x.shape[-2], device=x.device)[:, None].float() * (1 / self.theta**half)
        angles = torch.cat([angles, angles], dim=-1)
        first, second = x.chunk(2, dim=-1)
        return (x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()).to(x.dtype)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        H, G = self.n_heads, self.n_kv_heads
        q, k, v = self.qkv(x).unflatten(-1, (H + 2 * G, self.d_head)).transpose(1, 2).split([H, G, G], dim=1)
        q, k = self.rotate(self.q_norm(q)), self.rotate(self.k_norm(k))
        k, v = k.repeat_interleave(H // G, dim=1), v.repeat_interleave(H // G, dim=1)
        return self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: GlassConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.down = nn.Linear(config.d_mlp, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu().square())


class Block(nn.Module):
    def __init__(self, config: GlassConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.d_model, config.norm_eps, bias=False)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.d_model, config.norm_eps, bias=False)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class GlassForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits from tokens; the LM head is the token embedding."""

    config_class = GlassConfig
    base_model_prefix = ""

    def __init__(self, config: GlassConfig) -> None:
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model, config.norm_eps, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **unused: Any
    ) -> CausalLMOutput:
        x = self.token_embedding(input_ids[:, -self.config.context :])
        T = x.shape[1]
        mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()[None, None]
        if attention_mask is not None:  # padding attends to itself, which nothing else attends to
            own = torch.eye(T, dtype=torch.bool, device=x.device)
            mask = mask & attention_mask[:, None, None, -T:].bool() | own
        for block in self.blocks:
            x = block(x, mask)
        logits = F.linear(self.final_norm(x), self.token_embedding.weight)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}
