"""What a run watches: chosen once, kept in a file, and never believed unread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from inspection.contrast_pairs import ContrastPair
from inspection.eval_texts import DUMP_BYTES, LONGEST, REPEATS, EvalTexts, repeated, watched_length
from inspection.user_prompts import user_prompts
from model.config import ModelConfig

END = 0
PROBE = ContrastPair("pronoun", (END, 5, 6, 7), (1,), (5,), (6,), (2,))
SET = EvalTexts((("held-out 1", (END, 3, 4)),), repeated(range(20), END, 21, seed=1), (PROBE,))


def test_a_repeat_is_random_tokens_said_twice() -> None:
    said = repeated(range(100), END, 41, seed=1)
    assert len(said) == REPEATS and len(set(said)) == REPEATS
    for first, *rest in said:
        assert first == END and len(rest) == 40
        assert rest[:20] == rest[20:] and len(set(rest)) == 20 and END not in rest
    assert said == repeated(range(100), END, 41, seed=1) != repeated(range(100), END, 41, seed=2)


def test_a_small_vocabulary_repeats_with_repetitions_and_a_tiny_context_not_at_all() -> None:
    assert all(row[1:21] == row[21:] for row in repeated(range(5), END, 41, seed=1))
    assert repeated(range(5), END, 4, seed=1) == ()
    assert repeated([END, 3], END, 41, seed=1) == ()


def test_large_models_are_watched_by_the_beginnings_of_texts() -> None:
    small, large = ModelConfig(context=160), ModelConfig(n_layers=48, n_heads=25, d_model=1600, context=1024)
    assert watched_length(small, 12) == 160
    assert watched_length(ModelConfig(context=5000), 2) == LONGEST and watched_length(ModelConfig(context=4), 9) == 4
    length = watched_length(large, 12)
    assert 8 <= length < LONGEST and 12 * 48 * 25 * length * length <= DUMP_BYTES


def test_the_set_comes_back_as_it_was(tmp_path: Path) -> None:
    SET.save(tmp_path / "attention" / "eval_texts.json")
    assert EvalTexts.load(tmp_path / "attention" / "eval_texts.json", 100, 64) == SET
    EvalTexts().save(tmp_path / "empty.json")
    assert EvalTexts.load(tmp_path / "empty.json", 100, 64) == EvalTexts()


def test_a_dump_shows_each_text_one_repeat_and_a_question_of_each_kind() -> None:
    other = ContrastPair("place", (END, 9), (1,), (5,), (6,))
    texts = (*((f"held-out {k}", (END, k)) for k in (1, 2, 3)), ("line 1", (END, 4)))
    names = [name for name, _ in EvalTexts(texts, SET.repeats, (PROBE, PROBE, other)).shown()]
    assert names == ["line 1", "held-out 1", "held-out 2", "repeat 1", "pronoun 1", "place 1"]


def spoiled(change: Any) -> str:
    table = json.loads(json.dumps({"format": "glassgpt-eval-texts-1", **as_table()}))
    change(table)
    return json.dumps(table)


def as_table() -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(SET)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"format": "other"}',
        spoiled(lambda t: t.pop("probes")),
        spoiled(lambda t: t["texts"][0].append(1)),
        spoiled(lambda t: t["texts"].append([1, [1]])),
        spoiled(lambda t: t["texts"].append(["x", []])),
        spoiled(lambda t: t["texts"].append(["x", [100]])),
        spoiled(lambda t: t["texts"].append(["x", [-1]])),
        spoiled(lambda t: t["texts"].append(["x", [True]])),
        spoiled(lambda t: t["texts"].append(["x", [1.0]])),
        spoiled(lambda t: t["texts"].append(["x", [1] * 65])),
        spoiled(lambda t: t["repeats"].append([1, 2])),
        spoiled(lambda t: t["probes"][0].update(evidence=[4])),
        spoiled(lambda t: t["probes"][0].update(kind=3)),
        spoiled(lambda t: t["probes"][0].pop("right")),
        spoiled(lambda t: t["probes"].append("x")),
    ],
)
def test_a_file_that_was_tampered_with_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "eval_texts.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        EvalTexts.load(path, 100, 64)
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*watched\.json"):
        EvalTexts.load(tmp_path / "eval_texts.json", 100, 64)


# The user's own lines, with bytes as tokens: the id of a byte is its value plus 1.


def lines(tmp_path: Path, text: str, context: int = 64) -> tuple[list[tuple[str, tuple[int, ...]]], list[ContrastPair]]:
    path = tmp_path / "lines.txt"
    path.write_text(text, encoding="utf-8")
    return user_prompts(path, lambda t: [b + 1 for b in t.encode()], lambda t: bytes([t - 1]), END, context)


def test_a_line_is_a_text_and_columns_are_a_question(tmp_path: Path) -> None:
    texts, probes = lines(tmp_path, "Tom ran 🙂.\n\nAnn met Tom. Then\t Ann\t Tom\nIt rained\t wet\t dry\train\n")
    assert texts == [("line 1", (END, *(b + 1 for b in "Tom ran 🙂.".encode())))]
    named, reason = probes
    assert named.kind == reason.kind == "own"
    assert [bytes([t - 1]) for t in named.right] == [b" ", b"A", b"n", b"n"]
    assert named.evidence == (1, 2, 3)  # "Ann", behind end-of-text
    assert reason.evidence == (4, 5, 6, 7)  # "rain"


def test_a_long_text_is_watched_by_its_beginning(tmp_path: Path) -> None:
    assert len(lines(tmp_path, "x" * 200)[0][0][1]) == 64


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no lines"),
        ("a\tb", "line 1: 2 columns"),
        ("one\nAnn ran\t he\t she", "line 2: 'he' does not stand in the prompt"),
        ("Ann ran\t Ann\t Ann", "line 1: both candidates"),
        ("Ann ran\t\t Ann\tAnn", "does not stand"),
        ("Ann " * 30 + "\t Ann\t Tom", "more than the context"),
        ("x\n" * 9, "at most 8"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        lines(tmp_path, text)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="no UTF-8"):
        user_prompts(tmp_path / "lines.txt", lambda t: [1], lambda t: b"a", END, 64)
    with pytest.raises(UserError, match="cannot read"):
        user_prompts(tmp_path / "none.txt", lambda t: [1], lambda t: b"a", END, 64)
