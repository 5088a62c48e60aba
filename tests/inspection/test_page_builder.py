"""The page file: it contains the numbers of the attention files, stays within its budget, and is safe.

`tests/browser/` tests what it does in a browser.
"""

import base64
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from common.errors import CHECKPOINT, UserError
from inspection import page_builder
from inspection.attention_file import AttentionFile
from inspection.page_builder import PageRun, write_page
from inspection.page_encoding import DTYPES
from inspection.terminal import display_pieces
from tests.browser import example_run
from tests.runs import python, user_error


class Page:
    """A page of one run, written and read back."""

    def __init__(self, tmp_path: Path, files: Sequence[AttentionFile], evaluations: Any = (), **options: Any) -> None:
        path, defaults = tmp_path / "attention.html", {"findings": None, "ablations": None, "title": "a run"}
        self.notes = write_page(path, [PageRun("run", files, evaluations)], **(defaults | options))
        self.bytes, self.source = path.stat().st_size, path.read_text("utf-8")
        self.table: Any = json.loads(self.between('<script type="application/json" id="page-data">', "</script>"))
        self.steps = self.table["runs"][0]["steps"]

    def between(self, start: str, end: str) -> str:
        return self.source.partition(start)[2].partition(end)[0]


def decode(encoded: tuple[str, str]) -> NDArray[Any]:
    return np.frombuffer(zlib.decompress(base64.b64decode(encoded[1])), DTYPES[encoded[0]])


def assert_equal(encoded: tuple[str, str], expected: ArrayLike, atol: float = 0) -> None:
    np.testing.assert_allclose(decode(encoded), np.ravel(np.asarray(expected, np.float64)), rtol=0, atol=atol)


def test_arrays_are_exact(tmp_path: Path) -> None:
    files = example_run.files()
    page = Page(tmp_path, files)
    assert page.notes == [] and page.table["texts"] == ["sample", "held-out 1", "pronoun 1"]
    for file, step in zip(files, page.steps, strict=True):
        for text, entry in zip(file.texts, step["texts"], strict=True):
            arrays = entry["arrays"]
            top_tokens, top_probs = zip(*[pair for row in text.top_tokens for pair in row], strict=True)
            for name, tokens in (("tokens", text.token_bytes), ("top_tokens", top_tokens)):
                pieces = [page.table["vocabulary"][k] for k in decode(arrays[name])]
                assert pieces == [display_pieces(token) for token in tokens]
            assert_equal(arrays["loss"], [np.nan, *text.loss])
            assert_equal(arrays["value_norms"], text.value_norms / text.value_norms.max(-1, keepdims=True), atol=5e-4)
            assert_equal(arrays["top_probs"], top_probs, atol=5e-4)
            for layer, encoded in enumerate(entry["layers"]):
                assert_equal(encoded["pattern"], text.pattern_tril[layer])
                for name in ("queries", "keys", "values", "attn_out"):
                    assert (name in encoded) == (text.queries is not None)
                    if name in encoded:
                        assert_equal(encoded[name], getattr(text, name)[layer])


def test_scores_and_timeline(tmp_path: Path) -> None:
    files = example_run.files()
    files[1].scores["induction"][0, 0] = np.nan
    scored = {"step": 50, "head_scores": {"entropy": [[0.5] * 3] * 2}}
    page = Page(tmp_path, files, [{"step": 0, "val_loss": 3.0}, scored])
    assert [step["step"] for step in page.steps] == list(example_run.STEPS)
    assert page.steps[1]["scores"]["induction"][0][0] is None
    assert np.allclose(page.steps[2]["scores"]["entropy"], files[2].scores["entropy"], rtol=1e-6)
    infos = page.table["scores"]
    assert infos["entropy"]["high"] == 1 and "held-out" in infos["entropy"]["description"]
    assert infos["distance"]["high"] == pytest.approx(max(f.scores["distance"].max() for f in files), rel=1e-4)
    assert page.table["runs"][0]["timeline"] == [{"step": 50, "scores": {"entropy": [[0.5] * 3] * 2}}]


def test_ablation_labels_come_from_python(tmp_path: Path) -> None:
    files = example_run.files()
    options: dict[str, Any] = {"ablations": example_run.ablations(), "findings": example_run.FINDINGS}
    table = Page(tmp_path, files, **options).table
    ablation = table["scores"]["antecedent.pronoun"]["ablation"]
    assert ablation["zero"][1][2] == [[2.5, 2.0, 3.0], [0.1, -0.2, 0.3], [2.5, 2.0, 3.0]]
    (*_, disputed, _), (*_, supported) = ablation["labels"]
    assert supported["kind"] == "supported" and disputed["kind"] == "caution" and "disputed" in disputed["text"]
    assert table["scores"]["entropy"]["ablation"] is None
    assert table["headline"] == example_run.FINDINGS["headline"] and table["findings"][1]["head"] == [1, 0]
    assert table["start"] == {"layer": 1, "head": 2, "score": "antecedent.pronoun"}
    files[2].scores["antecedent.pronoun"][...] = 0.1
    table = Page(tmp_path, files, **options).table
    low, disputed, _ = table["scores"]["antecedent.pronoun"]["ablation"]["labels"][0]
    assert disputed["text"].startswith("disputed") and low["text"].startswith("not supported")


@pytest.mark.parametrize("share, expected", [(0.6, "for one step in 2"), (0.45, "only for the last step")])
def test_size_budget(share: float, expected: str, tmp_path: Path) -> None:
    texts = [[example_run.record(f"text {k}", example_run.WORDS, 7 * s + k, True) for k in range(4)] for s in range(8)]
    files = [AttentionFile(texts[step], {"step": str(step)}) for step in range(8)]
    budget = int(Page(tmp_path, files).bytes * share)
    page = Page(tmp_path, files, budget=budget)
    assert expected in " ".join(page.notes) and page.table["notes"] == page.notes
    assert page.bytes <= budget
    assert all(page.steps[7]["texts"]) and all(all(step["texts"][:2]) for step in page.steps)
    assert page.steps[7]["texts"][0]["layers"][0]["queries"][0] == "float16"


def test_long_texts_are_cut_to_the_maximum_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = example_run.record("long", [bytes([65 + k % 20]) for k in range(150)], 1, True, (6, 5))
    files = [AttentionFile([text], {"step": "1"})]
    monkeypatch.setattr(page_builder, "MAX_BYTES", Page(tmp_path, files).bytes // 4)
    page = Page(tmp_path, files, budget=0)
    entry = page.steps[0]["texts"][0]
    kept = entry["length"]
    assert page.bytes <= page_builder.MAX_BYTES and 1 < kept < 150 and entry["first"] == 150 - kept
    assert f"the last {kept} tokens" in " ".join(page.notes) and set(entry["layers"][0]) == {"pattern"}
    expected = text.pattern(0)[0, :, -kept:, -kept:]
    assert_equal(entry["layers"][0]["pattern"], expected[:, *np.tril_indices(kept)])
    monkeypatch.setattr(page_builder, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="larger than 1,000 bytes"):
        Page(tmp_path, files, budget=0)


def test_only_our_own_code_runs(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- {{script}} \u2028"
    record = example_run.record(evil, example_run.HOSTILE, 1, True)
    file = AttentionFile([record], {"step": evil}, {evil: np.ones((2, 3), np.float32)})
    page = Page(tmp_path, [file], title=evil, findings={"headline": evil, "findings": []})
    assert [page.source.count(tag) for tag in ("<script>", "<style>", "<!--", "</title>")] == [1, 1, 0, 1]
    assert page.source[page.source.index('id="page-data"') : page.source.index("<script>")].isascii()
    policy = page.between('http-equiv="Content-Security-Policy" content="', '"')
    assert "default-src 'none'" in policy and "unsafe" not in policy and "innerHTML" not in page.source


def test_tokens_are_shown_safely() -> None:
    tokens = {
        b"": ["x<end>"],
        b" She\n\n": ["s·", "tShe", "n↵", "n↵"],
        b"a\x00\xf0": ["ta", "x\\x00", "x\\xf0"],
        "\u0301".encode(): ["t\u25cc\u0301"],
        "\u202eab".encode(): ["x\\u202e", "tab"],
    }
    assert {token: display_pieces(token) for token in tokens} == tokens


def test_errors_are_one_line(tmp_path: Path) -> None:
    malformed = {"headline": "x", "findings": [{}]}
    for steps, findings, message in ((0, None, "nothing to show"), (3, malformed, "findings are malformed")):
        with user_error(CHECKPOINT, message):
            Page(tmp_path, example_run.files()[:steps], findings=findings)
        assert not list(tmp_path.iterdir())


def test_page_needs_no_torch_and_all_scripts() -> None:
    assert not python("import sys; sys.modules['torch'] = None; import inspection.page_builder").returncode
    assert {path.name for path in page_builder.WEB.glob("*.js")} == set(page_builder.SCRIPTS)
