"""Tokenizers: round trips, saved files, damaged files, agreement with the library that trains them."""

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CHECKPOINT, CONFIG, DATA, UserError
from data import stories
from data.text_files import read_documents
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tests.data.texts import PROSE, no_network, write_range
from tests.runs import user_error

SPECIAL = "<|endoftext|>"
FRAGMENTS = [SPECIAL, " the", "the", "'s", "  ", "\r\n", "😀", "é", "12", "word ", "<|"]
TEXTS = st.one_of(
    st.text(),
    st.text(alphabet=st.sampled_from("theca. \n\r\t'sDé😀ש1-")),
    st.lists(st.sampled_from(FRAGMENTS)).map("".join),
    st.lists(st.builds(str.__mul__, st.sampled_from("A1-\n 你é😀"), st.integers(80, 600)), max_size=4).map("".join),
)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer("bpe", 600, [PROSE * 3])


@pytest.fixture(scope="module", params=["char", "byte", "bpe", "gpt2"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "gpt2":
        return gpt2()
    return train_tokenizer(request.param, 600, [PROSE * 3, SPECIAL + "theca. \n\r\t'sDé😀ש1-word <|"])


def gpt2() -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiktoken.load.read_file", no_network)
        try:
            return train_tokenizer("gpt2", 0, [])
        except UserError:
            pytest.skip("TIKTOKEN_CACHE_DIR has no files of gpt2")


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_round_trip(any_tokenizer: Tokenizer, text: str) -> None:
    if any_tokenizer.name == "char":
        text = "".join(c for c in text if c in PROSE + SPECIAL)
    ids = any_tokenizer.encode(text)
    assert ids.dtype == np.int64 and ids.ndim == 1
    assert any_tokenizer.decode(ids) == any_tokenizer.decode(ids.tolist()) == text
    assert b"".join(map(any_tokenizer.token_bytes, ids.tolist())) == text.encode()
    assert not len(ids) or 0 <= ids.min() <= ids.max() < any_tokenizer.vocab_size
    assert any_tokenizer.end_of_text not in ids


def test_only_end_of_text_has_no_bytes(any_tokenizer: Tokenizer) -> None:
    empty = [token for token in range(any_tokenizer.vocab_size) if not any_tokenizer.token_bytes(token)]
    assert empty == [any_tokenizer.end_of_text] == [any_tokenizer.vocab_size - 1]
    assert any_tokenizer.decode([any_tokenizer.end_of_text]) == ""
    for outside in (-1, any_tokenizer.vocab_size):
        with pytest.raises(IndexError):
            any_tokenizer.token_bytes(outside)


def test_saved_and_loaded_tokenizer_is_equal(any_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_bytes(any_tokenizer.to_json())
    loaded = load_tokenizer(path)
    for name in ("name", "vocab_size", "end_of_text"):
        assert getattr(loaded, name) == getattr(any_tokenizer, name)
    assert loaded.encode(PROSE).tolist() == any_tokenizer.encode(PROSE).tolist()
    assert loaded.fingerprint() == any_tokenizer.fingerprint()
    json.loads(path.read_text(encoding="utf-8"))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["The cat", "didn't", "12345", "ש", "!?\n", "\n\n", "e\u0301", "あ"])))
def test_pieces_of_a_document_have_the_ids_of_the_whole(bpe: Tokenizer, fragments: list[str]) -> None:
    text = " ok ".join(fragments) + " end"
    span = write_range(Path(os.environ["GLASSGPT_CACHE"]) / "pieces.txt", text)
    pieces = [bpe.encode(piece.text) for piece in read_documents(span, 48)]
    assert np.concatenate(pieces).tolist() == bpe.encode(text).tolist()


def test_invalid_text_and_bytes_become_replacement_characters(any_tokenizer: Tokenizer, bpe: Tokenizer) -> None:
    if any_tokenizer.name == "char":
        any_tokenizer = train_tokenizer("char", 0, ["a\ufffdb"])
    assert any_tokenizer.decode(any_tokenizer.encode("a\udc80b")) == "a\ufffdb"
    owl = list("🦉".encode())
    assert bpe.decode(owl) == "🦉" and bpe.decode([*owl[:2], 65]) == "\ufffdA"


def test_char() -> None:
    char = train_tokenizer("char", 0, ["bc", "ac"])
    assert char.encode("abc").tolist() == [0, 1, 2], "ids follow code points"
    with user_error(CONFIG, r"'é' at position 1, '\\x1b' at position 3, '\S+' at"):
        char.encode("aéb\x1b\U0010ffff")
    with pytest.raises(UserError, match="and 995 more"):
        char.encode("z" * 1000)


BPE = {"format": 1, "kind": "bpe", "merged": ["ab", "abc"]}
CHAR = {"format": 1, "kind": "char"}
NAMED = {"format": 1, "kind": "tiktoken"}


@pytest.mark.parametrize(
    "damaged",
    [
        b"", b"[]", b"[" * 100_000, b"\xff\xfe{", b"1" * 5000, b'{"format": 1}',
        {"format": 2, "kind": "byte"}, {"format": 1, "kind": ["bpe"]},
        {**BPE, "merged": [1]}, {**BPE, "merged": ["a"]}, {**BPE, "merged": ["ab", "ab"]},
        {**BPE, "merged": ["\u0100b"]}, {**BPE, "merged": ["x" * 100_000]}, {**BPE, "merged": "ab"},
        {**CHAR, "characters": "ba"}, {**CHAR, "characters": ["a"]}, {**CHAR, "characters": "\ud800"}, CHAR,
        {**NAMED, "name": "../../etc/passwd"}, {**NAMED, "name": None},
    ],
    ids=lambda damaged: str(damaged)[:50],
)  # fmt: skip
def test_damaged_file_is_one_clear_line(tmp_path: Path, damaged: bytes | dict[str, Any]) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_bytes(damaged if isinstance(damaged, bytes) else json.dumps(damaged).encode())
    with pytest.raises(
        UserError, match=r"vocabulary\.json is not a readable tokenizer: .*; use another checkpoint"
    ) as caught:
        load_tokenizer(path)
    assert caught.value.exit_code == CHECKPOINT and len(str(caught.value)) < 400


def test_changed_tiktoken_encoding_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps({"format": 1, **gpt2().saved, "vocab_size": 50258}))
    with user_error(CHECKPOINT, "differs from what gpt2 is"):
        load_tokenizer(path)


@pytest.mark.parametrize("vocab_size", [257, 300, 700])
def test_bpe_agrees_with_the_tokenizers_library(vocab_size: int) -> None:
    from tokenizers import Tokenizer as Reference
    from tokenizers import models, pre_tokenizers, trainers

    reference = Reference(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = [PROSE * 3, *(story.text for story in stories.stories("train", 200))]
    options: dict[str, Any] = {"min_frequency": 2, "initial_alphabet": alphabet, "show_progress": False}
    reference.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=vocab_size - 1, **options))
    ours = train_tokenizer("bpe", vocab_size, corpus)
    assert ours.vocab_size == vocab_size
    texts = (PROSE, PROSE[::-1], PROSE.upper(), "aaaa theththe\n\n \n", " \r\n\t 你好😀😀 שָׁלוֹם " * 9, "=-" * 300)
    for text in (*texts, *(PROSE[i : i + 20] for i in range(0, len(PROSE), 3))):
        tokens = [ours.token_bytes(token) for token in ours.encode(text).tolist()]
        # The reference writes each byte as a visible character; lengths and joined bytes determine the tokens.
        expected = [len(token) for token in reference.encode(text).tokens]
        assert [len(token) for token in tokens] == expected and b"".join(tokens) == text.encode()


def test_bpe_of_a_small_text_has_fewer_tokens() -> None:
    small = train_tokenizer("bpe", 5000, ["no two alike"])
    assert 257 <= small.vocab_size < 270 and small.end_of_text == small.vocab_size - 1


def test_a_million_blanks_are_encoded() -> None:
    text = " " * 1_000_000 + "end"
    bpe = train_tokenizer("bpe", 300, [PROSE])
    assert bpe.decode(bpe.encode(text)) == text


@pytest.mark.parametrize("alphabet", ["ACGT", "-", " ", "\n ", "天地玄黄宇宙洪荒"])
def test_vocabulary_of_text_without_breaks_takes_seconds(alphabet: str) -> None:
    text = "".join(random.Random(0).choices(alphabet, k=500_000))
    started = time.monotonic()
    bpe = train_tokenizer("bpe", 400, [text])
    assert time.monotonic() - started < 20  # a minute or more if time grew with the square
    assert bpe.decode(bpe.encode(text)) == text and bpe.vocab_size > 261


@pytest.mark.parametrize(("name", "nearest"), [("gtp2", "gpt2"), ("cl100k", "cl100k_base"), ("x\x1b", "char")])
def test_unknown_name_gets_suggestions(name: str, nearest: str) -> None:
    with user_error(CONFIG, f"nearest are: .*{nearest}") as caught:
        train_tokenizer(name, 0, [])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("response", "why"), [(no_network, "ConnectionError"), (lambda *_: b"?", "ValueError")])
def test_failed_download_is_one_clear_line(
    response: Callable[..., bytes], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", response)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with user_error(DATA, rf"encoding cl100k_base \({why}.*TIKTOKEN_CACHE_DIR"):
        train_tokenizer("cl100k_base", 0, [])
