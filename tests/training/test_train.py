"""train.py: what a run leaves behind and prints, what it refuses, and that an interrupted run ends with the same bits."""

import json
import re
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file

from common.files import read_metrics
from inspection.attention_file import read_attention_file
from tests.runs import TINY, error_line, output, script
from training.checkpoint import TrainState, open_checkpoint, sha256_of_file, sha256_of_weights
from training.device import get_dist_context
from training.metrics import MetricsLogger

TEXT = "The quick brown fox jumps over the lazy dog. " * 12  # 30 sequences: the second epoch begins within step 8
OFF = "--log.attention=off"
LONG = ("--train.steps=12", "--train.eval_every=4", "--train.save_every=5", "--train.keep_checkpoints=9")
VARIANTS = {
    "plain": (),
    "dropout": ("--model.dropout=0.2", OFF),
    "accumulation": ("--train.micro_batch_size=3", OFF),
    "toy": ("--model.mlp=none", "--model.norm=none", "--model.positions=none", "--model.tie_embeddings=False", OFF),
    "adamw": ("--optim.optimizer=adamw", "--model.dropout=0.1", "--train.micro_batch_size=1", OFF),
    "fp16": ("--train.dtype=fp16", OFF),
}
TIMING = {"tokens_per_second", "mfu", "peak_memory_mb"}


train = partial(output, "train.py")


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The options of a new run, but for its folder."""
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT)
    return (*TINY, f"--data.source={path}")


@pytest.fixture(scope="module")
def run(new: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "fox"
    output = train(*new, f"--run.dir={folder}")
    (folder / "output.txt").write_text(output)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(new: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that gives the uninterrupted run of a variant, up to step 12, without the report at its end."""

    @cache
    def run(variant: str) -> Path:
        folder = tmp_path_factory.mktemp("uninterrupted") / variant
        train(*new, *LONG, *VARIANTS[variant], f"--run.dir={folder}", "--run.stop_at_step=12")
        return folder

    return run


def weights(folder: Path, which: str = "best") -> str:
    return sha256_of_weights(open_checkpoint(folder, which).load_model(get_dist_context("fp32")))


def hashes(folder: Path) -> list[str]:
    """The sha256 of weights and optimizer state after step 12."""
    files = (folder / "checkpoints" / "000012").glob("*.safetensors")
    return [sha256_of_file(path) for path in sorted(files)]


def assert_same(folder: Path, other: Path) -> None:
    """The same weights, optimizer state, samples and metrics but for those that depend on the clock and the process."""
    assert hashes(folder) == hashes(other) and len(hashes(folder)) == 2
    lines = (read_metrics(path / "metrics.jsonl") for path in (folder, other))
    assert len({json.dumps([{k: v for k, v in line.items() if k not in TIMING} for line in ls]) for ls in lines}) == 1
    assert (folder / "samples.txt").read_text() == (other / "samples.txt").read_text()
    assert open_checkpoint(folder, "last").state == open_checkpoint(other, "last").state


# ---- files and lines ----


def test_files_of_a_run(run: Path) -> None:
    plots = ("loss.png", "attention.png", "head.png", "timeline.png")
    files = ("model.safetensors", "optimizer.safetensors", "state.json", "vocabulary.json", "manifest.json")
    names = ["config.toml", "metrics.jsonl", "samples.txt", "attention.html", *plots]
    assert all((run / name).stat().st_size for name in [*names, *(f"checkpoints/000006/{name}" for name in files)])
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    first, early, late = map(read_attention_file, sorted((run / "attention").glob("0*")))
    assert (first.metadata["step"], early.metadata["step"], late.metadata["step"]) == ("0", "3", "6")
    assert late.texts[0].name == "sample"
    texts = [[(text.name, text.tokens.tolist()) for text in file.texts[1:]] for file in (early, late)]
    assert texts[0] == texts[1]
    assert late.metadata["weights_sha256"] == weights(run) != early.metadata["weights_sha256"]
    assert open_checkpoint(run).environment.starts_with_eot  # the text has no line break to begin after


def test_figures_that_cannot_be_drawn_are_named(
    new: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.figures.write_atomic", Mock(side_effect=RuntimeError("no\nfont \x1b")))
    done = script("train.py", *new, f"--run.dir={tmp_path}")
    assert done.returncode == 0 and (tmp_path / "attention.html").is_file() and not list(tmp_path.glob("*.png"))
    names = ("loss", "attention", "head", "timeline")
    assert done.stderr.splitlines() == [f"cannot draw {name}.png: no font \\x1b" for name in names]


def test_printed_lines(run: Path) -> None:
    text = (run / "output.txt").read_text()
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["recipe", "data", "model", "device", "run"]
    (evaluation,) = (line for line in lines if line.startswith("step 3/6 | "))
    names = [part.split()[0] for part in evaluation.split(" | ")[1:5]]
    assert names == ["loss", "val", "lr", "grad"] and "tok/s | mfu " in evaluation and evaluation.endswith(" left")
    ends = (f"open {run / 'attention.html'}", f"python sample.py {run}")
    assert all(
        word in text for word in ("uniform", "unigram", "trigram", "this model", "nats/token", "bits/byte", *ends)
    )
    assert "floor" not in text  # the entropy of this text is not known


def test_log_attention_off_leaves_nothing_of_it(run: Path, new: tuple[str, ...], tmp_path: Path) -> None:
    output = train(*new, OFF, f"--run.dir={tmp_path}")
    assert "log.attention is off: no attention is recorded" in output and "attend.py" not in output
    assert not list(tmp_path.glob("attention*"))
    assert [path.name for path in tmp_path.glob("*.png")] == ["loss.png"]
    assert weights(tmp_path) == weights(run)
    final, expected = (read_metrics(path / "metrics.jsonl")[-1] for path in (tmp_path, run))
    assert final == expected and "final_val_loss" in final


def test_smallest_models_run_to_the_end(new: tuple[str, ...], tmp_path: Path) -> None:
    out = train(
        *new, "--model.context=1", "--model.ngrams=2", "--log.sample_tokens=0", f"--run.dir={tmp_path / 'short'}"
    )
    assert "(n-grams up to 2)" in out and "; cannot be exported\n" in out
    assert not (tmp_path / "short" / "attention.html").exists()
    (tmp_path / "lines.txt").write_text("the lazy dog\nthe fox\t fox\t dog\n")
    prompts = f"--log.prompts={tmp_path / 'lines.txt'}"
    out = train(*new, "--model.n_heads=1", prompts, f"--run.dir={tmp_path / 'run'}")
    assert re.search(r"contrast pairs\n  own: right in [\d.]+% of 1\n", out)
    recorded = read_attention_file(tmp_path / "run" / "attention" / "000006.safetensors")
    assert {"line 1", "own 1"} <= {text.name for text in recorded.texts} and (
        tmp_path / "run" / "attention.html"
    ).is_file()


def test_prompts_may_be_removed_but_not_replaced(new: tuple[str, ...], tmp_path: Path) -> None:
    """They are saved with the run."""
    file = tmp_path / "lines.txt"
    file.write_text("the lazy dog\n")
    train(*new, f"--log.prompts={file}", f"--run.dir={tmp_path / 'run'}", "--run.stop_at_step=3")
    file.rename(tmp_path / "moved.txt")
    file.write_text("other\n" * 9)  # too many for a new run
    assert script("sample.py", tmp_path / "run", "--tokens=2").returncode == 0
    resume = f"--run.resume={tmp_path / 'run'}"
    line = error_line(script("train.py", resume, f"--log.prompts={tmp_path / 'moved.txt'}"), 2)
    assert "log.prompts was" in line and "cannot become" in line
    train(resume)
    recorded = read_attention_file(tmp_path / "run" / "attention" / "000006.safetensors")
    assert "line 1" in {text.name for text in recorded.texts}


def test_all_that_is_reported_is_of_the_best_step(new: tuple[str, ...], tmp_path: Path) -> None:
    options = ("--optim.lr=3", "--optim.muon_lr=3", "--train.steps=40", "--train.eval_every=2", "--train.save_every=2")
    output = train(*new, *options, f"--run.dir={tmp_path}")
    last, best = (open_checkpoint(tmp_path, which).state for which in ("last", "best"))
    assert best.step == last.best_step == last.step - 10  # 5 evaluations
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == {best.step, last.step - 2, last.step}
    losses = {line["step"]: line["val_loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "val_loss" in line}
    assert last.best_loss == min(losses.values()) == losses[best.step]
    stopped = f"stopped at step {last.step}: no improvement for 5 evaluations (--train.patience 0 trains on)"
    rows = ("best, at", "unstable: held-out loss is lowest at")
    assert all(text in output for text in (stopped, *(f"{row} step {best.step}" for row in rows)))
    assert f"the best checkpoint, of step {best.step}" in output
    final = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert final["step"] == best.step and final["final_val_loss"] == pytest.approx(last.best_loss, rel=1e-3)
    ablated = json.loads((tmp_path / "attention" / "ablations.json").read_text())
    assert ablated["step"] == best.step and ablated["weights_sha256"] == weights(tmp_path)
    sampled = [script("sample.py", tmp_path, f"--checkpoint={each}").stdout for each in ("best", "last", best.step)]
    assert sampled[0] == sampled[2] != sampled[1]
    assert f"best, last, {best.step}, " in error_line(script("sample.py", tmp_path, "--checkpoint=999"), 2)
    for which, step in (("last", last.step), ("best", best.step)):
        assert script("attend.py", "ablate", tmp_path, f"--checkpoint={which}").returncode == 0
        assert script("attend.py", "heads", tmp_path).stdout.startswith(f"{tmp_path}, step {step}\n")
        done = script("attend.py", tmp_path, "--prompt=fox", f"--checkpoint={which}")
        assert f"attention/{step:06d}-fox-" in done.stdout
    newest, again = weights(tmp_path, "last"), train(f"--run.resume={tmp_path}")
    assert output[output.index("loss on ") : output.index(" s in all")][:-4] in again
    assert weights(tmp_path, "last") == newest and read_metrics(tmp_path / "metrics.jsonl")[-1] == final


# ---- mistakes ----


def test_existing_run_is_not_overwritten(run: Path, new: tuple[str, ...]) -> None:
    before = sha256_of_file(run / "metrics.jsonl")
    line = error_line(script("train.py", *new, f"--run.dir={run}"), 2)
    assert f"--run.resume {run}" in line and sha256_of_file(run / "metrics.jsonl") == before


@pytest.mark.parametrize(
    ("option", "code", "words"),
    [
        ("--model.context=100000", 3, "100001"),
        ("--data.source=/nowhere/text.txt", 3, "/nowhere/text.txt"),
        ("--run.dir=train.py/nowhere", 6, "nowhere"),
        ("--model.d_model=17", 2, "model.d_model is 17"),
        ("--train.micro_batch_size=-1", 2, "train.micro_batch_size"),
        ("--log.prompts=nowhere.txt", 2, "no such file"),
        ("--run.resume=/", 4, "config.toml"),
    ],
)
def test_bad_input_is_one_line(new: tuple[str, ...], tmp_path: Path, option: str, code: int, words: str) -> None:
    assert words in error_line(script("train.py", *new, f"--run.dir={tmp_path / 'none'}", option), code)


def test_non_finite_loss_ends_the_run_before_it_is_saved(new: tuple[str, ...], tmp_path: Path) -> None:
    options = ("--optim.lr=1e30", "--optim.optimizer=adamw", "--optim.grad_clip=0", "--train.steps=30", OFF)
    assert "optim.lr" in error_line(script("train.py", *new, *options, f"--run.dir={tmp_path}"), 5)
    for path in tmp_path.glob("checkpoints/*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


# ---- resuming ----


@pytest.mark.parametrize(("variant", "stops"), [*((name, (1, 7)) for name in VARIANTS), ("dropout", (8, 11))])
def test_interrupted_run_ends_with_the_same_bits(
    variant: str, stops: tuple[int, ...], new: tuple[str, ...], uninterrupted: Any, tmp_path: Path
) -> None:
    train(*new, *LONG, *VARIANTS[variant], f"--run.dir={tmp_path}", f"--run.stop_at_step={stops[0]}")
    for stop in (*stops[1:], 12):
        train(f"--run.resume={tmp_path}", f"--run.stop_at_step={stop}")
    assert_same(tmp_path, uninterrupted(variant))
    assert bool(open_checkpoint(tmp_path, "last").state.scaler) == (variant == "fp16")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line] == [*range(1, 13)]


def test_what_came_after_the_newest_checkpoint_is_repeated(uninterrupted: Any, tmp_path: Path) -> None:
    """As after a kill: metrics, samples and attention files reach further than the newest checkpoint."""
    folder = shutil.copytree(uninterrupted("plain"), tmp_path / "killed")
    for step in ("000012", "000010", "000008"):
        shutil.rmtree(folder / "checkpoints" / step)
    leftover = folder / "attention" / "000011.safetensors"
    shutil.copy(folder / "attention" / "000012.safetensors", leftover)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # cut off in the middle
    assert "from step 5" in train(f"--run.resume={folder}", "--run.stop_at_step=12")
    assert_same(folder, uninterrupted("plain"))
    assert not leftover.exists() and (folder / "attention" / "000012.safetensors").is_file()


def test_evaluating_and_logging_change_nothing(new: tuple[str, ...], uninterrupted: Any, tmp_path: Path) -> None:
    options = ("--train.eval_every=1", "--train.save_every=2", "--log.sample_tokens=0", "--log.every=5")
    train(*new, *LONG, *VARIANTS["dropout"], f"--run.dir={tmp_path}", "--run.stop_at_step=12", *options)
    assert hashes(tmp_path) == hashes(uninterrupted("dropout"))


def test_what_may_change_on_resuming(uninterrupted: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(uninterrupted("dropout"), tmp_path / "longer")
    resume = partial(script, "train.py", f"--run.resume={folder}")
    assert "the run has done its 12 steps; continue with --train.steps N" in resume("--run.stop_at_step=12").stdout
    assert_same(folder, uninterrupted("dropout"))
    for name, text in (("moved.txt", TEXT), ("other.txt", TEXT[:-1] + "!")):
        (tmp_path / name).write_text(text)
    longer, other = "--train.steps=14", f"--data.source={tmp_path / 'other.txt'}"
    for change, code, words in ((other, 3, "has changed"), ("--model.n_layers=3", 2, "model.n_layers was 2")):
        assert words in error_line(resume(longer, change), code)
    moved = f"--data.source={tmp_path / 'moved.txt'}"
    config = folder / "config.toml"
    config.write_text(re.sub(r"^lr = .*", "lr = 0.001", config.read_text(), flags=re.M))  # edited, not typed
    done = resume(longer, moved, "--run.stop_at_step=13", "--model.attention=eager")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("resumed with other options: "))
    assert re.search(r"optim.lr 0\.\d+ -> 0\.001", line) and "train.steps 12 -> 14" in line and "run.dir" not in line
    assert re.search(r"^the learning rate jumps from \S+ to \S+ at step 12$", done.stdout, re.M)
    assert (
        done.returncode == 0 and "may differ in the last bits: attention " in done.stdout and "-> eager" in done.stdout
    )
    assert open_checkpoint(folder, "last").state.step == 13 and "steps = 14" in config.read_text()
    *older, newest = sorted((folder / "checkpoints").iterdir())
    assert f"move the later ones out of {folder / 'checkpoints'}" in error_line(resume(f"--run.resume={older[-1]}"), 4)
    assert resume(f"--run.resume={newest}").returncode == 0 and (folder / "checkpoints" / "000014").is_dir()


def test_separate_validation_text_may_move_and_not_change(tmp_path: Path, new: tuple[str, ...]) -> None:
    val, folder = tmp_path / "val.txt", tmp_path / "run"
    val.write_text(TEXT[::-1][:500])
    output = train(*new, f"--data.val={val}", f"--run.dir={folder}", "--log.attention=off")
    shares = f"1 document, {len(TEXT) + 2:,} training tokens, 501 held out ({501 / (len(TEXT) + 503):.1%}): data.val; "
    assert shares in output and f"; {6 * 4 * 16 / (len(TEXT) + 2):.2f} epochs" in output
    moved = val.rename(tmp_path / "moved.txt")
    assert train(f"--run.resume={folder}", f"--data.val={moved}", "--train.steps=7")
    moved.write_text(TEXT[:500])
    assert "has changed" in error_line(script("train.py", f"--run.resume={folder}", "--train.steps=8"), 3)


@pytest.mark.parametrize("end", ["", "0123456789" * 120])
def test_held_out_text_that_is_unlike_the_rest_is_reported(tmp_path: Path, end: str) -> None:
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog " * 200 + end)
    output = train(*TINY, f"--data.source={tmp_path / 'book.txt'}", f"--run.dir={tmp_path / 'run'}", OFF)
    assert ("the held-out text is unlike" in output and "--data.val" in output) == bool(end)


def test_damaged_metrics_end_at_the_damage(tmp_path: Path) -> None:
    good = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    for bad in ("[1, 2]", '{"loss": 3}', '{"step": "x"}', "\x00", "[" * 100_000, '{"step": 1'):
        (tmp_path / "metrics.jsonl").write_text("\n".join([*good, bad, *good]))
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    MetricsLogger(tmp_path, TrainState(step=2))
    assert (tmp_path / "metrics.jsonl").read_text() == "\n".join(good[:2]) + "\n"
