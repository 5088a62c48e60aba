"""The key/value cache of autoregressive decoding."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model.config import ModelConfig


class KVCache:
    """Keys and values of every layer, and the tokens, in buffers allocated once for the whole context of `batch` sequences.

    Device and dtype are those of `like`, a parameter of the model.
    """

    def __init__(self, config: ModelConfig, batch: int, like: Tensor) -> None:
        shape = (config.n_layers, batch, config.n_kv_heads, config.context, config.d_head)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)
        self.tokens = torch.empty(batch, config.context, dtype=torch.long, device=like.device)
        self.length = 0  # positions in the cache; `GPT.hidden_states` advances it after the last layer
        self.start = 0  # index in the text of the first cached position (`model.generate.context_start`)

    def update_tokens(self, tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B S"]:
        """Store T new tokens; returns all S = length + T."""
        end = self.length + tokens.shape[1]
        self.tokens[:, self.length : end] = tokens
        return self.tokens[:, :end]

    def update(
        self, layer: int, k: Float[Tensor, "B G T D"], v: Float[Tensor, "B G T D"]
    ) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S D"]]:
        """Store T new keys and values; return those of all S = length + T positions, as views."""
        end, context = self.length + k.shape[2], self.keys.shape[3]
        assert end <= context, f"{end} positions in a context of {context}"
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
