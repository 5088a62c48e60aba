"""Each operation against its library kernel, against its closed form, and by its properties."""

from __future__ import annotations

import math

import pytest
import torch

from model import functional
from tests.model.checks import (
    check_activations,
    check_attention_faces,
    check_equal_keys,
    check_face,
    check_layer_norm,
    check_rms_norm,
    check_rotary_distance,
    normal,
    same,
)


def test_explicit_attention_is_the_library_kernel() -> None:
    check_attention_faces()


@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm_has_two_equal_faces(biased: bool) -> None:
    gain, bias = 1 + normal(16, seed=4), normal(16, seed=5) if biased else None
    check_face(functional.layer_norm, functional.fused_layer_norm, normal(4, 5, 16), gain, bias, 1e-5)


def test_rms_norm_has_two_equal_faces() -> None:
    check_face(functional.rms_norm, functional.fused_rms_norm, normal(4, 5, 16), 1 + normal(16, seed=4), 1e-6)


def test_gelu_has_two_equal_faces() -> None:
    check_face(functional.gelu, functional.fused_gelu, 3 * normal(4, 30))


def test_swiglu_has_two_equal_faces() -> None:
    check_face(functional.swiglu, functional.fused_swiglu, 2 * normal(4, 5, 30))


def test_layer_norm_is_the_library_function() -> None:
    check_layer_norm()


def test_rms_norm_is_the_library_function() -> None:
    check_rms_norm()


def test_activations_are_the_library_functions() -> None:
    check_activations()


@pytest.mark.parametrize(("T", "S"), [(8, 8), (1, 8), (3, 8), (1, 1)])
def test_rows_sum_to_one_and_the_future_is_exactly_zero(T: int, S: int) -> None:
    weights = functional.attention_pattern(4 * normal(2, 3, T, 6), 4 * normal(2, 3, S, 6, seed=4))
    same(weights.sum(-1), torch.ones(2, 3, T), 1e-6)
    for i in range(T):
        place = S - T + i  # the queries are the last T of the S positions
        assert (weights[:, :, i, place + 1 :] == 0).all()
        assert (weights[:, :, i, : place + 1] > 0).all()


def test_the_mask_of_the_last_queries_is_the_end_of_the_whole_mask() -> None:
    device = torch.device("cpu")
    whole = functional.causal_mask(9, 9, device)
    assert torch.equal(whole, torch.ones(9, 9).tril().bool())
    for T in range(1, 10):
        assert torch.equal(functional.causal_mask(T, 9, device), whole[-T:])


def test_equal_keys_are_read_equally() -> None:
    check_equal_keys()


def test_weights_by_hand() -> None:
    """Two keys whose scores differ by ln 3 after the scale: the weights are 1/4 and 3/4."""
    k = torch.tensor([[0.0, 0, 0, 0], [2 * math.log(3), 0, 0, 0]])[None, None]  # √D is 2
    q = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0]])[None, None]
    same(functional.attention_pattern(q, k)[0, 0], torch.tensor([[1.0, 0.0], [0.25, 0.75]]), 1e-6)


def test_without_positions_the_order_of_earlier_keys_is_lost() -> None:
    q, k, v = normal(2, 3, 7, 8), normal(2, 3, 7, 8, seed=4), normal(2, 3, 7, 8, seed=5)
    order = torch.tensor([3, 0, 5, 1, 4, 2, 6])
    for attend in (lambda q, k, v: functional.attention_pattern(q, k) @ v, functional.sdpa):
        plain, shuffled = attend(q, k, v), attend(q, k[:, :, order], v[:, :, order])
        same(shuffled[:, :, -1], plain[:, :, -1], 1e-6)
        assert (shuffled[:, :, 2] - plain[:, :, 2]).abs().max() > 0.1  # earlier ones see another set


def test_large_scores_stay_finite() -> None:
    q, k = 1e4 * normal(1, 2, 6, 8), 1e4 * normal(1, 2, 6, 8, seed=4)
    weights = functional.attention_pattern(q, k)
    assert torch.isfinite(weights).all()
    same(weights.sum(-1), torch.ones(1, 2, 6), 1e-6)
    best = (q @ k.transpose(-2, -1)).masked_fill(~functional.causal_mask(6, 6, q.device), -torch.inf).argmax(-1)
    assert torch.equal(weights.argmax(-1), best)


def test_rotary_products_depend_on_distance_alone() -> None:
    check_rotary_distance()


def test_rotary_turns_each_pair_by_its_angle() -> None:
    """Pair i of a vector, read as a complex number, is multiplied by exp(i · position · theta^(-2i/D))."""
    x, D, theta = normal(1, 1, 12, 6), 6, 50.0
    turned = functional.apply_rope(x, *functional.precompute_rope(torch.arange(12), D, theta))
    for i in range(D // 2):
        turn = torch.polar(torch.ones(12), torch.arange(12) * theta ** (-2 * i / D))
        wanted = torch.complex(x[..., i], x[..., i + D // 2]) * turn
        same(torch.complex(turned[..., i], turned[..., i + D // 2]), wanted, 1e-5)


def test_rotary_keeps_the_data_type() -> None:
    turned = functional.apply_rope(normal(1, 2, 5, 6).bfloat16(), *functional.precompute_rope(torch.arange(5), 6, 1e4))
    assert turned.dtype == torch.bfloat16


def test_shared_heads_are_neighbours() -> None:
    """Query heads 0, 1, 2 read key/value head 0; heads 3, 4, 5 read head 1."""
    x = normal(2, 2, 5, 4)
    shared = functional.repeat_kv(x, 6)
    for head in range(6):
        assert torch.equal(shared[:, head], x[:, head // 3])
    assert functional.repeat_kv(x, 2) is x


@pytest.mark.parametrize("T", [4, 2])
def test_dropout_of_the_fused_kernel_keeps_the_mean(T: int) -> None:
    torch.manual_seed(0)
    q, k, v = (normal(1, 1, 4, 8, seed=seed).expand(3000, 1, 4, 8) for seed in (3, 4, 5))
    q = q[:, :, -T:]
    draws = functional.sdpa(q, k, v, 0.3)
    assert draws.std(dim=0).max() > 0.1
    same(draws.mean(dim=0), functional.sdpa(q, k, v)[0], 0.1)
