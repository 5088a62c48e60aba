"""sample.py and attend.py as a user meets them: what they print, what they write, what they refuse."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from inspection.attention_file import read_attention_file
from tests.runs import ROOT, TINY, process, said, script

EMOJI = "\N{FOX FACE}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run over several documents, by characters."""
    root = tmp_path_factory.mktemp("scripts")
    for k in range(6):
        (root / f"text{k}.txt").write_text(f"Tale {k}. The fox met the hen. The hen met the fox. " * 8)
    done = script("train.py", *TINY, f"--data.source={root / '*.txt'}", f"--run.dir={root / 'run'}")
    assert done.returncode == 0, done.stderr
    return root / "run"


def test_the_same_seed_writes_the_same_text(run: Path) -> None:
    options = ("--prompt=The ", "--tokens=40")
    first, again, other = (script("sample.py", run, *options, f"--seed={s}").stdout for s in (1, 1, 2))
    assert first == again != other
    assert len(first) > len("The \n")


def test_a_sample_begins_with_its_prompt(run: Path) -> None:
    done = script("sample.py", run, "--prompt", "The fox", "--tokens", "5")
    assert done.stdout.startswith("The fox")
    assert len(done.stdout) <= len("The fox") + 5 + 1


def test_several_samples_are_numbered_and_differ(run: Path) -> None:
    out = script("sample.py", run, "--samples=3", "--tokens=30", "--temperature=1.5").stdout
    texts = re.split(r"--- \d ---\n", out)[1:]
    assert len(texts) == len(set(texts)) == 3


def test_a_text_goes_on_past_the_context(run: Path) -> None:
    done = script("sample.py", run, "--prompt", "The fox met the hen. The hen", "--tokens=60", "--temperature=0")
    assert "or fewer are used" in done.stderr  # the prompt alone is longer than 16 characters
    assert done.returncode == 0


def test_temperature_zero_takes_the_likeliest_whatever_the_seed(run: Path) -> None:
    texts = {script("sample.py", run, "--temperature=0", f"--seed={s}", "--tokens=20").stdout for s in (1, 2)}
    assert len(texts) == 1


def test_an_empty_prompt_and_a_large_top_k_are_no_mistakes(run: Path) -> None:
    plain = script("sample.py", run, "--tokens=20").stdout
    assert script("sample.py", run, "--tokens=20", "--prompt=", "--top_k=99999").stdout == plain


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", f"a {EMOJI}"], EMOJI),
        (["--temperature", "-0.5"], "--temperature is -0.5"),
        (["--top_p", "0"], "--top_p is 0"),
        (["--samples", "0"], "--samples is 0"),
        (["--temprature", "1"], "did you mean --temperature?"),
    ],
)
def test_sample_refuses_in_one_line(run: Path, argv: list[str], words: str) -> None:
    assert words in said(script("sample.py", run, *argv), 2)


@pytest.mark.parametrize("name", ["sample.py", "attend.py"])
def test_a_folder_without_a_run_is_named(name: str, tmp_path: Path) -> None:
    assert "holds no checkpoint" in said(script(name, tmp_path), 4)
    assert "is no folder" in said(script(name, tmp_path / "nothing"), 4)


def test_a_checkpoint_folder_serves_as_well_as_a_run(run: Path) -> None:
    whole = script("sample.py", run, "--tokens=20").stdout
    assert script("sample.py", run / "checkpoints" / "000006", "--tokens=20").stdout == whole


def test_attend_says_what_every_head_reads_and_writes_weights_and_picture(run: Path, tmp_path: Path) -> None:
    done = script("attend.py", run, "--prompt", "The fox met", "--head=L1H0", f"--out={tmp_path}", "--dtype=f32")
    assert done.returncode == 0, done.stderr
    for head in ("L0H0", "L0H1", "L1H0", "L1H1"):
        assert len(re.findall(rf"  {head}  .* reads ", done.stdout)) == 3
    assert "Head L1H0: query (row) reads key (column)" in done.stdout
    (weights,) = tmp_path.glob("000006-the-fox-met-*.safetensors")
    (text,) = read_attention_file(weights).texts
    pattern = text.pattern()
    assert b"".join(text.token_bytes) == b"The fox met"
    assert pattern.shape == (2, 2, 12, 12)  # end-of-text, then eleven characters
    assert np.abs(pattern.sum(axis=-1) - 1).max() < 1e-6
    assert (np.triu(pattern, 1) == 0).all()
    assert weights.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_attend_says_what_the_next_tokens_logit_is_the_sum_of(run: Path, tmp_path: Path) -> None:
    done = script("attend.py", run, "--prompt", "The fox met", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    (lines,) = re.findall(r"Next comes .* Its logit (.*) is the sum of\n  (.*)\n  read off .*: (.*)\n", done.stdout)
    total, parts, lens = lines
    numbers = [float(part.rsplit(" ", 1)[1]) for part in parts.split(", ")]
    assert len(numbers) > 3 and sum(numbers) == pytest.approx(float(total), abs=0.005 * (len(numbers) + 1))
    assert len(re.findall(r'"[^"]+"', lens)) == 3  # the embedding, and two layers
    assert re.findall(r'Next comes ("[^"]+")', done.stdout) == re.findall(r'"[^"]+"', lens)[-1:]


def test_attend_without_a_prompt_reads_the_models_own_text(run: Path) -> None:
    done = script("attend.py", run, "--tokens=10")
    assert done.returncode == 0, done.stderr
    assert list((run / "attention").glob("000006-own-text-seed-1-*.png"))


@pytest.mark.parametrize("head", ["L9H0", "1.2"])
def test_attend_refuses_a_head_that_is_not_there(run: Path, head: str) -> None:
    assert "--head is" in said(script("attend.py", run, f"--head={head}", "--prompt=The"), 2)


def test_attend_refuses_a_folder_that_cannot_be_written(run: Path) -> None:
    assert "--out" in said(script("attend.py", run, "--prompt=The", "--out=/proc/nowhere"), 6)


def test_a_poor_terminal_changes_nothing(run: Path) -> None:
    """No UTF-8, no display: the same words, in the characters that there are."""
    env = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "DISPLAY": ""}
    done = process("attend.py", run, "--prompt", "The fox met", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert process("sample.py", run, "--tokens=20", env=env).stdout == script("sample.py", run, "--tokens=20").stdout


def test_a_reader_that_goes_away_is_no_error(run: Path) -> None:
    import subprocess
    import sys

    command = f"{sys.executable} sample.py {run} --tokens=300 --samples=40 | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "--- 1 ---\n"
    assert done.stderr == ""


def test_a_damaged_checkpoint_is_named_and_passed_over(run: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(run, folder)
    weights = folder / "checkpoints" / "000006" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    done = script("sample.py", folder, "--tokens=5")
    assert done.returncode == 0
    assert "000006" in done.stderr and "sha256" in done.stderr
    shutil.rmtree(folder / "checkpoints" / "000003")
    line = said(script("sample.py", folder, "--tokens=5"), 4)
    assert "no checkpoint" in line


def test_a_text_without_lines_or_documents_can_still_be_begun(tmp_path: Path) -> None:
    """It has one beginning only, and that follows end-of-text; a line break would be a token never seen."""
    (tmp_path / "one.txt").write_text("abcd " * 200)
    options = ("--train.steps=40", "--train.eval_every=40", "--data.tokenizer=byte", "--model.d_model=32")
    done = script("train.py", *TINY, *options, f"--data.source={tmp_path / 'one.txt'}", f"--run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    text = script("sample.py", tmp_path / "run", "--tokens=20", "--temperature=0").stdout
    assert "abcd abcd" in text
