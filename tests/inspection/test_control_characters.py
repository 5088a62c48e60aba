"""What others wrote, in a text, a file's name, a token or a setting, never drives the terminal or a page.

A terminal obeys what it is shown: `ESC ]0;` renames its window, `ESC [2J` wipes it, others type for the user; a
carriage return overwrites what was said, and a bidirectional override shows a line backwards. So whatever a run
meets, nothing reaches stdout or stderr but letters, line breaks and tabs.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.runs import TINY, script

CONTROLS = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e\u2066\u200f\x7f\x08"
MARKUP = "<script>alert(1)</script><img src=x onerror=\"alert('&')\">"
HOSTILE = CONTROLS + MARKUP
NAME = HOSTILE.replace("/", "\u2215")
"""A file may be called so."""
SLOW = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("error:Glyph")  # matplotlib prints what its font lacks, as it is
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, lines to watch and a run, all with names and contents of that kind."""
    root = tmp_path_factory.mktemp("terminal") / NAME
    root.mkdir()
    (root / NAME).write_text(f"The fox {HOSTILE} met the hen. The hen {CONTROLS} saw {MARKUP}.\n" * 30, newline="")
    own = CONTROLS.replace("\r", "")
    (root / "lines").write_text(f"{own}<img>\n<script>{own}\t&{own}\t<img>\t<script>\n", newline="")
    return root


@pytest.fixture(scope="module")
def trained(world: Path) -> subprocess.CompletedProcess[str]:
    options = (f"--data.source={world / NAME}", f"--run.dir={world / 'run'}{NAME}", f"--log.prompts={world / 'lines'}")
    options += (f"--log.wandb_project={HOSTILE}", "--log.sample_tokens=60", "--model.context=60")
    return script("train.py", *TINY, *options, "--data.val_fraction=0.3", "--train.steps=1")


@pytest.fixture(scope="module")
def run(world: Path, trained: subprocess.CompletedProcess[str]) -> Path:
    """The run, with attention files whose texts and scores somebody has renamed."""
    assert trained.returncode == 0, trained.stderr
    folder = world / f"run{NAME}"
    for path in (folder / "attention").glob("*.safetensors"):
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        names = json.loads(header["__metadata__"]["texts"])
        header["__metadata__"]["texts"] = json.dumps(["sample" if n == "sample" else n + HOSTILE for n in names])
        header = {re.sub("^scores.copying$", "scores." + HOSTILE, name): entry for name, entry in header.items()}
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return folder


def check(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    """Nothing that could drive a terminal was printed; what was."""
    for stream in (done.stdout, done.stderr):
        found = FORBIDDEN.search(stream)
        assert found is None, f"{found.group()!r} in {stream[max(0, found.start() - 200) : found.end() + 20]!r}"
    assert done.returncode == code, done.stderr
    return done.stdout


def test_training_prints_no_control_character(trained: subprocess.CompletedProcess[str]) -> None:
    out = check(trained)
    assert "\\x1b" in out and "\\u202e" in out  # they were there


@pytest.mark.parametrize(
    "argv",
    [
        ("RUN",),
        pytest.param(("RUN", "--prompt", f"The fox {HOSTILE}", "--top=2"), marks=SLOW),
        ("summary", "RUN"),
        ("heads", "RUN"),
        ("heads", "RUN", "--csv"),
        ("token", "RUN", "--text", "line 1" + HOSTILE, "--find", CONTROLS[:7]),
        ("token", "RUN", "--text", "line 1" + HOSTILE),
        ("token", "RUN", "--csv"),
        ("timeline", "RUN"),
        pytest.param(("timeline", "RUN", "--csv"), marks=SLOW),
        ("compare", "RUN"),
        pytest.param(("compare", "RUN", "--csv"), marks=SLOW),
        pytest.param(("compare", "RUN", "--json"), marks=SLOW),
        pytest.param(("page", "RUN"), marks=SLOW),
        pytest.param(("figures", "RUN", "--format=svg"), marks=SLOW),
        pytest.param(("figures", "RUN", "--score=all"), marks=SLOW),
    ],
    ids=lambda argv: " ".join(argv)[:20],
)
def test_looking_prints_no_control_character(argv: tuple[str, ...], run: Path) -> None:
    check(script("attend.py", *(run if word == "RUN" else word for word in argv)))


@pytest.mark.slow
def test_checking_and_measuring_print_no_control_character(run: Path, tmp_path: Path) -> None:
    """Of renamed texts `verify` says that they are not what they were; `evidence` measures them all the same."""
    check(script("attend.py", "verify", run), 4)
    copy = tmp_path / NAME
    shutil.copytree(run, copy)
    check(script("attend.py", "evidence", copy))
    check_pages(copy)


@pytest.mark.parametrize("samples", [1, pytest.param(2, marks=SLOW)])
def test_sampling_prints_no_control_character(samples: int, run: Path) -> None:
    prompt = f"The {HOSTILE}"
    out = check(script("sample.py", run, "--prompt", prompt, "--tokens=80", f"--samples={samples}", "--temperature=2"))
    assert "\\x1b" in out


@pytest.mark.slow
def test_where_attention_goes_while_sampling_is_said_without_control_characters(run: Path, tmp_path: Path) -> None:
    check(script("sample.py", run, "--tokens=5", "--attend", tmp_path / f"{NAME}.safetensors"))


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (("train.py", "--data.source=/no/" + HOSTILE), 3),
        pytest.param(("train.py", "--data.source=stories", f"--{HOSTILE}=1"), 2, marks=SLOW),
        (("train.py", f"--model.n_layers={HOSTILE}", f"--model.preset={HOSTILE}", f"--optim.lr={HOSTILE}"), 2),
        (("train.py", HOSTILE), 2),
        (("train.py", f"--log.prompts={HOSTILE}"), 2),
        (("train.py", f"--run.resume={NAME}"), 4),
        (("train.py", f"--run.dir=/proc/{NAME}"), 6),
        (("sample.py", NAME), 4),
        (("sample.py", NAME, "--debug"), 4),
        (("sample.py", "RUN", f"--prompt=\u05d0{HOSTILE}"), 2),
        pytest.param(("sample.py", "RUN", f"--attend=/proc/{NAME}.safetensors"), 6, marks=SLOW),
        (("attend.py", NAME), 4),
        (("attend.py", "RUN", f"--head={HOSTILE}"), 2),
        pytest.param(("attend.py", "RUN", f"--out=/proc/{NAME}"), 6, marks=SLOW),
        (("attend.py", "token", "RUN", f"--text={HOSTILE}"), 2),
        (("attend.py", "token", "RUN", f"--find=\u05d0{HOSTILE}"), 2),
        (("attend.py", "heads", "RUN", f"--score=no{HOSTILE}"), 2),
        pytest.param(("attend.py", "figures", "RUN", f"--out=/proc/{NAME}"), 6, marks=SLOW),
        (("attend.py", "summary", NAME), 4),
        (("attend.py", f"summ\x1b{NAME}", "RUN"), 2),
    ],
    ids=lambda value: " ".join(value)[:25] if isinstance(value, tuple) else None,
)
def test_errors_print_no_control_character(argv: tuple[str, ...], code: int, run: Path) -> None:
    done = script(*(str(run) if word == "RUN" else word for word in argv))
    check(done, code)
    assert ("Traceback" in done.stderr) == ("--debug" in argv) and "error: " in done.stderr


@pytest.mark.slow
def test_a_config_file_prints_no_control_character(tmp_path: Path) -> None:
    path = tmp_path / NAME
    for text in (
        f"[model]\n{json.dumps(HOSTILE)} = 1\n",
        f"{json.dumps(HOSTILE)} = 1\n",
        f"[model]\npreset = {json.dumps(HOSTILE)}\n",
        f"[{json.dumps(HOSTILE)}]\na = 1\n",
        f"[model]\n{json.dumps(HOSTILE)} = [1]\n",
        "\x1b]0;x\x07",
    ):
        path.write_text(text)
        check(script("train.py", path), 2)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_without_control_characters(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / NAME
    shutil.copytree(run, copy)
    newest = copy / "checkpoints" / "000001"
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps({HOSTILE: manifest, **dict.fromkeys([HOSTILE + "x"], HOSTILE)}))
    assert "passing over" in script("sample.py", copy, "--tokens=2").stderr
    check(script("sample.py", copy, "--tokens=2"))
    check(script("attend.py", "verify", copy), 4)


@pytest.mark.slow
def test_pages_and_pictures_hold_no_markup(run: Path) -> None:
    check(script("attend.py", "figures", run, "--format=svg", "--score=all", "--out", run / "svg"))
    check(script("attend.py", "page", run))
    check_pages(run)


def check_pages(run: Path) -> None:
    pages, pictures = list(run.rglob("*.html")), list(run.rglob("*.svg"))
    assert pages
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "<script>alert" not in text and "<img" not in text, page.name
        assert FORBIDDEN.search(text) is None, page.name
    for picture in pictures:
        kinds = {element.tag.rpartition("}")[2] for element in ElementTree.parse(picture).iter()}  # or it is no XML
        assert not {"script", "img"} & kinds, picture.name
