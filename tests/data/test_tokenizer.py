"""Tokenizers: text comes back as it was, saved ones encode alike, damaged ones are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CHECKPOINT, CONFIG, DATA, UserError
from data.documents import Span, read_documents
from data.tokenizer import StreamDecoder, Tokenizer, fingerprint, load, train_tokenizer
from tests.data.texts import PROSE, no_network

SPECIAL = "<|endoftext|>"
TEXTS = st.one_of(
    st.text(),
    st.text(alphabet=st.sampled_from("theca. \n\r\t'sDé😀ש1-")),
    st.lists(st.sampled_from([SPECIAL, " the", "the", "'s", "  ", "\r\n", "😀", "é", "12", "word ", "<|"])).map(
        "".join
    ),
)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer("bpe", 600, [PROSE * 3])


@pytest.fixture(scope="module", params=["char", "byte", "bpe", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "gpt2":
        return gpt2()
    return train_tokenizer(request.param, 600, [PROSE * 3, SPECIAL + "theca. \n\r\t'sDé😀ש1-word <|"])


def gpt2() -> Tokenizer:
    if not Path(os.environ.get("TIKTOKEN_CACHE_DIR") or "none").is_dir():
        pytest.skip("TIKTOKEN_CACHE_DIR names no folder with the files of gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiktoken.load.read_file", no_network)
        try:
            return train_tokenizer("gpt2", 0, [])
        except UserError:
            pytest.skip("TIKTOKEN_CACHE_DIR holds no files of gpt2")


def known(tokenizer: Tokenizer, text: str) -> str:
    """The part of a text that a tokenizer can encode."""
    return "".join(c for c in text if c in PROSE) if tokenizer.name == "char" else text


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str) -> None:
    text = known(tokenizer, text)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and ids.ndim == 1
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text
    assert b"".join(map(tokenizer.token_bytes, ids.tolist())) == text.encode()
    assert not len(ids) or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    assert tokenizer.end_of_text not in ids
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.feed, ids.tolist())) + stream.finish() == text


def test_every_id_has_bytes_but_end_of_text(tokenizer: Tokenizer) -> None:
    empty = [token for token in range(tokenizer.vocab_size) if not tokenizer.token_bytes(token)]
    assert empty == [tokenizer.end_of_text] == [tokenizer.vocab_size - 1]
    assert tokenizer.decode([tokenizer.end_of_text]) == ""
    for outside in (-1, tokenizer.vocab_size):
        with pytest.raises(IndexError):
            tokenizer.token_bytes(outside)


def test_the_name_of_the_separator_is_text_like_any_other(tokenizer: Tokenizer) -> None:
    if tokenizer.name == "char":
        tokenizer = train_tokenizer("char", 0, [SPECIAL])
    ids = tokenizer.encode(SPECIAL)
    assert len(ids) > 3 and tokenizer.end_of_text not in ids


def test_saved_and_loaded_it_encodes_alike(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load(tmp_path / "tokenizer.json")
    assert (again.name, again.vocab_size, again.end_of_text) == (
        tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text,
    )  # fmt: skip
    assert again.encode(PROSE).tolist() == tokenizer.encode(PROSE).tolist()
    assert fingerprint(again) == fingerprint(tokenizer)
    json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["The cat", "didn't", "12345", "ש", "!?\n", "\r\n\r\n", "   ", "e\u0301", "あ"])))
def test_pieces_of_a_file_have_the_ids_of_the_whole(trained: Tokenizer, fragments: list[str]) -> None:
    text = " ok ".join(fragments) + " end"
    path = Path(os.environ["GLASSGPT_CACHE"]) / "pieces.txt"
    path.write_bytes(text.encode())
    pieces = [piece.text for piece in read_documents(Span(path, 0, len(text.encode())), 48)]
    assert np.concatenate([trained.encode(piece) for piece in pieces]).tolist() == trained.encode(text).tolist()


def test_lone_surrogates_count_as_the_replacement_character(tokenizer: Tokenizer) -> None:
    if tokenizer.name == "char":
        tokenizer = train_tokenizer("char", 0, ["a\ud800b"])
    assert tokenizer.decode(tokenizer.encode("a\udc80b")) == "a\ufffdb"


def test_broken_characters_decode_to_the_replacement_character(trained: Tokenizer) -> None:
    owl = list("🦉".encode())
    assert trained.decode([*owl[:2], 65]) == "\ufffdA"
    stream = StreamDecoder(trained)
    assert [stream.feed(token) for token in owl] == ["", "", "", "🦉"]
    assert [stream.feed(token) for token in [*owl[:2], 65, owl[0]]] == ["", "", "\ufffdA", ""]
    assert stream.finish() == "\ufffd"


def test_char_has_the_characters_of_the_corpus_in_order() -> None:
    tokenizer = train_tokenizer("char", 0, ["bé\n", "a😀b"])
    assert [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)] == ["\n", "a", "b", "é", "😀", ""]
    assert tokenizer.encode("ab😀").tolist() == [1, 2, 4]


def test_char_names_unknown_characters_and_their_places() -> None:
    tokenizer = train_tokenizer("char", 0, ["abc"])
    with pytest.raises(UserError, match=r"'é' at position 1, '\\x1b' at position 3, '\\U0010ffff' at") as caught:
        tokenizer.encode("aéb\x1b\U0010ffff")
    assert caught.value.exit_code == CONFIG
    with pytest.raises(UserError, match="and 995 more"):
        tokenizer.encode("z" * 1000)


def test_char_without_text_is_refused() -> None:
    with pytest.raises(UserError, match="no text") as caught:
        train_tokenizer("char", 0, [])
    assert caught.value.exit_code == DATA


def test_characters_need_no_library() -> None:
    code = (
        "import sys; from data.tokenizer import *; train_tokenizer('char', 0, ['a']); "
        "print({'tiktoken', 'tokenizers', 'torch', 'requests'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "set()"


BPE = {"format": 1, "kind": "bpe", "merged": ["ab", "abc"]}
CHAR = {"format": 1, "kind": "char"}
NAMED = {"format": 1, "kind": "tiktoken"}


@pytest.mark.parametrize(
    "damaged",
    [
        b"", b"\x80\x04\x95", b"{", b"[]", b"null", b"[" * 100_000, b"\xff\xfe{", b"1" * 5000,
        b'{"format": 1}',
        {"format": 2, "kind": "byte"}, {"format": 1, "kind": "pickle"}, {"format": 1, "kind": ["bpe"]},
        {**BPE, "merged": None}, {**BPE, "merged": [1]}, {**BPE, "merged": ["a"]},
        {**BPE, "merged": ["ab", "ab"]},
        {**BPE, "merged": ["\u0100b"]}, {**BPE, "merged": ["x" * 100_000]}, {**BPE, "merged": "ab"},
        {**BPE, "merged": {"ab": 1}}, {**CHAR, "characters": "ba"}, {**CHAR, "characters": "aa"},
        {**CHAR, "characters": ["a"]}, {**CHAR, "characters": "\ud800"}, {"format": 1, "kind": "char"},
        {**NAMED, "name": "../../etc/passwd"}, {**NAMED, "name": None}, {"format": 1, "kind": "tiktoken"},
    ],
    ids=lambda damaged: str(damaged)[:50],
)  # fmt: skip
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, damaged: bytes | dict[str, Any]) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(damaged if isinstance(damaged, bytes) else json.dumps(damaged).encode())
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged or no tokenizer") as caught:
        load(path)
    assert caught.value.exit_code == CHECKPOINT and str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_a_missing_or_huge_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="No such file") as caught:
        load(tmp_path / "tokenizer.json")
    assert caught.value.exit_code == CHECKPOINT
    monkeypatch.setattr("data.tokenizer._MAX_FILE_BYTES", 10)
    train_tokenizer("byte", 0, []).save(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="larger than 10 bytes"):
        load(tmp_path / "tokenizer.json")


def test_a_saved_encoding_that_has_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    gpt2().save(path)
    saved = json.loads(path.read_text())
    for change in ({"vocab_size": 50258}, {"sha256": "0" * 64}, {"end_of_text": 5}):
        path.write_text(json.dumps({**saved, **change}))
        with pytest.raises(UserError, match="gpt2 is another one") as caught:
            load(path)
        assert caught.value.exit_code == CHECKPOINT
