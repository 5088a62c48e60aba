"""A small trained run, which the tests of the commands look at."""

from pathlib import Path

import pytest

from tests.runs import TINY, output

PROMPTS = "The hen met the fox. The\nThe hen met the fox. The\t hen\t fox\nThe fox met the hen. The\t fox\t hen\n"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with attention files of steps 0, 3 and 6, and checkpoints of the last two."""
    root = tmp_path_factory.mktemp("trained")
    (root / "text.txt").write_text("The fox met the hen. The hen met the fox. " * 60)
    (root / "prompts.txt").write_text(PROMPTS)
    options = (f"--data.source={root / 'text.txt'}", f"--log.prompts={root / 'prompts.txt'}", "--model.context=32")
    output("train.py", *TINY, *options, f"--run.dir={root / 'run'}")
    return root / "run"
