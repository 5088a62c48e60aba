"""The page's file: it holds the dumps' numbers exactly, stays small, says what it left out, and lets nothing else in.

What it does in a browser is tested in `tests/browser/`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.errors import CHECKPOINT, DISK_OR_MEMORY, UserError
from inspection import page_builder as page
from inspection.attention_file import AttentionFile
from inspection.page_builder import PageRun, write_page
from inspection.page_data import Plan, parts
from tests.browser import made

ROOT = Path(__file__).parents[2]


class Read:
    """A page read back: its table, and its blocks' bytes."""

    def __init__(self, path: Path) -> None:
        self.source = path.read_text("utf-8")
        self.about: Any = json.loads(self.between('<script type="application/json" id="about">', "</script>"))

    def between(self, start: str, end: str) -> str:
        return self.source.partition(start)[2].partition(end)[0]

    def block(self, k: int, *kinds: tuple[str, int]) -> list[NDArray[Any]]:
        """The arrays of a block: (number format, how many) of each."""
        raw = zlib.decompress(base64.b64decode(self.between(f'id="block-{k}">', "</script>")))
        found, at = [], 0
        for kind, count in kinds:
            size = np.dtype(kind).itemsize
            planes = np.frombuffer(raw[at : at + size * count], np.uint8).reshape(size, count)
            found.append(np.ascontiguousarray(planes.T).view(kind).ravel())
            at += size * count
        assert at == len(raw)
        return found

    def text(self, step: int, text: int) -> Any:
        return self.about["runs"][0]["steps"][step]["texts"][text]


def build(tmp_path: Path, dumps: Sequence[AttentionFile], **more: Any) -> tuple[Read, page.PageReport]:
    path = tmp_path / "attention.html"
    arguments = {"claims": None, "evidence": None, "title": "a run", **more}
    report = write_page(path, [PageRun("run", list(dumps))], **arguments)
    assert report.path == path and report.bytes == path.stat().st_size
    return Read(path), report


def many(steps: int, texts: int) -> list[AttentionFile]:
    """A run of some size: 12 tokens, 2 x 3 heads."""
    return [
        AttentionFile([made.text(f"text {k}", made.WORDS, 7 * s + k, True) for k in range(texts)], {"step": str(s)}, {})
        for s in range(steps)
    ]


def test_weights_are_the_dumps_numbers_exactly(tmp_path: Path) -> None:
    dumps = made.dumps()
    read, report = build(tmp_path, dumps)
    assert report.notes == []
    assert read.about["texts"] == ["sample", "held-out 1", "pronoun 1"]
    for s, dump in enumerate(dumps):
        for t, text in enumerate(dump.texts):
            entry = read.text(s, t)
            for layer, block in enumerate(entry["layers"]):
                (kept,) = read.block(block, ("<f2", text.pattern_tril[layer].size))
                assert np.array_equal(kept, text.pattern_tril[layer].ravel())


def test_what_goes_with_the_weights(tmp_path: Path) -> None:
    dumps = made.dumps()
    read, _ = build(tmp_path, dumps)
    text, entry = dumps[2].texts[1], read.text(2, 1)
    T, heads = len(text.tokens), made.L * made.H
    kinds = (("<u4", T), ("<f4", T), ("<f2", heads * T), ("<u4", 5 * T), ("<f2", 5 * T))
    tokens, loss, norms, likely, chance = read.block(entry["side"], *kinds)
    words = ["".join(part[1:] for part in pieces) for pieces in read.about["words"]]
    assert [words[k] for k in tokens[:4]] == ["<end>", "Mia", "·met", "·the"]
    assert np.isnan(loss[0]) and np.array_equal(loss[1:], text.loss)
    largest = text.value_norms.max(axis=-1, keepdims=True)
    assert np.allclose(norms.reshape(made.L, made.H, T), text.value_norms / largest, atol=5e-4)
    assert text.top_tokens is not None
    assert [words[k] for k in likely[:5]] == ["".join(p[1:] for p in parts(token)) for token, _ in text.top_tokens[0]]
    assert np.allclose(chance[:5], [p for _, p in text.top_tokens[0]], rtol=1e-3)


def test_queries_keys_and_values_in_full(tmp_path: Path) -> None:
    dumps = made.dumps()
    read, _ = build(tmp_path, dumps)
    text, entry = dumps[2].texts[0], read.text(2, 0)
    assert read.text(0, 0).get("details") is None and entry["details"]["half"] is False
    assert text.queries is not None and text.keys is not None and text.values is not None and text.attn_out is not None
    arrays = [text.queries[1], text.keys[1], text.values[1], text.attn_out[1]]
    kept = read.block(entry["details"]["blocks"][1], *(("<f4", array.size) for array in arrays))
    assert all(np.array_equal(a.ravel(), b) for a, b in zip(arrays, kept, strict=True))


def test_scores_and_what_they_mean(tmp_path: Path) -> None:
    dumps = made.dumps()
    dumps[1].scores["induction"][0, 0] = np.nan
    read, _ = build(tmp_path, dumps, evidence=made.evidence(), claims=made.CLAIMS)
    steps = read.about["runs"][0]["steps"]
    assert [step["step"] for step in steps] == list(made.STEPS)
    assert steps[1]["scores"]["induction"][0][0] is None
    assert np.allclose(steps[2]["scores"]["entropy"], dumps[2].scores["entropy"], rtol=1e-6)
    meaning = read.about["scores"]
    assert (
        meaning["induction"]["measure"] == "repeats"
        and meaning["antecedent.pronoun"]["measure"] == "logit_diff.pronoun"
    )
    assert meaning["entropy"]["measure"] == "corpus" and meaning["distance"]["high"] is None
    assert not meaning["entropy"]["weight"] and meaning["antecedent.pronoun"]["weight"]
    assert read.about["headline"] == made.CLAIMS["headline"] and read.about["evidence"]["step"] == 400


# ---- small enough


@pytest.mark.parametrize("share, lost", [(0.9, "last step"), (0.28, "one step in")])
def test_what_is_too_much_is_left_out_in_order(
    share: float, lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumps = many(8, 4)
    _, whole = build(tmp_path, dumps)
    empty = len(page._script()) + 20_000  # the page's own source does not shrink
    budget = empty + int((whole.bytes - empty) * share)
    monkeypatch.setattr(page, "BUDGET", budget)
    read, report = build(tmp_path, dumps)
    assert lost in " ".join(report.notes) and read.about["notes"] == report.notes
    assert report.bytes <= budget
    last = len(dumps) - 1
    assert all(read.text(last, t) for t in range(4)), "the last step of every text is always there"
    assert all(read.text(s, t) for s in range(8) for t in range(2)) or "last step" in lost
    assert read.text(last, 0)["details"]
    assert not any(read.text(s, t)["eight"] for s in range(8) for t in range(4) if read.text(s, t))


def test_what_is_kept_in_eight_bits_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dumps, seen = many(8, 4), set()
    _, whole = build(tmp_path, dumps)
    empty = len(page._script()) + 20_000
    for percent in range(30, 4, -2):
        monkeypatch.setattr(page, "BUDGET", empty + (whole.bytes - empty) * percent // 100)
        read, report = build(tmp_path, dumps)
        coarse = any(read.text(s, t)["eight"] for s in range(8) for t in range(4) if read.text(s, t))
        assert ("8 bits" in " ".join(report.notes)) == coarse, report.notes
        seen.add(coarse)
    assert seen == {False, True}


def test_eight_bits_are_within_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dumps = many(1, 3)
    monkeypatch.setattr(page, "BUDGET", 0)
    read, report = build(tmp_path, dumps)
    assert read.text(0, 0)["eight"]
    assert "8 bits, each within 0.004, those below 0.25 within 0.002" in " ".join(report.notes)
    text = dumps[0].texts[0]
    (kept,) = read.block(read.text(0, 0)["layers"][1], ("|u1", text.pattern_tril[1].size))
    assert np.abs((kept / 255.0) ** 2 - text.pattern_tril[1].ravel().astype(np.float64)).max() <= 0.004
    everything = np.linspace(0, 1, 9999)
    plan = replace(made.text("x", [b"a"], 1, False), pattern_tril=everything.reshape(1, 1, -1))
    off = np.abs((Plan().pattern(plan, 0, True)[0].ravel() / 255.0) ** 2 - everything)
    assert off.max() <= 0.004 and off[everything < 0.25].max() <= 0.002


def test_at_the_very_most_a_part_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    words = [bytes([65 + k]) for k in rng.integers(0, 20, 150)]
    dumps = [AttentionFile([made.text("long", words, 1, True, (6, 5))], {"step": "1"}, {})]
    monkeypatch.setattr(page, "BUDGET", 0)
    monkeypatch.setattr(page, "MOST", len(page._script()) + 30_000)
    read, report = build(tmp_path, dumps)
    said = " ".join(report.notes)
    assert report.bytes <= page.MOST
    run, entry = read.about["runs"][0], read.text(0, 0)
    kept = entry["tokens"]
    assert f"the last {kept} tokens" in said and entry["first"] == 150 - kept and "details" not in entry
    assert len(entry["layers"]) == run["layers"] and f"Of 6 layers the first {run['layers']} are kept" in said
    whole = dumps[0].texts[0].pattern(0)[0, :, -kept:, -kept:]
    rows, columns = np.tril_indices(kept)
    (first,) = read.block(entry["layers"][0], ("|u1", run["heads"] * len(rows)))
    expected = whole[: run["heads"], rows, columns]
    assert np.abs((first.reshape(run["heads"], -1) / 255.0) ** 2 - expected).max() <= 0.004


# ---- safe


def test_nothing_in_the_data_becomes_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- {{script}} \u2028"
    dump = AttentionFile([made.text(evil, made.HOSTILE, 1, True)], {"step": evil}, {evil: np.ones((2, 3), np.float32)})
    claims = {"headline": evil, "findings": [{"text": evil}]}
    read, _ = build(tmp_path, [dump], title=evil, claims=claims, evidence={evil: evil})
    ordinary, _ = build(tmp_path, made.dumps()[:1])
    for tag in ("<script>", "<!--", "</title>"):
        assert read.source.count(tag) == ordinary.source.count(tag), tag
    assert read.about["headline"] == evil, "and yet it arrives as it was"
    data = read.source[read.source.index('id="about"') : read.source.index("<script>")]
    assert data.isascii()


def test_the_policy_names_the_script_and_the_style(tmp_path: Path) -> None:
    read, _ = build(tmp_path, made.dumps())
    policy = read.between('http-equiv="Content-Security-Policy" content="', '"')
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("script", "style"):
        inner = read.between(f"<{tag}>", f"</{tag}>")
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
        assert len(re.findall(f"<{tag}>", read.source)) == 1
    assert not re.search(r"\son\w+=|\sstyle=|javascript:|innerHTML|insertAdjacent|\beval\(", read.source)
    addresses = set(re.findall(r"https?://[^\s\"'<)`]+", read.source))
    assert addresses == {"http://www.w3.org/2000/svg"}, "a name, which nobody asks for"


@pytest.mark.parametrize(
    "token, shown",
    [
        (b"", ["x<end>"]),
        (b" She", ["s·", "tShe"]),
        (b"\n\n", ["n↵", "n↵"]),
        (b"\xf0\x9f", ["x\\xf0", "x\\x9f"]),
        (b"a\x00b", ["ta", "x\\x00", "tb"]),
        ("\u2028".encode(), ["x\\u2028"]),
        ("e\u0301".encode(), ["te\u0301"]),
        ("\u0301".encode(), ["t\u25cc\u0301"]),
        ("\u202eab".encode(), ["x\\u202e", "tab"]),
        ("👩\u200d🚀".encode(), ["t👩\u200d🚀"]),
        (b"\xed\xa0\x80", ["x\\xed", "x\\xa0", "x\\x80"]),
        (b"<b>&", ["t<b>&"]),
    ],
)
def test_tokens_are_shown_safely(token: bytes, shown: list[str]) -> None:
    assert parts(token) == shown


# ---- faults


def test_nothing_to_show_is_one_line(tmp_path: Path) -> None:
    for runs in ([], [PageRun("x", [])], [PageRun("x", [AttentionFile([], {"step": "1"}, {})])]):
        with pytest.raises(UserError, match="nothing to show") as caught:
            write_page(tmp_path / "page.html", runs, None, None, "x")
        assert caught.value.exit_code == CHECKPOINT
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "attention.html"
    target.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="No space left") as caught:
        build(tmp_path, made.dumps())
    assert caught.value.exit_code == DISK_OR_MEMORY
    assert [path.name for path in tmp_path.iterdir()] == ["attention.html"] and target.read_text() == "old"
    with pytest.raises(UserError, match="cannot write"):
        write_page(target / "x.html", [PageRun("run", made.dumps())], None, None, "x")


def test_strange_dumps_still_make_a_page(tmp_path: Path) -> None:
    """Numbers that are none, a step that is no number, two texts of one name, a text of another shape."""
    text = made.text("a", made.WORDS, 1, True)
    broken = replace(
        text, pattern_tril=np.full_like(text.pattern_tril, np.nan), value_norms=np.full_like(text.value_norms, np.inf)
    )
    other = made.text("b", made.WORDS, 1, False, (1, 1))
    dumps = [AttentionFile([text, broken, other], {"step": "x"}, {}), AttentionFile([broken], {}, {})]
    read, _ = build(tmp_path, dumps, evidence={"measures": {"corpus": float("nan")}})
    assert [step["step"] for step in read.about["runs"][0]["steps"]] == [0, 1]
    assert read.text(0, 0) and read.text(0, 1) is None


def test_the_page_is_built_without_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; import inspection.page_builder"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_the_source_is_short_and_complete() -> None:
    names = {path.stem for path in page.SOURCE.glob("*.js")}
    assert names == {*page.SCRIPTS, "main"}
    for path in page.SOURCE.iterdir():
        assert len(path.read_text("utf-8").splitlines()) <= 330, path.name


def test_the_same_dumps_give_the_same_page(tmp_path: Path) -> None:
    first, _ = build(tmp_path, made.dumps())
    second, _ = build(tmp_path, made.dumps())
    assert first.source == second.source
