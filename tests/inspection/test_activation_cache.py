"""Hooks and cache show what the model computes, and leave the model unchanged."""

import math

import pytest
import torch
from torch import Tensor

from inspection.activation_cache import inference_mode, run_layers, run_with_cache, run_with_cache_batch
from model.gpt import GPT
from tests.model.helpers import VOCAB, random_model, random_tokens


@pytest.mark.parametrize("tokens", [[], [0] * 25, [1, VOCAB]])
def test_unusable_text_is_refused(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match=r"24|vocabulary of 61"):
        run_with_cache(random_model("gpt2"), torch.tensor(tokens, dtype=torch.long))


def test_batch_equals_single_texts() -> None:
    model = random_model("gpt2")
    texts = [random_tokens(1, T)[0].tolist() for T in (5, 24, 1, 13)]
    for text, cache in zip(texts, run_with_cache_batch(model, texts), strict=True):
        alone = run_with_cache(model, torch.tensor(text))
        for name in ("pattern", "value_norms", "loss"):
            torch.testing.assert_close(getattr(cache, name), getattr(alone, name), atol=2e-5, rtol=1e-5)


def snapshot(model: GPT) -> list[object]:
    """Flags, hooks, parameters, gradients and torch's random generator."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    parts = [hooks, *((m.training, getattr(m, "attention_implementation", None)) for m in model.modules())]
    weights = [(p.data_ptr(), p.dtype, p.requires_grad, p.grad is None, p.sum().item()) for p in model.parameters()]
    return [parts, weights, torch.get_rng_state().tolist()]


def test_model_is_unchanged() -> None:
    """Also after an error between two layers."""
    model = random_model("gpt2", "sdpa", dropout=0.5).train()
    before = snapshot(model)
    cache = run_with_cache(model, random_tokens(1, 10)[0])
    assert snapshot(model) == before
    assert not cache.pattern.requires_grad

    with pytest.raises(KeyError), inference_mode(model):
        for layer in run_layers(model, random_tokens(1, 5)):
            raise KeyError(layer)
    assert snapshot(model) == before


def test_pattern_is_computed_in_fp32() -> None:
    model, tokens = random_model("gpt2"), random_tokens(1, 24)[0]
    plain = run_with_cache(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run_with_cache(model, tokens).pattern, plain.pattern)


@pytest.mark.parametrize(("preset", "attention"), [("glass", "eager"), ("gpt2", "sdpa"), ("qwen3", "eager")])
@torch.no_grad()
def test_details_add_up_to_the_models_attention(preset: str, attention: str) -> None:
    """Queries, keys and values, combined by the formula, give the layer's attention output and the value norms."""
    model, tokens = random_model(preset, attention), random_tokens(1, 11)[0]
    outputs: list[Tensor] = []
    handles = [b.attention.register_forward_hook(lambda m, args, out: outputs.append(out[0])) for b in model.blocks]
    logits = model(tokens[None])[0]
    for handle in handles:
        handle.remove()
    cache = run_with_cache(model, tokens, details=True)
    for layer, block in enumerate(model.blocks):
        q, k, v = cache.queries[layer], cache.keys[layer], cache.values[layer]
        scores = (q @ k.mT / math.sqrt(model.config.d_head)).masked_fill(~torch.ones(11, 11).tril().bool(), -torch.inf)
        torch.testing.assert_close(cache.pattern[layer], scores.softmax(-1), atol=1e-6, rtol=0)
        mixed = (cache.pattern[layer] @ v).transpose(0, 1).flatten(1)  # heads side by side
        torch.testing.assert_close(block.attention.out(mixed), cache.attn_out[layer], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs[layer], cache.attn_out[layer], atol=1e-5, rtol=0)
        for head, W_O in enumerate(block.attention.out.weight.split(model.config.d_head, dim=1)):
            norms = (v[head].double() @ W_O.double().T).norm(dim=-1)
            torch.testing.assert_close(cache.value_norms[layer, head].double(), norms, atol=1e-5, rtol=1e-5)
    assert cache.pattern[..., 5:, :].max() > 0.4  # far from uniform, or agreement would mean little
    losses = -logits.log_softmax(-1)[range(10), tokens[1:]]
    torch.testing.assert_close(cache.loss, losses, atol=1e-5, rtol=0)
    assert torch.equal(cache.top_ids, logits.topk(5).indices)
    torch.testing.assert_close(cache.top_probs, logits.softmax(-1).gather(1, cache.top_ids), atol=1e-6, rtol=0)
