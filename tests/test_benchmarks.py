"""The benchmarks' helpers, their list, and the shortest of their programs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ablate, common
from benchmarks.common import Worker, run_command, seconds_until, table
from benchmarks.steps import load_corpus, write_random_tokens
from model.config import PRESETS
from tests.runs import ROOT, TINY

PYTHON = [sys.executable, "-c"]


def test_time_and_memory_of_a_command_are_its_own() -> None:
    """Not those of this process, which has torch loaded; those of its children count."""
    block = "x = bytearray(200_000_000); import time; time.sleep(0.2)"
    small = run_command([*PYTHON, "print('here')"])
    large = run_command([*PYTHON, f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{block}'])"])
    assert small.output == "here\n" and small.megabytes < 60
    assert 200 < large.megabytes < 260 and large.seconds > 0.2


def test_a_failing_command_ends_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="no such thing"):
        run_command([*PYTHON, "import sys; sys.exit('no such thing')"])
    with pytest.raises(SystemExit, match=r"(?s)too soon:.*ZeroDivisionError"):
        seconds_until([*PYTHON, "1 / 0"], bool)


def test_lines_are_timed_when_they_are_printed() -> None:
    program = "import time; print('early', flush=True); time.sleep(0.5); print('late', flush=True); time.sleep(0.5)"
    result = run_command([*PYTHON, program])
    assert result.seconds > result.seconds_until("late") > result.seconds_until("early") + 0.3
    endless = "import time; time.sleep(0.3); print('now', flush=True); time.sleep(60)"
    assert 0.3 <= seconds_until([*PYTHON, endless], lambda text: "now" in text) < 30


def test_results_are_markdown_and_contain_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert table(("", "s"), [("ours", 1.5)]) == "|      |   s |\n| ---- | --: |\n| ours | 1.5 |"
    path = tmp_path / "RESULTS.md"
    for name, text in (("train", "old"), ("start", "kept\n\n| a |\n| - |"), ("train", "new")):
        common.write_section(path, name, text)
    text = path.read_text()
    assert text.startswith("# ") and "old" not in text and "| a |" in text
    assert re.findall(r"^## (\w+)\n\n(.+)", text, re.M) == [("start", "kept"), ("train", "new")]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "train.py")])
    command = common.command_line(["loss", "--nanogpt", "/home/me/nanoGPT", "--run=~/x", "--rounds", "3"])
    assert command == "python -m benchmarks.train loss --nanogpt PATH --run=PATH --rounds 3"


def test_list_names_every_benchmark() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    names = [path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def main() -> None:" in path.read_text()]
    assert {"train", "start", "prepare", "sample", "attend", "ablate"} <= set(names)
    assert all(re.search(rf"^  {name} +\S", done.stdout, re.M) for name in names if name != "__main__"), done.stdout


def test_steps_are_taken_by_a_worker(tmp_path: Path) -> None:
    write_random_tokens(tmp_path / "tokens.npy", 300, 20_000)
    data = load_corpus(tmp_path / "tokens.npy", 300)
    assert len(data.train) == 20_000 and data.tokenizer.vocab_size == 300
    command = [sys.executable, "-m", "benchmarks.steps", str(tmp_path / "tokens.npy"), "300", *TINY]
    with Worker([*command, "--data.tokenizer=byte"]) as worker:
        assert worker.ready["matrices"] > 300 * 16 and "attention" in worker.ready["settings"]
        assert worker.ask(2)["seconds"] > 0
    assert worker.process.poll() is not None


def test_ablation_reports_only_consistent_differences() -> None:
    base = [ablate.Result(1.90, 10.0), ablate.Result(1.88, 10.0), ablate.Result(1.89, 12.0)]
    rises = ((0.02, 0.01, 0.03), (0.09, -0.01, 0.05), (-0.001, -0.002, -0.003))
    others = [
        [ablate.Result(one.loss + d, 2 * one.seconds) for one, d in zip(base, rise, strict=True)] for rise in rises
    ]
    changes = [ablate.UNCHANGED, *ablate.CHANGES[:3]]
    lines = ablate.result_table(dict(zip(changes, [base, *others], strict=True))).splitlines()[2:]
    assert "worse" in lines[1] and "+0.0200" in lines[1] and "2.00 x" in lines[1]
    assert not any(word in lines[i] for i in (0, 2, 3) for word in ("worse ", "better "))
    assert "better" in ablate.result_table({changes[0]: others[0], changes[1]: base})


@pytest.mark.slow
@pytest.mark.parametrize("change", [ablate.UNCHANGED, *ablate.CHANGES], ids=lambda change: change.name)
def test_every_ablation_can_be_trained(change: ablate.Change, tmp_path: Path) -> None:
    text, before = tmp_path / "text.txt", PRESETS["glass"]
    text.write_text("the cat sat on the mat. " * 400, "utf-8")
    recipe = (*TINY, f"--data.source={text}", "--train.steps=2", "--optim.warmup_steps=1")
    result = ablate.train(change, recipe, seed=1)
    assert PRESETS["glass"] == before
    assert 0 < result.loss < 10 and result.seconds > 0
