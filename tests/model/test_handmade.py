"""The hand-made induction model does what its docstring says; tests of the inspection build on it."""

import math

import pytest
import torch
from torch import Tensor

from inspection.activation_cache import ActivationCache, run_with_cache
from model.gpt import GPT
from tests.inspection.handmade import INDUCTION, PREVIOUS, handmade, repeats
from tests.model.helpers import same

N, V = 25, 30
FIRST, SECOND = slice(0, N + 1), slice(N + 1, 2 * N)
"""Targets that are random, and targets that the induction head predicts (from the second token of the repeat on)."""


def cached(model: GPT) -> ActivationCache:
    return run_with_cache(model, torch.tensor(repeats(1, N)[0]))


def close(value: Tensor, expected: Tensor | float, atol: float = 1e-6) -> None:
    same(value, torch.as_tensor(expected).expand_as(value), atol)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_heads_attend_as_built(attention: str) -> None:
    pattern = cached(handmade(attention=attention)).pattern
    previous, induction = pattern[PREVIOUS], pattern[INDUCTION]
    close(previous.diagonal(-1), 1.0)
    close(induction[1 : N + 1, 0], 1.0)  # nothing to copy yet: rests on position 0
    close(induction.diagonal(1 - N)[2:], 1.0)  # the position after the same token
    uniform = torch.ones_like(previous).tril() / torch.arange(1, 2 * N + 2)[:, None]
    for head in ((0, 1), (0, 2), (1, 0), (1, 2)):
        close(pattern[head], uniform)


def test_repeated_tokens_are_predicted() -> None:
    cache = cached(handmade())
    close(cache.loss[FIRST], math.log(V))
    close(cache.loss[SECOND], 0.0)
    logits = handmade()(torch.tensor(repeats(1, N)))[0]
    close(logits[N + 1 : 2 * N].amax(-1), 60.0, atol=1e-4)
    close(cache.value_norms[INDUCTION][0], 0.0)
