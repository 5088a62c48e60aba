"""Hostile texts, file names, tokens and options never reach the terminal or a page as control characters or markup.

A terminal obeys escape sequences: `ESC ]0;` renames its window, `ESC [2J` clears it. A carriage return overwrites a
line, and a bidirectional override reverses it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from inspection.attention_file import read_attention_file, write_attention_file
from tests.runs import TINY, script

CONTROLS = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e\u2066\u200f\x7f\x08"
MARKUP = "<script>alert(1)</script><img src=x onerror=\"alert('&')\">"
HOSTILE = CONTROLS + MARKUP
NAME = HOSTILE.replace("/", "\u2215")
"""Valid as a file name."""
SLOW = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("error:Glyph")  # matplotlib prints characters that its font lacks unescaped
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a hostile name, text and prompts."""
    root = tmp_path_factory.mktemp("terminal") / NAME
    root.mkdir()
    (root / NAME).write_text(f"The fox {HOSTILE} met the hen. The hen {CONTROLS} saw {MARKUP}.\n" * 30, newline="")
    own = CONTROLS.replace("\r", "")
    (root / "lines").write_text(f"{own}<img>\n<script>{own}\t&{own}\t<img>\t<script>\n", newline="")
    return root


@pytest.fixture(scope="module")
def training(world: Path) -> subprocess.CompletedProcess[str]:
    options = [f"--data.source={world / NAME}", f"--run.dir={world / 'run'}{NAME}", f"--log.prompts={world / 'lines'}"]
    options += [f"--log.wandb_project={HOSTILE}", "--log.sample_tokens=60", "--model.context=60"]
    return script("train.py", *TINY, *options, "--data.val_fraction=0.3", "--train.steps=1")


@pytest.fixture(scope="module")
def run(world: Path, training: subprocess.CompletedProcess[str]) -> Path:
    """The run, with hostile names of texts and scores in its attention files."""
    assert training.returncode == 0, training.stderr
    folder = world / f"run{NAME}"
    for path in (folder / "attention").glob("*.safetensors"):
        file = read_attention_file(path)
        texts = [each if each.name == "sample" else replace(each, name=each.name + HOSTILE) for each in file.texts]
        scores = {HOSTILE if name == "copying" else name: table for name, table in file.scores.items()}
        write_attention_file(path, texts, file.metadata, scores)
    return folder


def check(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    """The output, which has no control characters."""
    for stream in (done.stdout, done.stderr):
        match = FORBIDDEN.search(stream)
        assert match is None, f"{match.group()!r} in {stream[max(0, match.start() - 200) : match.end() + 20]!r}"
    assert done.returncode == code, done.stderr
    return done.stdout


def check_pages(run: Path) -> None:
    assert list(run.rglob("*.html"))
    for page in run.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "<script>alert" not in text and "<img" not in text and FORBIDDEN.search(text) is None, page.name
    for figure in run.rglob("*.svg"):
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(figure).iter()}
        assert not {"script", "img"} & tags, figure.name


def test_training_output_is_escaped(training: subprocess.CompletedProcess[str]) -> None:
    output = check(training)
    assert "\\x1b" in output and "\\u202e" in output


@pytest.mark.parametrize(
    "argv",
    [
        ("RUN",),
        pytest.param(("RUN", "--prompt", f"The fox {HOSTILE}", "--top=2"), marks=SLOW),
        ("summary", "RUN"),
        ("heads", "RUN"),
        ("token", "RUN", "--text", "line 1" + HOSTILE, "--find", CONTROLS[:7]),
        ("token", "RUN", "--json"),
        ("timeline", "RUN"),
        ("compare", "RUN"),
    ],
    ids=lambda argv: " ".join(argv)[:20],
)
def test_attend_output_is_escaped(argv: tuple[str, ...], run: Path) -> None:
    check(script("attend.py", *(run if word == "RUN" else word for word in argv)))


def test_samples_are_escaped(run: Path) -> None:
    done = script("sample.py", run, "--prompt", f"The {HOSTILE}", "--tokens=30", "--samples=2", "--temperature=2")
    assert "\\x1b" in check(done)


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (("train.py", "--data.source=/no/" + HOSTILE), 3),
        (("train.py", f"--model.n_layers={HOSTILE}", f"--model.preset={HOSTILE}", f"--optim.lr={HOSTILE}"), 2),
        (("train.py", HOSTILE), 2),
        (("train.py", f"--run.resume={NAME}"), 4),
        (("train.py", f"--run.dir=/proc/{NAME}"), 6),
        (("sample.py", NAME, "--debug"), 4),
        (("sample.py", "RUN", f"--prompt=\u05d0{HOSTILE}"), 2),
        (("attend.py", NAME), 2),
        (("attend.py", "RUN", f"--head={HOSTILE}"), 2),
        (("attend.py", "token", "RUN", f"--text={HOSTILE}"), 2),
        (("attend.py", "token", "RUN", f"--find=\u05d0{HOSTILE}"), 2),
        (("attend.py", "heads", "RUN", f"--score=no{HOSTILE}"), 2),
        (("attend.py", "plot", "RUN", f"--out=/proc/{NAME}"), 6),
        (("attend.py", "summary", NAME), 4),
    ],
    ids=lambda value: " ".join(value)[:25] if isinstance(value, tuple) else None,
)
def test_errors_are_escaped(argv: tuple[str, ...], code: int, run: Path) -> None:
    done = script(*(str(run) if word == "RUN" else word for word in argv))
    check(done, code)
    assert ("Traceback" in done.stderr) == ("--debug" in argv) and "error: " in done.stderr


@pytest.mark.slow
def test_verify_and_ablate_are_escaped(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / NAME
    shutil.copytree(run, copy)
    check(script("attend.py", "verify", copy), 4)  # the score of another name cannot be recomputed
    check(script("attend.py", "ablate", copy))


@pytest.mark.slow
def test_pages_and_figures_have_no_markup_of_texts(run: Path) -> None:
    check(script("attend.py", "plot", run, "--format=svg", "--score=all", "--out", run / "svg"))
    check(script("attend.py", "page", run))
    check_pages(run)
