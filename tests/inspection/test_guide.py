"""docs/attention.md holds: its lines stand in the code, its numbers are recomputed, what it says is tried."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attend
from inspection import head_scores as metrics
from inspection.activation_cache import run_with_cache, run_with_cache_batch
from inspection.attention_file import AttentionRecord, write_attention_file
from model import functional
from model.config import ModelConfig
from model.gpt import GPT
from tests.commands import check_command

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", GUIDE, re.M | re.S)
COMMANDS = sorted(
    {line.split("#")[0].strip() for _, block in BLOCKS for line in block.splitlines() if line.startswith("python ")}
    | set(re.findall(r"`(python (?:-m )?[\w./]+ [^`]+)`", GUIDE))
)


def section(title: str) -> str:
    return GUIDE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def small(**settings: object) -> GPT:
    """A model with random weights everywhere, so that no head is idle."""
    shape: dict[str, object] = {"n_layers": 2, "n_heads": 2, "d_model": 16, "context": 32, "attention": "eager"}
    model = GPT(ModelConfig(**{**shape, **settings}), 50)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


def test_every_quoted_line_stands_in_the_model() -> None:
    code = "\n".join((ROOT / "model" / name).read_text(encoding="utf-8") for name in ("functional.py", "gpt.py"))
    lines = {line.strip() for line in code.splitlines()}
    quoted = [line for language, block in BLOCKS if language == "python" for line in block.splitlines()]
    assert len(quoted) >= 5
    assert not [line for line in quoted if line.strip() not in lines]


def test_each_of_the_five_steps_has_its_line() -> None:
    steps = re.split(r"^\*\*\d\. ", section("The five steps"), flags=re.M)[1:]
    assert len(steps) == 5
    for step, operation in zip(steps, ("self.qkv(x)", "q @ k", "math.sqrt(D)", "softmax", "@ v"), strict=True):
        assert operation in step.split("```python")[1].split("```")[0]


def test_every_number_of_the_example_is_what_the_model_computes() -> None:
    x = torch.tensor([1.0, 2.0, 3.0])[None, None, :, None]
    scores = (x @ x.transpose(-2, -1) / math.sqrt(1))[0, 0]
    weights = functional.attention_pattern(x, x)
    below = [scores[i, : i + 1] for i in range(3)]
    powers = [(row - row.max()).exp() for row in below]
    expected = [*scores.flatten(), torch.tensor(1.0)]
    expected += [number for row in powers for number in (*row, row.sum())]
    taken = (weights @ x)[0, 0]
    expected += [number for i in range(3) for number in (*weights[0, 0, i, : i + 1], taken[i])]
    written = re.findall(r"-?\d+\.\d+", section("By hand"))
    assert written == [f"{float(number):.4f}" for number in expected]


def test_a_high_weight_on_a_short_value_moves_what_is_said() -> None:
    paragraph = section("How not to read it").split("**A high weight")[1].split("\n\n")[0]
    *given, first, second = map(float, re.findall(r"\d+\.\d{4}", paragraph))
    moved = metrics.value_weighted(torch.tensor([[given[:2], given[:2]]]), torch.tensor([given[2:]]))
    assert moved[0, 1].tolist() == pytest.approx([first, second], abs=5e-5)


@pytest.mark.parametrize("preset", ["glass", "gpt2", "qwen3"])
def test_what_it_reads_cannot_depend_on_a_word_that_comes_later(preset: str) -> None:
    words = ["the", "animal", "did", "not", "cross", "the", "street", "because", "it", "was", "too", "tired"]
    number = {word: k for k, word in enumerate(sorted({*words, "wide"}))}
    tired = torch.tensor([number[word] for word in words])
    wide = torch.tensor([number[word] for word in [*words[:-1], "wide"]])
    model, it = small(preset=preset), words.index("it")
    patterns = [run_with_cache(model, tokens).pattern for tokens in (tired, wide)]
    assert torch.equal(patterns[0][:, :, it], patterns[1][:, :, it])  # to the last bit, in every layer and head
    assert not torch.equal(patterns[0][:, :, -1], patterns[1][:, :, -1])  # where the difference has been read


def test_definitions_of_induction_differ_by_a_factor_of_two() -> None:
    n = 30
    tokens = torch.cat([torch.tensor([n]), torch.arange(n), torch.arange(n)])
    T = len(tokens)
    pattern = torch.zeros(T, T)
    second = torch.arange(n + 1, T)
    pattern[second, second - n + 1] = 1
    assert metrics.induction(pattern, tokens) == 1
    assert pattern.sum() / T == pytest.approx(0.5, abs=0.01)


def test_the_cost_table_says_what_the_weights_take() -> None:
    rows = re.findall(r"^\| (\d+) \| ([\d.,]+) \| ([\d.]+) \|$", section("What it costs"), re.M)
    assert [int(T) for T, _, _ in rows] == [128, 256, 512, 1024, 2048, 4096]
    for T, _, megabytes in rows:
        assert float(megabytes) == pytest.approx(4 * 4 * int(T) ** 2 / 1e6, abs=0.05)
    times = [float(ms.replace(",", "")) for _, ms, _ in rows]
    assert times == sorted(times)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command: str) -> None:
    check_command(command)


def test_the_commands_are_all_there() -> None:
    named = {command.split()[2] for command in COMMANDS if command.startswith("python attend.py")}
    assert named - {"RUN"} == set(attend.COMMANDS)


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", GUIDE)
    assert links and not [link for link in links if not (ROOT / "docs" / link).exists()]


def test_the_reading_example_runs_without_torch(tmp_path: Path) -> None:
    seen = run_with_cache_batch(small(), [[1, 2, 3, 4]])
    file = tmp_path / "a.safetensors"
    words = {1: b"<", 2: b"a", 3: b" b", 4: b"\xff"}
    record = AttentionRecord.from_cache("held-out 1", seen[0], words.__getitem__)
    write_attention_file(file, [record], {"step": "1"})
    example = next(
        block for _, block in BLOCKS if block.startswith("from inspection.attention_file import read_attention_file")
    )
    path = "runs/quickstart/attention/000540.safetensors"
    assert path in example
    code = "import sys; sys.modules['torch'] = None\n" + example.replace(path, file.as_posix())
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("held-out 1 (2, 2, 4, 4)")
