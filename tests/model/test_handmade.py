"""The model built by hand promises what its docstring says; tests of the inspection stand on it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from inspection.activation_cache import ActivationCache, run_with_cache
from model.gpt import GPT
from tests.inspection.handmade import INDUCTION, PREVIOUS, handmade, repeats

N, V = 25, 30
FIRST, SECOND = slice(0, N + 1), slice(N + 1, 2 * N)
"""Which targets nothing before them tells, and which the induction head tells (from the second token said again on)."""


def read(model: GPT) -> ActivationCache:
    return run_with_cache(model, torch.tensor(repeats(1, N)[0]), logits=True)


def without(model: GPT, layer: int, head: int) -> GPT:
    """The model with one head's columns of the output projection, and so all it writes, set to 0."""
    attention = model.blocks[layer].attention
    with torch.no_grad():
        attention.out.weight.view(-1, attention.n_heads, attention.d_head)[:, head] = 0
    return model


def exactly(value: Tensor, wanted: Tensor | float, atol: float = 1e-6) -> None:
    torch.testing.assert_close(value, torch.as_tensor(wanted).expand_as(value), atol=atol, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_heads_read_what_they_are_built_to_read(attention: str) -> None:
    T = 2 * N + 1
    pattern = read(handmade(attention=attention)).pattern
    previous, induction = pattern[PREVIOUS], pattern[INDUCTION]
    exactly(previous.diagonal(-1), 1.0)
    exactly(induction[1 : N + 1, 0], 1.0)  # nothing to find yet: it rests
    exactly(induction.diagonal(1 - N)[2:], 1.0)  # the position after the same token, N - 1 back
    uniform = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    for layer in range(2):
        for head in range(3):
            if (layer, head) not in (PREVIOUS, INDUCTION):
                exactly(pattern[layer, head], uniform)


def test_what_was_said_before_is_known_and_the_rest_is_not() -> None:
    seen = read(handmade())
    exactly(seen.loss[FIRST], math.log(V))
    exactly(seen.loss[SECOND], 0.0)
    assert seen.logits is not None
    exactly(seen.logits[N + 1 : 2 * N].amax(-1), 60.0, atol=1e-4)
    exactly(seen.value_norms[INDUCTION][0], 0.0)  # where it rests there is nothing to take


@pytest.mark.parametrize("head", [PREVIOUS, INDUCTION])
def test_without_either_of_the_two_heads_nothing_is_known(head: tuple[int, int]) -> None:
    exactly(read(without(handmade(), *head)).loss, math.log(V))


@pytest.mark.parametrize("head", [(0, 1), (0, 2), (1, 0), (1, 2)])
def test_any_other_head_may_go(head: tuple[int, int]) -> None:
    assert torch.equal(read(without(handmade(), *head)).loss, read(handmade()).loss)


def test_one_layer_alone_knows_nothing() -> None:
    seen = read(handmade(n_layers=1))
    exactly(seen.pattern[PREVIOUS].diagonal(-1), 1.0)
    exactly(seen.loss, math.log(V))


def test_the_norms_leave_the_stream_as_it_is() -> None:
    model = handmade()
    streams: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda module, args, out: streams.append((args[0], out)))
    read(model)
    for before, after in streams:
        exactly((after - before)[..., :-2], 0.0)  # all but the anchor, which is large
        exactly(after[..., -2:].abs() / 4096, 1.0)


@pytest.mark.parametrize(("n_tokens", "context", "n_heads"), [(60, 110, 2), (110, 60, 4)])
def test_it_can_be_built_in_other_sizes(n_tokens: int, context: int, n_heads: int) -> None:
    text = torch.tensor(repeats(1, 29, n_tokens, seed=3)[0])
    exactly(run_with_cache(handmade(n_tokens, context, n_heads), text).loss[30:], 0.0)
