"""Hostile texts, file names, tokens and options never reach the terminal or a page as control characters or markup."""

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
NAME = HOSTILE.replace("/", "\u2215")  # valid as a file name
pytestmark = pytest.mark.filterwarnings("error:Glyph")  # matplotlib prints characters that its font lacks unescaped
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run with a hostile name, text and prompts, and its output; then with hostile names in its attention files too."""
    root = tmp_path_factory.mktemp("terminal") / NAME
    root.mkdir()
    (root / NAME).write_text(f"The fox {HOSTILE} met the hen. The hen {CONTROLS} saw {MARKUP}.\n" * 30, newline="")
    own = CONTROLS.replace("\r", "")
    (root / "lines").write_text(f"{own}<img>\n<script>{own}\t&{own}\t<img>\t<script>\n", newline="")
    options = [f"--data.source={root / NAME}", f"--run.dir={root / 'run'}{NAME}", f"--log.prompts={root / 'lines'}"]
    options += [f"--log.wandb_project={HOSTILE}", "--log.sample_tokens=60", "--model.context=60"]
    done = script("train.py", *TINY, *options, "--data.val_fraction=0.3", "--train.steps=1")
    folder = root / f"run{NAME}"
    for path in (folder / "attention").glob("*.safetensors"):
        file = read_attention_file(path)
        texts = [each if each.name == "sample" else replace(each, name=each.name + HOSTILE) for each in file.texts]
        scores = {HOSTILE if name == "copying" else name: table for name, table in file.scores.items()}
        write_attention_file(path, texts, file.metadata, scores)
    return folder, done


def check(done: subprocess.CompletedProcess[str], code: int = 0) -> None:
    for stream in (done.stdout, done.stderr):
        match = FORBIDDEN.search(stream)
        assert match is None, f"{match.group()!r} in {stream[max(0, match.start() - 200) : match.end() + 20]!r}"
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and ("error: " in done.stderr) == (code > 0)


def test_training_output_is_escaped(training: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    check(training[1])
    assert "\\x1b" in training[1].stdout and "\\u202e" in training[1].stdout


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (("train.py", "--data.source=/no/" + HOSTILE), 3),
        (("train.py", f"--model.n_layers={HOSTILE}", f"--model.preset={HOSTILE}", f"--optim.lr={HOSTILE}"), 2),
        (("train.py", HOSTILE), 3),
        (("train.py", f"--run.dir=/proc/{NAME}"), 6),
        (("sample.py", NAME), 4),
        (("sample.py", "RUN", f"--prompt=The {HOSTILE}", "--tokens=30", "--samples=2", "--temperature=2"), 0),
        (("sample.py", "RUN", f"--prompt=\u05d0{HOSTILE}"), 2),
        (("attend.py", NAME), 4),
        (("attend.py", "RUN"), 0),
        pytest.param(("attend.py", "RUN", "--prompt", f"The fox {HOSTILE}", "--top=2"), 0, marks=pytest.mark.slow),
        (("attend.py", "token", "RUN", "--text", "line 1" + HOSTILE, "--find", CONTROLS[:7]), 0),
        (("attend.py", "token", "RUN", f"--text={HOSTILE}"), 2),
        (("attend.py", "heads", "RUN"), 0),
        (("attend.py", "timeline", "RUN"), 0),
        (("attend.py", "compare", "RUN"), 0),
        (("attend.py", "summary", "RUN"), 0),
        (("attend.py", "summary", NAME), 4),
        pytest.param(("attend.py", "ablate", "RUN"), 0, marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value)[:25] if isinstance(value, tuple) else None,
)
def test_output_and_errors_are_escaped(
    argv: tuple[str, ...], code: int, training: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    check(script(*(str(training[0]) if word == "RUN" else word for word in argv), terminal=True), code)


@pytest.mark.slow
def test_pages_and_figures_have_no_markup_of_texts(
    training: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    run = tmp_path / NAME
    shutil.copytree(training[0], run)
    check(script("attend.py", "plot", run, "--format=svg", f"--score={HOSTILE}", "--out", run / "svg"))
    check(script("attend.py", "page", run))
    verified = script("attend.py", "verify", run)
    assert verified.returncode == 4 and not FORBIDDEN.search(verified.stdout + verified.stderr)  # a renamed score
    pages, figures = list(run.rglob("*.html")), list(run.rglob("*.svg"))
    assert pages and figures
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "<script>alert" not in text and "<img" not in text and FORBIDDEN.search(text) is None, page.name
    for figure in figures:
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(figure).iter()}
        assert not {"script", "img"} & tags, figure.name
