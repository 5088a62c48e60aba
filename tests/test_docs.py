"""The documents are true: commands parse, files and tests exist, the README's code lines are in the model."""

import re

import pytest

from tests.commands import check_command
from tests.runs import ROOT

GUIDES = ("python", "fine_tuning", "exporting", "large_data", "from_nanogpt", "troubleshooting")
NAMES = ("README.md", "CONTRIBUTING.md", "docs/guarantees.md", "docs/running.md", "docs/attention.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README, CONTRIBUTING, GUARANTEES, RUNNING, ATTENTION = TEXTS.values()
TEXTS |= {f"docs/{name}.md": (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in GUIDES}
CODE = {name: "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)) for name, text in TEXTS.items()}
LINES = [line for name, code in CODE.items() if name != "CONTRIBUTING.md" for line in code.splitlines()]
PARTS = [part.strip() for line in LINES for part in line.split("#")[0].split("&&")]
TORCHRUN = re.findall(r"^(?:srun )?torchrun .*?(train\.py [^\n]*)$", RUNNING.replace("\\\n", " "), re.M)
COMMANDS = [part for part in PARTS if part.startswith(("python ", "pip "))] + [f"python {each}" for each in TORCHRUN]


@pytest.mark.parametrize("command", sorted({command for command in COMMANDS if "$" not in command}))
def test_every_command_parses(command: str) -> None:
    check_command(command)


def test_commands_are_found() -> None:
    assert "pip install -r requirements.txt && python train.py" in README
    assert "pip install -r requirements-dev.txt && python -m pytest" in README
    assert len(TORCHRUN) >= 4 and len(COMMANDS) > 20


def test_every_guarantee_names_an_existing_test() -> None:
    rows = [line for line in GUARANTEES.splitlines() if line.startswith("| ") and not line.startswith("| guarantee")]
    assert len(rows) > 20
    for row in rows:
        files = re.findall(r"`(tests/[\w/]+\.py)`", row.split(" | ")[-1])
        assert files and all((ROOT / file).is_file() for file in files), row


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files(name: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    assert not [link for link in links if not (ROOT / name).parent.joinpath(link).exists()]


def test_named_modules_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)`", CONTRIBUTING)
    for line in README.split("## How it is built")[1].split("```")[1].splitlines()[2:]:
        folder = line.split("/")[0].strip()
        named += [folder, *(f"{folder}/{name}" for name in re.findall(r"\b(\w+\.py)\b", line))]
    assert len(named) > 30
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize(
    "step",
    [
        "q, k, v = self.qkv(x).unflatten(-1, (H + 2 * G, D)).transpose(1, 2).split([H, G, G], dim=1)",
        "scores = q @ k.transpose(-2, -1)",
        "scores / math.sqrt(q.shape[-1])",
        "(scores + bias).softmax(dim=-1)",
        "F.dropout(self.pattern(q, k), dropout) @ v",
    ],
)
def test_the_five_steps_are_in_the_code(step: str) -> None:
    code = (ROOT / "model" / "functional.py").read_text() + (ROOT / "model" / "gpt.py").read_text()
    assert step in code and step in README


def test_every_requirement_is_pinned() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            assert not line or line.startswith(("#", "-r ")) or re.fullmatch(r"[\w-]+==[\w.]+", line), line
