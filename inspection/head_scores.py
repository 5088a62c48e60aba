"""Head scores: what an attention pattern is like, each as one number between known limits.

Formulas alone: tensors in, tensors out, no model run (`copying` reads weights). `scores.py` says on which texts each is
measured; `registry.py` names them for those who only show them.

Shapes: L layers, H heads, T positions, D head width, C model width, V vocabulary. A pattern A[..., i, j] is the weight
with which query i (row) reads key j (column), counted from 0: 0 for j > i, and each row sums to 1. Leading dimensions
("*batch") are kept as they are.

A score is nan where a text offers nothing to measure: one token has no previous one, a text without repetitions no
query for an induction head. Whoever averages over texts leaves nan out (`Tensor.nanmean`).
"""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from inspection.registry import SCORES, HeadScore, score_info
from model.gpt import GPT, Block

__all__ = [
    "SCORES",
    "HeadScore",
    "copying",
    "duplicate_token",
    "first_token",
    "induction",
    "mean_distance",
    "previous_token",
    "relative_entropy",
    "rollout",
    "score_info",
    "value_weighted",
]


def previous_token(pattern: Float[Tensor, "*batch T T"]) -> Float[Tensor, "*batch"]:
    """Mean over i >= 1 of A[i, i-1]: 0 to 1 (Elhage et al. 2021, "Induction Heads", name such heads).

    Reading everything alike gives (1/2 + 1/3 + ... + 1/T) / (T - 1): 0.0704 for 51 tokens.
    """
    return pattern.diagonal(-1, -2, -1).mean(dim=-1)


def first_token(pattern: Float[Tensor, "*batch T T"]) -> Float[Tensor, "*batch"]:
    """Mean over i >= 1 of A[i, 0]: 0 to 1 (Xiao et al. 2023, section 3.1, "attention sinks").

    Query 0 is left out: it has nothing else to read. Reading everything alike gives what `previous_token` gives.
    """
    return pattern[..., 1:, 0].mean(dim=-1)


def _mass(pattern: Float[Tensor, "*batch T T"], keys: Bool[Tensor, "*texts T T"]) -> Float[Tensor, "*batch"]:
    """Mean of each query's total weight on the keys asked for, over the queries that have any; nan without one."""
    eligible = keys.any(dim=-1)
    mass = (pattern * keys).sum(dim=-1)
    return mass.sum(dim=-1) / eligible.sum(dim=-1)


def duplicate_token(pattern: Float[Tensor, "*batch T T"], tokens: Int[Tensor, "*texts T"]) -> Float[Tensor, "*batch"]:
    """Weight on earlier places of the same token: 0 to 1 (Wang et al. 2023, "duplicate token heads").

    The mean, over the queries i whose token came before, of the sum of A[i, j] over all j < i with
    tokens[j] = tokens[i]; nan where no token comes twice.

    Args:
        tokens: broadcast against the pattern's leading dimensions: (B, 1, T) for a pattern (B, H, T, T).
    """
    same = tokens[..., :, None] == tokens[..., None, :]
    return _mass(pattern, same.tril(-1))


def induction(pattern: Float[Tensor, "*batch T T"], tokens: Int[Tensor, "*texts T"]) -> Float[Tensor, "*batch"]:
    """Weight on what came after earlier places of the same token: 0 to 1 (Olsson et al. 2022, "prefix matching").

    The mean, over the queries i that have such keys, of the sum of A[i, j] over all j < i with
    tokens[j - 1] = tokens[i]; nan where no query has one. The query itself does not count as such a key, though it
    is one where a token stands twice in a row.

    Definitions differ: those who divide by all queries of a sequence that is said twice, instead of the half that
    can find something, get about half of this number.

    Args:
        tokens: broadcast against the pattern's leading dimensions: (B, 1, T) for a pattern (B, H, T, T).
    """
    after_same = torch.zeros(*tokens.shape, tokens.shape[-1], dtype=torch.bool, device=tokens.device)
    after_same[..., 1:] = tokens[..., :, None] == tokens[..., None, :-1]
    return _mass(pattern, after_same.tril(-1))


def relative_entropy(pattern: Float[Tensor, "*batch T T"]) -> Float[Tensor, "*batch"]:
    """How widely a head reads, as a share of the most that is possible: 0 (one token) to 1 (all alike).

    Mean over i >= 1 of H(A[i]) / ln(i + 1), where H(p) = -sum of p ln p. The entropy is that of Clark et al. 2019,
    section 3.3; here it is divided by its largest value, so that early queries, which have less to choose from,
    count like late ones.
    """
    entropy = torch.special.entr(pattern).sum(dim=-1)
    most = torch.arange(1, pattern.shape[-1] + 1, device=pattern.device, dtype=pattern.dtype).log()
    return (entropy[..., 1:] / most[1:]).mean(dim=-1)


def mean_distance(pattern: Float[Tensor, "*batch T T"]) -> Float[Tensor, "*batch"]:
    """How many tokens back a head reads: 0 to (T - 1) / 2 (Vig & Belinkov 2019, "attention distance").

    Mean over all i of the sum over j of A[i, j] (i - j). Reading everything alike gives (T - 1) / 4.
    """
    place = torch.arange(pattern.shape[-1], device=pattern.device, dtype=pattern.dtype)
    return (pattern * (place[:, None] - place)).sum(dim=-1).mean(dim=-1)


def value_weighted(
    pattern: Float[Tensor, "*batch T T"], value_norms: Float[Tensor, "*batch T"]
) -> Float[Tensor, "*batch T T"]:
    """What each key hands over: |A[i, j] f(x_j)|, each row divided by its sum (Kobayashi et al. 2020, section 3).

    A large weight on a short vector moves little. A row of which every vector is zero stays zero.

    Args:
        value_norms: |f(x_j)|, the length of what each head would write if it read key j alone.
    """
    moved = pattern * value_norms[..., None, :]
    total = moved.sum(dim=-1, keepdim=True)
    return moved / total.where(total > 0, 1)


def rollout(pattern: Float[Tensor, "L H T T"]) -> Float[Tensor, "L T T"]:
    """How much of each input token has arrived at each position after each layer (Abnar & Zuidema 2020, section 3).

    R[l] = (0.5 mean over heads of A[l] + 0.5 I) R[l - 1], with R[-1] = I: half of each position is what it was
    before, by the residual connection, and half is what the heads have brought. Rows sum to 1. It takes the heads
    as equal and their values as equally long, and the MLPs as absent: a rough map, no measurement.
    """
    rolled, total = [], torch.eye(pattern.shape[-1], device=pattern.device, dtype=pattern.dtype)
    stays = 0.5 * total
    for layer in pattern:
        total = (0.5 * layer.mean(dim=0) + stays) @ total
        rolled.append(total)
    return torch.stack(rolled)


@torch.no_grad()
def copying(model: GPT) -> Float[Tensor, "L H"]:
    """Whether what a head reads becomes likelier as the next token (Elhage et al. 2021, "Summarizing OV/QK Matrices").

    The sum of the eigenvalues of W_U W_O W_V W_E, the V x V matrix that says by how much reading each token raises
    each logit, divided by the sum of their absolute values: 1 where every token raises itself, -1 where every token
    lowers itself, 0 where neither prevails or the head writes nothing that the logits see; nan if a weight is no
    number.

    Computed through W_V W_E W_U W_O: it is D x D and has the same eigenvalues but for zeros, as XY and YX do. Norms
    are folded in: the gain of the norm before attention scales what W_V reads and the last norm's gain what W_U
    reads; layer norm's taking away of the mean is applied to both too. What is left out is each norm's division,
    which changes all eigenvalues alike if the stream is equally long everywhere; biases, positions and all that the
    layers between add.
    """
    embedding = model.token_embedding.weight.float()
    read = embedding * model.final_norm.weight.float()
    if model.config.architecture.norm == "layer":
        embedding = embedding - embedding.mean(dim=-1, keepdim=True)
        read = read - read.mean(dim=-1, keepdim=True)
    products, sizes = [], []
    between = (embedding.T @ read).double().cpu()  # W_E W_U (C, C), of which every head takes its part
    for block in model.blocks:
        block = cast(Block, block)
        H, G, D = block.attention.n_heads, block.attention.n_kv_heads, block.attention.d_head
        values = block.attention.qkv.weight.double().cpu()[(H + G) * D :].unflatten(0, (G, D))
        values = (values * block.norm1.weight.double().cpu()).repeat_interleave(H // G, dim=0)
        outputs = block.attention.out.weight.double().cpu().unflatten(1, (H, D)).transpose(0, 1)
        products.append(values @ between @ outputs)
        sizes.append(values.norm(dim=(1, 2)) * between.norm() * outputs.norm(dim=(1, 2)))
    if not (whole := torch.stack(products)).isfinite().all():
        return torch.full(whole.shape[:2], torch.nan)  # eigenvalues would be refused
    eigenvalues = torch.linalg.eigvals(whole)
    total = eigenvalues.abs().sum(dim=-1)
    something = total > 1e-6 * torch.stack(sizes)  # less is rounding
    return (eigenvalues.real.sum(dim=-1) * something / total.where(something, 1)).float()
