"""Attention files: what `activation_cache` captured for several texts, written and read without torch.

An attention file is a safetensors file. For L layers, H heads of size D, residual stream of width C, and text k of T
tokens it holds:

    k.tokens        i32         (T,)                  token ids
    k.loss          f32         (T - 1,)              nats, of each token after the first
    k.value_norms   f32         (L, H, T)             |v_j W_O|
    k.pattern_tril  f16 or f32  (L, H, T (T + 1) / 2) attention pattern, the lower triangle row by row

and for texts with details:

    k.queries       f16 or f32  (L, H, T, D)          after QK norm and rotary embedding
    k.keys          f16 or f32  (L, H, T, D)          likewise; shared key heads are repeated
    k.values        f16 or f32  (L, H, T, D)          shared value heads are repeated
    k.attn_out      f32         (L, T, C)             attention's output, added to the residual stream
    k.top_ids       i32         (T, N)                the N most likely next tokens: 5, or V if that is less
    k.top_probs     f32         (T, N)                their probabilities

    scores.NAME     f32         (L, H)                a head score at this step; nan where it is undefined

softmax(q_i · k_j / √D) over j <= i is the pattern, within 1e-6 for f32 queries and keys.

The safetensors metadata has one entry, `glassgpt`: a JSON object of `format`, `texts` (names), `token_bytes` (bytes of
every token id in the file, as Latin-1) and what the caller adds, such as `step` and `weights_sha256`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.errors import CHECKPOINT, UserError
from common.files import write_atomic

FORMAT = "glassgpt-attention-1"
TOP_K = 5
"""Number of most likely next tokens that are kept for each position."""
LARGEST_F16 = 65504.0
SCORES = "scores."
SHAPES = {
    "tokens": ("I32", "T"),
    "loss": ("F32", "T-1"),
    "value_norms": ("F32", "L H T"),
    "pattern_tril": ("F16 F32", "L H T(T+1)/2"),
    "queries": ("F16 F32", "L H T D"),
    "keys": ("F16 F32", "L H T D"),
    "values": ("F16 F32", "L H T D"),
    "attn_out": ("F32", "L T C"),
    "top_ids": ("I32", "T N"),
    "top_probs": ("F32", "T N"),
}
"""dtypes and shape of every array of a text; the first four are required."""
REQUIRED = ("tokens", "loss", "value_norms", "pattern_tril")
DETAILS = ("queries", "keys", "values", "attn_out")


@dataclass(frozen=True)
class AttentionRecord:
    """The captured attention of one text: L layers, H heads of size D, T tokens, residual stream of width C."""

    name: str
    tokens: NDArray[np.int32]
    token_bytes: list[bytes]
    loss: NDArray[np.float32]
    value_norms: NDArray[np.float32]
    pattern_tril: NDArray[np.floating[Any]]
    """(L, H, T (T + 1) / 2), the lower triangle row by row: query i, key j at i (i + 1) / 2 + j."""
    queries: NDArray[np.floating[Any]] | None = None
    """(L, H, T, D), as are keys and values."""
    keys: NDArray[np.floating[Any]] | None = None
    values: NDArray[np.floating[Any]] | None = None
    attn_out: NDArray[np.float32] | None = None
    """(L, T, C)."""
    top_tokens: list[list[tuple[bytes, float]]] | None = None
    """For each position the most likely next tokens, most likely first: (bytes, probability)."""
    top_ids: NDArray[np.int32] | None = None
    """Their ids (T, N)."""

    @staticmethod
    def from_cache(name: str, cache: Any, token_bytes: Callable[[int], bytes]) -> AttentionRecord:
        """The record of an `ActivationCache`, or of anything with its fields.

        Args:
            token_bytes: the bytes of a token id.
        """
        pattern = np.asarray(cache.pattern, dtype=np.float32)
        rows, columns = np.tril_indices(pattern.shape[-1])
        details: dict[str, Any] = {}
        for part in DETAILS:
            if (array := getattr(cache, part, None)) is not None:
                details[part] = np.asarray(array, dtype=np.float32)
        top_ids, top_probs = getattr(cache, "top_tokens", None), getattr(cache, "top_probs", None)
        tokens = np.asarray(cache.tokens).astype(np.int32)
        record = AttentionRecord(
            name,
            tokens,
            [token_bytes(token) for token in tokens.tolist()],
            np.asarray(cache.loss, dtype=np.float32),
            np.asarray(cache.value_norms, dtype=np.float32),
            pattern[:, :, rows, columns],
            **details,
        )
        if top_ids is None or top_probs is None:
            return record
        return record.with_top(np.asarray(top_ids).astype(np.int32), np.asarray(top_probs, np.float32), token_bytes)

    def with_top(
        self, ids: NDArray[np.int32], probs: NDArray[np.float32], token_bytes: Callable[[int], bytes]
    ) -> AttentionRecord:
        """This record with the most likely next tokens, ids and probabilities (T, N)."""
        rows = zip(ids.tolist(), probs.tolist(), strict=True)
        top = [[(token_bytes(token), p) for token, p in zip(*row, strict=True)] for row in rows]
        return replace(self, top_tokens=top, top_ids=ids)

    def pattern(self, layer: int | None = None) -> NDArray[np.float32]:
        """Attention pattern (L, H, T, T), 0 above the diagonal; with `layer`, of that layer alone, (1, H, T, T).

        (1, H, T, T) is what transformers returns for each layer. bertviz's `head_view` takes
        `[torch.tensor(text.pattern(l)) for l in range(L)]`, CircuitsVis's `attention_patterns` takes
        `text.pattern(l)[0]`.
        """
        tril = self.pattern_tril if layer is None else self.pattern_tril[layer][None]
        T = len(self.tokens)
        pattern = np.zeros((*tril.shape[:2], T, T), dtype=np.float32)
        rows, columns = np.tril_indices(T)
        pattern[:, :, rows, columns] = tril
        return pattern

    def arrays(self, dtype: str) -> dict[str, NDArray[Any]]:
        """The arrays of this text as they are written, by name; `dtype` is that of the pattern."""
        half = np.dtype(np.float16 if dtype == "f16" else np.float32)
        arrays: dict[str, NDArray[Any]] = {part: getattr(self, part) for part in REQUIRED[:3]}
        arrays["pattern_tril"] = self.pattern_tril.astype(half)
        arrays |= {part: array for part in DETAILS if (array := getattr(self, part)) is not None}
        if self.top_tokens is not None and self.top_ids is not None:
            probs = [[p for _, p in row] for row in self.top_tokens]
            arrays |= {"top_ids": self.top_ids, "top_probs": np.array(probs, dtype=np.float32)}
        return arrays

    def vocabulary(self) -> dict[int, bytes]:
        """The bytes of every token id of this text."""
        pairs = dict(zip(self.tokens.tolist(), self.token_bytes, strict=True))
        if self.top_tokens is not None and self.top_ids is not None:
            top = (token for row in self.top_tokens for token, _ in row)
            pairs |= dict(zip(self.top_ids.ravel().tolist(), top, strict=True))
        return pairs


@dataclass(frozen=True)
class AttentionFile:
    """The contents of an attention file."""

    texts: list[AttentionRecord]
    metadata: dict[str, str]
    """Such as step, tokens_seen, config (JSON), vocab_size, weights_sha256, tokenizer_sha256, versions (JSON)."""
    scores: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Head scores by name, (L, H) each."""


def write_attention_file(
    path: Path | str,
    texts: Sequence[AttentionRecord],
    metadata: Mapping[str, str],
    scores: Mapping[str, ArrayLike] | None = None,
    dtype: str = "f16",
) -> None:
    """Write an attention file atomically.

    Args:
        metadata: see `AttentionFile.metadata`.
        scores: head scores (L, H) by name.
        dtype: of the patterns: `f16` (each value within 2^-12 of the fp32 one) or `f32`.

    Raises:
        UserError: if the file cannot be written (exit code 6).
    """
    arrays = {f"{k}.{part}": a for k, text in enumerate(texts) for part, a in text.arrays(dtype).items()}
    arrays |= {SCORES + name: np.asarray(table, dtype=np.float32) for name, table in (scores or {}).items()}
    vocabulary = {token: text for record in texts for token, text in record.vocabulary().items()}
    about = {
        **metadata,
        "format": FORMAT,
        "texts": [text.name for text in texts],
        "token_bytes": {str(token): vocabulary[token].decode("latin-1") for token in sorted(vocabulary)},
    }
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    # One metadata entry: safetensors writes several in an order that differs from run to run.
    write_atomic(Path(path), [save(contiguous, {"glassgpt": json.dumps(about, sort_keys=True)})])


def read_attention_file(path: Path | str) -> AttentionFile:
    """Read and check an attention file: known names, dtypes, and shapes that fit together.

    Raises:
        UserError: if the file is missing, damaged, or not an attention file (exit code 4).
    """
    path = Path(path)
    if not path.is_file():  # a pipe or device may never end
        reason = "not a regular file" if path.exists() else "No such file or directory"
        raise UserError(f"cannot read {path}: {reason}", CHECKPOINT)
    try:
        with safe_open(path, framework="numpy") as file:
            return _parse(file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}", CHECKPOINT) from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a readable attention file: {error}", CHECKPOINT) from error


def _parse(file: Any) -> AttentionFile:
    metadata = json.loads((file.metadata() or {}).get("glassgpt", "{}"))
    if not isinstance(metadata, dict) or metadata.pop("format", None) != FORMAT:
        raise ValueError(f"its metadata does not name the format {FORMAT}")
    names, vocabulary = metadata.pop("texts", None), metadata.pop("token_bytes", None)
    if not isinstance(names, list) or not isinstance(vocabulary, dict):
        raise ValueError("its list of texts or token bytes is missing")
    strings = [*names, *vocabulary.values(), *metadata.values()]
    if not all(isinstance(value, str) for value in strings):
        raise ValueError("its metadata is malformed")
    token_bytes = {int(token): text.encode("latin-1") for token, text in vocabulary.items()}
    arrays = {name: _load(file, name, len(names)) for name in file.keys()}  # noqa: SIM118 (not a dict)
    texts = [_record(k, name, arrays, token_bytes) for k, name in enumerate(names)]
    scores = {name.removeprefix(SCORES): array for name, array in arrays.items() if name.startswith(SCORES)}
    shapes = {text.value_norms.shape[:2] for text in texts} | {array.shape for array in scores.values()}
    if len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
        raise ValueError("its texts and scores have different numbers of heads")
    return AttentionFile(texts, metadata, scores)


def _load(file: Any, name: str, n_texts: int) -> NDArray[Any]:
    """An array of a known name and dtype."""
    number, _, part = name.partition(".")
    known = name.startswith(SCORES) or (number.isdecimal() and int(number) < n_texts and part in SHAPES)
    dtypes = "F32" if name.startswith(SCORES) else SHAPES.get(part, ("", ""))[0]
    if not known or file.get_slice(name).get_dtype() not in dtypes.split():
        raise ValueError(f"its array {name!r} is unknown or has a wrong dtype")
    array: NDArray[Any] = file.get_tensor(name)
    return array


def _record(k: int, name: str, arrays: Mapping[str, NDArray[Any]], token_bytes: Mapping[int, bytes]) -> AttentionRecord:
    """Text k, with every shape checked against the others."""
    parts: dict[str, Any] = {part: arrays[f"{k}.{part}"] for part in SHAPES if f"{k}.{part}" in arrays}
    if missing := [part for part in REQUIRED if part not in parts]:
        raise ValueError(f"text {k} has no {missing[0]}")
    T = len(parts["tokens"]) if parts["tokens"].ndim else 0
    sizes = {"T": T, "T-1": T - 1, "T(T+1)/2": T * (T + 1) // 2}
    for part, array in parts.items():
        dims = SHAPES[part][1].split()
        if (
            T < 1
            or len(dims) != array.ndim
            or any(sizes.setdefault(d, n) != n for d, n in zip(dims, array.shape, strict=True))
        ):
            raise ValueError(f"text {k}: the shape of {part} does not fit the others")
    if ("top_ids" in parts) != ("top_probs" in parts) or not 1 <= sizes.get("N", 1) <= TOP_K:
        raise ValueError(f"text {k}: the most likely next tokens are malformed")
    top_ids, top_probs = parts.pop("top_ids", None), parts.pop("top_probs", None)
    ids = parts["tokens"].tolist() + ([] if top_ids is None else top_ids.ravel().tolist())
    if unknown := set(ids) - token_bytes.keys():
        raise ValueError(f"text {k}: the bytes of token {min(unknown)} are missing")
    record = AttentionRecord(name, token_bytes=[token_bytes[token] for token in parts["tokens"].tolist()], **parts)
    return record if top_ids is None else record.with_top(top_ids, top_probs, token_bytes.__getitem__)


def package_versions() -> str:
    """The versions of Python, torch and numpy as JSON, for the metadata."""
    versions = {package: version(package) for package in ("torch", "numpy")}
    return json.dumps({"python": platform.python_version(), **versions})
