"""Writing text: the cache changes nothing, tokens are drawn as documented, the window moves as documented."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ATTENTION_IMPLEMENTATIONS, AttentionImplementation
from model.generate import filter_logits, generate, last_logits, next_token, window_start
from model.gpt import GPT
from model.kv_cache import KVCache
from tests.model.checks import PRESETS, VOCAB, normal, random_model, random_tokens, same


def written(model: GPT, prompt: Tensor, count: int, seed: int = 0, **how: Any) -> Tensor:
    """The tokens (B, count) that `generate` yields."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(list(generate(model, prompt, count, generator, **how)), dim=1)


@pytest.mark.parametrize("face", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_cache_changes_no_token(preset: str, face: AttentionImplementation) -> None:
    """256 tokens, many contexts long, three texts side by side."""
    model, prompt = random_model(preset, face, context=16, n_layers=1), random_tokens(3, 5)
    cached = written(model, prompt, 256, temperature=0.0)
    assert torch.equal(cached, written(model, prompt, 256, temperature=0.0, use_cache=False))
    assert len(cached.unique()) > 3  # a text that only repeats itself would prove little


LEAPS = [("glass", context, step) for context in (1, 2, 5, 16) for step in (1, 2, 3, 7)]
LEAPS += [(preset, 5, step) for preset in ("gpt2", "qwen3") for step in (1, 7)]


@pytest.mark.parametrize(("preset", "context", "step"), LEAPS)
def test_a_cache_follows_a_text_that_grows_by_leaps(preset: str, context: int, step: int) -> None:
    """At, before and past the context, also where a leap moves the window."""
    model = random_model(preset, context=context)
    text = random_tokens(2, 5 * context + step)
    cache = KVCache(model.config, 2, model.token_embedding.weight)
    with torch.no_grad():
        for length in range(1, text.shape[1] + 1, step):
            same(last_logits(model, text[:, :length], cache), last_logits(model, text[:, :length]), 1e-5)


def test_the_cache_saves_reading() -> None:
    """A token at a time; only when the window moves, once in half a context, is half a context read anew."""
    model, read = random_model("glass", context=16), []
    model.token_embedding.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape[1]))
    written(model, random_tokens(1, 5), 28)
    assert read == [5, *[1] * 11, 9, *[1] * 7, 9, *[1] * 7]


class NewMemory(TorchDispatchMode):
    """Counts the bytes that operations take beyond what they were given."""

    taken = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)}
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.taken += x.numel() * x.element_size()
        return out


@pytest.mark.parametrize("preset", PRESETS)
def test_a_token_takes_no_more_memory_as_the_text_grows(preset: str) -> None:
    """Nothing of the cache is copied, be it shared among heads or not, and there is no mask for a single query."""
    model, text = random_model(preset, "sdpa", context=200), random_tokens(2, 199)
    cache, taken = KVCache(model.config, 2, model.token_embedding.weight), []
    for length in (20, 21, 197, 198):
        with torch.inference_mode(), NewMemory() as memory:
            last_logits(model, text[:, :length], cache)
        taken.append(memory.taken)
    assert taken[1] == taken[3] < taken[0] < taken[2]


def test_the_cache_stays_where_it_is() -> None:
    model, text = random_model("qwen3", "sdpa"), random_tokens(2, 20)
    cache = KVCache(model.config, 2, model.token_embedding.weight)
    places = cache.keys.data_ptr(), cache.values.data_ptr()
    with torch.no_grad():
        for length in (3, 4, 9):
            last_logits(model, text[:, :length], cache)
            k, v = torch.zeros(2, 2, 2, 1, 10).unbind()
            keys, values = cache.extend(1, k, v)
            assert keys.untyped_storage().data_ptr() == places[0]
            assert values.untyped_storage().data_ptr() == places[1]
    assert (cache.keys.data_ptr(), cache.values.data_ptr()) == places


def test_the_head_reads_the_last_position_of_a_prompt_alone() -> None:
    model, read = random_model("gpt2"), []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape))
    written(model, random_tokens(2, 9), 3)
    assert read == [(2, 48)] * 3


def test_the_same_text_may_be_asked_twice() -> None:
    model, text = random_model("gpt2"), random_tokens(2, 9)
    cache = KVCache(model.config, 2, model.token_embedding.weight)
    with torch.no_grad():
        assert torch.equal(last_logits(model, text, cache), last_logits(model, text, cache))


def test_a_prompt_beyond_the_context_is_read_from_its_end() -> None:
    model, prompt = random_model("gpt2", context=8), random_tokens(2, 50)
    first = written(model, prompt, 5, temperature=0.0)
    assert torch.equal(first, written(model, prompt[:, 40:], 5, temperature=0.0))
    other = prompt.clone()
    other[:, : window_start(50, 8)] = 0
    assert torch.equal(first, written(model, other, 5, temperature=0.0))


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_same_seed_writes_the_same_text(use_cache: bool) -> None:
    model, prompt = random_model("glass"), random_tokens(3, 4)
    torch.manual_seed(5)  # the global generator has no say
    first = written(model, prompt, 30, seed=1, use_cache=use_cache)
    torch.manual_seed(6)
    assert torch.equal(first, written(model, prompt, 30, seed=1, use_cache=use_cache))
    assert not torch.equal(first, written(model, prompt, 30, seed=2, use_cache=use_cache))
    assert not torch.equal(first[0], first[1])


def test_the_prompt_is_left_alone() -> None:
    prompt = random_tokens(2, 4)
    kept = prompt.clone()
    out = written(random_model("glass"), prompt, 6)
    assert torch.equal(prompt, kept)
    assert out.shape == (2, 6) and out.min() >= 0 and out.max() < VOCAB


def test_greedy_takes_the_best_token_each_time() -> None:
    model, text = random_model("glass"), random_tokens(2, 4)
    greedy = written(model, text, 8, temperature=0.0)
    with torch.no_grad():
        for _ in range(8):
            text = torch.cat([text, model(text)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(greedy, text[:, 4:])
    assert torch.equal(greedy, written(model, text[:, :4], 8, top_k=1))
    assert torch.equal(greedy, written(model, text[:, :4], 8, top_p=1e-9))


def kept(logits: list[float], **how: Any) -> list[int]:
    """Which tokens may still be drawn; what may be keeps its logit."""
    before = torch.tensor([logits])
    after = filter_logits(before, **how)[0]
    allowed = after.isfinite()
    assert torch.equal(after[allowed], before[0, allowed])
    return allowed.nonzero().flatten().tolist()


def test_top_k_keeps_the_best() -> None:
    logits = [0.5, 3.0, -1.0, 2.0, 1.0]
    assert kept(logits, top_k=1) == [1]
    assert kept(logits, top_k=3) == [1, 3, 4]
    for everything in (0, 5, 6, 1000):
        assert kept(logits, top_k=everything) == [0, 1, 2, 3, 4]


def test_top_k_keeps_all_that_tie_for_the_last_place() -> None:
    assert kept([1.0, 2.0, 1.0, 0.0], top_k=2) == [0, 1, 2]


@pytest.mark.parametrize(
    ("top_p", "wanted"),
    [(1.0, [0, 1, 2, 3]), (0.99, [0, 1, 2, 3]), (0.8, [0, 1, 3]), (0.7, [1, 3]), (0.3, [1]), (0.0, [1])],
)
def test_top_p_keeps_the_smallest_nucleus(top_p: float, wanted: list[int]) -> None:
    """Probabilities 0.2, 0.4, 0.05 and 0.35."""
    assert kept(torch.tensor([0.2, 0.4, 0.05, 0.35]).log().tolist(), top_p=top_p) == wanted


def test_top_p_breaks_ties_without_growing() -> None:
    """Four equal tokens: half the mass is two of them, exactly; a little more is three."""
    assert len(kept([0.0] * 4, top_p=0.5)) == 2
    assert len(kept([0.0] * 4, top_p=0.51)) == 3
    assert len(kept([0.0] * 4, top_p=0.01)) == 1


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30),
    st.integers(0, 40),
    st.floats(0, 1, width=32),
)
@settings(max_examples=150, deadline=None)
def test_the_best_are_kept_and_at_least_one(logits: list[float], top_k: int, top_p: float) -> None:
    allowed = kept(logits, top_k=top_k, top_p=top_p)
    assert allowed
    left = [value for i, value in enumerate(logits) if i not in allowed]
    assert not left or max(left) <= min(logits[i] for i in allowed)


def test_the_nucleus_counts_what_top_k_left() -> None:
    """Of 0.4, 0.3, 0.2, 0.1 the best two are left, at 4/7 and 3/7: the first alone reaches a half."""
    assert kept(torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist(), top_k=2, top_p=0.5) == [0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probability(temperature: float) -> None:
    """Pearson's chi-square of 40,000 draws is below the value that one honest run in 10,000 exceeds."""
    logits = torch.tensor([0.3, 1.2, -0.8, 0.0, -2.0, 0.9])
    generator = torch.Generator().manual_seed(8)
    drawn = next_token(logits.expand(40_000, 6), generator, temperature).bincount(minlength=6)
    wanted = 40_000 * (logits / temperature).softmax(-1)
    assert ((drawn - wanted).square() / wanted).sum() < 25.7  # 5 degrees of freedom


def test_what_is_filtered_is_never_drawn() -> None:
    generator = torch.Generator().manual_seed(8)
    logits = normal(1, 20).expand(5000, 20)
    assert set(next_token(logits, generator, top_k=4).tolist()) == set(logits[0].topk(4).indices.tolist())


def test_temperature_zero_needs_no_chance() -> None:
    generator = torch.Generator().manual_seed(8)
    state, logits = generator.get_state(), normal(7, 20)
    assert torch.equal(next_token(logits, generator, temperature=0.0), logits.argmax(-1))
    assert torch.equal(generator.get_state(), state)


def test_half_precision_logits_can_be_drawn_from() -> None:
    drawn = next_token(normal(3, 20, dtype=torch.bfloat16), torch.Generator().manual_seed(0), 0.7, 5, 0.9)
    assert drawn.shape == (3,)


@given(st.integers(1, 300), st.integers(1, 3000))
@settings(max_examples=300, deadline=None)
def test_the_window_holds_half_a_context_to_a_whole_one(context: int, length: int) -> None:
    start, half = window_start(length, context), max(1, context // 2)
    assert 0 <= start < length and length - start <= context
    if length <= context:
        assert start == 0
    else:
        assert 2 * (length - start) >= context and start % half == 0
    assert start <= window_start(length + 1, context) <= start + half
    if window_start(length + 1, context) > start:
        assert length - start == context  # it moves only when it is full


def test_generate_in_training_mode_is_the_callers_choice() -> None:
    """`generate` does not switch the model's mode behind the caller's back."""
    model = random_model("glass").train()
    written(model, random_tokens(1, 3), 2)
    assert model.training
