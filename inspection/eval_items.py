"""What a model is scored on while heads are taken away: repeats, held-out texts, choices.

All of them are the same thing: items, each a weighted sum of log-probabilities of tokens. `EvalTexts` → `EvalTask`; then
`causal.py` asks the model, batch by batch (`Places`).

Shapes: B texts, T positions, V vocabulary, C model width, S places where logits are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from inspection.contrast_pairs import ContrastPair
from inspection.eval_texts import HELD_OUT, EvalTexts
from model.gpt import GPT

Tokens = Sequence[int]

READ_AT_ONCE = 2048
"""Tokens in one pass."""
LOGITS_AT_ONCE = 1 << 25
"""With a large vocabulary, fewer: logits are the largest tensor then (128 MiB in fp32)."""


class Asked(NamedTuple):
    """One prediction: log p(token | texts[row][: place + 1]) counts for an item, times a weight."""

    row: int
    place: int
    token: int
    item: int
    weight: float


@dataclass(frozen=True)
class EvalTask:
    """Items to score a model on: each a weighted sum of log-probabilities, higher where the model does better."""

    unit: str
    reference: list[tuple[int, ...]]
    """What means are taken over."""
    texts: list[tuple[int, ...]]
    asked: list[Asked]
    measures: dict[str, list[int]]
    """The items of each measure, two or more: a single one would give no interval."""


def _of_two_or_more(measures: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name: items for name, items in measures.items() if len(items) >= 2}


def _losses(name: str, texts: Sequence[tuple[int, ...]], firsts: Sequence[int]) -> EvalTask:
    """Minus the mean loss of each text, in nats/token, over its tokens from a first one on."""
    kept, asked = list[tuple[int, ...]](), list[Asked]()
    for text, first in zip(texts, firsts, strict=True):
        if first >= len(text):
            continue
        item, weight = len(kept), 1 / (len(text) - first)
        asked += [Asked(item, place - 1, text[place], item, weight) for place in range(first, len(text))]
        kept.append(text)
    return EvalTask("nats/token", kept, kept, asked, _of_two_or_more({name: list(range(len(kept)))}))


def repeats_exam(watch: EvalTexts) -> EvalTask:
    """Each repeat `first, r1 .. rn, r1 .. rn`: how well the second r2 .. rn are foretold. Nothing foretells r1."""
    return _losses("repeats", watch.repeats, [len(text) // 2 + 2 for text in watch.repeats])


def corpus_exam(watch: EvalTexts) -> EvalTask:
    """Each held-out text."""
    texts = [tokens for name, tokens in watch.texts if name.startswith(HELD_OUT)]
    return _losses("corpus", texts, [1] * len(texts))


def choices_exam(watch: EvalTexts, per_kind: int, context: int) -> EvalTask:
    """log p(right) - log p(wrong) of the first probes of each kind that fit the context."""
    measures, chosen = dict[str, list[int]](), list[ContrastPair]()
    for probe in watch.probes:
        items = measures.setdefault(f"logit_diff.{probe.kind}", [])
        if len(items) < per_kind and probe.length <= context:
            items.append(len(chosen))
            chosen.append(probe)
    texts, rows = shared({probe.tokens + answer[:-1] for probe in chosen for answer in (probe.right, probe.wrong)})
    asked = [
        Asked(rows[probe.tokens + answer[:-1]], len(probe.tokens) - 1 + k, token, item, weight)
        for item, probe in enumerate(chosen)
        for answer, weight in ((probe.right, 1.0), (probe.wrong, -1.0))
        for k, token in enumerate(answer)
    ]
    return EvalTask("nats", [probe.tokens for probe in chosen], texts, asked, _of_two_or_more(measures))


def shared(texts: Iterable[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], dict[tuple[int, ...], int]]:
    """The texts that begin no other one, and in which of them each text is read.

    No position sees what comes after it, so the questions of one story need its longest prompt alone.
    """
    kept, rows = list[tuple[int, ...]](), dict[tuple[int, ...], int]()
    for text in sorted(texts, reverse=True):  # a text comes right after those that it begins
        if not kept or kept[-1][: len(text)] != text:
            kept.append(text)
        rows[text] = len(kept) - 1
    return kept, rows


def exams_of(watch: EvalTexts, per_kind: int, context: int) -> list[EvalTask]:
    return [repeats_exam(watch), corpus_exam(watch), choices_exam(watch, per_kind, context)]


def batches(model: GPT, texts: Sequence[Tokens]) -> Iterator[list[int]]:
    """The numbers of texts to be read together: like lengths, which need little padding."""
    most = max(1, min(READ_AT_ONCE, LOGITS_AT_ONCE // model.vocab_size))
    batch: list[int] = []
    for number in sorted(range(len(texts)), key=lambda k: len(texts[k])):
        if batch and (len(batch) + 1) * len(texts[number]) > most:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@dataclass(frozen=True)
class Places:
    """Where a batch is asked: S spots of the flattened (B, T), and which of them each of A predictions looks at."""

    spots: Tensor
    which: Tensor
    tokens: Tensor
    items: Tensor
    weights: Tensor

    @staticmethod
    def of(exam: EvalTask, batch: list[int], T: int, device: torch.device) -> Places:
        rows = {row: k for k, row in enumerate(batch)}
        asked = [one for one in exam.asked if one.row in rows]
        flat = torch.tensor([rows[one.row] * T + one.place for one in asked], device=device)
        spots, which = flat.unique(return_inverse=True)
        tokens = torch.tensor([one.token for one in asked], device=device)
        items = torch.tensor([one.item for one in asked])
        return Places(spots, which, tokens, items, torch.tensor([one.weight for one in asked], dtype=torch.float64))

    def at(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "1 S C"]:
        return x.flatten(0, 1)[self.spots][None]

    def score(self, logits: Float[Tensor, "1 S V"], items: int) -> NDArray[np.float64]:
        """What this batch adds to the score of each item."""
        log_p = logits[0].log_softmax(dim=-1)[self.which, self.tokens].cpu().double()
        return torch.zeros(items, dtype=torch.float64).index_add(0, self.items, self.weights * log_p).numpy()
