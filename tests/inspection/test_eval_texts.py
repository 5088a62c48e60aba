"""Evaluation texts: drawn once, saved, checked when they are loaded; and the user's prompts."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from data.tokenizer import ByteTokenizer, CharTokenizer
from inspection.contrast_pairs import ContrastPair
from inspection.eval_texts import (
    HELD_OUT_TEXTS,
    HELD_OUT_TOKENS,
    N_REPEATS,
    SCORED_HELD_OUT,
    EvalTexts,
    held_out_texts,
    read_user_prompts,
    repeated_sequences,
)
from tests.runs import user_error

END = 0
PAIR = ContrastPair("pronoun", (END, 5, 6, 7), (1,), (5,), (6,), (2,))
TEXTS = EvalTexts((("held-out 1", (END, 3, 4)),), repeated_sequences(range(20), END, 21, seed=1), (PAIR,))


def test_repeated_sequences() -> None:
    sequences = repeated_sequences(range(100), END, 41, seed=1)
    assert len(set(sequences)) == len(sequences) == N_REPEATS
    for first, *rest in sequences:
        assert first == END and rest[:20] == rest[20:] and len(set(rest)) == 20 and END not in rest
    assert sequences == repeated_sequences(range(100), END, 41, seed=1)
    assert sequences != repeated_sequences(range(100), END, 41, seed=2)


def test_saved_texts_are_loaded(tmp_path: Path) -> None:
    for texts in (TEXTS, EvalTexts()):
        texts.save(tmp_path / "attention" / "eval_texts.json")
        assert EvalTexts.load(tmp_path / "attention" / "eval_texts.json", 100, 64) == texts


@given(st.lists(st.integers(2, 900), min_size=1, max_size=300), st.integers(2, 256))  # end-of-text and a token or more
def test_held_out_texts_are_spread_and_do_not_overlap(lengths: list[int], longest: int) -> None:
    starts, n = np.cumsum([0, *lengths])[:-1], sum(lengths) + 1
    texts = held_out_texts(np.arange(n), starts, longest)  # a token is its position
    assert [name for name, _ in texts] == [f"held-out {k + 1}" for k in range(len(texts))]
    spans = [(tokens[0], tokens[-1]) for _, tokens in texts]
    assert all(tokens == tuple(range(tokens[0], tokens[-1] + 1)) and len(tokens) <= longest for _, tokens in texts)
    assert all(end < start for (_, end), (start, _) in pairwise(spans))
    assert len(texts) <= max(HELD_OUT_TEXTS) and (n < 3 or spans[0][0] == 0)
    assert sum(len(tokens) for _, tokens in texts) <= 1.5 * HELD_OUT_TOKENS
    assert n < 3 or spans[-1][1] >= n * 7 / 8 - 2 * longest
    scored = EvalTexts((("line 1", (1,)), *texts)).scored_texts()
    assert scored[0] == (1,) and len(scored) == 1 + min(SCORED_HELD_OUT, len(texts)) == len(set(scored))


def test_recorded_texts() -> None:
    place = ContrastPair("place", (END, 9), (1,), (5,), (6,))
    named = (*((f"held-out {k}", (END, k)) for k in (1, 2, 3)), ("line 1", (END, 4)))
    texts = EvalTexts(named, TEXTS.repeats, (PAIR, PAIR, place))
    names = [name for name, _ in texts.recorded_texts()]
    assert names == ["line 1", "held-out 1", "held-out 2", "repeat 1", "pronoun 1", "place 1"]


DAMAGE: list[Callable[[Any], Any]] = [
    lambda d: d.update(format="other"),
    lambda d: d["texts"].append(["x", []]),
    lambda d: d["texts"].append(["x", [100]]),
    lambda d: d["texts"].append(["x", [1] * 65]),
    lambda d: d["contrast_pairs"][0].pop("right"),
]


@pytest.mark.parametrize("change", DAMAGE)
def test_damaged_file_is_one_line(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    path = tmp_path / "eval_texts.json"
    TEXTS.save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with user_error(4) as error:
        EvalTexts.load(path, 100, 64)
    assert str(path) in str(error.value)


def prompts(
    tmp_path: Path, text: str, has_backslashes: bool = False
) -> tuple[list[tuple[str, tuple[int, ...]]], list[ContrastPair]]:
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    return read_user_prompts(tmp_path / "prompts.txt", ByteTokenizer(), 64, has_backslashes)


def test_prompts_are_texts_or_contrast_pairs(tmp_path: Path) -> None:
    texts, pairs = prompts(tmp_path, "Tom ran 🙂.\n\nAnn met Tom. Then\t Ann\t Tom\nIt rained\t wet\t dry\train\n")
    assert texts == [("line 1", (256, *"Tom ran 🙂.".encode()))]
    mention, reason = pairs
    assert mention.kind == reason.kind == "own" and mention.right == tuple(b" Ann")
    assert mention.antecedent == (1, 2, 3) and reason.antecedent == (4, 5, 6, 7)
    assert prompts(tmp_path, "\ufeffTom")[0] == [("line 1", (256, *b"Tom"))]  # a byte-order mark
    assert len(prompts(tmp_path, "x" * 200)[0][0][1]) == 64
    assert prompts(tmp_path, "<|endoftext|>Tom ran  \n")[0] == [("line 1", (256, *b"Tom ran"))]
    assert prompts(tmp_path, r"Tom\nran")[0] == [("line 1", (256, *b"Tom\nran"))]
    assert prompts(tmp_path, r"Tom\nran", has_backslashes=True)[0] == [("line 1", (256, *rb"Tom\nran"))]  # as in code
    (word,) = prompts(tmp_path, "When the cat met the dog, then he ran. And\t he\t she\n")[1]
    assert (
        word.antecedent == (32, 33) == (1 + len("When the cat met the dog, then "), 33)
    )  # not "When", "the" or "then"
    (russian,) = prompts(tmp_path, "Оно, она, оно и он,\t он\t она\n".lower())[1]
    assert len(russian.antecedent) == 2 * 2  # not in "оно"
    (hanzi,) = prompts(tmp_path, "小明说明天来\t明\t天\n")[1]
    assert len(hanzi.antecedent) == 2 * 3
    (unknown,) = prompts(tmp_path, "2 + 2 =\t 4\t 5\n")[1]  # the answer is not in the prompt
    assert unknown.antecedent == () and unknown.right == tuple(b" 4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompts"),
        ("a\tb", "line 1: 2 columns"),
        ("one\nAnn ran\t he\t she\tTom", "line 2: 'Tom' is not in the prompt"),
        ("Ann ran\t\t she", "line 1: the right answer is empty"),
        ("Ann " * 30 + "\t Ann\t Tom", "line 1: .*more than the context"),
        ("x\n" * 9, "at most 8"),
    ],
)
def test_unusable_prompt_is_named(tmp_path: Path, text: str, message: str) -> None:
    with user_error(2, message):
        prompts(tmp_path, text)


def test_unknown_character_of_a_prompt_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("ab\ncab\n")
    with pytest.raises(UserError, match=r"prompts\.txt, line 2: .*'c'"):
        read_user_prompts(tmp_path / "prompts.txt", CharTokenizer("ab"), 64, False)


def test_unreadable_prompts_are_named(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe")
    for path, message in ((tmp_path / "prompts.txt", "not UTF-8"), (tmp_path / "none.txt", "cannot read")):
        with pytest.raises(UserError, match=message):
            read_user_prompts(path, ByteTokenizer(), 64, False)
