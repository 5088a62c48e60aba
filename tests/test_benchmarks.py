"""The benchmarks' own instruments: what they measure, how they judge, what they leave in RESULTS.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ablate, ceilings, nanogpt, results
from benchmarks.side_by_side import Target, Worker, alternate, spend, spread, table, targets
from benchmarks.start import seconds_until
from benchmarks.steps import corpus, matrix_parameters, random_tokens
from benchmarks.training import Trained
from model.config import PRESETS, ModelConfig
from model.gpt import GPT
from tests.runs import ROOT, TINY


def benchmark(*words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def test_contestants_take_turns_and_everybody_is_first_once() -> None:
    order: list[str] = []
    found = alternate({name: lambda name=name: order.append(name) or len(order) for name in "abc"}, 3)  # type: ignore[misc]
    assert order == list("abcbcacab")
    assert found["a"] == [1, 6, 8]


def test_the_time_and_the_memory_of_a_command_are_its_own() -> None:
    """Not those of the process that starts it, which has torch loaded; and those of its children count."""
    block = "x = bytearray(200_000_000); import time; time.sleep(0.2)"
    small = spend([sys.executable, "-c", "print('here')"])
    large = spend([sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{block}'])"])
    assert small.output == "here\n" and small.megabytes < 60
    assert 200 < large.megabytes < 260
    assert large.seconds > 0.2


def test_a_command_that_fails_ends_the_benchmark_with_what_it_said() -> None:
    program = [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    with pytest.raises(SystemExit, match="no such thing"):
        spend(program)
    assert spend(program, allowed=(1,)).code == 1


def test_the_time_of_a_line_is_that_of_its_coming() -> None:
    """Not that of the command's end, nor of a later line with the same word."""
    said = "print('early', flush=True); time.sleep(0.5); print('late', flush=True); time.sleep(0.5); print('late')"
    spent = spend([sys.executable, "-c", f"import time; {said}"])
    assert spent.output == "early\nlate\nlate\n"
    assert 0.5 <= spent.until("late") - spent.until("early") < 0.9
    assert spent.seconds - spent.until("late") > 0.4
    with pytest.raises(StopIteration):
        spent.until("never")


def test_a_worker_answers_and_is_gone_afterwards() -> None:
    program = "import sys\nprint('chatter')\nprint('{\"ready\": 1}', flush=True)\n"
    program += "for line in sys.stdin: print('{\"twice\": %d}' % (2 * int(line)), flush=True)"
    with Worker([sys.executable, "-c", program]) as worker:
        assert worker.ready == {"ready": 1}
        assert worker.ask(21) == {"twice": 42}
    assert worker.process.poll() is not None


def test_the_clock_stops_when_what_was_waited_for_is_printed() -> None:
    program = "import time; time.sleep(0.3); print('now', flush=True); time.sleep(60)"
    took = seconds_until([sys.executable, "-c", program], lambda text: "now" in text)
    assert 0.3 <= took < 30
    with pytest.raises(SystemExit, match=r"(?s)too soon:.*ZeroDivisionError"):
        seconds_until([sys.executable, "-c", "1 / 0"], bool)


def test_tables_are_markdown_and_targets_are_judged_both_ways() -> None:
    assert table(("", "s"), [("ours", 1.5)]) == "|      |   s |\n| ---- | --: |\n| ours | 1.5 |"
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00-3.00)" and spread([1.0]) == "1.00"
    judged = [Target("a", 1.0, 2.0, at_most=True), Target("b", 1.0, 2.0), Target("c", 2.0, 2.0)]
    assert [one.held for one in judged] == [True, False, True]
    assert targets(judged).count("NO") == 1


def test_a_section_of_the_results_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    for name, text in (("train", "old"), ("start", "kept\n\n| a |\n| - |"), ("train", "new")):
        results.write_section(page, name, text)
    text = page.read_text()
    assert text.startswith("# ") and "old" not in text
    assert re.findall(r"^## (\w+)\n\n(.+)", text, re.M) == [("start", "kept"), ("train", "new")]
    assert "| a |" in text and os.listdir(tmp_path) == ["RESULTS.md"]


def test_what_is_recorded_names_no_path_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "train.py")])
    told = results.command_line(["loss", "--nanogpt", "/home/me/nanoGPT", "--run=~/x", "--rounds", "3"])
    assert told == "python -m benchmarks.train loss --nanogpt PATH --run=PATH --rounds 3"


def test_operations_are_counted_as_nanogpt_counts_them() -> None:
    """Its estimate for its own shape: 6 N + 12 L H Q T, N without the positions."""
    model = GPT(ModelConfig("gpt2", n_layers=6, n_heads=6, d_model=384, context=256, attention="sdpa"), 65)
    matrices = matrix_parameters(model)
    assert matrices == 12 * 6 * 384**2 + 65 * 384
    assert ceilings.flops_per_token(matrices, 6, 384, 256) == 6 * matrices + 12 * 6 * 6 * 64 * 256
    shapes = ceilings.gpt_matrices(6, 384, 65)
    assert sum(rows * columns for rows, columns in shapes) == matrices


def test_ceilings_are_of_a_sensible_size() -> None:
    assert 1e8 < ceilings.product_speed(64, 64, 64, torch.float32, seconds=0.01) < 1e14
    assert 1e8 < ceilings.stream_speed(gigabytes=0.02, seconds=0.01) < 1e13
    assert 1e7 < ceilings.vector_speed([(256, 256)], torch.bfloat16, seconds=0.01) < 1e13


def test_random_tokens_are_a_corpus_without_ends(tmp_path: Path) -> None:
    random_tokens(tmp_path / "tokens.npy", 300, 20_000)
    data = corpus(tmp_path / "tokens.npy", 300)
    tokens = data.train.tokens
    assert len(tokens) == 20_000 and tokens.max() == 298 == data.tokenizer.end_of_text - 1


def test_what_is_no_clone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no clone of nanoGPT"), nanogpt.copied(tmp_path):
        pass


def test_the_list_names_every_benchmark() -> None:
    done = benchmark("benchmarks")
    names = [path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def main() -> None:" in path.read_text()]
    assert {"train", "start", "prepare", "gpu", "attend"} <= set(names)
    assert all(re.search(rf"^  {name} +\S", done.stdout, re.M) for name in names if name != "__main__"), done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
def test_without_a_gpu_its_benchmark_says_so_in_a_line() -> None:
    done = benchmark("benchmarks.gpu")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: there is no CUDA here; --smoke runs the same code with tiny shapes on the processor"
    ]


@pytest.mark.slow
def test_what_runs_on_a_gpu_runs_on_the_processor_with_tiny_shapes() -> None:
    done = benchmark("benchmarks.gpu", "--smoke", "--rounds=1")
    assert done.returncode == 0, done.stderr
    for part in ("of the peak", "GB/s of weights", "until a loss of"):
        assert part in done.stdout


def test_an_ablation_calls_only_what_every_seed_says() -> None:
    base = [Trained(1.90, 10.0), Trained(1.88, 10.0), Trained(1.89, 12.0)]
    worse, mixed, small = (
        [Trained(one.loss + rise, 2 * one.seconds) for one, rise in zip(base, rises, strict=True)]
        for rises in ((0.02, 0.01, 0.03), (0.09, -0.01, 0.05), (-0.001, -0.002, -0.003))
    )
    changes = [ablate.UNCHANGED, *ablate.CHANGES[:3]]
    page = ablate.described(dict(zip(changes, [base, worse, mixed, small], strict=True)))
    verdicts = {change.name: next(row for row in page.splitlines() if change.name in row) for change in changes}
    assert "worse" in verdicts[changes[1].name] and "+0.0200" in verdicts[changes[1].name]
    assert "2.00 x" in verdicts[changes[1].name]
    assert not any(word in verdicts[one.name] for one in (changes[0], *changes[2:]) for word in ("worse ", "better "))
    better = ablate.described({changes[0]: worse, changes[1]: base})
    assert "better" in better


@pytest.mark.parametrize("change", [ablate.UNCHANGED, *ablate.CHANGES], ids=lambda change: change.name)
def test_every_ablation_can_be_trained(change: ablate.Change, tmp_path: Path) -> None:
    """Two steps of a tiny model; the preset is as it was afterwards."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 400, "utf-8")
    before = PRESETS["glass"]
    recipe = (*TINY, f"--data.source={text}", "--train.steps=2", "--optim.warmup_steps=1")
    try:
        found = ablate.learned(change, recipe, seed=1)
    finally:
        assert PRESETS["glass"] == before
    assert 0 < found.loss < 10 and found.seconds > 0
