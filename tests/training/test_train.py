"""train.py: what a run leaves behind, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from common.files import read_metrics
from inspection.attention_file import read_attention_file
from model.config import ATTENTION_IMPLEMENTATIONS
from tests.runs import ROOT, TINY, said, script
from training.checkpoint import open_checkpoint, sha256_of_weights
from training.device import get_dist_context

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "fox"
    done = script("train.py", *TINY, f"--data.source={corpus}", f"--run.dir={folder}")
    assert done.returncode == 0, done.stderr
    (folder / "output.txt").write_text(done.stdout)
    return folder


def weights(folder: Path) -> str:
    return sha256_of_weights(open_checkpoint(folder).load_model(get_dist_context("fp32")))


def test_a_run_leaves_what_the_readme_says(run: Path) -> None:
    pictures = ("loss.png", "attention.png", "head.png", "timeline.png", "phase_change.png")
    for name in ("config.toml", "metrics.jsonl", "samples.txt", "attention.html", *pictures):
        assert (run / name).stat().st_size > 0, name
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "vocabulary.json", "manifest.json"):
        assert (run / "checkpoints" / "000006" / name).stat().st_size > 0, name
    dumps = [f"{step:06d}.safetensors" for step in (0, 3, 6)]
    names = sorted(path.name for path in (run / "attention").iterdir())
    assert names == [*dumps, "findings.json", "ablations.json", "eval_texts.json"]
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_the_first_lines_say_what_is_trained_where_and_how(run: Path) -> None:
    lines = (run / "output.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["data", "model", "machine", "run"]
    assert "fp32" in lines[2] or "bf16" in lines[2]
    assert any(f"{face} attention" in lines[2] for face in ATTENTION_IMPLEMENTATIONS)


def test_the_last_lines_set_the_loss_in_context(run: Path) -> None:
    text = (run / "output.txt").read_text()
    assert "No head passes" in text  # six steps teach no head anything
    assert (
        "An attention weight shows what a head attends to, not why." in text
        and f"open {run / 'attention.html'}" in text
    )
    for word in ("uniform", "unigram", "trigram", "this model", "nats/token", "bits/byte"):
        assert word in text
    assert "floor" not in text  # nobody knows the entropy of this text


def test_dumps_hold_the_same_texts_at_every_evaluation_and_say_where_they_come_from(run: Path) -> None:
    early, late = (read_attention_file(run / "attention" / f"{step:06d}.safetensors") for step in (3, 6))
    names = [text.name for text in late.texts]
    assert names == ["sample", "held-out 1", "held-out 2", "repeat 1"] == [text.name for text in early.texts]
    for before, after in zip(early.texts[1:], late.texts[1:], strict=True):
        assert before.tokens.tolist() == after.tokens.tolist()
    assert late.texts[0].queries is not None and late.texts[0].top_tokens is not None  # what the page takes apart
    assert {"induction", "previous_token", "entropy", "copying"} <= set(late.scores)
    assert early.metadata["weights_sha256"] != late.metadata["weights_sha256"]
    assert late.metadata["weights_sha256"] == weights(run)
    assert json.loads(late.metadata["config"])["d_model"] == 16


def test_a_run_that_was_stopped_can_be_measured_and_ended_where_it_stands(run: Path, tmp_path: Path) -> None:
    """Its last checkpoint stands between two evaluations: without a dump, without evidence, without a page."""
    folder = tmp_path / "stopped"
    shutil.copytree(run, folder)
    for name in ("000006.safetensors", "findings.json", "ablations.json"):
        (folder / "attention" / name).unlink()
    (folder / "attention.html").unlink()
    shutil.copytree(folder, tmp_path / "resumed")
    done = script("attend.py", "evidence", folder)
    assert done.returncode == 0, done.stderr
    assert "No head passes" in done.stdout and (folder / "attention.html").is_file()
    again, before = (json.loads((at / "attention" / "ablations.json").read_text()) for at in (folder, run))
    assert again["weights_sha256"] == before["weights_sha256"] and set(again["measures"]) == set(before["measures"])
    assert again["measures"]["repeats"]["zero"][1][0] == pytest.approx(
        before["measures"]["repeats"]["zero"][1][0], 1e-2
    )
    done = script("train.py", f"--run.resume={tmp_path / 'resumed'}", "--train.steps=4")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "resumed" / "attention" / "000006.safetensors").is_file()
    assert (tmp_path / "resumed" / "attention.html").is_file()


@pytest.mark.parametrize("options", [("--model.context=1", "--log.sample_tokens=0"), ("--model.n_heads=1",)])
def test_where_there_is_little_to_look_at_the_run_ends_well_all_the_same(
    options: tuple[str, ...], corpus: Path, tmp_path: Path
) -> None:
    done = script("train.py", *TINY, *options, f"--data.source={corpus}", f"--run.dir={tmp_path / 'small'}")
    assert done.returncode == 0, done.stderr
    assert "No head passes" in done.stdout
    assert (tmp_path / "small" / "attention.html").is_file() == ("--model.n_heads=1" in options)


def test_lines_of_ones_own_are_watched(corpus: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("the lazy dog\nthe fox\t fox\t dog\n")
    options = (f"--log.prompts={lines}", f"--data.source={corpus}", f"--run.dir={tmp_path / 'own'}")
    done = script("train.py", *TINY, *options)
    assert done.returncode == 0, done.stderr
    assert "own: right in" not in done.stdout  # one question is too few to choose a head on and to judge it
    seen = read_attention_file(tmp_path / "own" / "attention" / "000006.safetensors")
    assert {"line 1", "own 1"} <= {text.name for text in seen.texts} and "antecedent.own" in seen.scores
    assert "no such file" in said(script("train.py", *TINY, "--log.prompts=nowhere.txt"), 2)


def test_watching_more_often_changes_nothing(run: Path, corpus: Path, tmp_path: Path) -> None:
    options = ("--train.eval_every=1", "--log.sample_tokens=3", "--train.save_every=2", "--train.keep_checkpoints=9")
    done = script("train.py", *TINY, *options, f"--data.source={corpus}", f"--run.dir={tmp_path / 'often'}")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "often") == weights(run)


def test_accumulation_changes_the_memory_and_not_the_step(run: Path, corpus: Path, tmp_path: Path) -> None:
    argv = (*TINY, f"--data.source={corpus}", "--train.dtype=fp32", "--optim.optimizer=adamw", "--train.steps=1")
    for name, micro in (("whole", 4), ("pieces", 1)):
        done = script("train.py", *argv, f"--run.dir={tmp_path / name}", f"--train.micro_batch_size={micro}")
        assert done.returncode == 0, done.stderr
    losses = [read_metrics(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("whole", "pieces")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_best_and_the_newest_checkpoints_are_kept(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    # A huge rate after the warm-up: the loss is best early, and the best one must outlive the rotation.
    options = ("--optim.lr=3", "--optim.muon_lr=3", "--train.steps=12", "--train.eval_every=2", "--train.save_every=2")
    done = script("train.py", *TINY, *options, f"--data.source={corpus}", f"--run.dir={folder}")
    assert done.returncode == 0, done.stderr
    state = open_checkpoint(folder).state
    kept = sorted(int(p.name) for p in (folder / "checkpoints").iterdir())
    assert kept == sorted({state.best_step, 10, 12})
    losses = {line["step"]: line["val_loss"] for line in read_metrics(folder / "metrics.jsonl") if "val_loss" in line}
    assert state.best_loss == min(losses.values()) == losses[state.best_step]


def test_patience_ends_a_run_that_no_longer_improves(corpus: Path, tmp_path: Path) -> None:
    options = ("--optim.lr=0", "--optim.muon_lr=0", "--train.steps=50", "--train.eval_every=1", "--train.patience=2")
    done = script("train.py", *TINY, *options, f"--data.source={corpus}", f"--run.dir={tmp_path / 'short'}")
    assert done.returncode == 0, done.stderr
    assert open_checkpoint(tmp_path / "short").state.step == 3  # the first is the best, and two are no better


def test_a_stopped_run_has_saved_and_says_how_to_go_on(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    argv = (*TINY, f"--data.source={corpus}", f"--run.dir={folder}", "--train.steps=100000", "--train.eval_every=50000")
    process = subprocess.Popen(
        [sys.executable, "train.py", *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert f"--run.resume {folder}" in out
    step = open_checkpoint(folder).state.step
    assert step == read_metrics(metrics)[-1]["step"] > 0  # nothing that was learned is lost


def test_nothing_good_is_overwritten(run: Path, corpus: Path) -> None:
    line = said(script("train.py", *TINY, f"--data.source={corpus}", f"--run.dir={run}"), 2)
    assert f"--run.resume {run}" in line


@pytest.mark.parametrize(
    ("option", "code", "words"),
    [
        ("--model.context=100000", 3, "needs 100001"),
        ("--data.source=/nowhere/text.txt", 3, "/nowhere/text.txt"),
        ("--run.dir=/proc/nowhere", 6, "/proc/nowhere"),
        ("--model.d_model=17", 2, "model.d_model is 17"),
        ("--train.micro_batch_size=-1", 2, "train.micro_batch_size"),
    ],
)
def test_bad_input_is_one_line(corpus: Path, tmp_path: Path, option: str, code: int, words: str) -> None:
    argv = [*TINY, f"--data.source={corpus}", f"--run.dir={tmp_path / 'none'}", option]
    assert words in said(script("train.py", *argv), code)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    options = (
        "--optim.lr=1e30",
        "--optim.optimizer=adamw",
        "--optim.grad_clip=0",
        "--train.steps=30",
        "--train.eval_every=30",
    )
    line = said(script("train.py", *TINY, *options, f"--data.source={corpus}", f"--run.dir={folder}"), 5)
    assert "step" in line
    for path in folder.glob("checkpoints/*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_resuming_what_is_no_run_says_so(tmp_path: Path) -> None:
    assert "no run folder" in said(script("train.py", f"--run.resume={tmp_path}"), 4)
