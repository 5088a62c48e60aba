"""Writing text: logits → a token → the text, one longer. Pure functions with an explicit generator.

A text that outgrows the context goes on by one rule, with and without a cache (`window_start`): when the window is
full, its older half is let go and the rest is read anew from position 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model.gpt import GPT
from model.kv_cache import KVCache
from model.recorded import Record, RecordedReading


def window_start(length: int, context: int) -> int:
    """First position that the model reads in a text of `length` tokens.

    0 while the text fits; after that the start moves on by half a context at a time, so that between half a
    context and a whole one is always read, and a cache has to be filled anew only once in half a context.
    """
    if length <= context:
        return 0
    half = max(1, context // 2)
    return -(-(length - context) // half) * half


def filter_logits(logits: Float[Tensor, "B V"], top_k: int = 0, top_p: float = 1.0) -> Float[Tensor, "B V"]:
    """Set to -inf what may not be drawn: all but the `top_k` best, and all beyond the nucleus of mass `top_p`.

    The nucleus is the smallest set of most likely tokens whose probabilities reach top_p (Holtzman et al. 2020,
    section 3.1). `top_k` 0 or above the vocabulary keeps all; so does `top_p` 1.
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        beyond = probability.cumsum(dim=-1) - probability >= top_p  # the mass of all better ones is enough
        beyond[:, 0] = False  # the best is always kept
        logits = logits.masked_fill(beyond.gather(-1, order.argsort(dim=-1)), -torch.inf)
    return logits


def next_token(
    logits: Float[Tensor, "B V"],
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Tensor, "B"]:
    """Draw one token a row from softmax(logits / temperature), after `filter_logits`; temperature 0 takes the best."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probability = filter_logits(logits.float() / temperature, top_k, top_p).softmax(dim=-1)
    return draw(probability, generator)


def draw(probability: Float[Tensor, "B V"], generator: torch.Generator) -> Int[Tensor, "B"]:
    """Draw one index a row by inverting the row's distribution function at one random number.

    torch.multinomial draws V random numbers for that, a millisecond for 50,257 tokens.
    """
    reached = probability.cumsum(dim=-1, dtype=torch.float64)
    aim = torch.rand(len(reached), 1, dtype=torch.float64, device=reached.device, generator=generator)
    found = torch.searchsorted(reached, aim * reached[:, -1:], right=True)[:, 0]  # right: never one of probability 0
    return found.clamp_max(probability.shape[-1] - 1)


def last_logits(
    model: GPT, text: Int[Tensor, "B N"], cache: KVCache | None = None, recorded: RecordedReading | None = None
) -> Float[Tensor, "B V"]:
    """Logits of the token after `text`. A cache that holds the beginning of the window saves reading it again.

    The cache belongs to one growing text: it is filled anew whenever the window moves. `recorded` reads a single token
    instead of the model; it has the same cache.
    """
    start = window_start(text.shape[1], model.config.context)
    window = text[:, start:]
    if cache is None:
        return newest_logits(model, window)
    if cache.start != start or cache.length >= window.shape[1]:  # the window has moved, and with it every position
        cache.clear(start)
    new = window[:, cache.length :]
    return recorded(new) if recorded and new.shape[1] == 1 else newest_logits(model, new, cache)


def newest_logits(model: GPT, tokens: Int[Tensor, "B T"], cache: KVCache | None = None) -> Float[Tensor, "B V"]:
    """`model(tokens, cache)` at the last position: of a long prompt the head, the largest matrix, reads that one."""
    return model.head(model.features(tokens, cache)[:, -1])


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: Int[Tensor, "B N"],
    count: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    use_cache: bool = True,
    record: Record | None = None,
) -> Iterator[Int[Tensor, "B"]]:
    """Yield `count` times the next token of each row of `prompt` (at least one token long).

    Args:
        record: how single tokens are recorded and replayed (`model/recorded.py`); without it they are computed.
    """
    text = torch.empty(prompt.shape[0], prompt.shape[1] + count, dtype=torch.long, device=prompt.device)
    text[:, : prompt.shape[1]] = prompt
    cache = KVCache(model.config, prompt.shape[0], model.token_embedding.weight) if use_cache else None
    recorded = RecordedReading(model, cache, record) if cache and record else None
    for end in range(prompt.shape[1], text.shape[1]):
        logits = last_logits(model, text[:, :end], cache, recorded)
        text[:, end] = next_token(logits, generator, temperature, top_k, top_p)
        yield text[:, end]
