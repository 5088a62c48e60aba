"""A run that was interrupted ends with the bits of one that was not, and what may not change on resuming is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.files import read_metrics
from tests.runs import TINY, said, script
from training.checkpoint import open_checkpoint, sha256_of_file
from training.metrics import MetricsLogger

TEXT = "The quick brown fox jumps over the lazy dog. " * 12  # 30 windows: an epoch ends within the eighth step
LENGTH = ("--train.steps=12", "--train.eval_every=4", "--train.save_every=5", "--train.keep_checkpoints=9")
VARIANTS = {
    "plain": (),
    "dropout": ("--model.dropout=0.2",),
    "accumulation": ("--train.micro_batch_size=3",),
    "adamw": ("--optim.optimizer=adamw", "--model.dropout=0.1", "--train.micro_batch_size=1"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes the uninterrupted run of a variant, once; up to step 12, without the report at its end."""
    made: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("whole") / variant
            start(corpus, made[variant], variant, 12)
        return made[variant]

    return make


def start(corpus: Path, folder: Path, variant: str, stop_at_step: int, *options: str) -> None:
    argv = (*TINY, *LENGTH, *VARIANTS[variant], f"--data.source={corpus}", f"--run.dir={folder}", *options)
    done = script("train.py", *argv, f"--run.stop_at_step={stop_at_step}")
    assert done.returncode == 0, done.stderr


def go_on(folder: Path, stop_at_step: int, *options: str) -> str:
    done = script("train.py", f"--run.resume={folder}", f"--run.stop_at_step={stop_at_step}", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def bits(folder: Path, step: int = 12) -> list[str]:
    """The sha256 of weights and of moments."""
    at = folder / "checkpoints" / f"{step:06d}"
    return [sha256_of_file(at / name) for name in ("model.safetensors", "optimizer.safetensors")]


def told(folder: Path) -> list[dict[str, Any]]:
    """The metrics, without the speed, which is another one every time."""
    return [
        {k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(folder / "metrics.jsonl")
    ]


def same(folder: Path, other: Path) -> None:
    assert bits(folder) == bits(other)
    assert told(folder) == told(other)
    assert (folder / "samples.txt").read_text() == (other / "samples.txt").read_text()
    assert open_checkpoint(folder).state == open_checkpoint(other).state


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stops", [(1, 7), (4,), (8, 11)], ids=str)
def test_an_interrupted_run_ends_with_the_same_bits(
    stops: tuple[int, ...], variant: str, corpus: Path, whole: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "interrupted"
    start(corpus, folder, variant, stops[0])
    for stop in (*stops[1:], 12):
        go_on(folder, stop)
    same(folder, whole(variant))
    steps = [line["step"] for line in told(folder) if "loss" in line]
    assert steps == list(range(1, 13))  # no gap, no line twice


def test_what_was_done_beyond_the_checkpoint_is_done_again(corpus: Path, whole: Any, tmp_path: Path) -> None:
    """As after a kill: metrics, samples and dumps reach further than the newest checkpoint."""
    folder = tmp_path / "killed"
    shutil.copytree(whole("dropout"), folder)
    for step in ("000012", "000010", "000008"):
        shutil.rmtree(folder / "checkpoints" / step)
    stale = folder / "attention" / "000011.safetensors"
    shutil.copy(folder / "attention" / "000012.safetensors", stale)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # cut off in the middle
    assert "from step 5" in go_on(folder, 12)
    same(folder, whole("dropout"))
    assert not stale.exists() and (folder / "attention" / "000012.safetensors").is_file()


def test_a_new_run_can_be_resumed_from_its_first_second(corpus: Path, whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "young"
    start(corpus, folder, "plain", 2)
    shutil.rmtree(folder / "checkpoints" / "000002")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["000000"]
    go_on(folder, 12)
    same(folder, whole("plain"))


def test_a_folder_without_its_config_is_no_run_yet(corpus: Path, whole: Any, tmp_path: Path) -> None:
    """A new run that was killed before its first checkpoint: the same command begins it again."""
    folder = tmp_path / "unborn"
    start(corpus, folder, "plain", 2)
    (folder / "config.toml").unlink()
    argv = (*TINY, *LENGTH, f"--data.source={corpus}", f"--run.dir={folder}")
    assert "holds checkpoints but no config.toml" in said(script("train.py", *argv), 4)  # something was learned there
    shutil.rmtree(folder / "checkpoints" / "000002")
    start(corpus, folder, "plain", 12)
    same(folder, whole("plain"))


def test_a_sample_that_was_written_before_its_evaluation_was_told_is_written_once(
    corpus: Path, whole: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "sampled"
    start(corpus, folder, "plain", 3)
    (folder / "samples.txt").write_text("step 4\nkilled right after this\n\n")
    go_on(folder, 12)
    same(folder, whole("plain"))


def test_damage_to_what_is_looked_at_stops_no_training(corpus: Path, whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(whole("plain"), folder)
    shutil.rmtree(folder / "checkpoints" / "000012")
    (folder / "attention" / "eval_texts.json").write_text("{")
    (folder / "attention" / "000004.safetensors").write_bytes(b"damaged")
    (folder / "attention" / ".ablations.json.abcd1234").write_text("{")
    done = script("train.py", f"--run.resume={folder}")
    assert done.returncode == 0, done.stderr
    assert "eval_texts.json" in done.stderr and "000004.safetensors" in done.stderr
    assert not (folder / "attention" / ".ablations.json.abcd1234").exists()
    assert (folder / "attention" / "000004.damaged").exists() and (folder / "attention.html").is_file()
    assert bits(folder) == bits(whole("plain"))


def test_evaluating_saving_and_logging_otherwise_change_nothing(corpus: Path, whole: Any, tmp_path: Path) -> None:
    options = ("--train.eval_every=1", "--train.save_every=2", "--log.sample_tokens=0", "--log.every=5")
    start(corpus, tmp_path / "often", "dropout", 12, *options)
    assert bits(tmp_path / "often") == bits(whole("dropout"))


def test_an_evaluation_that_was_broken_off_is_made_on_resuming(corpus: Path, whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "broken-off"
    shutil.copytree(whole("plain"), folder)
    for step in ("000010", "000012"):
        shutil.rmtree(folder / "checkpoints" / step)
    at = folder / "checkpoints" / "000008"
    state = json.loads((at / "state.json").read_text())
    state["state"] |= {"evaluated": 4, "best_loss": state["state"]["best_loss"] + 1, "best_step": 4}
    (at / "state.json").write_text(json.dumps(state))
    manifest = json.loads((at / "manifest.json").read_text())
    manifest["files"]["state.json"] = {
        "bytes": (at / "state.json").stat().st_size,
        "sha256": sha256_of_file(at / "state.json"),
    }
    (at / "manifest.json").write_text(json.dumps(manifest))
    out = go_on(folder, 12)
    assert "step     8  validation loss" in out
    same(folder, whole("plain"))


def test_resuming_at_the_end_trains_nothing(corpus: Path, whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "ended"
    shutil.copytree(whole("plain"), folder)
    go_on(folder, 12)
    same(folder, whole("plain"))


def test_a_run_may_become_longer(corpus: Path, whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "longer"
    shutil.copytree(whole("plain"), folder)
    go_on(folder, 14, "--train.steps=14", "--optim.lr=0.001")
    assert open_checkpoint(folder).state.step == 14
    assert "steps = 14" in (folder / "config.toml").read_text()


@pytest.mark.parametrize(
    "change", ["--model.n_layers=3", "--run.seed=2", "--data.val_fraction=0.2", "--train.batch_size=8"]
)
def test_what_may_not_change_on_resuming_is_said(change: str, whole: Any) -> None:
    option = change.removeprefix("--").split("=")[0]
    assert option in said(script("train.py", f"--run.resume={whole('plain')}", change, "--train.steps=14"), 2)


def test_another_text_is_refused_and_a_moved_one_is_not(corpus: Path, whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(whole("plain"), folder)
    for name, text in (("moved.txt", TEXT), ("other.txt", TEXT[:-1] + "!")):
        (tmp_path / name).write_text(text)
    go_on(folder, 13, "--train.steps=14", f"--data.source={tmp_path / 'moved.txt'}")
    argv = (f"--run.resume={folder}", "--train.steps=14", f"--data.source={tmp_path / 'other.txt'}")
    assert "has changed" in said(script("train.py", *argv), 3)


def test_another_path_of_the_numbers_is_said(whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "path"
    shutil.copytree(whole("plain"), folder)
    out = go_on(folder, 13, "--train.steps=14", "--model.attention=sdpa", "--train.dtype=fp32")
    assert ("the last digits may differ" in out and "attention" in out) or "dtype" in out


def test_no_whole_checkpoint_is_no_new_start(whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "lost"
    shutil.copytree(whole("plain"), folder)
    for at in (folder / "checkpoints").iterdir():
        (at / "model.safetensors").write_bytes(b"")
    line = said(script("train.py", f"--run.resume={folder}"), 4)
    assert "no checkpoint" in line
    assert told(folder) == told(whole("plain"))  # nothing was touched


def test_metrics_that_are_none_end_where_they_end(tmp_path: Path, whole: Any) -> None:
    good = (whole("plain") / "metrics.jsonl").read_text().splitlines()[:3]
    for bad in ("[1, 2]", '{"loss": 3}', '{"step": "x"}', "\x00", "[" * 100_000, '{"step": 1'):
        (tmp_path / "metrics.jsonl").write_text("\n".join([*good, bad, *good]))
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe")
    MetricsLogger(tmp_path, open_checkpoint(whole("plain")).state)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.slow
@pytest.mark.parametrize("position", [0, 12])
def test_a_user_can_prove_it_on_their_own_machine(position: int, corpus: Path, whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "proved"
    shutil.copytree(whole("dropout"), folder)
    before = sorted(path.name for path in folder.rglob("*"))
    done = script("train.py", f"--run.resume={folder}", f"--train.steps={40 if position else 9}", "--check")
    assert done.returncode == 0 and "the same bits" in done.stdout, done.stdout + done.stderr
    assert f"step {position}" in done.stdout
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_checking_needs_a_run() -> None:
    assert "--run.resume RUN --check" in said(script("train.py", "--check"), 2)
