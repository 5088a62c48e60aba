"""The attention file: what `capture.py` saw of several texts, and a reader that needs numpy alone.

`record.py` writes it. This file stands on numpy and the standard library: copied anywhere, it reads.

The file is ordinary safetensors (eight bytes of header length, a JSON header, the raw numbers), so every
library for that format opens it; `read` here needs neither such a library nor torch. For L layers, H heads of
width D, residual stream of width C, and text k of n with T tokens:

    k.pattern      f16 or f32  (L, H, T (T + 1) / 2)  attention weights, the lower triangle row by row
    k.value_norms  f32         (L, H, T)              |v_j W_O|: length of what each position hands over
    k.loss         f32         (T - 1,)               nats of each token after the first
    k.tokens       i32         (T,)                   token ids
    k.ends         i32         (T,)                   where each token's bytes end in k.bytes
    k.bytes        u8          (bytes,)               the bytes of all tokens, one after the other

and, where more was asked for (a file of an older version has none of them):

    k.queries      f16 or f32  (L, H, T, D)  as the scores use them: normalised, turned by their position
    k.keys         f16 or f32  (L, H, T, D)  the same of keys; those that heads share are repeated for each
    k.values       f16 or f32  (L, H, T, D)  what a weight is multiplied with, repeated likewise
    k.attn_out    f32         (L, T, C)     what the layer's attention adds to the residual stream
    k.top_tokens          i32         (T, N)        the N likeliest next tokens: five, or a vocabulary of fewer
    k.top_probs        f32         (T, N)        their probabilities
    k.top_ends     i32         (T N,)        where the bytes of each end in k.top_bytes
    k.top_bytes    u8          (bytes,)      their bytes
    scores.NAME    f32         (L, H)        a score of every head at this step; nan where it has none

softmax(q_i · k_j / √D) over j <= i is the pattern; from f32 queries and keys it comes back within 1e-6, and in
the same number format the two are smaller than the pattern in texts of T >= 4 D tokens.

Metadata, all strings: `format` and `texts` (a JSON list of the texts' names) are written by `record.py`; its
caller adds `config` (JSON), `vocab_size`, `step`, `tokens_seen`, `weights_sha256`, `tokenizer_sha256` and
`versions` (JSON). Where a text outgrew the context while the model wrote it, `windows` (JSON) says what each query
could read: [first query, start] for a stretch of queries that read from `start` on, zero before it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = "glassgpt-attention-1"
DTYPES = {"F16": "<f2", "F32": "<f4", "I32": "<i4", "U8": "|u1"}
MAX_HEADER = 100_000_000
"""Bytes; the bound of the safetensors format."""
TOP_K = 5
"""How many of the likeliest next tokens are kept of each position."""
SCORES = "scores."

HALF, FLOAT, INT, BYTE = ("<f2", "<f4"), ("<f4",), ("<i4",), ("|u1",)
REQUIRED = {
    "pattern": (HALF, 3),
    "value_norms": (FLOAT, 3),
    "loss": (FLOAT, 1),
    "tokens": (INT, 1),
    "ends": (INT, 1),
    "bytes": (BYTE, 1),
}
OPTIONAL = {
    "queries": (HALF, 4),
    "keys": (HALF, 4),
    "values": (HALF, 4),
    "attn_out": (FLOAT, 3),
    "top_tokens": (INT, 2),
    "top_probs": (FLOAT, 2),
    "top_ends": (INT, 1),
    "top_bytes": (BYTE, 1),
}
"""Of each part of a text: the number formats that it may have, and its number of dimensions."""


@dataclass(frozen=True)
class AttentionRecord:
    """One text of a dump: L layers, H heads of width D, T tokens, residual stream of width C."""

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
    """For each of T positions the likeliest next tokens, likeliest first: (bytes, probability)."""
    top_ids: NDArray[np.int32] | None = None
    """Their ids (T, N)."""

    def pattern(self, layer: int | None = None) -> NDArray[np.float32]:
        """Attention weights (L, H, T, T), 0 above the diagonal; with `layer`, that layer alone, (1, H, T, T).

        (1, H, T, T), a batch of one, is what transformers returns for each layer. bertviz's `head_view` takes
        `[torch.tensor(text.pattern(l)) for l in range(L)]`; CircuitsVis's `attention_patterns` takes
        `text.pattern(l)[0]`.
        """
        packed = self.pattern_tril if layer is None else self.pattern_tril[layer][None]
        T = len(self.tokens)
        full = np.zeros((*packed.shape[:2], T, T), dtype=np.float32)
        rows, columns = np.tril_indices(T)
        full[:, :, rows, columns] = packed
        return full


@dataclass(frozen=True)
class AttentionFile:
    """All texts of an attention file, and what it says about the model."""

    texts: list[AttentionRecord]
    metadata: dict[str, str]
    scores: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """By name, (L, H) each."""


class _Broken(ValueError):
    """What is wrong with a file; `read` puts its name to it."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Broken("its header names something twice")
    return found


def _header(raw: bytes) -> tuple[dict[str, Any], memoryview]:
    """The JSON header, and the numbers behind it."""
    if len(raw) < 8:
        raise _Broken("it is too short")
    (length,) = struct.unpack("<Q", raw[:8])
    if length > min(len(raw) - 8, MAX_HEADER):
        raise _Broken(f"its header claims {length} bytes")
    try:
        header = json.loads(raw[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique)
    except _Broken:
        raise
    except (ValueError, RecursionError) as error:
        raise _Broken("its header is no JSON") from error
    if not isinstance(header, dict):
        raise _Broken("its header is no table")
    return header, memoryview(raw)[8 + length :]


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _array(name: str, entry: object, data: memoryview) -> tuple[int, int, NDArray[Any]]:
    """(begin, end, array) of one entry of the header, every number in it checked."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Broken(f"the entry {name!r} is malformed")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise _Broken(f"{name!r} has an unknown type")
    for numbers, most in ((shape, 4), (offsets, 2)):
        if not isinstance(numbers, list) or not 1 <= len(numbers) <= most or not all(map(_whole, numbers)):
            raise _Broken(f"the entry {name!r} is malformed")
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= len(data):
        raise _Broken(f"{name!r} lies outside the file")
    dtype = np.dtype(DTYPES[kind])
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise _Broken(f"{name!r} does not fill its place")
    if not math.prod(shape) and max(shape) > len(data):
        raise _Broken(f"{name!r} is malformed")  # nothing by very much: numpy refuses such shapes
    return offsets[0], offsets[1], np.frombuffer(data[offsets[0] : offsets[1]], dtype).reshape(shape)


def _arrays_of(header: dict[str, Any], data: memoryview) -> dict[str, NDArray[Any]]:
    found = {name: _array(name, entry, data) for name, entry in header.items() if name != "__metadata__"}
    covered = 0
    for begin, end, _ in sorted(found.values(), key=lambda item: item[:2]):
        if begin < covered:
            raise _Broken("its arrays overlap")
        covered = max(covered, end)
    return {name: array for name, (_, _, array) in found.items()}


def _metadata(header: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The metadata and the names of the texts."""
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Broken("it has no metadata")
    if metadata.get("format") != FORMAT:
        raise _Broken(f"it is no {FORMAT} file")
    try:
        names = json.loads(metadata.get("texts", ""))
    except (ValueError, RecursionError) as error:
        raise _Broken("its list of texts is no JSON") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _Broken("its list of texts is malformed")
    return metadata, names


def _parts(k: int, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The arrays of text k by name, each of a known format and rank."""
    parts = {}
    for part, (kinds, rank) in (REQUIRED | OPTIONAL).items():
        array = arrays.get(f"{k}.{part}")
        if array is None and part in OPTIONAL:
            continue
        if array is None or array.dtype.str not in kinds or array.ndim != rank:
            raise _Broken(f"'{k}.{part}' is missing or malformed")
        parts[part] = array
    return parts


def _ends_fit(ends: NDArray[Any], count: int, whole: NDArray[Any]) -> bool:
    """Whether `count` ends cut `whole` into as many pieces."""
    if ends.shape != (count,) or ends[0] < 0 or ends[-1] != len(whole):
        return False
    return bool((ends[1:] >= ends[:-1]).all())


def _details_fit(parts: Mapping[str, NDArray[Any]], L: int, H: int, T: int) -> bool:
    """Whether the optional arrays fit the text, and each other."""
    wide = [parts[part].shape for part in ("queries", "keys", "values") if part in parts]
    if any(shape[:3] != (L, H, T) or shape != wide[0] for shape in wide):
        return False
    if "attn_out" in parts and parts["attn_out"].shape[:2] != (L, T):
        return False
    likeliest = [part in parts for part in ("top_tokens", "top_probs", "top_ends", "top_bytes")]
    if not all(likeliest):
        return not any(likeliest)
    N = parts["top_tokens"].shape[1]
    shapes = parts["top_tokens"].shape == parts["top_probs"].shape == (T, N) and 1 <= N <= TOP_K
    return shapes and _ends_fit(parts["top_ends"], T * N, parts["top_bytes"])


def _cut(whole: NDArray[Any], ends: NDArray[Any]) -> list[bytes]:
    raw = whole.tobytes()
    return [raw[begin:end] for begin, end in pairwise([0, *ends.tolist()])]


def _top(parts: Mapping[str, NDArray[Any]]) -> list[list[tuple[bytes, float]]] | None:
    if "top_tokens" not in parts:
        return None
    T, N = parts["top_tokens"].shape
    pieces, chances = _cut(parts["top_bytes"], parts["top_ends"]), parts["top_probs"].tolist()
    return [list(zip(pieces[t * N : t * N + N], chances[t], strict=True)) for t in range(T)]


def _text(k: int, name: str, arrays: Mapping[str, NDArray[Any]]) -> AttentionRecord:
    """Text k, once its arrays are found to fit each other."""
    parts = _parts(k, arrays)
    L, H, T = parts["value_norms"].shape
    if not (
        T >= 1
        and parts["pattern"].shape == (L, H, T * (T + 1) // 2)
        and parts["loss"].shape == (T - 1,)
        and parts["tokens"].shape == (T,)
        and _ends_fit(parts["ends"], T, parts["bytes"])
        and _details_fit(parts, L, H, T)
    ):
        raise _Broken(f"the arrays of text {k} do not fit each other")
    details = {part: parts.get(part) for part in ("queries", "keys", "values", "attn_out")}
    return AttentionRecord(
        name,
        parts["tokens"],
        _cut(parts["bytes"], parts["ends"]),
        parts["loss"],
        parts["value_norms"],
        parts["pattern"],
        **details,
        top_tokens=_top(parts),
        top_ids=parts.get("top_tokens"),
    )


def _scores(arrays: Mapping[str, NDArray[Any]], texts: list[AttentionRecord]) -> dict[str, NDArray[np.float32]]:
    """The heads' scores, once they are found to be of the heads that the texts have."""
    found = {name.removeprefix(SCORES): array for name, array in arrays.items() if name.startswith(SCORES)}
    shapes = {text.value_norms.shape[:2] for text in texts} | {array.shape for array in found.values()}
    if len(shapes) > 1 or any(array.dtype.str not in FLOAT or array.ndim != 2 for array in found.values()):
        raise _Broken("its texts and scores are not of the same heads")
    return found


def _failure(message: str) -> Exception:
    """`UserError`, which our scripts say in one line; in a copy of this file that stands alone, a `ValueError`."""
    try:
        from common.errors import CHECKPOINT, UserError
    except ImportError:
        return ValueError(message)
    return UserError(message, CHECKPOINT)


def read_attention_file(path: Path | str) -> AttentionFile:
    """The attention file at `path`. Nothing in it is believed before it is checked.

    Raises:
        UserError: if the file is missing, damaged, or no attention file (exit code 4).
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise _Broken("it is a folder, or a device or pipe that may never end")
        header, data = _header(Path(path).read_bytes())
        metadata, names = _metadata(header)
        arrays = _arrays_of(header, data)
        texts = [_text(k, name, arrays) for k, name in enumerate(names)]
        return AttentionFile(texts, metadata, _scores(arrays, texts))
    except OSError as error:
        raise _failure(f"cannot read {path}: {error.strerror}") from error
    except _Broken as error:
        raise _failure(
            f"{path} is no attention file that can be read: {error}; write it anew with attend.py"
        ) from error
