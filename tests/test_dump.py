"""The attention file promises: what was written is read with numpy alone; a bad file is one line of error."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from inspection import dump
from inspection.capture import Capture, capture
from runtime.errors import CHECKPOINT, DISK_OR_MEMORY, UserError
from tests.test_capture import SMALL, lively, some_tokens

ROOT = Path(__file__).parent.parent
TEXTS = {"a story": 24, "one token": 1, "näme\n": 7}


def token_bytes(capture: Capture) -> list[bytes]:
    """Tokens of unlike lengths, one of them half a letter and some empty."""
    return [(b"", b" She", b"\xc3", "日".encode())[int(token) % 4] for token in capture.tokens]


@pytest.fixture(scope="module")
def captures() -> list[tuple[str, Capture, list[bytes]]]:
    seen = {name: capture(lively(SMALL), some_tokens(T)) for name, T in TEXTS.items()}
    return [(name, one, token_bytes(one)) for name, one in seen.items()]


@pytest.fixture(scope="module")
def written(captures: list[tuple[str, Capture, list[bytes]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dump") / "000400.safetensors"
    dump.write(path, captures, {"step": "400", "config": json.dumps({"n_layers": 2})})
    return path


def test_what_was_written_is_read(written: Path, captures: list[tuple[str, Capture, list[bytes]]]) -> None:
    read = dump.read(written)
    assert read.metadata["step"] == "400" and json.loads(read.metadata["config"]) == {"n_layers": 2}
    assert [text.name for text in read.texts] == list(TEXTS)
    for text, (_, seen, raw) in zip(read.texts, captures, strict=True):
        assert text.tokens.tolist() == seen.tokens.tolist() and text.token_bytes == raw
        assert np.array_equal(text.loss, seen.loss.numpy())
        assert np.array_equal(text.value_norms, seen.value_norms.numpy())
        difference = np.abs(text.unpack() - seen.pattern.numpy())
        assert difference.max() <= 2**-12, "half of the last of 11 bits of a number below 1"
        assert text.unpack().dtype == np.float32


def test_f32_is_exact(tmp_path: Path, captures: list[tuple[str, Capture, list[bytes]]]) -> None:
    dump.write(tmp_path / "f32", captures, {}, dtype="f32")
    for text, (_, seen, _) in zip(dump.read(tmp_path / "f32").texts, captures, strict=True):
        assert np.array_equal(text.unpack(), seen.pattern.numpy())


def test_one_layer_is_a_batch_of_one(written: Path) -> None:
    text = dump.read(written).texts[0]
    whole = text.unpack()
    assert whole.shape == (2, 4, 24, 24)
    for layer in range(2):
        assert np.array_equal(text.unpack(layer), whole[layer][None])


def test_the_triangle_is_packed_row_by_row(written: Path) -> None:
    text = dump.read(written).texts[0]
    whole = text.unpack()
    for i, j in ((0, 0), (5, 3), (23, 0), (23, 23)):
        assert np.array_equal(text.packed[:, :, i * (i + 1) // 2 + j].astype(np.float32), whole[:, :, i, j])


def test_safetensors_reads_it_too(written: Path) -> None:
    read = dump.read(written)
    with safe_open(written, framework="np") as file:
        assert file.metadata() == read.metadata
        assert len(list(file.keys())) == 6 * len(TEXTS)
        assert np.array_equal(file.get_tensor("0.pattern"), read.texts[0].packed)
        assert file.get_tensor("1.loss").shape == (0,)


READER = """
import sys
sys.modules["torch"] = sys.modules["safetensors"] = None  # importing them now raises ImportError
from inspection import dump
for text in dump.read(sys.argv[1]).texts:
    print(text.unpack().shape, text.unpack().sum().round(), len(text.token_bytes))
"""


def test_the_reader_needs_numpy_alone(written: Path) -> None:
    """The sum of all weights is one for each row of each of 8 heads."""
    command = [sys.executable, "-c", READER, str(written)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:3] == [f"(2, 4, {T}, {T}) {8.0 * T} {T}" for T in TEXTS.values()]


def test_every_array_begins_at_a_multiple_of_its_items_size(written: Path) -> None:
    header, _ = split(written.read_bytes())
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % np.dtype(dump.DTYPES[entry["dtype"]]).itemsize == 0


def test_the_same_input_gives_the_same_bytes(
    tmp_path: Path, written: Path, captures: list[tuple[str, Capture, list[bytes]]]
) -> None:
    again = tmp_path / "again"
    dump.write(again, captures, {"step": "400", "config": json.dumps({"n_layers": 2})})
    assert again.read_bytes() == written.read_bytes()


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, captures: list[tuple[str, Capture, list[bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dump.os, "fsync", full)
    with pytest.raises(UserError, match="No space left") as caught:
        dump.write(path, captures, {})
    assert caught.value.exit_code == DISK_OR_MEMORY
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_text_without_all_its_token_texts_is_refused(
    tmp_path: Path, captures: list[tuple[str, Capture, list[bytes]]]
) -> None:
    name, seen, raw = captures[0]
    with pytest.raises(ValueError, match="23 token texts for 24"):
        dump.write(tmp_path / "file", [(name, seen, raw[1:])], {})


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file") as caught:
        dump.read(tmp_path / "nothing")
    assert caught.value.exit_code == CHECKPOINT


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refused(path: Path, raw: bytes) -> str:
    path.write_bytes(raw)
    with pytest.raises(UserError) as caught:
        dump.read(path)
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
        for text in dump.read(path).texts:
            T = len(text.tokens)
            assert text.unpack().shape[2:] == (T, T) and len(text.token_bytes) == T
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
        for part in ("pattern", "value_norms", "loss", "tokens", "ends", "bytes")
        for field in ("", "/dtype", "/shape", "/data_offsets")
    ),
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
