"""What a start loads: nothing that the run does not use, and mistakes are answered by few questions to the parser."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from tests.runs import ROOT, TINY
from training import cli
from training.config import parse_train

FIRST_STEP = """
import sys
import train
from training.trainer import Trainer

real = Trainer.train_step

def step(self):
    real(self)
    print("loaded", *sorted(sys.modules))
    raise SystemExit(0)

Trainer.train_step = step
train.main(sys.argv[1:])
"""


def test_the_first_step_of_a_run_by_characters_is_taken_without_what_it_does_not_use(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The fox met the hen. " * 50)
    options = [*TINY, f"--data.source={tmp_path / 'text.txt'}", f"--run.dir={tmp_path / 'run'}"]
    command = [sys.executable, "-c", FIRST_STEP, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    loaded = next(line for line in done.stdout.splitlines() if line.startswith("loaded")).split()
    assert "torch" in loaded, done.stderr
    unused = {"wandb", "matplotlib", "tiktoken", "tokenizers", "transformers", "pandas", "torch._dynamo", "sympy"}
    assert not unused & set(loaded)


@pytest.mark.parametrize(
    ("argv", "most"),
    [(["--model.n_layer=3"], 2), (["--model.n_layers=three"], 14), (["--optim.lr=x", "--train.steps=y"], 20)],
)
def test_a_mistake_is_found_by_few_questions(argv: list[str], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question to tyro takes a hundredth of a second, and the config file has more than a dozen options."""
    asked = []
    real = cli.accepts
    monkeypatch.setattr(cli, "accepts", lambda *words: asked.append(words) or real(*words))
    with pytest.raises(UserError):
        parse_train(argv)
    assert len(asked) <= most


def test_of_many_mistakes_each_is_told_and_nothing_else() -> None:
    wrong = ["--optim.lr=fast", "--train.steps=1e3", "--model.n_heads=4.5", "--data.workers=two", "--log.every=_"]
    good = ["--optim.muon_lr=0.01", "--train.batch_size=8", "--model.n_layers=1", "--data.val_fraction=0.2"]
    mixed = [word for pair in zip(wrong, [*good, "--run.seed=3"], strict=True) for word in pair]
    with pytest.raises(UserError) as raised:
        parse_train(mixed)
    lines = str(raised.value).splitlines()
    assert [line.split(" is ")[0] for line in lines] == [word.split("=")[0] for word in wrong]


def test_a_short_command_does_not_look_through_all_objects_again_and_again() -> None:
    """Collections of Python's garbage while torch is loaded: a handful instead of hundreds, and none at the end."""
    program = (
        "import atexit, gc\n"
        "from common.errors import run_main\n"
        "def collections(): return sum(s['collections'] for s in gc.get_stats())\n"
        "atexit.register(lambda: print(collections(), gc.get_freeze_count() > 100_000))\n"
        "def main(argv):\n    import torch\n"
        "run_main(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    collections, frozen = done.stdout.split()
    assert int(collections) < 60 and frozen == "True", done.stdout + done.stderr
