"""docs/guarantees.md and docs/running.md are true: every named test file exists, every command parses."""

from __future__ import annotations

import re

import pytest

from tests.commands import check_command
from tests.runs import ROOT

GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
RUNNING = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
COMMANDS = sorted({line.split("#")[0].strip() for line in RUNNING.splitlines() if line.startswith("python ")})


def test_every_guarantee_names_an_existing_test() -> None:
    rows = [line for line in GUARANTEES.splitlines() if line.startswith("| ") and not line.startswith("| guarantee")]
    assert len(rows) > 20
    for row in rows:
        files = re.findall(r"`(tests/[\w/]+\.py)`", row.split(" | ")[-1])
        assert files, row
        assert not [file for file in files if not (ROOT / file).is_file()], row


@pytest.mark.parametrize("command", [command for command in COMMANDS if "$" not in command])
def test_every_command_parses(command: str) -> None:
    check_command(command)


def test_torchrun_commands_parse() -> None:
    joined = RUNNING.replace("\\\n", " ")
    started = re.findall(r"^(?:srun )?torchrun .*?(train\.py [^\n]*)$", joined, re.M)
    assert len(started) >= 4
    for command in started:
        if "$" not in command:
            check_command(f"python {command}")


def test_links_lead_to_files() -> None:
    for text in (GUARANTEES, RUNNING):
        assert not [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (ROOT / "docs" / link).exists()]
    assert not [link for link in re.findall(r"\]\(([^)#:]+)\)", CONTRIBUTING) if not (ROOT / link).exists()]


def test_contributing_names_existing_files() -> None:
    named = re.findall(r"`([\w/]+\.py)`", CONTRIBUTING)
    assert len(named) > 8
    assert not [name for name in named if not (ROOT / name).is_file()]
