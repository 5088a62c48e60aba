"""A model in memory, with its tokenizer; the scripts load it. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer
    from model.gpt import GPT


@dataclass(frozen=True)
class LoadedModel:
    """The model of a checkpoint, with what an attention file records about it."""

    model: GPT
    step: int
    metadata: Mapping[str, str]
    tokenizer: Tokenizer
    encode: Callable[[str], list[int]]  # Text -> tokens, after end-of-text if the training documents began with it.

    @property
    def token_bytes(self) -> Callable[[int], bytes]:
        return self.tokenizer.token_bytes
