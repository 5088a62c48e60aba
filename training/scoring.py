"""`sample.py --score FILE`: the loss of a text, token by token, and its most surprising words."""

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import DATA, UserError, escape_control_chars
from data.tokenizer import Tokenizer
from model.gpt import GPT

SHOWN_WORDS = 20
RED, PLAIN = "\x1b[31m", "\x1b[0m"  # terminal colours


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


def score_text(model: GPT, tokenizer: Tokenizer, text: str, starts_with_eot: bool) -> dict[str, Any]:
    """Number of tokens, loss in nats/token, perplexity, bits per byte, token ids, and the loss of each token: None for a
    first one that nothing predicts. With `starts_with_eot` it is predicted from end-of-text.

    Raises UserError (3) if the text is too short.
    """
    ids = tokenizer.encode(text).tolist()
    prefix = [tokenizer.end_of_text] if starts_with_eot else list(tokenizer.prompt_prefix)
    if len(prefix) + len(ids) < 2:
        raise UserError("the text to score is too short: it needs two tokens", DATA)
    losses = token_losses(model, prefix + ids).tolist()[max(0, len(prefix) - 1) :]
    total, loss = math.fsum(losses), math.fsum(losses) / len(losses)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    bits_per_byte = total / math.log(2) / len(text.encode())
    numbers = {"tokens": len(losses), "loss": loss, "perplexity": perplexity, "bits_per_byte": bits_per_byte}
    return {**numbers, "token_ids": ids, "losses": losses if prefix else [None, *losses]}


def sum_over_words(tokens: Sequence[bytes], losses: Sequence[float | None]) -> list[tuple[str, float]]:
    """The words of a text in order, each with the sum of its tokens' losses; a word begins where white space does."""
    words = list[tuple[bytes, float]]()
    for token, loss in zip(tokens, losses, strict=True):
        if words and token[:1].strip() and words[-1][0][-1:].strip():
            words[-1] = words[-1][0] + token, words[-1][1] + (loss or 0.0)
        else:
            words.append((token, loss or 0.0))
    return [(escape_control_chars(word.decode("utf-8", "replace"), keep="\n\t"), loss) for word, loss in words]


def print_score(score: dict[str, Any], tokenizer: Tokenizer, as_json: bool) -> None:
    """Print loss, perplexity, bits per byte and the most surprising words; on a terminal also the text, with them in red."""
    if as_json:
        print(json.dumps(score))
        return
    words = sum_over_words([tokenizer.token_bytes(token) for token in score["token_ids"]], score["losses"])
    surprising = sorted(range(len(words)), key=lambda k: -words[k][1])[:SHOWN_WORDS]
    if sys.stdout.isatty():
        text = (f"{RED}{word}{PLAIN}" if k in surprising else word for k, (word, _) in enumerate(words))
        print("".join(text), end="\n\n")
    numbers = "{tokens:,} tokens: {loss:.4f} nats/token, perplexity {perplexity:,.2f}, {bits_per_byte:.4f} bits/byte"
    print(numbers.format(**score), "most surprising words, in nats:", sep="\n")
    for word, loss in (words[k] for k in surprising):
        print(f"  {loss:6.2f}  {word.strip()}")
