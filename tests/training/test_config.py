"""The command line: every mistake is named at once, with the nearest right name, before torch is loaded."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.errors import CHECKPOINT, CONFIG, UserError
from model.gpt import GPT
from training.config import RunConfig, as_arguments, from_saved, parse_train, read_toml, to_toml

ROOT = Path(__file__).parents[2]


def complaints(*argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_train(list(argv))
    assert caught.value.exit_code == CONFIG
    return str(caught.value).splitlines()


def test_all_problems_are_reported_at_once() -> None:
    lines = complaints(
        *("--model.n_layer", "3", "--model.attention", "fuse", "--train.steps", "many", "--model.d_model", "130"),
        *("--optim.lr", "-1", "--train.batch_size"),
    )
    assert lines == [
        "unknown option --model.n_layer; did you mean --model.n_layers?",
        "--model.attention is 'fuse'; it takes one of auto, explicit, fused, chunked; did you mean fused?",
        "--train.steps is 'many'; it takes a whole number",
        "--train.batch_size needs a value: a whole number",
        "model.d_model is 130, which is not divisible by 4 heads; use model.d_model 132, or another model.n_heads",
        "optim.lr is -1.0; it must be at least 0",
    ]


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("--steps", "--train.steps"), ("--model.heads", "--model.n_heads"), ("--data.tokeniser", "--data.tokenizer")],
)
def test_the_nearest_option_is_named(option: str, nearest: str) -> None:
    (line,) = complaints(option, "4")
    assert line == f"unknown option {option}; did you mean {nearest}?"


def test_dashes_and_underscores_are_the_same() -> None:
    dashes, _ = parse_train(["--model.n-layers", "3", "--train.batch-size=6"])
    underscores, _ = parse_train(["--model.n_layers=3", "--train.batch_size", "6"])
    assert dashes == underscores
    assert (dashes.model.n_layers, dashes.train.batch_size) == (3, 6)


def test_the_command_line_overrides_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[train]\nsteps = 7\nbatch_size = 3\n")
    config, name = parse_train([str(file), "--train.steps", "9"])
    assert name == "mine"
    assert config.train.steps == 9
    assert config.train.batch_size == 3
    assert config.train.eval_every == RunConfig().train.eval_every


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "quickstart"),
        (["--data.source=my book.txt"], "my-book"),
        (["--data.source=texts/*.txt"], "run"),
        (["configs/shakespeare_char.toml", "--data.source=my.txt"], "shakespeare_char"),
    ],
)
def test_a_run_is_named_after_its_config_or_its_text(argv: list[str], expected: str) -> None:
    assert parse_train(argv)[1] == expected


def test_a_file_is_judged_like_a_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[train]\nstep = 7\n")
    (line,) = complaints(str(file))
    assert line == "unknown option --train.step; did you mean --train.steps?"


@pytest.mark.parametrize("text", ["[train\nsteps = 7", "steps = 7", "[train]\nsteps = [7]", "\xff"])
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(text.encode("latin-1"))
    assert str(file) in complaints(str(file))[0]


def test_a_missing_file_is_named() -> None:
    assert complaints("configs/nothing.toml") == [
        "cannot read the config file configs/nothing.toml: No such file or directory"
    ]


def test_a_config_survives_the_file_that_keeps_it(tmp_path: Path) -> None:
    config, _ = parse_train(['--data.source=a "quoted" \\ path/*.txt', "--optim.lr=3e-05", "--run.dir="])
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    again, _ = parse_train([str(file)])
    assert again == config


def test_a_saved_config_from_a_stranger_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        from_saved({"model": {"n_layers": "__import__('os')"}}, "state.json")
    assert caught.value.exit_code == CHECKPOINT
    assert from_saved({"model": {"n_layers": 3}}, "state.json").model.n_layers == 3


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_config_that_ships_is_good_and_says_what_to_expect(file: Path) -> None:
    config, name = parse_train([str(file)])
    assert config.problems() == []
    assert name == file.stem
    text = file.read_text()
    assert "Expect" in text
    assert 10 <= len(text.splitlines()) <= 45
    assert read_toml(file) == as_arguments(__import__("tomllib").loads(text), str(file))


def test_no_value_is_silently_out_of_range() -> None:
    lines = complaints(
        *("--train.steps=0", "--train.batch_size=0", "--data.val_fraction=1.5", "--model.dropout=1", "--optim.beta1=1"),
        *("--data.vocab_size=3", "--run.seed=-1", "--log.every=0", "--optim.lr=nan"),
    )
    assert len(lines) == 9
    assert "2**63" in complaints(f"--run.seed={1 << 64}")[0]


@pytest.mark.parametrize(
    "argv",
    [["train.py", "--model.n_layer", "3"], ["sample.py", "--temprature", "1"], ["attend.py"], ["train.py", "--help"]],
)
def test_answers_come_without_loading_torch(argv: list[str]) -> None:
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert not {'torch', 'matplotlib', 'wandb', 'tiktoken'} & set(sys.modules), 'heavy import'"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if "--help" in argv else CONFIG), done.stderr
    assert "Traceback" not in done.stderr
    assert "heavy import" not in done.stderr
    assert time.perf_counter() - start < 10  # a bound against hanging; the measured time stands in benchmarks/


@pytest.mark.parametrize("config", ["shakespeare_gpt2.toml", "gpt2_124m.toml"])
def test_a_large_config_builds_its_model_on_the_meta_device(config: str) -> None:
    settings, _ = parse_train([f"configs/{config}"])
    with torch.device("meta"):
        model = GPT(settings.model, 50257)
    count = sum(p.numel() for p in model.parameters())
    assert count == {"shakespeare_gpt2.toml": 7_242_624, "gpt2_124m.toml": 124_439_808}[config]


def test_a_number_too_large_for_a_float_survives_being_saved(tmp_path: Path) -> None:
    config, _ = parse_train(["--optim.grad_clip=" + "9" * 400])
    file = tmp_path / "again.toml"
    file.write_text(to_toml(config))
    assert parse_train([str(file)])[0] == config
