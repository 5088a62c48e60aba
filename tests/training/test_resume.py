"""Resuming: an interrupted run ends with the bits of an uninterrupted one; what may not change is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.files import read_metrics
from tests.runs import TINY, error_line, script
from training.checkpoint import TrainState, open_checkpoint, sha256_of_file
from training.metrics import MetricsLogger

TEXT = "The quick brown fox jumps over the lazy dog. " * 12  # 30 sequences: the second epoch begins within step 8
LENGTH = ("--train.steps=12", "--train.eval_every=4", "--train.save_every=5", "--train.keep_checkpoints=9")
VARIANTS = {
    "plain": (),
    "dropout": ("--model.dropout=0.2", "--log.attention=off"),
    "accumulation": ("--train.micro_batch_size=3", "--log.attention=off"),
    "adamw": ("--optim.optimizer=adamw", "--model.dropout=0.1", "--train.micro_batch_size=1", "--log.attention=off"),
}
TIMING = {"tokens_per_second", "mfu", "peak_memory_mb"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that gives the uninterrupted run of a variant, up to step 12, without the report at its end."""
    runs: dict[str, Path] = {}

    def run(variant: str) -> Path:
        if variant not in runs:
            runs[variant] = tmp_path_factory.mktemp("uninterrupted") / variant
            start(corpus, runs[variant], variant, 12)
        return runs[variant]

    return run


def start(corpus: Path, folder: Path, variant: str, stop_at_step: int, *options: str) -> None:
    argv = (*TINY, *LENGTH, *VARIANTS[variant], f"--data.source={corpus}", f"--run.dir={folder}", *options)
    done = script("train.py", *argv, f"--run.stop_at_step={stop_at_step}")
    assert done.returncode == 0, done.stderr


def resume(folder: Path, stop_at_step: int, *options: str) -> str:
    done = script("train.py", f"--run.resume={folder}", f"--run.stop_at_step={stop_at_step}", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def hashes(folder: Path, step: int = 12) -> list[str]:
    """The sha256 of weights and optimizer state."""
    checkpoint = folder / "checkpoints" / f"{step:06d}"
    return [sha256_of_file(checkpoint / name) for name in ("model.safetensors", "optimizer.safetensors")]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """All but those that depend on the clock and the process."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def assert_same(folder: Path, other: Path) -> None:
    assert hashes(folder) == hashes(other)
    assert metrics(folder) == metrics(other)
    assert (folder / "samples.txt").read_text() == (other / "samples.txt").read_text()
    assert open_checkpoint(folder).state == open_checkpoint(other).state


@pytest.mark.parametrize(("variant", "stops"), [*((name, (1, 7)) for name in VARIANTS), ("dropout", (8, 11))])
def test_interrupted_run_ends_with_the_same_bits(
    variant: str, stops: tuple[int, ...], corpus: Path, uninterrupted: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "interrupted"
    start(corpus, folder, variant, stops[0])
    for stop in (*stops[1:], 12):
        resume(folder, stop)
    assert_same(folder, uninterrupted(variant))
    assert [line["step"] for line in metrics(folder) if "loss" in line] == list(range(1, 13))


def test_what_came_after_the_newest_checkpoint_is_repeated(uninterrupted: Any, tmp_path: Path) -> None:
    """As after a kill: metrics, samples and attention files reach further than the newest checkpoint."""
    folder = tmp_path / "killed"
    shutil.copytree(uninterrupted("plain"), folder)
    for step in ("000012", "000010", "000008"):
        shutil.rmtree(folder / "checkpoints" / step)
    leftover = folder / "attention" / "000011.safetensors"
    shutil.copy(folder / "attention" / "000012.safetensors", leftover)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # cut off in the middle
    assert "from step 5" in resume(folder, 12)
    assert_same(folder, uninterrupted("plain"))
    assert not leftover.exists() and (folder / "attention" / "000012.safetensors").is_file()


def test_damaged_attention_files_do_not_stop_training(uninterrupted: Any, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(uninterrupted("plain"), folder)
    shutil.rmtree(folder / "checkpoints" / "000012")
    (folder / "attention" / "eval_texts.json").write_text("{")
    (folder / "attention" / "000004.safetensors").write_bytes(b"damaged")
    done = script("train.py", f"--run.resume={folder}")
    assert done.returncode == 0, done.stderr
    assert "eval_texts.json" in done.stderr and "000004.safetensors" in done.stderr
    assert (folder / "attention.html").is_file()
    assert hashes(folder) == hashes(uninterrupted("plain"))


def test_evaluating_and_logging_change_nothing(corpus: Path, uninterrupted: Any, tmp_path: Path) -> None:
    options = ("--train.eval_every=1", "--train.save_every=2", "--log.sample_tokens=0", "--log.every=5")
    start(corpus, tmp_path / "often", "dropout", 12, *options)
    assert hashes(tmp_path / "often") == hashes(uninterrupted("dropout"))


def test_run_may_become_longer(uninterrupted: Any, tmp_path: Path) -> None:
    folder = tmp_path / "longer"
    shutil.copytree(uninterrupted("dropout"), folder)
    resume(folder, 12)  # nothing is left to do
    assert_same(folder, uninterrupted("dropout"))
    resume(folder, 14, "--train.steps=14", "--optim.lr=0.001")
    assert open_checkpoint(folder).state.step == 14
    assert "steps = 14" in (folder / "config.toml").read_text()


@pytest.mark.parametrize("change", ["--model.n_layers=3", "--data.val_fraction=0.2"])
def test_option_that_may_not_change_is_named(change: str, uninterrupted: Any) -> None:
    option = change.removeprefix("--").split("=")[0]
    done = script("train.py", f"--run.resume={uninterrupted('dropout')}", change, "--train.steps=14")
    assert option in error_line(done, 2)


def test_text_may_move_but_not_change(uninterrupted: Any, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(uninterrupted("dropout"), folder)
    for name, text in (("moved.txt", TEXT), ("other.txt", TEXT[:-1] + "!")):
        (tmp_path / name).write_text(text)
    resume(folder, 13, "--train.steps=14", f"--data.source={tmp_path / 'moved.txt'}")
    argv = (f"--run.resume={folder}", "--train.steps=14", f"--data.source={tmp_path / 'other.txt'}")
    assert "has changed" in error_line(script("train.py", *argv), 3)


def test_changed_environment_is_printed(uninterrupted: Any, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(uninterrupted("dropout"), folder)
    out = resume(folder, 13, "--train.steps=14", "--model.attention=eager")
    assert "results may differ in the last bits: " in out and "-> eager" in out


def test_damaged_metrics_end_at_the_damage(tmp_path: Path) -> None:
    good = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    for bad in ("[1, 2]", '{"loss": 3}', '{"step": "x"}', "\x00", "[" * 100_000, '{"step": 1'):
        (tmp_path / "metrics.jsonl").write_text("\n".join([*good, bad, *good]))
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    MetricsLogger(tmp_path, TrainState(step=2))
    assert (tmp_path / "metrics.jsonl").read_text() == "\n".join(good[:2]) + "\n"


@pytest.mark.slow
def test_check_proves_that_a_run_resumes_exactly(uninterrupted: Any, tmp_path: Path) -> None:
    folder = tmp_path / "proved"
    shutil.copytree(uninterrupted("dropout"), folder)
    before = sorted(path.name for path in folder.rglob("*"))
    done = script("train.py", f"--run.resume={folder}", "--train.steps=40", "--check")
    assert done.returncode == 0 and "same bits: " in done.stdout, done.stdout + done.stderr
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_check_needs_a_run() -> None:
    assert "--run.resume RUN --check" in error_line(script("train.py", "--check"), 2)
