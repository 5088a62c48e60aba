"""Embeddings of the last few tokens together: what a short text before a token tells, without attention."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from model.config import ModelConfig

MULTIPLIER = 1_000_003  # of the hash: a prime


class NgramEmbedding(nn.Module):
    """The sum of an embedding of the last two tokens, of the last three, ..., of the last n (Pagnoni et al. 2024, section 3.2.1).

    The n-grams of one length share the rows of a table by a hash. Positions before the text count as token V.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.rows = vocab_size, config.ngram_rows
        self.tables = nn.ModuleList(nn.Embedding(self.rows, config.d_model) for _ in range(config.ngrams - 1))

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T C"]:
        row, embeddings = tokens, []
        for distance, table in enumerate(self.tables, start=1):
            earlier = F.pad(tokens, (distance, 0), value=self.vocab_size)[:, : tokens.shape[1]]
            row = (row * MULTIPLIER + earlier) % self.rows
            embeddings.append(table(row))
        return torch.stack(embeddings).sum(dim=0)
