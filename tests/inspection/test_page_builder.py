"""The page file: it contains the numbers of the attention files, stays within its budget, and is safe.

`tests/browser/` tests what it does in a browser.
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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.errors import CHECKPOINT, DISK_OR_MEMORY, UserError
from inspection import page_builder
from inspection.attention_file import AttentionFile
from inspection.page_builder import PageReport, PageRun, write_page
from inspection.page_encoding import DTYPES, display_pieces
from tests.browser import example_run

ROOT = Path(__file__).parents[2]


class Page:
    """A page read back."""

    def __init__(self, path: Path) -> None:
        self.source = path.read_text("utf-8")
        self.table: Any = json.loads(self.between('<script type="application/json" id="page-data">', "</script>"))

    def between(self, start: str, end: str) -> str:
        return self.source.partition(start)[2].partition(end)[0]

    def block(self, k: int, *layout: tuple[str, int]) -> list[NDArray[Any]]:
        """The arrays of a block: dtype and length of each."""
        data = zlib.decompress(base64.b64decode(self.between(f'id="block-{k}">', "</script>")))
        arrays, offset = [], 0
        for dtype, length in layout:
            arrays.append(np.frombuffer(data, DTYPES[dtype], length, offset))
            offset += arrays[-1].nbytes
        assert offset == len(data)
        return arrays

    def text(self, step: int, text: int) -> Any:
        return self.table["runs"][0]["steps"][step]["texts"][text]


def build(tmp_path: Path, files: Sequence[AttentionFile], **options: Any) -> tuple[Page, PageReport]:
    path = tmp_path / "attention.html"
    arguments = {"findings": None, "ablations": None, "title": "a run", **options}
    report = write_page(path, [PageRun("run", files)], **arguments)
    assert report.path == path and report.bytes == path.stat().st_size
    return Page(path), report


def large_run(steps: int, texts: int) -> list[AttentionFile]:
    return [
        AttentionFile(
            [example_run.record(f"text {k}", example_run.WORDS, 7 * s + k, True) for k in range(texts)],
            {"step": str(s)},
            {},
        )
        for s in range(steps)
    ]


def test_arrays_are_exact(tmp_path: Path) -> None:
    files = example_run.files()
    page, report = build(tmp_path, files)
    assert report.notes == [] and page.table["texts"] == ["sample", "held-out 1", "pronoun 1"]
    words = ["".join(piece[1:] for piece in pieces) for pieces in page.table["vocabulary"]]
    for s, file in enumerate(files):
        for t, text in enumerate(file.texts):
            entry, (L, H, T) = page.text(s, t), text.value_norms.shape
            for layer, block in enumerate(entry["layers"]):
                (pattern,) = page.block(block, ("float16", text.pattern_tril[layer].size))
                assert np.array_equal(pattern, text.pattern_tril[layer].ravel())
            layout = (("uint32", T), ("float32", T), ("float16", L * H * T), ("uint32", 5 * T), ("float16", 5 * T))
            tokens, loss, norms, top_tokens, top_probs = page.block(entry["block"], *layout)
            assert [words[k] for k in tokens[:4]] == ["<end>", "Mia", "·met", "·the"]
            assert np.isnan(loss[0]) and np.array_equal(loss[1:], text.loss)
            expected = text.value_norms / text.value_norms.max(axis=-1, keepdims=True)
            assert np.allclose(norms.reshape(L, H, T), expected, atol=5e-4)
            pairs = [pair for row in text.top_tokens or [] for pair in row]
            pieces = [display_pieces(token) for token, _ in pairs]
            assert [words[k] for k in top_tokens] == ["".join(piece[1:] for piece in word) for word in pieces]
            assert np.allclose(top_probs, [p for _, p in pairs], rtol=2e-3, atol=1e-6)
            assert ("qkv" in entry) == (text.queries is not None)
    text, qkv = files[2].texts[0], page.text(2, 0)["qkv"]
    arrays = [np.asarray(getattr(text, name))[1] for name in ("queries", "keys", "values", "attn_out")]
    stored = page.block(qkv["blocks"][1], *((qkv["dtype"], array.size) for array in arrays))
    assert qkv["dtype"] == "float32" and all(np.array_equal(a.ravel(), b) for a, b in zip(arrays, stored, strict=True))


def test_scores_and_timeline(tmp_path: Path) -> None:
    files = example_run.files()
    files[1].scores["induction"][0, 0] = np.nan
    evaluations: list[dict[str, Any]] = [
        {"step": 0, "val_loss": 3.0},
        {"step": 50, "head_scores": {"entropy": [[0.5] * 3] * 2}},
    ]
    run = PageRun("run", files, evaluations)
    write_page(tmp_path / "attention.html", [run], None, None, "a run")
    page = Page(tmp_path / "attention.html")
    steps = page.table["runs"][0]["steps"]
    assert [step["step"] for step in steps] == list(example_run.STEPS)
    assert steps[1]["scores"]["induction"][0][0] is None
    assert np.allclose(steps[2]["scores"]["entropy"], files[2].scores["entropy"], rtol=1e-6)
    infos = page.table["scores"]
    assert infos["entropy"]["high"] == 1 and "held-out" in infos["entropy"]["description"]
    assert infos["distance"]["high"] == pytest.approx(max(f.scores["distance"].max() for f in files), rel=1e-4)
    assert page.table["runs"][0]["timeline"] == [{"step": 50, "scores": {"entropy": [[0.5] * 3] * 2}}]


def test_ablation_labels_come_from_python(tmp_path: Path) -> None:
    files, ablations = example_run.files(), example_run.ablations()
    page, _ = build(tmp_path, files, ablations=ablations, findings=example_run.FINDINGS)
    effects = page.table["ablation"][page.table["scores"]["antecedent.pronoun"]["measure"]]
    assert effects["zero"][1][2] == [[2.5, 2.0, 3.0], [0.1, -0.2, 0.3], [2.5, 2.0, 3.0]]
    labels = page.table["scores"]["antecedent.pronoun"]["labels"]
    assert labels[1][2]["kind"] == "supported" and labels[1][2]["text"].startswith("supported")
    assert labels[0][1]["kind"] == "caution" and "disputed" in labels[0][1]["text"]
    files[2].scores["antecedent.pronoun"][...] = 0.1
    page, _ = build(tmp_path, files, ablations=ablations, findings=example_run.FINDINGS)
    labels = page.table["scores"]["antecedent.pronoun"]["labels"]
    assert labels[0][1]["text"].startswith("disputed") and labels[0][0]["text"].startswith("not supported")
    assert page.table["scores"]["entropy"]["labels"] is None
    assert page.table["headline"] == example_run.FINDINGS["headline"]
    assert page.table["start"] == {"layer": 1, "head": 2, "score": "antecedent.pronoun"}
    assert page.table["findings"][1]["head"] == [1, 0]


@pytest.mark.parametrize("share, expected", [(0.9, "last step"), (0.28, "one step in")])
def test_size_budget(share: float, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = large_run(8, 4)
    _, full = build(tmp_path, files)
    source = len(page_builder._script()) + 20_000  # the page's own source does not shrink
    budget = source + int((full.bytes - source) * share)
    monkeypatch.setattr(page_builder, "BUDGET", budget)
    page, report = build(tmp_path, files)
    assert expected in " ".join(report.notes) and page.table["notes"] == report.notes
    assert report.bytes <= budget
    assert all(page.text(7, t) for t in range(4)), "every text is stored at the last step"
    assert all(page.text(s, t) for s in range(8) for t in range(2)), "the first texts are stored at every step"
    assert page.text(7, 0)["qkv"] and page.text(7, 0)["dtype"] == "float16"


def test_8_bit_patterns_are_as_exact_as_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_builder, "BUDGET", 0)
    files = large_run(1, 3)
    page, report = build(tmp_path, files)
    assert "8 bits, within 0.004, and within 0.002 below 0.25" in " ".join(report.notes)
    text, entry = files[0].texts[0], page.text(0, 0)
    (stored,) = page.block(entry["layers"][1], (entry["dtype"], text.pattern_tril[1].size))
    assert np.abs((stored / 255.0) ** 2 - text.pattern_tril[1].ravel().astype(np.float64)).max() <= 0.004


def test_long_texts_are_cut_to_the_maximum_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [bytes([65 + k]) for k in np.random.default_rng(1).integers(0, 20, 150)]
    files = [AttentionFile([example_run.record("long", words, 1, True, (6, 5))], {"step": "1"}, {})]
    monkeypatch.setattr(page_builder, "BUDGET", 0)
    monkeypatch.setattr(page_builder, "MAX_BYTES", len(page_builder._script()) + 60_000)
    page, report = build(tmp_path, files)
    assert report.bytes <= page_builder.MAX_BYTES
    entry = page.text(0, 0)
    kept = entry["tokens"]
    assert 1 < kept < 150 and f"the last {kept} tokens" in " ".join(report.notes)
    assert entry["first"] == 150 - kept and "qkv" not in entry
    rows, columns = np.tril_indices(kept)
    (stored,) = page.block(entry["layers"][0], (entry["dtype"], 5 * len(rows)))
    expected = files[0].texts[0].pattern(0)[0, :, -kept:, -kept:][:, rows, columns]
    assert np.abs((stored.reshape(5, -1) / 255.0) ** 2 - expected).max() <= 0.004
    monkeypatch.setattr(page_builder, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="larger than 1,000 bytes"):
        build(tmp_path, files)


def test_data_never_becomes_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- {{script}} \u2028"
    record = example_run.record(evil, example_run.HOSTILE, 1, True)
    file = AttentionFile([record], {"step": evil}, {evil: np.ones((2, 3), np.float32)})
    page, _ = build(tmp_path, [file], title=evil, findings={"headline": evil, "findings": []})
    ordinary, _ = build(tmp_path, example_run.files()[:1])
    for tag in ("<script>", "<!--", "</title>"):
        assert page.source.count(tag) == ordinary.source.count(tag), tag
    assert page.table["headline"] == evil
    assert page.source[page.source.index('id="page-data"') : page.source.index("<script>")].isascii()


def test_content_security_policy(tmp_path: Path) -> None:
    page, _ = build(tmp_path, example_run.files())
    policy = page.between('http-equiv="Content-Security-Policy" content="', '"')
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("script", "style"):
        digest = hashlib.sha256(page.between(f"<{tag}>", f"</{tag}>").encode()).digest()
        assert f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
        assert page.source.count(f"<{tag}>") == 1
    assert not re.search(r"\son\w+=|\sstyle=|javascript:|innerHTML|insertAdjacent|\beval\(", page.source)
    assert set(re.findall(r"https?://[^\s\"'<)`]+", page.source)) == {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize(
    "token, pieces",
    [
        (b"", ["x<end>"]),
        (b" She", ["s·", "tShe"]),
        (b"\n\n", ["n↵", "n↵"]),
        (b"a\x00\xf0", ["ta", "x\\x00", "x\\xf0"]),
        ("\u0301".encode(), ["t\u25cc\u0301"]),
        ("\u202eab".encode(), ["x\\u202e", "tab"]),
        (b"<b>&", ["t<b>&"]),
    ],
)
def test_tokens_are_shown_safely(token: bytes, pieces: list[str]) -> None:
    assert display_pieces(token) == pieces


@pytest.mark.parametrize(
    "files, findings, message",
    [
        ([], None, "nothing to show"),
        (example_run.files(), {"headline": "x", "findings": [{}]}, "findings are malformed"),
        (example_run.files(), {"findings": []}, "findings are malformed"),
    ],
)
def test_errors_are_one_line(files: list[AttentionFile], findings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(tmp_path, files, findings=findings)
    assert caught.value.exit_code == CHECKPOINT and not list(tmp_path.iterdir())


def test_write_error_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "attention.html"
    target.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(UserError, match="No space left") as caught:
        build(tmp_path, example_run.files())
    assert caught.value.exit_code == DISK_OR_MEMORY
    assert [path.name for path in tmp_path.iterdir()] == ["attention.html"] and target.read_text() == "old"


def test_page_needs_no_torch_and_all_scripts(tmp_path: Path) -> None:
    program = "import sys; sys.modules['torch'] = None; import inspection.page_builder"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert {path.stem for path in page_builder.WEB.glob("*.js")} == {*page_builder.SCRIPTS, "main"}
    sources = [build(tmp_path, example_run.files())[0].source for _ in range(2)]
    assert sources[0] == sources[1], "the same files give the same page"
