"""A model with hand-set parameters that contains an induction head, so that every result of inspection is known.

How a transformer of two layers continues a text that repeats itself (Elhage et al. 2021, "Induction heads"; Olsson et
al. 2022): after `A B ... A` it predicts `B`.

1. Layer 0, head 0 is a *previous-token head*. Each query attends to the position before and copies its token, so that
   every position then has two things: its token, and the token before it.
2. Layer 1, head 1 is an *induction head*. The query of the second `A` attends to the position whose previous token is
   `A`, where `B` is, and copies `B` into the prediction. It needs what the first layer wrote: the two heads are
   composed, and one layer alone cannot do this.

The residual stream is a concatenation of one-hot parts:

    token      1 at the current token; the induction head adds the next one
    mirror    -1 at the current token
    position   1 at the position
    before     1 at the previous token: empty at first, written by the previous-token head
    balance    minus what the others add, so that the stream always sums to 0
    anchor     4096 and -4096 at every position

The norms do nothing: the anchor is nearly all of a position's standard deviation, whatever the heads write or a test
ablates, and the norm's weight multiplies it back. The logits are 60 (token + mirror), because the LM head is tied to
the embedding and the final norm is negative on `mirror`: the current token cancels, and what the induction head wrote
remains. Where nothing was written the loss is exactly ln V. The score of the matching key is 60 above all others,
which get less than e^-60 = 10^-26. Without a match the induction head attends to position 0, whose token 0 has a value
of zero. All other heads attend uniformly and write nothing; the MLPs are zero.
"""

import math
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from model.config import ModelConfig
from model.gpt import GPT, CausalSelfAttention

PREVIOUS = (0, 0)
"""(layer, head) of the previous-token head."""
INDUCTION = (1, 1)
"""(layer, head) of the induction head."""
ANCHOR = 4096.0
LEAD = 60.0
"""The margin of the matching score, and of the right logit, over all others."""


class Stream:
    """The slices of the residual stream."""

    def __init__(self, n_tokens: int, context: int) -> None:
        sizes = (n_tokens, n_tokens, context, n_tokens, 1, 2)
        ends = list(accumulate(sizes))
        parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self.token, self.mirror, self.position, self.before, self.balance, self.anchor = parts
        self.width = ends[-1]
        self.deviation = ANCHOR * math.sqrt(2 / self.width)
        """The divisor of layer norm."""


def handmade(
    n_tokens: int = 30,
    context: int = 60,
    n_heads: int = 3,
    n_layers: Literal[1, 2] = 2,
    attention: Literal["eager", "sdpa"] = "eager",
) -> GPT:
    """The model described above; with one layer, its first layer alone, which predicts nothing.

    Args:
        n_tokens: V; texts begin with token 0, which should not occur again.
        context: the longest text.
        n_heads: H, at least 2, of width max(V, context).
    """
    stream = Stream(n_tokens, context)
    shape = {"n_heads": n_heads, "d_model": stream.width, "d_head": max(n_tokens, context), "d_mlp": 1}
    model = GPT(ModelConfig("gpt2", n_layers, context=context, attention=attention, **shape), n_tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(stream.deviation)
        _embed(model, stream)
        _previous_token_head(model.blocks[PREVIOUS[0]].attention, stream)
        if n_layers == 2:
            _induction_head(model.blocks[INDUCTION[0]].attention, stream)
    return model.eval()


def repeats(count: int, n: int, n_tokens: int = 30, seed: int = 1) -> list[list[int]]:
    """Texts of 2 n + 1 tokens: token 0, then n distinct random tokens, repeated once."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [(1 + torch.randperm(n_tokens - 1, generator=generator)[:n]).tolist() for _ in range(count)]
    return [[0, *tokens, *tokens] for tokens in drawn]


def _embed(model: GPT, stream: Stream) -> None:
    """Set the embeddings and the final norm."""
    assert model.position_embedding is not None
    tokens, positions = model.token_embedding.weight, model.position_embedding.weight
    tokens[:, stream.token] = torch.eye(len(tokens))
    tokens[:, stream.mirror] = -torch.eye(len(tokens))
    positions[:, stream.position] = torch.eye(len(positions))
    positions[:, stream.balance] = -1
    positions[:, stream.anchor] = torch.tensor([ANCHOR, -ANCHOR])
    model.final_norm.weight[stream.token] *= LEAD
    model.final_norm.weight[stream.mirror] *= -LEAD


def _previous_token_head(attention: CausalSelfAttention, stream: Stream) -> None:
    query, key, value, out = _head(attention, PREVIOUS[1])
    T, V, scale = _size(stream.position), _size(stream.token), LEAD * math.sqrt(attention.d_head)
    query[: T - 1, stream.position] = scale * torch.eye(T)[:-1].roll(1, dims=1)  # position i attends to i - 1
    key[:T, stream.position] = torch.eye(T)
    value[:V, stream.token] = torch.eye(V)
    out[stream.before, :V] = torch.eye(V)
    out[stream.balance, :V] = -1


def _induction_head(attention: CausalSelfAttention, stream: Stream) -> None:
    query, key, value, out = _head(attention, INDUCTION[1])
    V, scale = _size(stream.token), 2 * LEAD * math.sqrt(attention.d_head)
    query[:V, stream.token] = scale * torch.eye(V)  # this position's token ...
    key[:V, stream.before] = torch.eye(V)  # ... is the token before that one
    key[:V, stream.position.start] = 0.5  # half a match with any token: the default target
    value[1:V, stream.token] = torch.eye(V)[1:]  # all tokens but token 0
    out[stream.token, :V] = torch.eye(V)
    out[stream.balance, :V] = -1


def _head(attention: CausalSelfAttention, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of one head's matrices: query, key, value (D, C); output (C, D)."""
    per_head = attention.qkv.weight.view(3, attention.n_heads, attention.d_head, -1)
    query, key, value = per_head[:, head]
    out = attention.out.weight
    return query, key, value, out.view(len(out), attention.n_heads, -1)[:, head]


def _size(part: slice) -> int:
    return int(part.stop - part.start)
