"""docs/attention.md: quoted lines are in the code, numbers are recomputed, examples work."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import attend
from inspection.attention_file import read_attention_file
from inspection.head_scores import value_weighted
from model import functional
from tests.runs import ROOT, python

GUIDE = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", GUIDE, re.M | re.S)


def section(title: str) -> str:
    return GUIDE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_quoted_lines_are_in_the_model() -> None:
    code = "\n".join((ROOT / "model" / name).read_text(encoding="utf-8") for name in ("functional.py", "gpt.py"))
    quoted = [line.strip() for language, block in BLOCKS if language == "python" for line in block.splitlines()]
    assert len(quoted) >= 5 and not [line for line in quoted if line not in code]


def test_numbers_of_the_example_are_computed() -> None:
    x = torch.tensor([1.0, 2.0, 3.0])[None, None, :, None]
    scores = (x @ x.transpose(-2, -1))[0, 0]
    pattern = functional.attention_pattern(x, x)
    exponentials = [(row - row.max()).exp() for row in (scores[i, : i + 1] for i in range(3))]
    expected = [*scores.flatten(), torch.tensor(math.sqrt(1))]
    expected += [number for row in exponentials for number in (*row, row.sum())]
    output = (pattern @ x)[0, 0]
    expected += [number for i in range(3) for number in (*pattern[0, 0, i, : i + 1], output[i])]
    assert re.findall(r"-?\d+\.\d+", section("By hand")) == [f"{float(number):.4f}" for number in expected]


def test_value_weighted_example() -> None:
    (paragraph,) = [text for text in section("How not to read it").split("\n\n") if "0.9000 and 0.1000" in text]
    *given, first, second = map(float, re.findall(r"\d+\.\d{4}", paragraph))
    weighted = value_weighted(np.array(given[:2]), np.array(given[2:]))
    assert weighted.tolist() == pytest.approx([first, second], abs=5e-5)


def test_all_commands_are_in_the_guide() -> None:
    assert not [name for name in attend.COMMANDS if f"python attend.py {name} " not in GUIDE]


def test_reading_example_runs_without_torch(trained: Path) -> None:
    path = trained / "attention" / "000006.safetensors"
    (example,) = [block for _, block in BLOCKS if "inspection.attention_file import" in block]
    code = re.sub(r"runs/quickstart/attention/\d+\.safetensors", path.as_posix(), example)
    code = "import sys; sys.modules['torch'] = None\n" + code
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{read_attention_file(path).texts[0].name} ")
