"""The writer of attention files; `dump.py` says what stands in them, and reads them."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.files import write_atomic
from common.safetensors_header import file_head
from inspection.attention_file import DTYPES, FORMAT, SCORES

LARGEST_HALF = 65504.0
Chunk = bytes | memoryview


@runtime_checkable
class Observed(Protocol):
    """What is written of a text; a `capture.ActivationCache` is one.

    Besides, its weights: `pattern` (L, H, T, T), or `packed` as in `dump.AttentionRecord`. What it has of queries, keys,
    values, attn_out, top and top_p (see `ActivationCache`) is written too.
    """

    @property
    def tokens(self) -> Any: ...
    @property
    def value_norms(self) -> Any: ...
    @property
    def loss(self) -> Any: ...


def _stored(array: Any, dtype: str) -> NDArray[Any]:
    """In the number format asked for; f32 where f16 would overflow."""
    wide = np.asarray(array, dtype="<f4")
    if dtype == "f16" and (np.abs(wide) > LARGEST_HALF).any():
        return wide
    return wide.astype(DTYPES[dtype.upper()])


def _triangle(capture: Observed, dtype: str) -> NDArray[Any]:
    """The weights on and below the diagonal, row by row."""
    if (packed := getattr(capture, "pattern_tril", None)) is not None:
        return np.asarray(packed, dtype=DTYPES[dtype.upper()])
    pattern = np.asarray(capture.pattern, dtype=np.float32)  # type: ignore[attr-defined]
    rows, columns = np.tril_indices(pattern.shape[-1])
    return pattern[:, :, rows, columns].astype(DTYPES[dtype.upper()])


def _joined(pieces: Sequence[bytes]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Where each piece ends, and all of them in a row."""
    return np.cumsum([len(piece) for piece in pieces], dtype="<i4"), np.frombuffer(b"".join(pieces), dtype=np.uint8)


def _details(capture: Observed, token_bytes: Callable[[int], bytes] | None, dtype: str) -> dict[str, NDArray[Any]]:
    """The optional arrays that the capture has."""
    found = {}
    for part in ("queries", "keys", "values"):
        if (array := getattr(capture, part, None)) is not None:
            found[part] = _stored(array, dtype)
    if (attn_out := getattr(capture, "attn_out", None)) is not None:
        found["attn_out"] = np.asarray(attn_out, dtype="<f4")
    if (top := getattr(capture, "top_tokens", None)) is not None:
        if token_bytes is None:
            raise ValueError("the likeliest next tokens can only be written with the bytes of any token")
        found["top_tokens"] = np.asarray(top).astype("<i4")
        found["top_probs"] = np.asarray(capture.top_probs, dtype="<f4")  # type: ignore[attr-defined]
        found["top_ends"], found["top_bytes"] = _joined([token_bytes(int(token)) for token in found["top_tokens"].flat])
    return found


def _arrays(
    capture: Observed, texts: Sequence[bytes], token_bytes: Callable[[int], bytes] | None, dtype: str, details: str
) -> dict[str, NDArray[Any]]:
    T = len(capture.tokens)
    if len(texts) != T:
        raise ValueError(f"{len(texts)} token texts for {T} tokens")
    ends, whole = _joined(texts)
    return {
        "pattern": _triangle(capture, dtype),
        "value_norms": np.asarray(capture.value_norms, dtype="<f4"),
        "loss": np.asarray(capture.loss, dtype="<f4"),
        "tokens": np.asarray(capture.tokens).astype("<i4"),
        "ends": ends,
        "bytes": whole,
        **_details(capture, token_bytes, details),
    }


def _serialize(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> list[Chunk]:
    """The file as chunks. Wide numbers come first: each array begins at a multiple of its item's size."""
    names = {kind: name for name, kind in DTYPES.items()}
    ordered = sorted(arrays.items(), key=lambda item: -item[1].itemsize)
    head = file_head(((name, names[a.dtype.str], a.shape, a.nbytes) for name, a in ordered), metadata)
    # Each array as it lies there, without a copy.
    return [head, *(np.ascontiguousarray(a).reshape(-1).view(np.uint8).data for _, a in ordered)]


def write_attention_file(
    path: Path | str,
    captures: Sequence[tuple[str, Observed, Sequence[bytes]]],
    metadata: Mapping[str, str],
    dtype: str = "f16",
    scores: Mapping[str, ArrayLike] | None = None,
    token_bytes: Callable[[int], bytes] | None = None,
    details: str | None = None,
) -> None:
    """Write (name, capture, bytes of each token) of several texts; `path` is replaced whole or not at all.

    Args:
        metadata: strings; see the head of `dump.py`.
        dtype: of the weights: `f16` (each within 2^-12 of the fp32 one) or `f32`.
        scores: of every head, (L, H) by name.
        token_bytes: the bytes of any token; needed where a capture holds the likeliest next ones.
        details: of queries, keys and values; by default that of the weights. In f16 the scores that are computed
            from them are a few thousandths off.

    Raises:
        UserError: if the file cannot be written (exit code 6).
        ValueError: if a text has not as many token texts as tokens, or `token_bytes` is missing.
    """
    assert dtype in ("f16", "f32"), dtype
    arrays: dict[str, NDArray[Any]] = {}
    for k, (_, capture, texts) in enumerate(captures):
        parts = _arrays(capture, texts, token_bytes, dtype, details or dtype)
        arrays |= {f"{k}.{part}": array for part, array in parts.items()}
    arrays |= {SCORES + name: np.asarray(table, dtype="<f4") for name, table in (scores or {}).items()}
    ours = {"format": FORMAT, "texts": json.dumps([name for name, _, _ in captures])}
    write_atomic(Path(path), _serialize(arrays, {**metadata, **ours}))


def package_versions() -> str:
    """Of what computed the weights, as the string that the metadata holds."""
    found = {package: version(package) for package in ("torch", "numpy")}
    return json.dumps({"python": platform.python_version(), **found})
