"""Is an attention file what it says it is? Each check measures how far off it is, and beside it stands the bound.

After `dump.read`, which has found the file whole: first what the numbers say about themselves, then, with the model
that they are said to come from, everything computed again (`recompute.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields

import numpy as np
from numpy.typing import ArrayLike

from inspection.attention_file import AttentionFile
from inspection.finding import HALF_STEP, WEIGHT, CheckResult, Measured, layers, most, spans, worst
from inspection.recompute import recomputed, scores_recomputed
from model.config import ModelConfig
from model.gpt import GPT

METADATA = ("config", "vocab_size", "step", "tokens_seen", "weights_sha256", "tokenizer_sha256", "versions")


def verify_dump(
    dump: AttentionFile,
    model: GPT | None = None,
    hashes: Mapping[str, str] | None = None,
    token_bytes: Callable[[int], bytes] | None = None,
    scores: Callable[[GPT], Mapping[str, ArrayLike]] | None = None,
) -> list[CheckResult]:
    """All checks that can be made with what is given; the file is good if all are `ok`.

    Args:
        model: with the weights that the file is said to come from; without it nothing is computed again.
        hashes: what `weights_sha256` and `tokenizer_sha256` have to be.
        token_bytes: of the tokenizer that the file is said to come from.
        scores: computes the scores of every head, by name, as they were computed for this file.
    """
    with np.errstate(all="ignore"):  # what is not finite fails its check without a warning
        findings = [_metadata(dump), *_inside(dump)]
        findings += [_same(key, dump.metadata.get(key, ""), wanted) for key, wanted in (hashes or {}).items()]
        if token_bytes is not None:
            findings.append(worst("tokens with other bytes", _spelling(dump, token_bytes)))
        if model is None:
            return findings
        problems = _strangers(dump, model.config, model.vocab_size)
        findings.append(
            CheckResult("the model has this shape", not problems, len(problems), 0, "; ".join(problems[:3]))
        )
        if not problems:
            findings += recomputed(dump, model)
            if scores is not None and dump.scores:
                findings.append(scores_recomputed(dump, scores(model)))
        return findings


def _config(dump: AttentionFile) -> ModelConfig:
    """Raises ValueError if the metadata holds none."""
    try:
        return ModelConfig(**json.loads(dump.metadata["config"]))
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("its config is malformed") from error


def _metadata(dump: AttentionFile) -> CheckResult:
    """Whether all is there that says where the file comes from, and its arrays have the shape that it states."""
    problems = [f"no {key}" for key in METADATA if key not in dump.metadata]
    try:
        config, vocab_size = _config(dump), int(dump.metadata.get("vocab_size", ""))
        problems += _strangers(dump, config, vocab_size)
    except ValueError as error:
        problems.append(str(error))
    return CheckResult("metadata and shapes", not problems, len(problems), 0, "; ".join(problems[:3]))


def _strangers(dump: AttentionFile, config: ModelConfig, vocab_size: int) -> list[str]:
    """What does not fit a model of this shape."""
    problems = []
    heads, width = (config.n_layers, config.n_heads), config.d_head
    for text in dump.texts:
        T = len(text.tokens)
        try:
            windows = spans(dump.metadata, T)
        except (ValueError, RecursionError) as error:
            return [str(error)]
        wide = [part for part in (text.queries, text.keys, text.values) if part is not None]
        if text.value_norms.shape[:2] != heads:
            problems.append(f"{text.name}: heads {text.value_norms.shape[:2]}, not {heads}")
        if any(part.shape[-1] != width for part in wide):
            problems.append(f"{text.name}: heads are not {width} wide")
        if text.attn_out is not None and text.attn_out.shape[-1] != config.d_model:
            problems.append(f"{text.name}: the residual stream is not {config.d_model} wide")
        if len(windows) > 1 and (wide or text.attn_out is not None):
            problems.append(f"{text.name}: queries, keys, values or sums of more than one window")
        if (longest := max(span.stop - span.start for span in windows)) > config.context:
            problems.append(f"{text.name}: {longest} tokens in a context of {config.context}")
        ids = [text.tokens, *([] if text.top_ids is None else [text.top_ids])]
        if any(array.min() < 0 or array.max() >= vocab_size for array in ids):
            problems.append(f"{text.name}: a token outside the vocabulary of {vocab_size}")
    return problems


def _same(name: str, found: str, wanted: str) -> CheckResult:
    return CheckResult(name, found == wanted, found, wanted)


def _spelling(dump: AttentionFile, token_bytes: Callable[[int], bytes]) -> Measured:
    for text in dump.texts:
        pairs = list(zip(text.tokens.tolist(), text.token_bytes, strict=True))
        if text.top_tokens is not None and text.top_ids is not None:
            likely = [piece for row in text.top_tokens for piece, _ in row]
            pairs += zip(text.top_ids.flatten().tolist(), likely, strict=True)
        yield text.name, sum(_bytes(token_bytes, token) != piece for token, piece in pairs), 0


def _bytes(token_bytes: Callable[[int], bytes], token: int) -> bytes | None:
    try:
        return token_bytes(token)
    except Exception:  # whatever a tokenizer says to a token that is none of its own
        return None


# What the numbers say about themselves.


def _inside(dump: AttentionFile) -> list[CheckResult]:
    asked = any(text.queries is not None and text.keys is not None for text in dump.texts)
    return [
        worst("numbers that are not finite", _not_finite(dump)),
        worst("rows sum to 1", _row_sums(dump)),
        worst("weights lie in 0 to 1", _range(dump)),
        worst("weight outside of what may be read", _outside(dump)),
        *([worst("weights from the stored queries and keys", _from_queries(dump))] if asked else []),
    ]


def _not_finite(dump: AttentionFile) -> Measured:
    for text in dump.texts:
        arrays = [getattr(text, field.name) for field in fields(text)]
        numbers = [a for a in arrays if isinstance(a, np.ndarray) and a.dtype.kind == "f"]
        likely = [chance for row in text.top_tokens or [] for _, chance in row]
        count = sum(int((~np.isfinite(array)).sum()) for array in [*numbers, np.array(likely)])
        yield text.name, count, 0
    for name, score in dump.scores.items():  # nan says that a head has no such score
        yield f"score {name}", int(np.isinf(score).sum()), 0


def _row_sums(dump: AttentionFile) -> Measured:
    """T numbers that sum to 1, each rounded to f16 by 2^-12 of itself, or by 2^-25 where it is smaller than 2^-14."""
    for text in dump.texts:
        T = len(text.tokens)
        bound = T * 2.0**-24 + 1e-6 if text.pattern_tril.itemsize == 4 else HALF_STEP + T * 2.0**-25
        off = [float(np.abs(weights.sum(axis=-1, dtype=np.float64) - 1).max()) for weights in layers(text)]
        yield text.name, most(off), bound


def _range(dump: AttentionFile) -> Measured:
    for text in dump.texts:
        least, highest = text.pattern_tril.min(), text.pattern_tril.max()
        yield text.name, float(np.maximum(np.maximum(0 - least, highest - 1), 0)), WEIGHT[4]


def _outside(dump: AttentionFile) -> Measured:
    """No place in the file holds weight on a later token; what lies before a query's window has to be 0."""
    for text in dump.texts:
        try:
            windows = spans(dump.metadata, len(text.tokens))
        except (ValueError, RecursionError):
            windows = []  # `_metadata` has said so
        off = []
        for weights in layers(text):
            off.append(float(np.abs(np.triu(weights, 1)).max()))
            before = [weights[:, span.first : span.stop, : span.start] for span in windows if span.start]
            off += [float(np.abs(part).max()) for part in before]
        yield text.name, most(off), 0


def _from_queries(dump: AttentionFile) -> Measured:
    """softmax(q · k / √D) again. Roundings of q and k move a score by at most 2^-10 Σ |q_d k_d| / √D where they are
    f16, and a weight by at most half of that."""
    for text in dump.texts:
        if text.queries is None or text.keys is None:
            continue
        T, D = text.queries.shape[-2:]
        future = np.triu(np.full((T, T), -np.inf, dtype=np.float32), 1)
        for layer, weights in enumerate(layers(text)):
            q, k = text.queries[layer].astype(np.float32), text.keys[layer].astype(np.float32)
            raised = q @ k.swapaxes(-1, -2) / np.sqrt(np.float32(D)) + future
            raised = np.exp(raised - raised.max(axis=-1, keepdims=True))
            off = float(np.abs(raised / raised.sum(axis=-1, keepdims=True) - weights).max())
            rounded = text.queries.itemsize == 2
            slack = HALF_STEP * float((np.abs(q) @ np.abs(k).swapaxes(-1, -2)).max()) / math.sqrt(D) if rounded else 0
            yield text.name, off, WEIGHT[text.pattern_tril.itemsize] + slack
