"""The key/value cache: what the model has already computed about the text so far."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from model.config import ModelConfig


class KVCache:
    """Keys and values of every layer, in memory that is taken once and never copied.

    Args:
        config: the model's shape.
        batch: texts that grow side by side.
        like: a tensor of the model, for the device and data type.
    """

    def __init__(self, config: ModelConfig, batch: int, like: Tensor) -> None:
        shape = (config.n_layers, batch, config.kv_heads, config.context, config.width_of_head)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)
        self.length = 0
        self.start = 0  # where in the text the first position stands

    def extend(
        self, layer: int, k: Float[Tensor, "B G T D"], v: Float[Tensor, "B G T D"]
    ) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S D"]]:
        """Store the keys and values of T new positions; return those of all S = length + T positions as views."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, count: int) -> None:
        """Count `count` positions as read, once every layer has stored them."""
        self.length += count

    def clear(self, start: int = 0) -> None:
        """Forget everything; the memory stays. What comes next begins at `start` of the text."""
        self.length, self.start = 0, start
