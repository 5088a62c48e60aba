"""Contrast pairs: a prompt, a right and a wrong answer, and the antecedent that decides between them.

Such pairs show whether the model knows the answer, and which head attends to the antecedent. The corpus labels both by
character (`data/stories.py`); `make_contrast_pair` turns them into token positions and `score_pairs` runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from inspection.activation_cache import pad, run_with_hooks
from model.gpt import GPT

CharSpan = tuple[int, int]
"""First character, and the one after the last."""
BATCH_SIZE = 16


@runtime_checkable
class Tokenizer(Protocol):
    """The part of `data.tokenizer.Tokenizer` that is needed here."""

    @property
    def end_of_text(self) -> int: ...
    def encode(self, text: str) -> Any: ...
    def token_bytes(self, token: int) -> bytes: ...


@dataclass(frozen=True)
class LabelledText:
    """A text with an answer whose antecedent is known, by character."""

    kind: str
    text: str
    answer: CharSpan
    """The right answer in `text`, leading space included; the prompt ends before it."""
    antecedent: Sequence[CharSpan]
    """The mentions that decide the answer, all before it."""
    wrong: str
    """The wrong answer, as it would be written in place of the right one."""
    nouns: Sequence[CharSpan] = ()
    """The nouns before the answer, if they are known."""


@dataclass(frozen=True)
class ContrastPair:
    """A prompt with a right and a wrong answer, in tokens."""

    kind: str
    tokens: tuple[int, ...]
    """The prompt; begins with end_of_text."""
    antecedent: tuple[int, ...]
    """Positions in `tokens` of the mention that decides the answer."""
    right: tuple[int, ...]
    wrong: tuple[int, ...]
    nearest_noun: tuple[int, ...] = ()
    """Positions of the last noun before the answer; empty if unknown."""

    @property
    def length(self) -> int:
        """Number of positions the model needs: prompt and longer answer, without its last token."""
        return len(self.tokens) + max(len(self.right), len(self.wrong)) - 1


def make_contrast_pair(label: LabelledText, tokenizer: Tokenizer) -> ContrastPair:
    """From character spans to token positions. A token belongs to a span if they overlap by a byte or more.

    Raises:
        ValueError: if the spans do not fit the text, both answers are the same, or the tokenizer merges prompt and
            answer or changes the bytes of the prompt.
    """
    text, (start, end) = label.text, label.answer
    spans = [*label.antecedent, *label.nouns]
    if not label.antecedent or not start < end <= len(text) or not all(0 <= a < b <= start for a, b in spans):
        where = f"antecedent {label.antecedent}, nouns {label.nouns} and answer {label.answer}"
        raise ValueError(f"{where} do not fit {len(text)} characters of text")
    prompt = [int(token) for token in tokenizer.encode(text[:start])]
    answers = []
    for answer in (text[start:end], label.wrong):
        tokens = [int(token) for token in tokenizer.encode(answer)]
        if not tokens or prompt + tokens != [int(token) for token in tokenizer.encode(text[:start] + answer)]:
            raise ValueError(f"the tokenizer merges {answer!r} with the text before it")
        answers.append(tuple(tokens))
    if answers[0] == answers[1]:
        raise ValueError(f"both answers are {label.wrong!r}")
    pieces = [tokenizer.token_bytes(token) for token in prompt]
    if b"".join(pieces) != text[:start].encode():
        raise ValueError("the tokenizer changes the bytes of the text")
    nearest = [max(label.nouns, key=lambda span: span[1])] if label.nouns else []
    antecedent, nearest_noun = _overlapping(text, label.antecedent, pieces), _overlapping(text, nearest, pieces)
    return ContrastPair(label.kind, (tokenizer.end_of_text, *prompt), antecedent, answers[0], answers[1], nearest_noun)


def _overlapping(text: str, spans: Sequence[CharSpan], pieces: Sequence[bytes]) -> tuple[int, ...]:
    """Positions of the tokens, whose bytes are `pieces`, that overlap character spans."""
    in_bytes = [tuple(len(text[:character].encode()) for character in span) for span in spans]
    ends = list(accumulate(map(len, pieces)))
    tokens = enumerate(zip([0, *ends[:-1]], ends, strict=True), 1)  # position 0 is end_of_text
    return tuple(k for k, (start, end) in tokens if any(start < last and end > first for first, last in in_bytes))


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


def score_pairs(model: GPT, pairs: Sequence[ContrastPair]) -> tuple[Float[Tensor, " P"], Float[Tensor, "P L H"]]:
    """The logit difference and every head's attention to the antecedent, for P contrast pairs.

    Returns:
        log p(right) - log p(wrong) in nats, each summed over the answer's tokens; and each head's total attention to
        the antecedent from the prompt's last position, where the answer is predicted. Both on the CPU.

    Raises:
        ValueError: if a pair is longer than the model's context.
    """
    answers = [(pair, answer) for pair in pairs for answer in (pair.right, pair.wrong)]
    rows, row_of = merge_prefixes([pair.tokens + answer[:-1] for pair, answer in answers])
    row_numbers = [row_of[pair.tokens + answer[:-1]] for pair, answer in answers]
    log_probs = torch.empty(len(answers))
    attention = torch.empty(len(answers), model.config.n_layers, model.config.n_heads)
    for start in range(0, len(rows), BATCH_SIZE):
        batch = [a for a, row in enumerate(row_numbers) if start <= row < start + BATCH_SIZE]
        queries = [(row_numbers[a] - start, *answers[a]) for a in batch]
        log_probs[batch], attention[batch] = _score_batch(model, rows[start : start + BATCH_SIZE], queries)
    return log_probs[::2] - log_probs[1::2], attention[::2]


def _score_batch(
    model: GPT, rows: Sequence[tuple[int, ...]], queries: Sequence[tuple[int, ContrastPair, tuple[int, ...]]]
) -> tuple[Float[Tensor, " A"], Float[Tensor, "A L H"]]:
    """log p in nats of A answers (row, pair, answer), and each head's attention to their antecedents."""
    tokens = pad(rows)
    row = [k for k, _, _ in queries]
    last = [len(pair.tokens) - 1 for _, pair, _ in queries]
    antecedent = torch.zeros(len(queries), tokens.shape[1], device=model.token_embedding.weight.device)
    for a, (_, pair, _) in enumerate(queries):
        antecedent[a, list(pair.antecedent)] = 1
    layers: list[Tensor] = []

    def hook(layer: int, activations: dict[str, Tensor]) -> None:
        layers.append((activations["pattern"][row, :, last] * antecedent[:, None]).sum(dim=-1))

    logits = run_with_hooks(model, tokens, hook)
    flat = [
        (a, row[a], last[a] + k, token) for a, (_, _, answer) in enumerate(queries) for k, token in enumerate(answer)
    ]
    owner, at_row, position, target = (list(column) for column in zip(*flat, strict=True))
    scores = logits[at_row, position].log_softmax(dim=-1)[torch.arange(len(flat)), target]
    log_probs = scores.new_zeros(len(queries)).index_add(0, torch.tensor(owner, device=scores.device), scores)
    return log_probs.cpu(), torch.stack(layers, dim=1).cpu()
