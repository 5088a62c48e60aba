"""The README is true: its commands parse, its files exist, its code lines are in the model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.commands import check_command

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
COMMANDS = sorted(
    {
        part.strip()
        for block in BLOCKS
        for line in block.splitlines()
        for part in line.split("#")[0].split("&&")
        if part.strip().startswith(("python ", "pip "))
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command: str) -> None:
    check_command(command)


def test_the_two_commands() -> None:
    assert "pip install -r requirements.txt && python train.py" in README
    assert "pip install -r requirements-dev.txt && python -m pytest" in README


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_every_named_module_is_there() -> None:
    tree = README.split("## How it is built")[1].split("```")[1]
    for line in tree.splitlines()[2:]:
        folder = line.split("/")[0].strip()
        assert (ROOT / folder).is_dir()
        for name in re.findall(r"\b(\w+\.py)\b", line):
            assert (ROOT / folder / name).is_file(), f"{folder}/{name}"


def test_the_five_steps_are_in_the_code() -> None:
    code = (ROOT / "model" / "functional.py").read_text() + (ROOT / "model" / "gpt.py").read_text()
    for step in (
        "q, k, v = self.qkv(x).unflatten(-1, (H + 2 * G, D)).transpose(1, 2).split([H, G, G], dim=1)",
        "scores = q @ k.transpose(-2, -1)",
        "scores / math.sqrt(q.shape[-1])",
    ):
        assert step in code and step in README
    for piece in (
        "(scores + bias).softmax(dim=-1)",
        "F.dropout(self.pattern(q, k), dropout) @ v",
    ):
        assert piece in code and piece in README


def test_the_pictures_are_small() -> None:
    for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / link).stat().st_size < 400_000


def test_every_requirement_is_pinned() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            assert not line or line.startswith(("#", "-r ")) or re.fullmatch(r"[\w-]+==[\w.]+", line), line
