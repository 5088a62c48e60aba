"""Byte-pair encoding: agrees with the library that trains it; what cannot be fetched is told soon."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import CONFIG, DATA, UserError
from data import stories
from data import tokenizer as bpe
from data.tokenizer import fingerprint, train_tokenizer
from tests.data.texts import PROSE, no_network


@pytest.mark.parametrize("vocab_size", [257, 300, 700])
def test_bpe_agrees_with_the_library_that_trained_it(vocab_size: int) -> None:
    from tokenizers import Tokenizer as Reference
    from tokenizers import models, pre_tokenizers, trainers

    reference = Reference(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = [PROSE * 3, *(story.text for story in stories.stories("train", 200))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    reference.train_from_iterator(corpus, trainer)
    tokenizer = train_tokenizer("bpe", vocab_size, corpus)
    assert tokenizer.vocab_size == vocab_size
    pieces = (
        PROSE,
        PROSE[::-1],
        PROSE.upper(),
        "aaaaaaaaaaaa theththe\n\n \n",
        " \r\n\t 你好😀😀 שָׁלוֹם " * 9,
        "=-" * 300,
    )
    for text in (*pieces, *(PROSE[i : i + 20] for i in range(0, len(PROSE), 3))):
        ours = [tokenizer.token_bytes(token) for token in tokenizer.encode(text).tolist()]
        # The reference writes each byte as a visible character; lengths and joined bytes fix the tokens.
        theirs = [len(token) for token in reference.encode(text).tokens]
        assert [len(token) for token in ours] == theirs and b"".join(ours) == text.encode()


def test_bpe_joins_the_most_frequent_neighbours_first() -> None:
    tokenizer = train_tokenizer("bpe", 260, ["abab abab abab abab cdcd"])
    assert [tokenizer.token_bytes(i) for i in range(256, 259)] == [b"ab", b"abab", b" abab"]


@pytest.mark.parametrize("text", ["", "x", "no two alike"])
def test_a_small_text_gives_a_small_vocabulary(text: str) -> None:
    tokenizer = train_tokenizer("bpe", 5000, [text])
    assert 257 <= tokenizer.vocab_size < 270 and tokenizer.end_of_text == tokenizer.vocab_size - 1


def test_bpe_reads_a_bounded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "BPE_SAMPLE_CHARACTERS", 100)
    read = []

    def texts() -> Any:
        for i in range(1000):
            read.append(i)
            yield "ten chars "

    train_tokenizer("bpe", 300, texts)
    assert len(read) == 10


def test_the_same_text_gives_the_same_tokenizer_in_every_process() -> None:
    code = (
        "from data.tokenizer import fingerprint, train_tokenizer; from tests.data.texts import PROSE; "
        "print(fingerprint(train_tokenizer('bpe', 600, [PROSE * 3])))"
    )
    root = str(Path(__file__).parents[1])
    runs = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True)
        runs.append(done.stdout.strip())
    assert runs == [fingerprint(train_tokenizer("bpe", 600, [PROSE * 3]))] * 2


def test_a_mile_of_blanks_is_encoded() -> None:
    text = " " * 1_000_000 + "end"
    tokenizer = train_tokenizer("bpe", 300, [PROSE])
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("name", "near"), [("gtp2", "gpt2"), ("bep", "bpe"), ("cl100k", "cl100k_base"), ("x\x1b", "char")]
)
def test_an_unknown_name_gets_the_nearest_ones(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"nearest are: .*{near}") as caught:
        train_tokenizer(name, 0, [])
    assert caught.value.exit_code == CONFIG and str(caught.value).isprintable()


def hang(*args: object) -> bytes:
    time.sleep(2)
    return b""


@pytest.mark.parametrize(
    ("answer", "why"), [(no_network, "ConnectionError"), (hang, "no answer"), (lambda *_: b"?", "ValueError")]
)
def test_an_encoding_that_cannot_be_fetched_is_told_soon(
    answer: Callable[..., bytes], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", answer)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr(bpe, "_FETCH_SECONDS", 0.3)
    # Nothing else in this process may have to wait for the lock of the hanging one.
    monkeypatch.setattr("tiktoken.registry._lock", threading.RLock())
    with pytest.raises(UserError, match=rf"encoding cl100k_base \({why}.*TIKTOKEN_CACHE_DIR") as caught:
        train_tokenizer("cl100k_base", 0, [])
    assert caught.value.exit_code == DATA
