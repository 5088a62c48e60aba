"""Attention files: what `activation_cache` captured for several texts, written and read without torch.

An attention file is a safetensors file. Of text k it holds the arrays of `SHAPES`, named `k.tokens`, `k.loss` and so on, and of
each head score `scores.NAME`, f32 (L, H); nan where it is undefined. The safetensors metadata has one entry, `glassgpt`: a JSON
object of `format`, `texts` (names), `token_bytes` (bytes of every token id in the file, as Latin-1) and what the caller adds.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import safe_open
from safetensors.numpy import save

from common.errors import CHECKPOINT, RemovedError, UserError
from common.files import reading, write_atomic

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer
    from model.gpt import GPT

FORMAT = "glassgpt-attention-1"
TOP_K = 5  # Number of most likely next tokens that are kept for each position.
SCORES = "scores."
SHAPES = {
    "tokens": "T",  # i32, token ids
    "loss": "T-1",  # f32, nats, of each token after the first
    "value_norms": "L H T",  # f32, |v_j W_O|
    "pattern_tril": "L H T(T+1)/2",  # f16 or f32, the pattern's lower triangle row by row: A[i, j] at i (i + 1) / 2 + j
    "top_ids": "T N",  # i32, the N most likely next tokens, most likely first: 5, or V if that is less
    "top_probs": "T N",  # f32, their probabilities
    # Texts with details only:
    "queries": "L H T D",  # f16 or f32, after QK norm and rotary embedding
    "keys": "L H T D",  # likewise; shared key and value heads are repeated
    "values": "L H T D",
    "attn_out": "L T C",  # f32, what the layer's attention adds to the residual stream
}
"""The arrays of a text of T tokens: L layers, H heads of size D, residual stream of width C.

softmax(q_i · k_j / √D) over j <= i is the pattern, within 1e-6 for f32 queries and keys."""
DETAILS = ("queries", "keys", "values", "attn_out")


@dataclass(frozen=True)
class AttentionRecord:
    """The captured attention of one text; see `SHAPES`."""

    name: str
    vocabulary: Mapping[int, bytes]  # The bytes of every token id in `tokens` and `top_ids`.
    tokens: NDArray[np.int32]
    loss: NDArray[np.float32]
    value_norms: NDArray[np.float32]
    pattern_tril: NDArray[np.floating[Any]]
    top_ids: NDArray[np.int32]
    top_probs: NDArray[np.float32]
    queries: NDArray[np.floating[Any]] | None = None
    keys: NDArray[np.floating[Any]] | None = None
    values: NDArray[np.floating[Any]] | None = None
    attn_out: NDArray[np.float32] | None = None

    @staticmethod
    def from_cache(name: str, cache: Any, token_bytes: Callable[[int], bytes]) -> AttentionRecord:
        """The record of an `ActivationCache`; `token_bytes` gives the bytes of a token id."""
        rows, columns = np.tril_indices(len(cache.tokens))
        arrays: dict[str, Any] = {"pattern_tril": np.asarray(cache.pattern, dtype=np.float32)[:, :, rows, columns]}
        for part in SHAPES:
            if (array := getattr(cache, part, None)) is not None:
                arrays[part] = np.asarray(array).astype(np.int32 if part in ("tokens", "top_ids") else np.float32)
        return AttentionRecord(name, {token: token_bytes(token) for token in _token_ids(arrays)}, **arrays)

    @property
    def token_bytes(self) -> list[bytes]:
        return [self.vocabulary[token] for token in self.tokens.tolist()]

    @property
    def top_tokens(self) -> list[list[tuple[bytes, float]]]:
        """For each position the most likely next tokens, most likely first: (bytes, probability)."""
        rows = zip(self.top_ids.tolist(), self.top_probs.tolist(), strict=True)
        return [[(self.vocabulary[token], p) for token, p in zip(*row, strict=True)] for row in rows]

    def pattern(self, layer: int | None = None) -> NDArray[np.float32]:
        """Attention pattern (L, H, T, T), 0 above the diagonal; with `layer`, of that layer alone, (1, H, T, T)."""
        tril = self.pattern_tril if layer is None else self.pattern_tril[layer][None]
        T = len(self.tokens)
        pattern = np.zeros((*tril.shape[:2], T, T), dtype=np.float32)
        rows, columns = np.tril_indices(T)
        pattern[:, :, rows, columns] = tril
        return pattern


def _token_ids(arrays: Mapping[str, NDArray[Any]]) -> list[int]:
    return np.unique(np.concatenate([arrays["tokens"], arrays["top_ids"].ravel()])).tolist()


@dataclass(frozen=True)
class AttentionFile:
    """The contents of an attention file."""

    texts: list[AttentionRecord]
    metadata: dict[str, str]
    """Such as step, tokens_seen, config (JSON), vocab_size, weights_sha256, tokenizer_sha256, versions (JSON)."""
    scores: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # by name, (L, H) each

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, heads) of the model; (0, 0) for an empty file."""
        shapes = [*(text.value_norms.shape for text in self.texts), *(values.shape for values in self.scores.values())]
        return (shapes[0][0], shapes[0][1]) if shapes else (0, 0)


@dataclass(frozen=True)
class LoadedModel:
    """The model of a checkpoint, with what an attention file records about it."""

    model: GPT
    step: int
    metadata: Mapping[str, str]
    tokenizer: Tokenizer
    encode: Callable[[str], list[int]]  # Text -> tokens, after end-of-text if the training documents began with it.

    @property
    def token_bytes(self) -> Callable[[int], bytes]:
        return self.tokenizer.token_bytes


def write_attention_file(
    path: Path | str,
    texts: Sequence[AttentionRecord],
    metadata: Mapping[str, str],
    scores: Mapping[str, ArrayLike] | None = None,
    dtype: str = "f16",
) -> None:
    """Write an attention file atomically; `metadata` and `scores` as in `AttentionFile`.

    The patterns are stored as `dtype`: `f16` (each value within 2^-12 of the fp32 one) or `f32`. Raises UserError (exit
    code 6) if the file cannot be written.
    """
    arrays = {SCORES + name: np.asarray(table, dtype=np.float32) for name, table in (scores or {}).items()}
    for k, text in enumerate(texts):
        parts = {part: array for part in SHAPES if (array := getattr(text, part)) is not None}
        parts["pattern_tril"] = parts["pattern_tril"].astype(np.float16 if dtype == "f16" else np.float32)
        arrays |= {f"{k}.{part}": array for part, array in parts.items()}
    vocabulary = {str(token): word.decode("latin-1") for text in texts for token, word in text.vocabulary.items()}
    versions = {"python": platform.python_version(), **{package: version(package) for package in ("torch", "numpy")}}
    names = [text.name for text in texts]
    about = {"versions": json.dumps(versions), **metadata, "format": FORMAT, "texts": names, "token_bytes": vocabulary}
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    # One metadata entry: safetensors writes several in an order that differs from run to run.
    write_atomic(Path(path), [save(contiguous, {"glassgpt": json.dumps(about, sort_keys=True)})])


def read_attention_file(path: Path | str) -> AttentionFile:
    """Read an attention file, and check that the shapes of its arrays fit together. Raises UserError (exit code 4) if it is
    missing, damaged, or not an attention file."""
    if not Path(path).is_file():  # a pipe or device may never end
        raise (UserError if Path(path).exists() else RemovedError)(f"{path} is not a file", CHECKPOINT)
    with reading(path, "attention file"), safe_open(path, framework="numpy") as file:
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
    return AttentionRecord(name, {token: token_bytes[token] for token in _token_ids(parts)}, **parts)
