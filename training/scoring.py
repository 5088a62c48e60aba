"""The loss of a text under a model, token by token, and its most surprising words."""

import json
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import DATA, UserError, escape_control_chars
from data.tokenizer import Tokenizer
from model.gpt import GPT

SHOWN_WORDS = 20
COLOURS = (
    (8.0, "\x1b[41;97m"),
    (5.0, "\x1b[31m"),
    (3.0, "\x1b[33m"),
    (1.0, "\x1b[36m"),
)  # nats of a token -> terminal colour


@torch.inference_mode()
def token_losses(model: GPT, tokens: list[int]) -> Tensor:
    """-log p in nats of each token after the first, (N - 1,).

    Windows of the model's context move by half of it, and each token is scored once: with all tokens before it, or with at
    least half a context of them.
    """
    context, device = model.config.context, model.token_embedding.weight.device
    losses, scored = [], 1
    for start in range(0, len(tokens), max(1, context // 2)):
        window = torch.tensor([tokens[start : start + context + 1]], device=device)
        logits = model(window[:, :-1])[0].float()
        loss = F.cross_entropy(logits, window[0, 1:], reduction="none")
        losses.append(loss[scored - start - 1 :].cpu())
        scored = start + window.shape[1]
        if scored >= len(tokens):
            break
    return torch.cat(losses)


@dataclass(frozen=True)
class Score:
    """A scored text: its tokens, and the loss of each in nats; None for a first token that nothing predicts."""

    words: list[bytes]
    ids: list[int]
    losses: list[float | None]
    n_bytes: int

    @property
    def total(self) -> float:
        return math.fsum(loss for loss in self.losses if loss is not None)

    @property
    def summary(self) -> dict[str, float]:
        """Loss, perplexity and bits per byte."""
        n_tokens = sum(loss is not None for loss in self.losses)
        loss, bits = self.total / n_tokens, self.total / math.log(2) / self.n_bytes
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {"tokens": n_tokens, "loss": loss, "perplexity": perplexity, "bits_per_byte": bits}

    def surprising_words(self) -> list[tuple[str, float]]:
        """The words with the highest sums of losses, (word, nats); a word begins where white space does."""
        words = list[tuple[bytes, float]]()
        for word, loss in zip(self.words, self.losses, strict=True):
            if words and word[:1].strip() and words[-1][0][-1:].strip():
                words[-1] = words[-1][0] + word, words[-1][1] + (loss or 0.0)
            elif word:
                words.append((word, loss or 0.0))
        ordered = sorted(words, key=lambda word: -word[1])[:SHOWN_WORDS]
        return [(word.decode("utf-8", "replace").strip(), loss) for word, loss in ordered]

    def coloured(self) -> str:
        """The text with terminal colours: the more nats a token costs, the brighter."""
        pieces = []
        for word, loss in zip(self.words, self.losses, strict=True):
            colour = next((code for least, code in COLOURS if (loss or 0.0) >= least), "")
            text = escape_control_chars(word.decode("utf-8", "replace"), keep="\n\t")
            pieces.append(f"{colour}{text}\x1b[0m" if colour else text)
        return "".join(pieces)

    def to_dict(self) -> dict[str, Any]:
        return {**self.summary, "token_ids": self.ids, "losses": self.losses}


def score_text(model: GPT, tokenizer: Tokenizer, text: str, starts_with_eot: bool) -> Score:
    """Score a text; with `starts_with_eot` its first token is predicted from end-of-text.

    Raises UserError (3) if the text is too short.
    """
    ids = tokenizer.encode(text).tolist()
    prefix = [tokenizer.end_of_text] if starts_with_eot else list(tokenizer.prompt_prefix)
    if len(prefix) + len(ids) < 2:
        raise UserError("the text to score is too short: it needs two tokens", DATA)
    losses: list[float | None] = [*token_losses(model, prefix + ids).tolist()]
    losses = losses if prefix else [None, *losses]
    return Score([tokenizer.token_bytes(token) for token in ids], ids, losses, len(text.encode()))


def print_score(score: Score, as_json: bool) -> None:
    """Print loss, perplexity, bits per byte and the most surprising words; on a terminal the text in colours."""
    if as_json:
        print(json.dumps(score.to_dict()))
        return
    numbers = score.summary
    if sys.stdout.isatty():
        print(score.coloured(), end="\n\n")
    loss = f"{numbers['loss']:.4f} nats/token, perplexity {numbers['perplexity']:,.2f}"
    print(f"{numbers['tokens']:,} tokens: {loss}, {numbers['bits_per_byte']:.4f} bits/byte")
    print("most surprising words, in nats:")
    for word, nats in score.surprising_words():
        print(f"  {nats:6.2f}  {escape_control_chars(word)}")
