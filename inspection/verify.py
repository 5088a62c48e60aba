"""Recompute an attention file from the model that it was captured from, and compare."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from inspection.activation_cache import run_with_cache
from inspection.attention_file import AttentionFile, AttentionRecord
from inspection.eval_texts import EvalTexts
from inspection.head_scores import compute_head_scores
from model.gpt import GPT

PATTERN_TOLERANCE = {2: 2.0**-11, 4: 1e-6}
"""By item size in bytes: rounding to f16, or the last bits of fp32, which depend on CPU and threads."""
LOSS_TOLERANCE = 1e-4
"""In nats."""
RELATIVE_TOLERANCE = 1e-5
"""Relative to the largest value."""


@dataclass(frozen=True)
class Check:
    """The outcome of one check of a file."""

    check: str
    ok: bool
    difference: float | None = None
    """The largest difference; None for values that are only equal or not."""
    tolerance: float | None = None
    where: str = ""
    """The text or score with the largest difference, or what is wrong."""


def verify_attention_file(
    file: AttentionFile, model: GPT, metadata: Mapping[str, str], texts: EvalTexts | None = None
) -> list[Check]:
    """Compare what a file records of the checkpoint, its patterns, losses and scores with the model.

    Args:
        metadata: what the file should record about the checkpoint: config, `weights_sha256`, `tokenizer_sha256`.
        texts: on which the heads were scored; without it scores are not recomputed.
    """
    checks = [Check("config", _config(file.metadata) == _config(metadata))]
    checks += [Check(key, file.metadata.get(key) == metadata[key]) for key in ("weights_sha256", "tokenizer_sha256")]
    shape = (model.config.n_layers, model.config.n_heads)
    for text in file.texts:
        fits = text.value_norms.shape[:2] == shape and len(text.tokens) <= model.config.context
        if not fits or text.tokens.min() < 0 or text.tokens.max() >= model.vocab_size:
            return [*checks, Check("shape", False, where=f"{text.name} does not fit the model")]
    checks += _largest(check for text in file.texts for check in _text_checks(text, model))
    if texts is not None and file.scores:
        checks += _largest(_score_checks(file, model, texts))
    return checks


def _config(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The model's config, without the attention implementation, which does not change the model."""
    try:
        config = json.loads(metadata["config"])
        return {key: value for key, value in config.items() if key != "attention"}
    except (KeyError, ValueError, AttributeError, RecursionError):
        return None


def _text_checks(text: AttentionRecord, model: GPT) -> Iterator[Check]:
    cache = run_with_cache(model, torch.from_numpy(text.tokens.astype(np.int64)))
    tolerance = PATTERN_TOLERANCE[text.pattern_tril.itemsize]
    for layer, pattern in enumerate(cache.pattern.numpy()):  # by layer: all layers unpacked at once are large
        yield _check("pattern", _max_difference(text.pattern(layer)[0], pattern), tolerance, text.name)
    yield _check("loss", _max_difference(text.loss, cache.loss), LOSS_TOLERANCE, text.name)


def _score_checks(file: AttentionFile, model: GPT, texts: EvalTexts) -> Iterator[Check]:
    recomputed = compute_head_scores(model, texts)
    for name in {**file.scores, **recomputed}:
        difference = math.inf
        if name in file.scores and name in recomputed:
            scale = max(1.0, float(recomputed[name].abs().max()))
            difference = _max_difference(file.scores[name], recomputed[name]) / scale
        yield _check("scores", difference, RELATIVE_TOLERANCE, name)


def _check(name: str, difference: float, tolerance: float, where: str) -> Check:
    return Check(name, difference <= tolerance, difference, tolerance, where)


def _max_difference(stored: NDArray[Any], recomputed: ArrayLike) -> float:
    """The largest absolute difference; infinite if one of the two has a nan where the other has none."""
    a, b = np.asarray(stored, dtype=np.float64), np.asarray(recomputed, dtype=np.float64)
    if a.shape != b.shape or (np.isnan(a) != np.isnan(b)).any():
        return math.inf
    return float(np.abs(np.nan_to_num(a) - np.nan_to_num(b)).max(initial=0.0))


def _largest(checks: Iterable[Check]) -> list[Check]:
    """One check of each name: that with the largest difference in relation to its tolerance."""
    every = list(checks)
    same_name = [[check for check in every if check.check == name] for name in dict.fromkeys(c.check for c in every)]
    return [max(same, key=lambda check: (check.difference or 0.0) / (check.tolerance or 1.0)) for same in same_name]
