"""Each operation against the library's, against its closed form, and by its properties."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from model import functional
from tests.model import checks
from tests.model.checks import check_same_function, normal, same


@pytest.mark.parametrize(
    "check",
    [
        checks.check_eager_attention,
        checks.check_equal_keys,
        checks.check_layer_norm,
        checks.check_rms_norm,
        checks.check_activations,
        checks.check_rope_depends_on_distance,
    ],
)
def test_operation_matches_reference(check) -> None:
    check()


@pytest.mark.parametrize("bias", [None, normal(16, seed=5)])
def test_norm_gradients_match_library(bias: torch.Tensor | None) -> None:
    x, weight = normal(4, 5, 16), 1 + normal(16, seed=4)
    check_same_function(
        functional.layer_norm, lambda x, w, b, eps: F.layer_norm(x, w.shape, w, b, eps), x, weight, bias, 1e-5
    )
    check_same_function(
        functional.rms_norm, lambda x, w, eps: F.rms_norm(x, w.shape, w.to(x.dtype), eps), x, weight, 1e-6
    )


def test_activation_gradients_match_library() -> None:
    check_same_function(functional.gelu, lambda x: F.gelu(x, approximate="tanh"), 3 * normal(4, 30))
    check_same_function(functional.silu, F.silu, 2 * normal(4, 30))


@pytest.mark.parametrize(("T", "S"), [(8, 8), (1, 8), (3, 8), (1, 1)])
def test_rows_sum_to_one_and_future_is_zero(T: int, S: int) -> None:
    pattern = functional.attention_pattern(4 * normal(2, 3, T, 6), 4 * normal(2, 3, S, 6, seed=4))
    same(pattern.sum(-1), torch.ones(2, 3, T), 1e-6)
    assert (pattern[..., ~functional.causal_mask(T, S, pattern.device)] == 0).all()
    assert (pattern >= 0).all()


def test_scores_are_scaled_dot_products() -> None:
    q, k = normal(2, 3, 4, 9), normal(2, 3, 7, 9, seed=4)
    same(functional.attention_scores(q, k), torch.einsum("bhtd,bhsd->bhts", q, k) / 3, 1e-5)


def test_attention_ignores_order_of_past_keys() -> None:
    q, k, v = normal(2, 3, 7, 8), normal(2, 3, 7, 8, seed=4), normal(2, 3, 7, 8, seed=5)
    order = torch.tensor([3, 0, 5, 1, 4, 2, 6])
    for attention in (lambda q, k, v: functional.attention_pattern(q, k) @ v, functional.sdpa):
        plain, shuffled = attention(q, k, v), attention(q, k[:, :, order], v[:, :, order])
        same(shuffled[:, :, -1], plain[:, :, -1], 1e-6)
        assert (shuffled[:, :, 2] - plain[:, :, 2]).abs().max() > 0.1  # earlier queries see another set of keys


def test_large_scores_stay_finite() -> None:
    q, k = 1e4 * normal(1, 2, 6, 8), 1e4 * normal(1, 2, 6, 8, seed=4)
    pattern = functional.attention_pattern(q, k)
    assert torch.isfinite(pattern).all()
    same(pattern.sum(-1), torch.ones(1, 2, 6), 1e-6)
    best = (q @ k.transpose(-2, -1)).masked_fill(~functional.causal_mask(6, 6, q.device), -torch.inf).argmax(-1)
    assert torch.equal(pattern.argmax(-1), best)


def test_rope_rotates_each_pair() -> None:
    """Pair i as a complex number is multiplied by exp(i · position · theta^(-2i/D))."""
    x, D, theta = normal(1, 1, 12, 6), 6, 50.0
    rotated = functional.apply_rope(x, *functional.precompute_rope(torch.arange(12), D, theta))
    for i in range(D // 2):
        factor = torch.polar(torch.ones(12), torch.arange(12) * theta ** (-2 * i / D))
        expected = torch.complex(x[..., i], x[..., i + D // 2]) * factor
        same(torch.complex(rotated[..., i], rotated[..., i + D // 2]), expected, 1e-5)


def test_rope_keeps_dtype() -> None:
    rope = functional.precompute_rope(torch.arange(5), 6, 1e4)
    assert functional.apply_rope(normal(1, 2, 5, 6).bfloat16(), *rope).dtype == torch.bfloat16


def test_kv_groups_are_neighbouring_heads() -> None:
    """Query heads 0, 1, 2 attend with key/value head 0; heads 3, 4, 5 with head 1."""
    x = normal(2, 2, 5, 4)
    repeated = functional.repeat_kv(x, 6)
    for head in range(6):
        assert torch.equal(repeated[:, head], x[:, head // 3])
    assert functional.repeat_kv(x, 2) is x


@pytest.mark.parametrize("T", [4, 2, 1])
def test_sdpa_dropout_keeps_mean(T: int) -> None:
    torch.manual_seed(0)
    q, k, v = (normal(1, 1, 4, 8, seed=seed).expand(3000, 1, 4, 8) for seed in (3, 4, 5))
    q = q[:, :, -T:]
    samples = functional.sdpa(q, k, v, 0.3)
    assert samples.std(dim=0).max() > 0.1
    same(samples.mean(dim=0), functional.sdpa(q, k, v)[0], 0.1)


def test_sdpa_scale_is_inverse_square_root() -> None:
    q, k, v = normal(1, 1, 5, 4), normal(1, 1, 5, 4, seed=4), normal(1, 1, 5, 4, seed=5)
    scores = (q @ k.mT / math.sqrt(4)).masked_fill(~functional.causal_mask(5, 5, q.device), -torch.inf)
    same(functional.sdpa(q, k, v), scores.softmax(-1) @ v, 1e-6)
