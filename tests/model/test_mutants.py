"""The tests' own test: the model is broken in ways that happen by accident, and a shared check must notice.

A mutant that survives means a check that proves less than its name says.
"""

from __future__ import annotations

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
from model.gpt import GPT, CausalSelfAttention
from tests.model import checks

Patch = pytest.MonkeyPatch


def attention(scale: float | None = None, shift: int = 0) -> Callable[[Patch], None]:
    """Attention weights with another divisor than √D, or with the mask's diagonal moved."""

    def weights(q: Tensor, k: Tensor) -> Tensor:
        T, S = q.shape[-2], k.shape[-2]
        scores = q @ k.transpose(-2, -1) / (scale or math.sqrt(q.shape[-1]))
        allowed = torch.ones(T, S, dtype=torch.bool).tril(S - T + shift)
        return scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)

    return lambda patch: patch.setattr(functional, "attention_pattern", weights)


def operation(name: str, function: Callable[..., object]) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(functional, name, function)


def after_building(change: Callable[[GPT], object]) -> Callable[[Patch], None]:
    """Every model is changed as soon as it stands."""

    def apply(patch: Patch) -> None:
        build = GPT.__init__

        def broken(self: GPT, *args: Any, **options: Any) -> None:
            build(self, *args, **options)
            change(self)

        patch.setattr(GPT, "__init__", broken)

    return apply


def projecting(change: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[[Patch], None]:
    """The queries, keys and values (q, k, v) of every attention pass through `change` first."""

    def apply(patch: Patch) -> None:
        project = CausalSelfAttention.project
        patch.setattr(CausalSelfAttention, "project", lambda self, x, angles: change(*project(self, x, angles)))

    return apply


def untie(model: GPT) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def positions_off_by_one(model: GPT) -> None:
    if model.position_embedding is not None:
        model.position_embedding.register_forward_pre_hook(lambda m, args: ((args[0] + 1) % m.num_embeddings,))


def heads_without_transpose(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, H·D) cut into (B, H, T, D) by shape alone, so that a "head" is a stretch of the text."""

    def wrong(x: Tensor) -> Tensor:
        B, H, T, D = x.shape
        return x.transpose(1, 2).reshape(B, T * H * D).view(B, H, T, D)

    return wrong(q), wrong(k), wrong(v)


def norm_without_mean(x: Tensor, gain: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    y = x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps) * gain
    return y if bias is None else y + bias


def norm_with_eps_outside(x: Tensor, gain: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    y = (x - x.mean(dim=-1, keepdim=True)) / (x.std(dim=-1, keepdim=True, unbiased=False) + eps) * gain
    return y if bias is None else y + bias


def norm_of_a_sample(x: Tensor, gain: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Variance divided by C - 1."""
    y = (x - x.mean(dim=-1, keepdim=True)) / torch.sqrt(x.var(dim=-1, keepdim=True) + eps) * gain
    return y if bias is None else y + bias


def rotate_backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos - torch.cat([-second, first], dim=-1) * sin


def rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (0, 1), (2, 3), …, as other models have them."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    cos, sin = (angle[:, : x.shape[-1] // 2].repeat_interleave(2, dim=-1) for angle in (cos, sin))
    return x * cos + turned * sin


def rotate_without_a_sign(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Past half a turn the vector is no longer turned but stretched."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin.abs()


def forgetful(patch: Patch) -> None:
    """A model with a cache counts every piece's positions from 0."""
    angles = functional.precompute_rope
    patch.setattr(functional, "precompute_rope", lambda positions, *rest: angles(positions - positions[0], *rest))


logits = checks.check_logits_match_reference

# What is broken, how, and every check that must notice.
MUTANTS: dict[str, tuple[Callable[[Patch], None], list[Callable[[], None]]]] = {
    "scores are not divided by √D": (
        attention(scale=1.0),
        [
            partial(logits, "gpt2"),
            partial(checks.check_attention_matches_reference, "gpt2"),
            checks.check_attention_faces,
        ],
    ),
    "scores are divided by D": (
        attention(scale=10.0),
        [partial(logits, "qwen3"), checks.check_attention_faces],
    ),
    "the mask shows the next token": (
        attention(shift=1),
        [*(partial(checks.check_causality, preset) for preset in checks.PRESETS), checks.check_equal_keys],
    ),
    "the mask hides the token itself": (
        attention(shift=-1),
        [partial(checks.check_causality, "gpt2"), checks.check_equal_keys],
    ),
    "the mask counts from the first key": (
        operation("causal_mask", lambda T, S, device: torch.ones(T, S, dtype=torch.bool).tril()),
        [partial(checks.check_cache, preset, face) for preset in checks.PRESETS for face in ATTENTION_IMPLEMENTATIONS],
    ),
    "the head is untied": (
        after_building(untie),
        [partial(checks.check_tied_head, p) for p in ("gpt2", "qwen3")],
    ),
    "gelu has the error function": (
        operation("gelu", F.gelu),
        [partial(logits, "gpt2"), checks.check_activations],
    ),
    "relu is not squared": (operation("relu2", F.relu), [checks.check_activations]),
    "swiglu gates with the other half": (
        operation("swiglu", lambda x: F.silu(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0]),
        [partial(logits, "qwen3"), checks.check_activations],
    ),
    "learned positions are off by one": (after_building(positions_off_by_one), [partial(logits, "gpt2")]),
    "rotary positions turn backwards": (operation("rotate", rotate_backwards), [partial(logits, "qwen3")]),
    "rotary positions pair neighbours": (operation("rotate", rotate_neighbours), [partial(logits, "qwen3")]),
    "rotary positions lose a sign": (
        operation("rotate", rotate_without_a_sign),
        [checks.check_rotary_distance],
    ),
    "rotary positions forget the cache": (
        forgetful,
        [partial(checks.check_cache, preset) for preset in ("glass", "qwen3")],
    ),
    "layer norm keeps the mean": (
        operation("layer_norm", norm_without_mean),
        [partial(logits, "gpt2"), checks.check_layer_norm],
    ),
    "layer norm adds eps outside the root": (
        operation("layer_norm", norm_with_eps_outside),
        [checks.check_layer_norm],
    ),
    "layer norm divides by C - 1": (
        operation("layer_norm", norm_of_a_sample),
        [partial(logits, "gpt2"), checks.check_layer_norm],
    ),
    "layer norm forgets its gain": (
        operation("layer_norm", lambda x, gain, bias, eps: F.layer_norm(x, gain.shape, None, bias, eps)),
        [partial(logits, "gpt2"), checks.check_layer_norm],
    ),
    "rms norm forgets its gain": (
        operation("rms_norm", lambda x, gain, eps: F.rms_norm(x, gain.shape, None, eps)),
        [partial(logits, "qwen3"), checks.check_rms_norm],
    ),
    "rms norm adds eps outside the root": (
        operation("rms_norm", lambda x, gain, eps: x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * gain),
        [checks.check_rms_norm],
    ),
    "keys and values are swapped": (
        projecting(lambda q, k, v: (q, v, k)),
        [
            partial(logits, "gpt2"),
            partial(logits, "qwen3"),
            partial(checks.check_attention_matches_reference, "gpt2"),
        ],
    ),
    "heads are cut without a transpose": (
        projecting(heads_without_transpose),
        [partial(logits, "gpt2"), partial(checks.check_causality, "gpt2")],
    ),
    "shared heads are dealt out in turn": (
        operation("repeat_kv", lambda x, n_heads: x.repeat(1, n_heads // x.shape[1], 1, 1)),
        [partial(logits, "qwen3"), partial(checks.check_gradients_match_reference, "qwen3", "sdpa")],
    ),
}
CASES = [(name, number) for name, (_, watchers) in MUTANTS.items() for number in range(len(watchers))]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_broken_model_is_noticed(name: str, number: int, monkeypatch: Patch) -> None:
    breaks, watchers = MUTANTS[name]
    breaks(monkeypatch)
    with pytest.raises(AssertionError):
        watchers[number]()


def test_the_same_checks_pass_on_the_real_model() -> None:
    """Else a check that always fails would count as one that notices everything."""
    for _, watchers in MUTANTS.values():
        for check in watchers:
            check()
