"""A model with hand-set parameters that contains an induction head, so that every result of inspection is known.

After `A B ... A` it predicts `B` (Elhage et al. 2021, "Induction heads"; Olsson et al. 2022). Layer 0, head 0 is a
*previous-token head*: it copies the token before into each position. Layer 1, head 1 is the *induction head*: the query
of the second `A` attends to the position whose previous token is `A`, where `B` is, and copies `B` into the prediction.

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

import torch
from torch import Tensor

from model.config import ModelConfig
from model.gpt import GPT

PREVIOUS, INDUCTION = (0, 0), (1, 1)
"""(layer, head) of the previous-token head and of the induction head."""
T = 60  # the longest text
ANCHOR = 4096.0
LEAD = 60.0
"""The margin of the matching score, and of the right logit, over all others."""


def handmade(V: int = 30) -> GPT:
    """The model for texts that begin with token 0."""
    sizes = [V, V, T, V, 1, 2]
    width, D = sum(sizes), max(V, T)
    shape = {"n_heads": 3, "d_model": width, "d_head": D, "d_mlp": 1}
    model = GPT(ModelConfig("gpt2", 2, context=T, attention="eager", **shape), V)
    token, mirror, position, before, balance, anchor = torch.arange(width).split(sizes)
    eye, scale = torch.eye, LEAD * math.sqrt(D)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            parameter.fill_(ANCHOR * math.sqrt(2 / width) if is_norm else 0)  # the divisor of layer norm
        assert model.position_embedding is not None
        tokens, positions = model.token_embedding.weight, model.position_embedding.weight
        tokens[:, token], tokens[:, mirror] = eye(V), -eye(V)
        positions[:, position], positions[:, balance] = eye(T), torch.tensor(-1.0)
        positions[:, anchor] = torch.tensor([ANCHOR, -ANCHOR])
        model.final_norm.weight[token] *= LEAD
        model.final_norm.weight[mirror] *= -LEAD

        query, key, value, out = _head(model, *PREVIOUS)
        query[: T - 1, position] = scale * eye(T)[:-1].roll(1, dims=1)  # position i attends to i - 1
        key[:T, position] = eye(T)
        value[:V, token] = eye(V)
        out[before, :V], out[balance, :V] = eye(V), torch.tensor(-1.0)
        query, key, value, out = _head(model, *INDUCTION)
        query[:V, token] = 2 * scale * eye(V)  # this position's token ...
        key[:V, before] = eye(V)  # ... is the token before that one
        key[:V, position[0]] = 0.5  # half a match with any token: the default target
        value[1:V, token] = eye(V)[1:]  # all tokens but token 0
        out[token, :V], out[balance, :V] = eye(V), torch.tensor(-1.0)
    return model.eval()


def _head(model: GPT, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of one head's matrices: query, key, value (D, C); output (C, D)."""
    attention = model.blocks[layer].attention
    query, key, value = attention.qkv.weight.view(3, attention.n_heads, attention.d_head, -1)[:, head]
    out = attention.out.weight
    return query, key, value, out.view(len(out), attention.n_heads, -1)[:, head]


def repeats(count: int, n: int, n_tokens: int = 30, seed: int = 1) -> list[list[int]]:
    """Texts of 2 n + 1 tokens: token 0, then n distinct random tokens, repeated once."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [(1 + torch.randperm(n_tokens - 1, generator=generator)[:n]).tolist() for _ in range(count)]
    return [[0, *tokens, *tokens] for tokens in drawn]
