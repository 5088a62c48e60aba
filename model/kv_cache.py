"""The key/value cache: what the model has already computed about the text so far."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from model.config import ModelConfig


class KVCache:
    """Keys and values of every layer, in memory that is taken once and never copied.

    Args:
        config: the model's shape.
        batch: texts that grow side by side.
        like: a tensor of the model, for the device and data type.
    """

    allowed: Bool[Tensor, "1 S"] | None = None
    """Which positions the newest may read, where that is not all that are handed out."""

    def __init__(self, config: ModelConfig, batch: int, like: Tensor) -> None:
        shape = (config.n_layers, batch, config.kv_heads, config.context, config.width_of_head)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)
        self.length = 0
        self.start = 0  # where in the text the first position stands

    def positions(self, count: int) -> Int[Tensor, "T"]:
        """The places of the next `count` tokens."""
        end, context = self.length + count, self.keys.shape[3]
        assert end <= context, f"{end} positions in a context of {context}"
        return torch.arange(self.length, end, device=self.keys.device)

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


class OnePosition(KVCache):
    """A cache's memory for one position at a time, in tensors whose shapes and addresses never change.

    The place is a number in memory instead of a number in Python: the newest key and value go where it says, the first
    `reach` positions are handed out, and a mask hides those which come after it. So all steps are the same operations
    on the same memory, and may be recorded once and replayed (`model/recorded.py`).
    """

    def __init__(self, cache: KVCache, reach: int) -> None:
        self.keys, self.values = cache.keys[..., :reach, :], cache.values[..., :reach, :]
        for memory in (self.keys, self.values):
            memory[:, :, :, cache.length :] = 0  # what was never written may be NaN, and 0 * NaN is NaN
        self.place = torch.full((1,), cache.length, device=self.keys.device)
        self.order = torch.arange(reach, device=self.keys.device)

    def positions(self, count: int) -> Int[Tensor, "1"]:
        self.allowed = (self.order <= self.place)[None]
        return self.place

    def extend(
        self, layer: int, k: Float[Tensor, "B G 1 D"], v: Float[Tensor, "B G 1 D"]
    ) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S D"]]:
        """Store one position's keys and values; return those of all S = `reach` positions as views."""
        keys, values = self.keys[layer], self.values[layer]
        return keys.index_copy_(2, self.place, k), values.index_copy_(2, self.place, v)

    def advance(self, count: int) -> None:
        """The place is set from outside, before each step."""
