"""Questions with a known answer: does the model know it, and which head reads the word that decides it?

A probe is a text that breaks off where an answer is due, with the right and a wrong candidate, and the place
of the mention that decides between them. The corpus knows these places (`data/stories.py` labels them by
character); `locate` turns them into tokens, `measure` asks the model. `relations.py` weighs what comes of it, and
`scores.py` tables it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from inspection.activation_cache import observe, pad
from model.gpt import GPT

Span = tuple[int, int]


@dataclass(frozen=True)
class ContrastPair:
    """A text up to just before an answer, and what decides it."""

    kind: str
    tokens: tuple[int, ...]
    """The prompt; begins with end_of_text."""
    evidence: tuple[int, ...]
    """Positions in `tokens` of the mention that decides."""
    right: tuple[int, ...]
    wrong: tuple[int, ...]
    nearest: tuple[int, ...] = ()
    """Positions of the last noun before the answer; empty where it is unknown."""

    @property
    def length(self) -> int:
        """Positions that the model has to read: prompt and longer candidate, without its last token."""
        return len(self.tokens) + max(len(self.right), len(self.wrong)) - 1


def locate(
    kind: str,
    text: str,
    answer: Span,
    evidence: Sequence[Span],
    wrong: str,
    encode: Callable[[str], Sequence[int]],
    token_bytes: Callable[[int], bytes],
    end_of_text: int,
    nouns: Sequence[Span] = (),
) -> ContrastPair:
    """From spans of characters to positions of tokens.

    A token belongs to a mention if it overlaps it by a byte or more.

    Args:
        answer: where in `text` the right answer stands, leading space included; the prompt ends before it.
        evidence: where the mentions that decide stand, all before the answer.
        wrong: the other candidate, as it would be written in the answer's place.
        nouns: where nouns stand before the answer, if that is known; the last of them is the nearest.

    Raises:
        ValueError: if the spans do not fit the text, the candidates are the same, or the tokenizer
            keeps neither the border between prompt and answer nor the bytes of the prompt.
    """
    before = [0 <= start < end <= answer[0] for start, end in (*evidence, *nouns)]
    if not (evidence and all(before) and answer[0] < answer[1] <= len(text)):
        spans = f"evidence {evidence}, nouns {nouns} and answer {answer}"
        raise ValueError(f"{spans} do not fit {len(text)} characters of text")
    prompt = list(encode(text[: answer[0]]))
    candidates = []
    for candidate in (text[answer[0] : answer[1]], wrong):
        tokens = list(encode(candidate))
        if not tokens or prompt + tokens != list(encode(text[: answer[0]] + candidate)):
            raise ValueError(f"the tokenizer does not keep {candidate!r} apart from the text before it")
        candidates.append(tuple(tokens))
    if candidates[0] == candidates[1]:
        raise ValueError(f"both candidates are {wrong!r}")
    pieces = [token_bytes(token) for token in prompt]
    if b"".join(pieces) != text[: answer[0]].encode():
        raise ValueError("the tokenizer does not keep the text's bytes")
    mentions = _overlapping(text, evidence, pieces)
    nearest = _overlapping(text, [max(nouns, key=lambda span: span[1])], pieces) if nouns else ()
    right, other = candidates
    return ContrastPair(kind, (end_of_text, *prompt), mentions, right, other, nearest)


def _overlapping(text: str, spans: Sequence[Span], pieces: Sequence[bytes]) -> tuple[int, ...]:
    """Positions of the tokens, whose bytes are `pieces`, that overlap spans of characters."""
    in_bytes = [tuple(len(text[:character].encode()) for character in span) for span in spans]
    ends = list(accumulate(map(len, pieces)))
    tokens = enumerate(zip([0, *ends[:-1]], ends, strict=True), 1)  # position 0 is end_of_text
    return tuple(k for k, (start, end) in tokens if any(start < last and end > first for first, last in in_bytes))


def _rows(texts: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The texts, without those that only begin another one; and the row that shows each text.

    No position sees what comes later, so the longer text shows what the shorter one would. The questions about one
    story, asked at its several places, become one row or two.
    """
    shown: dict[tuple[int, ...], tuple[int, ...]] = {}
    longest: tuple[int, ...] = ()
    for text in sorted(set(texts), reverse=True):  # whatever goes on from a text comes just before it
        longest = longest if longest[: len(text)] == text else text
        shown[text] = longest
    rows = sorted(set(shown.values()), key=lambda row: (len(row), row))  # like lengths need little padding
    number = {row: k for k, row in enumerate(rows)}
    return rows, [number[shown[text]] for text in texts]


def _read(
    model: GPT, rows: Sequence[tuple[int, ...]], asked: Sequence[tuple[int, ContrastPair, tuple[int, ...]]]
) -> tuple[Float[Tensor, " A"], Float[Tensor, "A L H"]]:
    """log p, in nats, of A answers (row, probe, candidate), and each head's weight on their evidence."""
    tokens = pad(rows)
    row = [k for k, _, _ in asked]
    last = [len(probe.tokens) - 1 for _, probe, _ in asked]
    evidence = torch.zeros(len(asked), tokens.shape[1], device=model.token_embedding.weight.device)
    for a, (_, probe, _) in enumerate(asked):
        evidence[a, list(probe.evidence)] = 1
    found: list[Tensor] = []

    def watch(layer: int, weights: Tensor) -> None:
        found.append((weights[row, :, last] * evidence[:, None]).sum(dim=-1))

    logits = observe(model, tokens, watch)
    each = [(a, row[a], last[a] + k, token) for a, (_, _, answer) in enumerate(asked) for k, token in enumerate(answer)]
    owner, at_row, position, token = (list(column) for column in zip(*each, strict=True))
    scores = logits[at_row, position].log_softmax(dim=-1)[torch.arange(len(each)), token]
    log_probs = scores.new_zeros(len(asked)).index_add(0, torch.tensor(owner, device=scores.device), scores)
    return log_probs.cpu(), torch.stack(found, dim=1).cpu()


def measure(
    model: GPT, probes: Sequence[ContrastPair], batch_size: int = 16
) -> tuple[Float[Tensor, " P"], Float[Tensor, "P L H"]]:
    """Ask the model P questions.

    Returns:
        log p(right) - log p(wrong) in nats, each summed over the candidate's tokens; and each head's weight on the
        evidence at the prompt's last position, where the answer is due. Both on the CPU.

    Raises:
        ValueError: if a probe is longer than the model's context.
    """
    answers = [(probe, answer) for probe in probes for answer in (probe.right, probe.wrong)]
    rows, shown_by = _rows([probe.tokens + answer[:-1] for probe, answer in answers])
    log_probs = torch.empty(len(answers))
    weights = torch.empty(len(answers), model.config.n_layers, model.config.n_heads)
    for start in range(0, len(rows), batch_size):
        mine = [a for a, row in enumerate(shown_by) if start <= row < start + batch_size]
        asked = [(shown_by[a] - start, *answers[a]) for a in mine]
        log_probs[mine], weights[mine] = _read(model, rows[start : start + batch_size], asked)
    return log_probs[::2] - log_probs[1::2], weights[::2]
