"""The tests' own test: typical bugs are put into the mathematics, and tests of the model must fail.

A mutant that survives means a test that proves less than its name says.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import functional
from model.config import ATTENTION_IMPLEMENTATIONS
from model.gpt import GPT, MLP, CausalSelfAttention
from tests.model import test_functional as ops
from tests.model import test_gpt, test_huggingface
from tests.model.helpers import PRESETS

Mutation = Callable[[pytest.MonkeyPatch], None]


def replaced(name: str, function: Callable[..., object]) -> Mutation:
    """An operation of `model.functional` replaced."""
    return lambda patch: patch.setattr(functional, name, function)


def attention(scale: float | None = None, shift: int = 0) -> Mutation:
    """Another divisor than √D, or a shifted mask."""

    def pattern(q: Tensor, k: Tensor) -> Tensor:
        T, S = q.shape[-2], k.shape[-2]
        scores = q @ k.transpose(-2, -1) / (scale or math.sqrt(q.shape[-1]))
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T + shift)
        return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)

    return replaced("attention_pattern", pattern)


def after_init(change: Callable[[GPT], object]) -> Mutation:
    """Every new model changed."""
    init = GPT.__init__

    def mutated(self: GPT, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        change(self)

    return lambda patch: patch.setattr(GPT, "__init__", mutated)


def projected(change: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Mutation:
    """Queries, keys and values changed."""
    project = CausalSelfAttention.project
    return lambda patch: patch.setattr(
        CausalSelfAttention, "project", lambda self, x, rope: change(*project(self, x, rope))
    )


def untie(model: GPT) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def shift_positions(model: GPT) -> None:
    if model.position_embedding is not None:
        model.position_embedding.register_forward_pre_hook(lambda m, args: ((args[0] + 1) % m.num_embeddings,))


def heads_without_transpose(*projections: Tensor) -> Any:
    """(B, T, H·D) reshaped directly to (B, H, T, D), so that a "head" is a part of the text."""
    return tuple(x.transpose(1, 2).reshape(x.shape[0], -1).view(x.shape) for x in projections)


def layer_norm(variance: Callable[[Tensor], Tensor], center: bool = True) -> Mutation:
    def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y = x - x.mean(dim=-1, keepdim=True) if center else x
        y = y / (variance(x) + eps).sqrt() * weight
        return y if bias is None else y + bias

    return replaced("layer_norm", norm)


def rope(change: Callable[..., Tensor]) -> Mutation:
    return replaced("apply_rope", change)


def rotate_backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos - torch.cat([-second, first], dim=-1) * sin


def rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (0, 1), (2, 3), ..., as in GPT-J."""
    rotated = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    cos, sin = (angle[:, : x.shape[-1] // 2].repeat_interleave(2, dim=-1) for angle in (cos, sin))
    return x * cos + rotated * sin


def rope_without_cache(patch: pytest.MonkeyPatch) -> None:
    """Positions counted from 0 though the cache is not empty."""
    original = functional.precompute_rope
    patch.setattr(functional, "precompute_rope", lambda positions, *rest: original(positions - positions[0], *rest))


def gate_with_other_half(patch: pytest.MonkeyPatch) -> None:
    original = MLP.activation

    def activation(self: MLP, hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return original(self, torch.cat([up, gate], dim=-1))

    patch.setattr(MLP, "activation", activation)


logits = {
    preset: partial(test_huggingface.test_logits_match_transformers, preset, "eager") for preset in ("gpt2", "qwen3")
}
causality = partial(test_gpt.test_no_position_sees_the_future, "gpt2")
kv_cache = test_gpt.test_kv_cache_matches_full_forward
patterns = partial(test_huggingface.test_patterns_match_transformers, "gpt2")

# The mutation, and every test that must fail.
MUTANTS: dict[str, tuple[Mutation, list[Callable[[], None]]]] = {
    "no sqrt(D)": (attention(scale=1.0), [logits["gpt2"], patterns, ops.test_eager_attention_matches_sdpa]),
    "D instead of sqrt(D)": (attention(scale=10.0), [logits["qwen3"], ops.test_eager_attention_matches_sdpa]),
    "mask shows next token": (attention(shift=1), [causality, ops.test_equal_keys_get_equal_attention]),
    "mask hides own token": (attention(shift=-1), [causality, ops.test_equal_keys_get_equal_attention]),
    "mask ignores cache": (
        replaced("causal_mask", lambda T, S, device: torch.ones(T, S, dtype=torch.bool).tril()),
        [partial(kv_cache, preset, a) for preset, a in zip(PRESETS, ATTENTION_IMPLEMENTATIONS, strict=True)],
    ),
    "untied": (after_init(untie), [partial(test_gpt.test_lm_head_is_tied, "glass")]),
    "erf gelu": (replaced("gelu", F.gelu), [logits["gpt2"], ops.test_activations_match_library]),
    "swiglu gates other half": (gate_with_other_half, [logits["qwen3"]]),
    "positions off by one": (after_init(shift_positions), [logits["gpt2"]]),
    "rope backwards": (rope(rotate_backwards), [logits["qwen3"]]),
    "rope on neighbours": (rope(rotate_neighbours), [logits["qwen3"]]),
    "rope ignores cache": (rope_without_cache, [partial(kv_cache, p, "eager") for p in ("glass", "qwen3")]),
    "layer norm without mean": (
        layer_norm(lambda x: x.square().mean(dim=-1, keepdim=True), center=False),
        [logits["gpt2"], ops.test_norms_match_library],
    ),
    "layer norm divides by C - 1": (layer_norm(lambda x: x.var(dim=-1, keepdim=True)), [logits["gpt2"]]),
    "rms norm eps outside root": (
        replaced("rms_norm", lambda x, weight, eps: x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight),
        [ops.test_norms_match_library],
    ),
    "keys and values swapped": (projected(lambda q, k, v: (q, v, k)), [logits["gpt2"], logits["qwen3"], patterns]),
    "heads without transpose": (projected(heads_without_transpose), [logits["gpt2"], causality]),
    "groups interleaved": (
        replaced("repeat_kv", lambda x, n_heads: x.repeat(1, n_heads // x.shape[1], 1, 1)),
        [logits["qwen3"], partial(test_huggingface.test_gradients_match_transformers, "qwen3", "sdpa")],
    ),
}
CASES = [(name, i) for name, (_, must_fail) in MUTANTS.items() for i in range(len(must_fail))]


@pytest.mark.parametrize(("name", "i"), CASES)
def test_mutant_is_noticed(name: str, i: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation, must_fail = MUTANTS[name]
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        must_fail[i]()
