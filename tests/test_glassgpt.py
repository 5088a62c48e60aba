"""`import glassgpt`: a run from Python, docs/python.md as a doctest, and the notebook as a script."""

import doctest
import html
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import glassgpt
from common.errors import CHECKPOINT, CONFIG
from data.stories import stories
from inspection.head_scores import previous_token
from tests.runs import ROOT, output, python, user_error

TEXT = "One day Ann the hen found a red kite."
OPTIONS = {"model.n_layers": 2, "model.n_heads": 4, "model.d_model": 128, "model.context": 64, "train.batch_size": 8}


class CountSteps:
    steps = 0

    def on_step(self, trainer: object, metrics: dict[str, float]) -> None:
        self.steps += 1

    def on_eval(self, trainer: object, metrics: dict[str, object]) -> None:
        metrics["counted"] = self.steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a text of stories and, in runs/quickstart, a run of 20 steps on it, trained from Python."""
    folder, callback = tmp_path_factory.mktemp("python"), CountSteps()
    book = "\n<|endoftext|>\n".join(story.text for story in stories("train", 250))
    (folder / "my_book.txt").write_text(book)
    steps = {"train.steps": 20, "train.eval_every": 10, "train.save_every": 10, "log.sample_tokens": 8}
    run_dir = folder / "runs" / "quickstart"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = glassgpt.train("my_book.txt", {**OPTIONS, **steps, "run.dir": run_dir}, [callback])
        assert run.folder == run_dir.resolve() and callback.steps == 20
        assert '"counted": 20' in (run_dir / "metrics.jsonl").read_text()
        yield folder


@pytest.fixture
def run(folder: Path) -> glassgpt.Run:
    return glassgpt.open(folder / "runs" / "quickstart")


def test_docs(folder: Path) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    results = doctest.testfile(str(ROOT / "docs" / "python.md"), module_relative=False, optionflags=flags)
    assert results.failed == 0 and results.attempted > 15


def test_notebook(folder: Path) -> None:
    cells = json.loads((ROOT / "notebooks" / "tour.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code) and len(code[0]["source"]) <= 10
    program = "\n".join("".join(cell["source"]) for cell in code)
    done = python(program, cwd=folder, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "without head L1H3" in done.stdout


def test_import_beside_a_folder_named_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "values.csv").touch()
    elsewhere = partial(python, cwd=tmp_path, PYTHONPATH=str(ROOT))
    done = elsewhere("import sys, glassgpt, data.tokenizer; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr
    (tmp_path / "data" / "__init__.py").touch()
    done = elsewhere("import glassgpt")
    assert "hides GlassGPT's own 'data': rename it" in done.stderr.splitlines()[-1]


def test_start_token(run: glassgpt.Run) -> None:
    ids = run.tokens(TEXT)
    assert ids[0] == run.tokenizer.end_of_text and run.tokens(TEXT, start=False) == ids[1:]
    assert np.array_equal(run.logits(TEXT), run.logits(ids))


def test_arrays_add_up(run: glassgpt.Run) -> None:
    arrays, model = run.attention(TEXT), run.model
    residual = torch.tensor(arrays["residual"])
    assert np.allclose(arrays["pattern"].sum(axis=-1), 1, atol=1e-6)
    assert torch.allclose(model.lm_head(model.final_norm(residual[-1])), torch.tensor(run.logits(TEXT)), atol=1e-4)
    for block, before, after, heads in zip(
        model.blocks, residual, residual[1:], torch.tensor(arrays["head_outputs"]), strict=False
    ):
        middle = before + heads.sum(dim=0)
        assert torch.allclose(middle + block.mlp(block.norm2(middle[None]))[0], after, atol=1e-4)


def test_ablation_is_nested_and_undone(run: glassgpt.Run) -> None:
    whole = run.logits(TEXT)
    with run.ablate("L0H0", "L1H2"):
        both = run.logits(TEXT)
        assert not run.attention(TEXT)["head_outputs"][[0, 1], [0, 2]].any()
    with pytest.raises(KeyError), run.ablate("L0H0"), run.ablate("L1H2"):
        assert np.array_equal(run.logits(TEXT), both) and not np.array_equal(both, whole)
        raise KeyError
    assert np.array_equal(run.logits(TEXT), whole)


def test_mean_is_that_of_the_whole_model(run: glassgpt.Run) -> None:
    with run.ablate("L1H2", mode="mean"), run.ablate("L0H0"):
        expected = run.logits(TEXT)
    with run.ablate("L0H0"), run.ablate("L1H2", mode="mean"):
        assert np.array_equal(run.logits(TEXT), expected)
    with run.ablate("L1H2", "L0H0"):
        assert not np.array_equal(run.logits(TEXT), expected)


def test_sample_is_that_of_the_command(run: glassgpt.Run) -> None:
    text = output("sample.py", run.folder, "--prompt=One day", "--tokens=12", "--temperature=1.5", "--seed=3")
    assert run.sample("One day", tokens=12, temperature=1.5, seed=3) + "\n" == text


def test_own_score(run: glassgpt.Run) -> None:
    scores, own = run.head_scores(), run.head_scores(score=previous_token)
    assert np.allclose(own, scores["text.previous_token"], atol=1e-6)
    repeats = run.head_scores(score=previous_token, texts=run.eval_texts.repeats)
    assert np.allclose(repeats, scores["previous_token"], atol=1e-6) and not np.allclose(repeats, own)


def test_page_is_in_a_sandbox(run: glassgpt.Run) -> None:
    shown = re.fullmatch(
        r'<iframe sandbox="allow-scripts" style="[^"]*" srcdoc="([^"<>]*)"></iframe>', run._repr_html_()
    )
    assert shown and html.unescape(shown[1]) == (run.folder / "attention.html").read_text(encoding="utf-8")


def test_every_checkpoint(run: glassgpt.Run) -> None:
    assert run.steps == [10, 20]
    assert [run.at(step).step for step in run.steps] == run.steps
    assert not np.array_equal(run.at(10).logits(TEXT), run.at(20).logits(TEXT))


def test_mistakes_are_one_line(run: glassgpt.Run, tmp_path: Path) -> None:
    mistakes = [
        (lambda: glassgpt.open(tmp_path), CHECKPOINT, "has no checkpoint"),
        (lambda: run.at(7), CONFIG, "best, last, 10, 20"),
        (lambda: run.ablate("L2H0").__enter__(), CONFIG, "the model has L0H0 to L1H3"),
        (lambda: run.ablate("head 3").__enter__(), CONFIG, "such as L1H2"),
        (lambda: run.ablate("L0H0", mode="max").__enter__(), CONFIG, "must be 'zero' or 'mean'"),  # type: ignore[arg-type]
        (lambda: run.sample(temperature=-1), CONFIG, "temperature is -1"),
        (lambda: glassgpt.train("", {"train.step": 3}), CONFIG, "did you mean --train.steps"),
        (lambda: run.patch("One day", "One", right=" Ann", wrong=" Sue"), CONFIG, "the clean text has 3 tokens"),
    ]
    for call, code, message in mistakes:
        with user_error(code, message):
            call()
