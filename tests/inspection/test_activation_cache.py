"""Hooks and cache show what the model computes, and leave the model unchanged."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from inspection.activation_cache import Hooks, run_with_cache, run_with_cache_batch, run_with_hooks
from model import functional
from model.config import ModelConfig
from model.gpt import GPT

PRESETS = ("glass", "gpt2", "qwen3")
SMALL = ModelConfig(n_layers=2, n_heads=4, d_model=32, context=24, attention="eager")


def random_gpt(config: ModelConfig, vocab_size: int = 50) -> GPT:
    """A model with weights so large that its attention is far from uniform."""
    model = GPT(config, vocab_size)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def random_text(T: int, vocab_size: int = 50) -> Tensor:
    return torch.randint(vocab_size, (T,), generator=torch.Generator().manual_seed(T))


def previous_token_model(sharpness: float, C: int = 16) -> GPT:
    """One layer, one head that reads the previous token.

    Positions are unit vectors. Layer norm makes of e_i the vector a e_i + b 1; keys stay as they are, queries
    are shifted by one place. So q_i · k_j is the same for every j, but for sharpness a² more at j = i - 1.
    """
    model = GPT(ModelConfig("gpt2", n_layers=1, n_heads=1, d_model=C, context=C - 1, attention="eager"), 20)
    attention = model.blocks[0].attention
    with torch.no_grad():
        model.token_embedding.weight.zero_()
        model.position_embedding.weight.copy_(torch.eye(C)[: C - 1])
        attention.qkv.weight[:C] = sharpness * torch.roll(torch.eye(C), -1, dims=0)
        attention.qkv.weight[C : 2 * C] = torch.eye(C)
    return model


def test_previous_token_head_has_its_closed_form() -> None:
    C, T, sharpness = 16, 15, 1.3
    pattern = run_with_cache(previous_token_model(sharpness, C), random_text(T, 10)).pattern[0, 0]
    variance = (1 / C) * (1 - 1 / C)
    boost = math.exp(sharpness / (variance + 1e-5) / math.sqrt(C))
    expected = torch.zeros(T, T)
    for i in range(T):
        others = i if i else 0  # keys that i may read beside the previous one
        for j in range(i + 1):
            expected[i, j] = (boost if j == i - 1 else 1) / ((boost if i else 1) + others)
    assert expected[5, 4] > 0.9
    torch.testing.assert_close(pattern, expected, atol=1e-6, rtol=0)


def by_hand(model: GPT, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and value norms from queries and keys, one dot product and one softmax at a time, in fp64."""
    T, config = len(tokens), model.config
    x = model.token_embedding(tokens[None])
    angles = None
    if model.position_embedding is not None:
        x = x + model.position_embedding.weight[:T]
    else:
        angles = functional.precompute_rope(torch.arange(T), config.d_head, config.architecture.rope_theta)
    patterns = torch.zeros(config.n_layers, config.n_heads, T, T)
    norms = torch.zeros(config.n_layers, config.n_heads, T)
    for layer, block in enumerate(model.blocks):
        q, k, v = block.attention.project(block.norm1(x), angles)
        for head in range(config.n_heads):
            shared = head * config.n_kv_heads // config.n_heads
            D = config.d_head
            handed = v[0, shared] @ block.attention.out.weight[:, head * D : (head + 1) * D].T
            norms[layer, head] = handed.norm(dim=-1)
            for i in range(T):
                scores = [float(q[0, head, i].double() @ k[0, shared, j].double()) for j in range(i + 1)]
                scores = [score / math.sqrt(config.d_head) for score in scores]
                total = sum(math.exp(score - max(scores)) for score in scores)
                for j, score in enumerate(scores):
                    patterns[layer, head, i, j] = math.exp(score - max(scores)) / total
        x = block(x, angles)
    return patterns, norms


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_pattern_and_value_norms_equal_a_plain_loop(preset: str, attention: str) -> None:
    shared = 2 if preset == "qwen3" else 0
    model = random_gpt(replace(SMALL, preset=preset, attention=attention, n_kv_heads=shared))
    tokens = random_text(11)
    seen = run_with_cache(model, tokens)
    patterns, norms = by_hand(model, tokens)
    # sdpa, which the plain loop uses between layers, rounds differently
    torch.testing.assert_close(seen.pattern, patterns, atol=1e-6 if attention == "eager" else 1e-5, rtol=0)
    torch.testing.assert_close(seen.value_norms, norms, atol=1e-5, rtol=1e-5)
    assert patterns.max() > 0.5  # far from uniform, or agreement would mean little


@pytest.mark.parametrize("preset", PRESETS)
def test_attention_implementation_does_not_matter(preset: str) -> None:
    tokens = random_text(24)
    explicit, fused = (random_gpt(replace(SMALL, preset=preset, attention=k)) for k in ("eager", "sdpa"))
    fused.load_state_dict(explicit.state_dict())
    one, other = run_with_cache(explicit, tokens), run_with_cache(fused, tokens)
    torch.testing.assert_close(one.pattern, other.pattern, atol=2e-5, rtol=0)
    torch.testing.assert_close(one.loss, other.loss, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("T", [1, 2, 24])
def test_rows_are_causal_distributions(T: int) -> None:
    seen = run_with_cache(random_gpt(SMALL), random_text(T), logits=True)
    assert seen.pattern.shape == (2, 4, T, T) and seen.value_norms.shape == (2, 4, T)
    assert seen.loss.shape == (T - 1,) and seen.logits.shape == (T, 50)
    assert torch.equal(seen.pattern, seen.pattern.tril()), "the future is exactly 0"
    torch.testing.assert_close(seen.pattern.sum(dim=-1), torch.ones(2, 4, T), atol=1e-6, rtol=0)


@torch.no_grad()
def test_loss_and_logits_are_the_models() -> None:
    model, tokens = random_gpt(SMALL), random_text(20)
    seen = run_with_cache(model, tokens, logits=True)
    logits = model(tokens[None])[0]
    torch.testing.assert_close(seen.logits, logits, atol=1e-6, rtol=0)
    expected = [-float(logits[t].log_softmax(-1)[tokens[t + 1]]) for t in range(19)]
    torch.testing.assert_close(seen.loss, torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("T", [0, 25])
def test_wrong_length_is_refused(T: int) -> None:
    with pytest.raises(ValueError, match=r"24|at least 1"):
        run_with_cache(random_gpt(SMALL), torch.zeros(T, dtype=torch.long))


@pytest.mark.parametrize("token", [-1, 50])
def test_unknown_token_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match="vocabulary of 50"):
        run_with_cache(random_gpt(SMALL), torch.tensor([1, token]))


def test_batch_equals_single_texts() -> None:
    model = random_gpt(SMALL)
    texts = [random_text(T).tolist() for T in (5, 24, 1, 13)]
    for text, seen in zip(texts, run_with_cache_batch(model, texts), strict=True):
        alone = run_with_cache(model, torch.tensor(text))
        assert torch.equal(seen.tokens, torch.tensor(text))
        for name in ("pattern", "value_norms", "loss"):
            torch.testing.assert_close(getattr(seen, name), getattr(alone, name), atol=2e-5, rtol=1e-5)


def snapshot(model: GPT) -> list[object]:
    """Everything that looking could disturb: flags, hooks, weights, gradients, random generators.

    Python's own generator is missing: beartype, which checks shapes while tests run, draws from it.
    """
    parts = [(m.training, m.__dict__.get("sdpa"), len(m._forward_hooks)) for m in model.modules()]
    weights = [(p.data_ptr(), p.dtype, p.requires_grad, p.grad is None, p.sum().item()) for p in model.parameters()]
    return [parts, weights, torch.get_rng_state().tolist(), str(np.random.get_state())]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_is_unchanged(attention: str, dtype: torch.dtype) -> None:
    model = random_gpt(replace(SMALL, attention=attention, dropout=0.5)).to(dtype)
    model.train()
    model.blocks[0].eval()  # put to rest on purpose; must not be woken
    before = snapshot(model)
    seen = run_with_cache(model, random_text(10), logits=True)
    assert snapshot(model) == before
    assert not any(t.requires_grad for t in (seen.pattern, seen.value_norms, seen.loss, seen.logits))


def test_model_is_unchanged_after_a_failed_hook() -> None:
    model = random_gpt(replace(SMALL, attention="sdpa"))
    before = snapshot(model)

    def fail(layer: int, pattern: Tensor) -> None:
        raise KeyError(layer)

    with pytest.raises(KeyError):
        run_with_hooks(model, random_text(5)[None], Hooks(pattern=fail))
    assert snapshot(model) == before


def test_dropout_is_off() -> None:
    model, tokens = random_gpt(replace(SMALL, dropout=0.5)), random_text(10)
    training = run_with_cache(model.train(), tokens)
    assert torch.equal(training.pattern, run_with_cache(model.eval(), tokens).pattern)


def test_pattern_is_computed_in_fp32() -> None:
    model, tokens = random_gpt(SMALL), random_text(24)
    plain = run_with_cache(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run_with_cache(model, tokens).pattern, plain.pattern)
    rounded = model.to(torch.bfloat16)
    low = run_with_cache(rounded, tokens)
    assert low.pattern.dtype == low.loss.dtype == torch.float32
    assert torch.equal(low.pattern, run_with_cache(rounded.float(), tokens).pattern)


def test_hook_that_replaces_the_pattern_is_seen() -> None:
    model, tokens = random_gpt(SMALL), random_text(8)
    hook = model.blocks[1].attention.pattern.register_forward_hook(lambda m, args, out: torch.eye(8).expand_as(out))
    with_hook = run_with_cache(model, tokens)
    hook.remove()
    assert torch.equal(with_hook.pattern[1], torch.eye(8).expand(4, 8, 8))
    assert not torch.equal(with_hook.loss, run_with_cache(model, tokens).loss)


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_details_add_up_to_the_models_attention(preset: str) -> None:
    """Queries, keys and values, combined by the formula, give the layer's attention output."""
    shared = 2 if preset == "qwen3" else 0
    model, tokens = random_gpt(replace(SMALL, preset=preset, n_kv_heads=shared)), random_text(11)
    outputs: list[Tensor] = []
    handles = [b.attention.register_forward_hook(lambda m, args, out: outputs.append(out[0])) for b in model.blocks]
    logits = model(tokens[None])[0]
    for handle in handles:
        handle.remove()
    seen = run_with_cache(model, tokens, details=True)
    for layer, block in enumerate(model.blocks):
        q, k, v = seen.queries[layer], seen.keys[layer], seen.values[layer]
        scores = (q @ k.mT / math.sqrt(8)).masked_fill(~torch.ones(11, 11).tril().bool(), -torch.inf)
        torch.testing.assert_close(seen.pattern[layer], scores.softmax(-1), atol=1e-6, rtol=0)
        mixed = (seen.pattern[layer] @ v).transpose(0, 1).flatten(1)  # heads side by side
        torch.testing.assert_close(block.attention.out(mixed), seen.attn_out[layer], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs[layer], seen.attn_out[layer], atol=1e-6, rtol=0)
    assert torch.equal(seen.top_tokens, logits.topk(5).indices)
    torch.testing.assert_close(seen.top_probs, logits.softmax(-1).gather(1, seen.top_tokens), atol=1e-6, rtol=0)


def test_details_of_a_batch_equal_single_texts() -> None:
    model = random_gpt(SMALL)
    texts = [random_text(T).tolist() for T in (5, 24, 1)]
    names = ("queries", "keys", "values", "attn_out", "top_tokens", "top_probs")
    assert all(getattr(run_with_cache_batch(model, texts)[0], name) is None for name in names)
    for text, seen in zip(texts, run_with_cache_batch(model, texts, details=True), strict=True):
        alone = run_with_cache(model, torch.tensor(text), details=True)
        for name in names:
            torch.testing.assert_close(getattr(seen, name), getattr(alone, name), atol=2e-5, rtol=1e-5)


def test_small_vocabulary_has_fewer_top_tokens() -> None:
    seen = run_with_cache(random_gpt(SMALL, vocab_size=3), torch.tensor([0, 2]), details=True)
    assert seen.top_tokens.shape == seen.top_probs.shape == (2, 3)
    torch.testing.assert_close(seen.top_probs.sum(-1), torch.ones(2))
