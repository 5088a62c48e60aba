"""The documents are true: commands parse, files and tests exist, the README's code lines are in the model."""

import io
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.commands import check_command
from tests.runs import ROOT, TINY, output
from tests.test_pretrained import TEXT, save_model

GUIDES = ("python", "fine_tuning", "exporting", "large_data", "from_nanogpt", "troubleshooting")
NAMES = ("README.md", "CONTRIBUTING.md", "docs/guarantees.md", "docs/running.md", "docs/attention.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README, CONTRIBUTING, GUARANTEES, RUNNING, ATTENTION = TEXTS.values()
TEXTS |= {f"docs/{name}.md": (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in GUIDES}
CODE = {name: "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)) for name, text in TEXTS.items()}
LINES = [line for name, code in CODE.items() if name != "CONTRIBUTING.md" for line in code.splitlines()]
PARTS = [part.strip() for line in LINES for part in line.split("#")[0].split("&&")]
TORCHRUN = re.findall(r"^(?:srun )?torchrun .*?(train\.py [^\n]*)$", RUNNING.replace("\\\n", " "), re.M)
COMMANDS = [part for part in PARTS if part.startswith(("python ", "pip "))] + [f"python {each}" for each in TORCHRUN]


RUNNABLE = sorted({command for command in COMMANDS if "$" not in command})
NOT_RUN = (  # they need a network, or do not end
    *("pip ", "python -m pytest", "python train.py --model.init gpt2 ", "python train.py --data.source hf:"),
    "python attend.py serve",
)


@pytest.mark.parametrize("command", RUNNABLE)
def test_every_command_parses(command: str) -> None:
    check_command(command)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files and the runs that the documents speak of, the runs after a few steps."""
    place = tmp_path_factory.mktemp("place")
    (place / "notes").mkdir()
    for name in ("my_book.txt", "my_text.txt", "notes/monday.md"):
        (place / name).write_text(TEXT, encoding="utf-8")
    (place / "questions.txt").write_text("The fox met the hen. The hen met the\t fox\t hen\n")
    save_model(place / "gpt2_folder", "gpt2")
    short = ("--train.steps=20", "--train.eval_every=10", "--train.eval_tokens=500")
    own = (*TINY, f"--data.source={place / 'my_book.txt'}")
    tuned = (f"--model.init={place / 'gpt2_folder'}", *own[-1:], "--train.batch_size=2")
    runs = {"quickstart": (), "book": own, "parts": own, "gpt2": (*own, "--model.preset=gpt2", "--data.tokenizer=byte")}
    for name, options in {**runs, "tuned": tuned}.items():
        output("train.py", *options, *short, f"--run.dir={place / 'runs' / name}")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in RUNNABLE if not command.startswith(NOT_RUN)])
def test_every_command_runs(command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training stops early, and the models of config files are small."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"One day")))
    _, name, *argv = [str(ROOT / word) if word.endswith(".toml") else word for word in shlex.split(command)]
    if name == "train.py" and "--plan" not in argv:
        has_config = bool(argv) and argv[0].endswith(".toml")
        argv += [*TINY, f"--data.source={place / 'my_book.txt'}"] if has_config else []
        argv += (
            ["--run.stop_at_step=22"]
            if "--run.resume" in argv
            else ["--run.stop_at_step=2", f"--run.dir={tmp_path}/run"]
        )
    if name == "export.py":
        argv[1] = os.fspath(tmp_path / argv[1])
    assert output(name, *argv)
    shutil.rmtree(tmp_path)  # dozens of runs


def test_commands_are_found() -> None:
    assert "pip install -r requirements.txt && python train.py" in README
    assert "pip install -r requirements-dev.txt && python -m pytest" in README
    assert len(TORCHRUN) >= 4 and len(COMMANDS) > 20


def test_every_guarantee_names_an_existing_test() -> None:
    rows = [line for line in GUARANTEES.splitlines() if line.startswith("| ") and not line.startswith("| guarantee")]
    assert len(rows) > 20
    for row in rows:
        files = re.findall(r"`(tests/[\w/]+\.py)`", row.split(" | ")[-1])
        assert files and all((ROOT / file).is_file() for file in files), row


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files(name: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    assert not [link for link in links if not (ROOT / name).parent.joinpath(link).exists()]


def test_named_modules_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)`", CONTRIBUTING)
    for line in README.split("## How it is built")[1].split("```")[1].splitlines()[2:]:
        folder = line.split("/")[0].strip()
        named += [folder, *(f"{folder}/{name}" for name in re.findall(r"\b(\w+\.py)\b", line))]
    assert len(named) > 30
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_five_steps_are_in_the_code() -> None:
    code = (ROOT / "model" / "functional.py").read_text() + (ROOT / "model" / "gpt.py").read_text()
    rows = README.split("Attention in five steps")[1].split("\n\n")[1].splitlines()[2:]
    assert len(rows) == 5
    for row in rows:
        assert row.split("`")[1] in code, row


def test_every_requirement_is_pinned() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            assert not line or line.startswith(("#", "-r ")) or re.fullmatch(r"[\w-]+==[\w.]+", line), line
