"""What the first line of the README promises, held by a whole run: slow, and run by the continuous integration."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.files import read_metrics
from data.config import cache_folder
from data.stories import KINDS
from inspection.attention_file import read_attention_file
from model.generate import SamplingParams
from tests.data.story_parser import parse
from tests.runs import process
from training.checkpoint import open_checkpoint
from training.device import get_dist_context
from training.text_generation import encode_prompt, generate_text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder and the output of a whole quickstart."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    # The tests' own waiting policy is for a busy machine; a user has none.
    done = process("train.py", f"--run.dir={folder}", timeout=900, env={"OMP_WAIT_POLICY": ""})
    assert done.returncode == 0, done.stderr
    yield folder, done.stdout


def test_the_loss_comes_within_a_fiftieth_of_a_nat_of_the_computed_floor(quickstart: tuple[Path, str]) -> None:
    last = read_metrics(quickstart[0] / "metrics.jsonl")[-1]
    assert abs(last["final_val_loss"] - last["floor"]) < 0.02
    assert last["floor"] < last["trigram"] < last["unigram"] < last["uniform"]


def test_the_right_answer_is_preferred_in_every_family(quickstart: tuple[Path, str]) -> None:
    found = dict(re.findall(r"^  (\w+): right in ([\d.]+)% of \d+;", quickstart[1], re.M))
    assert set(found) == set(KINDS)
    assert min(map(float, found.values())) >= 95, found
    # A head is named for what it reads, or it is said that none does.
    lines = [line for line in quickstart[1].splitlines() if "right in" in line]
    outcome = r"; (head L\dH\d reads|no head puts half).*tokens? back .*nearest noun"
    assert all(re.search(outcome, line) for line in lines)
    assert len(lines) == len(KINDS) and sum("reads" in line for line in lines) >= 2


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_nine_of_ten_samples_are_sentences_of_the_grammar(quickstart: tuple[Path, str], temperature: float) -> None:
    saved = open_checkpoint(quickstart[0])
    model, tokenizer = saved.model(get_dist_context("fp32")), saved.tokenizer()
    start, count = encode_prompt(tokenizer, "", saved.documents), model.config.context - 1
    pieces = generate_text(model, tokenizer, start, count, 200, 1, SamplingParams(temperature))
    texts = ["".join(written) for written in zip(*pieces, strict=True)]
    good = sum(is_story(text) for text in texts)
    # At the default temperature 90%; at 1, where every rare token gets its full chance, most of them.
    assert good >= (180 if temperature < 1 else 150)
    assert len(set(texts)) > 190


def is_story(text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True


def test_the_dumps_follow_the_heads_through_training(quickstart: tuple[Path, str]) -> None:
    files = sorted((quickstart[0] / "attention").glob("*.safetensors"))
    train = open_checkpoint(quickstart[0]).config.train
    # One at every evaluation, the untrained model's first.
    assert [int(file.stem) for file in files] == list(range(0, train.steps + 1, train.eval_every))
    first, last = read_attention_file(files[0]), read_attention_file(files[-1])
    assert int(first.metadata["tokens_seen"]) < int(last.metadata["tokens_seen"])
    assert set(last.scores) == set(first.scores) > {"induction", "previous_token", "antecedent.pronoun"}
    untrained = {text.name: text for text in first.texts}
    for after in last.texts:
        if after.name not in untrained or after.name.startswith("repeat"):
            continue  # the sample differs, and random tokens are unlike anything in a story
        before = untrained[after.name]
        assert np.abs(after.pattern().sum(axis=-1) - 1).max() < 0.01  # stored in f16
        assert after.loss.mean() < before.loss.mean() + 0.05


def test_the_sentence_names_a_head_only_with_its_effect(quickstart: tuple[Path, str]) -> None:
    (sentence,) = re.findall(r"^(By step \d+ head.*|No head passes.*)$", quickstart[1], re.M)
    named = r"heads? L\dH\d.* reads? .*without (it|them) the .* by [\d.]+ nats \[95 %: .*\], without .* other head"
    assert sentence.startswith("No head passes") or re.search(named, sentence)
    page = (quickstart[0] / "attention.html").read_text("utf-8")
    assert json.dumps(sentence)[1:-1] in page and len(page) < 5_000_000


def test_every_number_in_the_dumps_can_be_computed_again(quickstart: tuple[Path, str]) -> None:
    done = process("attend.py", "verify", quickstart[0])
    assert done.returncode == 0, done.stdout
    assert "all checks hold" in done.stdout and "scores recomputed" in done.stdout


def test_shakespeare_by_character_beats_the_recipe_it_is_compared_with(tmp_path: Path) -> None:
    if not (cache_folder() / "tinyshakespeare.txt").is_file():
        pytest.skip("Tiny Shakespeare is not in the cache, and tests use no network")
    argv = ("configs/shakespeare_char.toml", f"--run.dir={tmp_path / 'run'}")
    done = process("train.py", *argv, timeout=900, env={"OMP_WAIT_POLICY": ""})
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["final_val_loss"] <= 1.898
