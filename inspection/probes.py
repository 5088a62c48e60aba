"""Does the model know the answer, and which head reads the word that decides it?

A probe is a text that breaks off where an answer is due, with the right and a wrong candidate, and the place
of the mention that decides between them. The corpus knows these places (`data/stories.py` labels them by
character); `locate` turns them into tokens, `examine` asks the model, `sentence` says the outcome in words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from inspection.capture import observe, pad
from inspection.words import head_name
from model.gpt import GPT

Span = tuple[int, int]

READS_IT = 0.5
"""A head that puts at least this share of its weight on the evidence reads it."""
DECIDERS = {
    "pronoun": "the name that decides it",
    "agreement": "the subject that decides it",
    "induction": "the earlier mention",
    "place": "the place that decides it",
    "cause": "the feeling that decides it",
    "crossing": "the noun that decides it",
}
DISCLAIMER = "Weights show what is read, not why."


@dataclass(frozen=True)
class Probe:
    """A text up to just before an answer, and what decides it."""

    kind: str
    tokens: tuple[int, ...]
    """The prompt; begins with end_of_text."""
    evidence: tuple[int, ...]
    """Positions in `tokens` of the mention that decides."""
    right: tuple[int, ...]
    wrong: tuple[int, ...]

    @property
    def length(self) -> int:
        """Positions that the model has to read: prompt and longer candidate, without its last token."""
        return len(self.tokens) + max(len(self.right), len(self.wrong)) - 1


@dataclass(frozen=True)
class Reading:
    """What the probes of one kind have shown."""

    kind: str
    count: int
    preferred: float
    """Share of probes in which log p(right) > log p(wrong), each summed over the candidate's tokens."""
    head: tuple[int, int]
    """(layer, head), the one that reads the evidence most, chosen on the even probes."""
    weight: float
    """Its mean weight on the evidence tokens at the last position of the prompt, over the odd probes."""

    @property
    def passes(self) -> bool:
        return self.weight >= READS_IT


def locate(
    kind: str,
    text: str,
    answer: Span,
    evidence: Sequence[Span],
    wrong: str,
    encode: Callable[[str], Sequence[int]],
    token_bytes: Callable[[int], bytes],
    end_of_text: int,
) -> Probe:
    """From spans of characters to positions of tokens.

    A token belongs to the evidence if it overlaps it by a byte or more.

    Args:
        answer: where in `text` the right answer stands, leading space included; the prompt ends before it.
        evidence: where the mentions that decide stand, all before the answer.
        wrong: the other candidate, as it would be written in the answer's place.

    Raises:
        ValueError: if the spans do not fit the text, the candidates are the same, or the tokenizer
            keeps neither the border between prompt and answer nor the bytes of the prompt.
    """
    before = [0 <= start < end <= answer[0] for start, end in evidence]
    if not (before and all(before) and answer[0] < answer[1] <= len(text)):
        raise ValueError(f"evidence {evidence} and answer {answer} do not fit {len(text)} characters of text")
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
    mentions = [tuple(len(text[:character].encode()) for character in span) for span in evidence]
    ends = list(accumulate(map(len, pieces)))
    spans = enumerate(zip([0, *ends[:-1]], ends, strict=True), 1)  # position 0 is end_of_text
    overlapping = tuple(k for k, (start, end) in spans if any(start < last and end > first for first, last in mentions))
    return Probe(kind, (end_of_text, *prompt), overlapping, *candidates)


def _log_probs(
    logits: Float[Tensor, "R T V"],
    rows: Sequence[int],
    starts: Sequence[int],
    answers: Sequence[tuple[int, ...]],
) -> Float[Tensor, " P"]:
    """log p of each answer, in nats: answer p follows position starts[p] of row rows[p]."""
    owner, row, position, token = zip(
        *((p, rows[p], starts[p] + k, t) for p, answer in enumerate(answers) for k, t in enumerate(answer)),
        strict=True,
    )
    scores = logits[list(row), list(position)].log_softmax(dim=-1)
    scores = scores[torch.arange(len(token)), list(token)]
    return scores.new_zeros(len(answers)).index_add(0, torch.tensor(owner, device=scores.device), scores)


def _read(model: GPT, probes: Sequence[Probe]) -> tuple[Float[Tensor, " P"], Float[Tensor, "P L H"]]:
    """log p(right) - log p(wrong) in nats and each head's weight on the evidence, for a batch of P."""
    prompts = [probe.tokens for probe in probes]
    # Candidates of one token each need the prompt alone: dict keys hold such a text once.
    rows: dict[tuple[int, ...], int] = {}
    right = [rows.setdefault(probe.tokens + probe.right[:-1], len(rows)) for probe in probes]
    wrong = [rows.setdefault(probe.tokens + probe.wrong[:-1], len(rows)) for probe in probes]
    tokens = pad(list(rows))
    last = [len(prompt) - 1 for prompt in prompts]
    evidence = torch.zeros(len(probes), tokens.shape[1], device=model.token_embedding.weight.device)
    for p, probe in enumerate(probes):
        evidence[p, list(probe.evidence)] = 1
    found: list[Tensor] = []

    def watch(layer: int, weights: Tensor) -> None:
        found.append((weights[right, :, last] * evidence[:, None]).sum(dim=-1))

    logits = observe(model, tokens, watch)
    margin = _log_probs(logits, right, last, [probe.right for probe in probes])
    margin = margin - _log_probs(logits, wrong, last, [probe.wrong for probe in probes])
    return margin.cpu(), torch.stack(found, dim=1).cpu()


def examine(model: GPT, probes: Sequence[Probe], batch_size: int = 16) -> list[Reading]:
    """Ask the model every probe; one `Reading` for each kind, in the order in which the kinds first come.

    The head is chosen on the even probes of a kind and its weight reported on the odd ones, so that choosing
    among L * H heads does not flatter it.

    Probes longer than the model's context are left out, and so is a kind of which fewer than two fit.
    """
    fitting = [probe for probe in probes if probe.length <= model.config.context]
    if not fitting:
        return []
    order = sorted(range(len(fitting)), key=lambda k: fitting[k].length)  # like lengths need little padding
    margins = torch.empty(len(fitting))
    weights = torch.empty(len(fitting), model.config.n_layers, model.config.n_heads)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        margins[batch], weights[batch] = _read(model, [fitting[k] for k in batch])
    readings = []
    for kind in dict.fromkeys(probe.kind for probe in fitting):
        mine = [k for k, probe in enumerate(fitting) if probe.kind == kind]
        if len(mine) < 2:
            continue
        best = int(weights[mine[::2]].mean(dim=0).argmax())
        layer, head = divmod(best, model.config.n_heads)
        weight = weights[mine[1::2], layer, head].mean().item()
        preferred = (margins[mine] > 0).float().mean().item()
        readings.append(Reading(kind, len(mine), preferred, (layer, head), weight))
    return readings


def sentence(readings: Sequence[Reading]) -> list[str]:
    """The outcome in words: a line for each reading, then one that says what weights cannot tell."""
    lines = []
    for reading in readings:
        name = head_name(*reading.head)
        outcome = f"no head puts half of its weight on the deciding word (best {name}, {reading.weight:.2f})"
        if reading.passes:
            decider = DECIDERS.get(reading.kind, "the word that decides it")
            outcome = f"head {name} reads {decider} ({reading.weight:.2f})"
        lines.append(f"{reading.kind}: right in {reading.preferred:.1%} of {reading.count}; {outcome}")
    return [*lines, DISCLAIMER]
