"""Verification promises: a true file passes with room to spare, and whatever is wrong with one fails its check."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.errors import UserError
from inspection import record
from inspection.activation_cache import run_with_cache_batch
from inspection.attention_file import AttentionFile, AttentionRecord, read_attention_file
from inspection.finding import CheckResult, table
from inspection.recompute import fused_weights
from inspection.verify import verify_dump
from model import functional
from model.gpt import GPT
from tests.model.checks import PRESETS, VOCAB, normal, random_model, random_tokens

HASHES = {"weights_sha256": "w" * 64, "tokenizer_sha256": "t" * 64}
LENGTHS = {"sample": 24, "one token": 1, "repeat 1": 11}
INSIDE = {
    "metadata and shapes",
    "numbers that are not finite",
    "rows sum to 1",
    "weights lie in 0 to 1",
    "weight outside of what may be read",
    "weights from the stored queries and keys",
}
AGAIN = {
    "the model has this shape",
    "attention recomputed",
    "attention by the fused face",
    "loss recomputed",
    "value norms recomputed",
    "queries, keys, values, sums recomputed",
    "next tokens recomputed",
    "scores recomputed",
}


def piece(token: int) -> bytes:
    return b"%d " % token


def head_scores(model: GPT) -> dict[str, NDArray[Any]]:
    """Some numbers that depend on the weights; one of them has no value in some heads."""
    first = model.blocks[0].attention.out.weight.detach().numpy()
    score = first[: model.config.n_layers, : model.config.n_heads]
    return {"one": score, "other": np.where(score > 0, score, np.nan)}


def written(path: Path, model: GPT, dtype: str = "f16", details: bool = True) -> Path:
    texts = [random_tokens(1, T, seed=T)[0].tolist() for T in LENGTHS.values()]
    seen = run_with_cache_batch(model, texts, details=details)
    rows = [(name, one, [piece(t) for t in text]) for name, one, text in zip(LENGTHS, seen, texts, strict=True)]
    where = {"config": json.dumps(asdict(model.config)), "vocab_size": str(VOCAB), "step": "8", "tokens_seen": "64"}
    record.write_attention_file(
        path, rows, {**where, **HASHES, "versions": record.package_versions()}, dtype, head_scores(model), piece
    )
    return path


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model("qwen3")


@pytest.fixture(scope="module")
def dump(model: GPT, tmp_path_factory: pytest.TempPathFactory) -> AttentionFile:
    return read_attention_file(written(tmp_path_factory.mktemp("verify") / "000008.safetensors", model))


def everything(dump: AttentionFile, model: GPT | None) -> dict[str, CheckResult]:
    findings = verify_dump(dump, model, HASHES, piece, head_scores)
    names = [finding.name for finding in findings]
    assert len(set(names)) == len(names)
    return dict(zip(names, findings, strict=True))


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_true_file_passes_every_check(tmp_path: Path, preset: str, dtype: str) -> None:
    model = random_model(preset, context=24)
    found = everything(read_attention_file(written(tmp_path / "file", model, dtype)), model)
    assert set(found) == INSIDE | AGAIN | set(HASHES) | {"tokens with other bytes"}
    assert all(finding.ok for finding in found.values()), [f for f in found.values() if not f.ok]
    assert found["attention recomputed"].bound == (2**-11 if dtype == "f16" else 1e-6)
    assert found["attention by the fused face"].bound == 1e-5


def test_a_model_of_the_fused_face_says_the_same(tmp_path: Path) -> None:
    explicit, fused = random_model("gpt2"), random_model("gpt2", "sdpa")
    assert all(
        finding.ok for finding in everything(read_attention_file(written(tmp_path / "file", explicit)), fused).values()
    )


def test_without_a_model_only_the_file_itself_is_checked(dump: AttentionFile) -> None:
    assert {finding.name for finding in verify_dump(dump)} == INSIDE
    assert all(finding.ok for finding in verify_dump(dump))


def test_a_file_without_details_has_less_to_be_checked(tmp_path: Path, model: GPT) -> None:
    found = everything(read_attention_file(written(tmp_path / "file", model, details=False)), model)
    details = {"queries, keys, values, sums recomputed", "next tokens recomputed"}
    assert (INSIDE | AGAIN) - set(found) == details | {"weights from the stored queries and keys"}
    assert all(finding.ok for finding in found.values())


Change = Callable[[NDArray[Any]], NDArray[Any]]


def text_with(dump: AttentionFile, k: int = 0, **parts: object) -> AttentionFile:
    """A part given as a function is applied to the array that stands there."""
    text = dump.texts[k]
    changed = {name: part(getattr(text, name).copy()) if callable(part) else part for name, part in parts.items()}
    return replace(dump, texts=[*dump.texts[:k], replace(text, **changed), *dump.texts[k + 1 :]])


def metadata_with(dump: AttentionFile, **changed: str) -> AttentionFile:
    return replace(dump, metadata={**dump.metadata, **changed})


def put(value: float, *place: int) -> Change:
    def change(array: NDArray[Any]) -> NDArray[Any]:
        array[place] = value
        return array

    return change


def moved(array: NDArray[Any]) -> NDArray[Any]:
    """Weight that is taken from one key below zero and given to another."""
    array[1, 0, 3:5] += np.array([-1.5, 1.5])
    return array


def another(array: NDArray[Any]) -> NDArray[Any]:
    array[7] = (array[7] + 1) % VOCAB
    return array


class Leaky(AttentionRecord):
    """A text whose weights come with some of the future."""

    def pattern(self, layer: int | None = None) -> NDArray[np.float32]:
        return super().pattern(layer) + np.eye(len(self.tokens), k=1, dtype=np.float32)


def leaky(dump: AttentionFile) -> AttentionFile:
    first = dump.texts[0]
    return replace(dump, texts=[Leaky(**{name: getattr(first, name) for name in first.__dataclass_fields__})])


def config_with(dump: AttentionFile, **changed: object) -> AttentionFile:
    return metadata_with(dump, config=json.dumps({**json.loads(dump.metadata["config"]), **changed}))


def swapped(rows: list[Any]) -> list[Any]:
    return [*rows[:4], rows[4][::-1], *rows[5:]]


def sixth(dump: AttentionFile, model: GPT, own_chance: bool) -> AttentionFile:
    """In the place of the fifth likeliest token stands the sixth, with its own chance or with the fifth's."""
    text = dump.texts[0]
    window = torch.from_numpy(text.tokens.astype(np.int64))
    with torch.no_grad():
        top_p, top = model(window[None])[0, 3].softmax(-1).topk(6)
    tokens = text.top_ids.copy()
    tokens[3, 4] = top[5]
    row = [*text.top_tokens[3][:4], (piece(int(top[5])), top_p[5 if own_chance else 4].item())]
    return text_with(dump, top_ids=tokens, top_tokens=[*text.top_tokens[:3], row, *text.top_tokens[4:]])


ATTENTION = "attention recomputed"
DETAILS = "queries, keys, values, sums recomputed"
SPELLING = "tokens with other bytes"
WRONG: dict[str, tuple[str, Callable[[AttentionFile], AttentionFile]]] = {
    "a weight is nan": ("numbers that are not finite", lambda d: text_with(d, pattern_tril=put(np.nan, 1, 2, 30))),
    "a row has a nan": ("rows sum to 1", lambda d: text_with(d, pattern_tril=put(np.nan, 1, 2, 30))),
    "a key is infinite": ("numbers that are not finite", lambda d: text_with(d, keys=put(np.inf, 0, 0, 0, 0))),
    "a loss is nan": ("numbers that are not finite", lambda d: text_with(d, 2, loss=put(np.nan, 4))),
    "a score is infinite": (
        "numbers that are not finite",
        lambda d: replace(d, scores={"one": np.full((2, 6), np.inf, dtype=np.float32)}),
    ),
    "a chance is nan": (
        "numbers that are not finite",
        lambda d: text_with(d, top_tokens=[[(b"", float("nan"))] * 5] * 24),
    ),
    "weights fade": ("rows sum to 1", lambda d: text_with(d, 2, pattern_tril=lambda a: a * np.float16(0.998))),
    "a weight is gone": ("rows sum to 1", lambda d: text_with(d, pattern_tril=put(0, 0, 0, 0))),
    "a weight is negative": ("weights lie in 0 to 1", lambda d: text_with(d, pattern_tril=moved)),
    "the future is read": ("weight outside of what may be read", leaky),
    "keys are half as long": (
        "weights from the stored queries and keys",
        lambda d: text_with(d, keys=lambda a: a / 2),
    ),
    "heads are swapped": (
        "weights from the stored queries and keys",
        lambda d: text_with(d, pattern_tril=lambda a: a[:, ::-1]),
    ),
    "the step is missing": (
        "metadata and shapes",
        lambda d: replace(d, metadata={k: v for k, v in d.metadata.items() if k != "step"}),
    ),
    "the config is no table": ("metadata and shapes", lambda d: metadata_with(d, config="[]")),
    "the config is no JSON": ("metadata and shapes", lambda d: metadata_with(d, config="{")),
    "the config has other heads": ("metadata and shapes", lambda d: config_with(d, n_heads=3)),
    "the config has wider heads": ("metadata and shapes", lambda d: config_with(d, d_head=20)),
    "the config has a wider stream": ("metadata and shapes", lambda d: config_with(d, d_model=96)),
    "the context is shorter": ("metadata and shapes", lambda d: config_with(d, context=23)),
    "the vocabulary is smaller": ("metadata and shapes", lambda d: metadata_with(d, vocab_size="9")),
    "the vocabulary is no number": ("metadata and shapes", lambda d: metadata_with(d, vocab_size="many")),
    "the windows are no list": ("metadata and shapes", lambda d: metadata_with(d, windows="3")),
    "the windows run backwards": ("metadata and shapes", lambda d: metadata_with(d, windows="[[0, 0], [5, 9]]")),
    "the windows are nested": ("metadata and shapes", lambda d: metadata_with(d, windows="[" * 100_000)),
    "other weights": ("weights_sha256", lambda d: metadata_with(d, weights_sha256="0" * 64)),
    "another tokenizer": ("tokenizer_sha256", lambda d: metadata_with(d, tokenizer_sha256="")),
    "a token has another's bytes": (SPELLING, lambda d: text_with(d, token_bytes=lambda a: [b"?", *a[1:]])),
    "a likely token has another's bytes": (
        SPELLING,
        lambda d: text_with(d, top_tokens=lambda a: [[(b"?", 0.1)] * 5, *a[1:]]),
    ),
    "a token is another": (ATTENTION, lambda d: text_with(d, tokens=another)),
    "layers are swapped": (ATTENTION, lambda d: text_with(d, pattern_tril=lambda a: a[::-1])),
    "a weight moved by a thousandth": (
        ATTENTION,
        lambda d: text_with(d, pattern_tril=lambda a: put(a[0, 0, 5] + 1e-3, 0, 0, 5)(a)),
    ),
    "losses are late by one": ("loss recomputed", lambda d: text_with(d, 2, loss=lambda a: np.roll(a, 1))),
    "a loss is off": ("loss recomputed", lambda d: text_with(d, loss=lambda a: a + np.float32(3e-4))),
    "values are not projected": (
        "value norms recomputed",
        lambda d: text_with(d, value_norms=np.linalg.norm(d.texts[0].values.astype(np.float32), axis=-1)),
    ),
    "queries of another position": (DETAILS, lambda d: text_with(d, queries=lambda a: np.roll(a, 1, axis=2))),
    "keys of another head": (DETAILS, lambda d: text_with(d, keys=lambda a: np.roll(a, 1, axis=1))),
    "values of another layer": (DETAILS, lambda d: text_with(d, values=lambda a: a[::-1])),
    "a sum of another width": (DETAILS, lambda d: text_with(d, attn_out=lambda a: a * np.float32(1.001))),
    "likely tokens in another order": (
        "next tokens recomputed",
        lambda d: text_with(d, top_tokens=swapped, top_ids=lambda a: np.concatenate([a[:4], a[4:5, ::-1], a[5:]])),
    ),
    "likely tokens with other chances": ("next tokens recomputed", lambda d: text_with(d, top_tokens=swapped)),
    "a score of another head": (
        "scores recomputed",
        lambda d: replace(d, scores={**d.scores, "one": d.scores["one"][:, ::-1]}),
    ),
    "a score where there is none": (
        "scores recomputed",
        lambda d: replace(d, scores={**d.scores, "other": np.nan_to_num(d.scores["other"])}),
    ),
    "a score that nobody knows": ("scores recomputed", lambda d: replace(d, scores={"third": d.scores["one"]})),
}


@pytest.mark.parametrize("name", WRONG)
def test_whatever_is_wrong_fails_its_check(dump: AttentionFile, model: GPT, name: str) -> None:
    check, change = WRONG[name]
    finding = everything(change(dump), model)[check]
    assert not finding.ok, finding


@pytest.mark.parametrize("own_chance", [True, False])
def test_a_less_likely_token_is_noticed(dump: AttentionFile, model: GPT, own_chance: bool) -> None:
    found = everything(sixth(dump, model, own_chance), model)
    assert [name for name, finding in found.items() if not finding.ok] == ["next tokens recomputed"]


@pytest.mark.parametrize("T", [3, 8, 21])
def test_the_identity_brings_out_the_fused_weights(T: int) -> None:
    """Fewer columns than a value is wide, as many, and more."""
    q, k = normal(2, 3, T, 8), normal(2, 3, T, 8, seed=4)
    blocks = list(fused_weights(q, k))
    assert [first for first, _ in blocks] == list(range(0, T, 8))
    weights = torch.cat([columns for _, columns in blocks], dim=-1)
    torch.testing.assert_close(weights, functional.attention_pattern(q, k), atol=1e-5, rtol=0)


def test_another_models_file_is_noticed(dump: AttentionFile) -> None:
    found = everything(dump, random_model("qwen3", seed=2))
    failing = {name for name, finding in found.items() if not finding.ok}
    assert failing == AGAIN - {"the model has this shape", "attention by the fused face"}
    found = everything(dump, random_model("gpt2"))
    assert {name for name, finding in found.items() if not finding.ok} == {"the model has this shape"}
    assert "attention recomputed" not in found


@pytest.mark.parametrize("part", ["loss", "queries", "top_tokens"])
def test_one_weight_of_the_model_is_noticed(dump: AttentionFile, part: str) -> None:
    model = random_model("qwen3")
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[0, 0] += 0.1
    check = {"loss": "loss recomputed", "queries": ATTENTION, "top_tokens": "next tokens recomputed"}[part]
    found = everything(dump, model)
    assert found[check].ok == (part == "queries"), "the last layer's own attention stands before that weight"


def test_a_fused_kernel_with_other_weights_is_noticed(
    dump: AttentionFile, model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = functional.sdpa
    monkeypatch.setattr(functional, "sdpa", lambda q, k, v: kernel(1.01 * q, k, v))
    found = everything(dump, model)
    assert [name for name, finding in found.items() if not finding.ok] == ["attention by the fused face"]


def test_any_number_with_a_flipped_bit_is_noticed(tmp_path: Path, dump: AttentionFile, model: GPT) -> None:
    """The highest bit but the sign, in one number of each array: the reader refuses it or a check fails."""
    path = written(tmp_path / "file", model)
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header: Mapping[str, Any] = json.loads(raw[8 : 8 + length])
    draw = np.random.default_rng(1)
    for name, entry in header.items():
        if not name.startswith(("0.", "scores.")):
            continue
        size = {"F16": 2, "F32": 4, "I32": 4, "U8": 1}[entry["dtype"]]
        begin, end = entry["data_offsets"]
        place = 8 + length + begin + size * int(draw.integers((end - begin) // size)) + size - 1
        changed = bytearray(raw)
        changed[place] ^= 0x40
        path.write_bytes(changed)
        try:
            found = everything(read_attention_file(path), model)
        except UserError:
            continue
        assert not all(finding.ok for finding in found.values()), name


def test_findings_print_as_a_table(dump: AttentionFile, model: GPT) -> None:
    lines = table(list(everything(metadata_with(dump, weights_sha256="0" * 64), model).values()))
    assert sum(line.startswith("FAIL  weights_sha256") for line in lines) == 1
    assert sum(line.startswith("ok    ") for line in lines) == len(lines) - 1
    assert any("rows sum to 1" in line and "of 0.00049" in line for line in lines)
