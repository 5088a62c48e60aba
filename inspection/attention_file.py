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
SCORES = "scores."
SHAPES = {
    "tokens": "T",
    "loss": "T-1",
    "value_norms": "L H T",
    "pattern_tril": "L H T(T+1)/2",
    "queries": "L H T D",
    "keys": "L H T D",
    "values": "L H T D",
    "attn_out": "L T C",
    "top_ids": "T N",
    "top_probs": "T N",
}
"""The shape of every array of a text; the first four are required."""
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
        tokens = np.asarray(cache.tokens).astype(np.int32)
        arrays: dict[str, Any] = {}
        for part in ("loss", "value_norms", *DETAILS):
            if (array := getattr(cache, part)) is not None:
                arrays[part] = np.asarray(array, dtype=np.float32)
        names = [token_bytes(token) for token in tokens.tolist()]
        record = AttentionRecord(name, tokens, names, pattern_tril=pattern[:, :, rows, columns], **arrays)
        if cache.top_tokens is None:
            return record
        return record.with_top(np.asarray(cache.top_tokens).astype(np.int32), np.asarray(cache.top_probs), token_bytes)

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
        arrays: dict[str, NDArray[Any]] = {part: getattr(self, part) for part in ("tokens", "loss", "value_norms")}
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
    """Read an attention file, and check that the shapes of its arrays fit together.

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
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is not a readable attention file: {reason}", CHECKPOINT) from error


def _parse(file: Any) -> AttentionFile:
    metadata = json.loads((file.metadata() or {}).get("glassgpt", "{}"))
    if metadata.pop("format", None) != FORMAT:
        raise ValueError(f"its metadata does not name the format {FORMAT}")
    names, vocabulary = metadata.pop("texts"), metadata.pop("token_bytes")
    if not all(isinstance(value, str) for value in (*names, *metadata.values())):
        raise ValueError("its metadata is malformed")
    token_bytes = {int(token): text.encode("latin-1") for token, text in vocabulary.items()}
    arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    texts = [_record(k, name, arrays, token_bytes) for k, name in enumerate(names)]
    scores = {name.removeprefix(SCORES): array for name, array in arrays.items() if name.startswith(SCORES)}
    shapes = {text.value_norms.shape[:2] for text in texts} | {array.shape for array in scores.values()}
    if len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
        raise ValueError("its texts and scores have different numbers of heads")
    return AttentionFile(texts, metadata, scores)


def _record(k: int, name: str, arrays: Mapping[str, NDArray[Any]], token_bytes: Mapping[int, bytes]) -> AttentionRecord:
    """Text k, with every shape checked against the others."""
    parts: dict[str, Any] = {part: arrays[f"{k}.{part}"] for part in SHAPES if f"{k}.{part}" in arrays}
    T = len(parts["tokens"])
    sizes = {"T": T, "T-1": T - 1, "T(T+1)/2": T * (T + 1) // 2}
    for part, array in parts.items():
        dims = zip(SHAPES[part].split(), array.shape, strict=True)
        if T < 1 or any(sizes.setdefault(dim, n) != n for dim, n in dims):
            raise ValueError(f"text {k}: the shape of {part} does not fit the others")
    tokens = parts["tokens"].tolist()
    top = (parts.pop("top_ids"), parts.pop("top_probs")) if "top_ids" in parts else None
    record = AttentionRecord(name, token_bytes=[token_bytes[token] for token in tokens], **parts)
    return record.with_top(*top, token_bytes.__getitem__) if top else record


def package_versions() -> str:
    """The versions of Python, torch and numpy as JSON, for the metadata."""
    versions = {package: version(package) for package in ("torch", "numpy")}
    return json.dumps({"python": platform.python_version(), **versions})
