"""Generation: the cache changes nothing, tokens are sampled as documented, the context shifts as documented."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import ATTENTION_IMPLEMENTATIONS
from model.generate import (
    SamplingParams,
    context_start,
    filter_logits,
    generate,
    next_logits,
    penalize_repetition,
    sample_token,
)
from model.gpt import GPT
from model.kv_cache import KVCache
from tests.model.helpers import PRESETS, VOCAB, random_model, random_tokens, same

SAMPLED, GREEDY = SamplingParams(), SamplingParams(temperature=0.0)


def generated(model: GPT, prompt: Tensor, n: int, params: SamplingParams = SAMPLED, seed: int = 0) -> Tensor:
    """The new tokens (B, n)."""
    steps = generate(model, prompt, n, torch.Generator().manual_seed(seed), params)
    return torch.stack([tokens for tokens, _ in steps], dim=1)


@pytest.mark.parametrize(
    ("preset", "attention"), [*zip(PRESETS, ATTENTION_IMPLEMENTATIONS, strict=True), ("n-grams", "sdpa")]
)
def test_greedy_takes_the_most_likely_token(preset: str, attention: Any) -> None:
    """In a batch of three, several contexts long: the same as without a cache."""
    model, text = random_model(preset, attention, context=16, n_layers=1), random_tokens(3, 5)
    greedy = generated(model, text, 64, GREEDY)
    assert len(greedy.unique()) > 3
    for params in (SamplingParams(top_k=1), SamplingParams(top_p=1e-9)):
        assert torch.equal(greedy, generated(model, text, 64, params))
    with torch.no_grad():
        for _ in range(64):
            text = torch.cat([text, next_logits(model, text).argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(greedy, text[:, 5:])


@pytest.mark.parametrize(
    ("preset", "context", "step"), [("glass", 1, 1), ("glass", 16, 3), ("gpt2", 5, 7), ("qwen3", 5, 2)]
)
def test_cache_follows_growing_text(preset: str, context: int, step: int) -> None:
    """By several tokens at a time; at, before and past the context."""
    model, text = random_model(preset, context=context), random_tokens(2, 3 * context + step)
    cache = KVCache(model.config, 2, model.token_embedding.weight)
    with torch.no_grad():
        for length in [*range(1, text.shape[1] + 1, step), text.shape[1], text.shape[1]]:  # at last no new token
            start = context_start(length, context)
            expected = model(text[:, start:length])[:, -1]
            same(next_logits(model, text[:, :length]), expected, 1e-5)
            same(next_logits(model, text[:, :length], cache), expected, 1e-5)


def test_decoding_encodes_one_token_at_a_time() -> None:
    """Except after a context shift, which encodes half a context again. The LM head gets one position."""
    model, encoded, projected = random_model("glass", context=16), [], []
    model.token_embedding.register_forward_pre_hook(lambda module, inputs: encoded.append(inputs[0].shape[1]))
    model.lm_head.register_forward_pre_hook(lambda module, inputs: projected.append(inputs[0].shape))
    generated(model, random_tokens(1, 5), 28)
    assert encoded == [5, *[1] * 11, 9, *[1] * 7, 9, *[1] * 7]
    assert set(projected) == {(1, 30)}


@given(st.integers(1, 300), st.integers(1, 3000))
@settings(max_examples=100, deadline=None)
def test_context_shift_keeps_half_to_full_context(context: int, length: int) -> None:
    start, half = context_start(length, context), max(1, context // 2)
    assert 0 <= start < length and length - start <= context
    assert start == 0 if length <= context else 2 * (length - start) >= context and start % half == 0
    following = context_start(length + 1, context)
    assert following == start or (following == start + half and length - start == context)  # only when it is full


def test_seed_decides_the_text() -> None:
    model, prompt = random_model("glass"), random_tokens(3, 4)
    first = generated(model, prompt, 20, seed=1)
    torch.manual_seed(6)
    assert torch.equal(first, generated(model, prompt, 20, seed=1))
    assert not torch.equal(first, generated(model, prompt, 20, seed=2))
    assert not torch.equal(first[0], first[1])
    assert first.shape == (3, 20) and first.min() >= 0 and first.max() < VOCAB


def kept(logits: list[float], **params: Any) -> list[int]:
    """The tokens that `filter_logits` keeps, with their logits unchanged."""
    before = torch.tensor([logits])
    after = filter_logits(before, **params)[0]
    allowed = after.isfinite()
    assert torch.equal(after[allowed], before[0, allowed])
    return allowed.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("probabilities", "top_k", "top_p", "expected"),
    [
        ([0.1, 0.4, 0.05, 0.25, 0.2], 1, 1.0, [1]),
        ([0.1, 0.4, 0.05, 0.25, 0.2], 3, 1.0, [1, 3, 4]),
        ([0.1, 0.4, 0.05, 0.25, 0.2], 1000, 1.0, [0, 1, 2, 3, 4]),
        ([0.2, 0.5, 0.2, 0.1], 2, 1.0, [0, 1, 2]),  # a tie for the last place
        ([0.2, 0.4, 0.05, 0.35], 0, 1.0, [0, 1, 2, 3]),
        ([0.2, 0.4, 0.05, 0.35], 0, 0.8, [0, 1, 3]),
        ([0.2, 0.4, 0.05, 0.35], 0, 0.7, [1, 3]),
        ([0.2, 0.4, 0.05, 0.35], 0, 0.0, [1]),
        ([0.4, 0.3, 0.2, 0.1], 2, 0.5, [0]),  # top_p applies to 4/7 and 3/7
    ],
)
def test_filter_keeps_top_k_and_nucleus(
    probabilities: list[float], top_k: int, top_p: float, expected: list[int]
) -> None:
    assert kept(torch.tensor(probabilities).log().tolist(), top_k=top_k, top_p=top_p) == expected


def test_smallest_temperatures_are_greedy() -> None:
    logits, generator = torch.tensor([[3.0, -40.0, 3.1, 0.0]]), torch.Generator()
    for temperature in (0.0, 1e-45, 1e-30, 1e-6):
        assert sample_token(logits, generator, SamplingParams(temperature)).item() == 2


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_token_frequencies_match_probabilities(temperature: float) -> None:
    """Chi-square test of 40,000 samples at p = 1e-4."""
    logits = torch.tensor([0.3, 1.2, -0.8, 0.0, -2.0, 0.9])
    generator = torch.Generator().manual_seed(8)
    counts = sample_token(logits.expand(40_000, 6), generator, SamplingParams(temperature)).bincount(minlength=6)
    expected = 40_000 * (logits / temperature).softmax(-1)
    assert ((counts - expected).square() / expected).sum() < 25.7  # 5 degrees of freedom


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "repetition_penalty"])
def test_filters_equal_those_of_transformers(name: str) -> None:
    """On 1,000 random rows, also with ties and logits of -inf."""
    from transformers.generation import logits_process as theirs

    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(1000, VOCAB, generator=generator)
    logits[:300] = logits[:300].round()  # ties
    logits[300:600, ::3] = -torch.inf
    text = torch.randint(VOCAB, (1000, 9), generator=generator)
    kinds: dict[str, Any] = {
        "top_k": (theirs.TopKLogitsWarper(7), filter_logits(logits, top_k=7)),
        "top_p": (theirs.TopPLogitsWarper(0.8), filter_logits(logits, top_p=0.8)),
        "min_p": (theirs.MinPLogitsWarper(0.1), filter_logits(logits, min_p=0.1)),
        "repetition_penalty": (theirs.RepetitionPenaltyLogitsProcessor(1.3), penalize_repetition(logits, text, 1.3)),
    }
    process, ours = kinds[name]
    expected = process(text, logits.clone())
    if name == "top_p":  # of tied tokens at the edge, either may be kept: the kept probabilities are the same
        ours, expected = ours.sort(dim=-1).values, expected.sort(dim=-1).values
    assert torch.equal(ours, expected)
