"""Autoregressive generation: sampling of the next token from the logits, with a KV cache.

A text longer than the context is continued by context shift: when the context is full, its older half is dropped and
the rest is encoded again from position 0 (`context_start`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model.gpt import GPT
from model.kv_cache import KVCache


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is sampled."""

    temperature: float = 1.0  # the logits are divided by it; 0 is greedy
    top_k: int = 0  # sample from the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # sample from the smallest set of most likely tokens with this total probability; 1 keeps all
    min_p: float = 0.0  # sample from the tokens with at least this fraction of the highest probability; 0 keeps all
    repetition_penalty: float = 1.0  # above 1, tokens of the text become less likely


def context_start(length: int, context: int) -> int:
    """Index of the first token in context for a text of `length` tokens: 0, or a multiple of half a context.

    Moving by half a context at a time, a cache has to be filled again only once every half context.
    """
    half = max(1, context // 2)
    return max(0, -(-(length - context) // half) * half)


def filter_logits(
    logits: Float[Tensor, "B V"], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float[Tensor, "B V"]:
    """Set the logits outside the top k, outside the nucleus of probability `top_p`, and of improbable tokens to -inf.

    Tokens tied for the k-th place are all kept. The most likely token is always in the nucleus (Holtzman et al. 2020,
    section 3.1). `min_p` is relative to the most likely token (Nguyen et al. 2024). The order is that of transformers.
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        outside = probabilities.cumsum(dim=-1) - probabilities >= top_p  # more likely tokens already reach top_p
        outside[:, 0] = False
        logits = logits.masked_fill(outside.gather(-1, order.argsort(dim=-1)), -torch.inf)
    if min_p > 0:
        probabilities = logits.softmax(dim=-1)
        is_improbable = probabilities < min_p * probabilities.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(is_improbable, -torch.inf)
    return logits


def penalize_repetition(logits: Float[Tensor, "B V"], text: Int[Tensor, "B N"], penalty: float) -> Float[Tensor, "B V"]:
    """Divide positive logits of the tokens in `text` by `penalty`, multiply negative ones (Keskar et al. 2019, section 4.1)."""
    seen = logits.gather(-1, text)
    return logits.scatter(-1, text, torch.where(seen < 0, seen * penalty, seen / penalty))


def sample_token(
    logits: Float[Tensor, "B V"], generator: torch.Generator, params: SamplingParams = SamplingParams()
) -> Int[Tensor, "B"]:
    """Sample one token per row from softmax(logits / temperature) after `filter_logits`; at temperature 0 the argmax.

    It is drawn on the generator's device. The cumulative distribution is inverted at one random number per row.
    torch.multinomial draws V of them instead, which takes a millisecond for 50,257 tokens.
    """
    if params.temperature < 1e-6:  # logits divided by less overflow
        return logits.argmax(dim=-1)
    logits = logits.to(generator.device)
    logits = filter_logits(logits.float() / params.temperature, params.top_k, params.top_p, params.min_p)
    probabilities = logits.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    uniform = torch.rand(len(cumulative), 1, dtype=torch.float64, device=cumulative.device, generator=generator)
    threshold = uniform * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0]  # right: skips probabilities of 0
    return tokens.clamp_max(logits.shape[-1] - 1)


def next_logits(model: GPT, text: Int[Tensor, "B N"], cache: KVCache | None = None) -> Float[Tensor, "B V"]:
    """Logits of the token after `text`, of which the tokens in context are encoded.

    With a cache of the same growing text, only the tokens after the cached ones are encoded; when the context shifts,
    the cache is filled again.
    """
    start = context_start(text.shape[1], model.config.context)
    tokens = text[:, start:]
    if cache is not None:
        if cache.start != start or cache.length >= tokens.shape[1]:
            cache.start, cache.length = start, 0
        tokens = tokens[:, cache.length :]
    return model.lm_head(model.hidden_states(tokens, cache)[:, -1])  # the LM head is applied to the last position only


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: Int[Tensor, "B N"],
    max_new_tokens: int,
    generator: torch.Generator,
    params: SamplingParams = SamplingParams(),
) -> Iterator[tuple[Int[Tensor, "B"], Float[Tensor, "B V"]]]:
    """Yield the next token of each row of `prompt`, which has at least one token, `max_new_tokens` times; and the model's
    logits, before any filter."""
    cache = KVCache(model.config, len(prompt), model.token_embedding.weight)
    text = prompt
    for _ in range(max_new_tokens):
        logits = penalized = next_logits(model, text, cache)
        if params.repetition_penalty != 1:
            penalized = penalize_repetition(logits.float(), text, params.repetition_penalty)
        tokens = sample_token(penalized, generator, params)
        text = torch.cat([text, tokens[:, None].to(text.device)], dim=1)
        yield tokens, logits
