"""Attention files: the round trip, agreement with transformers, and one line of error for damaged files."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from common.errors import CHECKPOINT, UserError
from inspection.activation_cache import ActivationCache, run_with_cache
from inspection.attention_file import DETAILS, AttentionRecord, read_attention_file, write_attention_file
from tests.model import helpers
from tests.runs import user_error

LENGTHS = {"a story": 24, "one token": 1, "näme\n": 7}
SCORES = {"induction": np.arange(8.0).reshape(2, 4), "antecedent.pronoun": np.full((2, 4), np.nan)}


def token_bytes(token: int) -> bytes:
    """Tokens of different lengths, one of them half a character and some empty."""
    return (b"", b" She", b"\xc3", "日".encode())[token % 4]


@pytest.fixture(scope="module")
def caches() -> dict[str, ActivationCache]:
    """Three texts, the first with all details."""
    model = helpers.random_model("gpt2")
    texts = {name: helpers.random_tokens(1, T)[0] for name, T in LENGTHS.items()}
    return {name: run_with_cache(model, tokens, details=name == "a story") for name, tokens in texts.items()}


def write(path: Path, caches: dict[str, ActivationCache], dtype: str = "f16", scores: Any = SCORES) -> Path:
    records = [AttentionRecord.from_cache(name, cache, token_bytes) for name, cache in caches.items()]
    write_attention_file(path, records, {"step": "400", "config": json.dumps({"n_layers": 2})}, scores, dtype)
    return path


@pytest.fixture(scope="module")
def written(caches: dict[str, ActivationCache], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("attention") / "000400.safetensors", caches)


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 2**-12), ("f32", 0)])
def test_round_trip(tmp_path: Path, caches: dict[str, ActivationCache], dtype: str, tolerance: float) -> None:
    file = read_attention_file(write(tmp_path / "file", caches, dtype))
    assert json.loads(file.metadata["versions"])["torch"] == torch.__version__
    assert file.metadata["step"] == "400" and file.metadata["config"] == '{"n_layers": 2}'
    assert set(file.scores) == set(SCORES)
    assert all(np.array_equal(file.scores[name], SCORES[name], equal_nan=True) for name in SCORES)
    assert [text.name for text in file.texts] == list(LENGTHS)
    for text, cache in zip(file.texts, caches.values(), strict=True):
        assert text.tokens.tolist() == cache.tokens.tolist()
        assert text.token_bytes == [token_bytes(token) for token in text.tokens.tolist()]
        assert np.array_equal(text.loss, cache.loss) and np.array_equal(text.value_norms, cache.value_norms)
        assert np.abs(text.pattern() - cache.pattern.numpy()).max() <= tolerance
        i, j = len(text.tokens) - 1, len(text.tokens) // 2
        assert np.array_equal(text.pattern_tril[:, :, i * (i + 1) // 2 + j], text.pattern()[:, :, i, j])


def test_round_trip_of_details(written: Path, caches: dict[str, ActivationCache]) -> None:
    story, *others = read_attention_file(written).texts
    for name in (*DETAILS, "top_ids", "top_probs"):
        assert np.array_equal(getattr(story, name), getattr(caches["a story"], name).numpy())
        assert all((getattr(text, name) is None) == (name in DETAILS) for text in others)
    assert [token for token, _ in story.top_tokens[3]] == [token_bytes(token) for token in story.top_ids[3].tolist()]


def test_writing_again_gives_the_same_bytes(tmp_path: Path, caches: dict[str, ActivationCache], written: Path) -> None:
    assert write(tmp_path / "again", caches).read_bytes() == written.read_bytes()
    file = read_attention_file(written)
    write_attention_file(tmp_path / "copy", file.texts, file.metadata, file.scores)
    assert (tmp_path / "copy").read_bytes() == written.read_bytes()


@pytest.mark.parametrize("preset", ["gpt2", "qwen3"])
@torch.no_grad()
def test_pattern_keys_and_values_agree_with_transformers(tmp_path: Path, preset: str) -> None:
    model, tokens = helpers.random_model(preset), helpers.random_tokens(1, 20)
    cache = run_with_cache(model, tokens[0], details=True)
    (text,) = read_attention_file(write(tmp_path / "file", {"text": cache}, "f32", None)).texts
    theirs = helpers.transformers_model(model)(tokens, output_attentions=True, use_cache=True)
    assert text.keys is not None and text.values is not None
    for layer, attention in enumerate(theirs.attentions):
        assert np.abs(text.pattern(layer) - attention.numpy()).max() <= 1e-6
        layer_cache = theirs.past_key_values.layers[layer]
        for ours, part in ((text.keys, layer_cache.keys), (text.values, layer_cache.values)):
            repeated = part.repeat_interleave(model.config.n_heads // part.shape[1], dim=1)
            assert np.abs(ours[layer] - repeated[0].numpy()).max() <= 1e-5


def refused(path: Path, match: str = "not a readable attention file") -> None:
    with user_error(CHECKPOINT, match):
        read_attention_file(path)


Arrays, Metadata = dict[str, Any], dict[str, Any]
DAMAGE: dict[str, Callable[[Arrays, Metadata], object]] = {
    "no loss": lambda a, m: a.pop("0.loss"),
    "pattern of another length": lambda a, m: a.update({"0.pattern_tril": a["0.pattern_tril"][..., 1:]}),
    "scores of other heads": lambda a, m: a.update({"scores.x": np.zeros((2, 3), np.float32)}),
    "format": lambda a, m: m.update(format="other"),
    "no texts": lambda a, m: m.pop("texts"),
    "no token bytes": lambda a, m: m["token_bytes"].popitem(),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_file_is_one_line(tmp_path: Path, written: Path, name: str) -> None:
    with safe_open(written, framework="numpy") as file:
        arrays, metadata = {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["glassgpt"])  # noqa: SIM118
    DAMAGE[name](arrays, metadata)
    save_file(arrays, tmp_path / "file", {"glassgpt": json.dumps(metadata)})
    refused(tmp_path / "file")


def test_other_files_are_refused(tmp_path: Path, written: Path) -> None:
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "file")
    refused(tmp_path / "file", "does not name the format")
    refused(tmp_path / "missing", "is not a file")
    for length in (0, 7, 100, written.stat().st_size - 1):
        (tmp_path / "file").write_bytes(written.read_bytes()[:length])
        refused(tmp_path / "file")


@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), max_size=4))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_bytes_are_refused_or_read(tmp_path: Path, written: Path, damage: list[tuple[float, bytes]]) -> None:
    """Damage in the header gives one line of error or a file that fits together, in bounded memory."""
    raw = bytearray(written.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    for place, new in damage:
        at = int(place * (8 + length))
        raw[at : at + len(new)] = new
    (tmp_path / "file").write_bytes(raw)
    tracemalloc.start()
    try:
        for text in read_attention_file(tmp_path / "file").texts:
            assert text.pattern().shape[2:] == (len(text.tokens),) * 2 and len(text.token_bytes) == len(text.tokens)
    except UserError as error:
        assert error.exit_code == CHECKPOINT
    assert tracemalloc.get_traced_memory()[1] < 2_000_000 + 20 * len(raw)
    tracemalloc.stop()
