"""Reading one token as a recording: the same operations on the same memory, replayed without asking Python again.

A model of 124 M parameters reads a token by some 200 small operations. A GPU finishes each of them sooner than Python
names the next; a CUDA graph is all of them in one. What records is handed in (`training/graphs.py`): nothing here
knows a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model.gpt import GPT, Block
from model.kv_cache import KVCache, OnePosition

Step = Callable[[], Tensor]
Record = Callable[[Step], Step]
"""Turns an operation into one that does the same again, on the same memory, and returns the same tensor."""
LEAST = 128
"""Fewest positions that a recording reads."""


def reach_of(length: int, context: int) -> int:
    """How many positions a recording reads whose longest text has more than `length` tokens: the next power of two.

    Positions that are not there yet cost as much as those that are, and each reach is a recording of its own.
    """
    return min(context, max(LEAST, 1 << length.bit_length()))


class RecordedReading:
    """Reads the newest token of growing texts by a recording; their earlier positions are in the cache.

    Raises:
        ValueError: if the model's attention is written out, which knows no mask but the causal one.
    """

    def __init__(self, model: GPT, cache: KVCache, record: Record) -> None:
        if not all(cast(Block, block).attention.fused for block in model.blocks):
            raise ValueError("a recording needs the library's attention (kernels = fused)")
        self.model, self.cache, self.record = model, cache, record
        self.token = torch.zeros(cache.keys.shape[1], 1, dtype=torch.long, device=cache.keys.device)
        self.reach = 0

    def __call__(self, tokens: Int[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
        """Logits after one more token. They are overwritten by the next call."""
        if self.cache.length >= self.reach:
            self.reach = reach_of(self.cache.length, self.model.config.context)
            self.one = OnePosition(self.cache, self.reach)
            self.token.copy_(tokens)
            self.replay = self.record(lambda: self.model(self.token, self.one)[:, -1])
        self.token.copy_(tokens)
        self.one.place.fill_(self.cache.length)
        self.cache.advance(1)
        return self.replay()
