"""train.py: what a run leaves behind, what it prints, and what it refuses."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from common.files import read_metrics
from inspection.attention_file import read_attention_file
from tests.runs import TINY, error_line, script
from tests.training.helpers import make_trainer
from training.checkpoint import open_checkpoint, sha256_of_file, sha256_of_weights
from training.device import get_dist_context
from training.time_budget import Deadline

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
OFF = "--log.attention=off"


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


def test_files_of_a_run(run: Path) -> None:
    plots = ("loss.png", "attention.png", "head.png", "timeline.png", "phase_change.png")
    for name in ("config.toml", "metrics.jsonl", "samples.txt", "attention.html", *plots):
        assert (run / name).stat().st_size > 0, name
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "vocabulary.json", "manifest.json"):
        assert (run / "checkpoints" / "000006" / name).stat().st_size > 0, name
    files = sorted(path.name for path in (run / "attention").glob("0*"))
    assert files == [f"{step:06d}.safetensors" for step in (0, 3, 6)]
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_printed_lines(run: Path) -> None:
    text = (run / "output.txt").read_text()
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["data", "model", "device", "run"]
    (evaluation,) = (line for line in lines if line.startswith("step 3/6 | "))
    names = [part.split()[0] for part in evaluation.split(" | ")[1:5]]
    assert names == ["loss", "val", "lr", "grad"] and "tok/s | mfu " in evaluation and evaluation.endswith(" left")
    for word in ("uniform", "unigram", "trigram", "this model", "nats/token", "bits/byte"):
        assert word in text
    assert "floor" not in text  # the entropy of this text is not known
    assert f"open {run / 'attention.html'}" in text and f"python sample.py {run}" in text


def test_attention_files_hold_the_same_texts_at_every_evaluation(run: Path) -> None:
    early, late = (read_attention_file(run / "attention" / f"{step:06d}.safetensors") for step in (3, 6))
    assert [text.name for text in late.texts] == [text.name for text in early.texts]
    assert late.texts[0].name == "sample"
    for before, after in zip(early.texts[1:], late.texts[1:], strict=True):
        assert before.tokens.tolist() == after.tokens.tolist()
    assert late.metadata["weights_sha256"] == weights(run) != early.metadata["weights_sha256"]
    assert json.loads(late.metadata["config"])["d_model"] == 16


def test_log_attention_off_leaves_nothing_of_it(run: Path, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "off"
    done = script("train.py", *TINY, OFF, f"--data.source={corpus}", f"--run.dir={folder}")
    assert done.returncode == 0, done.stderr
    assert "log.attention is off: no attention is recorded" in done.stdout and "attend.py" not in done.stdout
    assert not list((folder / "attention").iterdir()) and not (folder / "attention.html").exists()
    assert [path.name for path in folder.glob("*.png")] == ["loss.png"]
    assert weights(folder) == weights(run)
    final, expected = (read_metrics(path / "metrics.jsonl")[-1] for path in (folder, run))
    assert final == expected and "final_val_loss" in final


def test_run_that_was_stopped_is_ended_by_resuming(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(run, folder)
    (folder / "attention" / "000006.safetensors").unlink()
    (folder / "attention.html").unlink()
    done = script("train.py", f"--run.resume={folder}", "--train.steps=4")
    assert done.returncode == 0, done.stderr
    assert (folder / "attention" / "000006.safetensors").is_file() and (folder / "attention.html").is_file()


@pytest.mark.parametrize("options", [("--model.context=1", "--log.sample_tokens=0"), ("--model.n_heads=1",)])
def test_smallest_models_run_to_the_end(options: tuple[str, ...], corpus: Path, tmp_path: Path) -> None:
    done = script("train.py", *TINY, *options, f"--data.source={corpus}", f"--run.dir={tmp_path / 'small'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "small" / "attention.html").is_file() == ("--model.n_heads=1" in options)


def test_prompts_of_the_user_are_recorded(corpus: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("the lazy dog\nthe fox\t fox\t dog\n")
    options = (f"--log.prompts={lines}", f"--data.source={corpus}", f"--run.dir={tmp_path / 'own'}")
    done = script("train.py", *TINY, *options)
    assert done.returncode == 0, done.stderr
    recorded = read_attention_file(tmp_path / "own" / "attention" / "000006.safetensors")
    assert {"line 1", "own 1"} <= {text.name for text in recorded.texts}
    assert "no such file" in error_line(script("train.py", *TINY, "--log.prompts=nowhere.txt"), 2)


def test_best_and_newest_checkpoints_are_kept(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    # The learning rate is far too high after the warmup: the loss is best early.
    options = ("--optim.lr=3", "--optim.muon_lr=3", "--train.steps=12", "--train.eval_every=2", "--train.save_every=2")
    done = script("train.py", *TINY, OFF, *options, f"--data.source={corpus}", f"--run.dir={folder}")
    assert done.returncode == 0, done.stderr
    state = open_checkpoint(folder).state
    kept = sorted(int(p.name) for p in (folder / "checkpoints").iterdir())
    assert kept == sorted({state.best_step, 10, 12})
    losses = {line["step"]: line["val_loss"] for line in read_metrics(folder / "metrics.jsonl") if "val_loss" in line}
    assert state.best_loss == min(losses.values()) == losses[state.best_step]


def test_existing_run_is_not_overwritten(run: Path, corpus: Path) -> None:
    before = sha256_of_file(run / "metrics.jsonl")
    line = error_line(script("train.py", *TINY, f"--data.source={corpus}", f"--run.dir={run}"), 2)
    assert f"--run.resume {run}" in line and sha256_of_file(run / "metrics.jsonl") == before


@pytest.mark.parametrize(
    ("option", "code", "words"),
    [
        ("--model.context=100000", 3, "100001"),
        ("--data.source=/nowhere/text.txt", 3, "/nowhere/text.txt"),
        ("--run.dir=/proc/nowhere", 6, "/proc/nowhere"),
        ("--model.d_model=17", 2, "model.d_model is 17"),
        ("--train.micro_batch_size=-1", 2, "train.micro_batch_size"),
        ("--run.resume=/", 4, "config.toml"),
    ],
)
def test_bad_input_is_one_line(corpus: Path, tmp_path: Path, option: str, code: int, words: str) -> None:
    argv = [*TINY, f"--data.source={corpus}", f"--run.dir={tmp_path / 'none'}", option]
    assert words in error_line(script("train.py", *argv), code)


def test_non_finite_loss_ends_the_run_before_it_is_saved(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    options = ("--optim.lr=1e30", "--optim.optimizer=adamw", "--optim.grad_clip=0", "--train.steps=30", OFF)
    line = error_line(script("train.py", *TINY, *options, f"--data.source={corpus}", f"--run.dir={folder}"), 5)
    assert "optim.lr" in line
    for path in folder.glob("checkpoints/*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_deadline_shortens_the_run_and_is_saved(tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.config = replace(trainer.config, run=replace(trainer.config.run, dir=str(tmp_path)))
    trainer.callbacks = [Deadline(time.perf_counter())]  # the time is already over
    trainer.run()
    assert trainer.state.step == 2 and "steps = 2\n" in (tmp_path / "config.toml").read_text()
