"""The weights in a page: which steps fit, and files that are damaged or missing."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from inspection.page_builder import NO_MODEL, write_page
from inspection.page_data import PageRun
from inspection.page_model import encode_model
from tests.browser.model_run import STEPS, make_run


@pytest.fixture
def run(tmp_path: Path) -> PageRun:
    return make_run(tmp_path, "glass", "byte")[0]


def weights(run: PageRun, step: int) -> Path:
    assert run.folder is not None
    return run.folder / "attention" / "weights" / f"{step:06d}.safetensors"


def steps_in(run: PageRun, limit: int = 1 << 30) -> list[int]:
    model, vocabulary = encode_model(run, limit)
    assert bool(model) == bool(vocabulary)
    return [snapshot["step"] for snapshot in model["snapshots"]] if model else []


def test_as_many_steps_as_fit(run: PageRun) -> None:
    """The last, the first, then the newest."""
    model, _ = encode_model(run, 1 << 30)
    assert model is not None
    last, first, _ = (sum(len(text) for _, text in s["weights"].values()) for s in model["snapshots"])
    assert steps_in(run) == [STEPS[2], STEPS[0], STEPS[1]]
    assert steps_in(run, last + first) == [STEPS[2], STEPS[0]] and steps_in(run, last) == [STEPS[2]]
    assert steps_in(run, last - 1) == []


def test_damaged_weights_are_skipped(run: PageRun, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = load_file(weights(run, STEPS[0]))
    save_file(arrays | {"means.mlps": arrays["means.mlps"].astype(np.float64)}, weights(run, STEPS[0]))
    weights(run, STEPS[1]).write_bytes(b"no weights")
    assert steps_in(run) == [STEPS[2]]
    assert capsys.readouterr().err.count("skipping damaged weights: ") == 2
    arrays = load_file(weights(run, STEPS[2]))
    del arrays["token_embedding.weight"]
    save_file(arrays, weights(run, STEPS[2]))
    assert steps_in(run) == []


def test_tokenizer_of_an_intact_checkpoint_is_used(run: PageRun) -> None:
    """A page is of the tokenizer that the attention file names; it has no model if every checkpoint is damaged."""
    assert run.folder is not None
    first, *others = sorted(run.folder.glob("checkpoints/*"))
    newest = shutil.copytree(first, run.folder / "checkpoints" / "999998")
    for name, content in (
        ("state.json", b"{"),
        ("vocabulary.json", b'{"kind": "byte"'),
        ("vocabulary.json", b'{"kind": "char", "characters": "ab"}'),  # of another tokenizer
    ):
        (newest / name).write_bytes(content)
        model, _ = encode_model(run, 1 << 30)
        assert model is not None and model["tokenizer"]["kind"] == "byte"
        shutil.copy(first / name, newest)
    shutil.rmtree(newest)
    for folder in (first, *others):
        (folder / "vocabulary.json").unlink()
    assert steps_in(run) == []


def test_malformed_metadata_is_one_line(run: PageRun) -> None:
    last = run.files[-1]
    run.files[-1] = replace(last, metadata={**last.metadata, "config": '{"n_layers": "two", "x": 1}'})
    with pytest.raises(UserError, match="run with weights"):
        encode_model(run, 1 << 30)


def test_page_without_weights_says_so(run: PageRun, tmp_path: Path) -> None:
    weights(run, STEPS[2]).unlink()
    assert NO_MODEL in write_page(tmp_path / "page.html", [run], None, None, "run")
    assert NO_MODEL not in write_page(tmp_path / "page.html", [PageRun("run", run.files)], None, None, "run")
