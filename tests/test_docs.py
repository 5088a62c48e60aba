"""docs/promises.md and docs/running.md hold: every named test is there, every command is understood."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.commands import check_command

ROOT = Path(__file__).parent.parent
PROMISES = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
RUNNING = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PROMISES)))
COMMANDS = sorted({line.split("#")[0].strip() for line in RUNNING.splitlines() if line.startswith("python ")})


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_every_promise_has_its_test(file: str, name: str) -> None:
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.M)


def test_every_row_of_promises_names_a_test() -> None:
    rows = [line for line in PROMISES.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 25
    assert not [row for row in rows if "`tests/" not in row.split(" | ")[-1]]


@pytest.mark.parametrize("command", [command for command in COMMANDS if "$" not in command])
def test_every_command_is_understood(command: str) -> None:
    check_command(command)


def test_what_torchrun_starts_is_understood() -> None:
    joined = RUNNING.replace("\\\n", " ")
    started = re.findall(r"^(?:srun )?torchrun .*?(train\.py [^\n]*)$", joined, re.M)
    assert len(started) >= 4
    for command in started:
        if "$" not in command:
            check_command(f"python {command}")


def test_every_link_leads_to_a_file() -> None:
    for text in (PROMISES, RUNNING):
        assert not [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (ROOT / "docs" / link).exists()]
