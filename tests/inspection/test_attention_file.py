"""The attention file promises: what was written is read, with numpy alone. `test_dump_faults.py` has bad files."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from common.errors import DISK_OR_MEMORY, UserError
from inspection import attention_file as dump
from inspection import record
from inspection.activation_cache import ActivationCache, run_with_cache
from tests.inspection.test_activation_cache import SMALL, lively, some_tokens
from tests.model import helpers

ROOT = Path(__file__).parents[2]
TEXTS = {"a story": 24, "one token": 1, "näme\n": 7}


SCORES = {"induction": np.arange(8.0).reshape(2, 4), "antecedent.pronoun": np.full((2, 4), np.nan)}


def piece(token: int) -> bytes:
    """Tokens of unlike lengths, one of them half a letter and some empty."""
    return (b"", b" She", b"\xc3", "日".encode())[token % 4]


def token_bytes(capture: ActivationCache) -> list[bytes]:
    return [piece(int(token)) for token in capture.tokens]


def write(path: Path, captures: Any, dtype: str = "f16", **metadata: str) -> Path:
    record.write_attention_file(path, captures, metadata, dtype, SCORES, piece)
    return path


def observed() -> list[tuple[str, ActivationCache, list[bytes]]]:
    """Three texts, the first in every detail."""
    seen = {name: run_with_cache(lively(SMALL), some_tokens(T), details=name == "a story") for name, T in TEXTS.items()}
    return [(name, one, token_bytes(one)) for name, one in seen.items()]


@pytest.fixture(scope="module")
def captures() -> list[tuple[str, ActivationCache, list[bytes]]]:
    return observed()


@pytest.fixture(scope="module")
def written(captures: list[tuple[str, ActivationCache, list[bytes]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dump") / "000400.safetensors"
    return write(path, captures, step="400", config=json.dumps({"n_layers": 2}))


def test_what_was_written_is_read(written: Path, captures: list[tuple[str, ActivationCache, list[bytes]]]) -> None:
    read = dump.read_attention_file(written)
    assert read.metadata["step"] == "400" and json.loads(read.metadata["config"]) == {"n_layers": 2}
    assert [text.name for text in read.texts] == list(TEXTS)
    for text, (_, seen, raw) in zip(read.texts, captures, strict=True):
        assert text.tokens.tolist() == seen.tokens.tolist() and text.token_bytes == raw
        assert np.array_equal(text.loss, seen.loss.numpy())
        assert np.array_equal(text.value_norms, seen.value_norms.numpy())
        difference = np.abs(text.pattern() - seen.pattern.numpy())
        assert difference.max() <= 2**-12, "half of the last of 11 bits of a number below 1"
        assert text.pattern().dtype == np.float32


def test_f32_is_exact(tmp_path: Path, captures: list[tuple[str, ActivationCache, list[bytes]]]) -> None:
    for text, (_, seen, _) in zip(
        dump.read_attention_file(write(tmp_path / "f32", captures, "f32")).texts, captures, strict=True
    ):
        assert np.array_equal(text.pattern(), seen.pattern.numpy())


DETAILS = ("queries", "keys", "values", "attn_out")


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_details_are_read_where_they_were_written(tmp_path: Path, captures: list[Any], dtype: str) -> None:
    with_details, *without = dump.read_attention_file(write(tmp_path / "file", captures, dtype)).texts
    _, seen, _ = captures[0]
    for name in DETAILS:
        stored, wanted = getattr(with_details, name), getattr(seen, name).numpy()
        assert stored.shape == wanted.shape
        exact = dtype == "f32" or name == "attn_out"
        assert np.array_equal(stored, wanted if exact else wanted.astype(np.float16))
    assert with_details.queries is not None and with_details.queries.shape == (2, 4, 24, 8)
    assert with_details.attn_out is not None and with_details.attn_out.shape == (2, 24, 32)
    assert with_details.top_tokens is not None and with_details.top_ids is not None
    assert np.array_equal(with_details.top_ids, seen.top_tokens.numpy())
    for row, tokens, chances in zip(
        with_details.top_tokens, seen.top_tokens.tolist(), seen.top_probs.tolist(), strict=True
    ):
        assert row == [(piece(token), chance) for token, chance in zip(tokens, chances, strict=True)]
        assert len(row) == 5 and chances == sorted(chances, reverse=True)
    for text in without:
        assert [getattr(text, name) for name in (*DETAILS, "top_tokens", "top_ids")] == [None] * 6


def test_scores_are_read_by_name(written: Path) -> None:
    scores = dump.read_attention_file(written).scores
    assert list(scores) == list(SCORES)
    for name, wanted in SCORES.items():
        assert scores[name].dtype == np.float32 and np.array_equal(scores[name], wanted, equal_nan=True)


def test_a_file_without_scores_and_details_is_read(tmp_path: Path, captures: list[Any]) -> None:
    record.write_attention_file(tmp_path / "file", captures[1:], {})
    read = dump.read_attention_file(tmp_path / "file")
    assert read.scores == {} and [text.name for text in read.texts] == list(TEXTS)[1:]


@pytest.mark.parametrize("preset", ["glass", "gpt2", "qwen3"])
def test_stored_queries_and_keys_are_enough_for_the_weights(tmp_path: Path, preset: str) -> None:
    """softmax(q · k / √D), in numpy; and in a text of more than 4 D tokens they take less room than the weights."""
    T, D = 72, 16
    model = helpers.random_model(preset, n_heads=4, n_kv_heads=2, d_model=4 * D, d_head=D, context=T)
    seen = run_with_cache(model, some_tokens(T), details=True)
    (text,) = dump.read_attention_file(write(tmp_path / "file", [("text", seen, token_bytes(seen))], "f32")).texts
    q, k = text.queries, text.keys
    assert q is not None and k is not None
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(np.float32(D))
    scores[..., ~np.tri(T, dtype=bool)] = -np.inf
    raised = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = raised / raised.sum(axis=-1, keepdims=True)
    assert np.abs(weights - text.pattern()).max() <= 1e-6
    assert weights.max() > 0.5, "far from uniform, or it would prove little"
    assert T > 4 * D and q.nbytes + k.nbytes < text.pattern_tril.nbytes
    shorter = 4 * D - 2
    assert 2 * shorter * D > shorter * (shorter + 1) / 2, "and no less in a shorter one"


@pytest.mark.parametrize("preset", ["gpt2", "qwen3"])
@torch.no_grad()
def test_the_numbers_are_those_of_transformers(tmp_path: Path, preset: str) -> None:
    """Its attentions and cached keys and values, layer by layer, in its shapes; its heads that share are repeated."""
    model, tokens = helpers.random_model(preset), checks.random_tokens(1, 20)
    seen = run_with_cache(model, tokens[0], details=True)
    record.write_attention_file(tmp_path / "file", [("text", seen, token_bytes(seen))], {}, "f32", token_bytes=piece)
    (text,) = dump.read_attention_file(tmp_path / "file").texts
    theirs = helpers.transformers_model(model)(tokens, output_attentions=True, use_cache=True)
    assert text.keys is not None and text.values is not None and text.top_tokens is not None
    for layer, attention in enumerate(theirs.attentions):
        assert text.pattern(layer).shape == attention.shape == (1, model.config.n_heads, 20, 20)
        assert np.abs(text.pattern(layer) - attention.numpy()).max() <= 1e-6
        cached = theirs.past_key_values.layers[layer]
        for ours, part in ((text.keys, cached.keys), (text.values, cached.values)):
            repeated = part.repeat_interleave(model.config.n_heads // part.shape[1], dim=1)
            assert ours[layer][None].shape == repeated.shape
            assert np.abs(ours[layer] - repeated[0].numpy()).max() <= 1e-5
    chances = theirs.logits[0].softmax(-1).sort(descending=True).values[:, :5]
    assert np.abs(np.array([[chance for _, chance in row] for row in text.top_tokens]) - chances.numpy()).max() <= 1e-5


def test_numbers_too_large_for_f16_are_kept_in_f32(tmp_path: Path, captures: list[Any]) -> None:
    name, seen, raw = captures[0]
    (text,) = dump.read_attention_file(
        write(tmp_path / "file", [(name, replace(seen, keys=1e5 * seen.keys), raw)])
    ).texts
    assert text.keys is not None and text.queries is not None
    assert text.keys.dtype == np.float32 and text.queries.dtype == np.float16
    assert np.array_equal(text.keys, 1e5 * seen.keys.numpy())


def test_weights_that_are_packed_already_give_the_same_file(tmp_path: Path, captures: list[Any]) -> None:
    packed = []
    for name, seen, raw in captures[1:]:
        rows, columns = np.tril_indices(len(seen.tokens))
        triangle = seen.pattern.numpy()[:, :, rows, columns]
        parts = {"tokens": seen.tokens, "value_norms": seen.value_norms, "loss": seen.loss, "pattern_tril": triangle}
        packed.append((name, SimpleNamespace(**parts), raw))
    one, other = write(tmp_path / "one", captures[1:], "f32"), write(tmp_path / "other", packed, "f32")
    assert one.read_bytes() == other.read_bytes()


def test_the_likeliest_tokens_need_their_bytes(tmp_path: Path, captures: list[Any]) -> None:
    with pytest.raises(ValueError, match="bytes of any token"):
        record.write_attention_file(tmp_path / "file", captures, {})


def test_one_layer_is_a_batch_of_one(written: Path) -> None:
    text = dump.read_attention_file(written).texts[0]
    whole = text.pattern()
    assert whole.shape == (2, 4, 24, 24)
    for layer in range(2):
        assert np.array_equal(text.pattern(layer), whole[layer][None])


def test_the_triangle_is_packed_row_by_row(written: Path) -> None:
    text = dump.read_attention_file(written).texts[0]
    whole = text.pattern()
    for i, j in ((0, 0), (5, 3), (23, 0), (23, 23)):
        assert np.array_equal(text.pattern_tril[:, :, i * (i + 1) // 2 + j].astype(np.float32), whole[:, :, i, j])


def test_safetensors_reads_it_too(written: Path) -> None:
    read = dump.read_attention_file(written)
    with safe_open(written, framework="np") as file:
        assert file.metadata() == read.metadata
        assert len(list(file.keys())) == 6 * len(TEXTS) + len(DETAILS) + 4 + len(SCORES)
        assert np.array_equal(file.get_tensor("0.top_tokens"), read.texts[0].top_ids)
        assert np.array_equal(file.get_tensor("0.pattern"), read.texts[0].pattern_tril)
        assert file.get_tensor("1.loss").shape == (0,)


READER = """
import sys
sys.modules["torch"] = sys.modules["safetensors"] = None  # importing them now raises ImportError
from inspection import attention_file as dump
from inspection import record
for text in dump.read_attention_file(sys.argv[1]).texts:
    print(text.pattern().shape, text.pattern().sum().round(), len(text.token_bytes))
"""


def test_the_reader_needs_numpy_alone(written: Path) -> None:
    """The sum of all weights is one for each row of each of 8 heads."""
    command = [sys.executable, "-c", READER, str(written)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:3] == [f"(2, 4, {T}, {T}) {8.0 * T} {T}" for T in TEXTS.values()]


COPY = """
import sys
sys.modules["torch"] = sys.modules["safetensors"] = None
import dump
text = dump.read_attention_file(sys.argv[1]).texts[0]
print(text.pattern().shape, text.top_tokens[0][0][1] > 0)
try:
    dump.read_attention_file("nothing")
except ValueError as error:
    print(error)
print(sorted(name for name in sys.modules if name.split(".")[0] in ("inspection", "training", "model")))
"""


def test_the_reader_can_be_copied_anywhere(tmp_path: Path, written: Path) -> None:
    shutil.copy(ROOT / "inspection" / "dump.py", tmp_path)
    command = [sys.executable, "-c", COPY, str(written)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "(2, 4, 24, 24) True",
        "cannot read nothing: No such file or directory",
        "[]",
    ]


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def test_every_array_begins_at_a_multiple_of_its_items_size(written: Path) -> None:
    header, _ = split(written.read_bytes())
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % np.dtype(dump.DTYPES[entry["dtype"]]).itemsize == 0


def test_the_same_input_gives_the_same_bytes(
    tmp_path: Path, written: Path, captures: list[tuple[str, ActivationCache, list[bytes]]]
) -> None:
    again = write(tmp_path / "again", captures, step="400", config=json.dumps({"n_layers": 2}))
    assert again.read_bytes() == written.read_bytes()


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, captures: list[tuple[str, ActivationCache, list[bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left") as caught:
        write(path, captures)
    assert caught.value.exit_code == DISK_OR_MEMORY
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_text_without_all_its_token_texts_is_refused(
    tmp_path: Path, captures: list[tuple[str, ActivationCache, list[bytes]]]
) -> None:
    name, seen, raw = captures[0]
    with pytest.raises(ValueError, match="23 token texts for 24"):
        record.write_attention_file(tmp_path / "file", [(name, seen, raw[1:])], {})
