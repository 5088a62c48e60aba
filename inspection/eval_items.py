"""What a model is scored on while heads are ablated: repeated tokens, held-out texts, contrast pairs.

All are `EvalTask`s: items, each a weighted sum of log-probabilities of tokens. `ablation.py` runs them in batches.

Shapes: B texts, T positions, V vocabulary, C model width, S positions where logits are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from inspection.contrast_pairs import ContrastPair, merge_prefixes
from inspection.eval_texts import EvalTexts
from model.gpt import GPT

Tokens = Sequence[int]

PAIRS_PER_KIND = 128
"""Contrast pairs of each kind, at most. With 32 the intervals were too wide to tell a head from the others."""
BATCH_TOKENS = 2048
"""Tokens in one forward pass."""
BATCH_LOGITS = 1 << 25
"""With a large vocabulary, fewer: the logits are the largest tensor then (128 MiB in fp32)."""


class Query(NamedTuple):
    """One prediction: log p(token | texts[row][: position + 1]), times a weight, counts for an item."""

    row: int
    position: int
    token: int
    item: int
    weight: float


@dataclass(frozen=True)
class EvalTask:
    """Items to score a model on: each a weighted sum of log-probabilities, higher where the model does better."""

    unit: str
    """`nats/token` (negative loss) or `nats` (logit difference)."""
    reference: list[tuple[int, ...]]
    """The texts over which mean activations are taken."""
    texts: list[tuple[int, ...]]
    queries: list[Query]
    measures: dict[str, list[int]]
    """The items of each measure, at least two: one would give no interval."""

    @property
    def n_items(self) -> int:
        return 1 + max(query.item for query in self.queries)


def eval_tasks(eval_texts: EvalTexts, context: int) -> list[EvalTask]:
    """The tasks of measures `repeats`, `corpus` and `logit_diff.KIND`; those without two items have no measures."""
    repeats, held_out = eval_texts.repeats, [tokens for _, tokens in eval_texts.held_out()]
    return [
        # In `first, r1 .. rn, r1 .. rn` the second copy of r2 .. rn can be predicted, the second r1 cannot.
        _loss_task("repeats", repeats, [len(text) // 2 + 2 for text in repeats]),
        _loss_task("corpus", held_out, [1] * len(held_out)),
        _logit_diff_task(eval_texts, context),
    ]


def _loss_task(name: str, texts: Sequence[tuple[int, ...]], firsts: Sequence[int]) -> EvalTask:
    """The negative mean loss of each text in nats/token, over its tokens from a first one on."""
    kept, queries = list[tuple[int, ...]](), list[Query]()
    for text, first in zip(texts, firsts, strict=True):
        if first >= len(text):
            continue
        item, weight = len(kept), 1 / (len(text) - first)
        queries += [Query(item, position - 1, text[position], item, weight) for position in range(first, len(text))]
        kept.append(text)
    return EvalTask("nats/token", kept, kept, queries, _with_two_items({name: list(range(len(kept)))}))


def _logit_diff_task(eval_texts: EvalTexts, context: int) -> EvalTask:
    """log p(right) - log p(wrong) of the first pairs of each kind that fit the context."""
    measures, chosen = dict[str, list[int]](), list[ContrastPair]()
    for pair in eval_texts.contrast_pairs:
        items = measures.setdefault(f"logit_diff.{pair.kind}", [])
        if len(items) < PAIRS_PER_KIND and pair.length <= context:
            items.append(len(chosen))
            chosen.append(pair)
    texts, rows = merge_prefixes([pair.tokens + answer[:-1] for pair in chosen for answer in (pair.right, pair.wrong)])
    queries = [
        Query(rows[pair.tokens + answer[:-1]], len(pair.tokens) - 1 + k, token, item, weight)
        for item, pair in enumerate(chosen)
        for answer, weight in ((pair.right, 1.0), (pair.wrong, -1.0))
        for k, token in enumerate(answer)
    ]
    return EvalTask("nats", [pair.tokens for pair in chosen], texts, queries, _with_two_items(measures))


def _with_two_items(measures: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name: items for name, items in measures.items() if len(items) >= 2}


def batches(model: GPT, texts: Sequence[Tokens]) -> Iterator[list[int]]:
    """Indices of texts for one forward pass each, grouped by similar length, which needs little padding."""
    most = max(1, min(BATCH_TOKENS, BATCH_LOGITS // model.vocab_size))
    batch: list[int] = []
    for number in sorted(range(len(texts)), key=lambda k: len(texts[k])):
        if batch and (len(batch) + 1) * len(texts[number]) > most:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@dataclass(frozen=True)
class GatherIndex:
    """Where a batch needs logits: S positions of the flattened (B, T), and which of them each query uses."""

    positions: Tensor
    which: Tensor
    tokens: Tensor
    items: Tensor
    weights: Tensor

    @staticmethod
    def of(task: EvalTask, batch: list[int], T: int, device: torch.device) -> GatherIndex:
        """The index for the task's texts `batch`, padded to T tokens."""
        rows = {row: k for k, row in enumerate(batch)}
        queries = [query for query in task.queries if query.row in rows]
        flat = torch.tensor([rows[query.row] * T + query.position for query in queries], device=device)
        positions, which = flat.unique(return_inverse=True)
        tokens = torch.tensor([query.token for query in queries], device=device)
        weights = torch.tensor([query.weight for query in queries], dtype=torch.float64)
        return GatherIndex(positions, which, tokens, torch.tensor([query.item for query in queries]), weights)

    def gather(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "1 S C"]:
        """`x` at the S positions."""
        return x.flatten(0, 1)[self.positions][None]

    def score(self, logits: Float[Tensor, "1 S V"], n_items: int) -> NDArray[np.float64]:
        """What this batch adds to the score of each item."""
        log_p = logits[0].log_softmax(dim=-1)[self.which, self.tokens].cpu().double()
        scores = torch.zeros(n_items, dtype=torch.float64).index_add(0, self.items, self.weights * log_p)
        return np.asarray(scores)
