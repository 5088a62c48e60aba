"""The attention file's reader promises: a bad file is one line of error, whatever is bad about it."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import CHECKPOINT, UserError
from inspection import attention_file as dump
from tests.inspection.test_attention_file import observed, split, write


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dump") / "000400.safetensors", observed(), step="400")


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file") as caught:
        dump.read_attention_file(tmp_path / "nothing")
    assert caught.value.exit_code == CHECKPOINT


def joined(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refused(path: Path, raw: bytes) -> str:
    path.write_bytes(raw)
    with pytest.raises(UserError) as caught:
        dump.read_attention_file(path)
    assert caught.value.exit_code == CHECKPOINT and "\n" not in str(caught.value)
    return str(caught.value)


def change(header: dict[str, Any], path: str, value: object) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        header = header[parent]
    header[last] = value


BAD = [
    ("0.tokens/data_offsets", [0, 10**9], "outside"),
    ("0.tokens/data_offsets", [96, 0], "outside"),
    ("0.tokens/data_offsets", [-96, 0], "malformed"),
    ("0.tokens/data_offsets", [0.0, 96.0], "malformed"),
    ("0.tokens/data_offsets", [0], "outside"),
    ("0.tokens/shape", [23], "fill"),
    ("0.tokens/shape", [-24], "malformed"),
    ("0.tokens/shape", [True], "malformed"),
    ("0.tokens/shape", [2**40, 2**40, 2**40], "fill"),
    ("0.tokens/shape", [2, 12], "missing or malformed"),
    ("1.loss/shape", [0, 2**62, 2**62], "malformed"),
    ("0.tokens/dtype", "I64", "unknown type"),
    ("0.tokens/dtype", "F32", "missing or malformed"),
    ("0.tokens/dtype", ["F32"], "unknown type"),
    ("0.tokens", 3, "malformed"),
    ("0.value_norms/shape", [4, 2, 24], "fit each other"),
    ("0.value_norms/shape", [2, 8, 12], "fit each other"),
    ("0.queries/shape", [2, 4, 8, 24], "fit each other"),
    ("0.values/shape", [2, 4, 12, 16], "fit each other"),
    ("0.keys/shape", [2, 4, 192], "missing or malformed"),
    ("0.keys/dtype", "I32", "fill"),
    ("0.attn_out/shape", [24, 2, 32], "fit each other"),
    ("0.top_tokens/shape", [5, 24], "fit each other"),
    ("0.top_tokens/shape", [12, 10], "fit each other"),
    ("0.top_probs/dtype", "I32", "missing or malformed"),
    ("0.top_ends/shape", [60, 2], "missing or malformed"),
    ("scores.induction/shape", [4, 2], "same heads"),
    ("scores.induction/shape", [8], "same heads"),
    ("scores.induction/dtype", "I32", "same heads"),
    ("__metadata__", None, "no metadata"),
    ("__metadata__/step", 400, "no metadata"),
    ("__metadata__/format", "glassgpt-attention-2", "glassgpt-attention-1"),
    ("__metadata__/texts", "[", "no JSON"),
    ("__metadata__/texts", "[3]", "malformed"),
    ("__metadata__/texts", '["a", "b", "c", "d"]', "missing"),
    ("__metadata__/texts", "[" * 100_000, "no JSON"),
]


@pytest.mark.parametrize(("where", "value", "message"), BAD)
def test_a_lying_header_is_refused(tmp_path: Path, written: Path, where: str, value: object, message: str) -> None:
    header, data = split(written.read_bytes())
    change(header, where, value)
    assert message in refused(tmp_path / "bad", joined(header, data))


@pytest.mark.parametrize("part", ["top_tokens", "top_probs", "top_ends", "top_bytes"])
def test_likeliest_tokens_without_their_bytes_or_chances_are_refused(tmp_path: Path, written: Path, part: str) -> None:
    header, data = split(written.read_bytes())
    del header[f"0.{part}"]
    assert "fit each other" in refused(tmp_path / "bad", joined(header, data))


def test_heads_of_several_widths_are_refused(tmp_path: Path, written: Path) -> None:
    header, data = split(written.read_bytes())
    header["0.values"] |= {"dtype": "F32", "shape": [2, 4, 24, 4]}  # the same bytes
    assert "fit each other" in refused(tmp_path / "bad", joined(header, data))


def test_more_likely_tokens_than_the_format_has_are_refused(tmp_path: Path) -> None:
    name, seen, raw = observed()[0]
    six = replace(
        seen, top_tokens=seen.top_tokens[:, [0, 1, 2, 3, 4, 4]], top_probs=seen.top_probs[:, [0, 1, 2, 3, 4, 4]]
    )
    assert "fit each other" in refused(tmp_path / "bad", write(tmp_path / "six", [(name, six, raw)]).read_bytes())


def test_overlapping_arrays_are_refused(tmp_path: Path, written: Path) -> None:
    header, data = split(written.read_bytes())
    header["0.tokens"]["data_offsets"] = header["0.ends"]["data_offsets"]
    assert "overlap" in refused(tmp_path / "bad", joined(header, data))


def test_token_ends_that_run_backwards_are_refused(tmp_path: Path, written: Path) -> None:
    header, data = split(written.read_bytes())
    begin, end = header["0.ends"]["data_offsets"]
    ends = np.frombuffer(data[begin:end], "<i4")
    backwards = np.concatenate([ends[-2::-1], ends[-1:]]).tobytes()  # the last one stays
    assert "fit each other" in refused(tmp_path / "bad", joined(header, data[:begin] + backwards + data[end:]))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "too short"),
        (b"\xff" * 8, "claims"),
        (struct.pack("<Q", 2**63) + b"{}", "claims"),
        (struct.pack("<Q", 3) + b"{}", "claims"),
        (joined(b"{", b""), "no JSON"),
        (joined(b"\xff\xfe", b""), "no JSON"),
        (joined(b"[" * 100_000, b""), "no JSON"),
        (joined(b'{"a": ' + b"9" * 5000 + b"}", b""), "no JSON"),
        (joined([], b""), "no table"),
        (joined({}, b""), "no metadata"),
        (joined(b'{"a": 1, "a": 2}', b""), "twice"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    assert message in refused(tmp_path / "bad", raw)


def survives(path: Path, raw: bytes) -> None:
    """Reading either works, down to the last weight, or says in one line why not."""
    path.write_bytes(raw)
    try:
        read = dump.read_attention_file(path)
        assert all(score.ndim == 2 for score in read.scores.values())
        for text in read.texts:
            T = len(text.tokens)
            assert text.top_tokens is None or len(text.top_tokens) == T
            assert text.pattern().shape[2:] == (T, T) and len(text.token_bytes) == T
    except UserError as error:
        assert error.exit_code == CHECKPOINT and "\n" not in str(error)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(max_size=4)
    | st.sampled_from(["F16", "F32", "I32", "U8", 0, 1, 24, 96, 2**31, 2**63, 2**64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)
PATHS = [
    *(
        f"{k}.{part}{field}"
        for k in range(3)
        for part in dump.REQUIRED
        for field in ("", "/dtype", "/shape", "/data_offsets")
    ),
    *(f"0.{part}{field}" for part in dump.OPTIONAL for field in ("", "/dtype", "/shape", "/data_offsets")),
    *("scores.induction", "scores.induction/dtype", "scores.induction/shape", "scores.surplus"),
    *("__metadata__", "__metadata__/texts", "__metadata__/format", "surplus"),
]
ONE_FILE = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.lists(st.tuples(st.sampled_from(PATHS), JSON), min_size=1, max_size=3))
@ONE_FILE
def test_no_header_makes_the_reader_stumble(tmp_path: Path, written: Path, changes: list[tuple[str, object]]) -> None:
    header, data = split(written.read_bytes())
    for where, value in changes:
        entry = header.get(where.split("/")[0])
        if "/" not in where or isinstance(entry, dict):
            change(header, where, value)
    survives(tmp_path / "bad", joined(header, data))


@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4), st.floats(0.5, 1))
@ONE_FILE
def test_no_damage_makes_the_reader_stumble(
    tmp_path: Path, written: Path, bytes_changed: list[tuple[float, int]], kept: float
) -> None:
    raw = bytearray(written.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    for place, value in bytes_changed:
        raw[int(place * (8 + length))] = value  # in the header, where damage could mislead
    survives(tmp_path / "bad", bytes(raw[: math.ceil(kept * len(raw))] if kept < 0.9 else raw))


def test_a_random_file_is_refused(tmp_path: Path) -> None:
    noise = torch.randint(256, (4096,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    refused(tmp_path / "bad", noise.numpy().tobytes())
