"""Chunked attention and the checkpointed MLP: same values and gradients, whatever the chunk size and what is recomputed."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from model import chunked_attention as chunked
from model import functional
from tests.model.helpers import normal, random_model, random_tokens, relative_difference, same


def qkv(B: int, H: int, T: int, D: int, n_kv_heads: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in double precision."""
    G = n_kv_heads or H
    q, k, v = (normal(B, n, T, D, seed=seed).double().requires_grad_() for seed, n in ((3, H), (4, G), (5, G)))
    return q, k, v


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = functional.repeat_kv(k, q.shape[1]), functional.repeat_kv(v, q.shape[1])
    return functional.attention_pattern(q, k) @ v


def saved_sizes(attention: Callable[[], Tensor]) -> list[int]:
    """The sizes of the tensors that are kept for the backward pass."""
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()), lambda x: x):
        attention()
    return saved


@pytest.fixture(params=[(4, 0), (1, 1 << 22), (128, 1 << 22)], ids=str)
def limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk sizes, with patterns and activations kept or recomputed."""
    monkeypatch.setattr(chunked, "CHUNK_SIZE", request.param[0])
    monkeypatch.setattr(chunked, "RECOMPUTE_ABOVE", request.param[1])


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize(("T", "H", "n_kv_heads"), [(12, 3, 3), (9, 4, 2)])
def test_chunked_matches_formula(T: int, H: int, n_kv_heads: int) -> None:
    inputs = qkv(2, H, T, 5, n_kv_heads)
    y, expected = chunked.chunked_attention(*inputs), plain_attention(*inputs)
    same(y, expected, 1e-12)
    grad = normal(*y.shape, seed=9).double()
    gradients = (torch.autograd.grad(out, inputs, grad) for out in (y, expected))
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.shape == theirs.shape and relative_difference(ours, theirs) <= 1e-12


@pytest.mark.usefixtures("limits")
def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(chunked.chunked_attention, qkv(1, 2, 6, 2))


def test_large_patterns_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = qkv(2, 3, 40, 5)
    monkeypatch.setattr(chunked, "CHUNK_SIZE", 16)
    attention = partial(chunked.chunked_attention, *inputs)
    assert sum(saved_sizes(attention)) > 2 * 3 * 40 * 40 / 2
    monkeypatch.setattr(chunked, "RECOMPUTE_ABOVE", 2 * 3 * 40 * 40 - 1)
    assert set(saved_sizes(attention)) == {2 * 3 * 40 * 5}  # queries, keys and values only


def test_recomputation_under_autocast_gives_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass runs outside of autocast, and must recompute in bf16 all the same."""
    tokens, results = random_tokens(3, 13), []
    monkeypatch.setattr(chunked, "CHUNK_SIZE", 5)
    for limit in (1 << 22, 0):
        monkeypatch.setattr(chunked, "RECOMPUTE_ABOVE", limit)
        model = random_model("glass", "chunked", context=13)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens)
        logits.float().square().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    assert results[0][0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
