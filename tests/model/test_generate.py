"""Generation: the cache changes nothing, tokens are sampled as documented, the context shifts as documented."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import ATTENTION_IMPLEMENTATIONS, AttentionImplementation
from model.generate import SamplingParams, context_start, filter_logits, generate, next_logits, sample_token
from model.gpt import GPT
from model.kv_cache import KVCache
from tests.model.helpers import PRESETS, VOCAB, random_model, random_tokens, same

DEFAULT, GREEDY = SamplingParams(), SamplingParams(temperature=0.0)


def generated(
    model: GPT, prompt: Tensor, n: int, params: SamplingParams = DEFAULT, seed: int = 0, use_cache: bool = True
) -> Tensor:
    """The new tokens (B, n)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(list(generate(model, prompt, n, generator, params, use_cache)), dim=1)


# Cache and context shift.


@pytest.mark.parametrize(("preset", "attention"), list(zip(PRESETS, ATTENTION_IMPLEMENTATIONS, strict=True)))
def test_cache_changes_no_token(preset: str, attention: AttentionImplementation) -> None:
    """Greedy tokens, several contexts long, in a batch of three."""
    model, prompt = random_model(preset, attention, context=16, n_layers=1), random_tokens(3, 5)
    cached = generated(model, prompt, 64, GREEDY)
    assert torch.equal(cached, generated(model, prompt, 64, GREEDY, use_cache=False))
    assert len(cached.unique()) > 3


@pytest.mark.parametrize(
    ("preset", "context", "step"), [("glass", 1, 1), ("glass", 16, 3), ("gpt2", 5, 7), ("qwen3", 5, 2)]
)
def test_cache_follows_growing_text(preset: str, context: int, step: int) -> None:
    """By several tokens at a time; at, before and past the context."""
    model, text = random_model(preset, context=context), random_tokens(2, 3 * context + step)
    cache = KVCache(model.config, 2, model.token_embedding.weight)
    with torch.no_grad():
        for length in range(1, text.shape[1] + 1, step):
            same(next_logits(model, text[:, :length], cache), next_logits(model, text[:, :length]), 1e-5)
        for _ in range(2):  # the second time there is no new token
            same(next_logits(model, text, cache), next_logits(model, text), 1e-5)


def test_decoding_encodes_one_token_at_a_time() -> None:
    """Except after a context shift, which encodes half a context again. The LM head gets one position."""
    model, encoded, projected = random_model("glass", context=16), [], []
    model.token_embedding.register_forward_pre_hook(lambda module, inputs: encoded.append(inputs[0].shape[1]))
    model.lm_head.register_forward_pre_hook(lambda module, inputs: projected.append(inputs[0].shape))
    generated(model, random_tokens(1, 5), 28)
    assert encoded == [5, *[1] * 11, 9, *[1] * 7, 9, *[1] * 7]
    assert set(projected) == {(1, 30)}


def test_long_prompt_is_cut_to_context() -> None:
    model, prompt = random_model("gpt2", context=8), random_tokens(2, 50)
    first = generated(model, prompt, 5, GREEDY)
    assert torch.equal(first, generated(model, prompt[:, 40:], 5, GREEDY))
    other = prompt.clone()
    other[:, : context_start(50, 8)] = 0
    assert torch.equal(first, generated(model, other, 5, GREEDY))


@given(st.integers(1, 300), st.integers(1, 3000))
@settings(max_examples=100, deadline=None)
def test_context_shift_keeps_half_to_full_context(context: int, length: int) -> None:
    start, half = context_start(length, context), max(1, context // 2)
    assert 0 <= start < length and length - start <= context
    if length <= context:
        assert start == 0
    else:
        assert 2 * (length - start) >= context and start % half == 0
    assert start <= context_start(length + 1, context) <= start + half
    if context_start(length + 1, context) > start:
        assert length - start == context  # it shifts only when the context is full


# Sampling.


@pytest.mark.parametrize("use_cache", [True, False])
def test_seed_decides_the_text(use_cache: bool) -> None:
    model, prompt = random_model("glass"), random_tokens(3, 4)
    original = prompt.clone()
    torch.manual_seed(5)
    first = generated(model, prompt, 20, seed=1, use_cache=use_cache)
    torch.manual_seed(6)
    assert torch.equal(first, generated(model, prompt, 20, seed=1, use_cache=use_cache))
    assert not torch.equal(first, generated(model, prompt, 20, seed=2, use_cache=use_cache))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(prompt, original) and first.shape == (3, 20) and first.min() >= 0 and first.max() < VOCAB


def test_greedy_takes_the_most_likely_token() -> None:
    model, text = random_model("glass"), random_tokens(2, 4)
    greedy = generated(model, text, 8, GREEDY)
    with torch.no_grad():
        for _ in range(8):
            text = torch.cat([text, model(text)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(greedy, text[:, 4:])
    assert torch.equal(greedy, generated(model, text[:, :4], 8, SamplingParams(top_k=1)))
    assert torch.equal(greedy, generated(model, text[:, :4], 8, SamplingParams(top_p=1e-9)))


def kept(logits: list[float], **params: Any) -> list[int]:
    """The tokens that `filter_logits` keeps, with their logits unchanged."""
    before = torch.tensor([logits])
    after = filter_logits(before, **params)[0]
    allowed = after.isfinite()
    assert torch.equal(after[allowed], before[0, allowed])
    return allowed.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("logits", "top_k", "expected"),
    [
        ([0.5, 3.0, -1.0, 2.0, 1.0], 1, [1]),
        ([0.5, 3.0, -1.0, 2.0, 1.0], 3, [1, 3, 4]),
        ([0.5, 3.0, -1.0, 2.0, 1.0], 1000, [0, 1, 2, 3, 4]),
        ([1.0, 2.0, 1.0, 0.0], 2, [0, 1, 2]),  # a tie for the last place
    ],
)
def test_top_k_keeps_the_most_likely(logits: list[float], top_k: int, expected: list[int]) -> None:
    assert kept(logits, top_k=top_k) == expected


@pytest.mark.parametrize(("top_p", "expected"), [(1.0, [0, 1, 2, 3]), (0.8, [0, 1, 3]), (0.7, [1, 3]), (0.0, [1])])
def test_top_p_keeps_the_smallest_nucleus(top_p: float, expected: list[int]) -> None:
    assert kept(torch.tensor([0.2, 0.4, 0.05, 0.35]).log().tolist(), top_p=top_p) == expected


def test_top_p_applies_to_what_top_k_kept() -> None:
    """Of 0.4, 0.3, 0.2, 0.1 the top 2 have 4/7 and 3/7, so the first alone reaches 0.5."""
    assert kept(torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist(), top_k=2, top_p=0.5) == [0]


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30), st.integers(0, 40), st.floats(0, 1, width=32))
@settings(max_examples=50, deadline=None)
def test_filter_keeps_at_least_the_most_likely(logits: list[float], top_k: int, top_p: float) -> None:
    allowed = kept(logits, top_k=top_k, top_p=top_p)
    assert allowed
    dropped = [value for i, value in enumerate(logits) if i not in allowed]
    assert not dropped or max(dropped) <= min(logits[i] for i in allowed)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_token_frequencies_match_probabilities(temperature: float) -> None:
    """Chi-square test of 40,000 samples at p = 1e-4."""
    logits = torch.tensor([0.3, 1.2, -0.8, 0.0, -2.0, 0.9])
    generator = torch.Generator().manual_seed(8)
    counts = sample_token(logits.expand(40_000, 6), generator, SamplingParams(temperature)).bincount(minlength=6)
    expected = 40_000 * (logits / temperature).softmax(-1)
    assert ((counts - expected).square() / expected).sum() < 25.7  # 5 degrees of freedom
