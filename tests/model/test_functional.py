"""Each operation against the library's, against its closed form, and by its properties."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import functional
from tests.model.helpers import normal, relative_difference, same


def check_same_function(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Two functions agree in value (1e-5), in the gradient of each tensor (1e-5 relative), and in bfloat16 (2e-2)."""
    results = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        results.append((out, torch.autograd.grad(out, leaves, normal(*out.shape, seed=9))))
    (value, gradients), (expected, expected_gradients) = results
    same(value, expected, 1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert relative_difference(a, b) <= 1e-5
    short, expected = (function(*(x.bfloat16() for x in inputs)) for function in (ours, theirs))
    assert short.dtype == torch.bfloat16
    torch.testing.assert_close(short, expected, rtol=2e-2, atol=2e-2)


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


def test_norms() -> None:
    """At scales where the place of eps matters."""
    weight, bias = 1 + normal(16, seed=4), normal(16, seed=5)
    for scale in (1.0, 1e-3):
        x = 0.5 * scale + scale * normal(4, 5, 16)
        check_same_function(
            lambda x, w, b: functional.layer_norm(x, w, b, 1e-5),
            lambda x, w, b: F.layer_norm(x, w.shape, w, b),
            x,
            weight,
            bias,
        )
        check_same_function(
            lambda x, w: functional.rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), x, weight
        )
        same(functional.layer_norm(x, weight, None, 1e-5), F.layer_norm(x, (16,), weight), 1e-5)


def test_activations() -> None:
    x = torch.linspace(-8, 8, 400)
    check_same_function(functional.gelu, lambda x: F.gelu(x, approximate="tanh"), x)
    check_same_function(functional.relu2, lambda x: F.relu(x) ** 2, x)
    check_same_function(functional.silu, F.silu, x)


@pytest.mark.parametrize(("T", "S", "scale"), [(8, 8, 4), (3, 8, 4), (6, 6, 1e4)])
def test_rows_sum_to_one_and_future_is_zero(T: int, S: int, scale: float) -> None:
    """With scores of 1e8 too, of which the largest gets all attention."""
    q, k = scale * normal(2, 3, T, 6), scale * normal(2, 3, S, 6, seed=4)
    pattern, mask = functional.attention_pattern(q, k), functional.causal_mask(T, S, q.device)
    same(pattern.sum(-1), torch.ones(2, 3, T), 1e-6)
    assert (pattern[..., ~mask] == 0).all() and (pattern >= 0).all()
    best = (q @ k.transpose(-2, -1)).masked_fill(~mask, -torch.inf).argmax(-1)
    assert torch.equal(pattern.argmax(-1), best)
