"""An attention file computed again, from the model that it is said to come from, and compared number by number.

Part of `verify.py`. The same machine gives the same numbers but for roundings; the bounds leave room for another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from inspection.activation_cache import ActivationCache, run_with_cache
from inspection.attention_file import AttentionFile, AttentionRecord
from inspection.finding import HALF_STEP, WEIGHT, CheckResult, Measured, Span, spans, worst
from model import functional
from model.gpt import GPT

FUSED = 1e-5
"""Of a weight: the explicit face against the fused one."""
NATS = 1e-4
CHANCE = 1e-4
"""Of a probability."""
RELATIVE = 1e-5
"""Of the largest number of an array that holds no weights."""

Check = Callable[[AttentionRecord, Span, ActivationCache], Iterator[tuple[float, float]]]
"""Measures and bounds of one text over one stretch of it, which was read again."""


def recomputed(dump: AttentionFile, model: GPT) -> list[CheckResult]:
    """Everything that a text holds but its tokens, against the model. The file's shapes must be the model's."""
    checks: dict[str, Check] = {
        "attention recomputed": _attention,
        "attention by the fused face": partial(_fused, model),
        "loss recomputed": _loss,
        "value norms recomputed": _value_norms,
        "queries, keys, values, sums recomputed": _details,
        "next tokens recomputed": _next,
    }
    measured: dict[str, list[tuple[str, int | float, int | float]]] = {name: [] for name in checks}
    for text in dump.texts:
        for span in spans(dump.metadata, len(text.tokens)):
            window = torch.from_numpy(text.tokens[span.start : span.stop].astype(np.int64))
            seen = run_with_cache(model, window, logits=True, details=True)
            for name, check in checks.items():
                measured[name] += [(text.name, value, bound) for value, bound in check(text, span, seen)]
    return [worst(name, iter(found)) for name, found in measured.items() if found]


def scores_recomputed(dump: AttentionFile, again: Mapping[str, ArrayLike]) -> CheckResult:
    """The scores of every head against those computed anew; a score that is nan must be so again."""
    return worst("scores recomputed", _scores(dump, again))


def _scores(dump: AttentionFile, again: Mapping[str, ArrayLike]) -> Measured:
    for name, stored in dump.scores.items():
        fresh = np.asarray(again[name], dtype=np.float32) if name in again else None
        if fresh is None or fresh.shape != stored.shape or (np.isnan(fresh) != np.isnan(stored)).any():
            yield name, np.inf, RELATIVE
        else:
            yield name, _furthest(np.nan_to_num(stored), np.nan_to_num(fresh), least=1.0), RELATIVE


def fused_weights(
    queries: Float[Tensor, "L H T D"], keys: Float[Tensor, "L H T D"]
) -> Iterator[tuple[int, Float[Tensor, "L H T N"]]]:
    """What the fused kernel, which never shows its weights, must have used: they come out of it when the values are
    the identity. Yields (first column, N columns of the weights), so many at a time as values are wide."""
    T, D = queries.shape[-2:]
    identity = torch.eye(T, T + D, device=queries.device).expand(*queries.shape[:2], T, T + D)
    for first in range(0, T, D):
        columns = functional.sdpa(queries, keys, identity[..., first : first + D])
        yield first, columns[..., : T - first]


def _furthest(stored: NDArray[np.floating], fresh: NDArray[np.floating], least: float = 0.0) -> float:
    """The largest difference, as a share of the largest number or of `least`, whichever is more."""
    off = float(np.abs(stored.astype(np.float64) - fresh).max()) if stored.size else 0.0
    return off / max(float(np.abs(fresh).max(initial=0.0)), least, 1e-30) if off else 0.0


def _attention(text: AttentionRecord, span: Span, seen: ActivationCache) -> Iterator[tuple[float, float]]:
    for layer, fresh in enumerate(seen.pattern.numpy()):
        stored = text.pattern(layer)[0][:, span.first : span.stop, span.start : span.stop]
        yield float(np.abs(stored - fresh[:, span.first - span.start :]).max()), WEIGHT[text.pattern_tril.itemsize]


def _fused(model: GPT, text: AttentionRecord, span: Span, seen: ActivationCache) -> Iterator[tuple[float, float]]:
    assert seen.queries is not None and seen.keys is not None
    device = model.token_embedding.weight.device
    with torch.no_grad():
        for first, columns in fused_weights(seen.queries.to(device), seen.keys.to(device)):
            explicit = seen.pattern[..., first : first + columns.shape[-1]]
            yield (columns.cpu() - explicit).abs().max().item(), FUSED


def _loss(text: AttentionRecord, span: Span, seen: ActivationCache) -> Iterator[tuple[float, float]]:
    assert seen.logits is not None
    targets = torch.from_numpy(text.tokens[span.first + 1 : span.stop + 1].astype(np.int64))
    chances = seen.logits[span.first - span.start :][: len(targets)].log_softmax(dim=-1)
    fresh = -chances.gather(1, targets[:, None])[:, 0].numpy()
    if len(fresh):
        yield float(np.abs(text.loss[span.first : span.first + len(fresh)] - fresh).max()), NATS


def _value_norms(text: AttentionRecord, span: Span, seen: ActivationCache) -> Iterator[tuple[float, float]]:
    stored = text.value_norms[..., span.first : span.stop]
    yield _furthest(stored, seen.value_norms[..., span.first - span.start :].numpy()), RELATIVE


def _details(text: AttentionRecord, span: Span, seen: ActivationCache) -> Iterator[tuple[float, float]]:
    for name in ("queries", "keys", "values", "attn_out"):
        stored: NDArray[np.floating] | None = getattr(text, name)
        if stored is not None:
            yield _furthest(stored, getattr(seen, name).numpy()), RELATIVE + (HALF_STEP if stored.itemsize == 2 else 0)


def _next(text: AttentionRecord, span: Span, seen: ActivationCache) -> Iterator[tuple[float, float]]:
    """The stored tokens must have the stored probabilities, and no others may be likelier."""
    if text.top_tokens is None or text.top_ids is None:
        return
    assert seen.logits is not None and seen.top_probs is not None
    after = span.first - span.start
    stored = np.array(
        [[chance for _, chance in row] for row in text.top_tokens[span.first : span.stop]], dtype=np.float32
    )
    named = torch.from_numpy(text.top_ids[span.first : span.stop].astype(np.int64))
    theirs = seen.logits[after:].softmax(dim=-1).gather(1, named)
    yield float(np.abs(stored - theirs.numpy()).max()), CHANCE
    yield float(np.abs(stored - seen.top_probs[after:].numpy()).max()), CHANCE
