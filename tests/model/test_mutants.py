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

init, project, activation = GPT.__init__, CausalSelfAttention.project, MLP.activation
precompute_rope = functional.precompute_rope


def pattern(q: Tensor, k: Tensor, scale: float | None = None, shift: int = 0) -> Tensor:
    """Another divisor than √D, or a shifted mask."""
    T, S = q.shape[-2], k.shape[-2]
    scores = q @ k.transpose(-2, -1) / (scale or math.sqrt(q.shape[-1]))
    return scores.masked_fill(~torch.ones(T, S, dtype=torch.bool).tril(S - T + shift), -torch.inf).softmax(dim=-1)


def untied(self: GPT, *args: Any, **options: Any) -> None:
    init(self, *args, **options)
    self.lm_head.weight = nn.Parameter(self.lm_head.weight.detach().clone())


def shifted_positions(self: GPT, *args: Any, **options: Any) -> None:
    init(self, *args, **options)
    if self.position_embedding is not None:
        self.position_embedding.register_forward_pre_hook(lambda m, args: ((args[0] + 1) % m.num_embeddings,))


def swapped(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = project(*args)
    return q, v, k


def untransposed(*args: Any) -> tuple[Tensor, ...]:
    """(B, T, H·D) reshaped directly to (B, H, T, D), so that a "head" is a part of the text."""
    return tuple(x.transpose(1, 2).reshape(x.shape[0], -1).view(x.shape) for x in project(*args))


def uncentered(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    y = x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight
    return y if bias is None else y + bias


def unbiased(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The variance divided by C - 1."""
    y = (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, keepdim=True) + eps).sqrt() * weight
    return y if bias is None else y + bias


def rotate_backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos - torch.cat([-second, first], dim=-1) * sin


def rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (0, 1), (2, 3), ..., as in GPT-J."""
    rotated = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    cos, sin = (angle[:, : x.shape[-1] // 2].repeat_interleave(2, dim=-1) for angle in (cos, sin))
    return x * cos + rotated * sin


logits = {p: partial(test_huggingface.test_logits_match_transformers, p, "eager") for p in ("gpt2", "qwen3")}
gradients = partial(test_huggingface.test_gradients_match_transformers, "qwen3", "sdpa")
patterns = partial(test_huggingface.test_patterns_match_transformers, "gpt2")
causality = partial(test_gpt.test_no_position_sees_the_future, "gpt2")
kv_cache = test_gpt.test_kv_cache_matches_full_forward
sdpa, uniform, norms = ops.test_eager_attention_matches_sdpa, ops.test_equal_keys_get_equal_attention, ops.test_norms

# What is replaced by what, and every test that must fail.
MUTANTS: dict[str, tuple[Any, str, Callable[..., Any], list[Callable[[], None]]]] = {
    "no sqrt(D)": (functional, "attention_pattern", partial(pattern, scale=1.0), [logits["gpt2"], patterns, sdpa]),
    "D instead of sqrt(D)": (functional, "attention_pattern", partial(pattern, scale=10.0), [logits["qwen3"], sdpa]),
    "mask shows next token": (functional, "attention_pattern", partial(pattern, shift=1), [causality, uniform]),
    "mask hides own token": (functional, "attention_pattern", partial(pattern, shift=-1), [causality, uniform]),
    "mask ignores cache": (
        functional,
        "causal_mask",
        lambda T, S, device: torch.ones(T, S, dtype=torch.bool).tril(),
        [partial(kv_cache, preset, a) for preset, a in zip(PRESETS, ATTENTION_IMPLEMENTATIONS, strict=True)],
    ),
    "untied": (GPT, "__init__", untied, [partial(test_gpt.test_lm_head_is_tied, "glass")]),
    "erf gelu": (functional, "gelu", F.gelu, [logits["gpt2"], ops.test_activations]),
    "swiglu gates other half": (
        MLP,
        "activation",
        lambda self, x: activation(self, x.roll(x.shape[-1] // 2, -1)),
        [logits["qwen3"]],
    ),
    "positions off by one": (GPT, "__init__", shifted_positions, [logits["gpt2"]]),
    "rope backwards": (functional, "apply_rope", rotate_backwards, [logits["qwen3"]]),
    "rope on neighbours": (functional, "apply_rope", rotate_neighbours, [logits["qwen3"]]),
    "rope ignores cache": (
        functional,
        "precompute_rope",
        lambda positions, *rest: precompute_rope(positions - positions[0], *rest),
        [partial(kv_cache, preset, "eager") for preset in ("glass", "qwen3")],
    ),
    "layer norm without mean": (functional, "layer_norm", uncentered, [logits["gpt2"], norms]),
    "layer norm divides by C - 1": (functional, "layer_norm", unbiased, [logits["gpt2"]]),
    "rms norm eps outside root": (
        functional,
        "rms_norm",
        lambda x, weight, eps: x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight,
        [norms],
    ),
    "keys and values swapped": (CausalSelfAttention, "project", swapped, [*logits.values(), patterns]),
    "heads without transpose": (CausalSelfAttention, "project", untransposed, [logits["gpt2"], causality]),
    "groups interleaved": (
        functional,
        "repeat_kv",
        lambda x, n_heads: x.repeat(1, n_heads // x.shape[1], 1, 1),
        [logits["qwen3"], gradients],
    ),
}


@pytest.mark.parametrize(("name", "i"), [(name, i) for name, mutant in MUTANTS.items() for i in range(len(mutant[-1]))])
def test_mutant_is_noticed(name: str, i: int, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, replacement, must_fail = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, replacement)
    with pytest.raises(AssertionError):
        must_fail[i]()
