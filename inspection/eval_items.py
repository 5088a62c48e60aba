"""What a model is scored on: repeated tokens, held-out texts, contrast pairs.

All are `EvalTask`s: items, each a weighted sum of log-probabilities of tokens.
Shapes: B texts, T positions, V vocabulary, C model width, S positions where logits are needed.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from inspection.contrast_pairs import ContrastPair
from inspection.eval_texts import EvalTexts
from model.gpt import GPT

ABLATED_PAIRS = 128  # of each kind, at most; with 32 the intervals were too wide to tell a head from the others
BATCH_TOKENS = 2048  # in one forward pass of an ablation
BATCH_LOGITS = 1 << 25  # likewise; with a large vocabulary the logits are the largest tensor (128 MiB in fp32)


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

    unit: str  # nats/token (negative loss) or nats (logit difference)
    reference: list[tuple[int, ...]]  # the texts over which mean activations are taken
    texts: list[tuple[int, ...]]
    queries: list[Query]
    measures: dict[str, list[int]]  # the items of each measure

    @property
    def n_items(self) -> int:
        return 1 + max(query.item for query in self.queries)


def eval_tasks(eval_texts: EvalTexts) -> list[EvalTask]:
    """The tasks of measures `repeats`, `corpus` and `logit_diff.KIND`, without those that have no two items.

    `corpus.choose` and `corpus.judge` are halves of `corpus`: on one a head is chosen, on the other it is measured.
    """
    # In `first, r1 .. rn, r1 .. rn` the second copy of r2 .. rn can be predicted, the second r1 cannot.
    repeats = [(text, len(text) // 2 + 2) for text in eval_texts.repeats]
    held_out = [(text, 1) for _, text in eval_texts.held_out()]
    tasks = [_loss_task("repeats", repeats), _loss_task("corpus", held_out), _logit_diff_task(eval_texts)]
    choose, judge = halves(tasks[1].measures["corpus"])
    tasks[1].measures.update({"corpus.choose": choose, "corpus.judge": judge})
    for task in tasks:
        for name in [name for name, items in task.measures.items() if len(items) < 2]:  # one would give no interval
            del task.measures[name]
    return [task for task in tasks if task.measures]


def _loss_task(name: str, texts: Sequence[tuple[tuple[int, ...], int]]) -> EvalTask:
    """The negative mean loss of each text in nats/token, over its tokens from the given one on."""
    queries = [
        Query(item, position - 1, text[position], item, 1 / (len(text) - first))
        for item, (text, first) in enumerate(texts)
        for position in range(first, len(text))
    ]
    only_texts = [text for text, _ in texts]
    return EvalTask("nats/token", only_texts, only_texts, queries, {name: list(range(len(texts)))})


def _logit_diff_task(eval_texts: EvalTexts) -> EvalTask:
    measures, chosen = dict[str, list[int]](), list[ContrastPair]()
    for pair in eval_texts.contrast_pairs:
        items = measures.setdefault(f"logit_diff.{pair.kind}", [])
        if len(items) < ABLATED_PAIRS:
            items.append(len(chosen))
            chosen.append(pair)
    return pair_task(chosen, measures)


def pair_task(pairs: Sequence[ContrastPair], measures: dict[str, list[int]]) -> EvalTask:
    """log p(right) - log p(wrong) of each pair; its first query is at the last position of the prompt."""
    texts, rows = merge_prefixes([pair.tokens + answer[:-1] for pair in pairs for answer in (pair.right, pair.wrong)])
    queries = [
        Query(rows[pair.tokens + answer[:-1]], len(pair.tokens) - 1 + k, token, item, weight)
        for item, pair in enumerate(pairs)
        for answer, weight in ((pair.right, 1.0), (pair.wrong, -1.0))
        for k, token in enumerate(answer)
    ]
    return EvalTask("nats", [pair.tokens for pair in pairs], texts, queries, measures)


def halves(indices: Sequence[int]) -> tuple[list[int], list[int]]:
    """Two random halves, the same for the same number of items; the first is the larger one if the number is odd.

    Alternating items would not do: a story asks twice about its feelings, so all even pairs would be about one animal
    and all odd ones about the other.
    """
    shuffled = random.Random(f"halves of {len(indices)}").sample(indices, len(indices))
    middle = (len(shuffled) + 1) // 2
    return shuffled[:middle], shuffled[middle:]


def merge_prefixes(texts: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], dict[tuple[int, ...], int]]:
    """The texts that are not a prefix of another one, shortest first, and the row of them that contains each text.

    No position attends to later ones, so one forward pass of the longer text serves its prefixes too.
    """
    longest_of: dict[tuple[int, ...], tuple[int, ...]] = {}
    longest: tuple[int, ...] = ()
    for text in sorted(set(texts), reverse=True):  # a prefix comes right after the texts that continue it
        longest = longest if longest[: len(text)] == text else text
        longest_of[text] = longest
    rows = sorted(set(longest_of.values()), key=lambda row: (len(row), row))  # similar lengths need little padding
    number = {row: k for k, row in enumerate(rows)}
    return rows, {text: number[row] for text, row in longest_of.items()}


def batches(model: GPT, texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
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


class GatherIndex:
    """Where a batch needs logits: S positions of the flattened (B, T), and which of them each query uses."""

    def __init__(self, task: EvalTask, batch: list[int], T: int, device: torch.device) -> None:
        """The index for the task's texts `batch`, padded to T tokens."""
        rows = {row: k for k, row in enumerate(batch)}
        queries = [query for query in task.queries if query.row in rows]
        flat = torch.tensor([rows[query.row] * T + query.position for query in queries], device=device)
        self.positions, self.which = flat.unique(return_inverse=True)
        self.tokens = torch.tensor([query.token for query in queries], device=device)
        self.items = torch.tensor([query.item for query in queries])
        self.weights = torch.tensor([query.weight for query in queries], dtype=torch.float64)

    def gather(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "1 S C"]:
        """`x` at the S positions."""
        return x.flatten(0, 1)[self.positions][None]

    def score(self, logits: Float[Tensor, "1 S V"], n_items: int) -> NDArray[np.float64]:
        """What this batch adds to the score of each item."""
        log_p = logits[0].log_softmax(dim=-1)[self.which, self.tokens].cpu().double()
        scores = torch.zeros(n_items, dtype=torch.float64).index_add(0, self.items, self.weights * log_p)
        return np.asarray(scores)
