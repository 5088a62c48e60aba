"""Verify: a file captured from the model passes; changed weights, patterns, losses, scores or hashes fail their check."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from data.tokenizer import ByteTokenizer
from inspection.activation_cache import run_with_cache_batch
from inspection.attention_file import AttentionFile, AttentionRecord, read_attention_file, write_attention_file
from inspection.commands.shared import LoadedModel
from inspection.commands.verify import verify_attention_file
from inspection.compute_scores import compute_head_scores
from inspection.eval_texts import EvalTexts
from model.gpt import GPT
from tests.model.helpers import random_model, random_tokens

LENGTHS = {"long": 24, "one token": 1, "short": 11}
TEXTS = EvalTexts(texts=(("held-out 1", tuple(random_tokens(1, 20, seed=9)[0].tolist())),))
METADATA = {"weights_sha256": "w" * 64, "tokenizer_sha256": "t" * 64}


def token_bytes(token: int) -> bytes:
    return b"%d " % token


class Words(ByteTokenizer):
    token_bytes = staticmethod(token_bytes)  # type: ignore[assignment]


def capture(model: GPT, path: Any, dtype: str = "f16") -> AttentionFile:
    tokens = [random_tokens(1, T, seed=T)[0].tolist() for T in LENGTHS.values()]
    caches = run_with_cache_batch(model, tokens)
    records = [AttentionRecord.from_cache(n, c, token_bytes) for n, c in zip(LENGTHS, caches, strict=True)]
    scores = {name: table.numpy() for name, table in compute_head_scores(model, TEXTS, token_bytes).items()}
    write_attention_file(path, records, METADATA, scores, dtype)
    return read_attention_file(path)


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model("qwen3", context=24)


@pytest.fixture(scope="module")
def file(model: GPT, tmp_path_factory: pytest.TempPathFactory) -> AttentionFile:
    return capture(model, tmp_path_factory.mktemp("verify") / "000008.safetensors")


def verify(file: AttentionFile, model: GPT) -> list[dict[str, Any]]:
    return list(verify_attention_file(file, LoadedModel(model, 8, METADATA, Words(), list), TEXTS))


def failed(file: AttentionFile, model: GPT) -> set[str]:
    return {check["check"] for check in verify(file, model) if not check["ok"]}


@pytest.mark.parametrize(("preset", "dtype"), [("gpt2", "f16"), ("qwen3", "f32")])
def test_captured_file_passes(tmp_path: Any, preset: str, dtype: str) -> None:
    model = random_model(preset, context=24)
    file = capture(model, tmp_path / "file", dtype)
    tolerance = {check["check"]: check["tolerance"] for check in verify(file, model)}
    assert not failed(file, model) and set(tolerance) == {"hashes", "pattern", "loss", "scores"}
    assert tolerance["pattern"] == (2**-11 if dtype == "f16" else 1e-6)


def with_array(file: AttentionFile, part: str, *place: int) -> AttentionFile:
    array = getattr(file.texts[0], part).copy()
    array[place] += 0.01
    return replace(file, texts=[replace(file.texts[0], **{part: array}), *file.texts[1:]])


def with_entropy(file: AttentionFile, change: float) -> AttentionFile:
    return replace(file, scores={**file.scores, "entropy": file.scores["entropy"] + np.float32(change)})


CHANGES: dict[str, tuple[str, Callable[[AttentionFile], AttentionFile]]] = {
    "one weight of a pattern": ("pattern", lambda f: with_array(f, "pattern_tril", 1, 0, 40)),
    "one loss": ("loss", lambda f: with_array(f, "loss", 7)),
    "one score": ("scores", lambda f: with_entropy(f, 0.01)),
    "nan in a score": ("scores", lambda f: with_entropy(f, np.nan)),
    "a score of another name": ("scores", lambda f: replace(f, scores={"x": f.scores["copying"]})),
    "other weights": ("hashes", lambda f: replace(f, metadata={**f.metadata, "weights_sha256": "0" * 64})),
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_of_a_file_fails_its_check(file: AttentionFile, model: GPT, name: str) -> None:
    check, change = CHANGES[name]
    assert failed(change(file), model) == {check}
