"""The attention file: what `capture.py` saw of several texts, and a reader that needs numpy alone.

The file is ordinary safetensors (eight bytes of header length, a JSON header, the raw numbers), so every
library for that format opens it; `read` here needs neither such a library nor torch. Format version 1. For
text k of n:

    k.pattern      f16 or f32  (L, H, T (T + 1) / 2)  attention weights, the lower triangle row by row
    k.value_norms  f32         (L, H, T)              length of each position's value
    k.loss         f32         (T - 1,)               nats of each token after the first
    k.tokens       i32         (T,)                   token ids
    k.ends         i32         (T,)                   where each token's bytes end in k.bytes
    k.bytes        u8          (bytes,)               the bytes of all tokens, one after the other

Metadata, all strings: `format` and `texts` (a JSON list of the texts' names) are written here; the caller
adds `config` (JSON), `vocab_size`, `step`, `tokens_seen`, `weights_sha256`, `tokenizer_sha256` and `versions`
(JSON).
"""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from runtime.errors import CHECKPOINT, DISK_OR_MEMORY, UserError

FORMAT = "glassgpt-attention-1"
DTYPES = {"F16": "<f2", "F32": "<f4", "I32": "<i4", "U8": "|u1"}
MAX_HEADER = 100_000_000
"""Bytes; the bound of the safetensors format."""


@runtime_checkable
class Observed(Protocol):
    """What is written of a text; a `capture.Capture` is one."""

    @property
    def tokens(self) -> Any: ...
    @property
    def pattern(self) -> Any: ...
    @property
    def value_norms(self) -> Any: ...
    @property
    def loss(self) -> Any: ...


@dataclass(frozen=True)
class TextDump:
    """One text of a dump: L layers, H heads, T tokens."""

    name: str
    tokens: NDArray[np.int32]
    token_bytes: list[bytes]
    loss: NDArray[np.float32]
    value_norms: NDArray[np.float32]
    packed: NDArray[np.floating[Any]]
    """(L, H, T (T + 1) / 2), the lower triangle row by row: query i, key j at i (i + 1) / 2 + j."""

    def unpack(self, layer: int | None = None) -> NDArray[np.float32]:
        """Attention weights (L, H, T, T), 0 above the diagonal; with `layer`, that layer alone, (1, H, T, T).

        (1, H, T, T), a batch of one, is what transformers returns for each layer. bertviz's `head_view` takes
        `[torch.tensor(text.unpack(l)) for l in range(L)]`; CircuitsVis's `attention_patterns` takes
        `text.unpack(l)[0]`.
        """
        packed = self.packed if layer is None else self.packed[layer][None]
        T = len(self.tokens)
        full = np.zeros((*packed.shape[:2], T, T), dtype=np.float32)
        rows, columns = np.tril_indices(T)
        full[:, :, rows, columns] = packed
        return full


@dataclass(frozen=True)
class Dump:
    """All texts of an attention file, and what it says about the model."""

    texts: list[TextDump]
    metadata: dict[str, str]


def _arrays(capture: Observed, token_bytes: Sequence[bytes], dtype: str) -> dict[str, NDArray[Any]]:
    pattern = np.asarray(capture.pattern, dtype=np.float32)
    T = pattern.shape[-1]
    if len(token_bytes) != T:
        raise ValueError(f"{len(token_bytes)} token texts for {T} tokens")
    rows, columns = np.tril_indices(T)
    return {
        "pattern": pattern[:, :, rows, columns].astype(DTYPES[dtype.upper()]),
        "value_norms": np.asarray(capture.value_norms, dtype="<f4"),
        "loss": np.asarray(capture.loss, dtype="<f4"),
        "tokens": np.asarray(capture.tokens).astype("<i4"),
        "ends": np.cumsum([len(token) for token in token_bytes], dtype="<i4"),
        "bytes": np.frombuffer(b"".join(token_bytes), dtype=np.uint8),
    }


def _serialize(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> list[bytes]:
    """The file as chunks. Wide numbers come first: each array begins at a multiple of its item's size."""
    names = {kind: name for name, kind in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    chunks, offset = [], 0
    for name, array in sorted(arrays.items(), key=lambda item: -item[1].itemsize):
        header[name] = {
            "dtype": names[array.dtype.str],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        chunks.append(array.tobytes())
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)), text, *chunks]


def write(
    path: Path | str,
    captures: Sequence[tuple[str, Observed, list[bytes]]],
    metadata: Mapping[str, str],
    dtype: str = "f16",
) -> None:
    """Write (name, capture, bytes of each token) of several texts; `path` is replaced whole or not at all.

    Args:
        metadata: strings; see the head of this file.
        dtype: of the weights: `f16` (each within 2^-12 of the fp32 weight) or `f32`.

    Raises:
        UserError: if the file cannot be written.
        ValueError: if a text has not as many token texts as tokens.
    """
    assert dtype in ("f16", "f32"), dtype
    arrays: dict[str, NDArray[Any]] = {}
    for k, (_, capture, token_bytes) in enumerate(captures):
        arrays |= {f"{k}.{part}": array for part, array in _arrays(capture, token_bytes, dtype).items()}
    ours = {"format": FORMAT, "texts": json.dumps([name for name, _, _ in captures])}
    path = Path(path)
    try:
        _replace(path, _serialize(arrays, {**metadata, **ours}))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", DISK_OR_MEMORY) from error


def _replace(path: Path, chunks: Sequence[bytes]) -> None:
    """Put the chunks in the place of `path` in one step, once they are safely on disk."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp lets nobody else read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
    for numbers, most in ((shape, 3), (offsets, 2)):
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


def _text(k: int, name: str, arrays: Mapping[str, NDArray[Any]]) -> TextDump:
    """Text k, once its arrays are found to fit each other."""
    parts = {}
    for part, kinds, rank in (
        ("pattern", ("<f2", "<f4"), 3),
        ("value_norms", ("<f4",), 3),
        ("loss", ("<f4",), 1),
        ("tokens", ("<i4",), 1),
        ("ends", ("<i4",), 1),
        ("bytes", ("|u1",), 1),
    ):
        array = arrays.get(f"{k}.{part}")
        if array is None or array.dtype.str not in kinds or array.ndim != rank:
            raise _Broken(f"'{k}.{part}' is missing or malformed")
        parts[part] = array
    L, H, T = parts["value_norms"].shape
    ends = parts["ends"]
    if not (
        T >= 1
        and parts["pattern"].shape == (L, H, T * (T + 1) // 2)
        and parts["loss"].shape == (T - 1,)
        and parts["tokens"].shape == ends.shape == (T,)
        and ends[0] >= 0
        and (np.diff(ends) >= 0).all()
        and ends[-1] == len(parts["bytes"])
    ):
        raise _Broken(f"the arrays of text {k} do not fit each other")
    whole, cuts = parts["bytes"].tobytes(), [0, *ends.tolist()]
    token_bytes = [whole[begin:end] for begin, end in pairwise(cuts)]
    return TextDump(name, parts["tokens"], token_bytes, parts["loss"], parts["value_norms"], parts["pattern"])


def read(path: Path | str) -> Dump:
    """The attention file at `path`. Nothing in it is believed before it is checked.

    Raises:
        UserError: if the file is missing, damaged, or no attention file (exit code 4).
    """
    try:
        header, data = _header(Path(path).read_bytes())
        metadata, names = _metadata(header)
        arrays = _arrays_of(header, data)
        return Dump([_text(k, name, arrays) for k, name in enumerate(names)], metadata)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", CHECKPOINT) from error
    except _Broken as error:
        message = f"{path} is no attention file that can be read: {error}; write it anew with attend.py"
        raise UserError(message, CHECKPOINT) from error
