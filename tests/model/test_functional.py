"""Each operation against the library's, against its closed form, and by its properties."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import functional
from tests.model.helpers import normal, relative_difference, same


def check_same_function(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor | float | None
) -> None:
    """Two functions agree in value (1e-5), in the gradient of each tensor (1e-5 relative), and in bfloat16 (2e-2)."""
    results = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
        out = function(*leaves)
        out.backward(normal(*out.shape, seed=9))
        results.append((out.detach(), [x.grad for x in leaves if isinstance(x, Tensor)]))
    (value, gradients), (expected, expected_gradients) = results
    same(value, expected, 1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert a is not None and b is not None and relative_difference(a, b) <= 1e-5
    short = [x.bfloat16() if isinstance(x, Tensor) else x for x in inputs]
    assert ours(*short).dtype == theirs(*short).dtype == torch.bfloat16
    torch.testing.assert_close(ours(*short), theirs(*short), rtol=2e-2, atol=2e-2)


def test_eager_attention_matches_sdpa() -> None:
    """Eager attention against sdpa, for full texts and for more keys than queries."""
    for T, S in ((7, 7), (1, 7), (3, 7)):
        q, k, v = normal(2, 3, T, 8), normal(2, 3, S, 8, seed=4), normal(2, 3, S, 8, seed=5)
        check_same_function(lambda q, k, v: functional.attention_pattern(q, k) @ v, functional.sdpa, q, k, v)


def test_equal_keys_get_equal_attention() -> None:
    """With equal keys query i attends to each of its i + 1 keys by 1 / (i + 1)."""
    for T, S in ((9, 9), (1, 9), (4, 9)):
        pattern = functional.attention_pattern(normal(1, 2, T, 6), normal(1, 2, 1, 6, seed=4).expand(1, 2, S, 6))
        position = torch.arange(S - T, S)
        expected = (torch.arange(S) <= position[:, None]) / (position[:, None] + 1.0)
        same(pattern, expected.expand(1, 2, T, S), 1e-6)
        assert (pattern[..., expected == 0] == 0).all()


def test_norms_match_library() -> None:
    """At scales where the place of eps matters."""
    for scale in (1.0, 1e-3):
        x, weight = 0.5 * scale + scale * normal(4, 5, 16), 1 + normal(16, seed=4)
        for bias in (normal(16, seed=5), None):
            same(functional.layer_norm(x, weight, bias, 1e-5), F.layer_norm(x, (16,), weight, bias, 1e-5), 1e-5)
        same(functional.rms_norm(x, weight, 1e-6), F.rms_norm(x, (16,), weight, 1e-6), 1e-5)


def test_activations_match_library() -> None:
    x = torch.linspace(-8, 8, 400)
    same(functional.gelu(x), F.gelu(x, approximate="tanh"), 1e-6)
    same(functional.relu2(x), F.relu(x) ** 2, 0)
    same(functional.silu(x), F.silu(x), 1e-6)


@pytest.mark.parametrize("bias", [None, normal(16, seed=5)])
def test_norm_gradients_match_library(bias: Tensor | None) -> None:
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


@pytest.mark.parametrize(("T", "S"), [(8, 8), (3, 8)])
def test_rows_sum_to_one_and_future_is_zero(T: int, S: int) -> None:
    pattern = functional.attention_pattern(4 * normal(2, 3, T, 6), 4 * normal(2, 3, S, 6, seed=4))
    same(pattern.sum(-1), torch.ones(2, 3, T), 1e-6)
    assert (pattern[..., ~functional.causal_mask(T, S, pattern.device)] == 0).all()
    assert (pattern >= 0).all()


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


def test_kv_groups_are_neighbouring_heads() -> None:
    """Query heads 0, 1, 2 attend with key/value head 0; heads 3, 4, 5 with head 1."""
    x = normal(2, 2, 5, 4)
    repeated = functional.repeat_kv(x, 6)
    for head in range(6):
        assert torch.equal(repeated[:, head], x[:, head // 3])
    assert functional.repeat_kv(x, 2) is x


@pytest.mark.parametrize("T", [4, 1])
def test_sdpa_dropout_keeps_mean(T: int) -> None:
    torch.manual_seed(0)
    q, k, v = (normal(1, 1, 4, 8, seed=seed).expand(3000, 1, 4, 8) for seed in (3, 4, 5))
    q = q[:, :, -T:]
    samples = functional.sdpa(q, k, v, 0.3)
    assert samples.std(dim=0).max() > 0.1
    same(samples.mean(dim=0), functional.sdpa(q, k, v)[0], 0.1)
