"""The face that goes by chunks: the same values and gradients whatever the size of a chunk and whatever is kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from model import chunked_attention as thrift
from model import functional
from tests.model.checks import PRESETS, normal, random_model, random_tokens, relative_difference, same

SIZES = (7, 12, 13)


def read(*shape: int, heads: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in double precision."""
    B, H, T, D = shape
    shapes = [(B, H, T, D), *[(B, heads or H, T, D)] * 2]
    return tuple(normal(*one, seed=seed).double().requires_grad_() for seed, one in enumerate(shapes, 3))  # type: ignore[return-value]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = functional.repeat_kv(k, q.shape[1]), functional.repeat_kv(v, q.shape[1])
    return functional.attention_pattern(q, k) @ v


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of a sum in which every number counts otherwise."""
    return torch.autograd.grad((y * normal(*y.shape, seed=9).to(y.dtype)).sum(), inputs)


def kept_by(work: Any) -> list[Tensor]:
    """All that a piece of work keeps for its backward pass."""
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        work()
    return found


@pytest.fixture(params=[(4, 0), (4, 1 << 22), (13, 0), (1, 0), (128, 1 << 22)], ids=str)
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of some queries, with weights and activations kept or not."""
    monkeypatch.setattr(thrift, "CHUNK", request.param[0])
    monkeypatch.setattr(thrift, "KEPT", request.param[1])


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("T", SIZES)
def test_chunks_are_the_formula(T: int) -> None:
    inputs = read(2, 3, T, 5)
    y, wanted = thrift.chunked_attention(*inputs), plain(*inputs)
    same(y, wanted, 1e-12)
    for mine, theirs in zip(gradients(y, *inputs), gradients(wanted, *inputs), strict=True):
        assert relative_difference(mine, theirs) <= 1e-12


@pytest.mark.usefixtures("pieces")
def test_heads_that_share_keys_add_up_their_gradients() -> None:
    inputs = read(2, 4, 9, 6, heads=2)
    y, wanted = thrift.chunked_attention(*inputs), plain(*inputs)
    same(y, wanted, 1e-12)
    for mine, theirs in zip(gradients(y, *inputs), gradients(wanted, *inputs), strict=True):
        assert mine.shape == theirs.shape and relative_difference(mine, theirs) <= 1e-12


@pytest.mark.usefixtures("pieces")
def test_gradients_through_dropped_weights_are_slopes() -> None:
    """The backward pass must drop what the forward pass dropped, though the weights are not kept."""

    def attend(*inputs: Tensor) -> Tensor:
        torch.manual_seed(5)
        return thrift.chunked_attention(*inputs, dropout=0.4)

    inputs = read(1, 2, 9, 3)
    assert not torch.allclose(attend(*inputs), plain(*inputs))
    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.usefixtures("pieces")
def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    q, k, v = (x.detach().expand(3000, -1, -1, -1) for x in read(1, 2, 7, 7))
    torch.manual_seed(3)
    draws = thrift.chunked_attention(q, k, torch.eye(7, dtype=torch.double).expand_as(v), 0.3)  # the weights themselves
    same(draws.mean(dim=0), functional.attention_pattern(q[:1], k[:1])[0], 0.05)
    read_at_all = torch.ones(7, 7).tril().bool().expand_as(draws)
    assert abs((draws[read_at_all] == 0).double().mean().item() - 0.3) < 0.01
    assert (draws[~read_at_all] == 0).all()
    assert not torch.equal(draws[:, :, 0], draws[:, :, 1]) and not torch.equal(draws[0], draws[1])


def test_large_weights_are_not_kept_and_small_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = read(2, 3, 40, 5)
    monkeypatch.setattr(thrift, "CHUNK", 16)
    assert sum(x.numel() for x in kept_by(lambda: thrift.chunked_attention(*inputs))) > 2 * 3 * 40 * 40 / 2
    monkeypatch.setattr(thrift, "KEPT", 2 * 3 * 40 * 40 - 1)
    largest = 2 * 3 * 40 * 5
    assert {x.numel() for x in kept_by(lambda: thrift.chunked_attention(*inputs))} == {largest}
    peak = []
    weights = thrift.chunk_weights
    monkeypatch.setattr(thrift, "chunk_weights", lambda q, k: peak.append(weights(q, k)) or peak[-1])  # type: ignore[func-returns-value]
    gradients(thrift.chunked_attention(*inputs), *inputs)
    assert [tuple(w.shape[2:]) for w in peak] == [(16, 16), (16, 32), (8, 40)] * 2  # no key that nobody reads


@pytest.mark.parametrize("preset", PRESETS)
def test_a_large_activation_is_computed_again(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, times = random_model(preset, "chunked", n_layers=1), random_tokens(3, 9), []
    mlp, size = model.blocks[0].mlp, 3 * 9 * model.config.d_mlp
    activation = mlp.activation
    monkeypatch.setattr(mlp, "activation", lambda x: times.append(1) or activation(x))
    kept, found = [], []
    for limit in (size, size - 1):
        monkeypatch.setattr(thrift, "KEPT", limit)
        kept.append({x.untyped_storage()._cdata: x for x in kept_by(partial(mlp, normal(3, 9, model.config.d_model)))})
        model.zero_grad(set_to_none=True)
        times.clear()
        model(tokens).square().sum().backward()
        assert len(times) == (1 if limit == size else 2)
        found.append([p.grad for p in model.parameters()])
    assert [sum(x.numel() == size for x in one.values()) for one in kept] in ([2, 1], [3, 2], [4, 3])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]


def test_what_mixed_precision_computes_again_is_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training products are in bf16; what is computed again, outside of that, must be in bf16 too."""
    tokens = random_tokens(3, 13)
    found = []
    for limit in (1 << 22, 0):
        monkeypatch.setattr(thrift, "KEPT", limit)
        monkeypatch.setattr(thrift, "CHUNK", 5)
        model = random_model("glass", "chunked", context=13)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens)
        logits.float().square().sum().backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    assert found[0][0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]
